"""Latents, expression and background of a regularised model, streamed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellstill.data.order import in_order
from cellstill.data.selection import gene_positions
from cellstill.errors import InvalidArgumentError, check_option
from cellstill.io.arrays import Out, output_array
from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.base import RegularizedModel
from cellstill.vi.denoising import expected_parts
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.evaluation import blocks, expected_means, native_expression, to_numpy
from cellstill.vi.parts import Background

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

Target = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


class Getters(RegularizedModel):
    """The getters of both regularised models."""

    @names_what_to_use
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        give_mean: bool = True,
        return_dist: bool = False,
        batch_size: int | None = 4096,
        seed: int = 0,
    ) -> Any:
        """Posterior mean of z; the modalities' parts side by side, sorted by name, where they are concatenated.

        Parameters
        ----------
        adata
            Any cells with the model's features, in any order; ``None`` takes the model's own. No covariates are needed,
            apart from those that encoders are told.
        indices
            Positions of the cells wanted, or a mask; ``None`` takes all.
        give_mean
            Otherwise a draw from the posterior.
        return_dist
            Return mean and variance.
        batch_size
            Cells encoded at a time; ``None`` is 1,024. Larger is faster until memory runs out.
        seed
            Of the draw.

        Returns
        -------
        float32, shape ``(n, n_latent)``; a pair of them with ``return_dist``. In the part of a modality that a cell
        lacks, the prior: mean 0, variance 1.
        """
        self._require_trained()
        cells = self._cells(adata, covariates=False, counts=False)[indices]
        order = self.module.config.columns_of_z
        shape = (len(cells), len(order))
        mean, variance = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
        for block in blocks(self.module, cells, batch_size):
            mean[block.rows] = to_numpy(block.latent.mean)[:, order]
            variance[block.rows] = to_numpy(block.latent.variance)[:, order]
        if return_dist:
            return mean, variance
        if give_mean:
            return mean
        noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)[:, order]
        return mean + np.sqrt(variance) * noise

    def get_modality_latents(
        self, adata: AnnData | MuData | None = None, indices: np.ndarray | Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Each modality's own part of z; with ``latent_mode="weighted_mean"``, what its encoder says of all of z.

        The joint z is then their mean over the modalities that a cell has, with the weights
        ``softmax(model.module.mixing)``, in the order of ``model.module.config.modalities``.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_representation`. A weighted mean needs counts: minified data do not hold its parts.

        Returns
        -------
        By modality: posterior mean, shape ``(n, n_latent of the modality)``; 0 for cells that lack it.

        Raises
        ------
        InvalidArgumentError
            The model has one encoder for all modalities (``latent_mode``).
        """
        config = self.module.config
        if config.latent_mode == "single_encoder":
            raise InvalidArgumentError(
                "With latent_mode='single_encoder' modalities have no latents of their own. Use "
                "get_latent_representation, or train with latent_mode='concatenation' or 'weighted_mean'."
            )
        if config.latent_mode == "weighted_mean":
            return self._means_by_encoder(adata, indices)
        joint = self.get_latent_representation(adata, indices)
        widths = [config.modalities[name].n_latent for name in self.modality_names]
        return dict(zip(self.modality_names, np.split(joint, np.cumsum(widths)[:-1], axis=1), strict=True))

    def _means_by_encoder(
        self, adata: AnnData | MuData | None, indices: np.ndarray | Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        """Posterior mean of each modality's encoder; 0 for cells that lack the modality."""
        self._require_trained()
        cells = self._cells(adata, covariates=False)[indices]
        shape = (len(cells), self.module.config.n_latent)
        means = {name: np.empty(shape, dtype=np.float32) for name in self.module.config.modalities}
        for block in blocks(self.module, cells, 4096):
            for own, (mean, _) in zip(means.values(), self.module.posteriors(block.counts, block.batch), strict=True):
                own[block.rows] = to_numpy(mean)
        for name, own in means.items():
            own[~cells.present[name]] = 0.0
        return means

    def get_latent_library_size(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        modality: str | None = None,
        batch_size: int | None = 4096,
    ) -> np.ndarray:
        """Library size l, at the posterior mean of its logarithm; the mean cell has about the sensitivity.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        modality
            Name; may be left out where there is one.

        Returns
        -------
        float32, shape ``(n, 1)``.
        """
        self._require_trained()
        name = self._modality(modality)
        cells = self._cells(adata, counts=False)[indices]
        result = np.empty((len(cells), 1), dtype=np.float32)
        for block in blocks(self.module, cells, batch_size):
            library = self.module.library(name, block.counts[name], block.batch)
            result[block.rows] = to_numpy(library.mean.exp())
        return result

    @names_what_to_use
    def get_normalized_expression(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        modality: str | None = None,
        transform_batch: Target = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1.0,
        include_background: bool = False,
        batch_size: int | None = 1024,
        out: Out = None,
        return_numpy: bool = False,
    ) -> Any:
        """Expected expression at the posterior mean of z, without background, scaling and depth.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_representation`, with the covariates that decoders are told.
        modality
            Name; may be left out where there is one.
        transform_batch
            Category of the conditioning covariate as which all cells are decoded, or several, whose expression is
            averaged; where there are several such covariates, a dictionary from column to categories. ``None`` decodes
            each cell as its own.
        gene_list
            Features wanted, in order; ``None`` takes all.
        library_size
            Total of a cell over all features; ``"latent"`` gives what is expected at the cell's own library size.
        include_background
            Keep the ambient background of the cell's categories.
        batch_size
            Cells decoded at a time. Larger is faster until memory runs out.
        out
            Where to write: an array of the right shape, or the path of a Zarr array to create, which is then returned
            open for reading. Of the result, memory then holds one block of cells at a time.
        return_numpy
            Return an array instead of a DataFrame.

        Returns
        -------
        DataFrame of cells x features; an array with ``return_numpy``; what was written to, with ``out``. Features are
        those of ``gene_list``, or all in the order of ``adata``, or of the model's own data. Where these lack some of
        the model's, have others, or do not have the modality, all of the model's, in that of :meth:`get_var_names`.

        Raises
        ------
        InvalidArgumentError
            An unknown modality, feature, category or library size.

        Warns
        -----
        CellstillWarning
            The features of the data are not the model's, and the result has no names.
        """
        self._require_trained()
        name = self._modality(modality)
        _check_library_size(library_size)
        targets = self._targets(transform_batch)
        columns = gene_positions(self._features[name], gene_list, "gene_list")
        if gene_list is None:
            columns = self._order(adata, name, named=out is None and not return_numpy)
        names = np.asarray(self._features[name], dtype=object)[columns]
        cells = self._cells(adata, counts=False)[indices]
        with output_array(out, (len(cells), len(names))) as result:
            for block in blocks(self.module, cells, batch_size):
                rates = native_expression(self.module, name, block.latent.mean, block.batch, targets)
                log_library = self.module.library(name, block.counts[name], block.batch).mean
                if include_background:
                    background = self.module.background_of(name, block.counts[name], block.batch, log_library)
                    rates = rates if background is None else rates + background
                if library_size == "latent":
                    rates = rates * log_library.exp()
                else:
                    rates = rates / rates.sum(dim=1, keepdim=True) * library_size
                result[block.rows] = to_numpy(rates)[:, columns]
        if isinstance(out, (str, os.PathLike)):
            import zarr

            return zarr.open_array(out, mode="r")
        if out is None and not return_numpy:
            return pd.DataFrame(result, index=cells.obs_names, columns=names)
        return result

    def get_ambient_profile(self, *, modality: str | None = None) -> pd.DataFrame:
        """Composition of the ambient background of each category of the ambient covariates.

        One of the form ``"profile"`` is known before training.

        Parameters
        ----------
        modality
            Name; may be left out where there is one.

        Returns
        -------
        Categories x features; each row sums to 1. Where there are several ambient covariates, a background of the form
        ``"profile"`` has a row for each combination of their categories that occurs, with a level of the index for each
        covariate; backgrounds of the form ``"free"`` add up, and rows are indexed by column and category.

        Raises
        ------
        InvalidArgumentError
            The modality has no background.
        """
        name, background = self._background(modality)
        with torch.inference_mode():
            tables = [to_numpy(table.exp()).astype(np.float64) for table in background.tables()]
        profile = np.vstack(tables)
        profile /= profile.sum(axis=1, keepdims=True)
        return pd.DataFrame(profile, index=self._ambient_index(background), columns=self._features[name])

    def get_ambient_rate(self, *, modality: str | None = None) -> pd.DataFrame:
        """Share of ambient RNA in the counts of each category: found, or stated, before training.

        Parameters
        ----------
        modality
            Name; may be left out where there is one.

        Returns
        -------
        One row per category, as in :meth:`get_ambient_profile`: ``rate``; ``low`` and ``high``, an interval of about
        95 %; ``identified``, whether counts tell the rate at all (:func:`~cellstill.vi.soup.estimate_soup`), or it was
        stated. Where it is not, ``rate`` is the median of the other categories' rates, but not more than the lower end
        that counts show, and 0 where no category's is identified; ``high`` is what it cannot be above.

        Raises
        ------
        InvalidArgumentError
            The modality has no background of the form ``"profile"``.
        """
        name, background = self._background(modality)
        if not isinstance(background, ProfileBackground):
            raise InvalidArgumentError(
                f"The background of {name!r} is free: it has no rate. Give the model background='profile'."
            )
        low, high = to_numpy(background.interval).T
        found = {"rate": to_numpy(background.rate), "low": low, "high": high}
        found["identified"] = to_numpy(background.identified)
        n = len(background.combinations)
        return pd.DataFrame({key: values[:n] for key, values in found.items()}, index=self._ambient_index(background))

    def get_ambient_fraction(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        modality: str | None = None,
        batch_size: int | None = 1024,
    ) -> pd.Series:
        """Share of each cell's expected counts that is background.

        Parameters
        ----------
        adata, indices, modality, batch_size
            As in :meth:`get_normalized_expression`.

        Returns
        -------
        Indexed by cell; NaN for cells that lack the modality.
        """
        self._require_trained()
        name, _ = self._background(modality)
        cells = self._cells(adata, counts=False)[indices]
        fraction = np.empty(len(cells))
        for block in blocks(self.module, cells, batch_size):
            native, background = expected_means(self.module, name, block)
            assert background is not None
            share = background.sum(dim=1) / (native.sum(dim=1) + background.sum(dim=1))
            present = block.batch.get(f"{name}/present")
            fraction[block.rows] = to_numpy(share if present is None else share.where(present > 0, torch.nan))
        return pd.Series(fraction, index=cells.obs_names, name="ambient_fraction")

    def get_denoised_counts(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        modality: str | None = None,
        integer: bool = False,
        batch_size: int | None = 1024,
        seed: int = 0,
    ) -> sp.csr_matrix:
        r"""Counts without ambient background, never above the observed ones.

        At the posterior mean of z, given the observed counts. With a background of the form ``"profile"`` native counts
        are taken to be negative binomial with mean :math:`l \rho y`, and soup Poisson with mean :math:`r N \chi`; the
        native part of their sum follows by Bayes (:func:`~cellstill.data.soup.expected_native`). Training takes the sum
        for negative binomial, which is close to this and quicker. A ``"free"`` background shares the native part's
        fluctuations, as published: the native part is then binomial with the share :math:`\rho / (\rho + b)`.

        Parameters
        ----------
        adata, indices, modality, batch_size
            As in :meth:`get_normalized_expression`.
        integer
            Draw integers instead of taking the expectation.
        seed
            Of the draw: equal seeds give equal counts, whatever the batch size.

        Returns
        -------
        CSR, float32, shape ``(n, n_features)``; without stored zeros. Features are in the order of the data (see
        :meth:`get_normalized_expression`), so that it fits into their ``layers``.

        Warns
        -----
        CellstillWarning
            The features of the data are not the model's: those of the result are the model's, in the model's order.
        """
        self._require_trained()
        name = self._modality(modality)
        cells = self._cells(adata)[indices]
        counts = cells.counts[name].astype(np.float32, copy=True)
        order = self._order(adata, name)
        if self.module.modality(name).background is None:
            return in_order(counts, order)
        rng = np.random.default_rng(seed)
        for block in blocks(self.module, cells, batch_size):
            rows = block.rows
            stored = slice(counts.indptr[rows.start], counts.indptr[rows.stop])
            lengths = np.diff(counts.indptr[rows.start : rows.stop + 1])
            parts = expected_parts(self.module, name, block, np.repeat(np.arange(len(lengths)), lengths))
            counts.data[stored] = parts.native_counts(counts.data[stored], rng if integer else None)
        counts.eliminate_zeros()
        return in_order(counts, order)

    def _modality(self, name: str | None) -> str:
        names = self.modality_names
        if name is None and len(names) == 1:
            return names[0]
        if name is None:
            raise InvalidArgumentError(f"modality has to be named: one of {names}.")
        check_option("modality", name, names)
        return name

    def _ambient_index(self, background: Background | ProfileBackground) -> pd.Index:
        """Categories of the ambient covariates, or combinations of them."""
        columns = list(self._keys.ambient)
        if not columns:
            return pd.Index(["all_cells"])
        if len(columns) == 1:
            return pd.Index(self._categories[columns[0]], name=columns[0])
        if isinstance(background, ProfileBackground):
            rows = to_numpy(background.combinations)
            names = [np.asarray(self._categories[column], dtype=object)[rows[:, k]] for k, column in enumerate(columns)]
            return pd.MultiIndex.from_arrays(names, names=columns)
        pairs = [(column, category) for column in columns for category in self._categories[column]]
        return pd.MultiIndex.from_tuples(pairs, names=["covariate", "category"])

    def _background(self, modality: str | None) -> tuple[str, Any]:
        name = self._modality(modality)
        background = self.module.modality(name).background
        if background is None:
            raise InvalidArgumentError(
                f"The modality {name!r} has no ambient background. Give the model one: background='profile'."
            )
        if not isinstance(background, ProfileBackground):
            self._require_trained()
        return name, background

    def _targets(self, target: Target) -> list[dict[str, int]]:
        """Codes to decode as, one dictionary per combination."""
        if target is None:
            return []
        columns = [column.removeprefix("code/") for column in self.module.config.conditioning]
        if not isinstance(target, Mapping):
            if len(columns) != 1:
                raise InvalidArgumentError(
                    f"transform_batch={target!r} names no column, and decoders are told {list(columns) or 'none'}. "
                    + ("Name the column too: transform_batch={column: category}." if columns else "Leave it out.")
                )
            target = {columns[0]: target}
        targets: list[dict[str, int]] = [{}]
        for column, wanted in target.items():
            check_option("transform_batch", column, columns)
            known = self._categories[column]
            names = (
                list(wanted) if isinstance(wanted, Sequence | np.ndarray) and not isinstance(wanted, str) else [wanted]
            )
            if not names:
                raise InvalidArgumentError(
                    f"transform_batch names no category of {column!r}. Name some of {known}, or pass None."
                )
            names = list(dict.fromkeys(map(str, names)))  # each once, however often it was named
            for category in names:
                check_option(f"transform_batch[{column!r}]", str(category), known)
            targets = [{**one, f"code/{column}": known.index(str(category))} for one in targets for category in names]
        return targets


def _check_library_size(library_size: Any) -> None:
    if isinstance(library_size, str):
        check_option("library_size", library_size, ("latent",))
    elif isinstance(library_size, bool) or not isinstance(library_size, Real) or not 0 < float(library_size) < math.inf:
        raise InvalidArgumentError(
            f"library_size={library_size!r} has to be a finite number above 0, or 'latent' for each cell's own."
        )
