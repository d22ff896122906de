"""The spread of classes, given back to cells that are generated without matching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cellstill.condense.generator import OneStepGenerator

N_SAMPLES = 4096
"""Samples from which the generator's own spread is known."""


@dataclass(frozen=True, eq=False)
class Spread:
    r"""Linear map of generated z, within classes: :math:`z \mapsto m_c + A (z - m_c)`.

    The one-step generator is tuned by distances, which are sums over all dimensions: the variance within a class is
    right in total, and in wrong directions. Where cells of a class differ most it may reach half of theirs, which is
    made up for where they hardly differ and the decoder hardly looks.

    Attributes
    ----------
    center
        Mean m of what is generated of each class, shape ``(n_classes, n_latent)``.
    map
        A, shape ``(n_latent, n_latent)``.
    """

    center: torch.Tensor
    map: torch.Tensor

    def __call__(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return z with the spread of real cells, shape ``(n, n_latent)``."""
        center = self.center[label]
        return center + (z - center) @ self.map.t()


def fit_spread(
    generator: OneStepGenerator, z: torch.Tensor, codes: np.ndarray, n_classes: int, seed: int = 0
) -> Spread:
    r"""Find the map that gives samples the covariance within classes that real cells have.

    .. math:: A = \Sigma_g^{-1/2} (\Sigma_g^{1/2} \Sigma \Sigma_g^{1/2})^{1/2} \Sigma_g^{-1/2}, \qquad
        \Sigma = \frac{n \Sigma_z + d \Sigma_g}{n + d}

    moves samples least of all that do so (Peyré & Cuturi 2019, remark 2.31). Covariances are within classes, pooled in
    proportion to the root of a class's size, as cells are shown to the generator. That of real cells counts as much as
    the n deviations from class means that it rests on, and that of samples as much as d, the number of dimensions: the
    fewer cells, the closer is A to the identity.

    Parameters
    ----------
    generator
        Tuned to one step.
    z, codes
        Training cells in the latent space, ``(n_train, n_latent)``, and their classes.
    n_classes
        Number of classes.
    seed
        Of the samples.
    """
    label = torch.from_numpy(codes)
    weight = torch.bincount(label, minlength=n_classes).double().sqrt()
    drawn = torch.repeat_interleave(torch.arange(n_classes), (N_SAMPLES * weight / weight.sum()).long().clamp(min=2))
    noise = torch.randn(len(drawn), z.shape[1], generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        made = generator(noise.to(z.device), drawn.to(z.device)).cpu()
    center, generated, _ = _within(made, drawn, weight)
    _, real, n_free = _within(z.cpu(), label, weight)
    # The scale of rounding, so that a direction without variance has an inverse.
    floor = 1e-8 * float(generated.diagonal().mean()) * torch.eye(len(generated), dtype=generated.dtype)
    generated = generated + floor
    share = n_free / (n_free + z.shape[1])
    root, inverse = _power(generated, 0.5), _power(generated, -0.5)
    found = inverse @ _power(root @ (share * real + (1 - share) * generated) @ root, 0.5) @ inverse
    # Ordinary tensors: those of inference mode could not be part of a gradient.
    return Spread(center.float().clone().to(z.device), found.float().to(z.device))


def _within(z: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Class means, pooled covariance within classes, and the number of deviations that are free."""
    z = z.double()
    center, total = z.new_zeros(len(weight), z.shape[1]), z.new_zeros(z.shape[1], z.shape[1])
    counted, n_free = 0.0, 0
    for code in range(len(weight)):
        own = z[label == code]
        if len(own):
            center[code] = own.mean(dim=0)
        if len(own) > 1:
            away = own - center[code]
            total += weight[code] * (away.t() @ away) / (len(own) - 1)
            counted, n_free = counted + float(weight[code]), n_free + len(own) - 1
    return center, total / max(counted, 1e-12), n_free


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).pow(exponent)) @ vectors.t()
