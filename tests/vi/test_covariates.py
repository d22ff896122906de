"""From arguments to purposes, and what is refused on the way."""

from __future__ import annotations

import json
import logging
import warnings

import numpy as np
import pandas as pd
import pytest

from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError
from cellstill.vi.covariates import CovariateKeys, check_nested

resolve = CovariateKeys.resolve


def test_batch_key_alone_fans_out_to_ambient_dispersion_and_library():
    keys = resolve(batch_key="lane")
    assert keys == CovariateKeys(batch="lane", ambient=("lane",), dispersion="lane", library_size="lane")
    assert keys.columns == ("lane",)
    assert keys.registered == {"batch": "lane"}


def test_the_published_quick_start():
    keys = resolve(batch_key="lane", nn_conditioning_covariate_keys=["site", "donor"])
    assert keys.conditioning == ("site", "donor")
    assert keys.feature_scaling == ()
    assert keys.columns == ("lane", "site", "donor")
    assert keys.registered == {"batch": "lane", "covariate_site": "site", "covariate_donor": "donor"}


def test_each_purpose_by_its_own_argument():
    keys = resolve(
        ambient_covariate_keys=["lane", "site"],
        nn_conditioning_covariate_keys=["site"],
        feature_scaling_covariate_keys=["chemistry"],
        dispersion_key="chemistry",
        library_size_key="lane",
        continuous_covariate_keys=["mito"],
    )
    assert keys.columns == ("lane", "site", "chemistry")
    assert (keys.dispersion, keys.library_size, keys.batch) == ("chemistry", "lane", None)
    assert "batch" not in keys.registered


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ambient_covariate_keys", ["lane"]),
        ("ambient_covariate_keys", []),
        ("dispersion_key", "lane"),
        ("library_size_key", "lane"),
    ],
    ids=["ambient", "empty_ambient", "dispersion", "library"],
)
def test_batch_key_together_with_what_it_stands_for_is_refused(argument, value):
    with pytest.raises(ValueError, match=rf"batch_key='lane' stands for .* {argument}"):
        resolve(batch_key="lane", **{argument: value})


def test_one_string_does_for_a_list():
    assert resolve(
        ambient_covariate_keys="lane",
        nn_conditioning_covariate_keys="lane",
        feature_scaling_covariate_keys="lane",
        continuous_covariate_keys="mito",
        technical_covariate_keys="site",
    ) == resolve(
        ambient_covariate_keys=["lane"],
        nn_conditioning_covariate_keys=["lane"],
        feature_scaling_covariate_keys=["lane"],
        continuous_covariate_keys=["mito"],
        technical_covariate_keys=["site"],
    )


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [(None, ("site",)), ([], ()), (["lane"], ("lane",))],
    ids=["default", "none", "own"],
)
def test_feature_scaling_follows_the_conditioning_keys_where_asked(scaling, expected):
    arguments = {"nn_conditioning_covariate_keys": ["site"], "feature_scaling_covariate_keys": scaling}
    assert resolve(**arguments, scaling_follows_conditioning=True).feature_scaling == expected
    assert resolve(**arguments).feature_scaling == (() if scaling is None else expected)
    assert resolve(**arguments, scaling_follows_conditioning=True).scaling_named == bool(scaling)


def test_encoder_keys_are_off_by_default_and_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(nn_conditioning_covariate_keys=["site"]).encoder == ()
        assert resolve(nn_conditioning_covariate_keys=["site"], encoder_covariate_keys=None).encoder == ()
    with pytest.warns(CellstillWarning, match=r"encoder_covariate_keys=\['site'\]"):
        assert resolve(nn_conditioning_covariate_keys=["site"], encoder_covariate_keys=True).encoder == ("site",)
    with pytest.warns(CellstillWarning):
        keys = resolve(encoder_covariate_keys="lane")
    assert keys.encoder == keys.columns == ("lane",)
    with pytest.raises(InvalidArgumentError, match="encoder_covariate_keys=True"):
        resolve(encoder_covariate_keys=True)


