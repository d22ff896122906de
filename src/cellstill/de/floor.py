"""The smallest effect worth a call, estimated from how far apart most genes are."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

_N_SPREADS = 2.0


def estimate_floor(loc: np.ndarray, scale: np.ndarray, df: float | np.ndarray) -> float:
    r"""Effect floor: twice the robust spread of the true effects of the bulk of the genes.

    Most genes differ a little, by what no experiment holds constant; of interest are those that differ more than most
    do. With estimates :math:`\hat\Delta_g = \Delta_g + s_g t_g`, the spread :math:`\tau` of the :math:`\Delta_g` about
    0 is the one that puts the median of :math:`|\hat\Delta_g| / \sqrt{s_g^2 + \tau^2}` where it belongs: at the third
    quartile of a standardised error, which is that of :math:`t` for :math:`\tau = 0` and of the normal where
    :math:`\tau \gg s`. Noise is taken out, so more donors do not change the floor. As the median does not see up to
    half of the genes, large effects in a minority hardly set it: in 10 or 30 % of the genes they make :math:`\tau` 1.1
    or 1.6 times as large. The floor is :math:`2\tau`, and 0 where the estimates scatter no more than their errors.

    Parameters
    ----------
    loc, scale
        Estimate and standard error of each gene's effect, shape ``(n_genes,)``.
    df
        Degrees of freedom of the standard errors, a number or shape ``(n_genes,)``.
    """
    size = np.abs(loc)
    quartile_t, quartile = stdtrit(df, 0.75), ndtri(0.75)

    def excess(spread: float) -> float:
        return float(np.median(size / np.sqrt((quartile_t * scale) ** 2 + (quartile * spread) ** 2)) - 1)

    if excess(0.0) <= 0:
        return 0.0
    return _N_SPREADS * float(brentq(excess, 0.0, 2 * size.max() / quartile))
