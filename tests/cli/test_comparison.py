from __future__ import annotations

from itertools import product

import pandas as pd
import pytest

from cellstill.cli._comparison import suggest_comparison
from cellstill.cli._keys import describe_columns


def suggested(rows, columns):
    """Options for cells of which every row occurs 5 times."""
    obs = pd.DataFrame(list(rows) * 5, columns=columns)
    return suggest_comparison(obs, describe_columns(obs))


def with_donors(*levels, n=2):
    """Donors of their own for each level."""
    return [(level, f"d{i}{level}") for level, i in product(levels, range(n))]


@pytest.mark.parametrize(
    ("levels", "groups"),
    [
        (["ctrl", "stim"], ["--group1", "stim", "--group2", "ctrl"]),
        (["LPS", "Wild-type"], ["--group1", "LPS", "--group2", "Wild-type"]),
        (["a", "b"], ["--group1", "a", "--group2", "b"]),
        (["a", "b", "c"], ["--group1", "a"]),
        (["a", "b", "healthy"], ["--group1", "a", "--group2", "healthy"]),
        (["control", "ctrl"], ["--group1", "ctrl", "--group2", "control"]),
        (["ctrl A", "in control"], ["--group1", "ctrl A", "--group2", "in control"]),
    ],
)
def test_groups(levels, groups):
    options = suggested(with_donors(*levels), ["condition", "donor"])
    assert options == ["--groupby", "condition", *groups, "--sample-key", "donor"]


def test_levels_without_replicates_are_no_groups():
    assert suggested(with_donors("a", "b", n=1), ["condition", "donor"]) == []
    three = [*with_donors("a", "b"), ("c", "d0c")]
    assert suggested(three, ["condition", "donor"])[2:6] == ["--group1", "a", "--group2", "b"]


def test_the_first_condition_that_has_replicates():
    rows = [(group, group, sex, donor) for group, sex, donor in (("a", "f", "1"), ("a", "m", "2"), ("b", "f", "3"))]
    rows += [("a", "a", "m", "4")]
    options = suggested(rows, ["treatment", "condition", "sex", "donor"])
    assert options[:2] == ["--groupby", "sex"]


@pytest.mark.parametrize(
    ("batch_of", "named"),
    [
        (lambda condition, donor: donor[1], True),
        (lambda condition, donor: "x", False),
        (lambda condition, donor: condition, False),
    ],
    ids=["crossed", "constant", "confounded"],
)
def test_batch(batch_of, named):
    rows = [(*row, batch_of(*row)) for row in with_donors("ctrl", "stim")]
    assert suggested(rows, ["condition", "donor", "batch"])[8:] == (["--batch-key", "batch"] if named else [])


def test_a_batch_that_splits_samples_is_not_named():
    rows = [(*row, batch) for row, batch in product(with_donors("ctrl", "stim"), "xy")]
    assert suggested(rows, ["condition", "donor", "batch"])[8:] == []


def test_a_batch_of_other_groups_is_not_named():
    rows = [(*row, "x") for row in with_donors("ctrl", "stim")] + [("c", "d0c", "y")]
    options = suggested(rows, ["condition", "donor", "batch"])
    assert options[2:6] == ["--group1", "stim", "--group2", "ctrl"]
    assert "--batch-key" not in options


@pytest.mark.parametrize("columns", [["condition"], ["donor"], ["condition", "cell_type"]])
def test_without_samples_or_conditions_there_is_none(columns):
    assert suggested([("a", "b")[: len(columns)], ("c", "d")[: len(columns)]], columns) == []
