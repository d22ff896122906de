import functools
import itertools

import mpmath
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from cellstill.errors import InvalidArgumentError
from cellstill.nn import likelihood, stored
from cellstill.nn.likelihood import (
    negative_binomial,
    poisson,
    zero_inflated_negative_binomial,
)
from cellstill.nn.sparse import CSRRows

mpmath.mp.dps = 50

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]

# theta 1e-4 to 1e8 and means 1e-12 to 1e6, exact in float32 and not powers of two, whose quotients are not rounded.
THETA = [1.25 * 2.0**k for k in (*range(-14, 25, 3), 26)]
MEAN = [1.625 * 2.0**k for k in range(-40, 20, 3)]
COUNTS = [0, 1, 2, 5, 100, 10**4, 10**6]
GRID = np.array(list(itertools.product(THETA, MEAN)))


def rows(matrix, dtype=torch.float64):
    """CSR rows with the zeros left out."""
    csr = sp.csr_matrix(np.asarray(matrix, dtype=np.float64))
    return CSRRows(
        torch.tensor(csr.data, dtype=dtype),
        torch.tensor(csr.indices, dtype=torch.int64),
        torch.tensor(csr.indptr, dtype=torch.int64),
        csr.shape[1],
    )


def full_rows(matrix, dtype=torch.float64):
    """CSR rows with every zero stored."""
    n, n_vars = matrix.shape
    data = torch.tensor(np.asarray(matrix, dtype=np.float64).ravel(), dtype=dtype)
    return CSRRows(data, torch.arange(n_vars).repeat(n), torch.arange(n + 1) * n_vars, n_vars)


def case(seed=0, n=7, n_vars=40, dtype=torch.float64):
    """Counts, mean, theta per gene, logits per entry, codes of three groups."""
    rng = np.random.default_rng(seed)
    mean, theta = 10 ** rng.uniform(-1.5, 1.5, (n, n_vars)), 10 ** rng.uniform(-1, 2, n_vars)
    counts = rng.poisson(rng.gamma(theta, mean / theta))
    logits = rng.normal(-1, 2, (n, n_vars))
    group = np.r_[0, 1, 2, rng.integers(0, 3, n - 3)]
    return counts, *[torch.tensor(v, dtype=dtype) for v in (mean, theta, logits)], torch.tensor(group)


def with_gradients(function, *parameters):
    """Value and the gradients of a sum weighted by row, so that no row passes for another."""
    parameters = [p.detach().clone().requires_grad_() for p in parameters]
    value = function(*parameters)
    weights = torch.linspace(0.5, 2, len(value), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), parameters)]


MODELS = {
    "nb": lambda x, mean, theta, logits: with_gradients(lambda *a: negative_binomial(x, *a), mean, theta),
    "zinb": lambda x, mean, theta, logits: with_gradients(
        lambda *a: zero_inflated_negative_binomial(x, *a), mean, theta, logits
    ),
    "poisson": lambda x, mean, theta, logits: with_gradients(lambda *a: poisson(x, *a), mean),
}
EACH_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def assert_all_close(got, expected, rtol):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0)


# Values, against scipy.


