"""Everything we touch of scvi-tools that is private or drifts between releases: its registry and its model base."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.pretty  # noqa: F401  (scvi-tools 1.4 uses it in view_anndata_setup without importing it)
import scvi
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField
from scvi.model.base import BaseModelClass
from scvi.model.base._base_model import BaseModelMetaClass

if TYPE_CHECKING:
    from anndata import AnnData


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

    def __init__(self, adata: AnnData | None = None, registry: dict[str, Any] | None = None) -> None:
        super().__init__(adata, registry)
        # The per-instance store would keep the data of a deleted model.
        weakref.finalize(self, self._per_instance_manager_store.pop, self.id, None)

    @classmethod
    def register_manager(cls, adata_manager: AnnDataManager) -> None:
        """Register a manager for as long as its AnnData lives."""
        adata_manager.adata.__dict__.setdefault("_cellstill_managers", {})[cls.__name__] = adata_manager
        super().register_manager(adata_manager)


def register(
    cls: type[RegisteredModel],
    adata: AnnData,
    *,
    layer: str | None,
    categorical: dict[str, str],
    setup_args: dict[str, Any],
    source_registry: dict[str, Any] | None = None,
) -> None:
    """Register a count layer and categorical ``obs`` columns of ``adata`` with a model class.

    Parameters
    ----------
    cls
        Model class.
    adata
        Data; not a view.
    layer
        Layer with counts, or ``None`` for ``X``.
    categorical
        ``obs`` column of each registry key, such as ``"batch"``.
    setup_args
        Arguments of ``setup_anndata``, kept in the registry.
    source_registry
        Registry whose category codes are to be kept, from :func:`category_registry`.
    """
    fields = [LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False)]
    fields += [CategoricalObsField(key, column) for key, column in categorical.items()]
    manager = AnnDataManager(
        fields=fields,
        setup_method_args={
            "model_name": cls.__name__,
            "setup_method_name": "setup_anndata",
            "setup_args": setup_args,
        },
    )
    if source_registry is not None:
        source_registry = _with_values_of(source_registry, adata, categorical)
    with warnings.catch_warnings():
        # Small batches are checked where they matter.
        warnings.filterwarnings("ignore", message="Category .* has fewer than 3 cells")
        manager.register_fields(adata, source_registry)
    cls.register_manager(manager)


def setup_args(registry: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which the data were set up."""
    return dict(registry["setup_args"])


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


def category_registry(model_name: str, arguments: dict[str, Any], known: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Build the registry of a model that was saved: its set-up arguments and the codes of its categories.

    Genes are left out, because they are matched by name when data are attached.
    """
    return {
        "scvi_version": scvi.__version__,
        "model_name": model_name,
        "setup_args": arguments,
        "setup_method_name": "setup_anndata",
        "field_registries": {
            key: {
                "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{key}"},
                "state_registry": {
                    "categorical_mapping": np.asarray(names, dtype=object),
                    "original_key": arguments[f"{key}_key"],
                },
                "summary_stats": {f"n_{key}": len(names)},
            }
            for key, names in known.items()
        },
    }


def _with_values_of(registry: dict[str, Any], adata: AnnData, categorical: dict[str, str]) -> dict[str, Any]:
    """Turn saved names back into values of the columns they are looked for in, which need not be strings."""
    cast: dict[str, Callable[[str], Any]] = {"i": int, "u": int, "f": float, "b": "True".__eq__}
    registry = deepcopy(registry)
    for key, column in categorical.items():
        kind = adata.obs[column].astype("category").cat.categories.dtype.kind
        state = registry["field_registries"][key]["state_registry"]
        state["categorical_mapping"] = np.asarray(
            [cast.get(kind, str)(name) for name in state["categorical_mapping"]], dtype=object
        )
    return registry
