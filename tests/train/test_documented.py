"""The page on models of one's own, run as it is written but for the number of epochs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cellstill.data import simulate_counts

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    for written, run in (("max_epochs=100", "max_epochs=3"), (".train()", ".train(2, accelerator='cpu')")):
        code = code.replace(written, run)
    found = {"adata": simulate_counts(n_obs=300, n_vars=60, n_batches=2, n_cell_types=2, seed=0)}
    exec(code, found)
    history, tested = found["history"], found["trainer"].callback_metrics
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert 0.5 < float(tested["test_loss"]) / history["validation_loss"].iloc[-1] < 1.5
    assert (tmp_path / "run.safetensors").exists()
