from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics.realism import (
    class_mean_correlation,
    class_recovery,
    fold_change_slope,
    forest_auroc,
    gene_correlation_agreement,
    match_classes,
    mean_variance_error,
    mixing,
    mmd,
    realism_table,
    within_class_variance_ratio,
    zero_fraction_error,
    zero_fraction_excess,
)

N_TYPES = 3


@pytest.fixture(scope="module")
def cells():
    """Overdispersed cells of three types, and in three parts: real, control and a third."""
    return simulate_counts(
        n_obs=1080, n_vars=150, n_cell_types=N_TYPES, n_batches=1, conditions=("only",), theta_median=2.0, seed=6
    )


@pytest.fixture(scope="module")
def parts(cells):
    labels = cells.obs["cell_type"].to_numpy().astype(str)
    part = np.arange(cells.n_obs) % 3
    return [(cells.X[part == k], labels[part == k]) for k in range(3)]


def poisson_around_means(counts, labels, rng, noisy=True):
    """As many cells of each class, around the mean of the class, of the depths of its cells."""
    made = np.zeros(counts.shape)
    for name in np.unique(labels):
        mine = np.flatnonzero(labels == name)
        profile = np.asarray(counts[mine].sum(axis=0)).ravel()
        expected = np.asarray(counts[mine].sum(axis=1)) * profile / profile.sum()
        made[mine] = rng.poisson(expected) if noisy else expected
    return sp.csr_matrix(made)


def log_expression_of(counts):
    x = np.asarray(counts.todense() if sp.issparse(counts) else counts, dtype=float)
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


# Each number against its definition.


def test_class_means_correlate_as_numpy_says(parts):
    (r, rl), (s, sl), _ = parts
    expected = [
        np.corrcoef(log_expression_of(r)[rl == k].mean(axis=0), log_expression_of(s)[sl == k].mean(axis=0))[0, 1]
        for k in np.unique(rl)
    ]
    assert class_mean_correlation(r, s, rl, sl) == pytest.approx(np.mean(expected), abs=1e-6)
    assert class_mean_correlation(r, s, rl, np.roll(np.unique(sl), 1)[np.unique(sl, return_inverse=True)[1]]) < 0.98


def test_gene_correlations_agree_as_numpy_says(parts):
    (r, _), (s, _), _ = parts
    a, b = log_expression_of(r), log_expression_of(s)
    top = np.argsort(-a.var(axis=0))[:40]
    pairs = np.triu_indices(40, 1)
    expected = np.corrcoef(np.corrcoef(a[:, top].T)[pairs], np.corrcoef(b[:, top].T)[pairs])[0, 1]
    assert gene_correlation_agreement(r, s, n_genes=40) == pytest.approx(expected, abs=1e-5)


def test_a_constant_gene_correlates_with_none(parts):
    (r, _), _, _ = parts
    constant = sp.csr_matrix(np.tile(np.arange(1.0, 151.0), (30, 1)))
    assert gene_correlation_agreement(r, constant, n_genes=40) == 0


def test_genes_shuffled_among_cells_lose_their_correlations(parts):
    (r, _), (s, _), _ = parts
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(column) for column in s.toarray().T], axis=1)
    assert gene_correlation_agreement(r, s, n_genes=60) > 0.5
    assert abs(gene_correlation_agreement(r, shuffled, n_genes=60)) < 0.1
    assert zero_fraction_error(s, shuffled) == 0  # each gene keeps its counts


def test_zero_fractions_are_counted():
    r = np.array([[0, 1, 0], [0, 2, 3], [0, 0, 1], [1, 1, 1.0]])  # zeros .75, .25, .25
    s = np.array([[0, 1, 1], [0, 1, 1.0]])  # zeros 1, 0, 0
    assert zero_fraction_error(r, s) == pytest.approx(0.25)
    assert zero_fraction_excess(r, s) == pytest.approx(1 / 3 - 1.25 / 3)
    stored = sp.csr_matrix((np.array([0.0, 1, 1, 1, 1]), ([0, 0, 0, 1, 1], [0, 1, 2, 1, 2])), shape=(2, 3))
    assert zero_fraction_excess(r, stored) == zero_fraction_excess(r, s)


