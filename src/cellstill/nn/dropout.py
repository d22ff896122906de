"""Dropout of many values: 16 random bits decide on each, instead of a random number each."""

from __future__ import annotations

import torch

from cellstill.nn.compiled import kernels

_LEVELS = 1 << 16


def drop(values: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Set values to zero with probability ``p`` and scale up the others, so that their expectation stays.

    On the CPU several times as fast as torch's own where loops are compiled, with ``p`` rounded to a multiple of 2^-16;
    elsewhere torch's own.

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
    seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
    lowest, scale = n_dropped - _LEVELS // 2, _LEVELS / (_LEVELS - n_dropped)
    loops = kernels(values.device)
    if loops is not None and values.dtype == torch.float32 and not values.requires_grad:
        return torch.from_numpy(loops.layers.drop(values.numpy(), seed, lowest, scale))
    bits = _random_words(seed, -(-len(values) // 4)).view(torch.int16)
    return values * (bits[: len(values)] >= lowest).mul(scale)


def _random_words(seed: int, n: int) -> torch.Tensor:
    """The first words of splitmix64 (Steele, Lea & Flood 2014), as the compiled loop draws them."""
    words = torch.arange(1, n + 1).mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    shifted = torch.empty_like(words)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        torch.bitwise_right_shift(words, shift, out=shifted).bitwise_and_((1 << (64 - shift)) - 1)
        words.bitwise_xor_(shifted)
        if factor > 1:
            words.mul_(_signed(factor))
    return words


def _signed(word: int) -> int:
    """The signed integer with the bits of an unsigned one of 64."""
    return word - (1 << 64) if word >> 63 else word
