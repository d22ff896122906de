"""Optional priors: their values, the optima that they have without data, and what they do to a trained model."""

from __future__ import annotations

import math
import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import optimize, stats

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import InvalidArgumentError, MissingKeyError
from cellstill.nn.priors import horseshoe, normal_kl, sparse_gamma
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.penalties import Relevance, dimensions_present, penalties_of_z, penalty_of_hidden
from cellstill.vi.start import start_from_data

N, N_GENES = 240, 40
SMALL = {"n_hidden": 16, "n_latent": 4, "background": False}
JOINT = {"n_hidden": 16, "n_latent": 4, "background": {"gex": "free", "peaks": False}}

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")


def counts_of(n_vars=N_GENES, seed=0, n=N):
    """Three cell types, which two dimensions of z can tell apart."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 6.0, (3, n_vars))[np.arange(n) % 3] * rng.lognormal(0, 0.3, (n, 1))
    counts = rng.poisson(rates + 0.1)
    counts[counts.sum(axis=1) == 0, 0] = 1
    return sp.csr_matrix(counts, dtype=np.float32)


def batch_of(counts, present=None):
    batch = {
        f"{name}/{part}": torch.from_numpy(getattr(matrix, part))
        for name, matrix in counts.items()
        for part in ("data", "indices", "indptr")
    }
    for name, mask in (present or {}).items():
        batch[f"{name}/present"] = torch.from_numpy(mask.astype(np.float32))
    return batch


def build(counts, present=None, sensitivity=1.0, **settings):
    torch.manual_seed(0)
    modalities = {
        name: ModalityConfig(
            n_vars=matrix.shape[1], n_hidden=12, n_latent=4, background="free", sensitivity=sensitivity
        )
        for name, matrix in counts.items()
    }
    module = RegularizedVAE(VAEConfig(modalities=modalities, dropout=0.0, **settings))
    start_from_data(module, counts, {}, present or {}, np.arange(N))
    for encoder in module.encoders:
        # z depends on the cell, as after training.
        encoder.output.reset_parameters()
    return module


def minimise(closure, *parameters):
    optimiser = torch.optim.LBFGS(parameters, max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    optimiser.step(step)


# Values.


def z_config(**settings):
    return VAEConfig(modalities={"rna": ModalityConfig(n_vars=5, n_latent=4)}, **settings)


def test_penalties_of_z_are_their_densities_where_a_cell_has_the_modality():
    z = torch.tensor([[0.5, -1.0, 2.0, 0.3], [-0.2, 0.7, 0.1, -3.0]], dtype=torch.float64)
    present = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    config = z_config(z_sparsity=0.8, z_horseshoe=0.3)
    found = dict(penalties_of_z(config, z, present))
    magnitudes = stats.gamma(0.2).logpdf(z.abs())
    expected = [-magnitudes[0].sum(), -magnitudes[1, :2].sum()]
    np.testing.assert_allclose(found["z_sparsity"], expected, atol=1e-2)
    each = horseshoe(z, 0.3)
    torch.testing.assert_close(found["z_horseshoe"], -torch.stack([each[0].sum(), each[1, :2].sum()]))
    whole = dict(penalties_of_z(config, z, None))
    torch.testing.assert_close(whole["z_sparsity"], -sparse_gamma(z, 0.2).sum(dim=1))
    assert not dict(penalties_of_z(z_config(), z, None))


def test_penalty_of_hidden_is_the_gamma_of_what_is_well_above_its_floor():
    hidden = torch.tensor([[3.0, 5.0], [10.0, 4.0]])
    expected = -stats.gamma(0.5).logpdf(hidden).sum(axis=1)
    np.testing.assert_allclose(penalty_of_hidden(1.0, hidden), expected, rtol=0.02)
    at_zero = torch.zeros(1, 3, requires_grad=True)
    penalty_of_hidden(1.0, at_zero).sum().backward()
    assert not at_zero.grad.any()


def test_mask_of_dimensions_follows_the_modalities():
    has = torch.tensor([1.0, 0.0])
    found = dimensions_present({"a": 1, "b": 2}, {"a": None, "b": has})
    np.testing.assert_array_equal(found, [[1, 1, 1], [1, 0, 0]])
    assert dimensions_present({"a": 1, "b": 2}, {"a": None, "b": None}) is None


# Optima without data.


@pytest.mark.parametrize("concentration", [0.05, 0.2, 1.0])
def test_without_data_a_sparse_z_settles_where_normal_and_gamma_balance(concentration):
    log_s = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    draws = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)

    def loss():
        s = log_s.exp()
        kl = normal_kl(torch.zeros(1, dtype=torch.float64), s.square()[None])
        config = z_config(z_sparsity=4 * concentration)
        ((_, penalty),) = penalties_of_z(config, (s * torch.from_numpy(draws)).reshape(-1, 4), None)
        return kl + penalty.mean() / 4

    minimise(loss, log_s)

    def by_hand(log_s):
        magnitude = np.hypot(np.exp(log_s) * draws, 0.01)
        return np.exp(2 * log_s) / 2 - log_s - stats.gamma(concentration).logpdf(magnitude).mean()

    expected = np.exp(optimize.minimize_scalar(by_hand, bounds=(-6, 1), method="bounded").x)
    assert log_s.exp().item() == pytest.approx(expected, rel=1e-4)
    # Without the floor: the root of s^2 + s E|t| = concentration, t a standard normal variable.
    slope = math.sqrt(2 / math.pi)
    root = (math.sqrt(slope**2 + 4 * concentration) - slope) / 2
    assert root < log_s.exp().item() < root + 0.1


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_relevance_of_an_unneeded_dimension_settles_at_its_scale(scale):
    part = Relevance(3, scale).double()
    minimise(part.penalty, *part.parameters())
    np.testing.assert_allclose(part.variance().detach().sqrt(), scale, rtol=1e-5)


def test_relevance_of_a_dimension_with_content_is_its_mean_square():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5000, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 0.1])
    variance = torch.full((5000, 2), 0.04, dtype=torch.float64)
    part = Relevance(2, 0.1).double()
    minimise(lambda: normal_kl(mean, variance, 0.0, part.variance()).sum() + part.penalty(), *part.parameters())
    np.testing.assert_allclose(part.variance().detach(), (mean.square() + variance).mean(dim=0), rtol=2e-3)


@pytest.mark.parametrize("sensitivity", [0.2, 1.0, 5.0])
def test_modality_scaling_alone_settles_at_the_sensitivity(sensitivity):
    library = build({"rna": counts_of()}, sensitivity=sensitivity, modality_scaling=True).modality("rna").library
    prior = stats.gamma(5, scale=sensitivity / 5)

    def negative_log_density(log_scale):
        # Of the logarithm of the scale s: p(s) s, with s measured against the sensitivity in both.
        s = sensitivity * math.exp(log_scale)
        return -prior.logpdf(s) - math.log(s)

    for log_scale in (-1.5, 0.3, 2.0):
        with torch.no_grad():
            library.log_scale.fill_(log_scale)
        assert library.scale_penalty().item() == pytest.approx(negative_log_density(log_scale), rel=1e-5)
    minimise(library.scale_penalty, library.log_scale)
    assert library.log_scale.item() == pytest.approx(0, abs=1e-3)


# In the loss.


def losses(counts, present=None, kl_weight=1.0, n_obs=500, module=None, **settings):
    module = build(counts, present, **settings) if module is None else module
    torch.manual_seed(1)
    return module.loss(batch_of(counts, present), kl_weight=kl_weight, n_obs=n_obs)


LOCAL = [("z_sparsity", 1.0), ("z_horseshoe", 0.1), ("hidden_sparsity", 2.0)]
GLOBAL = [("ard", 0.1), ("decoder_weight_l1", 0.5), ("modality_scaling", True)]
TERMS = {"decoder_weight_l1": "decoder_l1"}


@pytest.mark.parametrize(("option", "value"), LOCAL + GLOBAL, ids=[name for name, _ in LOCAL + GLOBAL])
def test_an_option_adds_its_term_and_nothing_else(option, value):
    counts = {"rna": counts_of()}
    plain, found = losses(counts, kl_weight=0.3), losses(counts, kl_weight=0.3, **{option: value})
    term = TERMS.get(option, option)
    assert set(found.terms) == {*plain.terms, term}
    local = option in dict(LOCAL)
    added = (0.3 if local else 1.0) * found.terms[term].item() / N
    assert added != 0
    assert found.total.item() - plain.total.item() == pytest.approx(added, rel=1e-3, abs=3e-5)
    by_cell = (found.per_cell - plain.per_cell).mean().item()
    assert by_cell == pytest.approx(added if local else 0.0, rel=1e-3, abs=3e-5)
    half = {"rna": counts["rna"][: N // 2]}
    module = build(counts, **{option: value})
    if not local:
        part = losses(half, module=module).terms[term].item() / (N // 2)
        assert part == pytest.approx(found.terms[term].item() / N, rel=1e-5)


@pytest.mark.parametrize("option", ["decoder_weight_l1", "decoder_weight_l2"])
def test_weights_of_all_layers_and_categories_are_penalised_and_nothing_else(option):
    torch.manual_seed(0)
    rna = ModalityConfig(n_vars=9, n_hidden=7, n_latent=3, n_layers=2)
    settings = {"decoder_weight_l1": 0.0, "decoder_weight_l2": 0.0, option: 0.5}
    settings |= {"categories": {"batch": 4, "plate": 2}, "conditioning": ("batch", "plate")}
    module = RegularizedVAE(VAEConfig(modalities={"rna": rna}, **settings))
    part = module.modality("rna")
    penalty = dict(part.penalties(module.config))[option.replace("_weight", "")]
    penalty.backward()
    total = 0.0
    for name, parameter in part.named_parameters():
        own = name.startswith("decoder.") and parameter.ndim > 1
        # The last layer's squares are penalised with the likelihood.
        if not (own or (name == "output.weight" and option == "decoder_weight_l1")):
            assert parameter.grad is None, name
            continue
        weight = parameter.detach()
        total += (weight.abs() if option == "decoder_weight_l1" else weight.square()).sum().item()
        expected = weight.sign() if option == "decoder_weight_l1" else 2 * weight
        torch.testing.assert_close(parameter.grad, 0.5 * expected, msg=name)
    assert penalty.item() == pytest.approx(0.5 * total, rel=1e-6)


@pytest.mark.parametrize("option", [dict(LOCAL), dict(GLOBAL)], ids=["local", "global"])
def test_cell_without_a_modality_contributes_nothing(option):
    counts = {"atac": counts_of(30, 1), "rna": counts_of()}
    has = np.arange(N) % 3 > 0
    blank = counts["atac"].tolil()
    blank[~has] = 0
    module = build(counts, {"atac": has}, **option)
    if module.relevance is not None:
        with torch.no_grad():
            module.relevance.log_precision.copy_(torch.arange(8.0) / 4)
    each = [
        losses(other, {"atac": has}, module=module) for other in (counts, {"atac": blank.tocsr(), "rna": counts["rna"]})
    ]
    for term, value in each[0].terms.items():
        assert each[1].terms[term].item() == pytest.approx(value.item(), rel=1e-6), term
    batch = batch_of(counts, {"atac": has})
    latent = module.encode(module.rows(batch), batch)
    expected = torch.ones(4) if module.relevance is None else module.relevance.variance()[:4]
    np.testing.assert_array_equal(latent.variance[~has, :4].detach(), expected.detach().expand((~has).sum(), 4))


def test_learned_scale_multiplies_what_is_expected():
    counts = {"rna": counts_of()}
    module = build(counts, modality_scaling=True).eval()
    batch = batch_of(counts)
    rows = module.rows(batch)["rna"]
    before = module.library("rna", rows, batch)
    with torch.no_grad():
        module.modality("rna").library.log_scale.fill_(math.log(3))
    after = module.library("rna", rows, batch)
    torch.testing.assert_close(after.mean, before.mean + math.log(3))
    torch.testing.assert_close(normal_kl(*after), normal_kl(*before), rtol=1e-4, atol=1e-5)


def test_learned_scales_and_precisions_learn_as_global_parameters():
    module = build({"rna": counts_of()}, modality_scaling=True, ard=0.1)
    assert {"relevance.log_precision", "modalities.0.library.log_scale"} <= module.global_parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"z_sparsity": 0}, "z_sparsity=0 has to be above 0 and at most 4"),
        ({"z_sparsity": 5}, "z_sparsity=5 has to be above 0 and at most 4"),
        ({"hidden_sparsity": 13}, "hidden_sparsity=13 has to be above 0 and at most 12"),
        ({"z_horseshoe": 0.0}, "z_horseshoe=0.0 has to be above 0"),
        ({"ard": -1.0}, "ard=-1.0 has to be above 0"),
        ({"decoder_weight_l1": -0.1}, "decoder_weight_l1=-0.1 has to be at least 0"),
        ({"dispersion_start": 1.0}, "dispersion_start=1.0 has to be a share"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        build({"rna": counts_of()}, **settings)


# Trained.


def adata_of(n_vars=N_GENES, prefix="g", seed=0):
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N)])
    return ad.AnnData(counts_of(n_vars, seed), obs=obs, var=pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)]))


def trained(max_epochs=40, kl_warmup=1 / 3, **settings):
    adata = adata_of()
    AmbientRegularizedSCVI.setup_anndata(adata)
    model = AmbientRegularizedSCVI(adata, n_hidden=24, n_latent=6, background=False, **settings)
    return model.train(
        max_epochs=max_epochs, batch_size=60, lr=5e-3, train_size=1.0, early_stopping=False, kl_warmup=kl_warmup
    )


def state(model):
    """Draws of z, its posterior, and the activations of the decoder's last hidden layer."""
    batch = next(iter(model._cells().loader(batch_size=N)))
    with torch.no_grad():
        latent = model.module.encode(model.module.rows(batch), batch)
        torch.manual_seed(0)
        z = torch.cat([latent.sample() for _ in range(10)])
        return z, latent, model.module.modality("rna").features(latent.mean, batch)


