"""A trained space as arrays and plain settings, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellstill.condense.generator import Denoiser, GeneratorConfig, OneStepGenerator
from cellstill.condense.latent import Autoencoder, LatentConfig
from cellstill.condense.space import Space
from cellstill.condense.spread import Spread

_PARTS = ("autoencoder", "generator", "teacher")


def space_tensors(space: Space) -> dict[str, np.ndarray]:
    """All arrays of a space, by name."""
    found = {"log_library": space.log_library, "n_detected": space.n_detected}
    for name in _PARTS:
        for key, value in getattr(space, name).state_dict().items():
            found[f"{name}.{key}"] = value.cpu().numpy()
    if space.spread is not None:
        found |= {f"spread.{key}": value.cpu().numpy() for key, value in vars(space.spread).items()}
    return found


def space_config(space: Space) -> dict[str, Any]:
    """Sizes and settings of a space."""
    module = space.autoencoder
    return {
        "n_vars": module.n_vars,
        "n_classes": module.n_classes,
        "n_told": module.n_told,
        "latent": asdict(module.config),
        "generator": asdict(space.config),
        "history": {phase: losses.to_dict(orient="list") for phase, losses in space.history.items()},
    }


def restore_space(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Space:
    """Build a space from :func:`space_tensors` and :func:`space_config`."""
    latent, generator = LatentConfig(**config["latent"]), GeneratorConfig(**config["generator"])
    n_vars, n_classes = config["n_vars"], config["n_classes"]
    start = torch.zeros(n_vars)

    def denoiser() -> Denoiser:
        return Denoiser(latent.n_latent, n_classes, generator.n_hidden, generator.n_blocks)

    autoencoder = Autoencoder(start, start, n_classes, config["n_told"], latent)
    one_step, teacher = OneStepGenerator(denoiser(), generator.kept_noise), denoiser()
    for name, module in zip(_PARTS, (autoencoder, one_step, teacher), strict=True):
        weights = {
            key.removeprefix(f"{name}."): torch.from_numpy(np.array(value))
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        module.load_state_dict(weights)
        module.eval().requires_grad_(False)
    history = {phase: pd.DataFrame(columns).rename_axis(index="epoch") for phase, columns in config["history"].items()}
    spread = None
    if "spread.map" in tensors:
        spread = Spread(*(torch.from_numpy(np.array(tensors[f"spread.{key}"])) for key in ("center", "map")))
    sizes = tensors["log_library"], tensors["n_detected"]
    return Space(autoencoder, one_step, teacher, spread, generator, *sizes, history)
