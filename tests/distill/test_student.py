"""The decoder's first layer, gathered by batch and level, against the product with zeros and ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellstill.data import CountsLoader
from cellstill.data.covariates import CovariateDesign
from cellstill.distill.student import Decoder, NewBatches
from cellstill.nn.compiled import compiled

N, N_VARS, N_LATENT, N_BATCHES, N_HIDDEN = 60, 12, 5, 4, 7
KEYS = {
    "none": [],
    "levels": ["condition"],
    "several": ["condition", "sex"],
    "continuous": ["age"],
    "levels_and_continuous": ["age", "condition", "depth", "sex"],
}


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    condition, sex = rng.permutation([*"abc"] * 20), rng.permutation([*"fm"] * 30)
    return pd.DataFrame({"condition": condition, "sex": sex, "age": rng.normal(size=N), "depth": rng.normal(size=N)})


def made(obs, keys, n_batch_embedding, dtype):
    """A decoder, a minibatch, and the covariates of its cells as zeros and ones."""
    torch.manual_seed(0)
    rng, design = np.random.default_rng(1), CovariateDesign.fit(obs, keys)
    decoder = Decoder(
        *(N_LATENT, N_VARS, N_BATCHES, design.n_columns),
        n_batch_embedding=n_batch_embedding,
        n_hidden=N_HIDDEN,
        n_layers=2,
        dropout=0.0,
        log_rate=torch.zeros(N_VARS),
    ).to(dtype)
    counts = sp.csr_matrix(rng.poisson(1.0, (N, N_VARS)).astype(np.float32))
    levels, continuous = design.codes(obs)
    z, batch = rng.normal(size=(N, N_LATENT)), rng.integers(0, N_BATCHES, N)
    loader = CountsLoader(
        counts, {"z": z, "batch": batch, "levels": levels, "continuous": continuous}, batch_size=N, shuffle=True
    )
    minibatch = next(iter(loader))
    covariates = torch.from_numpy(design.encode(obs))[minibatch["rows"]].to(dtype)
    floats = {name: minibatch[name].to(dtype) for name in ("z", "continuous")}
    return decoder, {**minibatch, **floats}, covariates


def gradients(value, parameters, outer):
    return torch.autograd.grad(value, parameters, outer, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("n_batch_embedding", [3, 0], ids=["batch", "no_batch"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize(
    ("dtype", "mode"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=str
)
def test_a_gather_is_the_product_with_zeros_and_ones_and_so_are_its_gradients(
    obs, keys, n_batch_embedding, dtype, mode
):
    decoder, batch, covariates = made(obs, keys, n_batch_embedding, dtype)
    learned = [*decoder.network.hidden.parameters(), *decoder.network.norms.parameters(), decoder.batches.weight]
    outer = torch.randn(N, N_HIDDEN, dtype=dtype)
    with compiled(mode):
        found = decoder.features(batch, decoder.batches.weight)
        grads = gradients(found, learned, outer)
    inputs = torch.cat([batch["z"], decoder.batches(batch["batch"]), covariates], dim=1)
    expected = decoder.network.features(inputs)
    assert expected.std() > 0.1
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **bound)
    for grad, wanted in zip(grads, gradients(expected, learned, outer), strict=True):
        torch.testing.assert_close(grad, wanted, **bound)


def test_the_loss_is_that_of_the_decoded_proportions(obs):
    decoder, batch, covariates = made(obs, KEYS["levels_and_continuous"], 3, torch.float32)
    torch.nn.init.normal_(decoder.network.output.weight)
    x = torch.zeros(N, N_VARS)
    x[torch.arange(N).repeat_interleave(batch["indptr"].diff()), batch["indices"].long()] = batch["data"]
    with torch.no_grad():
        mean = x.sum(dim=1, keepdim=True) * decoder(batch["z"], decoder.batches(batch["batch"]), covariates).exp()
        nb = torch.distributions.NegativeBinomial(decoder.log_theta.exp(), logits=mean.log() - decoder.log_theta)
        torch.testing.assert_close(decoder.loss(batch).per_cell, -nb.log_prob(x).mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [False, True], ids=["torch", "compiled"])
def test_embeddings_of_new_batches_learn_by_the_same_gather(obs, mode):
    decoder, batch, covariates = made(obs, KEYS["several"], 3, torch.float32)
    module = NewBatches(decoder, 6)
    torch.nn.init.normal_(module.vectors)
    batch["batch"] = torch.arange(N) % 5
    outer = torch.randn(N, N_HIDDEN)
    with compiled(mode):
        (grad,) = gradients(decoder.features(batch, module.vectors), [module.vectors], outer)
        module.loss(batch).total.backward()
    inputs = torch.cat([batch["z"], module.vectors[batch["batch"]], covariates], dim=1)
    (expected,) = gradients(decoder.network.features(inputs), [module.vectors], outer)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert grad[:5].abs().min() > 0
    assert not grad[5].any()
    assert module.vectors.grad[:5].abs().max() > 0
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_weights_are_laid_out_as_in_models_that_were_stored_before(obs):
    decoder, *_ = made(obs, KEYS["levels_and_continuous"], 3, torch.float32)
    assert {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items() if "output" not in name} == {
        "log_theta": (N_VARS,),
        "batches.weight": (N_BATCHES, 3),
        "network.hidden.0.weight": (N_HIDDEN, N_LATENT + 3 + 3 + 2 + 2),
        "network.hidden.0.bias": (N_HIDDEN,),
        "network.hidden.1.weight": (N_HIDDEN, N_HIDDEN),
        "network.hidden.1.bias": (N_HIDDEN,),
        **{f"network.norms.{i}.{name}": (N_HIDDEN,) for i in range(2) for name in ("weight", "bias")},
    }
