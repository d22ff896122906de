from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from sklearn.manifold import trustworthiness

from cellstill.data import simulate_counts
from cellstill.errors import InvalidArgumentError
from cellstill.pl.condensation import (
    condensed_embedding_figure,
    gene_panels_figure,
    joint_umap,
    mean_variance_figure,
    zero_fraction_figure,
)

NAMES = [f"g{i}" for i in range(60)]


@pytest.fixture(scope="module")
def cells():
    return simulate_counts(
        n_obs=300, n_vars=60, n_cell_types=3, n_batches=1, conditions=("only",), marker_fraction=0.2, seed=2
    )


@pytest.fixture(scope="module")
def sets(cells):
    labels = cells.obs["cell_type"].to_numpy().astype(str)
    return cells.X[:200], labels[:200], cells.X[200:], labels[200:]


def log_expression_of(counts):
    x = counts.toarray().astype(float)
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


def offsets(collection):
    return np.asarray(collection.get_offsets())


# One embedding.


def test_every_cell_lies_where_it_is_in_the_colour_of_its_class():
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(size=(90, 2)), rng.normal(size=(12, 2))
    real_labels, synthetic_labels = np.repeat(["b", "a", "c"], 30), np.repeat(["a", "b", "c"], 4)
    (axes,) = condensed_embedding_figure(real, synthetic, real_labels, synthetic_labels, title="kind").axes
    legend = axes.get_legend()
    colours = {
        text.get_text(): to_rgba(handle.get_color())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert list(colours) == ["a", "b", "c"]
    assert legend.get_title().get_text() == "kind"
    assert len(axes.collections) == 2
    for drawn, points, labels in zip(axes.collections, (real, synthetic), (real_labels, synthetic_labels), strict=True):
        order = np.argmin(np.abs(offsets(drawn)[:, None] - points).sum(axis=2), axis=1)
        np.testing.assert_array_equal(offsets(drawn), points[order])
        assert sorted(order) == list(range(len(points)))
        np.testing.assert_allclose(drawn.get_facecolors()[:, :3], [colours[labels[cell]][:3] for cell in order])
    of_real, of_synthetic = axes.collections
    assert of_synthetic.get_linewidths()[0] > 0 == of_real.get_linewidths()[0]
    assert to_rgba("black") == tuple(of_synthetic.get_edgecolors()[0])
    assert of_synthetic.get_sizes()[0] > of_real.get_sizes()[0]
    assert "90 real cells, 12 synthetic" in axes.get_title()


def test_synthetic_cells_are_inside_the_frame_and_over_the_real_ones():
    rng = np.random.default_rng(1)
    far = np.array([[30.0, -20.0]])
    (axes,) = condensed_embedding_figure(rng.normal(size=(50, 2)), far, ["a"] * 50, ["a"]).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 30 < right
    assert bottom < -20 < top
    real, synthetic = axes.collections
    assert synthetic.get_zorder() >= real.get_zorder()
    assert axes.collections.index(synthetic) > axes.collections.index(real)


def test_levels_keep_the_order_of_the_real_cells_and_missing_ones_are_grey():
    real = pd.Categorical(["x", None, "z", "y"], categories=["z", "y", "x"])
    (axes,) = condensed_embedding_figure(np.eye(4, 2), np.eye(2), real, ["y", "new"]).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["z", "y", "x", "new", "missing"]


def test_the_joint_layout_keeps_synthetic_cells_with_their_class(sets):
    real, real_labels, synthetic, synthetic_labels = sets
    a, b = joint_umap(real, synthetic, n_comps=5)
    assert (a.shape, b.shape) == ((200, 2), (100, 2))
    expression = np.vstack([log_expression_of(x) for x in (real, synthetic)])
    centred = expression - expression[:200].mean(axis=0)
    scores = centred @ np.linalg.svd(centred[:200], full_matrices=False)[2][:5].T
    assert trustworthiness(scores, np.vstack([a, b]), n_neighbors=15) > 0.85
    nearest = np.argsort(np.linalg.norm(b[:, None] - a, axis=2), axis=1)[:, :9]
    votes = [max(set(row), key=list(row).count) for row in real_labels[nearest]]
    assert (np.array(votes) == synthetic_labels).mean() > 0.6


# Genes, class by class.


def test_points_are_the_synthetic_and_boxes_the_real_cells(sets):
    real, real_labels, synthetic, synthetic_labels = sets
    figure = gene_panels_figure(real, synthetic, real_labels, synthetic_labels, NAMES, n_genes=3)
    a, b = log_expression_of(real), log_expression_of(synthetic)
    top = np.argsort(-a.var(axis=0))[:3]
    assert [axes.get_title() for axes in figure.axes] == [NAMES[gene] for gene in top]
    for axes, gene in zip(figure.axes, top, strict=True):
        classes = [text.get_text() for text in axes.get_xticklabels()]
        assert classes == ["type_0", "type_1", "type_2"]
        clouds = [c for c in axes.collections if len(offsets(c)) > 1]
        medians = [line for line in axes.lines if line.get_color() == "black"]
        bars = [c.get_segments()[0] for c in axes.collections if hasattr(c, "get_segments")]
        assert len(clouds) == len(medians) == len(bars) == len(axes.patches) == 3
        for k, name in enumerate(classes):
            of_class = b[synthetic_labels == name, gene]
            np.testing.assert_allclose(offsets(clouds[k])[:, 1], of_class, rtol=1e-5)
            assert (np.abs(offsets(clouds[k])[:, 0] - k - 0.2) < 0.2).all()
            assert bars[k][0, 1] == pytest.approx(np.median(of_class), rel=1e-5)
            values = a[real_labels == name, gene]
            assert medians[k].get_ydata()[0] == pytest.approx(np.median(values), rel=1e-5)
            box = axes.patches[k].get_path().vertices[:, 1]
            assert (box.min(), box.max()) == pytest.approx(tuple(np.quantile(values, [0.25, 0.75])), rel=1e-5)


def test_genes_can_be_named_and_points_are_thinned(sets):
    figure = gene_panels_figure(sets[0], sets[2], sets[1], sets[3], NAMES, genes=["g7", "g3"], max_points=4)
    assert [axes.get_title() for axes in figure.axes] == ["g7", "g3"]
    b = log_expression_of(sets[2])
    clouds = [c for c in figure.axes[1].collections if len(offsets(c)) > 1]
    for k, cloud in enumerate(clouds):
        of_class = b[sets[3] == f"type_{k}", 3]
        assert len(offsets(cloud)) == 4
        assert all(np.isclose(of_class, y, rtol=1e-5).any() for y in offsets(cloud)[:, 1])


def test_a_class_without_synthetic_cells_has_a_box_only(sets):
    real, real_labels, synthetic, synthetic_labels = sets
    kept = synthetic_labels != "type_1"
    (axes,) = gene_panels_figure(real, synthetic[kept], real_labels, synthetic_labels[kept], NAMES, n_genes=1).axes
    assert len(axes.patches) == 3
    assert len([c for c in axes.collections if len(offsets(c)) > 1]) == 2


# Zeros, and the variance.


def test_zero_fractions_are_those_of_the_genes(sets):
    real, _, synthetic, _ = sets
    figure = zero_fraction_figure(real, synthetic, control=real[100:])
    x, y, c = ((m.toarray() == 0).mean(axis=0) for m in (real, synthetic, real[100:]))
    assert len(figure.axes) == 2
    for axes, expected, name in zip(figure.axes, (c, y), ("other real cells", "synthetic cells"), strict=True):
        np.testing.assert_allclose(offsets(axes.collections[0]), np.column_stack([x, expected]))
        assert axes.get_title() == f"{name}: mean difference {np.abs(x - expected).mean():.3f}"
        np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0], [1, 1]])
    assert len(zero_fraction_figure(real, synthetic).axes) == 1


