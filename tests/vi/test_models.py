"""Both models from set-up to store: getters against the module's own numbers and against each other."""

from __future__ import annotations

import warnings

import anndata as ad
import matplotlib as mpl
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.data.soup import expected_native
from cellstill.errors import (
    CellstillError,
    CellstillWarning,
    InvalidArgumentError,
    MissingKeyError,
    NotTrainedError,
    StoreError,
)
from cellstill.vi.evaluation import blocks, expected_means
from cellstill.vi.roles import resolve_roles

mpl.use("Agg")

N, N_GENES, N_PEAKS = 90, 40, 30
# Too few counts to tell the rate of ambient RNA.
SMALL = {"n_hidden": 16, "n_latent": 4, "ambient_rate": 0.1}


def make(n_vars=N_GENES, prefix="g", seed=0):
    rng = np.random.default_rng(seed)
    cell_type = np.arange(N) % 3
    rates = rng.gamma(0.5, 4.0, (3, n_vars))[cell_type] * rng.lognormal(0, 0.3, (N, 1))
    counts = rng.poisson(rates + 0.1)
    counts[counts.sum(axis=1) == 0, 0] = 1
    obs = pd.DataFrame(
        {"lane": np.array(["a", "b", "c"])[rng.integers(0, 3, N)], "site": np.array(["x", "y"])[np.arange(N) % 2]},
        index=[f"cell{i}" for i in range(N)],
    )
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)])
    return ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=obs, var=var)


pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")


def make_mudata():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.MuData({"gex": make(), "peaks": make(N_PEAKS, "p", seed=1)})


@pytest.fixture(scope="module")
def rna():
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane", nn_conditioning_covariate_keys=["site"])
    model = AmbientRegularizedSCVI(adata, **SMALL)
    return model.train(max_epochs=3, batch_size=32)


@pytest.fixture(scope="module")
def joint():
    mdata = make_mudata()
    RegularizedMultimodalVI.setup_mudata(mdata)
    model = RegularizedMultimodalVI(mdata, **SMALL)
    return model.train(max_epochs=3, batch_size=32)


def test_expression_sums_to_the_library_size_and_two_calls_agree(rna):
    expression = rna.get_normalized_expression(library_size=1e4)
    np.testing.assert_allclose(expression.sum(axis=1), 1e4, rtol=1e-5)
    assert expression.shape == (N, N_GENES)
    pd.testing.assert_frame_equal(expression, rna.get_normalized_expression(library_size=1e4))
    some = rna.get_normalized_expression(indices=[3, 1], gene_list=["g5", "g2"], library_size=1e4)
    np.testing.assert_allclose(some, expression.loc[["cell3", "cell1"], ["g5", "g2"]], rtol=1e-5)


def test_background_is_what_is_added_to_native_expression(rna):
    native = rna.get_normalized_expression(library_size="latent", return_numpy=True)
    whole = rna.get_normalized_expression(library_size="latent", include_background=True, return_numpy=True)
    profile = rna.get_ambient_profile()
    np.testing.assert_allclose(profile.sum(axis=1), 1.0, rtol=1e-6)
    assert list(profile.index) == ["a", "b", "c"]
    total = np.asarray(rna.adata.X.sum(axis=1))
    added = (whole - native) / total
    lanes = rna.adata.obs["lane"].to_numpy()
    for lane in "abc":
        own = added[lanes == lane]
        np.testing.assert_allclose(own, own[[0]].repeat(len(own), axis=0), rtol=1e-2, atol=1e-4)
        np.testing.assert_allclose(own[0] / own[0].sum(), profile.loc[lane], rtol=1e-2)
    fraction = (whole - native).sum(axis=1) / whole.sum(axis=1)
    np.testing.assert_allclose(rna.get_ambient_fraction(), fraction, rtol=1e-3)


def test_denoised_counts_never_exceed_the_observed(rna):
    observed = rna.adata.X
    expected = rna.get_denoised_counts()
    drawn = rna.get_denoised_counts(integer=True)
    assert (observed - expected).min() >= 0
    assert (observed - drawn).min() >= 0
    np.testing.assert_array_equal(drawn.data, np.round(drawn.data))
    assert 0 < expected.sum() < observed.sum()
    np.testing.assert_allclose(drawn.sum(), expected.sum(), rtol=0.05)
    assert (drawn != rna.get_denoised_counts(integer=True, batch_size=7)).nnz <= 2  # rounding may move a draw
    seen = observed[5, :].toarray()[0]
    native = rna.get_normalized_expression(indices=[5], library_size="latent", return_numpy=True)[0]
    both = rna.get_normalized_expression(
        indices=[5], library_size="latent", include_background=True, return_numpy=True
    )[0]
    lane = rna.adata.obs["lane"].astype("category").cat.codes.iloc[5]
    theta = rna.module.modalities[0].dispersion.mean[lane].exp().detach().numpy()
    by_bayes = expected_native(seen, native, both - native, theta)
    np.testing.assert_allclose(expected[5, :].toarray()[0], by_bayes, rtol=1e-3, atol=1e-5)


