"""What is to be condensed: cells, their labels, and which of them train, choose and judge."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from cellstill.condense.cells import LabelledCells
from cellstill.condense.genes import variable_genes
from cellstill.condense.splits import split_classes
from cellstill.data.annotations import category_names, is_mudata
from cellstill.data.counts import as_csr, check_counts, get_layer
from cellstill.data.covariates import obs_column
from cellstill.data.genes import align_genes, check_unique_genes
from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside, whole_number

_log = logging.getLogger("cellstill")

UNLABELLED = frozenset({"", "nan", "NaN", "NAN", "NA", "N/A", "<NA>", "NaT", "None"})
"""Texts, blanks around them aside, that are written where a label or donor is missing."""


@dataclass(frozen=True, eq=False)
class Task:
    """One label of the cells.

    Attributes
    ----------
    key
        Column of ``obs``.
    names
        Its categories, in the order of their codes.
    of_class
        Category of each class, int64, shape ``(n_classes,)``.
    dtype
        Of the categories: ``"int64"``, ``"bool"``, or ``"str"`` for all else.
    ordered
        Whether the order of the categories has a meaning.
    """

    key: str
    names: tuple[str, ...]
    of_class: np.ndarray
    dtype: str = "str"
    ordered: bool = False

    @property
    def categories(self) -> pd.Index[Any]:
        """The categories as they were, of which ``names`` is the text."""
        if self.dtype == "bool":
            return pd.Index([name == "True" for name in self.names])
        return pd.Index([int(name) for name in self.names] if self.dtype == "int64" else self.names)


@dataclass(frozen=True, eq=False)
class CondensationProblem:
    """Labelled cells, split once and for all.

    Attributes
    ----------
    train, validation, test
        Everything is fitted on the first, chosen on the second, and scored once on the third.
    classes
        Names of the classes, in the order of their codes. With several label columns, the combinations that occur.
    tasks
        One for each label column.
    genes
        Names of the genes used, shape ``(n_vars,)``.
    rows
        Positions in the AnnData of the cells of ``"train"``, ``"validation"`` and ``"test"``.
    donors
        Donor of each training cell, if there are donors.
    """

    train: LabelledCells
    validation: LabelledCells
    test: LabelledCells
    classes: tuple[str, ...]
    tasks: tuple[Task, ...]
    genes: np.ndarray
    rows: dict[str, np.ndarray]
    donors: np.ndarray | None = None

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        labels_key: str | Sequence[str],
        *,
        layer: str | None = None,
        donor_key: str | None = None,
        n_top_genes: int | None = 2000,
        train_size: float = 0.7,
        validation_size: float = 0.1,
        seed: int = 0,
    ) -> CondensationProblem:
        """Read cells and labels, and split them.

        Parameters
        ----------
        adata
            Counts and labels.
        labels_key
            Column of ``adata.obs`` with the labels, or several: a class is then a combination of their categories, and
            a synthetic cell has all labels.
        layer
            Layer of counts; ``None`` takes ``X``.
        donor_key
            Column with donors or other units: each is on one side of the split only, so that scores tell of new donors.
        n_top_genes
            Most variable genes kept, chosen on the training cells. More tell more and take longer. ``None`` keeps all
            that have counts in the training cells.
        train_size, validation_size
            Shares of the cells, within each class (of donors, with ``donor_key``); the rest are test cells, if any.
        seed
            Of the split.

        Raises
        ------
        InvalidArgumentError
            Missing labels or donors, also as text (:data:`UNLABELLED`), a column of one category, combinations of
            labels that read alike, or too few donors to split.
        InvalidCountsError
            The layer holds no counts.
        """
        check_anndata(adata)
        keys = label_keys(labels_key)
        if n_top_genes is not None:
            n_top_genes = whole_number("n_top_genes", n_top_genes, least=1)
        check_unique_genes(adata.var_names)
        check_counts(adata, layer, allow_noninteger=None)
        codes, classes, _ = read_labels(adata, keys)
        donors = None if donor_key is None else read_donors(adata, donor_key)
        parts = split_classes(codes, donors, train_size=train_size, validation_size=validation_size, seed=seed)
        _warn_about_small_classes(codes, classes, parts)
        counts = as_csr(get_layer(adata, layer))
        genes = variable_genes(counts[parts["train"]].astype(np.float32), n_top_genes)
        names = adata.var_names.to_numpy().astype(str)[genes]
        _log.info(
            "%s: %d classes, %s cells of training, validation and test, %d genes.",
            ", ".join(keys),
            len(classes),
            " / ".join(f"{len(rows):,}" for rows in parts.values()),
            len(genes),
        )
        if len(genes) < adata.n_vars and len(genes) != n_top_genes:
            n_absent = adata.n_vars - len(genes)
            _log.info("Left out, without counts in the training cells: %d of %d genes.", n_absent, adata.n_vars)
        return cls.from_rows(adata, keys, parts, names, layer=layer, donor_key=donor_key)

    @classmethod
    def from_rows(
        cls,
        adata: AnnData,
        labels_key: str | Sequence[str],
        rows: Mapping[str, np.ndarray],
        genes: np.ndarray,
        *,
        layer: str | None = None,
        donor_key: str | None = None,
    ) -> CondensationProblem:
        """Build a problem whose split and genes are known.

        Parameters
        ----------
        adata, labels_key, layer, donor_key
            As in :meth:`from_anndata`.
        rows
            Positions of the cells of ``"train"``, ``"validation"`` and ``"test"``.
        genes
            Names of the genes.

        Raises
        ------
        InvalidArgumentError
            Positions that ``adata`` does not have.
        GeneMismatchError
            Genes that it does not have.
        """
        check_anndata(adata)
        keys = label_keys(labels_key)
        last = max((int(part.max()) for part in rows.values() if len(part)), default=-1)
        if last >= adata.n_obs:
            raise InvalidArgumentError(
                f"adata has {adata.n_obs} cells; the split names cell {last}. Pass its own cells."
            )
        codes, classes, tasks = read_labels(adata, keys)
        check_counts(adata, layer, set_up=True)
        counts = as_csr(get_layer(adata, layer)).astype(np.float32)
        counts, _ = align_genes(counts, adata.var_names.astype(str), list(genes), min_overlap=1.0)
        donors = None if donor_key is None else read_donors(adata, donor_key)
        return cls(
            **{name: LabelledCells(counts[part], codes[part]) for name, part in rows.items()},
            classes=classes,
            tasks=tasks,
            genes=np.asarray(genes).astype(str),
            rows=dict(rows),
            donors=None if donors is None else donors[rows["train"]],
        )

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def fingerprint(self) -> str:
        """Hash of the classes of all cells, and of the totals of their counts and of the genes in each part."""
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.validation, self.test):
            totals = [np.asarray(part.counts.sum(axis=axis, dtype=np.float64)).ravel() for axis in (0, 1)]
            for array in (part.codes.astype(np.int64), *totals):
                found.update(array.tobytes())
        return found.hexdigest()

    def budget(self, samples_per_class: int) -> np.ndarray:
        """Number of synthetic cells of each class, int64: as many as asked for, but no more than real ones.

        Raises
        ------
        InvalidArgumentError
            Fewer than 1.
        """
        budget = whole_number("samples_per_class", samples_per_class, least=1)
        return np.minimum(budget, np.bincount(self.train.codes, minlength=self.n_classes))


def check_anndata(adata: object) -> None:
    """Refuse what is no AnnData."""
    if not isinstance(adata, AnnData):
        remedy = (
            "Give one of its modalities: mdata['rna']" if is_mudata(adata) else "Read a file with anndata.read_h5ad"
        )
        raise InvalidArgumentError(f"adata is of type {type(adata).__name__}, and an AnnData is needed. {remedy}.")


def label_keys(labels_key: Any) -> list[str]:
    """Columns that ``labels_key`` names, one or several."""
    keys = [labels_key] if isinstance(labels_key, str) or not isinstance(labels_key, Iterable) else list(labels_key)
    if not all(isinstance(key, str) for key in keys):
        raise InvalidArgumentError(
            f"labels_key={labels_key!r} has to name a column of adata.obs, or several in a list."
        )
    return keys


def read_labels(adata: AnnData, keys: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], tuple[Task, ...]]:
    """Codes of the classes, their names, and the tasks that they serve; see :class:`CondensationProblem`."""
    if not keys or len(set(keys)) < len(keys):
        raise InvalidArgumentError(f"labels_key={list(keys)} has to name one column of adata.obs or several different.")
    columns = [obs_column(adata.obs, key, "labels_key") for key in keys]
    names = [category_names(column) for column in columns]
    for key, column, known in zip(keys, columns, names, strict=True):
        _check_named("labels_key", key, column, known, "class")
        if len(known) < 2:
            remedy = "Leave it out" if len(keys) > 1 else "Name a column with at least two categories"
            raise InvalidArgumentError(
                f"labels_key={key!r}: all cells are labelled {known[0]!r}, so there is nothing to tell apart. {remedy}."
            )
    coded = np.stack(
        [
            pd.Index(known).get_indexer(pd.Index(column.astype(str)))
            for known, column in zip(names, columns, strict=True)
        ],
        axis=1,
    )
    combinations, codes = np.unique(coded, axis=0, return_inverse=True)
    classes = tuple(" | ".join(known[code] for known, code in zip(names, row, strict=True)) for row in combinations)
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise InvalidArgumentError(
            f"labels_key={list(keys)}: different combinations of labels are all called {twice!r}. Rename the "
            "categories that contain ' | '."
        )
    tasks = tuple(
        Task(key, known, combinations[:, k].astype(np.int64), _dtype(column), _is_ordered(column))
        for k, (key, known, column) in enumerate(zip(keys, names, columns, strict=True))
    )
    return codes.ravel().astype(np.int64), classes, tasks


def _is_ordered(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype) and bool(column.dtype.ordered)


def _dtype(column: pd.Series) -> str:
    categories = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return {"b": "bool", "i": "int64", "u": "int64"}.get(getattr(categories.dtype, "kind", "O"), "str")


def read_donors(adata: AnnData, key: str) -> np.ndarray:
    """Name of each cell's donor, shape ``(n_obs,)``; none may be missing, also as text (:data:`UNLABELLED`)."""
    column = obs_column(adata.obs, key, "donor_key")
    _check_named("donor_key", key, column, category_names(column), "donor")
    return column.astype(str).to_numpy()


