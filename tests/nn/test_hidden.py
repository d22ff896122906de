"""The hidden layer as one compiled function, against torch's operations and autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from cellstill.nn.compiled import compiled
from cellstill.nn.hidden import hidden_layer
from cellstill.nn.layers import SparseLinear
from cellstill.nn.sparse import CSRRows

N, N_IN, N_OUT = 23, 50, 17


def rows(density: float) -> CSRRows:
    counts = sp.random(N, N_IN, density, format="csr", dtype=np.float32, random_state=0)
    return CSRRows(*(torch.from_numpy(part) for part in (counts.data, counts.indices, counts.indptr)), N_IN)


def layer(sparse: bool, dtype=torch.float32) -> tuple[nn.Module, nn.LayerNorm]:
    torch.manual_seed(0)
    linear, norm = (SparseLinear if sparse else nn.Linear)(N_IN, N_OUT), nn.LayerNorm(N_OUT, eps=1e-3)
    for parameter in (linear.bias, norm.weight, norm.bias):
        nn.init.normal_(parameter)
    return linear.to(dtype), norm.to(dtype)


def gradients(x, linear, norm, added, outer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value of the layer, and gradients in all that has one."""
    inputs = [part for part in (x, added) if isinstance(part, torch.Tensor)]
    for part in inputs:
        part.requires_grad_().grad = None
    found = hidden_layer(x, linear, norm, added)
    found.backward(outer)
    learned = [*linear.parameters(), *norm.parameters(), *inputs]
    return found.detach(), [part.grad.clone() for part in learned]


@pytest.mark.parametrize("with_added", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("kind", ["sparse", "sparse_rows_made_dense", "dense"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_value_and_gradients_are_those_of_autograd(kind, with_added, n_threads, monkeypatch):
    monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    torch.manual_seed(1)
    outer, added = torch.randn(N, N_OUT), torch.randn(N, N_OUT) if with_added else None
    x = torch.randn(N, N_IN) if kind == "dense" else rows(0.1 if kind == "sparse" else 0.6)
    linear, norm = layer(kind != "dense")
    with compiled(True):
        found, grads = gradients(x, linear, norm, added, outer)
        again, same = gradients(x, *layer(kind != "dense"), added, outer)

    weight = linear.weight.detach().double().requires_grad_()
    others = [part.detach().double().requires_grad_() for part in (linear.bias, norm.weight, norm.bias)]
    dense = (x if kind == "dense" else x.to_dense()).detach().double().requires_grad_()
    more = None if added is None else added.detach().double().requires_grad_()
    product = dense @ (weight.T if kind == "dense" else weight) + others[0]
    product = product if more is None else product + more
    expected = torch.relu(nn.functional.layer_norm(product, (N_OUT,), others[1], others[2], norm.eps))
    expected.backward(outer.double())
    wanted = [weight, *others, *([dense] if kind == "dense" else []), *([] if more is None else [more])]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert len(grads) == len(wanted)
    for grad, leaf in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=2e-5)
    assert torch.equal(again, found)
    assert all(torch.equal(one, other) for one, other in zip(grads, same, strict=True))


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_compiled_or_not_the_same(sparse):
    outer, results = torch.randn(N, N_OUT), []
    for mode in (False, True):
        torch.manual_seed(2)
        x = rows(0.1) if sparse else torch.randn(N, N_IN)
        with compiled(mode):
            results.append(gradients(x, *layer(sparse), None, outer))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [False, True], ids=["torch", "compiled"])
def test_a_part_of_the_weight_multiplies_a_part_of_the_inputs(mode):
    linear, norm = layer(False)
    x, outer, n = torch.randn(N, N_IN), torch.randn(N, N_OUT), 20
    with compiled(mode):
        expected = hidden_layer(x, linear, norm)
        wanted = torch.autograd.grad(expected, list(linear.parameters()), outer)
        one, other = linear.weight.split([n, N_IN - n], dim=1)
        found = hidden_layer(x[:, :n], linear, norm, x[:, n:] @ other.t(), one)
        grads = torch.autograd.grad(found, list(linear.parameters()), outer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_products_of_gradients_that_nobody_wants_are_left_out(of_x, of_weight, monkeypatch):
    linear, norm = layer(False)
    linear.weight.requires_grad_(of_weight)
    x = torch.randn(N, N_IN, requires_grad=of_x)
    calls, product = [], torch.mm
    with compiled(True):
        value = hidden_layer(x, linear, norm).sum()
        monkeypatch.setattr(torch, "mm", lambda *arguments: calls.append(arguments) or product(*arguments))
        value.backward()
    assert len(calls) == of_x + of_weight
    assert (x.grad is not None, linear.weight.grad is not None) == (of_x, of_weight)
    assert linear.bias.grad.abs().max() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    linear, norm = layer(False)
    x = torch.randn(N, N_IN)
    x[3, 0] = bad
    with compiled(True), torch.no_grad():
        finite = hidden_layer(x, linear, norm).isfinite().all(dim=1)
    assert finite.tolist() == [i != 3 for i in range(N)]


def test_float64_and_autocast_go_through_torch():
    linear, norm = layer(False, torch.float64)
    x = torch.randn(N, N_IN, dtype=torch.float64)
    expected = torch.relu(norm(linear(x)))
    with compiled(True):
        assert torch.equal(hidden_layer(x, linear, norm), expected)
        linear, norm = layer(False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(hidden_layer(x.float(), linear, norm), torch.relu(norm(linear(x.float()))))


def test_a_second_derivative_is_refused_instead_of_wrong():
    linear, norm = layer(False)
    with compiled(True):
        value = hidden_layer(torch.randn(N, N_IN, requires_grad=True), linear, norm)
        grad = torch.autograd.grad(value.square().sum(), linear.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
