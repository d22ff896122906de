"""Minified data: posteriors in place of counts change no number that needs no count."""

from __future__ import annotations

import gc
import warnings
import weakref

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.data import simulate_counts
from cellstill.de import BayesianConfig
from cellstill.errors import InvalidArgumentError, MissingKeyError, NotTrainedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The share of ambient RNA:cellstill.errors.CellstillWarning"),
    pytest.mark.filterwarnings("ignore:.*have no count in the modality:cellstill.errors.CellstillWarning"),
]

FAST = {"max_epochs": 3, "accelerator": "cpu", "progress": False}
SIZE = {"n_obs": 240, "n_vars": 60, "n_batches": 2, "n_cell_types": 2}


def cells():
    adata = simulate_counts(**SIZE, seed=1)
    adata.obs["depth"] = np.random.default_rng(0).normal(size=adata.n_obs)
    adata.obsm["X_umap"] = np.zeros((adata.n_obs, 2))
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata
    return adata


def make_rna(background="profile"):
    adata = cells()
    AmbientRegularizedSCVI.setup_anndata(
        adata,
        layer="counts",
        batch_key="batch",
        nn_conditioning_covariate_keys=["batch"],
        feature_scaling_covariate_keys=["batch"],
        continuous_covariate_keys=["depth"],
    )
    return AmbientRegularizedSCVI(adata, n_hidden=16, n_latent=4, background=background).train(**FAST)


def make_joint():
    """Some cells lack one modality or the other; one has it, without a count."""
    rna, second = cells(), simulate_counts(**{**SIZE, "n_vars": 30}, seed=2)
    second.var_names = [f"p{i}" for i in range(30)]
    second.X[50] = 0
    second.X.eliminate_zeros()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        mdata = mudata.MuData({"rna": rna[:200].copy(), "protein": second[40:].copy()})
    mdata.obs["batch"] = rna.obs["batch"].reindex(mdata.obs_names).array
    mdata.obs["donor"] = rna.obs["donor"].reindex(mdata.obs_names).array
    mdata.obs["condition"] = rna.obs["condition"].reindex(mdata.obs_names).array
    RegularizedMultimodalVI.setup_mudata(
        mdata,
        modalities={"rna": "counts", "protein": None},
        batch_key="batch",
        nn_conditioning_covariate_keys=["batch"],
    )
    return RegularizedMultimodalVI(mdata, n_hidden=16, n_latent=3).train(**FAST)


def minify(model, *arguments):
    (model.minify_mudata if isinstance(model, RegularizedMultimodalVI) else model.minify_adata)(*arguments)
    return model


def everything(model, data=None):
    """Whatever needs no counts, by name."""
    some = {"adata": data, "indices": [5, 3, 239]}
    found = {
        "latent": model.get_latent_representation(data),
        "draw": model.get_latent_representation(data, give_mean=False),
        "variance": model.get_latent_representation(data, return_dist=True)[1],
    }
    for name in model.modality_names:
        own = {"modality": name}
        found |= {
            f"size of {name}": model.get_latent_library_size(data, **own),
            f"expression of {name}": model.get_normalized_expression(data, **own),
            f"whole expression of {name}": model.get_normalized_expression(
                data, library_size="latent", include_background=True, **own
            ),
            f"decoded {name}": model.get_normalized_expression(**some, transform_batch="batch_1", **own),
            f"profile of {name}": model.get_ambient_profile(**own),
            f"fraction of {name}": model.get_ambient_fraction(data, **own),
            f"predicted {name}": model.posterior_predictive_sample(data, **own).toarray(),
            f"attribution of {name}": model.get_modality_attribution(**some)[name].attribution,
        }
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        if isinstance(values, pd.DataFrame):
            pd.testing.assert_frame_equal(values, other[name], obj=name)
        elif name.startswith("attribution"):
            # Of three cells, which before were encoded by themselves: products of other sizes round differently.
            np.testing.assert_allclose(values, other[name], rtol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.fixture(scope="module", params=["rna", "free", "joint"])
def pair(request):
    """A minified model, and what it gave before."""
    model = make_joint() if request.param == "joint" else make_rna("free" if request.param == "free" else "profile")
    before, original = everything(model), model.adata
    return minify(model), before, original


def test_every_number_is_what_it_was(pair):
    model, before, _ = pair
    assert_same(everything(model), before)


def test_counts_are_gone_and_the_original_is_left_alone(pair):
    model, _, original = pair
    small = model.adata
    assert small is not original
    assert model.minified_data_type == "latent_posterior_parameters"
    assert "vi_latent_qzm" not in original.obsm
    for adata in small.mod.values() if hasattr(small, "mod") else [small]:
        assert adata.X.nnz == 0
        assert adata.raw is None
        assert all(layer.nnz == 0 for layer in adata.layers.values())
    for adata in original.mod.values() if hasattr(original, "mod") else [original]:
        assert adata.X.nnz > 0
    fields = model.registry["field_registries"]
    assert {"latent_qzm", "latent_qzv", "latent_qlm", "latent_qlv", "observed_lib_size", "minify_type"} <= set(fields)
    np.testing.assert_array_equal(
        model.adata_manager.get_from_registry("latent_qzm"), model.get_latent_representation()
    )
    assert "minified?: True" in model.summary_string


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.train(max_epochs=1),
        lambda model: model.get_elbo(),
        lambda model: model.get_reconstruction_error(),
        lambda model: model.get_marginal_ll(n_mc_samples=1),
        lambda model: model.get_denoised_counts(modality="rna"),
        lambda model: model.differential_expression("condition", "treat", "ctrl", "donor", modality="rna"),
        lambda model: model.differential_expression(
            "condition", "treat", "ctrl", "donor", BayesianConfig(n_samples=2), modality="rna"
        ),
    ],
    ids=["train", "elbo", "error", "likelihood", "denoised", "pseudobulk", "bayesian"],
)
def test_what_needs_counts_says_so_and_takes_them(pair, call):
    model, _, original = pair
    with pytest.raises(InvalidArgumentError, match=r"needs counts, and the data are minified.*load\(path, data\)"):
        call(model)
    assert np.isfinite(model.get_elbo(original))


