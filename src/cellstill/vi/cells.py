"""Cells as a regularised model reads them: counts by modality in its order of features, covariates as its codes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.data.annotations import category_names, gather_obs, is_mudata, modality_rows
from cellstill.data.counts import as_csr, check_counts, get_layer, iter_rows
from cellstill.data.genes import align_genes, check_unique_genes
from cellstill.data.modalities import ModalityLoader
from cellstill.data.selection import cell_positions
from cellstill.errors import CellstillWarning, InvalidArgumentError, InvalidCountsError, check_key, level_outside
from cellstill.vi.covariates import CovariateKeys

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_log = logging.getLogger("cellstill")


@dataclass(frozen=True)
class Cells:
    """Cells, aligned with a model.

    Attributes
    ----------
    counts
        By modality (sorted by name): CSR, shape ``(n_obs, n_features)``, in the model's order of features. Rows of
        cells that lack the modality are empty.
    present
        By modality: mask of the cells that have it, shape ``(n_obs,)``.
    codes
        By column: category of each cell, int64, shape ``(n_obs,)``.
    continuous
        Standardised continuous covariates, float32, shape ``(n_obs, n_continuous)``.
    obs_names
        Names of the cells, in the order of the data's own ``obs``.
    features
        By modality: names of the features.
    categories
        By column: names of the codes.
    scales
        By continuous column: mean and standard deviation that it was standardised with.
    overlap
        By modality: share of the model's features that the data have.
    posterior
        Posteriors that minified data hold instead of counts (:mod:`cellstill.vi.minified`), by entry of a minibatch.
    """

    counts: Mapping[str, sp.csr_matrix]
    present: Mapping[str, np.ndarray]
    codes: Mapping[str, np.ndarray]
    continuous: np.ndarray
    obs_names: pd.Index
    features: Mapping[str, tuple[str, ...]]
    categories: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[float, float]]
    overlap: Mapping[str, float]
    posterior: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.obs_names)

    @classmethod
    def read(
        cls,
        data: AnnData | MuData,
        keys: CovariateKeys,
        *,
        layers: Mapping[str, str | None],
        features: Mapping[str, Sequence[str]] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        scales: Mapping[str, tuple[float, float]] | None = None,
        extend: bool = False,
        allow_missing_modalities: bool = False,
        allow_noninteger: bool = False,
        min_gene_overlap: float = 0.5,
    ) -> Cells:
        """Read any data set for a model.

        Parameters
        ----------
        data
            AnnData for a model of one modality, MuData for any; in memory or backed. Features are matched by name.
        keys
            Columns to read.
        layers
            Layer with counts of each modality; ``None`` is ``X``. An AnnData is of the only modality.
        features
            The model's features by modality; ``None`` takes those of the data.
        categories
            The model's categories by column; ``None`` takes those that occur.
        scales
            The model's scales of continuous covariates; ``None`` takes those of the data.
        extend
            Append categories that the model does not know, sorted, instead of refusing them.
        allow_missing_modalities
            Take a modality that ``data`` do not have for one that all cells lack.
        allow_noninteger, min_gene_overlap
            See :func:`~cellstill.data.check_counts` and :func:`~cellstill.data.genes.align_genes`.

        Raises
        ------
        InvalidArgumentError
            A category is unknown, data are not of the model's modalities, or a cell has counts in none.
        MissingKeyError
            A column, layer or modality does not exist; the message lists those that do.
        InvalidCountsError
            A matrix does not hold counts, or a cell of an AnnData is empty.
        GeneMismatchError
            Too few features in common, or names that occur twice.

        Warns
        -----
        CellstillWarning
            Cells of a MuData without a single count of a modality: they are taken to lack it.
        """
        modalities = _modalities(data, layers, allow_missing_modalities)
        obs = gather_obs(data, keys.used)
        names, codes = encode(obs, keys, categories, extend=extend)
        continuous, used_scales = standardise(obs, keys.continuous, scales)
        counts, present, used_features, overlap = {}, {}, {}, {}
        for name, (adata, rows) in modalities.items():
            wanted = None if features is None else features[name]
            if adata is None:
                if wanted is None:
                    raise InvalidArgumentError(f"mdata has no modality {name!r}, and its features are not known.")
                matrix, share = sp.csr_matrix((0, len(wanted)), dtype=np.float32), 0.0
            else:
                matrix, rows = _read_counts(
                    adata, layers[name], rows, name, allow_noninteger=allow_noninteger, may_be_empty=is_mudata(data)
                )
                if wanted is None:
                    check_unique_genes(adata.var_names)
                    wanted = adata.var_names.astype(str)
                matrix, share = align_genes(matrix, adata.var_names, wanted, min_overlap=min_gene_overlap)
            counts[name], present[name] = _spread_rows(matrix, rows), rows >= 0
            used_features[name], overlap[name] = tuple(map(str, wanted)), share
        alone = ~np.any(list(present.values()), axis=0)
        if alone.any():
            shown = ", ".join(repr(str(cell)) for cell in data.obs_names[alone][:3])
            raise InvalidArgumentError(
                f"{int(alone.sum())} cells have no counts in any of {list(counts)} ({shown}"
                f"{', ...' if alone.sum() > 3 else ''}). Remove them."
            )
        return cls(
            counts=counts,
            present=present,
            codes=codes,
            continuous=continuous,
            obs_names=data.obs_names.astype(str),
            features=used_features,
            categories=names,
            scales=used_scales,
            overlap=overlap,
        )

    def say_what_is_lacking(self) -> None:
        """Tell the log how many cells lack each modality, and what follows for their latents."""
        for name, has in self.present.items():
            if not has.all():
                lacking = int((~has).sum())
                _log.info(
                    "%d of %d cells lack %r: they add nothing to its terms, and its part of their z, if it has one, is "
                    "the prior.",
                    *(lacking, len(self), name),
                )

    @property
    def per_cell(self) -> dict[str, np.ndarray]:
        """What a minibatch holds beside counts: ``"code/{column}"``, ``"continuous"`` and ``"{modality}/present"``.

        The latter two are left out where there are no continuous covariates and where all cells have the modality.
        """
        arrays: dict[str, np.ndarray] = {code_of(column): code for column, code in self.codes.items()}
        if self.continuous.shape[1]:
            arrays["continuous"] = self.continuous
        for name, has in self.present.items():
            if not has.all():
                arrays[f"{name}/present"] = has.astype(np.float32)
        return {**arrays, **self.posterior}

    def loader(self, indices: np.ndarray | None = None, **settings: Any) -> ModalityLoader:
        """Minibatches of these cells, or of some.

        Parameters
        ----------
        indices
            Cells to visit, as positions or a mask; ``None`` visits all of them.
        **settings
            Of :class:`~cellstill.data.modalities.ModalityLoader`.
        """
        return ModalityLoader(self.counts, self.per_cell, indices=indices, **settings)

    def __getitem__(self, indices: np.ndarray | Sequence[int] | slice | None) -> Cells:
        if indices is None:
            return self
        rows = cell_positions(indices, len(self))
        return replace(
            self,
            counts={name: matrix[rows] for name, matrix in self.counts.items()},
            present={name: has[rows] for name, has in self.present.items()},
            codes={column: code[rows] for column, code in self.codes.items()},
            continuous=self.continuous[rows],
            obs_names=self.obs_names[rows],
            posterior={name: values[rows] for name, values in self.posterior.items()},
        )


def code_of(column: str) -> str:
    """Key of a column's codes in a minibatch, which no count or other array has."""
    return f"code/{column}"


