"""Cells of donors in two groups and two batches, with known fold changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp


@dataclass
class Simulated:
    counts: sp.csr_matrix
    obs: pd.DataFrame
    genes: list[str]
    lfc: np.ndarray


@pytest.fixture(scope="session")
def simulate() -> Callable[..., Simulated]:
    """Negative binomial cells: gene mean x group x batch x donor, and a log-normal depth."""

    def draw(
        donors: list[tuple[str, str, str]],
        *,
        n_genes: int = 400,
        n_cells: int = 50,
        share_de: float = 0.15,
        batch_sd: float = 0.0,
        donor_sd: float = 0.1,
        seed: int = 0,
    ) -> Simulated:
        rng = np.random.default_rng(seed)
        base = rng.normal(0.0, 1.0, n_genes)
        is_de = rng.random(n_genes) < share_de
        lfc = np.where(is_de, rng.choice([-1.0, 1.0], n_genes) * rng.uniform(0.8, 2.0, n_genes), 0.0)
        shift = {batch: rng.normal(0, batch_sd, n_genes) for batch in sorted({donor[2] for donor in donors})}
        own = {name: rng.normal(0, donor_sd, n_genes) for name in sorted({donor[0] for donor in donors})}
        blocks, rows = [], []
        for name, group, batch in donors:
            mean = np.exp(base + np.log(2) * (lfc * (group == "treated") + shift[batch]) + own[name])
            mean = mean * rng.lognormal(0, 0.3, (n_cells, 1))
            blocks.append(rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape)))
            rows += [(name, group, batch)] * n_cells
        order = rng.permutation(len(rows))
        obs = pd.DataFrame(rows, columns=["donor", "condition", "batch"]).iloc[order]
        obs.index = [f"cell{number}" for number in range(len(obs))]
        counts = sp.csr_matrix(np.concatenate(blocks)[order].astype(np.float32))
        return Simulated(counts, obs, [f"gene{number}" for number in range(n_genes)], lfc)

    return draw
