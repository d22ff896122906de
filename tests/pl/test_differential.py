from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellstill.errors import InvalidArgumentError, MissingKeyError
from cellstill.pl import ma_figure, volcano_figure


def made(n_genes: int = 400, seed: int = 0, fdr: float = 0.05) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    lfc = rng.normal(0, 1.5, n_genes)
    p_value = np.exp(-np.abs(lfc) * rng.uniform(0, 8, n_genes))
    table = pd.DataFrame({"gene": [f"GENE{i}" for i in range(n_genes)], "base_mean": rng.lognormal(2, 2, n_genes)})
    table = table.assign(lfc=lfc, p_value=p_value, fdr=np.minimum(2 * p_value, 1))
    table["is_de"] = table["fdr"] <= fdr
    table["direction"] = np.where(table["is_de"], np.where(lfc > 0, "up", "down"), "none")
    return table


def drawn(axes) -> dict[str, np.ndarray]:
    return {points.get_label().split(" (")[0]: np.asarray(points.get_offsets()) for points in axes.collections}


def names(axes) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text().startswith("GENE")]


@pytest.mark.parametrize("draw", [lambda tables: volcano_figure(tables, fdr=0.05), ma_figure], ids=["volcano", "ma"])
def test_points_lie_where_the_table_says_in_the_colour_of_their_direction(draw):
    tables = {"one": made(), "two": made(50, seed=1)}
    figure = draw(tables)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    colours = set()
    for axes, table in zip(figure.axes, tables.values(), strict=True):
        found = drawn(axes)
        for label, way in (("not called", "none"), ("down", "down"), ("up", "up")):
            rows = table[table["direction"] == way]
            if draw is ma_figure:
                expected = rows[["base_mean", "lfc"]].to_numpy()
            else:
                expected = np.column_stack([rows["lfc"], -np.log10(rows["fdr"])])
            np.testing.assert_allclose(found[label], expected)
        colours |= {tuple(points.get_facecolor()[0][:3]) for points in axes.collections}
    assert len(colours) == 3


def test_the_line_parts_the_genes_called_from_the_others():
    axes = volcano_figure({"x": made(fdr=0.01)}, fdr=0.01, threshold=0.5).axes[0]
    (height,) = {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"}
    assert sorted(line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":") == [-0.5, 0.5]
    found = drawn(axes)
    assert min(found["up"][:, 1].min(), found["down"][:, 1].min()) >= height > found["not called"][:, 1].max()
    assert any(text.get_text() == "FDR 0.01" for text in axes.texts)


def test_an_fdr_of_zero_is_drawn_above_all_others_and_inside_the_panel():
    table = made()
    table.loc[[3, 5], ["p_value", "fdr"]] = 0.0
    table.loc[[3, 5], "is_de"] = True
    table.loc[[3, 5], "direction"] = ["up", "down"]
    table.loc[7, ["p_value", "fdr"]] = 1e-300
    axes = volcano_figure({"x": table}, fdr=0.05).axes[0]
    heights = np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])
    assert len(heights) == len(table)
    assert np.isfinite(heights).all()
    assert (heights[:, 1] > 300).sum() == 2
    assert heights[:, 1].max() < axes.get_ylim()[1]
    triangles = [points for points in axes.collections if len(points.get_paths()[0].vertices) == 4]
    assert [len(points.get_offsets()) for points in triangles] == [1, 1]


def test_genes_that_were_not_tested_and_genes_without_a_count_are_not_drawn():
    table = made(20)
    table.loc[:3, ["lfc", "p_value", "fdr"]] = np.nan
    table.loc[:3, ["is_de", "direction"]] = [False, "none"]
    table.loc[10, "base_mean"] = 0.0
    assert sum(map(len, drawn(volcano_figure({"x": table}, fdr=0.05).axes[0]).values())) == 16
    assert sum(map(len, drawn(ma_figure({"x": table}).axes[0]).values())) == 15


def test_nothing_called_and_nothing_tested_are_drawn_too():
    table = made(30).assign(is_de=False, direction="none")
    assert names(volcano_figure({"x": table}, fdr=0.05).axes[0]) == []
    volcano_figure({"x": table.assign(fdr=np.nan)}, fdr=0.05).draw_without_rendering()
    ma_figure({"x": table.assign(lfc=np.nan)}).draw_without_rendering()


@pytest.mark.parametrize("draw", [lambda tables, **some: volcano_figure(tables, fdr=0.05, **some), ma_figure])
def test_the_most_certain_genes_are_named_without_overlap_inside_the_panel(draw):
    table = made(1000)
    figure = draw({"x": table, "y": table}, n_labels=25)
    figure.draw_without_rendering()
    certain = table[table["is_de"]].sort_values("p_value")["gene"].tolist()
    for axes in figure.axes:
        named = names(axes)
        assert 8 < len(named) <= 25
        assert set(named) <= set(certain[:25])
        assert named[0] == certain[0]
        boxes = [text.get_window_extent() for text in axes.texts]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert axes.bbox.contains(*box.min)
            assert axes.bbox.contains(*box.max)
    assert names(draw({"x": table}, n_labels=0).axes[0]) == []


def test_bayesian_tables_are_ranked_by_their_probability():
    table = made(60).rename(columns={"lfc": "lfc_mean"}).drop(columns="p_value")
    table["prob_de"] = 1 - table["fdr"].rank() / 1000
    figure = volcano_figure({"x": table}, fdr=0.05, n_labels=1)
    assert names(figure.axes[0]) == [table.loc[table["prob_de"].idxmax(), "gene"]]
    assert figure.axes[0].get_xlabel() == "log2 fold change (posterior mean)"
    with pytest.raises(MissingKeyError, match="'base_mean'"):
        ma_figure({"x": table.drop(columns="base_mean")})


@pytest.mark.parametrize(("column", "word"), [("lfc_shrunken", "shrunken"), ("lfc_borrowed", "borrowed")])
def test_shrunken_and_borrowed_fold_changes_are_drawn_where_there_are_any(column, word):
    table = made(30)
    table[column] = 0.5 * table["lfc"]
    axes = ma_figure({"x": table}).axes[0]
    np.testing.assert_allclose(np.sort(np.concatenate(list(drawn(axes).values()))[:, 1]), np.sort(table[column]))
    assert axes.get_ylabel() == f"{word} log2 fold change"


def test_figures_do_not_reach_pyplot():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    volcano_figure({"x": made(30)}, fdr=0.05)
    assert pyplot.get_fignums() == before


def test_bad_tables_are_named():
    with pytest.raises(InvalidArgumentError, match="tables is empty"):
        volcano_figure({}, fdr=0.05)
    with pytest.raises(MissingKeyError, match="column='direction' is not in the table of 'x'"):
        ma_figure({"x": made(5).drop(columns="direction")})
    with pytest.raises(InvalidArgumentError, match="no fold change: none of 'lfc_borrowed', 'lfc_shrunken', 'lfc'"):
        volcano_figure({"x": made(5).drop(columns="lfc")}, fdr=0.05)
