from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.data import CountsLoader
from cellstill.nn.layers import MLP, SparseLinear
from cellstill.nn.sparse import CSRRows


@pytest.fixture(params=[0.1, 0.3], ids=["sparse", "dense"])
def x(request) -> CSRRows:
    counts = sp.random(9, 40, request.param, format="csr", random_state=0, dtype=np.float32)
    counts.data = np.ceil(counts.data * 5)
    counts = sp.csr_matrix(counts.multiply((np.arange(9) != 4)[:, None]))
    return CSRRows.of(CountsLoader(counts).gather(np.arange(9)), 40)


def test_rows_agree_with_dense_arithmetic(x):
    dense = x.to_dense()
    torch.testing.assert_close(x.library_size(), dense.sum(dim=1))
    library = dense.sum(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(x.log2_cpm().to_dense(), torch.log2(1 + 1e6 * dense / library))
    assert x.library_size()[4] == 0, "an empty row is a row"


def test_sparse_linear_is_the_same_affine_map_with_and_without_gradients(x):
    layer = SparseLinear(40, 6)
    expected = x.to_dense() @ layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    by_hand = 2 * x.to_dense().T @ expected
    torch.testing.assert_close(layer.weight.grad, by_hand.detach())


def test_dropout_of_the_input_keeps_the_mean_and_only_acts_in_training(x):
    torch.manual_seed(0)
    network = MLP([40, 8, 3], dropout=0.5, sparse_input=True)
    drawn = torch.stack([network._drop(x, 0.5, None).to_dense() for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(dim=0), x.to_dense(), atol=0.4, rtol=0)
    assert set(drawn[:, 0, x.indices[0]].unique().tolist()) == {0.0, 2 * float(x.data[0])}
    network.eval()
    torch.testing.assert_close(network._drop(x, 0.5, None).to_dense(), x.to_dense())


def test_masks_are_one_function_for_all_rows(x):
    network = MLP([40, 8, 8, 3], dropout=0.5, sparse_input=True).eval()
    masks = network.draw_masks(torch.Generator().manual_seed(1))
    assert [len(mask) for mask in masks] == [40, 8]
    assert set(torch.cat(list(masks)).tolist()) == {0.0, 2.0}
    whole = network(x, masks)
    alone = network(CSRRows(x.data[: x.indptr[1]], x.indices[: x.indptr[1]], x.indptr[:2], 40), masks)
    torch.testing.assert_close(whole[:1], alone)
    assert not torch.allclose(whole, network(x))
    by_hand = x.to_dense() * masks[0]
    for linear, norm, mask in zip(network.hidden, network.norms, [None, masks[1]], strict=True):
        by_hand = by_hand if mask is None else by_hand * mask
        weight = linear.weight if isinstance(linear, SparseLinear) else linear.weight.T
        by_hand = torch.relu(norm(by_hand @ weight + linear.bias))
    torch.testing.assert_close(whole, network.output(by_hand))
