"""One measurement of the engine in a process of its own. Started by ``engine.py``."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _worker import peak_megabytes, reset_peak, resident_megabytes

SEED = 0


def main(request: dict[str, Any]) -> None:
    if hasattr(os, "sched_setaffinity") and request.get("device") != "cuda":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["threads"]])
    import torch

    torch.set_num_threads(request["threads"])
    warnings.simplefilter("ignore")
    measure = {"cellstill": cellstill, "scvi": scvi, "products": products, "parts": parts, "loader": loader}[
        request["what"]
    ]
    Path(request["out"]).write_text(json.dumps(measure(request) | {"load_average": round(os.getloadavg()[0], 2)}))


def load(request: dict[str, Any]):
    import anndata as ad

    return ad.read_h5ad(request["data"])


def device_of(request: dict[str, Any]):
    import torch

    return torch.device(request.get("device", "cpu"))


def cellstill(request: dict[str, Any]) -> dict[str, Any]:
    """Training steps, latent inference and memory of cellstill; ``dense`` is the plain implementation."""
    import torch
    from _engine_model import VAE

    from cellstill._compat.malloc import keeping_freed_memory
    from cellstill.data import CountsLoader, split_cells
    from cellstill.nn.compiled import compiled
    from cellstill.nn.sparse import CSRRows
    from cellstill.train.fit import fit, seeded

    counts, device = load(request).X, device_of(request)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    train, validation, _ = split_cells(counts.shape[0], 0.9, seed=SEED)
    size = request["batch_size"]
    sizes = {key: request[key] for key in ("n_hidden", "n_latent") if key in request}
    with compiled(request["compile"]), seeded(SEED):
        module = VAE(counts.shape[1], dense=request.get("dense", False), **sizes)
        # Compiles, or loads what was compiled.
        fit(
            module,
            CountsLoader(counts, indices=train[: 2 * size], batch_size=size),
            max_epochs=1,
            patience=None,
            accelerator=accelerator,
        )
        torch.manual_seed(SEED)
        module = VAE(counts.shape[1], dense=request.get("dense", False), **sizes)
        loader = CountsLoader(counts, indices=train, batch_size=size, shuffle=True, seed=SEED)
        before = resident_megabytes()
        reset_peak()
        history = fit(
            module,
            loader,
            CountsLoader(counts, indices=validation, batch_size=1024) if request.get("validate") else None,
            max_epochs=request["epochs"],
            patience=None,
            precision=request.get("precision", "32-true"),
            accelerator=accelerator,
        )
        added = peak_megabytes() - before
        module.to(device).eval()
        # As of scVI, the time is that from counts in the host's memory to latent means there.
        loader.to(None)
        there = None if device.type == "cpu" else device

        def embed() -> None:
            with torch.inference_mode(), keeping_freed_memory():
                for batch in CountsLoader(counts, batch_size=1024, device=there):
                    module.posterior(CSRRows.of(batch, counts.shape[1]))[0].cpu().numpy()

        embedding = seconds_of(embed, 3)
    epochs = list(history.attrs["seconds"])
    return {
        "step_ms": 1e3 * min(epochs[1:] or epochs) / len(loader),
        "cells_per_second": len(train) / min(epochs[1:] or epochs),
        "embedded_per_second": counts.shape[0] / embedding,
        "added_mb": added,
        "validation_loss": history["validation_loss"].iloc[-1] if request.get("validate") else None,
    }


def scvi(request: dict[str, Any]) -> dict[str, Any]:
    """The same of scVI, at the same architecture."""
    import logging

    import torch
    from lightning.pytorch import Callback
    from scvi.model import SCVI

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    device = device_of(request)

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_epoch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *args: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    adata = load(request)
    settings: dict[str, Any] = {
        "batch_size": request["batch_size"],
        "train_size": 0.9,
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "enable_progress_bar": False,
        "logger": False,
    }
    tiny = adata[: 4 * 128].copy()
    SCVI.setup_anndata(tiny)
    SCVI(tiny, n_hidden=128, n_latent=10, n_layers=1, gene_likelihood="nb").train(1, **settings | {"batch_size": 128})
    SCVI.setup_anndata(adata)
    model = SCVI(adata, n_hidden=128, n_latent=10, n_layers=1, gene_likelihood="nb")
    before = resident_megabytes()
    reset_peak()
    clock = Clock()
    model.train(request["epochs"], callbacks=[clock], **settings)
    added = peak_megabytes() - before
    n_train = len(model.train_indices)
    best = min(clock.seconds[1:] or clock.seconds)
    embedding = seconds_of(lambda: model.get_latent_representation(batch_size=1024), 3)
    return {
        "step_ms": 1e3 * best / -(-n_train // request["batch_size"]),
        "cells_per_second": n_train / best,
        "embedded_per_second": adata.n_obs / embedding,
        "added_mb": added,
    }


def products(request: dict[str, Any]) -> dict[str, Any]:
    """The dense matrix products of one step alone, the encoder's first layer dense."""
    import torch
    from _engine_model import N_HIDDEN, N_LATENT

    from cellstill._compat.malloc import keeping_freed_memory

    n, n_vars = request["batch_size"], request["n_vars"]
    device = device_of(request)
    # Inputs, outputs, and whether the gradient of the inputs is needed.
    layers = [(n_vars, N_HIDDEN, False), (N_HIDDEN, 2 * N_LATENT, True), (N_LATENT, N_HIDDEN, True)]
    layers.append((N_HIDDEN, n_vars, True))
    arrays = [
        (torch.randn(n, a, device=device), torch.randn(b, a, device=device), torch.randn(n, b, device=device), back)
        for a, b, back in layers
    ]

    def step() -> None:
        for inputs, weight, outer, back in arrays:
            torch.mm(inputs, weight.t())
            torch.mm(outer.t(), inputs)
            if back:
                torch.mm(outer, weight)

    # As steps are timed: the fastest mean over an epoch of them, the first not counted.
    n_steps, means = max(5, -(-request["n_train"] // n)), []
    with keeping_freed_memory():
        for _ in range(request["epochs"]):
            start = time.perf_counter()
            for _ in range(n_steps):
                step()
            # Once, as training waits for the device.
            if device.type == "cuda":
                torch.cuda.synchronize()
            means.append((time.perf_counter() - start) / n_steps)
    return {"step_ms": 1e3 * min(means[1:])}


def parts(request: dict[str, Any]) -> dict[str, Any]:
    """What a step of cellstill cannot do without, each compiled and alone, on real minibatches.

    The products of the layers behind the first, the first layer's and its gradient as sparse rows, the likelihood with
    its gradients, and the optimiser's pass over the parameters: a step without loader, loop, autograd and all else.
    """
    import torch
    from _engine_model import N_HIDDEN, N_LATENT, VAE

    from cellstill._compat.malloc import keeping_freed_memory
    from cellstill.data import CountsLoader
    from cellstill.nn.compiled import compiled
    from cellstill.nn.output import negative_binomial_output
    from cellstill.nn.product import sparse_product
    from cellstill.nn.sparse import CSRRows
    from cellstill.train.adamw import CompiledAdamW

    counts, n = load(request).X, request["batch_size"]
    n_vars = counts.shape[1]
    x = CSRRows.of(next(iter(CountsLoader(counts, batch_size=n, shuffle=True, seed=SEED))), n_vars)
    module = VAE(n_vars)
    first, output = module.encoder.hidden[0].weight, module.decoder.output
    hidden = torch.randn(n, N_HIDDEN, requires_grad=True)
    outer = torch.randn(n, N_HIDDEN)
    small = [(N_HIDDEN, 2 * N_LATENT), (N_LATENT, N_HIDDEN)]
    arrays = [(torch.randn(n, a), torch.randn(b, a), torch.randn(n, b)) for a, b in small]

    def small_products() -> None:
        for inputs, weight, grads in arrays:
            torch.mm(inputs, weight.t())
            torch.mm(grads.t(), inputs)
            torch.mm(grads, weight)

    def first_layer() -> None:
        first.grad = None
        sparse_product(x, first).backward(outer)

    def output_and_likelihood() -> None:
        negative_binomial_output(hidden, output.weight, output.bias, x, None, module.log_theta.detach())

    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimiser = CompiledAdamW(module.parameters())
    repeats = max(5, 20_000 // n)
    with compiled(True), keeping_freed_memory():
        found = {
            "optimiser_ms": 1e3 * seconds_of(optimiser.step, repeats),
            "first_layer_ms": 1e3 * seconds_of(first_layer, repeats),
            "output_ms": 1e3 * seconds_of(output_and_likelihood, repeats),
            "small_products_ms": 1e3 * seconds_of(small_products, repeats),
        }
    return {"step_ms": sum(found.values()), **found}


def loader(request: dict[str, Any]) -> dict[str, Any]:
    """Cells per second of the loader, and of bare row indexing of the same matrix in the same order."""
    from cellstill._compat.malloc import keeping_freed_memory
    from cellstill.data import CountsLoader

    counts, size = load(request).X, request["batch_size"]
    order = np.random.default_rng(SEED).permutation(counts.shape[0])
    ours = CountsLoader(counts, indices=order, batch_size=size, prefetch=0)

    def pass_over() -> None:
        for _ in ours:
            pass

    def bare() -> None:
        for start in range(0, len(order), size):
            counts[order[start : start + size]]

    # As in training, for both.
    with keeping_freed_memory():
        times = [(seconds_of(pass_over, 1), seconds_of(bare, 1)) for _ in range(7)]
    return {
        "cells_per_second": len(order) / min(time for time, _ in times),
        "bare_cells_per_second": len(order) / min(time for _, time in times),
    }


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Shortest time of several calls, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
