"""Codes that are matched to the real cells: everything else is frozen, gradients reach them through the generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as nnf

from cellstill.condense.cells import LabelledCells
from cellstill.condense.objectives import distribution_distance, gradient_distance, outcome_loss
from cellstill.condense.pool import WIDTHS, draw_probe, train_probe
from cellstill.condense.settings import keep_checked
from cellstill.data.expression import TARGET_SUM
from cellstill.errors import InvalidArgumentError, TrainingError, above_zero, at_least_zero, whole_number
from cellstill.train.fault import listed

Decode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From codes and classes to z and to expected log expression."""


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Settings of the matching.

    Parameters
    ----------
    n_steps, lr
        Steps of Adam on the codes, and their length. 0 steps leave the codes as they start.
    real_per_class
        Real cells of each class in a step, drawn with replacement where there are fewer. More are steadier and slower.
    gradient_weight, distribution_weight, outcome_weight, class_weight, shell_weight
        Of the objectives (:mod:`~cellstill.condense.objectives`), of the classes' cross-entropy in the latent space,
        and of the distance of codes from the shell on which noise lies. 0 leaves one out.
    pool
        Architectures of which each step draws one.
    inner_steps
        Most steps that the drawn network takes on the synthetic cells before it is used; a step draws how many.

    Raises
    ------
    InvalidArgumentError
        A setting is out of range, or the pool names no architecture, or one that there is not.
    """

    n_steps: int = 200
    lr: float = 0.01
    real_per_class: int = 64
    gradient_weight: float = 0.0
    distribution_weight: float = 0.0
    outcome_weight: float = 1.0
    class_weight: float = 0.01
    shell_weight: float = 0.01
    pool: tuple[str, ...] = field(default=tuple(WIDTHS))
    inner_steps: int = 10

    def __post_init__(self) -> None:
        keep_checked(self, whole_number, "n_steps", "inner_steps", least=0)
        keep_checked(self, whole_number, "real_per_class", least=1)
        keep_checked(self, above_zero, "lr")
        keep_checked(self, at_least_zero, "gradient_weight", "distribution_weight", "outcome_weight")
        keep_checked(self, at_least_zero, "class_weight", "shell_weight")
        keep_checked(self, _known_pool, "pool")


def _known_pool(argument: str, value: object) -> tuple[str, ...]:
    known = tuple(WIDTHS)
    if not isinstance(value, Sequence) or not value or any(name not in known for name in value):
        raise InvalidArgumentError(f"{argument}={value!r} has to name some of {known}.")
    return tuple(value)


def match_codes(
    codes: torch.Tensor,
    label: torch.Tensor,
    train: LabelledCells,
    n_classes: int,
    decode: Decode,
    classify: Callable[[torch.Tensor], torch.Tensor],
    config: MatchingConfig,
    *,
    seed: int = 0,
    snapshots: Collection[int] = (),
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[dict[int, torch.Tensor], pd.DataFrame]:
    """Move codes until what networks make of their cells is what they make of real ones.

    Parameters
    ----------
    codes, label
        Start, ``(n, n_latent)``, and class of each, ``(n,)``.
    train
        Real cells.
    n_classes
        Number of classes.
    decode
        From codes and classes to z and expected log expression; differentiable, frozen.
    classify
        Logits of the classes of z.
    config
        Settings.
    seed
        Of the real cells and networks drawn.
    snapshots
        Numbers of steps after which codes are kept, besides the last.
    on_step
        Called with the step and its terms.

    Returns
    -------
    Codes by the number of steps, and the terms of each step.

    Raises
    ------
    TrainingError
        A term, or the gradient of the codes, is not finite.
    """
    expression, device = train.expression(), codes.device
    of_class = [train.of_class(code) for code in range(n_classes)]
    present = [cells for cells in of_class if len(cells)]
    rng = np.random.default_rng(seed)
    matched = codes.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([matched], lr=config.lr)
    history, kept = [], {0: codes.clone()} if 0 in snapshots or not config.n_steps else {}
    with torch.enable_grad(), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        for step in range(config.n_steps):
            rows = np.concatenate(
                [rng.choice(cells, config.real_per_class, len(cells) < config.real_per_class) for cells in present]
            )
            real = torch.from_numpy(expression[rows].toarray()).to(device)
            real_label = torch.from_numpy(train.codes[rows]).to(device)
            z, expected = decode(matched, label)
            made = as_seen(expected)
            terms: dict[str, torch.Tensor] = {}
            if config.gradient_weight or config.distribution_weight:
                name = config.pool[int(rng.integers(len(config.pool)))]
                probe = draw_probe(name, train.n_vars, n_classes, device)
                n_inner = int(rng.integers(config.inner_steps + 1))
                probe = train_probe(probe, made.detach(), label, n_inner)
                if config.gradient_weight:
                    terms["gradient"] = gradient_distance(probe, real, real_label, made, label)
                if config.distribution_weight:
                    terms["distribution"] = distribution_distance(probe, real, real_label, made, label)
            if config.outcome_weight:
                terms["outcome"] = outcome_loss(real, real_label, made, label, n_classes)
            terms["class"] = nnf.cross_entropy(classify(z), label)
            terms["shell"] = (matched.norm(dim=1) / matched.shape[1] ** 0.5 - 1).square().mean()
            total = torch.stack([getattr(config, f"{name}_weight") * term for name, term in terms.items()]).sum()
            found = {name: float(term.detach()) for name, term in terms.items()}
            optimiser.zero_grad(set_to_none=True)
            total.backward(inputs=[matched])
            _check_finite(step, found, matched.grad)
            history.append(found)
            optimiser.step()
            if step + 1 in snapshots or step + 1 == config.n_steps:
                kept[step + 1] = matched.detach().clone()
            if on_step is not None:
                on_step(step, found)
    return kept, pd.DataFrame(history).rename_axis(index="step")


def _check_finite(step: int, terms: Mapping[str, float], gradient: torch.Tensor | None) -> None:
    """Stop before a step that would spoil the codes."""
    wrong = [name for name, value in terms.items() if not math.isfinite(value)]
    told = ", ".join(f"{name} is {value:g}" for name, value in terms.items())
    if not wrong and (gradient is None or bool(gradient.isfinite().all())):
        return
    what = f"term {listed(wrong)}" if wrong else "gradient of the codes"
    raise TrainingError(f"The {what} of the matching is not finite in step {step}, where {told}. Use a smaller lr.")


def as_seen(expected: torch.Tensor) -> torch.Tensor:
    r"""Log expression as classifiers see it of a cell whose counts are in proportion to ``exp(expected) - 1``.

    Their total is brought to 10,000, as that of every cell is; the mean of real cells' log expression has less.
    """
    counts = torch.expm1(expected)
    return torch.log1p(counts * (TARGET_SUM / counts.sum(dim=1, keepdim=True).clamp(min=1e-6)))


def invert(
    z: torch.Tensor,
    label: torch.Tensor,
    generate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    n_steps: int = 200,
    lr: float = 0.05,
) -> tuple[torch.Tensor, float]:
    """Find codes that generate given points of the latent space.

    Parameters
    ----------
    z, label
        Points, ``(n, n_latent)``, and their classes.
    generate
        One-step generator.
    n_steps, lr
        Of Adam, which starts at the points themselves.

    Returns
    -------
    Codes, and the share of the points' variance that is missed.
    """
    codes = z.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([codes], lr=lr)
    for _ in range(n_steps):
        optimiser.zero_grad(set_to_none=True)
        error = (generate(codes, label) - z).square().sum(dim=1).mean()
        error.backward(inputs=[codes])
        optimiser.step()
    with torch.no_grad():
        missed = (generate(codes, label) - z).square().sum() / z.square().sum()
    return codes.detach(), float(missed)