def _modalities(
    data: AnnData | MuData, layers: Mapping[str, str | None], allow_missing: bool
) -> dict[str, tuple[AnnData | None, np.ndarray]]:
    """AnnData of each modality, and the row of each cell in it."""
    names = sorted(layers)
    if not is_mudata(data):
        if len(names) != 1:
            raise InvalidArgumentError(
                f"The model has the modalities {names}, and an AnnData has one. Give a MuData: "
                f"mudata.MuData({{{names[0]!r}: adata, ...}})."
            )
        return {names[0]: (data, np.arange(data.n_obs))}
    found: dict[str, tuple[AnnData | None, np.ndarray]] = {}
    for name in names:
        if allow_missing and name not in data.mod:
            found[name] = (None, np.full(data.n_obs, -1))
            continue
        check_key("modality", name, "mdata.mod", data.mod.keys())
        _check_layer(data[name], layers[name], name)
        found[name] = (data[name], modality_rows(data, name))
    return found


def _check_layer(adata: AnnData, layer: str | None, name: str) -> None:
    """Refuse a layer that a modality lacks, in the words of who sets up a MuData."""
    layers = adata.layers.keys()
    if layer is not None:
        check_key(f"modalities[{name!r}]", layer, f"mdata[{name!r}].layers", layers)
    elif adata.X is None:
        raise InvalidCountsError(
            f"mdata[{name!r}].X is empty. Name the layer that holds counts: modalities={{{name!r}: ...}} (layers: "
            f"{', '.join(map(repr, layers)) or 'none'})."
        )


