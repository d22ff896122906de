"""Factors of genes in batches: the right ones, of what is not protected, and nothing done to the form of the counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp

from cellstill.data import gene_scaling
from cellstill.data.gene_scaling import MAX_FACTOR, PRIOR_COUNTS, GeneScaling
from cellstill.errors import InvalidArgumentError

N_OBS, N_VARS = 3000, 300


def simulated(shares_of_level, *, seed=0, depth=1500.0):
    """Cells whose genes differ between batches by ``rates`` and between two levels; Poisson, depths vary."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, len(shares_of_level), N_OBS)
    level = (rng.random(N_OBS) < np.asarray(shares_of_level)[batch]).astype(int)
    rates = np.exp(rng.normal(0, 0.5, (len(shares_of_level), N_VARS)))
    profile = np.exp(rng.normal(0, 0.7, N_VARS)) * np.exp(rng.normal(0, 0.8, (2, N_VARS)) * (rng.random(N_VARS) < 0.3))
    mean = rates[batch] * profile[level]
    mean *= (depth * rng.lognormal(0, 0.4, N_OBS) / mean.sum(axis=1))[:, None]
    return sp.csr_matrix(rng.poisson(mean).astype(np.float32)), batch, level, rates


def log_ratios(rates):
    """Logarithm of each gene's rate in each batch over that in the first, less what all genes of a batch share."""
    found = np.log(rates / rates[0])
    return found - np.median(found, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5, 0.5), (0.1, 0.5, 0.9), (0.0, 0.5, 1.0)], ids=["equal", "mixed", "nested"]
)
def test_the_true_factors_come_back_whatever_the_composition_of_the_batches(shares):
    counts, batch, level, rates = simulated(shares)
    truth = log_ratios(rates)
    protected = log_ratios(1 / GeneScaling.fit(counts, batch, np.eye(2)[level]).factors)
    assert np.sqrt(np.square(protected - truth).mean()) < 0.05
    assert np.polyfit(truth[1:].ravel(), protected[1:].ravel(), 1)[0] == pytest.approx(1, abs=0.02)
    unprotected = log_ratios(1 / GeneScaling.fit(counts, batch).factors)
    error = np.sqrt(np.square(unprotected - truth).mean())
    assert error < 0.05 if shares[0] == shares[2] else error > 0.15


def test_the_fit_is_the_likelihoods_maximum(monkeypatch):
    """But for the prior."""
    monkeypatch.setattr(gene_scaling, "PRIOR_COUNTS", 0.0)
    counts, batch, level, _ = simulated((0.1, 0.5, 0.9), depth=300.0)
    scaling = GeneScaling.fit(counts, batch, np.eye(2)[level])
    dense = counts.toarray().astype(np.float64)
    cell = np.array([[dense[(batch == b) & (level == k)].sum(axis=0) for k in range(2)] for b in range(3)])
    totals = cell.sum(axis=2)
    for gene in range(0, N_VARS, 60):
        found = cell[:, :, gene]

        def loss(beta, found=found):
            eta = np.r_[0.0, beta[:2]][:, None] + beta[2:]
            return (totals * np.exp(eta) - found * eta).sum() / found.sum()

        beta = scipy.optimize.minimize(loss, np.r_[0, 0, -6, -6], method="BFGS", options={"gtol": 1e-9}).x
        rate = np.exp(np.r_[0.0, beta[:2]])
        level_of_rate = (totals.sum(axis=1) @ rate) / totals.sum()
        shares = np.exp(beta[2:]) * level_of_rate
        np.testing.assert_allclose(scaling.shares[::-1, gene], shares, rtol=1e-5)  # strata are sorted, [0, 1] first
        np.testing.assert_allclose(scaling.factors[:, gene], totals @ shares / found.sum(axis=1), rtol=1e-5)


def test_without_strata_factors_are_ratios_of_shares():
    counts, batch, _, _ = simulated((0.5, 0.5))
    found = np.array([np.asarray(counts[batch == b].sum(axis=0)).ravel() for b in range(2)]).astype(np.float64)
    expected = found.sum(axis=1, keepdims=True) * found.sum(axis=0) / found.sum()
    scaling = GeneScaling.fit(counts, batch)
    np.testing.assert_allclose(scaling.factors, (expected + PRIOR_COUNTS) / (found + PRIOR_COUNTS), rtol=1e-6)
    np.testing.assert_allclose(scaling.shares[0], found.sum(axis=0) / found.sum(), rtol=1e-12)


