from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from sklearn.manifold import trustworthiness

from cellstill.errors import InvalidArgumentError
from cellstill.pl import embedding_figure, umap_coordinates


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def cells(rng):
    panels = {"before": rng.normal(size=(300, 2)) * [5, 1] + 40, "after": rng.normal(size=(300, 2))}
    colours = {
        "batch": pd.Categorical(rng.choice(["b2", "b1"], 300), categories=["b2", "unused", "b1"]),
        "cell_type": rng.choice(["T cell", "B cell", "NK", "Mono"], 300, p=[0.4, 0.3, 0.2, 0.1]),
    }
    return panels, colours


def grid_of(figure, n_rows, n_columns):
    return np.array(figure.axes).reshape(n_rows, n_columns)


def legend_of(axes):
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    return {label: to_rgba(handle.get_color()) for label, handle in zip(labels, legend.legend_handles, strict=True)}


def cell_of_each_point(axes, points):
    offsets = np.asarray(axes.collections[0].get_offsets())
    cells = np.argmin(np.abs(offsets[:, None] - points).sum(axis=2), axis=1)
    np.testing.assert_array_equal(offsets, points[cells])
    return cells


def test_every_cell_is_drawn_once_where_it_is_and_in_the_colour_of_its_category(cells):
    panels, colours = cells
    grid = grid_of(embedding_figure(panels, colours), 2, 2)
    for row, values in zip(grid, colours.values(), strict=True):
        legend = legend_of(row[-1])
        for axes, points in zip(row, panels.values(), strict=True):
            order = cell_of_each_point(axes, points)
            assert sorted(order) == list(range(300))
            expected = [legend[values[cell]] for cell in order]
            np.testing.assert_allclose(axes.collections[0].get_facecolors(), expected)
    assert [axes.get_title() for axes in grid[0]] == ["before", "after"]
    assert [axes.get_title() for axes in grid[1]] == ["", ""]


def test_legends_name_the_categories_in_their_order(cells):
    panels, colours = cells
    grid = grid_of(embedding_figure(panels, colours), 2, 2)
    assert list(legend_of(grid[0, 1])) == ["b2", "b1"]
    assert list(legend_of(grid[1, 1])) == ["B cell", "Mono", "NK", "T cell"]
    assert [row[-1].get_legend().get_title().get_text() for row in grid] == ["batch", "cell_type"]
    assert [row[0].get_legend() for row in grid] == [None, None]
    assert len({colour for row in grid for colour in legend_of(row[-1]).values()}) == 6


def test_points_are_shuffled_by_the_seed_and_alike_in_every_panel(cells):
    panels, colours = cells
    orders = [
        cell_of_each_point(axes, points)
        for seed in (0, 0, 1)
        for axes, points in zip(
            embedding_figure(panels, colours, seed=seed).axes, list(panels.values()) * 2, strict=True
        )
    ]
    assert all((order == orders[0]).all() for order in orders[:8])
    assert (orders[8] != orders[0]).mean() > 0.9
    # Sorted batches would hide each other: no long run of one batch survives.
    by_batch = embedding_figure({"x": panels["after"]}, {"batch": np.repeat(["a", "b"], 150)}).axes[0]
    drawn = cell_of_each_point(by_batch, panels["after"]) < 150
    assert 110 < (drawn[1:] != drawn[:-1]).sum() < 190


def test_missing_categories_are_grey(cells):
    panels, colours = cells
    labels = pd.Series(colours["cell_type"]).where(np.arange(300) % 3 > 0)
    axes = embedding_figure({"after": panels["after"]}, {"cell_type": labels}).axes[0]
    legend = legend_of(axes)
    assert list(legend) == ["B cell", "Mono", "NK", "T cell", "missing"]
    grey = np.isclose(axes.collections[0].get_facecolors(), legend["missing"]).all(axis=1)
    np.testing.assert_array_equal(grey, cell_of_each_point(axes, panels["after"]) % 3 == 0)


def test_a_long_legend_keeps_the_commonest_levels_and_says_so(rng):
    labels = np.repeat([f"level {i:02d}" for i in range(24)], np.r_[[1, 50, 2, 40, 3, 4], np.full(18, 10)])
    points = rng.normal(size=(len(labels), 2))
    axes = embedding_figure({"x": points}, {"donor": labels}).axes[0]
    entries = list(legend_of(axes))
    assert entries[-1] == "and 4 more"
    assert entries[:-1] == [f"level {i:02d}" for i in range(24) if i not in (0, 2, 4, 5)]
    assert len(np.unique(axes.collections[0].get_facecolors(), axis=0)) == 24
    assert "more" not in " ".join(legend_of(embedding_figure({"x": points[:9]}, {"d": labels[:9]}).axes[0]))


