"""One job in a process of its own: warm up, load the data, measure the fit. Started by :func:`_common.run_job`."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main(request: dict) -> None:
    # Affinity too, because harmonypy counts the CPUs it may run on and has no environment variable.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["threads"]])
    import _methods
    import numpy as np

    warnings.simplefilter("ignore")
    _methods.pin_threads(request["threads"])
    methods = importlib.import_module(request.get("module", "_methods"))
    method = getattr(methods, request["method"])
    methods.import_libraries(request["method"])
    if request.get("warm_up", True):
        # A fit of a few cells loads what libraries import late, and so keeps it out of the seconds.
        tiny = _methods.tiny_data()
        method(tiny, "batch", 0, **_methods.shortened(request["method"], request["settings"]))()
        del tiny
    data = read(Path(request["data"]))

    before = resident_megabytes()
    reset_peak()
    start = time.perf_counter()
    finish = method(data, request["batch_key"], request["seed"], **request["settings"])
    seconds = time.perf_counter() - start
    peak = peak_megabytes()

    arrays, numbers = finish()
    numbers |= {
        "seconds": seconds,
        "added_mb": None if peak is None or before is None else peak - before,
        "loaded_mb": before,
        "load_average": round(os.getloadavg()[0], 2),
    }
    np.savez(request["arrays"], **arrays)
    Path(request["numbers"]).write_text(json.dumps(numbers))


def read(path: Path) -> Any:
    """Read an AnnData, or by the ending ``.h5mu`` a MuData."""
    if path.suffix == ".h5mu":
        import mudata

        return mudata.read_h5mu(path)
    import anndata as ad

    return ad.read_h5ad(path)


def resident_megabytes() -> float | None:
    """Resident memory, after what is no longer used was given back."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return None
    return _status("VmRSS")


def reset_peak() -> None:
    """Forget the highest resident memory so far: importing and loading have peaks of their own."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float | None:
    """Highest resident memory since :func:`reset_peak`, as the kernel keeps it; nothing is sampled."""
    return _status("VmHWM")


def _status(name: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
