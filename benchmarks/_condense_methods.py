"""Jobs of the condensation benchmark that need a process of their own: seconds and memory."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from anndata import AnnData

Finish = Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]
LIBRARIES = ("cellstill.condense", "sklearn.ensemble", "sklearn.cluster")


def import_libraries(method: str) -> None:
    """Import what a job needs."""
    for name in LIBRARIES:
        importlib.import_module(name)


def whole(adata: AnnData, batch_key: str, seed: int, *, samples_per_class: int) -> Finish:
    """Train on all cells, then condense: seconds of both, and the highest memory of the process and its children."""
    from cellstill import SCDD

    numbers: dict[str, Any] = {}
    with _tree_memory() as memory:
        SCDD.setup_anndata(adata, "cell_type")
        with _clock(numbers, "train"):
            model = SCDD(adata, seed=seed).train(progress=False)
        with _clock(numbers, "condense"):
            cells = model.condense(samples_per_class, progress=False)
    numbers |= {"peak_gb": memory["mb"] / 1024, "n_cells": cells.n_obs}
    return lambda: ({}, numbers)


def steps(adata: AnnData, batch_key: str, seed: int, *, samples_per_class: int, repeats: int) -> Finish:
    """Milliseconds of a backward pass through the generator and of a matching step, in one step and in ten.

    By turns, the fastest of ``repeats``. Weights do not change the time, so the generator is hardly trained.
    """
    from cellstill.condense import CondensationProblem, GeneratorConfig, LatentConfig, MatchingConfig, fit_space
    from cellstill.condense.generator import generate_in_steps
    from cellstill.condense.matching import match_codes
    from cellstill.condense.starts import labels_of_budget, start_codes

    problem = CondensationProblem.from_anndata(adata, "cell_type")
    space = fit_space(
        problem, LatentConfig(max_epochs=2), GeneratorConfig(n_steps=20, n_tuning_steps=5), seed=seed, accelerator="cpu"
    )
    codes = labels_of_budget(problem.budget(samples_per_class))
    label = torch.from_numpy(codes)
    first = start_codes("random", problem, space, codes, seed)

    def generate(n_steps: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        if n_steps == 1:
            return space.generator
        return lambda noise, of: generate_in_steps(space.teacher, noise, of, n_steps)

    def backward(n_steps: int) -> float:
        noise = first.clone().requires_grad_(True)
        start = time.perf_counter()
        torch.autograd.grad(generate(n_steps)(noise, label).square().sum(), noise)
        return time.perf_counter() - start

    def matching(n_steps: int) -> float:
        made = generate(n_steps)

        def decode(noise: torch.Tensor, of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = made(noise, of)
            return z, space.autoencoder.expect(z)

        n, classify = 10, space.autoencoder.classify
        start = time.perf_counter()
        match_codes(first, label, problem.train, problem.n_classes, decode, classify, MatchingConfig(n_steps=n))
        return (time.perf_counter() - start) / n

    numbers: dict[str, Any] = {}
    for name, measure in (("backward", backward), ("matching", matching)):
        found: dict[int, list[float]] = {1: [], 10: []}
        for _ in range(repeats):
            for n_steps, seconds in found.items():
                seconds.append(measure(n_steps))
        numbers |= {f"{name}_{n_steps}_ms": 1e3 * min(seconds) for n_steps, seconds in found.items()}
    return lambda: ({}, numbers)


@contextmanager
def _clock(numbers: dict[str, Any], name: str) -> Iterator[None]:
    """Note wall seconds and those of CPUs, which other programs change less."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    numbers |= {f"{name}_seconds": time.perf_counter() - wall, f"{name}_cpu_seconds": time.process_time() - cpu}


@contextmanager
def _tree_memory(every: float = 0.05) -> Iterator[dict[str, float]]:
    """Note the highest resident memory of the process and its children inside the block, in MB."""
    import psutil

    process, done, found = psutil.Process(), threading.Event(), {"mb": 0.0}

    def look() -> None:
        total = process.memory_info().rss
        for child in process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        found["mb"] = max(found["mb"], total / 2**20)

    def watch() -> None:
        while not done.wait(every):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        look()
