"""Errors and warnings: every message names the argument, what was found, what exists, and what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

_PACKAGE = str(Path(__file__).parent) + os.sep


class CellstillError(Exception):
    """Base of every error that cellstill raises on purpose."""


class InvalidArgumentError(CellstillError, ValueError):
    """An argument has a value that cannot be used."""


class UnknownCellError(InvalidArgumentError, IndexError):
    """Positions or a mask name cells that do not exist."""


class InvalidCountsError(CellstillError, ValueError):
    """The chosen matrix does not hold counts."""


class GeneMismatchError(CellstillError, ValueError):
    """The genes of a data set do not fit those of a model."""


class MissingKeyError(CellstillError, KeyError):
    """A key is absent from ``obs``, ``obsm`` or ``layers``."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote the sentence.
        return str(self.args[0]) if self.args else ""


class NotTrainedError(CellstillError, RuntimeError):
    """The model has to be trained before this call."""


class TrainingError(CellstillError, RuntimeError):
    """Training stopped because its loss was no longer finite."""


class StoreError(CellstillError, OSError):
    """A file or folder cannot be written, or does not hold what it should."""


class OtherRunError(StoreError):
    """A checkpoint, or results kept beside it, belong to a run of other data or settings."""


class OptionalDependencyError(CellstillError, ImportError):
    """A feature needs a package of one of the optional extras."""


class CellstillWarning(UserWarning):
    """Something works, but its user should know about it."""


def whole_number(argument: str, value: object, *, least: int) -> int:
    """Return an integer of any type, such as NumPy's, as ``int``; refuse all else, naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidArgumentError(f"{argument}={value!r} has to be an integer of at least {least}.")
    return int(value)


def above_zero(argument: str, value: object) -> float:
    """Return a finite number above 0, of any type, as ``float``; refuse all else, naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
        raise InvalidArgumentError(f"{argument}={value!r} has to be a number above 0.")
    return float(value)


def at_least_zero(argument: str, value: object) -> float:
    """Return a finite number of at least 0, of any type, as ``float``; refuse all else, naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        raise InvalidArgumentError(f"{argument}={value!r} has to be a number of at least 0.")
    return float(value)


def below_one(argument: str, value: object) -> float:
    """Return a number from 0 to below 1, of any type, as ``float``; refuse all else, naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise InvalidArgumentError(f"{argument}={value!r} has to be at least 0 and below 1.")
    return float(value)


def check_option(argument: str, value: object, known: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``known``, naming the argument and listing what is known."""
    known = list(known)
    if value not in known:
        options = ", ".join(repr(option) for option in known)
        raise InvalidArgumentError(f"{argument}={value!r} is not known. Use one of: {options}.")


def check_key(argument: str, key: object, container: str, existing: Iterable[str]) -> None:
    """Raise unless ``key`` is in ``existing``, naming the container and listing the keys that exist."""
    existing = [str(name) for name in existing]
    if key not in existing:
        shown = [name for name in existing if not name.startswith("_scvi_")]  # those of scvi-tools' registry
        found = ", ".join(map(repr, shown)) if shown else "no keys at all"
        raise MissingKeyError(f"{argument}={key!r} is not in {container}. {container} has: {found}.")


def optional_dependency(package: str, extra: str, purpose: str) -> OptionalDependencyError:
    """Build the error for a missing optional package."""
    return OptionalDependencyError(
        f"{purpose} needs the package {package!r}, which is not installed. Run: pip install 'cellstill[{extra}]'."
    )


def level_outside() -> int:
    """Give the ``stacklevel`` with which a warning points to the code outside this package that led to it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
