"""cellstill: distil single-cell data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AmbientRegularizedSCVI": "cellstill.vi",
    "Distiller": "cellstill.distill",
    "RegularizedMultimodalVI": "cellstill.vi",
    "SCDD": "cellstill.condense",
}
_SUBPACKAGES = {
    "condense",
    "data",
    "de",
    "distill",
    "errors",
    "foundation",
    "io",
    "metrics",
    "nn",
    "pl",
    "teachers",
    "train",
    "vi",
}

__all__ = ["SCDD", "AmbientRegularizedSCVI", "Distiller", "RegularizedMultimodalVI", "__version__"]

if TYPE_CHECKING:
    from cellstill.condense import SCDD
    from cellstill.distill import Distiller
    from cellstill.vi import AmbientRegularizedSCVI, RegularizedMultimodalVI


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is asked for.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"cellstill.{name}")
    raise AttributeError(f"module 'cellstill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
