from __future__ import annotations

import numpy as np
import pytest

from cellstill.data.selection import cell_positions, gene_positions
from cellstill.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([3, 1, 1], [3, 1, 1]),
        (np.array([2.0]), [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [4, 2, 0]),
        ([True, False, False, True, False], [0, 3]),
        ([-1], [4]),
        (np.array([True, False, False, True, False], dtype=object), [0, 3]),
        (np.array([4, 0], dtype=object), [4, 0]),
    ],
    ids=["list", "floats", "slice", "backwards", "mask", "negative", "object_mask", "object_positions"],
)
def test_cells_by_position_slice_and_mask(indices, expected):
    np.testing.assert_array_equal(cell_positions(indices, 5), expected)


def test_no_cell_or_one_that_does_not_exist_is_refused():
    for none in ([], slice(3, 3), np.zeros(5, dtype=bool)):
        with pytest.raises(InvalidArgumentError, match="selects no cell"):
            cell_positions(none, 5)
    for other in ([5], np.ones(4, dtype=bool)):
        with pytest.raises(InvalidArgumentError, match="indices does not fit the 5 cells .* from 0 to 4") as refused:
            cell_positions(other, 5)
        assert isinstance(refused.value, IndexError)


def test_genes_by_name():
    genes = ["a", "b", "c"]
    assert gene_positions(genes, None, "genes") == slice(None)
    np.testing.assert_array_equal(gene_positions(genes, ["c", "a", "c"], "genes"), [2, 0, 2])
    np.testing.assert_array_equal(gene_positions(genes, "b", "genes"), [1])
    with pytest.raises(InvalidArgumentError, match="genes='z' is not known"):
        gene_positions(genes, ["a", "z"], "genes")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0.9, 1.9], "float64 values, such as .*0.9"),
        (["cell_1", "cell_2"], "str.* values, such as .*'cell_1'.*get_indexer"),
        ("condition == 'stim'", "such as .*condition == 'stim'"),
        (np.array([True, np.nan, False], dtype=object), "float64 values"),
    ],
    ids=["fractions", "names", "query", "mask_with_nan"],
)
def test_what_is_neither_position_nor_mask_is_named(indices, message):
    with pytest.raises(InvalidArgumentError, match=message):
        cell_positions(indices, 3)
