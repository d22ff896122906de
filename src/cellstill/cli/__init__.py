"""The command line. Importing it is cheap; what a command needs is imported when it runs."""

from __future__ import annotations


def main() -> None:
    """Run ``cellstill``, the console script."""
    from cellstill.cli.app import run

    run()


__all__ = ["main"]
