"""What every benchmark needs: pinned threads, jobs in processes of their own, tables, bounds and the JSON record."""

from __future__ import annotations

import json
import operator
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
DATA_DIR = Path(os.environ.get("CELLSTILL_DATA_DIR", HERE.parents[1] / "shared" / "data"))
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
PACKAGES = (
    "cellstill", "scdistill", "scvi-tools", "harmonypy", "torch", "lightning", "anndata", "scanpy", "scikit-learn",
    "scipy", "numpy",
)  # fmt: skip

_COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}

# A width of its own, so that a log holds the same tables as a terminal.
console = Console(width=210, soft_wrap=False)


@dataclass(frozen=True)
class Check:
    """A number and the bound that it has to keep.

    Attributes
    ----------
    what
        What was measured.
    value
        The number; ``None`` if it could not be measured.
    relation, bound
        Passed if ``value relation bound``, such as ``>= 0.98``.
    note
        Where the bound comes from, or what else to know.
    """

    what: str
    value: float | None
    relation: str
    bound: float | None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the bound is kept; ``None`` if either number is missing."""
        if self.value is None or self.bound is None:
            return None
        return bool(_COMPARISONS[self.relation](self.value, self.bound))

    def to_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "value": self.value,
            "relation": self.relation,
            "bound": self.bound,
            "passed": self.passed,
            "note": self.note,
        }


@dataclass
class Section:
    """One part of a benchmark: what was run, what came out, and which bounds it keeps.

    ``columns`` maps the keys of ``rows`` that are shown to a heading and, after ``|``, the format of a number.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class JobResult:
    """What a job left: ``numbers`` (seconds, megabytes, whatever the method reports) and ``arrays``; or an error."""

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]
    error: str | None = None


def run_job(job: Mapping[str, Any], *, threads: int) -> JobResult:
    """Run one method on one data set in a process of its own (:mod:`_worker`), with pinned threads.

    Parameters
    ----------
    job
        ``method`` (a function of :mod:`_methods`, or of ``module``), ``data`` (path of an h5ad or h5mu file), ``seed``,
        ``settings``.
    threads
        CPUs that the process may use.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "numbers.json", Path(folder) / "arrays.npz"
        request = {**job, "threads": threads, "numbers": str(outputs[0]), "arrays": str(outputs[1])}
        done = subprocess.run(
            [sys.executable, str(HERE / "_worker.py"), json.dumps(request)],
            env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            console.print(done.stderr[-4000:], style="dim", markup=False)
            return JobResult({}, {}, last)
        with np.load(outputs[1]) as arrays:
            return JobResult(json.loads(outputs[0].read_text()), dict(arrays))


def environment(threads: int) -> dict[str, Any]:
    """Describe the machine and the versions; no date, no name of the machine."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": load_average(),
        "versions": versions,
    }


def load_average() -> float:
    """Mean number of running processes over the last minute, ours among them."""
    return round(os.getloadavg()[0], 2)


def median_rows(runs: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Medians over the repeats of each method, in order of appearance; ``n_runs`` counts them."""
    return _rows_over_runs("median", runs, by)


def mean_rows(runs: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the repeats of each method, in order of appearance; ``n_runs`` counts them."""
    return _rows_over_runs("mean", runs, by)


def _rows_over_runs(
    statistic: Literal["mean", "median"], runs: Sequence[Mapping[str, Any]], by: Sequence[str]
) -> list[dict[str, Any]]:
    if not runs:
        return []
    groups = pd.DataFrame(runs).groupby(list(by), sort=False, dropna=False)
    found = getattr(groups, statistic)(numeric_only=True).drop(columns="seed", errors="ignore")
    found["n_runs"] = groups.size()
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()}
        for row in found.reset_index().to_dict(orient="records")
    ]


def show_rows(section: Section) -> None:
    """Print the rows as a table."""
    headings, rows = text_table(section.rows, section.columns)
    table = Table(title=section.title, title_justify="left", title_style="bold")
    for heading, is_number in headings.items():
        table.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def text_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, bool], list[list[str]]]:
    """Return headings, each with whether its column holds numbers, and rows of text; empty columns are left out."""
    shown = {key: heading for key, heading in columns.items() if any(row.get(key) is not None for row in rows)}
    headings = {heading.split("|")[0]: "|" in heading for heading in shown.values()}
    lines = []
    for row in rows:
        values = {key: row.get(key) for key in shown}
        formats = {key: heading.partition("|")[2] for key, heading in shown.items()}
        lines.append(["" if value is None else format(value, formats[key]) for key, value in values.items()])
    return headings, lines


def show_checks(checks: Sequence[Check]) -> None:
    """Print every number beside its bound."""
    table = Table(title="Bounds", title_justify="left", title_style="bold")
    for heading, justify in (("what", "left"), ("measured", "right"), ("bound", "right"), ("", "left"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    verdicts = {True: "[green]pass[/]", False: "[red]MISS[/]", None: "[yellow]not measured[/]"}
    for check in checks:
        value = "" if check.value is None else f"{check.value:.4g}"
        bound = check.relation + (" ?" if check.bound is None else f" {check.bound:.4g}")
        table.add_row(check.what, value, bound, verdicts[check.passed], check.note)
    console.print(table)


def write_section(path: Path, name: str, section: Section, described: Mapping[str, Any]) -> None:
    """Put a section into the record, in place of an earlier one of that name; other sections stay."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record[name] = {
        "title": section.title,
        "environment": {**described, "load_average_at_end": load_average()},
        "data": section.data,
        "notes": section.notes,
        "columns": section.columns,
        "rows": [_rounded(row) for row in section.rows],
        "checks": [_rounded(check.to_dict()) for check in section.checks],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