def test_negative_binomial_is_scipys_with_theta_per_gene_group_and_entry():
    counts, mean, theta, _, group = case()
    x, by_group = rows(counts), torch.stack([theta, theta * 3, theta / 7])
    for ours, each in [
        (negative_binomial(x, mean, theta), theta),
        (negative_binomial(x, mean, by_group, group=group), by_group[group]),
        (negative_binomial(x, mean, by_group[group]), by_group[group]),
    ]:
        expected = stats.nbinom.logpmf(counts, each, each / (each + mean)).sum(axis=1)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_poisson_is_scipys():
    counts, mean, *_ = case(1)
    np.testing.assert_allclose(poisson(rows(counts), mean), stats.poisson.logpmf(counts, mean).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("by_gene", [False, True], ids=["logits_per_entry", "logits_per_gene"])
def test_zero_inflated_is_a_mixture_of_scipys(by_gene):
    counts, mean, theta, logits, _ = case(2)
    logits = logits[0] if by_gene else logits
    extra = 1 / (1 + np.exp(-logits.numpy()))
    density = (1 - extra) * stats.nbinom.pmf(counts, theta, theta / (theta + mean)) + extra * (counts == 0)
    ours = zero_inflated_negative_binomial(rows(counts), mean, theta, logits)
    np.testing.assert_allclose(ours, np.log(density).sum(axis=1), rtol=1e-12)


def test_agree_with_scvi_tools_where_those_are_accurate():
    from scvi import distributions

    counts, mean, theta, logits, _ = case(3)
    x, dense = rows(counts), torch.tensor(counts, dtype=torch.float64)
    theirs = {
        "nb": distributions.NegativeBinomial(mu=mean, theta=theta),
        "zinb": distributions.ZeroInflatedNegativeBinomial(mu=mean, theta=theta, zi_logits=logits),
        "poisson": distributions.Poisson(mean),
    }
    ours = {
        "nb": negative_binomial(x, mean, theta),
        "zinb": zero_inflated_negative_binomial(x, mean, theta, logits),
        "poisson": poisson(x, mean),
    }
    for name, distribution in theirs.items():
        # They add 1e-8 to means and thetas, of which the smallest here are 0.03 and 0.1.
        np.testing.assert_allclose(ours[name], distribution.log_prob(dense).sum(dim=1), rtol=1e-6, err_msg=name)


# Every entry by itself, against 50 digits, over the whole range of theta, mean and counts.


@functools.cache
def nb_truth(count):
    """Log-probability, derivatives in mean and theta, and the parts that the last is the difference of."""
    result = []
    for theta, mean in GRID:
        x, mu, t = mpmath.mpf(count), mpmath.mpf(mean), mpmath.mpf(theta)
        value = mpmath.loggamma(x + t) - mpmath.loggamma(t) - mpmath.loggamma(x + 1)
        value += x * mpmath.log(mu / (mu + t)) - t * mpmath.log1p(mu / t)
        digammas = mpmath.digamma(x + t) - mpmath.digamma(t)
        d_theta = digammas - mpmath.log1p(mu / t) + (mu - x) / (mu + t)
        parts = [digammas - mpmath.log1p(x / t), (x - mu) / (mu + t) - mpmath.log((x + t) / (mu + t))]
        if count == 1:
            parts = [mu / (t * (mu + t)), mpmath.log1p(mu / t) - mu / (mu + t)]
        result.append((value, t * (x - mu) / (mu * (mu + t)), d_theta, sum(map(abs, parts))))
    return result


def largest_error(got, truth, scale):
    """Largest error in units of ``scale``."""
    return max(float(abs(g - t) / s) for g, t, s in zip(got.flatten().tolist(), truth, scale, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_negative_binomial_is_exact_at_any_theta_mean_and_count(count, dtype):
    theta, mean = (torch.tensor(column[:, None], dtype=dtype) for column in GRID.T)
    x = rows(np.full((len(GRID), 1), count), dtype)
    value, d_mean, d_theta = with_gradients(lambda m, t: negative_binomial(x, m, t), mean, theta)
    weights = torch.linspace(0.5, 2, len(GRID), dtype=dtype)[:, None]
    value_truth, mean_truth, theta_truth, theta_parts = zip(*nb_truth(count), strict=True)
    rounding = torch.finfo(dtype).eps / 2
    # All terms of a log-probability have its sign: one term's roundings, of some ten operations, are its own. Those
    # that take off the shift of Stirling's series are, in float64, 10 times as large, where the result is at least 1.
    assert largest_error(value, value_truth, map(abs, value_truth)) <= (10 if dtype == torch.float32 else 40) * rounding
    assert largest_error(d_mean / weights, mean_truth, map(abs, mean_truth)) <= 10 * rounding
    # Its parts have opposite signs, and are themselves differences from which up to a digit is lost; for zeros the
    # bound of the series is where truncation (2e-5, 3e-11) and cancellation (6e-5, 1e-10) meet.
    relative = (6e-5 if dtype == torch.float32 else 1e-10) if count == 0 else 50 * rounding
    assert largest_error(d_theta / weights, theta_truth, theta_parts) <= relative


def test_derivative_in_theta_of_zeros_between_the_grid_points_is_exact_to_the_bound_stated():
    # Twice the finest steps of the share around its bound, 0.09, and down to where cancellation would be total.
    for dtype, bound in [(torch.float32, 6e-5), (torch.float64, 1e-10)]:
        ratio = torch.tensor(np.r_[10 ** np.linspace(-8, 4, 4001), np.linspace(0.09, 0.11, 4001)], dtype=dtype)
        x = CSRRows(ratio[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), len(ratio))
        theta = torch.ones(len(ratio), dtype=dtype, requires_grad=True)
        negative_binomial(x, ratio[None], theta).sum().backward()
        r = ratio.numpy().astype(np.longdouble)
        share = r / (1 + r)
        series = -sum(share**k / k for k in range(2, 40))
        exact = np.where(share < 0.1, series, share - np.log1p(r)).astype(np.float64)
        np.testing.assert_allclose(theta.grad.numpy(), exact, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_poisson_is_exact_at_any_mean_and_count(count, dtype):
    mean = torch.tensor(MEAN, dtype=dtype)[:, None]
    x = rows(np.full((len(MEAN), 1), count), dtype)
    value, d_mean = with_gradients(lambda m: poisson(x, m), mean)
    weights = torch.linspace(0.5, 2, len(MEAN), dtype=dtype)[:, None]
    k, rounding = mpmath.mpf(count), torch.finfo(dtype).eps / 2
    truth = [k * mpmath.log(mu) - mu - mpmath.loggamma(k + 1) for mu in map(mpmath.mpf, MEAN)]
    derivatives = [(k - mu) / mu for mu in map(mpmath.mpf, MEAN)]
    assert largest_error(value, truth, map(abs, truth)) <= (10 if dtype == torch.float32 else 40) * rounding
    assert largest_error(d_mean / weights, derivatives, map(abs, derivatives)) <= 10 * rounding


@functools.cache
def inflated_zero_truth():
    """Of zeros: theta, mean and logits, then log-probability and its derivatives in mean, theta and logits."""
    result = []
    for theta, mean, logits in itertools.product(THETA[::2], MEAN[::2], [-50, -20, -3, 0, 2, 20, 50]):
        t, mu, logit = mpmath.mpf(theta), mpmath.mpf(mean), mpmath.mpf(logits)
        ratio = mu / t
        log_zero = -t * mpmath.log1p(ratio)
        extra, other = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
        value = mpmath.log1p(other * mpmath.expm1(log_zero))
        of_nb = 1 / (1 + mpmath.exp(logit - log_zero))
        of_extra = 1 / (1 + mpmath.exp(log_zero - logit))
        d_theta = of_nb * (ratio / (1 + ratio) - mpmath.log1p(ratio))
        d_logits = -of_extra * other * mpmath.expm1(log_zero)
        if log_zero < -1:
            value = mpmath.log(extra + other * mpmath.exp(log_zero))
        result.append(
            ((theta, mean, logits), (value, -of_nb / (1 + ratio), d_theta, d_logits), abs(log_zero) + abs(logit))
        )
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_inflated_zeros_are_exact_at_any_theta_mean_and_logits(dtype):
    grid, truth, exponents = zip(*inflated_zero_truth(), strict=True)
    theta, mean, logits = (torch.tensor(column, dtype=dtype)[:, None] for column in zip(*grid, strict=True))
    x = rows(np.zeros((len(grid), 1)), dtype)
    value, *gradients = with_gradients(lambda m, t, z: zero_inflated_negative_binomial(x, m, t, z), mean, theta, logits)
    weights = torch.linspace(0.5, 2, len(grid), dtype=dtype)[:, None]
    of_value, *of_gradients = zip(*truth, strict=True)
    rounding = torch.finfo(dtype).eps / 2
    assert largest_error(value, of_value, map(abs, of_value)) <= 10 * rounding
    of_series, largest = (6e-5, 88) if dtype == torch.float32 else (1e-10, 709)
    for got, exact, at_least in zip(gradients, of_gradients, [0, of_series, 0], strict=True):
        # Gradients have factors exp(-k) with k up to |log p(0)| + |logits|: four roundings of k make 4 k of the factor.
        # One that is too small for the precision may be 0.
        scale = [
            abs(e) * max(at_least, (10 + 4 * min(k, largest)) * rounding) + 10 * torch.finfo(dtype).tiny
            for e, k in zip(exact, exponents, strict=True)
        ]
        assert largest_error(got / weights, exact, scale) <= 1


@pytest.mark.parametrize("logits", [-1e4, -50.0, 50.0, 1e4])
@pytest.mark.parametrize("count", [0, 3])
def test_zero_inflated_stays_finite_at_extreme_logits_and_certain_counts(logits, count):
    # theta log(1 + mu / theta) is 1e6: a zero of the negative binomial has probability exp(-1e6).
    parameters = [torch.tensor([[v]]) for v in (1e6, 1e8, logits)]
    x = rows([[count]], torch.float32)
    result = with_gradients(lambda *a: zero_inflated_negative_binomial(x, *a), *parameters)
    assert all(bool(r.isfinite().all()) for r in result)
    if count == 0:
        np.testing.assert_allclose(result[0], min(logits, 0), rtol=1e-6, atol=1e-6)


def test_counts_need_not_be_integers():
    theta, mean = np.array([0.3, 2.0, 50.0]), np.array([[0.2, 3.0, 400.0]])
    counts = np.array([[0.01, 2.5, 399.9]])
    x, t, mu = ([mpmath.mpf(v) for v in values] for values in (counts.ravel(), theta.ravel(), mean.ravel()))
    expected = sum(
        mpmath.loggamma(a + b)
        - mpmath.loggamma(b)
        - mpmath.loggamma(a + 1)
        - b * mpmath.log1p(m / b)
        + a * mpmath.log(m / (m + b))
        for a, b, m in zip(x, t, mu, strict=True)
    )
    ours = negative_binomial(rows(counts), torch.tensor(mean), torch.tensor(theta))
    assert float(ours) == pytest.approx(float(expected), rel=1e-13)
    expected = sum(a * mpmath.log(m) - m - mpmath.loggamma(a + 1) for a, m in zip(x, mu, strict=True))
    assert float(poisson(rows(counts), torch.tensor(mean))) == pytest.approx(float(expected), rel=1e-13)


def test_a_mean_that_underflowed_is_harmless_where_there_is_no_count():
    mean = torch.tensor([[0.0, 2.0]])
    x = rows([[0, 3]], torch.float32)
    for result in (
        with_gradients(lambda m: poisson(x, m), mean),
        with_gradients(lambda m: negative_binomial(x, m, torch.ones(2)), mean),
    ):
        assert all(bool(r.isfinite().all()) for r in result)


# Gradients, against finite differences in float64.


def gradcheck_case():
    counts = np.array([[0, 1, 2, 0], [7, 0, 1, 0.5], [0, 0, 30, 1]])
    rng = np.random.default_rng(4)
    x = rows(counts)
    # The 2 becomes an explicit zero.
    x.data[1] = 0
    mean, logits = rng.uniform(0.2, 4, (3, 4)), rng.normal(0, 1.5, (3, 4))
    return x, *[torch.tensor(v, requires_grad=True) for v in (mean, logits)]


THETA_FORMS = pytest.mark.parametrize(
    ("shape", "group"),
    [((4,), None), ((2, 4), [1, 0, 1]), ((3, 4), None)],
    ids=["theta_per_gene", "theta_per_group", "theta_per_entry"],
)


def theta_of(shape, group):
    # From strongly dispersed to nearly Poisson.
    theta = 10 ** np.random.default_rng(5).uniform(-1, 2.5, shape)
    return torch.tensor(theta, requires_grad=True), None if group is None else torch.tensor(group)


@THETA_FORMS
def test_gradients_of_negative_binomial(shape, group):
    x, mean, _ = gradcheck_case()
    theta, group = theta_of(shape, group)
    assert torch.autograd.gradcheck(lambda m, t: negative_binomial(x, m, t, group=group), (mean, theta))


@THETA_FORMS
@pytest.mark.parametrize("by_gene", [False, True], ids=["logits_per_entry", "logits_per_gene"])
def test_gradients_of_zero_inflated_negative_binomial(shape, group, by_gene):
    x, mean, logits = gradcheck_case()
    theta, group = theta_of(shape, group)
    logits = logits[0].detach().requires_grad_() if by_gene else logits
    assert torch.autograd.gradcheck(
        lambda m, t, z: zero_inflated_negative_binomial(x, m, t, z, group=group), (mean, theta, logits)
    )


def test_gradients_of_poisson():
    x, mean, _ = gradcheck_case()
    assert torch.autograd.gradcheck(lambda m: poisson(x, m), (mean,))


@pytest.mark.parametrize("wanted", ["mean", "theta", "logits"])
def test_only_the_gradients_asked_for_are_computed(wanted, monkeypatch):
    counts, mean, theta, logits, _ = case()
    parameters = {"mean": mean, "theta": theta, "logits": logits}
    expected = dict(zip(parameters, MODELS["zinb"](rows(counts), mean, theta, logits)[1:], strict=True))
    evaluated = []
    digamma_excess = likelihood.digamma_excess
    monkeypatch.setattr(likelihood, "digamma_excess", lambda x, t: evaluated.append(x) or digamma_excess(x, t))
    parameters[wanted].requires_grad_()
    value = zero_inflated_negative_binomial(rows(counts), *parameters.values())
    (value * torch.linspace(0.5, 2, len(value), dtype=value.dtype)).sum().backward()
    torch.testing.assert_close(parameters[wanted].grad, expected[wanted])
    assert bool(evaluated) == (wanted == "theta")
    assert all(p.grad is None for name, p in parameters.items() if name != wanted)


def test_nothing_is_kept_without_gradients():
    counts, mean, theta, logits, _ = case()
    mean.requires_grad_()
    with torch.no_grad():
        assert zero_inflated_negative_binomial(rows(counts), mean, theta, logits).grad_fn is None


def test_log_gammas_are_computed_and_kept_for_stored_counts_only(monkeypatch):
    counts, mean, theta, logits, _ = case()
    x, sizes, kept = rows(counts), [], []
    stirling_error = likelihood.stirling_error
    monkeypatch.setattr(likelihood, "stirling_error", lambda z: sizes.append(z.numel()) or stirling_error(z))
    parameters = [p.requires_grad_() for p in (mean, theta, logits)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        zero_inflated_negative_binomial(x, *parameters)
    assert sorted(sizes) == sorted([len(theta), len(x.data), len(x.data)])
    # Besides the parameters themselves.
    assert [t.numel() for t in kept if not any(t is p or t.data_ptr() == p.data_ptr() for p in parameters)] == [
        len(x.data)
    ] * 3


def test_a_graph_can_be_used_twice_but_not_differentiated_twice():
    counts, mean, theta, _, _ = case()
    mean.requires_grad_()
    value, weights = negative_binomial(rows(counts), mean, theta), torch.ones(7, dtype=torch.float64)
    first, second = (torch.autograd.grad(value, mean, weights, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(value, mean, weights.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Invariants.


def test_large_theta_is_poisson():
    counts, mean, *_ = case(6)
    x = rows(counts)
    theta = torch.full((40,), 1e12, dtype=torch.float64)
    # They differ by ((x - mu)^2 - x) / (2 theta).
    assert_all_close(
        with_gradients(lambda m: negative_binomial(x, m, theta), mean),
        with_gradients(lambda m: poisson(x, m), mean),
        rtol=1e-8,
    )
    single = rows(counts, torch.float32)
    torch.testing.assert_close(
        negative_binomial(single, mean.float(), theta.float()), poisson(single, mean.float()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_extra_zeros_it_is_the_negative_binomial(dtype):
    counts, mean, theta, logits, _ = case(7, dtype=dtype)
    x = rows(counts, dtype)
    never = torch.full_like(logits, -700)
    value, d_mean, d_theta, d_logits = MODELS["zinb"](x, mean, theta, never)
    assert_all_close([value, d_mean, d_theta], MODELS["nb"](x, mean, theta, never), rtol=20 * torch.finfo(dtype).eps)
    assert bool((d_logits.abs() < 1e-30).all())


@EACH_MODEL
def test_explicit_zeros_are_implicit_zeros(model):
    counts, *parameters, _ = case(8)
    assert_all_close(model(full_rows(counts), *parameters), model(rows(counts), *parameters), rtol=1e-13)


@EACH_MODEL
def test_order_of_genes_does_not_matter(model):
    counts, mean, theta, logits, _ = case(9)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    value, *gradients = model(rows(counts), mean, theta, logits)
    permuted = model(rows(counts[:, order]), mean[:, order], theta[order], logits[:, order])
    assert_all_close(permuted, [value, *[g[..., order] for g in gradients]], rtol=1e-13)


@EACH_MODEL
def test_a_cell_does_not_depend_on_the_others(model):
    counts, mean, theta, logits, _ = case(10)
    alone = torch.cat([model(rows(counts[[i]]), mean[[i]], theta, logits[[i]])[0] for i in range(len(counts))])
    torch.testing.assert_close(model(rows(counts), mean, theta, logits)[0], alone, rtol=1e-13, atol=0)


@EACH_MODEL
@pytest.mark.parametrize(("part", "block"), [(1, 1), (3, 80), (64, 120)], ids=["smallest", "two_rows", "not_dividing"])
def test_size_of_the_pieces_does_not_matter(model, part, block, monkeypatch):
    counts, *parameters, group = case(11)
    # A row without counts, at the edge of a piece.
    counts[2] = 0
    by_group = torch.stack([parameters[1], parameters[1] * 2, parameters[1] / 3])

    def everything():
        grouped = with_gradients(
            lambda m, t: negative_binomial(rows(counts), m, t, group=group), parameters[0], by_group
        )
        return [*model(rows(counts), *parameters), *grouped]

    whole = everything()
    monkeypatch.setattr(stored, "_PART", part)
    monkeypatch.setattr(stored, "_BLOCK", block)
    assert_all_close(everything(), whole, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_groups_with_the_same_theta_are_one_theta_per_gene(dtype):
    counts, mean, theta, logits, group = case(12)
    x, group = rows(counts), group.to(dtype)
    value, d_mean, d_theta, d_logits = with_gradients(
        lambda m, t, z: zero_inflated_negative_binomial(x, m, t, z, group=group), mean, theta.repeat(3, 1), logits
    )
    assert_all_close([value, d_mean, d_theta.sum(dim=0), d_logits], MODELS["zinb"](x, mean, theta, logits), rtol=1e-12)


def test_gradient_by_group_is_that_by_entry_summed():
    counts, mean, theta, _, group = case(13)
    x, by_group = rows(counts), torch.stack([theta, theta * 3, theta / 7])
    *grouped, d_group = with_gradients(lambda m, t: negative_binomial(x, m, t, group=group), mean, by_group)
    *single, d_entry = with_gradients(lambda m, t: negative_binomial(x, m, t), mean, by_group[group])
    assert_all_close(grouped, single, rtol=1e-13)
    summed = torch.stack([d_entry[group == g].sum(dim=0) for g in range(3)])
    torch.testing.assert_close(d_group, summed, rtol=1e-12, atol=0)


def test_cells_without_counts_and_batches_without_cells():
    mean, theta = torch.full((2, 3), 0.5, requires_grad=True), torch.full((3,), 2.0)
    value = negative_binomial(rows(np.zeros((2, 3)), torch.float32), mean, theta)
    np.testing.assert_allclose(value.detach(), 3 * 2 * np.log(2 / 2.5), rtol=1e-6)
    value.sum().backward()
    np.testing.assert_allclose(mean.grad, -2 / 2.5, rtol=1e-6)
    empty = CSRRows(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 3)
    assert negative_binomial(empty, torch.zeros(0, 3), theta).shape == (0,)


# Precision.


@EACH_MODEL
def test_bfloat16_is_computed_in_float32(model):
    counts, mean, theta, logits, _ = case(14, dtype=torch.float32)
    x, mean = rows(counts, torch.float32), mean.bfloat16()
    half, single = model(x, mean, theta, logits), model(x, mean.float(), theta, logits)
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], single[0])
    assert half[1].dtype == torch.bfloat16
    assert torch.equal(half[1], single[1].bfloat16())


@EACH_MODEL
def test_autocast_changes_nothing(model):
    counts, *parameters, _ = case(15, dtype=torch.float32)
    x = rows(counts, torch.float32)
    plain = model(x, *parameters)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x, *parameters)
    for a, b in zip(cast, plain, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_under_autocast_gradients_reach_the_weights_of_a_bfloat16_layer():
    counts, _, theta, _, _ = case(16, dtype=torch.float32)
    layer = torch.nn.Linear(5, 40)
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        mean = torch.nn.functional.softplus(layer(z))
        value = negative_binomial(rows(counts, torch.float32), mean, theta)
    value.sum().backward()
    assert mean.dtype == torch.bfloat16
    exact = negative_binomial(rows(counts), mean.double().detach(), theta.double())
    np.testing.assert_allclose(value.detach(), exact, rtol=1e-6)
    assert bool(layer.weight.grad.isfinite().all())
    assert float(layer.weight.grad.abs().max()) > 0


def test_the_widest_parameter_sets_the_precision():
    counts, mean, theta, _, _ = case(17)
    x = rows(counts, torch.float32)
    value, d_mean, d_theta = with_gradients(lambda m, t: negative_binomial(x, m, t), mean.float(), theta)
    assert (value.dtype, d_mean.dtype, d_theta.dtype) == (torch.float64, torch.float32, torch.float64)
    torch.testing.assert_close(value, negative_binomial(rows(counts), mean.float().double(), theta))


def test_strides_of_the_mean_do_not_matter():
    counts, mean, theta, logits, _ = case(18)
    x = rows(counts)
    assert_all_close(
        MODELS["zinb"](x, mean.T.contiguous().T, theta, logits), MODELS["zinb"](x, mean, theta, logits), rtol=0
    )
    one = mean[:1]
    torch.testing.assert_close(poisson(x, one.expand(7, -1)), poisson(x, one.repeat(7, 1)), rtol=0, atol=0)


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.ones(7, 39)}, r"mean has shape \(7, 39\), but x has 7 cells and 40 genes"),
        ({"mean": torch.ones(40)}, r"mean has shape \(40,\).*Pass one expected count per cell and gene"),
        ({"theta": torch.ones(39)}, r"theta has shape \(39,\).*\(40,\), one per gene, or \(7, 40\), one per entry"),
        ({"theta": torch.ones(3, 40)}, r"theta has shape \(3, 40\).*pass group too"),
        ({"theta": torch.ones(40), "group": torch.zeros(7).long()}, r"theta has shape \(40,\), but group was given"),
        ({"theta": torch.ones(3, 39), "group": torch.zeros(7).long()}, r"Pass shape \(n_groups, 40\)"),
        ({"theta": torch.ones(3, 40), "group": torch.zeros(7, 1).long()}, r"group has shape \(7, 1\).*shape \(7,\)"),
        ({"theta": torch.ones(3, 40), "group": torch.zeros(7)}, r"group holds torch.float32"),
        ({"zero_logits": torch.ones(7, 1)}, r"zero_logits has shape \(7, 1\).*\(7, 40\), one per entry, or \(40,\)"),
    ],
    ids=[
        "mean_of_other_genes",
        "mean_without_cells",
        "theta_of_other_genes",
        "theta_by_group_without_group",
        "group_for_theta_by_gene",
        "theta_by_group_of_other_genes",
        "group_as_a_column",
        "group_of_floats",
        "one_logit_per_cell",
    ],
)
def test_wrong_shapes_are_named(change, message):
    counts, mean, theta, logits, _ = case()
    arguments = {"mean": mean, "theta": theta, "zero_logits": logits, "group": None, **change}
    with pytest.raises(InvalidArgumentError, match=message):
        zero_inflated_negative_binomial(rows(counts), **arguments)
    del arguments["zero_logits"]
    if "zero_logits" not in change:
        with pytest.raises(InvalidArgumentError, match=message):
            negative_binomial(rows(counts), **arguments)
    if "mean" in change:
        with pytest.raises(InvalidArgumentError, match=message):
            poisson(rows(counts), change["mean"])
