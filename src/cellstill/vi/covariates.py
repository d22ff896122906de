"""What each covariate is for: the purposes of the model's parameters, and the columns that serve them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellstill.data.covariates import obs_column
from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside
from cellstill.vi.config import ModalityConfig

_log = logging.getLogger("cellstill")

_FEW_CELLS, _MANY_CATEGORIES = 3, 10


@dataclass(frozen=True, kw_only=True)
class CovariateKeys:
    """Columns of ``obs`` by purpose.

    Attributes
    ----------
    batch
        Column that stands for the batch: what ``batch_key`` was, if it was given.
    ambient
        Additive background, summed over these columns.
    conditioning
        Input of decoders, one-hot.
    feature_scaling
        Factor per feature, multiplied over these columns.
    dispersion, library_size
        Groups of inverse dispersions and of library size priors; ``None`` is one group of all cells.
    encoder
        Input of encoders, one-hot.
    continuous
        Numbers, standardised.
    library_key, dataset_key, technical
        Vocabulary of metrics: the finest technical unit, the data sets that units nest in, and other technical axes.
    scaling_named
        Whether the columns of ``feature_scaling`` were named for it, and do not only follow those of ``conditioning``.
    """

    batch: str | None = None
    ambient: tuple[str, ...] = ()
    conditioning: tuple[str, ...] = ()
    feature_scaling: tuple[str, ...] = ()
    dispersion: str | None = None
    library_size: str | None = None
    encoder: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()
    library_key: str | None = None
    dataset_key: str | None = None
    technical: tuple[str, ...] = ()
    scaling_named: bool = False

    @classmethod
    def resolve(
        cls,
        *,
        batch_key: str | None = None,
        ambient_covariate_keys: Sequence[str] | str | None = None,
        nn_conditioning_covariate_keys: Sequence[str] | str | None = None,
        feature_scaling_covariate_keys: Sequence[str] | str | None = None,
        dispersion_key: str | None = None,
        library_size_key: str | None = None,
        encoder_covariate_keys: Sequence[str] | str | bool | None = False,
        continuous_covariate_keys: Sequence[str] | str | None = None,
        library_key: str | None = None,
        dataset_key: str | None = None,
        technical_covariate_keys: Sequence[str] | str | None = None,
        scaling_follows_conditioning: bool = False,
    ) -> CovariateKeys:
        """Turn the arguments of ``setup_anndata`` and ``setup_mudata`` into purposes.

        Parameters
        ----------
        batch_key
            One column for ambient background, inverse dispersion and library size.
        ambient_covariate_keys, dispersion_key, library_size_key
            These purposes one by one, instead of ``batch_key``. Without any, all cells are one group, which the log
            says.
        nn_conditioning_covariate_keys
            Columns that the decoder is told. They take up differences of any kind, and leave them out of z.
        feature_scaling_covariate_keys
            Columns with a factor per feature. ``None`` is none, or ``nn_conditioning_covariate_keys`` if
            ``scaling_follows_conditioning``; an empty list is none.
        encoder_covariate_keys
            Columns that encoders are told; ``True`` stands for ``nn_conditioning_covariate_keys``.
        continuous_covariate_keys
            Columns with numbers.
        library_key, dataset_key, technical_covariate_keys
            See the attributes.
        scaling_follows_conditioning
            Whether feature scaling has a default.

        Raises
        ------
        InvalidArgumentError
            ``batch_key`` beside a key it stands for, a column named twice for one purpose, a categorical column that is
            also continuous, or ``encoder_covariate_keys=True`` with no conditioning keys.

        Warns
        -----
        CellstillWarning
            Encoders are told covariates.
        """
        ambient = _names("ambient_covariate_keys", ambient_covariate_keys)
        dispersion = _name("dispersion_key", dispersion_key)
        library_size = _name("library_size_key", library_size_key)
        batch = _name("batch_key", batch_key)
        if batch is not None:
            given = {
                "ambient_covariate_keys": ambient_covariate_keys,
                "dispersion_key": dispersion_key,
                "library_size_key": library_size_key,
            }
            beside = [f"{argument}={value!r}" for argument, value in given.items() if value is not None]
            if beside:
                raise InvalidArgumentError(
                    f"batch_key={batch!r} stands for {', '.join(given)}, so it cannot be given together with "
                    f"{' and '.join(beside)}. Give batch_key alone, or each of the three by its own argument."
                )
            ambient, dispersion, library_size = (batch,), batch, batch
        conditioning = _names("nn_conditioning_covariate_keys", nn_conditioning_covariate_keys)
        scaling = named = _names("feature_scaling_covariate_keys", feature_scaling_covariate_keys)
        if feature_scaling_covariate_keys is None and scaling_follows_conditioning:
            scaling = conditioning
        keys = cls(
            batch=batch,
            ambient=ambient,
            conditioning=conditioning,
            feature_scaling=scaling,
            dispersion=dispersion,
            library_size=library_size,
            encoder=_encoder_keys(encoder_covariate_keys, conditioning),
            continuous=_names("continuous_covariate_keys", continuous_covariate_keys),
            library_key=_name("library_key", library_key),
            dataset_key=_name("dataset_key", dataset_key),
            technical=_names("technical_covariate_keys", technical_covariate_keys),
            scaling_named=bool(named),
        )
        both = [column for column in keys.continuous if column in keys.columns]
        if both:
            raise InvalidArgumentError(
                f"continuous_covariate_keys: {both[0]!r} is also a categorical covariate. Use it as one or the other; "
                "for both, copy the column under another name."
            )
        keys._say_what_has_one_group()
        return keys

    @property
    def columns(self) -> tuple[str, ...]:
        """Distinct categorical columns that the model uses, in the order of their first purpose."""
        single = [column for column in (self.dispersion, self.library_size) if column is not None]
        return tuple(dict.fromkeys([*self.ambient, *self.conditioning, *self.feature_scaling, *single, *self.encoder]))

    @property
    def left_to_z(self) -> tuple[str, ...]:
        """Columns of additive background, dispersion or library size that nothing else takes up."""
        named = [*self.ambient, self.dispersion, self.library_size]
        taken_up = {*self.conditioning, *self.feature_scaling, None}
        return tuple(dict.fromkeys(column for column in named if column is not None and column not in taken_up))

    @property
    def arguments(self) -> dict[str, str]:
        """Every column named, with the argument that names it first: for messages."""
        batch = "batch_key" if self.batch is not None else None
        purposes: list[tuple[str, Iterable[str | None]]] = [
            (batch or "ambient_covariate_keys", self.ambient),
            ("nn_conditioning_covariate_keys", self.conditioning),
            ("feature_scaling_covariate_keys", self.feature_scaling),
            ("dispersion_key", [self.dispersion]),
            ("library_size_key", [self.library_size]),
            ("encoder_covariate_keys", self.encoder),
            ("continuous_covariate_keys", self.continuous),
            ("library_key", [self.library_key]),
            ("dataset_key", [self.dataset_key]),
            ("technical_covariate_keys", self.technical),
        ]
        named: dict[str, str] = {}
        for argument, columns in purposes:
            for column in columns:
                if column is not None:
                    named.setdefault(column, argument)
        return named

    @property
    def used(self) -> dict[str, str]:
        """Those of :attr:`arguments` that the model uses."""
        used = {*self.columns, *self.continuous}
        return {column: argument for column, argument in self.arguments.items() if column in used}

    @property
    def registered(self) -> dict[str, str]:
        """Categorical column of each key of the registry: ``"batch"``, and ``"covariate_{column}"`` for the others."""
        return {"batch" if column == self.batch else f"covariate_{column}": column for column in self.columns}

    def check(self, obs: pd.DataFrame) -> None:
        """Refuse columns that cannot serve their purpose.

        Parameters
        ----------
        obs
            Annotations, with all columns of :attr:`arguments`.

        Raises
        ------
        MissingKeyError
            A column is absent; the message lists those that exist.
        InvalidArgumentError
            A value is missing, a continuous covariate is not a number, not finite or constant, two categories have the
            same name, or a library is in two data sets.

        Warns
        -----
        CellstillWarning
            Most categories of a column have one or two cells.
        """
        for column, argument in self.arguments.items():
            values = obs_column(obs, column, argument)
            if column in self.continuous:
                _check_continuous(values)
            else:
                _check_names(values, argument)
                _warn_if_tiny(values, argument)
        if self.library_key is not None and self.dataset_key is not None:
            check_nested(obs, self.library_key, self.dataset_key)

    def check_effects(self, modalities: Mapping[str, ModalityConfig]) -> None:
        """Refuse keys that were named for a part that no modality has.

        What ``batch_key`` stands for, and scaling that follows the conditioning keys, may find nothing to act on.

        Parameters
        ----------
        modalities
            By name.

        Raises
        ------
        InvalidArgumentError
            A key would change nothing; the message names it and the setting that leaves it none.
        """
        backgrounds = {name: modality.background or False for name, modality in modalities.items()}
        likelihoods = {name: modality.likelihood for name, modality in modalities.items()}
        scalings = {name: modality.feature_scaling for name, modality in modalities.items()}
        if self.batch is None:
            _check_effect("ambient_covariate_keys", self.ambient, "background", backgrounds, False, "profile")
            _check_effect("dispersion_key", self.dispersion, "likelihood", likelihoods, "poisson", "negative_binomial")
        if self.scaling_named:
            argument = "feature_scaling_covariate_keys"
            _check_effect(argument, self.feature_scaling, "use_feature_scaling", scalings, False, True)

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CovariateKeys:
        """Build from :meth:`to_dict`."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
        }
        if "scaling_named" not in plain:
            # Of models that were saved before it was kept.
            scaling, conditioning = plain.get("feature_scaling", ()), plain.get("conditioning", ())
            plain["scaling_named"] = bool(scaling) and scaling != conditioning
        return cls(**plain)

    def _say_what_has_one_group(self) -> None:
        purposes = {
            "ambient background": self.ambient,
            "dispersion": self.dispersion,
            "library size": self.library_size,
        }
        alone = [purpose for purpose, columns in purposes.items() if not columns]
        if alone:
            _log.info("No key for %s: all cells are one group there.", ", ".join(alone))


