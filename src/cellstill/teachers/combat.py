"""ComBat on principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from cellstill.errors import InvalidArgumentError
from cellstill.teachers.base import Teacher, TeacherInfo, TeacherInput, TeacherOutput


@dataclass(frozen=True)
class CombatTeacher(Teacher):
    """ComBat (Johnson, Li & Rabinovic 2007) on principal components, through scanpy.

    Location and scale of every component are adjusted per batch, shrunken towards what the batch's components share
    (empirical Bayes). It is run on components, not on genes: a gene-wise run would make the whole matrix dense. The
    adjustment is the same for all cells of a batch, whatever their type; with unequal cell types per batch, protect the
    cell type or take another teacher.

    Notes
    -----
    Covariates are columns of ComBat's design matrix beside the batches, so their effects are fitted jointly and kept.
    """

    info: ClassVar[TeacherInfo] = TeacherInfo(
        name="combat",
        reference="10.1093/biostatistics/kxj037",
        backend="scanpy",
        in_pca_space=True,
        protection="covariates are part of the design matrix",
    )

    def _teach(self, inputs: TeacherInput) -> TeacherOutput:
        import scanpy as sc
        from anndata import AnnData

        sizes = np.bincount(inputs.batch)
        if (sizes < 2).any():
            raise InvalidArgumentError(
                f"teacher='combat': {int((sizes < 2).sum())} batches have a single cell, so they have no variance. "
                "Remove them or join them to another batch."
            )
        # scanpy gives a categorical covariate a column for every level, which together sum to the batches' columns, and
        # inverts the singular result without complaint. Numbers it takes as they are: one level of each is left out.
        reference = np.cumsum([0, *[len(levels) for levels in inputs.design.levels.values()]])[:-1]
        columns = np.delete(inputs.design.encode(inputs.obs).astype(np.float64), reference, axis=1)
        design = np.hstack([np.eye(len(sizes))[inputs.batch], columns])
        if np.linalg.matrix_rank(design) < design.shape[1]:
            raise InvalidArgumentError(
                f"teacher='combat': batch and covariates {inputs.design.keys} are confounded, so ComBat's design "
                "has no unique solution. Protect fewer covariates."
            )
        covariates = [f"covariate{i}" for i in range(columns.shape[1])]
        obs = pd.DataFrame(columns, columns=covariates, index=[str(i) for i in range(len(columns))])
        obs["batch"] = pd.Categorical(inputs.batch)
        cells = AnnData(inputs.pca.astype(np.float64), obs=obs)
        corrected = sc.pp.combat(cells, key="batch", covariates=covariates or None, inplace=False)
        return TeacherOutput(corrected, {})
