"""New cells for a trained model: batches that it has not seen, learned with everything else frozen."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from cellstill._compat.scvi import MINIFIED, minified_type
from cellstill.errors import InvalidArgumentError
from cellstill.vi.cells import Cells, code_of
from cellstill.vi.containers import check_anndata, check_mudata, check_whole
from cellstill.vi.differential import Differential
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.growth import grow
from cellstill.vi.preparation import prepared_anndata, prepared_mudata
from cellstill.vi.rates import Rates

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_log = logging.getLogger("cellstill")


class Query(Differential):
    """Mapping of new data by both regularised models."""

    @classmethod
    @names_what_to_use
    def load_query_data(
        cls,
        adata: AnnData | MuData,
        reference_model: Self | str | os.PathLike[str],
        *,
        unfrozen: bool = False,
        ambient_rate: Rates = None,
        min_gene_overlap: float = 0.5,
    ) -> Self:
        """Make a model of new cells from a trained one, whose covariates may have new categories.

        Every new category gets rows of its own in what its covariate is for: ambient background and library prior start
        from the new cells, decoder input, feature scaling and dispersion at the mean of the known categories.
        :meth:`train` then learns these rows; all else is frozen, and latents of known cells stay what they were, bit
        for bit (architecture surgery: Lotfollahi et al., Nat. Biotechnol. 40:121, 2022). Latents of new cells are those
        that the reference gives them, unless encoders are told a covariate (``encoder_covariate_keys``).

        Parameters
        ----------
        adata
            New cells, with the columns and layers that the reference was set up with, which are set up here.
            Features are matched by name; missing ones count as zero. Results without names have them in the order of
            these data (see :meth:`get_normalized_expression`). Not a view.
        reference_model
            Trained model of this class, or the folder that one was saved to. It is not changed.
        unfrozen
            Train everything. Known cells then move.
        ambient_rate
            Known share of ambient RNA, as for the model itself, in the cells of new ambient categories; otherwise it is
            estimated. Cells of known categories keep the soup of the reference.
        min_gene_overlap
            Smallest share of the model's features that each modality must have. Larger is safer.

        Returns
        -------
        A model of the new cells, to be trained; trained already where nothing new is to be learned.

        Raises
        ------
        InvalidArgumentError
            The reference is of another class, or ``adata`` a view; or ``ambient_rate`` is that of no new category.
        NotTrainedError
            The reference is not trained.
        StoreError
            The folder is absent or damaged, or holds another class.
        MissingKeyError, InvalidCountsError, GeneMismatchError
            The data do not fit the reference.

        Warns
        -----
        CellstillWarning
            Features are missing, or counts do not identify an ambient rate.
        """
        reference = cls._reference(reference_model)
        check_whole(adata, "adata")
        if minified_type(adata) == MINIFIED:
            raise InvalidArgumentError("adata is minified, and mapping needs counts. Give cells with counts.")
        keys, setup = reference._keys, reference._setup
        cells = Cells.read(
            adata,
            keys,
            layers=reference._layers,
            features=reference._features,
            categories=reference._categories,
            scales=reference._scales,
            extend=True,
            allow_missing_modalities=len(reference._layers) > 1,
            allow_noninteger=setup["allow_noninteger"],
            min_gene_overlap=min_gene_overlap,
        )
        cells.say_what_is_lacking()
        cls._register(adata, keys, setup, cls._registry_of(setup, reference._categories), extend=True)
        known = {"features": reference._features, "categories": cells.categories, "scales": reference._scales}
        model = cls.__new__(cls)
        model._start(adata, None, reference.seed, known)
        counted = [name for name, has in cells.present.items() if has.any()]
        sizes = {code_of(column): len(names) for column, names in cells.categories.items()}
        config = replace(reference.module.config, categories=sizes)
        told = replace(cells, counts={name: cells.counts[name] for name in counted})
        model._build(config, told, ambient_rate, reference.module)
        model.module.to(reference.device)
        known_rows = grow(reference.module, model.module, counted)
        if not unfrozen:
            model._take_only_new(known_rows)
        if not unfrozen and not known_rows:
            _log.info("The query has no new category that anything is learned for: the model is ready as it is.")
            model.is_trained_ = True
            model.history_ = {}
            nothing = np.empty(0, dtype=np.int64)
            model.train_indices_, model.validation_indices_, model.test_indices_ = nothing, nothing, nothing
        return model

    @classmethod
    def prepare_query_anndata(
        cls,
        adata: AnnData,
        reference_model: Self | str | os.PathLike[str],
        return_reference_var_names: bool = False,
        inplace: bool = True,
        *,
        min_gene_overlap: float = 0.5,
    ) -> AnnData | pd.Index | None:
        """Give new cells the features of a trained model, in its order; those that they lack become zero.

        :meth:`load_query_data` does not need it, since it matches features by name: latents are the same with and
        without. Results are then in the order of the model, and cells keep no counts of other features; one without a
        count of the model's is refused.

        Parameters
        ----------
        adata
            New cells. ``X`` and layers are changed; ``obs``, ``obsm``, ``obsp``, ``uns`` and ``raw`` are not. Where
            features are missing, their annotation in ``var`` is too, and ``varm`` and ``varp`` are left out. Not a
            view, in memory, and not set up yet: :meth:`load_query_data` does that.
        reference_model
            As in :meth:`load_query_data`.
        return_reference_var_names
            Only give the names of the model's features.
        inplace
            Change ``adata``. Otherwise it is left as it is, and a copy comes back.
        min_gene_overlap
            Smallest share of the model's features that ``adata`` must have. Larger is safer.

        Returns
        -------
        ``None``; or the copy, or the names.

        Raises
        ------
        InvalidArgumentError, NotTrainedError, StoreError
            The reference cannot be used, as in :meth:`load_query_data`, or is one of MuData; or ``adata`` is a view, a
            MuData or backed by a file.
        GeneMismatchError
            Duplicated names, or fewer features in common than ``min_gene_overlap``.

        Warns
        -----
        CellstillWarning
            Features are missing; their names.
        """
        reference = cls._reference(reference_model)
        if "roles" in reference._setup:
            raise InvalidArgumentError("The reference is a model of MuData. Call prepare_query_mudata().")
        (features,) = reference._features.values()
        if return_reference_var_names:
            return pd.Index(features)
        check_anndata(adata)
        return prepared_anndata(adata, features, inplace=inplace, min_overlap=min_gene_overlap)

    @classmethod
    def prepare_query_mudata(
        cls,
        mdata: MuData,
        reference_model: Self | str | os.PathLike[str],
        return_reference_var_names: bool = False,
        inplace: bool = True,
        *,
        min_gene_overlap: float = 0.5,
    ) -> MuData | dict[str, pd.Index] | None:
        """Give the modalities of new cells the features of a trained model, as :meth:`prepare_query_anndata` does.

        Parameters
        ----------
        mdata
            New cells, which need not have all modalities of the model; others that they have stay as they are. Not a
            view.
        reference_model, return_reference_var_names, inplace, min_gene_overlap
            See :meth:`prepare_query_anndata`.

        Returns
        -------
        ``None``; or the copy, or the names by modality.

        Raises
        ------
        InvalidArgumentError, NotTrainedError, StoreError, GeneMismatchError
            See :meth:`prepare_query_anndata`.
        MissingKeyError
            The cells have no modality of the model.

        Warns
        -----
        CellstillWarning
            Features are missing; their names.
        """
        reference = cls._reference(reference_model)
        if "roles" not in reference._setup:
            raise InvalidArgumentError("The reference is a model of AnnData. Call prepare_query_anndata().")
        if return_reference_var_names:
            return {name: pd.Index(features) for name, features in reference._features.items()}
        check_mudata(mdata)
        return prepared_mudata(mdata, reference._features, inplace=inplace, min_overlap=min_gene_overlap)

    @classmethod
    def _reference(cls, reference_model: Any) -> Self:
        if isinstance(reference_model, (str, os.PathLike)):
            reference_model = cls._load(reference_model, False)
        if type(reference_model) is not cls:
            raise InvalidArgumentError(
                f"reference_model is a {type(reference_model).__name__}, not a {cls.__name__} or the folder of one."
            )
        reference_model._require_trained()
        return reference_model
