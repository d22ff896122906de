"""Models whose data hold posteriors instead of counts."""

from __future__ import annotations

import numpy as np

from cellstill._compat.scvi import MINIFIED, MINIFIED_WITH_COUNTS, QZM, QZV
from cellstill.errors import InvalidArgumentError, check_key, check_option
from cellstill.vi.minified import minified, posteriors
from cellstill.vi.query import Query


class Minification(Query):
    """Minified mode of both regularised models."""

    def minify_adata(
        self,
        minified_data_type: str = MINIFIED,
        use_latent_qzm_key: str | None = None,
        use_latent_qzv_key: str | None = None,
    ) -> None:
        """Give the model data without counts; those that it had are left as they are.

        Instead of counts, ``model.adata`` then holds mean and variance of z (``obsm["vi_latent_qzm"]``,
        ``obsm["vi_latent_qzv"]``) and of the log library sizes (``obsm["vi_latent_qlm"]``, ``obsm["vi_latent_qlv"]``,
        one column per modality), and observed totals. Whatever depends on counts through these alone stays what it was:
        latents, library sizes, expression, background, attribution and posterior predictive counts. What needs counts
        says so: training, evidence, denoised counts and differential expression of either kind;
        ``minified_data_type="latent_posterior_parameters_with_counts"`` keeps them.

        Parameters
        ----------
        minified_data_type
            ``"latent_posterior_parameters"``, or ``"latent_posterior_parameters_with_counts"``, which keeps counts for
            what needs them.
        use_latent_qzm_key, use_latent_qzv_key
            Keys of ``obsm`` with mean and variance of z, shape ``(n_obs, n_latent)`` each, to store instead of those
            that the model finds now, as scvi-tools has it.

        Raises
        ------
        InvalidArgumentError
            The data are minified already, are a MuData (:meth:`minify_mudata`), or the arrays do not fit.
        NotTrainedError
            The model is not trained.
        """
        if "roles" in self._setup:
            raise InvalidArgumentError("The model's data are a MuData. Call minify_mudata().")
        self._minify(minified_data_type, use_latent_qzm_key, use_latent_qzv_key)

    def minify_mudata(
        self,
        minified_data_type: str = MINIFIED,
        use_latent_qzm_key: str | None = None,
        use_latent_qzv_key: str | None = None,
    ) -> None:
        """Give the model data without counts, as :meth:`minify_adata` does for an AnnData.

        Parameters
        ----------
        minified_data_type, use_latent_qzm_key, use_latent_qzv_key
            See :meth:`minify_adata`.

        Raises
        ------
        InvalidArgumentError
            The data are minified already, are an AnnData or backed by a file, or the arrays do not fit.
        NotTrainedError
            The model is not trained.
        """
        if "roles" not in self._setup:
            raise InvalidArgumentError("The model's data are an AnnData. Call minify_adata().")
        self._minify(minified_data_type, use_latent_qzm_key, use_latent_qzv_key)

    def _minify(self, kind: str, mean_key: str | None, variance_key: str | None) -> None:
        self._require_trained()
        check_option("minified_data_type", kind, (MINIFIED, MINIFIED_WITH_COUNTS))
        data = self._require_data()
        if self.minified_data_type is not None:
            raise InvalidArgumentError(f"The model's data are minified already ({self.minified_data_type}).")
        arrays = posteriors(self.module, self._cells())
        given = {QZM: ("use_latent_qzm_key", mean_key), QZV: ("use_latent_qzv_key", variance_key)}
        for key, (argument, chosen) in given.items():
            if chosen is None:
                continue
            check_key(argument, chosen, "obsm", data.obsm.keys())
            values = np.asarray(data.obsm[chosen], dtype=np.float32)
            if values.shape != arrays[key].shape:
                raise InvalidArgumentError(
                    f"{argument}={chosen!r}: obsm[{chosen!r}] has the shape {values.shape}, and the model's z has "
                    f"{arrays[key].shape}."
                )
            arrays[key] = values
        small = minified(data, kind, arrays, keep_counts=kind == MINIFIED_WITH_COUNTS)
        self._register(small, self._keys, self._setup, self._registry_of(self._setup, self._categories))
        self._replace_data(small)
