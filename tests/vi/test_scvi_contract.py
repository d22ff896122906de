"""What users of scvi-tools rely on, of both models: registry, state, signs, storage and criticism."""

from __future__ import annotations

import inspect
import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from packaging.version import Version
from scvi.criticism import PosteriorPredictiveCheck
from scvi.model.base import ArchesMixin, BaseModelClass

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import CellstillWarning, InvalidArgumentError, StoreError
from cellstill.vi.elsewhere import _INSTEAD

N = 60
LANES, SITES = np.resize(["b", "a", "c"], N), np.resize(["x", "y"], N)
FAST = {"max_epochs": 2, "batch_size": 32, "progress": False}

since_1_5 = pytest.mark.skipif(Version(scvi.__version__) < Version("1.5"), reason="scvi-tools before 1.5 fails at it")
pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning", "ignore:Cannot join columns:UserWarning")


def cells(n_vars=20, prefix="g", seed=0):
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 6.0, n_vars) + 0.2, (N, n_vars)), dtype=np.float32)
    obs = pd.DataFrame({"lane": LANES, "site": SITES, "age": rng.normal(size=N)}, index=[f"cell{i}" for i in range(N)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)]))


def data_of(kind):
    if kind is AmbientRegularizedSCVI:
        return cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        data = mudata.MuData({"gex": cells(), "peaks": cells(15, "p", 1)})
    data.obs[["lane", "site", "age"]] = cells().obs[["lane", "site", "age"]]
    return data


def set_up(kind, data, **arguments):
    setup = kind.setup_anndata if kind is AmbientRegularizedSCVI else kind.setup_mudata
    setup(data, **arguments)
    return data


def new(kind, data):
    return kind(data, n_hidden=8, n_latent=2, ambient_rate=0.1)


@pytest.fixture(scope="module", params=[AmbientRegularizedSCVI, RegularizedMultimodalVI])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    data = set_up(kind, data_of(kind), batch_key="lane", nn_conditioning_covariate_keys=["site"])
    return new(kind, data).train(**FAST)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "model"
    model.save(path)
    return path


# The registry.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_key": "lane", "nn_conditioning_covariate_keys": ["lane"], "feature_scaling_covariate_keys": ["lane"]},
        {"batch_key": "lane", "nn_conditioning_covariate_keys": ["site"], "encoder_covariate_keys": True},
        {
            "ambient_covariate_keys": ["lane", "site"],
            "dispersion_key": "site",
            "library_size_key": "lane",
            "continuous_covariate_keys": ["age"],
            "technical_covariate_keys": ["lane"],
            "allow_noninteger": True,
        },
    ],
)
def test_arguments_of_the_set_up_are_in_the_registry_and_set_data_up_alike(kind, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellstillWarning)
        one = new(kind, set_up(kind, data_of(kind), **arguments))
        setup = kind.setup_anndata if kind is AmbientRegularizedSCVI else kind.setup_mudata
        names = list(inspect.signature(setup).parameters)[1:]
        kept = {name: one.get_setup_arg(name) for name in names}
        assert kept == one.registry["setup_args"]
        for name, value in arguments.items():
            assert kept[name] == (["site"] if value is True and name.startswith("encoder") else value)
        other = new(kind, set_up(kind, data_of(kind), **kept))
    assert other._setup == one._setup
    assert other.registry["setup_args"] == kept


def test_the_set_up_of_a_stored_model_can_be_viewed_and_read(model, folder, kind, capsys):
    kind.view_setup_args(folder)
    shown = capsys.readouterr().out
    assert f"Setup via `{kind.__name__}." in shown
    assert "'batch_key': 'lane'" in shown
    registry = kind.load_registry(folder)
    for key in ("setup_args", "model_name", "setup_method_name"):
        assert registry[key] == model.registry[key], key
    assert registry["model_name"] == kind.__name__
    assert registry["setup_method_name"] == ("setup_anndata" if kind is AmbientRegularizedSCVI else "setup_mudata")


def test_codes_and_categories_are_found_by_key(model, folder, kind):
    codes = pd.Categorical(LANES).codes
    np.testing.assert_array_equal(model.data_registry("batch").ravel(), codes)
    np.testing.assert_array_equal(model.get_from_registry(model.adata, "batch").ravel(), codes)
    np.testing.assert_array_equal(model.adata_manager.get_from_registry("batch").ravel(), codes)
    assert model.summary_stats.n_batch == 3
    for one in (model, kind.load(folder, False)):
        state = one.get_state_registry("batch")
        assert list(state.categorical_mapping) == ["a", "b", "c"]
        assert state.original_key == "lane"
        assert one.get_setup_arg("batch_key") == "lane"


