from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from cellstill.data import resident
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


def with_integers(counts: sp.csr_matrix, dtype: type) -> sp.csr_matrix:
    """The same matrix, its indices in another integer type, which the constructor would narrow."""
    counts = counts.copy()
    counts.indices, counts.indptr = counts.indices.astype(dtype), counts.indptr.astype(dtype)
    return counts


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


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_integers_stay_integers_and_the_rest_are_float32(counts, integer, device):
    counts = with_integers(counts, integer)
    per_cell = {"code": np.zeros(101, np.int16), "z": np.zeros((101, 2))}
    batch = next(iter(CountsLoader(counts, per_cell, device=device)))
    assert {name: str(tensor.dtype) for name, tensor in batch.items()} == {
        "data": "torch.float32",
        "indices": f"torch.{np.dtype(integer)}",
        "indptr": f"torch.{np.dtype(integer)}",
        "rows": "torch.int64",
        "code": "torch.int64",
        "z": "torch.float32",
    }


def test_bad_arguments_are_named(counts):
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        CountsLoader(counts, batch_size=0)
    with pytest.raises(InvalidArgumentError, match="indices is empty"):
        CountsLoader(counts, indices=np.array([], dtype=int))
    with pytest.raises(InvalidArgumentError, match="prefetch=-1"):
        CountsLoader(counts, prefetch=-1)
    with pytest.raises(InvalidArgumentError, match="indices holds 101; the 101 cells have positions 0 to 100"):
        CountsLoader(counts, indices=np.array([3, 101]))
    with pytest.raises(InvalidArgumentError, match="indices holds -1"):
        CountsLoader(counts).gather(np.array([-1]))
    with pytest.raises(InvalidArgumentError, match=r"mask of shape \(100,\); 101 cells"):
        CountsLoader(counts, indices=np.ones(100, dtype=bool))
    with pytest.raises(InvalidArgumentError, match=r"per_cell\['batch'\] has 3 rows for 101 cells"):
        CountsLoader(counts, {"batch": np.zeros(3)})
    with pytest.raises(InvalidArgumentError, match="per_cell names 'data', which is an entry of every minibatch"):
        CountsLoader(counts, {"data": np.zeros(101)})
    with pytest.raises(InvalidArgumentError, match=r"per_cell\['type'\] has dtype object"):
        CountsLoader(counts, {"type": np.array(["a"] * 101, dtype=object)})
    for wrong in (counts.toarray(), counts.tocsc(), AnnData(counts)):
        with pytest.raises(InvalidArgumentError, match=f"counts is of type {type(wrong).__name__}"):
            CountsLoader(wrong)
    for setting in ({"batch_size": 2.5}, {"seed": -1}, {"prefetch": 1.5}):
        with pytest.raises(InvalidArgumentError, match=next(iter(setting))):
            CountsLoader(counts, **setting)
    with pytest.raises(InvalidArgumentError, match="indices has dtype <U1"):
        CountsLoader(counts, indices=["a"])
    with pytest.raises(InvalidArgumentError, match="device='foo' is not known"):
        CountsLoader(counts, device="foo")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgumentError, match="torch finds no CUDA device"):
            CountsLoader(counts, device="cuda")


def test_a_mask_chooses_cells(counts):
    mask = np.arange(101) % 3 == 0
    batch = next(iter(CountsLoader(counts, indices=mask)))
    np.testing.assert_array_equal(batch["rows"], np.flatnonzero(mask))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name, tensor in batch.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


PER_CELL = {"code": np.arange(101, dtype=np.int16), "z": np.random.default_rng(1).normal(size=(101, 2))}


@pytest.mark.parametrize("how", [{"prefetch": 1}, {"prefetch": 3}, {"prefetch": 50}, {"device": "cpu"}])
@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
def test_prefetched_and_resident_batches_are_those_of_the_plain_loader(counts, how, integer, dtype):
    counts = with_integers(counts.astype(dtype), integer)
    settings = {"batch_size": 10, "shuffle": True, "seed": 4, "indices": np.arange(3, 90)}
    plain, other = (CountsLoader(counts, PER_CELL, **settings, **extra) for extra in ({"prefetch": 0}, how))
    for _ in range(2):
        assert_same(list(other), list(plain))
    assert_same([other.gather(np.array([5, 5, 0]))], [plain.gather(np.array([5, 5, 0]))])


def test_counts_that_do_not_fit_stay_on_the_host_and_yield_the_same(counts, monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 2 * resident.n_bytes(counts) - 1)
    loader = CountsLoader(counts, PER_CELL, batch_size=10, device="cpu")
    assert not loader.is_resident
    assert_same(list(loader), list(CountsLoader(counts, PER_CELL, batch_size=10)))
    monkeypatch.setattr(resident, "free_memory", lambda device: 2 * resident.n_bytes(counts))
    assert loader.to("cpu").is_resident
    assert not loader.to(None).is_resident


def test_loaders_of_the_same_counts_share_what_lives_on_the_device(counts):
    first, second = (CountsLoader(counts, indices=[i], device="cpu") for i in range(2))
    assert first._resident is second._resident
    assert first._resident is not CountsLoader(counts.copy(), device="cpu")._resident
    alive = weakref.ref(first._resident)
    del first, second
    gc.collect()
    assert alive() is None


def test_counts_that_cannot_be_written_to_are_read(counts):
    counts = counts.astype(np.float32)
    counts.data.setflags(write=False)
    for device in (None, "cpu"):
        np.testing.assert_array_equal(dense(next(iter(CountsLoader(counts, device=device)))), counts.toarray()[:128])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"seed": 1}, False),
        ({"batch_size": 11}, False),
        ({"indices": np.arange(100)}, False),
        ({"shuffle": False}, False),
        ({"prefetch": 2}, True),
    ],
)
def test_a_fingerprint_tells_what_is_yielded(counts, change, same):
    settings = {"batch_size": 10, "shuffle": True}
    first = CountsLoader(counts, PER_CELL, **settings).fingerprint()
    assert (CountsLoader(counts.copy(), PER_CELL, **{**settings, **change}).fingerprint() == first) is same


def test_a_fingerprint_sees_every_count_and_every_value(counts):
    first = CountsLoader(counts, PER_CELL).fingerprint()
    counts.data[-1] += 1
    assert CountsLoader(counts, PER_CELL).fingerprint() != first
    counts.data[-1] -= 1
    assert CountsLoader(counts, {**PER_CELL, "code": PER_CELL["code"] + np.int16(1)}).fingerprint() != first


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
