"""The fused output layer against distributions of scipy, autograd through torch.distributions, and itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

import cellstill.nn.fused as fused
import cellstill.nn.output as output
from cellstill.errors import InvalidArgumentError
from cellstill.nn.compiled import compiled
from cellstill.nn.output import negative_binomial_output
from cellstill.nn.sparse import CSRRows

NAMES = ("hidden", "weight", "bias", "log_size", "theta")


def rows(counts) -> CSRRows:
    counts = sp.csr_matrix(counts, dtype=np.float32)
    return CSRRows(*(torch.from_numpy(part) for part in (counts.data, counts.indices, counts.indptr)), counts.shape[1])


def make(n=37, n_vars=53, n_hidden=8, n_groups=1, seed=0):
    """Counts drawn from the model itself, and its parameters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    hidden, weight, bias = normal(n, n_hidden), normal(n_vars, n_hidden, scale=0.5), normal(n_vars)
    log_size = normal(n, scale=0.5) + math.log(n_vars)
    theta = normal(n_groups, n_vars).exp()
    group = torch.arange(n) % n_groups
    mean = means(hidden, weight, bias, log_size).double()
    theta_of_cells = theta[group].double().numpy()
    counts = np.random.default_rng(seed).negative_binomial(
        theta_of_cells, theta_of_cells / (theta_of_cells + mean.numpy())
    )
    return counts, (hidden, weight, bias, log_size, theta[0] if n_groups == 1 else theta), group


def means(hidden, weight, bias, log_size):
    return log_size.exp()[:, None] * torch.softmax(hidden @ weight.T + bias, dim=1)


def reference(counts, parameters, group, cell_weight):
    """Values and gradients by autograd, in float64, with the whole array of means."""
    parameters = [p.double().clone().requires_grad_() for p in parameters]
    mean = means(*parameters[:4])
    theta = parameters[4] if parameters[4].ndim == 1 else parameters[4][group]
    x = torch.from_numpy(np.asarray(counts, dtype=np.float64))
    terms = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    terms = terms + theta * (theta / (theta + mean)).log() + torch.special.xlogy(x, mean / (theta + mean))
    value = terms.sum(dim=1)
    (value @ cell_weight.double()).backward()
    if mean.min() > 1e-6 * theta.max():  # below, the 1 - p that scipy takes loses the mean
        size, dispersion = mean.detach().numpy(), theta.detach().expand(mean.shape).numpy()
        by_scipy = scipy.stats.nbinom.logpmf(counts, dispersion, dispersion / (dispersion + size)).sum(axis=1)
        np.testing.assert_allclose(value.detach(), by_scipy, rtol=1e-7)
    return value.detach().numpy(), [p.grad for p in parameters]


def evaluate(counts, parameters, group, cell_weight, scale=1.0):
    parameters = [p.clone().requires_grad_() for p in parameters]
    chosen = None if parameters[4].ndim == 1 else group
    total, value = negative_binomial_output(
        *parameters[:3],
        rows(counts),
        parameters[3],
        parameters[4],
        group=chosen,
        cell_weight=cell_weight,
    )
    (scale * total).backward()
    return total.detach(), value, [p.grad for p in parameters]


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


@pytest.mark.parametrize("n_groups", [1, 3], ids=["theta_per_gene", "theta_per_gene_and_group"])
def test_values_and_gradients_are_those_of_the_distribution(n_groups):
    counts, parameters, group = make(n_groups=n_groups)
    cell_weight = torch.linspace(0.1, 2, len(counts))
    expected, grads = reference(counts, parameters, group, cell_weight)
    total, value, found = evaluate(counts, parameters, group, cell_weight)
    np.testing.assert_allclose(value, expected, rtol=5e-6)  # terms of lgamma(x) round by 1e-5
    assert float(total) == pytest.approx(float(expected @ cell_weight.double().numpy()), rel=5e-6)
    for name, grad, true in zip(NAMES, found, grads, strict=True):
        np.testing.assert_allclose(grad, true, rtol=1e-4, atol=2e-6 * float(true.abs().max()), err_msg=name)


