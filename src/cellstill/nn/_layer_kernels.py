# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU for hidden layers, as in `_kernels`: what stands between two matrix products."""

from __future__ import annotations

import numpy as np

from cellstill.nn._kernels import _F, _compile

# Of splitmix64 (Steele, Lea & Flood 2014): the step from one word to the next, and the two multipliers.
_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@_compile
def normed_relu(start, stop, bias, scale, shift, eps, rows, out, inverse):
    """``relu(LayerNorm(rows + bias))`` of the rows ``start`` to ``stop``, which are standardised in place.

    ``inverse`` gets one over their standard deviations.
    """
    n = rows.shape[1]
    for i in range(start, stop):
        total, squares = _F(0), _F(0)
        row, result = rows[i], out[i]
        for j in range(n):
            value = row[j] + bias[j]
            row[j] = value
            total += value
        mean = total / _F(n)
        for j in range(n):
            value = row[j] - mean
            row[j] = value
            squares += value * value
        own = _F(1) / np.sqrt(squares / _F(n) + _F(eps))
        inverse[i] = own
        for j in range(n):
            row[j] *= own
            value = row[j] * scale[j] + shift[j]
            # What is not a number stays so.
            result[j] = _F(0) if value <= _F(0) else value


@_compile
def normed_relu_backward(start, stop, grad, scale, out, standard, inverse, grad_rows, sums):
    """Gradients of :func:`normed_relu`: ``grad_rows`` is filled; those of scale, shift and bias are added to ``sums``.

    ``out`` and ``standard`` are what that function has made of its rows.
    """
    n = grad.shape[1]
    grad_scale, grad_shift, grad_bias = sums[0], sums[1], sums[2]
    for i in range(start, stop):
        row, own = standard[i], grad_rows[i]
        total, along = _F(0), _F(0)
        for j in range(n):
            outer = _F(0) if out[i, j] <= _F(0) else grad[i, j]
            grad_shift[j] += outer
            grad_scale[j] += outer * row[j]
            own[j] = outer * scale[j]
            total += own[j]
            along += own[j] * row[j]
        total /= _F(n)
        along /= _F(n)
        for j in range(n):
            value = (own[j] - total - row[j] * along) * inverse[i]
            own[j] = value
            grad_bias[j] += value


@_compile
def _random_words(seed, n):
    words = np.empty(n, np.uint64)
    for k in range(n):
        word = np.uint64(seed) + np.uint64(k + 1) * _STEP
        word = (word ^ (word >> np.uint64(30))) * _FIRST
        word = (word ^ (word >> np.uint64(27))) * _SECOND
        words[k] = word ^ (word >> np.uint64(31))
    return words


@_compile
def drop(values, seed, lowest, scale):
    """Values times ``scale``, and zeros where 16 random bits are below ``lowest``: four draws from each word."""
    bits = _random_words(seed, (values.size + 3) // 4).view(np.int16)
    out, kept = np.empty_like(values), _F(scale)
    for k in range(values.size):
        out[k] = values[k] * (kept if bits[k] >= lowest else _F(0))
    return out
