"""Priors against densities of scipy, quadrature, and the optima that they have without data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from cellstill.nn import priors


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def expect(function, mean, sd):
    """Expectation under a Normal, by quadrature."""
    value, error = integrate.quad(
        lambda t: function(t) * stats.norm.pdf(t, mean, sd), mean - 12 * sd, mean + 12 * sd, epsabs=1e-12, limit=200
    )
    assert error < 1e-8
    return value


def log_density_of_log(distribution):
    """Log density of log x for x of a distribution; the Jacobian taken numerically."""

    def log_density(t):
        h = 1e-5
        jacobian = (math.exp(t + h) - math.exp(t - h)) / (2 * h)
        return distribution.logpdf(math.exp(t)) + math.log(jacobian)

    return log_density


def maximise(function, *start, steps=200):
    """Newton's method in its quasi form, to where the gradient is gone."""
    parameters = [s.clone().requires_grad_() for s in start]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = -function(*parameters)
        loss.backward()
        return loss

    optimiser.step(closure)
    return [p.detach() for p in parameters], max(p.grad.abs().max().item() for p in parameters)


# Normal.


@pytest.mark.parametrize(
    ("mean", "sd", "prior_mean", "prior_sd"),
    [
        pytest.param(0.0, 1.0, 0.0, 1.0, id="equal"),
        pytest.param(1.3, 0.2, 0.0, 1.0, id="latent"),
        pytest.param(8.1, 0.05, 7.5, 0.4, id="library"),
    ],
)
def test_normal_kl_is_the_expected_difference_of_log_densities(mean, sd, prior_mean, prior_sd):
    q, p = stats.norm(mean, sd), stats.norm(prior_mean, prior_sd)
    expected = expect(lambda t: q.logpdf(t) - p.logpdf(t), mean, sd)
    ours = priors.normal_kl(tensor(mean), tensor(sd**2), prior_mean, prior_sd**2)
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-9, atol=1e-12)


def test_normal_kl_sums_over_dimensions_and_takes_a_prior_per_cell_or_dimension():
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator) + 0.1
    each = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(priors.normal_kl(mean, variance), each.sum(1))
    location, spread = torch.randn(5, 1, generator=generator), torch.rand(3, generator=generator) + 0.5
    each = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(location.expand(5, 3), spread.sqrt().expand(5, 3)),
    )
    torch.testing.assert_close(priors.normal_kl(mean, variance, location, spread), each.sum(1))


# Densities.


@pytest.mark.parametrize(
    ("concentration", "rate"),
    [
        pytest.param(1.0, 100.0, id="background"),
        pytest.param(200.0, 200.0, id="feature_scaling"),
        pytest.param(9.0, 3.0, id="containment_rate"),
        pytest.param(5.0, 2.5, id="modality_scaling"),
        pytest.param(0.2, 1.0, id="below_1"),
    ],
)
def test_gamma_is_scipys_as_a_density_of_x_and_of_log_x(concentration, rate):
    distribution = stats.gamma(concentration, scale=1 / rate)
    log_x = np.log(concentration / rate) + np.linspace(-3, 2, 11)
    as_x, as_log_x = (
        priors.gamma(tensor(*log_x), concentration, rate),
        priors.gamma_of_log(tensor(*log_x), concentration, rate),
    )
    np.testing.assert_allclose(as_x, distribution.logpdf(np.exp(log_x)), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(as_log_x, [log_density_of_log(distribution)(t) for t in log_x], rtol=1e-8, atol=1e-8)
    mass, _ = integrate.quad(
        lambda t: priors.gamma_of_log(tensor(t), concentration, rate).exp().item(), -150, 10, limit=500, points=[-5, 0]
    )
    assert mass == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("concentration", "rate", "settles"),
    [(1.0, 100.0, 0.01), (200.0, 200.0, 1.0), (5.0, 5 / 0.3, 0.3)],
    ids=["background", "feature_scaling", "modality_scaling"],
)
def test_as_a_density_of_log_x_a_gamma_settles_at_its_mean(concentration, rate, settles):
    (log_x,), gradient = maximise(lambda t: priors.gamma_of_log(t, concentration, rate).sum(), tensor(-1.0, 0.5))
    # The concentration is the curvature there.
    assert gradient / concentration < 1e-7
    np.testing.assert_allclose(log_x.exp(), settles, rtol=1e-7)


