"""Training, validation and test cells for a Lightning ``Trainer``, such as that of scvi-tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from lightning.pytorch import LightningDataModule

from cellstill.data.counts import as_csr
from cellstill.data.loader import CountsLoader, split_cells
from cellstill.errors import InvalidArgumentError
from cellstill.nn.sparse import CSRRows

if TYPE_CHECKING:
    from scvi.data import AnnDataManager


class CountsDataModule(LightningDataModule):
    """Split cells, and load them as minibatches of CSR rows.

    A model of scvi-tools' ``UnsupervisedTrainingMixin`` whose module reads CSR rows uses it with
    ``_data_splitter_cls = CountsDataModule.from_manager``; a ``TrainRunner`` takes it as ``data_splitter``. Models of
    scvi-tools itself read dense counts: ``functools.partial(CountsDataModule.from_manager, dense=True)``.

    Parameters
    ----------
    counts, per_cell
        See :class:`~cellstill.data.CountsLoader`.
    train_size, validation_size
        Shares of the cells (:func:`~cellstill.data.split_cells`); the rest are for testing. ``None`` validates on all
        that is not trained on.
    splits
        Positions of the training, validation and test cells, instead of shares.
    batch_size
        Cells in a minibatch of training.
    evaluation_batch_size
        Cells in one of validation and test; larger is faster, and changes no result. ``None`` is ``batch_size``.
    seed
        Seeds split and shuffling.
    prefetch, device
        See :class:`~cellstill.data.CountsLoader`.
    dense
        Give a ``Trainer`` the counts of a minibatch as a dense tensor under ``"X"`` in place of CSR rows, which is how
        modules of scvi-tools read them. They are made dense on the device of training, a minibatch at a time.

    Attributes
    ----------
    train_idx, val_idx, test_idx
        Sorted positions of the cells of each part.
    n_train, n_val
        Number of training and validation cells.

    Raises
    ------
    InvalidArgumentError
        The shares are impossible, a cell is in two parts of ``splits``, or nothing is left to train on.
    """

    def __init__(
        self,
        counts: sp.csr_matrix,
        per_cell: Mapping[str, np.ndarray] | None = None,
        *,
        train_size: float = 0.9,
        validation_size: float | None = None,
        splits: Sequence[np.ndarray] | None = None,
        batch_size: int = 128,
        evaluation_batch_size: int | None = None,
        seed: int = 0,
        prefetch: int | None = None,
        device: str | torch.device | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.counts = counts
        self.per_cell = per_cell
        if splits is None:
            splits = split_cells(counts.shape[0], train_size, validation_size, seed=seed)
        self.train_idx, self.val_idx, self.test_idx = _check_splits(splits, counts.shape[0])
        self.batch_size = batch_size
        self.evaluation_batch_size = batch_size if evaluation_batch_size is None else evaluation_batch_size
        self.seed = seed
        self._loading: dict[str, Any] = {"prefetch": prefetch, "device": device}

    @classmethod
    def from_manager(
        cls,
        adata_manager: AnnDataManager,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        distributed_sampler: bool = False,
        load_sparse_tensor: bool = False,
        external_indexing: Sequence[np.ndarray] | None = None,
        **kwargs: Any,
    ) -> CountsDataModule:
        """Load what is registered with scvi-tools; the signature is that of its ``DataSplitter``.

        Minibatches hold the CSR rows of the registered counts, and every other registered ``obs`` and ``obsm`` entry
        under its registry key and in its shape there, codes as int64 of shape ``(n, 1)``.

        Parameters
        ----------
        adata_manager
            Manager of the data.
        train_size, validation_size
            As in the constructor; ``None`` is 0.9, and the rest.
        shuffle_set_split
            Split at random; otherwise in the order of the data, training cells first.
        distributed_sampler
            Has to be false: one device loads all cells.
        load_sparse_tensor
            Without effect: rows are sparse throughout.
        external_indexing
            ``splits`` of the constructor; parts that are left out are empty.
        **kwargs
            Further arguments of the constructor: such as ``dense=True``, for a module of scvi-tools itself.
        """
        from cellstill._compat.scvi import registered_arrays

        if distributed_sampler:
            raise InvalidArgumentError("distributed_sampler=True is not supported: train on one device.")
        counts, per_cell = registered_arrays(adata_manager)
        n_obs = counts.shape[0]
        sizes = (0.9 if train_size is None else train_size, validation_size)
        splits = external_indexing
        if splits is not None:
            splits = [*map(np.asarray, splits), *[np.empty(0, dtype=np.int64)] * 3][:3]
        elif not shuffle_set_split:
            lengths = [len(part) for part in split_cells(n_obs, *sizes)]
            splits = np.split(np.arange(n_obs), np.cumsum(lengths[:2]))
        return cls(as_csr(counts), per_cell, train_size=sizes[0], validation_size=sizes[1], splits=splits, **kwargs)

    @property
    def n_train(self) -> int:
        """Number of training cells."""
        return len(self.train_idx)

    @property
    def n_val(self) -> int:
        """Number of validation cells."""
        return len(self.val_idx)

    def train_dataloader(self) -> CountsLoader:
        """Shuffled minibatches of the training cells."""
        return self._loader(self.train_idx, self.batch_size, shuffle=True)

    def val_dataloader(self) -> CountsLoader | list[Any]:
        """Minibatches of the validation cells, in order; an empty list if there are none."""
        return self._loader(self.val_idx, self.evaluation_batch_size) if self.n_val else []

    def test_dataloader(self) -> CountsLoader | list[Any]:
        """Minibatches of the test cells, in order; an empty list if there are none."""
        return self._loader(self.test_idx, self.evaluation_batch_size) if len(self.test_idx) else []

    def on_after_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        """Make the counts dense, if that was asked for."""
        if not self.dense:
            return batch
        others = {name: values for name, values in batch.items() if name not in ("data", "indices", "indptr")}
        # First, because Lightning takes the size of a minibatch from its first tensor.
        return {"X": CSRRows.of(batch, self.counts.shape[1]).to_dense(), **others}

    def _loader(self, cells: np.ndarray, batch_size: int, *, shuffle: bool = False) -> CountsLoader:
        return CountsLoader(
            self.counts,
            self.per_cell,
            indices=cells,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **self._loading,
        )


def _check_splits(splits: Sequence[np.ndarray], n_obs: int) -> tuple[np.ndarray, ...]:
    if len(splits) != 3:
        raise InvalidArgumentError(f"splits has {len(splits)} parts; give training, validation and test cells.")
    parts = tuple(np.sort(np.asarray(part, dtype=np.int64)) for part in splits)
    cells, times = np.unique(np.concatenate(parts), return_counts=True)
    if len(cells) and not 0 <= cells[0] <= cells[-1] < n_obs:
        wrong = cells[0] if cells[0] < 0 else cells[-1]
        raise InvalidArgumentError(f"splits holds {wrong}; the {n_obs} cells have positions 0 to {n_obs - 1}.")
    if (times > 1).any():
        raise InvalidArgumentError(f"splits holds the cell {cells[times > 1][0]} twice. Each may be in one part only.")
    if len(parts[0]) == 0:
        raise InvalidArgumentError("splits has no cell to train on.")
    return parts
