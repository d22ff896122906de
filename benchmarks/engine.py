"""The training step beside its own matrix products and beside scVI, at the same architecture.

20,000 x 2,000 and 5,000 x 20,000 simulated cells with 8 % of counts not zero, minibatches of 128 and 1,024, one thread:
milliseconds per step, cells per second in training and in latent inference, added memory, the loader alone, and the
validation loss beside a plain dense implementation. Prints tables, writes ``results/engine.json`` and shows that
record in ``README.md``, which says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _common import (
    HERE,
    THREAD_VARIABLES,
    Check,
    Section,
    console,
    environment,
    load_average,
    show_checks,
    show_rows,
    write_section,
)  # fmt: skip
from _data import sized, store
from _readme import update_readme

SIZES = {"2,000": (20_000, 2_000), "20,000": (5_000, 20_000)}
BATCHES = (128, 1024)
COUNTS_PER_GENE = 0.105
COMPILED, TORCH, SCVI, PRODUCTS = "cellstill, compiled", "cellstill, torch", "scVI", "dense products"
PARTS = "its loops and products alone"
COLUMNS = {
    "n_vars": "genes",
    "batch_size": "batch|,.0f",
    "method": "what",
    "step_ms": "ms per step|,.2f",
    "of_products": "of its products|.2f",
    "cells_per_second": "cells/s|,.0f",
    "of_scvi": "times scVI|.1f",
    "embedded_per_second": "embedded/s|,.0f",
    "embedded_of_scvi": "embedded, times scVI|.1f",
    "added_mb": "added MB|,.0f",
    "first_layer_ms": "first layer, ms|,.2f",
    "output_ms": "output and likelihood, ms|,.2f",
    "optimiser_ms": "optimiser, ms|,.2f",
    "load_average": "load average|.2f",
}


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    scratch: Path
    quick: bool
    threads: int
    repeats: int
    device: str


def steps(options: Options) -> Section:
    """Seconds of a step, and what it is of the step's own products."""
    section = Section("Training and embedding, one fit in each process", COLUMNS)
    for genes in SIZES:
        data = _data(genes, options, section)
        for batch_size in BATCHES:
            n_obs, n_vars = _size(genes, options)
            common = {"data": str(data), "n_vars": n_vars, "batch_size": batch_size, "n_train": round(0.9 * n_obs)}
            jobs = {
                PRODUCTS: {"what": "products"},
                COMPILED: {"what": "cellstill", "compile": True},
                **({} if options.device == "cuda" else {PARTS: {"what": "parts"}}),
                TORCH: {"what": "cellstill", "compile": False},
                SCVI: {"what": "scvi"},
            }
            runs: dict[str, list[dict[str, Any]]] = {method: [] for method in jobs}
            # By turns, so that a busy minute falls on all of them.
            for _ in range(options.repeats):
                for method, job in jobs.items():
                    found = run({**common, **job, "epochs": 2 if options.quick else 4}, options)
                    runs[method].append(found)
                    shown = f"  {genes} genes, {batch_size}: {method} {found['step_ms']:,.2f} ms"
                    console.print(shown, style="dim")
            measured = {method: min(each, key=lambda found: found["step_ms"]) for method, each in runs.items()}
            for method, numbers in measured.items():
                row = {"n_vars": genes, "batch_size": batch_size, "method": method, **numbers}
                row["of_products"] = numbers["step_ms"] / measured[PRODUCTS]["step_ms"]
                if method not in (PRODUCTS, PARTS):
                    for key, ratio in (("cells_per_second", "of_scvi"), ("embedded_per_second", "embedded_of_scvi")):
                        row[ratio] = numbers[key] / measured[SCVI][key]
                section.rows.append(row)
            where = f"{genes} genes, batch {batch_size}"
            value = partial(_value, section.rows, genes, batch_size)
            section.checks += [
                Check(f"step over its products, compiled, {where}", value(COMPILED, "of_products"), "<=", 1.3),
                Check(f"step over its products, torch alone, {where}", value(TORCH, "of_products"), "<=", 2.0),
                Check(f"cells/s over scVI's, {where}", value(COMPILED, "of_scvi"), ">=", 5.0),
                Check(f"embedded cells/s over scVI's, {where}", value(COMPILED, "embedded_of_scvi"), ">=", 3.0),
            ]
            if genes == "20,000" and batch_size == 1024:
                share = value(COMPILED, "added_mb") / value(SCVI, "added_mb")
                section.checks.append(Check(f"added memory over scVI's, {where}", share, "<=", 1 / 3))
    show_rows(section)
    return section


