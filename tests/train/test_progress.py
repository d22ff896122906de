from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console

from cellstill.train import fit
from cellstill.train import progress as module
from cellstill.train.progress import reporting


def drawn(new_line, data, loaders, monkeypatch, *, terminal: bool, **settings) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, legacy_windows=False)
    monkeypatch.setattr(module, "_REFRESH", 0.0)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    fit(new_line(), *loaders(data), max_epochs=3, accelerator="cpu", progress=True, **settings)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_terminal_shows_epoch_losses_rate_and_time_left(new_line, data, loaders, monkeypatch):
    shown = drawn(new_line, data, loaders, monkeypatch, terminal=True, phase="encoder")
    assert "encoder epoch 1/3" in shown
    assert "encoder epoch 3/3" in shown
    assert re.search(r"train \d+\.\d+  validation \d+\.\d+", shown)
    assert re.search(r"[\d,]+ cells/s", shown)
    assert re.search(r"0?0:00", shown)


def test_nothing_is_written_where_nobody_watches(new_line, data, loaders, monkeypatch, capfd):
    assert drawn(new_line, data, loaders, monkeypatch, terminal=False) == ""
    monkeypatch.undo()
    fit(new_line(), *loaders(data), max_epochs=2, accelerator="cpu", progress=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_no_thread_draws(new_line, data, loaders, monkeypatch):
    before = threading.active_count()
    counts = []

    class Counting(new_line):
        def loss(self, batch):
            counts.append(threading.active_count())
            return super().loss(batch)

    drawn(Counting, data, loaders, monkeypatch, terminal=True)
    assert set(counts) == {before}


@pytest.mark.parametrize("phase", [None, "decoder"])
def test_a_function_is_called_after_each_epoch(new_line, data, loaders, phase):
    called = []
    history = fit(
        new_line(),
        *loaders(data),
        max_epochs=3,
        accelerator="cpu",
        progress=lambda *given: called.append(given),
        phase=phase,
    )
    assert [given[:2] for given in called] == [(phase, 0), (phase, 1), (phase, 2)]
    assert [dict(given[2]) for given in called] == history.to_dict(orient="records")


def test_a_bar_starts_where_a_resumed_run_does():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with reporting(True, None, n_epochs=10, steps_per_epoch=5, start=4, console=console) as reporter:
        task = reporter.progress.tasks[0]
        assert (task.completed, task.total) == (20, 50)
        assert task.description == "epoch 5/10"
        reporter.epoch(4, {"train_loss": 1.0, "train_kl": 2.0})
        assert task.completed == 25
        assert task.fields["losses"] == "train 1"


def test_the_bar_is_not_drawn_at_every_step(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    with reporting(True, None, n_epochs=1, steps_per_epoch=1000, console=console) as reporter:
        refreshed = []
        monkeypatch.setattr(reporter.progress, "refresh", lambda: refreshed.append(clock[0]))
        for step in range(1000):
            clock[0] = step / 1000
            reporter.on_step(step + 1, 128 * (step + 1))
    assert 8 <= len(refreshed) <= 11
