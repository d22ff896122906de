from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellstill.de import Contrast, comparison_cells
from cellstill.de.design import design_of_units, make_design
from cellstill.de.units import make_units
from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError

CONTRAST = Contrast("group", "t", "c")


def cells(samples: list[tuple], columns: list[str], n_cells: int = 12) -> pd.DataFrame:
    """``n_cells`` cells of each sample, shuffled."""
    rows = [sample for sample in samples for _ in range(n_cells)]
    return pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)


def design_of(obs, *, sample_key="sample", batch_key=None, covariate_keys=(), min_cells=10):
    return make_design(
        obs,
        CONTRAST,
        sample_key=sample_key,
        batch_key=batch_key,
        covariate_keys=covariate_keys,
        min_cells=min_cells,
    )


def contrast_weights(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.pinv(matrix)[-1]


BALANCED = [(f"s{i}", "tc"[i % 2], "ab"[i // 4]) for i in range(8)]


def test_batch_then_condition_last():
    units, design = design_of(cells(BALANCED, ["sample", "group", "my lane (x)"]), batch_key="my lane (x)")
    assert design.formula == "~ my lane (x) + group"
    assert design.notes == ()
    assert np.linalg.matrix_rank(design.matrix) == design.matrix.shape[1] == 3
    np.testing.assert_array_equal(design.matrix[:, -1], units.table["group"] == "t")
    np.testing.assert_array_equal(design.matrix[:, 1], units.table["my lane (x)"] == "b")


def test_cells_map_to_the_replicate_of_their_sample_and_group():
    obs = cells([*BALANCED, ("s9", "other", "a"), ("s0", "c", "a")], ["sample", "group", "batch"])
    units, _ = design_of(obs)
    assert (units.codes[(obs["group"] == "other").to_numpy()] == -1).all()
    used = units.codes >= 0
    table = units.table.iloc[units.codes[used]]
    np.testing.assert_array_equal(table["sample"], obs["sample"][used])
    np.testing.assert_array_equal(table["group"], obs["group"][used])
    np.testing.assert_array_equal(units.n_cells, np.bincount(units.codes[used]))
    assert len(units.table) == 9


def test_confounded_batch_and_condition_is_an_error_with_the_table():
    obs = cells([(f"s{i}", "tc"[i // 4], "ab"[i // 4]) for i in range(8)], ["sample", "group", "lane"])
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)'group' cannot be told from 'lane'.*a\s+0\s+4\nb\s+4\s+0.*batch_key=None"
    ):
        design_of(obs, batch_key="lane")


def test_terms_that_only_together_determine_the_condition_are_named_together():
    rows = [(f"s{i}", "tc"[(i // 2 + i // 4) % 2], "ab"[i // 4], "xy"[i // 2 % 2]) for i in range(8)]
    rows = [(name, "t" if (b == "a") and (x == "x") else "c", b, x) for name, _, b, x in rows if (b, x) != ("b", "y")]
    obs = cells(rows, ["sample", "group", "batch", "kit"])
    with pytest.raises(InvalidArgumentError, match="'group' cannot be told from 'batch' \\+ 'kit'"):
        design_of(obs, batch_key="batch", covariate_keys=["kit"])


def test_a_constant_batch_is_dropped_and_said():
    obs = cells([(f"s{i}", "tc"[i % 2], "a") for i in range(6)] + [("s7", "else", "b")], ["sample", "group", "batch"])
    _, design = design_of(obs, batch_key="batch")
    assert design.formula == "~ group"
    assert design.notes == ("'batch' is not in the design: it is constant in these samples.",)


def test_a_covariate_constant_within_batches_is_dropped_and_changes_nothing():
    obs = cells([(*row, {"a": "f", "b": "m"}[row[2]]) for row in BALANCED], ["sample", "group", "batch", "sex"])
    _, alone = design_of(obs, batch_key="batch")
    _, both = design_of(obs, batch_key="batch", covariate_keys=["sex"])
    assert both.formula == "~ batch + group"
    assert both.notes == ("'sex' is not in the design: batch already determines it.",)
    np.testing.assert_allclose(contrast_weights(both.matrix), contrast_weights(alone.matrix))


def test_numbers_enter_linearly_and_codes_of_batches_as_levels():
    age = [31.0, 45.0, 27.0, 60.0, 33.0, 51.0, 48.0, 39.0]
    obs = cells(
        [(*row[:2], i % 4 // 2 * 7, age[i]) for i, row in enumerate(BALANCED)], ["sample", "group", "lane", "age"]
    )
    units, design = design_of(obs, batch_key="lane", covariate_keys=["age"])
    assert design.formula == "~ lane + age + group"
    assert set(np.unique(design.matrix[:, 1])) == {0.0, 1.0}
    assert np.corrcoef(design.matrix[:, 2], units.table["age"])[0, 1] == pytest.approx(1)
    oracle = np.column_stack([np.ones(8), units.table["lane"] == "7", units.table["age"], units.table["group"] == "t"])
    np.testing.assert_allclose(contrast_weights(design.matrix), contrast_weights(oracle.astype(float)), atol=1e-10)


PAIRS = [(f"d{i}", group) for i in range(4) for group in "tc"]


def test_donors_in_both_groups_are_compared_with_themselves():
    units, design = design_of(cells(PAIRS, ["donor", "group"]), sample_key="donor")
    assert design.formula == "~ donor + group"
    values = np.random.default_rng(0).normal(size=len(units.table))
    wide = units.table.assign(value=values).pivot(index="donor", columns="group", values="value")
    assert contrast_weights(design.matrix) @ values == pytest.approx((wide["t"] - wide["c"]).mean())


def test_terms_of_single_pairs_are_not_common_whatever_their_name():
    obs = cells([(*row, f"{row[0]}{row[1]}") for row in PAIRS], ["donor", "group", "sample"])
    for keys in ({"sample_key": "donor"}, {"sample_key": "sample", "batch_key": "donor"}):
        _, design = design_of(obs, **keys)
        np.testing.assert_array_equal(design.common, design.matrix[:, [0, -1]])
    _, design = design_of(cells(BALANCED, ["sample", "group", "batch"]), batch_key="batch")
    np.testing.assert_array_equal(design.common, design.matrix)


def test_the_donor_as_batch_is_the_same_as_the_donor_as_sample():
    obs = cells([(*row, f"{row[0]}{row[1]}") for row in PAIRS], ["donor", "group", "sample"])
    _, by_donor = design_of(obs, sample_key="donor")
    _, by_sample = design_of(obs, sample_key="sample", batch_key="donor")
    assert by_donor.formula == by_sample.formula
    assert np.abs(contrast_weights(by_donor.matrix)).tolist() == pytest.approx([0.25] * 8)
    assert np.abs(contrast_weights(by_sample.matrix)).tolist() == pytest.approx([0.25] * 8)


def test_pairs_contain_their_batch():
    obs = cells([(*row, "ab"[int(row[0][1]) // 2]) for row in PAIRS], ["donor", "group", "batch"])
    _, design = design_of(obs, sample_key="donor", batch_key="batch")
    assert design.formula == "~ donor + group"
    assert design.notes == ("'batch' is not in the design: donor already determines it.",)


def test_a_donor_without_a_partner_is_left_out_of_a_paired_design():
    obs = cells([*PAIRS, ("d9", "t")], ["donor", "group"])
    with pytest.warns(CellstillWarning, match=r"1 of 9 samples left out: 'd9' in 't' \(12 cells\): in one group only"):
        units, design = design_of(obs, sample_key="donor")
    assert len(units.table) == 8
    reason = "in one group only, while samples in both are compared with themselves"
    assert units.left_out.to_numpy().tolist() == [["d9", "t", 12, reason]]
    assert np.linalg.matrix_rank(design.matrix) == design.matrix.shape[1] == 5
    assert units.codes.max() == 7
    assert (units.codes == -1).sum() == 12


def test_few_pairs_among_many_samples_stay_independent_and_said():
    rows = [("d0", "t"), ("d0", "c"), *[(f"t{i}", "t") for i in range(3)], *[(f"c{i}", "c") for i in range(3)]]
    _, design = design_of(cells(rows, ["donor", "group"]), sample_key="donor")
    assert design.formula == "~ group"
    assert design.notes[0].startswith("1 of 7 samples lie in both groups; their replicates were treated as independent")


def test_the_only_sample_of_a_batch_is_left_out_unless_the_contrast_needs_it():
    obs = cells([*BALANCED, ("s8", "t", "c")], ["sample", "group", "batch"])
    with pytest.warns(CellstillWarning, match=r"'s8' in 't' \(12 cells\): fitted exactly by a coefficient of its own"):
        units, design = design_of(obs, batch_key="batch")
    assert units.left_out["sample"].tolist() == ["s8"]
    assert design.matrix.shape == (8, 3)
    needed = [
        ("s0", "t", "a"),
        ("s1", "t", "a"),
        ("s2", "t", "b"),
        ("s3", "c", "b"),
        ("s4", "c", "c"),
        ("s5", "c", "c"),
    ]
    units, design = design_of(cells(needed, ["sample", "group", "batch"]), batch_key="batch")
    assert len(units.table) == 6
    np.testing.assert_allclose(np.abs(contrast_weights(design.matrix)), [0, 0, 1, 1, 0, 0], atol=1e-12)


def test_cells_still_map_to_their_replicate_when_one_in_the_middle_is_left_out():
    columns = ["sample", "group", "batch"]
    obs = pd.concat([cells(BALANCED, columns), cells([("s3_", "t", "a")], columns, 4)])
    with pytest.warns(CellstillWarning, match="'s3_' in 't'"):
        units, _ = design_of(obs)
    assert units.table["sample"].tolist() == [f"s{i}" for i in range(8)]
    expected = obs["sample"].map({f"s{i}": i for i in range(8)}).fillna(-1)
    np.testing.assert_array_equal(units.codes, expected)
    np.testing.assert_array_equal(units.n_cells, [12] * 8)


def test_small_samples_are_left_out_and_listed():
    obs = pd.concat(
        [cells(BALANCED, ["sample", "group", "batch"]), cells([("tiny", "t", "a")], ["sample", "group", "batch"], 9)]
    )
    with pytest.warns(CellstillWarning, match="1 of 9 samples left out") as caught:
        units, _ = design_of(obs)
    assert len(caught) == 1
    assert units.left_out.to_numpy().tolist() == [["tiny", "t", 9, "fewer than 10 cells"]]
    assert len(design_of(obs, min_cells=9)[0].table) == 9


def test_one_warning_names_all_that_was_left_out_but_not_without_end():
    columns = ["donor", "group"]
    obs = pd.concat(
        [
            cells([*PAIRS, ("d8", "t"), ("d9", "c"), ("few", "t")], columns),
            cells([(f"x{i}", "c") for i in range(20)], columns, 3),
        ]
    )
    settings = {"sample_key": "donor", "batch_key": None, "covariate_keys": ()}
    units = make_units(obs, CONTRAST, min_cells=10, **settings)
    units = units.keep((units.table["donor"] != "few").to_numpy(), "fewer than 1,000 counts")
    with pytest.warns(CellstillWarning) as caught:
        units, _ = design_of_units(units, CONTRAST, sample_key="donor", batch_key=None, covariate_keys=())
    (message,) = [str(item.message) for item in caught]
    assert message == (
        "23 of 31 samples left out: 'x0' in 'c' (3 cells), 'x1' in 'c' (3 cells), 'x10' in 'c' (3 cells), "
        "'x11' in 'c' (3 cells), 'x12' in 'c' (3 cells) and 15 more: fewer than 10 cells. "
        "'few' in 't' (12 cells): fewer than 1,000 counts. "
        "'d8' in 't' (12 cells), 'd9' in 'c' (12 cells): in one group only, while samples in both are compared with "
        "themselves."
    )


def test_a_single_sample_in_a_group_is_an_error_with_the_table_of_samples():
    obs = cells([("s0", "t"), ("s1", "c"), ("s2", "c"), ("s3", "c")], ["sample", "group"])
    obs = pd.concat([obs, cells([("s4", "t")], ["sample", "group"], 3)])
    with pytest.raises(InvalidArgumentError, match=r"of obs\['sample'\], 't' has 1 and 'c' has 3\. ") as error:
        design_of(obs)
    head, *rows = [line.split(maxsplit=3) for line in str(error.value).splitlines()[1:]]
    assert head == ["sample", "group", "n_cells", "left out because"]
    assert [row[:3] for row in rows] == [
        ["s1", "c", "12"],
        ["s2", "c", "12"],
        ["s3", "c", "12"],
        ["s0", "t", "12"],
        ["s4", "t", "3"],
    ]
    assert [row[3:] for row in rows] == [[]] * 4 + [["fewer than 10 cells"]]


def test_the_table_of_samples_is_short_however_many_there_are():
    obs = cells([("only", "t"), *[(f"s{i:03}", "c") for i in range(300)]], ["sample", "group"])
    with pytest.raises(InvalidArgumentError) as error:
        design_of(obs)
    lines = str(error.value).splitlines()
    assert len(lines) < 15
    assert lines[-1] == "... and 292 more"
    assert any(line.split()[:2] == ["only", "t"] for line in lines)


def test_as_many_coefficients_as_samples_is_an_error():
    obs = cells([("s0", "t", 1.0), ("s1", "t", 2.0), ("s2", "c", 1.5), ("s3", "c", 4.0)], ["sample", "group", "x"])
    obs["y"] = obs["sample"].map({"s0": 1.0, "s1": -1.0, "s2": 3.0, "s3": 0.0})
    with pytest.raises(InvalidArgumentError, match=r"~ x \+ y \+ group needs 4 coefficients for 4 samples"):
        design_of(obs, covariate_keys=["x", "y"])


def test_a_batch_that_varies_within_a_sample_is_an_error():
    obs = cells(BALANCED, ["sample", "group", "batch"])
    obs.loc[obs.index[obs["sample"] == "s3"][0], "batch"] = "a"
    obs.loc[obs.index[obs["sample"] == "s3"], "batch"] = ["a", "b"] * 6
    with pytest.raises(
        InvalidArgumentError, match=r"obs\['batch'\] is not one value per replicate: sample 's3' in group 'c'"
    ):
        design_of(obs, batch_key="batch")


@pytest.mark.parametrize(
    ("column", "argument"),
    [("group", "groupby"), ("sample", "sample_key"), ("batch", "batch_key"), ("age", "covariate_keys")],
)
def test_missing_values_are_an_error(column, argument):
    obs = cells([(*row, float(i)) for i, row in enumerate(BALANCED)], ["sample", "group", "batch", "age"])
    obs.index = [f"cell{number}" for number in range(len(obs))]
    obs.loc["cell5", column] = None
    with pytest.raises(
        InvalidArgumentError, match=f"{argument}='{column}'.*missing values in 1 of 96 cells .first: 'cell5'"
    ):
        design_of(obs, batch_key="batch", covariate_keys=["age"])


def test_groups_are_looked_up():
    obs = pd.DataFrame({"treated": [True, False, True, True], "x": [1, 2, 3, 3]})
    assert comparison_cells(obs, groupby="treated", group1="True", group2="False").tolist() == [0, 1, 2, 3]
    assert comparison_cells(obs, groupby="x", group1=3, group2=1).tolist() == [0, 2, 3]
    with pytest.raises(InvalidArgumentError, match=r"group1='yes' is not known\. Use one of: 'True', 'False'"):
        comparison_cells(obs, groupby="treated", group1="yes", group2="False")
    with pytest.raises(InvalidArgumentError, match="both 1"):
        comparison_cells(obs, groupby="x", group1=1, group2=1)
    with pytest.raises(MissingKeyError, match=r"groupby='y' is not in obs\. obs has: 'treated', 'x'"):
        comparison_cells(obs, groupby="y", group1=1, group2=2)


def test_groups_as_samples_are_refused():
    obs = cells(BALANCED, ["sample", "group", "batch"])
    with pytest.raises(InvalidArgumentError, match="sample_key and groupby are both 'group'"):
        design_of(obs, sample_key="group")


@pytest.mark.parametrize("argument", ["sample_key", "batch_key", "covariate_keys"])
@pytest.mark.parametrize("name", ["n_cells", "size_factor"])
def test_columns_that_the_table_of_samples_adds_are_refused(argument, name):
    obs = cells(BALANCED, ["sample", "group", "batch"])
    obs[name] = obs["sample" if argument == "sample_key" else "batch"]
    with pytest.raises(InvalidArgumentError, match=rf"{argument}='{name}': .*Rename obs\['{name}'\]"):
        design_of(obs, **{argument: [name] if argument == "covariate_keys" else name})
