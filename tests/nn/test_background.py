"""Counts with background and scaling: against autograd in float64 on the whole array of means, and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

import cellstill.nn.background as module
import cellstill.nn.fused as fused
from cellstill.errors import InvalidArgumentError
from cellstill.nn.background import NativePenalty, background_output
from cellstill.nn.compiled import compiled
from cellstill.nn.composition import SparseComposition
from cellstill.nn.sparse import CSRRows

N, N_VARS, N_HIDDEN = 37, 53, 8
NAMES = ("hidden", "weight", "bias", "log_size", "theta", "log_background", "log_amount", "log_scaling")


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


def make(n_theta=2, n_background=3, n_scaling=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    parameters = {
        "hidden": normal(N, N_HIDDEN),
        "weight": normal(N_VARS, N_HIDDEN, scale=0.5),
        "bias": normal(N_VARS),
        "log_size": normal(N, scale=0.5),
        "theta": normal(n_theta, N_VARS).exp(),
        "log_background": normal(n_background, N_VARS) - 1,
        "log_amount": normal(N, scale=0.3),
        "log_scaling": normal(n_scaling, N_VARS, scale=0.3),
    }
    groups = {name: torch.arange(N) % len(parameters[name]) for name in ("theta", "log_background", "log_scaling")}
    mean = means({k: v.double() for k, v in parameters.items()}, groups).numpy()
    theta = parameters["theta"][groups["theta"]].double().numpy()
    return np.random.default_rng(seed).negative_binomial(theta, theta / (theta + mean)), parameters, groups


def means(p, groups):
    native = torch.nn.functional.softplus(p["hidden"] @ p["weight"].T + p["bias"])
    if p.get("log_background") is not None:
        added = p["log_background"][groups["log_background"]].exp()
        if p.get("log_amount") is not None:
            added = added * p["log_amount"].exp()[:, None]
        native = native + added
    if p.get("log_scaling") is not None:
        native = native * p["log_scaling"][groups["log_scaling"]].exp()
    return native * p["log_size"].exp()[:, None]


def reference(counts, parameters, groups, cell_weight):
    p = {name: value.double().clone().requires_grad_() for name, value in parameters.items()}
    mean, theta = means(p, groups), p["theta"][groups["theta"]]
    x = torch.from_numpy(counts.astype(np.float64))
    terms = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    terms = terms + theta * (theta / (theta + mean)).log() + torch.special.xlogy(x, mean / (theta + mean))
    (terms.sum(dim=1) @ cell_weight.double()).backward()
    probability = (theta / (theta + mean)).detach().numpy()
    by_scipy = scipy.stats.nbinom.logpmf(counts, theta.detach().numpy(), probability).sum(axis=1)
    np.testing.assert_allclose(terms.sum(dim=1).detach(), by_scipy, rtol=1e-7)
    return by_scipy, {name: value.grad for name, value in p.items()}


def rows(counts) -> CSRRows:
    counts = sp.csr_matrix(counts, dtype=np.float32)
    return CSRRows(*(torch.from_numpy(part) for part in (counts.data, counts.indices, counts.indptr)), counts.shape[1])


def evaluate(counts, parameters, groups, cell_weight=None, scale=1.0):
    p = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    total, value, _ = background_output(
        *(p["hidden"], p["weight"], p["bias"], rows(counts), p["log_size"], p["theta"]),
        group=groups["theta"],
        log_background=p.get("log_background"),
        background_group=groups["log_background"] if "log_background" in p else None,
        log_amount=p.get("log_amount"),
        log_scaling=p.get("log_scaling"),
        scaling_group=groups["log_scaling"] if "log_scaling" in p else None,
        cell_weight=cell_weight,
    )
    (scale * total).backward()
    return total.detach(), value, {name: value.grad for name, value in p.items()}


@pytest.mark.parametrize("n_groups", [1, 3], ids=["one_group", "groups"])
@pytest.mark.parametrize(
    "absent",
    [(), ("log_background", "log_amount"), ("log_amount",), ("log_scaling",)],
    ids=["all_terms", "no_background", "same_amount", "no_scaling"],
)
def test_values_and_gradients_are_those_of_the_distribution(absent, n_groups):
    counts, parameters, groups = make(n_groups, n_groups, n_groups)
    parameters = {name: value for name, value in parameters.items() if name not in absent}
    cell_weight = torch.linspace(0.1, 2, N)
    expected, grads = reference(counts, parameters, groups, cell_weight)
    total, value, found = evaluate(counts, parameters, groups, cell_weight, scale=2.0)
    np.testing.assert_allclose(value, expected, rtol=5e-6)
    assert float(total) == pytest.approx(float(expected @ cell_weight.double().numpy()), rel=5e-6)
    for name, true in grads.items():
        limit = 2e-6 * float(true.abs().max())
        np.testing.assert_allclose(found[name] / 2, true, rtol=1e-4, atol=limit, err_msg=name)


def test_cells_of_no_weight_leave_no_gradient():
    counts, parameters, groups = make()
    weight = torch.ones(N)
    weight[::2] = 0
    other = counts.copy()
    other[::2] = 3
    _, _, grads = evaluate(counts, parameters, groups, weight)
    _, _, changed = evaluate(other, parameters, groups, weight)
    for name in NAMES:
        np.testing.assert_array_equal(grads[name], changed[name], err_msg=name)
    assert not grads["hidden"][::2].any()
    assert grads["hidden"][1::2].any()


def test_blocks_of_cells_do_not_matter(monkeypatch):
    counts, parameters, groups = make()
    _, value, grads = evaluate(counts, parameters, groups)
    for size in (1, 7 * N_VARS, 36 * N_VARS):
        monkeypatch.setitem(fused._BLOCK, "cpu", size)
        monkeypatch.setattr(module, "_CACHED", max(1, size // 2))
        _, again, others = evaluate(counts, parameters, groups)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        for name, grad in grads.items():
            limit = 1e-5 * float(grad.abs().max())
            np.testing.assert_allclose(others[name], grad, rtol=1e-4, atol=limit, err_msg=name)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_share_the_cells(n_threads, monkeypatch):
    counts, parameters, groups = make()
    alone = evaluate(counts, parameters, groups)
    monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    shared = evaluate(counts, parameters, groups)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)


def test_permuted_genes_give_permuted_gradients():
    counts, parameters, groups = make()
    order = np.random.default_rng(1).permutation(N_VARS)
    by_gene = {"weight": 0, "bias": 0, "theta": 1, "log_background": 1, "log_scaling": 1}
    permuted = {
        name: value.index_select(by_gene[name], torch.from_numpy(order)) if name in by_gene else value
        for name, value in parameters.items()
    }
    _, value, grads = evaluate(counts, parameters, groups)
    _, other, found = evaluate(counts[:, order], permuted, groups)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for name, grad in grads.items():
        expected = grad.index_select(by_gene[name], torch.from_numpy(order)) if name in by_gene else grad
        limit = 1e-5 * float(grad.abs().max())
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=limit, err_msg=name)


@pytest.mark.parametrize("where", ["bias", "log_size", "theta", "log_background", "log_scaling"])
def test_what_is_not_finite_shows(where):
    counts, parameters, groups = make()
    parameters[where].view(-1)[3] = torch.nan
    total, _, _ = evaluate(counts, parameters, groups)
    assert not torch.isfinite(total)


@pytest.mark.parametrize("theta", [1e-4, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("log_mean", [-27.0, -5.0, 0.0, 5.0, 10.0])
def test_extreme_means_and_dispersions(log_mean, theta):
    """Two genes of equal mean, counts of 0 to 3,000."""
    counts = np.array([[0, 1], [2, 10], [300, 0], [3000, 3000]])
    zero = torch.zeros
    parameters = {
        "hidden": zero(4, 1),
        "weight": zero(2, 1),
        "bias": zero(2),
        "log_size": torch.full((4,), log_mean - math.log(math.log(2))),
        "theta": torch.full((1, 2), theta),
    }
    _, value, found = evaluate(counts, parameters, {"theta": torch.zeros(4, dtype=torch.int64)})
    x, t = torch.from_numpy(counts).double(), torch.full((4, 2), theta, dtype=torch.float64).requires_grad_()
    logits = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    mean = torch.nn.functional.softplus(logits) * parameters["log_size"].double().exp()[:, None]
    terms = torch.lgamma(x + t) - torch.lgamma(t) - torch.lgamma(x + 1)
    terms = (terms + t * (t / (t + mean)).log() + torch.special.xlogy(x, mean / (t + mean))).sum(dim=1)
    terms.sum().backward()
    # A count far from its mean is a sum of terms as large as x log(mean / x).
    np.testing.assert_allclose(value, terms.detach(), rtol=3e-6, atol=3e-6 * 3000 * 10)
    np.testing.assert_allclose(found["bias"], logits.grad.sum(dim=0), rtol=1e-4, atol=1e-6 * 6000)
    # Towards Poisson its gradient vanishes against terms as large as x / theta.
    np.testing.assert_allclose(found["theta"][0] * theta, t.grad.sum(dim=0) * theta, rtol=1e-4, atol=3e-6 * 6000)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf], ids=["nan", "negative_nan", "inf"])
@pytest.mark.parametrize("gene", [0, N_VARS // 2, N_VARS - 1])
def test_a_single_logit_that_is_not_finite_shows(bad, gene):
    """In vector instructions as in what is left over."""
    counts, parameters, groups = make()
    counts[:, gene] = 0
    parameters["bias"][gene] = bad
    assert not torch.isfinite(evaluate(counts, parameters, groups)[1]).any()


def test_group_of_another_length_is_refused():
    counts, parameters, groups = make()
    with pytest.raises(InvalidArgumentError, match="background_group has shape"):
        evaluate(counts, parameters, {**groups, "log_background": groups["log_background"][:-1]})


@pytest.mark.parametrize("block", [1 << 22, 2 * N_VARS], ids=["one_block", "blocks_of_two_cells"])
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_penalties_are_taken_from_the_total_with_their_gradients(block, scale, monkeypatch):
    monkeypatch.setitem(fused._BLOCK, "cpu", block)
    counts, parameters, groups = make(1, 1, 1)
    cell_weight = torch.linspace(0.0, 2, N)
    _, _, plain = evaluate(counts, parameters, groups, cell_weight)

    prior = SparseComposition(torch.linspace(0.5, 2, N_VARS), 0.4, 0.6, 1e-2)

    p = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    total, _, mean = background_output(
        *(p["hidden"], p["weight"], p["bias"], rows(counts), p["log_size"], p["theta"]),
        log_background=p["log_background"],
        log_amount=p["log_amount"],
        log_scaling=p["log_scaling"],
        cell_weight=cell_weight,
        weight_l2=0.3,
        native_penalty=NativePenalty(prior, 0.7, 3),
        scale=scale,
    )
    likelihood = evaluate(counts, parameters, groups, cell_weight)[0]
    total.backward()
    q = {name: parameters[name].double().clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    native = torch.nn.functional.softplus(q["hidden"][:3] @ q["weight"].T + q["bias"])
    expected = (prior._replace(typical=prior.typical.double()).penalty(native) * cell_weight[:3]).sum() / 3
    penalty = 0.7 * expected + 0.3 * q["weight"].square().sum()
    penalty.backward()
    np.testing.assert_allclose(mean, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(total.detach(), scale * (likelihood - penalty.detach()), rtol=1e-5)
    for name, value in q.items():
        expected = scale * (plain[name] - value.grad)
        np.testing.assert_allclose(p[name].grad, expected, rtol=2e-4, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(p["theta"].grad, scale * plain["theta"], rtol=1e-5, atol=1e-6)
