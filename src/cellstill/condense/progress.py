"""Bars that say how far a condensation or an evaluation is; nothing where nobody watches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cellstill.condense.solver import OnStep

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def bars(progress: bool | None) -> Iterator[Progress | None]:
    """Give bars on stderr if that is a terminal and ``progress`` is not false, ``None`` otherwise."""
    if os.isatty(2) if progress is None else progress:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        if console.is_terminal or console.is_jupyter:
            with Progress(console=console, transient=True) as shown:
                yield shown
            return
    yield None


@contextmanager
def showing_steps(progress: bool | None, on_step: OnStep | None) -> Iterator[OnStep | None]:
    """Give what is to be told of steps: a bar for each phase, and ``on_step``, which without ``progress`` is alone."""
    if progress is None and on_step is not None:
        progress = False
    with bars(progress) as shown:
        if shown is None:
            yield on_step
            return
        of_phase: dict[str, TaskID] = {}

        def show(phase: str, step: int, n_steps: int) -> None:
            if phase not in of_phase:
                of_phase[phase] = shown.add_task(phase, total=n_steps)
            shown.update(of_phase[phase], completed=step)
            if on_step is not None:
                on_step(phase, step, n_steps)

        yield show
