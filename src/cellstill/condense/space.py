"""A trained latent space and generator: all that a condensation keeps frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.counts import Rendering, render
from cellstill.condense.diffusion import fit_generator
from cellstill.condense.generator import Denoiser, GeneratorConfig, MultiStepGenerator, OneStepGenerator
from cellstill.condense.latent import Autoencoder, LatentConfig, encode, fit_autoencoder
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.spread import Spread, fit_spread
from cellstill.errors import InvalidArgumentError, whole_number
from cellstill.train.progress import OnEpoch


@dataclass(frozen=True, eq=False)
class Space:
    """What maps codes to cells.

    Attributes
    ----------
    autoencoder
        Latent space and decoders.
    generator
        One-step generator; that of :meth:`in_steps` takes several.
    teacher
        The multi-step diffusion model it was tuned from.
    spread
        What gives samples the spread of real cells; ``None`` leaves them as they are generated.
    config
        Settings of the generator.
    log_library
        Mean and standard deviation of the log library size of each class, shape ``(n_classes, 2)``.
    n_detected
        Number of genes that the median cell of each class detects, shape ``(n_classes,)``.
    history
        Losses of ``"latent"``, ``"diffusion"`` and ``"tuning"``.
    """

    autoencoder: Autoencoder
    generator: OneStepGenerator | MultiStepGenerator
    teacher: Denoiser
    spread: Spread | None
    config: GeneratorConfig
    log_library: np.ndarray
    n_detected: np.ndarray
    history: dict[str, pd.DataFrame]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.autoencoder.center.device

    def in_steps(self, n_steps: int) -> Space:
        """Return the same space with so many deterministic steps of the diffusion model in place of the one.

        For ablations: generating, and each step of matching, takes as many passes through the network.

        Raises
        ------
        InvalidArgumentError
            Fewer than one step.
        """
        whole_number("n_steps", n_steps, least=1)
        return replace(self, generator=MultiStepGenerator(self.teacher, int(n_steps)), spread=None)

    def decode(self, codes: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z and expected log expression of codes; differentiable in them."""
        z = self.generator(codes, label)
        return z, self.autoencoder.expect(z)

    @torch.inference_mode()
    def sample(self, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return z of cells as diverse as those of their class, of noise. Codes that are matched need no such help."""
        z = self.generator(noise, label)
        return z if self.spread is None else self.spread(z, label)

    @torch.inference_mode()
    def render(self, rendering: Rendering, z: torch.Tensor, codes: np.ndarray, seed: int = 0) -> LabelledCells:
        """Cells of some classes at z, as counts."""
        module = self.autoencoder
        counts = render(
            rendering,
            expected=module.expect(z).cpu().numpy(),
            rates=module.decode(z).cpu().numpy(),
            theta=module.log_theta.exp().cpu().numpy(),
            library=self.library(codes, seed if rendering.form == "sampled" else None),
            n_detected=self.n_detected[codes],
            codes=codes,
            seed=seed,
        )
        return LabelledCells(counts, codes)

    def library(self, codes: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Library sizes of cells of some classes: their geometric mean, or draws around it with ``seed``."""
        mean, sd = self.log_library[codes].T
        # A stream of its own: counts are drawn from that of the seed itself.
        noise = np.zeros(len(codes)) if seed is None else np.random.default_rng([seed, 1]).standard_normal(len(codes))
        return np.exp(mean + sd * noise)

    def encode(self, cells: LabelledCells) -> torch.Tensor:
        """Standardised z of cells, on the device of the networks."""
        return encode(self.autoencoder, cells.counts).to(self.device)

    def features(self, z: torch.Tensor, codes: np.ndarray) -> Features:
        """Points of the latent space, ``(n, n_latent)``, and their classes, for classifiers of z."""
        return Features(z.cpu().numpy(), codes, lambda cells: self.encode(cells).cpu().numpy())


def fit_space(
    problem: CondensationProblem,
    latent: LatentConfig | None = None,
    generator: GeneratorConfig | None = None,
    *,
    told: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    progress: bool | OnEpoch = False,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Space:
    """Train latent space and generator on the training cells of a problem.

    Parameters
    ----------
    problem
        Cells.
    latent, generator
        Settings; ``None`` takes the defaults.
    told
        Embeddings that teach, of the cells of ``"train"`` and ``"validation"``.
    seed, accelerator, progress
        As in :func:`cellstill.train.fit.fit`.
    checkpoint, resume
        Folder for the state of the three trainings, written after each epoch, and whether to go on from it.

    Raises
    ------
    InvalidArgumentError
        ``resume`` without ``checkpoint``.
    TrainingError
        A loss or gradient is not finite.
    StoreError
        ``checkpoint`` holds a run already and ``resume`` is false, or one with other data or settings.
    """
    if resume and checkpoint is None:
        raise InvalidArgumentError("resume=True needs the checkpoint to go on from: give checkpoint=... as well.")
    phases = ("latent", "diffusion", "tuning")
    saved: dict[str, dict[str, Any]] = {phase: {} for phase in phases}
    if checkpoint is not None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        saved = {phase: {"checkpoint": checkpoint / f"{phase}.ckpt", "resume": resume} for phase in phases}
    how: dict[str, Any] = {"seed": seed, "accelerator": accelerator, "progress": progress}
    autoencoder, losses = fit_autoencoder(
        problem.train,
        problem.validation,
        problem.n_classes,
        latent or LatentConfig(),
        told=told,
        **how,
        **saved["latent"],
    )
    autoencoder.requires_grad_(False)
    checkpoints = (saved["diffusion"], saved["tuning"])
    generator = generator or GeneratorConfig()
    one_step, teacher, histories = fit_generator(autoencoder, problem.train, generator, **how, checkpoints=checkpoints)
    z = encode(autoencoder, problem.train.counts).to(autoencoder.center.device)
    return Space(
        autoencoder,
        one_step,
        teacher.requires_grad_(False),
        fit_spread(one_step, z, problem.train.codes, problem.n_classes, seed),
        generator,
        log_library(problem.train, problem.n_classes),
        detected(problem.train, problem.n_classes),
        {"latent": losses, **histories},
    )


def log_library(cells: LabelledCells, n_classes: int) -> np.ndarray:
    """Mean and standard deviation of the log library size of each class, shape ``(n_classes, 2)``."""
    total = np.log(np.maximum(np.asarray(cells.counts.sum(axis=1)).ravel(), 1))
    found = np.zeros((n_classes, 2))
    for code in range(n_classes):
        own = total[cells.of_class(code)]
        found[code] = (own.mean(), own.std()) if len(own) else (total.mean(), total.std())
    return found


def detected(cells: LabelledCells, n_classes: int) -> np.ndarray:
    """Median number of genes that the cells of each class detect, shape ``(n_classes,)``."""
    n_genes = np.diff(cells.counts.indptr)
    return np.array([np.median(n_genes[own] if len(own := cells.of_class(k)) else n_genes) for k in range(n_classes)])