def _check_named(argument: str, key: str, column: pd.Series, names: Sequence[str], what: str) -> None:
    """Refuse text that stands for a missing name, as files that went through text have it."""
    found = [name for name in names if name.strip() in UNLABELLED]
    if found:
        missing = column.astype(str).isin(found)
        raise InvalidArgumentError(
            f"{argument}: adata.obs[{key!r}] is missing for {int(missing.sum())} of {len(column)} cells, which are "
            f"labelled {', '.join(map(repr, found))}. Label those cells or remove them: "
            f"adata[~adata.obs[{key!r}].isin({found})].copy(). If it is the name of a {what}, rename it."
        )


def _warn_about_small_classes(codes: np.ndarray, classes: Sequence[str], parts: dict[str, np.ndarray]) -> None:
    n_single = int((np.bincount(codes, minlength=len(classes)) == 1).sum())
    if n_single > len(classes) / 2:
        warnings.warn(
            f"{n_single} of {len(classes)} classes have a single cell ({len(codes)} cells in all), of which nothing "
            "can be condensed or tested. Is labels_key the column of labels?",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    absent = {
        name: [classes[code] for code in range(len(classes)) if not (codes[rows] == code).any()]
        for name, rows in parts.items()
    }
    if absent["train"]:
        raise InvalidArgumentError(
            f"No training cell is left of the classes {absent['train']}: all their cells belong to donors of the other "
            "parts. Remove these classes, or split without donor_key."
        )
    if len(parts["test"]) and absent["test"]:
        warnings.warn(
            f"No test cell is left of the classes {absent['test']}, which have too few cells or donors: scores do not "
            "tell of them.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
