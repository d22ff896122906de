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

    def forward(
        self, z: torch.Tensor, batch_vectors: torch.Tensor, covariates: torch.Tensor, masks: Masks | None = None
    ) -> torch.Tensor:
        """Logarithm of the expected proportions, shape ``(n, n_vars)``; every row of proportions sums to 1.

        Batches and covariates may be means over several, so they are multiplied.
        """
        return torch.log_softmax(self.network(torch.cat([z, batch_vectors, covariates], dim=1), masks), dim=1)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Negative log-likelihood per gene, with the negative binomial of :func:`negative_binomial_output`.

        The minibatch carries ``z``, ``batch`` (codes), and ``levels`` and ``continuous`` of
        :meth:`~cellstill.data.covariates.CovariateDesign.codes`.
        """
        return self.loss_given(batch, self.batches.weight)

    def loss_given(self, batch: Mapping[str, torch.Tensor], embeddings: torch.Tensor) -> Loss:
        """As :meth:`loss`, with embeddings of the batches that need not be the decoder's own, by code."""
        counts = CSRRows.of(batch, self.n_vars)
        hidden = self.features(batch, embeddings)
        output = self.network.output
        n = counts.n_rows
        total, value = negative_binomial_output(
            *(hidden, output.weight, output.bias, counts, None, self.log_theta.exp()), scale=-1 / (n * self.n_vars)
        )
        return Loss(total, -value / self.n_vars, n)

    def features(self, batch: Mapping[str, torch.Tensor], embeddings: torch.Tensor) -> torch.Tensor:
        """Last hidden layer, as :meth:`forward` has it: a batch and a level each add a gathered row to the first."""
        z, continuous = batch["z"], batch["continuous"]
        first = self.network.hidden[0].weight
        assert isinstance(first, torch.Tensor)
        sizes = [z.shape[1], embeddings.shape[1], continuous.shape[1]]
        sizes.insert(2, first.shape[1] - sum(sizes))
        of_z, of_batch, of_levels, of_continuous = first.split(sizes, dim=1)
        added = (embeddings @ of_batch.t()).index_select(0, batch["batch"])
        by_level = of_levels.t().contiguous()
        for level in batch["levels"].unbind(1):
            added = added + by_level.index_select(0, level)
        if continuous.shape[1]:
            added = torch.addmm(added, continuous, of_continuous.t())
        return self.network.features(z, added=added, weight=of_z)


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
        return self.decoder.loss_given(batch, self.vectors)
