"""How ``distill_simulated.py`` runs its methods: each result is kept as soon as it is there."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from _common import Section, console, run_job
from _simulated_fits import FITS, LATENTS, RESULT, Fit
from _simulated_methods import measured
from _simulated_scenarios import COMMON, SCENARIOS, Scenario
from _simulated_scores import de_scores, latent_scores, pack, unpack
from _simulated_store import Store

from cellstill.errors import CellstillError


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    cache: Path
    quick: bool
    scenarios: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    threads: int
    resume: bool
    null_runs: dict[str, int] = field(hash=False)

    @property
    def store(self) -> Store:
        """Where single results are kept."""
        return Store(self.cache / ("quick" if self.quick else "full"))


@cache
def fill(options: Options) -> tuple[str, ...]:
    """Run what has not been run, seed by seed and scenario by scenario, once; return what failed."""
    importlib.import_module("pydeseq2.ds")
    failed = []
    for seed in options.seeds:
        for name in options.scenarios:
            cells = Cells(SCENARIOS[name], seed, options.quick)
            with tempfile.TemporaryDirectory() as scratch:
                for method, fit in wanted(options, seed):
                    key, settings = f"scenarios/{name}-{seed}-{method}", settings_of(fit, name, options)
                    if options.store.read(key, settings) is not None:
                        continue
                    console.print(f"  scenario {name}, seed {seed}: {method}", style="dim")
                    error = run_fit(fit, cells, Path(scratch), options, key, settings)
                    if error is not None:
                        failed.append(f"Scenario {name}, seed {seed}: {method} failed: {error}")
    return tuple(failed)


@dataclass
class Cells:
    """Cells of a scenario, drawn when they are needed."""

    scenario: Scenario
    seed: int
    quick: bool
    _drawn: dict[bool, Any] = field(default_factory=dict)

    def get(self, batch_effect: bool) -> Any:
        """With or without batch effect."""
        if batch_effect not in self._drawn:
            self._drawn[batch_effect] = self.scenario.simulate(self.seed, quick=self.quick, batch_effect=batch_effect)
        return self._drawn[batch_effect]


def wanted(options: Options, seed: int) -> Iterator[tuple[str, Fit]]:
    """Methods to run with a seed."""
    for method in options.methods:
        if FITS[method].seeds is None or seed in FITS[method].seeds:
            yield method, FITS[method]


def settings_of(fit: Fit, name: str, options: Options) -> Any:
    """What a result depends on beside its seed and code."""
    scenario = SCENARIOS[name]
    return scenario, COMMON, options.quick, fit.settings(scenario, options.quick) if fit.settings else None


def run_fit(fit: Fit, cells: Cells, scratch: Path, options: Options, key: str, settings: Any) -> str | None:
    """Run a test or a job and keep what comes out; return what stopped it."""
    adata, covariates = cells.get(fit.batch_effect), cells.scenario.covariates
    truth = {"truth": adata.var["truth"].to_numpy(), "is_de": adata.var["is_de"].to_numpy()}
    if fit.test is not None:
        try:
            found, costs = measured(partial(fit.test, adata, covariates))
        except (CellstillError, ValueError) as error:
            return str(error)
        options.store.write(key, settings, {"costs": {RESULT: costs}, "errors": {}}, truth | pack({RESULT: found}))
        return None
    path = scratch / "cells.h5ad"
    if not path.exists():
        adata.write_h5ad(path)
    asked = fit.settings(cells.scenario, options.quick) if fit.settings else {}
    job = {"module": "_simulated_methods", "method": fit.job, "data": str(path), "batch_key": "batch"}
    result = run_job({**job, "seed": cells.seed, "settings": asked, "warm_up": False}, threads=options.threads)
    if result.error is not None:
        return result.error
    numbers = dict(result.numbers)
    numbers["latent"] = latent_scores(result.arrays["embedding"], adata.obs)
    if "teacher" in result.arrays:
        teacher = latent_scores(result.arrays["teacher"], adata.obs)
        numbers["latent"] |= {f"teacher_{key}": value for key, value in teacher.items()}
    genes = {key: values for key, values in result.arrays.items() if "/" in key}
    options.store.write(key, settings, numbers, truth | genes)
    return None


def runs_of(options: Options, section: Section) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run what is missing; scores of each result, and of each latent."""
    if options.resume:
        section.notes += fill(options)
    scores, latents = [], []
    for name in options.scenarios:
        for seed in options.seeds:
            for method, fit in wanted(options, seed):
                key = f"scenarios/{name}-{seed}-{method}"
                numbers = options.store.read(key, settings_of(fit, name, options))
                if numbers is None:
                    continue
                arrays = options.store.arrays(key)
                one = {"scenario": name, "seed": seed, "fit": method, "side": fit.side}
                for result, genes in unpack(arrays).items():
                    part = "" if result == RESULT else result
                    scores.append(
                        {
                            **one,
                            "key": f"{method}/{part}".rstrip("/"),
                            "method": fit.results[part],
                            **de_scores(genes, arrays["truth"], arrays["is_de"]),
                            "fit_seconds": numbers.get("seconds"),
                            "fit_cpu_seconds": numbers.get("cpu_seconds"),
                            "fit_mb": numbers.get("added_mb"),
                            **numbers["costs"][result],
                        }
                    )
                section.notes += [f"{fit.results[part]} failed: {error}" for part, error in numbers["errors"].items()]
                if "latent" in numbers:
                    latents.append({**one, "method": LATENTS[method], **numbers["latent"]})
    return pd.DataFrame(scores), pd.DataFrame(latents)
