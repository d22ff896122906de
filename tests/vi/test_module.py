"""The torch module: its terms against their definitions, cells that lack a modality, names and order of genes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.errors import InvalidArgumentError
from cellstill.nn.compiled import compiled
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.networks import Trunk
from cellstill.vi.start import start_from_data

N = 60


def counts_of(n_vars, seed=0, mean=2.0):
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, mean / 0.5, n_vars) * rng.lognormal(0, 0.5, (N, 1))
    counts = rng.poisson(rates)
    counts[counts.sum(axis=1) == 0, 0] = 1
    return sp.csr_matrix(counts, dtype=np.float32)


def batch_of(counts, codes=None, present=None, continuous=None):
    batch = {}
    for name, matrix in counts.items():
        for part in ("data", "indices", "indptr"):
            batch[f"{name}/{part}"] = torch.from_numpy(getattr(matrix, part))
    for name, mask in (present or {}).items():
        batch[f"{name}/present"] = torch.from_numpy(mask.astype(np.float32))
    batch.update({column: torch.from_numpy(values) for column, values in (codes or {}).items()})
    if continuous is not None:
        batch["continuous"] = torch.from_numpy(continuous.astype(np.float32))
    return batch


def small(n_vars, **settings):
    return ModalityConfig(**{"n_vars": n_vars, "n_hidden": 12, "n_latent": 4, "background": "free", **settings})


def build(config, counts, codes=None, present=None, seed=0, ambient_rate=None, at_start=False):
    """Build a module; but for ``at_start``, z depends on the cell, as after training."""
    torch.manual_seed(seed)
    module = RegularizedVAE(config)
    rates = dict.fromkeys(counts, ambient_rate)
    start_from_data(module, counts, codes or {}, present or {}, np.arange(N), ambient_rates=rates)
    if not at_start:
        for encoder in module.encoders:
            encoder.output.reset_parameters()
    return module


def predicted_totals(module, counts, codes):
    """Expected totals of cells at the posterior means, and their library sizes."""
    batch = batch_of({"rna": counts}, codes)
    with torch.no_grad():
        rows = module.rows(batch)
        part = module.modality("rna")
        log_size = module.library("rna", rows["rna"], batch).mean
        expression = part.native(module.encode(rows, batch).mean, batch)
        background = module.background_of("rna", rows["rna"], batch, log_size)
        expression = expression if background is None else expression + background
        return (log_size.exp() * expression).sum(dim=1).numpy(), log_size.exp()


@pytest.fixture
def codes():
    rng = np.random.default_rng(1)
    return {"lane": rng.integers(0, 3, N), "site.x": rng.integers(0, 2, N)}


@pytest.mark.parametrize("sensitivity", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("background", ["free", "profile", None])
def test_predicted_totals_match_observed_totals_at_the_start(sensitivity, background, codes):
    counts = {"rna": counts_of(80)}
    config = VAEConfig(
        modalities={"rna": small(80, sensitivity=sensitivity, background=background)},
        categories={"lane": 3},
        ambient=("lane",),
        library="lane",
    )
    rate = 0.15 if background == "profile" else None
    module = build(config, counts, codes, ambient_rate=rate, at_start=True).eval()
    predicted, size = predicted_totals(module, counts["rna"], codes)
    observed = np.asarray(counts["rna"].sum(axis=1)).ravel()
    np.testing.assert_allclose(predicted, observed, rtol=0.05)
    assert size.median().item() == pytest.approx(sensitivity, rel=0.2)


@pytest.mark.parametrize("sensitivity", [0.2, 5.0])
@pytest.mark.parametrize("background", ["free", "profile", None])
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_predicted_counts_match_in_sum_where_totals_do_not_enter_library_sizes(spread, background, sensitivity, codes):
    rng = np.random.default_rng(4)
    rates = rng.gamma(0.5, 40.0, 80) * rng.lognormal(0, spread, (N, 1))
    counts = sp.csr_matrix(rng.poisson(rates), dtype=np.float32)
    config = VAEConfig(
        modalities={"rna": small(80, sensitivity=sensitivity, background=background)},
        categories={"lane": 3},
        ambient=("lane",),
        library="lane",
        residual_library=False,
    )
    rate = 0.15 if background == "profile" else None
    module = build(config, {"rna": counts}, codes, ambient_rate=rate, at_start=True).eval()
    predicted, size = predicted_totals(module, counts, codes)
    assert predicted.sum() == pytest.approx(counts.sum(), rel=0.05)
    np.testing.assert_allclose(size, sensitivity, rtol=1e-5)


@pytest.mark.parametrize("sensitivity", [0.2, 1.0, 5.0])
def test_sensitivity_leaves_the_library_prior_where_the_posterior_starts(sensitivity, codes):
    counts = {"rna": counts_of(80)}
    config = VAEConfig(modalities={"rna": small(80, sensitivity=sensitivity)}, categories={"lane": 3}, library="lane")
    module = build(config, counts, codes).eval()
    batch = batch_of(counts, codes)
    library = module.library("rna", module.rows(batch)["rna"], batch)
    totals = np.log(np.asarray(counts["rna"].sum(axis=1)).ravel())
    for lane in range(3):
        own = codes["lane"] == lane
        expected = totals[own].mean() - totals.mean() + math.log(sensitivity)
        np.testing.assert_allclose(library.prior_mean[own].detach(), expected, rtol=1e-4, atol=1e-5)
        assert library.mean[own].mean().item() == pytest.approx(expected, abs=1e-4)
        np.testing.assert_allclose(library.prior_variance[own].detach(), 0.5 * totals[own].var(), rtol=1e-4)


def test_loss_is_the_sum_of_its_terms(codes):
    counts = {"rna": counts_of(40)}
    config = VAEConfig(
        modalities={"rna": small(40, feature_scaling=True)},
        categories={"lane": 3, "site.x": 2},
        ambient=("lane", "site.x"),
        conditioning=("lane",),
        feature_scaling=("site.x",),
        dispersion="lane",
        library="lane",
        regularise_background=True,
    )
    module = build(config, counts, codes)
    loss = module.loss(batch_of(counts, codes), kl_weight=0.3, n_obs=100)
    assert set(loss.terms) == {
        *("reconstruction_loss", "kl_z", "kl_l", "dispersion", "background", "feature_scaling", "library_weight"),
        "decoder_l2",
    }
    terms = {name: value.item() / N for name, value in loss.terms.items()}
    assert loss.total.item() == pytest.approx(sum(terms.values()) - 0.7 * terms["kl_z"], rel=1e-5)
    expected = terms["reconstruction_loss"] + 0.3 * terms["kl_z"] + terms["kl_l"]
    assert loss.per_cell.mean().item() == pytest.approx(expected, rel=1e-5)


def test_global_penalties_do_not_depend_on_the_minibatch(codes):
    counts = {"rna": counts_of(40)}
    config = VAEConfig(modalities={"rna": small(40)}, categories={"lane": 3}, ambient=("lane",))
    module = build(config, counts, codes)
    half = {"rna": counts["rna"][: N // 2]}
    whole = module.loss(batch_of(counts, codes), n_obs=1000)
    part = module.loss(batch_of(half, {k: v[: N // 2] for k, v in codes.items()}), n_obs=1000)
    per_cell = whole.terms["dispersion"].item() / N
    assert part.terms["dispersion"].item() / (N // 2) == pytest.approx(per_cell, rel=1e-6)
    assert per_cell == pytest.approx(module.modality("rna").dispersion.penalty().item() / 1000, rel=1e-6)


@pytest.mark.parametrize("n_obs", [None, N - 1], ids=["missing", "below_the_minibatch"])
def test_number_of_training_cells_is_needed(n_obs):
    counts = {"rna": counts_of(20)}
    module = build(VAEConfig(modalities={"rna": small(20)}), counts)
    with pytest.raises(InvalidArgumentError, match="number of training cells"):
        module.loss(batch_of(counts), n_obs=n_obs)
    if n_obs is not None:
        assert module.loss(batch_of(counts), n_obs=n_obs, skip_n_obs_check=True).n == N


@pytest.mark.parametrize("recorded", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize(
    ("several", "settings"),
    [
        pytest.param(False, {"encoder_input": "log1p", "residual_library": False}, id="plain"),
        pytest.param(False, {"decoder_weight_l1": 0.01, "z_sparsity": 2.0, "hidden_sparsity": 4.0}, id="penalties"),
        pytest.param(False, {"theta_sampling": "cell", "regularise_background": True}, id="theta_of_cells"),
        pytest.param(True, {"latent_mode": "concatenation", "ard": 0.3}, id="concatenation"),
        pytest.param(True, {"latent_mode": "weighted_mean", "modality_scaling": True}, id="weighted_mean"),
        pytest.param(True, {"latent_mode": "single_encoder", "z_horseshoe": 1.0}, id="single_encoder"),
    ],
)
def test_compiled_loops_give_the_loss_and_the_gradients_of_torch(several, settings, recorded, codes):
    counts = {"rna": counts_of(80)} | ({"atac": counts_of(50, seed=3)} if several else {})
    present = {"atac": np.arange(N) % 3 > 0} if several else {}
    if several:
        counts["atac"] = sp.csr_matrix(sp.diags_array(present["atac"].astype(np.float32)) @ counts["atac"])
    background = "free" if settings.get("regularise_background") else "profile"
    config = VAEConfig(
        modalities={"rna": small(80, background=background, feature_scaling=True)}
        | ({"atac": small(50, background=None)} if several else {}),
        categories={"lane": 3, "site.x": 2},
        ambient=("lane",),
        conditioning=("site.x",),
        feature_scaling=("site.x",),
        dispersion="lane",
        library="lane",
        **settings,
    )
    batch, found = batch_of(counts, codes, present), []
    for mode in (False, True):
        with compiled(mode):
            rate = 0.1 if background == "profile" else None
            module = build(config, counts, codes, present, ambient_rate=rate).train(recorded)
            torch.manual_seed(5)
            with torch.inference_mode(not recorded):
                loss = module.loss(batch, kl_weight=0.7, n_obs=500)
            if recorded:
                loss.total.backward()
        gradients = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
        found.append((loss.total.detach(), loss.per_cell, dict(loss.terms), gradients))
    assert bool(found[0][3]) == recorded
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("latent_mode", ["concatenation", "weighted_mean", "single_encoder"])
def test_all_decoders_see_the_whole_latent(latent_mode):
    counts = {"atac": counts_of(30, 1), "rna": counts_of(20)}
    module = build(VAEConfig(modalities={"atac": small(30), "rna": small(20)}, latent_mode=latent_mode), counts).eval()
    batch = batch_of(counts)
    latent = module.encode(module.rows(batch), batch)
    assert latent.mean.shape == (N, 8 if latent_mode == "concatenation" else 4)
    z = latent.mean.detach().requires_grad_()
    for name in counts:
        grad = torch.autograd.grad(module.modality(name).native(z, batch).sum(), z)[0]
        assert (grad.abs().sum(dim=0) > 0).all()


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("n_latent", [10, 128])
def test_categories_speak_to_the_decoder_as_loudly_as_z_at_the_start(n_latent, columns):
    """Or z learns to tell batches apart long before the decoder does."""
    torch.manual_seed(0)
    categories = {f"key_{i}": 50 for i in range(columns)}
    trunk = Trunk(n_dense=n_latent, categories=categories, widths=[256], dropout=0.0)
    z = torch.randn(500, n_latent)
    of_z = (trunk.dense(z) - trunk.dense.bias).std(dim=0).mean()
    of_categories = sum(shift[torch.randint(50, (500,))] for shift in trunk.shifts).std(dim=0).mean()
    assert of_categories.item() == pytest.approx(of_z.item(), rel=0.1)


@pytest.mark.parametrize("latent_mode", ["concatenation", "single_encoder"])
def test_latent_starts_at_its_prior_and_every_dimension_can_leave_it(latent_mode):
    counts = {"atac": counts_of(30, 1), "rna": counts_of(20)}
    config = VAEConfig(modalities={"atac": small(30), "rna": small(20)}, latent_mode=latent_mode)
    module = build(config, counts, at_start=True)
    batch = batch_of(counts)
    latent = module.encode(module.rows(batch), batch)
    assert not latent.mean.any()
    assert (latent.variance == 1).all()
    assert not latent.kl.any()
    module.loss(batch, n_obs=N).total.backward()
    for encoder in module.encoders:
        assert (encoder.output.weight.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("latent_mode", ["concatenation", "weighted_mean"])
def test_cell_without_a_modality_contributes_nothing_to_it(latent_mode):
    counts = {"atac": counts_of(30, 1), "rna": counts_of(20)}
    has = np.arange(N) % 3 > 0
    present = {"atac": has}
    config = VAEConfig(modalities={"atac": small(30), "rna": small(20)}, latent_mode=latent_mode, dropout=0.0)
    module = build(config, counts, present=present)
    missing = counts["atac"].tolil()
    missing[~has] = 0
    blank = {"atac": missing.tocsr(), "rna": counts["rna"]}

    def gradients(of):
        torch.manual_seed(3)
        module.zero_grad()
        loss = module.loss(batch_of(of, present=present), n_obs=N)
        loss.total.backward()
        return loss, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    loss, grads = gradients(counts)
    without, other = gradients(blank)
    assert loss.total.item() == pytest.approx(without.total.item(), rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(other[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)
    latent = module.encode(module.rows(batch_of(counts, present=present)), batch_of(counts, present=present))
    if latent_mode == "concatenation":
        assert not latent.mean[~has, :4].any()
        np.testing.assert_array_equal(latent.variance[~has, :4].detach(), 1.0)
        assert latent.mean[~has, 4:].all()


def test_renamed_modalities_change_nothing():
    one = {"atac": counts_of(30, 1), "rna": counts_of(20)}
    losses = []
    for names in ({"atac": "atac", "rna": "rna"}, {"atac": "a.peaks", "rna": "b genes"}):
        counts = {names[name]: matrix for name, matrix in one.items()}
        config = VAEConfig(modalities={names["atac"]: small(30), names["rna"]: small(20)})
        module = build(config, counts)
        torch.manual_seed(5)
        losses.append(module.loss(batch_of(counts), n_obs=N).total.item())
    assert losses[0] == losses[1]


def test_permuted_genes_give_the_same_loss(codes):
    counts = {"rna": counts_of(40)}
    config = VAEConfig(
        modalities={"rna": small(40, feature_scaling=True)}, categories={"lane": 3}, ambient=("lane",), dropout=0.0
    )
    module = build(config, counts, codes).eval()
    order = torch.from_numpy(np.random.default_rng(0).permutation(40))
    permuted = build(config, counts, codes).eval()
    state = module.state_dict()
    for name, value in state.items():
        for axis, size in enumerate(value.shape):
            if size == 40:
                state[name] = value.index_select(axis, order)
    permuted.load_state_dict(state)
    moved = counts["rna"][:, order.numpy()]
    moved.sort_indices()
    torch.manual_seed(2)
    expected = module.loss(batch_of(counts, codes), n_obs=N)
    torch.manual_seed(2)
    found = permuted.loss(batch_of({"rna": moved}, codes), n_obs=N)
    np.testing.assert_allclose(found.per_cell, expected.per_cell, rtol=1e-5)


def test_global_parameters_are_those_of_the_data_as_a_whole(codes):
    config = VAEConfig(
        modalities={"rna": small(40, feature_scaling=True)},
        categories={"lane": 3},
        ambient=("lane",),
        dispersion="lane",
    )
    module = build(config, {"rna": counts_of(40)}, codes)
    assert {name.removeprefix("modalities.0.") for name in module.global_parameters} == {
        *("background.beta.tables.0", "scaling.gamma.tables.0", "dispersion.mean", "dispersion.log_sigma"),
        *("dispersion.log_rate", "library.weight.mean", "library.weight.log_sigma"),
    }


def test_evaluation_draws_no_dispersion_and_no_library_weight():
    module = build(VAEConfig(modalities={"rna": small(20)}), {"rna": counts_of(20)})
    part = module.modality("rna")

    def draws():
        return part.dispersion({}, N)[0], part.library.residual_weight()

    for drawn, other in zip(draws(), draws(), strict=True):
        assert not torch.equal(drawn, other)
    module.eval()
    theta, weight = draws()
    torch.testing.assert_close(theta, part.dispersion.mean.exp())
    assert weight.item() == pytest.approx(1.0, abs=1e-6)
