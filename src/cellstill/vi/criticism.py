"""How well a regularised model explains counts: evidence, likelihood, and counts drawn from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.data.order import in_order
from cellstill.errors import InvalidArgumentError
from cellstill.nn import normal
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.evaluation import Block, blocks, expected_means, to_numpy
from cellstill.vi.getters import Getters
from cellstill.vi.library import LibraryPosterior
from cellstill.vi.module import Latent
from cellstill.vi.noise import CellNoise

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from sparse import GCXS

    Sample: TypeAlias = sp.csr_matrix | GCXS


class Criticism(Getters):
    """Evidence and posterior predictive counts of both regularised models."""

    @names_what_to_use
    def get_elbo(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        batch_size: int | None = 1024,
        return_mean: bool = True,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Evidence lower bound of cells, at one draw of z and of library size; larger is better.

        Log-likelihood less divergences: the sign is that of scvi-tools' ``get_elbo``. ``history_["elbo_train"]`` and
        ``history_["elbo_validation"]`` are losses, the negative of it, as they are there.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_normalized_expression`.
        batch_size
            Cells at a time, on which the draws do not depend. Larger is faster until memory runs out.
        return_mean
            Otherwise one value per cell, shape ``(n,)``.
        seed
            Of the draw.
        """
        values, noise = [], CellNoise(seed)
        for block in self._blocks(adata, indices, batch_size):
            z = _drawn_z(block, noise)
            value = -block.latent.kl
            for number, name in enumerate(self.module.config.modalities):
                log_likelihood, library = self._at(block, name, z, noise, number)
                divergence = normal.divergence(*library)
                value = value + log_likelihood - _of_present(block, name, divergence)
            values.append(to_numpy(value))
        return _mean(values, return_mean)

    @names_what_to_use
    def get_reconstruction_error(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        batch_size: int | None = 1024,
        return_mean: bool = True,
        seed: int = 0,
    ) -> dict[str, float | np.ndarray]:
        """Negative log-likelihood of cells given a draw of z and of library size; smaller is better.

        The sign is that of scvi-tools' ``get_reconstruction_error``, and of the history's ``reconstruction_loss``.

        Parameters
        ----------
        adata, indices, batch_size, return_mean, seed
            As in :meth:`get_elbo`.

        Returns
        -------
        ``"reconstruction_loss"``, and with several modalities ``"reconstruction_loss_{modality}"`` as well.
        """
        names = list(self.module.config.modalities)
        values: dict[str, list[np.ndarray]] = {name: [] for name in names}
        noise = CellNoise(seed)
        for block in self._blocks(adata, indices, batch_size):
            z = _drawn_z(block, noise)
            for number, name in enumerate(names):
                values[name].append(to_numpy(-self._at(block, name, z, noise, number)[0]))
        each = {name: np.concatenate(parts) for name, parts in values.items()}
        errors = {"reconstruction_loss": np.sum(list(each.values()), axis=0)}
        if len(names) > 1:
            errors.update({f"reconstruction_loss_{name}": value for name, value in each.items()})
        return {name: float(value.mean()) if return_mean else value for name, value in errors.items()}

    @names_what_to_use
    def get_marginal_ll(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        n_mc_samples: int = 1000,
        batch_size: int | None = 128,
        return_mean: bool = True,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Log-likelihood of cells with z and library size integrated out, by importance sampling; larger is better.

        An estimate from below, closer with more samples. The sign is that of scvi-tools' ``get_marginal_ll``.

        Parameters
        ----------
        adata, indices, batch_size, return_mean, seed
            As in :meth:`get_elbo`.
        n_mc_samples
            Draws from the posterior.
        """
        if n_mc_samples < 1:
            raise InvalidArgumentError(f"n_mc_samples={n_mc_samples} has to be at least 1.")
        values, noise = [], CellNoise(seed)
        for block in self._blocks(adata, indices, batch_size):
            weights = torch.stack([self._importance(block, noise, draw) for draw in range(n_mc_samples)])
            values.append(to_numpy(torch.logsumexp(weights.double(), dim=0) - np.log(n_mc_samples)))
        return _mean(values, return_mean)

    @names_what_to_use
    def posterior_predictive_sample(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        modality: str | None = None,
        n_samples: int = 1,
        batch_size: int | None = 1024,
        seed: int = 0,
    ) -> Sample | dict[str, Sample]:
        """Counts drawn from the model at draws of z and library size from the posterior of each cell.

        Parameters
        ----------
        adata, indices, seed
            As in :meth:`get_elbo`.
        modality
            Name; ``None`` is all of them, drawn at the same z.
        n_samples
            Draws.
        batch_size
            Cells at a time. Larger is faster until memory runs out; other sizes give other draws.

        Returns
        -------
        CSR, float32, shape ``(n, n_features)``, which fits into ``layers``; with several draws a ``sparse.GCXS`` of
        shape ``(n, n_features, n_samples)``, as scvi-tools' models give it to
        ``scvi.criticism.PosteriorPredictiveCheck``. A dictionary by modality where there are several and none is named;
        cells that lack one have no counts of it. Features are in the order of the data
        (see :meth:`get_normalized_expression`).

        Warns
        -----
        CellstillWarning
            The features of the data are not the model's: those of the result are the model's, in the model's order.
        """
        names = list(self.module.config.modalities) if modality is None else [self._modality(modality)]
        if n_samples < 1:
            raise InvalidArgumentError(f"n_samples={n_samples} has to be at least 1.")
        drawn: dict[str, list[list[sp.csr_matrix]]] = {name: [[] for _ in range(n_samples)] for name in names}
        with _seeded(seed):
            for block in self._blocks(adata, indices, batch_size, counts=False):
                for number in range(n_samples):
                    z = block.latent.sample()
                    for name in names:
                        drawn[name][number].append(self._drawn(block, name, z))
        each: dict[str, Sample] = {}
        for name, samples in drawn.items():
            order = self._order(adata, name)
            each[name] = _joined([in_order(sp.vstack(parts, format="csr"), order) for parts in samples])
        return each if len(each) > 1 else each[names[0]]

    def _drawn(self, block: Block, name: str, z: torch.Tensor) -> sp.csr_matrix:
        """Counts of cells drawn at z and at a draw of their library size."""
        theta, group = self.module.modality(name).dispersion(block.batch, block.counts[name].n_rows)
        theta = theta if group is None else theta[group]
        library = self.module.library(name, block.counts[name], block.batch)
        native, background = expected_means(self.module, name, block, z, normal.draw(library.mean, library.variance))
        mean = _of_present(block, name, native if background is None else native + background)
        rate = torch._standard_gamma(theta.expand_as(mean).contiguous()) * (mean / theta)
        return sp.csr_matrix(to_numpy(torch.poisson(rate)))

    def _blocks(
        self,
        data: AnnData | MuData | None,
        indices: np.ndarray | Sequence[int] | None,
        batch_size: int | None,
        *,
        counts: bool = True,
    ) -> Iterator[Block]:
        self._require_trained()
        return blocks(self.module, self._cells(data, counts=counts)[indices], batch_size)

    def _at(
        self, block: Block, name: str, z: torch.Tensor, noise: CellNoise, number: int
    ) -> tuple[torch.Tensor, LibraryPosterior]:
        """Log-likelihood of each cell given z and a draw of its library size, and the latter's posterior."""
        library = self.module.library(name, block.counts[name], block.batch)
        return self._given(block, name, z, _drawn_size(block, library, noise, number)), library

    def _given(self, block: Block, name: str, z: torch.Tensor, log_library: torch.Tensor) -> torch.Tensor:
        present = block.batch.get(f"{name}/present")
        part = self.module.modality(name)
        return part.log_likelihood(z, log_library, block.counts[name], block.batch, present).per_cell

    def _importance(self, block: Block, noise: CellNoise, draw: int) -> torch.Tensor:
        """``log p(x, z, l) - log q(z, l)`` at a draw from q."""
        latent = block.latent
        z = _drawn_z(block, noise, draw)
        prior = torch.ones_like(z) * self.module.prior_variance()
        weight = _log_ratio(z, Latent(torch.zeros_like(z), prior, latent.kl), latent)
        for number, name in enumerate(self.module.config.modalities):
            library = self.module.library(name, block.counts[name], block.batch)
            log_library = _drawn_size(block, library, noise, number, draw)
            prior_of_size = LibraryPosterior(library.prior_mean, library.prior_variance, *library[2:])
            ratio = _log_ratio(log_library, prior_of_size, library)
            weight = weight + self._given(block, name, z, log_library) + _of_present(block, name, ratio)
        return weight


def _drawn_z(block: Block, noise: CellNoise, draw: int = 0) -> torch.Tensor:
    return noise.draw(block.rows, block.latent.mean, block.latent.variance, draw, 0)


def _drawn_size(
    block: Block, library: LibraryPosterior, noise: CellNoise, modality: int, draw: int = 0
) -> torch.Tensor:
    return noise.draw(block.rows, library.mean, library.variance, draw, 1 + modality)


def _joined(samples: list[sp.csr_matrix]) -> Sample:
    """One draw as it is, several as one array of cells x features x draws."""
    if len(samples) == 1:
        return samples[0]
    from sparse import GCXS  # comes with scvi-tools, whose models give it

    n_obs, n_features = samples[0].shape
    beside = sp.hstack(samples, format="csr")
    draw, feature = np.divmod(beside.indices, n_features)
    rows = sp.csr_matrix((beside.data, feature * len(samples) + draw, beside.indptr), shape=beside.shape)
    rows.sort_indices()
    shape = (n_obs, n_features, len(samples))
    return GCXS((rows.data, rows.indices, rows.indptr), shape=shape, compressed_axes=(0,))


def _log_ratio(x: torch.Tensor, above: Latent | LibraryPosterior, below: Latent | LibraryPosterior) -> torch.Tensor:
    """Log ratio of two Normal densities at x, summed over the last axis."""

    def log_density(of: Latent | LibraryPosterior) -> torch.Tensor:
        return -0.5 * ((x - of.mean).square() / of.variance + of.variance.log())

    return (log_density(above) - log_density(below)).sum(dim=-1)


def _of_present(block: Block, name: str, values: torch.Tensor) -> torch.Tensor:
    """Zero where a cell lacks the modality."""
    present = block.batch.get(f"{name}/present")
    if present is None:
        return values
    return values * (present if values.ndim == 1 else present[:, None])


def _mean(values: list[np.ndarray], return_mean: bool) -> float | np.ndarray:
    each = np.concatenate(values)
    return float(each.mean()) if return_mean else each


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
