"""Results on the scenarios on disk, one file each, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Store:
    """Numbers and arrays by name; those of other settings are computed anew.

    Attributes
    ----------
    folder
        Where results are.
    """

    folder: Path

    def read(self, name: str, settings: Any) -> dict[str, Any] | None:
        """Numbers of a result, or None if there is none of these settings."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        return record["numbers"] if record["settings"] == _digest(settings) else None

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Arrays of a result that :meth:`read` found."""
        with np.load(self.folder / f"{name}.npz") as arrays:
            return dict(arrays)

    def write(
        self, name: str, settings: Any, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Keep a result; the record comes last, and at once."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrays is not None:
            np.savez_compressed(path.with_suffix(".npz"), **arrays)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": _digest(settings), "numbers": numbers}))
        unfinished.replace(path)


def _digest(settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
