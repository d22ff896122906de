"""Training in two processes: everything has to be as in one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cellstill.data import CountsLoader
from cellstill.data.loader import share_of
from cellstill.errors import InvalidArgumentError, StoreError
from cellstill.train import fit
from cellstill.train.devices import on_device
from cellstill.train.gradients import SummedGradients
from cellstill.train.ranks import Ranks
from cellstill.train.state import join_rng, rng_of

SCRIPT = Path(__file__).with_name("on_two_ranks.py")
_spec = importlib.util.spec_from_file_location("on_two_ranks", SCRIPT)
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_shares_are_the_whole_and_differ_by_at_most_one_cell(n_ranks):
    for n in range(1, 50):
        parts = [range(*share_of(n, rank, n_ranks)) for rank in range(n_ranks)]
        assert [cell for part in parts for cell in part] == list(range(n))
        sizes = [len(part) for part in parts]
        assert n < 2 * n_ranks or max(sizes) - min(sizes) <= 1
        assert 1 not in sizes or n == 1


@pytest.mark.parametrize("settings", [{"prefetch": 0}, {"prefetch": 2}, {"device": "cpu"}], ids=str)
def test_shares_of_a_loader_are_its_minibatches(settings):
    import scipy.sparse as sp

    counts = sp.random(100, 7, 0.4, format="csr", random_state=np.random.default_rng(0), dtype=np.float32)
    z = np.random.default_rng(1).normal(size=(100, 2))
    how = {"indices": np.arange(3, 97), "batch_size": 23, "shuffle": True, "seed": 4, **settings}
    whole = CountsLoader(counts, {"z": z}, **how)
    shared = [CountsLoader(counts, {"z": z}, **how) for _ in range(3)]
    for _ in range(2):
        each = [list(loader.shares(rank, 3)) for rank, loader in enumerate(shared)]
        for batch, *shares in zip(whole, *each, strict=True):
            n = len(batch["rows"])
            assert [share.n_whole for share in shares] == [n] * 3
            assert [len(share.batch["rows"]) for share in shares] == [share.n for share in shares]
            assert sum(share.n for share in shares) == n
            for name in ("data", "indices", "rows", "z"):
                assert torch.equal(torch.cat([share.batch[name] for share in shares]), batch[name])
            lengths = torch.cat([share.batch["indptr"].diff() for share in shares])
            assert torch.equal(lengths, batch["indptr"].diff())


def test_random_states_of_all_processes_come_apart_again():
    each = [{"cpu": torch.tensor([rank]), f"cuda:{rank % 2}": torch.tensor([10 + rank])} for rank in range(12)]
    joined = join_rng(each)
    assert joined["cpu"] is each[0]["cpu"]
    assert len(joined) == 24
    assert [rng_of(joined, rank) for rank in range(12)] == each


def test_gradients_are_added_up_and_those_that_no_process_has_stay_absent():
    class Twice(Ranks):
        """The other process has the same gradients, and one for the third parameter."""

        def add_up(self, values):
            values *= 2
            values[6:8] += 5
            # After the gradients comes how many processes have each, and then the loss.
            assert values[9:].tolist() == [2, 2, 0, 0, 3]
            values[11] += 1

    gradients = [torch.arange(4.0).reshape(2, 2), torch.tensor([0.1, 1e-9], dtype=torch.float64), None, None]
    shapes = [(2, 2), (2,), (2,), ()]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32]
    parameters = [torch.nn.Parameter(torch.zeros(how, dtype=d)) for how, d in zip(shapes, dtypes, strict=True)]
    summed = SummedGradients(parameters, Twice(0, 2))
    for _ in range(2):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        assert summed.add_up(torch.tensor(1.5)).item() == 3
        assert torch.equal(parameters[0].grad, 2 * gradients[0])
        assert torch.equal(parameters[1].grad, 2 * gradients[1])
        assert torch.equal(parameters[2].grad, torch.tensor([5.0, 5.0]))
        assert parameters[3].grad is None
        assert [parameter.grad.dtype for parameter in parameters[:3]] == dtypes[:3]


@pytest.mark.parametrize("devices", [0, -1, 1.0, True, "2"], ids=repr)
def test_a_number_of_devices_that_is_none(new_line, data, loaders, devices):
    with pytest.raises(InvalidArgumentError, match=f"devices={devices!r} has to be an integer of at least 1"):
        fit(new_line(), *loaders(data), max_epochs=1, accelerator="cpu", devices=devices)


def test_a_notebook_cannot_start_other_processes(monkeypatch, new_line, data, loaders):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(InvalidArgumentError, match="devices=2 needs a process for each.*notebook.*Write a script"):
        fit(new_line(), *loaders(data), max_epochs=1, accelerator="cpu", devices=2)


def test_what_is_no_script_cannot_start_other_processes(monkeypatch, new_line, data, loaders):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(InvalidArgumentError, match="devices=2.*'-c' is not a file.*torchrun"):
        fit(new_line(), *loaders(data), max_epochs=1, accelerator="cpu", devices=2)


def test_more_devices_than_there_are(monkeypatch, new_line, data, loaders):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidArgumentError, match="accelerator='gpu', devices=2: torch finds 1 CUDA devices"):
        fit(new_line(), *loaders(data), max_epochs=1, accelerator="gpu", devices=2)


def test_more_devices_than_processes_were_started(monkeypatch, new_line, data, loaders):
    started = {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InvalidArgumentError, match=r"devices=3 on 2 machine\(s\), and 4 processes were started"):
        fit(new_line(), *loaders(data), max_epochs=1, accelerator="cpu", devices=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left, which torchrun started; before them, two that Fabric started were killed."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kill_after(folder, 2, [sys.executable, str(SCRIPT), str(folder), "killed"], environment)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(SCRIPT), str(folder), *(run.__name__ for run in runs.ON_TWO)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert process.wait(240) == 0
    finally:
        end(process)
    return folder


def end(process):
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_after(folder, epoch, command, environment):
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=folder
    )
    watch = threading.Timer(90, end, [process])
    watch.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith(f"{epoch} "):
                break
        # In the middle of the next epoch: a step takes 0.05 s, and an epoch five of them.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.12)
    finally:
        watch.cancel()
        end(process)
        process.stdout.close()
    # By the first process alone, and both train together.
    assert said == ["0 2\n", "1 2\n", "2 2\n"]
    assert (folder / "killed").exists()


@pytest.fixture
def ends(folder):
    """Load the ends of a run by rank."""

    def load(run):
        return [torch.load(folder / f"{run.__name__}-{rank}.pt", weights_only=False) for rank in range(2)]

    return load


def assert_close(end, expected, **tolerance):
    assert end["error"] is None
    assert end["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(end["weights"][name], weight, **tolerance, msg=name)
    pd.testing.assert_frame_equal(
        end["history"], expected["history"], **{k: max(v, 1e-12) for k, v in tolerance.items()}
    )


def assert_equal(end, expected):
    """Bit for bit, and the random numbers that follow."""
    assert_close(end, expected, rtol=0, atol=0)
    pd.testing.assert_frame_equal(end["history"], expected["history"], check_exact=True)
    assert torch.equal(end["follows"], expected["follows"])


@pytest.mark.parametrize("run", [runs.exact, runs.early_stop, runs.plain_minibatches], ids=lambda run: run.__name__)
def test_two_processes_train_as_one(ends, tmp_path, run):
    expected = run(tmp_path, 1)
    first, second = ends(run)
    assert_equal(second, first)
    assert_close(first, expected, rtol=1e-10, atol=1e-12)
    assert len(expected["history"]) < 200
    assert not first["training"]
    assert torch.equal(first["weights"]["unused"], torch.ones(5, dtype=torch.float64))
    assert not torch.equal(first["weights"]["rare"], torch.ones(2, dtype=torch.float64))


NOT_FINITE = [
    runs.nan_loss,
    runs.nan_loss_seen_late,
    runs.nan_loss_of_both,
    runs.nan_gradient,
    runs.nan_gradient_seen_late,
    runs.nan_of_all,
    runs.nan_of_plain_minibatches,
    runs.nan_validation,
]


@pytest.mark.parametrize("run", NOT_FINITE, ids=lambda run: run.__name__)
def test_what_is_not_finite_in_one_process_stops_both_as_it_would_one(ends, tmp_path, run):
    expected = run(tmp_path, 1)
    assert expected["error"].startswith("TrainingError: ")
    for end in ends(run):
        assert end["error"] == expected["error"]
        assert not end["training"]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(end["weights"][name], weight)


FAILURES = [runs.failure, runs.failure_seen_late, runs.failure_in_validation]


@pytest.mark.parametrize("run", FAILURES, ids=lambda run: run.__name__)
def test_an_error_in_one_process_stops_both(ends, run):
    first, second = ends(run)
    assert second["error"] == "ValueError: out of luck"
    assert first["error"] == ("TrainingError: Training stopped because rank 1 of 2 failed with ValueError: out of luck")


def test_an_error_where_only_the_first_process_works_stops_both(ends):
    first, second = ends(runs.stopped)
    assert first["error"] == "StopError: here"
    assert second["error"] == "TrainingError: Training stopped because rank 0 of 2 failed with StopError: here"


@pytest.mark.parametrize("run", [runs.resumed, runs.finished, runs.resumed_after_a_kill], ids=lambda run: run.__name__)
def test_a_run_that_was_interrupted_ends_as_one_that_never_was(ends, run):
    """With dropout, whose random numbers are apart in each process, and batch normalisation."""
    expected = ends(runs.noisy)
    for end in [*ends(run), expected[1]]:
        assert_equal(end, expected[0])
    assert len(expected[0]["history"]) == 6


def test_with_dropout_two_processes_learn_with_other_random_numbers(ends, tmp_path):
    expected = runs.noisy(tmp_path, 1)
    found = ends(runs.noisy)[0]
    assert not torch.equal(found["weights"]["output.weight"], expected["weights"]["output.weight"])
    loss = "validation_loss"
    assert found["history"][loss].iloc[-1] < 0.8 * found["history"][loss].iloc[0]


def test_random_numbers_are_drawn_apart_and_then_together(ends):
    first, second = ends(runs.draws)
    # The last minibatch of an epoch is too small to share.
    assert len(first["drawn"]) > len(second["drawn"]) > 40
    assert not set(first["drawn"]) & set(second["drawn"])
    assert torch.equal(first["follows"], second["follows"])


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (runs.not_resumed, "StoreError: .*stopped exists"),
        (runs.other_settings, "OtherRunError: .*lr=0.02 there and 0.5 here"),
        (runs.other_data, "InvalidArgumentError: Rank 1 and rank 0 differ in data"),
        (runs.other_number, r"InvalidArgumentError: devices=3 on 1 machine\(s\), and 2 processes were started"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_both_processes_refuse(ends, run, error):
    for end in ends(run):
        with pytest.raises(AssertionError, match=error):
            raise AssertionError(end["error"])


def test_a_run_of_two_processes_is_not_resumed_by_one(folder):
    with pytest.raises(StoreError, match="devices=2 there and 1 here"):
        fit(
            runs.parts.Noisy(),
            *runs.make_loaders(runs.make_data()),
            lr=0.02,
            weight_decay=0.1,
            gradient_clip=2.0,
            accelerator="cpu",
            **runs.NOISY,
            checkpoint=folder / "stopped",
            resume=True,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_named():
    module = torch.nn.Linear(2, 1)
    with (
        pytest.raises(InvalidArgumentError, match="accelerator='gpu', devices=1: torch finds 0 CUDA devices"),
        on_device(module, "gpu", "32-true"),
    ):
        pass
