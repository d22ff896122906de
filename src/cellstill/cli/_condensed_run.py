"""What tells one run of ``cellstill condense`` from another, and says in words how they differ."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cellstill
from cellstill.cli._condensed_model import CondensationSettings

if TYPE_CHECKING:
    from cellstill.condense import CondensationProblem

_FREE = ("baselines", "n_seeds")
"""Settings that may differ when a run goes on: results are kept by method and seed."""

_OPTIONS = {"path": "FILE", "label_keys": "--label-key", "samples_per_class": "--spc", "evaluators": "--evaluator"}
"""Where the option of a setting is not its name."""


def describe_settings(settings: CondensationSettings) -> dict[str, Any]:
    """Return settings that results depend on, and the version, in a form that JSON can hold."""
    plain = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
    return {
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()},
        "version": cellstill.__version__,
    }


def describe_cells(problem: CondensationProblem) -> dict[str, Any]:
    """Return what tells cells and names from others, in a form that JSON can hold.

    Parameters
    ----------
    problem
        All cells, the test cells among them if there are any.
    """
    return {
        "cells": problem.fingerprint(),
        "genes": hashlib.blake2b("\0".join(problem.genes.tolist()).encode(), digest_size=16).hexdigest(),
        "classes": list(problem.classes),
        "categories": {task.key: list(task.names) for task in problem.tasks},
    }


def other_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say how the settings of a run, described before, differ from those that are kept there; nothing if none do."""
    if there.get("version") != here["version"]:
        return [f"cellstill {there.get('version', 'of another version')} there and {here['version']} here"]
    known, given = there["settings"], here["settings"]
    found = [name for name, value in given.items() if known.get(name) != value]
    return [f"{_flag(name, known.get(name))} there and {_flag(name, given[name])} here" for name in found]


def other_cells(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say how the cells of a run, described before, differ from those that are kept there; nothing if none do."""
    said = [_renamed(key, there["categories"][key], names) for key, names in here["categories"].items()]
    said = [words for words in said if words]
    if there["genes"] != here["genes"]:
        said.append("other genes, or other names of genes")
    if there["classes"] != here["classes"] and not said:
        said.append("other combinations of labels")
    if there["cells"] != here["cells"]:
        said.append("other cells, labels or counts")
    return said


def _flag(name: str, value: Any) -> str:
    option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
    if name == "n_top_genes" and value is None:
        value = 0
    if value is None or value is False or value == []:
        return f"no {option}"
    if value is True:
        return option
    return " ".join(f"{option} {shlex.quote(str(each))}" for each in (value if isinstance(value, list) else [value]))


def _renamed(key: str, there: list[str], here: list[str]) -> str:
    """Say how the categories of a column differ."""
    if there == here:
        return ""
    if len(there) != len(here):
        return f"{len(there)} categories of {key!r} there and {len(here)} here"
    old, new = next(pair for pair in zip(there, here, strict=True) if pair[0] != pair[1])
    return f"a category of {key!r} is {old!r} there and {new!r} here"
