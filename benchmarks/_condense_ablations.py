"""scDD with one part changed at a time, on the same cells and splits, and judged in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from _condense_scores import Scores
from _condense_store import OURS, START, Ours, Store
from anndata import AnnData
from torch import nn

from cellstill import AmbientRegularizedSCVI
from cellstill.condense import (
    GeneratorConfig,
    LabelledCells,
    LatentConfig,
    MatchingConfig,
    Space,
    Variant,
    condense,
    fit_space,
)
from cellstill.condense.baselines.base import principal_components
from cellstill.condense.diffusion import tune_to_one_step
from cellstill.condense.latent import Autoencoder, expression
from cellstill.data.expression import TARGET_SUM
from cellstill.foundation import embed
from cellstill.nn.sparse import CSRRows
from cellstill.train.fit import seeded

SIZE = 10
"""Cells per class of the ablations."""

FREE = MatchingConfig(shell_weight=0.0)
"""Matching of codes that are no noise, so that no shell holds them."""


@dataclass(frozen=True)
class Ablation:
    """One part of ours changed.

    Attributes
    ----------
    part, what
        Part, and what takes its place.
    prepare
        Trains what the variant needs.
    trains
        Whether that is more than the space of the default.
    """

    part: str
    what: str
    prepare: Callable[[Store, int], Ours]
    trains: bool = False


def of_variant(variant: Variant) -> Callable[[Store, int], Ours]:
    """The shared space, other settings."""

    def prepare(kept: Store, seed: int) -> Ours:
        kept.need_space(seed)
        return variant.condense

    return prepare


def of_space(
    build: Callable[[Store, int], Space], matching: MatchingConfig | None = None, start: Any = "auto"
) -> Callable[[Store, int], Ours]:
    """A space of its own."""

    def prepare(kept: Store, seed: int) -> Ours:
        space = build(kept, seed)

        def ours(problem: Any, samples_per_class: int, seed: int) -> Any:
            return condense(problem, space, samples_per_class, matching=matching, start=start, seed=seed)

        return ours

    return prepare


class Given(nn.Module):
    """A generator that returns its codes: they are points of the latent space."""

    def forward(self, codes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return codes


class Linear(nn.Module):
    r"""Linear map of log expression in place of the autoencoder, :math:`z = (\tilde x - m) B^T / s` and back.

    Parameters
    ----------
    autoencoder
        Whose dispersions are taken, for draws of counts.
    mean, basis, spread
        m ``(n_vars,)``, orthonormal B ``(n_dims, n_vars)`` (``None``: genes themselves) and s ``(n_dims,)``.
    """

    center: torch.Tensor

    def __init__(self, autoencoder: Autoencoder, mean: np.ndarray, basis: np.ndarray | None, spread: np.ndarray):
        super().__init__()
        self.n_vars, self.n_classes = autoencoder.n_vars, autoencoder.n_classes
        self.config = LatentConfig(n_latent=len(spread))
        self.log_theta = autoencoder.log_theta
        for name, array in (("center", mean), ("spread", spread), ("basis", basis)):
            self.register_buffer(name, None if array is None else torch.as_tensor(array, dtype=torch.float32))

    def encode(self, counts: CSRRows) -> torch.Tensor:
        away = expression(counts).to_dense() - self.center
        return (away if self.basis is None else away @ self.basis.T) / self.spread

    def expect(self, z: torch.Tensor) -> torch.Tensor:
        away = z * self.spread
        return torch.relu((away if self.basis is None else away @ self.basis) + self.center)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        share = torch.expm1(self.expect(z)) / TARGET_SUM
        return share / share.sum(dim=1, keepdim=True).clamp(min=1e-6)

    def classify(self, z: torch.Tensor) -> torch.Tensor:
        """Logits that prefer no class."""
        return z.new_zeros(len(z), self.n_classes)


def linear(kept: Store, seed: int, *, components: bool) -> Space:
    """Principal components, or genes, each in units of its spread, in place of latent space and generator."""
    if components:
        scores, basis, mean = principal_components(kept.problem)
        spread = scores.std(axis=0)
    else:
        dense = kept.problem.train.expression().toarray()
        mean, basis, spread = dense.mean(axis=0), None, dense.std(axis=0)
    space = kept.space(seed)
    module = Linear(space.autoencoder, mean, basis, np.maximum(spread, 1e-6)).eval().requires_grad_(False)
    return replace(space, autoencoder=module, generator=Given())


def retuned(kept: Store, seed: int, *, kept_noise: float) -> Space:
    """The same latent space and diffusion model with a generator whose one step starts at another time."""
    space, config = kept.space(seed), GeneratorConfig(kept_noise=kept_noise)
    with seeded(seed + 2):
        generator, _ = tune_to_one_step(space.teacher, space.autoencoder, kept.problem.train, config, seed=seed)
    return replace(space, generator=generator, config=config)


def taught(kept: Store, seed: int, *, teach: Callable[[Store, int], Mapping[str, np.ndarray]]) -> Space:
    """A space whose latent space learns an embedding besides."""
    return fit_space(kept.problem, told=teach(kept, seed), seed=seed)


def components(kept: Store, seed: int) -> Mapping[str, np.ndarray]:
    """Principal components of the training cells' log expression, 50."""
    scores, loadings, mean = principal_components(kept.problem)
    others = (kept.problem.validation.expression().toarray() - mean) @ loadings.T
    return {"train": scores.astype(np.float32), "validation": others.astype(np.float32)}