def test_as_a_density_of_x_the_background_would_vanish():
    log_b = tensor(-4.0, -8.0, -40.0).requires_grad_()
    priors.gamma(log_b, 1.0, 100.0).sum().backward()
    assert (log_b.grad < 0).all()


# Dispersion.


def containment_density_of_log_theta(log_theta, rate):
    """Density of log theta where theta^(-1/2) is exponential; the Jacobian taken numerically."""
    h = 1e-5
    jacobian = abs(math.exp(-(log_theta + h) / 2) - math.exp(-(log_theta - h) / 2)) / (2 * h)
    return stats.expon(scale=1 / rate).logpdf(math.exp(-log_theta / 2)) + math.log(jacobian)


@pytest.mark.parametrize(
    ("m", "sigma", "rate"),
    [(math.log(9), 0.1, 3.0), (0.0, 1.0, 1.0), (2.96, 2.0, 8 / 3), (-3.0, 0.5, 5.0)],
    ids=["start", "wide", "optimum", "overdispersed"],
)
def test_containment_kl_is_the_expected_difference_of_log_densities_of_log_theta(m, sigma, rate):
    q = stats.norm(m, sigma)
    expected = expect(lambda t: q.logpdf(t) - containment_density_of_log_theta(t, rate), m, sigma)
    ours = priors.containment_kl(tensor(m), tensor(sigma), tensor(rate).log())
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-7, atol=1e-8)
    assert ours.item() > 0


def dispersion_prior(m, log_sigma, log_rate, kl=priors.containment_kl):
    """What the dispersions of a model without data maximise."""
    return priors.gamma(log_rate, 9.0, 3.0).sum() - kl(m, log_sigma.exp(), log_rate).sum()


def dispersion_start(n_vars, sigma=0.1):
    start = (1, n_vars)
    return (
        torch.full(start, math.log(9.0)).double(),
        torch.full(start, math.log(sigma)).double(),
        tensor([[math.log(3)]])[0],
    )


@pytest.mark.parametrize("n_vars", [1, 7, 300])
def test_the_dispersion_prior_alone_reaches_its_closed_form_optimum(n_vars):
    (m, log_sigma, log_rate), gradient = maximise(dispersion_prior, *dispersion_start(n_vars))
    assert gradient < 1e-6
    rate = log_rate.exp().item()
    assert rate == pytest.approx(8 / 3, rel=1e-5)
    np.testing.assert_allclose(log_sigma.exp(), 2, rtol=1e-5)
    np.testing.assert_allclose(torch.exp(log_sigma.exp() ** 2 / 8 - m / 2), 1 / rate, rtol=1e-5)
    np.testing.assert_allclose(m.exp(), (8 / 3) ** 2 * math.e, rtol=1e-4)
    np.testing.assert_allclose(m.exp(), 19.3, rtol=2e-3)


def test_held_near_a_point_the_dispersion_prior_settles_lower():
    start_m, _, start_rate = dispersion_start(5)
    narrow = torch.full_like(start_m, math.log(1e-3))
    (m, log_rate), _ = maximise(lambda m, log_rate: dispersion_prior(m, narrow, log_rate), start_m, start_rate)
    np.testing.assert_allclose(m.exp(), 7.1, rtol=3e-3)
    assert log_rate.exp().item() == pytest.approx(8 / 3, rel=1e-5)


def test_without_the_jacobian_the_dispersion_prior_drives_theta_to_infinity():
    def without(m, sigma, log_rate):
        # log(u / 2), the Jacobian, has the expectation -m / 2 - log 2.
        return priors.containment_kl(m, sigma, log_rate) - m / 2 - math.log(2)

    (m, _, _), _ = maximise(lambda *a: dispersion_prior(*a, kl=without), *dispersion_start(5), steps=300)
    assert (m > math.log(19.4) + 5).all()


# Library.


@pytest.mark.parametrize(("m", "sigma", "rate"), [(-0.5, 1.0, 1.0), (0.0, 0.1, 1.0), (-2.0, 0.7, 3.0)])
def test_lognormal_exponential_kl_is_the_expected_difference_of_log_densities_of_log_w(m, sigma, rate):
    q, p = stats.norm(m, sigma), log_density_of_log(stats.expon(scale=1 / rate))
    expected = expect(lambda t: q.logpdf(t) - p(t), m, sigma)
    ours = priors.lognormal_exponential_kl(tensor(m), tensor(sigma), rate)
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-6, atol=1e-8)


