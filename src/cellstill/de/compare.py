"""Differential expression of any AnnData, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cellstill.de.bayesian import BayesianConfig
from cellstill.de.choice import check_within, choose_groups, chosen_how, require_samples
from cellstill.de.pseudobulk import pseudobulk_de
from cellstill.de.pseudobulk_config import PseudobulkConfig
from cellstill.de.result import DEResult
from cellstill.de.stratified import StratifiedDEResult
from cellstill.errors import InvalidArgumentError, InvalidCountsError

if TYPE_CHECKING:
    from anndata import AnnData


def differential_expression(
    adata: AnnData,
    *,
    groupby: str,
    group1: str,
    group2: str | None = None,
    sample_key: str,
    batch_key: str | None = None,
    within: str | None = None,
    layer: str | None = None,
    how: PseudobulkConfig | None = None,
) -> DEResult | StratifiedDEResult:
    """Compare two groups of the cells of an AnnData by the summed raw counts of their samples.

    Parameters
    ----------
    adata
        Annotated data, in memory or backed by a file, which is read once, in chunks.
    groupby, group1, group2
        Column of ``adata.obs``, and the two of its values to compare; fold changes are log2 of group1 over group2.
        Without ``group2``, group1 is compared with all other cells, ``"rest"``.
    sample_key
        Column that names samples or donors: the replicates, of which each group needs at least two.
    batch_key
        Column of the batches, or ``None`` for no batch term.
    within
        Column, such as cell types, inside each level of which the comparison is made; ``None`` compares all cells at
        once.
    layer
        Layer with raw counts; ``None`` takes ``adata.X``.
    how
        See :class:`~cellstill.de.PseudobulkConfig`.

    Returns
    -------
    Record with a tidy ``table``, the design and the contrast; with ``within``, one for each level
    (:class:`~cellstill.de.StratifiedDEResult`).

    Warns
    -----
    CellstillWarning
        Samples were left out, or levels of ``within`` could not be compared.

    Raises
    ------
    MissingKeyError
        There is no such column or layer.
    InvalidArgumentError
        A group does not exist, has fewer than two samples (the message has their table), or cannot be told from the
        batches; or there is none of these faults in some level of ``within``, but in all of them.
    InvalidCountsError
        The layer does not hold raw counts; the message lists those that do.
    GeneMismatchError
        Names of genes occur twice.

    See Also
    --------
    cellstill.de.pseudobulk_de : The same from matrices, with all that it assumes.
    """
    from cellstill.data.annotations import is_mudata
    from cellstill.data.counts import get_layer
    from cellstill.data.genes import check_unique_genes

    if is_mudata(adata):
        raise InvalidArgumentError(f"adata is a MuData. Give one modality, of: {', '.join(map(repr, adata.mod))}.")
    config = chosen_how(how)
    if isinstance(config, BayesianConfig):
        raise InvalidArgumentError(
            "how is a BayesianConfig, which needs the posterior of a trained model: call differential_expression of "
            "a Distiller or of a model of vi. Counts alone are compared with a PseudobulkConfig."
        )
    check_unique_genes(adata.var_names)
    check_within(adata.obs, within, groupby=groupby, sample_key=sample_key)
    obs, contrast = choose_groups(adata.obs, groupby, group1, group2)
    counts = get_layer(adata, layer)
    _check_is_counts(adata, layer)
    return pseudobulk_de(
        counts,
        obs,
        adata.var_names,
        groupby=contrast.column,
        group1=contrast.group1,
        group2=contrast.group2,
        sample_key=require_samples(sample_key),
        batch_key=batch_key,
        within=within,
        config=config,
    )


def _check_is_counts(adata: AnnData, layer: str | None) -> None:
    """Look at the first cells only, to name the right layer; the sums look at all that they add up."""
    from cellstill.data.counts import count_layers, fault_of_first, get_layer, looks_like_counts

    fault = fault_of_first(get_layer(adata, layer))
    if not fault:
        return
    places = ["layer=None (adata.X)" if place is None else f"layer={place!r}" for place in count_layers(adata)]
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if places:
        remedy = f"These look like counts: {', '.join(places)}."
    elif adata.raw is not None and looks_like_counts(adata.raw.X):
        remedy = "adata.raw looks like counts: give adata.raw.to_adata()."
    else:
        remedy = "No other layer looks like counts: bring raw counts."
    raise InvalidCountsError(f"{where} holds {fault}: no raw counts, which are finite, non-negative integers. {remedy}")
