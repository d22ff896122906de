"""Dropout of many values: 16 random bits decide on each, instead of a random number each."""

from __future__ import annotations

import torch

from cellstill.nn.compiled import kernels

_LEVELS = 1 << 16


def drop(values: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Set values to zero with probability ``p`` and scale up the others, so that their expectation stays.

    On the CPU several times as fast as torch's own, with ``p`` rounded to a multiple of 2^-16; elsewhere torch's own.

    Parameters
    ----------
    values
        Shape ``(n,)``.
    p
        Probability, from 0 to below 1.
    training
        Otherwise nothing is dropped.
    """
    n_dropped = round(p * _LEVELS)
    if not training or n_dropped == 0:
        return values
    if values.device.type != "cpu":
        return torch.nn.functional.dropout(values, p)
    bits = torch.empty(-(-len(values) // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    lowest, scale = n_dropped - _LEVELS // 2, _LEVELS / (_LEVELS - n_dropped)
    loops = kernels(values.device)
    if loops is not None and values.dtype == torch.float32 and not values.requires_grad:
        return torch.from_numpy(loops.drop(values.numpy(), bits.numpy(), lowest, scale))
    return values * (bits[: len(values)] >= lowest).mul(scale)
