"""When the compiled loops of the CPU are used, and how threads share them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cellstill.errors import InvalidArgumentError

CompileMode = bool | Literal["auto"]

WORTH_COMPILING = 1e9
"""Values, cells x genes x epochs, at which ``compile="auto"`` compiles: what that saves, 8 to 16 ns each, is then about
what compiling takes, 5 to 10 seconds, or more."""

_MIN_SHARE = 1 << 18
"""Fewest values for which one more thread is woken."""

_log = logging.getLogger("cellstill")
_active: ContextVar[CompileMode | None] = ContextVar("compiled", default=None)
_lock = threading.Lock()


@contextmanager
def compiled(mode: CompileMode = "auto", *, n_values: float = 0.0) -> Iterator[None]:
    """Choose, for what runs inside the block, between compiled loops and torch's own operations.

    Both give the same results to rounding. The choice depends on the arguments alone, not on what this machine has
    compiled before, so that equal calls give equal bits.

    Parameters
    ----------
    mode
        ``True`` compiles, which takes seconds, once on a machine; ``False`` uses torch's operations alone; ``"auto"``
        compiles from :data:`WORTH_COMPILING` values on, where that is possible, and inside another such block leaves
        the choice to that. On a GPU torch's operations are used.
    n_values
        Cells x genes x epochs that will pass.

    Raises
    ------
    InvalidArgumentError
        Another mode; or ``True``, and nothing can be compiled here, which is said when loops are first needed.
    """
    check_compile(mode)
    chosen: CompileMode | None = mode
    if mode == "auto":
        around = _active.get()
        chosen = around if around is not None else "auto" if n_values >= WORTH_COMPILING else False
    token = _active.set(chosen)
    try:
        yield
    finally:
        _active.reset(token)


def check_compile(mode: object) -> None:
    """Raise unless ``mode`` is ``True``, ``False`` or ``"auto"``."""
    if not (isinstance(mode, bool) or mode == "auto"):
        raise InvalidArgumentError(f"compile={mode!r} is not known. Use one of: True, False, 'auto'.")


class Loops(NamedTuple):
    """Modules of compiled loops.

    Attributes
    ----------
    counts, layers, optimizer, products, rows
        For the likelihood of counts, for hidden layers, for the step of the optimiser, for products of sparse rows, and
        for their non-zeros.
    """

    counts: ModuleType
    layers: ModuleType
    optimizer: ModuleType
    products: ModuleType
    rows: ModuleType


def kernels(device: torch.device) -> Loops | None:
    """Return the compiled loops, if they are to be used on this device."""
    mode = _active.get()
    if not mode or device.type != "cpu":
        return None
    found = _found()
    if isinstance(found, Loops):
        return found
    if mode == "auto":
        return None
    raise InvalidArgumentError(
        f"compile=True, but loops cannot be compiled here: {found}. Set NUMBA_CACHE_DIR to a folder that can be "
        "written before Python starts, if that is why, or use compile='auto' or False, which take torch's operations."
    )


def fit_loops(*tensors: torch.Tensor) -> bool:
    """Whether compiled loops are to be used on the device of the tensors, and all are of the type they work on."""
    return kernels(tensors[0].device) is not None and all(one.dtype == torch.float32 for one in tensors)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Contiguous values, without gradient: a view, if the tensor is contiguous."""
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


def flat_array(tensor: torch.Tensor) -> np.ndarray:
    """Values in a row, as :func:`as_array`."""
    return as_array(tensor).reshape(-1)


def contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous tensor of the same shape, with values to be filled."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def share_out(function: Callable[[int, int], Any], n: int, n_values: int) -> list[Any]:
    """Call ``function(start, stop)`` on ranges that cover ``n`` things, one for each thread that torch may use."""
    n_threads = min(torch.get_num_threads(), n, 1 + n_values // _MIN_SHARE)
    if n_threads <= 1:
        return [function(0, n)]
    bounds = [n * part // n_threads for part in range(n_threads + 1)]
    return list(_threads(n_threads).map(function, bounds[:-1], bounds[1:]))


def add_up(
    loop: Callable[..., object], known: Sequence[Any], totals: Sequence[np.ndarray], n: int, n_values: int
) -> None:
    """Call ``loop(start, stop, *known, *sums)``, which adds to sums, as :func:`share_out` does.

    The first thread adds to ``totals`` themselves, the others to sums of their own, which are added in the end.
    """

    def share(start: int, stop: int) -> Sequence[np.ndarray]:
        sums = totals if start == 0 else [np.zeros_like(total) for total in totals]
        loop(start, stop, *known, *sums)
        return sums

    for sums in share_out(share, n, n_values)[1:]:
        for total, added in zip(totals, sums, strict=True):
            total += added


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="cellstill")


def loops() -> Loops:
    """The compiled loops, where :func:`kernels` has found them."""
    found = _found()
    assert isinstance(found, Loops)
    return found


@cache
def _found() -> Loops | str:
    """Load the compiled loops, or compile them; where that fails, say so, and return why."""
    try:
        found = Loops(*_load("_kernels", "_layer_kernels", "_optimizer_kernels", "_product_kernels", "_row_kernels"))
        _run_all(found)
    # Whatever it is that a compiler stumbles over, torch's operations are there.
    except Exception as error:  # noqa: BLE001
        why = f"{type(error).__name__}: {error}"
        _log.warning("Loops of the CPU cannot be compiled (%s). Torch's operations are used, which take longer.", why)
        return why
    return found


@cache
def more_loops(name: str) -> ModuleType:
    """Load a module of loops that only some models use."""
    return _load(name)[0]


def _load(*names: str) -> list[ModuleType]:
    """Import modules of loops, and say so where their loops are compiled first, which they are when they are called."""
    with _lock:
        modules = [import_module(f"cellstill.nn.{name}") for name in names]
        folder = Path(import_module("cellstill.nn._kernels").negative_binomial_rows.stats.cache_path or "")
        forget_stale(folder, Path(__file__).parent.glob("*_kernels.py"))
        if not all(any(folder.glob(f"{name}.*.nbi")) for name in names):
            _log.warning("Compiling loops of the CPU: some seconds, once on this machine.")
        return modules


def forget_stale(folder: Path, sources: Iterable[Path]) -> None:
    """Remove machine code that is older than the newest source, so that it is compiled again.

    Numba looks at a loop's own file only, and loops have parts of other files compiled into them.
    """
    newest = max(source.stat().st_mtime for source in sources)
    for index in folder.glob("*_kernels.*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink(missing_ok=True)


def _run_all(found: Loops) -> None:
    """Call the loops that all models use once, on next to nothing, which compiles them or loads them from disk."""
    one, row = np.ones(1, np.float32), np.ones((1, 1), np.float32)
    gene, starts = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    found.counts.negative_binomial_rows(
        *(0, 1, row.copy(), one, one, row, np.zeros(1, np.int64), one, np.float32(1), one, gene, starts),
        *(one.copy(), one.copy(), row.copy(), one.copy()),
    )
    layers = found.layers
    layers.drop(one, 0, 0, 1.0)
    layers.normed_relu(0, 1, one, one, one, 1e-5, row.copy(), row.copy(), one.copy())
    layers.normed_relu_backward(0, 1, row, one, row, row, one, row.copy(), np.zeros((3, 1), np.float32))
    found.products.rows_times(0, 1, one, gene, starts, row, 1, row.copy())
    found.products.columns_times(0, 1, one, gene, starts, row, 1, row.copy())
    found.rows.totals(0, 1, one, starts, one.copy())
    found.rows.log1p(0, 1, one, starts, one, one.copy())
    nothing = np.empty((0, 6), np.int64)
    found.optimizer.count_steps(nothing)
    found.optimizer.adamw(0, 1, nothing, np.empty((0, 5)))
