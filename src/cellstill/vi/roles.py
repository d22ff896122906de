"""What each modality measures, and what follows for its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cellstill.errors import InvalidArgumentError, check_option
from cellstill.vi.config import Background

Role = Literal["rna", "atac", "protein"]


@dataclass(frozen=True)
class RoleDefaults:
    """Parts of the model that a role has by default.

    Attributes
    ----------
    background, feature_scaling
        See :class:`~cellstill.vi.config.ModalityConfig`.
    at_most_one
        Library sizes are on the scale on which the largest mean expression of a feature is 1.
    relative_lr
        Learning rate of its parameters, as a multiple of that of the model.
    """

    background: Background | None
    feature_scaling: bool
    at_most_one: bool = False
    relative_lr: float = 1.0


ROLES: dict[str, RoleDefaults] = {
    # Ambient molecules are captured with the cell's own.
    "rna": RoleDefaults(background="profile", feature_scaling=False),
    # Peaks differ by GC content, mappability and calling. Each is seen in few cells, and Adam's steps are as large for
    # these as for any other feature: at the rate of RNA, cells are learned by heart within a few epochs.
    "atac": RoleDefaults(background=None, feature_scaling=True, relative_lr=0.2),
    # Antibodies bind without their target, and few kinds are counted: no rate can be told from those that lack one.
    # Some have hundreds of counts in a cell: softplus would have to change by hundreds, where it is a line; below 1 it
    # is about exponential, and expression learns to change by factors.
    "protein": RoleDefaults(background="free", feature_scaling=False, at_most_one=True),
}

_KINDS_OF_RNA = ("spliced", "unspliced")

_NAMES: dict[str, tuple[str, ...]] = {
    "rna": ("rna", "gex", "gene", "genes", "expression", "transcriptome", "spliced", "unspliced", "mrna", "scrna"),
    "atac": ("atac", "peak", "peaks", "accessibility", "chromatin", "fragments", "scatac", "tiles"),
    "protein": ("protein", "proteins", "prot", "adt", "antibody", "antibodies", "cite", "surface"),
}


def resolve_roles(modalities: Sequence[str], given: Mapping[str, str] | None) -> dict[str, str]:
    """Find the role of each modality.

    Parameters
    ----------
    modalities
        Names.
    given
        Roles by modality, where ``"spliced"`` and ``"unspliced"`` are ``"rna"``; those left out are guessed from common
        names, such as ``"gex"`` or ``"peaks"``.

    Raises
    ------
    InvalidArgumentError
        A role is unknown, belongs to no modality, or can be neither found nor guessed.
    """
    given = dict(given or {})
    for name, role in given.items():
        check_option("modality_roles", name, modalities)
        check_option(f"modality_roles[{name!r}]", role, (*ROLES, *_KINDS_OF_RNA))
        given[name] = "rna" if role in _KINDS_OF_RNA else role
    roles = {name: given.get(name) or _guess(name) for name in modalities}
    unknown = [name for name, role in roles.items() if role is None]
    if unknown:
        raise InvalidArgumentError(
            f"What the modality {unknown[0]!r} measures cannot be told from its name. Say so: "
            f"modality_roles={{{unknown[0]!r}: ...}}, with one of {list(ROLES)}."
        )
    return {name: role for name, role in roles.items() if role is not None}


def by_role(roles: Mapping[str, str]) -> list[str]:
    """Modalities by role, and those of one role by name.

    Random numbers are drawn for them in this order: what they are called changes nothing.
    """
    return sorted(roles, key=lambda name: (list(ROLES).index(roles[name]), name))


def _guess(name: str) -> str | None:
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    found = {role for role, names in _NAMES.items() if any(word in names for word in words)}
    return found.pop() if len(found) == 1 else None
