from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from cellstill.de import BayesianConfig, Contrast, PseudobulkConfig
from cellstill.de.choice import (
    batch_terms,
    check_within,
    choose_cells,
    choose_groups,
    chosen_how,
    codes_of_both,
    require_samples,
)
from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError


@pytest.fixture
def obs():
    return pd.DataFrame({"kind": pd.Categorical(list("abcab"), categories=list("zcba")), "n": [1, 2, 2, 3, 1]})


def test_two_groups_are_taken_as_they_are(obs):
    chosen, contrast = choose_groups(obs, "n", 2, 1)
    assert contrast == Contrast("n", "2", "1")
    assert contrast.arguments == {"groupby": "n", "group1": "2", "group2": "1"}
    assert chosen["n"].tolist() == ["1", "2", "2", "3", "1"]
    assert obs["n"].tolist() == [1, 2, 2, 3, 1]


def test_without_a_second_group_the_first_is_compared_with_the_rest(obs):
    chosen, contrast = choose_groups(obs, "kind", "a")
    assert contrast == Contrast("kind", "a", "rest")
    assert chosen["kind"].tolist() == ["a", "rest", "rest", "a", "rest"]
    assert obs["kind"].tolist() == list("abcab")


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (("kind", "z"), InvalidArgumentError, "group1='z' is not known. Use one of: 'a', 'b', 'c'"),
        (("kind", "a", "z"), InvalidArgumentError, "group2='z' is not known"),
        (("kind", "a", "a"), InvalidArgumentError, "group1 and group2 are both 'a'"),
        (("type", "a"), MissingKeyError, "groupby='type' is not in obs"),
    ],
    ids=["empty_category", "unknown", "twice", "no_column"],
)
def test_groups_that_are_not_there_are_named(obs, groups, error, message):
    with pytest.raises(error, match=message):
        choose_groups(obs, *groups)


def test_a_group_called_rest_and_a_column_of_one_value_cannot_be_compared_with_the_rest():
    with pytest.raises(InvalidArgumentError, match="group1='rest' is also what all other cells are called"):
        choose_groups(pd.DataFrame({"state": ["rest", "act"]}), "state", "rest")
    with pytest.raises(InvalidArgumentError, match="group2='rest' is not known. Use one of: 'a'"):
        choose_groups(pd.DataFrame({"state": ["a", "a"]}), "state", "a")


@pytest.mark.parametrize("idx2", [[4, 1], np.array([False, True, False, False, True])], ids=["positions", "mask"])
def test_cells_by_position_become_groups(obs, idx2):
    chosen, contrast = choose_cells(obs, [2, 0], idx2)
    assert contrast == Contrast("idx", "idx1", "idx2")
    assert chosen["idx"].tolist() == ["idx1", "idx2", "idx1", "neither", "idx2"]
    assert choose_cells(obs, [2, 0])[0]["idx"].tolist() == ["idx1", "idx2", "idx1", "idx2", "idx2"]
    assert list(obs) == ["kind", "n"]
    with pytest.raises(InvalidArgumentError, match=r"idx1 and idx2 have 1 cells in common \(position 4"):
        choose_cells(obs, [3, 4], idx2)


def test_within_has_to_be_a_column_of_its_own(obs):
    check_within(obs, None, groupby="kind", sample_key="n")
    with pytest.raises(InvalidArgumentError, match="within and groupby are both 'kind'"):
        check_within(obs, "kind", groupby="kind", sample_key="n")
    with pytest.raises(InvalidArgumentError, match="within and sample_key are both 'n'"):
        check_within(obs, "n", groupby="kind", sample_key="n")
    with pytest.raises(MissingKeyError, match="within='type' is not in obs. obs has: 'kind', 'n'"):
        check_within(obs, "type", groupby="kind", sample_key="n")


def test_samples_are_required():
    assert require_samples("donor") == "donor"
    with pytest.raises(InvalidArgumentError, match="sample_key is missing. Name the column"):
        require_samples(None)


def cells(samples: list[tuple], n_cells: int = 5) -> pd.DataFrame:
    rows = [sample for sample in samples for _ in range(n_cells)]
    return pd.DataFrame(rows, columns=["sample", "group", "batch", "type"]).sample(frac=1, random_state=0)


