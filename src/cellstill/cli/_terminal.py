"""What a command says: its stages, our warnings, one line for an error; and its exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from cellstill.cli._wording import in_options
from cellstill.errors import CellstillError, CellstillWarning

if TYPE_CHECKING:
    from rich.console import Console

_NOISY = ("anndata", "harmonypy", "lightning", "lightning.fabric", "lightning.pytorch", "numba", "scanpy", "scvi")
_PIPE_WIDTH = 110
_SECONDS_PER_LINE = 30
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_USAGE = (typer.BadParameter, typer.Exit, typer.Abort)


@dataclass
class Terminal:
    """Where a command writes: results to ``out``, everything else to ``err``.

    Attributes
    ----------
    out, err
        Consoles of stdout and stderr.
    verbose
        Show what other libraries say, and the trace of errors.
    seconds
        Time of each stage.
    warnings
        Our warnings, each once.
    """

    out: Console
    err: Console
    verbose: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[Callable[[str], None]]:
        """Time a stage, and show that it runs and how long it took: where nobody watches, in lines that a log keeps.

        What it gives is a function that says how far the stage has come. In a terminal only the last words are seen, in
        a log those of each half minute.
        """
        started = time.perf_counter()
        if self.err.is_terminal:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            # With --verbose other libraries write too, which a moving line would garble.
            with Progress(*columns, console=self.err, transient=True, disable=self.verbose) as progress:
                task = progress.add_task(doing)
                yield lambda words: progress.update(task, description=f"{doing}: {words}")
            self.err.print(f"[green]✓[/] {doing} [dim]{time.perf_counter() - started:.1f} s[/]", highlight=False)
        else:
            self.line("stage", doing, "dim")
            yield self._told_now_and_then(doing)
            self.line("stage", f"{doing}: {time.perf_counter() - started:.1f} s", "dim")
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _told_now_and_then(self, doing: str) -> Callable[[str], None]:
        started = told = time.perf_counter()

        def say(words: str) -> None:
            nonlocal told
            now = time.perf_counter()
            if now - told >= _SECONDS_PER_LINE:
                told = now
                self.line("stage", f"{doing}: {words}, after {now - started:.0f} s", "dim")

        return say

    def line(self, kind: str, message: str, style: str) -> None:
        """Write ``kind: message`` to stderr; further lines of the message, such as a table, are indented."""
        from rich.text import Text

        text = "\n".join("  " * (i > 0) + row for i, row in enumerate(message.splitlines()))
        self.err.print(Text.assemble((f"{kind}: ", style), text), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Show a warning once, and keep it."""
        message = in_options(message)
        if message not in self.warnings:
            self.warnings.append(message)
            self.line("warning", message, "bold yellow")


@contextmanager
def terminal(*, verbose: bool) -> Iterator[Terminal]:
    """Run a command: errors become one line and exit code 1, an interruption 130 (128 + signal).

    Usage errors pass through; typer reports them and exits with 2.
    """
    from rich.console import Console

    # Tables in a pipe or a log need not be squeezed into 80 columns.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    term = Terminal(Console(width=width), Console(stderr=True), verbose)
    try:
        with _heard(term):
            yield term
    except _USAGE:
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT
        if code in _STOPPED:
            term.line("interrupted", "nothing was written.", "bold red")
        raise SystemExit(code) from None
    except Exception as error:  # noqa: BLE001 - the last line of defence of a program
        if verbose:
            traceback.print_exc(file=sys.stderr)
        if isinstance(error, CellstillError):
            term.line("error", in_options(str(error)), "bold red")
        else:
            name, reason = type(error).__name__, (str(error).splitlines() or [""])[0]
            again = "" if verbose else " This is a fault of cellstill or of the data; run again with --verbose."
            term.line("error", f"{name}: {reason.rstrip('.')}.{again}", "bold red")
        raise typer.Exit(1) from None


@contextmanager
def _heard(term: Terminal) -> Iterator[None]:
    """Show our warnings as lines; keep the rest off the terminal unless it is wanted."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    with warnings.catch_warnings():
        show = warnings.showwarning

        def heard(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            if issubclass(category, CellstillWarning):
                term.warn(str(message))
            elif term.verbose:
                show(message, category, *args, **kwargs)

        warnings.showwarning = heard
        if not term.verbose:
            warnings.simplefilter("ignore")
            for name in _NOISY:
                logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("always", category=CellstillWarning)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