def test_zeros_that_are_taken_away_are_missed(parts):
    (r, _), (s, _), _ = parts
    x = s.toarray()
    filled = np.where((x == 0) & (np.random.default_rng(0).random(x.shape) < 0.2), 1, x)
    expected = 0.2 * (x == 0).mean()
    assert zero_fraction_error(r, filled) == pytest.approx(expected, rel=0.15)
    assert zero_fraction_excess(r, filled) == pytest.approx(-expected, rel=0.15)


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_variance_at_equal_mean_is_off_by_the_decades_it_is_off(factor):
    # Gamma counts on gene means of 100 to 1,000, and a last gene that makes all depths equal.
    rng = np.random.default_rng(1)
    mean = np.geomspace(100, 1000, 100)

    def draw(fano):
        x = rng.gamma(mean / fano, fano, (2000, 100))
        return np.column_stack([x, 1e6 - x.sum(axis=1)])

    found = mean_variance_error(draw(4.0), draw(4.0 * factor))
    assert found == pytest.approx(abs(np.log10(factor)), abs=0.03)


def test_poisson_cells_lack_the_variance_of_overdispersed_ones(parts):
    (r, rl), (s, _), _ = parts
    smooth = poisson_around_means(r, rl, np.random.default_rng(2))
    assert mean_variance_error(r, smooth) > 2 * mean_variance_error(r, s)


def test_fold_changes_shrink_by_the_slope():
    rng = np.random.default_rng(3)
    base = rng.gamma(2, 1, 300) + 0.5
    change = rng.normal(0, 0.8, (N_TYPES, 300))

    def profiles(slope):
        p = base * np.exp(slope * change)
        return 1e6 * p / p.sum(axis=1, keepdims=True)  # far above the one count that is added

    labels = np.repeat(["a", "b", "c"], 2)
    for slope in (0.5, 1.0, 1.5):
        found = fold_change_slope(
            np.repeat(profiles(1.0), 2, axis=0), np.repeat(profiles(slope), 2, axis=0), *[labels] * 2
        )
        assert found == pytest.approx(slope, abs=0.06)


def test_fold_change_slope_is_that_of_polyfit(parts):
    (r, rl), (s, sl), _ = parts
    slopes, changes = [], []
    for x, labels in ((r, rl), (s, sl)):
        scaled = np.expm1(log_expression_of(x))
        mean = np.stack([scaled[labels == k].mean(axis=0) for k in np.unique(rl)])
        others = np.stack([np.delete(mean, k, axis=0).mean(axis=0) for k in range(N_TYPES)])
        changes.append(np.log2(1 + mean) - np.log2(1 + others))
    slopes = [np.polyfit(a, b, 1)[0] for a, b in zip(*changes, strict=True)]
    assert fold_change_slope(r, s, rl, sl) == pytest.approx(np.mean(slopes), abs=1e-6)


def test_shuffled_labels_have_no_fold_changes(parts):
    (r, rl), (s, sl), _ = parts
    assert fold_change_slope(r, s, rl, sl) > 0.8
    assert abs(fold_change_slope(r, s, rl, np.random.default_rng(4).permutation(sl))) < 0.15


def test_classes_are_recovered_as_scikit_learn_says(parts):
    (r, rl), (s, sl), _ = parts
    model = LogisticRegression(max_iter=1000).fit(log_expression_of(r), rl)
    assert class_recovery(r, s, rl, sl) == pytest.approx((model.predict(log_expression_of(s)) == sl).mean(), abs=0.01)
    assert class_recovery(r, s, rl, sl) > 0.9


