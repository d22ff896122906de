r"""How much the expected counts of each modality depend on each latent dimension, cell by cell.

.. math::
    A_{nj}^{(m)} = \frac1{F_m} \sum_f \left| \frac{\partial \mu_{nf}^{(m)}}{\partial z_{nj}} \right|, \qquad
    \frac{\partial \mu_{nf}}{\partial z_{nj}} =
    l_n\, y_{nf}\, \sigma(W h_n + b)_f \sum_k W_{fk} \frac{\partial h_{nk}}{\partial z_{nj}}

exactly: the Jacobian of the hidden layers times the output weights, cells in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cellstill.vi.evaluation import Block, to_numpy
from cellstill.vi.modality import Batch
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.networks import features_and_jacobian

_CHUNK = 1 << 24
"""Entries, cells x features x dimensions, of derivatives held at a time."""


@dataclass(frozen=True)
class ModalityAttribution:
    """Dependence of one modality's expected counts on z.

    Attributes
    ----------
    attribution
        Mean over features of the absolute derivative, shape ``(n_obs, n_latent)``.
    weighted_z
        ``z`` times ``attribution``: cell state as this modality sees it, shape ``(n_obs, n_latent)``.
    block_norm
        By modality whose part of z it is: Frobenius norm of the derivatives of all features in that part, shape
        ``(n_obs,)``. Where modalities have no parts of their own, that of all of z, under ``"joint"``.
    """

    attribution: np.ndarray
    weighted_z: np.ndarray
    block_norm: dict[str, np.ndarray]


def attribute(
    module: RegularizedVAE, name: str, block: Block, parts: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Attribution of some cells at the posterior means of z and library size, and its norm over parts of z.

    Dimensions of z are in the order in which the module has them.
    """
    modality = module.modality(name)
    z = block.latent.mean
    n, n_latent = z.shape
    size = module.library(name, block.counts[name], block.batch).mean.exp()
    scaling = modality.scaling_of(block.batch)
    mean = torch.empty_like(z)
    norms = {part: torch.empty_like(z[:, 0]) for part in parts}
    weight = modality.output.weight
    step = max(1, _CHUNK // (len(weight) * n_latent))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        batch = _rows(block.batch, rows, n)
        hidden, jacobian = features_and_jacobian(modality.decoder, modality.inputs(z[rows], batch), batch)
        jacobian = jacobian[:, :, :n_latent]
        slope = torch.sigmoid(torch.nn.functional.linear(hidden, weight, modality.output.bias)) * size[rows]
        if scaling is not None:
            slope = slope * (scaling[rows] if len(scaling) == n else scaling)
        # cells x features x dimensions
        derivative = torch.matmul(weight, jacobian).abs_().mul_(slope[:, :, None])
        mean[rows] = derivative.mean(dim=1)
        squares = derivative.square_().sum(dim=1)
        for part, columns in parts.items():
            norms[part][rows] = squares[:, columns].sum(dim=1).sqrt()
    return to_numpy(mean), {part: to_numpy(norm) for part, norm in norms.items()}


def _rows(batch: Batch, rows: slice, n: int) -> Batch:
    """Codes and continuous covariates of some cells of a minibatch."""
    taken = (key for key in batch if key == "continuous" or key.startswith("code/"))
    return {key: batch[key][rows] for key in taken}
