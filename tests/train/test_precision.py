from __future__ import annotations

import numpy as np
import pytest
import torch

from cellstill.data import CountsLoader, SimulationConfig, simulate_counts
from cellstill.errors import InvalidArgumentError
from cellstill.train import fit, seeded


class CountNetwork(torch.nn.Module):
    """A small autoencoder of counts with a negative binomial likelihood, written densely."""

    global_parameters = frozenset({"log_theta"})

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(n_vars, 32), torch.nn.LayerNorm(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(10, 32), torch.nn.LayerNorm(32), torch.nn.ReLU(), torch.nn.Linear(32, n_vars)
        )
        self.log_theta = torch.nn.Parameter(torch.ones(n_vars))
        self.product_dtypes = set()
        self.decoder[-1].register_forward_hook(lambda _, __, out: self.product_dtypes.add(out.dtype))

    def loss(self, batch):
        n = len(batch["rows"])
        x = torch.zeros(n, self.n_vars)
        x[torch.repeat_interleave(torch.arange(n), batch["indptr"].diff()), batch["indices"].long()] = batch["data"]
        library = x.sum(dim=1, keepdim=True)
        mean = library * torch.softmax(self.decoder(self.encoder(torch.log1p(1e4 * x / library))), dim=1)
        theta = self.log_theta.exp()
        nb = torch.distributions.NegativeBinomial(
            theta, logits=(mean + 1e-8).log() - self.log_theta, validate_args=False
        )
        return -nb.log_prob(x).mean(dim=1)


@pytest.fixture(scope="module")
def counts():
    return simulate_counts(SimulationConfig(n_obs=1000, n_vars=200), seed=0).X.tocsr()


def train(counts, precision):
    cells = np.arange(counts.shape[0])
    with seeded(0):
        module = CountNetwork(counts.shape[1])
        history = fit(
            module,
            CountsLoader(counts, indices=cells[:800], shuffle=True),
            CountsLoader(counts, indices=cells[800:], batch_size=200),
            max_epochs=25,
            lr=3e-3,
            patience=None,
            precision=precision,
            accelerator="cpu",
        )
    return module, history


def test_bfloat16_converges_to_the_loss_of_float32(counts):
    full, mixed = train(counts, "32-true"), train(counts, "bf16-mixed")
    assert full[0].product_dtypes == {torch.float32}
    assert mixed[0].product_dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in mixed[0].parameters()} == {torch.float32}
    first, last = full[1]["validation_loss"].iloc[0], full[1]["validation_loss"].min()
    assert last < 0.95 * first
    assert mixed[1]["validation_loss"].min() == pytest.approx(last, rel=0.01)
    assert mixed[1]["train_loss"].iloc[-1] == pytest.approx(full[1]["train_loss"].iloc[-1], rel=0.01)


def test_a_loss_in_bfloat16_is_averaged_in_float32(data, loaders):
    class Low(torch.nn.Module):
        global_parameters = frozenset()

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def loss(self, batch):
            return (self.weight + batch["rows"]).to(torch.bfloat16)

    history = fit(Low(), loaders(data)[0], max_epochs=1, lr=0.0, accelerator="cpu")
    expected = torch.arange(150).to(torch.bfloat16).double().mean().item()
    assert history.loc[0, "train_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_unknown_precision(new_line, data, loaders):
    with pytest.raises(InvalidArgumentError, match=r"precision='16-mixed' is not known\. Use one of: '32-true'"):
        fit(new_line(), *loaders(data), max_epochs=1, precision="16-mixed")
