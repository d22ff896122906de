"""New cells in a trained latent space: labels of their neighbours, and how far they are from anything known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cellstill.data.loader import CountsLoader
from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted
from cellstill.distill.scaling import factors_of
from cellstill.distill.student import NewBatches
from cellstill.train.fit import fit, seeded


@dataclass(frozen=True)
class QueryMapping:
    """Where new cells lie.

    Attributes
    ----------
    latent
        Student latent, in the teacher's coordinates, shape ``(n_obs, n_latent)``.
    labels
        Transferred labels and their confidence, indexed by cell: columns ``label`` (the largest share of the votes of
        the nearest training cells, nearer ones weighing more) and ``confidence`` (that share, 0 to 1); ``None`` if the
        model was set up without ``labels_key``.
    out_of_reference
        Share of the held-out cells of training whose counts the model explains better than this cell's, shape
        ``(n_obs,)``. Near 1: unlike anything in the reference. Cells like those of training are uniform over 0 to 1.
        All cells of an unseen batch score high until its embedding is learned (``fine_tune_batches``); compare them
        with one another. ``None`` if the model has covariates that the new cells lack, or levels that it does not know.
    unseen_batches
        Batches of the new cells for which the model had no embedding.
    gene_overlap
        Share of the model's genes that the new data have.
    """

    latent: np.ndarray
    labels: pd.DataFrame | None
    out_of_reference: np.ndarray | None
    unseen_batches: tuple[str, ...]
    gene_overlap: float


def map_cells(fitted: Fitted, cells: Cells, latent: np.ndarray, unseen: list[str], *, n_neighbors: int) -> QueryMapping:
    """Compare cells, with their standardised latent, with the training cells."""
    score = None
    if fitted.design.knows(cells.obs):
        score = np.searchsorted(fitted.usual_misfit, fitted.misfit(cells, latent)) / len(fitted.usual_misfit)
    coordinates = fitted.to_teacher(latent)
    labels = None if fitted.labels is None else _vote(fitted, coordinates, cells.obs.index, n_neighbors)
    return QueryMapping(coordinates, labels, score, tuple(unseen), cells.gene_overlap)


def _vote(fitted: Fitted, coordinates: np.ndarray, index: pd.Index, n_neighbors: int) -> pd.DataFrame:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=n_neighbors).fit(fitted.student_latent)
    distances, neighbours = search.kneighbors(coordinates)
    codes, names = pd.factorize(np.asarray(fitted.labels, dtype=object), sort=True)
    votes = np.zeros((len(coordinates), len(names)))
    np.add.at(votes, (np.arange(len(votes))[:, None], codes[neighbours]), 1 / np.maximum(distances, 1e-12))
    votes /= votes.sum(axis=1, keepdims=True)
    return pd.DataFrame({"label": names[votes.argmax(axis=1)], "confidence": votes.max(axis=1)}, index=index)


def learn_batches(
    fitted: Fitted,
    cells: Cells,
    latent: np.ndarray,
    names: np.ndarray,
    unseen: list[str],
    *,
    n_epochs: int,
    lr: float,
    seed: int,
) -> Cells:
    """Learn an embedding of each unseen batch from its cells, and add it to ``fitted``; return the cells with its code.

    With it go factors of its genes, if the model scales counts and the batch has cells enough.
    """
    if not unseen or fitted.decoder.batches.embedding_dim == 0:
        return cells
    wanted = np.flatnonzero(np.isin(names, unseen))
    codes = pd.Index(unseen).get_indexer(pd.Index(names[wanted]))
    module = NewBatches(fitted.decoder, len(unseen))
    subset = cells[wanted]
    levels, continuous = fitted.design.codes(subset.obs)
    loader = CountsLoader(
        subset.counts,
        {"z": latent[wanted], "batch": codes, "levels": levels, "continuous": continuous},
        shuffle=True,
        seed=seed,
    )
    accelerator = "gpu" if fitted.device.type == "cuda" else "cpu"
    with seeded(seed, accelerator):
        fit(module, loader, max_epochs=n_epochs, lr=lr, accelerator=accelerator)
    vectors = module.vectors.detach().cpu().numpy()
    fitted.query_batches.update(zip(unseen, vectors, strict=True))
    for name in unseen:
        factors = factors_of(fitted, cells[names == name])
        if factors is not None:
            fitted.query_factors[name] = factors
    return replace(cells, batch=pd.Series(names).map(fitted.batch_codes).to_numpy(dtype=np.int64))
