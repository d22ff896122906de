# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU for means with an additive background and a multiplicative scaling, as in `_kernels`.

And for the prior of the composition of native expression, which the same logits make.
"""

from __future__ import annotations

import numpy as np

from cellstill.nn._kernels import _F, _compile, _exp, _log, _log1p, _nonzeros, _zeros


@_compile
def _means(row, bias, background, amount, scaling, slope, share):
    """``(softplus(logits + bias) + amount * background) * scaling`` in place.

    ``slope`` gets the derivative of its logarithm in the logit, ``share`` that in the logarithm of the background.
    """
    # In three loops: the steps of a long one wait for one another, and a core has few of its turns under way. Until the
    # last, ``share`` holds the logits, and ``slope`` exp(-|logit|).
    for j in range(row.size):
        logit = row[j] + bias[j]
        share[j], slope[j] = logit, _exp(-abs(logit))
    for j in range(row.size):
        row[j] = max(share[j], _F(0)) + _log1p(slope[j])
    for j in range(row.size):
        t, added = slope[j], amount * background[j]
        mean = row[j] + added
        inverse = _F(1) / mean
        slope[j] = (_F(1) if share[j] >= _F(0) else t) / (_F(1) + t) * inverse
        share[j] = added * inverse
        row[j] = mean * scaling[j]


@_compile
def background_rows(
    start,
    stop,
    logits,
    bias,
    size,
    theta,
    inverse_theta,
    group,
    background,
    background_group,
    amount,
    scaling,
    scaling_group,
    weight,
    data,
    indices,
    indptr,
    value,
    grad_size,
    grad_amount,
    grad_theta,
    grad_background,
    grad_scaling,
    grad_bias,
):
    """Log-likelihood of the cells ``start`` to ``stop``, and its gradients times each cell's weight.

    ``logits`` become their own gradient. ``grad_theta``, ``grad_background``, ``grad_scaling`` (the last two in the
    logarithms), of the shapes of what they belong to, and ``grad_bias`` are added to; ``value``, ``grad_size`` and
    ``grad_amount``, the derivatives in the logarithms of size and amount, are filled.
    """
    n_vars = logits.shape[1]
    slope, share = np.empty(n_vars, np.float32), np.empty(n_vars, np.float32)
    grads = np.empty(n_vars, np.float32)
    means, thetas = np.empty(n_vars, np.float32), np.empty(n_vars, np.float32)
    grad_means, grad_thetas = np.empty(n_vars, np.float32), np.empty(n_vars, np.float32)
    for i in range(start, stop):
        row, own, grad_own, w = logits[i], theta[group[i]], grad_theta[group[i]], weight[i]
        of_background, of_scaling = grad_background[background_group[i]], grad_scaling[scaling_group[i]]
        _means(row, bias, background[background_group[i]], amount[i], scaling[scaling_group[i]], slope, share)
        total, common = _zeros(row, size[i], own, inverse_theta[group[i]], w, grads, grad_own)

        first, n_counts = indptr[i], indptr[i + 1] - indptr[i]
        genes, counts = indices[first : first + n_counts], data[first : first + n_counts]
        for k in range(n_counts):
            means[k], thetas[k] = row[genes[k]], own[genes[k]]
        total += _nonzeros(counts, means, thetas, grad_means, grad_thetas)
        for k in range(n_counts):
            grads[genes[k]] += grad_means[k]
            common += grad_means[k]
            grad_own[genes[k]] += w * grad_thetas[k]

        from_background = _F(0)
        for j in range(n_vars):
            grad = w * grads[j]
            of_scaling[j] += grad
            of_background[j] += grad * share[j]
            from_background += grad * share[j]
            grad *= slope[j]
            row[j] = grad
            grad_bias[j] += grad
        value[i], grad_size[i], grad_amount[i] = total, w * common, from_background


@_compile
def sparse_composition(
    start, stop, logits, bias, per_typical, concentration, rate, floor, constant, weight, value, grads, grad_bias
):
    """Penalty of native expression, softplus of ``logits + bias``, of the cells ``start`` to ``stop``.

    ``per_typical`` is one over the typical share of each feature, ``constant`` the normaliser of the log density.
    ``value`` is filled, and ``grads`` with the gradient in the logits times each cell's weight, which is added to
    ``grad_bias``, too.
    """
    n_vars = bias.size
    native, slope = np.empty(n_vars, np.float32), np.empty(n_vars, np.float32)
    for i in range(start, stop):
        row, own, w, total = logits[i], grads[i], weight[i], _F(0)
        for j in range(n_vars):
            logit = row[j] + bias[j]
            t = _exp(-abs(logit))
            native[j] = max(logit, _F(0)) + _log1p(t)
            slope[j] = (_F(1) if logit >= _F(0) else t) / (_F(1) + t)
            total += native[j]
        penalty, along, per_total = _F(0), _F(0), _F(1) / total
        for j in range(n_vars):
            r = native[j] * per_total * per_typical[j]
            square = r * r + _F(floor) * _F(floor)
            size = np.sqrt(square)
            penalty += (_F(1) - _F(concentration)) * _F(0.5) * _log(square) + _F(rate) * size
            # In the ratio.
            grad = ((_F(1) - _F(concentration)) / square + _F(rate) / size) * r
            along += grad * r
            own[j] = grad
        for j in range(n_vars):
            grad = w * per_total * (own[j] * per_typical[j] - along) * slope[j]
            own[j] = grad
            grad_bias[j] += grad
        value[i] = penalty - _F(n_vars) * _F(constant)
