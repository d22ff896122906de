from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from scvi import REGISTRY_KEYS
from scvi.model import SCVI
from scvi.model.base import UnsupervisedTrainingMixin
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from scvi.train import TrainingPlan, TrainRunner

from cellstill._compat.scvi import RegisteredModel, register
from cellstill.data import CountsLoader, SimulationConfig, simulate_counts
from cellstill.errors import InvalidArgumentError
from cellstill.train import CountsDataModule, Plan, fit, seeded

pytestmark = [
    # What Lightning and scvi-tools say about any model that is trained in this way.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory.*"),
]


def rates(module, batch, n_vars):
    """Poisson factor model: library times softmax of a linear map of the cell's own log proportions and its batch."""
    n = len(batch["indptr"]) - 1
    rows = torch.repeat_interleave(torch.arange(n), batch["indptr"].diff())
    dense = torch.zeros(n, n_vars)
    dense[rows, batch["indices"].long()] = batch["data"]
    library = dense.sum(dim=1, keepdim=True)
    hidden = module.encoder(torch.log1p(1e4 * dense / library)) + module.batches(batch["batch"].squeeze(1))
    log_rate = torch.log_softmax(module.decoder(torch.tanh(hidden)), dim=1)
    return -(dense * (log_rate + library.log()) - library * log_rate.exp()).mean(dim=1)


class Factors(torch.nn.Module):
    global_parameters = frozenset()

    def __init__(self, n_vars: int, n_batch: int) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.encoder = torch.nn.Linear(n_vars, 8)
        self.decoder = torch.nn.Linear(8, n_vars)
        self.batches = torch.nn.Embedding(n_batch, 8)

    def loss(self, batch):
        return rates(self, batch, self.n_vars)


class FactorModel(UnsupervisedTrainingMixin, RegisteredModel):
    """A model in the style of scvi-tools."""

    _data_splitter_cls = CountsDataModule.from_manager
    _training_plan_cls = Plan

    def __init__(self, adata) -> None:
        super().__init__(adata)
        self.module = Factors(self.summary_stats.n_vars, self.summary_stats.n_batch)

    @classmethod
    def setup_anndata(cls, adata, batch_key):
        register(cls, adata, layer=None, categorical={"batch": batch_key}, setup_args={"batch_key": batch_key})


@pytest.fixture(scope="module")
def adata():
    data = simulate_counts(SimulationConfig(n_obs=400, n_vars=60), seed=0)
    assert sp.issparse(data.X)
    FactorModel.setup_anndata(data, "batch")
    return data


def quiet(**settings):
    return {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, **settings}


def test_a_train_runner_reaches_the_losses_of_a_direct_fit(adata):
    with seeded(0):
        model = FactorModel(adata)
    data = CountsDataModule.from_manager(model.adata_manager, train_size=0.8, batch_size=64, seed=3)
    direct = Factors(60, model.summary_stats.n_batch)
    direct.load_state_dict(model.module.state_dict())
    history = fit(
        direct, data.train_dataloader(), data.val_dataloader(), max_epochs=6, lr=1e-2, patience=None, accelerator="cpu"
    )
    runner = TrainRunner(
        model,
        training_plan=Plan(model.module, lr=1e-2),
        data_splitter=data,
        max_epochs=6,
        **quiet(check_val_every_n_epoch=1),
    )
    runner()
    assert history["train_loss"].iloc[-1] < 0.9 * history["train_loss"].iloc[0]
    for name in ("train_loss", "validation_loss"):
        # The same cells in the same order from the same start; the logger holds float32.
        np.testing.assert_allclose(model.history[name][name].astype(float), history[name], rtol=1e-6)
    np.testing.assert_array_equal(model.train_indices, data.train_idx)
    np.testing.assert_array_equal(model.validation_indices, data.val_idx)
    assert model.is_trained
    assert not model.module.training


def test_a_model_of_scvi_tools_uses_it_unchanged(adata):
    with seeded(0):
        model = FactorModel(adata)
        model.train(
            max_epochs=30,
            train_size=0.8,
            validation_size=0.1,
            batch_size=64,
            early_stopping=True,
            early_stopping_monitor="validation_loss",
            early_stopping_patience=3,
            plan_kwargs={"lr": 3e-2},
            datasplitter_kwargs={"seed": 1, "evaluation_batch_size": 500},
            **quiet(),
        )
    losses = model.history["validation_loss"]["validation_loss"].astype(float).to_numpy()
    assert losses.min() < 0.9 * losses[0]
    assert [len(part) for part in (model.train_indices, model.validation_indices, model.test_indices)] == [320, 40, 40]


