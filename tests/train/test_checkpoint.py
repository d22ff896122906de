from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from cellstill.errors import InvalidArgumentError, StoreError, TrainingError
from cellstill.nn.compiled import compiled
from cellstill.nn.layers import MLP
from cellstill.train import fit, seeded
from cellstill.train import run as run_module

SETTINGS = {
    "max_epochs": 7,
    "lr": 0.02,
    "weight_decay": 0.01,
    "kl_warmup": 9,
    "patience": 4,
    "gradient_clip": 5.0,
    "accelerator": "cpu",
}


def assert_same_end(module, history, expected, expected_history):
    """Bit for bit: weights, buffers, losses, and the random numbers that come next."""
    pd.testing.assert_frame_equal(history, expected_history, check_exact=True)
    assert module.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.fixture
def uninterrupted(new_noisy, data, loaders):
    with seeded(0):
        module = new_noisy()
        history = fit(module, *loaders(data), **SETTINGS)
        follows = torch.rand(3)
    return module, history, follows


class StopError(Exception):
    """Interrupts a run between two epochs."""


def stop_after(epoch):
    def progress(phase, done, losses):
        if done == epoch:
            raise StopError

    return progress


@pytest.mark.parametrize("epochs", [[0], [1], [3], [6], [0, 1, 2, 3, 4, 5]], ids=str)
def test_a_run_that_was_interrupted_between_epochs_ends_as_one_that_never_was(
    tmp_path, new_noisy, data, loaders, uninterrupted, epochs
):
    path = tmp_path / "deep" / "run.safetensors"
    for i, epoch in enumerate(epochs):
        # Other weights and other random numbers each time: everything has to come from the checkpoint.
        with seeded(0 if i == 0 else 100 + i), pytest.raises(StopError):
            fit(
                new_noisy(),
                *loaders(data),
                **SETTINGS,
                checkpoint=path,
                resume=i > 0,
                progress=stop_after(epoch),
            )
    with seeded(99):
        module = new_noisy()
        history = fit(module, *loaders(data), **SETTINGS, checkpoint=path, resume=True)
        follows = torch.rand(3)
    assert_same_end(module, history, *uninterrupted[:2])
    assert torch.equal(follows, uninterrupted[2])
    assert os.listdir(path.parent) == ["run.safetensors"]


@pytest.mark.parametrize("step", [1, 5, 6, 23])
def test_a_run_that_was_interrupted_within_an_epoch_goes_on_from_its_start(
    tmp_path, new_noisy, data, loaders, uninterrupted, step
):
    class Interrupted(new_noisy):
        def __init__(self) -> None:
            super().__init__()
            self.n = 0

        def loss(self, batch, kl_weight=1.0):
            self.n += self.training
            if self.n > step:
                raise KeyboardInterrupt
            return super().loss(batch, kl_weight)

    # A checkpoint knows the class of its module by name.
    Interrupted.__name__ = "Noisy"
    path = tmp_path / "run.safetensors"
    with seeded(0), pytest.raises(KeyboardInterrupt):
        fit(Interrupted(), *loaders(data, prefetch=2), **SETTINGS, checkpoint=path)
    assert path.exists() == (step >= 5)
    with seeded(99 if step >= 5 else 0):
        module = new_noisy()
        history = fit(module, *loaders(data), **SETTINGS, checkpoint=path, resume=True)
    assert_same_end(module, history, *uninterrupted[:2])


SCRIPT = textwrap.dedent(
    """
    import importlib.util, os, pathlib, sys, time
    import numpy as np
    path, folder, seed, slow = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    spec = importlib.util.spec_from_file_location("parts", pathlib.Path(folder) / "conftest.py")
    parts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    from cellstill.data import CountsLoader
    from cellstill.train import fit, seeded

    with np.load(path + ".npz") as file:
        data = dict(file)

    class Noisy(parts.Noisy):
        def loss(self, batch, kl_weight=1.0):
            time.sleep(slow)
            return super().loss(batch, kl_weight)

    with seeded(seed):
        module = Noisy()
        fit(
            module,
            CountsLoader(parts.COUNTS, data, indices=np.arange(150), shuffle=True, batch_size=32, prefetch=1),
            CountsLoader(parts.COUNTS, data, indices=np.arange(150, 200)),
            checkpoint=path,
            resume=True,
            progress=lambda phase, epoch, losses: print(epoch, flush=True),
            **eval(sys.argv[5]),
        )
    """
)