def reconstruction(model):
    return model.history_["reconstruction_loss_train"].iloc[-1, 0]


@pytest.fixture(scope="module")
def plain():
    return trained()


def near_zero(values, of=0.1):
    return (values.abs() < of).float().mean().item()


@pytest.mark.parametrize("option", [{"z_sparsity": 0.6}, {"z_horseshoe": 0.05}], ids=lambda option: next(iter(option)))
def test_sparsity_of_z_brings_more_of_it_near_zero(plain, option):
    model = trained(**option)
    assert near_zero(state(plain)[0]) < 0.12
    assert near_zero(state(model)[0]) > 0.25
    # Cell types are still told apart.
    assert reconstruction(model) < reconstruction(plain) + 4


def test_hidden_sparsity_leaves_few_activations(plain):
    # So strong a penalty holds z at its prior, where it starts, for long.
    model = trained(hidden_sparsity=3.0, max_epochs=120)
    shares = [near_zero(state(one)[2]) for one in (plain, model)]
    assert shares[0] < 0.75
    assert 0.85 < shares[1] < 1
    assert reconstruction(model) < reconstruction(plain) + 6


def test_ard_shrinks_the_dimensions_that_are_not_needed():
    model = trained(max_epochs=160, ard=0.1)
    _, latent, _ = state(model)
    prior = model.module.relevance.variance().detach()
    content = latent.mean.var(dim=0) / (latent.mean.square() + latent.variance).mean(dim=0)
    needed = content > 0.3
    assert 0 < needed.sum() < 6
    assert prior[needed].min() > 3 * prior[~needed].max()
    assert prior[~needed].max() < 0.5
    assert latent.variance[:, ~needed].max() < 0.6


