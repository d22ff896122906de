"""Decoder, library and parameters of one modality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from cellstill.nn.background import NativePenalty, background_output
from cellstill.nn.sparse import CSRRows
from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.library import Library
from cellstill.vi.networks import Trunk
from cellstill.vi.parts import Background, Dispersion, FeatureScaling, NoOverdispersion
from cellstill.vi.tables import join

Batch = Mapping[str, torch.Tensor]
Table = tuple[torch.Tensor | None, torch.Tensor | None]

_PENALISED = 32
"""One cell of so many has its native expression penalised."""


class Likelihood(NamedTuple):
    """What a modality says of counts.

    Attributes
    ----------
    total
        Sum over cells, less penalties, times the scale asked for, to differentiate.
    per_cell
        Log-likelihood of each cell, shape ``(n,)``.
    features
        What the output layer saw, shape ``(n, n_hidden)``.
    native_penalty
        Mean penalty of native expression.
    """

    total: torch.Tensor
    per_cell: torch.Tensor
    features: torch.Tensor
    native_penalty: torch.Tensor


class Modality(nn.Module):
    """Decoder, library and parameters of one modality.

    Parameters
    ----------
    config
        Of the modality.
    shared
        Of the model.
    """

    def __init__(self, config: ModalityConfig, shared: VAEConfig) -> None:
        super().__init__()

        def sizes(columns: tuple[str, ...]) -> dict[str, int]:
            return {column: shared.categories[column] for column in columns}

        n_vars, widths = config.n_vars, [config.n_hidden] * config.n_layers
        self.decoder = Trunk(
            n_dense=shared.n_latent + shared.n_continuous,
            categories=sizes(shared.conditioning),
            widths=widths,
            dropout=shared.dropout,
        )
        self.output = nn.Linear(widths[-1], n_vars)
        self.library = Library(
            n_vars,
            n_hidden=shared.library_hidden,
            n_continuous=shared.n_continuous,
            categories=sizes(shared.encoder),
            dropout=shared.dropout,
            column=shared.library,
            n_groups=1 if shared.library is None else shared.categories[shared.library],
            sensitivity=config.sensitivity,
            variance_weight=shared.library_variance_weight,
            residual=shared.residual_library,
            learn_scale=shared.modality_scaling,
        )
        self.background: Background | ProfileBackground | None = None
        if config.background is not None:
            form = ProfileBackground if config.background == "profile" else Background
            self.background = form(sizes(shared.ambient), n_vars)
        self.scaling = FeatureScaling(sizes(shared.feature_scaling), n_vars) if config.feature_scaling else None
        n_groups = 1 if shared.dispersion is None else shared.categories[shared.dispersion]
        if config.likelihood == "poisson":
            self.dispersion: Dispersion | NoOverdispersion = NoOverdispersion(n_vars)
        else:
            per_cell = shared.theta_sampling == "cell"
            self.dispersion = Dispersion(shared.dispersion, n_groups, n_vars, per_cell=per_cell)

    def features(self, z: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return what the output layer sees, shape ``(n, n_hidden)``."""
        return self.decoder((), self.inputs(z, batch), batch)

    def inputs(self, z: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Dense inputs of the decoder: z, and the continuous covariates."""
        continuous = batch.get("continuous")
        return z if continuous is None else torch.cat([z, continuous], dim=1)

    def native(self, z: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Native expression rho, shape ``(n, n_vars)``."""
        return nn.functional.softplus(self.output(self.features(z, batch)).float())

    @property
    def has_profile(self) -> bool:
        """Whether the background is of the form ``"profile"``."""
        return isinstance(self.background, ProfileBackground)

    def background_of(self, batch: Batch, log_amount: torch.Tensor | None) -> torch.Tensor | None:
        """Background of cells, broadcast against ``(n, n_vars)``; ``None`` if there is none."""
        table, group = self.background_table(batch, self.scaling_table(batch))
        if table is None:
            return None
        background = _rows(table, group)
        return (background if log_amount is None else background + log_amount).exp()

    def background_table(self, batch: Batch, scaled: Table) -> Table:
        """Log background by group and feature, before the feature scaling ``scaled``, and the group of each cell."""
        if self.background is None:
            return None, None
        table, group = self.background(batch)
        scaling, own = scaled
        if not self.has_profile or scaling is None:
            return table, group
        # Soup has the composition that was observed, scaled as it is.
        if own is group or own is None:
            return table - scaling, group
        rows = torch.zeros_like(own) if group is None else group
        return join([table, -scaling], [rows, own])

    def scaling_of(self, batch: Batch) -> torch.Tensor | None:
        """Feature scaling of cells, as :meth:`background_of`."""
        return None if self.scaling is None else _rows(*self.scaling(batch)).exp()

    def scaling_table(self, batch: Batch) -> Table:
        """Log feature scaling by group and feature, and the group of each cell."""
        return (None, None) if self.scaling is None else self.scaling(batch)

    def log_likelihood(
        self,
        z: torch.Tensor,
        log_library: torch.Tensor,
        x: CSRRows,
        batch: Batch,
        present: torch.Tensor | None,
        *,
        weight_l2: float = 0.0,
        native_sparsity: float = 0.0,
        scale: float = 1.0,
    ) -> Likelihood:
        """Likelihood of counts, less the penalties that are computed with it; the total times ``scale``."""
        log_amount = self.log_amount(x, log_library, present)
        theta, group = self.dispersion(batch, x.n_rows)
        scaling, scaling_group = self.scaling_table(batch)
        background, background_group = self.background_table(batch, (scaling, scaling_group))
        features = self.features(z, batch)
        penalty = None
        if isinstance(self.background, ProfileBackground) and native_sparsity:
            penalty = NativePenalty(self.background.native_prior, native_sparsity, max(1, x.n_rows // _PENALISED))
        total, value, native = background_output(
            *(features, self.output.weight, self.output.bias, x, log_library[:, 0], theta),
            group=group,
            log_background=background,
            background_group=background_group,
            log_amount=None if log_amount is None else log_amount[:, 0],
            log_scaling=scaling,
            scaling_group=scaling_group,
            cell_weight=present,
            weight_l2=weight_l2,
            native_penalty=penalty,
            scale=scale,
        )
        return Likelihood(total, value if present is None else value * present, features, native)

    def log_amount(self, x: CSRRows, log_library: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor | None:
        """Logarithm of the amount of background per unit of library size, shape ``(n, 1)``; ``None`` is 0.

        Soup is a share of what was counted. The library size is not: it may grow while native expression shrinks.
        Cells that lack the modality have the amount of a cell of their library size.
        """
        if not self.has_profile:
            return None
        amount = self.library.log_observed(total_counts(x)) - log_library
        return amount if present is None else amount * present[:, None]

    def penalties(self, config: VAEConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Negative log priors of what stands for the data as a whole."""
        if config.regularise_dispersion:
            yield "dispersion", self.dispersion.penalty()
        if isinstance(self.background, Background) and config.regularise_background:
            yield "background", self.background.penalty()
        if self.scaling is not None:
            yield "feature_scaling", self.scaling.penalty()
        if self.library.weight is not None:
            yield "library_weight", self.library.penalty()
        if self.library.log_scale is not None:
            yield "modality_scaling", self.library.scale_penalty()
        if config.decoder_weight_l2:
            # That of the last layer comes with the likelihood.
            squares = [torch.dot(flat, flat) for flat in map(torch.flatten, self.decoder.matrices())]
            yield "decoder_l2", config.decoder_weight_l2 * sum(squares[1:], start=squares[0])
        if config.decoder_weight_l1:
            weights = [*self.decoder.matrices(), self.output.weight]
            magnitudes = torch.stack([weight.abs().sum() for weight in weights])
            yield "decoder_l1", config.decoder_weight_l1 * magnitudes.sum()


def total_counts(x: CSRRows) -> torch.Tensor:
    """Total of each cell, at least 1, shape ``(n,)``."""
    return x.library_size().clamp(min=1.0)


def _rows(table: torch.Tensor, group: torch.Tensor | None) -> torch.Tensor:
    return table if group is None or len(table) == 1 else table[group]