def test_what_batch_and_stratum_share_is_left_as_it_is():
    counts, batch, _, _ = simulated((0.5, 0.5))
    confounded = GeneScaling.fit(counts, batch, np.eye(2)[batch])
    np.testing.assert_allclose(confounded.factors, 1, rtol=1e-6)


def test_batches_that_no_stratum_joins_are_scaled_apart():
    counts, batch, level, _ = simulated((0.1, 0.3, 0.9, 0.7))
    part = batch % 2
    factors = GeneScaling.fit(counts, batch, np.hstack([np.eye(2)[part], np.eye(2)[level]])).factors
    for k in range(2):
        alone = part == k
        own = GeneScaling.fit(counts[alone], batch[alone] // 2, np.eye(2)[level[alone]]).factors
        np.testing.assert_allclose(factors[[k, k + 2]], own, rtol=1e-5)


def test_rare_genes_keep_their_counts_and_no_factor_is_large():
    counts = sp.csr_matrix(np.array([[3, 500, 0, 9000], [0, 500, 9000, 0], [0, 0, 0, 500]], dtype=np.float32))
    factors = GeneScaling.fit(counts, np.array([0, 1, 1])).factors
    assert np.isfinite(factors).all()
    assert np.abs(factors[:, 0] - 1).max() < 0.2
    assert factors[0, 2] == MAX_FACTOR
    assert factors[1, 3] > 5
    with pytest.raises(InvalidArgumentError, match=r"\[1\].*no counts"):
        GeneScaling.fit(counts[:, :1], np.array([0, 1, 1]))


@pytest.mark.parametrize("found", [(1, 0, 1000), (1, 0, 50), (3, 1, 1000)], ids=str)
def test_few_counts_where_batches_meet_move_nothing(found):
    """The second batch alone has the second stratum, whose counts say nothing of the batch."""
    rest = 50_000
    counts = sp.csr_matrix([[count, rest] for count in found], dtype=np.float32)
    factors = GeneScaling.fit(counts, np.array([0, 1, 1]), np.eye(2)[[0, 0, 1]]).factors
    np.testing.assert_allclose(factors[:, 0], 1, atol=0.16)
    assert GeneScaling.fit(counts, np.array([0, 1, 1])).factors[1, 0] < 0.9


def test_duplicate_entries_are_one_count():
    counts, batch, _, _ = simulated((0.5, 0.5))
    scaling = GeneScaling.fit(counts, batch)
    twice = sp.csr_matrix(
        (
            np.append(counts.data, np.float32(2)),
            np.append(counts.indices, counts.indices[-1]),
            np.append(counts.indptr[:-1], counts.nnz + 1),
        ),
        shape=counts.shape,
    )
    once = twice.copy()
    once.sum_duplicates()
    np.testing.assert_array_equal(scaling.apply(twice, batch).toarray(), scaling.apply(once, batch).toarray())


def test_genes_that_a_new_batch_lacks_do_not_scale_the_others():
    counts, batch, level, _ = simulated((0.3, 0.5, 0.9))
    old, covariates = batch < 2, np.eye(2)[level]
    scaling = GeneScaling.fit(counts[old], batch[old], covariates[old])
    whole = scaling.of_new_batch(counts[~old], covariates[~old])
    has = np.arange(N_VARS) % 3 > 0
    part = scaling.of_new_batch(sp.csr_matrix(counts[~old].multiply(has)), covariates[~old])
    assert (part[~has] == 1).all()
    change = np.log(part[has] / whole[has])
    # What a batch does to its depth is not known of a part of the genes; a common factor is all that may be left.
    assert np.std(change) < 0.03
    assert abs(change.mean()) < 0.2


def test_a_gene_without_counts_and_a_single_batch_change_nothing():
    counts, batch, level, _ = simulated((0.5, 0.5))
    counts = sp.csr_matrix(counts.multiply(np.arange(N_VARS) != 7))
    assert (GeneScaling.fit(counts, batch, np.eye(2)[level]).factors[:, 7] == 1).all()
    one = GeneScaling.fit(counts, np.zeros(N_OBS, dtype=int), np.eye(2)[level])
    np.testing.assert_allclose(one.factors, 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64, np.uint16])
