"""Memory of this process, in MB."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_MB = 1 << 20


def used_mb() -> float:
    """Memory held now."""
    import psutil

    return float(psutil.Process().memory_info().rss / _MB)


def peak_mb() -> float:
    """Most memory held so far."""
    # Not getrusage on Linux: there a process begins with the peak of the one that started it.
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(peak[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(getattr(psutil.Process().memory_info(), "peak_wset", 0) / _MB)
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere.
    return maximum / _MB if sys.platform == "darwin" else maximum / 1024
