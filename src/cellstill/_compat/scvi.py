"""Everything we touch of scvi-tools that is private or drifts between releases: its registry and its model base."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pandas as pd
import rich.pretty  # noqa: F401  (scvi-tools 1.4 uses it in view_anndata_setup without importing it)
import scvi
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager, AnnDataManagerValidationCheck
from scvi.data._constants import _ADATA_MINIFY_TYPE_UNS_KEY, _MANAGER_UUID_KEY, _SCVI_UUID_KEY, ADATA_MINIFY_TYPE
from scvi.data.fields import (
    CategoricalObsField,
    LayerField,
    MuDataLayerField,
    MuDataNumericalJointObsField,
    MuDataWrapper,
    NumericalJointObsField,
    NumericalObsField,
    ObsmField,
    StringUnsField,
)
from scvi.model.base import BaseMinifiedModeModelClass, BaseModelClass
from scvi.model.base._base_model import BaseModelMetaClass

from cellstill._compat.pandas import categories_in_order
from cellstill.errors import InvalidArgumentError

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


class _WeakStores(BaseModelMetaClass):
    """A class of models that does not keep data alive.

    scvi-tools' metaclass keeps every manager, and with it every AnnData, until the process ends. Here the manager
    lives on its AnnData, and the class only refers to it.
    """

    def __init__(self, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        self._setup_adata_manager_store: Any = weakref.WeakValueDictionary()


class RegisteredModel(BaseModelClass, metaclass=_WeakStores):
    """scvi-tools' model base, with a registry that ends with its data and its model."""

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict[str, Any] | None = None) -> None:
        super().__init__(adata, registry)
        # The per-instance store would keep the data of a deleted model.
        weakref.finalize(self, self._per_instance_manager_store.pop, self.id, None)

    @classmethod
    def register_manager(cls, adata_manager: AnnDataManager) -> None:
        """Register a manager for as long as its AnnData lives."""
        _managers(adata_manager.adata)[cls.__name__] = adata_manager
        super().register_manager(adata_manager)

    @classmethod
    def _get_most_recent_anndata_manager(cls, adata: AnnData | MuData, required: bool = False) -> AnnDataManager | None:
        """Find the set-up of data, which they hold: copies share the number by which scvi-tools knows them."""
        manager = _managers(adata).get(cls.__name__) if _SCVI_UUID_KEY in adata.uns else None
        if manager is None and required:
            of_original = cls._setup_adata_manager_store.get(adata.uns.get(_SCVI_UUID_KEY))
            raise InvalidArgumentError(_not_set_up(cls, adata, of_original))
        return manager

    def deregister_manager(self, adata: AnnData | MuData | None = None) -> None:
        """Forget how data were set up: ``adata``, or all but those of this model."""
        managers = list(self._setup_adata_manager_store.values())
        forgotten = [one.adata for one in managers if one is not self._adata_manager] if adata is None else [adata]
        super().deregister_manager(adata)
        for data in forgotten:
            _managers(data).pop(type(self).__name__, None)

    @classmethod
    def view_setup_args(cls, dir_path: str | os.PathLike[str], **settings: Any) -> None:
        """Print the arguments with which the data of a saved model were set up.

        Parameters
        ----------
        dir_path
            Folder of the model.
        **settings
            Of ``load_registry``.
        """
        # That of scvi-tools calls its own load_registry, which looks for a pickle.
        AnnDataManager.view_setup_method_args(cls.load_registry(dir_path, **settings))


def _managers(data: AnnData | MuData) -> dict[str, AnnDataManager]:
    """What data are set up for, by class; not what data are set up for of which they are a shallow copy."""
    found: dict[str, AnnDataManager] = data.__dict__.setdefault(_MANAGERS, {})
    if any(manager.adata is not data for manager in found.values()):
        found = data.__dict__[_MANAGERS] = {}
    return found


_MANAGERS = "_cellstill_managers"


def _not_set_up(cls: type[RegisteredModel], data: AnnData | MuData, of_original: AnnDataManager | None) -> str:
    """Say why data have no set-up: scvi-tools takes a copy whose original is gone for data of another model."""
    argument, mudata = ("mdata", True) if hasattr(data, "mod") else ("adata", False)
    others, given = list(_managers(data)), ["..."]
    if of_original is not None:
        found = "is a copy, a subset or from the file of data that are set up, and a set-up does not go along"
        given = [f"{name}={value!r}" for name, value in setup_args(of_original._registry).items() if _is_stated(value)]
    elif others:
        found = f"is set up for {' and '.join(others)}, not for {cls.__name__}"
    elif _SCVI_UUID_KEY in data.uns:
        found = (
            "is a copy, a subset or from the file of data that were set up, and a set-up does not go along; or it is "
            f"set up for a model of another class than {cls.__name__}"
        )
    else:
        found = f"is not set up for {cls.__name__}"
    copied = f"{argument} = {argument}.copy(), then " if data.is_view else ""
    call = f"{cls.__name__}.{_method_name(mudata=mudata)}({', '.join([argument, *given])})"
    return f"{argument} {found}. Call {copied}{call} first."


