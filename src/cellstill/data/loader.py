"""Minibatches of cells as CSR rows and integer codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.errors import InvalidArgumentError


class CountsLoader:
    """Iterate over cells in minibatches of CSR rows.

    Each minibatch is a plain dictionary of tensors, so that Lightning moves it between devices by itself:
    ``data`` (float32, non-zeros), ``indices`` (int64, their genes), ``indptr`` (int64, ``n + 1``), ``rows`` (int64,
    the cells' positions in ``counts``), and one entry for each of ``per_cell``.

    Parameters
    ----------
    counts
        CSR matrix, shape ``(n_obs, n_vars)``, any numeric dtype. Never copied, never made dense.
    per_cell
        Arrays whose first axis is the cells: category codes, targets, cached embeddings. Rows are gathered with the
        counts. Integer arrays become int64, others float32.
    indices
        Cells to visit; ``None`` visits all of them.
    batch_size
        Cells in a minibatch. Larger batches use the machine better and take fewer, smoother steps.
        A last batch of a single cell is joined to the one before it, because nothing can be normalised over it.
    shuffle
        Visit the cells in a new random order in each epoch, each exactly once; otherwise in the order given.
    seed
        Epoch ``e`` is shuffled by the generator seeded with ``(seed, e)``: the order does not depend on history.

    Raises
    ------
    InvalidArgumentError
        ``batch_size`` is below 1, there is no cell to visit, or an array of ``per_cell`` has another length.
    """

    def __init__(
        self,
        counts: sp.csr_matrix,
        per_cell: Mapping[str, np.ndarray] | None = None,
        *,
        indices: np.ndarray | None = None,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InvalidArgumentError(f"batch_size={batch_size} is below 1.")
        n_obs = counts.shape[0]
        self.cells = np.arange(n_obs) if indices is None else np.asarray(indices, dtype=np.int64)
        if self.cells.size == 0:
            raise InvalidArgumentError("indices is empty: there is no cell to visit.")
        for name, values in (per_cell or {}).items():
            if len(values) != n_obs:
                raise InvalidArgumentError(f"per_cell[{name!r}] has {len(values)} rows for {n_obs} cells.")
        self.counts = counts
        self.per_cell = dict(per_cell or {})
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._stops = np.arange(batch_size, len(self.cells) + batch_size, batch_size)
        self._stops[-1] = len(self.cells)
        if batch_size > 1 and len(self._stops) > 1 and self._stops[-1] - self._stops[-2] == 1:
            self._stops = np.delete(self._stops, -2)

    def __len__(self) -> int:
        return len(self._stops)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = self.cells
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
            self.epoch += 1
        for start, stop in zip([0, *self._stops[:-1]], self._stops, strict=True):
            yield self.gather(order[start:stop])

    def gather(self, cells: np.ndarray) -> dict[str, torch.Tensor]:
        """Build the minibatch of the given cells, in the order given."""
        rows = self.counts[cells]
        batch = {
            "data": _tensor(rows.data.astype(np.float32, copy=False)),
            "indices": _tensor(rows.indices.astype(np.int64, copy=False)),
            "indptr": _tensor(rows.indptr.astype(np.int64, copy=False)),
            "rows": _tensor(cells),
        }
        for name, values in self.per_cell.items():
            dtype = np.int64 if values.dtype.kind in "iub" else np.float32
            batch[name] = _tensor(values[cells].astype(dtype, copy=False))
        return batch


def split_cells(
    n_obs: int, train_size: float = 0.9, validation_size: float | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split cells at random into training, validation and test.

    Parameters
    ----------
    n_obs
        Number of cells.
    train_size
        Share of the cells to train on, above 0 and at most 1.
    validation_size
        Share kept for early stopping. ``None`` takes all the rest, so there are no test cells.
    seed
        Seed of the permutation.

    Returns
    -------
    Sorted positions of the training, validation and test cells: every cell in exactly one of them.
    """
    rest = 1 - train_size if validation_size is None else validation_size
    if not 0 < train_size <= 1 or rest < 0 or train_size + rest > 1 + 1e-9:
        raise InvalidArgumentError(
            f"train_size={train_size} and validation_size={validation_size} must be shares, "
            "train_size above 0 and both together at most 1."
        )
    n_train = int(np.ceil(train_size * n_obs - 1e-9))
    n_validation = n_obs - n_train if validation_size is None else int(np.floor(rest * n_obs + 1e-9))
    order = np.random.default_rng(seed).permutation(n_obs)
    parts = np.split(order, [n_train, min(n_train + n_validation, n_obs)])
    return np.sort(parts[0]), np.sort(parts[1]), np.sort(parts[2])


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
