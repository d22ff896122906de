"""Factors that take counts to native expression in other categories."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cellstill.vi.correction import LARGEST_RATIO, corrected_ratios


def whole(chunks):
    rows, ratios = zip(*chunks, strict=True)
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(sum(map(len, rows))))
    return np.concatenate(ratios)


def shares(values):
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("targets", [[0], [0, 1]], ids=["one", "average"])
def test_ratios_are_native_shares_over_expected_shares(trained, targets):
    """Oracle: the getters, and what they expect of the counts as measured."""
    cells = trained._cells()
    asked = [{"code/batch": code} for code in targets]
    found = whole(corrected_ratios(trained.module, "rna", cells, asked, batch_size=300))
    names = [f"batch_{code}" for code in targets]
    wanted = trained.get_normalized_expression(transform_batch=names, return_numpy=True)

    import torch

    from cellstill.vi.evaluation import blocks, expected_means

    with torch.inference_mode():
        block = next(iter(blocks(trained.module, cells, len(cells))))
        native, background = expected_means(trained.module, "rna", block)
        total = (native + background if background is not None else native).numpy()
    expected = np.clip(shares(wanted) / shares(total), 1 / LARGEST_RATIO, LARGEST_RATIO)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    np.testing.assert_allclose(
        found, whole(corrected_ratios(trained.module, "rna", cells, asked, batch_size=77)), rtol=1e-3
    )


def test_logarithms_of_ratios_are_the_true_shifts_between_batches(trained, two_types):
    found = whole(corrected_ratios(trained.module, "rna", trained._cells(), [{"code/batch": 1}]))
    shift = two_types.varm["batch_shift"]
    expressed = np.asarray(two_types.X.mean(axis=0)).ravel() > 5
    first = (two_types.obs["batch"] == "batch_0").to_numpy()
    expected = (shift["batch_1"] - shift["batch_0"]).to_numpy()[expressed]
    fit = stats.linregress(expected, np.log(found[first]).mean(axis=0)[expressed])
    assert fit.rvalue > 0.9
    assert fit.slope == pytest.approx(1, abs=0.15)
    assert np.abs(np.log(found[~first]).mean(axis=0)[expressed]).mean() < 0.2 * np.abs(expected).mean()


def test_without_targets_cells_stay_in_their_own_categories(trained):
    cells = trained._cells()
    stay = whole(corrected_ratios(trained.module, "rna", cells, []))
    codes = cells.per_cell["code/batch"]
    for code in (0, 1):
        asked = whole(corrected_ratios(trained.module, "rna", cells, [{"code/batch": code}]))
        np.testing.assert_allclose(stay[codes == code], asked[codes == code], rtol=1e-4)
