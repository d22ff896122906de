"""Memory of this process, in MB."""

from __future__ import annotations

import sys

_MB = 1 << 20


def used_mb() -> float:
    """Memory held now."""
    import psutil

    return float(psutil.Process().memory_info().rss / _MB)


def peak_mb() -> float:
    """Most memory held so far."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(getattr(psutil.Process().memory_info(), "peak_wset", 0) / _MB)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere.
    return peak / _MB if sys.platform == "darwin" else peak / 1024
