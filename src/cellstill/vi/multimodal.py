"""RegularizedMultimodalVI: regularised VI of any number of modalities."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cellstill._compat.scvi import register
from cellstill.data.annotations import complete_obs
from cellstill.errors import InvalidArgumentError, below_one, check_key
from cellstill.vi.analysis import Analysis
from cellstill.vi.arguments import setup_arguments
from cellstill.vi.cells import Cells
from cellstill.vi.config import NATIVE_SPARSITY, Background, LatentMode, ModalityConfig
from cellstill.vi.containers import check_mudata
from cellstill.vi.covariates import CovariateKeys
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.multiplicative import warn_if_multiplicative
from cellstill.vi.rates import Rates
from cellstill.vi.roles import ROLES, by_role, resolve_roles

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


class RegularizedMultimodalVI(Analysis):
    r"""Regularised VI of RNA, chromatin accessibility, surface protein, or any counts of the same cells.

    Each modality m has the generative model of :class:`~cellstill.vi.AmbientRegularizedSCVI`, and its decoder sees the
    latents of all of them:

    .. math::
        z_n = [z_n^{(1)}; \ldots; z_n^{(M)}], \qquad
        \mu^{(m)}_{nf} = l^{(m)}_n\,\mathrm{softplus}(f^{(m)}([z_n, c_n]))_f\,y^{(m)}_{nf} + s^{(m)}_{nf}

    with the expected background s, as there.

    Cells may lack modalities: they add nothing to the terms of those, and the part of z that belongs to them is the
    prior. Their library sizes of those are what the counts that they have let expect
    (:class:`~cellstill.vi.expected.ExpectedLibrary`).

    Parameters
    ----------
    mdata
        Counts, registered with :meth:`setup_mudata`.
    n_hidden, n_layers, n_latent
        See :class:`~cellstill.vi.AmbientRegularizedSCVI`; a number, or a dictionary by modality, as are ``background``,
        ``use_feature_scaling``, ``likelihood`` and ``sensitivity``.
    sensitivity
        Scale of library sizes; expression is scaled by its inverse. ``None`` is 1, and for protein the largest mean
        count of a feature, if that is above 1: native expression is then at most about 1, where it learns to change by
        factors. With 1 where counts are in the hundreds, decoders are too slow to tell cells apart.
    background, use_feature_scaling
        ``None`` follows the modality's role: a ``"profile"`` background for RNA, a ``"free"`` one for protein, feature
        scaling for ATAC, and for all modalities where its covariates were named. ``False`` leaves either out.
    ambient_rate
        See :class:`~cellstill.vi.AmbientRegularizedSCVI`; of all modalities with a ``"profile"`` background. By
        modality, ``{"rna": 0.08}`` or ``{"rna": {"s1": 0.08}}``, it is of those named, and estimated in the others.
    latent_mode
        ``"concatenation"``: each modality has a part of z, in the order of the names. ``"weighted_mean"``: one z, the
        mean of the modalities' posteriors with learned weights, for which all have the same ``n_latent``.
        ``"single_encoder"``: one z of one encoder, for which all have the same sizes.
    dropout_rate
        See :class:`~cellstill.vi.AmbientRegularizedSCVI`. ``None`` is 0 with one modality, and 0.1 with several: their
        decoders learn to do without some of z, such as the part of a modality that a cell lacks.
    use_batch_in_decoder, encoder_input, library_n_hidden, library_variance_weight, residual_library
        See :class:`~cellstill.vi.AmbientRegularizedSCVI`.
    regularise_background, regularise_dispersion, native_sparsity, decoder_weight_l2, theta_sampling, seed
        See :class:`~cellstill.vi.AmbientRegularizedSCVI`.
    z_sparsity, z_horseshoe, hidden_sparsity, ard, decoder_weight_l1, dispersion_start
        See :class:`~cellstill.vi.AmbientRegularizedSCVI`; all are off by default. z is that of all modalities joined,
        and every decoder has hidden activations.
    modality_scaling
        Learn a factor of each modality's library sizes, with the prior Gamma(5, 5 / sensitivity).

    Examples
    --------
    >>> RegularizedMultimodalVI.setup_mudata(mdata, batch_key="sample", modality_roles={"gex": "rna", "peaks": "atac"})
    >>> model = RegularizedMultimodalVI(mdata, n_latent={"gex": 96, "peaks": 32})
    >>> model.train()
    >>> mdata.obsm["X_vi"] = model.get_latent_representation()
    """

    @names_what_to_use
    def __init__(
        self,
        mdata: MuData | None = None,
        *,
        n_hidden: int | Mapping[str, int] = 512,
        n_latent: int | Mapping[str, int] = 128,
        n_layers: int | Mapping[str, int] = 1,
        dropout_rate: float | None = None,
        background: Background | Literal[False] | Mapping[str, Background | Literal[False] | None] | None = None,
        ambient_rate: Rates = None,
        use_feature_scaling: bool | Mapping[str, bool | None] | None = None,
        use_batch_in_decoder: bool = False,
        likelihood: str | Mapping[str, str] = "negative_binomial",
        latent_mode: LatentMode = "concatenation",
        encoder_input: Literal["normalized", "log1p"] = "normalized",
        sensitivity: float | Mapping[str, float | None] | None = None,
        library_n_hidden: int = 16,
        library_variance_weight: float = 0.5,
        residual_library: bool = True,
        regularise_background: bool = False,
        regularise_dispersion: bool = True,
        native_sparsity: float = NATIVE_SPARSITY,
        decoder_weight_l2: float = 0.1,
        theta_sampling: Literal["minibatch", "cell"] = "minibatch",
        z_sparsity: float | None = None,
        z_horseshoe: float | None = None,
        hidden_sparsity: float | None = None,
        ard: float | None = None,
        decoder_weight_l1: float = 0.0,
        modality_scaling: bool = False,
        dispersion_start: float | None = None,
        seed: int = 0,
    ) -> None:
        cells = self._start(mdata, None, seed, None)
        names, roles, scaled = self.modality_names, self._setup["roles"], self._keys.scaling_named
        if dropout_rate is None:
            dropout_rate = 0.1 if len(names) > 1 else 0.0
        backgrounds = _each("background", background, names)
        scalings = _each("use_feature_scaling", use_feature_scaling, names)
        settings: dict[str, dict[str, Any]] = {
            argument: _each(argument, value, names)
            for argument, value in {
                "n_hidden": n_hidden,
                "n_latent": n_latent,
                "n_layers": n_layers,
                "likelihood": likelihood,
                "sensitivity": sensitivity,
            }.items()
        }
        modalities = {}
        for name in by_role(roles):
            usual = ROLES[roles[name]]
            own_background = usual.background if backgrounds[name] is None else backgrounds[name]
            own_scaling = (scaled or usual.feature_scaling) if scalings[name] is None else scalings[name]
            if settings["sensitivity"][name] is None:
                settings["sensitivity"][name] = _largest_mean(cells, name) if usual.at_most_one else 1.0
            modalities[name] = ModalityConfig(
                n_vars=len(self._features[name]),
                background=None if own_background is False else own_background,
                feature_scaling=own_scaling,
                **{argument: values[name] for argument, values in settings.items()},
            )
        config = self._vae_config(
            modalities,
            use_batch_in_decoder=use_batch_in_decoder,
            latent_mode=latent_mode,
            dropout=below_one("dropout_rate", dropout_rate),
            encoder_input=encoder_input,
            library_hidden=library_n_hidden,
            library_variance_weight=library_variance_weight,
            residual_library=residual_library,
            regularise_background=regularise_background,
            regularise_dispersion=regularise_dispersion,
            native_sparsity=native_sparsity,
            decoder_weight_l2=decoder_weight_l2,
            theta_sampling=theta_sampling,
            z_sparsity=z_sparsity,
            z_horseshoe=z_horseshoe,
            hidden_sparsity=hidden_sparsity,
            ard=ard,
            decoder_weight_l1=decoder_weight_l1,
            modality_scaling=modality_scaling,
            dispersion_start=dispersion_start,
        )
        self._build(config, cells, ambient_rate)

    @classmethod
    def setup_anndata(cls, adata: AnnData, **settings: Any) -> None:
        """Refuse: this model takes MuData.

        Raises
        ------
        InvalidArgumentError
            Always.
        """
        raise InvalidArgumentError(
            "RegularizedMultimodalVI takes a MuData: use setup_mudata. For one AnnData use AmbientRegularizedSCVI."
        )

    @classmethod
    @names_what_to_use
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        modalities: Sequence[str] | Mapping[str, str | None] | None = None,
        modality_roles: Mapping[str, str] | None = None,
        batch_key: str | None = None,
        ambient_covariate_keys: Sequence[str] | None = None,
        nn_conditioning_covariate_keys: Sequence[str] | None = None,
        feature_scaling_covariate_keys: Sequence[str] | None = None,
        dispersion_key: str | None = None,
        library_size_key: str | None = None,
        encoder_covariate_keys: Sequence[str] | bool = False,
        continuous_covariate_keys: Sequence[str] | None = None,
        library_key: str | None = None,
        dataset_key: str | None = None,
        technical_covariate_keys: Sequence[str] | None = None,
        allow_noninteger: bool = False,
    ) -> None:
        """Check a data set and register it; the log says how many cells lack a modality.

        Parameters
        ----------
        mdata
            Counts by modality, whose cells need not have all of them. A cell without a single count of a modality is
            taken to lack it.
        modalities
            Names of the modalities to model, or a dictionary from names to layers with counts (``None`` is ``X``).
            Without it, ``X`` of all of them.
        modality_roles
            What each modality measures: ``"rna"`` (``"spliced"`` and ``"unspliced"`` are other names for it),
            ``"atac"`` or ``"protein"``; guessed from common names where left out.
        batch_key, ambient_covariate_keys, nn_conditioning_covariate_keys, dispersion_key, library_size_key
            See :meth:`AmbientRegularizedSCVI.setup_anndata`. Columns are looked for in ``mdata.obs``, then in ``obs``
            of the modalities; ``"modality:column"`` names one of those. What only modalities have is copied to
            ``mdata.obs``, and the copy follows them when they are corrected, unless it was changed itself.
        feature_scaling_covariate_keys
            Columns whose categories have a factor per feature, in all modalities. ``None`` is the conditioning keys,
            in the modalities whose role has feature scaling: ATAC.
        encoder_covariate_keys, continuous_covariate_keys, library_key, dataset_key, technical_covariate_keys
            See :meth:`AmbientRegularizedSCVI.setup_anndata`.
        allow_noninteger
            Accept counts that were corrected before and are no longer integers.

        Raises
        ------
        MissingKeyError
            A modality, column or layer does not exist; the message lists those that do.
        InvalidCountsError
            A matrix does not hold counts.
        InvalidArgumentError
            A role can be neither found nor guessed, covariates are wrong (see
            :meth:`AmbientRegularizedSCVI.setup_anndata`), or data are a view or no MuData.

        Warns
        -----
        CellstillWarning
            Cells without counts of a modality; categories of the ambient, dispersion or library size covariates that
            differ by a factor per feature of RNA.
        """
        check_mudata(mdata)
        if modalities is None:
            modalities = list(mdata.mod)
        if isinstance(modalities, str):
            modalities = [modalities]
        layers = dict(modalities) if isinstance(modalities, Mapping) else dict.fromkeys(modalities)
        for name in layers:
            check_key("modalities", name, "mdata.mod", mdata.mod.keys())
        roles = resolve_roles(list(layers), modality_roles)
        keys = CovariateKeys.resolve(
            batch_key=batch_key,
            ambient_covariate_keys=ambient_covariate_keys,
            nn_conditioning_covariate_keys=nn_conditioning_covariate_keys,
            feature_scaling_covariate_keys=feature_scaling_covariate_keys,
            dispersion_key=dispersion_key,
            library_size_key=library_size_key,
            encoder_covariate_keys=encoder_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
            library_key=library_key,
            dataset_key=dataset_key,
            technical_covariate_keys=technical_covariate_keys,
            scaling_follows_conditioning=True,
        )
        keys.check(complete_obs(mdata, keys.arguments))
        cells = Cells.read(mdata, keys, layers=layers, allow_noninteger=allow_noninteger)
        cells.say_what_is_lacking()
        for name in (name for name, role in roles.items() if role == "rna"):
            has = cells.present[name]
            for column in keys.left_to_z:
                warn_if_multiplicative(
                    cells.counts[name][has], cells.codes[column][has], cells.categories[column], column
                )
        setup = {"keys": keys.to_dict(), "layers": layers, "roles": roles, "allow_noninteger": allow_noninteger}
        register(
            cls,
            mdata,
            layers=layers,
            categorical=keys.registered,
            continuous=keys.continuous,
            setup_args=setup_arguments(setup),
            record=setup,
        )

    @classmethod
    @names_what_to_use
    def load(
        cls,
        dir_path: str | os.PathLike[str],
        mdata: MuData | Literal[False] | None = None,
        *,
        accelerator: str = "cpu",
        device: int | str = "auto",
    ) -> RegularizedMultimodalVI:
        """Read a model that :meth:`save` wrote.

        Parameters
        ----------
        dir_path
            Folder.
        mdata
            Data to attach; features are matched by name, in any order, and results have them in that order (see
            :meth:`get_normalized_expression`). ``None`` attaches those that were saved with the model, if any;
            ``False`` attaches none.
        accelerator, device
            Where the model goes: ``"cpu"``, ``"gpu"``, or ``"auto"``, a CUDA device if there is one; and the number of
            that device. :meth:`to_device` moves it later. Training chooses its own device.

        Raises
        ------
        StoreError
            The folder is absent, damaged, of another class, or from a newer cellstill.
        InvalidArgumentError
            There is no such device; or the data are a view, an AnnData where the model has several modalities, or have
            categories that the model does not know.
        MissingKeyError, InvalidCountsError, GeneMismatchError
            The data do not fit the model: a column or layer is absent, it does not hold counts, or features are others.
        """
        return cls._load(dir_path, mdata, accelerator, device)


def _largest_mean(cells: Cells | None, name: str) -> float:
    """Largest mean count of a feature over the cells that have the modality, at least 1."""
    assert cells is not None
    sums = np.asarray(cells.counts[name].sum(axis=0, dtype=np.float64))
    return max(1.0, float(sums.max()) / max(1, int(cells.present[name].sum())))


def _each(argument: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """One value per modality."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    missing = [name for name in names if name not in value]
    unknown = [name for name in value if name not in names]
    if missing or unknown:
        raise InvalidArgumentError(
            f"{argument} has {list(value)}; the modalities are {list(names)}. Give one value for each, or one for all."
        )
    return dict(value)
