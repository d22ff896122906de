from __future__ import annotations

import threading
import weakref

import pytest
import torch

from cellstill.train import fit
from cellstill.train.loop import evaluating, set_training


class Modes(torch.nn.Module):
    """Notes in which mode its parts are."""

    global_parameters = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).requires_grad_(False)
        self.learns = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))
        self.seen = []

    def loss(self, batch):
        parts = (self, self.frozen, self.frozen[1], self.learns, self.learns[1])
        self.seen.append(tuple(part.training for part in parts))
        return self.learns(self.frozen(batch["x"])).squeeze(1) - batch["y"]


@pytest.mark.parametrize("frozen_training", [False, True])
def test_frozen_parts_stay_in_their_mode_and_the_rest_trains(data, loaders, frozen_training):
    module = Modes().eval()
    module.frozen.train(frozen_training)
    before = module.frozen[0].weight.clone()
    fit(module, *loaders(data), max_epochs=2, accelerator="cpu")
    train = (True, frozen_training, frozen_training, True, True)
    assert module.seen == ([train] * 5 + [(False,) * 5]) * 2
    assert torch.equal(module.frozen[0].weight, before)


def test_modes_are_put_back_part_by_part():
    module = Modes()
    module.frozen.eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert module.training
    assert not module.frozen.training
    assert module.learns[1].training
    set_training(module)
    assert not module.frozen[1].training


def test_an_error_leaves_no_thread_behind(new_line, data, loaders):
    class Fails(new_line):
        def loss(self, batch):
            raise ValueError("first")

    module = Fails()
    with pytest.raises(ValueError, match="first") as error:
        fit(module, *loaders(data, prefetch=2), max_epochs=2, accelerator="cpu")
    # Even while the traceback, which holds the loop's frames, is alive.
    assert error.value.__traceback__ is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "cellstill-ahead"]
    assert not module.training


def test_nothing_of_a_run_is_kept(new_line, data, loaders):
    module = new_line()
    train, validation = loaders(data, device="cpu")
    fit(module, train, validation, max_epochs=1, accelerator="cpu")
    resident = weakref.ref(train._resident)
    alive = weakref.ref(module)
    del module, train, validation
    assert alive() is None
    assert resident() is None


@pytest.mark.parametrize("settings", [{"prefetch": 2}, {"device": "cpu"}], ids=str)
def test_prefetched_and_resident_counts_train_to_the_same_weights(new_line, data, loaders, settings):
    first = new_line()
    second = new_line()
    second.load_state_dict(first.state_dict())
    expected = fit(first, *loaders(data), max_epochs=3, accelerator="cpu")
    found = fit(second, *loaders(data, **settings), max_epochs=3, accelerator="cpu")
    assert found.equals(expected)
    assert torch.equal(first.linear.weight, second.linear.weight)


def test_any_sized_iterable_of_minibatches_will_do(new_line, data):
    x, y = (torch.as_tensor(data[name], dtype=torch.float32) for name in ("x", "y"))
    batches = [{"x": x[i : i + 50], "y": y[i : i + 50]} for i in range(0, 200, 50)]
    history = fit(new_line(), batches, max_epochs=100, lr=0.1, accelerator="cpu")
    assert history["train_loss"].iloc[-1] < 0.05


def test_minibatches_of_another_device_are_sent(new_line, data, loaders):
    from cellstill.train.loop import Loop
    from cellstill.train.plans import Plan

    plan = Plan(new_line())
    loop = Loop(
        plan,
        plan.configure_optimizers(),
        *loaders(data),
        device=torch.device("meta"),
        autocast=torch.no_grad,
        gradient_clip=None,
    )
    assert all(tensor.is_meta for batch in loop.batches(loop.train) for tensor in batch.values())