def test_decoder_l1_brings_weights_to_zero(plain):
    def share(model):
        part = model.module.modality("rna")
        return near_zero(torch.cat([part.output.weight.flatten(), part.decoder.dense.weight.flatten()]), 1e-2)

    model = trained(decoder_weight_l1=10.0, max_epochs=120)
    assert share(model) > 3 * share(plain)
    assert reconstruction(model) < reconstruction(plain) + 4


OPTIONS = {
    **dict(LOCAL),
    **dict(GLOBAL),
    "dispersion_start": 0.9,
}


@pytest.fixture(scope="module")
def mdata():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.MuData({"gex": adata_of(), "peaks": adata_of(30, "p", 1)})


@pytest.mark.parametrize("which", ["rna", "joint"])
def test_both_models_take_every_option_log_its_terms_and_are_stored_with_it(which, mdata, tmp_path):
    if which == "rna":
        adata = adata_of()
        AmbientRegularizedSCVI.setup_anndata(adata)
        model = AmbientRegularizedSCVI(adata, **SMALL, **OPTIONS)
    else:
        RegularizedMultimodalVI.setup_mudata(mdata)
        model = RegularizedMultimodalVI(mdata, **JOINT, **OPTIONS)
    model.train(max_epochs=2)
    ends = [""] if which == "rna" else ["_gex", "_peaks"]
    terms = ["z_sparsity", "z_horseshoe", "ard"]
    terms += [term + end for term in ("hidden_sparsity", "decoder_l1", "modality_scaling") for end in ends]
    for term in terms:
        for split in ("train", "validation"):
            assert np.isfinite(model.history_[f"{term}_{split}"].to_numpy()).all()
    loaded = type(model).load(tmp_path / "model", model.adata) if model.save(tmp_path / "model") is None else None
    assert loaded.module.config == model.module.config
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_marginal_ll(n_mc_samples=30) > loaded.get_elbo()