def test_a_free_background_takes_its_share_of_the_counts():
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    model = AmbientRegularizedSCVI(adata, background="free", n_hidden=16, n_latent=4).train(max_epochs=1)
    denoised = model.get_denoised_counts(indices=[5]).toarray()[0]
    native = model.get_normalized_expression(indices=[5], library_size="latent", return_numpy=True)[0]
    both = model.get_normalized_expression(
        indices=[5], library_size="latent", include_background=True, return_numpy=True
    )[0]
    np.testing.assert_allclose(denoised, adata.X[5, :].toarray()[0] * native / both, rtol=1e-4)
    with pytest.raises(InvalidArgumentError, match="no rate"):
        model.get_ambient_rate()


def test_decoding_as_a_category_puts_all_cells_in_it(rna):
    as_x, as_y = (rna.get_normalized_expression(transform_batch=site, return_numpy=True) for site in "xy")
    own = rna.get_normalized_expression(return_numpy=True)
    is_x = (rna.adata.obs["site"] == "x").to_numpy()
    np.testing.assert_allclose(own[is_x], as_x[is_x], rtol=1e-5)
    np.testing.assert_allclose(own[~is_x], as_y[~is_x], rtol=1e-5)
    assert not np.allclose(own[~is_x], as_x[~is_x], rtol=1e-3)
    native = [
        rna.get_normalized_expression(transform_batch=site, library_size="latent", return_numpy=True) for site in "xy"
    ]
    averaged = rna.get_normalized_expression(transform_batch=["x", "y"], library_size="latent", return_numpy=True)
    np.testing.assert_allclose(averaged, np.mean(native, axis=0), rtol=1e-5)
    with pytest.raises(InvalidArgumentError, match=r"transform_batch\['site'\]"):
        rna.get_normalized_expression(transform_batch="z")


@pytest.mark.parametrize("named", [7, 0, np.int64(7), ["x", 7], [], {"site": []}], ids=str)
def test_a_category_to_decode_as_that_is_not_there_is_refused(rna, named):
    with pytest.raises(InvalidArgumentError, match="transform_batch"):
        rna.get_normalized_expression(transform_batch=named)


@pytest.mark.parametrize("size", [0, -1.0, np.nan, np.inf, None, True, "observed", [1e4]], ids=str)
def test_a_library_size_that_is_none_is_refused(rna, size):
    with pytest.raises(InvalidArgumentError, match="library_size="):
        rna.get_normalized_expression(library_size=size)


def test_zarr_holds_the_same(rna, tmp_path):
    stored = rna.get_normalized_expression(out=tmp_path / "e.zarr", batch_size=17)
    np.testing.assert_allclose(stored[:], rna.get_normalized_expression(return_numpy=True), rtol=1e-5)


@pytest.mark.parametrize("which", ["rna", "joint"])
def test_attribution_is_the_derivative_of_the_expected_counts(which, request):
    model = request.getfixturevalue(which)
    chosen = [0, 7, 20]
    found = model.get_modality_attribution(indices=chosen)
    again = model.get_modality_attribution(indices=chosen)
    batch = next(iter(model._cells()[chosen].loader(batch_size=3)))
    z = torch.from_numpy(model.get_latent_representation(indices=chosen)).double()
    sizes = {name: model.get_latent_library_size(indices=chosen, modality=name) for name in found}
    module = model.module.double()
    try:
        for name, one in found.items():
            np.testing.assert_array_equal(one.attribution, again[name].attribution)
            part, size = module.modality(name), torch.from_numpy(sizes[name]).double()
            scaling = part.scaling_of(batch)

            def mean(at, part=part, size=size, scaling=scaling):
                logits = part.output(part.features(at, batch))
                value = size * torch.nn.functional.softplus(logits)
                return value if scaling is None else value * scaling

            derivative = []
            for j in range(z.shape[1]):
                step = torch.zeros_like(z)
                step[:, j] = 1e-6
                derivative.append(((mean(z + step) - mean(z - step)) / 2e-6).detach())
            derivative = torch.stack(derivative, dim=2)
            np.testing.assert_allclose(one.attribution, derivative.abs().mean(dim=1), rtol=1e-3, atol=1e-5)
            for block, norm in one.block_norm.items():
                columns = model.module.config.parts_of_z[block]
                expected = derivative[:, :, columns].square().sum(dim=(1, 2)).sqrt()
                np.testing.assert_allclose(norm, expected, rtol=1e-3)
            np.testing.assert_allclose(one.weighted_z, z.numpy() * one.attribution, rtol=1e-5)
    finally:
        module.float()
    figure = model.plot_attribution_scatter(indices=chosen)
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[0].collections])
    means = [one.attribution.mean(axis=0) for one in found.values()]
    expected = (
        np.stack(means, axis=1) if len(means) > 1 else np.stack([np.arange(1, 5), np.sort(means[0])[::-1]], axis=1)
    )
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def test_evidence_is_a_bound_and_repeats(rna):
    each = rna.get_elbo(return_mean=False)
    assert each.shape == (N,)
    assert rna.get_elbo() == pytest.approx(each.mean())
    assert rna.get_elbo() == rna.get_elbo()
    bound = np.mean([rna.get_elbo(seed=seed) for seed in range(10)])
    assert rna.get_marginal_ll(n_mc_samples=100) > bound
    error = rna.get_reconstruction_error()["reconstruction_loss"]
    assert -error > bound


