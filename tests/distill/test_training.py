"""How training runs: interrupted and resumed, compiled, in lower precision, watched."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from cellstill import Distiller
from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning, InvalidArgumentError, StoreError

SCRIPT = """
import os, signal, sys, warnings
from cellstill import Distiller
from cellstill.data import simulate_counts

warnings.simplefilter("ignore")
folder, phase, epoch = sys.argv[1], sys.argv[2], int(sys.argv[3])

def stop(found, number, losses):
    if (found, number) == (phase, epoch):
        os.kill(os.getpid(), signal.SIGKILL)

adata = simulate_counts(n_obs=300, n_vars=120, seed=3)
model = Distiller(adata, "batch", n_latent=8)
model.train(6, 8, accelerator="cpu", progress=stop, checkpoint=folder)
"""


def train(**settings) -> Distiller:
    adata = simulate_counts(n_obs=300, n_vars=120, seed=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Harmony stopped at max_iter", category=CellstillWarning)
        return Distiller(adata, "batch", n_latent=8).train(6, 8, accelerator="cpu", **{"progress": False, **settings})


@pytest.fixture(scope="module")
def whole() -> Distiller:
    return train()


def weights(model: Distiller) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.module.state_dict().items()}


@pytest.mark.parametrize(("phase", "epoch"), [("encoder", 3), ("decoder", 4)])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(whole, tmp_path, phase, epoch):
    folder = tmp_path / "checkpoint"
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), phase, str(epoch)], check=False)
    assert killed.returncode == -signal.SIGKILL
    epochs = []
    resumed = train(checkpoint=folder, resume=True, progress=lambda name, number, losses: epochs.append((name, number)))
    assert 0 < len(epochs) < 14 - epoch
    assert epochs[-1] == ("decoder", 7)
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(array, weights(resumed)[name], err_msg=name)
    np.testing.assert_array_equal(whole.latent.student, resumed.latent.student)
    for phase_name, frame in whole.history.items():
        assert frame.equals(resumed.history[phase_name])


def test_a_checkpoint_is_not_overwritten_nor_taken_for_another_run(tmp_path):
    train(checkpoint=tmp_path)
    with pytest.raises(StoreError, match=r"exists\. Pass resume=True"):
        train(checkpoint=tmp_path)
    with pytest.raises(StoreError, match="lr"):
        train(checkpoint=tmp_path, resume=True, lr=1e-2)


@pytest.mark.parametrize(
    "settings", [{"compile": True}, {"precision": "bf16-mixed"}], ids=["compiled", "bfloat16_products"]
)
def test_other_arithmetic_ends_near_the_same_losses(settings):
    # Without validation: two epochs of nearly equal losses would leave it to rounding which weights are kept.
    plain, other = (train(train_size=1.0, **each) for each in ({}, settings))
    for phase, frame in plain.history.items():
        bound = 1e-4 if "compile" in settings else 0.01
        np.testing.assert_allclose(other.history[phase]["train_loss"], frame["train_loss"], rtol=bound, err_msg=phase)
    agreement = np.corrcoef(other.latent.student.ravel(), plain.latent.student.ravel())[0, 1]
    assert agreement > 0.999


def test_two_calls_agree_bit_for_bit_also_compiled():
    first, second = train(compile=True), train(compile=True)
    for name, array in weights(first).items():
        np.testing.assert_array_equal(array, weights(second)[name], err_msg=name)


def test_progress_is_told_of_every_epoch(whole):
    seen = []
    train(progress=lambda phase, epoch, losses: seen.append((phase, epoch, losses["validation_loss"])))
    expected = [
        (phase, epoch, loss)
        for phase in ("encoder", "decoder")
        for epoch, loss in whole.history[phase]["validation_loss"].items()
    ]
    assert seen == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "16"}, "precision='16' is not known. Use one of: '32-true', 'bf16-mixed'"),
        ({"compile": "yes"}, "compile='yes' is not known. Use one of: True, False, 'auto'"),
        ({"resume": True}, "resume=True needs the checkpoint"),
    ],
    ids=["precision", "compile", "resume_from_nowhere"],
)
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        train(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "16"}, "precision='16' is not known"),
        ({"compile": "yes"}, "compile='yes' is not known"),
        ({"batch_size": 0}, "batch_size=0 has to be an integer of at least 1"),
        ({"train_size": 1.5}, "train_size=1.5 and validation_size=None must be shares"),
        ({"n_epochs_encoder": 2.5}, "n_epochs_encoder=2.5 has to be an integer"),
        ({"lr": "a"}, "lr='a' has to be a number above 0"),
        ({"train_size": "most"}, "train_size='most' has to be a share"),
        ({"patience": -1}, "patience=-1 has to be an integer of at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked_before_the_teacher_takes_its_time(monkeypatch, settings, message):
    monkeypatch.setattr("cellstill.distill.training.fit_pca", None)
    adata = simulate_counts(n_obs=60, n_vars=30, n_batches=2, seed=0)
    with pytest.raises(InvalidArgumentError, match=message):
        Distiller(adata, "batch").train(**settings)