def test_features_are_named_with_data_and_without(model, folder, kind):
    for one in (model, kind.load(folder, False)):
        names = one.get_var_names()
        if kind is AmbientRegularizedSCVI:
            assert list(names) == list(model.adata.var_names)
        else:
            assert {name: list(own) for name, own in names.items()} == {
                name: list(own.var_names) for name, own in model.adata.mod.items()
            }
            assert list(one.get_var_names(legacy_mudata_format=True)) == list(model.adata.var_names)


def test_the_set_up_of_a_model_can_be_viewed(model, capsys):
    model.view_anndata_setup()
    model.view_setup_method_args()
    shown = capsys.readouterr().out
    assert "obs['lane']" in shown
    assert shown.count("'batch_key': 'lane'") == 2


@since_1_5
def test_the_registry_of_a_model_can_be_viewed_and_added_to(kind, folder, capsys):
    one = kind.load(folder, False)
    one.view_registry()
    assert "'batch_key': 'lane'" in capsys.readouterr().out
    one.update_setup_method_args({"note": 1})
    assert one.get_setup_arg("note") == 1


def test_a_manager_belongs_to_its_data_and_class(model, kind):
    assert model.adata_manager.adata is model.adata
    assert kind(model.adata, n_hidden=8, n_latent=2, ambient_rate=0.1).adata_manager.adata is model.adata
    other = data_of(kind)
    assert model.get_anndata_manager(other) is None
    with pytest.raises(ValueError, match=rf"is not set up for {kind.__name__}. Call {kind.__name__}.setup_"):
        new(kind, other)
    codes = model.adata_manager.transfer_fields(other).get_from_registry("batch").ravel()
    np.testing.assert_array_equal(codes, model.data_registry("batch").ravel())
    other.obs["lane"] = np.resize(["a", "new"], N)
    with pytest.raises(ValueError, match="Category new not found in source registry"):
        model.adata_manager.transfer_fields(other)


# State, signs and storage.


def test_training_fills_the_state_that_scvi_tools_names(model, kind):
    untrained = new(kind, set_up(kind, data_of(kind)))
    assert isinstance(untrained, BaseModelClass)
    assert not untrained.is_trained
    assert model.is_trained
    assert "Not Trained" in untrained.summary_string
    assert f"{kind.__name__} (" in model.summary_string
    assert "Training status: Trained" in model.summary_string
    assert model.history is model.history_
    for name in ("elbo", "loss"):
        for split in ("train", "validation"):
            frame = model.history_[f"{name}_{split}"]
            assert list(frame) == [f"{name}_{split}"]
            assert frame.index.name == "epoch"
            assert len(frame) == 2
    parts = (model.train_indices, model.validation_indices, model.test_indices)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(N))
    assert model.minified_data_type is None
    assert getattr(model, model.get_normalized_function_name)(**one_modality(kind)).shape == (N, 20)


def one_modality(kind):
    return {} if kind is AmbientRegularizedSCVI else {"modality": "gex"}


def test_evidence_is_negative_and_errors_and_the_history_are_positive(model):
    # tests/vi/test_evidence.py has those of scvi-tools beside them.
    error = model.get_reconstruction_error()["reconstruction_loss"]
    assert 0 < error <= -model.get_elbo()
    assert model.get_marginal_ll(n_mc_samples=3) < 0
    assert (model.history_["elbo_train"].to_numpy() > 0).all()
    assert (model.history_["elbo_validation"].to_numpy() > 0).all()


def test_what_is_loaded_is_what_was_saved(model, folder, kind):
    loaded = kind.load(folder, model.adata)
    assert loaded.is_trained
    assert loaded.adata_manager.adata is model.adata
    assert loaded.registry["setup_args"] == model.registry["setup_args"]
    assert set(loaded.history_) == set(model.history_)
    for name, frame in model.history_.items():
        pd.testing.assert_frame_equal(loaded.history_[name], frame, check_dtype=False, check_names=False)
    np.testing.assert_array_equal(loaded.validation_indices, model.validation_indices)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_elbo() == model.get_elbo()
    with pytest.raises(StoreError, match="exists"):
        model.save(folder)
    model.save(folder, overwrite=True)


@pytest.mark.parametrize(
    ("method", "argument", "instead"),
    [
        ("save", "prefix", "give each model a folder of its own"),
        ("save", "save_kwargs", "safetensors and JSON"),
        ("save", "legacy_mudata_format", "stored by modality"),
        ("save", "datamodule", "give the data themselves"),
        ("save", "compression", "write the data yourself"),
        ("load", "prefix", "give each model a folder of its own"),
        ("load", "backup_url", "download the folder first"),
        ("load", "datamodule", "give the data themselves"),
        ("load", "allowed_classes_names_list", "the class that wrote it"),
        ("load_registry", "prefix", "give each model a folder of its own"),
        ("view_setup_args", "prefix", "give each model a folder of its own"),
        ("load_query_data", "freeze_dropout", "unfrozen=True trains all of it"),
        ("load_query_data", "inplace_subset_query_vars", "features are matched by name"),
    ],
)
def test_arguments_of_the_store_that_are_not_here_say_what_takes_their_place(
    model, kind, folder, tmp_path, method, argument, instead
):
    of_scvi = getattr(BaseModelClass if method in ("save", "load", "load_registry") else ArchesMixin, method, None)
    if of_scvi is not None and argument != "compression":
        assert argument in inspect.signature(of_scvi).parameters
    places = {"save": (tmp_path / "new",), "load_query_data": (model.adata, folder)}
    message = (
        f"{argument} is an argument of scvi-tools, not of {method.replace('view_setup_args', 'load_registry')} here"
    )
    with pytest.raises(InvalidArgumentError, match=f"{message}: .*{instead}"):
        getattr(model, method)(*places.get(method, (folder,)), **{argument: "any"})
    assert not list(tmp_path.iterdir())


