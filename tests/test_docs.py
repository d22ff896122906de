"""Pages of the documentation that list what there is: they have it all."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

from cellstill.condense import BASELINES

DOCS = Path(__file__).parents[1] / "docs"
ENTRIES = re.findall(r"^   ([A-Za-z_][\w.]*)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)


def test_entries_of_the_api_exist_and_stand_there_once():
    assert len(ENTRIES) > 100
    assert len(set(ENTRIES)) == len(ENTRIES)
    for entry in ENTRIES:
        resolve_name(f"cellstill.{entry}")


@pytest.mark.parametrize("module", ["condense", "metrics", "metrics.realism"])
def test_all_that_is_public_is_in_the_api(module):
    listed = {entry.rpartition(".")[2] for entry in ENTRIES if entry.partition(".")[0] == module.partition(".")[0]}
    assert set(import_module(f"cellstill.{module}").__all__) - listed - {"SCDD"} == set()


def test_table_of_baselines_has_each_with_the_package_that_it_needs():
    page = (DOCS / "condense.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:`(\w+)` )?\|$", page, flags=re.MULTILINE)
    packages = dict(rows)
    assert len(packages) == len(rows)
    assert BASELINES.keys() - packages.keys() == set()
    for name, baseline in BASELINES.items():
        assert bool(packages[name]) == (baseline.extra is not None), name
