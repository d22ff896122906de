from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.data import CountsLoader, resident
from cellstill.data.modalities import ModalityLoader
from cellstill.errors import InvalidArgumentError

N_VARS = {"atac": 30, "rna": 20}
PER_CELL = {"code": np.arange(101, dtype=np.int16), "atac/present": np.arange(101) % 4 > 0}


def counts_of(dtype=np.int64):
    """Two modalities; a quarter of the cells have no row in one of them."""
    rng = np.random.default_rng(0)
    made = {name: rng.poisson(0.5, size=(101, n)) for name, n in N_VARS.items()}
    made["atac"][::4] = 0
    return {name: sp.csr_matrix(values.astype(dtype)) for name, values in made.items()}


@pytest.fixture
def counts():
    return counts_of()


def dense(batch, name):
    parts = [batch[f"{name}/{part}"].numpy() for part in ("data", "indices", "indptr")]
    return sp.csr_matrix(tuple(parts), shape=(len(batch["rows"]), N_VARS[name])).toarray()


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert list(batch) == list(other)
        for name, tensor in batch.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


SETTINGS = {"batch_size": 10, "shuffle": True, "seed": 4, "indices": np.arange(3, 90)}
EACH_PLACE = pytest.mark.parametrize(
    "how", [{"prefetch": 0}, {"prefetch": 3}, {"device": "cpu"}], ids=["plain", "prefetched", "resident"]
)


@EACH_PLACE
def test_batches_hold_the_rows_of_every_modality_in_the_order_of_the_plain_loader(counts, how):
    loader, plain = (
        ModalityLoader(counts, PER_CELL, **SETTINGS, **how),
        CountsLoader(counts["rna"], PER_CELL, **SETTINGS),
    )
    for _ in range(2):
        batches, expected = list(loader), list(plain)
        assert len(batches) == len(loader) == len(plain)
        for batch, other in zip(batches, expected, strict=True):
            rows = batch["rows"].numpy()
            np.testing.assert_array_equal(rows, other["rows"])
            for name, matrix in counts.items():
                np.testing.assert_array_equal(dense(batch, name), matrix.toarray()[rows])
            for name in ("code", "atac/present"):
                assert torch.equal(batch[name], other[name])
            for part in ("data", "indices", "indptr"):
                assert torch.equal(batch[f"rna/{part}"], other[part])
    assert loader.epoch == plain.epoch == 2


@EACH_PLACE
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_shares_of_processes_are_those_of_the_plain_loader(counts, how, n_ranks):
    for rank in range(n_ranks):
        loader, plain = ModalityLoader(counts, **SETTINGS, **how), CountsLoader(counts["rna"], **SETTINGS)
        shares, expected = list(loader.shares(rank, n_ranks)), list(plain.shares(rank, n_ranks))
        assert len(shares) == len(expected)
        for share, other in zip(shares, expected, strict=True):
            assert (share.n, share.n_whole) == (other.n, other.n_whole)
            np.testing.assert_array_equal(share.batch["rows"], other.batch["rows"])
            for name, matrix in counts.items():
                np.testing.assert_array_equal(dense(share.batch, name), matrix.toarray()[share.batch["rows"].numpy()])


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_resident_batches_are_those_of_the_host(dtype, integer):
    counts = counts_of(dtype)
    for matrix in counts.values():
        matrix.indices, matrix.indptr = matrix.indices.astype(integer), matrix.indptr.astype(integer)
    here, there = (ModalityLoader(counts, PER_CELL, **SETTINGS, **how) for how in ({"prefetch": 1}, {"device": "cpu"}))
    assert there.is_resident
    assert not here.is_resident
    for _ in range(2):
        assert_same(list(there), list(here))
    cells = np.array([5, 5, 0])
    assert_same([there.gather(cells)], [here.gather(cells)])
    assert_same(list(there.to(None)), list(here))


def test_one_modality_has_prefixed_keys_too(counts):
    batch = next(iter(ModalityLoader({"rna": counts["rna"]})))
    assert list(batch) == ["rows", "rna/data", "rna/indices", "rna/indptr"]
    np.testing.assert_array_equal(dense(batch, "rna"), counts["rna"].toarray())


def test_the_number_of_cells_is_that_of_the_first_entry(counts):
    # Training takes it for the size of a minibatch.
    assert len(next(iter(next(iter(ModalityLoader(counts, PER_CELL, batch_size=7))).values()))) == 7


def test_a_cell_without_any_count_of_a_modality_has_an_empty_row(counts):
    for device in (None, "cpu"):
        batch = ModalityLoader(counts, device=device).gather(np.array([4, 8, 5]))
        assert batch["atac/indptr"].diff().tolist()[:2] == [0, 0]
        assert batch["atac/indptr"].diff()[2] > 0


def test_modalities_live_on_the_device_together_or_not_at_all(counts, monkeypatch):
    needed = sum(map(resident.n_bytes, counts.values()))
    monkeypatch.setattr(resident, "free_memory", lambda device: 2 * needed - 1)
    loader = ModalityLoader(counts, PER_CELL, batch_size=10, device="cpu")
    assert not loader.is_resident
    assert loader._residents == {}
    assert_same(list(loader), list(ModalityLoader(counts, PER_CELL, batch_size=10)))
    monkeypatch.setattr(resident, "free_memory", lambda device: 2 * needed)
    assert loader.to("cpu").is_resident
    # Another loader of the same counts takes nothing more.
    monkeypatch.setattr(resident, "free_memory", lambda device: 0)
    other = ModalityLoader(counts, device="cpu")
    assert other._residents == loader._residents
    alive = [weakref.ref(one) for one in loader._residents.values()]
    del loader, other
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_the_order_of_the_mapping_does_not_matter(counts):
    first = ModalityLoader(counts, **SETTINGS)
    second = ModalityLoader(dict(reversed(counts.items())), **SETTINGS)
    assert_same(list(first), list(second))
    assert first.fingerprint() == second.fingerprint()


def test_a_fingerprint_sees_every_modality_and_its_name(counts):
    first = ModalityLoader(counts, PER_CELL).fingerprint()
    assert ModalityLoader({name: matrix.copy() for name, matrix in counts.items()}, PER_CELL).fingerprint() == first
    assert ModalityLoader({"atac": counts["atac"], "spliced": counts["rna"]}, PER_CELL).fingerprint() != first
    assert ModalityLoader(counts, PER_CELL, seed=1).fingerprint() != first
    for name in counts:
        counts[name].data[-1] += 1
        assert ModalityLoader(counts, PER_CELL).fingerprint() != first
        counts[name].data[-1] -= 1


def test_bad_arguments_are_named(counts):
    with pytest.raises(InvalidArgumentError, match="counts is empty"):
        ModalityLoader({})
    with pytest.raises(InvalidArgumentError, match=r"different numbers of cells: \{'atac': 100, 'rna': 101\}"):
        ModalityLoader({**counts, "atac": counts["atac"][:100]})
    with pytest.raises(InvalidArgumentError, match=r"per_cell\['rna/data'\] has the name"):
        ModalityLoader(counts, {"rna/data": np.zeros(101)})
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        ModalityLoader(counts, batch_size=0)
    with pytest.raises(InvalidArgumentError, match="indices holds 101"):
        ModalityLoader(counts).gather(np.array([101]))