def test_stored_zeros_are_zeros():
    stored = sp.csr_matrix((np.array([0.0, 1, 1]), ([0, 0, 1], [0, 1, 1])), shape=(2, 2))
    (axes,) = zero_fraction_figure(np.array([[1.0, 0], [1, 2]]), stored).axes
    np.testing.assert_array_equal(offsets(axes.collections[0]), [[0, 1], [0.5, 0]])


def test_means_and_variances_are_of_cells_of_one_depth(sets):
    real, _, synthetic, _ = sets
    (axes,) = mean_variance_figure(real, synthetic, control=real[:100]).axes
    depth = np.median(real.toarray().sum(axis=1))
    for drawn, counts in zip(axes.collections, (real, synthetic), strict=True):
        scaled = counts.toarray().astype(float)
        scaled *= depth / scaled.sum(axis=1, keepdims=True)
        mean, variance = scaled.mean(axis=0), scaled.var(axis=0, ddof=1)
        np.testing.assert_allclose(offsets(drawn), np.column_stack([mean, variance])[mean > 0])
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["real", "other real cells", "synthetic", "variance = mean"]
    assert f"{depth:,.0f} counts" in axes.get_xlabel()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    of_real = offsets(axes.collections[0])
    bins = np.array_split(of_real[np.argsort(of_real[:, 0])], 20)
    np.testing.assert_allclose(lines["real"].get_xydata(), [np.median(b, axis=0) for b in bins])
    diagonal = lines["variance = mean"].get_xydata()
    np.testing.assert_array_equal(diagonal[:, 0], diagonal[:, 1])


