"""Training on a GPU against training on the CPU from the same seed.

Everything is run on the CPU as well, there with compiled loops and counts "resident" in memory, so that the tests
themselves are tested where there is no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellstill.data import CountsLoader, resident, simulate_counts
from cellstill.nn.compiled import compiled
from cellstill.nn.layers import MLP
from cellstill.nn.output import negative_binomial_output
from cellstill.nn.sparse import CSRRows
from cellstill.train import Loss, fit, seeded


class Autoencoder(torch.nn.Module):
    """The engine's first and last layers, with nothing drawn at random."""

    global_parameters = frozenset({"log_theta"})

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.encoder = MLP([n_vars, 32, 8], dropout=0.0, sparse_input=True)
        self.decoder = MLP([8, 32, n_vars], dropout=0.0)
        self.log_theta = torch.nn.Parameter(torch.ones(n_vars))

    def loss(self, batch):
        counts = CSRRows.of(batch, self.n_vars)
        hidden, output = self.decoder.features(self.encoder(counts.log1p())), self.decoder.output
        scale = 1 / (counts.n_rows * self.n_vars)
        total, value = negative_binomial_output(
            hidden, output.weight, output.bias, counts, None, self.log_theta.exp(), scale=-scale
        )
        return Loss(total, -value / self.n_vars, counts.n_rows)


@pytest.fixture(scope="module")
def counts():
    return simulate_counts(n_obs=500, n_vars=100, seed=0).X.tocsr()


def train(counts, accelerator, device=None, **settings):
    cells = np.arange(counts.shape[0])
    with seeded(0, accelerator):
        module = Autoencoder(counts.shape[1])
        loaders = [
            CountsLoader(counts, indices=cells[:400], shuffle=True, batch_size=64, device=device),
            CountsLoader(counts, indices=cells[400:], batch_size=100, device=device),
        ]
        history = fit(module, *loaders, max_epochs=6, lr=3e-3, patience=None, accelerator=accelerator, **settings)
    return module, history, loaders


@pytest.fixture(scope="module")
def on_the_cpu(counts):
    with compiled(False):
        return train(counts, "cpu")


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "sent"])
@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-4), ("bf16-mixed", 2e-3)])
def test_losses_and_weights_are_those_of_the_cpu(
    accelerator, device, is_resident, precision, bound, counts, on_the_cpu, monkeypatch
):
    if not is_resident:
        monkeypatch.setattr(resident, "free_memory", lambda device: 0)
    with compiled(True):
        module, history, loaders = train(counts, accelerator, device, precision=precision)
    assert [loader.is_resident for loader in loaders] == [is_resident] * 2
    assert {loader.device.type for loader in loaders} == {device}
    expected, expected_history, _ = on_the_cpu
    fell = expected_history["validation_loss"].iloc[0] - expected_history["validation_loss"].iloc[-1]
    assert fell > 0.05 * expected_history["validation_loss"].iloc[-1]
    for column in ("train_loss", "validation_loss"):
        np.testing.assert_allclose(history[column], expected_history[column], rtol=bound, err_msg=column)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    for name, weight in expected.state_dict().items() if precision == "32-true" else ():
        found = module.state_dict()[name]
        assert (found - weight).norm() <= 10 * bound * weight.norm(), name


class StopError(Exception):
    """Interrupts a run between two epochs."""


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_was_interrupted_ends_as_one_that_never_was(
    accelerator, device, precision, tmp_path, new_noisy, data, loaders
):
    def run(seed, **more):
        with seeded(seed, accelerator):
            module = new_noisy()
            history = fit(module, *loaders(data), **settings, **more)
            return module, history, torch.rand(3), torch.rand(3, device=device)

    def stop(phase, epoch, losses):
        if epoch == 2:
            raise StopError

    settings = {"max_epochs": 6, "lr": 0.02, "weight_decay": 0.01, "kl_warmup": 9, "patience": 4, "gradient_clip": 5.0}
    settings |= {"accelerator": accelerator, "precision": precision}
    path = tmp_path / "run.safetensors"
    module, history, *follow = run(0)
    with pytest.raises(StopError):
        run(0, checkpoint=path, progress=stop)
    # Other weights and other random numbers: everything has to come from the checkpoint.
    resumed, resumed_history, *resumed_follow = run(9, checkpoint=path, resume=True)
    assert resumed_history.equals(history)
    for name, tensor in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for found, expected in zip(resumed_follow, follow, strict=True):
        assert torch.equal(found, expected)
