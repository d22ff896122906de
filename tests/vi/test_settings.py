"""Settings that cannot be meant, or would change nothing, are refused; others reach the model as they were given."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.parts import log_scaling

N = 80
SIZES = {"n_hidden": 8, "n_latent": 2}
KNOWN = {**SIZES, "ambient_rate": 0.1}

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")


def cells(n_vars=20, prefix="g", seed=0, n=N):
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 6.0, n_vars) + 0.2, (n, n_vars)), dtype=np.float32)
    obs = pd.DataFrame({"lane": np.array(["a", "b"])[np.arange(n) % 2]}, index=[f"cell{i}" for i in range(n)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)]))


def three_modalities():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.MuData({"gex": cells(), "peaks": cells(15, "p", 1), "adt": cells(10, "a", 2)})


@pytest.fixture(scope="module")
def adata():
    adata = cells()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    return adata


@pytest.fixture(scope="module")
def mdata():
    mdata = three_modalities()
    RegularizedMultimodalVI.setup_mudata(mdata)
    return mdata


@pytest.fixture(params=["rna", "joint"])
def make(request):
    """Make a model of one modality or of three."""
    if request.param == "rna":
        return lambda **settings: AmbientRegularizedSCVI(request.getfixturevalue("adata"), **settings)
    return lambda **settings: RegularizedMultimodalVI(request.getfixturevalue("mdata"), **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ambient_rate": 0.1, "background": "free"}, "ambient_rate=0.1 is of no use.*'profile'"),
        ({"ambient_rate": 0.1, "background": False}, "ambient_rate=0.1 is of no use.*'profile'"),
        ({"regularise_background": True, "background": "profile"}, "regularise_background=True .* none is"),
        ({"regularise_background": True, "background": False}, "regularise_background=True .* none is"),
        ({"dispersion_start": 0.9, "likelihood": "poisson", "background": False}, "dispersion_start=0.9 .* has none"),
    ],
    ids=["rate_free", "rate_none", "prior_profile", "prior_none", "start_poisson"],
)
def test_settings_that_would_change_nothing_are_refused(make, settings, match):
    with pytest.raises(InvalidArgumentError, match=match):
        make(**SIZES, **settings)


@pytest.mark.parametrize(
    ("keys", "settings", "match"),
    [
        ({"ambient_covariate_keys": ["lane"]}, {"background": False}, r"=\['lane'\] would .* background is {.*False}"),
        ({"dispersion_key": "lane"}, {"likelihood": "poisson"}, "='lane' would .* likelihood is {.*'poisson'}"),
        (
            {"feature_scaling_covariate_keys": ["lane"]},
            {"use_feature_scaling": False},
            r"=\['lane'\] would .* use_feature_scaling is {.*False}.* use_feature_scaling=True",
        ),
    ],
    ids=["ambient", "dispersion", "scaling"],
)
@pytest.mark.parametrize("which", ["rna", "joint"])
def test_keys_for_a_part_that_is_not_there_are_refused(which, keys, settings, match):
    model, data = (AmbientRegularizedSCVI, cells()) if which == "rna" else (RegularizedMultimodalVI, three_modalities())
    set_up = model.setup_anndata if which == "rna" else model.setup_mudata
    settings = {**SIZES, "background": "free", **settings}
    set_up(data, **keys)
    with pytest.raises(InvalidArgumentError, match=next(iter(keys)) + match):
        model(data, **settings)
    # What other keys stand for need not act everywhere.
    set_up(data, batch_key="lane", nn_conditioning_covariate_keys=["lane"])
    model(data, **settings)


def scaled_modalities(model):
    """Categories of the feature scaling of each modality that has it."""
    parts = {name: model.module.modality(name).scaling for name in model.modality_names}
    return {name: len(part.gamma.tables[0]) for name, part in parts.items() if part is not None}


def test_named_scaling_acts_on_every_modality_and_that_of_conditioning_by_role():
    data = three_modalities()
    RegularizedMultimodalVI.setup_mudata(data, nn_conditioning_covariate_keys=["lane"])
    assert scaled_modalities(RegularizedMultimodalVI(data, **KNOWN)) == {"peaks": 2}
    RegularizedMultimodalVI.setup_mudata(data, feature_scaling_covariate_keys=[])
    assert scaled_modalities(RegularizedMultimodalVI(data, **KNOWN)) == {"peaks": 1}
    RegularizedMultimodalVI.setup_mudata(data, feature_scaling_covariate_keys=["lane"])
    assert scaled_modalities(RegularizedMultimodalVI(data, **KNOWN)) == {"adt": 2, "gex": 2, "peaks": 2}
    some = {"adt": None, "gex": False, "peaks": None}
    assert scaled_modalities(RegularizedMultimodalVI(data, **KNOWN, use_feature_scaling=some)) == {"adt": 2, "peaks": 2}


def test_models_saved_when_named_scaling_went_by_role_stay_as_they_were(tmp_path):
    data = three_modalities()
    RegularizedMultimodalVI.setup_mudata(data, feature_scaling_covariate_keys=["lane"])
    by_role = {"adt": False, "gex": False, "peaks": True}
    model = RegularizedMultimodalVI(data, **KNOWN, use_feature_scaling=by_role).train(max_epochs=1)
    model.save(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "model.json").read_text())
    del stored["config"]["setup"]["keys"]["scaling_named"]
    (tmp_path / "model" / "model.json").write_text(json.dumps(stored))
    loaded = RegularizedMultimodalVI.load(tmp_path / "model", data)
    assert loaded.module.config == model.module.config
    assert loaded.get_setup_arg("feature_scaling_covariate_keys") == ["lane"]
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_settings_that_serve_one_modality_are_accepted(mdata):
    likelihood = {"gex": "negative_binomial", "peaks": "poisson", "adt": "poisson"}
    model = RegularizedMultimodalVI(
        mdata, **KNOWN, regularise_background=True, dispersion_start=0.9, likelihood=likelihood
    )
    assert "background" in dict(model.module.modality("adt").penalties(model.module.config))
    assert model.module.modality("gex").dispersion.mean.detach().std() > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"library_variance_weight": 0}, "library_variance_weight=0 "),
        ({"library_variance_weight": -1.0}, "library_variance_weight=-1.0"),
        ({"library_variance_weight": np.nan}, "library_variance_weight=nan"),
        ({"sensitivity": np.inf}, "sensitivity=inf"),
        ({"sensitivity": 0.0}, "sensitivity=0.0"),
        ({"library_n_hidden": 0}, "library_n_hidden=0 "),
        ({"n_hidden": 8.0}, "n_hidden=8.0"),
        ({"n_layers": True}, "n_layers=True"),
        ({"seed": -1}, "seed=-1 "),
        ({"seed": 0.5}, "seed=0.5"),
        ({"background": True}, "background=True"),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(f"{k}={v}" for k, v in value.items()),
)
def test_what_cannot_be_meant_names_the_argument(make, settings, match):
    with pytest.raises(InvalidArgumentError, match=match):
        make(**{**KNOWN, **settings})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"early_stopping_patience": -1}, "early_stopping_patience=-1"),
        ({"early_stopping_patience": 4.5}, "early_stopping_patience=4.5"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0"),
        ({"lr": np.nan}, "lr=nan"),
    ],
    ids=["patience_below_0", "patience_of_a_half", "decay", "clip", "lr"],
)
def test_training_settings_that_cannot_be_meant_name_the_argument(adata, settings, match):
    with pytest.raises(InvalidArgumentError, match=match):
        AmbientRegularizedSCVI(adata, **KNOWN).train(max_epochs=1, **settings)


def test_integers_of_numpy_are_integers(make, tmp_path):
    model = make(n_hidden=np.int64(8), n_latent=np.int32(2), ambient_rate=0.1, seed=np.int64(3))
    other = make(n_hidden=8, n_latent=2, ambient_rate=0.1, seed=3)
    assert model.module.config == other.module.config
    model.train(max_epochs=1, early_stopping_patience=np.int64(4))
    other.train(max_epochs=1, early_stopping_patience=4)
    np.testing.assert_array_equal(model.get_latent_representation(), other.get_latent_representation())
    model.save(tmp_path / "model")
    assert type(model).load(tmp_path / "model").module.config == other.module.config


def test_none_is_no_background_of_rna_and_false_leaves_it_out_of_any(adata, mdata):
    with pytest.raises(InvalidArgumentError, match="background=False to leave it out"):
        AmbientRegularizedSCVI(adata, **SIZES, background=None)
    assert AmbientRegularizedSCVI(adata, **SIZES, background=False).module.modality("rna").background is None
    joint = RegularizedMultimodalVI(mdata, **SIZES, background=False)
    assert [joint.module.modality(name).background for name in ("adt", "gex", "peaks")] == [None] * 3
    by_role = RegularizedMultimodalVI(mdata, **KNOWN, background={"gex": None, "adt": False, "peaks": None})
    backgrounds = {name: one.background for name, one in by_role.module.config.modalities.items()}
    assert backgrounds == {"adt": None, "gex": "profile", "peaks": None}


def test_a_modality_has_the_background_that_models_have_by_default():
    assert ModalityConfig(n_vars=5).background == "profile"


@pytest.mark.parametrize("argument", ["n_latent", "n_hidden", "n_layers"])
def test_one_encoder_has_one_size(argument):
    sizes = {"n_hidden": 8, "n_latent": 2, "n_layers": 1}

    def config(latent_mode):
        other = {**sizes, argument: 3}
        modalities = {"atac": ModalityConfig(n_vars=9, **sizes), "rna": ModalityConfig(n_vars=7, **other)}
        return VAEConfig(modalities=modalities, latent_mode=latent_mode)

    with pytest.raises(InvalidArgumentError, match=rf"'single_encoder' needs the same {argument} .*'rna': 3"):
        config("single_encoder")
    config("concatenation")
    if argument == "n_latent":
        with pytest.raises(InvalidArgumentError, match="'weighted_mean' needs the same n_latent"):
            config("weighted_mean")
    else:
        config("weighted_mean")


def test_fewer_training_cells_than_are_validated_at_once():
    adata = cells(n=200)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    model = AmbientRegularizedSCVI(adata, **KNOWN).train(max_epochs=2, train_size=0.1)
    assert (len(model.train_indices_), len(model.validation_indices_)) == (20, 180)
    assert np.isfinite(model.history_["loss_validation"]).all().all()
    # Means over validation cells, whatever the minibatches: terms of the data as a whole are those of training.
    whole = model.history_["decoder_l2_validation"].iloc[-1, 0]
    part = model.module.modality("rna")
    weights = [part.output.weight, part.decoder.dense.weight]
    expected = 0.1 * sum(weight.detach().square().sum().item() for weight in weights) / 20
    assert whole == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def technologies():
    return simulate_counts(n_obs=900, n_vars=600, n_batches=3, n_cell_types=3, batch_sd=0.8, seed=11)


@pytest.mark.parametrize(
    "keys",
    [{"ambient_covariate_keys": ["batch"]}, {"dispersion_key": "batch"}, {"library_size_key": "batch"}],
    ids=["ambient", "dispersion", "library"],
)
@pytest.mark.parametrize("which", ["rna", "joint"])
def test_factors_between_categories_of_any_purpose_are_told(technologies, keys, which):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        joint = mudata.MuData({"gex": technologies.copy()})
        joint.obs["batch"] = technologies.obs["batch"]

    def set_up(**more):
        if which == "rna":
            AmbientRegularizedSCVI.setup_anndata(technologies.copy(), **keys, **more)
        else:
            RegularizedMultimodalVI.setup_mudata(joint, **keys, **more)

    with pytest.warns(CellstillWarning, match="'batch' differ by a factor per gene"):
        set_up()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellstillWarning)
        set_up(nn_conditioning_covariate_keys=["batch"])
        set_up(feature_scaling_covariate_keys=["batch"])


def test_factors_between_technologies_are_found_in_rna_of_several_modalities(technologies):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        joint = mudata.MuData({"gex": technologies.copy(), "adt": cells(10, "a", 2, n=technologies.n_obs)})
    joint["adt"].obs_names = technologies.obs_names
    joint.update()
    joint.obs["batch"] = technologies.obs["batch"]
    RegularizedMultimodalVI.setup_mudata(joint, feature_scaling_covariate_keys=["batch"])
    model = RegularizedMultimodalVI(joint, n_hidden=16, n_latent=4, background=False)
    model.train(max_epochs=8, lr=5e-3, train_size=1.0, early_stopping=False)
    (gamma,) = model.module.modality("gex").scaling.gamma.tables
    found, known = log_scaling(gamma).detach().numpy(), technologies.varm["batch_shift"].to_numpy().T
    found, known = ((one - one.mean(axis=0)).ravel() for one in (found, known))
    # Found over three seeds: .82 to .86.
    assert np.corrcoef(found, known)[0, 1] > 0.7


@pytest.mark.parametrize("column", ["rows", "continuous"])
def test_columns_may_have_any_name(column):
    adata = cells()
    adata.obs[column] = adata.obs["lane"]
    adata.obs["age"] = np.linspace(0, 1, N)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key=column, continuous_covariate_keys=["age"])
    renamed = AmbientRegularizedSCVI(adata, **KNOWN).train(max_epochs=1)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane", continuous_covariate_keys=["age"])
    model = AmbientRegularizedSCVI(adata, **KNOWN).train(max_epochs=1)
    np.testing.assert_array_equal(renamed.get_latent_representation(), model.get_latent_representation())
