# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU: a count likelihood with its gradients row by row.

Numba compiles them on first use and keeps the machine code on disk. They read and write NumPy arrays in float32,
release the interpreter's lock, and work on a range of rows or columns, so that threads can share the work.

The approximations of ``exp`` and ``log`` are polynomials (Cephes' coefficients, relative error below 3e-7) without
branches, which the compiler turns into vector instructions; calls to the C library would run one value at a time.
"""

from __future__ import annotations

import numba
import numpy as np

_F = np.float32
_LN2 = _F(0.69314718)
_HALF_LOG_2PI = _F(0.9189385332)
# All but the assumption that nothing is infinite: a loss that is not finite has to show.
_FAST = {"reassoc", "nsz", "arcp", "contract", "afn"}

_inline = numba.njit(inline="always", error_model="numpy")
_compile = numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy", boundscheck=False)


@_inline
def _exp(x):
    x = min(max(x, _F(-87.0)), _F(88.0))
    n = np.floor(x * _F(1.44269504) + _F(0.5))
    r = x - n * _F(0.693359375) + n * _F(2.12194440e-4)
    p = _F(1.9875691500e-4)
    p = p * r + _F(1.3981999507e-3)
    p = p * r + _F(8.3334519073e-3)
    p = p * r + _F(4.1665795894e-2)
    p = p * r + _F(1.6666665459e-1)
    p = p * r + _F(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + _F(1)) * power


@_inline
def _exponent(x):
    """Power of two that brings x between sqrt(1/2) and sqrt(2)."""
    # Numba makes 64 bits of differences of 32, and vectors of those are several times as slow.
    above = np.int32(np.float32(x).view(np.int32) - np.int32(0x3F3504F3))
    return np.int32(above >> np.int32(23))


@_inline
def _log_near_one(m):
    """log(1 + m), sqrt(1/2) <= 1 + m <= sqrt(2)."""
    p = _F(7.0376836292e-2)
    p = p * m + _F(-1.1514610310e-1)
    p = p * m + _F(1.1676998740e-1)
    p = p * m + _F(-1.2420140846e-1)
    p = p * m + _F(1.4249322787e-1)
    p = p * m + _F(-1.6668057665e-1)
    p = p * m + _F(2.0000714765e-1)
    p = p * m + _F(-2.4999993993e-1)
    p = p * m + _F(3.3333331174e-1)
    square = m * m
    return (m * square * p - _F(0.5) * square) + m


@_inline
def _log(x):
    e = _exponent(x)
    m = np.int32(np.float32(x).view(np.int32) - (e << np.int32(23))).view(np.float32) - _F(1)
    return _log_near_one(m) + _F(e) * _LN2


@_inline
def _log1p(x):
    e = _exponent(_F(1) + x)
    # (1 + x) / 2^e - 1, without rounding 1 + x first.
    scale = np.int32((np.int32(127) - e) << np.int32(23)).view(np.float32)
    return _log_near_one(x * scale + (scale - _F(1))) + _F(e) * _LN2


@_inline
def _stirling(u):
    square = u * u
    return u * (_F(1 / 12) - square * (_F(1 / 360) - square * _F(1 / 1260)))


@_inline
def _digamma_tail(u):
    square = u * u
    return -u * _F(0.5) - square * (_F(1 / 12) - square * (_F(1 / 120) - square * _F(1 / 252)))


@_inline
def _product(z):
    return z * (z + _F(1)) * (z + _F(2)) * (z + _F(3))


@_inline
def _ordered(bits):
    """Integers in the order of the floats that have these bits, and back: a maximum of integers is vectorised."""
    sign = np.int32(bits >> np.int32(31))
    return np.int32(bits ^ np.int32(sign & np.int32(0x7FFFFFFF)))


@_compile
def _softmax(row, bias):
    """``exp(logits + bias - max)`` in place; returns their sum, NaN if a logit is NaN or plus infinity."""
    top = np.int32(-(2**31))
    for j in range(row.size):
        logit = row[j] + bias[j]
        row[j] = logit
        key = _ordered(np.float32(logit).view(np.int32))
        top = key if key > top else top
    highest = np.int32(_ordered(top)).view(np.float32)
    total = _F(0)
    for j in range(row.size):
        e = _exp(row[j] - highest)
        row[j] = e
        total += e
    return total


@_compile
def _zeros(row, factor, theta, inverse_theta, weight, grads, grad_theta):
    """Log-likelihood of a cell with means ``row * factor``, as if all its counts were zero, and its gradients' sum.

    ``row`` becomes the means, ``grads`` the gradient in their logarithm.
    """
    value, common = _F(0), _F(0)
    for j in range(row.size):
        mean = row[j] * factor
        row[j] = mean
        ratio = mean * inverse_theta[j]
        at_zero = _log1p(ratio)
        share = ratio / (_F(1) + ratio)
        grad_theta[j] += weight * (share - at_zero)
        grad = -theta[j] * share
        value -= theta[j] * at_zero
        common += grad
        grads[j] = grad
    return value, common


@_compile
def _nonzeros(counts, means, thetas, grad_means, grad_thetas):
    """What non-zero counts add to the log-likelihood, and to its gradients in log mean and in theta."""
    value = _F(0)
    for k in range(counts.size):
        x, mean, theta = counts[k], means[k], thetas[k]
        start, above, beyond = theta + _F(4), theta + x, x + _F(5)
        u, v, w = _F(1) / start, _F(1) / (above + _F(4)), _F(1) / beyond
        spread = _F(1) / (theta + mean)
        step, square = _log1p(x * u), w * w
        # Stirling's series after four steps, for x! after five, of the three log-gammas. Their steps have a logarithm
        # each: compilers may reorder a product of them all, and then it overflows.
        value += (start - _F(0.5)) * step + x * _log((above + _F(4)) * mean * spread * w)
        value += _log(_product(theta) / _product(above)) + _log(_product(x + _F(1)) * square * square * np.sqrt(w))
        value += _stirling(v) - _stirling(u) - _stirling(w) + (_F(5) - _HALF_LOG_2PI)
        # 1 / (theta above) and the next three of the kind.
        a, b = theta * above, (theta + _F(1)) * (above + _F(1))
        c, d = (theta + _F(2)) * (above + _F(2)), (theta + _F(3)) * (above + _F(3))
        digamma = step + _digamma_tail(v) - _digamma_tail(u) + x * ((a + b) / (a * b) + (c + d) / (c * d))
        grad_means[k] = x * spread * theta
        grad_thetas[k] = digamma - x * spread
    return value


@_compile
def negative_binomial_rows(
    start,
    stop,
    logits,
    bias,
    log_size,
    theta,
    group,
    weight,
    scale,
    data,
    indices,
    indptr,
    value,
    grad_size,
    grad_theta,
    grad_bias,
):
    """Log-likelihood of the cells ``start`` to ``stop``, and its gradients times each cell's weight and ``scale``.

    ``logits`` become their own gradient. ``log_size`` may be empty, for sizes that are the totals of the counts, at
    least 1; so may ``group`` and ``weight``. ``grad_theta``, of the shape of ``theta``, and ``grad_bias`` are added to;
    ``value`` and ``grad_size``, the derivative in the logarithm of the size, are filled.
    """
    n_vars = logits.shape[1]
    grads = np.empty(n_vars, np.float32)
    means, thetas = np.empty(n_vars, np.float32), np.empty(n_vars, np.float32)
    grad_means, grad_thetas = np.empty(n_vars, np.float32), np.empty(n_vars, np.float32)
    inverse_theta = _F(1) / theta
    for i in range(start, stop):
        at = group[i] if group.size else 0
        row, own, grad_own = logits[i], theta[at], grad_theta[at]
        w = scale * weight[i] if weight.size else scale
        first, n_counts = indptr[i], indptr[i + 1] - indptr[i]
        genes, counts = indices[first : first + n_counts], data[first : first + n_counts]
        size = np.exp(log_size[i]) if log_size.size else max(counts.sum(), _F(1))
        total, common = _zeros(row, size / _softmax(row, bias), own, inverse_theta[at], w, grads, grad_own)

        for k in range(n_counts):
            means[k], thetas[k] = row[genes[k]], own[genes[k]]
        total += _nonzeros(counts, means, thetas, grad_means, grad_thetas)
        for k in range(n_counts):
            grads[genes[k]] += grad_means[k]
            common += grad_means[k]
            grad_own[genes[k]] += w * grad_thetas[k]

        value[i], grad_size[i] = total, w * common
        # The sum over all genes goes back through the normalisation.
        common /= size
        for j in range(n_vars):
            grad = w * (grads[j] - row[j] * common)
            row[j] = grad
            grad_bias[j] += grad
