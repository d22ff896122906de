"""Gradients of the parts of a minibatch, summed to that of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from cellstill.train.ranks import Ranks


class SummedGradients:
    """Sum gradients over processes in one exchange a step.

    Parameters
    ----------
    parameters
        What is trained, on its device; the same in every process.
    ranks
        The processes.

    Notes
    -----
    Gradients and what goes with them travel as one vector, whose parts the parameters then have as gradients: a copy
    of them into it is all that is added to the exchange itself. A parameter without gradient adds nothing to the sum.
    The vector counts for each parameter the processes where it has one, so that one without gradient anywhere is left
    alone by the optimiser, as in a process by itself; they are read, which waits for the device, only in a process that
    lacks a gradient itself.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks
        sizes = [parameter.numel() for parameter in self.parameters]
        dtype = reduce(torch.promote_types, (parameter.dtype for parameter in self.parameters), torch.float32)
        n = len(self.parameters)
        self._vector = torch.zeros(sum(sizes) + n + 1, dtype=dtype, device=self.parameters[0].device)
        *parts, self._present, self._loss = self._vector.split([*sizes, n, 1])
        self._parts = [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def add_up(self, loss: torch.Tensor | float) -> torch.Tensor:
        """Replace every parameter's gradient by its sum over the processes.

        Parameters
        ----------
        loss
            Share of this process in the loss of the minibatch.

        Returns
        -------
        The loss of the minibatch, a scalar on the device, the same in every process.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        lacking = [i for i, gradient in enumerate(gradients) if gradient is None]
        if lacking:
            self._vector.zero_()
        self._present.fill_(1.0)
        for i in lacking:
            self._present[i] = 0.0
        for part, gradient in zip(self._parts, gradients, strict=True):
            if gradient is not None:
                part.copy_(gradient)
        self._loss.fill_(loss)
        self.ranks.add_up(self._vector)
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            parameter.grad = part if part.dtype == parameter.dtype else part.to(parameter.dtype)
        if lacking:
            n_present = self._present.tolist()
            for i in lacking:
                if n_present[i] == 0:
                    self.parameters[i].grad = None
        return self._loss
