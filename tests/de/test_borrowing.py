from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.de import PseudobulkConfig, borrowing, pseudobulk_de
from cellstill.de.borrowing import shared_effects
from cellstill.de.posterior import expected_fdr, prob_effect
from cellstill.errors import InvalidArgumentError

ERRORS = np.array([0.15, 0.2, 0.35, 0.8])


def draw(pattern: str, seed: int, correlation: float = 0.2, n_genes: int = 1500):
    """True effects, estimates and errors of genes in four levels, with errors that levels have in common."""
    rng = np.random.default_rng(seed)
    n_levels = len(ERRORS)
    size = rng.choice([-1, 1], n_genes) * (0.3 + np.abs(rng.normal(0, 0.8, n_genes)))
    own = rng.choice([-1, 1], (n_genes, n_levels)) * (0.3 + np.abs(rng.normal(0, 0.8, (n_genes, n_levels))))
    true = {
        "same": size[:, None] * np.ones(n_levels),
        "similar": size[:, None] * np.exp(rng.normal(0, 0.4, (n_genes, n_levels))),
        "unrelated": own * (rng.random((n_genes, n_levels)) < 0.4),
        "not_in_the_last": size[:, None] * np.array([1, 1, 1, 0]),
        "nothing": np.zeros((n_genes, n_levels)),
    }[pattern] * (rng.random(n_genes) < 0.15)[:, None]
    errors = ERRORS * np.exp(rng.normal(0, 0.3, (n_genes, n_levels)))
    covariance = correlation + (1 - correlation) * np.eye(n_levels)
    # By Cholesky: of the default, singular vectors, processors make different draws.
    common = rng.multivariate_normal(np.zeros(n_levels), covariance, n_genes, method="cholesky")
    return true, true + errors * common, errors


def called(effects, errors):
    _, prob = shared_effects(effects, errors)
    return np.column_stack([expected_fdr(column) <= 0.05 for column in prob.T])


@pytest.mark.parametrize("correlation", [0.0, 0.2], ids=["independent_errors", "common_errors"])
@pytest.mark.parametrize("pattern", ["same", "similar", "unrelated"])
def test_calls_are_false_no_more_often_than_they_say(pattern, correlation):
    false, calls, found, alone, effects_there = (np.zeros(4) for _ in range(5))
    for seed in range(3):
        true, effects, errors = draw(pattern, seed, correlation)
        is_called = called(effects, errors)
        false += (is_called & (true == 0)).sum(axis=0)
        calls += is_called.sum(axis=0)
        found += (is_called & (true != 0)).sum(axis=0)
        by_itself = [expected_fdr(prob_effect(effects[:, j], errors[:, j], 1e6, 0.0)) <= 0.05 for j in range(4)]
        alone += (np.column_stack(by_itself) & (true != 0)).sum(axis=0)
        effects_there += (true != 0).sum(axis=0)
    assert (false / np.maximum(calls, 50) < 0.085).all()
    recall, recall_alone = found / effects_there, alone / effects_there
    if pattern == "unrelated":
        assert (recall > recall_alone - 0.05).all()
    else:
        assert recall[3] > 4 * recall_alone[3]
        assert recall[3] > 0.3


def test_a_level_without_effects_borrows_none():
    _, effects, errors = draw("not_in_the_last", 0)
    is_called = called(effects, errors)
    assert is_called[:, 3].sum() <= 1
    assert is_called[:, 0].sum() > 150


def test_where_nothing_moves_nothing_is_called():
    assert sum(called(*draw("nothing", seed)[1:]).sum() for seed in range(4)) <= 1


def test_means_are_nearer_the_truth_than_estimates():
    true, effects, errors = draw("similar", 1)
    mean, _ = shared_effects(effects, errors)
    assert (np.square(mean - true).mean(axis=0) < 0.4 * np.square(effects - true).mean(axis=0)).all()
    assert np.square(mean - true).mean(axis=0)[3] < 0.06 * np.square(effects - true).mean(axis=0)[3]


def test_genes_tested_in_one_level_only_and_orders_are_handled():
    _, effects, errors = draw("same", 2)
    effects[:200, 1:] = errors[:200, 1:] = np.nan
    mean, prob = shared_effects(effects, errors)
    assert (mean[:200, 1:] == 0).all()
    assert (prob[:200, 1:] == 0).all()
    assert np.isfinite(mean).all()
    order = np.random.default_rng(0).permutation(len(effects))
    again, _ = shared_effects(effects[order][:, ::-1], errors[order][:, ::-1])
    np.testing.assert_allclose(again[:, ::-1], mean[order], atol=1e-6)


@pytest.fixture(scope="module")
def types():
    """One large and one small cell type with the same effects, eight donors."""
    rng = np.random.default_rng(0)
    n_genes = 400
    lfc = np.where(np.arange(n_genes) < 60, rng.choice([-1.0, 1.0], n_genes) * rng.uniform(0.8, 1.6, n_genes), 0.0)
    base = np.exp(rng.normal(0, 1, n_genes))
    blocks, rows = [], []
    for kind, n_cells in (("large", 60), ("small", 6)):
        for donor in range(8):
            own = np.exp(rng.normal(0, 0.1, n_genes))
            mean = base * own * 2 ** (lfc * (donor % 2))
            blocks.append(rng.poisson(mean * rng.gamma(3.0, 1 / 3, (n_cells, n_genes))))
            rows += [(f"d{donor}", "treated" if donor % 2 else "control", kind)] * n_cells
    obs = pd.DataFrame(rows, columns=["donor", "condition", "cell_type"])
    return sp.csr_matrix(np.concatenate(blocks)), obs, [f"g{i}" for i in range(n_genes)], lfc


