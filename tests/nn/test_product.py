"""Sparse rows times a matrix against scipy and against dense arithmetic."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.errors import InvalidArgumentError
from cellstill.nn import compiled as module
from cellstill.nn import product
from cellstill.nn.compiled import add_up, compiled, kernels, share_out
from cellstill.nn.product import sparse_pays, sparse_product
from cellstill.nn.sparse import CSRRows

CPU = torch.device("cpu")


def rows(counts, index=torch.int32) -> CSRRows:
    parts = (torch.from_numpy(counts.data), *(torch.from_numpy(p).to(index) for p in (counts.indices, counts.indptr)))
    return CSRRows(*parts, counts.shape[1])


@pytest.fixture
def counts():
    counts = sp.random(31, 70, 0.1, format="csr", dtype=np.float32, random_state=0)
    return sp.csr_matrix(counts.multiply((np.arange(31) != 4)[:, None]))  # with an empty cell


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("mode", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_product_and_gradient(counts, index, mode, n_threads, monkeypatch):
    matrix = torch.randn(70, 9, requires_grad=True)
    outer = torch.randn(31, 9)
    monkeypatch.setattr(module, "_MIN_SHARE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with compiled(mode):
            found = sparse_product(rows(counts, index), matrix)
            found.backward(outer)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found.detach(), counts @ matrix.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(matrix.grad, counts.T @ outer.numpy(), rtol=1e-5, atol=1e-6)
    assert not found[4].any(), "an empty row is a row"


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("genes", [1, 8, 100], ids="{} genes a block".format)
def test_blocks_and_threads_change_nothing(counts, genes, n_threads, monkeypatch):
    """Blocks of genes that do not divide their number, rows whose genes are in no order, and a gene named twice."""
    monkeypatch.setattr(product, "_IN_CACHE", 9 * genes)
    monkeypatch.setattr(module, "_MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    mixed = counts.copy()
    for row in range(0, 31, 3):
        own = slice(*mixed.indptr[row : row + 2])
        order = np.random.default_rng(row).permutation(own.stop - own.start)
        mixed.indices[own], mixed.data[own] = mixed.indices[own][order], mixed.data[own][order]
    mixed.indices[mixed.indptr[7] + 1] = mixed.indices[mixed.indptr[7]]
    counts = sp.csr_matrix(mixed.toarray())
    matrix, outer = torch.randn(70, 9), torch.randn(31, 9)
    with compiled(True):
        found = product.rows_times(rows(mixed), matrix), product.columns_times(rows(mixed), outer)
    np.testing.assert_allclose(found[0], counts @ matrix.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], counts.T @ outer.numpy(), rtol=1e-5, atol=1e-6)


def test_a_matrix_of_doubles_keeps_them(counts):
    """The compiled loops are of single precision."""
    matrix, outer = torch.randn(70, 9, dtype=torch.float64), torch.randn(31, 9, dtype=torch.float64)
    with compiled(True):
        found = product.rows_times(rows(counts), matrix), product.columns_times(rows(counts), outer)
        assert product._loops(rows(counts), matrix) is None
        assert product._loops(rows(counts), matrix.float()) is not None
    np.testing.assert_allclose(found[0], counts.astype(np.float64) @ matrix.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found[1], counts.T.astype(np.float64) @ outer.numpy(), rtol=1e-12)


@pytest.mark.parametrize("mode", [False, True], ids=["torch", "compiled"])
def test_nothing_times_a_matrix_and_a_matrix_turned_around(counts, mode):
    nothing, matrix = sp.csr_matrix((0, 70), dtype=np.float32), torch.randn(9, 70).t()
    with compiled(mode):
        assert product.rows_times(rows(nothing), matrix).shape == (0, 9)
        assert not product.columns_times(rows(nothing), torch.empty(0, 9)).any()
        np.testing.assert_allclose(
            product.rows_times(rows(counts), matrix), counts @ matrix.numpy(), rtol=1e-5, atol=1e-6
        )


def test_a_matrix_of_another_size_is_refused(counts):
    with compiled(True):
        for function in (product.rows_times, product.columns_times):
            with pytest.raises(ValueError, match="a matrix of 30 rows cannot be multiplied"):
                function(rows(counts), torch.randn(30, 9))


def test_a_second_derivative_is_refused(counts):
    matrix = torch.randn(70, 9, requires_grad=True)
    first = torch.autograd.grad(sparse_product(rows(counts), matrix).square().sum(), matrix, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_density_and_size_decide():
    dense = sp.random(20, 50, 0.5, format="csr", dtype=np.float32, random_state=0)
    sparse = sp.random(20, 50, 0.2, format="csr", dtype=np.float32, random_state=0)
    small, large = torch.empty(50, 8), torch.empty(1 << 18, 8)
    assert not sparse_pays(rows(dense), small)
    assert sparse_pays(rows(sparse), small)
    assert not sparse_pays(rows(sparse), large)
    with compiled(True):
        assert sparse_pays(rows(sparse), large)
        assert not sparse_pays(rows(dense), large)


def test_machine_code_older_than_any_source_is_forgotten(tmp_path):
    """A loop has parts of other files compiled into it, of which Numba knows nothing."""
    sources = [tmp_path / name for name in ("_kernels.py", "_background_kernels.py")]
    code = [tmp_path / f"_{name}kernels.loop-1.py311.nbi" for name in ("", "background_")]
    for age, path in zip((10, 50, 30, 5), (*sources, *code), strict=True):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    module.forget_stale(tmp_path, sources)
    # The second loop is younger than both sources, the first only than its neighbour.
    assert [path.exists() for path in (*sources, *code)] == [True, True, False, True]


def test_the_choice_depends_on_the_arguments_alone():
    assert kernels(CPU) is None
    with compiled("auto", n_values=module.WORTH_COMPILING - 1):
        assert kernels(CPU) is None
    with compiled("auto", n_values=module.WORTH_COMPILING):
        loops = kernels(CPU)
        assert loops is not None
        with compiled(False):
            assert kernels(CPU) is None
        assert kernels(CPU) is loops
        assert kernels(torch.device("cuda")) is None
    assert kernels(CPU) is None
    with compiled(True):
        assert kernels(CPU) is loops


@pytest.mark.parametrize("mode", ["yes", None, 2])
def test_another_mode_is_refused(mode):
    with (
        pytest.raises(InvalidArgumentError, match="compile=.* is not known. Use one of: True, False, 'auto'"),
        compiled(mode),
    ):
        pass


@pytest.mark.parametrize(("n", "n_values"), [(10, 1 << 20), (3, 1 << 30), (7, 0)])
def test_ranges_cover_everything_once(n, n_values, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    ranges = share_out(lambda start, stop: list(range(start, stop)), n, n_values)
    assert [i for found in ranges for i in found] == list(range(n))
    assert len(ranges) == (1 if n_values == 0 else min(4, n))


def test_an_error_in_a_thread_comes_back(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def fail(start, stop):
        raise ValueError(f"rows {start} to {stop}")

    with pytest.raises(ValueError, match="rows"):
        share_out(fail, 4, 1 << 20)


def test_a_product_that_is_not_differentiated_is_the_same(counts):
    matrix = torch.randn(70, 9, requires_grad=True)
    with_gradient = sparse_product(rows(counts), matrix)
    assert with_gradient.requires_grad
    with torch.no_grad():
        without = sparse_product(rows(counts), matrix)
    assert not without.requires_grad
    assert torch.equal(without, with_gradient)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_what_threads_add_up_comes_on_top_of_what_is_there(n_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    totals = [np.array([5.0, 0.0]), np.zeros(())]
    own = []

    def add(start, stop, step, counted, summed):
        # Threads that shared sums would lose some.
        own.append(counted)
        assert counted is totals[0] or not counted.any()
        counted += [step, stop - start]
        summed += sum(range(start, stop))

    add_up(add, [1], totals, 10, 1 << 20)
    assert len({id(one) for one in own}) == len(own) == n_threads
    assert sum(one is totals[0] for one in own) == 1
    np.testing.assert_array_equal(totals[0], [5 + n_threads, 10])
    assert totals[1] == sum(range(10))
