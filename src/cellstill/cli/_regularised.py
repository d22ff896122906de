"""From a file of counts to latents, ambient profile and denoised counts: what ``cellstill vi`` runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellstill.cli._memory import peak_mb, used_mb
from cellstill.cli._outputs import (
    MAX_DRAWN,
    add_elements,
    draw_figures,
    versions,
    write_data,
    write_figure,
    write_json,
)
from cellstill.cli._pipeline import check_accelerator, read_counts
from cellstill.cli._scores import MAX_SCORED, Scores, sample_cells, scorable_labels, score
from cellstill.cli._terminal import Terminal
from cellstill.data.annotations import gather_obs, is_mudata, modality_rows
from cellstill.errors import InvalidArgumentError, check_key
from cellstill.io.anndata import open_anndata, read_mudata

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI

RESULTS = ("ambient_profile", "cells.h5ad", "cells.h5mu", "figures", "model", "summary.json")
"""Names in a folder of results; one that holds anything else is never replaced."""

BEFORE, AFTER, JOINT = "before (PCA)", "after (z)", "joint z"
_N_COMPONENTS = 50


@dataclass(frozen=True, kw_only=True)
class RegularisedSettings:
    """What ``cellstill vi`` was asked for; its ``--help`` explains every one."""

    path: Path
    batch_key: str | None = None
    conditioning_keys: tuple[str, ...] = ()
    feature_scaling_keys: tuple[str, ...] = ()
    ambient_keys: tuple[str, ...] = ()
    dispersion_key: str | None = None
    library_size_key: str | None = None
    encoder_keys: tuple[str, ...] = ()
    continuous_keys: tuple[str, ...] = ()
    label_key: str | None = None
    layer: str | None = None
    allow_noninteger: bool = False
    modalities: Mapping[str, str | None] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    n_hidden: int = 512
    n_latent: int = 128
    max_epochs: int | None = None
    batch_size: int = 128
    ambient_rate: float | Mapping[str | tuple[str, ...], float] | None = None
    seed: int = 0
    accelerator: str = "auto"
    denoised: bool = False

    @property
    def keys(self) -> dict[str, Any]:
        """Arguments of ``setup_anndata`` and ``setup_mudata``: the columns by purpose."""
        return {
            "batch_key": self.batch_key,
            "nn_conditioning_covariate_keys": self.conditioning_keys or None,
            "feature_scaling_covariate_keys": self.feature_scaling_keys or None,
            "ambient_covariate_keys": self.ambient_keys or None,
            "dispersion_key": self.dispersion_key,
            "library_size_key": self.library_size_key,
            "encoder_covariate_keys": self.encoder_keys or None,
            "continuous_covariate_keys": self.continuous_keys or None,
        }

    @property
    def columns(self) -> dict[str, str]:
        """Every categorical column named, with the argument that names it first."""
        named: dict[str, str] = {}
        for argument, value in {**self.keys, "labels_key": self.label_key}.items():
            if argument != "continuous_covariate_keys" and value is not None:
                for column in (value,) if isinstance(value, str) else value:
                    named.setdefault(column, argument)
        return named

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold, with the name of the input but not its folder."""
        rate = self.ambient_rate
        if isinstance(rate, Mapping):
            rate = {_label(name): value for name, value in rate.items()}
        return asdict(self) | {"path": self.path.name, "ambient_rate": rate}


@dataclass(frozen=True)
class Regularised:
    """What a run made.

    Attributes
    ----------
    model
        The trained model, with its data.
    scores
        Of the latents; ``None`` without a column of batches.
    summary
        Content of ``summary.json``.
    """

    model: AmbientRegularizedSCVI | RegularizedMultimodalVI
    scores: Scores | None
    summary: dict[str, Any]


