from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellstill.data.loader import CountsLoader, split_cells
from cellstill.errors import InvalidArgumentError


@pytest.fixture
def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(0.5, size=(101, 20)).astype(np.int64))


def dense(batch, n_vars: int = 20) -> np.ndarray:
    return sp.csr_matrix(
        (batch["data"].numpy(), batch["indices"].numpy(), batch["indptr"].numpy()),
        shape=(len(batch["indptr"]) - 1, n_vars),
    ).toarray()


@pytest.mark.parametrize("batch_size", [1, 7, 10, 50, 100, 101, 500])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_cell_comes_once_an_epoch_with_its_own_counts_and_codes(counts, batch_size, shuffle):
    codes = np.arange(101, dtype=np.int8)
    loader = CountsLoader(counts, {"batch": codes}, batch_size=batch_size, shuffle=shuffle)
    batches = list(loader)
    assert len(batches) == len(loader)
    rows = np.concatenate([batch["rows"].numpy() for batch in batches])
    np.testing.assert_array_equal(np.sort(rows), np.arange(101))
    np.testing.assert_array_equal(np.concatenate([batch["batch"].numpy() for batch in batches]), codes[rows])
    np.testing.assert_array_equal(np.vstack([dense(batch) for batch in batches]), counts.toarray()[rows])
    assert (not shuffle) == np.array_equal(rows, np.arange(101))


@pytest.mark.parametrize("batch_size", [2, 10, 50, 100])
def test_no_last_batch_of_one_cell(counts, batch_size):
    sizes = [len(batch["rows"]) for batch in CountsLoader(counts, batch_size=batch_size)]
    assert min(sizes) > 1
    assert sum(sizes) == 101


def test_epochs_differ_and_are_reproducible(counts):
    def epochs(seed: int) -> list[np.ndarray]:
        loader = CountsLoader(counts, shuffle=True, batch_size=10, seed=seed)
        return [np.concatenate([batch["rows"].numpy() for batch in loader]) for _ in range(3)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    # The order of an epoch depends on (seed, epoch) only, so a resumed run meets the same batches.
    resumed = CountsLoader(counts, shuffle=True, batch_size=10, seed=1)
    resumed.epoch = 2
    np.testing.assert_array_equal(np.concatenate([batch["rows"].numpy() for batch in resumed]), first[2])


def test_only_the_chosen_cells_are_visited(counts):
    chosen = np.array([5, 80, 3])
    batch = next(iter(CountsLoader(counts, indices=chosen)))
    np.testing.assert_array_equal(batch["rows"], chosen)
    np.testing.assert_array_equal(dense(batch), counts.toarray()[chosen])


def test_integers_stay_integers_and_the_rest_are_float32(counts):
    batch = next(iter(CountsLoader(counts, {"code": np.zeros(101, np.int16), "z": np.zeros((101, 2))})))
    assert {name: str(tensor.dtype) for name, tensor in batch.items()} == {
        "data": "torch.float32",
        "indices": "torch.int64",
        "indptr": "torch.int64",
        "rows": "torch.int64",
        "code": "torch.int64",
        "z": "torch.float32",
    }


def test_bad_arguments_are_named(counts):
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        CountsLoader(counts, batch_size=0)
    with pytest.raises(InvalidArgumentError, match="indices is empty"):
        CountsLoader(counts, indices=np.array([], dtype=int))
    with pytest.raises(InvalidArgumentError, match=r"per_cell\['batch'\] has 3 rows for 101 cells"):
        CountsLoader(counts, {"batch": np.zeros(3)})


@pytest.mark.parametrize(
    ("shares", "sizes"),
    [((0.9, None), (91, 10, 0)), ((0.8, 0.1), (81, 10, 10)), ((1.0, None), (101, 0, 0)), ((0.5, 0.0), (51, 0, 50))],
)
def test_splits_are_disjoint_and_complete(shares, sizes):
    parts = split_cells(101, *shares, seed=3)
    assert tuple(map(len, parts)) == sizes
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(101))
    np.testing.assert_array_equal(parts[0], split_cells(101, *shares, seed=3)[0])


@pytest.mark.parametrize("shares", [(0.0, None), (1.1, None), (0.9, 0.2), (0.5, -0.1)])
def test_impossible_shares(shares):
    with pytest.raises(InvalidArgumentError, match="train_size"):
        split_cells(100, *shares)
