"""Hidden layers over all that a network of the model is given: sparse counts, dense numbers, categories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cellstill.nn.dropout import drop
from cellstill.nn.hidden import hidden_layer
from cellstill.nn.layers import SparseLinear
from cellstill.nn.sparse import CSRRows


class Trunk(nn.Module):
    """Hidden layers, each dropout on its input, linear, LayerNorm, ReLU.

    The first layer adds up what it is given: sparse rows times their weights, dense inputs times theirs, and a gathered
    row of weights for each category.

    Parameters
    ----------
    n_sparse
        Features of each matrix of sparse rows.
    n_dense
        Dense inputs.
    categories
        Number of categories of each column of codes.
    widths
        Of the hidden layers.
    dropout
        Probability of dropping an input. Categories are never dropped.
    """

    def __init__(
        self,
        *,
        n_sparse: Sequence[int] = (),
        n_dense: int = 0,
        categories: Mapping[str, int] | None = None,
        widths: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        width, self.dropout, self.columns = widths[0], dropout, list(categories or ())
        self.sparse = nn.ModuleList([SparseLinear(n, width) for n in n_sparse])
        self.dense = nn.Linear(n_dense, width) if n_dense else None
        # A decoder hears categories as spread as all of z. As one input among many dimensions they are learned from so
        # slowly that z comes to tell batches apart.
        bound = (n_dense + len(self.columns) + 1) ** -0.5 if n_sparse else max(len(self.columns), 1) ** -0.5
        self.shifts = nn.ParameterList(
            [nn.Parameter(torch.empty(n, width).uniform_(-bound, bound)) for n in (categories or {}).values()]
        )
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for width in widths])

    def matrices(self) -> list[torch.Tensor]:
        """Weights of all inputs and of the hidden layers."""
        layers = [*self.sparse, *([] if self.dense is None else [self.dense]), *self.hidden]
        return [*(layer.weight for layer in layers), *self.shifts]

    def forward(
        self, rows: Sequence[CSRRows], dense: torch.Tensor | None, codes: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the features of the last hidden layer, shape ``(n, widths[-1])``."""
        drop_dense = nn.functional.dropout
        inputs: list[tuple[nn.Module, CSRRows | torch.Tensor]] = [
            (layer, x.with_data(drop(x.data, self.dropout, self.training)))
            for layer, x in zip(self.sparse, rows, strict=True)
        ]
        if self.dense is not None and dense is not None:
            inputs.append((self.dense, drop_dense(dense, self.dropout, self.training)))
        (first, x), *others = inputs
        parts = [layer(other) for layer, other in others]
        parts += [shift.index_select(0, codes[column]) for column, shift in zip(self.columns, self.shifts, strict=True)]
        features = hidden_layer(x, first, self.norms[0], sum(parts[1:], start=parts[0]) if parts else None)
        for layer, norm in zip(self.hidden, self.norms[1:], strict=True):
            features = hidden_layer(drop_dense(features, self.dropout, self.training), layer, norm)
        return features


def features_and_jacobian(
    trunk: Trunk, dense: torch.Tensor, codes: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a trunk without sparse rows, in evaluation mode, and their derivative in its dense inputs.

    Returns
    -------
    Shapes ``(n, width)`` and ``(n, width, n_dense)``.
    """
    assert trunk.dense is not None
    features = trunk.dense(dense)
    for column, shift in zip(trunk.columns, trunk.shifts, strict=True):
        features = features + shift.index_select(0, codes[column])
    jacobian = trunk.dense.weight.expand(len(dense), -1, -1)
    features, jacobian = _through_norm(trunk.norms[0], features, jacobian)
    for layer, norm in zip(trunk.hidden, trunk.norms[1:], strict=True):
        assert isinstance(layer, nn.Linear)
        features, jacobian = _through_norm(norm, layer(features), torch.matmul(layer.weight, jacobian))
    return features, jacobian


def _through_norm(norm: nn.Module, features: torch.Tensor, jacobian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm and ReLU of features, and the derivative after them."""
    assert isinstance(norm, nn.LayerNorm)
    variance, mean = torch.var_mean(features, dim=1, correction=0, keepdim=True)
    scale = (variance + norm.eps).rsqrt()
    standard = (features - mean) * scale
    along = torch.matmul(standard[:, None] / features.shape[1], jacobian)
    jacobian = jacobian - jacobian.mean(dim=1, keepdim=True) - standard[:, :, None] * along
    normed = torch.addcmul(norm.bias, standard, norm.weight)
    slope = scale * norm.weight * (normed > 0)
    return torch.relu(normed), jacobian * slope[:, :, None]


class GaussianEncoder(nn.Module):
    """Mean and variance of independent Normal distributions, by a linear layer on a :class:`Trunk`.

    They start at mean 0 and one variance, whatever the input, so that each moves only as far as the data ask for.

    Parameters
    ----------
    trunk
        Hidden layers.
    n_hidden, n_out
        Width of the last hidden layer, and number of distributions.
    start_variance
        The variance where they start.
    """

    _LARGEST = 20.0

    def __init__(self, trunk: Trunk, n_hidden: int, n_out: int, *, start_variance: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.output = nn.Linear(n_hidden, 2 * n_out)
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            self.output.bias[:n_out] = 0.0
            self.output.bias[n_out:] = math.log(start_variance)

    def forward(
        self, rows: Sequence[CSRRows], dense: torch.Tensor | None, codes: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, each of shape ``(n, n_out)``."""
        mean, log_variance = self.output(self.trunk(rows, dense, codes)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-self._LARGEST, self._LARGEST).exp()
