"""Settings that are checked once, when they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cellstill.errors import InvalidArgumentError

Settings = TypeVar("Settings")


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


def given_or_default(argument: str, settings: Settings | None, kind: type[Settings]) -> Settings:
    """Return settings, or the defaults of their class for ``None``; refuse all else, naming the argument."""
    if settings is None:
        return kind()
    if not isinstance(settings, kind):
        raise InvalidArgumentError(
            f"{argument}={settings!r} is of the class {type(settings).__name__}. Give a {kind.__name__}, such as "
            f"{kind.__name__}(...) with what is to differ from the defaults, or None."
        )
    return settings
