"""Training of the generator: diffusion first, then the tuning that makes one step enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cellstill.condense.cells import LabelledCells
from cellstill.condense.generator import Denoiser, GeneratorConfig, OneStepGenerator, generate_in_steps, schedule
from cellstill.condense.latent import Autoencoder, encode
from cellstill.data.loader import CountsLoader
from cellstill.nn.compiled import compiled
from cellstill.nn.sparse import CSRRows
from cellstill.train.fit import fit, seeded
from cellstill.train.plans import Loss
from cellstill.train.progress import OnEpoch


class Diffusion(nn.Module):
    r"""Denoiser with the loss of its training, :math:`\lVert v_\phi(\alpha z_0 + \sigma\epsilon, t, c) - v \rVert^2`.

    With :math:`v = \alpha\epsilon - \sigma z_0` (Salimans & Ho 2022) the error weighs all times alike, and predictions
    stay finite at pure noise. What is used in the end is the moving average of the weights.

    Parameters
    ----------
    denoiser
        Network.
    config
        Settings.
    """

    global_parameters: frozenset[str] = frozenset()
    average: torch.Tensor
    n_averaged: torch.Tensor

    def __init__(self, denoiser: Denoiser, config: GeneratorConfig) -> None:
        super().__init__()
        self.denoiser, self.config = denoiser, config
        # Buffers, and so a part of checkpoints, which frozen parameters are not.
        self.register_buffer("average", parameters_to_vector(denoiser.parameters()).detach().clone())
        self.register_buffer("n_averaged", torch.zeros(()))

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Squared error of the velocity, per dimension, shape ``(n,)``."""
        if self.training:
            self._follow()
        z, label = batch["z"], batch["label"]
        time, noise = torch.rand_like(z[:, 0]), torch.randn_like(z)
        told = torch.where(torch.rand_like(time) < self.config.label_dropout, self.denoiser.n_classes, label)
        alpha, sigma = (part[:, None] for part in schedule(time))
        velocity = self.denoiser(alpha * z + sigma * noise, time, told)
        return (velocity - (alpha * noise - sigma * z)).square().mean(dim=1)

    @torch.no_grad()
    def _follow(self) -> None:
        self.n_averaged += 1
        # Shorter at first: of the untrained weights nothing is to be left, however few the steps.
        share = (9 / (10 + self.n_averaged)).clamp(min=1 - self.config.decay)
        self.average.lerp_(parameters_to_vector(self.denoiser.parameters()), share)

    def averaged(self) -> Denoiser:
        """Denoiser with the moving average of the weights."""
        found = copy.deepcopy(self.denoiser).requires_grad_(False)
        vector_to_parameters(self.average.clone(), found.parameters())
        return found