def test_blocks_of_cells_do_not_matter(monkeypatch):
    counts, parameters, group = make(n=40)
    ones = torch.ones(40)
    whole = evaluate(counts, parameters, group, ones)
    for size in (1, 53 * 7, 53 * 39):
        monkeypatch.setitem(fused._BLOCK, "cpu", size)
        monkeypatch.setattr(output, "_CACHED", max(1, size // 2))
        total, value, grads = evaluate(counts, parameters, group, ones)
        np.testing.assert_allclose(total, whole[0], rtol=1e-6)
        np.testing.assert_allclose(value, whole[1], rtol=1e-5)
        for name, grad, other in zip(NAMES, grads, whole[2], strict=True):
            np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), err_msg=name)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_share_the_cells(monkeypatch, n_threads):
    counts, parameters, group = make(n=41, n_groups=2)
    ones = torch.ones(41)
    alone = evaluate(counts, parameters, group, ones)
    monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        shared = evaluate(counts, parameters, group, ones)
        again = evaluate(counts, parameters, group, ones)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(shared[1], alone[1], rtol=1e-6)
    for name, grad, other, same in zip(NAMES, shared[2], alone[2], again[2], strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), err_msg=name)
        np.testing.assert_array_equal(grad, same, err_msg=name)


@pytest.mark.parametrize("theta", [1e-4, 1e-2, 1.0, 1e3, 1e6, 1e8])
@pytest.mark.parametrize("log_mean", [-27.0, -5.0, 0.0, 5.0, 10.0])
def test_extreme_means_and_dispersions(log_mean, theta):
    """Two genes of equal mean, counts of 0 to 3,000."""
    counts = np.array([[0, 1], [2, 10], [300, 0], [3000, 3000]])
    log_size = torch.full((4,), log_mean + math.log(2))
    zero = torch.zeros
    parameters = zero(4, 1), zero(2, 1), zero(2), log_size, torch.full((2,), theta)
    expected, grads = reference(counts, parameters, None, torch.ones(4))
    _, value, found = evaluate(counts, parameters, None, torch.ones(4))
    # A count far from its mean is a sum of terms as large as x log(mean / x).
    np.testing.assert_allclose(value, expected, rtol=3e-6, atol=3e-6 * 3000 * 10)
    for name, grad, true in zip(NAMES, found, grads, strict=True):
        if name == "theta":
            # Towards Poisson its gradient vanishes against terms as large as x / theta.
            np.testing.assert_allclose(grad * theta, true * theta, rtol=1e-4, atol=3e-6 * 6000, err_msg=name)
        else:
            np.testing.assert_allclose(grad, true, rtol=1e-4, atol=1e-6 * 6000, err_msg=name)


def test_explicit_zeros_and_empty_cells():
    counts, parameters, group = make(n=5)
    counts[2] = 0
    stored = sp.coo_matrix(counts, dtype=np.float32)
    empty = np.argwhere(counts == 0)[::3].T
    positions = np.hstack([[stored.row, stored.col], empty])
    values = np.concatenate([stored.data, np.zeros(empty.shape[1])])
    explicit = sp.csr_matrix((values, positions), shape=stored.shape)
    assert explicit.nnz > stored.nnz
    first = evaluate(stored, parameters, group, torch.ones(5))
    second = evaluate(explicit, parameters, group, torch.ones(5))
    np.testing.assert_allclose(first[1], second[1], rtol=1e-6)
    for grad, other in zip(first[2], second[2], strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-6)


def test_the_outer_gradient_scales_all_gradients():
    counts, parameters, group = make()
    one = evaluate(counts, parameters, group, torch.ones(37))
    third = evaluate(counts, parameters, group, torch.ones(37), scale=1 / 3)
    for grad, other in zip(one[2], third[2], strict=True):
        np.testing.assert_allclose(grad / 3, other, rtol=1e-6, atol=1e-7)


