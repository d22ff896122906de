"""The protocol of encoders that were trained elsewhere, and the one way to call anything that embeds cells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.data.counts import iter_rows
from cellstill.errors import InvalidArgumentError, check_key

if TYPE_CHECKING:
    from anndata import AnnData


@runtime_checkable
class FoundationEncoder(Protocol):
    """Anything that embeds cells: a model of ours, one of scvi-tools, or an adapter of a published checkpoint."""

    def get_latent_representation(self, adata: AnnData) -> np.ndarray:
        """Embed cells; finite, shape ``(n_obs, n_latent)``, in the order of ``adata``."""
        ...


def embed(source: str | FoundationEncoder, adata: AnnData, argument: str = "latent") -> np.ndarray:
    """Embed cells with an encoder, or read an embedding that is there.

    Parameters
    ----------
    source
        Encoder, or key of ``adata.obsm``.
    adata
        Cells.
    argument
        Name of the argument that gave ``source``, for messages.

    Returns
    -------
    float32, shape ``(n_obs, n_latent)``.

    Raises
    ------
    MissingKeyError
        There is no such key.
    InvalidArgumentError
        ``source`` embeds nothing or takes no cells, changes ``X`` or a layer of the cells in place, or what it gives is
        not a finite matrix with a row for each cell, or the same for all cells.
    """
    found: Any
    if isinstance(source, str):
        check_key(argument, source, "adata.obsm", adata.obsm.keys())
        found, name = adata.obsm[source], f"adata.obsm[{source!r}]"
    elif isinstance(source, FoundationEncoder) and not isinstance(source, type):
        name = f"{type(source).__name__}.get_latent_representation"
        if not accepts(source.get_latent_representation, adata):
            raise InvalidArgumentError(
                f"{argument}: {name}{inspect.signature(source.get_latent_representation)} cannot be called with the "
                "cells to embed. Give an encoder with get_latent_representation(adata)."
            )
        before = _totals(adata)
        found = source.get_latent_representation(adata)
        after = _totals(adata)
        if changed := [place for place, total in before.items() if after.get(place) != total]:
            raise InvalidArgumentError(
                f"{argument}: {name} changed {', '.join(changed)} of the cells it was given. Let it work on a copy, "
                "adata.copy(), and read the data anew."
            )
    else:
        raise InvalidArgumentError(
            f"{argument}={source!r} embeds no cells. Give a key of adata.obsm, or a trained model or encoder with "
            "get_latent_representation(adata)."
        )
    try:
        embedding = as_float32(found)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{argument}: {name} holds no numbers ({error}). Give a matrix of numbers."
        ) from error
    is_matrix = embedding.ndim == 2 and embedding.shape[0] == adata.n_obs and embedding.shape[1] > 0
    n_bad = int((~np.isfinite(embedding)).sum())
    if not is_matrix or n_bad:
        fault = f"{n_bad} values that are not finite" if is_matrix else f"shape {embedding.shape}"
        raise InvalidArgumentError(
            f"{argument}: {name} has {fault}. A finite matrix with a row for each of the {adata.n_obs} cells is needed."
        )
    if adata.n_obs > 1 and (embedding == embedding[0]).all():
        raise InvalidArgumentError(
            f"{argument}: {name} is the same for all {adata.n_obs} cells, so that it tells nothing. Give another."
        )
    return embedding


def _totals(adata: AnnData) -> dict[str, str]:
    """Sum of ``X`` and of each layer as text, as which NaN is equal to itself."""
    places: dict[str, Any] = {} if adata.X is None else {"adata.X": adata.X}
    places |= {f"adata.layers[{name!r}]": layer for name, layer in adata.layers.items()}
    return {
        name: repr(float(sum(rows.sum(dtype=np.float64) for _, rows in iter_rows(matrix))))
        for name, matrix in places.items()
    }


def as_float32(found: Any) -> np.ndarray:
    """An array, a table, a sparse matrix or a tensor, on any device and with or without gradient, as dense float32."""
    if isinstance(found, torch.Tensor):
        return found.float().numpy(force=True)
    return np.asarray(found.toarray() if sp.issparse(found) else found, dtype=np.float32)


def accepts(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function can be called with so many arguments; one that does not tell is taken to."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
