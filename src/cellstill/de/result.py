from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Contrast(NamedTuple):
    """The comparison made: ``group1`` over ``group2``, two values of the column ``column`` of ``obs``."""

    column: str
    group1: str
    group2: str

    def __str__(self) -> str:
        return f"{self.column}: {self.group1} over {self.group2}"

    @property
    def arguments(self) -> dict[str, str]:
        """The comparison as arguments ``groupby, group1, group2``."""
        return {"groupby": self.column, "group1": self.group1, "group2": self.group2}


@dataclass(frozen=True, kw_only=True, eq=False)
class DEResult:
    """One comparison, gene by gene, with what is needed to defend it.

    Attributes
    ----------
    table
        One row per gene, in the order of the genes given. Fold changes are log2 of group1 over group2.
        ``is_de`` marks the genes called, ``direction`` is ``"up"`` or ``"down"`` for those and ``"none"`` for all
        others. Pseudobulk: ``gene, base_mean, lfc, lfc_se, p_value, fdr, is_de, direction``; a gene that could not be
        tested keeps its row, with NaN for what is unknown. Bayesian:
        ``gene, base_mean, lfc_mean, ci_low, ci_high, prob_de, fdr, is_de, direction``, without ``base_mean`` where no
        counts were given; NaN likewise, where counts were too few.
    contrast
        Column and the two groups.
    design
        The model of the mean in the names of ``obs``, such as ``"~ batch + condition"``; a term that could not be
        told from the others is not in it, and ``notes`` says why.
    method
        ``"bayesian"``, or the method of :class:`~cellstill.de.PseudobulkConfig`.
    units
        One row per replicate: sample, group, the design's other columns, and ``n_cells``.
    left_out
        The samples that were not used: sample, group, ``n_cells``, ``reason``.
    params
        The configuration it was made with.
    notes
        What the method changed or could not do, in sentences.
    """

    table: pd.DataFrame
    contrast: Contrast
    design: str
    method: str
    units: pd.DataFrame
    left_out: pd.DataFrame
    params: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def de_genes(self) -> list[str]:
        """Names of the genes called, most certain first; of those as certain, the largest changes first."""
        called = self.table[self.table["is_de"]]
        size = called["lfc" if "lfc" in called else "lfc_mean"].abs()
        falling = {"prob_de": False, "p_value": True, "size": False}
        called = called.assign(size=size)
        by = [column for column in falling if column in called]
        return called.sort_values(by, ascending=[falling[column] for column in by], kind="stable")["gene"].tolist()

    @property
    def n_samples(self) -> dict[str, int]:
        """Replicates of each group."""
        return {group: int((self._groups == group).sum()) for group in self.contrast[1:]}

    @property
    def n_cells(self) -> dict[str, int]:
        """Cells of each group, in the replicates used."""
        return {group: int(self.units["n_cells"][self._groups == group].sum()) for group in self.contrast[1:]}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`table` as CSV, whole or not at all; a file of that name is replaced.

        What is unknown is an empty field. ``pandas.read_csv(path)`` gives the table back (to the last bit with
        ``float_precision="round_trip"``).

        Parameters
        ----------
        path
            File to write; compressed if it ends in ``.gz``, ``.bz2``, ``.xz`` or ``.zst``.

        Raises
        ------
        StoreError
            The file cannot be written.
        """
        write_csv(self.table, path)

    def volcano(self, *, n_labels: int = 10) -> Figure:
        """Draw how certain each gene is against its fold change (:func:`cellstill.pl.volcano_figure`).

        Parameters
        ----------
        n_labels
            Genes to name, most certain first, as far as there is room.

        Returns
        -------
        matplotlib.figure.Figure
            Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.
        """
        from cellstill.pl.differential import volcano_figure

        tables = {str(self.contrast): self.table}
        return volcano_figure(tables, fdr=self.params["fdr"], threshold=floor_of(self.params), n_labels=n_labels)

    def ma(self, *, n_labels: int = 10) -> Figure:
        """Draw the fold change of each gene against its mean expression (:func:`cellstill.pl.ma_figure`).

        Parameters
        ----------
        n_labels
            Genes to name, most certain first, as far as there is room.

        Returns
        -------
        matplotlib.figure.Figure
            Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.

        Raises
        ------
        MissingKeyError
            The table has no ``base_mean``.
        """
        from cellstill.pl.differential import ma_figure

        return ma_figure({str(self.contrast): self.table}, threshold=floor_of(self.params), n_labels=n_labels)

    @property
    def _groups(self) -> pd.Series:
        return self.units[self.contrast.column]

    def __repr__(self) -> str:
        table, samples, cells = self.table, self.n_samples, self.n_cells
        up, down = ((table["direction"] == way).sum() for way in ("up", "down"))
        counts = " vs ".join(f"{samples[group]} ({cells[group]:,} cells)" for group in self.contrast[1:])
        tested = int(table["fdr"].notna().sum())
        lines = [
            f"DEResult: {self.contrast} ({self.method})",
            f"  design   {self.design}",
            f"  samples  {counts}" + (f"; {len(self.left_out)} left out" if len(self.left_out) else ""),
            f"  genes    {len(table):,}, {tested:,} with an FDR; "
            f"{up + down:,} DE at FDR {self.params.get('fdr', np.nan):g}: {up:,} up, {down:,} down",
        ]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def direction(lfc: np.ndarray, is_de: np.ndarray) -> np.ndarray:
    """``"up"`` or ``"down"`` where ``is_de``, ``"none"`` elsewhere."""
    return np.where(is_de, np.where(lfc > 0, "up", "down"), "none")


def floor_of(params: Mapping[str, Any]) -> float:
    """Effect floor of a test or of a posterior probability, log2; 0 for none."""
    return float(params.get("lfc_threshold") or params.get("delta") or 0.0)


def write_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as CSV without its index, whole or not at all."""
    from cellstill.io.files import atomic_file

    with atomic_file(path) as partial:
        table.to_csv(partial, index=False)
