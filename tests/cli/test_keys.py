from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellstill.cli._keys import can_be_told_apart, describe_columns, suggest


def experiment(n=400):
    """Donors in two conditions each; samples are donor x condition; pools hold two donors."""
    rng = np.random.default_rng(0)
    donor = rng.integers(4, size=n)
    condition = rng.integers(2, size=n)
    obs = pd.DataFrame(
        {
            "barcode": [f"b{i}" for i in range(n)],
            "donor_id": [f"d{i}" for i in donor],
            "condition": np.array(["ctrl", "stim"])[condition],
            "sample": [f"s{i}{j}" for i, j in zip(donor, condition, strict=True)],
            "pool": [f"p{i // 2}" for i in donor],
            "cell_type": rng.choice(["B", "T"], n),
            "leiden": rng.integers(5, size=n),
            "pct_mito": rng.random(n),
            "n_counts": rng.integers(10_000, size=n),
            "species": "human",
        }
    )
    return obs


def described(obs):
    return {column.name: column for column in describe_columns(obs)}


def test_roles_and_kinds():
    columns = described(experiment())
    assert {name: column.role for name, column in columns.items()} == {
        "barcode": "",
        "donor_id": "sample",
        "condition": "condition",
        "sample": "sample",
        "pool": "batch",
        "cell_type": "label",
        "leiden": "label",
        "pct_mito": "",
        "n_counts": "",
        "species": "",
    }
    assert columns["barcode"].kind == "identifier"
    assert columns["pct_mito"].kind == "number"
    assert columns["n_counts"].kind in ("number", "identifier")
    assert columns["species"].kind == "constant"


def test_nesting_and_sizes():
    obs = experiment()
    columns = described(obs)
    assert set(columns["sample"].nested_in) == {"donor_id", "condition", "pool"}
    assert columns["donor_id"].nested_in == ("pool",)
    assert columns["condition"].nested_in == ()
    assert columns["sample"].smallest == obs["sample"].value_counts().min()
    assert "nested in pool" in columns["donor_id"].why


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("CellType", "label"),
        ("cell.type", "label"),
        ("predicted.celltype.l1", "label"),
        ("seurat_clusters", "label"),
        ("tech", "batch"),
        ("orig.ident", "sample"),
        ("stim", "condition"),
        ("batch", "batch"),
        ("sample_batch", "batch"),
        ("phase", ""),
        ("runtime", ""),
    ],
)
def test_names_of_the_field(name, role):
    assert described(pd.DataFrame({name: ["a", "b"] * 10}))[name].role == role


def test_suggestion():
    obs = experiment()
    assert suggest(obs, describe_columns(obs)) == {
        "batch": ["pool"],
        "label": ["cell_type"],
        "covariate": ["condition"],
    }


def test_samples_serve_as_batches_and_rather_those_that_cross_the_condition():
    # "sample" is nested in the condition, so what is removed with it would take the condition along.
    obs = experiment().drop(columns="pool")
    obs = obs[["sample", "donor_id", "condition"]]
    assert suggest(obs, describe_columns(obs))["batch"] == ["donor_id"]
    obs = obs.rename(columns={"donor_id": "mouse", "sample": "patient"})
    assert suggest(obs, describe_columns(obs))["batch"] == ["mouse"]


def test_a_condition_that_is_the_batch_is_not_suggested():
    obs = pd.DataFrame({"batch": ["a", "b"] * 20, "condition": ["x", "y"] * 20})
    assert suggest(obs, describe_columns(obs)) == {"batch": ["batch"], "label": [], "covariate": []}


def test_columns_with_missing_values_are_described_and_not_suggested():
    obs = pd.DataFrame({"batch": ["a", None, "b", "a"] * 5, "tech": ["x", "y"] * 10})
    columns = described(obs)
    assert (columns["batch"].n_missing, columns["batch"].n_levels) == (5, 2)
    assert "missing for 5 cells" in columns["batch"].why
    assert suggest(obs, list(columns.values()))["batch"] == ["tech"]


def test_no_column_at_all():
    obs = pd.DataFrame(index=["a", "b"])
    assert suggest(obs, describe_columns(obs)) == {"batch": [], "label": [], "covariate": []}


@pytest.mark.parametrize(
    ("pairs", "joined"),
    [
        (["a1", "a2", "b1", "b2"], True),
        (["a1", "a2", "b2"], True),
        (["a1", "b2"], False),
        (["a1", "a2", "b2", "c3"], False),
    ],
)
def test_told_apart_is_the_rank_of_the_additive_design(pairs, joined):
    table = pd.DataFrame([tuple(pair) for pair in pairs], columns=["batch", "condition"])
    design = np.hstack([pd.get_dummies(table[key]).to_numpy(float) for key in table])
    full = design.shape[1] - 1
    assert (np.linalg.matrix_rank(design) == full) == joined
    assert can_be_told_apart(table["batch"], table["condition"]) == joined
