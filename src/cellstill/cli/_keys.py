"""Which column of ``obs`` may be the batch, the label, the condition or the sample, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

ROLES = ("batch", "label", "condition", "sample")

_MAX_LEVELS = 500
_MAX_COVARIATE_LEVELS = 50
# In the order of preference: names of these roles in the field, as whole words of a column's name.
_KNOWN: dict[str, tuple[str, ...]] = {
    "label": (
        "cell type",
        "celltype",
        "cell ontology",
        "cell label",
        "annotation",
        "label",
        "labels",
        "subtype",
        "cluster",
        "clusters",
        "leiden",
        "louvain",
    ),
    "batch": (
        "batch",
        "technology",
        "tech",
        "protocol",
        "platform",
        "assay",
        "chemistry",
        "dataset",
        "study",
        "library",
        "channel",
        "lane",
        "pool",
        "run",
        "plate",
        "site",
        "lab",
    ),
    "condition": (
        "condition",
        "treatment",
        "stim",
        "stimulation",
        "disease",
        "perturbation",
        "genotype",
        "timepoint",
        "time",
        "group",
        "status",
        "tissue",
        "sex",
    ),
    "sample": ("donor", "patient", "subject", "individual", "sample", "specimen", "replicate", "mouse", "orig ident"),
}


@dataclass(frozen=True)
class Column:
    """A column of ``obs``.

    Attributes
    ----------
    name
        Its name.
    kind
        ``"levels"``, ``"number"``, ``"constant"`` or ``"identifier"`` (a level of its own for nearly every cell).
    n_levels
        Number of different values.
    n_missing
        Cells without a value.
    smallest
        Cells of the rarest level.
    role
        One of :data:`ROLES`, or empty.
    known_as
        The word in its name that suggests the role.
    nested_in
        Columns of which each level of this one has a single level.
    """

    name: str
    kind: str
    n_levels: int
    n_missing: int
    smallest: int
    role: str = ""
    known_as: str = ""
    nested_in: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """What speaks for and against it, in a few words."""
        if self.kind != "levels":
            return {"constant": "one value only", "identifier": "names single cells", "number": "a number"}[self.kind]
        parts = [f"{self.n_levels} levels, the rarest with {self.smallest:,} cells"]
        if self.nested_in:
            parts.append("nested in " + " and ".join(self.nested_in))
        if self.n_missing:
            parts.append(f"missing for {self.n_missing:,} cells")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "name": self.name,
            "kind": self.kind,
            "n_levels": self.n_levels,
            "n_missing": self.n_missing,
            "smallest_level": self.smallest,
            "role": self.role,
            "nested_in": list(self.nested_in),
        }


def describe_columns(obs: pd.DataFrame) -> list[Column]:
    """Describe every column of ``obs``, and guess its role from its name and its levels."""
    columns = [_describe(name, obs[name]) for name in obs.columns]
    codes = {c.name: pd.factorize(obs[c.name].astype(str))[0] for c in columns if c.kind == "levels"}
    levels = {c.name: c.n_levels for c in columns}
    # Only roles that structure the experiment are worth comparing.
    groups = [c.name for c in columns if c.role in ("batch", "condition", "sample")]
    return [
        replace(
            column,
            nested_in=tuple(
                other
                for other in groups
                if column.name in groups
                and levels[other] < column.n_levels
                and _is_nested(codes[column.name], codes[other])
            ),
        )
        for column in columns
    ]


def by_role(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """Columns of each role that can serve as keys, those to be preferred first."""
    usable = [c for c in columns if c.kind == "levels" and not c.n_missing]
    return {role: sorted((c for c in usable if c.role == role), key=_preference) for role in ROLES}


def suggest(obs: pd.DataFrame, columns: Sequence[Column]) -> dict[str, list[str]]:
    """Choose keys for ``cellstill integrate``.

    Returns
    -------
    Columns by ``"batch"``, ``"label"`` and ``"covariate"``: the batch is a column with a batch's name or, failing that,
    a sample's, and rather one that can be told apart from the condition; covariates are conditions that can be told
    apart from that batch.
    """
    found = by_role(columns)
    conditions = [c.name for c in found["condition"] if c.n_levels <= _MAX_COVARIATE_LEVELS]

    def separable(batch: str) -> list[str]:
        return [key for key in conditions[:1] if can_be_told_apart(obs[batch], obs[key])]

    batches = [c.name for role in ("batch", "sample") for c in found[role]]
    batch = next((name for name in batches if separable(name)), batches[0] if batches else None)
    return {
        "batch": [batch] if batch is not None else [],
        "label": [c.name for c in found["label"][:1]],
        "covariate": separable(batch) if batch is not None else [],
    }


def can_be_told_apart(first: pd.Series, second: pd.Series) -> bool:
    """Whether the levels of two columns are joined into one by the cells that share them."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows, columns = (pd.factorize(values.astype(str))[0] for values in (first, second))
    offset = int(rows.max()) + 1
    size = offset + int(columns.max()) + 1
    graph = coo_matrix((np.ones(len(rows)), (rows, columns + offset)), shape=(size, size))
    return int(connected_components(graph, directed=False)[0]) == 1


def _describe(name: str, values: pd.Series) -> Column:
    sizes = values.astype(str)[values.notna()].value_counts()
    n_missing = int(values.isna().sum())
    if len(sizes) < 2:
        kind = "constant"
    elif pd.api.types.is_float_dtype(values) or (pd.api.types.is_integer_dtype(values) and len(sizes) > _MAX_LEVELS):
        kind = "number"
    elif len(sizes) > max(_MAX_LEVELS, len(values) // 2) or len(sizes) > 0.9 * len(values):
        kind = "identifier"
    else:
        kind = "levels"
    role, word = _role(name) if kind == "levels" else ("", "")
    return Column(name, kind, len(sizes), n_missing, int(sizes.min()) if len(sizes) else 0, role, word)


def _role(name: str) -> tuple[str, str]:
    """Role that a column's name suggests, and by which word."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = f" {' '.join(re.findall('[a-z]+', spaced.lower()))} "
    found = [(role, word) for role, known in _KNOWN.items() for word in known if f" {word} " in words]
    return found[0] if found else ("", "")


def _preference(column: Column) -> tuple[int, int, int]:
    """Better-known words first; then names that say nothing else; then fewer levels."""
    return _KNOWN[column.role].index(column.known_as), len(column.name), column.n_levels


def _is_nested(inner: np.ndarray, outer: np.ndarray) -> bool:
    pairs = np.unique(np.column_stack([inner, outer]), axis=0)
    return len(pairs) == inner.max() + 1
