# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU for parameters by group and feature and for their priors, as in `_kernels`."""

from __future__ import annotations

import numpy as np

from cellstill.nn._kernels import _F, _compile, _exp, _log, _log1p

_INFINITE, _LARGEST = _F(np.inf), _F(88)
_CHUNK = 4096
"""Numbers added up in single precision."""


@_compile
def log_normal(start, stop, mean, log_sigma, noise, out, slope):
    """Fill ``out`` with ``exp(mean + sigma * noise)``, and ``slope`` with its derivative in ``log_sigma``."""
    for j in range(start, stop):
        deviation = (_exp(log_sigma[j]) if log_sigma[j] < _LARGEST else _INFINITE) * noise[j]
        power = mean[j] + deviation
        # Above it the approximation stays where it is.
        value = _INFINITE if power > _LARGEST else _exp(power)
        out[j], slope[j] = value, value * deviation


@_compile
def containment(mean, log_sigma, log_rate, constant, grad_mean, grad_log_sigma, grad_log_rate):
    """Sum of the divergences from the containment prior, up to ``constant`` for each; fills its gradients."""
    n, total = mean.shape[1], 0.0
    for d in range(mean.shape[0]):
        m, s, rate = mean[d], log_sigma[d], _F(np.exp(log_rate[d]))
        own, other, rest, above = grad_mean[d], grad_log_sigma[d], _F(0), _F(0)
        for j in range(n):
            square = _exp(_F(2) * s[j])
            u = _exp(_F(0.125) * square - _F(0.5) * m[j])
            above += u
            rest += _F(0.5) * m[j] - s[j]
            own[j] = _F(0.5) - _F(0.5) * rate * u
            other[j] = _F(0.25) * rate * u * square - _F(1)
        total += rate * above + rest + n * (constant - log_rate[d])
        grad_log_rate[d] = rate * above - _F(n)
    return total


@_compile
def log_softplus(start, stop, x, out, slope):
    """Fill ``out`` with the logarithm of softplus, at least -87, and ``slope`` with its derivative."""
    for j in range(start, stop):
        t = _exp(-abs(x[j]))
        value = max(x[j], _F(0)) + _log1p(t)
        # The logarithm of bits would turn what is not finite into a number.
        out[j] = _log(value) if abs(x[j]) < _INFINITE else x[j]
        slope[j] = (_F(1) if x[j] >= _F(0) else t) / ((_F(1) + t) * value)


@_compile
def gamma(log_x, power, rate, constant, grad):
    """Sum of the log densities of a Gamma; fills its gradient.

    ``power`` is the concentration where they are densities of the logarithm, and 1 less where they are densities of x.
    ``constant`` is their normaliser, at large concentrations about as large as the rest, and of the other sign.
    """
    total = 0.0
    for first in range(0, log_x.size, _CHUNK):
        value = _F(0)
        for j in range(first, min(first + _CHUNK, log_x.size)):
            x = _F(rate) * _exp(log_x[j])
            value += (_F(power) * log_x[j] - x) + _F(constant)
            grad[j] = _F(power) - x
        total += float(value)
    return total


@_compile
def lognormal_exponential(mean, log_sigma, rate, constant, grad_mean, grad_log_sigma):
    """Sum of the divergences of LogNormals from an Exponential, up to ``constant`` for each; fills its gradients."""
    total = 0.0
    for j in range(mean.size):
        square = np.exp(_F(2) * log_sigma[j])
        expected = _F(rate) * np.exp(mean[j] + _F(0.5) * square)
        total += expected - mean[j] - log_sigma[j] + constant
        grad_mean[j], grad_log_sigma[j] = expected - _F(1), expected * square - _F(1)
    return total


@_compile
def normal_draw(mean, variance, noise, out, slope):
    """Fill ``out`` with ``mean + sqrt(variance) * noise``, and ``slope`` with its derivative in ``variance``."""
    for j in range(mean.size):
        sigma = np.sqrt(variance[j])
        out[j], slope[j] = mean[j] + sigma * noise[j], _F(0.5) * noise[j] / sigma


@_compile
def normal_kl(mean, variance, prior_mean, prior_variance, out):
    """Fill ``out`` with the divergence of each row from its prior; one prior of each row, or one for all."""
    for i in range(mean.shape[0]):
        p = i if prior_mean.size > 1 else 0
        center, inverse, total = prior_mean[p], _F(1) / prior_variance[p], _F(0)
        for j in range(mean.shape[1]):
            distance, ratio = mean[i, j] - center, variance[i, j] * inverse
            above = _log(ratio) if ratio > _F(0) else -_INFINITE
            total += ratio + distance * distance * inverse - _F(1) - above
        out[i] = _F(0.5) * total


@_compile
def normal_kl_backward(mean, variance, prior_mean, prior_variance, grad, grad_mean, grad_variance):
    """Gradients of :func:`normal_kl`, times the ``grad`` of each row; both are filled."""
    for i in range(mean.shape[0]):
        p = i if prior_mean.size > 1 else 0
        center, inverse = prior_mean[p], _F(1) / prior_variance[p]
        for j in range(mean.shape[1]):
            grad_mean[i, j] = grad[i] * (mean[i, j] - center) * inverse
            grad_variance[i, j] = grad[i] * _F(0.5) * (inverse - _F(1) / variance[i, j])