def test_a_process_that_was_killed_is_resumed_to_the_same_end(tmp_path, new_noisy, data, loaders, uninterrupted):
    path = tmp_path / "run.safetensors"
    np.savez(f"{path}.npz", **data)
    arguments = [sys.executable, "-c", SCRIPT, str(path), str(Path(__file__).parent), "0", "0.1", repr(SETTINGS)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "2\n":
                break
        # In the middle of epoch 3: a step takes 0.1 s, and the epoch five of them.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.25)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    with seeded(99):
        module = new_noisy()
        epochs = []
        history = fit(
            module,
            *loaders(data),
            **SETTINGS,
            checkpoint=path,
            resume=True,
            progress=lambda phase, epoch, losses: epochs.append(epoch),
        )
    assert epochs == [3, 4, 5, 6]
    assert_same_end(module, history, *uninterrupted[:2])


def test_early_stopping_goes_on_where_it_was(tmp_path, new_noisy, data, loaders):
    noise = {"x": data["x"], "y": np.random.default_rng(1).normal(size=200)}
    settings = {"max_epochs": 200, "lr": 0.1, "patience": 3, "accelerator": "cpu"}
    with seeded(0):
        expected = new_noisy()
        expected_history = fit(expected, *loaders(noise), **settings)
    assert len(expected_history) < 100
    best = int(expected_history["validation_loss"].argmin())
    path = tmp_path / "run"
    # Between the best epoch and the end, where only the count of patience and the best weights decide.
    with seeded(0), pytest.raises(StopError):
        fit(new_noisy(), *loaders(noise), **settings, checkpoint=path, progress=stop_after(best + 1))
    with seeded(9):
        module = new_noisy()
        history = fit(module, *loaders(noise), **settings, checkpoint=path, resume=True)
    assert_same_end(module, history, expected, expected_history)


def test_a_finished_run_resumes_to_itself(tmp_path, new_noisy, data, loaders, uninterrupted):
    path = tmp_path / "run"
    with seeded(0):
        fit(new_noisy(), *loaders(data), **SETTINGS, checkpoint=path)
    content, called = path.read_bytes(), []
    with seeded(5):
        module = new_noisy()
        train, validation = loaders(data)
        history = fit(
            module,
            train,
            validation,
            **SETTINGS,
            checkpoint=path,
            resume=True,
            progress=lambda *done: called.append(done),
        )
        follows = torch.rand(3)
    assert_same_end(module, history, *uninterrupted[:2])
    assert torch.equal(follows, uninterrupted[2])
    assert called == []
    assert train.epoch == 7
    assert path.read_bytes() == content
    assert not module.training
    assert len(history.attrs["seconds"]) == len(history)


def test_training_without_a_checkpoint_goes_the_same_way(tmp_path, new_noisy, data, loaders, uninterrupted):
    with seeded(0):
        module = new_noisy()
        history = fit(module, *loaders(data), **SETTINGS, checkpoint=tmp_path / "run")
    assert_same_end(module, history, *uninterrupted[:2])


def test_a_checkpoint_is_safetensors_and_json(tmp_path, new_line, data, loaders):
    path = tmp_path / "run"
    history = fit(new_line(), *loaders(data), max_epochs=2, accelerator="cpu", checkpoint=path)
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["cellstill"])
        names = set(file.keys())
    assert header["epochs"] == history.to_dict(orient="records")
    assert header["finished"] is True
    assert header["step"] == 10
    assert {"weights:linear.weight", "moments:linear.weight/exp_avg", "best:linear.bias", "rng:cpu"} <= names