def test_predicted_counts_resemble_the_observed(rna):
    drawn = rna.posterior_predictive_sample(n_samples=3)
    assert drawn.shape == (N, N_GENES, 3)
    np.testing.assert_array_equal(drawn.data, np.round(drawn.data))
    each = drawn.todense()
    np.testing.assert_allclose(each.sum() / 3, rna.adata.X.sum(), rtol=0.15)
    assert (each[..., 0] != each[..., 1]).any()
    # All cells fit into one block, so that the first draw is the only one with the same seed.
    np.testing.assert_array_equal(rna.posterior_predictive_sample().toarray(), each[..., 0])


def test_draws_of_several_modalities_are_at_the_same_z(joint):
    drawn = joint.posterior_predictive_sample(seed=3)
    assert {name: counts.shape for name, counts in drawn.items()} == {"gex": (N, N_GENES), "peaks": (N, N_PEAKS)}
    several = joint.posterior_predictive_sample(n_samples=2, seed=3)
    for name, counts in drawn.items():
        np.testing.assert_array_equal(several[name].todense()[..., 0], counts.toarray())
    # The first in the order of names is drawn first, right after z.
    alone = joint.posterior_predictive_sample(modality="gex", seed=3)
    np.testing.assert_array_equal(alone.toarray(), drawn["gex"].toarray())


def test_history_has_every_term_of_both_splits(rna):
    for split in ("train", "validation"):
        for term in ("loss", "elbo", "reconstruction_loss", "kl_z", "kl_l", "dispersion", "library_weight"):
            frame = rna.history_[f"{term}_{split}"]
            assert len(frame) == 3
            assert np.isfinite(frame.to_numpy()).all()
    parts = sum(rna.history_[f"{term}_train"].iloc[:, 0] for term in ("reconstruction_loss", "kl_z", "kl_l"))
    np.testing.assert_allclose(rna.history_["elbo_train"].iloc[:, 0], parts, rtol=1e-6)


def test_equal_seeds_give_equal_models(rna):
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane", nn_conditioning_covariate_keys=["site"])
    other = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=3, batch_size=32)
    np.testing.assert_array_equal(other.get_latent_representation(), rna.get_latent_representation())


def test_published_quick_starts_run(caplog):
    adata = make()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    AmbientRegularizedSCVI.setup_anndata(
        adata, layer="counts", batch_key="lane", nn_conditioning_covariate_keys=["site"]
    )
    with pytest.warns(CellstillWarning, match="not identified in 3 of 3 batches"):
        model = AmbientRegularizedSCVI(adata, n_hidden=16, n_layers=1, n_latent=8)
    with caplog.at_level("INFO", logger="cellstill"):
        model.train(train_size=1.0, max_epochs=2, batch_size=1024)
    assert any("watches the training loss" in message for message in caplog.messages)
    assert model.get_latent_representation().shape == (N, 8)
    AmbientRegularizedSCVI.setup_anndata(
        adata,
        layer="counts",
        ambient_covariate_keys=["lane", "site"],
        nn_conditioning_covariate_keys=["site"],
        dispersion_key="lane",
        library_size_key="site",
    )
    model = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=1)
    profile = model.get_ambient_profile()
    assert list(profile.index) == [(lane, site) for lane in "abc" for site in "xy"]


def test_rna_alone_is_the_case_of_one_modality():
    adata = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        mdata = mudata.MuData({"rna": adata.copy()})
    AmbientRegularizedSCVI.setup_anndata(adata)
    RegularizedMultimodalVI.setup_mudata(mdata)
    one = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=2)
    other = RegularizedMultimodalVI(mdata, **SMALL).train(max_epochs=2)
    np.testing.assert_array_equal(one.get_latent_representation(), other.get_latent_representation())
    assert one.module.config.dropout == other.module.config.dropout == 0


def test_several_modalities_learn_to_do_without_some_of_z(joint):
    assert joint.module.config.dropout == 0.1
    assert RegularizedMultimodalVI(joint.adata, dropout_rate=0.0, **SMALL).module.config.dropout == 0


def test_roles_decide_what_modalities_have(joint):
    gex, peaks = joint.module.modality("gex"), joint.module.modality("peaks")
    assert gex.background is not None
    assert gex.scaling is None
    assert peaks.background is None
    assert peaks.scaling is not None
    latents = joint.get_modality_latents()
    np.testing.assert_array_equal(np.hstack(list(latents.values())), joint.get_latent_representation())
    with pytest.raises(InvalidArgumentError, match="modality has to be named"):
        joint.get_normalized_expression()
    with pytest.raises(InvalidArgumentError, match="has no ambient background"):
        joint.get_ambient_profile(modality="peaks")