class Their(BaseModuleClass):
    """The same factor model, with the methods of a module of scvi-tools."""

    def __init__(self, n_vars: int, n_batch: int) -> None:
        super().__init__()
        self.factors = Factors(n_vars, n_batch)

    def _get_inference_input(self, tensors, **kwargs):
        return {"tensors": tensors}

    def _get_generative_input(self, tensors, inference_outputs, **kwargs):
        return {"tensors": tensors}

    @auto_move_data
    def inference(self, tensors):
        return {}

    @auto_move_data
    def generative(self, tensors):
        return {"per_cell": self.factors.loss(tensors)}

    def loss(self, tensors, inference_outputs, generative_outputs, kl_weight: float = 1.0):
        per_cell = generative_outputs["per_cell"]
        nothing = torch.zeros_like(per_cell)
        return LossOutput(per_cell.mean(), reconstruction_loss=per_cell, kl_local=nothing)


class TheirPlan(TrainingPlan):
    """A plan of scvi-tools infers the size of a minibatch from its tensors, which CSR rows do not tell."""

    def log(self, *args, **kwargs):
        kwargs["batch_size"] = kwargs.get("batch_size") or self.n
        super().log(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        self.n = len(batch["rows"])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.n = len(batch["rows"])
        super().validation_step(batch, batch_idx)


def test_a_module_and_plan_of_scvi_tools_train_on_csr_rows(adata):
    class Theirs(FactorModel):
        _training_plan_cls = TheirPlan

        def __init__(self, adata) -> None:
            super().__init__(adata)
            self.module = Their(self.summary_stats.n_vars, self.summary_stats.n_batch)

    Theirs.setup_anndata(adata, "batch")
    with seeded(0):
        model = Theirs(adata)
        direct = Factors(60, model.summary_stats.n_batch)
        direct.load_state_dict(model.module.factors.state_dict())
        model.train(
            max_epochs=5,
            batch_size=64,
            check_val_every_n_epoch=1,
            plan_kwargs={"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.0},
            **quiet(),
        )
    data = CountsDataModule.from_manager(model.adata_manager, batch_size=64)
    history = fit(
        direct, data.train_dataloader(), data.val_dataloader(), max_epochs=5, lr=1e-2, patience=None, accelerator="cpu"
    )
    for theirs, ours in (("train_loss", "train_loss"), ("elbo_validation", "validation_loss")):
        np.testing.assert_allclose(model.history[theirs][theirs].astype(float), history[ours], rtol=1e-4)


def test_minibatches_hold_what_is_registered(adata):
    manager = FactorModel(adata).adata_manager
    data = CountsDataModule.from_manager(manager)
    batch = next(iter(data.val_dataloader()))
    rows = batch["rows"].numpy()
    np.testing.assert_array_equal(rows, data.val_idx)
    expected = np.asarray(manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY))[rows]
    assert batch["batch"].dtype == torch.int64
    assert batch["batch"].shape == (len(rows), 1)
    np.testing.assert_array_equal(batch["batch"], expected)
    counts = sp.csr_matrix((batch["data"], batch["indices"], batch["indptr"]), shape=(len(rows), 60))
    np.testing.assert_array_equal(counts.toarray(), adata.X[rows].toarray())


@pytest.mark.parametrize(
    ("shares", "sizes"),
    [
        ({}, (90, 10, 0)),
        ({"train_size": 0.5, "validation_size": 0.2}, (50, 20, 30)),
        ({"train_size": 1.0}, (100, 0, 0)),
    ],
    ids=str,
)
def test_parts_are_disjoint_complete_and_seeded(shares, sizes):
    counts = sp.csr_matrix(np.ones((100, 3)))
    data = CountsDataModule(counts, seed=5, **shares)
    parts = (data.train_idx, data.val_idx, data.test_idx)
    assert tuple(map(len, parts)) == sizes
    assert (data.n_train, data.n_val) == sizes[:2]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    np.testing.assert_array_equal(CountsDataModule(counts, seed=5, **shares).train_idx, data.train_idx)
    assert (data.val_dataloader() == []) == (sizes[1] == 0)
    assert (data.test_dataloader() == []) == (sizes[2] == 0)
    assert data.train_dataloader().shuffle


def test_splits_can_be_given(adata):
    manager = FactorModel(adata).adata_manager
    counts = sp.csr_matrix(np.ones((10, 3)))
    data = CountsDataModule(counts, splits=(np.array([5, 1]), np.array([2]), np.array([], dtype=int)))
    np.testing.assert_array_equal(data.train_idx, [1, 5])
    data = CountsDataModule.from_manager(manager, external_indexing=[np.arange(300), np.arange(300, 310)])
    assert (data.n_train, data.n_val, len(data.test_idx)) == (300, 10, 0)
    data = CountsDataModule.from_manager(manager, train_size=0.5, validation_size=0.25, shuffle_set_split=False)
    np.testing.assert_array_equal(data.train_idx, np.arange(200))
    np.testing.assert_array_equal(data.test_idx, np.arange(300, 400))


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (([0, 1], [1], []), "holds the cell 1 twice"),
        (([0, 1], [10**7], []), "holds 10000000; the"),
        (([], [1], []), "no cell to train on"),
        (([0], [1]), "has 2 parts"),
    ],
)
def test_impossible_splits(splits, said):
    with pytest.raises(InvalidArgumentError, match=said):
        CountsDataModule(sp.csr_matrix(np.ones((10, 3))), splits=splits)


