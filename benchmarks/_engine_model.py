"""scVI's architecture in cellstill's parts, and the same written plainly with dense arrays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cellstill.nn import normal
from cellstill.nn.layers import MLP
from cellstill.nn.output import negative_binomial_output
from cellstill.nn.sparse import CSRRows
from cellstill.train.plans import Loss

N_HIDDEN, N_LATENT = 128, 10


class VAE(nn.Module):
    """One hidden layer on each side (128, and 10 latent dimensions), a negative binomial of softmax proportions.

    ``dense=True`` makes every minibatch and all of the likelihood's terms dense, and leaves gradients to autograd.
    """

    global_parameters = frozenset({"log_theta"})

    def __init__(
        self,
        n_vars: int,
        *,
        n_hidden: int = N_HIDDEN,
        n_latent: int = N_LATENT,
        dense: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.n_vars, self.dense = n_vars, dense
        self.encoder = MLP([n_vars, n_hidden, 2 * n_latent], dropout=dropout, sparse_input=True)
        self.decoder = MLP([n_latent, n_hidden, n_vars], dropout=dropout, drop_input=False)
        self.log_theta = nn.Parameter(torch.zeros(n_vars))

    def posterior(self, counts: CSRRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the latent, each of shape ``(n, n_latent)``."""
        x = counts.log1p()
        if not self.dense:
            return self.encoder(x).chunk(2, dim=1)
        first, norm = self.encoder.hidden[0], self.encoder.norms[0]
        dense = self.encoder._drop(x, self.encoder.dropout[0], None).to_dense()
        hidden = torch.relu(norm(dense @ first.weight + first.bias))
        return self.encoder.output(hidden).chunk(2, dim=1)

    def loss(self, batch: Mapping[str, torch.Tensor], kl_weight: float = 1.0) -> Loss:
        """Negative evidence lower bound."""
        counts = CSRRows.of(batch, self.n_vars)
        n, (mean, log_variance) = counts.n_rows, self.posterior(counts)
        variance = log_variance.exp()
        if self.dense:
            z = mean + variance.sqrt() * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + variance - 1 - log_variance).sum(dim=1)
        else:
            z, kl = normal.draw(mean, variance), normal.divergence(mean, variance)
        hidden, output, theta = self.decoder.features(z), self.decoder.output, self.log_theta.exp()
        if self.dense:
            log_size = counts.library_size().log()
            value = dense_log_likelihood(counts.to_dense(), output(hidden), log_size, theta)
            total, value = -value.mean(), value.detach()
        else:
            total, value = negative_binomial_output(
                hidden, output.weight, output.bias, counts, None, theta, scale=-1 / n
            )
        each, kl = kl_weight * kl.detach() - value, kl.sum()
        terms = {"reconstruction": n * total.detach(), "kl": kl.detach()}
        return Loss(total + kl_weight / n * kl, each, n, terms)


def dense_log_likelihood(
    x: torch.Tensor, logits: torch.Tensor, log_size: torch.Tensor, theta: torch.Tensor
) -> torch.Tensor:
    """Negative binomial log-likelihood of each cell, term by term as it stands in the textbook."""
    mean = torch.softmax(logits, dim=1) * log_size.exp()[:, None]
    value = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    value = value + theta * torch.log(theta / (theta + mean)) + torch.special.xlogy(x, mean / (theta + mean))
    return value.sum(dim=1)