def regularise_file(settings: RegularisedSettings, folder: Path, term: Terminal) -> Regularised:
    """Fit regularised VI to a file, and write the results into an existing folder.

    Parameters
    ----------
    settings
        What to do.
    folder
        Where the data, ``ambient_profile/``, ``model/``, ``figures/`` and ``summary.json`` go.
    term
        Where to report.

    Raises
    ------
    CellstillError
        The file, a key or the counts cannot be used; raised before anything takes long.
    """
    started = time.perf_counter()
    with _loaded(settings, term) as (data, where):
        with term.stage("check", "Checking counts, covariates and settings"):
            check_accelerator(settings.accelerator)
            model = _build(data, where, settings)
            obs = gather_obs(data, settings.columns)
            group = next(
                (key for key in settings.columns if key != settings.label_key and obs[key].nunique() > 1), None
            )
            label = settings.label_key if group is None else scorable_labels(obs, group, settings.label_key)
        loaded = used_mb()
        epochs = "" if settings.max_epochs is None else f" (at most {settings.max_epochs} epochs)"
        with term.stage("train", f"Training{epochs}"):
            model.train(
                settings.max_epochs,
                batch_size=settings.batch_size,
                accelerator=settings.accelerator,
                progress=term.verbose and term.err.is_terminal,
            )
        with term.stage("encode", "Encoding the cells, and telling ambient from native counts"):
            embeddings, latents = _embeddings(model, settings.seed)
            ambient = _Ambient.of(model)
        scores = None
        if group is not None:
            with term.stage("score", "Scoring batch mixing and label conservation"):
                cells = sample_cells(len(obs), MAX_SCORED, settings.seed)
                scores = score(
                    {name: array[cells] for name, array in embeddings.items()},
                    obs.iloc[cells],
                    batch_key=group,
                    label_key=label,
                    covariate_keys=(),
                    seed=settings.seed,
                )
        with term.stage("draw", "Drawing the figures"):
            drawn = sample_cells(len(obs), MAX_DRAWN, settings.seed)
            _draw(folder / "figures", model, {name: array[drawn] for name, array in embeddings.items()}, obs, drawn)
        with term.stage("write", "Writing the cells, the ambient profile and the model"):
            model.save(folder / "model")
            ambient.write_profiles(folder / "ambient_profile")
            _write_cells(settings, folder, model, latents, ambient)
        summary: dict[str, Any] = {
            "input": _describe(data, where, settings, model),
            "settings": settings.to_dict(),
            "training": _training(model),
            "ambient": ambient.summary(obs, settings),
            "scores": None if scores is None else {"batch": group, **scores.to_dict()},
        }
    peak = peak_mb()
    summary |= {
        "n_cells_drawn": len(drawn),
        "seconds": term.seconds | {"total": time.perf_counter() - started},
        "memory_mb": {"loaded": loaded, "peak": peak, "increase": max(peak - loaded, 0.0)},
        "versions": versions(),
        "warnings": list(term.warnings),
    }
    write_json(folder / "summary.json", summary)
    return Regularised(model, scores, summary)


@dataclass(frozen=True)
class _Ambient:
    """Ambient background by modality: profiles and rates by category, and the share of each cell.

    The share is NaN where a cell lacks the modality.
    """

    profiles: Mapping[str, pd.DataFrame]
    rates: Mapping[str, pd.DataFrame]
    shares: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, model: AmbientRegularizedSCVI | RegularizedMultimodalVI) -> _Ambient:
        profiles, rates, shares = {}, {}, {}
        present = model._cells().present
        for name, modality in model.module.config.modalities.items():
            if modality.background is None:
                continue
            profiles[name] = model.get_ambient_profile(modality=name)
            if modality.background == "profile":
                rates[name] = model.get_ambient_rate(modality=name)
            share = model.get_ambient_fraction(modality=name).to_numpy(dtype=np.float64)
            shares[name] = np.where(present[name], share, np.nan) if name in present else share
        return cls(profiles, rates, shares)

    def write_profiles(self, folder: Path) -> None:
        """Write one table of features x categories for each modality."""
        folder.mkdir()
        for name, profile in self.profiles.items():
            profile.T.to_csv(folder / f"{name}.csv", index_label="feature")

    def summary(self, obs: pd.DataFrame, settings: RegularisedSettings) -> dict[str, Any]:
        """Mean share over cells, and that of each category of the first ambient covariate; rates with intervals."""
        column = settings.batch_key or next(iter(settings.ambient_keys), None)
        found = {}
        for name, share in self.shares.items():
            by_category = {}
            if column is not None:
                each = pd.Series(share).groupby(obs[column].astype(str).to_numpy()).mean()
                # A category whose cells all lack the modality has no share of it.
                by_category = each.dropna().to_dict()
            found[name] = {"share": float(np.nanmean(share)), "share_by_category": by_category}
            if name in self.rates:
                rates = self.rates[name]
                found[name]["rates"] = rates.set_axis([_label(key) for key in rates.index]).to_dict(orient="index")
        return found