def check_nested(obs: pd.DataFrame, library_key: str, dataset_key: str) -> None:
    """Raise unless each library belongs to one data set.

    Raises
    ------
    InvalidArgumentError
        A library has cells in several data sets; the message names it and them.
    """
    pairs = obs[[library_key, dataset_key]].astype(str).drop_duplicates()
    n_sets = pairs.groupby(library_key, observed=True)[dataset_key].nunique()
    split = n_sets.index[n_sets > 1]
    if len(split):
        found = sorted(pairs.loc[pairs[library_key] == split[0], dataset_key])
        raise InvalidArgumentError(
            f"library_key={library_key!r} has to nest in dataset_key={dataset_key!r}, but the library {split[0]!r} has "
            f"cells in {found}{f', and so have {len(split) - 1} others' if len(split) > 1 else ''}. Name libraries "
            "uniquely across data sets, for example as dataset + '_' + library."
        )


def _name(argument: str, key: object) -> str | None:
    if key is None or isinstance(key, str):
        return key
    raise InvalidArgumentError(f"{argument}={key!r} has to be the name of one column, or None.")


def _names(argument: str, keys: Sequence[str] | str | None) -> tuple[str, ...]:
    names = (keys,) if isinstance(keys, str) else () if keys is None else tuple(keys)
    for name in names:
        if not isinstance(name, str):
            raise InvalidArgumentError(f"{argument}={keys!r} has to be a list of column names; {name!r} is not one.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidArgumentError(f"{argument} names {twice[0]!r} twice. Name each column once.")
    return names


def _encoder_keys(keys: Sequence[str] | str | bool | None, conditioning: tuple[str, ...]) -> tuple[str, ...]:
    if keys is True:
        if not conditioning:
            raise InvalidArgumentError(
                "encoder_covariate_keys=True stands for nn_conditioning_covariate_keys, and there are none. Name the "
                "columns."
            )
        keys = conditioning
    names = () if keys is False or keys is None else _names("encoder_covariate_keys", keys)
    if names:
        warnings.warn(
            f"encoder_covariate_keys={list(names)}: encoders are told these covariates, so z may depend on them, and "
            "cells of a new category cannot be encoded without further training. Let decoders take them up instead: "
            "nn_conditioning_covariate_keys.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return names


def _check_effect(
    argument: str, named: Sequence[str] | str | None, setting: str, found: Mapping[str, Any], off: Any, instead: Any
) -> None:
    if named and all(value == off for value in found.values()):
        shown = list(named) if isinstance(named, tuple) else named
        raise InvalidArgumentError(
            f"{argument}={shown!r} would change nothing: {setting} is {found}. Set the data up without it, or use "
            f"{setting}={instead!r}."
        )


def _check_continuous(values: pd.Series) -> None:
    column = values.name
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        raise InvalidArgumentError(
            f"continuous_covariate_keys: obs[{column!r}] holds {values.dtype}, not numbers. Use a column of numbers, "
            "or name it as a categorical covariate."
        )
    numbers = values.to_numpy(dtype=np.float64)
    if not np.isfinite(numbers).all() or numbers.std() == 0:
        raise InvalidArgumentError(
            f"continuous_covariate_keys: obs[{column!r}] is constant or not finite. Leave it out."
        )


def _warn_if_tiny(values: pd.Series, argument: str) -> None:
    """Warn where most categories have hardly a cell, as those of a measurement or of names of cells have."""
    sizes = values.value_counts()
    sizes = sizes[sizes > 0]
    if len(sizes) > _MANY_CATEGORIES and sizes.median() < _FEW_CELLS:
        warnings.warn(
            f"{argument}={values.name!r} has {len(sizes)} categories for {len(values)} cells, most with fewer than "
            f"{_FEW_CELLS}, of which little is learned. Is it the column that was meant?",
            CellstillWarning,
            stacklevel=level_outside(),
        )


def _check_names(values: pd.Series, argument: str) -> None:
    names = values.astype(str).unique()
    if len(names) < values.nunique():
        raise InvalidArgumentError(
            f"{argument}={values.name!r}: different values have the same name ({sorted(names)[:5]}), such as 1 and "
            "'1'. Convert the column to one type: adata.obs[key].astype(str)."
        )
    found = values.unique()
    try:
        sorted(found)
    except TypeError as error:
        types = sorted({type(value).__name__ for value in found})
        raise InvalidArgumentError(
            f"{argument}={values.name!r} mixes values of type {' and '.join(types)}, which have no order. Convert the "
            f"column to one type: adata.obs[{values.name!r}] = adata.obs[{values.name!r}].astype(str)."
        ) from error
