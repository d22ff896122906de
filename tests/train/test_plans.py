from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from lightning.pytorch import Trainer

from cellstill.errors import InvalidArgumentError, TrainingError
from cellstill.train import CountsDataModule, Loss, Plan, fit, seeded
from cellstill.train.plans import LossSums


def test_a_record_and_the_loss_of_each_cell_train_the_same_way(new_line, data, loaders):
    class Recorded(new_line):
        def loss(self, batch):
            per_cell = super().loss(batch)
            terms = {"square": per_cell.detach().sum(), "bias": self.linear.bias.detach().sum() * len(per_cell)}
            return Loss(per_cell.mean(), None, len(per_cell), terms)

    first = new_line()
    second = Recorded()
    second.load_state_dict(first.state_dict())
    settings = {"max_epochs": 4, "lr": 0.1, "accelerator": "cpu"}
    plain, recorded = fit(first, *loaders(data), **settings), fit(second, *loaders(data), **settings)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert list(recorded.columns) == [
        "train_loss",
        "validation_loss",
        "train_square",
        "train_bias",
        "validation_square",
        "validation_bias",
    ]
    np.testing.assert_array_equal(recorded[plain.columns], plain)
    np.testing.assert_allclose(recorded["train_square"], recorded["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(recorded["validation_square"], recorded["validation_loss"], rtol=1e-6)
    # The bias at the end of an epoch is what validation sees.
    assert recorded["validation_bias"].iloc[recorded["validation_loss"].argmin()] == pytest.approx(
        second.linear.bias.item()
    )


def test_a_loss_of_another_shape_is_refused(new_line, data, loaders):
    class Mean(new_line):
        def loss(self, batch):
            return super().loss(batch).mean()

    with pytest.raises(InvalidArgumentError, match=r"Mean\.loss returned a tensor of shape \(\)"):
        fit(Mean(), *loaders(data), max_epochs=1, accelerator="cpu")


def test_a_loss_of_other_cells_is_refused(new_line, data, loaders):
    class Few(new_line):
        def loss(self, batch):
            return super().loss(batch)[:3]

    with pytest.raises(InvalidArgumentError, match=r"Few\.loss returned 3 losses for a minibatch of 32 cells"):
        fit(Few(), *loaders(data), max_epochs=1, accelerator="cpu")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_epochs": 2.5}, "max_epochs=2.5 has to be an integer of at least 0"),
        ({"max_epochs": -1}, "max_epochs=-1"),
        ({"patience": -1}, "patience=-1"),
        ({"min_delta": -1.0}, "min_delta=-1.0"),
        ({"gradient_clip": 0}, "gradient_clip=0 has to be a number above 0"),
        ({"lr": -1}, "lr=-1"),
        ({"lr": "x"}, "lr='x'"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        (
            {"own_lr": {"linear.wait": 0.0}},
            "own_lr='linear.wait' is not known. Use one of: 'linear.weight', 'linear.bias'",
        ),
        ({"own_lr": {"linear.bias": -0.1}}, r"own_lr\['linear.bias'\]=-0.1"),
        ({"obs_names": ["a"]}, "obs_names has 1 names; 200 cells are counted"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_trained(new_line, data, loaders, setting, message):
    module = new_line()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidArgumentError, match=message):
        fit(module, *loaders(data), **{"max_epochs": 1, "accelerator": "cpu", **setting})
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_module_without_a_loss_is_refused(data, loaders):
    with pytest.raises(InvalidArgumentError, match=r"module=Linear has no loss. Give it a method loss\(batch\)"):
        fit(torch.nn.Linear(3, 1), *loaders(data), max_epochs=1, accelerator="cpu")


def test_a_module_without_anything_to_train_is_refused(new_line, data, loaders):
    with pytest.raises(InvalidArgumentError, match="Line has no parameter that requires a gradient"):
        fit(new_line().requires_grad_(False), *loaders(data), max_epochs=1, accelerator="cpu")


def test_parameters_learn_at_rates_of_their_own(new_line, data, loaders):
    class WithGlobal(new_line):
        global_parameters = frozenset({"linear.bias"})

    def rates(**settings):
        module = WithGlobal()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = Plan(module, lr=0.1, weight_decay=0.5, **settings).configure_optimizers().param_groups
        return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert rates() == {"linear.weight": (0.1, 0.5), "linear.bias": (1.0, 0.0)}
    found = rates(own_lr={"linear.weight": 0.0, "linear.bias": 0.02})
    assert found == {"linear.weight": (0.0, 0.5), "linear.bias": (pytest.approx(0.2), 0.0)}
    module = WithGlobal()
    start = copy.deepcopy(module)
    fit(module, *loaders(data), max_epochs=2, lr=0.1, own_lr={"linear.weight": 0.0}, accelerator="cpu")
    assert torch.equal(module.linear.weight, start.linear.weight)
    assert not torch.equal(module.linear.bias, start.linear.bias)


def test_sums_are_kept_in_float64():
    sums = LossSums()
    for _ in range(1000):
        sums.add(Loss(torch.tensor(0.1), None, 3, {"a": torch.tensor(0.3)}))
    assert sums.pop("train") == pytest.approx({"train_loss": np.float32(0.1), "train_a": np.float32(0.1)}, rel=1e-12)
    assert sums.pop("train") == {}
    assert sums.is_finite()


def test_fit_takes_the_steps_of_a_loop_written_by_hand(new_noisy, data, loaders):
    settings = {"lr": 0.01, "weight_decay": 0.1}
    with seeded(1):
        module = new_noisy()
        by_hand = copy.deepcopy(module)
        train, _ = loaders(data)
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in by_hand.named_parameters() if name != "scale"], **settings},
                {"params": [by_hand.scale], "lr": 0.1, "weight_decay": 0.0},
            ],
            fused=True,
        )
        torch.manual_seed(2)
        for _ in range(3):
            for batch in train:
                optimizer.zero_grad()
                by_hand.loss(batch).total.backward()
                # Last bits of the norm depend on the order of its terms.
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
                optimizer.step()
        torch.manual_seed(2)
        fit(module, loaders(data)[0], max_epochs=3, patience=None, gradient_clip=0.5, accelerator="cpu", **settings)
    # Without validation the training loss chooses; it falls from epoch to epoch here.
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