def _label(category: str | tuple[str, ...]) -> str:
    """Name of a category, or of a combination of them."""
    return ": ".join(category) if isinstance(category, tuple) else str(category)


@contextmanager
def _loaded(settings: RegularisedSettings, term: Terminal) -> Iterator[tuple[AnnData | MuData, str | None]]:
    """Read the file; other matrices can be read meanwhile. The second is the layer of an AnnData with the counts."""
    path = settings.path
    if path.suffix == ".h5mu":
        if settings.layer is not None:
            raise InvalidArgumentError(
                f"layer={settings.layer!r} is for an AnnData. Give the layer of each modality: --modality NAME=LAYER."
            )
        with term.stage("load", "Loading libraries"):
            _load_libraries()
        with term.stage("read", f"Reading {path.name}"):
            mdata = read_mudata(path)
        yield mdata, None
        return
    if settings.modalities or settings.roles:
        option = "--modality" if settings.modalities else "--role"
        raise InvalidArgumentError(
            f"{option} is for an .h5mu file; {path.name} has one modality, which is taken for RNA. Leave {option} out."
        )
    with open_anndata(path) as stored:
        for column, argument in settings.columns.items():
            check_key(argument, column, "adata.obs", stored.obs.columns)
        if settings.layer is not None:
            check_key("layer", settings.layer, "adata.layers", stored.layers)
        with term.stage("load", "Loading libraries"):
            _load_libraries()
        with term.stage("read", f"Reading {path.name}: {stored.shape[0]:,} cells x {stored.shape[1]:,} genes"):
            adata, layer = read_counts(stored, settings.layer)
        yield adata, layer


def _load_libraries() -> None:
    # What is loaded now is not counted as memory of the fit.
    import cellstill.pl
    import cellstill.vi  # noqa: F401


def _build(
    data: AnnData | MuData, layer: str | None, settings: RegularisedSettings
) -> AmbientRegularizedSCVI | RegularizedMultimodalVI:
    """Set the model up, which checks the data."""
    from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI

    sizes: dict[str, Any] = {"n_hidden": settings.n_hidden, "n_latent": settings.n_latent, "seed": settings.seed}
    shared: dict[str, Any] = {**settings.keys, "allow_noninteger": settings.allow_noninteger}
    if is_mudata(data):
        modalities = dict(settings.modalities) or None
        RegularizedMultimodalVI.setup_mudata(
            data, modalities=modalities, modality_roles=dict(settings.roles) or None, **shared
        )
        rate = _by_modality(settings.ambient_rate, data.mod.keys())
        return RegularizedMultimodalVI(data, ambient_rate=rate, **sizes)
    AmbientRegularizedSCVI.setup_anndata(data, layer=layer, **shared)
    return AmbientRegularizedSCVI(data, ambient_rate=settings.ambient_rate, **sizes)


def _by_modality(rates: Any, modalities: Collection[str]) -> Any:
    """Rates of ``modality:category`` as a dictionary by modality and category; others as they are."""
    if not isinstance(rates, Mapping):
        return rates
    found: dict[Any, Any] = {}
    of_categories: dict[str, dict[Any, float]] = {}
    for key, rate in rates.items():
        first, *others = key if isinstance(key, tuple) else (key,)
        modality, colon, category = first.partition(":")
        if colon and modality in modalities:
            of_categories.setdefault(modality, {})[(category, *others) if others else category] = rate
        else:
            found[key] = rate
    twice = [name for name in of_categories if name in found]
    if twice:
        raise InvalidArgumentError(
            f"ambient_rate[{twice[0]!r}]: the rate is stated of the whole modality and of categories. Leave one out."
        )
    return found | of_categories


