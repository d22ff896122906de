"""Gradient and distribution matching on free expression profiles, without latent space or generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from cellstill.condense.baselines.base import baseline
from cellstill.condense.baselines.profiles import counts_of_profiles
from cellstill.condense.baselines.selection import random
from cellstill.condense.cells import LabelledCells
from cellstill.condense.problem import CondensationProblem
from cellstill.data.expression import TARGET_SUM
from cellstill.train.fit import seeded

N_STEPS = 200
"""Steps of the synthetic profiles."""

_N_HIDDEN = 64
_N_REAL = 256
_LR = 0.05
_LR_NETWORK = 0.01
_LOOPS = {1: (1, 1), 10: (10, 50), 50: (50, 10)}


@baseline(
    "dc",
    reference="Zhao, Mopuri and Bilen (2021), arXiv:2006.05929",
    limits="Short budget: 200 steps. Follows the gradients of one small network, and is slow with many classes.",
    trained_with=("mlp_small",),
)
def gradient_matching(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Match gradients of small networks on real and synthetic cells, class by class.

    Outer loops draw a network; inside, matching of all classes and training of the network on the synthetic cells take
    turns: 1 matching and 1 training step at up to 1 cell per class, 10 and 50 at up to 10, 50 and 10 above.
    """
    n_matching, n_training = _LOOPS[next((size for size in _LOOPS if samples_per_class <= size), 50)]

    def losses(real: _Real, cells: _Profiles) -> Iterator[torch.Tensor]:
        while True:
            network = _network(real.x.shape[1], _N_HIDDEN, real.n_classes)
            weights = list(network.parameters())
            for _ in range(n_matching):
                loss = torch.zeros(())
                for code in range(real.n_classes):
                    x = real.draw(code)
                    true = torch.autograd.grad(_entropy(network(x), code), weights)
                    made = torch.autograd.grad(
                        _entropy(network(cells.expression(cells.of[code])), code), weights, create_graph=True
                    )
                    loss = loss + sum(gradient_distance(a, b) for a, b in zip(made, true, strict=True) if a.ndim > 1)
                yield loss
                _train(network, cells, n_training)

    return _match(problem, samples_per_class, seed, losses)


@baseline(
    "dm",
    reference="Zhao and Bilen (2023), arXiv:2110.04181",
    limits="Short budget: 200 steps. Means of random features only, so that neither spread nor boundaries are matched.",
    trained_with=("mlp_small",),
)
def distribution_matching(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Match the mean features of real and synthetic cells of each class under random networks."""

    def losses(real: _Real, cells: _Profiles) -> Iterator[torch.Tensor]:
        while True:
            features = _network(real.x.shape[1], _N_HIDDEN, real.n_classes)[:-1]
            made = features(cells.expression())
            loss = torch.zeros(())
            for code in range(real.n_classes):
                with torch.no_grad():
                    true = features(real.draw(code)).mean(dim=0)
                loss = loss + ((made[cells.of[code]].mean(dim=0) - true) ** 2).sum()
            yield loss

    return _match(problem, samples_per_class, seed, losses)


def gradient_distance(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Sum over the rows of a weight matrix, one for each output, of one minus the cosine of the two gradients."""
    return (1 - nn.functional.cosine_similarity(made, true, dim=1, eps=1e-8)).sum()


class _Real:
    """Training cells, drawn from by class."""

    def __init__(self, problem: CondensationProblem, generator: torch.Generator) -> None:
        self.x = torch.from_numpy(problem.train.expression().toarray())
        self.rows = [torch.from_numpy(problem.train.of_class(code)) for code in range(problem.n_classes)]
        self.n_classes = problem.n_classes
        self.generator = generator

    def draw(self, code: int) -> torch.Tensor:
        """Cells of a class, with replacement where there are fewer than are wanted."""
        rows = self.rows[code]
        if len(rows) <= _N_REAL:
            return self.x[rows[torch.randint(len(rows), (_N_REAL,), generator=self.generator)]]
        return self.x[rows[torch.randperm(len(rows), generator=self.generator)[:_N_REAL]]]


class _Profiles:
    r"""Free compositions :math:`\rho`, a softmax of what is learned, seen as :math:`\log(1 + 10^4 \rho)`."""

    def __init__(self, start: LabelledCells, n_classes: int) -> None:
        share = start.counts.toarray() / np.maximum(start.counts.sum(axis=1), 1e-12)
        self.free = torch.log(torch.from_numpy(np.asarray(share, dtype=np.float32)) + 1e-6).requires_grad_()
        self.codes = torch.from_numpy(start.codes)
        self.of = [torch.from_numpy(start.of_class(code)) for code in range(n_classes)]

    def expression(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        free = self.free if rows is None else self.free[rows]
        return torch.log1p(TARGET_SUM * free.softmax(dim=1))


def _match(
    problem: CondensationProblem,
    samples_per_class: int,
    seed: int,
    losses: Callable[[_Real, _Profiles], Iterator[torch.Tensor]],
) -> LabelledCells:
    """Start at random real cells and take :data:`N_STEPS` steps of Adam along the losses."""
    start = random(problem, samples_per_class, seed)
    real = _Real(problem, torch.Generator().manual_seed(seed))
    cells = _Profiles(start, problem.n_classes)
    optimiser = torch.optim.Adam([cells.free], lr=_LR)
    with seeded(seed, "cpu"):
        for _, loss in zip(range(N_STEPS), losses(real, cells), strict=False):
            cells.free.grad = torch.autograd.grad(loss, cells.free)[0]
            optimiser.step()
    depth = np.asarray(start.counts.sum(axis=1)).ravel()
    with torch.no_grad():
        return LabelledCells(counts_of_profiles(cells.expression().numpy(), depth), start.codes)


def _network(n_vars: int, n_hidden: int, n_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_vars, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_classes))


def _entropy(logits: torch.Tensor, code: int) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, torch.full((len(logits),), code))


def _train(network: nn.Module, cells: _Profiles, n_steps: int) -> None:
    """Train a network on the synthetic cells as they are now."""
    with torch.no_grad():
        x = cells.expression()
    optimiser = torch.optim.SGD(network.parameters(), lr=_LR_NETWORK, momentum=0.5)
    for _ in range(n_steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x), cells.codes).backward()
        optimiser.step()