@pytest.mark.parametrize("kind", ["spliced", "unspliced"])
def test_spliced_and_unspliced_are_roles_of_rna(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        mdata = mudata.MuData({"first": make(), "peaks": make(N_PEAKS, "p")})
    RegularizedMultimodalVI.setup_mudata(mdata, modality_roles={"first": kind})
    part = RegularizedMultimodalVI(mdata, **SMALL).module.config.modalities["first"]
    assert (part.background, part.feature_scaling) == ("profile", False)
    assert resolve_roles(["first", "adt"], {"first": kind}) == {"first": "rna", "adt": "protein"}
    with pytest.raises(InvalidArgumentError, match=r"modality_roles\['first'\]='intron' .*'spliced', 'unspliced'"):
        RegularizedMultimodalVI.setup_mudata(mdata, modality_roles={"first": "intron"})


def test_unknown_role_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        mdata = mudata.MuData({"first": make(), "peaks": make(N_PEAKS, "p")})
    with pytest.raises(InvalidArgumentError, match="modality_roles=.'first': ...."):
        RegularizedMultimodalVI.setup_mudata(mdata)
    RegularizedMultimodalVI.setup_mudata(mdata, modality_roles={"first": "protein"})
    with pytest.raises(InvalidArgumentError, match="takes a MuData"):
        RegularizedMultimodalVI.setup_anndata(make())


@pytest.fixture(scope="module")
def unpaired():
    """Make data whose first 20 cells lack RNA, the next 10 ATAC, under any names of the modalities."""

    def unpaired(rna="gex", atac="peaks"):
        has_atac = np.r_[:20, 30:N]
        parts = {rna: make()[20:].copy(), atac: make(N_PEAKS, "p", seed=1)[has_atac].copy()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return mudata.MuData(parts)

    return unpaired


def test_set_up_says_how_many_cells_lack_a_modality(unpaired, caplog):
    with caplog.at_level("INFO", logger="cellstill"):
        RegularizedMultimodalVI.setup_mudata(make_mudata())
        assert not [message for message in caplog.messages if "lack" in message]
        RegularizedMultimodalVI.setup_mudata(unpaired())
    what = "they add nothing to its terms, and its part of their z, if it has one, is the prior."
    said = [message for message in caplog.messages if "lack" in message]
    assert said == [f"20 of 90 cells lack 'gex': {what}", f"10 of 90 cells lack 'peaks': {what}"]


def test_a_weighted_mean_is_that_of_what_the_encoders_say(unpaired):
    mdata = unpaired()
    RegularizedMultimodalVI.setup_mudata(mdata)
    model = RegularizedMultimodalVI(mdata, latent_mode="weighted_mean", **SMALL).train(max_epochs=3, batch_size=32)
    with torch.no_grad():
        model.module.mixing += torch.tensor([1.0, -0.5])
    parts = model.get_modality_latents()
    assert list(parts) == ["gex", "peaks"]
    share = torch.softmax(model.module.mixing, dim=0).tolist()
    joint, has = model.get_latent_representation(), model._cells().present
    both = has["gex"] & has["peaks"]
    expected = share[0] * parts["gex"] + share[1] * parts["peaks"]
    np.testing.assert_allclose(joint[both], expected[both], rtol=1e-4, atol=1e-6)
    assert not np.allclose(parts["gex"][both], parts["peaks"][both], atol=1e-3)
    for name, other in (("gex", "peaks"), ("peaks", "gex")):
        lacks = ~has[name]
        assert not parts[name][lacks].any()
        np.testing.assert_allclose(joint[lacks], parts[other][lacks], rtol=1e-5, atol=1e-7)
    some = model.get_modality_latents(indices=[50, 3])
    np.testing.assert_allclose(some["peaks"], parts["peaks"][[50, 3]], rtol=1e-5, atol=1e-7)
    model.minify_mudata()
    with pytest.raises(InvalidArgumentError, match="This needs counts"):
        model.get_modality_latents()


def test_one_encoder_has_no_latents_of_modalities():
    mdata = make_mudata()
    RegularizedMultimodalVI.setup_mudata(mdata)
    model = RegularizedMultimodalVI(mdata, latent_mode="single_encoder", **SMALL).train(max_epochs=2)
    assert model.get_latent_representation().shape == (N, 4)
    with pytest.raises(InvalidArgumentError, match="latent_mode='single_encoder' .*'concatenation' or 'weighted_mean'"):
        model.get_modality_latents()


@pytest.mark.parametrize("latent_mode", ["concatenation", "weighted_mean", "single_encoder"])
def test_what_modalities_are_called_changes_nothing(unpaired, latent_mode, tmp_path):
    """Models are the same, bit for bit, also where the names are in another order: but for that of the parts of z."""
    names, sizes = {"gex": "b: gex", "peaks": "a: peaks"}, {"gex": 4, "peaks": 4}
    if latent_mode == "concatenation":
        sizes["peaks"] = 3
    models = []
    for data, called in ((unpaired(), dict(zip(names, names, strict=True))), (unpaired(*names.values()), names)):
        RegularizedMultimodalVI.setup_mudata(data)
        n_latent = {called[name]: size for name, size in sizes.items()}
        model = RegularizedMultimodalVI(data, **{**SMALL, "latent_mode": latent_mode, "n_latent": n_latent})
        models.append(model.train(max_epochs=4, batch_size=16, lr=1e-2))
    model, other = models
    assert other.modality_names == [names["peaks"], names["gex"]]
    order = np.r_[4:7, 0:4] if latent_mode == "concatenation" else np.arange(4)
    same = np.testing.assert_array_equal

    def assert_same(getter, convert=np.asarray, modality=tuple(names), **settings):
        for name in modality:
            expected = convert(getattr(model, getter)(modality=name, **settings))
            same(convert(getattr(other, getter)(modality=names[name], **settings)), expected, err_msg=getter)

    assert model.get_latent_representation().std(axis=0).min() > 1e-3
    for settings in ({}, {"give_mean": False, "seed": 1}):
        same(other.get_latent_representation(**settings), model.get_latent_representation(**settings)[:, order])
    for found, expected in zip(
        *(one.get_latent_representation(return_dist=True) for one in (other, model)), strict=True
    ):
        same(found, expected[:, order])
    assert_same("get_latent_library_size")
    assert_same("get_normalized_expression")
    assert_same("get_normalized_expression", library_size="latent", include_background=True, modality=["gex"])
    assert_same("get_denoised_counts", lambda counts: counts.toarray(), modality=["gex"])
    assert_same("get_ambient_fraction", lambda share: share.fillna(-1).to_numpy(), modality=["gex"])
    assert_same("posterior_predictive_sample", lambda counts: counts.toarray(), modality=["peaks"])
    drawn, expected = other.posterior_predictive_sample(), model.posterior_predictive_sample()
    found = other.get_modality_attribution()
    for name, own in names.items():
        same(drawn[own].toarray(), expected[name].toarray())
        of_model = model.get_modality_attribution()[name]
        same(found[own].attribution, of_model.attribution[:, order])
        same(found[own].weighted_z, of_model.weighted_z[:, order])
        for part, norm in of_model.block_norm.items():
            same(found[own].block_norm[names.get(part, part)], norm)
    if latent_mode != "single_encoder":
        found, expected = other.get_modality_latents(), model.get_modality_latents()
        for name, own in names.items():
            same(found[own], expected[name])
    for getter in ("get_elbo", "get_marginal_ll"):
        settings = {"n_mc_samples": 3} if getter == "get_marginal_ll" else {}
        assert getattr(other, getter)(**settings) == getattr(model, getter)(**settings)
    history = {term: frame.to_numpy() for term, frame in model.history_.items()}
    for name, own in names.items():
        history = {term.replace(f"_{name}_", f"_{own}_"): values for term, values in history.items()}
    assert history.keys() == other.history_.keys()
    for term, values in history.items():
        same(other.history_[term].to_numpy(), values, err_msg=term)

    # The order outlives a store, and data without counts.
    latents = other.get_latent_representation()
    other.save(tmp_path / "model")
    stored = RegularizedMultimodalVI.load(tmp_path / "model", other.adata)
    same(stored.get_latent_representation(), latents)
    stored.minify_mudata()
    same(stored.get_latent_representation(), latents)
    for name, own in names.items():
        same(stored.get_normalized_expression(modality=own), model.get_normalized_expression(modality=name))


def test_permuted_genes_give_permuted_results(rna):
    adata, order = make(), np.random.default_rng(0).permutation(N_GENES)
    moved = adata[:, order].copy()
    AmbientRegularizedSCVI.setup_anndata(moved, batch_key="lane", nn_conditioning_covariate_keys=["site"])
    other = AmbientRegularizedSCVI(moved, **SMALL)
    state = rna.module.state_dict()
    for name, value in state.items():
        for axis, size in enumerate(value.shape):
            if size == N_GENES:
                state[name] = value.index_select(axis, torch.from_numpy(order))
    other.module.load_state_dict(state)
    other.is_trained_ = True
    np.testing.assert_allclose(other.get_latent_representation(), rna.get_latent_representation(), rtol=1e-4, atol=1e-5)
    genes = [f"g{i}" for i in order]
    expression = rna.get_normalized_expression(library_size="latent", include_background=True)
    found = other.get_normalized_expression(library_size="latent", include_background=True)
    assert list(found.columns) == genes
    pd.testing.assert_frame_equal(found, expression[genes], rtol=1e-4)
    pd.testing.assert_frame_equal(other.get_ambient_profile(), rna.get_ambient_profile()[genes], rtol=1e-5)
    denoised = rna.get_denoised_counts().toarray()[:, order]
    np.testing.assert_allclose(other.get_denoised_counts().toarray(), denoised, rtol=1e-3, atol=1e-5)
    assert not np.allclose(rna.get_denoised_counts().toarray(), denoised, rtol=0.1)


@pytest.mark.parametrize("which", ["rna", "joint"])
def test_a_fall_of_the_loss_counts_from_so_much_per_feature_on(which):
    data, kind = (make(), AmbientRegularizedSCVI) if which == "rna" else (make_mudata(), RegularizedMultimodalVI)
    (kind.setup_anndata if which == "rna" else kind.setup_mudata)(data)
    n_features = N_GENES if which == "rna" else N_GENES + N_PEAKS

    def watched(**settings):
        model = kind(data, **SMALL)
        model.train(6, lr=5e-3, batch_size=32, train_size=1.0, early_stopping_patience=2, **settings)
        return model.history_["loss_train"].iloc[:, 0].to_numpy()

    whole = watched(early_stopping=False)
    assert (np.diff(whole) < 0).all()
    assert len(watched(early_stopping_min_delta_per_feature=0)) == len(whole) == 6
    # Training stops after two epochs that bring less than counts as a fall.
    fall = (whole[0] - whole[2]) / n_features
    assert len(watched(early_stopping_min_delta_per_feature=1.01 * fall)) == 3
    assert len(watched(early_stopping_min_delta_per_feature=0.99 * fall)) > 3
    with pytest.raises(InvalidArgumentError, match=r"early_stopping_min_delta_per_feature=-0\.1 is below 0"):
        watched(early_stopping_min_delta_per_feature=-0.1)


@pytest.mark.parametrize("which", ["rna", "joint"])
@pytest.mark.parametrize("with_data", [True, False], ids=["with_data", "without_data"])
def test_a_stored_model_is_the_same(which, with_data, request, tmp_path):
    model = request.getfixturevalue(which)
    model.save(tmp_path / "model")
    data = model.adata.copy()
    loaded = type(model).load(tmp_path / "model", data if with_data else None)
    given = None if with_data else data
    np.testing.assert_array_equal(loaded.get_latent_representation(given), model.get_latent_representation())
    assert loaded.get_elbo(given) == model.get_elbo()
    pd.testing.assert_frame_equal(loaded.history_["elbo_train"], model.history_["elbo_train"])
    np.testing.assert_array_equal(loaded.train_indices_, model.train_indices_)
    with pytest.raises(StoreError, match="exists"):
        model.save(tmp_path / "model")


def test_genes_are_matched_by_name(rna):
    order = np.random.default_rng(0).permutation(N_GENES)
    np.testing.assert_allclose(
        rna.get_latent_representation(make()[:, order].copy()), rna.get_latent_representation(), rtol=1e-4, atol=1e-5
    )


def test_unknown_category_is_named_where_it_matters(rna):
    new = make()
    new.obs["lane"] = "d"
    assert rna.get_latent_representation(new).shape == (N, 4)
    with pytest.raises(CellstillError, match="'d'"):
        rna.get_normalized_expression(new)


def test_untrained_model_says_so():
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata)
    model = AmbientRegularizedSCVI(adata, **SMALL)
    with pytest.raises(NotTrainedError, match=r"Call train\(\)"):
        model.get_latent_representation()
    free = AmbientRegularizedSCVI(adata, **{**SMALL, "ambient_rate": None}, background="free")
    with pytest.raises(NotTrainedError, match=r"Call train\(\)"):
        free.get_ambient_profile()


def test_rate_and_composition_of_the_soup_are_known_before_training():
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    model = AmbientRegularizedSCVI(adata, **{**SMALL, "ambient_rate": {"a": 0.2, "b": 0.1, "c": 0.0}})
    before = model.get_ambient_rate(), model.get_ambient_profile()
    np.testing.assert_allclose(before[0]["rate"], [0.2, 0.1, 0.0])
    model.train(max_epochs=2)
    pd.testing.assert_frame_equal(model.get_ambient_rate(), before[0])
    pd.testing.assert_frame_equal(model.get_ambient_profile(), before[1])


def test_resume_goes_on_from_a_checkpoint(tmp_path):
    def train(max_epochs, stop_after=None, made_of=None, **settings):
        adata = make()
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
        model = AmbientRegularizedSCVI(adata, **{**SMALL, **(made_of or {})})

        def interrupt(phase, epoch, losses):
            if epoch == stop_after:
                raise KeyboardInterrupt

        model.train(max_epochs=max_epochs, progress=interrupt, **settings)
        return model.get_latent_representation()

    whole = train(4)
    with pytest.raises(KeyboardInterrupt):
        train(4, stop_after=1, checkpoint=tmp_path / "run.safetensors")
    for other, shown in (
        ({"ambient_rate": 0.3}, r"the module has .*rate=.* there and .*rate=0\.3.* here"),
        ({"z_sparsity": 2.0}, r"z_sparsity=None there and 2\.0 here"),
    ):
        with pytest.raises(StoreError, match=shown):
            train(4, made_of=other, checkpoint=tmp_path / "run.safetensors", resume=True)
    np.testing.assert_array_equal(train(4, checkpoint=tmp_path / "run.safetensors", resume=True), whole)


@pytest.mark.parametrize("stratified", [False, True])
def test_stratified_split_takes_the_share_of_every_group(stratified):
    adata = make()
    adata.obs["lane"] = ["a"] * 10 + ["b"] * 80
    AmbientRegularizedSCVI.setup_anndata(adata)
    model = AmbientRegularizedSCVI(adata, **SMALL)
    model.train(max_epochs=1, train_size=0.8, stratify_validation_key="lane" if stratified else None)
    assert len(model.validation_indices_) == 18
    if stratified:
        assert (model.validation_indices_ < 10).sum() == 2


@pytest.mark.parametrize("columns", [["lane", "site"], ["lane"], None], ids=["joined", "same_column", "no_column"])
def test_soup_keeps_its_rate_and_composition_beside_feature_scaling(columns):
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(
        adata,
        batch_key="lane",
        nn_conditioning_covariate_keys=["site"],
        feature_scaling_covariate_keys=columns,
    )
    model = AmbientRegularizedSCVI(adata, **SMALL, use_feature_scaling=True).train(max_epochs=1)
    with torch.no_grad():
        for gamma in model.module.modalities[0].scaling.gamma.tables:
            gamma.normal_()
    (block,) = blocks(model.module, model._cells(), batch_size=N)
    with torch.inference_mode():
        native, soup = (part.numpy() for part in expected_means(model.module, "rna", block))
    total = np.asarray(adata.X.sum(axis=1))
    # A gene that a lane does not show counts as half a count.
    np.testing.assert_allclose(soup.sum(axis=1, keepdims=True), 0.1 * total, rtol=1e-3)
    profile = model.get_ambient_profile().loc[adata.obs["lane"]].to_numpy()
    np.testing.assert_allclose(soup / soup.sum(axis=1, keepdims=True), profile, rtol=1e-4)
    fraction = soup.sum(axis=1) / (native + soup).sum(axis=1)
    np.testing.assert_allclose(model.get_ambient_fraction(), fraction, rtol=1e-4)
    part, batch = model.module.modalities[0], block.batch
    with torch.inference_mode():
        size = model.module.library("rna", block.counts["rna"], batch).mean.exp()
        unscaled = part.native(block.latent.mean, batch) * size
        np.testing.assert_allclose(native, unscaled * part.scaling_of(batch), rtol=1e-4)
        # What training sees is what getters give.
        table, group = part.background_table(batch, part.scaling_table(batch))
        amount = part.log_amount(block.counts["rna"], size.log(), None)
        seen = (table[group] + amount).exp() * size * part.scaling_of(batch)
        np.testing.assert_allclose(seen, soup, rtol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_cells_that_lack_a_modality_have_a_library_size_like_that_of_the_others(residual):
    mdata = make_mudata()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        part = mudata.MuData({"gex": mdata["gex"][20:].copy(), "peaks": mdata["peaks"].copy()})
    RegularizedMultimodalVI.setup_mudata(part)
    model = RegularizedMultimodalVI(part, **SMALL, residual_library=residual).train(max_epochs=2)
    cells = model._cells()
    lacks = ~cells.present["gex"]
    size = model.get_latent_library_size(modality="gex")[:, 0]
    assert 0.5 < np.median(size[lacks]) / np.median(size[~lacks]) < 2
    fraction = model.get_ambient_fraction(modality="gex").to_numpy()
    np.testing.assert_array_equal(np.isnan(fraction), lacks)
    predicted = model.get_normalized_expression(
        modality="gex", library_size="latent", include_background=True, return_numpy=True
    ).sum(axis=1)
    assert 0.4 < np.median(predicted[lacks]) / np.median(predicted[~lacks]) < 2.5


def test_going_on_training_appends_to_the_history(tmp_path):
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    model = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=2, train_size=1.0)
    first = model.history_["loss_train"]
    model.save(tmp_path / "model")
    loaded = AmbientRegularizedSCVI.load(tmp_path / "model", adata)
    for one in (model, loaded):
        one.train(max_epochs=3, checkpoint=tmp_path / f"{id(one)}.safetensors")
        whole = one.history_["loss_train"]
        assert whole.index.tolist() == [0, 1, 2, 3, 4]
        assert whole.index.name == "epoch"
        np.testing.assert_array_equal(whole[:2], first)
        # What was watched later has the epochs at which it was.
        assert one.history_["loss_validation"].index.tolist() == [2, 3, 4]
        # A finished run that is resumed is no further one.
        one.train(max_epochs=3, checkpoint=tmp_path / f"{id(one)}.safetensors", resume=True)
        pd.testing.assert_frame_equal(one.history_["loss_train"], whole)
        assert one.train(max_epochs=0).history_["loss_train"] is one.history_["loss_train"]
    loaded.save(tmp_path / "again")
    again = AmbientRegularizedSCVI.load(tmp_path / "again", False)
    for name, frame in loaded.history_.items():
        pd.testing.assert_frame_equal(again.history_[name], frame)


def test_none_is_the_default_of_batch_and_training_size(rna):
    np.testing.assert_allclose(
        rna.get_latent_representation(batch_size=None), rna.get_latent_representation(), rtol=1e-5, atol=1e-6
    )
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    model = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=1, batch_size=None, train_size=None)
    other = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=1)
    np.testing.assert_array_equal(model.get_latent_representation(), other.get_latent_representation())
    for asks in (rna.get_latent_representation, rna.get_normalized_expression, rna.get_elbo, model.train):
        with pytest.raises(InvalidArgumentError, match="batch_size=2.5 has to be an integer of at least 1"):
            asks(batch_size=2.5)


