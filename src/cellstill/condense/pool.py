"""Networks that matching draws from: fresh weights at each step, in several architectures."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import nn


class Probe(NamedTuple):
    """A classifier as a function of its parameters, so that its gradients can be differentiated.

    Attributes
    ----------
    parameters
        Matrices ``(n_out, n_in)`` and biases by turns; the last pair is the classifier.
    """

    parameters: list[torch.Tensor]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the last layer sees, shape ``(n, n_features)``."""
        for weight, bias in zip(self.parameters[:-2:2], self.parameters[1:-2:2], strict=True):
            x = torch.relu(nn.functional.linear(x, weight, bias))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the classes, shape ``(n, n_classes)``."""
        return nn.functional.linear(self.features(x), *self.parameters[-2:])


WIDTHS: dict[str, tuple[int, ...]] = {"linear": (), "mlp_64": (64,), "mlp_256": (256,), "mlp_256_128": (256, 128)}
"""Hidden layers of the pool's architectures."""


def draw_probe(name: str, n_vars: int, n_classes: int, device: torch.device) -> Probe:
    """Draw an architecture's weights as torch does for linear layers (Kaiming)."""
    sizes = [n_vars, *WIDTHS[name], n_classes]
    parameters: list[torch.Tensor] = []
    for n_in, n_out in itertools.pairwise(sizes):
        bound = n_in**-0.5
        for shape in ((n_out, n_in), (n_out,)):
            parameters.append(torch.empty(shape, device=device).uniform_(-bound, bound).requires_grad_(True))
    return Probe(parameters)


def train_probe(probe: Probe, x: torch.Tensor, label: torch.Tensor, n_steps: int, lr: float = 1e-3) -> Probe:
    """Take steps of Adam on cells, and return the probe with fresh parameters."""
    if not n_steps:
        return probe
    parameters = [part.detach().clone().requires_grad_(True) for part in probe.parameters]
    trained = Probe(parameters)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    with torch.enable_grad():
        for _ in range(n_steps):
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(trained.logits(x), label).backward()
            optimiser.step()
    return trained
