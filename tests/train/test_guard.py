from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cellstill.data import CountsLoader
from cellstill.errors import TrainingError
from cellstill.train import Loss, fit, loop, seeded
from cellstill.train.guard import cut

NAMES = [f"cell-{i}" for i in range(200)]


@pytest.fixture(params=[1, 64], ids=["seen_at_once", "seen_late"])
def _checks(request, monkeypatch):
    """On a GPU a loss is looked at every 64 steps only; what is reported has to be the same."""
    monkeypatch.setattr(loop, "steps_per_check", lambda device: request.param)


def where_is(cell: int, epoch: int, batch_size: int = 32) -> int:
    """Minibatch of a training cell, from the rule of shuffling alone."""
    order = np.random.default_rng((0, epoch)).permutation(np.arange(150))
    return int(np.flatnonzero(order == cell)[0]) // batch_size


def message(*args, **kwargs) -> str:
    with pytest.raises(TrainingError) as error:
        fit(*args, accelerator="cpu", **kwargs)
    return str(error.value)


@pytest.mark.usefixtures("_checks")
def test_a_cell_that_is_not_finite_is_named_with_its_minibatch(new_line, data, loaders):
    data["y"][17] = np.nan
    line = new_line()
    before = {name: tensor.clone() for name, tensor in line.state_dict().items()}
    said = message(line, *loaders(data), max_epochs=3, obs_names=NAMES)
    assert said.startswith(
        f"train_loss is nan in epoch 0, batch {where_is(17, 0)} of train, because of its cells 17 ('cell-17'). "
    )
    assert "The weights are those of the start." in said
    assert "smaller lr" in said
    assert not line.training
    assert all(torch.equal(before[name], tensor) for name, tensor in line.state_dict().items())


@pytest.mark.usefixtures("_checks")
@pytest.mark.parametrize("record", ["scalar", "scalar_with_terms"])
def test_the_cells_and_term_of_a_scalar_loss_are_found(new_line, data, loaders, record):
    class Scalar(new_line):
        def loss(self, batch):
            fit = super().loss(batch)
            prior = torch.log(batch["y"] - batch["y"] + batch["ok"])
            total = fit.mean() + prior.mean()
            terms = {"fit": fit.detach().sum(), "prior": prior.detach().sum()}
            return Loss(total, None, len(fit), terms if record == "scalar_with_terms" else {})

    data["ok"] = np.ones(200)
    data["ok"][[3, 60]] = -1
    said = message(Scalar(), *loaders(data, batch_size=150), max_epochs=3)
    term = " (term 'prior')" if record == "scalar_with_terms" else ""
    order = np.random.default_rng((0, 0)).permutation(np.arange(150))
    first, second = sorted([3, 60], key=order.tolist().index)
    assert said.startswith(f"train_loss is nan{term} in epoch 0, batch 0 of train, because of its cells ")
    assert f"its cells {first}, {second}. " in said


@pytest.mark.usefixtures("_checks")
@pytest.mark.parametrize("per_cell", [True, False])
def test_a_gradient_that_is_not_finite_is_found_at_its_own_step(new_line, data, loaders, per_cell):
    """The loss of the step is finite; only the one after it is not, and after the last step of an epoch none is."""

    class Root(new_line):
        def loss(self, batch):
            # At 0 the root is 0 and its slope infinite.
            root = (self.linear.weight.sum() * batch["zero"]).abs().sqrt()
            loss = super().loss(batch) + root
            return loss if per_cell else Loss(loss.mean(), None, len(loss))

    data["zero"] = np.ones(200)
    for epoch in range(2):
        order = np.random.default_rng((0, epoch)).permutation(np.arange(150))
        for cell in (order[0], order[40], order[-1]):
            data["zero"][:] = 1
            data["zero"][cell] = 0
            batch = where_is(int(cell), 0)
            said = message(Root(), *loaders(data), max_epochs=2, lr=1e-4)
            assert said.startswith("The gradient of 'linear.weight' is not finite while train_loss is ")
            assert f" in epoch 0, batch {batch} of train, because of its cells {cell}. " in said


@pytest.mark.usefixtures("_checks")
def test_without_validation_the_last_step_of_an_epoch_is_looked_at_too(new_line, data, loaders):
    class Root(new_line):
        def loss(self, batch):
            return super().loss(batch) + (self.linear.weight.sum() * batch["zero"]).abs().sqrt()

    cell = np.random.default_rng((0, 0)).permutation(np.arange(150))[-1]
    data["zero"] = np.ones(200)
    data["zero"][cell] = 0
    line = Root()
    said = message(line, loaders(data)[0], max_epochs=1, lr=1e-4)
    assert f"in epoch 0, batch 4 of train, because of its cells {cell}. " in said
    assert line.linear.weight.isfinite().all()