@pytest.fixture
def written(tmp_path, new_line, data, loaders):
    path = tmp_path / "run"
    with pytest.raises(StopError):
        fit(new_line(), *loaders(data), max_epochs=3, accelerator="cpu", checkpoint=path, progress=stop_after(1))
    return path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.5}, "lr=0.001 there and 0.5 here"),
        ({"max_epochs": 4}, "max_epochs=3 there and 4 here"),
        ({"patience": None, "weight_decay": 1.0}, "weight_decay=0.0 there and 1.0 here, patience=10 there and None"),
        ({"precision": "bf16-mixed"}, "precision='32-true' there"),
    ],
    ids=str,
)
def test_other_settings_are_refused(written, new_line, data, loaders, settings, said):
    settings = {"max_epochs": 3, "accelerator": "cpu", **settings}
    with pytest.raises(StoreError, match=f"belongs to another run: {said}"):
        fit(new_line(), *loaders(data), **settings, checkpoint=written, resume=True)


def test_another_architecture_is_refused(written, new_line, data, loaders):
    class Line(torch.nn.Module):
        global_parameters = frozenset()

        def __init__(self, n_in=3, bias=True, dropout=None, frozen=False) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(n_in, 1, bias=bias)
            if dropout is not None:
                self.dropout = torch.nn.Dropout(dropout)
            if frozen:
                self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)

        loss = new_line.loss

    def refused(**changes):
        with pytest.raises(StoreError, match="belongs to another run") as error:
            fit(Line(**changes), *loaders(data), max_epochs=3, accelerator="cpu", checkpoint=written, resume=True)
        return str(error.value)

    assert "linear.weight is float32 (1, 3) there and float32 (1, 4) here" in refused(n_in=4)
    assert "linear.bias is float32 (1,) there and absent here" in refused(bias=False)
    assert "the module has ) there and (dropout): Dropout(p=0.2, inplace=False) here" in refused(dropout=0.2)
    assert "frozen parameters have other values" in refused(frozen=True)
    fit(Line(), *loaders(data), max_epochs=3, accelerator="cpu", checkpoint=written, resume=True)


def test_settings_that_no_shape_shows_are_refused(tmp_path, new_line, data, loaders):
    @dataclass(frozen=True)
    class Config:
        penalty: float = 0.1
        prior: str = "gamma"

    class Configured(new_line):
        def __init__(self, config, dropout=0.1) -> None:
            super().__init__()
            self.config = config
            self.network = MLP([3, 4, 1], dropout=dropout)

    path = tmp_path / "run.safetensors"
    settings = {"max_epochs": 2, "accelerator": "cpu", "checkpoint": path}
    fit(Configured(Config()), *loaders(data), **settings)

    def refused(*made_of, compile=False):
        with pytest.raises(StoreError, match="belongs to another run") as error, compiled(compile):
            fit(Configured(*made_of), *loaders(data), **settings, resume=True)
        return str(error.value)

    assert "another run: penalty=0.1 there and 0.2 here. Resume" in refused(Config(penalty=0.2))
    assert "another run: prior='gamma' there and 'horseshoe' here. Resume" in refused(Config(prior="horseshoe"))
    assert "dropout=[0.1] there and dropout=[0.5] here" in refused(Config(), 0.5)
    assert "compiled=False there and True here" in refused(Config(), compile=True)
    fit(Configured(Config()), *loaders(data), **settings, resume=True)


def test_other_data_are_refused(written, new_line, data, loaders):
    def refused(train, *validation):
        with pytest.raises(StoreError, match="belongs to another run") as error:
            fit(new_line(), train, *validation, max_epochs=3, accelerator="cpu", checkpoint=written, resume=True)
        return str(error.value)

    train, validation = loaders(data)
    assert "its training data" in refused(loaders(data, batch_size=31)[0], validation)
    assert "its training data" in refused(loaders(data, seed=1)[0], validation)
    assert "its validation data" in refused(train)
    changed = {**data, "y": data["y"] + np.eye(200)[199]}
    assert "its validation data" in refused(train, loaders(changed)[1])
    assert "its training data" in refused([{"x": torch.zeros(2, 3), "y": torch.zeros(2)}], validation)