def test_no_argument_of_the_store_of_scvi_tools_is_unheard_of(kind):
    """Each is one here, or is refused by name; any others are those of ``AnnData.write``."""
    for method in ("save", "load", "load_registry"):
        theirs, ours = (set(inspect.signature(getattr(of, method)).parameters) for of in (BaseModelClass, kind))
        unheard = theirs - ours - set(_INSTEAD) - {"self", "anndata_write_kwargs"}
        assert unheard <= ({"adata"} if kind is RegularizedMultimodalVI else set()), method


@pytest.mark.parametrize(
    ("method", "argument", "instead"),
    [
        ("train", "check_val_every_n_epoch", "after every epoch"),
        ("train", "datasplitter_kwargs", "use train_size"),
        ("get_latent_representation", "mc_samples", "give_mean=False draws"),
        ("get_normalized_expression", "n_samples", "posterior_predictive_sample"),
        ("get_normalized_expression", "importance_weighting_kwargs", "posterior mean"),
        ("posterior_predictive_sample", "gene_list", "choose features of the result"),
        ("posterior_predictive_sample", "transform_batch", "get_normalized_expression"),
        ("differential_expression", "mode", "how=PseudobulkConfig"),
        ("differential_expression", "batch_correction", r"batch_keys=\[\]"),
        ("get_elbo", "dataloader", "give the data themselves"),
    ],
)
def test_arguments_of_getters_that_are_not_here_say_what_takes_their_place(model, method, argument, instead):
    with pytest.raises(InvalidArgumentError, match=f"{argument} is an argument of scvi-tools.* {method} .*{instead}"):
        getattr(model, method)(**{argument: None})


def test_no_argument_of_the_getters_of_scvi_tools_is_unheard_of():
    methods = ("train", "get_latent_representation", "get_normalized_expression", "posterior_predictive_sample")
    for method in (*methods, "differential_expression", "get_elbo", "get_marginal_ll", "get_reconstruction_error"):
        kinds = scvi.model.SCVI, AmbientRegularizedSCVI
        theirs, ours = (set(inspect.signature(getattr(of, method)).parameters) for of in kinds)
        unheard = theirs - ours - set(_INSTEAD)
        # The batch size of a comparison is that of its BayesianConfig.
        assert unheard <= {"kwargs", "trainer_kwargs", "batch_size"}, method


def test_a_warning_points_to_the_call_that_led_to_it():
    data = cells()
    with pytest.warns(CellstillWarning, match="encoder_covariate_keys") as seen:
        AmbientRegularizedSCVI.setup_anndata(data, encoder_covariate_keys=["lane"])
    assert [warning.filename for warning in seen if "encoder_covariate_keys" in str(warning.message)] == [__file__]


# Criticism.


def check(model, kind, dtype):
    data = data_of(kind)
    for one in [data] if kind is AmbientRegularizedSCVI else data.mod.values():
        one.X = one.X.astype(dtype)
    return PosteriorPredictiveCheck(data, {"ours": model}, n_samples=3, modality=one_modality(kind).get("modality"))


def test_posterior_predictive_checks_take_the_models(model, kind):
    # Of counts that are floats and sparse, scvi-tools before 1.5 fails.
    found = check(model, kind, np.int64).samples_dataset
    assert found["ours"].dims == ("cells", "features", "samples")
    # It asks for batches of 32 cells.
    drawn = model.posterior_predictive_sample(n_samples=3, batch_size=32)
    expected = drawn if kind is AmbientRegularizedSCVI else drawn["gex"]
    np.testing.assert_array_equal(found["ours"].data.todense(), expected.todense())
    assert list(found["features"].values) == list(cells().var_names)
    # Each cell is drawn at its own library size.
    totals = found["ours"].data.todense().sum(axis=1)
    assert np.corrcoef(totals.mean(axis=1), cells().X.sum(axis=1).A1)[0, 1] > 0.5


@since_1_5
def test_posterior_predictive_checks_take_sparse_floats(model, kind):
    assert not check(model, kind, np.float32).is_float_data