def test_prior_variances_enter_the_evidence():
    model = trained(max_epochs=2, ard=0.1)
    before = model.get_marginal_ll(n_mc_samples=20), model.get_elbo()
    with torch.no_grad():
        model.module.relevance.log_precision.fill_(math.log(400))
    after = model.get_marginal_ll(n_mc_samples=20), model.get_elbo()
    assert after[0] < before[0] - 1
    assert after[1] < before[1] - 1


# Learning rates.


@pytest.mark.parametrize("latent_mode", ["concatenation", "single_encoder"])
def test_modality_with_a_learning_rate_of_zero_stays_while_the_other_moves(mdata, latent_mode):
    RegularizedMultimodalVI.setup_mudata(mdata)
    model = RegularizedMultimodalVI(mdata, **JOINT, latent_mode=latent_mode)
    start = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.train(max_epochs=2, modality_lr={"peaks": 0.0}, weight_decay=0.1)
    trainable = {name for name, _ in model.module.named_parameters()}
    own = ("modalities.1.", "encoders.1.")
    for name, value in model.module.state_dict().items():
        if name in trainable:
            assert torch.equal(value, start[name]) == name.startswith(own), name
    moved = {name for name in trainable if name.startswith("encoders.0")}
    assert moved


def test_peaks_learn_at_a_fifth_of_the_rate_unless_they_are_given_one(mdata):
    latents = []
    for settings in ({}, {"modality_lr": {"gex": 1e-3, "peaks": 2e-4}}, {"modality_lr": {"peaks": 1e-3}}):
        RegularizedMultimodalVI.setup_mudata(mdata)
        model = RegularizedMultimodalVI(mdata, **JOINT).train(max_epochs=2, **settings)
        latents.append(model.get_latent_representation())
    np.testing.assert_array_equal(latents[0], latents[1])
    assert not np.allclose(latents[0], latents[2], rtol=1e-2)


def test_learning_rate_of_an_unknown_modality_is_refused(mdata):
    RegularizedMultimodalVI.setup_mudata(mdata)
    model = RegularizedMultimodalVI(mdata, **JOINT)
    with pytest.raises(MissingKeyError, match="protein"):
        model.train(max_epochs=1, modality_lr={"protein": 1e-3})
    with pytest.raises(InvalidArgumentError, match=r"modality_lr\['gex'\]"):
        model.train(max_epochs=1, modality_lr={"gex": -1.0})
