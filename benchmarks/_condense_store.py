"""Results of condensation on disk, one file each, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellstill.condense.baselines import BASELINES
from cellstill.condense.cells import LabelledCells
from cellstill.condense.evaluate import evaluate, train_full
from cellstill.condense.evaluated import Condensed, Evaluation, FullData
from cellstill.condense.evaluators import get_evaluators
from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.matching import MatchingConfig
from cellstill.condense.method import TRAINED_WITH, Variant
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.shared import share_space
from cellstill.condense.space import fit_space
from cellstill.condense.stored import restore_space, space_config, space_tensors
from cellstill.io.store import load_store, save_store

OURS, START = "scdd", "scdd_start"
VARIANTS = {OURS: Variant(), START: Variant().unmatched()}
"""Ours, and ours with codes that stay where they start."""
LATENT = ("kmeans_latent", "generator", "text_distill")
"""Baselines that need our trained space."""


@dataclass
class Store:
    """Results of one data set.

    Attributes
    ----------
    name, problem
        Data set, and its cells and split.
    folder
        Where results are; one of another split, other genes or other settings is computed anew.
    """

    name: str
    problem: CondensationProblem
    folder: Path
    _spaces: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = repr((MatchingConfig(), LatentConfig(), GeneratorConfig())).encode()
        parts = [*self.problem.rows.values(), self.problem.train.counts.data]
        self._of = hashlib.sha256(settings + b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    def run(self, method: str, samples_per_class: int, seed: int) -> bool:
        """Condense and predict, unless that was done before; return whether there was anything to do."""
        path = self._path(method, samples_per_class, seed)
        if self._read(path) is not None:
            return False
        if method in VARIANTS or method in LATENT:
            self.need_space(seed)
        kept: dict[str, Any] = {}
        condense = self._ours(VARIANTS[method], kept, path) if method in VARIANTS else BASELINES[method].condense
        found = evaluate(
            self.problem,
            {method: condense},
            samples_per_class=(samples_per_class,),
            seeds=(seed,),
            full=self.full([seed]),
        ).condensed[0]
        predictions = {name: predicted.tolist() for (name, _), predicted in found.predictions.items()}
        numbers = {"n_cells": found.n_cells, "seconds": found.seconds, "added_mb": found.added_mb}
        self._write(path, {**numbers, "n_bytes": found.n_bytes, **kept, "predictions": predictions})
        return True

    def full(self, seeds: Sequence[int]) -> FullData:
        """Predictions after training on all cells."""
        task, known = self.problem.tasks[0].key, {}
        for seed in seeds:
            path = self.folder / f"full-{seed}.json"
            record = self._read(path)
            if record is None:
                predictions = train_full(self.problem, get_evaluators(), [seed]).predictions
                record = {"predictions": {name: found.tolist() for (name, _, _), found in predictions.items()}}
                self._write(path, record)
            known |= {(name, seed, task): np.array(found) for name, found in record["predictions"].items()}
        return FullData(self.problem, known)

    def evaluation(self, methods: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> Evaluation:
        """All that there is so far."""
        found, task = [], self.problem.tasks[0].key
        for method in methods:
            for size in sizes:
                for seed in seeds:
                    record = self._read(self._path(method, size, seed))
                    if record is None:
                        continue
                    predictions = {(name, task): np.array(codes) for name, codes in record["predictions"].items()}
                    numbers = [record[key] for key in ("n_cells", "seconds", "added_mb", "n_bytes")]
                    found.append(Condensed(method, size, seed, *numbers, predictions))
        trained_with = {name: BASELINES[name].trained_with for name in methods if name in BASELINES}
        names = tuple(evaluator.name for evaluator in get_evaluators())
        full = self.full(sorted({one.seed for one in found}))
        return Evaluation(self.problem, tuple(found), full, names, trained_with | dict.fromkeys(VARIANTS, TRAINED_WITH))

    def choice(self, samples_per_class: int, seed: int) -> list[dict[str, Any]] | None:
        """The candidates of ours, with their scores on the validation cells."""
        record = self._read(self._path(OURS, samples_per_class, seed))
        return None if record is None else record["choice"]

    def cells(self, samples_per_class: int, seed: int) -> LabelledCells | None:
        """The cells of ours."""
        path = self._path(OURS, samples_per_class, seed)
        if self._read(path) is None:
            return None
        codes = np.load(path.with_suffix(".npy"))
        return LabelledCells(sp.csr_matrix(sp.load_npz(path.with_suffix(".npz"))), codes)

    def need_space(self, seed: int) -> None:
        """Train the space that ours and the baselines of the latent space share, or read the one trained before."""
        if seed in self._spaces:
            return
        # Kept when it is trained: checkpoints of every epoch would take longer than the epochs of so few cells.
        folder = self.folder / f"space-{seed}-{self._of}"
        if not folder.exists():
            space = fit_space(self.problem, seed=seed)
            save_store(folder, "Space", space_tensors(space), space_config(space))
        share_space(self.problem, seed, restore_space(*load_store(folder, "Space")))
        self._spaces.add(seed)

    def _ours(
        self, variant: Variant, kept: dict[str, Any], path: Path
    ) -> Callable[[CondensationProblem, int, int], LabelledCells]:
        def condense(problem: CondensationProblem, samples_per_class: int, seed: int) -> LabelledCells:
            found = variant.condense(problem, samples_per_class, seed)
            kept["choice"] = json.loads(found.choice.to_json(orient="records"))
            kept["chosen"] = {"start": found.start, "steps": found.n_steps, "counts": found.rendering.name}
            sp.save_npz(path.with_suffix(".npz"), found.cells.counts)
            np.save(path.with_suffix(".npy"), found.cells.codes)
            return found.cells

        return condense

    def _path(self, method: str, samples_per_class: int, seed: int) -> Path:
        return self.folder / f"{method}-{samples_per_class}-{seed}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        record = json.loads(path.read_text()) if path.exists() else None
        return record if record is not None and record["of"] == self._of else None

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        # Written aside first, so that an interruption leaves no half of a file.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"of": self._of, **record}))
        partial.replace(path)
