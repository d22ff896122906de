"""The scenarios of ``distill_simulated.py``: simulated counts whose fold changes are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from anndata import AnnData
from scipy.special import softmax

from cellstill.data.simulate import simulate_counts

CONTRAST = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor"}
COMMON = {"n_donors_per_group": 3}
QUICK = {"n_obs": 900, "n_vars": 300}
AGE_KEY = "age_group"
_AGES = ("young", "old")


@dataclass(frozen=True)
class Scenario:
    """Cells, genes and donors to simulate; ``age`` adds a second factor, a column ``age_group`` of the donors."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    age: bool = False

    @property
    def covariates(self) -> list[str]:
        """Columns beside batch and condition that belong into a design."""
        return [AGE_KEY] if self.age else []

    def simulate(self, seed: int, *, quick: bool, batch_effect: bool = True) -> AnnData:
        """Draw counts; the truth is ``var["truth"]``, log2 fold changes of proportions, and ``var["is_de"]``.

        Without ``batch_effect``, batches do not shift genes; genes, donors, cells and effects are the same.
        """
        sizes = QUICK if quick else {}
        without = {} if batch_effect else {"batch_sd": 0.0}
        adata = simulate_counts(seed=seed, **{**COMMON, **self.settings, **sizes, **without})
        adata.var["is_de"] = adata.var["is_de_treat"]
        adata.var["truth"] = adata.var["log2fc_proportion_treat"]
        if self.age:
            _add_age(adata, seed)
        return adata


SCENARIOS = {
    "1": Scenario("2 batches, balanced", {"n_obs": 5000, "n_vars": 2000, "n_batches": 2}),
    "2": Scenario("3 batches, condition and age group", {"n_obs": 8000, "n_vars": 3000, "n_batches": 3}, age=True),
    "3": Scenario(
        "4 batches of 40, 30, 20, 10 %",
        {"n_obs": 10000, "n_vars": 3000, "n_batches": 4, "batch_fractions": (0.4, 0.3, 0.2, 0.1)},
    ),
    "4": Scenario(
        "3 batches, 70, 50, 30 % treated",
        {
            "n_obs": 8000,
            "n_vars": 3000,
            "n_batches": 3,
            "condition_fractions": ((0.3, 0.7), (0.5, 0.5), (0.7, 0.3)),
        },
    ),
    "5": Scenario(
        "3 batches, 100, 50, 0 % treated",
        {
            "n_obs": 8000,
            "n_vars": 3000,
            "n_batches": 3,
            "condition_fractions": ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)),
        },
    ),
    "6": Scenario(
        "2 batches, zero-inflated",
        {"n_obs": 5000, "n_vars": 2000, "n_batches": 2, "dropout_rate": 0.3, "dropout_decay": 0.5},
    ),
    "null": Scenario("as 1, no gene differs", {"n_obs": 5000, "n_vars": 2000, "n_batches": 2, "de_fraction": 0.0}),
}


def split_donors(adata: AnnData, names: tuple[str, str], rng: np.random.Generator | None = None) -> np.ndarray:
    """Give half of the donors of each batch and condition each name; return the name of each cell's donor.

    In the order of their numbers or, with ``rng``, at random; of odd numbers the second gets more in every other group.
    """
    donors = adata.obs.drop_duplicates("donor").sort_values("donor")
    turn = donors["batch"].cat.codes + donors["condition"].cat.codes
    chosen: dict[str, str] = {}
    for _, group in donors.assign(turn=turn).groupby(["batch", "condition"], observed=True):
        members = group["donor"].astype(str).tolist()
        if rng is not None:
            members = rng.permutation(members).tolist()
        n_first = (len(members) + int(group["turn"].iloc[0]) % 2) // 2
        chosen |= {donor: names[int(place >= n_first)] for place, donor in enumerate(members)}
    return adata.obs["donor"].astype(str).map(chosen).to_numpy()


def _add_age(adata: AnnData, seed: int) -> None:
    """Let genes differ with the age of the donor, as many and as much as with the condition, by thinning counts.

    A negative binomial count of which each molecule is kept with probability p is a negative binomial count of the same
    dispersion and p times the mean, so that the fold changes stay known: genes that are lower in the old are thinned in
    the old, and those that are higher are thinned in the young.
    """
    rng = np.random.default_rng([seed, 1])
    drawn = adata.uns["simulation"]
    n_vars = adata.n_vars
    differs = rng.permutation(n_vars) < round(drawn["de_fraction"] * n_vars)
    size = drawn["min_abs_log2fc"] + np.abs(rng.normal(0, drawn["de_log2fc_sd"], n_vars))
    effect = np.where(differs, rng.choice([-1.0, 1.0], n_vars) * size, 0.0)
    kept = np.stack([np.minimum(-effect, 0), np.minimum(effect, 0)])

    ages = split_donors(adata, _AGES)
    is_old = (ages == "old").astype(int)
    rows = np.repeat(np.arange(adata.n_obs), np.diff(adata.X.indptr))
    counts = adata.X.copy()
    counts.data = rng.binomial(counts.data.astype(np.int64), 2.0 ** kept[is_old[rows], counts.indices])
    counts.data = counts.data.astype(np.float32)
    counts.eliminate_zeros()
    adata.X = counts
    adata.obs[AGE_KEY] = ages

    mixture = np.asarray(adata.obs["cell_type"].value_counts(normalize=True, sort=False))
    log_mean = adata.varm["cell_type_log_mean"].to_numpy().T
    condition = adata.var["log2fc_treat"].to_numpy()

    def log2_proportions(log2fc: np.ndarray) -> np.ndarray:
        return np.log2(mixture @ softmax(log_mean + np.log(2) * log2fc, axis=1))

    changes = [log2_proportions(condition + age) - log2_proportions(age) for age in kept]
    adata.var["truth"] = np.mean(changes, axis=0)
