"""The networks: an encoder that imitates the teacher, a decoder that explains the counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cellstill.nn.layers import MLP, Masks
from cellstill.nn.output import negative_binomial_output
from cellstill.nn.sparse import CSRRows
from cellstill.train.plans import Loss

MEAN_BATCH = -1
"""Batch code that decodes with the mean of the known batches' embeddings."""


class Encoder(nn.Module):
    """A frozen linear map of the principal components, plus a learned correction.

    ``E(x) = A pca(x) + c + MLP(log2 CPM(x))``, in the teacher's coordinates, standardised per dimension.

    Parameters
    ----------
    n_vars
        Number of genes.
    weight, bias
        ``A``, shape ``(n_comps, n_latent)``, and ``c``, shape ``(n_latent,)``; they are not trained.
    n_hidden, n_layers, dropout
        Of the correction.
    """

    global_parameters: frozenset[str] = frozenset()

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, n_vars: int, weight: torch.Tensor, bias: torch.Tensor, *, n_hidden: int, n_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        sizes = [n_vars, *[n_hidden] * n_layers, weight.shape[1]]
        self.correction = MLP(sizes, dropout=dropout, sparse_input=True)
        # Training starts at the linear map, which is already close.
        nn.init.zeros_(self.correction.output.weight)
        nn.init.zeros_(self.correction.output.bias)

    def forward(self, batch: Mapping[str, torch.Tensor], masks: Masks | None = None) -> torch.Tensor:
        """Encode a minibatch that carries ``pca``; shape ``(n, n_latent)``."""
        counts = CSRRows.of(batch, self.n_vars)
        return torch.addmm(self.bias, batch["pca"], self.weight) + self.correction(counts.log2_cpm(), masks)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Squared distance to the teacher's ``target``, averaged over dimensions, shape ``(n,)``."""
        return (self(batch) - batch["target"]).square().mean(dim=1)


class Decoder(nn.Module):
    """Expected proportions of genes, given latent, batch and covariates: ``rho = softmax(D([z, e(batch), c]))``.

    Parameters
    ----------
    n_latent, n_vars, n_batches, n_covariates
        Sizes.
    n_batch_embedding
        Size of the embedding of a batch; 0 decodes without the batch.
    n_hidden, n_layers, dropout
        Of the hidden layers.
    log_rate
        Logarithm of each gene's overall proportion, shape ``(n_vars,)``: where the output starts.
    """

    global_parameters: frozenset[str] = frozenset({"log_theta"})

    def __init__(
        self,
        n_latent: int,
        n_vars: int,
        n_batches: int,
        n_covariates: int,
        *,
        n_batch_embedding: int,
        n_hidden: int,
        n_layers: int,
        dropout: float,
        log_rate: torch.Tensor,
    ) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.batches = nn.Embedding(n_batches, n_batch_embedding)
        nn.init.normal_(self.batches.weight, std=0.1)
        sizes = [n_latent + n_batch_embedding + n_covariates, *[n_hidden] * n_layers, n_vars]
        self.network = MLP(sizes, dropout=dropout, drop_input=False)
        nn.init.normal_(self.network.output.weight, std=1e-2)
        with torch.no_grad():
            self.network.output.bias.copy_(log_rate)
        self.log_theta = nn.Parameter(torch.full((n_vars,), 1.0))

    def batch_vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Embed batch codes; :data:`MEAN_BATCH` gives the mean of all embeddings."""
        weight = self.batches.weight
        return torch.cat([weight, weight.mean(dim=0, keepdim=True)])[codes]

    def forward(
        self, z: torch.Tensor, batch_vectors: torch.Tensor, covariates: torch.Tensor, masks: Masks | None = None
    ) -> torch.Tensor:
        """Logarithm of the expected proportions, shape ``(n, n_vars)``; every row of proportions sums to 1."""
        return torch.log_softmax(self.network(torch.cat([z, batch_vectors, covariates], dim=1), masks), dim=1)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Negative log-likelihood per gene, with the negative binomial of :func:`negative_binomial_output`."""
        return self.loss_given(batch, self.batch_vectors(batch["batch"]))

    def loss_given(self, batch: Mapping[str, torch.Tensor], batch_vectors: torch.Tensor) -> Loss:
        """As :meth:`loss`, with embeddings of the batches that need not be the decoder's own."""
        counts = CSRRows.of(batch, self.n_vars)
        hidden = self.network.features(torch.cat([batch["z"], batch_vectors, batch["covariates"]], dim=1))
        output = self.network.output
        n = counts.n_rows
        total, value = negative_binomial_output(
            *(hidden, output.weight, output.bias, counts, None, self.log_theta.exp()), scale=-1 / (n * self.n_vars)
        )
        return Loss(total, -value / self.n_vars, n)


class NewBatches(nn.Module):
    """Embeddings of batches that a trained decoder has not seen; the decoder stays as it is.

    Parameters
    ----------
    decoder
        Trained decoder.
    n_batches
        Number of new batches; each starts at the mean of the known ones.
    """

    global_parameters: frozenset[str] = frozenset()

    def __init__(self, decoder: Decoder, n_batches: int) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(False)
        self.vectors = nn.Parameter(decoder.batches.weight.mean(dim=0).repeat(n_batches, 1))

    def loss(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        """As :meth:`Decoder.loss`, with the new embeddings."""
        return self.decoder.loss_given(batch, self.vectors[batch["batch"]])
