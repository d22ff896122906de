"""From a problem and a trained space to synthetic cells: start, match, render, choose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.choice import mean_score, validation_score
from cellstill.condense.counts import FORMS, CountsForm, Rendering
from cellstill.condense.matching import MatchingConfig, match_codes
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.settings import given_or_default
from cellstill.condense.space import Space
from cellstill.condense.starts import STARTS, Start, labels_of_budget, start_codes
from cellstill.errors import check_option

_log = logging.getLogger("cellstill")

DETECTIONS = (1.0, 2.0)
"""Detection of rounded cells that are tried."""

N_FORMS = 2
"""Forms of counts in which matched codes are tried."""


OnStep = Callable[[str, int, int], None]
"""Called as ``on_step(phase, step, n_steps)``."""


@dataclass(frozen=True, eq=False)
class Condensed:
    """Synthetic cells, and how they came to be.

    Attributes
    ----------
    cells
        Counts and classes.
    codes
        Codes of the cells, shape ``(n, n_latent)``.
    rendering
        How they became counts.
    start, n_steps
        Where codes started, and for how many steps they were matched.
    choice
        One row for each candidate: start, steps, counts, macro-F1 of the validation cells by each judge, their mean.
    points
        As many points of the latent space, which teach classifiers that see the z of real cells in place of genes.
    point_choice
        As ``choice``, of the points: what they are, and macro-F1 by each judge.
    history
        Terms of the matching, by start.
    """

    cells: LabelledCells
    codes: np.ndarray
    rendering: Rendering
    start: Start
    n_steps: int
    choice: pd.DataFrame
    points: Features
    point_choice: pd.DataFrame
    history: dict[str, pd.DataFrame]


def condense(
    problem: CondensationProblem,
    space: Space,
    samples_per_class: int,
    *,
    counts: CountsForm | Literal["auto"] = "auto",
    start: Start | Literal["auto"] = "auto",
    matching: MatchingConfig | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Condensed:
    """Make synthetic cells.

    Parameters
    ----------
    problem
        Real cells: those of training are matched, those of validation choose.
    space
        Trained on them.
    samples_per_class
        Synthetic cells of each class; no more than real ones.
    counts
        Form of the counts (:class:`~cellstill.condense.counts.Rendering`); ``"auto"`` chooses.
    start
        Where codes start (:func:`~cellstill.condense.starts.start_codes`); ``"auto"`` chooses.
    matching
        Settings of the matching; ``None`` takes the defaults.
    seed
        Of everything drawn.
    on_step
        Called as ``on_step(phase, step, n_steps)``.

    Returns
    -------
    The candidate with the best mean macro-F1 on the validation cells: of each start, the codes as they start, after a
    quarter of the steps, and after all. The first of these are tried in every form of counts that is allowed, the
    others in the two forms that did best. Points of the latent space are chosen apart, among what the generator makes
    of all these codes, and z of the cells that were chosen.
    """
    check_option("counts", counts, ("auto", *FORMS))
    check_option("start", start, ("auto", *STARTS))
    matching = given_or_default("matching", matching, MatchingConfig)
    codes = labels_of_budget(problem.budget(samples_per_class))
    label = torch.from_numpy(codes).to(space.device)
    states: dict[tuple[Start, int], torch.Tensor] = {}
    history: dict[str, pd.DataFrame] = {}
    for name in STARTS if start == "auto" else (start,):
        kept, history[name] = match_codes(
            start_codes(name, problem, space, codes, seed),
            label,
            problem.train,
            problem.n_classes,
            space.decode,
            space.autoencoder.classify,
            matching,
            seed=seed,
            snapshots=(0, matching.n_steps // 4),
            on_step=None if on_step is None else _counting(on_step, f"matching, {name}", matching.n_steps),
        )
        states |= {(name, n_steps): state for n_steps, state in kept.items()}

    def cells_of(state: torch.Tensor, rendering: Rendering) -> LabelledCells:
        with torch.inference_mode():
            return space.render(rendering, space.generator(state, label), codes, seed)

    (name, n_steps), rendering, cells, table = _choose(
        states, renderings(counts, samples_per_class), cells_of, problem, seed, on_step
    )
    _log.info("Chosen on the validation cells: start %s, %d steps, counts %s.", name, n_steps, rendering.name)
    chosen = states[name, n_steps].cpu().numpy()
    with torch.inference_mode():
        made = {f"{of}, {n} steps": space.generator(state, label) for (of, n), state in states.items()}
    points, of_points = _choose_points(made | {"cells": space.encode(cells)}, codes, problem, space, seed)
    return Condensed(cells, chosen, rendering, name, n_steps, table, points, of_points, history)


def _choose(
    states: Mapping[tuple[Start, int], torch.Tensor],
    forms: Sequence[Rendering],
    cells_of: Callable[[torch.Tensor, Rendering], LabelledCells],
    problem: CondensationProblem,
    seed: int,
    on_step: OnStep | None,
) -> tuple[tuple[Start, int], Rendering, LabelledCells, pd.DataFrame]:
    """Best state and form on the validation cells, the first of equals, and the table of all that were tried."""
    n_candidates = len(forms) + (len(states) - 1) * min(len(forms), N_FORMS)
    rows: list[dict[str, Any]] = []
    found: list[tuple[float, tuple[Start, int], Rendering, LabelledCells]] = []
    for key, state in states.items():
        for rendering in forms:
            cells = cells_of(state, rendering)
            # A single candidate needs no judge.
            scores = validation_score(problem, cells, seed=seed) if n_candidates > 1 else {}
            mean = mean_score(scores) if scores else np.nan
            rows.append({"start": key[0], "steps": key[1], "counts": rendering.name, **scores, "mean": mean})
            if not found or mean > found[0][0]:
                found = [(mean, key, rendering, cells)]
            if on_step is not None:
                on_step("choosing", len(rows), n_candidates)
        if len(rows) == len(forms) > N_FORMS:
            best = sorted(range(len(forms)), key=lambda k: -rows[k]["mean"])[:N_FORMS]
            forms = [forms[k] for k in sorted(best)]
    _, key, rendering, cells = found[0]
    return key, rendering, cells, pd.DataFrame(rows)


def _choose_points(
    made: Mapping[str, torch.Tensor], codes: np.ndarray, problem: CondensationProblem, space: Space, seed: int
) -> tuple[Features, pd.DataFrame]:
    """Best points on the validation cells, the first of equals, and the table of all that were tried."""
    rows: list[dict[str, Any]] = []
    found: list[tuple[float, Features]] = []
    for name, z in made.items():
        features = space.features(z, codes)
        scores = validation_score(problem, features, seed=seed)
        mean = mean_score(scores)
        rows.append({"points": name, **scores, "mean": mean})
        if not found or mean > found[0][0]:
            found = [(mean, features)]
    return found[0][1], pd.DataFrame(rows)


def renderings(counts: CountsForm | Literal["auto"], samples_per_class: int) -> list[Rendering]:
    """Forms of counts to try."""
    forms = FORMS if counts == "auto" else (counts,)
    found = []
    for form in forms:
        if form == "mixed" and samples_per_class == 1 and counts == "auto":
            continue
        detections = DETECTIONS if form in ("rounded", "mixed") else (1.0,)
        found += [Rendering(form, detection) for detection in detections]
    return found


def unmatched(matching: MatchingConfig | None = None) -> MatchingConfig:
    """Settings that leave codes as they start."""
    return replace(matching or MatchingConfig(), n_steps=0)


def _counting(on_step: OnStep, phase: str, n_steps: int) -> Callable[[int, dict], None]:
    return lambda step, _: on_step(phase, step + 1, n_steps)
