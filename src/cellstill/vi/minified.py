"""Data without counts: the posteriors of each cell, from which all that a model expects of it follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from cellstill._compat.scvi import OBSERVED_LIB_SIZE, QLM, QLV, QZM, QZV, TOTALS, mark_minified
from cellstill.data.annotations import gather_obs, is_mudata
from cellstill.errors import InvalidArgumentError, check_key
from cellstill.vi.cells import Cells, encode, standardise
from cellstill.vi.covariates import CovariateKeys
from cellstill.vi.evaluation import blocks, to_numpy
from cellstill.vi.module import RegularizedVAE

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_BATCH_SIZE = 1024


def minified(
    data: AnnData | MuData, kind: str, arrays: Mapping[str, np.ndarray], *, keep_counts: bool
) -> AnnData | MuData:
    """Make data with posteriors, and without counts unless ``keep_counts``; ``data`` are left as they are."""
    if is_mudata(data):
        if data.isbacked and not keep_counts:
            raise InvalidArgumentError("The MuData is backed by a file. Read it into memory to minify it.")
        small = data.copy()
        for name in small.mod if not keep_counts else ():
            small.mod[name] = _without_counts(small.mod[name])
    else:
        small = data.copy() if keep_counts else _without_counts(data)
    mark_minified(small, kind)
    for key, values in arrays.items():
        small.obsm[key] = values
    small.obs[OBSERVED_LIB_SIZE] = arrays[TOTALS].sum(axis=1)
    return small


def posteriors(module: RegularizedVAE, cells: Cells) -> dict[str, np.ndarray]:
    """Mean and variance of z and of log library sizes, and the totals of cells, by key of ``obsm``."""
    names, order = sorted(cells.counts), module.config.columns_of_z
    shapes = dict.fromkeys((QZM, QZV), module.config.n_latent) | dict.fromkeys((QLM, QLV, TOTALS), len(names))
    arrays = {key: np.empty((len(cells), width), dtype=np.float32) for key, width in shapes.items()}
    for block in blocks(module, cells, _BATCH_SIZE):
        arrays[QZM][block.rows] = to_numpy(block.latent.mean)[:, order]
        arrays[QZV][block.rows] = to_numpy(block.latent.variance)[:, order]
        for j, name in enumerate(names):
            library = module.library(name, block.counts[name], block.batch)
            arrays[QLM][block.rows, j] = to_numpy(library.mean)[:, 0]
            arrays[QLV][block.rows, j] = to_numpy(library.variance)[:, 0]
            arrays[TOTALS][block.rows, j] = to_numpy(block.counts[name].library_size())
    return arrays


def read_minified(
    data: AnnData | MuData,
    keys: CovariateKeys,
    features: Mapping[str, Sequence[str]],
    categories: Mapping[str, Sequence[str]],
    scales: Mapping[str, tuple[float, float]],
    columns_of_z: np.ndarray,
) -> Cells:
    """Read minified data for a model.

    The total of a cell, which is all that is known of its counts, stands in the column of the first feature.

    Parameters
    ----------
    data
        Minified data.
    keys, features, categories, scales
        Of the model; as for :meth:`~cellstill.vi.cells.Cells.read`.
    columns_of_z
        Of the model's configuration: z is stored as getters give it.

    Raises
    ------
    MissingKeyError
        A posterior or column is absent.
    InvalidArgumentError
        Posteriors are of another model, or a category is unknown.
    """
    names, n_latent = sorted(features), len(columns_of_z)
    stored: dict[str, np.ndarray] = {}
    for key, width in {QZM: n_latent, QZV: n_latent, QLM: len(names), QLV: len(names), TOTALS: len(names)}.items():
        check_key("minified data", key, "obsm", data.obsm.keys())
        stored[key] = np.asarray(data.obsm[key], dtype=np.float32)
        if stored[key].shape != (data.n_obs, width):
            raise InvalidArgumentError(
                f"obsm[{key!r}] has the shape {stored[key].shape}, and this model's is {(data.n_obs, width)}: the data "
                "were minified by another model. Give data with counts, or those that this model minified."
            )
    obs = gather_obs(data, keys.used)
    known, codes = encode(obs, keys, categories)
    continuous, used = standardise(obs, keys.continuous, scales)
    order = np.argsort(columns_of_z)
    posterior = {"latent/mean": stored[QZM][:, order], "latent/variance": stored[QZV][:, order]}
    counts, present = {}, {}
    for j, name in enumerate(names):
        posterior[f"{name}/library"] = np.column_stack([stored[QLM][:, j], stored[QLV][:, j]])
        total = stored[TOTALS][:, j]
        counts[name] = sp.csr_matrix(
            (total, np.zeros(len(total), dtype=np.int32), np.arange(len(total) + 1)), (len(total), len(features[name]))
        )
        present[name] = total > 0
    return Cells(
        counts=counts,
        present=present,
        codes=codes,
        continuous=continuous,
        obs_names=data.obs_names.astype(str),
        features={name: tuple(map(str, features[name])) for name in names},
        categories=known,
        scales=used,
        overlap=dict.fromkeys(names, 1.0),
        posterior=posterior,
    )


def _without_counts(adata: AnnData) -> AnnData:
    from anndata import AnnData

    def copied(of: Any) -> dict[str, Any]:
        return {key: of[key].copy() for key in of}

    def nothing() -> sp.csr_matrix:
        return sp.csr_matrix(adata.shape, dtype=np.float32)

    return AnnData(
        X=nothing(),
        obs=adata.obs.copy(),
        var=adata.var.copy(),
        obsm=copied(adata.obsm),
        varm=copied(adata.varm),
        obsp=copied(adata.obsp),
        varp=copied(adata.varp),
        uns=dict(adata.uns),
        layers={layer: nothing() for layer in adata.layers},
    )
