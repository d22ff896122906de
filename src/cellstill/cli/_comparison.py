"""Which comparison ``cellstill de`` can make of a file: groups that have samples to stand for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import pandas as pd

from cellstill.cli._keys import Column, by_role, can_be_told_apart

_MAX_GROUPS = 50
_MIN_SAMPLES = 2
_REFERENCE = re.compile(
    "control|ctrl|ctl|untreated|unstim(ulated)?|healthy|normal|vehicle|mock|wildtype|wt", re.IGNORECASE
)


def suggest_comparison(obs: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    """Choose the options of ``cellstill de``.

    Returns
    -------
    Options and their values; none where no two levels of a column with a condition's name have two samples each. The
    second group is a control if a level has the name of one, or the other of two levels, and else all other cells. The
    batch is named where each sample lies in one, and it can be told apart from the groups.
    """
    found = by_role(columns)
    for condition, sample in product(found["condition"], found["sample"]):
        groups = _groups(obs, condition.name, sample.name) if condition.n_levels <= _MAX_GROUPS else []
        if not groups:
            continue
        compared = obs[obs[condition.name].astype(str).isin(groups)] if len(groups) == 2 else obs
        batches = [c.name for c in found["batch"] if _is_term(compared, c.name, condition.name, sample.name)]
        options = ["--groupby", condition.name]
        options += [word for number, group in enumerate(groups, 1) for word in (f"--group{number}", group)]
        options += ["--sample-key", sample.name]
        options += [word for label in found["label"][:1] for word in ("--within", label.name)]
        return options + [word for batch in batches[:1] for word in ("--batch-key", batch)]
    return []


def _groups(obs: pd.DataFrame, condition: str, sample: str) -> list[str]:
    """Choose two levels that have samples enough, or one to be compared with the rest."""
    n_samples = obs[sample].astype(str).groupby(obs[condition].astype(str)).nunique()
    levels = sorted(n_samples[n_samples >= _MIN_SAMPLES].index)
    if len(levels) < 2:
        return []
    references = [level for level in levels if _REFERENCE.fullmatch("".join(filter(str.isalpha, level)))]
    others = [level for level in levels if level not in references[:1]]
    return [others[0], *references[:1]] if references or len(levels) > 2 else others


def _is_term(obs: pd.DataFrame, batch: str, condition: str, sample: str) -> bool:
    """Whether a batch fits into the design: one of each sample, several in all, and not the condition itself."""
    keys = [obs[key].astype(str) for key in (sample, condition)]
    levels = obs[batch].astype(str)
    return (
        bool(levels.groupby(keys).nunique().max() == 1)
        and levels.nunique() > 1
        and can_be_told_apart(obs[batch], obs[condition])
    )
