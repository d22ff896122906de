"""SCDG: a conditional diffusion model of the latent space, tuned to generate in one step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as nnf

from cellstill.condense.settings import keep_checked
from cellstill.errors import above_zero, at_least_zero, below_one, whole_number


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    r"""Settings of the generator.

    Parameters
    ----------
    n_hidden, n_blocks
        Width and depth of the residual network.
    n_steps, n_tuning_steps, batch_size, lr
        Steps of the diffusion model's training and of the one-step tuning, and their minibatches and learning rate.
    kept_noise
        :math:`\bar\alpha(t^*)` of the one step: the share of variance that is signal there. Smaller starts nearer to
        pure noise.
    label_dropout
        Share of cells whose class the diffusion model is not told.
    distribution_weight, teacher_weight, class_weight, count_weight
        :math:`w_m, w_t, w_k, w_n` of the one-step tuning. The first two hold the spread within classes, the third
        keeps samples in their class, the last makes noised cells decode to their own counts.
    n_teacher_steps
        Steps of the deterministic multi-step teacher.
    decay
        Of the moving average of the weights, per step; the average is over fewer steps at first.

    Raises
    ------
    InvalidArgumentError
        A setting is out of range.
    """

    n_hidden: int = 256
    n_blocks: int = 3
    n_steps: int = 3000
    n_tuning_steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    kept_noise: float = 0.2
    label_dropout: float = 0.1
    distribution_weight: float = 1.0
    teacher_weight: float = 0.1
    class_weight: float = 0.05
    count_weight: float = 0.1
    n_teacher_steps: int = 10
    decay: float = 0.999

    def __post_init__(self) -> None:
        keep_checked(self, whole_number, "n_hidden", "n_blocks", "batch_size", "n_teacher_steps", least=1)
        keep_checked(self, whole_number, "n_steps", "n_tuning_steps", least=0)
        keep_checked(self, below_one, "kept_noise", "label_dropout", "decay")
        keep_checked(self, at_least_zero, "distribution_weight", "teacher_weight", "class_weight", "count_weight")
        keep_checked(self, above_zero, "lr")


class Denoiser(nn.Module):
    """Residual network that predicts the velocity v of a noised z, given time and class.

    Parameters
    ----------
    n_latent, n_classes
        Sizes; the class ``n_classes`` stands for none. Several labels of a cell are one class, their combination, with
        one embedding.
    n_hidden, n_blocks
        Width, and number of residual blocks.
    """

    frequencies: torch.Tensor

    def __init__(self, n_latent: int, n_classes: int, n_hidden: int, n_blocks: int) -> None:
        super().__init__()
        self.n_latent, self.n_classes = n_latent, n_classes
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(100.0), 16)))
        self.time = nn.Sequential(nn.Linear(32, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_hidden))
        self.label = nn.Embedding(n_classes + 1, n_hidden)
        self.enter = nn.Linear(n_latent, n_hidden)
        self.blocks = nn.ModuleList([_Block(n_hidden) for _ in range(n_blocks)])
        self.leave = nn.Linear(n_hidden, n_latent)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Velocity, shape ``(n, n_latent)``, at times between 0 and 1, shape ``(n,)``."""
        angles = time[:, None] * self.frequencies
        told = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.label(label)
        hidden = self.enter(z)
        for block in self.blocks:
            hidden = hidden + block(hidden, told)
        return self.leave(nnf.silu(hidden))

    def clean(self, z: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        r"""Predict :math:`z_0 = \alpha z_t - \sigma v`."""
        alpha, sigma = schedule(time)
        return alpha[:, None] * z - sigma[:, None] * self(z, time, label)


class _Block(nn.Module):
    def __init__(self, n_hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_hidden, elementwise_affine=False)
        self.modulation = nn.Linear(n_hidden, 2 * n_hidden)
        self.first, self.second = nn.Linear(n_hidden, n_hidden), nn.Linear(n_hidden, n_hidden)

    def forward(self, hidden: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(nnf.silu(told)).chunk(2, dim=1)
        return self.second(nnf.silu(self.first(self.norm(hidden) * (1 + scale) + shift)))


def schedule(time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cosine schedule (Nichol & Dhariwal 2021): :math:`\alpha = \cos(\pi t / 2), \sigma = \sin(\pi t / 2)`."""
    return torch.cos(time * (math.pi / 2)), torch.sin(time * (math.pi / 2))


class OneStepGenerator(nn.Module):
    """``G(u, c)``: noise and a class become a z in one pass through a denoiser, at a fixed time.

    Parameters
    ----------
    denoiser
        Network.
    kept_noise
        See :class:`GeneratorConfig`.
    """

    def __init__(self, denoiser: Denoiser, kept_noise: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.time = 2 / math.pi * math.acos(math.sqrt(kept_noise))

    def forward(self, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return z, shape ``(n, n_latent)``."""
        return self.denoiser.clean(noise, noise.new_full((len(noise),), self.time), label)


class MultiStepGenerator(nn.Module):
    """``G(u, c)`` in several deterministic steps: the teacher of the one-step generator in its place, for ablations.

    Parameters
    ----------
    denoiser
        Trained diffusion model.
    n_steps
        Steps; so many passes through the network forwards, and as many backwards.
    """

    def __init__(self, denoiser: Denoiser, n_steps: int) -> None:
        super().__init__()
        self.denoiser, self.n_steps = denoiser, n_steps

    def forward(self, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return z, shape ``(n, n_latent)``."""
        return generate_in_steps(self.denoiser, noise, label, self.n_steps)


def generate_in_steps(denoiser: Denoiser, noise: torch.Tensor, label: torch.Tensor, n_steps: int) -> torch.Tensor:
    """Deterministic sampling in several steps (DDIM, Song et al. 2021), differentiable in ``noise``."""
    times = torch.linspace(1, 0, n_steps + 1)
    z = noise
    for now, then in itertools.pairwise(times):
        time = noise.new_full((len(noise),), float(now))
        velocity = denoiser(z, time, label)
        alpha, sigma = schedule(now)
        clean, epsilon = alpha * z - sigma * velocity, sigma * z + alpha * velocity
        alpha, sigma = schedule(then)
        z = alpha * clean + sigma * epsilon
    return z