def test_only_values_change(dtype):
    counts, batch, _, _ = simulated((0.5, 0.5))
    counts = counts.astype(dtype)
    before = counts.copy()
    scaling = GeneScaling.fit(counts, batch)
    scaled = scaling.apply(counts, batch)
    assert np.shares_memory(scaled.indices, counts.indices)
    assert np.shares_memory(scaled.indptr, counts.indptr)
    np.testing.assert_array_equal(scaled.indices, before.indices)
    np.testing.assert_array_equal(scaled.indptr, before.indptr)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.toarray(), before.toarray() * scaling.factors[batch], rtol=1e-6)
    assert (counts != before).nnz == 0
    untouched = scaling.apply(counts, np.full(N_OBS, -1))
    np.testing.assert_array_equal(untouched.data, before.data.astype(np.float32))


def test_order_of_cells_and_genes_does_not_matter_and_calls_agree():
    counts, batch, level, _ = simulated((0.1, 0.5, 0.9))
    covariates = np.eye(2)[level]
    first = GeneScaling.fit(counts, batch, covariates)
    np.testing.assert_array_equal(first.factors, GeneScaling.fit(counts, batch, covariates).factors)
    rng = np.random.default_rng(1)
    rows, genes = rng.permutation(N_OBS), rng.permutation(N_VARS)
    again = GeneScaling.fit(counts[rows][:, genes], batch[rows], covariates[rows])
    np.testing.assert_allclose(again.factors, first.factors[:, genes], rtol=1e-6)


def test_a_quantity_protects_by_quarters():
    counts, batch, level, _ = simulated((0.1, 0.5, 0.9))
    rng = np.random.default_rng(2)
    age = np.where(level == 1, 1.0, -1.0) + 0.1 * rng.standard_normal(N_OBS)
    by_age, by_level = GeneScaling.fit(counts, batch, age[:, None]), GeneScaling.fit(counts, batch, np.eye(2)[level])
    assert len(by_age.strata) == 2
    np.testing.assert_array_equal(by_age.factors, by_level.factors)


def test_a_new_batch_gets_the_factors_that_it_would_have_had():
    counts, batch, level, rates = simulated((0.3, 0.5, 0.9))
    old, covariates = batch < 2, np.eye(2)[level]
    scaling = GeneScaling.fit(counts[old], batch[old], covariates[old])
    new = 1 / scaling.of_new_batch(counts[~old], covariates[~old])
    # Both are relative to the mean of the first two batches.
    weights = np.array([counts[batch == b].sum() for b in range(2)])
    reference = rates[:2] / np.median(rates[:2], axis=1, keepdims=True)
    truth = np.log(rates[2]) - np.log(weights @ reference / weights.sum())
    error = np.log(new) - truth
    assert np.std(error) < 0.06
    blind = np.log(1 / scaling.of_new_batch(counts[~old])) - truth
    assert np.std(blind) > 2 * np.std(error)


def test_a_batch_of_training_is_a_new_batch_with_its_own_factors():
    counts, batch, level, _ = simulated((0.3, 0.5, 0.9))
    scaling = GeneScaling.fit(counts, batch, np.eye(2)[level])
    for b in range(3):
        found = scaling.of_new_batch(counts[batch == b], np.eye(2)[level[batch == b]])
        np.testing.assert_allclose(found, scaling.factors[b], rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "covariates", "message"),
    [
        (np.zeros(4, dtype=int), None, "5 cells, 4 batch codes"),
        (np.zeros(5, dtype=int), np.ones((3, 1)), "3 rows of covariates"),
        (np.array([0, 0, 2, 2, 2]), None, "every code from 0"),
        (np.array([-1, 0, 1, 1, 1]), None, "every code from 0"),
    ],
    ids=["too few codes", "too few rows", "empty batch", "negative code"],
)
def test_bad_input_is_named(batch, covariates, message):
    with pytest.raises(InvalidArgumentError, match=message):
        GeneScaling.fit(sp.csr_matrix(np.ones((5, 3), dtype=np.float32)), batch, covariates)
