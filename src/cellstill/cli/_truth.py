"""Whether a result recovers what was simulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstill.cli._pipeline import AFTER, BEFORE, Integration

if TYPE_CHECKING:
    from anndata import AnnData
    from rich.table import Table

_LEAST_CPM = 50.0


@dataclass(frozen=True)
class Check:
    """One comparison with the truth.

    Attributes
    ----------
    name
        What is compared.
    value
        The number found.
    bound
        Smallest value that passes, or largest if not ``at_least``.
    at_least
        Side of the bound.
    note
        What the number is to be seen beside.
    """

    name: str
    value: float
    bound: float
    at_least: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it passes."""
        return bool(self.value >= self.bound if self.at_least else self.value <= self.bound)

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "check": self.name,
            "value": self.value,
            "bound": f"{'>=' if self.at_least else '<='} {self.bound:g}",
            "passed": self.passed,
            "note": self.note,
        }


def check_truth(result: Integration, truth: AnnData, new_cells: AnnData, model_folder: Path) -> list[Check]:
    """Compare a run of ``integrate`` with the truth of the simulation.

    Parameters
    ----------
    result
        The run.
    truth
        The simulated cells that were integrated, with their truth.
    new_cells
        Cells of the same simulation that the model has not seen.
    model_folder
        Where the model was saved.
    """
    return [
        *_embedding(result),
        *_expression(result, truth),
        _mapping(model_folder, new_cells),
        *_differences(result, truth),
    ]


def to_table(checks: list[Check]) -> Table:
    """Lay out for a terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("compared with the truth", "left"), ("value", "right"), ("bound", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for check in checks:
        verdict = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        note = f" [dim]({check.note})[/]" if check.note else ""
        table.add_row(
            check.name, f"{check.value:.3f}", f"{'≥' if check.at_least else '≤'} {check.bound:.3g}", verdict + note
        )
    return table


def _embedding(result: Integration) -> list[Check]:
    scores, covariates = result.scores.table, result.scores.covariates["condition"]
    mixing, accuracy = scores["ilisi_of_ceiling"], scores["cross_batch_knn_accuracy"]
    return [
        Check("batches apart before: iLISI / ceiling", mixing[BEFORE], 0.3, at_least=False),
        Check("batches mixed after: iLISI / ceiling", mixing[AFTER], 0.9),
        Check("cell types found across batches", accuracy[AFTER], 0.97, note=f"before {accuracy[BEFORE]:.3f}"),
        Check(
            "condition kept: change of its kNN",
            covariates[AFTER] - covariates[BEFORE],
            -0.03,
            note=f"before {covariates[BEFORE]:.3f}",
        ),
        Check("student agrees with teacher: R²", result.summary["student_teacher_r2"], 0.9),
    ]


def _expression(result: Integration, truth: AnnData) -> list[Check]:
    """Corrected expression against the known means of the cell types, batch shifts and effects of the condition."""
    counts = np.asarray(truth.X.toarray(), dtype=np.float64)
    raw = counts / counts.sum(axis=1, keepdims=True)
    corrected = np.exp2(result.model.corrected_expression()).astype(np.float64) - 1
    corrected /= corrected.sum(axis=1, keepdims=True)
    expressed = np.exp(truth.var["base_log_mean"].to_numpy()) * 1e6 > _LEAST_CPM

    types, batches = truth.varm["cell_type_log_mean"], truth.varm["batch_shift"]
    known_mean = types.to_numpy().T[:, None, expressed]
    known_shift = batches.to_numpy().T[None, :, expressed]

    def log_means(proportions: np.ndarray) -> np.ndarray:
        """Log mean of each cell type in each batch, shape ``(n_types, n_batches, n_genes)``."""
        cells = [
            [(truth.obs["cell_type"] == name) & (truth.obs["batch"] == batch) for batch in batches] for name in types
        ]
        means = [[proportions[group.to_numpy()].mean(axis=0)[expressed] for group in row] for row in cells]
        return np.log(np.array(means) + 1e-7)

    def shift_left(means: np.ndarray) -> float:
        residual = means - means.mean(axis=1, keepdims=True)
        return float((residual * known_shift).sum() / (np.square(known_shift).sum() * len(means)))

    def error(means: np.ndarray) -> float:
        return float(np.sqrt(np.square(means - known_mean).mean()))

    before, after = log_means(raw), log_means(corrected)
    treated = (truth.obs["condition"] == "treat").to_numpy()
    changed = expressed & truth.var["is_de_treat"].to_numpy()
    effect = np.log2(corrected[treated].mean(axis=0) / corrected[~treated].mean(axis=0))[changed]
    known_effect = truth.var["log2fc_proportion_treat"].to_numpy()[changed]
    return [
        Check(
            "batch shift left in expression: slope",
            shift_left(after),
            0.2,
            at_least=False,
            note=f"counts {shift_left(before):.3f}",
        ),
        Check(
            "error of log means by type and batch",
            error(after),
            0.6 * error(before),
            at_least=False,
            note=f"counts {error(before):.3f}",
        ),
        Check("effect of condition in expression: r", _correlation(effect, known_effect), 0.9),
    ]


def _mapping(model_folder: Path, new_cells: AnnData) -> Check:
    from cellstill import Distiller

    mapped = Distiller.load(model_folder).map_query(new_cells)
    assert mapped.labels is not None
    found = mapped.labels["label"].to_numpy() == new_cells.obs["cell_type"].astype(str).to_numpy()
    return Check("cell types of new cells found", float(found.mean()), 0.95, note=f"{len(found)} cells")


def _differences(result: Integration, truth: AnnData) -> list[Check]:
    """Pseudobulk differential expression."""
    de = result.model.differential_expression("condition", "treat", "ctrl", sample_key="donor")
    changed, called = truth.var["is_de_treat"].to_numpy(), de.table["is_de"].to_numpy()
    tested = changed & de.table["lfc"].notna().to_numpy()
    known = truth.var["log2fc_proportion_treat"].to_numpy()
    agreement = _correlation(de.table["lfc"].to_numpy()[tested], known[tested])
    false = float((called & ~changed).sum() / max(called.sum(), 1))
    note = f"{called.sum()} called, {changed.sum()} true"
    return [
        Check("pseudobulk fold changes: r", agreement, 0.9),
        Check("pseudobulk false discovery share", false, 0.15, at_least=False, note=note),
    ]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])
