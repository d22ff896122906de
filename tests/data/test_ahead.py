from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from cellstill.data.ahead import default_prefetch, map_ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cellstill-ahead"]


@pytest.mark.parametrize("n_ahead", [0, 1, 2, 100])
def test_results_come_in_order_and_the_thread_ends(n_ahead):
    assert list(map_ahead(lambda x: x * x, range(50), n_ahead)) == [x * x for x in range(50)]
    assert list(map_ahead(str, [], n_ahead)) == []
    assert not threads()


@pytest.mark.parametrize("n_ahead", [1, 3])
def test_no_more_than_asked_for_are_made_ahead(n_ahead):
    made = []
    iterator = map_ahead(made.append, range(20), n_ahead)
    for used in range(1, 5):
        next(iterator)
        deadline = time.monotonic() + 5
        while len(made) < used + n_ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == used + n_ahead
    iterator.close()
    assert not threads()


def test_without_a_thread_each_is_made_when_asked_for():
    made = []
    iterator = map_ahead(made.append, range(20), 0)
    next(iterator)
    assert len(made) == 1
    assert not threads()


@pytest.mark.parametrize("n_ahead", [0, 1, 5])
@pytest.mark.parametrize("where", ["make", "items"])
def test_an_error_comes_after_the_results_before_it(n_ahead, where):
    def items():
        yield from range(3)
        if where == "items":
            raise ValueError("third")
        yield 3

    def make(x):
        if x == 3:
            raise ValueError("third")
        return x

    seen = []
    with pytest.raises(ValueError, match="third"):
        seen.extend(map_ahead(make, items(), n_ahead))
    assert seen == [0, 1, 2]
    assert not threads()


@pytest.mark.parametrize("how", ["close", "drop", "break", "raise"])
def test_no_thread_outlives_an_iterator_that_is_left(how):
    iterator = map_ahead(str, iter(int, 1), 2)
    next(iterator)
    assert len(threads()) == 1
    if how == "close":
        iterator.close()
    elif how == "drop":
        del iterator
    elif how == "break":
        for _ in map_ahead(str, iter(int, 1), 2):
            break
        iterator.close()
    else:
        with pytest.raises(RuntimeError, match="stop"):
            fail_within(iterator)
        del iterator
    assert not threads()


def fail_within(iterator):
    for _ in iterator:
        raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("cpus", "threads", "expected"), [(1, 1, 0), (1, 8, 0), (8, 1, 0), (2, 2, 1), (64, 8, 1)], ids=str
)
def test_one_ahead_only_where_a_second_cpu_and_thread_may_be_used(monkeypatch, cpus, threads, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert default_prefetch() == expected
