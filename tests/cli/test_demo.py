"""The demonstration fails where the truth is not recovered."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from cellstill.cli import _truth, demo
from cellstill.cli._truth import Check


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "passed"),
    [
        (0.9, 0.9, True, True),
        (0.89, 0.9, True, False),
        (0.2, 0.2, False, True),
        (0.21, 0.2, False, False),
        (float("nan"), 0.2, False, False),
        (float("nan"), 0.2, True, False),
    ],
)
def test_a_check_is_on_the_right_side_of_its_bound(value, bound, at_least, passed):
    assert Check("x", value, bound, at_least).passed is passed


@pytest.fixture
def small(monkeypatch):
    """A demonstration that takes a second, of batches that nothing tells apart: there is nothing to correct."""

    def config(**changes):
        from cellstill.data import SimulationConfig

        return SimulationConfig(**{"n_obs": 400, "n_vars": 60, "n_batches": 2, "n_cell_types": 3, **changes})

    monkeypatch.setattr(demo, "demo_config", lambda: config(batch_sd=0.0))
    monkeypatch.setattr(demo, "N_EPOCHS", 1)


def test_it_exits_with_1_and_names_what_failed_and_keeps_the_results(cellstill, here, small):
    result = cellstill("demo")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "checks failed: batches apart before: iLISI / ceiling" in result.stderr
    checks = {c["check"]: c for c in json.loads((here / "cellstill_demo" / "truth.json").read_text())["checks"]}
    assert checks["batches apart before: iLISI / ceiling"]["passed"] is False
    assert checks["batches mixed after: iLISI / ceiling"]["passed"] is True


class Uncorrected:
    """A model whose corrected expression is not corrected: the truth of each cell, batch shift included."""

    def __init__(self, truth, keep):
        log_means = truth.varm["cell_type_log_mean"][truth.obs["cell_type"].astype(str)].to_numpy().T
        shift = truth.varm["batch_shift"][truth.obs["batch"].astype(str)].to_numpy().T
        effect = np.log(2) * np.outer(truth.obs["condition"] == "treat", truth.var["log2fc_treat"])
        rates = np.exp(log_means + keep * shift + effect)
        self.rates = rates / rates.sum(axis=1, keepdims=True)

    def corrected_expression(self):
        return np.log2(1e6 * self.rates + 1)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_the_batch_shift_that_is_left_is_measured(keep):
    from types import SimpleNamespace

    from cellstill.data import simulate_counts

    truth = simulate_counts(n_obs=600, n_vars=200, batch_sd=0.25, library_size_median=20_000.0)
    shift, error, effect = _truth._expression(SimpleNamespace(model=Uncorrected(truth, keep)), truth)
    assert shift.value == pytest.approx(keep, abs=0.02)
    assert shift.passed is (keep == 0.0)
    assert error.passed is (keep < 1.0)
    assert effect.value > 0.98


def test_an_effect_of_the_condition_that_is_removed_is_noticed():
    from types import SimpleNamespace

    from cellstill.data import simulate_counts

    truth = simulate_counts(n_obs=600, n_vars=200, batch_sd=0.25)
    changed = truth.copy()
    changed.var["log2fc_treat"] = np.random.default_rng(0).permutation(changed.var["log2fc_treat"].to_numpy())
    effect = _truth._expression(SimpleNamespace(model=Uncorrected(changed, 0.0)), truth)[2]
    assert effect.passed is False


def test_what_is_simulated_is_what_is_promised():
    config = demo.demo_config()
    assert (config.n_batches, config.n_cell_types, len(config.conditions)) == (3, 5, 2)
    assert config.n_batches * len(config.conditions) * config.n_donors_per_group == 12
    assert not np.any(config.ambient_fractions)
    assert pd.Series(config.condition_shares.ravel()).gt(0).all()
