"""Results of condensation on disk, one file each, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellstill.condense.baselines import BASELINES
from cellstill.condense.cells import LabelledCells
from cellstill.condense.evaluate import Method, evaluate, known_training, train_full
from cellstill.condense.evaluated import Condensed, Evaluation, FullData
from cellstill.condense.evaluators import get_evaluators
from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.matching import MatchingConfig
from cellstill.condense.method import TRAINED_WITH, Variant, scdd_features
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.shared import share_space, shared_space
from cellstill.condense.solver import Condensed as Made
from cellstill.condense.space import Space, fit_space
from cellstill.condense.stored import restore_space, space_config, space_tensors
from cellstill.io.store import load_store, save_store

OURS, START, OUR_POINTS = "scdd", "scdd_start", "scdd_features"
VARIANTS = {OURS: Variant(), START: Variant().unmatched()}
"""Ours, and ours with codes that stay where they start."""
LATENT = ("kmeans_latent", "kmeans_latent_medoids", "generator", "text_distill", "feat_distill")
"""Baselines that need our trained space."""

Ours = Callable[[CondensationProblem, int, int], Made]
"""A variant of ours: from problem, samples per class and seed to cells, and how they came to be."""


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

    def run(
        self, method: str, samples_per_class: int, seed: int, prepare: Callable[[Store, int], Ours] | None = None
    ) -> bool:
        """Condense and predict, unless that was done before; return whether there was anything to do.

        ``prepare`` makes a variant of ours of store and seed, with all that is trained before it condenses.
        """
        path = self._path(method, samples_per_class, seed)
        if self._read(path) is not None:
            return False
        if method in VARIANTS or method in LATENT or method == OUR_POINTS:
            self.need_space(seed)
        kept: dict[str, Any] = {}
        start = time.process_time()
        ours = prepare(self, seed) if prepare else VARIANTS[method].condense if method in VARIANTS else None
        kept["training_cpu_seconds"] = time.process_time() - start
        if ours is not None:
            condense: Method = self._ours(ours, kept, path)
        else:
            condense = scdd_features if method == OUR_POINTS else BASELINES[method].condense
        found = evaluate(
            self.problem,
            {method: condense},
            samples_per_class=(samples_per_class,),
            seeds=(seed,),
            full=self.full([seed]),
            progress=False,
        ).condensed[0]
        predictions = {name: predicted.tolist() for (name, _), predicted in found.predictions.items()}
        numbers = {"n_cells": found.n_cells, "seconds": found.seconds, "added_mb": found.added_mb}
        self._write(path, {**numbers, "n_bytes": found.n_bytes, **kept, "predictions": predictions})
        return True

    def full(self, seeds: Sequence[int]) -> FullData:
        """Predictions after training on all cells."""
        task, known = self.problem.tasks[0].key, {}
        for seed in seeds:
            record = self.record(f"full-{seed}", lambda seed=seed: self._full(seed))
            known |= {(name, seed, task): np.array(found) for name, found in record["predictions"].items()}
        return FullData(self.problem, known)

    def _full(self, seed: int) -> dict[str, Any]:
        predictions = train_full(self.problem, get_evaluators(), [seed]).predictions
        return {"predictions": {name: found.tolist() for (name, _, _), found in predictions.items()}}

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
        ours = dict.fromkeys((*VARIANTS, OUR_POINTS), TRAINED_WITH)
        trained_with = known_training([*ours, *methods], ours)
        names = tuple(evaluator.name for evaluator in get_evaluators())
        full = self.full(sorted({one.seed for one in found}))
        return Evaluation(self.problem, tuple(found), full, names, trained_with)

    def choice(self, samples_per_class: int, seed: int, method: str = OURS) -> list[dict[str, Any]] | None:
        """The candidates of ours, or of a variant, with their scores on the validation cells."""
        record = self._read(self._path(method, samples_per_class, seed))
        return None if record is None else record["choice"]

    def number(self, name: str, method: str, samples_per_class: int, seed: int) -> float | None:
        """A number of a result, such as ``"cpu_seconds"``; ``None`` if it was not noted."""
        record = self._read(self._path(method, samples_per_class, seed))
        return None if record is None else record.get(name)

    def has(self, name: str) -> bool:
        """Whether there is such a record."""
        return self._read(self.folder / f"{name}.json") is not None

    def record(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Any other result, by its name; computed unless that was done before."""
        path = self.folder / f"{name}.json"
        found = self._read(path)
        if found is None:
            found = compute()
            self._write(path, found)
        return found

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

    def space(self, seed: int) -> Space:
        """Return that space."""
        self.need_space(seed)
        return shared_space(self.problem, seed)

    def _ours(
        self, ours: Ours, kept: dict[str, Any], path: Path
    ) -> Callable[[CondensationProblem, int, int], LabelledCells]:
        def condense(problem: CondensationProblem, samples_per_class: int, seed: int) -> LabelledCells:
            start = time.process_time()
            found = ours(problem, samples_per_class, seed)
            kept["cpu_seconds"] = time.process_time() - start
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