def test_the_total_scales_itself_and_takes_totals_as_sizes():
    counts, (hidden, weight, bias, _, theta), _ = make()
    x, cell_weight = rows(counts), torch.linspace(0.1, 2, 37)
    found = {}
    for scale, log_size in ((1.0, x.library_size().log()), (-1 / 37, None)):
        leaves = [part.clone().requires_grad_() for part in (hidden, weight, bias, theta)]
        total, value = negative_binomial_output(
            *(*leaves[:3], x, log_size, leaves[3]), cell_weight=cell_weight, scale=scale
        )
        # As a term of the loss, whose gradients nothing multiplies.
        (total + leaves[0].sum() * 0).backward()
        found[scale] = [total.detach(), *(leaf.grad for leaf in leaves)], value
    torch.testing.assert_close(found[1.0][1], found[-1 / 37][1])
    for one, scaled in zip(found[1.0][0], found[-1 / 37][0], strict=True):
        torch.testing.assert_close(scaled, -one / 37, rtol=1e-5, atol=1e-6)


def test_an_empty_cell_whose_size_is_its_total_harms_no_gradient():
    counts, (hidden, weight, bias, _, theta), _ = make(n=6)
    counts[2] = 0
    leaves = [part.clone().requires_grad_() for part in (hidden, weight, bias, theta)]
    total, value = negative_binomial_output(*leaves[:3], rows(counts), None, leaves[3])
    total.backward()
    log_size = torch.from_numpy(np.maximum(counts.sum(axis=1), 1)).float().log()
    known = [part.clone().requires_grad_() for part in (hidden, weight, bias, theta)]
    expected, each = negative_binomial_output(*known[:3], rows(counts), log_size, known[3])
    expected.backward()
    torch.testing.assert_close(value, each)
    for leaf, other in zip(leaves, known, strict=True):
        assert leaf.grad.isfinite().all()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_float32_whatever_torch_makes_by_default():
    counts, (hidden, weight, bias, log_size, theta), _ = make(n=5)
    torch.set_default_dtype(torch.float64)
    try:
        found = negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [part.dtype for part in found] == [torch.float32, torch.float32]


def test_sizes_and_dispersions_need_not_lie_in_order():
    counts, (hidden, weight, bias, log_size, theta), group = make(n=8, n_groups=2)
    one = evaluate(counts, (hidden, weight, bias, log_size, theta), group, torch.ones(8))
    both = torch.stack([log_size, log_size], dim=1)
    strided = both.clone()[:, 0], theta.T.contiguous().T
    assert not any(part.is_contiguous() for part in strided)
    leaves = [part.detach().requires_grad_() for part in (hidden.clone(), weight.clone(), bias.clone(), *strided)]
    total, value = negative_binomial_output(*leaves[:3], rows(counts), *leaves[3:], group=group)
    total.backward()
    torch.testing.assert_close(value, one[1])
    for leaf, grad in zip(leaves, one[2], strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused_instead_of_wrong():
    counts, (hidden, weight, bias, log_size, theta), _ = make(n=5)
    hidden.requires_grad_()
    total, _ = negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)
    grad = torch.autograd.grad(total.square(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_what_is_needed_gets_a_gradient():
    counts, (hidden, weight, bias, log_size, theta), _ = make()
    frozen = [weight, bias, log_size, theta]
    hidden.requires_grad_()
    total, value = negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)
    total.backward()
    assert hidden.grad.abs().max() > 0
    assert all(tensor.grad is None for tensor in frozen)
    assert not value.requires_grad
    with torch.no_grad():
        assert not negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)[0].requires_grad


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad):
    counts, (hidden, weight, bias, log_size, theta), _ = make()
    hidden[3, 0] = bad
    _, value = negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)
    finite = torch.isfinite(value)
    assert not finite[3]
    assert finite.sum() == 36


