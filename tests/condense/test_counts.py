from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cellstill.condense.counts import Rendering, render, round_to_detection
from cellstill.errors import InvalidArgumentError


def shares(n: int = 8, n_vars: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(n_vars, 0.5), n)


def rendered(form: str, n: int = 8, detection: float = 1.0, seed: int = 0, **changes):
    share = shares(n)
    told = {
        "expected": np.log1p(1e4 * share).astype(np.float32),
        "rates": share.astype(np.float32),
        "theta": np.full(100, 2.0, dtype=np.float32),
        "library": np.linspace(500, 4000, n),
        "n_detected": np.linspace(5, 60, n),
        "codes": np.arange(n) % 2,
    } | changes
    return render(Rendering(form, detection), **told, seed=seed), told


def test_rounding_detects_exactly_the_genes_wanted_and_is_proportional():
    share, wanted = shares(), np.array([1, 2, 5, 10, 30, 60, 99, 100])
    counts = round_to_detection(share, wanted)
    np.testing.assert_array_equal((counts > 0).sum(axis=1), wanted)
    np.testing.assert_array_equal(counts, np.round(counts))
    for row, of, n in zip(counts, share, wanted, strict=True):
        # The weakest of the genes wanted is at half a molecule, and all others are in proportion to it.
        exact = of / (2 * np.sort(of)[::-1][n - 1])
        assert np.abs(row - exact).max() <= 0.5 + 1e-6 * exact.max()
        assert set(np.flatnonzero(row)) == set(np.argsort(-of)[:n])


def test_rounding_at_its_edges():
    tied = np.array([[0.4, 0.2, 0.2, 0.2], [0.7, 0.3, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    counts = round_to_detection(tied, np.array([2, 4, 1, 3]))
    # Genes of equal share come together; genes without a share never come.
    assert (counts > 0).sum(axis=1).tolist() == [4, 2, 4, 1]
    assert counts[0].tolist() == [1, 1, 1, 1]
    assert counts[1].tolist() == [1, 1, 0, 0]
    # Fewer than one gene, or more than there are, is one or all.
    assert [(round_to_detection(shares(1), np.array([n])) > 0).sum() for n in (0.2, 0, 250)] == [1, 1, 100]


@pytest.mark.parametrize("detection", [0.5, 1.0, 2.0])
def test_rounded_cells_detect_as_many_genes_as_told(detection):
    counts, told = rendered("rounded", detection=detection)
    wanted = np.clip(np.round(detection * told["n_detected"]), 1, 100)
    np.testing.assert_array_equal(np.diff(counts.indptr), wanted)
    assert counts.dtype == np.float32
    np.testing.assert_array_equal(counts.data, np.round(counts.data))


def test_expected_counts_have_the_library_and_look_as_expected():
    counts, told = rendered("expected")
    dense = counts.toarray().astype(np.float64)
    np.testing.assert_allclose(dense.sum(axis=1), told["library"], rtol=1e-5)
    np.testing.assert_allclose(dense / dense.sum(axis=1, keepdims=True), told["rates"], rtol=1e-4, atol=1e-9)
    # The mean of log expression lies below the log of a mean: what is told then sums to less, and keeps its ratios.
    less, _ = rendered("expected", expected=np.log1p(4e3 * told["rates"]))
    np.testing.assert_allclose(less.toarray(), dense, rtol=1e-4, atol=1e-6)


def test_sampled_counts_are_negative_binomial():
    n, rate, library = 4000, np.array([0.5, 0.3, 0.15, 0.05]), 40.0
    theta = np.array([0.5, 2.0, 10.0, 1e4])
    counts, _ = rendered(
        "sampled",
        expected=np.tile(np.log1p(1e4 * rate), (n, 1)),
        rates=np.tile(rate, (n, 1)),
        theta=theta,
        library=np.full(n, library),
        n_detected=np.full(n, 3.0),
        codes=np.zeros(n, dtype=np.int64),
    )
    dense = counts.toarray()
    for gene, (r, mean) in enumerate(zip(theta, rate * library, strict=True)):
        truth = stats.nbinom(r, r / (r + mean))
        edges = np.unique(truth.ppf(np.linspace(0, 1, 9)[1:-1]))
        found = np.bincount(np.searchsorted(edges, dense[:, gene], side="left"), minlength=len(edges) + 1)
        probability = np.diff(np.concatenate([[0], truth.cdf(edges), [1]]))
        assert stats.chisquare(found, n * probability).pvalue > 1e-3
        assert dense[:, gene].mean() == pytest.approx(truth.mean(), abs=4 * truth.std() / np.sqrt(n))


def test_samples_are_those_of_their_seed():
    one, same, other = (rendered("sampled", seed=seed)[0].toarray() for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    for form in ("rounded", "mixed", "expected"):
        np.testing.assert_array_equal(rendered(form, seed=1)[0].toarray(), rendered(form, seed=2)[0].toarray())


def test_every_other_cell_of_a_class_is_rounded_in_mixed():
    codes = np.array([0, 1, 0, 0, 2, 1, 0, 0])
    mixed, rounded, expected = (rendered(form, codes=codes)[0].toarray() for form in ("mixed", "rounded", "expected"))
    # Second and fourth cell of class 0, second of class 1, and the only one of class 2.
    is_rounded = np.isin(np.arange(8), [2, 6, 5, 4])
    np.testing.assert_array_equal(mixed[is_rounded], rounded[is_rounded])
    np.testing.assert_array_equal(mixed[~is_rounded], expected[~is_rounded])


@pytest.mark.parametrize("form", ["rounded", "mixed", "expected", "sampled"])
def test_no_cell_is_empty(form):
    rates = np.zeros((8, 100))
    rates[:, 3] = 1
    hopeless, _ = rendered(form, rates=rates, expected=np.zeros((8, 100)), library=np.full(8, 1e-9))
    assert (np.asarray(hopeless.sum(axis=1)) > 0).all()
    sparse, told = rendered(form, library=np.full(8, 1e-3))
    assert (np.asarray(sparse.sum(axis=1)) > 0).all()
    if form == "sampled":
        strongest = told["expected"].argmax(axis=1)
        np.testing.assert_array_equal(sparse.toarray()[np.arange(8), strongest], 1)
    assert (sparse.data > 0).all()


def test_bad_renderings():
    with pytest.raises(InvalidArgumentError, match="counts='whole' is not known. Use one of: 'rounded'"):
        Rendering("whole")
    for detection in (0, -1, np.inf, np.nan):
        with pytest.raises(InvalidArgumentError, match="detection=.* finite number above 0"):
            Rendering("rounded", detection)


def test_names_in_tables():
    assert [Rendering(form, 2).name for form in ("rounded", "mixed", "expected", "sampled")] == [
        "rounded, 2", "mixed, 2", "expected", "sampled",
    ]  # fmt: skip
