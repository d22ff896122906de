"""After a loss that is not finite: which minibatch, which cells, which part of the loss or which gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch

from cellstill.train.fault import Fault, what_is_not_finite
from cellstill.train.loop import Batch, Loop, evaluating, non_finite, set_training
from cellstill.train.plans import Loss

_CSR = ("data", "indices", "indptr")


def find_fault(loop: Loop) -> Fault | None:
    """Train the epoch again from its start, which the caller has gone back to, checking every number.

    The order of cells and the random numbers are those of the first time, so that the step is found at which the first
    number was not finite, however late that was seen. ``None`` if everything is finite this time.
    """
    return _in_training(loop) or _in_validation(loop)


def _in_training(loop: Loop) -> Fault | None:
    set_training(loop.plan.module)
    with closing(loop.batches(loop.train)) as batches:
        for index, batch in enumerate(batches):
            fault = _fault("train", index, loop.ranks.gather(_look(loop, batch, train=True)))
            if fault is not None:
                return fault
            loop.update()
    return None


def _in_validation(loop: Loop) -> Fault | None:
    if loop.validation is None:
        return None
    with evaluating(loop.plan.module), closing(loop.batches(loop.validation)) as batches:
        for index, batch in enumerate(batches):
            fault = _fault("validation", index, loop.ranks.gather(_look(loop, batch, train=False)))
            if fault is not None:
                return fault
    return None


class _Look(NamedTuple):
    """What a process sees of a minibatch, of which it may have a share only, or no cell.

    Attributes
    ----------
    n, total
        Number of cells, and their mean loss.
    terms, gradients
        Names of those that are not finite.
    cells
        Of a fault, which cells of the share are to blame, or all.
    rows
        Positions of the share's cells in the data, if they are known.
    """

    n: int = 0
    total: float = 0.0
    terms: Sequence[str] = ()
    gradients: Sequence[str] = ()
    cells: Sequence[int] = ()
    rows: Sequence[int] | None = None

    @property
    def is_fault(self) -> bool:
        return bool(self.terms or self.gradients) or not math.isfinite(self.total)


def _look(loop: Loop, batch: Batch, train: bool) -> _Look:
    if not batch:
        return _Look()
    if train:
        loss = loop.forward(batch)
    else:
        with torch.no_grad():
            loss = loop.evaluate(batch)
    look = _Look(loss.n, loss.total.item(), non_finite(loss.terms.items()))
    if train and not look.is_fault:
        loop.backward(loss)
        gradients = ((name, parameter.grad) for name, parameter in loop.plan.module.named_parameters())
        look = look._replace(gradients=non_finite(gradients))
    if look.is_fault:
        rows = batch["rows"].tolist() if "rows" in batch else None
        look = look._replace(cells=_cells(loop, batch, loss), rows=rows)
    return look


def _fault(split: str, index: int, looks: Sequence[_Look]) -> Fault | None:
    faulty = [look for look in looks if look.is_fault]
    if not faulty:
        return None
    n = sum(look.n for look in looks)
    total = sum(look.total * look.n for look in looks) / n
    terms = list(dict.fromkeys(name for look in faulty for name in look.terms))
    gradients = list(dict.fromkeys(name for look in faulty for name in look.gradients))
    what = what_is_not_finite(split, total, terms, gradients)
    cells: list[int] = []
    before = 0
    for look in looks:
        cells += [before + cell if look.rows is None else look.rows[cell] for cell in look.cells]
        before += look.n
    return Fault(split, index, what, cells, len(cells) < n)


def _cells(loop: Loop, batch: Batch, loss: Loss) -> Sequence[int]:
    """Which cells of the minibatch are to blame, or all."""
    wrong: list[int] = []
    if loss.per_cell is not None:
        wrong = (~loss.per_cell.isfinite()).nonzero().flatten().tolist()
    return wrong or list(_wrong_alone(loop, batch, loss.n)) or range(loss.n)


def _wrong_alone(loop: Loop, batch: Batch, n: int) -> Iterator[int]:
    """Find cells whose loss, terms or gradient are not finite without the others, by halving."""
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
            if not bool(loss.total.isfinite()) or non_finite(loss.terms.items()):
                return True
            loss.total.backward()
    except (RuntimeError, ValueError, IndexError):
        # A loss that compares cells with each other need not exist for a part of them.
        return False
    return bool(non_finite((name, parameter.grad) for name, parameter in loop.plan.module.named_parameters()))


def cut(batch: Batch, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Take consecutive cells out of a minibatch."""
    part = {name: values[start:stop] for name, values in batch.items() if name.rpartition("/")[2] not in _CSR}
    for name, values in batch.items():
        prefix, found, _ = name.rpartition("indptr")
        if not found:
            continue
        indptr = values[start : stop + 1]
        first, last = int(indptr[0]), int(indptr[-1])
        part[name] = indptr - first
        part.update({prefix + array: batch[prefix + array][first:last] for array in ("data", "indices")})
    return part
