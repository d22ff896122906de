"""The application: its commands, its version, and how the process ends when it is stopped."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Any

import typer

from cellstill import __version__
from cellstill.cli.condense import condense
from cellstill.cli.de import de
from cellstill.cli.demo import demo
from cellstill.cli.inspect import inspect
from cellstill.cli.integrate import integrate
from cellstill.cli.vi import vi

app = typer.Typer(
    name="cellstill",
    help="Distil single-cell data: integrate batches, remove ambient RNA, condense cells, find genes that differ, look "
    "into files, see a demo.",
    epilog="Start with `cellstill inspect FILE`: it says what a file holds, and what to run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (integrate, vi, condense, de, inspect, demo):
    app.command(no_args_is_help=command is not demo)(command)


def run() -> None:
    """Run the application as a process."""
    # Threads of OpenMP spin while they wait, which on a busy machine slows training down tenfold and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    app()


def _stop(number: int, frame: Any) -> None:
    # Not KeyboardInterrupt, which does not say which signal it was.
    raise SystemExit(128 + number)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cellstill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
