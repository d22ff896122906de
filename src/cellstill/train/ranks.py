"""The processes that train together, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from cellstill.errors import CellstillError, TrainingError

T = TypeVar("T")


class Ranks:
    """One process among those that train together; by itself it exchanges nothing.

    All of them call every method, in the same order.

    Parameters
    ----------
    rank
        Number of this process, from 0.
    size
        Number of processes; more than one are joined in torch's default process group.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether it is the process that writes and shows."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Give every process the values of all, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function in the first process, and give its result to all.

        Raises
        ------
        CellstillError
            The function failed; see :meth:`check`.
        """
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        with self.together():
            if self.is_first:
                made[0] = make()
        torch.distributed.broadcast_object_list(made, 0)
        return made[0]

    def add_up(self, values: torch.Tensor) -> None:
        """Replace values by their sums over all processes, which are the same, bit for bit, in each."""
        # Fabric's own all_reduce puts a barrier before it, for which the host waits.
        torch.distributed.all_reduce(values)

    def check(self, error: Exception | None) -> None:
        """Raise in all processes if there is an error in one of them.

        Raises
        ------
        CellstillError
            One of ours, as it is.
        TrainingError
            Another error of another process, which is named; the one that failed raises its own.
        """
        # Those of others may hold what cannot be sent.
        sent = error if error is None or isinstance(error, CellstillError) else f"{type(error).__name__}: {error}"
        errors = self.gather(sent)
        if error is not None:
            raise error
        for rank, found in enumerate(errors):
            if isinstance(found, CellstillError):
                raise found
            if found is not None:
                raise TrainingError(f"Training stopped because rank {rank} of {self.size} failed with {found}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside the block, which exchanges nothing, stop all processes instead of leaving them waiting.

        Raises
        ------
        CellstillError
            See :meth:`check`.
        """
        error = None
        try:
            yield
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        if self.size > 1:
            self.check(error)