def test_a_checkpoint_is_not_overwritten_by_accident(written, new_line, data, loaders):
    content = written.read_bytes()
    with pytest.raises(StoreError, match=r"run exists\. Pass resume=True"):
        fit(new_line(), *loaders(data), max_epochs=3, accelerator="cpu", checkpoint=written)
    assert written.read_bytes() == content
    with pytest.raises(InvalidArgumentError, match="resume=True needs the checkpoint"):
        fit(new_line(), *loaders(data), max_epochs=3, accelerator="cpu", resume=True)


@pytest.mark.parametrize("damage", ["truncated", "not_safetensors", "no_header", "folder", "newer"])
def test_a_damaged_checkpoint_is_refused(written, new_line, data, loaders, damage):
    from safetensors.torch import save

    content = written.read_bytes()
    if damage == "folder":
        written.unlink()
        written.mkdir()
    else:
        written.write_bytes(
            {
                "truncated": content[:-10],
                "not_safetensors": b"weights",
                "no_header": save({"weights:linear.weight": torch.zeros(1, 3)}),
                "newer": save({}, {"cellstill": json.dumps({"checkpoint_version": 99})}),
            }[damage]
        )
    said = "has checkpoint version 99" if damage == "newer" else "is not a checkpoint, or damaged"
    with pytest.raises(StoreError, match=said):
        fit(new_line(), *loaders(data), max_epochs=3, accelerator="cpu", checkpoint=written, resume=True)


def test_a_crash_while_writing_leaves_the_checkpoint_before_it(tmp_path, new_line, data, loaders, monkeypatch):
    path, replaced = tmp_path / "run", []
    replace = os.replace

    def crash(source, target):
        replaced.append(target)
        if len(replaced) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(StoreError, match=r"Cannot write the checkpoint .*run: No space left on device"):
        fit(new_line(), *loaders(data), max_epochs=5, accelerator="cpu", checkpoint=path)
    with safe_open(path, "np") as file:
        assert len(json.loads(file.metadata()["cellstill"])["epochs"]) == 2
    assert os.listdir(tmp_path) == ["run"]


def test_a_run_that_failed_can_be_resumed_from_its_last_finite_epoch(tmp_path, new_line, data, loaders, monkeypatch):
    class Line(new_line):
        steps = 0

        def loss(self, batch):
            self.steps += self.training
            return super().loss(batch) * (torch.nan if self.steps > 12 else 1.0)

    path = tmp_path / "run"
    with seeded(0):
        expected = new_line()
        history = fit(expected, *loaders(data), max_epochs=4, accelerator="cpu")
    with seeded(0), pytest.raises(TrainingError, match="in epoch 2"):
        fit(Line(), *loaders(data), max_epochs=4, accelerator="cpu", checkpoint=path)
    module = new_line()
    assert_same_end(
        module,
        fit(module, *loaders(data), max_epochs=4, accelerator="cpu", checkpoint=path, resume=True),
        expected,
        history,
    )


def test_the_time_of_epochs_is_kept_over_a_resumption(tmp_path, new_line, data, loaders, monkeypatch):
    clock = iter(np.arange(100.0))
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: float(next(clock)))
    path = tmp_path / "run"
    with pytest.raises(StopError):
        fit(new_line(), *loaders(data), max_epochs=4, accelerator="cpu", checkpoint=path, progress=stop_after(1))
    history = fit(new_line(), *loaders(data), max_epochs=4, accelerator="cpu", checkpoint=path, resume=True)
    assert history.attrs["seconds"] == [1.0] * 4
    assert list(history.columns) == ["train_loss", "validation_loss"]