def test_a_small_cell_type_learns_from_a_large_one(types):
    counts, obs, genes, lfc = types
    arguments = {"groupby": "condition", "group1": "treated", "group2": "control", "sample_key": "donor"}
    alone, together = (
        pseudobulk_de(
            counts,
            obs,
            genes,
            **arguments,
            within="cell_type",
            config=PseudobulkConfig(min_cells_per_sample=3, borrow=borrow),
        )
        for borrow in (False, True)
    )
    before, after = alone["small"].table, together["small"].table
    assert after["is_de"][lfc != 0].mean() > 1.3 * before["is_de"][lfc != 0].mean()
    assert after["is_de"][lfc == 0].sum() <= 3
    np.testing.assert_array_equal(after["fdr_alone"], before["fdr"])
    for column in ("lfc", "lfc_se", "p_value"):
        np.testing.assert_array_equal(after[column], before[column])
    for result in together.results.values():
        table = result.table
        tested = table["p_value"].notna()
        assert table["prob_de"][tested].between(0, 1).all()
        assert table["fdr"][tested].between(0, 1).all()
        surest = table[table["is_de"]].sort_values(["prob_de", "p_value"], ascending=[False, True], kind="stable")
        assert result.de_genes == surest["gene"].tolist()
        drawn = result.volcano().axes[0].collections
        assert sum(len(points.get_offsets()) for points in drawn) == tested.sum()
    moved = after["is_de"]
    assert (np.sign(after["lfc_borrowed"][moved]) == np.where(after["direction"][moved] == "up", 1, -1)).all()
    assert any("fdr_alone" in note for note in together.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"within": None}, "borrow=True needs within="),
        ({"rows": "large"}, "needs two levels of 'cell_type'"),
    ],
    ids=["no_levels", "one_level"],
)
def test_what_cannot_be_borrowed_is_said(types, change, message):
    counts, obs, genes, _ = types
    arguments = {"groupby": "condition", "group1": "treated", "group2": "control", "sample_key": "donor"}
    arguments |= {"within": "cell_type", "config": PseudobulkConfig(borrow=True, min_cells_per_sample=3)}
    rows = np.flatnonzero(obs["cell_type"] == change.get("rows", obs["cell_type"]))
    arguments |= {key: value for key, value in change.items() if key != "rows"}
    with pytest.raises(InvalidArgumentError, match=message):
        pseudobulk_de(counts[rows], obs.iloc[rows], genes, **arguments)


def test_an_effect_floor_and_borrowing_exclude_each_other():
    with pytest.raises(InvalidArgumentError, match="Set lfc_threshold=0"):
        PseudobulkConfig(borrow=True, lfc_threshold=1.0)


@pytest.mark.parametrize("correlation", [0.6, 0.8])
@pytest.mark.parametrize("pattern", ["same", "unrelated", "not_in_the_last", "nothing"])
def test_errors_that_levels_have_in_common_are_no_effects(pattern, correlation):
    """Taken off on average, over what may move elsewhere and what does not, 7 and 75 genes are called in the last."""
    false, calls = np.zeros(4), np.zeros(4)
    for seed in range(4):
        true, effects, errors = draw(pattern, seed, correlation)
        is_called = called(effects, errors)
        false += (is_called & (true == 0)).sum(axis=0)
        calls += is_called.sum(axis=0)
    moving = {"same": 4, "unrelated": 3, "not_in_the_last": 3, "nothing": 0}[pattern]
    assert (calls[:moving] > 150).all()
    assert (false[:moving] < (0.085 if pattern == "unrelated" else 0.06) * calls[:moving]).all()
    assert false[moving:].sum() <= (3 if correlation < 0.7 else 12)


def test_errors_that_are_known_hide_effects_no_longer(monkeypatch):
    """Where levels move each for itself, their errors say most: 154 are found in the third without, 203 with them."""
    found, false = (np.zeros(2) for _ in range(2))
    for at, known in enumerate((False, True)):
        if known:
            monkeypatch.undo()
        else:
            monkeypatch.setattr(borrowing, "_correlation_of_errors", lambda *_: 0.0)
        for seed in range(4):
            true, effects, errors = draw("unrelated", seed, correlation=0.9)
            is_called = called(effects, errors)[:, 2]
            found[at] += (is_called & (true[:, 2] != 0)).sum()
            false[at] += (is_called & (true[:, 2] == 0)).sum()
    assert found[1] > 1.15 * found[0]
    assert false[1] <= 1.1 * false[0]
    assert false[1] / (found + false)[1] < 0.13


def test_levels_that_say_the_same_of_all_genes_are_no_reason_to_fail():
    effects, errors = np.full((100, 2), 0.1), np.full((100, 2), 0.2)
    mean, prob = shared_effects(effects, errors)
    assert np.isfinite(mean).all()
    assert np.isfinite(prob).all()


def test_an_effect_of_unknown_sign_is_not_probable():
    """Where every gene moves, one that nothing is known of moves too, but nobody knows which way."""
    rng = np.random.default_rng(0)
    errors = np.full((600, 2), 0.05)
    effects = rng.normal(0, 1, (600, 2)) + errors * rng.normal(size=(600, 2))
    effects[0], errors[0] = [0.0, np.nan], [3.0, np.nan]
    _, prob = shared_effects(effects, errors)
    assert prob[0, 0] < 0.6
    assert np.median(prob[1:]) > 0.99
