from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.data import CountsLoader
from cellstill.errors import TrainingError
from cellstill.train.fit import fit, seeded

COUNTS = sp.csr_matrix(np.ones((200, 2), dtype=np.float32))


class Line(torch.nn.Module):
    """Least squares of y on x: the optimum is known in closed form."""

    global_parameters = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def loss(self, batch):
        return (self.linear(batch["x"]).squeeze(1) - batch["y"]).square()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    y = x @ [1.0, -2.0, 0.5] + 3 + rng.normal(scale=0.1, size=200)
    return {"x": x, "y": y}


def loaders(data, batch_size=32):
    return (
        CountsLoader(COUNTS, data, indices=np.arange(150), shuffle=True, batch_size=batch_size),
        CountsLoader(COUNTS, data, indices=np.arange(150, 200)),
    )


def test_reaches_the_least_squares_solution(data):
    with seeded(0):
        line = Line()
        history = fit(line, *loaders(data), max_epochs=200, lr=0.02, patience=None, accelerator="cpu")
    design = np.c_[data["x"][:150], np.ones(150)]
    solution = np.linalg.lstsq(design, data["y"][:150], rcond=None)[0]
    found = np.append(line.linear.weight.detach().numpy().ravel(), line.linear.bias.item())
    np.testing.assert_allclose(found, solution, atol=0.03)
    assert list(history.columns) == ["train_loss", "validation_loss"]
    assert history.index.name == "epoch"
    assert len(history) == 200


def test_losses_are_means_over_cells_not_over_minibatches(data):
    line = Line()
    for parameter in line.parameters():
        torch.nn.init.zeros_(parameter)
    history = fit(line, *loaders(data, batch_size=64), max_epochs=1, lr=0.0, accelerator="cpu")
    assert history.loc[0, "train_loss"] == pytest.approx(np.square(data["y"][:150]).mean(), rel=1e-5)
    assert history.loc[0, "validation_loss"] == pytest.approx(np.square(data["y"][150:]).mean(), rel=1e-5)


def test_ends_with_the_weights_of_the_best_epoch_and_stops_after_patience(data):
    noisy = {"x": data["x"], "y": np.random.default_rng(1).normal(size=200)}
    with seeded(0):
        line = Line()
        train, validation = loaders(noisy)
        history = fit(line, train, validation, max_epochs=500, lr=0.5, patience=5, accelerator="cpu")
    best = history["validation_loss"].idxmin()
    assert len(history) == best + 1 + 5
    with torch.no_grad():
        loss = line.loss(validation.gather(np.arange(150, 200))).mean().item()
    assert loss == pytest.approx(history["validation_loss"].min(), rel=1e-5)
    assert not line.training


def test_without_validation_the_training_loss_is_watched(data):
    with seeded(0):
        history = fit(Line(), loaders(data)[0], max_epochs=300, lr=0.2, patience=3, accelerator="cpu")
    assert list(history.columns) == ["train_loss"]
    assert len(history) == history["train_loss"].idxmin() + 1 + 3


def test_a_loss_that_is_not_finite_stops_with_the_epoch_and_the_remedy(data):
    data["y"][3] = np.nan
    with pytest.raises(TrainingError, match="loss is nan in epoch 0.*smaller lr"):
        fit(Line(), *loaders(data), max_epochs=3, accelerator="cpu")


def test_zero_epochs_change_nothing(data):
    line = Line()
    before = line.linear.weight.detach().clone()
    assert fit(line, *loaders(data), max_epochs=0, accelerator="cpu").empty
    torch.testing.assert_close(line.linear.weight, before)


def test_seeded_is_reproducible_and_leaves_the_callers_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with seeded(1):
        first = torch.rand(3)
    torch.testing.assert_close(torch.rand(3), expected)
    with seeded(1):
        torch.testing.assert_close(torch.rand(3), first)


def test_an_interrupt_reaches_the_caller_as_such(data):
    class Interrupted(Line):
        def loss(self, batch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(), *loaders(data), max_epochs=2, accelerator="cpu")


def test_global_parameters_learn_faster_and_do_not_decay():
    class Pair(torch.nn.Module):
        global_parameters = frozenset({"apart"})

        def __init__(self) -> None:
            super().__init__()
            self.apart, self.weight = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))

        def loss(self, batch):
            return (self.apart + self.weight).expand(len(batch["rows"])) * 1e-3

    pair = Pair()
    fit(pair, CountsLoader(COUNTS, batch_size=200), max_epochs=10, lr=1e-3, patience=None, accelerator="cpu")
    assert 1 - pair.apart.item() == pytest.approx(10 * (1 - pair.weight.item()), rel=0.05)
    pair = Pair()
    fit(pair, CountsLoader(COUNTS, batch_size=200), max_epochs=1, lr=1e-3, weight_decay=100.0, accelerator="cpu")
    assert pair.weight.item() < 0.91
    assert pair.apart.item() > 0.98


def test_an_unknown_accelerator():
    with pytest.raises(ValueError, match="accelerator='mps' is not known"):
        fit(Line(), CountsLoader(COUNTS), max_epochs=1, accelerator="mps")
