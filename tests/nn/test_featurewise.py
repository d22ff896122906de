"""Parameters by group and feature: in one pass as in torch's float64, with the gradients of autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellstill.nn import featurewise, priors
from cellstill.nn.compiled import compiled

SHAPE = (3, 41)


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


def values(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(function, definition, *parameters):
    """Value and gradients of the same weighted sum of outputs, ours in float32 and the definition's in float64."""
    ours = [value.clone().requires_grad_() for value in parameters]
    theirs = [value.double().requires_grad_() for value in parameters]
    found, expected = function(*ours), definition(*theirs)
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=2e-6, atol=1e-6)
    weight = torch.linspace(-1, 2, found.numel()).reshape(found.shape)
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, other.grad, rtol=2e-5, atol=2e-5)


def test_containment_sum_is_the_sum_of_the_divergences():
    check(
        featurewise.containment_sum,
        lambda m, s, r: priors.containment_kl(m, s.exp(), r[:, None]).sum(),
        *(2 + values(*SHAPE, scale=2), values(*SHAPE, seed=1) - 2, values(3, seed=2)),
    )


@pytest.mark.parametrize(("concentration", "rate"), [(1.0, 100.0), (200.0, 200.0), (0.3, 2.0)])
def test_gamma_of_log_sum_is_the_sum_of_the_log_densities(concentration, rate):
    check(
        lambda x: featurewise.gamma_of_log_sum(x, concentration, rate),
        lambda x: priors.gamma_of_log(x, concentration, rate).sum(),
        np.log(concentration / rate) + values(*SHAPE, scale=0.5),
    )


def test_log_softplus_from_far_below_zero_to_far_above():
    check(
        featurewise.log_softplus,
        lambda x: torch.nn.functional.softplus(x).log(),
        torch.cat([torch.tensor([-60.0, -20.0, 0.0, 20.0, 60.0]), values(50, scale=3)])[None],
    )


def test_draws_are_log_normal_and_differentiable_along_their_noise():
    mean, log_sigma = values(*SHAPE), values(*SHAPE, seed=1) - 1
    torch.manual_seed(7)
    noise = torch.randn(SHAPE)

    def definition(m, s):
        return (m + s.exp() * noise.double()).exp()

    def seeded(m, s):
        torch.manual_seed(7)
        return featurewise.log_normal_draw(m, s)

    check(seeded, definition, mean, log_sigma)


def test_a_view_that_is_not_contiguous_is_read_in_its_own_order():
    x = values(*SHAPE).t()
    torch.testing.assert_close(featurewise.log_softplus(x), torch.nn.functional.softplus(x).log())
    whole = featurewise.gamma_of_log_sum(x, 2.0, 3.0)
    torch.testing.assert_close(whole, priors.gamma_of_log(x, 2.0, 3.0).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad):
    x = torch.zeros(1, 9)
    x[0, 4] = bad
    assert torch.isfinite(featurewise.log_softplus(x)).sum() == 8
    assert not torch.isfinite(featurewise.gamma_of_log_sum(x, 2.0, 3.0))
    assert not torch.isfinite(featurewise.containment_sum(x, torch.zeros(1, 9), torch.zeros(1)))
    assert not torch.isfinite(featurewise.containment_sum(torch.zeros(1, 9), x, torch.zeros(1)))


def test_double_precision_is_left_to_torch():
    x = values(*SHAPE).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: featurewise.gamma_of_log_sum(featurewise.log_softplus(t), 2.0, 3.0), x)
