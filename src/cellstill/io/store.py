"""Safe storage of models: safetensors and JSON in a folder, with a schema version, written atomically. No pickle."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cellstill.errors import StoreError
from cellstill.io.partial import no_empty_parents, partial_beside

SCHEMA_VERSION = 1

_CONFIG = "model.json"
_TENSORS = "tensors.safetensors"


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, overwrite: bool = False, ours: Collection[str] | None = None
) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place when the block ends without an error.

    What a process that was killed left of such a folder is removed, and after an error so are the folders above it that
    were made for it.

    Parameters
    ----------
    path
        Folder to write.
    overwrite
        Replace a folder that exists. What was there is removed only when its successor is complete.
    ours
        Names that a folder of this kind holds; one with anything else in it is never replaced. ``None`` allows all.

    Raises
    ------
    StoreError
        ``path`` exists and ``overwrite`` is false, it holds other files, or it is a file.
    """
    path = Path(path).absolute()
    _check_target(path, overwrite, ours)
    partial = partial_beside(path)
    replaced = path.parent / f".{path.name}.replaced-{secrets.token_hex(4)}"
    with no_empty_parents(path):
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"Cannot write to {path.parent}: {error.strerror}. Choose another path.") from error
        try:
            yield partial
            _check_target(path, overwrite, ours)
            try:
                if path.exists():
                    path.rename(replaced)
                partial.rename(path)
            except BaseException:
                if replaced.exists() and not path.exists():
                    replaced.rename(path)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_target(path: Path, overwrite: bool, ours: Collection[str] | None) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise StoreError(f"{path} is a file, not a folder. Choose another path.")
    if not overwrite:
        raise StoreError(f"{path} exists. Choose another path, or pass overwrite=True (--overwrite) to replace it.")
    foreign = sorted(set(os.listdir(path)) - set(ours)) if ours is not None else []
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise StoreError(f"{path} holds other files ({shown}), which overwriting would delete. Choose another path.")


def save_store(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write a model to a folder.

    Parameters
    ----------
    path
        Folder to write.
    kind
        Name of the model's class; :func:`load_store` refuses another.
    tensors
        Arrays by name.
    config
        Everything else, in a form that JSON can hold.
    overwrite
        Replace a folder that exists.
    beside
        Further files of the folder: what writes each, by name. Overwriting a folder that holds others is refused.

    Raises
    ------
    StoreError
        See :func:`atomic_directory`.
    """
    from safetensors.numpy import save

    import cellstill

    header = {"schema_version": SCHEMA_VERSION, "kind": kind, "cellstill_version": cellstill.__version__}
    beside = beside or {}
    with atomic_directory(path, overwrite=overwrite, ours=(_CONFIG, _TENSORS, *beside)) as folder:
        for name, write in beside.items():
            write(folder / name)
        # Written as bytes, because safetensors makes files that only their owner can read.
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        (folder / _TENSORS).write_bytes(save(arrays))
        text = json.dumps({**header, "config": dict(config)}, indent=1, allow_nan=False, default=_plain)
        (folder / _CONFIG).write_text(text, encoding="utf-8")


def load_store(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the arrays and the configuration of a model that :func:`save_store` wrote.

    Raises
    ------
    StoreError
        The folder is absent or damaged, holds a model of another kind, or was written by a newer cellstill.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    missing = [name for name in (_CONFIG, _TENSORS) if not (path / name).is_file()]
    if missing:
        raise StoreError(f"{path} is not a saved model: it has no {' and no '.join(missing)}.")
    try:
        content = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        header = {key: content[key] for key in ("schema_version", "kind", "cellstill_version", "config")}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path / _CONFIG} is damaged ({error}). Save the model again.") from error
    if header["kind"] != kind:
        raise StoreError(f"{path} holds a {header['kind']}, not a {kind}. Load it with {header['kind']}.load.")
    if header["schema_version"] != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {header['schema_version']} (cellstill {header['cellstill_version']}); this "
            f"cellstill reads version {SCHEMA_VERSION}. Use the cellstill that wrote it, or one that is newer."
        )
    try:
        return load_file(path / _TENSORS), header["config"]
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path / _TENSORS} is damaged ({error}). Save the model again.") from error


def names_to_array(names: Sequence[str]) -> np.ndarray:
    """Encode names as bytes, so that many of them are stored beside the other arrays."""
    return np.frombuffer(json.dumps(list(names), ensure_ascii=False).encode("utf-8"), dtype=np.uint8)


def array_to_names(array: np.ndarray) -> list[str]:
    """Decode :func:`names_to_array`."""
    return json.loads(array.tobytes().decode("utf-8"))


def _plain(value: Any) -> Any:
    """Numbers of NumPy, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
