"""Draws of Normal posteriors and their divergence from a prior: against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellstill.nn import normal, priors
from cellstill.nn.compiled import compiled

N, D = 23, 7


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


def posterior(d=D):
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(N, d, generator=generator), torch.rand(N, d, generator=generator) + 1e-3
    return mean.requires_grad_(), variance.requires_grad_()


def prior(d):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, d, generator=generator), torch.rand(N, d, generator=generator) + 0.1


@pytest.mark.parametrize(
    ("d", "known"),
    [
        pytest.param(D, (), id="standard"),
        pytest.param(D, (0.5, 2.0), id="one_prior"),
        pytest.param(1, prior(1), id="a_prior_of_each_cell"),
        pytest.param(D, prior(1), id="a_prior_of_each_cell_in_all_dimensions"),
        pytest.param(D, prior(D), id="a_prior_of_each_entry"),
        pytest.param(D, (0.0, torch.linspace(0.5, 2, D)), id="a_variance_of_each_dimension"),
    ],
)
def test_divergence_is_torchs_with_its_gradients(d, known, mode):
    mean, variance = posterior(d)
    found = normal.divergence(mean, variance, *known)
    in_one_pass = mode and all(not isinstance(part, torch.Tensor) or part.shape == (N, 1) for part in known)
    assert ("_Divergence" in type(found.grad_fn).__name__) == in_one_pass
    same = [value.detach().double().requires_grad_() for value in (mean, variance)]
    center, spread = [torch.as_tensor(part, dtype=torch.float64) for part in known] or [torch.tensor(0.0), 1.0]
    p = torch.distributions.Normal(center, torch.as_tensor(spread, dtype=torch.float64).sqrt().expand(N, d))
    q = torch.distributions.Normal(same[0], same[1].sqrt())
    expected = torch.distributions.kl_divergence(q, p).sum(dim=1)
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 2, N)
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for mine, theirs in zip((mean, variance), same, strict=True):
        np.testing.assert_allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_prior_that_is_learned_has_a_gradient():
    mean, variance = posterior(1)
    center = torch.zeros(N, 1).requires_grad_()
    normal.divergence(mean, variance, center, torch.ones(N, 1)).sum().backward()
    torch.testing.assert_close(center.grad, (center - mean).detach())


def test_draws_follow_mean_and_variance(mode):
    mean, variance = posterior()
    torch.manual_seed(3)
    noise = torch.randn(N, D)
    torch.manual_seed(3)
    drawn = normal.draw(mean, variance)
    assert ("_Draw" in type(drawn.grad_fn).__name__) == mode
    torch.testing.assert_close(drawn, mean + variance.sqrt() * noise)
    drawn.square().sum().backward()
    found = mean.grad.clone(), variance.grad.clone()
    mean.grad = variance.grad = None
    (mean + variance.sqrt() * noise).square().sum().backward()
    torch.testing.assert_close(found, (mean.grad, variance.grad), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1], ids=["mean", "variance"])
def test_what_is_not_finite_shows_in_its_own_cell(bad, at):
    parts = [part.detach().clone() for part in posterior()]
    parts[at][4, 2] = bad
    finite = torch.isfinite(normal.divergence(*parts))
    assert finite.sum() == N - 1
    assert not finite[4]


def test_parts_of_a_wider_tensor_are_read_in_their_own_order():
    both = torch.cat([part.detach() for part in posterior()], dim=1).requires_grad_()
    mean, variance = both.chunk(2, dim=1)
    assert not mean.is_contiguous()
    weight = torch.linspace(-1, 2, N)
    torch.manual_seed(0)
    noise = torch.randn(N, D)
    expected = weight @ priors.normal_kl(mean, variance) + (weight @ (mean + variance.sqrt() * noise).square()).sum()
    (of_both,) = torch.autograd.grad(expected, both)
    torch.manual_seed(0)
    found = weight @ normal.divergence(mean, variance) + (weight @ normal.draw(mean, variance).square()).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, both)[0], of_both, rtol=1e-4, atol=1e-5)


def test_a_variance_of_zero_is_infinitely_far():
    mean, variance = (part.detach().clone() for part in posterior())
    variance[3, 1] = 0.0
    assert torch.isposinf(normal.divergence(mean, variance)).nonzero().tolist() == [[3]]


def test_one_variance_of_all_dimensions_is_spread_over_them():
    mean, _ = posterior()
    variance = torch.rand(N, 1)
    torch.manual_seed(0)
    noise = torch.randn(N, D)
    torch.manual_seed(0)
    torch.testing.assert_close(normal.draw(mean, variance), mean + variance.sqrt() * noise)
    torch.testing.assert_close(normal.divergence(mean, variance), priors.normal_kl(mean, variance))
