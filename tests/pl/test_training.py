from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from cellstill.errors import InvalidArgumentError, MissingKeyError
from cellstill.pl import training_figure


def table(train, validation=None, first_epoch=1):
    columns = {"train_loss": train} | ({} if validation is None else {"validation_loss": validation})
    return pd.DataFrame(columns, index=pd.RangeIndex(first_epoch, first_epoch + len(train), name="epoch"))


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def data_of(line):
    return list(line.get_xdata()), list(line.get_ydata())


def test_curves_are_the_losses_of_each_phase():
    history = {
        "encoder": table([5.0, 3.0, 2.0, 1.5], [5.5, 3.2, 2.9, 3.1]),
        "decoder": table([900.0, 800.0], [910.0, 850.0], first_epoch=0),
    }
    figure = training_figure(history)
    assert [axes.get_title() for axes in figure.axes] == ["encoder", "decoder"]
    for axes, losses in zip(figure.axes, history.values(), strict=True):
        lines = lines_of(axes)
        assert data_of(lines["train"]) == (list(losses.index), list(losses["train_loss"]))
        assert data_of(lines["validation"]) == (list(losses.index), list(losses["validation_loss"]))


@pytest.mark.parametrize("seed", range(5))
def test_the_best_epoch_is_that_of_the_lowest_validation_loss(seed):
    losses = np.random.default_rng(seed).uniform(1, 2, (30, 2))
    history = table(*losses.T, first_epoch=11)
    (axes,) = training_figure({"encoder": history}).axes
    best = 11 + int(np.argmin(losses[:, 1]))
    marked = lines_of(axes)[f"best: epoch {best}"]
    assert data_of(marked) == ([best], [losses[:, 1].min()])
    assert f"best: epoch {best}" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_epochs_without_validation_are_skipped():
    validation = [np.nan, 4.0, np.nan, 2.0, np.nan, 3.0]
    (axes,) = training_figure({"encoder": table([6.0, 5, 4, 3, 2, 1], validation)}).axes
    lines = lines_of(axes)
    assert data_of(lines["validation"]) == ([2, 4, 6], [4.0, 2.0, 3.0])
    assert data_of(lines["best: epoch 4"]) == ([4], [2.0])
    assert len(lines["train"].get_xdata()) == 6


@pytest.mark.parametrize("history", [table([3.0, 2.0]), table([3.0, 2.0], [np.nan, np.nan])], ids=["absent", "all_nan"])
def test_without_validation_no_epoch_is_called_best(history):
    (axes,) = training_figure({"encoder": history}).axes
    assert list(lines_of(axes)) == ["train"]


@pytest.mark.parametrize(
    ("train", "validation", "scale"),
    [
        ([1.0, 0.3, 0.01], [1.0, 0.4, 0.05], "log"),
        ([1.0, 0.3, 0.2], [1.0, 0.4, 0.3], "linear"),
        ([1.0, 0.3, 0.2], [1.0, 0.4, 0.01], "log"),
        ([1900.0, 1100.0, 1000.0], None, "linear"),
        ([1.0, 0.01, -0.5], None, "linear"),
        ([1.0, 0.01, 0.0], None, "linear"),
    ],
    ids=["decades", "factor_of_five", "validation_only", "likelihood", "negative", "zero"],
)
def test_the_scale_is_logarithmic_only_where_it_helps(train, validation, scale):
    (axes,) = training_figure({"encoder": table(train, validation)}).axes
    assert axes.get_yscale() == scale


def test_a_single_epoch_is_visible_and_ticked_by_whole_numbers():
    figure = training_figure({"encoder": table([3.0]), "decoder": table([3.0, 2.0], [4.0, 3.0])})
    assert lines_of(figure.axes[0])["train"].get_marker() == "."
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)


def test_the_figure_can_be_saved_and_pyplot_is_left_alone():
    before = plt.get_fignums()
    training_figure({"encoder": table([1.0, 0.01], [1.0, 0.02])}).savefig(BytesIO(), format="png")
    assert plt.get_fignums() == before


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(InvalidArgumentError, match="history is empty"):
        training_figure({})
    with pytest.raises(InvalidArgumentError, match=r"history\['decoder'\] has no epochs"):
        training_figure({"decoder": table([])})
    with pytest.raises(MissingKeyError, match=r"history\['encoder'\] has: 'loss'"):
        training_figure({"encoder": pd.DataFrame({"loss": [1.0]})})
