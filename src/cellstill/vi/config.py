"""What a regularised model is made of, in a form that is checked once and stored as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from cellstill.errors import InvalidArgumentError, check_option, whole_number

Background = Literal["profile", "free"]
NATIVE_SPARSITY = 5.0
LatentMode = Literal["concatenation", "weighted_mean", "single_encoder"]


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """One kind of counts.

    Attributes
    ----------
    n_vars
        Features.
    n_hidden, n_layers
        Width and number of the hidden layers of its encoder and decoder.
    n_latent
        Dimensions of z that its encoder makes.
    background
        ``"profile"`` (:class:`~cellstill.vi.ambient.ProfileBackground`), ``"free"``
        (:class:`~cellstill.vi.parts.Background`), or ``None`` for none.
    feature_scaling
        Features have a multiplicative factor.
    likelihood
        ``"negative_binomial"``, or ``"poisson"``, which fixes the inverse dispersion at infinity.
    sensitivity
        Share of a cell's molecules that is counted.
    """

    n_vars: int
    n_hidden: int = 512
    n_layers: int = 1
    n_latent: int = 128
    background: Background | None = "profile"
    feature_scaling: bool = False
    likelihood: Literal["negative_binomial", "poisson"] = "negative_binomial"
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("n_vars", "n_hidden", "n_layers", "n_latent"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        if self.background is not None:
            check_option("background", self.background, ("profile", "free"))
        check_option("likelihood", self.likelihood, ("negative_binomial", "poisson"))
        if not 0 < self.sensitivity < math.inf:
            raise InvalidArgumentError(f"sensitivity={self.sensitivity!r} has to be a finite number above 0.")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """All of a model, in the units of :class:`~cellstill.vi.module.RegularizedVAE`.

    Attributes
    ----------
    modalities
        By name, in the order in which the module has them and random numbers are drawn for them.
    categories
        Number of categories of each column of codes that is used.
    ambient, conditioning, feature_scaling, encoder
        Columns for each purpose.
    dispersion, library
        Column of the groups of inverse dispersions and library sizes; ``None`` is one group of all cells.
    n_continuous
        Continuous covariates, given to decoders and library encoders.
    latent_mode
        How the parts of z are joined.
    dropout
        Of the inputs of hidden layers.
    encoder_input
        ``"log1p"``, or ``"normalized"``: of counts brought to the mean library size.
    library_hidden
        Width of the library encoder.
    library_variance_weight
        w: factor of the prior variance of log library sizes, and weight of the residual's prior.
    residual_library
        A cell's observed total enters its log library size.
    regularise_background, regularise_dispersion
        Whether their priors enter the loss.
    native_sparsity
        Weight of the sparse prior on native expression, in cells; only beside a ``"profile"`` background.
    decoder_weight_l2, decoder_weight_l1
        Weight of the decoders' squared weights, and of their magnitudes.
    theta_sampling
        One draw of the inverse dispersions per ``"minibatch"`` or per ``"cell"``.
    z_sparsity, hidden_sparsity
        Expected sum of the magnitudes of a cell's z, and of its activations in the last hidden layer of each decoder,
        under a Gamma prior on each; ``None`` is none.
    z_horseshoe
        Scale of a horseshoe on z; ``None`` is none.
    ard
        Standard deviation that the dimensions of z shrink to that are not needed
        (:class:`~cellstill.vi.penalties.Relevance`); ``None`` holds that of all at 1.
    modality_scaling
        Learn the scale of each modality's library sizes (:class:`~cellstill.vi.library.Library`).
    dispersion_start
        Share of the counts' overdispersion that is left to z where inverse dispersions start
        (:func:`~cellstill.vi.moments.inverse_dispersion`); ``None`` starts them all at 9.
    """

    modalities: Mapping[str, ModalityConfig]
    categories: Mapping[str, int] = field(default_factory=dict)
    ambient: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()
    feature_scaling: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    dispersion: str | None = None
    library: str | None = None
    n_continuous: int = 0
    latent_mode: LatentMode = "concatenation"
    dropout: float = 0.0
    encoder_input: Literal["log1p", "normalized"] = "normalized"
    library_hidden: int = 16
    library_variance_weight: float = 0.5
    residual_library: bool = True
    regularise_background: bool = False
    regularise_dispersion: bool = True
    native_sparsity: float = NATIVE_SPARSITY
    decoder_weight_l2: float = 0.1
    theta_sampling: Literal["minibatch", "cell"] = "minibatch"
    decoder_weight_l1: float = 0.0
    z_sparsity: float | None = None
    hidden_sparsity: float | None = None
    z_horseshoe: float | None = None
    ard: float | None = None
    modality_scaling: bool = False
    dispersion_start: float | None = None

    def __post_init__(self) -> None:
        check_option("latent_mode", self.latent_mode, ("concatenation", "weighted_mean", "single_encoder"))
        check_option("encoder_input", self.encoder_input, ("log1p", "normalized"))
        check_option("theta_sampling", self.theta_sampling, ("minibatch", "cell"))
        if not 0 <= self.dropout < 1:
            raise InvalidArgumentError(f"dropout={self.dropout} has to be at least 0 and below 1.")
        if not self.modalities:
            raise InvalidArgumentError("modalities is empty: a model needs at least one.")
        object.__setattr__(self, "modalities", dict(self.modalities))
        self._check_one_latent()
        object.__setattr__(self, "library_hidden", whole_number("library_n_hidden", self.library_hidden, least=1))
        if not 0 < self.library_variance_weight < math.inf:
            raise InvalidArgumentError(
                f"library_variance_weight={self.library_variance_weight!r} has to be a finite number above 0."
            )
        self._check_penalties()
        self._check_effects()

    @property
    def n_latent(self) -> int:
        """Dimensions of the joint z."""
        widths = [modality.n_latent for modality in self.modalities.values()]
        return sum(widths) if self.latent_mode == "concatenation" else widths[0]

    @property
    def parts_of_z(self) -> dict[str, np.ndarray]:
        """Columns of the module's z by modality, sorted by name; of all of it, under ``"joint"``, where it is one."""
        if self.latent_mode != "concatenation":
            return {"joint": np.arange(self.n_latent)}
        stops = np.cumsum([modality.n_latent for modality in self.modalities.values()])
        parts = np.split(np.arange(self.n_latent), stops[:-1])
        return dict(sorted(zip(self.modalities, parts, strict=True)))

    @property
    def columns_of_z(self) -> np.ndarray:
        """Columns of the module's z in the order in which it is given out: the modalities' parts sorted by name."""
        return np.concatenate(list(self.parts_of_z.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return asdict(self)

    def _check_one_latent(self) -> None:
        """One z needs encoders of one size, and one encoder one size of everything."""
        alike: dict[str, tuple[str, ...]] = {
            "weighted_mean": ("n_latent",),
            "single_encoder": ("n_latent", "n_hidden", "n_layers"),
        }
        for argument in alike.get(self.latent_mode, ()):
            sizes = {name: getattr(modality, argument) for name, modality in self.modalities.items()}
            if len(set(sizes.values())) > 1:
                raise InvalidArgumentError(
                    f"latent_mode={self.latent_mode!r} needs the same {argument} in all modalities; found {sizes}. "
                    "Give one number, or use latent_mode='concatenation'."
                )

    def _check_effects(self) -> None:
        """Refuse what was asked for and would change nothing."""
        modalities = self.modalities.values()
        backgrounds = {name: modality.background or False for name, modality in self.modalities.items()}
        if self.regularise_background and "free" not in backgrounds.values():
            raise InvalidArgumentError(
                f"regularise_background=True is a prior on a background that is learned, and none is: found "
                f"{backgrounds}. Leave it out, or use background='free'."
            )
        if self.dispersion_start is not None and all(modality.likelihood == "poisson" for modality in modalities):
            raise InvalidArgumentError(
                f"dispersion_start={self.dispersion_start!r} starts inverse dispersions, and likelihood='poisson' has "
                "none. Leave it out, or use likelihood='negative_binomial'."
            )

    def _check_penalties(self) -> None:
        n_hidden = min(modality.n_hidden for modality in self.modalities.values())
        for name, largest in (("z_sparsity", self.n_latent), ("hidden_sparsity", n_hidden)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= largest:
                raise InvalidArgumentError(
                    f"{name}={value!r} has to be above 0 and at most {largest}, the number of dimensions: beyond it "
                    "the prior would keep them from 0. Give a smaller number, or None for no such prior."
                )
        for name in ("z_horseshoe", "ard"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{name}={value!r} has to be above 0, or None for no such prior.")
        for name in ("decoder_weight_l1", "decoder_weight_l2", "native_sparsity"):
            if not getattr(self, name) >= 0:
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} has to be at least 0.")
        if self.dispersion_start is not None and not 0 <= self.dispersion_start < 1:
            raise InvalidArgumentError(
                f"dispersion_start={self.dispersion_start!r} has to be a share, at least 0 and below 1; or None to "
                "start all inverse dispersions at 9."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Build from :meth:`to_dict`."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
        }
        plain["modalities"] = {name: ModalityConfig(**one) for name, one in config["modalities"].items()}
        return cls(**plain)
