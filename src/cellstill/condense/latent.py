"""The latent space of a condensation: a supervised autoencoder with a count decoder, taught by any embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import nn

from cellstill.condense.cells import LabelledCells
from cellstill.condense.settings import keep_checked
from cellstill.data.expression import TARGET_SUM
from cellstill.data.loader import CountsLoader
from cellstill.errors import above_zero, at_least_zero, below_one, whole_number
from cellstill.nn.compiled import compiled
from cellstill.nn.layers import MLP
from cellstill.nn.output import negative_binomial_output
from cellstill.nn.sparse import CSRRows
from cellstill.train.fit import fit, seeded
from cellstill.train.plans import Loss
from cellstill.train.progress import OnEpoch


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Settings of the autoencoder.

    Parameters
    ----------
    n_latent
        Dimensions of z. More hold more of a cell, and are harder to generate.
    n_hidden
        Width of the hidden layer of encoder and decoder.
    dropout
        Of genes and hidden units of the encoder. More guards small data from being learned by heart.
    expression_weight
        :math:`w_1`, of the squared error of log expression, per gene. More makes means sharper at the cost of counts'
        likelihood.
    knowledge_weight
        :math:`w_2`, of the squared error of the embedding that teaches, per dimension.
    class_weight
        :math:`w_3`, of the classes' cross-entropy. More pulls classes apart, and spreads cells within them less.
    max_epochs, batch_size, lr, patience
        Of training; ``patience`` epochs without a lower loss of the validation cells end it, ``None`` waits for
        ``max_epochs``.

    Raises
    ------
    InvalidArgumentError
        A setting is out of range.
    """

    n_latent: int = 128
    n_hidden: int = 256
    dropout: float = 0.2
    expression_weight: float = 1.0
    knowledge_weight: float = 1.0
    class_weight: float = 0.1
    max_epochs: int = 150
    batch_size: int = 128
    lr: float = 1e-3
    patience: int | None = 15

    def __post_init__(self) -> None:
        keep_checked(self, whole_number, "n_latent", "n_hidden", "batch_size", least=1)
        keep_checked(self, whole_number, "max_epochs", least=0)
        if self.patience is not None:
            keep_checked(self, whole_number, "patience", least=0)
        keep_checked(self, below_one, "dropout")
        keep_checked(self, at_least_zero, "expression_weight", "knowledge_weight", "class_weight")
        keep_checked(self, above_zero, "lr")


