from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from cellstill.pl.retention import retention_figure


@pytest.mark.parametrize("sizes", [[10], [1, 10, 50]], ids=["one_budget", "three_budgets"])
def test_means_and_extremes_of_seeds_are_drawn_inside_the_panel(sizes):
    keys = list(itertools.product(["ours", "random"], sizes, [0, 1], ["knn", "forest"]))
    scores = pd.DataFrame(keys, columns=["method", "samples_per_class", "seed", "evaluator"])
    scores["retention"] = np.random.default_rng(0).uniform(0.5, 1, len(scores))
    figure = retention_figure(scores)
    figure.draw_without_rendering()
    mean, knn, _ = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["mean of 2", "knn", "forest"]
    for axes, rows in ((mean, scores), (knn, scores[scores["evaluator"] == "knn"])):
        for method, drawn in zip(["ours", "random"], axes.containers, strict=True):
            line, _, (bars,) = drawn.lines
            seeds = rows[rows["method"] == method].groupby(["samples_per_class", "seed"])["retention"].mean().unstack()
            np.testing.assert_allclose(line.get_xdata(), sizes)
            np.testing.assert_allclose(line.get_ydata(), seeds.mean(axis=1))
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, np.stack([seeds.min(axis=1), seeds.max(axis=1)], axis=1))
        low, high = axes.get_xlim()
        assert low < 0.9 * min(sizes)
        assert high > 1.1 * max(sizes)


def test_one_evaluator_is_drawn_once():
    scores = pd.DataFrame({"method": "ours", "samples_per_class": 1, "seed": [0, 1], "evaluator": "knn"})
    figure = retention_figure(scores.assign(retention=[0.5, 0.7]))
    assert [axes.get_title() for axes in figure.axes] == ["knn"]
