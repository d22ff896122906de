"""What ``cellstill condense`` was asked for, and the model that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellstill.cli._pipeline import check_accelerator
from cellstill.errors import check_key, check_option
from cellstill.io.anndata import StoredAnnData

if TYPE_CHECKING:
    from anndata import AnnData

    from cellstill import SCDD
    from cellstill.condense import CondensationProblem

Maker = Callable[[int, Callable[[str], None]], Any]
"""From a seed, and from who is told how far it is, to an AnnData of synthetic cells."""

DEFAULT_BASELINES = ("random", "herding", "kmeans_centroids", "half_centroids")


@dataclass(frozen=True, kw_only=True)
class CondensationSettings:
    """What ``cellstill condense`` was asked for; its ``--help`` explains every one."""

    path: Path
    label_keys: tuple[str, ...]
    samples_per_class: int = 10
    donor_key: str | None = None
    layer: str | None = None
    counts: str = "auto"
    start: str = "auto"
    n_top_genes: int | None = 2000
    obsm_key: str | None = None
    n_latent: int = 128
    n_hidden: int = 256
    max_epochs: int = 150
    generator_steps: int = 3000
    matching_steps: int = 200
    seed: int = 0
    accelerator: str = "auto"
    evaluate: bool = False
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    evaluators: tuple[str, ...] = ()
    n_seeds: int = 3
    test_size: float = 0.2

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold, with the name of the input but not its folder."""
        return asdict(self) | {"path": self.path.name}


def check_keys(stored: StoredAnnData, settings: CondensationSettings) -> None:
    """Check what can be checked before anything is imported or read."""
    for key in settings.label_keys:
        check_key("labels_key", key, "adata.obs", stored.obs.columns)
    if settings.donor_key is not None:
        check_key("donor_key", settings.donor_key, "adata.obs", stored.obs.columns)
    if settings.layer is not None:
        check_key("layer", settings.layer, "adata.layers", stored.layers)


def check_names(settings: CondensationSettings) -> None:
    """Check that baselines and evaluators exist, and that what they need is installed."""
    from cellstill.condense import BASELINES, get_evaluators

    for name in settings.baselines:
        check_option("baseline", name, BASELINES)
        BASELINES[name].check_installed()
    get_evaluators(settings.evaluators or None)


def only_needed(adata: AnnData, layer: str | None, settings: CondensationSettings) -> AnnData:
    """The cells with what is needed of them: other matrices are on disk, and cannot be split."""
    from anndata import AnnData

    columns = list(dict.fromkeys([*settings.label_keys, *([settings.donor_key] if settings.donor_key else [])]))
    return AnnData(
        X=adata.X if layer is None else None,
        obs=adata.obs[columns].copy(),
        var=pd.DataFrame(index=adata.var_names),
        layers={} if layer is None else {layer: adata.layers[layer]},
        obsm={key: adata.obsm[key] for key in [settings.obsm_key] if key is not None},
    )


def build_model(adata: AnnData, layer: str | None, settings: CondensationSettings) -> SCDD:
    """Set the model up, which checks the data."""
    from cellstill import SCDD
    from cellstill.condense import GeneratorConfig, LatentConfig
    from cellstill.condense.model import AUTOENCODER

    check_accelerator(settings.accelerator)
    SCDD.setup_anndata(adata, list(settings.label_keys), layer=layer, donor_key=settings.donor_key)
    return SCDD(
        adata,
        latent=settings.obsm_key or AUTOENCODER,
        n_top_genes=settings.n_top_genes,
        latent_settings=LatentConfig(
            n_latent=settings.n_latent, n_hidden=settings.n_hidden, max_epochs=settings.max_epochs
        ),
        generator_settings=GeneratorConfig(
            n_hidden=settings.n_hidden,
            n_steps=settings.generator_steps,
            n_tuning_steps=max(settings.generator_steps // 5, 1),
        ),
        seed=settings.seed,
    )


def maker(model: SCDD, settings: CondensationSettings) -> Maker:
    """Return what condenses with a trained model."""
    from cellstill.condense import MatchingConfig

    return lambda seed, say: model.condense(
        settings.samples_per_class,
        counts=settings.counts,  # type: ignore[arg-type]
        start=settings.start,  # type: ignore[arg-type]
        matching=MatchingConfig(n_steps=settings.matching_steps),
        seed=seed,
        progress=False,
        on_step=lambda phase, step, n_steps: say(f"{phase}, {step} of {n_steps}"),
    )


def with_test_cells(
    model: SCDD,
    adata: AnnData,
    rest: np.ndarray,
    test: np.ndarray,
    layer: str | None,
    settings: CondensationSettings,
) -> CondensationProblem:
    """The model's cells and genes, and the test cells; baselines that need a trained space find the model's."""
    from cellstill.condense import CondensationProblem
    from cellstill.condense.shared import use_space

    rows = {name: rest[model.problem.rows[name]] for name in ("train", "validation")} | {"test": test}
    problem = CondensationProblem.from_rows(
        adata, list(settings.label_keys), rows, model.gene_names, layer=layer, donor_key=settings.donor_key
    )
    use_space(problem, model.space)
    return problem
