from __future__ import annotations

import pytest
import torch

from cellstill.errors import InvalidArgumentError
from cellstill.train import Plan, fit, seeded
from cellstill.train.warmup import warmup_steps


@pytest.mark.parametrize(
    ("length", "n_epochs", "steps_per_epoch", "expected"),
    [
        pytest.param(None, 10, 5, 0, id="none"),
        pytest.param(0, 10, 5, 0, id="zero_steps"),
        pytest.param(0.0, 10, 5, 0, id="zero_share"),
        pytest.param(7, 10, 5, 7, id="steps_within_an_epoch"),
        pytest.param(0.3, 10, 5, 15, id="share"),
        pytest.param(400, 10, 5, 45, id="longer_than_training_leaves_the_last_epoch"),
        pytest.param(1.0, 10, 5, 45, id="whole_share_leaves_the_last_epoch"),
        pytest.param(1, 1, 1, 0, id="a_single_step"),
        pytest.param(100, 1, 9, 4, id="half_of_a_single_epoch"),
        pytest.param(1.0, 2, 1, 1, id="two_steps"),
    ],
)
def test_a_warmup_ends_before_training_does(length, n_epochs, steps_per_epoch, expected):
    assert warmup_steps(length, n_epochs, steps_per_epoch) == expected


@pytest.mark.parametrize("length", [-1, -0.1, 1.5, True, "all", float("nan")], ids=str)
def test_impossible_lengths(length):
    with pytest.raises(InvalidArgumentError, match="kl_warmup="):
        warmup_steps(length, 10, 5)


class Recording(torch.nn.Module):
    """Notes the weights it is given; its validation loss is scripted, so that early stopping can be predicted."""

    global_parameters = frozenset()

    def __init__(self, validation_losses=()) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.given = {True: [], False: []}
        self.validation_losses = list(validation_losses)

    def loss(self, batch, kl_weight):
        self.given[self.training].append(kl_weight)
        loss = self.weight.expand(len(batch["rows"]))
        if not self.training and self.validation_losses:
            return torch.full_like(loss, self.validation_losses.pop(0))
        return loss


def test_the_weight_rises_step_by_step_and_is_one_in_validation(data, loaders):
    module = Recording()
    fit(module, *loaders(data), max_epochs=4, kl_warmup=8, patience=None, accelerator="cpu")
    # Five steps an epoch.
    assert module.given[True] == pytest.approx([i / 8 for i in range(8)] + [1.0] * 12)
    assert module.given[False] == [1.0] * 4


def test_a_module_that_takes_a_weight_gets_one_without_a_warmup(data, loaders):
    module = Recording()
    fit(module, *loaders(data), max_epochs=2, accelerator="cpu")
    assert set(module.given[True]) == {1.0}


def test_early_stopping_and_the_best_weights_count_after_the_warmup_only(data, loaders):
    # Warm-up of 8 of 5 steps an epoch: epoch 2 is the first at full weight. Epoch 0 would be the best of all.
    losses = [0.0, 1.0, 5.0, 4.0, 4.5, 4.5, 4.5, 4.5]
    module, weights = Recording(losses), []
    history = fit(
        module,
        *loaders(data),
        max_epochs=8,
        kl_warmup=8,
        patience=2,
        lr=0.1,
        accelerator="cpu",
        progress=lambda phase, epoch, _: weights.append(module.weight.item()),
    )
    assert history["validation_loss"].tolist() == losses[:6]
    assert module.weight.item() == weights[3]


def test_patience_does_not_end_a_warmup(data, loaders):
    module = Recording([float(i) for i in range(10)])
    history = fit(module, *loaders(data), max_epochs=10, kl_warmup=0.6, patience=1, accelerator="cpu")
    assert module.given[True][-1] == 1.0
    assert len(history) == 6 + 2


def test_one_epoch_of_training_reaches_full_weight_and_keeps_its_weights(data, loaders):
    module = Recording()
    fit(module, *loaders(data), max_epochs=1, kl_warmup=1000, lr=0.1, accelerator="cpu")
    assert module.given[True] == pytest.approx([0, 0.5, 1, 1, 1])
    assert module.weight.item() == pytest.approx(-0.5, abs=1e-3)


def test_a_warmup_needs_a_module_that_takes_a_weight(new_line, data, loaders):
    with pytest.raises(InvalidArgumentError, match=r"kl_warmup=5 is given, but Line\.loss takes no kl_weight"):
        fit(new_line(), *loaders(data), max_epochs=2, kl_warmup=5, accelerator="cpu")
    with pytest.raises(InvalidArgumentError, match=r"kl_warmup=1\.5 has to be"):
        Plan(Recording(), kl_warmup=1.5)


def test_a_collapsing_latent_is_kept_by_the_warmup():
    """A prior that is too strong at first: with a warm-up the module fits the data before the prior pulls."""

    class Tug(torch.nn.Module):
        global_parameters = frozenset()

        def __init__(self) -> None:
            super().__init__()
            self.z = torch.nn.Parameter(torch.zeros(1))

        def loss(self, batch, kl_weight=1.0):
            return ((self.z - 3).square() + kl_weight * 100 * self.z.square()).expand(len(batch["rows"]))

    def weight_after_first_epoch(kl_warmup):
        module = Tug()
        batches = [{"rows": torch.arange(4)}] * 100
        seen = []
        with seeded(0):
            fit(
                module,
                batches,
                max_epochs=2,
                lr=0.05,
                kl_warmup=kl_warmup,
                accelerator="cpu",
                progress=lambda *_: seen.append(module.z.item()),
            )
        return max(seen), seen[-1]

    assert weight_after_first_epoch(None)[0] < 0.1
    # At the end the full prior holds in both: 3 / 101.
    assert weight_after_first_epoch(100)[1] == pytest.approx(3 / 101, abs=0.02)
