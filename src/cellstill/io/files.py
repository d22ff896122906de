"""Single files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellstill.errors import StoreError
from cellstill.io.partial import no_empty_parents, partial_beside


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``, with its suffixes, that takes its place when the block ends without error.

    A file of that name is replaced; folders above it are made. If the block fails, what was there stays as it was.

    Parameters
    ----------
    path
        File to write.

    Raises
    ------
    StoreError
        ``path`` is a folder, or cannot be written.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise StoreError(f"{path} is a folder, not a file. Choose another path.")
    partial = partial_beside(path)
    with no_empty_parents(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        except OSError as error:
            raise StoreError(f"Cannot write {path}: {error.strerror or error}. Choose another path.") from error
        finally:
            if partial.exists():
                partial.unlink()