def _read_counts(
    adata: AnnData,
    layer: str | None,
    rows: np.ndarray,
    name: str,
    *,
    allow_noninteger: bool,
    may_be_empty: bool,
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts of a modality, and the row of each cell in them; -1 also where a cell has no count, if it may."""
    if may_be_empty:
        blocks = iter_rows(get_layer(adata, layer))
        full = np.concatenate([np.diff(block.indptr) > 0 for _, block in blocks] or [np.empty(0, dtype=bool)])
        if full.any() and not full.all():
            lacking = (rows >= 0) & ~full[rows]
            warnings.warn(
                f"{int(lacking.sum())} cells have no count in the modality {name!r} and are taken to lack it.",
                CellstillWarning,
                stacklevel=level_outside(),
            )
            adata = adata[full]
            rows = np.where(lacking, -1, np.where(rows >= 0, np.cumsum(full)[rows] - 1, -1))
    check_counts(adata, layer, allow_noninteger=allow_noninteger, set_up=True)
    return as_csr(get_layer(adata, layer)), rows


def _spread_rows(counts: sp.csr_matrix, rows: np.ndarray) -> sp.csr_matrix:
    """Give each cell its row, or an empty one."""
    if np.array_equal(rows, np.arange(counts.shape[0])):
        return counts
    has = rows >= 0
    taken = counts[rows[has]]
    lengths = np.zeros(len(rows), dtype=taken.indptr.dtype)
    lengths[has] = np.diff(taken.indptr)
    indptr = np.append(0, np.cumsum(lengths)).astype(taken.indptr.dtype)
    return sp.csr_matrix((taken.data, taken.indices, indptr), shape=(len(rows), counts.shape[1]), copy=False)


def encode(
    obs: pd.DataFrame, keys: CovariateKeys, categories: Mapping[str, Sequence[str]] | None, *, extend: bool = False
) -> tuple[dict[str, tuple[str, ...]], dict[str, np.ndarray]]:
    """Names of the categories of each column, and the codes of the cells; see :meth:`Cells.read`."""
    names: dict[str, tuple[str, ...]] = {}
    codes: dict[str, np.ndarray] = {}
    for column in keys.columns:
        values = obs[column].astype(str)
        known = category_names(obs[column]) if categories is None else tuple(map(str, categories[column]))
        unknown = sorted(set(values) - set(known))
        if unknown and not extend:
            raise InvalidArgumentError(
                f"{keys.arguments[column]}: {column!r} has categories that the model does not know: {unknown[:5]}"
                f"{' and others' if len(unknown) > 5 else ''}. It knows: {list(known[:10])}"
                f"{' and others' if len(known) > 10 else ''}. Teach it new ones with load_query_data."
            )
        names[column] = (*known, *unknown)
        codes[column] = pd.Index(names[column]).get_indexer(pd.Index(values)).astype(np.int64)
    return names, codes


def standardise(
    obs: pd.DataFrame, columns: Sequence[str], scales: Mapping[str, tuple[float, float]] | None
) -> tuple[np.ndarray, dict[str, tuple[float, float]]]:
    """Continuous columns, standardised, and the scales used; see :meth:`Cells.read`."""
    used: dict[str, tuple[float, float]] = {}
    result = np.empty((len(obs), len(columns)), dtype=np.float32)
    for j, column in enumerate(columns):
        try:
            values = obs[column].to_numpy(dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"continuous_covariate_keys: {column!r} does not hold numbers.") from error
        used[column] = (float(values.mean()), float(values.std())) if scales is None else scales[column]
        mean, sd = used[column]
        if not np.isfinite(values).all() or not sd > 0:
            raise InvalidArgumentError(
                f"continuous_covariate_keys: {column!r} is constant or not finite. Leave it out."
            )
        result[:, j] = (values - mean) / sd
    return result, used
