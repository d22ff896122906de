"""The torch module of regularised VI, for one modality or many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from cellstill.errors import InvalidArgumentError
from cellstill.nn import normal
from cellstill.nn.sparse import CSRRows
from cellstill.train.plans import Loss
from cellstill.vi.config import VAEConfig
from cellstill.vi.expected import ExpectedLibrary, Told
from cellstill.vi.library import LibraryPosterior
from cellstill.vi.modality import Batch, Modality, total_counts
from cellstill.vi.networks import GaussianEncoder, Trunk
from cellstill.vi.penalties import Relevance, dimensions_present, penalties_of_z, penalty_of_hidden


@dataclass(frozen=True)
class Latent:
    """Posterior of z.

    Attributes
    ----------
    mean, variance
        Of the joint z, shape ``(n, n_latent)``; the prior, 0 and 1, in the part of a modality that a cell lacks.
    kl
        Divergence from the prior, shape ``(n,)``, of the modalities that a cell has.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    kl: torch.Tensor

    def sample(self) -> torch.Tensor:
        """Draw z."""
        return normal.draw(self.mean, self.variance)


class RegularizedVAE(nn.Module):
    r"""Variational autoencoder of counts of one modality or many, with all that regularises it.

    .. math::
        z_n \sim \mathrm{Normal}(0, I), \quad
        \mu_{nf} = l_n\, \mathrm{softplus}(f([z_n, c_n]))_f\, y_{nf} + s_{nf}, \quad
        x_{nf} \sim \mathrm{NB}(\mu_{nf}, \theta_{fd(n)})

    with the expected soup :math:`s_{nf} = r_{e(n)} N_n \chi_{e(n)f}`, a share r of the counts N of a cell
    (:class:`~cellstill.vi.ambient.ProfileBackground`), or :math:`s_{nf} = l_n b_{e(n)f}\, y_{nf}` where the background
    is ``"free"``; per modality, all of whose decoders see the whole of z (:class:`~cellstill.vi.config.VAEConfig`).

    A minibatch is a dictionary: ``<modality>/data``, ``/indices`` and ``/indptr`` (CSR rows, empty where a cell lacks
    the modality), ``<modality>/present`` (float32, if some cells lack it), codes by column (int64), and ``continuous``.

    Parameters
    ----------
    config
        What it is made of.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        names = list(config.modalities)
        # A name may hold a dot, which no child of a module may.
        self.modalities = nn.ModuleList([Modality(one, config) for one in config.modalities.values()])
        self._position = {name: i for i, name in enumerate(names)}
        categories = {column: config.categories[column] for column in config.encoder}
        groups = [names] if config.latent_mode == "single_encoder" else [[name] for name in names]
        self.encoders = nn.ModuleList()
        for group in groups:
            members = [config.modalities[name] for name in group]
            first = members[0]
            trunk = Trunk(
                n_sparse=[member.n_vars for member in members],
                categories=categories,
                widths=[first.n_hidden] * first.n_layers,
                dropout=config.dropout,
            )
            # z starts at its prior; of many dimensions that start at random, cells of one type connect less.
            self.encoders.append(GaussianEncoder(trunk, first.n_hidden, first.n_latent, start_variance=1.0))
        self.mixing = nn.Parameter(torch.zeros(len(names))) if config.latent_mode == "weighted_mean" else None
        self.relevance = None if config.ard is None else Relevance(config.n_latent, config.ard)
        n_vars = {name: one.n_vars for name, one in config.modalities.items()}
        self.expected = nn.ModuleList(
            [ExpectedLibrary({other: n for other, n in n_vars.items() if other != name}) for name in names]
        )

    @property
    def global_parameters(self) -> frozenset[str]:
        """Names of the parameters that stand for the data as a whole."""
        parts = {"background", "scaling", "dispersion"}
        of_modalities = {
            f"modalities.{i}.{name}"
            for i, modality in enumerate(self.modalities)
            for name, _ in modality.named_parameters()
            if name.split(".")[0] in parts or name.startswith(("library.weight.", "library.log_scale"))
        }
        shared = {name for name, _ in self.named_parameters() if name == "mixing" or name.startswith("relevance.")}
        return frozenset(of_modalities | shared)

    def by_parameter(self, values: Mapping[str, float]) -> dict[str, float]:
        """Give each parameter that belongs to one modality alone the modality's value; by the parameter's name."""
        by_parameter = {}
        for i, name in enumerate(self.config.modalities):
            if name in values:
                own = [f"modalities.{i}.", *([f"encoders.{i}."] if len(self.encoders) == len(self.modalities) else [])]
                for parameter, _ in self.named_parameters():
                    if parameter.startswith(tuple(own)):
                        by_parameter[parameter] = values[name]
        return by_parameter

    def modality(self, name: str) -> Modality:
        """Return the part of one modality."""
        return cast(Modality, self.modalities[self._position[name]])

    def rows(self, batch: Batch) -> dict[str, CSRRows]:
        """Counts of a minibatch."""
        return {
            name: CSRRows(batch[f"{name}/data"], batch[f"{name}/indices"], batch[f"{name}/indptr"], modality.n_vars)
            for name, modality in self.config.modalities.items()
        }

    def prior_variance(self) -> torch.Tensor | float:
        """Variance of the prior of z: 1, or that of each dimension, shape ``(n_latent,)``."""
        return 1.0 if self.relevance is None else self.relevance.variance()

    def encode(self, rows: Mapping[str, CSRRows], batch: Batch) -> Latent:
        """Posterior of z: that of the encoders, or the one that minified cells hold."""
        prior = self.prior_variance()
        if "latent/mean" in batch:
            mean, variance = batch["latent/mean"], batch["latent/variance"]
            return Latent(mean, variance, normal.divergence(mean, variance, 0.0, prior))
        posteriors = self.posteriors(rows, batch)
        if self.config.latent_mode == "single_encoder":
            mean, variance = posteriors[0]
            return Latent(mean, variance, normal.divergence(mean, variance, 0.0, prior))
        present = [batch.get(f"{name}/present") for name in rows]
        if self.config.latent_mode == "weighted_mean":
            return self._weighted_mean(posteriors, present, prior)
        means, variances, divergences = [], [], []
        widths = [one.n_latent for one in self.config.modalities.values()]
        priors = [prior] * len(rows) if isinstance(prior, float) else prior.split(widths)
        for (mean, variance), has, own in zip(posteriors, present, priors, strict=True):
            divergence = normal.divergence(mean, variance, 0.0, own)
            if has is not None:
                mean, variance = mean * has[:, None], torch.where(has[:, None] > 0, variance, own)
                divergence = divergence * has
            means.append(mean)
            variances.append(variance)
            divergences.append(divergence)
        if len(means) == 1:
            return Latent(means[0], variances[0], divergences[0])
        return Latent(torch.cat(means, dim=1), torch.cat(variances, dim=1), torch.stack(divergences).sum(dim=0))

    def posteriors(self, rows: Mapping[str, CSRRows], batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and variance of z by encoder, also of cells that lack its modality."""
        seen = [self._encoder_input(name, x) for name, x in rows.items()]
        if self.config.latent_mode == "single_encoder":
            return [self.encoders[0](seen, None, batch)]
        return [encoder([x], None, batch) for encoder, x in zip(self.encoders, seen, strict=True)]

    def library(self, name: str, x: CSRRows, batch: Batch) -> LibraryPosterior:
        """Posterior of the log library size of a modality, as :meth:`encode`; expected where a cell lacks it."""
        stored, has = batch.get(f"{name}/library"), batch.get(f"{name}/present")
        found = self._library(name, x, batch)
        if stored is not None:
            return found._replace(mean=stored[:, :1], variance=stored[:, 1:])
        return found if has is None else self.expected_library(name)(found, self.told(name, batch), has)

    def expected_library(self, name: str) -> ExpectedLibrary:
        """Library size of a modality in cells that lack it."""
        return cast(ExpectedLibrary, self.expected[self._position[name]])

    def told(self, name: str, batch: Batch) -> dict[str, Told]:
        """What the modalities other than ``name`` tell of its library size."""
        told = {}
        for other, x in self.rows(batch).items():
            if other != name:
                totals = total_counts(x)
                has = batch.get(f"{other}/present", torch.ones_like(totals))
                told[other] = Told(
                    self._encoder_input(other, x), totals.log() - self.modality(other).library.center, has
                )
        return told

    def background_of(self, name: str, x: CSRRows, batch: Batch, log_library: torch.Tensor) -> torch.Tensor | None:
        """Background of cells per unit of library size, as :meth:`Modality.background_of`."""
        modality = self.modality(name)
        return modality.background_of(batch, modality.log_amount(x, log_library, batch.get(f"{name}/present")))

    def loss(
        self, batch: Batch, kl_weight: float = 1.0, n_obs: int | None = None, skip_n_obs_check: bool = False
    ) -> Loss:
        """Negative evidence lower bound per cell, plus the global penalties over ``n_obs``.

        Parameters
        ----------
        batch
            Minibatch.
        kl_weight
            Weight of the divergence of z, and of the sparsity of z and of hidden activations.
        n_obs
            Number of training cells.
        skip_n_obs_check
            Accept fewer training cells than the minibatch has.

        Raises
        ------
        InvalidArgumentError
            ``n_obs`` is missing, or smaller than the minibatch.
        """
        rows = self.rows(batch)
        n = next(iter(rows.values())).n_rows
        if n_obs is None or (n_obs < n and not skip_n_obs_check):
            raise InvalidArgumentError(
                f"n_obs={n_obs} has to be the number of training cells, at least the {n} of the minibatch: global "
                "penalties are divided by it. Pass skip_n_obs_check=True to go on."
            )
        latent = self.encode(rows, batch)
        z, kl_z = latent.sample(), latent.kl.sum()
        total, per_cell, likelihood = kl_weight * kl_z, kl_weight * latent.kl.detach(), []
        terms = {"kl_z": kl_z.detach()}
        for term, penalty in penalties_of_z(self.config, z, self._dimensions_present(batch)):
            total, per_cell = total + kl_weight * penalty.sum(), per_cell + kl_weight * penalty.detach()
            terms[term] = penalty.detach().sum()
        for name, x in rows.items():
            modality, present = self.modality(name), batch.get(f"{name}/present")
            library = self._library(name, x, batch)
            kl = normal.divergence(*library)
            kl = kl if present is None else kl * present
            log_library = normal.draw(library.mean, library.variance)
            summed, value, features, native = modality.log_likelihood(
                *(z, log_library, x, batch, present),
                weight_l2=self.config.decoder_weight_l2 * n / n_obs,
                native_sparsity=self.config.native_sparsity * n / n_obs,
                scale=-1 / n,
            )
            if modality.has_profile and self.config.native_sparsity:
                terms[self._term("native_sparsity", name)] = self.config.native_sparsity * native * (n / n_obs)
            if self.config.hidden_sparsity is not None:
                penalty = penalty_of_hidden(self.config.hidden_sparsity, features)
                penalty = penalty if present is None else penalty * present
                total, per_cell = total + kl_weight * penalty.sum(), per_cell + kl_weight * penalty.detach()
                terms[self._term("hidden_sparsity", name)] = penalty.detach().sum()
            kl_l = kl.sum()
            likelihood.append(summed)
            total, per_cell = total + kl_l, per_cell - value + kl.detach()
            terms[self._term("reconstruction_loss", name)] = -value.sum()
            terms[self._term("kl_l", name)] = kl_l.detach()
        objective = sum(likelihood[1:], start=likelihood[0]) + total / n
        penalties = self._penalties()
        if penalties:
            found = torch.stack(list(penalties.values()))
            objective = objective + found.sum() / n_obs
            terms |= zip(penalties, (found.detach() * (n / n_obs)).unbind(), strict=True)
        if self.config.decoder_weight_l2:
            # Of the last layers the penalty came with the likelihood.
            for name in rows:
                square = _square(self.modality(name).output.weight)
                terms[self._term("decoder_l2", name)] += self.config.decoder_weight_l2 * (n / n_obs) * square
        return Loss(objective, per_cell, n, terms)

    def _penalties(self) -> dict[str, torch.Tensor]:
        """Negative log priors of what stands for the data as a whole, by term."""
        found = {
            self._term(term, name): penalty
            for name in self.config.modalities
            for term, penalty in self.modality(name).penalties(self.config)
        }
        return found if self.relevance is None else found | {"ard": self.relevance.penalty()}

    def _library(self, name: str, x: CSRRows, batch: Batch) -> LibraryPosterior:
        return self.modality(name).library(x, total_counts(x), batch.get("continuous"), batch)

    def _encoder_input(self, name: str, x: CSRRows) -> CSRRows:
        if self.config.encoder_input == "log1p":
            return x.log1p()
        return x.log1p(self.modality(name).library.center.exp() / total_counts(x))

    def _dimensions_present(self, batch: Batch) -> torch.Tensor | None:
        """Mask of the dimensions of z that cells have data for; ``None`` where z is of all modalities at once."""
        if self.config.latent_mode != "concatenation":
            return None
        widths = {name: one.n_latent for name, one in self.config.modalities.items()}
        return dimensions_present(widths, {name: batch.get(f"{name}/present") for name in widths})

    def _weighted_mean(self, posteriors: list, present: list, prior: torch.Tensor | float) -> Latent:
        """Weighted mean of independent Normals, with the weights of the modalities that a cell has."""
        assert self.mixing is not None
        n = len(posteriors[0][0])
        has = torch.stack([self.mixing.new_ones(n) if one is None else one for one in present], dim=1)
        share = torch.softmax(self.mixing, dim=0) * has
        share = share / share.sum(dim=1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        mean = sum(part[:, None] * m for part, (m, _) in zip(share.unbind(1), posteriors, strict=True))
        variance = sum(part[:, None].square() * v for part, (_, v) in zip(share.unbind(1), posteriors, strict=True))
        any_present = has.amax(dim=1)
        variance = torch.where(any_present[:, None] > 0, variance, prior)
        return Latent(mean, variance, normal.divergence(mean, variance, 0.0, prior) * any_present)

    def _term(self, term: str, modality: str) -> str:
        return term if len(self._position) == 1 else f"{term}_{modality}"


def _square(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    return torch.dot(flat, flat)
