"""Layers that read sparse rows, and the blocks built on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from cellstill.nn.dropout import drop
from cellstill.nn.hidden import hidden_layer
from cellstill.nn.product import sparse_pays, sparse_product
from cellstill.nn.sparse import CSRRows


class SparseLinear(nn.Module):
    """Affine map of CSR rows: ``x W + b``.

    Parameters
    ----------
    n_in, n_out
        Number of genes and of outputs.

    Notes
    -----
    Rows are multiplied sparse, or made dense first where that is faster: on an accelerator, and where more than
    15 to 25 % of the counts are not zero (see :func:`cellstill.nn.product.sparse_pays`). Both give the same result to
    rounding.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        nn.init.kaiming_uniform_(self.weight.T, a=5**0.5)

    def forward(self, x: CSRRows) -> torch.Tensor:
        """Map rows, ``(n, n_in)``, to ``(n, n_out)``."""
        if sparse_pays(x, self.weight):
            return sparse_product(x, self.weight) + self.bias
        return torch.addmm(self.bias, x.to_dense(), self.weight)


Masks = Sequence[torch.Tensor]
"""One dropout mask per hidden layer, shape ``(width,)``, the same for every row."""


class MLP(nn.Module):
    """Hidden layers, each dropout on its input, linear, LayerNorm, ReLU; then a linear output.

    Parameters
    ----------
    sizes
        Widths: input, hidden layers, output.
    dropout
        Probability of dropping an input of a hidden layer. Larger values regularise more.
    sparse_input
        The input are CSR rows.
    drop_input
        Drop inputs of the first layer too. Right for many redundant inputs, such as genes; wrong for a few that each
        say something of their own, such as the batch.
    """

    def __init__(
        self, sizes: Sequence[int], *, dropout: float = 0.1, sparse_input: bool = False, drop_input: bool = True
    ) -> None:
        super().__init__()
        first = SparseLinear if sparse_input else nn.Linear
        self.dropout = [dropout if i or drop_input else 0.0 for i in range(len(sizes) - 2)]
        self.widths = list(sizes[:-2])
        self.hidden = nn.ModuleList(
            [(first if i == 0 else nn.Linear)(a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes[:-1]))]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(size) for size in sizes[1:-1]])
        self.output = nn.Linear(sizes[-2], sizes[-1])

    def extra_repr(self) -> str:
        """What no part of it shows."""
        return f"dropout={self.dropout}"

    def draw_masks(self, generator: torch.Generator) -> Masks:
        """Draw one dropout mask per layer: a draw of the whole function (Gal & Ghahramani 2016), not of each row."""
        device = self.output.weight.device
        return [
            (torch.rand(width, generator=generator) >= p).to(device).float() / (1 - p)
            for width, p in zip(self.widths, self.dropout, strict=True)
        ]

    def forward(self, x: CSRRows | torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        """Map ``(n, sizes[0])`` to ``(n, sizes[-1])``; with ``masks`` those are applied instead of random dropout."""
        return self.output(self.features(x, masks))

    def features(
        self,
        x: CSRRows | torch.Tensor,
        masks: Masks | None = None,
        *,
        added: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the output layer sees, shape ``(n, sizes[-2])``.

        ``weight`` and ``added`` are for an ``x`` without some of the inputs: the first layer's weight for those it has,
        and what the others give (:func:`~cellstill.nn.hidden.hidden_layer`).
        """
        for i, (linear, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            x = self._drop(x, self.dropout[i], None if masks is None else masks[i])
            x = hidden_layer(x, linear, norm, added, weight)
            added = weight = None
        assert isinstance(x, torch.Tensor)
        return x

    def _drop(self, x: CSRRows | torch.Tensor, p: float, mask: torch.Tensor | None) -> CSRRows | torch.Tensor:
        if isinstance(x, CSRRows):
            # Zeros stay zero whatever is dropped, so only the non-zeros are drawn.
            if mask is not None:
                return x.with_data(x.data * mask[x.indices])
            return x.with_data(drop(x.data, p, self.training))
        return nn.functional.dropout(x, p, self.training) if mask is None else x * mask