CONTRAST = Contrast("group", "t", "c")
ASKED = {"sample_key": "sample", "within": None, "min_cells": 5}


def test_batches_of_one_sample_each_are_not_used():
    shared = cells([(f"s{i}", "tc"[i % 2], "xy"[i // 2], "B") for i in range(4)])
    assert batch_terms(shared, ["batch"], CONTRAST, **ASKED)[1] == ["batch"]
    single = cells([(f"s{i}", "tc"[i % 2], f"lane{i}", "B") for i in range(4)])
    assert batch_terms(single, ["batch"], CONTRAST, **ASKED)[1] == []
    # What the second sample of a batch is in another group, or has too few cells, does not count.
    other = pd.concat([single, cells([("s8", "other", "lane0", "B")])])
    assert batch_terms(other, ["batch"], CONTRAST, **ASKED)[1] == []
    few = pd.concat([single, cells([("s8", "t", "lane0", "B")], 4)])
    assert batch_terms(few, ["batch"], CONTRAST, **ASKED)[1] == []
    assert batch_terms(few, ["batch"], CONTRAST, **{**ASKED, "min_cells": 4})[1] == ["batch"]


NO_SAMPLES = {**ASKED, "sample_key": None}


def test_without_samples_batches_are_used_where_the_groups_share_them():
    """Of each group half of the cells, and two parts of ``min_cells``, in levels with ``min_cells`` cells of each."""
    shared = cells([("s", group, batch, "B") for group in "tc" for batch in "xy"])
    assert batch_terms(shared, ["batch"], CONTRAST, **NO_SAMPLES)[1] == ["batch"]
    own = cells([(f"s{i}", "tc"[i % 2], f"lane{i}", "B") for i in range(4)])
    message = "'batch' is no term of the design: 't' and 'c' share too few of its levels"
    with pytest.warns(CellstillWarning, match=message):
        obs, used = batch_terms(own, ["batch"], CONTRAST, **NO_SAMPLES)
    assert used == []
    assert set(obs["batch"]) == {"not shared by the groups"}
    # One of four batches is shared: a quarter of the cells.
    part = pd.concat([own, cells([("s4", "c", "lane0", "B"), ("s5", "t", "lane1", "B")], 4)])
    with pytest.warns(CellstillWarning, match=message):
        assert batch_terms(part, ["batch"], CONTRAST, **NO_SAMPLES)[1] == []
    assert batch_terms(part, ["batch"], CONTRAST, **{**NO_SAMPLES, "min_cells": 4})[1] == ["batch"]
    # Groups that are too small to compare at all are not the batches' fault.
    small = cells([("s", group, batch, "B") for group in "tc" for batch in "xy"], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert batch_terms(small, ["batch"], CONTRAST, **NO_SAMPLES)[1] == []


def test_without_samples_a_batch_has_to_be_shared_inside_those_before_it():
    obs = cells([("s", group, batch, "B") for group in "tc" for batch in "xy"], 10)
    # Balanced over the groups, but not inside the batches.
    first = (obs["group"] == "t") == (obs["batch"] == "x")
    obs["lane"] = np.where(first, "a", "b")
    assert batch_terms(obs, ["lane"], CONTRAST, **NO_SAMPLES)[1] == ["lane"]
    with pytest.warns(CellstillWarning, match="'lane' is no term"):
        assert batch_terms(obs, ["batch", "lane"], CONTRAST, **NO_SAMPLES)[1] == ["batch"]


def test_without_samples_each_level_has_the_batches_that_it_shares():
    rows = [("s", group, batch, "B") for group in "tc" for batch in "xy"]
    obs = cells([*rows, *[("s", "tc"[i % 2], "xy"[i % 2], "T") for i in range(4)]])
    with pytest.warns(CellstillWarning, match="'batch' is no term of the design of type in 'T': 't' and 'c'"):
        chosen, used = batch_terms(obs, ["batch"], CONTRAST, **{**NO_SAMPLES, "within": "type"})
    assert used == ["batch"]
    assert set(chosen["batch"][obs["type"] == "T"]) == {"not shared by the groups"}
    pd.testing.assert_series_equal(chosen["batch"][obs["type"] == "B"], obs["batch"][obs["type"] == "B"])


def test_the_columns_of_the_comparison_are_no_batches():
    shared = cells([(f"s{i}", "tc"[i % 2], "xy"[i // 2], "B") for i in range(4)])
    keys = ["batch", "group", "sample", "type", "batch"]
    assert batch_terms(shared, keys, CONTRAST, **{**ASKED, "within": "type"})[1] == ["batch"]


def test_inside_levels_a_batch_is_kept_where_it_spans_samples():
    shared = [(f"s{i}", "tc"[i % 2], "xy"[i // 2], "B") for i in range(4)]
    single = [("s0", "t", "x", "T"), ("s3", "c", "y", "T")]
    obs = cells([*shared, *single])
    chosen, used = batch_terms(obs, ["batch"], CONTRAST, **{**ASKED, "within": "type"})
    assert used == ["batch"]
    is_b = (obs["type"] == "B").to_numpy()
    np.testing.assert_array_equal(chosen["batch"][is_b], obs["batch"][is_b])
    assert set(chosen["batch"][~is_b]) == {"one per sample"}
    assert set(obs["batch"]) == {"x", "y"}
    assert batch_terms(obs[~is_b], ["batch"], CONTRAST, **{**ASKED, "within": "type"})[1] == []


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0, 1, 1, 2, 2, 2], [1]),
        ([0, 1, 0, 1, 0, 1, 1], [0, 1]),
        ([-1, 0, 1, 1, -1, 2, 2], [1]),
        ([0, 0, 0, 1, 1, 1, 1], [0, 1]),
        ([-1, -1, -1, -1, -1, -1, 3], [3]),
    ],
    ids=["one_in_the_middle", "all", "unknown_batches", "none_shared", "hardly_any_known"],
)
def test_codes_that_both_groups_have(codes, expected):
    groups = pd.Series([*list("aaabbb"), "other"])
    assert codes_of_both(np.array(codes), groups, Contrast("group", "a", "b")).tolist() == expected


def test_a_batch_that_differs_within_samples_is_no_term_and_this_is_said():
    obs = pd.DataFrame({"sample": list("ssttuuvv"), "lane": list("12121212"), "site": list("xxxxyyyy")})
    obs["group"] = list("aabbaabb")
    asked = {"sample_key": "sample", "within": None, "min_cells": 1}
    with pytest.warns(CellstillWarning, match="'lane' is no term of the design: it differs within samples .'s' in"):
        _, used = batch_terms(obs, ["lane", "site"], Contrast("group", "a", "b"), **asked)
    assert used == ["site"]


def test_samples_spread_in_one_level_cost_only_that_level_its_term():
    """And a stray cell is no spread: the design refuses it, as before."""
    rows = [(f"s{i}", "tc"[i % 2], "xy"[i // 2], level) for i in range(4) for level in "AB"]
    obs = cells(rows, 20)
    stray = obs.copy()
    stray.loc[stray.index[(stray["type"] == "B").to_numpy().argmax()], "batch"] = "y"
    asked = {**ASKED, "within": "type"}
    chosen, used = batch_terms(stray, ["batch"], CONTRAST, **asked)
    assert used == ["batch"]
    pd.testing.assert_series_equal(chosen["batch"], stray["batch"], check_dtype=False)
    in_b = (obs["type"] == "B").to_numpy()
    obs.loc[in_b & (np.arange(len(obs)) % 2 == 0), "batch"] = "z"
    with pytest.warns(CellstillWarning, match="'batch' is no term of the design of type in 'B': it differs within"):
        chosen, used = batch_terms(obs, ["batch"], CONTRAST, **asked)
    assert used == ["batch"]
    assert set(chosen["batch"][in_b]) == {"one per sample"}
    assert set(chosen["batch"][~in_b]) == {"x", "y"}


def test_samples_are_one_column():
    with pytest.raises(InvalidArgumentError, match=r"sample_key=\['donor', 'region'\] has to name one column of obs"):
        require_samples(["donor", "region"])


def test_what_is_no_configuration_is_named():
    assert chosen_how(None) == PseudobulkConfig()
    how = BayesianConfig()
    assert chosen_how(how) is how
    with pytest.raises(InvalidArgumentError, match="how='ttest' is no configuration. Write how=PseudobulkConfig"):
        chosen_how("ttest")