class OneStepTuning(nn.Module):
    r"""One-step generator with the loss that restores the spread of classes.

    .. math::
        L_{QA} = w_m \mathrm{MMD}^2(G(u, c), z_0 | c) + \tfrac{w_t}{d} \lVert G(u, c) - \mathrm{DDIM}(u, c) \rVert^2 +
            w_k \mathrm{CE}(k(G(u, c)), c) - \tfrac{w_n}{G} \log p(x \mid D(G(q(z_0, t^*), c)))

    A one-step regression alone returns the mean of a class. The first term, an energy distance within each class, is
    zero only where the distributions agree; the second, towards several deterministic steps from the same noise, keeps
    one noise one cell.

    Parameters
    ----------
    denoiser
        Trained denoiser, the teacher; the generator starts as its copy.
    autoencoder
        Trained latent space.
    config
        Settings.
    """

    global_parameters: frozenset[str] = frozenset()

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder, config: GeneratorConfig) -> None:
        super().__init__()
        self.generator = OneStepGenerator(copy.deepcopy(denoiser).requires_grad_(True), config.kept_noise)
        self.teacher = denoiser.requires_grad_(False)
        self.autoencoder = autoencoder.requires_grad_(False)
        self.config = config

    def loss(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Loss of a minibatch of cells with their ``z`` and ``label``: as many are generated, of the same classes."""
        config, z, label = self.config, batch["z"], batch["label"]
        n = len(z)
        noise = torch.randn_like(z)
        made = self.generator(noise, label)
        with torch.no_grad():
            taught = generate_in_steps(self.teacher, noise, label, config.n_teacher_steps)
        distance = energy_distance_within(made, z, label)
        teacher = (made - taught).square().mean()
        entropy = nnf.cross_entropy(self.autoencoder.classify(made), label)
        nb = self._counts(batch, z, label) if config.count_weight else z.new_zeros(())
        total = (
            config.distribution_weight * distance
            + config.teacher_weight * teacher
            + config.class_weight * entropy
            + config.count_weight * nb
        )
        parts = {"distribution": distance, "teacher": teacher, "class": entropy, "nb": nb}
        return Loss(total, None, n, {name: n * part.detach() for name, part in parts.items()})

    def _counts(self, batch: Mapping[str, torch.Tensor], z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        alpha = math.sqrt(self.config.kept_noise)
        noised = alpha * z + math.sqrt(1 - self.config.kept_noise) * torch.randn_like(z)
        return self.autoencoder.count_loss(self.generator(noised, label), CSRRows.of(batch, self.autoencoder.n_vars))


def energy_distance_within(x: torch.Tensor, y: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    r"""Squared MMD with the kernel :math:`-\lVert x - y \rVert` within each class, averaged over cells.

    Unbiased, and without a bandwidth to choose (Sejdinovic et al. 2013). Classes of a single cell do not count.

    Parameters
    ----------
    x, y
        Shape ``(n, d)``.
    label
        Class of the rows of both, shape ``(n,)``.
    """
    same = (label[:, None] == label).to(x.dtype)
    size = same.sum(dim=1)
    counted = same * (size > 1)[:, None]
    across = counted / size[:, None]
    within = (counted - torch.diag(counted.diagonal())) / (size - 1).clamp(min=1)[:, None]
    n = counted.diagonal().sum().clamp(min=1)
    total = (across * (2 * _distances(x, y))).sum() - (within * (_distances(x, x) + _distances(y, y))).sum()
    return total / n


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    square = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.t()
    # The gradient of a root is infinite at 0, where a point meets itself.
    return (square.clamp(min=0) + 1e-6).sqrt()


def fit_generator(
    autoencoder: Autoencoder,
    train: LabelledCells,
    config: GeneratorConfig,
    *,
    seed: int = 0,
    accelerator: str = "auto",
    progress: bool | OnEpoch = False,
    checkpoints: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
) -> tuple[OneStepGenerator, Denoiser, dict[str, pd.DataFrame]]:
    """Train the diffusion model of a latent space, and tune it to one step.

    Rare classes are shown more often than they occur: in proportion to the root of their size.

    Parameters
    ----------
    autoencoder
        Trained latent space.
    train
        Cells to learn from.
    config
        Settings.
    seed, accelerator, progress
        As in :func:`~cellstill.condense.latent.fit_autoencoder`.
    checkpoints
        ``checkpoint`` and ``resume`` of :func:`cellstill.train.fit.fit` for each of the two trainings.

    Returns
    -------
    The generator, its multi-step teacher, and the history of both trainings, ``"diffusion"`` and ``"tuning"``.
    """
    z = encode(autoencoder, train.counts).numpy()
    how: dict[str, Any] = {"accelerator": accelerator, "progress": progress}
    with seeded(seed + 1):
        diffusion = Diffusion(Denoiser(z.shape[1], autoencoder.n_classes, config.n_hidden, config.n_blocks), config)
        cells = _loader(z, train, config, seed, 1)
        epochs = -(-config.n_steps // len(cells))
        told = fit(diffusion, cells, max_epochs=epochs, phase="diffusion", **_common(config), **how, **checkpoints[0])
        teacher = diffusion.averaged()
        generator, tuned = tune_to_one_step(teacher, autoencoder, train, config, seed=seed, **how, **checkpoints[1])
    return generator, teacher, {"diffusion": told, "tuning": tuned}


def tune_to_one_step(
    teacher: Denoiser,
    autoencoder: Autoencoder,
    train: LabelledCells,
    config: GeneratorConfig,
    *,
    seed: int = 0,
    **how: Any,
) -> tuple[OneStepGenerator, pd.DataFrame]:
    """Tune a trained diffusion model to one step: the second half of :func:`fit_generator`.

    Parameters
    ----------
    teacher
        The diffusion model; the same for every ``kept_noise``.
    autoencoder, train, config
        As in :func:`fit_generator`.
    seed
        Of the order of cells; noise is drawn from torch's own generator.
    how
        ``accelerator``, ``progress``, ``checkpoint`` and ``resume`` of :func:`cellstill.train.fit.fit`.

    Returns
    -------
    The generator, and the history of its training.
    """
    tuning = OneStepTuning(teacher, autoencoder, config)
    cells = _loader(encode(autoencoder, train.counts).numpy(), train, config, seed, 2)
    epochs = -(-config.n_tuning_steps // len(cells))
    with compiled("auto", n_values=float(len(cells.cells)) * train.n_vars * epochs):
        history = fit(tuning, cells, max_epochs=epochs, phase="one step", **_common(config), **how)
    return tuning.generator.requires_grad_(False), history


def _common(config: GeneratorConfig) -> dict[str, Any]:
    return {"lr": config.lr, "patience": None, "gradient_clip": 1.0}


def _loader(z: np.ndarray, train: LabelledCells, config: GeneratorConfig, seed: int, stream: int) -> CountsLoader:
    return CountsLoader(
        train.counts,
        per_cell={"z": z, "label": train.codes},
        indices=_balanced(train.codes, seed),
        batch_size=config.batch_size,
        shuffle=True,
        seed=seed + stream,
    )


def _balanced(codes: np.ndarray, seed: int) -> np.ndarray:
    """Positions of cells, with repeats: as many as there are, each class in proportion to the root of its size."""
    rng = np.random.default_rng(seed)
    sizes = np.bincount(codes)
    wanted = np.maximum(np.round(len(codes) * np.sqrt(sizes) / np.sqrt(sizes).sum()).astype(np.int64), sizes > 0)
    return np.concatenate([_repeated(np.flatnonzero(codes == code), n, rng) for code, n in enumerate(wanted) if n])


def _repeated(cells: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.permutation(cells) for _ in range(-(-n // len(cells)))])[:n]
