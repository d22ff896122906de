"""One trained space for all that condenses a problem with a seed."""

from __future__ import annotations

import weakref

from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.space import Space, fit_space

_Key = tuple[int, LatentConfig, GeneratorConfig]
_spaces: weakref.WeakKeyDictionary[CondensationProblem, dict[_Key | None, Space]] = weakref.WeakKeyDictionary()
"""Spaces by what they were trained with; that of :func:`use_space` by ``None``."""


def shared_space(
    problem: CondensationProblem,
    seed: int = 0,
    latent: LatentConfig | None = None,
    generator: GeneratorConfig | None = None,
) -> Space:
    """Latent space and generator of a problem, trained at the first call and kept as long as the problem is.

    Parameters
    ----------
    problem
        Cells.
    seed
        Of the training.
    latent, generator
        Settings; ``None`` takes the defaults. With neither, the space of :func:`use_space` is taken if there is one,
        whatever the seed.
    """
    kept = _spaces.setdefault(problem, {})
    if latent is None and generator is None and None in kept:
        return kept[None]
    latent, generator = latent or LatentConfig(), generator or GeneratorConfig()
    key = (seed, latent, generator)
    if key not in kept:
        kept[key] = fit_space(problem, latent, generator, seed=seed)
    return kept[key]


def share_space(problem: CondensationProblem, seed: int, space: Space) -> None:
    """Let :func:`shared_space` find a space that was trained on a problem already.

    Parameters
    ----------
    problem, seed
        What it was trained on, and with.
    space
        Trained; its settings are those it is found by.
    """
    _spaces.setdefault(problem, {})[seed, space.autoencoder.config, space.config] = space


def use_space(problem: CondensationProblem, space: Space) -> None:
    """Let :func:`shared_space` return a trained space wherever no settings are asked for, whatever the seed.

    So methods that ask for the space of the defaults, such as the baselines of the latent space, share one of other
    settings; their seeds then tell of condensing, not of training.

    Parameters
    ----------
    problem
        Cells to condense.
    space
        Trained on their like: with the same genes and classes.
    """
    _spaces.setdefault(problem, {})[None] = space