def _is_stated(value: Any) -> bool:
    return value is not None and value is not False and (value == 0 or bool(value))


_RECORD = "cellstill_record"

MINIFIED, MINIFIED_WITH_COUNTS = ADATA_MINIFY_TYPE
"""What minified data hold: posteriors instead of counts, or beside them."""

QZM, QZV = "vi_latent_qzm", "vi_latent_qzv"
"""Keys of ``obsm`` with mean and variance of z."""

QLM, QLV, TOTALS = "vi_latent_qlm", "vi_latent_qlv", "vi_totals"
"""Keys of ``obsm`` with mean and variance of log library sizes, and observed totals: one column per modality."""


OBSERVED_LIB_SIZE = BaseModelClass._OBSERVED_LIB_SIZE_KEY
"""Column of ``obs`` of minified data with the total counts of a cell."""


class MinifiableModel(RegisteredModel, BaseMinifiedModeModelClass):
    """A model whose data may be minified: ``minified_data_type`` says how."""

    def _attach_data(self, data: AnnData | MuData) -> None:
        """Attach registered data."""
        self._register_manager_for_instance(self._get_most_recent_anndata_manager(data, required=True))
        self.adata = data

    def _replace_data(self, data: AnnData | MuData) -> None:
        """Attach other registered data, and keep nothing of those before."""
        before = self.adata_manager.adata_uuid
        self._attach_data(data)
        self._per_instance_manager_store[self.id].pop(before, None)


def minified_type(data: AnnData | MuData) -> str | None:
    """What minified data hold; ``None`` if data are not minified."""
    found = data.uns.get(_ADATA_MINIFY_TYPE_UNS_KEY)
    return None if found is None else str(found)


def mark_minified(data: AnnData | MuData, kind: str) -> None:
    """Say that data are minified, and that they are not those they were made from."""
    for key in (_SCVI_UUID_KEY, _MANAGER_UUID_KEY):
        data.uns.pop(key, None)
    data.uns[_ADATA_MINIFY_TYPE_UNS_KEY] = kind


def _posterior_fields() -> list[Any]:
    of_z = {REGISTRY_KEYS.LATENT_QZM_KEY: QZM, REGISTRY_KEYS.LATENT_QZV_KEY: QZV}
    return [
        *[ObsmField(key, place) for key, place in {**of_z, "latent_qlm": QLM, "latent_qlv": QLV}.items()],
        NumericalObsField(REGISTRY_KEYS.OBSERVED_LIB_SIZE, OBSERVED_LIB_SIZE),
        StringUnsField(REGISTRY_KEYS.MINIFY_TYPE_KEY, _ADATA_MINIFY_TYPE_UNS_KEY),
    ]


