"""After a loss that is not finite: which minibatch, which cells, which part of the loss or which gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from cellstill.train.loop import Batch, Loop, evaluating, non_finite, set_training
from cellstill.train.plans import Loss

_N_SHOWN = 3
_CSR = ("data", "indices", "indptr")


@dataclass(frozen=True)
class Fault:
    """Where training left the finite numbers.

    Attributes
    ----------
    split
        ``"train"`` or ``"validation"``.
    batch
        Number of the minibatch in its epoch, from 0.
    what
        What is not finite.
    cells
        Positions of its cells (``batch["rows"]``); if some are to blame by themselves, only those.
    alone
        They are to blame by themselves, and others of the minibatch are not.
    """

    split: str
    batch: int
    what: str
    cells: list[int]
    alone: bool

    def sentence(self, epoch: int, names: Sequence[str] | None) -> str:
        """Say it, with the names of cells if they are known."""
        shown = ", ".join(
            f"{cell} ({str(names[cell])!r})" if names is not None else str(cell) for cell in self.cells[:_N_SHOWN]
        )
        more = f" and {len(self.cells) - _N_SHOWN} more" if len(self.cells) > _N_SHOWN else ""
        whose = "because of" if self.alone else "for all of"
        return f"{self.what} in epoch {epoch}, batch {self.batch} of {self.split}, {whose} its cells {shown}{more}."


def find_fault(loop: Loop) -> Fault | None:
    """Train the epoch again from its start, which the caller has gone back to, checking every number.

    The order of cells and the random numbers are those of the first time, so that the step is found at which the first
    number was not finite, however late that was seen. ``None`` if everything is finite this time.
    """
    return _in_training(loop) or _in_validation(loop)


def _in_training(loop: Loop) -> Fault | None:
    module = loop.plan.module
    set_training(module)
    with closing(loop.batches(loop.train)) as batches:
        for index, batch in enumerate(batches):
            loss = loop.forward(batch)
            what = _of_loss(loss, "train")
            if what is None:
                loss.total.backward()
                wrong = non_finite((name, parameter.grad) for name, parameter in module.named_parameters())
                if wrong:
                    what = f"The gradient of {_listed(wrong)} is not finite while train_loss is {loss.total.item():g}"
            if what is not None:
                return Fault("train", index, what, *_cells(loop, batch, loss))
            loop.update()
    return None


def _in_validation(loop: Loop) -> Fault | None:
    if loop.validation is None:
        return None
    module = loop.plan.module
    with evaluating(module), closing(loop.batches(loop.validation)) as batches:
        for index, batch in enumerate(batches):
            with torch.no_grad():
                loss = loop.evaluate(batch)
            what = _of_loss(loss, "validation")
            if what is not None:
                return Fault("validation", index, what, *_cells(loop, batch, loss))
    return None


def _of_loss(loss: Loss, split: str) -> str | None:
    wrong = non_finite(loss.terms.items())
    if not wrong and bool(loss.total.isfinite()):
        return None
    of_term = f" (term {_listed(wrong)})" if wrong else ""
    return f"{split}_loss is {loss.total.item():g}{of_term}"


def _cells(loop: Loop, batch: Batch, loss: Loss) -> tuple[list[int], bool]:
    positions = batch["rows"].tolist() if "rows" in batch else list(range(loss.n))
    wrong: list[int] = []
    if loss.per_cell is not None:
        wrong = (~loss.per_cell.isfinite()).nonzero().flatten().tolist()
    wrong = wrong or list(_wrong_alone(loop, batch, loss.n))
    alone = 0 < len(wrong) < loss.n
    return [positions[i] for i in wrong] if alone else positions, alone


def _wrong_alone(loop: Loop, batch: Batch, n: int) -> Iterator[int]:
    """Find cells whose loss or gradient is not finite without the others, by halving."""
    start = 0
    with evaluating(loop.plan.module):
        while start < n and _is_wrong(loop, batch, start, n):
            low, high = start, n
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if _is_wrong(loop, batch, low, middle) else (middle, high)
            if not _is_wrong(loop, batch, low, high):
                return
            yield low
            start = low + 1


def _is_wrong(loop: Loop, batch: Batch, start: int, stop: int) -> bool:
    try:
        loop.optimizer.zero_grad()
        with torch.enable_grad():
            loss = loop.evaluate(cut(batch, start, stop))
            if not bool(loss.total.isfinite()):
                return True
            loss.total.backward()
    except (RuntimeError, ValueError, IndexError):
        # A loss that compares cells with each other need not exist for a part of them.
        return False
    return bool(non_finite((name, parameter.grad) for name, parameter in loop.plan.module.named_parameters()))


def cut(batch: Batch, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Take consecutive cells out of a minibatch."""
    part = {name: values[start:stop] for name, values in batch.items() if name not in _CSR}
    if "indptr" in batch:
        indptr = batch["indptr"][start : stop + 1]
        first, last = int(indptr[0]), int(indptr[-1])
        part["indptr"] = indptr - first
        part.update({name: batch[name][first:last] for name in ("data", "indices")})
    return part


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(map(repr, names[:_N_SHOWN])) + more
