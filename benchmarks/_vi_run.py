"""How ``vi_peers.py`` runs its methods: each fit in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import JobResult, Section, console, run_job


@dataclass(frozen=True)
class Method:
    """One line of a table."""

    label: str
    job: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    random: bool = True


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data_dir: Path
    scratch: Path
    quick: bool
    seeds: int
    threads: int
    max_epochs: int | None
    accelerator: str
    sets: tuple[str, ...] | None
    methods: tuple[str, ...] | None
    record: Path

    @property
    def train(self) -> dict[str, Any]:
        """Training settings: the defaults, but for what the command line says."""
        epochs = {} if self.max_epochs is None else {"max_epochs": self.max_epochs}
        return {"accelerator": self.accelerator, **epochs}

    def wants(self, name: str) -> bool:
        """Whether a data set is to be run."""
        return self.sets is None or name in self.sets

    def runs(self, label: str) -> bool:
        """Whether a method is to be run; the others keep the runs that the record has."""
        return self.methods is None or label in self.methods

    def kept(self, section: str) -> dict[str, Any]:
        """The record of a section, of which the runs of methods that are not asked for are kept; else nothing.

        Raises
        ------
        SystemExit
            It was made in another way.
        """
        if self.methods is None or self.quick or not self.record.exists():
            return {}
        known = json.loads(self.record.read_text()).get(section, {})
        asked = {"max_epochs": self.max_epochs, "accelerator": self.accelerator, "threads": self.threads}
        for key, value in asked.items():
            recorded = known["environment"][key] if known else value
            if recorded != value:
                raise SystemExit(
                    f"--{key.replace('_', '-')} is {value}, but {recorded} in the record of {section}. Give the same, "
                    "or run all of its methods."
                )
        return known

    def with_kept(
        self, kept: dict[str, Any], section: Section, runs: list[dict[str, Any]], labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Runs of this time and those that are kept, by method in the order of ``labels``; the section has them too."""
        if kept:
            section.data = kept["data"] | section.data
            runs = [*(run for run in kept["data"]["runs"] if not self.runs(run["method"])), *runs]
            section.notes.append(f"Run for this record: {'; '.join(self.methods or ())}. The other lines are older.")
        section.data["runs"] = sorted(runs, key=lambda run: labels.index(run["method"]))
        return section.data["runs"]


def run_method(
    method: Method, path: Path, seed: int, batch_key: str | None, section: Section, options: Options, where: str
) -> JobResult | None:
    """Run one job; a failure becomes a note."""
    console.print(f"  {where}: {method.label} seed {seed}", style="dim", highlight=False)
    request = {"module": "_vi_methods", "method": method.job, "data": str(path), "batch_key": batch_key, "seed": seed}
    # Settings travel as JSON.
    settings = json.loads(json.dumps(dict(method.settings)))
    result = run_job({**request, "settings": settings, "warm_up": False}, threads=options.threads)
    if result.error is None:
        return result
    section.notes.append(f"{where}: {method.label} failed: {result.error}")
    return None


def run_all(
    methods: Sequence[Method], path: Path, batch_key: str | None, section: Section, options: Options
) -> list[tuple[Method, int, JobResult]]:
    """Run every method that is asked for with every seed."""
    found = []
    for method in (method for method in methods if options.runs(method.label)):
        for seed in range(options.seeds if method.random else 1):
            result = run_method(method, path, seed, batch_key, section, options, path.stem)
            if result is not None:
                found.append((method, seed, result))
    return found


def value_of(rows: list[dict[str, Any]], key: str, **where: str) -> Any:
    """Value of a column in the first row that has what is asked for."""
    return next((row.get(key) for row in rows if all(row[name] == wanted for name, wanted in where.items())), None)
