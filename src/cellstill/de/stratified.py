"""The same comparison inside each level of a column, such as each cell type."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellstill.de.result import DEResult, floor_of, write_csv
from cellstill.de.units import text_column
from cellstill.errors import CellstillWarning, InvalidArgumentError, InvalidCountsError, check_option, level_outside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_N_SHOWN = 20
_N_WARNED = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class StratifiedDEResult:
    """One comparison inside each level of a column.

    Each level has its own design, and an FDR of its own: of the genes called in a level, that share is expected to be
    false.

    Attributes
    ----------
    within
        The column.
    results
        What was found, by level, sorted.
    skipped
        Levels that could not be compared: columns ``within`` and ``"reason"``.
    notes
        What was done across levels, in sentences; those of a level are in its own result.
    """

    within: str
    results: Mapping[str, DEResult]
    skipped: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> pd.DataFrame:
        """The tables of all levels, one after the other; the first column names the level."""
        parts = []
        for level, result in self.results.items():
            part = result.table.copy()
            part.insert(0, self.within, level)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @property
    def de_genes(self) -> dict[str, list[str]]:
        """Names of the genes called in each level, most certain first."""
        return {level: result.de_genes for level, result in self.results.items()}

    def __getitem__(self, level: str) -> DEResult:
        gone = dict(zip(self.skipped[self.within], self.skipped["reason"], strict=True))
        if level in gone:
            raise InvalidArgumentError(f"{self.within}={level!r} was not compared: {gone[level]}")
        check_option(self.within, level, self.results)
        return self.results[level]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __contains__(self, level: object) -> bool:
        return level in self.results

    def keys(self) -> Iterable[str]:
        """Levels that were compared."""
        return self.results.keys()

    def items(self) -> Iterable[tuple[str, DEResult]]:
        """Levels, and what was found in each."""
        return self.results.items()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`table`, as :meth:`DEResult.to_csv` does."""
        write_csv(self.table, path)

    def volcano(self, *, n_labels: int = 10) -> Figure:
        """Draw :meth:`DEResult.volcano` of each level, side by side."""
        from cellstill.pl.differential import volcano_figure

        first = next(iter(self.results.values()))
        return volcano_figure(
            self._tables, fdr=first.params["fdr"], threshold=floor_of(first.params), n_labels=n_labels
        )

    def ma(self, *, n_labels: int = 10) -> Figure:
        """Draw :meth:`DEResult.ma` of each level, side by side."""
        from cellstill.pl.differential import ma_figure

        first = next(iter(self.results.values()))
        return ma_figure(self._tables, threshold=floor_of(first.params), n_labels=n_labels)

    @property
    def _tables(self) -> dict[str, pd.DataFrame]:
        return {level: result.table for level, result in self.results.items()}

    def __repr__(self) -> str:
        first = next(iter(self.results.values()))
        lines = [f"StratifiedDEResult: {first.contrast} within {self.within} ({first.method})"]
        shown = list(self.results.items())[:_N_SHOWN]
        width = max(len(level) for level, _ in shown)
        for level, result in shown:
            up, down = ((result.table["direction"] == way).sum() for way in ("up", "down"))
            samples = " vs ".join(str(number) for number in result.n_samples.values())
            cells = " vs ".join(f"{number:,}" for number in result.n_cells.values())
            lines.append(
                f"  {level:<{width}}  {samples} samples, {cells} cells: {up + down:,} DE, {up:,} up, {down:,} down"
            )
        if len(self.results) > len(shown):
            lines.append(f"  ... {len(self.results) - len(shown)} more levels")
        for level, reason in self.skipped.to_numpy()[:_N_SHOWN]:
            lines.append(f"  skipped  {level}: {_short(reason)}")
        if len(self.skipped) > _N_SHOWN:
            lines.append(f"  ... {len(self.skipped) - _N_SHOWN} more skipped")
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def stratify(obs: pd.DataFrame, within: str, compare: Callable[[str, np.ndarray], DEResult]) -> StratifiedDEResult:
    """Make one comparison inside each level of a column.

    Parameters
    ----------
    obs
        Annotation of the cells.
    within
        Column with the levels.
    compare
        Called with each level, as text, and the positions in ``obs`` of its cells, ascending.

    Returns
    -------
    The results by level, and the levels that could not be compared: those for which ``compare`` raised
    :class:`~cellstill.errors.InvalidArgumentError` or :class:`~cellstill.errors.InvalidCountsError`.

    Warns
    -----
    CellstillWarning
        Once, if levels were skipped, or ``compare`` warned: what was said, and of which levels.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        No such column, missing values in it, or no level that can be compared; the message has the reasons.
    """
    levels = text_column(obs, within, "within").to_numpy()
    results: dict[str, DEResult] = {}
    skipped: list[tuple[str, str]] = []
    said: list[tuple[str, str]] = []
    for level in sorted(set(levels)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CellstillWarning)
            try:
                results[level] = compare(level, np.flatnonzero(levels == level))
            except (InvalidArgumentError, InvalidCountsError) as error:
                skipped.append((level, str(error)))
        for item in caught:
            if issubclass(item.category, CellstillWarning):
                said.append((level, str(item.message)))
            else:
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
    if not results:
        raise InvalidArgumentError(
            f"within={within!r}: none of the {len(skipped)} levels could be compared.\n"
            + "\n".join(_by_text(skipped, short=False))
        )
    said = [(level, text) for level, text in said if level in results]
    if skipped or said:
        parts = [f"Comparisons within {within!r}:"]
        parts += [f"Not compared, {line}" for line in _by_text(skipped)]
        warnings.warn("\n".join(parts + _by_text(said)), CellstillWarning, stacklevel=level_outside())
    return StratifiedDEResult(
        within=within,
        results=results,
        skipped=pd.DataFrame(skipped, columns=[within, "reason"], dtype=object),
    )


def _by_text(said: Iterable[tuple[str, str]], *, short: bool = True) -> list[str]:
    """Lines of text, each behind the levels that it was said of, and not too many."""
    levels: dict[str, list[str]] = {}
    for level, text in said:
        levels.setdefault(text, []).append(level)
    lines = [
        f"{', '.join(map(repr, of[:5]))}{f' and {len(of) - 5} more' if len(of) > 5 else ''}: "
        f"{_short(text) if short else text}"
        for text, of in levels.items()
    ]
    more = len(lines) - _N_WARNED
    return lines[:_N_WARNED] + ([f"... and {more} more."] if more > 0 else [])


def _short(text: str) -> str:
    return textwrap.shorten(text.splitlines()[0] if text else "", 240, placeholder=" ...")