def test_shuffled_labels_are_recovered_by_chance(parts):
    (r, rl), (s, sl), _ = parts
    rng = np.random.default_rng(12)
    share = np.unique(sl, return_counts=True)[1] / len(sl)
    for found in (
        class_recovery(r, s, rl, rng.permutation(sl)),  # the right class, by a wrong name
        class_recovery(r, s, rng.permutation(rl), sl),  # nothing to learn
    ):
        assert found == pytest.approx((share**2).sum(), abs=0.12)
    swapped = np.roll(np.unique(sl), 1)[np.unique(sl, return_inverse=True)[1]]
    assert class_recovery(r, s, rl, swapped) < 0.1


def test_classes_of_one_set_only_are_not_recovered(parts):
    (r, rl), (s, sl), _ = parts
    renamed = np.where(sl == "type_0", "other", sl)
    both = class_recovery(r[rl != "type_0"], s[sl != "type_0"], rl[rl != "type_0"], sl[sl != "type_0"])
    assert class_recovery(r, s, rl, renamed) == both


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_mmd_of_normal_clouds_is_the_closed_form(shift):
    rng = np.random.default_rng(5)
    d, n, misses = 3, 300, []
    for _ in range(30):
        a, b = rng.normal(size=(n, d)), rng.normal(size=(n, d)) + shift * np.eye(d)[0]
        pairs = ((a[:, None] - a) ** 2).sum(axis=2)
        width = np.median(pairs[np.triu_indices(n, 1)])
        # E k(x, y) with x - y ~ N(m, 2 I) is (s / (s + 2))^(d/2) exp(-m^2 / (2 (s + 2))), s the squared bandwidth.
        scale = (width / (width + 2)) ** (d / 2)
        misses.append(mmd(a, b) - 2 * scale * (1 - np.exp(-(shift**2) / (2 * (width + 2)))))
    assert abs(np.mean(misses)) < 3 * np.std(misses) / np.sqrt(30)
    assert np.std(misses) < 0.03


