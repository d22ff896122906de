"""One line that says how far training is; nothing where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

OnEpoch = Callable[[str | None, int, Mapping[str, float]], None]
"""Called as ``progress(phase, epoch, losses)`` after each epoch."""

_REFRESH = 0.1


class Reporter:
    """Takes note of steps and epochs, and says nothing."""

    on_step: Callable[[int, int], None] | None = None

    def epoch(self, epoch: int, losses: Mapping[str, float]) -> None:
        """Take note of a complete epoch."""


class CallingReporter(Reporter):
    """Calls a function after each epoch."""

    def __init__(self, call: OnEpoch, phase: str | None) -> None:
        self.call = call
        self.phase = phase

    def epoch(self, epoch: int, losses: Mapping[str, float]) -> None:
        """Hand the epoch on."""
        self.call(self.phase, epoch, losses)


class BarReporter(Reporter):
    """A bar in the terminal: epoch, losses, cells per second, time left.

    Parameters
    ----------
    console
        Where the bar is drawn.
    phase
        Shown before it; ``None`` for nothing.
    n_epochs, steps_per_epoch
        Length of training; it may stop earlier.
    start
        First epoch.
    """

    def __init__(self, console: Console, phase: str | None, n_epochs: int, steps_per_epoch: int, start: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[losses]}"),
            TextColumn("[dim]{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
        )
        # Drawn by the loop, ten times a second at most: a thread of its own would compete with training.
        self.progress = Progress(*columns, console=console, auto_refresh=False)
        self.phase = f"{phase} " if phase else ""
        self.n_epochs = n_epochs
        self.steps_per_epoch = steps_per_epoch
        self.done = start
        self._task = self.progress.add_task(
            self._title(), total=n_epochs * steps_per_epoch, completed=start * steps_per_epoch, losses="", rate=""
        )
        self._started = self._drawn = time.perf_counter()

    def on_step(self, n_steps: int, n_cells: int) -> None:
        """Move the bar, if it was not moved just now."""
        now = time.perf_counter()
        if now - self._drawn < _REFRESH:
            return
        self._drawn = now
        rate = f"{n_cells / (now - self._started):,.0f} cells/s"
        self.progress.update(
            self._task, completed=self.done * self.steps_per_epoch + n_steps, rate=rate, description=self._title()
        )
        self.progress.refresh()

    def epoch(self, epoch: int, losses: Mapping[str, float]) -> None:
        """Show the losses."""
        self.done = epoch + 1
        shown = "  ".join(f"{name.removesuffix('_loss')} {losses[name]:.4g}" for name in losses if "_loss" in name)
        self.progress.update(self._task, completed=self.done * self.steps_per_epoch, losses=shown)
        self.progress.refresh()
        self._started = time.perf_counter()

    def _title(self) -> str:
        return f"{self.phase}epoch {min(self.done + 1, self.n_epochs)}/{self.n_epochs}"


@contextmanager
def reporting(
    progress: bool | OnEpoch,
    phase: str | None,
    *,
    n_epochs: int,
    steps_per_epoch: int,
    start: int = 0,
    console: Console | None = None,
) -> Iterator[Reporter]:
    """Give what ``progress`` asks for: a bar on stderr if that is a terminal, a call per epoch, or silence."""
    if callable(progress):
        yield CallingReporter(progress, phase)
        return
    if progress:
        from rich.console import Console as RichConsole

        console = RichConsole(stderr=True) if console is None else console
        if console.is_terminal or console.is_jupyter:
            bar = BarReporter(console, phase, n_epochs, steps_per_epoch, start)
            with bar.progress:
                yield bar
            return
    yield Reporter()
