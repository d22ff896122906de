"""Settings that are checked once, when they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_checked(settings: object, check: Callable[..., Any], *names: str, **how: Any) -> None:
    """Replace fields of a frozen dataclass by what a check such as ``whole_number`` returns of them.

    Parameters
    ----------
    settings
        Dataclass.
    check
        Called as ``check(name, value, **how)``; raises for a value that cannot be used.
    names
        Fields.
    how
        Keyword arguments of the check.
    """
    for name in names:
        object.__setattr__(settings, name, check(name, getattr(settings, name), **how))
