"""A sparse prior on the composition of native expression, with its gradient in the logits of a softplus decoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from cellstill.nn.compiled import add_up, kernels, more_loops
from cellstill.nn.priors import sparse_gamma


class SparseComposition(NamedTuple):
    r"""Shares of features are near 0 in most cells, or well above what is typical of the feature.

    .. math:: \frac{\rho_{nf} / \sum_f \rho_{nf}}{t_f} \sim \mathrm{Gamma}(a, b)

    as a density of the ratio (:func:`~cellstill.nn.priors.sparse_gamma`). Of the composition, so that nothing is gained
    by smaller expression and larger library sizes.

    Attributes
    ----------
    typical
        Typical expression of each feature, above 0, on any scale, shape ``(n_vars,)``.
    concentration, rate, floor
        Of the Gamma. Smaller concentrations are sparser.
    """

    typical: torch.Tensor
    concentration: float
    rate: float
    floor: float

    def penalty(self, native: torch.Tensor) -> torch.Tensor:
        """Negative log density of native expression, ``(n, n_vars)``, summed over features, shape ``(n,)``."""
        ratio = native / native.sum(dim=1, keepdim=True) / (self.typical / self.typical.sum())
        return -sparse_gamma(ratio, self.concentration, self.rate, floor=self.floor).sum(dim=1)

    def penalty_and_gradient(
        self, logits: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Penalty of native expression ``softplus(logits + bias)``, and its gradients, whatever autograd records.

        Parameters
        ----------
        logits, bias
            Shapes ``(n, n_vars)`` and ``(n_vars,)``, float32.
        weight
            Of each cell in the gradients, shape ``(n,)``.

        Returns
        -------
        Penalty of each cell, shape ``(n,)``, and gradients of their weighted sum in ``logits`` and in ``bias``.
        """
        per_typical = self.typical.sum() / self.typical
        if kernels(logits.device) is None:
            logits = logits + bias
            native = torch.nn.functional.softplus(logits)
            total = native.sum(dim=1, keepdim=True)
            ratio = native / total * per_typical
            square = ratio.square() + self.floor**2
            of_ratio = ratio * ((1 - self.concentration) / square + self.rate / square.sqrt())
            along = (of_ratio * ratio).sum(dim=1, keepdim=True)
            gradient = (of_ratio * per_typical - along) * torch.sigmoid(logits) * (weight[:, None] / total)
            return self.penalty(native), gradient, gradient.sum(dim=0)
        sparse_composition = more_loops("_background_kernels").sparse_composition

        penalty, gradient, of_bias = torch.empty_like(weight), torch.empty_like(logits), torch.zeros_like(bias)
        constant = self.concentration * math.log(self.rate) - math.lgamma(self.concentration)
        arrays = [part.numpy() for part in (logits, bias, per_typical)]
        settings = (self.concentration, self.rate, self.floor, constant)
        filled = [part.numpy() for part in (weight, penalty, gradient)]
        totals = [of_bias.numpy()]
        add_up(sparse_composition, [*arrays, *settings, *filled], totals, logits.shape[0], logits.numel())
        return penalty, gradient, of_bias
