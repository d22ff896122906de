"""One trained space for all that condenses a problem with a seed."""

from __future__ import annotations

import weakref

from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.space import Space, fit_space

_Key = tuple[int, LatentConfig, GeneratorConfig]
_spaces: weakref.WeakKeyDictionary[CondensationProblem, dict[_Key, Space]] = weakref.WeakKeyDictionary()


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
        Settings; ``None`` takes the defaults.
    """
    latent, generator = latent or LatentConfig(), generator or GeneratorConfig()
    kept = _spaces.setdefault(problem, {})
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