def test_one_device_only(adata):
    with pytest.raises(InvalidArgumentError, match="distributed_sampler=True is not supported"):
        CountsDataModule.from_manager(FactorModel(adata).adata_manager, distributed_sampler=True)


def test_backed_and_csc_counts_are_read_as_csr(adata):
    other = ad.AnnData(
        adata.X.tocsc(), obs=pd.DataFrame({"batch": adata.obs["batch"].to_numpy()}, index=adata.obs_names)
    )
    FactorModel.setup_anndata(other, "batch")
    loader = CountsDataModule.from_manager(FactorModel(other).adata_manager).train_dataloader()
    assert isinstance(loader, CountsLoader)
    np.testing.assert_array_equal(loader.counts.toarray(), adata.X.toarray())


def test_scvi_itself_trains_on_dense_minibatches(adata):
    class Ours(SCVI):
        _data_splitter_cls = CountsDataModule.from_manager

    Ours.setup_anndata(adata, batch_key="batch")
    with seeded(0), warnings.catch_warnings():
        # Lightning would say so, if it could not tell the size of a minibatch.
        warnings.filterwarnings("error", message=".*infer the `batch_size`.*")
        model = Ours(adata, n_hidden=16, n_latent=3)
        model.train(
            max_epochs=4, batch_size=64, plan_kwargs={"lr": 1e-2}, datasplitter_kwargs={"dense": True}, **quiet()
        )
    losses = model.history["train_loss"]["train_loss"].astype(float)
    assert losses.iloc[-1] < 0.95 * losses.iloc[0]
    data = CountsDataModule.from_manager(model.adata_manager, batch_size=64, dense=True)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert next(iter(batch)) == "X"
    np.testing.assert_array_equal(batch["X"], adata.X[batch["rows"].numpy()].toarray())


@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_of_a_trainer_forgets_the_losses_of_the_warm_up(new_line, mode):
    rng = np.random.default_rng(0)
    per_cell = {"x": rng.normal(size=(120, 3)).astype(np.float32), "y": rng.normal(size=120).astype(np.float32)}
    data = CountsDataModule(sp.csr_matrix((120, 2), dtype=np.float32), per_cell, batch_size=32)
    sign, weights, epochs = 1 if mode == "min" else -1, [], []

    class Told(new_line):
        """Its validation loss is told: best at the start, worse up to the end of the warm-up, better until epoch 14."""

        def loss(self, batch, kl_weight=1.0):
            if self.training:
                weights.append(kl_weight)
                return super().loss(batch)
            epoch = len(weights) // len(data.train_dataloader())
            epochs.append(epoch)
            value = 10.0 + epoch if epoch <= 10 else 40.0 - min(epoch, 14)
            return 0 * super().loss(batch) + sign * value

    stopping = EarlyStopping("validation_loss", patience=3, mode=mode)
    plan = Plan(Told(), lr=1e-9, kl_warmup=0.25)
    Trainer(
        max_epochs=40,
        callbacks=[stopping],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(plan, data)
    steps = len(data.train_dataloader())
    assert plan.n_warmup == 10 * steps
    assert weights[plan.n_warmup - 1] < 1
    assert weights[plan.n_warmup :] == [1.0] * (len(weights) - plan.n_warmup)
    # The best is epoch 14, and three more are waited for.
    assert len(weights) == 17 * steps
