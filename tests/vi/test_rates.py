"""Ambient rates that are known of one modality, and not of another."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import InvalidArgumentError, InvalidCountsError, MissingKeyError

N = 80
SIZES = {"n_hidden": 8, "n_latent": 2, "background": {"rna": "profile", "adt": "profile", "peaks": None}}
pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    # Few cells do not tell soup, and there is none.
    pytest.mark.filterwarnings("ignore:The share of ambient RNA:cellstill.errors.CellstillWarning"),
]


def mdata(n_peaks=15, lanes=("s1", "s2"), sites=("x", "y"), seed=0):
    rng = np.random.default_rng(seed)
    names = [f"cell{i}" for i in range(N)]

    def cells(prefix, n_vars):
        counts = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 6.0, n_vars) + 0.2, (N, n_vars)), dtype=np.float32)
        var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)])
        return ad.AnnData(counts, obs=pd.DataFrame(index=names), var=var)

    parts = {"rna": cells("g", 20), "adt": cells("a", 10), **({"peaks": cells("p", n_peaks)} if n_peaks else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        data = mudata.MuData(parts)
    data.obs["lane"], data.obs["site"] = np.resize(lanes, N), np.resize(np.repeat(sites, 2), N)
    return data


def model_of(rate, keys=("lane",), **changes):
    data = mdata(**changes)
    RegularizedMultimodalVI.setup_mudata(data, ambient_covariate_keys=list(keys))
    return RegularizedMultimodalVI(data, **SIZES, ambient_rate=rate)


def rates_of(model):
    model.is_trained_ = True
    return {name: model.get_ambient_rate(modality=name) for name in ("rna", "adt")}


@pytest.fixture(scope="module")
def estimated():
    return rates_of(model_of(None))


def is_stated(rates):
    return (rates["low"] == rates["high"]).tolist()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({"rna": 0.08}, [0.08, 0.08]), ({"rna": {"s1": 0.08, "s2": 0.3}, "adt": None}, [0.08, 0.3])],
    ids=["one", "by_category"],
)
def test_the_modality_named_has_the_rate_and_the_other_is_estimated(estimated, stated, expected):
    found = rates_of(model_of(stated))
    np.testing.assert_allclose(found["rna"]["rate"], expected, rtol=1e-6)
    assert is_stated(found["rna"]) == [True, True]
    pd.testing.assert_frame_equal(found["adt"], estimated["adt"])
    assert is_stated(estimated["adt"]) == [False, False]


def test_categories_left_out_of_a_modality_are_estimated():
    found = rates_of(model_of({"adt": {"s2": 0.2}, "rna": 0.1}))
    assert is_stated(found["adt"]) == [False, True]
    np.testing.assert_allclose(found["rna"]["rate"], 0.1, rtol=1e-6)


@pytest.mark.parametrize("stated", [0.2, {"s1": 0.2, "s2": 0.2}], ids=["number", "categories"])
def test_what_names_no_modality_is_of_all(stated):
    for rates in rates_of(model_of(stated)).values():
        np.testing.assert_allclose(rates["rate"], 0.2, rtol=1e-6)


def test_combinations_of_a_modality():
    keys = ("lane", "site")
    for stated in ({("s1", "x"): 0.3}, {"rna": {("s1", "x"): 0.3}}):
        found = rates_of(model_of(stated, keys))
        assert found["rna"].loc[("s1", "x"), "rate"] == pytest.approx(0.3)
        assert is_stated(found["adt"]).count(True) == ("rna" not in stated)
    with pytest.raises(InvalidArgumentError, match=r"names \['s1'\].*as tuples, or both: .*'rna': \{\('s1', 'x'\)"):
        model_of({"s1": 0.3}, keys)


def test_names_of_modalities_and_categories_alike():
    lanes = ("rna", "adt")
    with pytest.raises(InvalidArgumentError, match=r"\['rna'\], which are modalities and categories alike.*'rna': \{"):
        model_of({"rna": 0.1}, lanes=lanes)
    found = rates_of(model_of({"rna": {"rna": 0.1}}, lanes=lanes))
    assert dict(zip(found["rna"].index, is_stated(found["rna"]), strict=True)) == {"adt": False, "rna": True}
    assert not any(is_stated(found["adt"]))
    # Only one of the readings is possible.
    assert is_stated(rates_of(model_of({"rna": 0.1, "s2": 0.1}, lanes=("rna", "s2")))["adt"]) == [True, True]
    assert is_stated(rates_of(model_of({"rna": 0.1, "adt": 0.1}, lanes=("rna", "s2")))["adt"]) == [True, True]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"rnaa": 0.1},
            r"names \['rnaa'\]\. Name modalities, \['rna', 'adt'\], or categories, \['s1', 's2'\]",
        ),
        ({"rna": 0.1, "s1": 0.1}, r"names \['rna'\] beside \['s1'\]\. Name modalities"),
        (
            {"rnaa": {"s1": 0.1}},
            r"ambient_rate\['rnaa'\]: there is no such modality. There are \['rna', 'peaks', 'adt'",
        ),
        ({"s1": {"rna": 0.1}}, r"ambient_rate\['s1'\]: there is no such modality"),
        ({"rna": {"s3": 0.1}}, r"names \['s3'\], and the categories .* \['s1', 's2'\]"),
        ({"peaks": 0.1}, r"ambient_rate\['peaks'\] is of no use: the modality has no background"),
        ({"rna": 1.5}, r"ambient_rate\['rna'\]=1.5 is no share"),
        ({"rna": {"s1": -0.1}}, r"ambient_rate\['rna'\]\['s1'\]=-0.1 is no share"),
        ({"rna": "much"}, r"ambient_rate\['rna'\] is 'much'. Give one number"),
        ({"rna": {"s1": {}}}, r"ambient_rate\['rna'\]\['s1'\]=\{\} is no share"),
        (1.5, r"ambient_rate=1.5 is no share"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_rate_is_estimated(stated, message, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("cellstill.vi.rates.estimate_soup", never)
    with pytest.raises(InvalidArgumentError, match=message):
        model_of(stated)


def test_a_background_of_another_form_has_no_rate():
    data = mdata()
    RegularizedMultimodalVI.setup_mudata(data, batch_key="lane")
    with pytest.raises(InvalidArgumentError, match=r"\['adt'\] is of no use: .*of the form 'free', and only"):
        RegularizedMultimodalVI(data, n_hidden=8, n_latent=2, ambient_rate={"adt": 0.1})


def test_a_model_of_one_modality_has_categories_only():
    adata = mdata()["rna"].copy()
    adata.obs["lane"] = np.resize(["s1", "s2"], N)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    with pytest.raises(InvalidArgumentError, match=r"names \['rna'\], and the categories"):
        AmbientRegularizedSCVI(adata, n_hidden=8, n_latent=2, ambient_rate={"rna": 0.1})


def test_rates_of_a_query_by_modality():
    model = model_of(0.1)
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    plain, stated = (
        RegularizedMultimodalVI.load_query_data(mdata(lanes=("s2", "new")), model, ambient_rate=rate)
        for rate in (None, {"rna": {"new": 0.3}})
    )
    found, expected = rates_of(stated), rates_of(plain)
    assert found["rna"].loc["new", "rate"] == pytest.approx(0.3)
    pd.testing.assert_frame_equal(found["adt"], expected["adt"])
    pd.testing.assert_frame_equal(found["rna"].iloc[:2], expected["rna"].iloc[:2])
    lacks = mdata(lanes=("s2", "new"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        alone = mudata.MuData({"rna": lacks["rna"]})
    alone.obs["lane"] = lacks.obs["lane"]
    with pytest.raises(InvalidArgumentError, match=r"\['adt'\] is of no use: no cell has the modality"):
        RegularizedMultimodalVI.load_query_data(alone, model, ambient_rate={"adt": 0.1})


def test_a_layer_that_a_modality_lacks_is_named_with_it():
    data = mdata()
    data["adt"].layers["raw"] = data["adt"].X
    message = r"modalities\['adt'\]='counts' is not in mdata\['adt'\].layers. .* has: 'raw'"
    with pytest.raises(MissingKeyError, match=message):
        RegularizedMultimodalVI.setup_mudata(data, modalities={"adt": "counts"})
    data["adt"].X = None
    message = r"mdata\['adt'\].X is empty. .*: modalities=\{'adt': ...\} \(layers: 'raw'\)"
    with pytest.raises(InvalidCountsError, match=message):
        RegularizedMultimodalVI.setup_mudata(data, modalities=["adt"])