@pytest.mark.parametrize("indices", [3, np.int64(3), [[1, 2]]])
def test_indices_are_a_list(rna, indices):
    with pytest.raises(InvalidArgumentError, match=r"^indices=.* has [02] dimensions, not 1. Give a list"):
        rna.get_latent_representation(indices=indices)


def test_truth_values_are_counts_of_one():
    is_there, ones = make(), make()
    is_there.X = sp.csr_matrix(is_there.X).astype(bool)
    ones.X = is_there.X.astype(np.float32)
    latents = []
    for adata in (is_there, ones):
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
        model = AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=1)
        latents.append((model.get_latent_representation(), model.get_denoised_counts().toarray()))
    np.testing.assert_array_equal(latents[0][0], latents[1][0])
    np.testing.assert_array_equal(latents[0][1], latents[1][1])


def test_a_column_of_several_types_is_refused():
    adata = make()
    adata.obs["run"] = pd.Series([1, "b"] * (N // 2), index=adata.obs_names, dtype=object)
    with pytest.raises(InvalidArgumentError, match=r"^batch_key='run' mixes values of type int and str.*astype\(str\)"):
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key="run")


@pytest.mark.parametrize(
    ("call", "name", "instead"),
    [
        ("setup_anndata", "labels_key", "no part of the model knows labels"),
        ("setup_anndata", "categorical_covariate_keys", "nn_conditioning_covariate_keys"),
        ("__init__", "gene_likelihood", "likelihood='negative_binomial'"),
        ("train", "plan_kwargs", "lr=, weight_decay= and kl_warmup="),
    ],
)
def test_arguments_of_scvi_are_told_what_takes_their_place(rna, call, name, instead):
    asks = {"setup_anndata": rna.setup_anndata, "__init__": AmbientRegularizedSCVI, "train": rna.train}[call]
    given = () if call == "train" else (rna.adata,)
    with pytest.raises(InvalidArgumentError, match=f"^{name} is an argument of .*, not of {call} here.*{instead}"):
        asks(*given, **{name: "x"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        asks(*given, nonsense=1)


def test_messages_name_what_the_user_wrote(rna, tmp_path):
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    with pytest.raises(InvalidArgumentError, match=r"^dropout_rate=1 has to be at least 0 and below 1"):
        AmbientRegularizedSCVI(adata, dropout_rate=1)
    with pytest.raises(MissingKeyError, match=r"batch_key='b' is not in adata.obs. adata.obs has: 'lane'") as error:
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key="b")
    assert any(column.startswith("_scvi") for column in adata.obs)
    assert "_scvi" not in str(error.value)
    one_gene = make(n_vars=1)
    one_gene.X = np.ones((N, 1), dtype=np.float32)
    AmbientRegularizedSCVI.setup_anndata(one_gene, batch_key="lane")
    with pytest.raises(InvalidArgumentError, match=rf"of \['a', 'b', 'c'\] cannot be .* are {N} and 1\."):
        AmbientRegularizedSCVI(one_gene, n_hidden=8, n_latent=2)
    new = make()[:1].copy()
    new.obs["lane"] = "new"
    message = rf"of \['new'\] cannot be .* 1 and {N_GENES}\. State it, ambient_rate=.'new': 0.1"
    with pytest.raises(InvalidArgumentError, match=message):
        AmbientRegularizedSCVI.load_query_data(new, rna)


def test_a_single_modality_may_be_named_as_text():
    mdata = make_mudata()
    RegularizedMultimodalVI.setup_mudata(mdata, modalities="gex", modality_roles={"gex": "rna"})
    assert RegularizedMultimodalVI(mdata, **SMALL).modality_names == ["gex"]


def test_a_run_of_other_genes_is_one_of_other_data(tmp_path):
    def train(n_vars, **settings):
        adata = make(n_vars=n_vars)
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
        AmbientRegularizedSCVI(adata, **SMALL).train(1, checkpoint=tmp_path / "run.safetensors", **settings)

    train(N_GENES)
    with pytest.raises(StoreError, match="another run: its training and validation data, or the batch size or seed"):
        train(N_GENES - 1, resume=True)
