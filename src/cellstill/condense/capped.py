"""Classes with fewer cells than they are to get."""

from __future__ import annotations

import warnings

import numpy as np

from cellstill.condense.problem import CondensationProblem
from cellstill.errors import CellstillWarning, level_outside

_MAX_NAMED = 8


def warn_about_capped_classes(problem: CondensationProblem, samples_per_class: int) -> None:
    """Say which classes get fewer synthetic cells than asked for, and whether anything is compressed at all.

    Raises
    ------
    InvalidArgumentError
        ``samples_per_class`` is no whole number of at least 1.
    """
    budget = problem.budget(samples_per_class)
    sizes = np.bincount(problem.train.codes, minlength=problem.n_classes)
    small = [f"{problem.classes[code]} ({sizes[code]})" for code in np.flatnonzero(budget < samples_per_class)]
    message = ""
    if small:
        shown = ", ".join(small[:_MAX_NAMED]) + (", ..." if len(small) > _MAX_NAMED else "")
        message = (
            f"{len(small)} of {problem.n_classes} classes have fewer than samples_per_class={samples_per_class} cells "
            f"to learn from, and get as many synthetic cells as these: {shown}. "
        )
        if (sizes == 1).any():
            message += "What is synthesised from a single cell may tell what that cell expresses. "
    if (budget == sizes).all():
        message += f"samples_per_class={samples_per_class} leaves no class smaller: there is no compression. Lower it."
    if message:
        # Its caller's caller is who chose the number.
        warnings.warn(message.rstrip(), CellstillWarning, stacklevel=level_outside())
