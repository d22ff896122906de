from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Ten colours found by Petroff (2021, arXiv:2107.02270) to be told apart, each from each, with every common kind of
# colour vision; here the two greys come last, since grey suggests the absence of a category.
_TEN = ["3f90da", "ffa90e", "bd1f01", "832db6", "92dadd", "b9ac70", "a96b59", "e76300", "94a4a2", "717581"]
_N_HUES = 8

MISSING = np.array([0.87, 0.87, 0.87, 1.0])


def palettes(n_levels: Sequence[int]) -> list[NDArray[np.float64]]:
    """Colours of several sets of categories: RGBA arrays of shapes ``(n, 4)``.

    Up to ten levels get colours that everybody can tell apart; sets that are small enough share none, so that a batch
    is not mistaken for a cell type. More levels are sampled around a wheel of hues, with lightness going up and down
    so that neighbours on the wheel differ in more than hue; no set of so many is safe for everybody.
    """
    from matplotlib.colors import to_rgba_array

    ten = to_rgba_array([f"#{colour}" for colour in _TEN])
    if sum(n_levels) <= _N_HUES:
        ends = np.cumsum(n_levels)
        return [ten[end - n : end] for n, end in zip(n_levels, ends, strict=True)]
    return [ten[:n] if n <= len(ten) else _wheel(n) for n in n_levels]


def _wheel(n_levels: int) -> NDArray[np.float64]:
    """Evenly spaced hues of the Oklch colour space at three lightnesses in turn (Ottosson 2020)."""
    hue = 2 * np.pi * np.arange(n_levels) / n_levels
    lightness = np.array([0.58, 0.78, 0.42])[np.arange(n_levels) % 3]
    chroma = np.array([0.17, 0.13, 0.13])[np.arange(n_levels) % 3]
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cubes = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_linear_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear_rgb @ cubes**3, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.column_stack([rgb.T, np.ones(n_levels)])
