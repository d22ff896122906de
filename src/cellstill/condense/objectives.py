"""What synthetic cells are to have in common with real ones: gradients, moments, and what is learned from them."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as nnf

from cellstill.condense.pool import Probe


def gradient_distance(
    probe: Probe, real: torch.Tensor, real_label: torch.Tensor, made: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    r"""Distance of the gradients of cross-entropy on real and on synthetic cells, class by class.

    .. math:: \frac1C \sum_c \sum_{\text{layers}} \frac{1}{R} \sum_{\text{rows } r}
        \Big(1 - \cos\big(\nabla_{W_r} L_{real}^c,\; \nabla_{W_r} L_{synthetic}^c\big)\Big)

    Parameters without rows, the biases, are skipped, and rows that are zero on both sides do not differ (Zhao, Mopuri
    & Bilen 2021, Dataset condensation with gradient matching).

    Parameters
    ----------
    probe
        Network.
    real, real_label, made, label
        Log expression and classes.
    """
    matrices = probe.parameters[::2]
    total = made.new_zeros(())
    classes = label.unique()
    for code in classes.tolist():
        of_real = nnf.cross_entropy(probe.logits(real[real_label == code]), real_label[real_label == code])
        of_made = nnf.cross_entropy(probe.logits(made[label == code]), label[label == code])
        wanted = torch.autograd.grad(of_real, matrices)
        found = torch.autograd.grad(of_made, matrices, create_graph=True)
        for one, other in zip(wanted, found, strict=True):
            moved = (one != 0).any(dim=1) | (other.detach() != 0).any(dim=1)
            cosine = nnf.cosine_similarity(one.detach(), other, dim=1, eps=1e-12)
            total = total + ((1 - cosine) * moved).mean()
    return total / len(classes)


def distribution_distance(
    probe: Probe, real: torch.Tensor, real_label: torch.Tensor, made: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    r"""Squared distance of the classes' means and variances under random features, per feature.

    Means as Zhao & Bilen (2023, Dataset condensation with distribution matching); variances in units of the features'
    overall spread, where a class has at least two synthetic cells, so that its spread survives.
    """
    with torch.no_grad():
        wanted = probe.features(real)
    found = probe.features(made)
    spread = wanted.std(dim=0).mean().clamp(min=1e-6)
    total = made.new_zeros(())
    classes = label.unique()
    for code in classes.tolist():
        one, other = wanted[real_label == code], found[label == code]
        total = total + ((one.mean(dim=0) - other.mean(dim=0)) / spread).square().mean()
        if len(one) > 1 and len(other) > 1:
            deviation = one.var(dim=0).sqrt() - (other.var(dim=0) + 1e-8).sqrt()
            total = total + (deviation / spread).square().mean()
    return total / len(classes)


def outcome_loss(
    real: torch.Tensor,
    real_label: torch.Tensor,
    made: torch.Tensor,
    label: torch.Tensor,
    n_classes: int,
    strength: float = 0.1,
) -> torch.Tensor:
    r"""What a classifier fitted to the synthetic cells alone gets wrong on real ones.

    Kernel ridge regression has its solution in closed form, through which gradients reach the synthetic cells:

    .. math:: \hat Y = K_{rs} (K_{ss} + \lambda \tfrac{\mathrm{tr} K_{ss}}{n} I)^{-1} Y_s

    with the kernel of an infinitely wide ReLU network (Cho & Saul 2009), averaged with the linear one (Nguyen, Chen &
    Lee 2021, Dataset meta-learning from kernel ridge regression).

    Parameters
    ----------
    real, real_label, made, label, n_classes
        Log expression, classes, and their number.
    strength
        :math:`\lambda`. Larger asks less of single synthetic cells, and moves them less.

    Returns
    -------
    Mean squared error of the real cells' one-hot classes, each class weighing the same.
    """
    unit = made.detach().norm(dim=1).mean().clamp(min=1e-6)
    across, within = _kernel(real / unit, made / unit), _kernel(made / unit, made / unit)
    ridge = strength * within.diagonal().mean() * torch.eye(len(made), dtype=made.dtype, device=made.device)
    targets = nnf.one_hot(label, n_classes).to(made.dtype) - 1 / n_classes
    predicted = across @ torch.linalg.solve(within + ridge, targets)
    wanted = nnf.one_hot(real_label, n_classes).to(made.dtype) - 1 / n_classes
    weight = 1 / torch.bincount(real_label, minlength=n_classes).to(made.dtype)[real_label]
    return ((predicted - wanted).square().sum(dim=1) * weight).sum() / weight.sum()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
    # Slightly inside: at 1 the derivative of the angle is infinite.
    cosine = (x @ y.t() / lengths.clamp(min=1e-12)).clamp(-1 + 1e-5, 1 - 1e-5)
    wide = ((1 - cosine.square()).sqrt() + (math.pi - torch.arccos(cosine)) * cosine) / math.pi
    return lengths * (wide + cosine) / 2
