"""What is done with a trained distiller: map new cells, compare groups, judge the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from cellstill.data.covariates import obs_column
from cellstill.de import BayesianConfig, DEResult, PseudobulkConfig, StratifiedDEResult
from cellstill.de.choice import batch_terms, check_within, choose_groups, chosen_how, codes_of_both, require_samples
from cellstill.distill.contrast import compare_groups
from cellstill.distill.mapping import QueryMapping, learn_batches, map_cells
from cellstill.distill.trained import Trained
from cellstill.errors import InvalidArgumentError, check_option

if TYPE_CHECKING:
    from anndata import AnnData


class Analysis(Trained):
    """The analyses of :class:`~cellstill.Distiller`."""

    def map_query(
        self,
        adata: AnnData,
        *,
        n_neighbors: int = 15,
        fine_tune_batches: bool = False,
        min_gene_overlap: float = 0.5,
        n_epochs: int = 50,
        lr: float = 1e-2,
    ) -> QueryMapping:
        """Map new cells: their latent, transferred labels, and how far they are from anything known.

        The teacher is not run again. Batches need not be known; nor is a batch column needed, except by
        ``pca_method="scaled_residuals"``: it scales the cells of a known batch by the batch's factors, and those of an
        unseen one by factors estimated from its own cells, 100 at least, against the composition of the training cells
        with the same covariates. Cells of fewer, or without a batch, are encoded as they are, with a warning.

        Parameters
        ----------
        adata
            New cells, with counts in the layer that the model was set up with. Genes are matched by name.
        n_neighbors
            Cells of training whose labels vote. More give smoother, more cautious labels.
        fine_tune_batches
            Learn an embedding of each unseen batch from the counts of its cells, everything else frozen, and keep it in
            the model: the new batch can then be decoded, and decoded as. Otherwise unseen batches are decoded with the
            mean embedding of those known.
        min_gene_overlap
            Smallest share of the model's genes that must be present.
        n_epochs, lr
            Of ``fine_tune_batches``.

        Returns
        -------
        See :class:`~cellstill.distill.QueryMapping`.

        Raises
        ------
        GeneMismatchError
            Too few genes in common.
        InvalidCountsError
            The layer does not hold counts.
        """
        fitted = self._fitted()
        if not 1 <= n_neighbors <= len(fitted.student_latent):
            raise InvalidArgumentError(f"n_neighbors={n_neighbors} has to be from 1 to {len(fitted.student_latent)}.")
        batch_key = self._setup["batch_key"]
        names = None
        if batch_key in adata.obs:
            names = obs_column(adata.obs, batch_key, "batch_key").astype(str).to_numpy()
        cells = self._cells(adata, min_gene_overlap=min_gene_overlap)
        latent = fitted.encode(cells)
        unseen = [] if names is None else sorted(set(names) - set(fitted.batch_codes))
        if fine_tune_batches:
            if names is None:
                raise InvalidArgumentError(
                    f"fine_tune_batches=True needs the batch of the new cells: adata.obs has no {batch_key!r}."
                )
            cells = learn_batches(fitted, cells, latent, names, unseen, n_epochs=n_epochs, lr=lr, seed=self.seed)
        return map_cells(fitted, cells, latent, unseen, n_neighbors=n_neighbors)

    def differential_expression(
        self,
        groupby: str,
        group1: str,
        group2: str | None = None,
        sample_key: str | None = None,
        how: PseudobulkConfig | BayesianConfig | None = None,
        *,
        within: str | None = None,
    ) -> DEResult | StratifiedDEResult:
        """Compare two groups of cells, with samples as replicates.

        Parameters
        ----------
        groupby, group1, group2
            Column of ``obs``, and the two of its values to compare; fold changes are log2 of group1 over group2.
            Without ``group2``, group1 is compared with all other cells, ``"rest"``.
        sample_key
            Column that names samples or donors: the replicates, of which each group needs at least two. Only a
            :class:`~cellstill.de.BayesianConfig` does without, and warns.
        how
            :class:`~cellstill.de.PseudobulkConfig` (default): raw counts summed per sample, tested with the batch in
            the design unless each batch is a single sample. :class:`~cellstill.de.BayesianConfig`: decoded expression,
            all cells as the same batch, under draws of the networks' dropout masks, and corrected by what the counts of
            each sample say of it (:func:`~cellstill.de.draws.replicate_rates`).
        within
            Column, such as cell types, inside each level of which the comparison is made; ``None`` compares all cells
            at once.

        Returns
        -------
        Record with a tidy ``table``, the design and the contrast; with ``within``, one for each level
        (:class:`~cellstill.de.StratifiedDEResult`).

        Raises
        ------
        MissingKeyError
            A column does not exist.
        InvalidArgumentError
            A group does not exist or has too few samples, or the design cannot tell it from the batches
            (:func:`~cellstill.de.design.design_of_units`).
        """
        how = chosen_how(how)
        fitted, cells = self._fitted(), self._cells()
        check_within(cells.obs, within, groupby=groupby, sample_key=sample_key)
        if isinstance(how, PseudobulkConfig):
            sample_key = require_samples(sample_key)
        obs, contrast = choose_groups(cells.obs, groupby, group1, group2)
        obs, batches = batch_terms(
            obs,
            [self._setup["batch_key"]],
            contrast,
            sample_key=sample_key,
            within=within,
            min_cells=how.min_cells_per_sample,
        )
        wanted = getattr(how, "target_batch", None)
        shared = codes_of_both(cells.batch, obs[contrast.column], contrast).tolist() if wanted is None else []
        target = shared or self._batch_codes(wanted or self.batch_names, "target_batch") or []
        return compare_groups(
            fitted,
            cells,
            target,
            obs,
            **contrast.arguments,
            sample_key=sample_key,
            batch_key=next(iter(batches), None),
            within=within,
            how=how,
        )

    def get_teacher_agreement(self, split: Literal["train", "validation", "test"] = "validation") -> float:
        """How well the student reproduces the teacher: R^2 per dimension, averaged over dimensions uniformly.

        Dimensions in which the teacher does not vary are left out.

        Parameters
        ----------
        split
            Cells to score. The validation cells chose the epoch, so only ``"test"`` cells were never looked at; there
            are some if ``train_size + validation_size < 1``.
        """
        fitted = self._fitted()
        check_option("split", split, fitted.splits)
        cells = fitted.splits[split]
        if len(cells) < 2:
            raise InvalidArgumentError(
                f"split={split!r} has {len(cells)} cells. Train with shares that leave some: train_size=0.8, "
                "validation_size=0.1 leaves a tenth for testing."
            )
        truth, student = fitted.teacher_latent[cells], fitted.student_latent[cells]
        total = np.square(truth - truth.mean(axis=0)).sum(axis=0)
        varying = total > 1e-12 * total.max()
        residual = np.square(truth - student).sum(axis=0)
        return float(np.mean(1 - residual[varying] / total[varying]))