def variational(kept: Store, seed: int) -> Mapping[str, np.ndarray]:
    """Latents of a regularised variational autoencoder, which is trained on the training cells without labels."""

    def table(cells: LabelledCells) -> AnnData:
        adata = AnnData(cells.counts.copy())
        adata.var_names = kept.problem.genes
        return adata

    adata = table(kept.problem.train)
    AmbientRegularizedSCVI.setup_anndata(adata)
    encoder = AmbientRegularizedSCVI(adata, seed=seed)
    encoder.train(progress=False)
    return {"train": embed(encoder, adata), "validation": embed(encoder, table(kept.problem.validation))}


def objectives(**weights: float) -> Variant:
    """Objectives of the matching, all others left out."""
    off = {"gradient_weight": 0.0, "distribution_weight": 0.0, "outcome_weight": 0.0}
    return Variant(matching=MatchingConfig(**(off | weights)))


ABLATIONS = {
    "start_centroids": Ablation("start", "inverted centroids only", of_variant(Variant(start="centroids"))),
    "start_random": Ablation("start", "random codes only", of_variant(Variant(start="random"))),
    START: Ablation("matching", "none: codes as they start", of_variant(Variant().unmatched())),
    "ten_steps": Ablation("generator", "ten steps of the teacher", of_variant(Variant(teacher_steps=10))),
    "free_latent": Ablation(
        "generator",
        "none: codes are points z",
        of_space(lambda kept, seed: replace(kept.space(seed), generator=Given()), FREE, "centroids"),
    ),
    "components": Ablation(
        "codes", "principal components, 50", of_space(partial(linear, components=True), FREE, "centroids")
    ),
    "genes": Ablation(
        "codes", "log expression of genes", of_space(partial(linear, components=False), FREE, "centroids")
    ),
    "distribution": Ablation("matching", "distributions", of_variant(objectives(distribution_weight=1.0))),
    "gradient": Ablation("matching", "gradients", of_variant(objectives(gradient_weight=1.0))),
    **{
        f"time_{kept_noise:g}": Ablation(
            "t*", f"signal {kept_noise:g}", of_space(partial(retuned, kept_noise=kept_noise)), True
        )
        for kept_noise in (0.05, 0.1, 0.4)
    },
    "told_components": Ablation(
        "knowledge", "principal components, 50", of_space(partial(taught, teach=components)), True
    ),
    "told_vi": Ablation("knowledge", "encoder of vi", of_space(partial(taught, teach=variational)), True),
    "all_objectives": Ablation(
        "matching",
        "outcome, gradients and distributions",
        of_variant(objectives(gradient_weight=1.0, distribution_weight=1.0, outcome_weight=1.0)),
    ),
}
"""Variants by the name of their files, the quickest first."""

DEFAULT = Ablation(
    "default", "one step, both starts, outcome, no knowledge, signal 0.2", of_variant(Variant())
)  # fmt: skip

COLUMNS = {
    "part": "part",
    "what": "in its place",
    "n_runs": "runs|d",
    "retention": "retention|.3f",
    "ahead": "ahead of the default by|.3f",
    "low": "low|.3f",
    "high": "high|.3f",
    "rare_recall": "rare recall|.3f",
    "start": "validation, as it starts|.3f",
    "matched": "validation, matched|.3f",
    "seconds": "CPU seconds|.1f",
    "training": "of training besides|.0f",
}


def rows(scores: Scores, stores: Mapping[str, Store]) -> Iterable[dict[str, Any]]:
    """One row for each variant of which there are results."""
    for name, ablation in {OURS: DEFAULT, **ABLATIONS}.items():
        runs = scores.runs(name, SIZE) & scores.runs(OURS, SIZE)
        if not runs:
            continue
        ahead = None if name == OURS else scores.difference(name, OURS, SIZE)
        yield {
            "part": ablation.part,
            "what": ablation.what,
            "n_runs": len(runs),
            **{key: scores.mean(name, SIZE, key, runs) for key in ("retention", "rare_recall")},
            **({} if ahead is None else {"ahead": ahead.value, "low": ahead.low, "high": ahead.high}),
            **_on_validation(name, runs, stores),
            "seconds": _mean(name, runs, stores, "cpu_seconds"),
            "training": _mean(name, runs, stores, "training_cpu_seconds") if ablation.trains else None,
        }


def missing(scores: Scores, stores: Iterable[str], seeds: Iterable[int]) -> list[str]:
    """Say which variants were not run, or not everywhere."""
    wanted, found = {(of, seed) for of in stores for seed in seeds}, []
    for name, ablation in ABLATIONS.items():
        absent = sorted(wanted - scores.runs(name, SIZE))
        if absent:
            where = ", ".join(f"{of} with seed {seed}" for of, seed in absent)
            found.append(f"{ablation.part}, {ablation.what}: not run on {where}.")
    return found


def _mean(name: str, runs: Iterable[tuple[str, int]], stores: Mapping[str, Store], number: str) -> float | None:
    found = [stores[of].number(number, name, SIZE, seed) for of, seed in sorted(runs)]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _on_validation(name: str, runs: Iterable[tuple[str, int]], stores: Mapping[str, Store]) -> dict[str, float | None]:
    """Best score on the validation cells of codes as they start, and of matched ones."""
    found = []
    for of, seed in runs:
        table = pd.DataFrame(stores[of].choice(SIZE, seed, name))
        found.append([table["mean"][table["steps"] == 0].max(), table["mean"][table["steps"] > 0].max()])
    start, matched = np.mean(found, axis=0)
    return {"start": float(start), "matched": None if np.isnan(matched) else float(matched)}