def test_bfloat16_products_stay_close(mode):
    counts, parameters, group = make(n=64, n_vars=200)
    exact = evaluate(counts, parameters, group, torch.ones(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = evaluate(counts, parameters, group, torch.ones(64))
    assert low[0].dtype == torch.float32
    assert float(low[0]) == pytest.approx(float(exact[0]), rel=2e-3)
    for name, grad, other in zip(NAMES, low[2], exact[2], strict=True):
        assert grad.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), other.flatten(), dim=0)
        assert float(cosine) > 0.999, name


def test_gradient_descent_finds_the_dispersion():
    counts, (hidden, weight, bias, log_size, theta), _ = make(n=4000, n_vars=12)
    log_theta = torch.zeros(12, requires_grad=True)
    optimiser = torch.optim.Adam([log_theta], lr=0.05)
    x = rows(counts)
    for _ in range(150):
        optimiser.zero_grad()
        total, _ = negative_binomial_output(hidden, weight, bias, x, log_size, log_theta.exp())
        (-total / 4000).backward()
        optimiser.step()
    np.testing.assert_allclose(log_theta.detach(), theta.log(), atol=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); \(53,\) is needed"),
        ({"hidden": torch.zeros(36, 8)}, r"hidden has shape \(36, 8\); \(37, 8\) is needed"),
        ({"weight": torch.zeros(54, 8)}, r"weight has shape \(54, 8\); \(53, 8\) is needed"),
        ({"log_size": torch.zeros(37, 1)}, r"log_size has shape \(37, 1\); \(37,\) is needed"),
        ({"theta": torch.zeros(2, 53)}, r"theta has shape \(2, 53\); \(1, 53\) is needed"),
        ({"group": torch.zeros(3, dtype=torch.int64)}, r"group has shape \(3,\); \(37,\) is needed"),
    ],
    ids=["bias", "hidden", "weight", "log_size", "theta_without_group", "group"],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    counts, parameters, _ = make()
    arguments = dict(zip(NAMES, parameters, strict=True)) | {"x": rows(counts)} | change
    with pytest.raises(InvalidArgumentError, match=message):
        negative_binomial_output(**arguments)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf], ids=["nan", "negative_nan", "inf"])
@pytest.mark.parametrize("gene", [0, 7, 31, 52])
def test_a_single_logit_that_is_not_finite_shows(bad, gene):
    """In vector instructions as in what is left over."""
    counts, (hidden, weight, bias, log_size, theta), _ = make()
    counts[:, gene] = 0
    bias[gene] = bad
    _, value = negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)
    assert not torch.isfinite(value).any()


def test_gradients_are_used_once():
    counts, parameters, _ = make()
    hidden = parameters[0].clone().requires_grad_()
    total, _ = negative_binomial_output(hidden, *parameters[1:3], rows(counts), *parameters[3:])
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="computed once, and were already used"):
        total.backward()


def test_a_gradient_is_handed_over_without_a_copy():
    counts, parameters, _ = make(n=300, n_vars=400, n_hidden=64)
    weight = parameters[1].clone().requires_grad_()
    total, _ = negative_binomial_output(parameters[0], weight, parameters[2], rows(counts), *parameters[3:])
    at = total.grad_fn.grads[1].data_ptr()
    total.backward()
    assert weight.grad.data_ptr() == at


def test_without_gradients_their_products_are_left_out(monkeypatch):
    counts, (hidden, weight, bias, log_size, theta), _ = make()
    weight.requires_grad_()
    n_products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args: n_products.append(1) or mm(*args))
    with torch.no_grad():
        without = negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)[1]
    assert len(n_products) == 1
    torch.testing.assert_close(
        without, negative_binomial_output(hidden, weight, bias, rows(counts), log_size, theta)[1]
    )
    assert len(n_products) == 3