@pytest.mark.usefixtures("_checks")
def test_the_step_of_a_random_failure_is_found_by_repeating_the_random_numbers(data, loaders):
    class Unlucky(torch.nn.Module):
        global_parameters = frozenset()

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.drawn = []

        def loss(self, batch):
            draws = torch.rand(len(batch["rows"]))
            if self.training:
                self.drawn.append(draws)
            return torch.where(draws > 0.999, torch.nan, self.weight)

    module = Unlucky()
    with seeded(3):
        said = message(module, loaders(data)[0], max_epochs=50)
    failed = [i for i, draws in enumerate(module.drawn) if (draws > 0.999).any()]
    epoch, batch = divmod(failed[0], 5)
    assert epoch > 0
    row = int((module.drawn[failed[0]] > 0.999).nonzero()[0])
    cell = np.random.default_rng((0, epoch)).permutation(np.arange(150))[32 * batch + row]
    assert f"in epoch {epoch}, batch {batch} of train, because of its cells {cell}. " in said


@pytest.mark.usefixtures("_checks")
def test_the_step_of_a_failure_of_the_warmup_is_found_by_repeating_its_weights(new_line, data, loaders):
    class Sharp(new_line):
        def loss(self, batch, kl_weight=1.0):
            return super().loss(batch) * (torch.nan if kl_weight == 0.8 else 1.0)

    said = message(Sharp(), *loaders(data), max_epochs=4, kl_warmup=10)
    assert said.startswith("train_loss is nan in epoch 1, batch 3 of train, for all of its cells ")
    assert "The weights are those of the end of epoch 0." in said


class Fails(torch.nn.Module):
    """Falls until an epoch at which every cell fails."""

    global_parameters = frozenset()

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.at_step = at_step

    def loss(self, batch):
        if self.training:
            self.steps += 1
        bad = self.training and self.steps > self.at_step
        return (self.weight / (0.0 if bad else 1.0)).expand(len(batch["rows"])) + batch["rows"]


@pytest.mark.usefixtures("_checks")
@pytest.mark.parametrize("kl", [False, True], ids=["best", "end_of_last_epoch"])
def test_the_last_good_weights_are_restored(data, loaders, kl):
    class Warm(Fails):
        def loss(self, batch, kl_weight=1.0):
            return super().loss(batch)

    settings = {"lr": 0.1, "patience": None, "accelerator": "cpu", "kl_warmup": 0.9 if kl else None}
    expected, module = Warm(10**6), Warm(12)
    snapshots = []
    fit(
        expected,
        *loaders(data),
        max_epochs=20,
        **settings,
        progress=lambda *_: snapshots.append((expected.weight.item(), expected.steps.item())),
    )
    with pytest.raises(TrainingError, match=r"train_loss is -?inf|train_loss is nan") as error:
        fit(module, *loaders(data), max_epochs=20, **settings)
    assert "in epoch 2, batch 2 of train, for all of its cells" in str(error.value)
    assert ("the end of epoch 1" if kl else "the best epoch, 1") in str(error.value)
    assert (module.weight.item(), module.steps.item()) == snapshots[1]


def test_validation_cells_are_named_as_such(new_line, data, loaders):
    data["y"][160] = np.inf
    said = message(new_line(), *loaders(data), max_epochs=3, obs_names=NAMES)
    assert said.startswith(
        "validation_loss is inf in epoch 0, batch 0 of validation, because of its cells 160 ('cell-160'). "
    )


@pytest.mark.usefixtures("_checks")
def test_a_term_alone_is_enough(new_line, data, loaders):
    """The total is finite, and nothing that is said has it otherwise; the cells are those of the term."""

    class Term(new_line):
        def loss(self, batch):
            loss = super().loss(batch)
            return Loss(loss.mean(), loss.detach(), len(loss), {"odd": batch["odd"].sum(), "even": loss.detach().sum()})

    data["odd"] = np.zeros(200)
    data["odd"][[17, 160]] = np.nan
    said = message(Term(), *loaders(data), max_epochs=1)
    found = re.fullmatch(
        rf"train_loss is ([\d.]+), but its term 'odd' is not finite, in epoch 0, batch {where_is(17, 0)} of train, "
        r"because of its cells 17\. .*",
        said,
    )
    assert found is not None, said
    data["odd"][17] = 0
    assert message(Term(), *loaders(data), max_epochs=1).startswith("validation_loss is ")


def test_a_failure_that_does_not_come_back_is_reported_as_such(data, loaders):
    class Once(torch.nn.Module):
        global_parameters = frozenset()
        failed = False

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def loss(self, batch):
            factor = 1.0 if self.failed else torch.nan
            self.failed = True
            return self.weight.expand(len(batch["rows"])) * factor

    said = message(Once(), *loaders(data), max_epochs=1)
    assert said.startswith("The losses of epoch 0 are not finite, but were when it was repeated.")


def test_consecutive_cells_are_cut_out_of_a_minibatch():
    rng = np.random.default_rng(0)
    import scipy.sparse as sp

    counts = sp.random(20, 7, 0.4, format="csr", random_state=rng, dtype=np.float32)
    loader = CountsLoader(counts, {"z": rng.normal(size=(20, 2))})
    whole = loader.gather(np.arange(20)[::-1].copy())
    for start, stop in ((0, 20), (3, 4), (7, 15), (19, 20)):
        part, expected = cut(whole, start, stop), loader.gather(np.arange(20)[::-1][start:stop].copy())
        assert part.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(part[name], tensor), name