def _embeddings(
    model: AmbientRegularizedSCVI | RegularizedMultimodalVI, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Embeddings to score and to draw by title, and latents to write by key of ``obsm``."""
    from cellstill.data.pca import fit_pca

    z = model.get_latent_representation()
    cells = model._cells()
    if len(model.modality_names) == 1:
        counts = next(iter(cells.counts.values()))
        components = min(_N_COMPONENTS, min(counts.shape) - 1)
        before = fit_pca(counts, components, seed=seed).transform(counts)
        return {BEFORE: before, AFTER: z}, {"X_vi": z}
    parts = model.get_modality_latents()
    complete = {name: part for name, part in parts.items() if name not in cells.present or cells.present[name].all()}
    return {JOINT: z, **complete}, {"X_vi": z, **{f"X_vi_{name}": part for name, part in parts.items()}}


def _draw(
    folder: Path,
    model: AmbientRegularizedSCVI | RegularizedMultimodalVI,
    embeddings: Mapping[str, np.ndarray],
    obs: pd.DataFrame,
    drawn: np.ndarray,
) -> None:
    """Draw UMAPs (where there is a column to colour by), the training curve, and what each dimension matters for."""
    losses = {
        f"{split}_loss": model.history_[f"loss_{split}"].iloc[:, 0]
        for split in ("train", "validation")
        if f"loss_{split}" in model.history_
    }
    history = {"training": pd.DataFrame(losses)}
    keys = list(obs.columns)
    draw_figures(folder, embeddings if keys else {}, obs.iloc[drawn], keys, history, seed=model.seed)
    write_figure(model.plot_attribution_scatter(indices=drawn), folder / "attribution")


def _write_cells(
    settings: RegularisedSettings,
    folder: Path,
    model: AmbientRegularizedSCVI | RegularizedMultimodalVI,
    latents: Mapping[str, np.ndarray],
    ambient: _Ambient,
) -> None:
    """Write the input with the results."""
    record = {"settings": settings.to_dict(), "versions": versions()}
    corrected = {
        name: {"denoised": model.get_denoised_counts(modality=name)} if settings.denoised else {}
        for name in ambient.shares
    }
    data = model.adata
    assert data is not None
    if not is_mudata(data):
        ((name, share),) = ambient.shares.items()
        write_data(
            settings.path,
            folder / "cells.h5ad",
            obsm=latents,
            record=record,
            shape=data.shape,
            layers=corrected[name],
            columns={"ambient_fraction": share},
        )
        return
    import h5py

    target = folder / "cells.h5mu"
    shutil.copyfile(settings.path, target)
    with h5py.File(target, "r+") as file:
        add_elements(file, obsm=latents, record=record)
        for name, share in ambient.shares.items():
            # The modality has its own cells, in its own order.
            rows = modality_rows(data, name)
            cells = np.flatnonzero(rows >= 0)
            cells = cells[np.argsort(rows[cells])]
            add_elements(
                file["mod"][name],
                layers={layer: matrix[cells] for layer, matrix in corrected[name].items()},
                columns={"ambient_fraction": share[cells]},
            )


def _describe(
    data: AnnData | MuData,
    layer: str | None,
    settings: RegularisedSettings,
    model: AmbientRegularizedSCVI | RegularizedMultimodalVI,
) -> dict[str, Any]:
    cells = model._cells()
    found = {}
    for name, counts in cells.counts.items():
        depth = np.asarray(counts.sum(axis=1)).ravel()
        has = cells.present.get(name, np.ones(len(cells), dtype=bool))
        if is_mudata(data):
            layer = settings.modalities.get(name)
        found[name] = {
            "n_obs": int(has.sum()),
            "n_vars": counts.shape[1],
            "counts": "X" if layer is None else f"layers/{layer}",
            "density": counts.nnz / max(int(has.sum()) * counts.shape[1], 1),
            "median_library_size": float(np.median(depth[has])),
        }
    return {"name": settings.path.name, "n_obs": data.n_obs, "modalities": found}


def _training(model: AmbientRegularizedSCVI | RegularizedMultimodalVI) -> dict[str, Any]:
    """Epochs, and the best of them."""
    record: dict[str, Any] = {"epochs": len(model.history_["loss_train"])}
    if "loss_validation" in model.history_:
        losses = model.history_["loss_validation"].iloc[:, 0]
        record |= {"best_epoch": int(losses.to_numpy().argmin()), "best_validation_loss": float(losses.min())}
    return record
