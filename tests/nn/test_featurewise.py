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
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NODES = ("_Known", "_LogNormalDraw", "_LogSoftplus")


def check(mode, function, definition, *parameters):
    """Value and gradients of the same weighted sum of outputs, ours in float32 and the definition's in float64."""
    ours = [value.clone().requires_grad_() for value in parameters]
    theirs = [value.double().requires_grad_() for value in parameters]
    found, expected = function(*ours), definition(*theirs)
    assert type(found.grad_fn).__name__.startswith(NODES) == mode
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=2e-6, atol=1e-6)
    weight = torch.linspace(-1, 2, found.numel()).reshape(found.shape)
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, other.grad, rtol=2e-5, atol=2e-5)


def test_containment_sum_is_the_sum_of_the_divergences(mode):
    check(
        mode,
        featurewise.containment_sum,
        lambda m, s, r: priors.containment_kl(m, s.exp(), r[:, None]).sum(),
        *(2 + values(*SHAPE, scale=2), values(*SHAPE, seed=1) - 2, values(3, seed=2)),
    )


@pytest.mark.parametrize(("concentration", "rate"), [(1.0, 100.0), (200.0, 200.0), (0.3, 2.0)])
def test_gamma_of_log_sum_is_the_sum_of_the_log_densities(concentration, rate, mode):
    check(
        mode,
        lambda x: featurewise.gamma_of_log_sum(x, concentration, rate),
        lambda x: priors.gamma_of_log(x, concentration, rate).sum(),
        np.log(concentration / rate) + values(*SHAPE, scale=0.5),
    )


@pytest.mark.parametrize(("concentration", "rate"), [(9.0, 3.0), (0.3, 2.0)])
def test_gamma_sum_is_the_sum_of_the_log_densities(concentration, rate, mode):
    check(
        mode,
        lambda x: featurewise.gamma_sum(x, concentration, rate),
        lambda x: priors.gamma(x, concentration, rate).sum(),
        np.log(concentration / rate) + values(*SHAPE, scale=0.5),
    )


@pytest.mark.parametrize(("shape", "rate"), [(SHAPE, 0.4), ((), 1.0)])
def test_lognormal_exponential_sum_is_the_sum_of_the_divergences(shape, rate, mode):
    check(
        mode,
        lambda m, s: featurewise.lognormal_exponential_sum(m, s, rate),
        lambda m, s: priors.lognormal_exponential_kl(m, s.exp(), rate).sum(),
        *(values(*shape), values(*shape, seed=1) - 1),
    )


def test_log_softplus_from_far_below_zero_to_far_above(mode):
    check(
        mode,
        featurewise.log_softplus,
        lambda x: torch.nn.functional.softplus(x).log(),
        torch.cat([torch.tensor([-60.0, -20.0, 0.0, 20.0, 60.0]), values(50, scale=3)])[None],
    )


def test_draws_are_log_normal_and_differentiable_along_their_noise(mode):
    mean, log_sigma = values(*SHAPE), values(*SHAPE, seed=1) - 1
    torch.manual_seed(7)
    noise = torch.randn(SHAPE)

    def definition(m, s):
        return (m + s.exp() * noise.double()).exp()

    def seeded(m, s):
        torch.manual_seed(7)
        return featurewise.log_normal_draw(m, s)

    check(mode, seeded, definition, mean, log_sigma)


@pytest.mark.parametrize(
    "function",
    [
        featurewise.log_softplus,
        lambda x: featurewise.gamma_of_log_sum(x, 2.0, 3.0),
        lambda x: featurewise.containment_sum(x, 0.3 * x, torch.zeros(len(x))),
        lambda x: featurewise.lognormal_exponential_sum(x, 0.3 * x),
    ],
    ids=["log_softplus", "gamma_of_log_sum", "containment_sum", "lognormal_exponential_sum"],
)
def test_a_view_that_is_not_contiguous_has_the_gradient_of_its_copy(function):
    x = values(*SHAPE).t()
    assert not x.is_contiguous()
    grads = []
    for same in (x.clone(memory_format=torch.preserve_format), x.contiguous()):
        same.requires_grad_()
        out = function(same)
        (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
        grads.append(same.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_the_sum_over_many_features_near_their_mean_is_that_of_double_precision():
    log_x = values(20, 20_000, scale=0.02)
    expected = priors.gamma_of_log(log_x.double(), 200.0, 200.0).sum()
    # Of each entry, a difference of two numbers of 200, half a unit in the last place is 5e-6.
    np.testing.assert_allclose(featurewise.gamma_of_log_sum(log_x, 200.0, 200.0), expected, rtol=5e-6)
    m, s, rate = log_x + 2, log_x - 2, torch.zeros(20)
    expected = priors.containment_kl(m.double(), s.double().exp(), rate.double()[:, None]).sum()
    np.testing.assert_allclose(featurewise.containment_sum(m, s, rate), expected, rtol=2e-6)


def test_several_threads_give_the_same(monkeypatch):
    x = values(3, 7001)

    def drawn():
        torch.manual_seed(0)
        with compiled(True):
            return featurewise.log_softplus(x), featurewise.log_normal_draw(x, x - 2)

    once = drawn()
    monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    torch.testing.assert_close(drawn(), once, rtol=0, atol=0)


def test_shapes_that_are_spread_over_one_another_are():
    m, one = values(*SHAPE), torch.zeros(1)
    expected = priors.containment_kl(m, torch.ones_like(m), one[:, None]).sum()
    torch.testing.assert_close(featurewise.containment_sum(m, torch.zeros_like(m), one), expected)
    torch.manual_seed(0)
    noise = torch.randn(SHAPE)
    torch.manual_seed(0)
    torch.testing.assert_close(featurewise.log_normal_draw(m, torch.zeros(3, 1)), (m + noise).exp())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad):
    x = torch.zeros(1, 9)
    x[0, 4] = bad
    assert torch.isfinite(featurewise.log_softplus(x)).sum() == 8
    assert not torch.isfinite(featurewise.gamma_of_log_sum(x, 2.0, 3.0))
    assert not torch.isfinite(featurewise.containment_sum(x, torch.zeros(1, 9), torch.zeros(1)))
    assert not torch.isfinite(featurewise.containment_sum(torch.zeros(1, 9), x, torch.zeros(1)))
    assert not torch.isfinite(featurewise.lognormal_exponential_sum(x, torch.zeros(1, 9)))
    assert not torch.isfinite(featurewise.lognormal_exponential_sum(torch.zeros(1, 9), x))
    if bad != float("-inf"):
        assert torch.isfinite(featurewise.log_normal_draw(x, torch.zeros(1, 9))).sum() == 8
    if bad != bad:
        assert torch.isfinite(featurewise.log_normal_draw(torch.zeros(1, 9), x)).sum() == 8


def test_a_draw_too_large_for_single_precision_is_infinite():
    assert torch.isposinf(featurewise.log_normal_draw(torch.full((1, 9), 95.0), torch.full((1, 9), -20.0))).all()


def test_double_precision_is_left_to_torch():
    x = values(*SHAPE).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: featurewise.gamma_of_log_sum(featurewise.log_softplus(t), 2.0, 3.0), x)
