from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellstill.data.annotations import category_names, gather_obs, is_mudata, modality_rows
from cellstill.errors import InvalidArgumentError, MissingKeyError

mudata = pytest.importorskip("mudata")


def modality(names, genes="gh", **columns):
    obs = pd.DataFrame(columns, index=list(names))
    return ad.AnnData(np.ones((len(names), 2)), obs=obs, var=pd.DataFrame(index=list(genes)))


@pytest.fixture
def mdata():
    with mudata.set_options(pull_on_update=False):
        made = mudata.MuData(
            {
                "rna": modality("cab", lane=["x", "y", "z"], depth=[1.0, 2.0, 3.0], ward=["p", "q", None]),
                "atac": modality("bd", "pq", lane=["z", "x"], ward=["r", "p"]),
            }
        )
    made.obs["age"] = np.arange(4)
    return made


def test_rows_of_modalities(mdata):
    assert is_mudata(mdata)
    assert not is_mudata(mdata["rna"])
    names = mdata.obs_names.tolist()
    for name in ("rna", "atac"):
        rows = modality_rows(mdata, name)
        own = mdata[name].obs_names.tolist()
        assert rows.tolist() == [own.index(cell) if cell in own else -1 for cell in names]
    with pytest.raises(MissingKeyError, match="modality='adt' is not in mdata.mod"):
        modality_rows(mdata, "adt")


def test_modalities_that_share_features_are_refused():
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData({"one": modality("ab"), "two": modality("cd")}, axis=1)
    with pytest.raises(InvalidArgumentError, match="axis=1"):
        modality_rows(mdata, "one")


def test_columns_of_modalities_are_joined(mdata):
    obs = gather_obs(mdata, {"lane": "batch_key", "age": "keys", "ward": "keys"})
    assert obs.index.tolist() == mdata.obs_names.tolist()
    assert obs["lane"].to_dict() == {"a": "y", "b": "z", "c": "x", "d": "x"}
    # A value that one modality lacks is taken from the other.
    assert obs["ward"].to_dict() == {"a": "q", "b": "r", "c": "p", "d": "p"}
    assert obs["age"].dtype.kind == "i"


def test_columns_of_an_anndata(mdata):
    obs = gather_obs(mdata["rna"], {"depth": "keys", "lane": "keys"})
    pd.testing.assert_frame_equal(obs, mdata["rna"].obs[["depth", "lane"]])
    assert gather_obs(mdata["rna"], {}).shape == (3, 0)


@pytest.mark.parametrize(
    ("column", "error", "match"),
    [
        ("depth", InvalidArgumentError, "keys: 'depth' is missing for 1 of 4 cells .'d'"),
        ("rna:depth", InvalidArgumentError, "'rna:depth' is missing for 1 of 4"),
        ("plate", MissingKeyError, "keys='plate' is not in mdata.obs .*'age', 'rna:lane', .*'atac:ward'"),
        ("adt:lane", MissingKeyError, "keys='adt:lane'"),
    ],
    ids=["one_modality", "prefixed", "absent", "no_modality"],
)
def test_columns_that_not_all_cells_have_are_named(mdata, column, error, match):
    with pytest.raises(error, match=match):
        gather_obs(mdata, {column: "keys"})


def test_a_column_of_one_modality_that_all_cells_have_keeps_its_type():
    kinds = pd.Categorical(["v", "u", "v"], categories=["v", "u", "t"], ordered=True)
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData({"rna": modality("cab", kind=kinds), "atac": modality("abc", "pq")})
    values = gather_obs(mdata, {"rna:kind": "keys"})["rna:kind"]
    assert values.dtype == kinds.dtype
    assert values.to_dict() == {"c": "v", "a": "u", "b": "v"}
    assert category_names(values) == ("v", "u")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 2, 1], ("1", "2", "10")),
        ([True, False], ("False", "True")),
        (pd.Categorical(["b", "a"], categories=["b", "c", "a"]), ("b", "a")),
    ],
    ids=["text", "numbers", "booleans", "categories"],
)
def test_names_of_categories_are_those_that_occur(values, expected):
    assert category_names(pd.Series(values)) == expected


def test_categories_of_mixed_types_are_sorted_as_text():
    assert category_names(pd.Series([2, "B", 10, "A", 2], dtype=object)) == ("10", "2", "A", "B")
    assert category_names(pd.Series([10, 2])) == ("2", "10")
