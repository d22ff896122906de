"""Names of what is being written, by which a later process knows what a killed one left."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_beside(path: Path) -> Path:
    """Give a hidden name beside ``path``, with its suffixes, for what is to take its place once it is whole.

    What processes of this machine that run no longer left under such names for the same ``path`` is removed.

    Parameters
    ----------
    path
        File or folder to write, absolute.
    """
    _remove_abandoned(path)
    return path.with_name(f".partial-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@contextmanager
def no_empty_parents(path: Path) -> Iterator[None]:
    """Remove the folders above ``path``, absolute, that were made inside the block and are empty at its end."""
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in absent:  # innermost first
            with suppress(OSError):
                folder.rmdir()


def _remove_abandoned(path: Path) -> None:
    ours = re.compile(rf"\.partial-{_machine()}-(\d+)-[0-9a-f]{{8}}-{re.escape(path.name)}")
    try:
        found = [(match, name) for name in os.listdir(path.parent) if (match := ours.fullmatch(name))]
    except OSError:
        # A folder that is not there yet holds nothing, and one that cannot be read says so when it is written to.
        return
    for match, name in found:
        if _runs(int(match[1])):
            continue
        left = path.with_name(name)
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def _runs(pid: int) -> bool:
    if os.name != "posix":
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user, whose processes a machine may hide in /proc
    return True


def _machine() -> str:
    """Tell where a process number holds: on this machine and, on Linux, since it started and in this container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.stat("/proc/self/ns/pid").st_ino)]
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=4).hexdigest()
