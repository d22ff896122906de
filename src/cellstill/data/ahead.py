"""The next item made while the current one is used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


def default_prefetch() -> int:
    """One item ahead where the process may use a second CPU and torch a second thread; otherwise none."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(min(cpus, torch.get_num_threads()) > 1)


def map_ahead(make: Callable[[T], U], items: Iterable[T], n_ahead: int) -> Iterator[U]:
    """Yield ``make(item)`` in the order of ``items``, made in a thread up to ``n_ahead`` items before they are needed.

    Parameters
    ----------
    make
        Function; an exception of it is raised in the iteration, after the items before it.
    items
        What to make something of; read in the thread.
    n_ahead
        Most results that wait. Larger evens out items that take unequal time, and holds more memory; 0 makes each when
        it is asked for, without a thread.

    Notes
    -----
    The thread ends with the iterator, whether it is exhausted, closed or dropped.
    """
    if n_ahead == 0:
        yield from map(make, items)
        return
    results: SimpleQueue[tuple[U | None, BaseException | None, bool]] = SimpleQueue()
    slots, stopped = threading.Semaphore(n_ahead), threading.Event()

    def work() -> None:
        try:
            for item in items:
                slots.acquire()
                if stopped.is_set():
                    return
                results.put((make(item), None, False))
            results.put((None, None, True))
        except BaseException as error:  # noqa: BLE001 - raised again by the iterator
            results.put((None, error, True))

    thread = threading.Thread(target=work, name="cellstill-ahead", daemon=True)
    thread.start()
    try:
        while True:
            made, error, last = results.get()
            if error is not None:
                raise error
            if last:
                return
            slots.release()
            yield made  # type: ignore[misc] # None only beside an error or at the end
            del made
    finally:
        stopped.set()
        slots.release()
        thread.join()