def loader(options: Options) -> Section:
    """The loader alone, beside bare row indexing."""
    columns = {
        "n_vars": "genes",
        "batch_size": "batch|,.0f",
        "cells_per_second": "cells/s|,.0f",
        "bare_cells_per_second": "X[idx], cells/s|,.0f",
        "slower": "times slower|.2f",
    }
    section = Section("The loader alone", columns)
    for genes in SIZES:
        data = _data(genes, options, section)
        for batch_size in BATCHES:
            found = run({"what": "loader", "data": str(data), "batch_size": batch_size}, options)
            slower = found["bare_cells_per_second"] / found["cells_per_second"]
            section.rows.append({"n_vars": genes, "batch_size": batch_size, "slower": slower, **found})
            section.checks.append(Check(f"loader over X[idx], {genes} genes, batch {batch_size}", slower, "<=", 1.3))
    show_rows(section)
    return section


def agreement(options: Options) -> Section:
    """Validation loss after equal epochs, same seed and order, beside the plain dense implementation."""
    columns = {
        "method": "what",
        "validation_loss": "validation loss|,.4f",
        "difference": "difference, %|.5f",
        "step_ms": "ms per step|,.2f",
    }
    section = Section("Validation loss after 10 epochs, 20,000 x 2,000, minibatches of 128", columns)
    data = _data("2,000", options, section)
    common = {"what": "cellstill", "data": str(data), "batch_size": 128, "validate": True}
    common["epochs"] = 2 if options.quick else 10
    variants = {
        "plain, dense": {"dense": True, "compile": False},
        TORCH: {"compile": False},
        COMPILED: {"compile": True},
        "cellstill, compiled, bf16-mixed": {"compile": True, "precision": "bf16-mixed"},
    }
    for method, job in variants.items():
        found = run({**common, **job}, options)
        plain = section.rows[0]["validation_loss"] if section.rows else found["validation_loss"]
        difference = 100 * (found["validation_loss"] / plain - 1)
        section.rows.append({"method": method, "difference": difference, **found})
        if section.rows[1:]:
            bound = 1.0 if "bf16" in method else 0.1
            section.checks.append(
                Check(f"validation loss off the plain one's, %, {method}", abs(difference), "<=", bound)
            )
    show_rows(section)
    return section


SECTIONS = {"steps": steps, "loader": loader, "agreement": agreement}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cells and epochs, to see that all runs; no record")
    parser.add_argument("--threads", type=int, default=1, help="CPUs of every fit (default: 1)")
    parser.add_argument("--repeats", type=int, default=1, help="processes per measurement; the fastest is shown")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where steps run (default: cpu)")
    parser.add_argument("--out", type=Path, help="JSON to write sections into (default: results/engine.json)")
    chosen = parser.parse_args(arguments)
    out = chosen.out or (None if chosen.quick else HERE / "results" / "engine.json")
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(Path(scratch), chosen.quick, chosen.threads, chosen.repeats, chosen.device)
        for name in chosen.only or SECTIONS:
            described = environment(chosen.threads)
            console.print(f"{name}, load average {load_average()}")
            section = SECTIONS[name](options)
            show_checks(section.checks)
            checks += section.checks
            if out is not None:
                write_section(out, name, section, described | {"device": chosen.device})
                if chosen.out is None:
                    update_readme(HERE / "README.md", out)
    missed = [check.what for check in checks if check.passed is False]
    console.print(f"{len(checks)} bounds: {len(missed)} missed. {'; '.join(missed)}")


def run(request: dict[str, Any], options: Options) -> dict[str, Any]:
    """Measure in a process of its own, with pinned threads."""
    out = options.scratch / "measured.json"
    request = {**request, "threads": options.threads, "device": options.device, "out": str(out)}
    subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "_engine_worker.py"), json.dumps(request)],
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(options.threads)),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(out.read_text())


def _size(genes: str, options: Options) -> tuple[int, int]:
    n_obs, n_vars = SIZES[genes]
    return (n_obs // 4, n_vars) if options.quick else (n_obs, n_vars)


def _data(genes: str, options: Options, section: Section) -> Path:
    path = options.scratch / f"{genes}.h5ad"
    if not path.exists():
        n_obs, n_vars = _size(genes, options)
        section.data[genes] = store(sized(n_obs, n_vars, COUNTS_PER_GENE)(options.scratch, False), path)
    return path


def _value(rows: list[dict[str, Any]], genes: str, batch_size: int, method: str, key: str) -> Any:
    return next(
        row.get(key) for row in rows if (row["n_vars"], row["batch_size"], row["method"]) == (genes, batch_size, method)
    )


if __name__ == "__main__":
    main()
