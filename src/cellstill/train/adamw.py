"""AdamW in one compiled loop over all parameters: on a CPU what goes on around a step costs as much as small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cellstill.nn.compiled import loops, share_out


class CompiledAdamW(torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, to rounding and with the same state, its step compiled and shared by threads.

    For parameters as :func:`fits` says. Of the settings it follows ``lr``, ``betas``, ``eps`` and ``weight_decay``.
    Hooks of steps are not called.

    References
    ----------
    Loshchilov & Hutter (2019), Decoupled weight decay regularization.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step along the gradients; parameters without one stay, as does their state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients, places, settings = [], [], []
        for group in self.param_groups:
            own = (group["lr"], group["weight_decay"], *group["betas"], group["eps"])
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                gradients.append(gradient := gradient.contiguous())
                tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])
                places.append((parameter.numel(), *[tensor.data_ptr() for tensor in tensors]))
                settings.append(own)
        if places:
            optimizer, arrays = loops().optimizer, (np.array(places, np.int64), np.array(settings, np.float64))
            optimizer.count_steps(arrays[0])
            n_values = int(arrays[0][:, 0].sum())
            share_out(lambda start, stop: optimizer.adamw(start, stop, *arrays), n_values, n_values)
        return loss

    # Says that torch's wrapper, which profiles a step and calls its hooks, is there: it costs 12 microseconds, warm.
    step.hooked = True  # type: ignore[attr-defined]


def fits(parameter: torch.Tensor) -> bool:
    """Whether the compiled loop can update a parameter: on the CPU, in float32, in order in memory."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()
