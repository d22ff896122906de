"""The sparse prior of compositions: its gradient in logits against autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cellstill.nn.compiled import compiled
from cellstill.nn.composition import SparseComposition

N, N_VARS = 6, 45


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


def test_penalty_is_the_gammas_of_the_ratios_of_shares():
    typical = torch.tensor([1.0, 2.0, 5.0])
    native = torch.tensor([[0.4, 0.9, 0.1], [3.0, 6.0, 15.0]])
    ratio = native / native.sum(dim=1, keepdim=True) / (typical / 8)
    expected = -stats.gamma(0.5, scale=1 / 0.7).logpdf(ratio).sum(axis=1)
    np.testing.assert_allclose(SparseComposition(typical, 0.5, 0.7, 1e-6).penalty(native), expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [-8.0, 0.0, 8.0])
def test_gradient_is_that_of_autograd(shift):
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(N, N_VARS, generator=generator) + shift, torch.randn(N_VARS, generator=generator)
    weight = torch.linspace(-1, 2, N)
    prior = SparseComposition(torch.rand(N_VARS, generator=generator) + 0.1, 0.5, 0.5, 1e-2)
    penalty, gradient, of_bias = prior.penalty_and_gradient(logits, bias, weight)
    at = (logits.double() + bias.double()).requires_grad_()
    exact = prior._replace(typical=prior.typical.double()).penalty(torch.nn.functional.softplus(at))
    (expected,) = torch.autograd.grad(exact, at, weight.double())
    np.testing.assert_allclose(penalty, exact.detach(), rtol=1e-5, atol=1e-4)
    scale = float(expected.abs().max())
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(of_bias, expected.sum(dim=0), rtol=1e-4, atol=1e-5 * scale)


def test_what_is_not_a_number_shows():
    logits = torch.zeros(2, N_VARS)
    logits[1, 3] = float("nan")
    prior = SparseComposition(torch.ones(N_VARS), 0.5, 0.5, 1e-2)
    penalty, gradient, _ = prior.penalty_and_gradient(logits, torch.zeros(N_VARS), torch.ones(2))
    assert penalty.isfinite().tolist() == [True, False]
    assert gradient[0].isfinite().all()


def test_several_threads_give_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(N, N_VARS, generator=generator), torch.randn(N_VARS, generator=generator)
    prior, weight = SparseComposition(torch.ones(N_VARS), 0.5, 0.5, 1e-2), torch.ones(N)
    with compiled(True):
        once = prior.penalty_and_gradient(logits, bias, weight)
        monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        torch.testing.assert_close(prior.penalty_and_gradient(logits, bias, weight), once, rtol=1e-6, atol=1e-6)
