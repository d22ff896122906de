"""What an interrupted run has condensed and judged already, in the folder of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstill.cli._condensed_model import CondensationSettings
from cellstill.cli._condensed_run import describe_cells, describe_settings, other_cells, other_settings
from cellstill.condense import CondensationProblem
from cellstill.condense.evaluated import Condensed
from cellstill.errors import OtherRunError, StoreError
from cellstill.io.files import atomic_file

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Kept:
    """Results of a run, one file each, written whole or not at all.

    Attributes
    ----------
    folder
        Where they are.
    """

    folder: Path

    def check_settings(self, settings: CondensationSettings) -> None:
        """Keep the settings of a run, or compare them with those that are kept.

        Raises
        ------
        OtherRunError
            The folder is of other settings, or another version; the message says what differs.
        """
        self._check("run", describe_settings(settings), other_settings)

    def check_cells(self, problem: CondensationProblem) -> None:
        """Keep what tells the cells of a run from others, or compare it with what is kept.

        Raises
        ------
        OtherRunError
            The folder is of other cells or names; the message says what differs.
        """
        self._check("cells", describe_cells(problem), other_cells)

    def _check(
        self,
        name: str,
        here: dict[str, Any],
        differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    ) -> None:
        if different := differences(self._record(name, lambda: here), here):
            raise OtherRunError(
                f"{self.folder} belongs to another run: {', '.join(different)}. Resume with what it was started with, "
                "or start afresh: --overwrite without --resume."
            )

    def predictions(
        self, name: str, compute: Callable[[], Mapping[tuple[str, int, str], np.ndarray]]
    ) -> dict[tuple[str, int, str], np.ndarray]:
        """Predictions by evaluator, seed and task; computed unless that was done before."""
        record = self._record(name, lambda: {"predictions": _listed(compute())})
        return {tuple(key): np.array(codes, dtype=np.int64) for *key, codes in record["predictions"]}

    def result(self, method: str, seed: int, compute: Callable[[], Condensed]) -> Condensed:
        """What became of a method; computed unless that was done before."""

        def record() -> dict[str, Any]:
            found = compute()
            return vars(found) | {"predictions": _listed(found.predictions)}

        found = self._record(f"{method}-{seed}", record)
        predictions = {tuple(key): np.array(codes, dtype=np.int64) for *key, codes in found["predictions"]}
        return Condensed(**found | {"predictions": predictions})

    def cells(self, make: Callable[[], AnnData]) -> AnnData:
        """Our cells, made unless they were before; as they are read, so that going on changes nothing."""
        import anndata

        if not self._cells.exists():
            self.keep_cells(make())
        return anndata.read_h5ad(self._cells)

    def keep_cells(self, cells: AnnData) -> None:
        """Keep our cells."""
        with atomic_file(self._cells) as partial:
            cells.write_h5ad(partial)

    @property
    def _cells(self) -> Path:
        return self.folder / "condensed.h5ad"

    def _record(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            record = compute()
            with atomic_file(path) as partial:
                partial.write_text(json.dumps(record), encoding="utf-8")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path} is damaged ({error}). Remove it, and resume.") from error


def _listed(predictions: Mapping[tuple[Any, ...], np.ndarray]) -> list[list[Any]]:
    return [[*key, codes.tolist()] for key, codes in predictions.items()]