def test_pyplot_is_left_alone(sets):
    before = plt.get_fignums()
    zero_fraction_figure(sets[0], sets[2])
    mean_variance_figure(sets[0], sets[2]).draw_without_rendering()
    gene_panels_figure(sets[0], sets[2], sets[1], sets[3], NAMES, n_genes=5).draw_without_rendering()
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, rl, s, sl: joint_umap(r, s[:, :5]), "must have the same genes"),
        (lambda r, rl, s, sl: joint_umap(r, s, n_comps=0), "n_comps=0"),
        (lambda r, rl, s, sl: zero_fraction_figure(r, s, control=r[:, :3]), r"other real cells \(200, 3\)"),
        (lambda r, rl, s, sl: zero_fraction_figure(r, s[:0]), r"synthetic cells \(0, 60\)"),
        (lambda r, rl, s, sl: mean_variance_figure(r, sp.vstack([s[:1]] * 3)), "synthetic: no gene varies"),
        (lambda r, rl, s, sl: mean_variance_figure(r, s[:1]), "synthetic has one cell"),
        (lambda r, rl, s, sl: condensed_embedding_figure(np.ones((3, 3)), np.ones((2, 2)), rl, sl), "See joint_umap"),
        (lambda r, rl, s, sl: condensed_embedding_figure(np.eye(2), np.eye(2)[:0], ["a", "b"], []), "synthetic must"),
        (lambda r, rl, s, sl: condensed_embedding_figure(np.eye(2), np.eye(2), ["a"], ["a", "b"]), "real_labels must"),
        (lambda r, rl, s, sl: gene_panels_figure(r, s, rl, sl[:-1], NAMES), "synthetic_labels must give one class"),
        (lambda r, rl, s, sl: gene_panels_figure(r, s, rl, [None, *sl[1:]], NAMES), "must not be missing"),
        (lambda r, rl, s, sl: gene_panels_figure(r, s, rl, sl, NAMES[:-1]), "names has 59 entries"),
        (lambda r, rl, s, sl: gene_panels_figure(r, s, rl, sl, NAMES, genes=["g1", "CD3E"]), r"\['CD3E'\]"),
        (lambda r, rl, s, sl: gene_panels_figure(r, s, rl, sl, NAMES, genes=[]), "genes names none"),
        (lambda r, rl, s, sl: gene_panels_figure(r, s, rl, sl, NAMES, n_genes=0), "n_genes=0"),
    ],
)
def test_what_cannot_be_drawn_is_named(sets, call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(*sets)
