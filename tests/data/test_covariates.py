from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from cellstill.data.covariates import CovariateDesign, warn_if_confounded
from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError


@pytest.fixture
def obs() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "condition": pd.Categorical(["ctrl", "stim", "ctrl", "stim"], categories=["stim", "unused", "ctrl"]),
            "cluster": [0, 1, 2, 10],
            "male": [True, False, True, True],
            "age": [20.0, 30.0, 40.0, 50.0],
        },
        index=list("wxyz"),
    )


def test_levels_are_one_hot_never_ordinal_and_floats_are_standardised(obs):
    design = CovariateDesign.fit(obs, ["condition", "cluster", "male", "age"])
    encoded = design.encode(obs)
    assert encoded.shape == (4, 2 + 4 + 2 + 1)
    np.testing.assert_array_equal(encoded[:, :2], [[1, 0], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_array_equal(encoded[:, :8].sum(axis=1), 3)
    age = obs["age"].to_numpy()
    np.testing.assert_allclose(encoded[:, 8], (age - 35) / age.std(), rtol=1e-6)


def test_codes_are_the_columns_that_are_one(obs):
    design = CovariateDesign.fit(obs, ["age", "condition", "cluster", "male"])
    ones, continuous = design.codes(obs)
    assert (ones.dtype, continuous.dtype) == (np.int64, np.float32)
    # Levels are sorted as strings: "10" comes before "2".
    np.testing.assert_array_equal(ones, [[0, 2, 7], [1, 3, 6], [0, 5, 7], [1, 4, 7]])
    np.testing.assert_allclose(continuous[:, 0], (obs["age"] - 35) / obs["age"].std(ddof=0), rtol=1e-6)
    alone = CovariateDesign.fit(obs, [])
    assert [part.shape for part in (*alone.codes(obs), alone.encode(obs))] == [(4, 0)] * 3


def test_encoding_new_cells_uses_what_was_fitted(obs):
    design = CovariateDesign.from_dict(json.loads(json.dumps(CovariateDesign.fit(obs, ["condition", "age"]).to_dict())))
    new = pd.DataFrame({"condition": ["stim"], "age": [35.0]})
    np.testing.assert_allclose(design.encode(new), [[0, 1, 0]], atol=1e-7)
    with pytest.raises(InvalidArgumentError, match=r"does not know: \['drug'\]. It knows: \['ctrl', 'stim'\]"):
        design.encode(pd.DataFrame({"condition": ["drug"], "age": [1.0]}))


def test_unusable_covariates_are_explained(obs):
    with pytest.raises(MissingKeyError, match=r"covariate_keys='sex' is not in adata\.obs.*'condition'"):
        CovariateDesign.fit(obs, ["sex"])
    obs.loc["x", "age"] = np.nan
    with pytest.raises(InvalidArgumentError, match=r"missing for 1 of 4 cells \('x'\)"):
        CovariateDesign.fit(obs, ["age"])
    with pytest.raises(InvalidArgumentError, match="only the level 'a'"):
        CovariateDesign.fit(obs.assign(one="a"), ["one"])
    many = pd.DataFrame({"barcode": [f"cell{i}" for i in range(60)]})
    with pytest.raises(InvalidArgumentError, match="60 levels"):
        CovariateDesign.fit(many, ["barcode"])


CONFOUNDED = {
    "each_condition_its_own_batch": ("aabb", "ccss"),
    "two_pairs_of_batches_that_share_nothing": ("aabbccdd", "xyxyzwzw"),
}
SEPARABLE = {
    "crossed": ("aabb", "cscs"),
    "joined_by_one_shared_batch": ("aabbc", "ccscs"),
    "chain_of_batches": ("aabbcc", "xyyzzz"),
}


@pytest.mark.parametrize(("batches", "levels"), CONFOUNDED.values(), ids=CONFOUNDED)
def test_confounding_warns_with_the_table(batches, levels):
    obs = pd.DataFrame({"pool": list(batches), "condition": list(levels)})
    design = CovariateDesign.fit(obs, ["condition"])
    with pytest.warns(
        CellstillWarning, match=rf"'pool'.*'condition' cannot be told apart(.|\n)*condition +{min(levels)}"
    ):
        assert warn_if_confounded(obs["pool"], obs, design) == ["condition"]


@pytest.mark.parametrize(("batches", "levels"), [*CONFOUNDED.values(), *SEPARABLE.values()])
def test_confounding_is_a_matter_of_rank(batches, levels, recwarn):
    obs = pd.DataFrame({"pool": list(batches), "condition": list(levels)})
    design = CovariateDesign.fit(obs, ["condition"])
    batch, covariate = np.eye(26)[[ord(x) - 97 for x in batches]], design.encode(obs)
    full = len(set(batches)) + len(set(levels)) - 1
    deficient = np.linalg.matrix_rank(np.hstack([batch, covariate])) < full
    assert (warn_if_confounded(obs["pool"], obs, design) == ["condition"]) == deficient
    assert len(recwarn) == deficient