def test_mmd_is_unbiased_around_zero():
    rng = np.random.default_rng(6)
    values = [mmd(rng.normal(size=(40, 4)), rng.normal(size=(40, 4))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_variance_within_classes_is_a_ratio_of_traces(factor):
    rng = np.random.default_rng(7)
    labels = np.repeat(["a", "b"], 2000)
    centre = np.where(labels == "a", 0.0, 50.0)[:, None]
    real = centre + rng.normal(size=(4000, 3)) * [3, 1, 0.1]
    made = centre + np.sqrt(factor) * rng.normal(size=(4000, 3)) * [3, 1, 0.1]
    assert within_class_variance_ratio(real, made, labels, labels) == pytest.approx(factor, rel=0.08)


def test_classes_weigh_the_same_and_tiny_ones_not_at_all():
    rng = np.random.default_rng(8)
    labels = np.repeat(["large", "small", "tiny"], [4000, 1000, 4])
    real = rng.normal(size=(5004, 1))
    made = real * np.sqrt(np.select([labels == "large", labels == "small"], [1, 3], 100))[:, None]
    assert within_class_variance_ratio(real, made, labels, labels) == pytest.approx(2.0)


def test_mixing_is_high_for_one_cloud_and_zero_for_two():
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(2, 300, 5))
    assert mixing(a, b) > 0.85
    assert mixing(a, b + 40) == pytest.approx(0, abs=1e-6)
    assert mixing(a[:20], b[:20]) > 0.7  # fewer cells than the usual neighbourhood, without a warning


def test_the_forest_finds_what_it_should(parts):
    (r, rl), (s, _), _ = parts
    rng = np.random.default_rng(10)
    assert forest_auroc(r, s, n_estimators=30) == pytest.approx(0.5, abs=0.08)
    assert forest_auroc(r, poisson_around_means(r, rl, rng, noisy=False), n_estimators=20) > 0.99
    assert forest_auroc(r, poisson_around_means(r, rl, rng), n_estimators=30) > 0.75
    assert forest_auroc(r, 2 * s, n_estimators=30) == forest_auroc(r, s, n_estimators=30)  # depth is scaled away


def test_copies_lie_below_chance(parts):
    (r, _), _, _ = parts
    assert forest_auroc(r[:150], r[:150], n_estimators=30) < 0.3


# All of them together.


@pytest.fixture(scope="module")
def of_real_cells(parts):
    (r, rl), (c, cl), (s, sl) = parts
    return realism_table(r, s, rl, sl, control=c, control_labels=cl, n_genes=60, n_estimators=30)


def test_other_real_cells_are_as_real_as_the_control(of_real_cells):
    t = of_real_cells
    gap = (t["synthetic"] - t["control"]).abs()
    assert gap["class_mean_correlation"] < 0.01
    assert gap["gene_correlation_agreement"] < 0.05
    assert gap["class_recovery"] < 0.04
    assert gap["forest_auroc"] < 0.1
    assert gap["mixing"] < 0.1
    assert gap["mmd"] < 0.005
    assert gap["zero_fraction_error"] < 0.005
    assert gap["mean_variance_error"] < 0.02
    assert gap["within_class_variance_ratio"] < 0.06
    assert gap["fold_change_slope"] < 0.1
    for column in t:
        assert t.loc["within_class_variance_ratio", column] == pytest.approx(1, abs=0.05)
        assert t.loc["forest_auroc", column] == pytest.approx(0.5, abs=0.08)
        assert t.loc["class_recovery", column] > 0.9
        assert abs(t.loc["zero_fraction_excess", column]) < 0.01
    assert t.attrs["n_classes"] == N_TYPES
    assert 300 < t.attrs["n_cells"] <= 360
    assert (t.attrs["n_genes"], t.attrs["n_comps"]) == (60, 30)


def test_smooth_cells_are_told_from_real_ones_and_the_control_is_not(parts, of_real_cells):
    (r, rl), (c, cl), _ = parts
    smooth = poisson_around_means(r, rl, np.random.default_rng(11))
    t = realism_table(r, smooth, rl, rl, control=c, control_labels=cl, n_genes=60, n_estimators=30)
    assert t.loc["forest_auroc", "synthetic"] > t.loc["forest_auroc", "control"] + 0.2
    assert t.loc["within_class_variance_ratio", "synthetic"] < 0.85
    assert t.loc["zero_fraction_excess", "synthetic"] < -0.02
    assert t.loc["mean_variance_error", "synthetic"] > 2 * t.loc["mean_variance_error", "control"]
    assert t.loc["within_class_variance_ratio", "control"] == pytest.approx(1, abs=0.05)


def test_cells_of_wrong_classes_are_not_recovered_and_the_control_is(parts, of_real_cells):
    (r, rl), (c, cl), (s, sl) = parts
    shuffled = np.random.default_rng(13).permutation(sl)
    t = realism_table(r, s, rl, shuffled, control=c, control_labels=cl, n_genes=60, n_estimators=5)
    assert t.loc["class_recovery", "synthetic"] < 0.5
    assert t.loc["class_recovery", "control"] == pytest.approx(of_real_cells.loc["class_recovery", "control"], abs=0.03)


def test_real_cells_of_the_table_have_to_be_counts(parts):
    (r, rl), (c, cl), (s, sl) = parts
    for real, control, name in ((r.log1p(), c, "real"), (r, c.log1p(), "control")):
        with pytest.raises(InvalidArgumentError, match=f"{name} has values that are not integers .*raw counts"):
            realism_table(real, s, rl, sl, control=control, control_labels=cl)


def test_without_a_control_the_real_cells_are_halved(parts):
    (r, rl), _, (s, sl) = parts
    t = realism_table(r, s, rl, sl, n_genes=60, n_estimators=30)
    assert t.attrs["n_cells"] <= 180
    assert t.loc["forest_auroc", "control"] == pytest.approx(0.5, abs=0.12)
    assert t.loc["within_class_variance_ratio", "control"] == pytest.approx(1, abs=0.1)
    pd.testing.assert_frame_equal(t, realism_table(r, s, rl, sl, n_genes=60, n_estimators=30))
    assert not t.equals(realism_table(r, s, rl, sl, n_genes=60, seed=1, n_estimators=30))


def test_composition_is_matched_before_anything_is_compared(parts):
    (r, rl), (c, cl), (s, sl) = parts
    few = np.flatnonzero((sl != "type_0") | (np.arange(len(sl)) % 5 == 0))
    t = realism_table(r, s[few], rl, sl[few], control=c, control_labels=cl, n_genes=60, n_estimators=30)
    assert t.loc["zero_fraction_error", "synthetic"] < 1.6 * t.loc["zero_fraction_error", "control"]
    assert t.loc["forest_auroc", "synthetic"] == pytest.approx(0.5, abs=0.12)


def test_classes_are_matched_by_the_smallest_set():
    labels = [np.repeat(["a", "b"], [5, 9]), np.repeat(["b", "a"], [4, 7]), np.repeat(["a", "b"], [6, 6])]
    for rows, values in zip(match_classes(labels), labels, strict=True):
        assert dict(zip(*np.unique(values[rows], return_counts=True), strict=True)) == {"a": 5, "b": 4}
        assert (np.diff(rows) > 0).all()
    thinned = match_classes([np.repeat(["a", "b"], [300, 100])] * 2, max_cells=40)[0]
    assert dict(zip(*np.unique(thinned < 300, return_counts=True), strict=True)) == {True: 30, False: 10}


def test_a_class_that_a_set_lacks_is_left_out_aloud():
    with pytest.warns(CellstillWarning, match=r"\['b'\] are not in all sets"):
        rows = match_classes([["a", "b", "a"], ["a", "a", "a"]])
    assert [len(r) for r in rows] == [2, 2]


def test_categories_and_numbers_are_matched_as_text():
    first, second = match_classes([pd.Categorical([1, 2, 1]), ["1", "1", "2"]])
    assert (len(first), len(second)) == (3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, names: zero_fraction_error(r, r[:, :5]), "must have the same genes"),
        (lambda r, names: zero_fraction_error(r, -r), "synthetic has negative"),
        (lambda r, names: zero_fraction_error(r, r[:1]), "synthetic has 1 cells"),
        (lambda r, names: class_mean_correlation(r, r, names, names[:-1]), "synthetic_labels must give one category"),
        (lambda r, names: class_mean_correlation(r, r, names, ["z"] * len(names)), "share no class"),
        (lambda r, names: class_recovery(r, r, ["a"] * len(names), ["a"] * len(names)), "share one class; to be told"),
        (lambda r, names: fold_change_slope(r, r, ["a"] * len(names), ["a"] * len(names)), "share one class"),
        (lambda r, names: gene_correlation_agreement(r, r, n_genes=2), "n_genes=2"),
        (lambda r, names: mean_variance_error(r[:, :9], r[:, :9]), "9 genes have counts"),
        (lambda r, names: forest_auroc(r, r[:4]), "synthetic 4 cells"),
        (lambda r, names: mmd(np.ones((5, 2)), np.ones((5, 2))), "one place"),
        (lambda r, names: mmd(np.ones((5, 2)), np.ones((5, 3))), "real has 2 dimensions and synthetic 3"),
        (lambda r, names: within_class_variance_ratio(np.eye(4), np.eye(4), *[["a"] * 4] * 2), "No class has 5"),
        (lambda r, names: match_classes([["a"], ["b"]]), "no class is in all"),
        (
            lambda r, names: realism_table(r, r[:6], names, names[:6], control=r, control_labels=names),
            "6 cells of like",
        ),
        (lambda r, names: realism_table(r, r, names, names, n_comps=0), "n_comps=0"),
        (lambda r, names: realism_table(r, r, names, [None, *names[1:]]), "synthetic_labels is missing"),
        (
            lambda r, names: realism_table(r, r, names, names, control=r, control_labels=names[:3]),
            "control_labels must give",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(parts, call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(*parts[0])