def trainer(**settings):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*is smaller than the logging interval.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_a_trainer_tests_and_clips_in_lower_precision(new_line, data):
    counts = sp.csr_matrix(np.ones((200, 2), dtype=np.float32))
    cells = CountsDataModule(counts, data, train_size=0.6, validation_size=0.2, batch_size=32)
    plan = Plan(new_line(), lr=0.01)
    lower = trainer(max_epochs=2, precision="bf16-mixed", gradient_clip_val=1e-3)
    before = plan.module.linear.weight.detach().clone()
    lower.fit(plan, datamodule=cells)
    assert not torch.equal(plan.module.linear.weight, before)
    tested = trainer().test(plan, datamodule=cells, verbose=False)[0]["test_loss"]
    with torch.inference_mode():
        rows = cells.test_idx
        x, y = (torch.from_numpy(np.asarray(data[name], np.float32)[rows]) for name in ("x", "y"))
        expected = (plan.module.linear(x).squeeze(1) - y).square().mean()
    assert tested == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*is smaller than the logging interval.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_a_lightning_trainer_follows_the_plan_to_the_same_weights(new_noisy, data, loaders):
    train, validation = loaders(data)
    with seeded(0):
        module, expected = new_noisy(), new_noisy()
        expected.load_state_dict(module.state_dict())
        torch.manual_seed(1)
        history = fit(expected, *loaders(data), max_epochs=3, patience=None, kl_warmup=7, accelerator="cpu")
        torch.manual_seed(1)
        ours = trainer(max_epochs=3)
        ours.fit(Plan(module, kl_warmup=7), train, validation)
    assert history["validation_loss"].argmin() == 2
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    logged = {name: value.item() for name, value in ours.callback_metrics.items()}
    assert logged == pytest.approx(history.iloc[-1].to_dict(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*is smaller than the logging interval.*")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero.*", "ignore:.*LeafSpec.*is deprecated")
def test_a_lightning_trainer_stops_at_a_loss_that_is_not_finite(new_line, data):
    data["y"][3] = np.nan
    module = CountsDataModule(sp.csr_matrix(np.ones((200, 2))), data, train_size=1.0)
    with pytest.raises(
        TrainingError, match=r"train_loss is nan in epoch 0, batch \d of train, because of its cells 3\."
    ):
        trainer(max_epochs=3).fit(Plan(new_line()), datamodule=module)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*is smaller than the logging interval.*")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero.*", "ignore:.*LeafSpec.*is deprecated")
@pytest.mark.parametrize("where", ["loss", "gradient of the last step", "the very last step"])
def test_what_is_not_finite_leaves_the_weights_of_the_epoch_before(new_line, data, where):
    module = CountsDataModule(sp.csr_matrix(np.ones((200, 2))), data, train_size=1.0, batch_size=50)
    ends = []

    class Breaking(new_line):
        n = 0

        def loss(self, batch):
            self.n += 1
            per_cell = super().loss(batch)
            if self.n % 4 == 1:
                ends.append(copy.deepcopy(self.state_dict()))
            if where == "loss" and self.n == 11:
                per_cell = per_cell + torch.inf
            if where != "loss" and self.n == 12:  # The last of epoch 2.
                # The loss is finite, its gradient is not.
                per_cell = per_cell + (self.linear.bias - self.linear.bias.detach()).abs().sqrt()
            terms = {"square": per_cell.detach().sum()}
            return Loss(per_cell.mean(), per_cell.detach(), len(per_cell), terms)

    line = Breaking()
    expected = {
        "loss": r"train_loss is inf \(term 'square'\) in epoch 2, batch 2 of train, for all of its cells \d",
        "gradient of the last step": r"train_loss is nan \(term 'square'\) in epoch 3, batch 0 of train",
        "the very last step": r"Weights are not finite after the last step, in epoch [23]\.",
    }[where]
    with pytest.raises(TrainingError, match=expected):
        trainer(max_epochs=3 if where == "the very last step" else 6).fit(Plan(line, lr=0.1), datamodule=module)
    assert not line.training
    assert not torch.equal(ends[1]["linear.weight"], ends[2]["linear.weight"])
    for name, tensor in line.state_dict().items():
        assert torch.equal(tensor, ends[2][name]), name


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*is deprecated")
def test_a_loss_that_is_not_finite_before_training_is_an_error_of_training(new_line, data):
    line = new_line()
    with torch.no_grad():
        line.linear.weight.fill_(torch.nan)
    module = CountsDataModule(sp.csr_matrix(np.ones((200, 2))), data)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    settings |= {"enable_checkpointing": False, "enable_model_summary": False}
    for run in (Trainer(**settings, max_epochs=1).fit, Trainer(**settings).validate):
        with pytest.raises(TrainingError, match="validation_loss is nan in epoch 0"):
            run(Plan(line), datamodule=module)
