"""Several labels at once: condensed cells of Kang's data that have a cell type and a condition."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from _condense_store import OURS, Store

from cellstill.condense import TRAINED_WITH, evaluate, scdd

SIZE = 10
"""Cells of each combination of the labels."""

LABELS = ("cell_type", "condition")
BESIDE = ("kmeans_centroids", "half_centroids", "herding", "random")

COLUMNS = {
    "task": "label",
    "method": "method",
    "retention": "retention|.3f",
    "retention_of_best": "of best|.3f",
    "macro_f1": "macro-F1|.3f",
    "rare_recall": "rare recall|.3f",
    "difference": f"{OURS} ahead by|.3f",
    "low": "low|.3f",
    "high": "high|.3f",
    "compression": "compression|.1f",
}


def run(kept: Store, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Scores of all methods, and what ours is ahead by, unless that was done before."""
    return kept.record(_name(seeds), lambda: _scores(kept, seeds))


def was_run(kept: Store, seeds: Sequence[int]) -> bool:
    """Whether that was done before."""
    return kept.has(_name(seeds))


def _name(seeds: Sequence[int]) -> str:
    return f"tasks-{SIZE}-{'-'.join(map(str, seeds))}"


def _scores(kept: Store, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    for seed in seeds:
        kept.need_space(seed)
    methods = {OURS: scdd, **{name: name for name in BESIDE}}
    found = evaluate(
        kept.problem,
        methods,
        samples_per_class=[SIZE],
        seeds=seeds,
        trained_with={OURS: TRAINED_WITH},
        progress=False,
    )
    tables = {"summary": found.summary(), "ahead": found.compare(OURS)}
    return {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}


def rows(found: Mapping[str, list[dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    """One row for each label and method."""
    ahead = pd.DataFrame(found["ahead"]).set_index(["task", "baseline"])[["difference", "low", "high"]]
    for row in found["summary"]:
        key = (row["task"], row["method"])
        yield row | (ahead.loc[key].to_dict() if key in ahead.index else {})
