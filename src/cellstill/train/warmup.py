"""How long the weight of the KL divergence rises."""

from __future__ import annotations

from cellstill.errors import InvalidArgumentError


def warmup_steps(length: int | float | None, n_epochs: int, steps_per_epoch: int) -> int:
    """Fix the number of warm-up steps.

    A share of one step or of all of them, the warm-up leaves at least the last epoch to full weight, so that there is
    one from which the weights can be chosen; of a single epoch it takes at most half.

    Parameters
    ----------
    length
        Number of steps (int, 0 or more), share of the planned steps (float, 0 to 1), or ``None`` for none.
    n_epochs, steps_per_epoch
        What is planned.

    Raises
    ------
    InvalidArgumentError
        ``length`` is out of range.
    """
    if length is None:
        return 0
    is_share = isinstance(length, float)
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 0 or (is_share and not length <= 1):
        raise InvalidArgumentError(
            f"kl_warmup={length!r} has to be a number of steps (an integer of at least 0) or a share of the planned "
            "steps (a float from 0 to 1)."
        )
    planned = n_epochs * steps_per_epoch
    steps = round(length * planned) if is_share else int(length)
    return min(steps, planned - steps_per_epoch if n_epochs > 1 else planned // 2)
