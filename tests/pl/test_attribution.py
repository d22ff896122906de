from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from cellstill.errors import InvalidArgumentError
from cellstill.pl import attribution_figure


@pytest.fixture
def table(rng):
    return {name: rng.lognormal(size=7) for name in ("adt", "gex", "peaks")}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


PARTS = {"adt": slice(0, 2), "gex": slice(2, 5), "peaks": slice(5, 7)}


def points(axes):
    """Points of each part, by its label."""
    return {drawn.get_label(): np.asarray(drawn.get_offsets()) for drawn in axes.collections}


def test_a_point_is_a_dimension_where_the_table_says_in_the_colour_of_its_part(table):
    figure = attribution_figure(table, PARTS)
    pairs = [("adt", "gex"), ("adt", "peaks"), ("gex", "peaks")]
    assert len(figure.axes) == len(pairs)
    colours = set()
    for axes, (first, second) in zip(figure.axes, pairs, strict=True):
        assert axes.get_xlabel() == f"attribution to {first}"
        assert axes.get_ylabel() == f"attribution to {second}"
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        found = points(axes)
        assert list(found) == [f"z of {part}" for part in PARTS]
        for part, columns in PARTS.items():
            expected = np.stack([table[first][columns], table[second][columns]], axis=1)
            np.testing.assert_array_equal(found[f"z of {part}"], expected)
        colours.add(tuple(to_hex(drawn.get_facecolor()[0]) for drawn in axes.collections))
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(found)
    # A part has one colour in all panels, and no two have the same.
    (of_parts,) = colours
    assert len(set(of_parts)) == len(PARTS)


def test_the_diagonal_spans_all_points_inside_the_panel(table):
    figure = attribution_figure({name: table[name] for name in ("gex", "peaks")}, {"joint": slice(0, 7)})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (diagonal,) = axes.lines
    both = np.concatenate([table["gex"], table["peaks"]])
    np.testing.assert_array_equal(diagonal.get_xydata(), [[both.min()] * 2, [both.max()] * 2])
    for values, limits in ((table["gex"], axes.get_xlim()), (table["peaks"], axes.get_ylim())):
        assert limits[0] < values.min()
        assert values.max() < limits[1]


def test_one_modality_is_drawn_by_rank(table):
    figure = attribution_figure({"rna": table["gex"]}, {"rna": slice(0, 7)})
    (axes,) = figure.axes
    found = points(axes)["z of rna"]
    np.testing.assert_array_equal(found[:, 0], np.arange(1, 8))
    np.testing.assert_array_equal(found[:, 1], np.sort(table["gex"])[::-1])
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rank of the dimension", "attribution to rna")


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(InvalidArgumentError, match="attribution is empty"):
        attribution_figure({}, {})
    with pytest.raises(InvalidArgumentError, match=r"\{'gex': 3, 'peaks': 2\} dimensions by modality"):
        attribution_figure({"gex": np.ones(3), "peaks": np.ones(2)}, {"joint": slice(0, 3)})