def test_a_stored_model_takes_minified_data_from_a_file(pair, tmp_path):
    model, before, original = pair
    model.save(tmp_path / "model")
    name = tmp_path / ("small.h5mu" if hasattr(original, "mod") else "small.h5ad")
    model.adata.write(name)
    data = mudata.read_h5mu(name) if hasattr(original, "mod") else ad.read_h5ad(name)
    loaded = type(model).load(tmp_path / "model", data)
    assert loaded.minified_data_type == "latent_posterior_parameters"
    assert_same(everything(loaded), before)
    alone = type(model).load(tmp_path / "model")
    np.testing.assert_array_equal(alone.get_latent_representation(data), before["latent"])
    # Counts can come back.
    whole = type(model).load(tmp_path / "model", original.copy())
    assert whole.minified_data_type is None
    assert np.isfinite(whole.get_elbo())


def test_minified_cells_can_be_chosen_and_reordered(pair):
    model, before, _ = pair
    some = model.adata[[7, 3, 100]].copy()
    np.testing.assert_array_equal(model.get_latent_representation(some), before["latent"][[7, 3, 100]])
    found = model.get_normalized_expression(some, modality="rna", return_numpy=True)
    np.testing.assert_allclose(found, before["expression of rna"].iloc[[7, 3, 100]], rtol=1e-5)


def test_memory_of_the_counts_is_given_back():
    model = make_rna()
    original = weakref.ref(model.adata)
    minify(model)
    gc.collect()
    assert original() is None


def test_counts_may_be_kept():
    model = make_rna()
    before, elbo = everything(model), model.get_elbo()
    minify(model, "latent_posterior_parameters_with_counts")
    assert model.minified_data_type == "latent_posterior_parameters_with_counts"
    assert_same(everything(model), before)
    assert model.get_elbo() == elbo


def test_posteriors_may_be_given():
    model = make_rna()
    mean, variance = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean + 1, variance
    model.minify_adata(use_latent_qzm_key="X_latent_qzm", use_latent_qzv_key="X_latent_qzv")
    np.testing.assert_array_equal(model.get_latent_representation(), mean + 1)


def test_bad_input_is_named():
    model = make_rna()
    with pytest.raises(InvalidArgumentError, match=r"Call minify_adata\(\)"):
        model.minify_mudata()
    with pytest.raises(InvalidArgumentError, match="minified_data_type='small' is not known"):
        model.minify_adata("small")
    with pytest.raises(MissingKeyError, match="use_latent_qzm_key='absent'"):
        model.minify_adata(use_latent_qzm_key="absent")
    with pytest.raises(InvalidArgumentError, match=r"use_latent_qzm_key='X_umap'.*\(240, 2\)"):
        model.minify_adata(use_latent_qzm_key="X_umap")
    assert model.minified_data_type is None
    model.minify_adata()
    with pytest.raises(InvalidArgumentError, match="minified already"):
        model.minify_adata()
    with pytest.raises(InvalidArgumentError, match="adata is minified"):
        AmbientRegularizedSCVI.load_query_data(model.adata, model)
    model.adata.obsm["vi_latent_qzm"] = np.zeros((240, 3))
    with pytest.raises(InvalidArgumentError, match="minified by another model"):
        model.get_latent_representation()
    data = cells()
    AmbientRegularizedSCVI.setup_anndata(data)
    untrained = AmbientRegularizedSCVI(data, n_hidden=4, n_latent=2, background=False)
    with pytest.raises(NotTrainedError):
        untrained.minify_adata()
