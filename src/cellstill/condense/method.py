"""scDD as a method that :func:`~cellstill.condense.evaluate.evaluate` compares with baselines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.choice import JUDGES
from cellstill.condense.counts import CountsForm
from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.matching import MatchingConfig
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.settings import given_or_default
from cellstill.condense.shared import shared_space
from cellstill.condense.solver import Condensed, condense, unmatched
from cellstill.condense.starts import Start

TRAINED_WITH = JUDGES
"""Evaluators by which ours chooses among its candidates; the others are new to its cells."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """scDD with settings of its own: ``Variant(start="random")`` is a method for an ablation.

    All variants with the same settings of latent space and generator share one trained space for each problem and seed.

    Parameters
    ----------
    counts, start, matching
        See :func:`~cellstill.condense.solver.condense`.
    latent, generator
        Settings of the space; ``None`` takes the defaults.
    teacher_steps
        Generate, and match codes, through so many deterministic steps of the generator's teacher; ``None`` takes the
        one step that it was tuned to. More take as many times longer.
    """

    counts: CountsForm | Literal["auto"] = "auto"
    start: Start | Literal["auto"] = "auto"
    matching: MatchingConfig | None = None
    latent: LatentConfig | None = None
    generator: GeneratorConfig | None = None
    teacher_steps: int | None = None

    def __post_init__(self) -> None:
        given_or_default("matching", self.matching, MatchingConfig)
        given_or_default("latent", self.latent, LatentConfig)
        given_or_default("generator", self.generator, GeneratorConfig)

    def __call__(self, problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
        """Condense the training cells of a problem."""
        return self.condense(problem, samples_per_class, seed).cells

    def condense(self, problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> Condensed:
        """Condense, and tell how: which candidates there were, and how well each did."""
        space = shared_space(problem, seed, self.latent, self.generator)
        return condense(
            problem,
            space if self.teacher_steps is None else space.in_steps(self.teacher_steps),
            samples_per_class,
            counts=self.counts,
            start=self.start,
            matching=self.matching,
            seed=seed,
        )

    def unmatched(self) -> Variant:
        """The same, with the codes as they start."""
        return replace(self, matching=unmatched(self.matching))


def scdd(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Condense with scDD at its defaults; a method of :func:`~cellstill.condense.evaluate.evaluate`.

    It is no baseline, so it is given by name: ``evaluate(problem, {"scdd": scdd, "random": "random"},
    trained_with={"scdd": TRAINED_WITH})``.

    Parameters
    ----------
    problem
        Cells: those of training are learned from, those of validation choose.
    samples_per_class
        Synthetic cells of each class; no more than real ones.
    seed
        Of everything drawn, the training of the space included, which all budgets share.
    """
    return Variant()(problem, samples_per_class, seed)


def scdd_features(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> Features:
    """Points of the latent space that scDD makes with its cells: what ``"feat_distill"`` is to be compared with.

    Parameters
    ----------
    problem, samples_per_class, seed
        As of :func:`scdd`.

    Returns
    -------
    Points, and the encoder: classifiers are trained on the latent space, and see z of the test cells.
    """
    return Variant().condense(problem, samples_per_class, seed).points
