from __future__ import annotations

import threading

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.data import CountsLoader
from cellstill.train import Loss

COUNTS = sp.csr_matrix(np.ones((200, 2), dtype=np.float32))


class Line(torch.nn.Module):
    """Least squares of y on x: the optimum is known in closed form."""

    global_parameters = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def loss(self, batch):
        return (self.linear(batch["x"]).squeeze(1) - batch["y"]).square()


class Noisy(torch.nn.Module):
    """Everything that a resumed run has to bring back: dropout, a buffer, a global parameter, terms, a KL weight."""

    global_parameters = frozenset({"scale"})

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(0.3)
        )
        self.output = torch.nn.Linear(16, 1)
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def loss(self, batch, kl_weight=1.0):
        hidden = self.network(batch["x"])
        fit = (self.output(hidden).squeeze(1) * self.scale.exp() - batch["y"]).square()
        kl = 0.01 * hidden.square().mean(dim=1)
        per_cell = fit + kl_weight * kl
        terms = {"fit": fit.detach().sum(), "kl": kl.detach().sum()}
        return Loss(per_cell.mean(), per_cell.detach(), len(per_cell), terms)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    y = x @ [1.0, -2.0, 0.5] + 3 + rng.normal(scale=0.1, size=200)
    return {"x": x, "y": y}


@pytest.fixture
def loaders():
    """Make loaders of 150 training and 50 validation cells."""

    def make(data, batch_size=32, **settings):
        return (
            CountsLoader(COUNTS, data, indices=np.arange(150), shuffle=True, batch_size=batch_size, **settings),
            CountsLoader(COUNTS, data, indices=np.arange(150, 200), **settings),
        )

    return make


@pytest.fixture
def new_line():
    return Line


@pytest.fixture
def new_noisy():
    return Noisy


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "cellstill-ahead"] == []
