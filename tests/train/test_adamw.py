"""The compiled AdamW against torch's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cellstill.nn.compiled import compiled
from cellstill.train import Plan, fit, seeded
from cellstill.train.adamw import CompiledAdamW, fits

SHAPES = [(7, 5), (1,), (), (33,), (2, 3, 4)]


def groups(parameters):
    return [
        {"params": parameters[:3], "lr": 0.01, "weight_decay": 0.1},
        {"params": parameters[3:], "lr": 0.1, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-3},
    ]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(optimizer, n, seed=1, skip=()):
    """Steps along gradients of widely different sizes, all zero now and then."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(n):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                scale = 10.0 ** torch.randint(-12, 6, parameter.shape, generator=generator)
                gradient = torch.randn(parameter.shape, generator=generator) * scale * (step % 5 != 3)
                parameter.grad = None if step in skip else gradient
        optimizer.step()


def assert_same(found, expected, **tolerance):
    for one, other in zip(found.param_groups, expected.param_groups, strict=True):
        for ours, torchs in zip(one["params"], other["params"], strict=True):
            torch.testing.assert_close(ours, torchs, **tolerance)
            state, known = found.state[ours], expected.state[torchs]
            assert state.keys() == known.keys() == {"step", "exp_avg", "exp_avg_sq"}
            for name, tensor in known.items():
                assert state[name].dtype == tensor.dtype
                assert state[name].shape == tensor.shape
                torch.testing.assert_close(state[name], tensor, **(tolerance if name != "step" else {}))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_steps_are_those_of_torch(n_threads, monkeypatch):
    monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    ours, torchs = CompiledAdamW(groups(parameters())), torch.optim.AdamW(groups(parameters()), fused=True)
    for optimizer in (ours, torchs):
        take_steps(optimizer, 300, skip=(4, 5))
    assert float(ours.state[ours.param_groups[0]["params"][0]]["step"]) == 298
    assert_same(ours, torchs, rtol=2e-5, atol=2e-6)


def test_it_goes_on_from_the_state_of_torch_and_back():
    torchs = torch.optim.AdamW(groups(parameters()), fused=True)
    take_steps(torchs, 10)
    start = [p.detach() for group in torchs.param_groups for p in group["params"]]
    ours = CompiledAdamW(groups([torch.nn.Parameter(tensor.clone()) for tensor in start]))
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for optimizer in (ours, torchs):
        take_steps(optimizer, 10, seed=2)
    assert_same(ours, torchs, rtol=2e-5, atol=2e-6)


def test_a_copy_goes_on_by_itself():
    first = CompiledAdamW(groups(parameters()))
    take_steps(first, 5)
    second = copy.deepcopy(first)
    for optimizer in (first, second):
        take_steps(optimizer, 5, seed=3)
    assert_same(first, second, rtol=0, atol=0)


class StopError(Exception):
    """Interrupts a run between two epochs."""


def test_a_compiled_run_that_was_interrupted_ends_as_one_that_never_was(tmp_path, new_noisy, data, loaders):
    def stop(phase, epoch, losses):
        if epoch == 1:
            raise StopError

    settings = {"max_epochs": 4, "patience": None, "accelerator": "cpu", "weight_decay": 0.01}
    path = tmp_path / "run.safetensors"
    with compiled(True):
        with seeded(0):
            expected = new_noisy()
            fit(expected, *loaders(data), **settings)
        with seeded(0), pytest.raises(StopError):
            fit(new_noisy(), *loaders(data), **settings, checkpoint=path, progress=stop)
        with seeded(9):
            resumed = new_noisy()
            fit(resumed, *loaders(data), **settings, checkpoint=path, resume=True)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_equal_steps_give_equal_bits():
    first, second = (CompiledAdamW(groups(parameters())) for _ in range(2))
    for optimizer in (first, second):
        take_steps(optimizer, 20)
    assert_same(first, second, rtol=0, atol=0)


def test_a_gradient_out_of_order_in_memory_and_none_at_all():
    weight, other = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = CompiledAdamW([weight, other])
    optimizer.step()
    assert not optimizer.state
    weight.grad = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]]).T
    optimizer.step()
    np.testing.assert_allclose(weight.detach(), -1e-3 * weight.grad.sign(), rtol=1e-5)
    assert other not in optimizer.state
    assert torch.equal(other, torch.ones(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    weight = torch.nn.Parameter(torch.zeros(20))
    weight.grad = torch.zeros(20)
    weight.grad[11] = bad
    CompiledAdamW([weight]).step()
    assert torch.nonzero(~weight.isfinite()).tolist() == [[11]]


def test_a_closure_is_evaluated_with_gradients():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = CompiledAdamW([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert weight.item() == pytest.approx(2 - 1e-3 - 2e-5, abs=1e-6)


@pytest.mark.parametrize("mode", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plan_compiles_what_fits(new_line, mode, dtype):
    with compiled(mode):
        optimizer = Plan(new_line().to(dtype)).configure_optimizers()
    assert isinstance(optimizer, CompiledAdamW) == (mode and dtype == torch.float32)
    assert not fits(torch.zeros(3, 2).T)
