"""What ``cellstill integrate`` and ``cellstill vi`` leave behind: the data, the figures, the summary."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import cellstill
from cellstill.io.anndata import read_anndata

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_DRAWN = 8_000
"""More cells than this are sampled for figures: points would hide each other."""

_PACKAGES = ("anndata", "harmonypy", "numpy", "scvi-tools", "torch")


def versions() -> dict[str, str]:
    """Return the versions of cellstill and of the libraries that shape its results."""
    return {"cellstill": cellstill.__version__} | {package: version(package) for package in _PACKAGES}


def write_data(
    source: Path,
    target: Path,
    *,
    obsm: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    shape: tuple[int, int],
    corrected: Callable[[Any], Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write everything that ``source`` holds, and the results, as h5ad.

    An h5ad is copied byte for byte before the results are added, so nothing of it can change or get lost.

    Parameters
    ----------
    source, target
        Input, h5ad or Zarr, and output.
    obsm
        Embeddings to add.
    record
        Content of ``uns["cellstill"]``.
    shape
        Number of cells and of genes.
    corrected
        Function that fills ``layers["corrected"]``, an array of that shape on disk.
    layers, columns
        Matrices to add to ``layers``, and numbers to add to ``obs``.
    """
    import h5py
    from anndata import settings

    if source.is_dir():
        with settings.override(allow_write_nullable_strings=True):
            read_anndata(source).write_h5ad(target, compression="gzip")
    else:
        shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        add_elements(file, obsm=obsm, record=record, layers=layers, columns=columns)
        if corrected is not None:
            add_elements(file, layers={})
            if "corrected" in file["layers"]:
                del file["layers/corrected"]
            layer = file["layers"].create_dataset("corrected", shape, dtype="float32")
            layer.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            corrected(layer)


def add_elements(
    group: Any,
    *,
    obsm: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Put results into an AnnData or MuData of an open HDF5 file, in place of what has their names.

    Parameters
    ----------
    group
        Root of the AnnData or MuData.
    obsm, layers
        Arrays and matrices by name.
    record
        Content of ``uns["cellstill"]``.
    columns
        Numbers by the name of their column of ``obs``.
    """
    from anndata.io import write_elem

    parts = {"obsm": obsm, "layers": layers, "uns": None if record is None else {"cellstill": _storable(record)}}
    for place, elements in parts.items():
        if elements is None:
            continue
        if place not in group:
            write_elem(group, place, {})
        for name, element in elements.items():
            write_elem(group[place], name, element)
    for name, values in (columns or {}).items():
        write_elem(group["obs"], name, values)
        order = [str(column) for column in group["obs"].attrs["column-order"]]
        if name not in order:
            group["obs"].attrs["column-order"] = np.asarray([*order, name], dtype=object)


def write_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as PNG, to look at, and as PDF, to print."""
    stem.parent.mkdir(exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), dpi=200)
    figure.savefig(stem.with_suffix(".pdf"), dpi=300)


def draw_figures(
    folder: Path,
    embeddings: Mapping[str, np.ndarray],
    obs: pd.DataFrame,
    keys: list[str],
    history: Mapping[str, pd.DataFrame],
    *,
    seed: int,
) -> None:
    """Draw the UMAP of each embedding coloured by each key, and the training curves.

    Parameters
    ----------
    folder
        Where the figures go.
    embeddings
        Coordinates by title, shape ``(n_obs, n_dims)``; without any, no UMAP is drawn.
    obs
        Annotation of these cells.
    keys
        Columns to colour by.
    history
        Losses by phase.
    seed
        Seed of the layouts.
    """
    from cellstill.pl import embedding_figure, training_figure, umap_coordinates

    n_neighbors = min(15, len(obs) - 1)
    panels = {title: umap_coordinates(array, n_neighbors=n_neighbors, seed=seed) for title, array in embeddings.items()}
    if panels:
        write_figure(embedding_figure(panels, {key: obs[key] for key in keys}, seed=seed), folder / "umap")
    trained = {phase: losses for phase, losses in history.items() if len(losses)}
    if trained:
        write_figure(training_figure(trained), folder / "training")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that people can read; numbers that are not finite become null."""
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _storable(value: Any) -> Any:
    """Bring nested settings into what h5ad can hold: no ``None``, and lists of text."""
    if isinstance(value, Mapping):
        return {str(key): _storable(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return np.asarray([str(item) for item in value], dtype=object)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