class _ObservedCategories(CategoricalObsField):
    """A categorical column whose codes are of the categories that occur, known by name.

    scvi-tools keeps a code for categories that no cell has, and takes an unknown category named 0, False or "" for a
    known one.
    """

    def register_field(self, adata: AnnData | MuData) -> dict[str, Any]:
        """Learn the categories."""
        self.validate_field(adata)
        return self._encode(adata, categories_in_order(adata.obs[self._original_attr_key]))

    def transfer_field(
        self, state_registry: dict, adata_target: AnnData | MuData, extend_categories: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Keep the categories of other data."""
        self.validate_field(adata_target)
        mapping = np.asarray(state_registry[self.CATEGORICAL_MAPPING_KEY], dtype=object)
        names = adata_target.obs[self._original_attr_key].astype(str)
        unknown = sorted(set(names) - set(map(str, mapping)))
        if unknown and not extend_categories:
            raise ValueError(
                f"obs[{self._original_attr_key!r}]: Category {unknown[0]} not found in source registry, which has "
                f"{[str(name) for name in mapping[:10]]}{' and others' if len(mapping) > 10 else ''}."
            )
        return self._encode(adata_target, np.append(mapping, np.asarray(unknown, dtype=object)))

    def _encode(self, adata: AnnData | MuData, mapping: np.ndarray) -> dict[str, Any]:
        names = pd.Index([str(value) for value in mapping])
        codes = names.get_indexer(pd.Index(adata.obs[self._original_attr_key].astype(str)))
        if (codes < 0).any():
            raise ValueError(f"obs[{self._original_attr_key!r}] has missing values.")
        adata.obs[self.attr_key] = codes.astype(np.int64)
        return {self.CATEGORICAL_MAPPING_KEY: mapping, self.ORIGINAL_ATTR_KEY: self._original_attr_key}


_MuDataObservedCategories = MuDataWrapper(_ObservedCategories)


def register(
    cls: type[RegisteredModel],
    data: AnnData | MuData,
    *,
    layer: str | None = None,
    layers: Mapping[str, str | None] | None = None,
    categorical: Mapping[str, str],
    continuous: Sequence[str] = (),
    setup_args: dict[str, Any],
    record: dict[str, Any] | None = None,
    source_registry: dict[str, Any] | None = None,
    extend_categories: bool = False,
) -> None:
    """Register count layers and ``obs`` columns with a model class.

    Parameters
    ----------
    cls
        Model class.
    data
        AnnData, or MuData with ``layers``, whose cells need not have all modalities; not a view. The columns have to
        be in its own ``obs``.
    layer
        Layer with the counts of an AnnData, or ``None`` for ``X``.
    layers
        Layer with counts of each modality of a MuData; their registry keys are ``"X_{modality}"``.
    categorical
        ``obs`` column of each registry key, such as ``"batch"``.
    continuous
        ``obs`` columns with numbers; their joint registry key is that of scvi-tools, ``"extra_continuous_covs"``.
    setup_args
        Arguments of ``setup_anndata`` or ``setup_mudata``, kept in the registry.
    record
        What a model makes of them, kept in the registry for :func:`setup_record`.
    source_registry
        Registry whose category codes are to be kept, from :func:`category_registry`.
    extend_categories
        Append categories that it does not know, instead of refusing them.
    """
    fields: list[Any] = []
    for name, place in ({None: layer} if layers is None else dict(layers)).items():
        as_they_are = {"is_count_data": False, "correct_data_format": False}
        if name is None:
            fields.append(LayerField(REGISTRY_KEYS.X_KEY, place, **as_they_are))
        else:
            key = f"{REGISTRY_KEYS.X_KEY}_{name}"
            fields.append(MuDataLayerField(key, place, mod_key=name, mod_required=True, **as_they_are))
    obs_field = _ObservedCategories if layers is None else _MuDataObservedCategories
    fields += [obs_field(key, column) for key, column in categorical.items()]
    if continuous:
        joint_field = NumericalJointObsField if layers is None else MuDataNumericalJointObsField
        fields.append(joint_field(REGISTRY_KEYS.CONT_COVS_KEY, list(continuous)))
    if minified_type(data) is not None:
        fields += _posterior_fields()
    manager = AnnDataManager(
        fields=fields,
        setup_method_args={
            "model_name": cls.__name__,
            "setup_method_name": _method_name(mudata=layers is not None),
            "setup_args": setup_args,
            _RECORD: record,
        },
        validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
    )
    extending = {} if source_registry is None else {"extend_categories": extend_categories}
    known = cls._setup_adata_manager_store.get(data.uns.get(_SCVI_UUID_KEY))
    if known is not None and known.adata is not data:
        # A copy has the number of its original, by which scvi-tools would take one for the other.
        data.uns[_SCVI_UUID_KEY] = str(uuid4())
    manager.register_fields(data, source_registry, **extending)
    cls.register_manager(manager)


def setup_args(registry: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which the data were set up."""
    return dict(registry["setup_args"])


def setup_record(registry: dict[str, Any]) -> dict[str, Any]:
    """What a model made of these arguments."""
    return dict(registry[_RECORD])


def registered_arrays(manager: AnnDataManager) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the registered counts, as they are held, and every registered array of ``obs`` and ``obsm`` by its key.

    Codes of categories have the shape ``(n_obs, 1)``, as models of scvi-tools expect them.
    """
    arrays = {
        key: np.asarray(manager.get_from_registry(key))
        for key, place in manager.data_registry.items()
        if key != REGISTRY_KEYS.X_KEY and place["attr_name"] in ("obs", "obsm")
    }
    return manager.get_from_registry(REGISTRY_KEYS.X_KEY), arrays


def registered_categories(manager: AnnDataManager) -> dict[str, tuple[str, ...]]:
    """Names of the categories of each categorical registry key, in the order of their codes."""
    states = {key: field["state_registry"] for key, field in manager.registry["field_registries"].items()}
    mapping = CategoricalObsField.CATEGORICAL_MAPPING_KEY
    return {key: tuple(str(value) for value in state[mapping]) for key, state in states.items() if mapping in state}


def category_registry(
    model_name: str,
    arguments: dict[str, Any],
    known: Mapping[str, Sequence[str]],
    *,
    columns: Mapping[str, str] | None = None,
    record: dict[str, Any] | None = None,
    mudata: bool = False,
) -> dict[str, Any]:
    """Build the registry of a model that was saved: its set-up arguments and the codes of its categories.

    Genes are left out, because they are matched by name when data are attached, and continuous columns, because they
    have no state.

    Parameters
    ----------
    model_name
        Name of the class.
    arguments
        Arguments of ``setup_anndata`` or ``setup_mudata``.
    known
        Names of the categories of each registry key.
    columns
        ``obs`` column of each registry key; ``None`` takes those that ``arguments`` name as ``"{key}_key"``.
    record
        What the model made of the arguments.
    mudata
        The data were set up with ``setup_mudata``.
    """
    return {
        "scvi_version": scvi.__version__,
        "model_name": model_name,
        "setup_args": arguments,
        _RECORD: record,
        "setup_method_name": _method_name(mudata=mudata),
        "field_registries": {
            key: {
                "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{key}"},
                "state_registry": {
                    "categorical_mapping": np.asarray(names, dtype=object),
                    "original_key": arguments[f"{key}_key"] if columns is None else columns[key],
                },
                "summary_stats": {f"n_{key}": len(names)},
            }
            for key, names in known.items()
        },
    }


def _method_name(*, mudata: bool) -> str:
    return "setup_mudata" if mudata else "setup_anndata"
