from __future__ import annotations

import numpy as np
import pytest
from matplotlib import colormaps

from cellstill.pl._palette import palettes

# Machado, Oliveira and Fernandes (2009): full dichromacy, on linear RGB.
VISION = {
    "trichromat": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
RGB_TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(rgba, vision="trichromat"):
    """CIE L*a*b* (D65) of sRGB colours as seen by an eye."""
    rgb = rgba[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.transpose(VISION[vision]), 0, 1) @ np.transpose(RGB_TO_XYZ) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.column_stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])])


def nearest_pair(points):
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    return distances[~np.eye(len(points), dtype=bool)].min()


@pytest.mark.parametrize("vision", VISION)
def test_ten_colours_are_told_apart_by_every_eye(vision):
    ten = palettes([10])[0]
    assert nearest_pair(lab(ten, vision)) > 9
    if vision != "trichromat":
        assert nearest_pair(lab(ten, vision)) > 1.5 * nearest_pair(lab(np.array(colormaps["tab10"].colors), vision))


@pytest.mark.parametrize("n_levels", [11, 17, 40])
def test_many_colours_differ_and_neighbours_differ_clearly(n_levels):
    (shades,) = palettes([n_levels])
    assert shades.shape == (n_levels, 4)
    assert ((shades >= 0) & (shades <= 1)).all()
    assert nearest_pair(lab(shades)) > 4
    steps = np.linalg.norm(lab(shades) - np.roll(lab(shades), 1, axis=0), axis=1)
    assert np.sort(steps)[1:].min() > 13  # the wheel may close on two of like lightness


def test_small_sets_share_no_colour_and_large_ones_start_anew():
    batch, cell_type = palettes([3, 5])
    assert len(np.unique(np.vstack([batch, cell_type]), axis=0)) == 8
    batch, cell_type = palettes([3, 8])
    np.testing.assert_array_equal(batch, cell_type[:3])
    assert [len(shades) for shades in palettes([2, 30, 0])] == [2, 30, 0]