def test_lognormal_exponential_kl_is_that_of_torch_in_the_variable_itself():
    # A divergence does not depend on the variable, if both densities are of the same one.
    q, p = torch.distributions.LogNormal(tensor(-0.3), tensor(0.6)), torch.distributions.Exponential(1.0)
    torch.manual_seed(0)
    w = q.sample((400_000,))
    monte_carlo = (q.log_prob(w) - p.log_prob(w)).mean(0)
    ours = priors.lognormal_exponential_kl(tensor(-0.3), tensor(0.6))
    torch.testing.assert_close(ours, monte_carlo, atol=4e-3, rtol=0)


def test_the_library_weight_alone_settles_at_the_mean_of_its_prior():
    (m, log_sigma), gradient = maximise(
        lambda m, s: -priors.lognormal_exponential_kl(m, s.exp()).sum(), tensor(0.0), tensor(-1.0)
    )
    assert gradient < 1e-8
    np.testing.assert_allclose(log_sigma.exp(), 1, rtol=1e-6)
    np.testing.assert_allclose(torch.exp(m + 0.5), 1, rtol=1e-6)


# Sparsity.


@pytest.mark.parametrize("concentration", [0.1, 1.0, 3.0])
def test_sparse_gamma_is_the_gamma_of_the_magnitude(concentration):
    x = np.array([-4.0, -0.7, 0.5, 2.0])
    expected = stats.gamma(concentration, scale=1 / 1.5).logpdf(np.abs(x))
    np.testing.assert_allclose(priors.sparse_gamma(tensor(*x), concentration, 1.5, floor=1e-6), expected, rtol=1e-9)
    np.testing.assert_allclose(priors.sparse_gamma(tensor(*x), concentration, 1.5), expected, atol=5e-4)


def test_sparse_gamma_has_gradients_bounded_by_its_floor():
    x = (torch.arange(-10_000, 10_001, dtype=torch.float64) / 10_000).requires_grad_()
    priors.sparse_gamma(x, 0.1, floor=1e-2).sum().backward()
    assert x.grad.isfinite().all()
    assert 45 < x.grad.abs().max().item() <= 46
    assert x.grad[10_000] == 0


def horseshoe_density(x, scale):
    """The scale mixture, by quadrature."""
    value, _ = integrate.quad(
        lambda angle: stats.norm.pdf(x, 0, scale * math.tan(angle)) * 2 / math.pi, 0, math.pi / 2, limit=500
    )
    return value


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_horseshoe_bounds_the_density_of_the_mixture_from_below(scale):
    x = scale * np.array([0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0])
    exact = np.log([horseshoe_density(v, scale) for v in x])
    gap = exact - priors.horseshoe(tensor(*x), scale).numpy()
    assert (gap > 0).all()
    assert (gap < math.log(2)).all()
    assert (np.diff(gap) < 0).all()
    assert gap[-1] < 2e-3
    np.testing.assert_array_equal(priors.horseshoe(tensor(*x), scale), priors.horseshoe(-tensor(*x), scale))


def test_horseshoe_has_a_finite_value_and_gradient_at_zero():
    x = torch.zeros(1, requires_grad=True)
    value = priors.horseshoe(x, 0.5)
    value.sum().backward()
    assert value.isfinite().all()
    assert x.grad.item() == 0


# Gradients.


def positive(*shape):
    return (torch.rand(*shape, dtype=torch.float64) + 0.3).requires_grad_()


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (priors.normal_kl, lambda: (real(3, 2), positive(3, 2), real(3, 1), positive(3, 1))),
        (priors.gamma, lambda: (real(3), positive(1), positive(1))),
        (priors.gamma_of_log, lambda: (real(3), positive(1), positive(1))),
        (priors.containment_kl, lambda: (real(2, 3), positive(2, 3), real(2, 1))),
        (priors.lognormal_exponential_kl, lambda: (real(3), positive(3))),
        (priors.sparse_gamma, lambda: (real(3), positive(1), positive(1))),
        (priors.horseshoe, lambda: (real(3), positive(1))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gradients(function, arguments):
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(function, arguments())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_keep_the_precision_of_their_argument(dtype):
    x = torch.full((2, 3), 0.5, dtype=dtype)
    for value in (
        priors.normal_kl(x, x),
        priors.gamma(x, 9, 3),
        priors.gamma_of_log(x, 1.0, 100.0),
        priors.containment_kl(x, x, x),
        priors.lognormal_exponential_kl(x, x),
        priors.sparse_gamma(x, 0.1),
        priors.horseshoe(x),
    ):
        assert value.dtype == dtype
