"""What we take from harmonypy, by name, orientation and meaning."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from cellstill._compat.harmony import run_harmony

SETTINGS = {"n_clusters": 6, "theta": 2.0, "sigma": 0.1, "alpha": 0.2, "max_iter": 8, "tol": 1e-4, "seed": 0}


@pytest.fixture(scope="module")
def cells():
    """Three clusters in two batches, one of which is shifted."""
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(0, 3, 240), rng.integers(0, 2, 240)
    pca = 6 * np.eye(6)[kind] + np.outer(batch, [0, 0, 0, 2, 0, 0]) + rng.normal(0, 0.5, (240, 6))
    return pca.astype(np.float32), kind, batch


def gap(embedding, kind, batch):
    """Mean distance between the batches of a type."""
    means = {(k, b): embedding[(kind == k) & (batch == b)].mean(axis=0) for k in range(3) for b in (0, 1)}
    return np.mean([np.linalg.norm(means[k, 0] - means[k, 1]) for k in range(3)])


def test_cells_are_rows_and_batches_come_together(cells):
    pca, kind, batch = cells
    result = run_harmony(pca, {"batch": batch}, **SETTINGS)
    assert result.corrected.shape == pca.shape
    assert gap(result.corrected, kind, batch) < 0.35 * gap(pca, kind, batch)
    # Its coordinates are those that went in: what is corrected stays near its own cell.
    assert np.abs(result.corrected - pca).max() < 3


def test_memberships_are_soft_clusters_of_cells(cells):
    pca, kind, batch = cells
    memberships = run_harmony(pca, {"batch": batch}, **SETTINGS).memberships
    assert memberships.shape == (240, 6)
    np.testing.assert_allclose(memberships.sum(axis=1), 1, atol=1e-5)
    found = memberships.argmax(axis=1)
    assert len(np.unique(found)) > 2
    for k in np.unique(found):
        assert np.bincount(kind[found == k]).max() / (found == k).sum() > 0.95


def test_the_objective_falls_until_the_tolerance(cells):
    pca, _, batch = cells
    loose = run_harmony(pca, {"batch": batch}, **SETTINGS | {"tol": 0.5}).objective
    tight = run_harmony(pca, {"batch": batch}, **SETTINGS | {"tol": 0.0, "max_iter": 5}).objective
    assert len(loose) < len(tight) == 6
    assert tight[-1] < tight[0]


@pytest.mark.parametrize("setting", ["alpha", "theta", "sigma"])
def test_every_setting_reaches_harmonypy(cells, setting):
    pca, _, batch = cells
    value = {"alpha": 50.0, "theta": 0.0, "sigma": 1.0}[setting]
    default = run_harmony(pca, {"batch": batch}, **SETTINGS).corrected
    changed = run_harmony(pca, {"batch": batch}, **SETTINGS | {setting: value}).corrected
    assert np.abs(default - changed).max() > 5e-3  # two runs with equal settings agree in every bit


def test_the_seed_decides(cells):
    pca, _, batch = cells
    first, again = (run_harmony(pca, {"batch": batch}, **SETTINGS).corrected for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_it_is_silent_and_leaves_the_logger_alone(cells, capfd):
    pca, _, batch = cells
    logger = logging.getLogger("harmonypy")
    level = logger.level
    run_harmony(pca, {"batch": batch}, **SETTINGS)
    assert logger.level == level
    assert capfd.readouterr() == ("", "")