class Autoencoder(nn.Module):
    r"""Encoder, count decoder, and heads that hold classes and knowledge in the latent space.

    .. math::
        z = E(\tilde x), \quad \rho = \mathrm{softmax}(D(z)), \quad x_g \sim \mathrm{NB}(l \rho_g, \theta_g), \qquad
        \tilde x = \log(1 + 10^4 x / l)

        L = \tfrac1G\big(-\log p(x) + w_1 \lVert M(z) - \tilde x \rVert^2\big) +
            \tfrac{w_2}{d} \lVert Q z - h \rVert^2 + w_3 \mathrm{CE}(k z, y)

    The expected log expression M has a layer of its own behind the decoder's hidden units: the logarithm of an
    expectation lies above the expectation of a logarithm, by more the noisier a gene is, so no single output is both.

    Parameters
    ----------
    log_rate, mean_expression
        Logarithm of each gene's share of all counts, and its mean log expression: where the decoder starts.
    n_classes
        Number of classes.
    n_told
        Dimensions of the embedding h that teaches; 0 without one.
    config
        Settings.
    """

    global_parameters = frozenset({"log_theta"})
    center: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        log_rate: torch.Tensor,
        mean_expression: torch.Tensor,
        n_classes: int,
        n_told: int,
        config: LatentConfig,
    ) -> None:
        super().__init__()
        self.n_vars, self.n_classes, self.n_told, self.config = len(log_rate), n_classes, n_told, config
        hidden, n_latent = config.n_hidden, config.n_latent
        self.encoder = MLP([self.n_vars, hidden, n_latent], dropout=config.dropout, sparse_input=True)
        self.decoder = MLP([n_latent, hidden, self.n_vars], dropout=0.0, drop_input=False)
        nn.init.normal_(self.decoder.output.weight, std=1e-2)
        with torch.no_grad():
            self.decoder.output.bias.copy_(log_rate)
        self.expression = nn.Linear(hidden, self.n_vars)
        nn.init.normal_(self.expression.weight, std=1e-2)
        with torch.no_grad():
            self.expression.bias.copy_(mean_expression)
        self.log_theta = nn.Parameter(torch.full((self.n_vars,), 1.0))
        self.classifier = nn.Linear(n_latent, n_classes)
        self.knowledge = nn.Linear(n_latent, n_told) if n_told else None
        self.register_buffer("center", torch.zeros(n_latent))
        self.register_buffer("scale", torch.ones(n_latent))

    def loss(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Loss of a minibatch with ``label`` and, where an embedding teaches, ``told``."""
        config, counts = self.config, CSRRows.of(batch, self.n_vars)
        n = counts.n_rows
        seen = expression(counts)
        z = self.encoder(seen)
        hidden = self.decoder.features(z)
        total, value = self._likelihood(hidden, counts)
        error = (self.expression(hidden) - seen.to_dense()).square().sum(dim=1)
        entropy = nn.functional.cross_entropy(self.classifier(z), batch["label"], reduction="none")
        each = config.expression_weight / self.n_vars * error + config.class_weight * entropy
        terms = {"nb": -value.sum() / self.n_vars, "class": entropy.detach().sum()}
        terms["expression"] = error.detach().sum() / self.n_vars
        if self.knowledge is not None:
            taught = (self.knowledge(z) - batch["told"]).square().mean(dim=1)
            each = each + config.knowledge_weight * taught
            terms["knowledge"] = taught.detach().sum()
        return Loss(each.mean() + total, each.detach() - value / self.n_vars, n, terms)

    def count_loss(self, z: torch.Tensor, counts: CSRRows) -> torch.Tensor:
        """Negative log-likelihood of counts given standardised z, mean over cells and genes."""
        return self._likelihood(self._hidden(z), counts)[0]

    def _likelihood(self, hidden: torch.Tensor, counts: CSRRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood, mean over cells and genes, and the log-likelihood of each cell."""
        output, scale = self.decoder.output, -1 / (counts.n_rows * self.n_vars)
        return negative_binomial_output(
            hidden, output.weight, output.bias, counts, None, self.log_theta.exp(), scale=scale
        )

    def _hidden(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder.features(z * self.scale + self.center)

    def encode(self, counts: CSRRows) -> torch.Tensor:
        """Return z, standardised over the training cells, shape ``(n, n_latent)``."""
        return (self.encoder(expression(counts)) - self.center) / self.scale

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        r"""Expected proportions of genes :math:`\rho` of standardised z, shape ``(n, n_vars)``."""
        return torch.softmax(self.decoder.output(self._hidden(z)), dim=1)

    def expect(self, z: torch.Tensor) -> torch.Tensor:
        """Expected log expression M of standardised z, at least 0, shape ``(n, n_vars)``."""
        return torch.relu(self.expression(self._hidden(z)))

    def classify(self, z: torch.Tensor) -> torch.Tensor:
        """Logits of the classes of standardised z, shape ``(n, n_classes)``."""
        return self.classifier(z * self.scale + self.center)


def expression(counts: CSRRows) -> CSRRows:
    r""":math:`\log(1 + 10^4 x / l)` of a minibatch, computed on the non-zeros."""
    return counts.log1p(TARGET_SUM / counts.library_size().clamp(min=1e-12))


def fit_autoencoder(
    train: LabelledCells,
    validation: LabelledCells,
    n_classes: int,
    config: LatentConfig,
    *,
    told: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    progress: bool | OnEpoch = False,
    **resume: Any,
) -> tuple[Autoencoder, pd.DataFrame]:
    """Train an autoencoder, and standardise its latent space.

    Parameters
    ----------
    train, validation
        Cells to learn from, and to stop by.
    n_classes
        Number of classes.
    config
        Settings.
    told
        Embeddings that teach, of the cells of ``"train"`` and ``"validation"``. Standardised by their overall spread.
    seed
        Of weights, order and dropout.
    accelerator, progress
        See :func:`cellstill.train.fit.fit`.
    resume
        ``checkpoint`` and ``resume`` of :func:`cellstill.train.fit.fit`.

    Returns
    -------
    The trained module, in evaluation mode, and its history.
    """
    share = np.asarray(train.counts.sum(axis=0), dtype=np.float64).ravel() + 0.5
    log_rate = torch.from_numpy(np.log(share / share.sum()).astype(np.float32))
    mean = torch.from_numpy(np.asarray(train.expression().mean(axis=0), dtype=np.float32).ravel())
    n_told, taught = 0, {}
    if told is not None:
        n_told, spread = told["train"].shape[1], float(told["train"].std()) or 1.0
        taught = {name: (part - told["train"].mean(axis=0)) / spread for name, part in told.items()}
    loaders = {
        name: CountsLoader(
            cells.counts,
            per_cell={"label": cells.codes} | ({"told": taught[name]} if taught else {}),
            batch_size=config.batch_size,
            shuffle=name == "train",
            seed=seed,
        )
        for name, cells in (("train", train), ("validation", validation))
        if len(cells) > 1
    }
    with seeded(seed), compiled("auto", n_values=float(len(train)) * train.n_vars * config.max_epochs):
        module = Autoencoder(log_rate, mean, n_classes, n_told, config)
        history = fit(
            module,
            loaders["train"],
            loaders.get("validation"),
            max_epochs=config.max_epochs,
            lr=config.lr,
            patience=config.patience,
            accelerator=accelerator,
            progress=progress,
            phase="latent space",
            **resume,
        )
    with torch.inference_mode():
        z = encode(module, train.counts)
    module.center.copy_(z.mean(dim=0))
    module.scale.copy_(z.std(dim=0).clamp(min=1e-6))
    return module, history


@torch.inference_mode()
def encode(module: Autoencoder, counts: sp.csr_matrix, batch_size: int = 2048) -> torch.Tensor:
    """Standardised z of cells, shape ``(n, n_latent)``, on the CPU."""
    device = module.center.device
    parts = [
        module.encode(CSRRows.of({name: part.to(device) for name, part in batch.items()}, module.n_vars)).cpu()
        for batch in CountsLoader(counts, batch_size=batch_size)
    ]
    return torch.cat(parts)
