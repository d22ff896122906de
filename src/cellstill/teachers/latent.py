"""Teachers that compute nothing: an embedding that is there already, and no correction at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError, check_key
from cellstill.teachers.base import Teacher, TeacherInfo, TeacherInput, TeacherOutput


@dataclass(frozen=True)
class LatentTeacher(Teacher):
    """Any embedding in ``adata.obsm``: an scVI or ``cellstill.vi`` latent, or the result of any other method.

    Parameters
    ----------
    obsm_key
        Key of the embedding, shape ``(n_obs, n_latent)``. The student has its number of dimensions.

    Notes
    -----
    What the embedding protects was decided when it was made, so ``covariate_keys`` is refused.
    """

    obsm_key: str

    info: ClassVar[TeacherInfo] = TeacherInfo(
        name="latent",
        reference="the method that made the embedding",
        backend="none",
        in_pca_space=False,
        protection="",
    )

    def _teach(self, inputs: TeacherInput) -> TeacherOutput:
        check_key("obsm_key", self.obsm_key, "adata.obsm", inputs.obsm.keys())
        found = inputs.obsm[self.obsm_key]
        embedding = np.asarray(found.toarray() if sp.issparse(found) else found, dtype=np.float32)
        if embedding.ndim != 2 or not np.isfinite(embedding).all():
            raise InvalidArgumentError(
                f"obsm_key={self.obsm_key!r}: adata.obsm[{self.obsm_key!r}] has shape {embedding.shape} and "
                f"{int((~np.isfinite(embedding)).sum())} values that are not finite. Give a finite matrix with one row "
                "per cell."
            )
        return TeacherOutput(embedding.copy(), {"obsm_key": self.obsm_key})


@dataclass(frozen=True)
class IdentityTeacher(Teacher):
    """The principal components themselves: the null, against which a correction has to show its worth."""

    info: ClassVar[TeacherInfo] = TeacherInfo(
        name="identity",
        reference="principal component analysis",
        backend="none",
        in_pca_space=True,
        protection="nothing is removed",
    )

    def _teach(self, inputs: TeacherInput) -> TeacherOutput:
        return TeacherOutput(inputs.pca, {})