@pytest.mark.parametrize("n_levels", [2, 15, 40])
def test_legends_cover_no_panel_and_stay_inside_the_figure(rng, n_levels):
    points = rng.normal(size=(400, 2))
    names = np.array([f"a rather long name of level {i}" for i in range(n_levels)])[np.arange(400) % n_levels]
    figure = embedding_figure({"before": points, "after": points}, {"many": names, "one": np.repeat("x", 400)})
    figure.draw_without_rendering()
    for axes in figure.axes:
        width, height = axes.get_window_extent().size
        assert width == pytest.approx(height)
        assert width == pytest.approx(2.4 * figure.dpi)
        if legend := axes.get_legend():
            extent = legend.get_window_extent()
            assert not any(extent.overlaps(other.get_window_extent()) for other in figure.axes)
            assert extent.x1 <= figure.bbox.x1
            assert 0 <= extent.y0 < extent.y1 <= figure.bbox.y1


def test_panels_have_one_scale_no_ticks_and_hold_all_points(cells):
    panels, colours = cells
    for axes, points in zip(embedding_figure(panels, colours).axes, list(panels.values()) * 2, strict=True):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert axes.get_aspect() == 1
        assert right - left == pytest.approx(top - bottom)
        assert (points > [left, bottom]).all()
        assert (points < [right, top]).all()
        assert np.ptp(points, axis=0).max() > 0.9 * (right - left)
        assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0


def test_points_shrink_with_their_number_unless_told(rng):
    def size(n_obs, **options):
        figure = embedding_figure({"x": rng.normal(size=(n_obs, 2))}, {"c": np.arange(n_obs) % 2}, **options)
        return figure.axes[0].collections[0].get_sizes()[0]

    assert size(100) > size(2000) > size(20000) > 0.2
    assert size(2000, point_size=7) == 7
    assert size(2000, panel_size=4.8) == pytest.approx(4 * size(2000))


def test_vector_files_stay_small_and_pyplot_is_left_alone(rng):
    before = plt.get_fignums()
    figure = embedding_figure({"x": rng.normal(size=(20_000, 2))}, {"c": np.arange(20_000) % 3})
    file = BytesIO()
    figure.savefig(file, format="pdf", dpi=100)
    assert len(file.getvalue()) < 200_000
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("panels", "colours", "message"),
    [
        ({}, {"c": [1, 2]}, "panels is empty"),
        ({"x": np.ones((2, 2))}, {}, "colours is empty"),
        (
            {"x": np.ones((2, 2)), "y": np.ones((3, 2))},
            {"c": [1, 2]},
            r"panels\['y'\] .*\(2, 2\).* found shape \(3, 2\)",
        ),
        ({"x": np.ones((2, 5))}, {"c": [1, 2]}, "See umap_coordinates"),
        ({"x": np.full((2, 2), np.nan)}, {"c": [1, 2]}, r"panels\['x'\] must be a finite array"),
        ({"x": np.ones((2, 2))}, {"c": [1, 2, 3]}, r"colours\['c'\] must give one category for each of the 2 cells"),
        ({"x": np.ones((2, 2))}, {"c": "cell_type"}, r"colours\['c'\] must give one category"),
    ],
)
def test_what_cannot_be_drawn_is_named(panels, colours, message):
    with pytest.raises(InvalidArgumentError, match=message):
        embedding_figure(panels, colours)


def test_umap_keeps_neighbours_together_and_is_seeded(rng):
    group = np.arange(160) % 4
    embedding = 10 * np.eye(4, 12)[group] + rng.normal(size=(160, 12))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    layout = umap_coordinates(embedding, n_neighbors=10)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert layout.shape == (160, 2)
    assert trustworthiness(embedding, layout, n_neighbors=10) > 0.9
    centres = np.array([layout[group == g].mean(axis=0) for g in range(4)])
    nearest = np.argmin(np.linalg.norm(layout[:, None] - centres, axis=2), axis=1)
    np.testing.assert_array_equal(nearest, group)
    np.testing.assert_array_equal(umap_coordinates(embedding, n_neighbors=10), layout)
    assert not np.allclose(umap_coordinates(embedding, n_neighbors=10, seed=1), layout)


@pytest.mark.parametrize(
    ("embedding", "n_neighbors", "message"),
    [
        (np.ones(4), 2, r"found shape \(4,\)\."),
        (np.full((20, 3), np.inf), 5, "with NaN or infinite values"),
        (np.eye(15), 15, "n_neighbors=15 must lie between 2 and n_obs - 1 = 14"),
        (np.eye(15), 1, "n_neighbors=1 must lie"),
    ],
)
def test_umap_names_what_it_cannot_lay_out(embedding, n_neighbors, message):
    with pytest.raises(InvalidArgumentError, match=message):
        umap_coordinates(embedding, n_neighbors=n_neighbors)
