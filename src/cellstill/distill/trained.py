"""The state of a distiller, and the way to it for everything built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cellstill._compat.scvi import RegisteredModel
from cellstill.data.annotations import category_names
from cellstill.data.covariates import obs_column
from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted
from cellstill.distill.scaling import scale_cells
from cellstill.distill.student import MEAN_BATCH
from cellstill.errors import InvalidArgumentError, NotTrainedError, check_option

if TYPE_CHECKING:
    from anndata import AnnData


class Trained(RegisteredModel):
    """A model with registered data, trained or to be trained."""

    seed: int
    _setup: dict[str, Any]
    _network: dict[str, Any]
    _fit_result: Fitted | None

    @property
    def gene_names(self) -> np.ndarray:
        """Names of the genes, in the order of decoded expression, shape ``(n_vars,)``."""
        if self._fit_result is not None:
            return np.asarray(self._fit_result.genes, dtype=object)
        return self._require_adata().var_names.astype(str).to_numpy()

    @property
    def batch_names(self) -> list[str]:
        """Names of the batches of training, in the order of their codes; unused categories are left out."""
        return self._observed_batches() if self._fit_result is None else self._fit_result.batch_names

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self._fitted().device

    def to_device(self, device: str | int | torch.device) -> None:
        """Move the networks to a device, such as ``"cuda:0"``."""
        self._fitted()
        self.module.to(device if isinstance(device, torch.device) else torch.device(device))

    def _set_trained(self) -> None:
        fitted = self._fitted()
        self.module = torch.nn.ModuleDict({"encoder": fitted.encoder, "decoder": fitted.decoder})
        self.train_indices_ = fitted.splits["train"]
        self.validation_indices_ = fitted.splits["validation"]
        self.test_indices_ = fitted.splits["test"]
        self.is_trained_ = True

    def _require_adata(self) -> AnnData:
        if self.adata is None:
            raise InvalidArgumentError(
                "The model was loaded without data. Load it with some: Distiller.load(path, adata)."
            )
        return self.adata

    def _fitted(self) -> Fitted:
        if self._fit_result is None:
            raise NotTrainedError("The model is not trained. Call train() first.")
        return self._fit_result

    def _observed_batches(self) -> list[str]:
        column = obs_column(self._require_adata().obs, self._setup["batch_key"], "batch_key")
        return list(category_names(column))

    def _cells(self, adata: AnnData | None = None, *, min_gene_overlap: float = 0.5) -> Cells:
        fitted = self._fitted()
        # Checked each time: between two calls users normalise their data in place.
        cells = Cells.read(
            self._require_adata() if adata is None else adata,
            self._setup["layer"],
            fitted.genes,
            self._setup["batch_key"],
            fitted.batch_codes,
            allow_noninteger=self._setup["allow_noninteger"],
            min_gene_overlap=min_gene_overlap,
        )
        if (adata is None or adata is self.adata) and (cells.batch == MEAN_BATCH).any():
            raise InvalidArgumentError(
                f"adata.obs[{self._setup['batch_key']!r}] has changed since the model was trained: it names batches "
                f"other than {list(fitted.batch_codes)}. Put it back, or train a new model."
            )
        return scale_cells(fitted, cells, self._setup["batch_key"])

    def _teacher_latent(self) -> np.ndarray:
        fitted = self._fitted()
        if self.adata is None:
            return fitted.teacher_latent.copy()
        names = self.adata.obs_names.astype(str)
        if names.tolist() == fitted.obs_names:
            return fitted.teacher_latent.copy()
        trained = pd.Index(fitted.obs_names)
        if not (trained.is_unique and names.is_unique):
            raise InvalidArgumentError(
                "latent.teacher belongs to the cells of training by name, and cell names occur twice. Call "
                "adata.obs_names_make_unique() before training, or use latent.student."
            )
        positions = trained.get_indexer(names)
        if (positions < 0).any():
            raise InvalidArgumentError(
                f"latent.teacher exists for the cells of training only; {int((positions < 0).sum())} of the attached "
                "cells were not among them. Use latent.student."
            )
        return fitted.teacher_latent[positions]

    def _batch_codes(self, batches: object, argument: str) -> list[int] | None:
        if batches is None:
            return None
        known = self._fitted().batch_codes
        names = [str(batch) for batch in np.atleast_1d(np.asarray(batches, dtype=object))]
        if not names:
            raise InvalidArgumentError(f"{argument} is empty. Name one batch or more of: {list(known)}.")
        for name in names:
            check_option(argument, name, known)
        # A decoder without batches decodes the same whatever is asked for.
        return [known[name] for name in names] if self._network["n_batch_embedding"] else [0]
