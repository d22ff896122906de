"""AmbientRegularizedSCVI: regularised VI of RNA counts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from cellstill._compat.scvi import register
from cellstill.data.counts import as_csr, check_counts, get_layer
from cellstill.data.genes import check_unique_genes
from cellstill.errors import InvalidArgumentError, below_one
from cellstill.vi.analysis import Analysis
from cellstill.vi.arguments import setup_arguments
from cellstill.vi.config import NATIVE_SPARSITY, Background, ModalityConfig
from cellstill.vi.containers import check_anndata
from cellstill.vi.covariates import CovariateKeys
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.multiplicative import warn_if_multiplicative
from cellstill.vi.rates import Rate

if TYPE_CHECKING:
    from anndata import AnnData

RNA = "rna"


class AmbientRegularizedSCVI(Analysis):
    r"""scVI with ambient RNA, feature scaling, hierarchical dispersion and learned library size.

    .. math::
        z_n \sim \mathrm{Normal}(0, I), \qquad
        \mu_{ng} = l_n\,\mathrm{softplus}(f([z_n, c_n]))_g\,y_{ng} + r_{e(n)} N_n \chi_{e(n)g}, \qquad
        x_{ng} \sim \mathrm{NB}(\mu_{ng}, \theta_{g,d(n)})

    with library size l, feature scaling y, and ambient RNA as the share r of a cell's counts N, of the composition
    :math:`\chi`; ``background="free"`` has the published :math:`l_n (\mathrm{softplus}(\cdot)_g + b_{e(n)g})\, y_{ng}`.
    Priors of the parts keep a large network from explaining noise, so that the sizes need no tuning.

    Parameters
    ----------
    adata
        Counts, cells x genes, registered with :meth:`setup_anndata`.
    n_hidden, n_layers
        Width and number of the hidden layers of encoder and decoder. Larger networks resolve more cell types, and take
        longer.
    n_latent
        Dimensions of z. They start at the prior, and those that are not needed stay there.
    dropout_rate
        Probability of dropping an input of a hidden layer; categories are never dropped. Larger regularises more, and
        cells of one type come to lie less close together. 0, the default, leaves it to the priors, with cells that were
        set aside as likely as at 0.1.
    background
        Ambient background of each category of the ambient covariates: ``"profile"`` is a share of the counts, found in
        the genes that some cells lack, with about the composition of all cells
        (:class:`~cellstill.vi.ambient.ProfileBackground`). ``"free"`` learns it gene by gene, as published: what it
        removes is close to its start, a fifth of the counts, because counts alone do not tell it from low expression.
        ``False`` leaves it out.
    ambient_rate
        Known share of ambient RNA in the counts, such as one from empty droplets, instead of an estimate: of all cells,
        or by category of the ambient covariate, ``{"s1": 0.08}``; where there are several, by tuple of categories that
        occur together, ``{("s1", "x"): 0.08}``. What is left out is estimated. Only for a ``"profile"`` background.
    native_sparsity
        Weight of the sparse prior on native expression beside a ``"profile"`` background, in cells: larger leaves less
        of the genes that a cell has little of, and takes more for soup. 0 leaves it out. Without such a background it
        is not used.
    use_feature_scaling
        Give genes a factor for each category of the feature scaling covariates, or one factor without any. ``None``
        does where such covariates were named.
    use_batch_in_decoder
        Tell the decoder the batch too, as ``nn_conditioning_covariate_keys`` does.
    likelihood
        ``"negative_binomial"`` or ``"poisson"``.
    encoder_input
        ``"normalized"``: log1p of counts brought to one library size; or ``"log1p"``, of the counts themselves.
    sensitivity
        Scale of library sizes. Expression is scaled by its inverse; results but for that do not depend on it.
    library_n_hidden
        Width of the library encoder; small, so that library size does not take up biology.
    library_variance_weight
        Factor of the variance of the prior of log library sizes. Larger lets them stray further.
    residual_library
        Start from the observed totals.
    regularise_background
        Put the prior Gamma(1, 100) on a ``"free"`` background, which pulls it to 0.01.
    regularise_dispersion
        Put the containment prior on dispersions. Without it they may take up what z should explain.
    decoder_weight_l2
        Weight of the decoder's squared weights. Larger is smoother.
    theta_sampling
        Draw inverse dispersions once per ``"minibatch"``, which is faster, or per ``"cell"``.
    z_sparsity
        Put the prior Gamma(``z_sparsity`` / n_latent, 1) on the magnitudes of z, times their Normal: about so many
        dimensions are then large in a cell. Smaller is sparser. ``None``, the default, as for those that follow, leaves
        it out. Evidence (:meth:`get_elbo`) is that of the Normal prior, without the three penalties of sparsity.
    z_horseshoe
        Put a horseshoe of this scale on z, times its Normal: most values near 0, and few of them held back. Smaller is
        sparser.
    hidden_sparsity
        Put the prior Gamma(``hidden_sparsity`` / n_hidden, 1) on the activations of the decoder's last hidden layer:
        about so many are then large in a cell. Smaller is sparser. It needs a warm-up,
        which :meth:`train` gives to it and to the divergence of z.
    ard
        Learn the prior variance of each dimension of z (automatic relevance determination); dimensions that are not
        needed shrink towards this standard deviation, in the course of hundreds of epochs. Smaller shrinks them
        further; 0.1 is one to try.
    decoder_weight_l1
        Weight of the magnitudes of the decoder's weights. Larger brings more of them to 0.
    modality_scaling
        Learn the scale of library sizes, with the prior Gamma(5, 5 / sensitivity), instead of fixing it at
        ``sensitivity``.
    dispersion_start
        Start inverse dispersions from the spread of the counts, of which this share is left to z: 0.9 is the published
        one. Larger starts closer to Poisson. ``None`` starts them all at 9. Not for ``likelihood="poisson"``.
    seed
        Seeds initial weights, split, shuffling, dropout and draws.

    References
    ----------
    Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics. Kleshchevnikov et al. (2022),
    Cell2location. Simpson et al. (2017), Penalising model component complexity.

    Examples
    --------
    >>> AmbientRegularizedSCVI.setup_anndata(adata, layer="counts", batch_key="sample")
    >>> model = AmbientRegularizedSCVI(adata)
    >>> model.train()
    >>> adata.obsm["X_vi"] = model.get_latent_representation()
    >>> adata.layers["denoised"] = model.get_denoised_counts()
    """

    @names_what_to_use
    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        n_hidden: int = 512,
        n_latent: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.0,
        background: Background | Literal[False] = "profile",
        ambient_rate: Rate = None,
        use_feature_scaling: bool | None = None,
        use_batch_in_decoder: bool = False,
        likelihood: Literal["negative_binomial", "poisson"] = "negative_binomial",
        encoder_input: Literal["normalized", "log1p"] = "normalized",
        sensitivity: float = 1.0,
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
        cells = self._start(adata, None, seed, None)
        assert cells is not None
        if background is None:
            raise InvalidArgumentError(
                "background=None may mean none, or the default. Say background=False to leave it out, or "
                "background='profile', the default."
            )
        keys = self._keys
        scaling = bool(keys.feature_scaling) if use_feature_scaling is None else use_feature_scaling
        modality = ModalityConfig(
            n_vars=len(self._features[RNA]),
            n_hidden=n_hidden,
            n_layers=n_layers,
            n_latent=n_latent,
            background=None if background is False else background,
            feature_scaling=scaling,
            likelihood=likelihood,
            sensitivity=sensitivity,
        )
        config = self._vae_config(
            {RNA: modality},
            use_batch_in_decoder=use_batch_in_decoder,
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
    @names_what_to_use
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
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
        """Check a data set and register it.

        Parameters
        ----------
        adata
            Counts, cells x genes. Not a view.
        layer
            Layer with raw counts; ``None`` reads ``adata.X``.
        batch_key
            One column for ambient background, dispersion and library size; not together with the keys of these three.
            For plain integration, name it in ``nn_conditioning_covariate_keys`` and ``feature_scaling_covariate_keys``
            too.
        ambient_covariate_keys
            Columns whose categories have an additive background each; they add up.
        nn_conditioning_covariate_keys
            Columns that the decoder is told. What differs between their categories is left out of z.
        feature_scaling_covariate_keys
            Columns whose categories have a factor per gene; they multiply.
        dispersion_key
            Column with the groups of inverse dispersions.
        library_size_key
            Column with the groups whose library sizes share a prior.
        encoder_covariate_keys
            Columns that encoders are told; ``True`` for the conditioning keys.
        continuous_covariate_keys
            Columns with numbers, for decoders and library encoders.
        library_key, dataset_key, technical_covariate_keys
            Not used by the model: they say which columns metrics are to go by, the finest technical unit, the data set
            that it nests in, and other technical axes. They are checked, each library for belonging to one data set,
            and kept with the set-up.
        allow_noninteger
            Accept counts that were corrected before and are no longer integers.

        Raises
        ------
        MissingKeyError
            A column or layer does not exist; the message lists those that do.
        InvalidCountsError
            The layer does not hold counts, or a cell is empty.
        GeneMismatchError
            A gene name occurs twice.
        InvalidArgumentError
            ``batch_key`` beside a key it stands for, missing values in a column, or data that are a view or no AnnData.

        Warns
        -----
        CellstillWarning
            Categories of the ambient, dispersion or library size covariates differ by a factor per gene, as
            technologies do, and no key takes that up.
        """
        check_anndata(adata)
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
        )
        keys.check(adata.obs)
        check_unique_genes(adata.var_names)
        check_counts(adata, layer, allow_noninteger=allow_noninteger)
        for column in keys.left_to_z:
            values = adata.obs[column].astype("category")
            names = [str(name) for name in values.cat.categories]
            counts = as_csr(get_layer(adata, layer))
            warn_if_multiplicative(counts, values.cat.codes.to_numpy(dtype=np.int64), names, column)
        setup = {"keys": keys.to_dict(), "layers": {RNA: layer}, "allow_noninteger": allow_noninteger}
        register(
            cls,
            adata,
            layer=layer,
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
        adata: AnnData | Literal[False] | None = None,
        *,
        accelerator: str = "cpu",
        device: int | str = "auto",
    ) -> AmbientRegularizedSCVI:
        """Read a model that :meth:`save` wrote.

        Parameters
        ----------
        dir_path
            Folder.
        adata
            Data to attach; genes are matched by name, in any order, and results have them in that order (see
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
            There is no such device; or the data are a view, no AnnData, or have categories that the model does not
            know.
        MissingKeyError, InvalidCountsError, GeneMismatchError
            The data do not fit the model: a column or layer is absent, it does not hold counts, or genes are others.
        """
        return cls._load(dir_path, adata, accelerator, device)