def test_without_any_key_all_cells_are_one_group_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="cellstill"):
        keys = resolve()
    assert keys.columns == ()
    assert caplog.messages == [
        "No key for ambient background, dispersion, library size: all cells are one group there."
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="cellstill"):
        resolve(ambient_covariate_keys="lane", dispersion_key="lane")
        resolve(batch_key="lane")
    assert caplog.messages == ["No key for library size: all cells are one group there."]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"ambient_covariate_keys": ["lane", "lane"]}, "names 'lane' twice"),
        ({"dispersion_key": ["lane"]}, "dispersion_key=.* has to be the name of one column"),
        ({"batch_key": 3}, "batch_key=3"),
        ({"nn_conditioning_covariate_keys": ["a", 1]}, "1 is not one"),
        ({"batch_key": "lane", "continuous_covariate_keys": ["lane"]}, "'lane' is also a categorical covariate"),
    ],
    ids=["twice", "list_for_one", "number", "number_in_list", "both_kinds"],
)
def test_what_cannot_be_meant_is_refused(arguments, match):
    with pytest.raises(InvalidArgumentError, match=match):
        resolve(**arguments)


def test_keys_survive_json():
    keys = resolve(
        batch_key="lane", nn_conditioning_covariate_keys=["site"], library_key="lane", technical_covariate_keys="site"
    )
    assert CovariateKeys.from_dict(json.loads(json.dumps(keys.to_dict()))) == keys


@pytest.fixture
def obs():
    return pd.DataFrame(
        {
            "lane": ["1", "1", "2", "3"],
            "site": pd.Categorical(["x", "x", "x", "y"]),
            "mito": [0.1, 0.3, 0.2, 0.5],
            "flat": 1.0,
            "text": list("abcd"),
            "holes": ["a", None, "b", None],
            "mixed": np.array([1, "1", 2, 2], dtype=object),
            "infinite": [0.0, 1.0, np.inf, 2.0],
            "day": pd.to_datetime(["2020-01-01", "2020-01-01", "2020-01-02", "2020-01-02"]),
        },
        index=list("ABCD"),
    )


def test_columns_that_serve_are_accepted(obs):
    keys = resolve(batch_key="lane", continuous_covariate_keys="mito", library_key="lane", dataset_key="site")
    keys.check(obs)
    assert set(keys.columns) <= set(obs.columns)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batch_key": "plate"}, MissingKeyError, r"batch_key='plate' is not in adata.obs.*'lane'"),
        ({"library_size_key": "plate"}, MissingKeyError, "library_size_key='plate'"),
        ({"technical_covariate_keys": "plate"}, MissingKeyError, "technical_covariate_keys='plate'"),
        ({"dispersion_key": "holes"}, InvalidArgumentError, "dispersion_key: .* is missing for 2 of 4 cells"),
        ({"batch_key": "mixed"}, InvalidArgumentError, "different values have the same name"),
        (
            {"batch_key": "day"},
            InvalidArgumentError,
            r"batch_key: .*'day'\] holds datetime64.*as text.*astype",
        ),
        ({"continuous_covariate_keys": "text"}, InvalidArgumentError, "not numbers"),
        ({"continuous_covariate_keys": "flat"}, InvalidArgumentError, "constant"),
        ({"continuous_covariate_keys": "infinite"}, InvalidArgumentError, "not finite"),
        ({"library_key": "site", "dataset_key": "lane"}, InvalidArgumentError, "library 'x' has cells in .*'1', '2'"),
    ],
    ids=[
        "absent",
        "absent_library",
        "absent_technical",
        "missing",
        "mixed",
        "dates",
        "text",
        "constant",
        "infinite",
        "nesting",
    ],
)
def test_columns_that_cannot_serve_are_refused(obs, arguments, error, match):
    with pytest.raises(error, match=match):
        resolve(**arguments).check(obs)


def test_categories_of_dates_are_refused_too(obs):
    with pytest.raises(InvalidArgumentError, match="batch_key: .* holds datetime64"):
        resolve(batch_key="day").check(obs.astype({"day": "category"}))


@pytest.mark.parametrize(("cells_of_each", "warned"), [(1, True), (2, True), (3, False)])
def test_a_column_of_names_of_cells_is_no_batch(cells_of_each, warned, recwarn):
    names = np.repeat([f"cell{i}" for i in range(12)], cells_of_each)
    obs = pd.DataFrame({"name": pd.Categorical(names, categories=[*np.unique(names), "nobody"])})
    resolve(batch_key="name").check(obs)
    found = [str(warning.message) for warning in recwarn if "12 categories for" in str(warning.message)]
    assert bool(found) == warned


def test_nesting_counts_the_libraries_that_are_split():
    obs = pd.DataFrame({"library": list("aabbc"), "dataset": ["p", "q", "p", "q", "p"]})
    with pytest.raises(InvalidArgumentError, match=r"library 'a' has cells in \['p', 'q'\], and so have 1 others"):
        check_nested(obs, "library", "dataset")
    check_nested(obs.iloc[[0, 2, 4]], "library", "dataset")
