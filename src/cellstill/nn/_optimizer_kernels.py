# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU for the optimiser, as in `_kernels`: a step of all parameters, by their addresses."""

from __future__ import annotations

import numba
import numba.extending
import numpy as np

from cellstill.nn._kernels import _F, _compile, _inline


@numba.extending.intrinsic
def _pointer(_, address):
    to = numba.types.CPointer(numba.types.float32)
    return to(address), lambda context, builder, _, args: builder.inttoptr(args[0], context.get_value_type(to))


@_inline
def _floats(address, n):
    """The float32 values at an address."""
    return numba.carray(_pointer(address), n)  # type: ignore[call-arg]


@_compile
def count_steps(places):
    """Add 1 to the steps of :func:`adamw`."""
    for row in range(places.shape[0]):
        _floats(places[row, 5], 1)[0] += _F(1)


@_compile
def adamw(start, stop, places, settings):
    """One step of AdamW on the values ``start`` to ``stop`` of all parameters in a row.

    A row of ``places`` for each parameter: number of values, and addresses of values, gradients, their means, their
    mean squares, and the number of steps, this one included. Of ``settings``: learning rate, weight decay, two betas,
    epsilon.
    """
    for row in range(places.shape[0]):
        n = places[row, 0]
        first, last = max(start, 0), min(stop, n)
        start, stop = start - n, stop - n
        if first >= last:
            continue
        lr, decay, beta, beta_square = settings[row, 0], settings[row, 1], settings[row, 2], settings[row, 3]
        step, eps = np.float64(_floats(places[row, 5], 1)[0]), _F(settings[row, 4])
        kept, rate = _F(1 - lr * decay), _F(lr / (1 - beta**step))
        new, new_square, known_square = _F(1 - beta), _F(1 - beta_square), _F(beta_square)
        correction = _F(1 / np.sqrt(1 - beta_square**step))
        values = _floats(places[row, 1], n)[first:last]
        grads = _floats(places[row, 2], n)[first:last]
        means = _floats(places[row, 3], n)[first:last]
        squares = _floats(places[row, 4], n)[first:last]
        for i in range(values.size):
            grad = grads[i]
            mean = means[i] + new * (grad - means[i])
            square = known_square * squares[i] + new_square * grad * grad
            means[i], squares[i] = mean, square
            values[i] = kept * values[i] - rate * mean / (np.sqrt(square) * correction + eps)
