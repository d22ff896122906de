"""What a teacher is given, what it returns, and the registry of teachers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from cellstill.data.covariates import CovariateDesign
from cellstill.errors import InvalidArgumentError, check_option

TEACHERS: dict[str, type[Teacher]] = {}
"""Teachers by name."""


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What there is to know about a teacher.

    Attributes
    ----------
    name
        Name in the registry and on the command line.
    reference
        DOI of the paper, or a sentence.
    backend
        Library that computes it.
    in_pca_space
        The result has the coordinates of the principal components it was given.
    protection
        How ``covariate_keys`` are protected; empty if the teacher cannot protect any.
    """

    name: str
    reference: str
    backend: str
    in_pca_space: bool
    protection: str


@dataclass(frozen=True, kw_only=True)
class TeacherInput:
    """What every teacher may use.

    Attributes
    ----------
    pca
        Principal components, shape ``(n_obs, n_comps)``.
    batch
        Batch codes, int, shape ``(n_obs,)``; every code from 0 to the largest occurs.
    obs
        Cell annotations, with the covariates.
    design
        Covariates to protect.
    obsm
        Other embeddings of the same cells.
    seed
        Seed of whatever is random.
    """

    pca: np.ndarray
    batch: np.ndarray
    obs: pd.DataFrame
    design: CovariateDesign = field(default_factory=lambda: CovariateDesign({}, {}))
    obsm: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher returns.

    Attributes
    ----------
    embedding
        Batch-corrected coordinates z*, float32, shape ``(n_obs, n_latent)``.
    record
        How it went, in a form that JSON can hold: iterations, convergence.
    """

    embedding: np.ndarray
    record: dict[str, Any]


class Teacher(ABC):
    """A batch-correction method that a :class:`~cellstill.Distiller` learns from.

    A teacher is a frozen dataclass of settings, an :attr:`info`, and a pure function :meth:`_teach`.
    """

    info: ClassVar[TeacherInfo]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "info" in cls.__dict__:
            # A subclass without an info of its own does not take its parent's place.
            TEACHERS[cls.info.name] = cls

    def teach(self, inputs: TeacherInput) -> TeacherOutput:
        """Correct the batch.

        Raises
        ------
        InvalidArgumentError
            Covariates are named and the teacher cannot protect them, or the result is not finite.
        """
        if inputs.design.keys and not self.info.protection:
            raise InvalidArgumentError(
                f"covariate_keys={inputs.design.keys}: the teacher {self.info.name!r} cannot protect covariates. "
                f"Teachers that can: {[name for name, cls in TEACHERS.items() if cls.info.protection]}."
            )
        output = self._teach(inputs)
        n_obs = len(inputs.pca)
        if output.embedding.ndim != 2 or len(output.embedding) != n_obs:
            raise InvalidArgumentError(
                f"The teacher {self.info.name!r} returned shape {output.embedding.shape} for {n_obs} cells; "
                "it has to return one row per cell."
            )
        if not np.isfinite(output.embedding).all():
            raise InvalidArgumentError(
                f"The teacher {self.info.name!r} returned values that are not finite. "
                "Check for batches with very few cells."
            )
        return TeacherOutput(np.ascontiguousarray(output.embedding, dtype=np.float32), output.record)

    @abstractmethod
    def _teach(self, inputs: TeacherInput) -> TeacherOutput: ...

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings, in a form that JSON can hold."""
        return {"name": self.info.name, "settings": dataclasses.asdict(self)}  # type: ignore[call-overload]


def get_teacher(name: str, **settings: Any) -> Teacher:
    """Build a teacher by its name in the registry.

    Raises
    ------
    InvalidArgumentError
        Unknown name or setting; the message lists those that exist.
    """
    check_option("teacher", name, TEACHERS)
    known = [f.name for f in dataclasses.fields(TEACHERS[name])]  # type: ignore[arg-type]
    for setting in settings:
        check_option(f"setting of teacher {name!r}", setting, known)
    return TEACHERS[name](**settings)
