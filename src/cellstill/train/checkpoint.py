"""A training run on disk: everything that is needed to go on, in one file of safetensors with a JSON header."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from cellstill.errors import OtherRunError, StoreError
from cellstill.io.partial import partial_beside
from cellstill.train.state import State, changing

CHECKPOINT_VERSION = 2

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_PARTS = ("weights", "moments", "rng", "best")


@dataclass(frozen=True)
class Progress:
    """How far a training run has come.

    Attributes
    ----------
    state
        Everything that changes, after the last complete epoch.
    step
        Steps done.
    epochs
        Losses of every complete epoch.
    seconds
        Time of each.
    best_value, best_epoch, best
        Lowest monitored loss, its epoch and weights; infinite, ``None`` and empty before an epoch counted.
    finished
        Training has ended.
    """

    state: State
    step: int
    epochs: list[dict[str, float]]
    seconds: list[float]
    best_value: float
    best_epoch: int | None
    best: dict[str, torch.Tensor]
    finished: bool


def write_checkpoint(path: str | os.PathLike[str], progress: Progress, run: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``path``, in one step that a crash does not interrupt.

    Parameters
    ----------
    path
        File.
    progress
        What to write.
    run
        What the run was started with (:func:`describe_run`).

    Raises
    ------
    StoreError
        The file cannot be written.
    """
    from safetensors.torch import save

    state = progress.state
    parts = {"weights": state.weights, "moments": state.moments, "rng": state.rng, "best": progress.best}
    tensors = {
        f"{part}:{name}": tensor.detach().cpu().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    header = {
        "checkpoint_version": CHECKPOINT_VERSION,
        "run": dict(run),
        "step": progress.step,
        "loader_epochs": state.epochs,
        "epochs": progress.epochs,
        "seconds": progress.seconds,
        # JSON has no infinity.
        "best_value": None if progress.best_epoch is None else progress.best_value,
        "best_epoch": progress.best_epoch,
        "finished": progress.finished,
    }
    _replace(Path(path), save(tensors, {"cellstill": json.dumps(header, allow_nan=False)}))


def read_checkpoint(path: str | os.PathLike[str], run: Mapping[str, Any]) -> Progress:
    """Read a checkpoint of the run that is described.

    Raises
    ------
    OtherRunError
        The file belongs to another run; the message says in what they differ.
    StoreError
        It is damaged, or of another cellstill.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["cellstill"])
            # Copied, because the file that they are mapped from is going to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no iterator
        version = header["checkpoint_version"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is not a checkpoint, or damaged ({error}). Remove it, and train afresh.") from error
    if version != CHECKPOINT_VERSION:
        raise StoreError(
            f"{path} has checkpoint version {version}; this cellstill reads version {CHECKPOINT_VERSION}. Resume with "
            "the cellstill that wrote it, or remove it and train afresh."
        )
    _check_run(path, header["run"], run)
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(":")
        parts[part][rest] = tensor
    return Progress(
        State(parts["weights"], parts["moments"], parts["rng"], header["loader_epochs"]),
        header["step"],
        header["epochs"],
        header["seconds"],
        float("inf") if header["best_value"] is None else header["best_value"],
        header["best_epoch"],
        parts["best"],
        header["finished"],
    )


def describe_run(module: torch.nn.Module, loaders: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what decides the outcome of a run: two runs with the same description go the same way.

    Parameters
    ----------
    module
        Before training. Shapes of what is trained, content of what is frozen, what it prints of itself, and the fields
        of its ``config``, if that is a dataclass.
    loaders
        By role. Those with a ``fingerprint()`` are told apart by what they yield, others by their length.
    settings
        Plain values.
    """
    architecture = {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in changing(module)
    }
    data = {
        role: loader.fingerprint() if hasattr(loader, "fingerprint") else f"{len(loader)} minibatches"
        for role, loader in loaders.items()
    }
    return {
        "architecture": {
            "repr": _ADDRESS.sub("", repr(module)),
            "config": _settings_of(module),
            "trained": architecture,
            "frozen": _hash_frozen(module),
        },
        "data": data,
        "settings": dict(settings),
    }


def _settings_of(module: torch.nn.Module) -> dict[str, str]:
    """Settings of a module that it keeps as a dataclass, ``config``, by name."""
    config = getattr(module, "config", None)
    if not is_dataclass(config):
        return {}
    return {field.name: repr(getattr(config, field.name)) for field in fields(config)}


def _hash_frozen(module: torch.nn.Module) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_run(path: str | os.PathLike[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    refuse = f"{path} belongs to another run: "
    remedy = "Resume with what it was started with, or give another path for a new run."
    others = [
        role for role in {**wanted["data"], **found["data"]} if found["data"].get(role) != wanted["data"].get(role)
    ]
    if others:
        # First: of other data, shapes and settings that follow from them differ as well.
        raise OtherRunError(
            f"{refuse}its {' and '.join(others)} data, or the batch size or seed with which they are read, are others. "
            f"{remedy}"
        )
    if found["settings"] != wanted["settings"]:
        different = [
            f"{name}={found['settings'].get(name)!r} there and {value!r} here"
            for name, value in wanted["settings"].items()
            if found["settings"].get(name) != value
        ]
        raise OtherRunError(f"{refuse}{', '.join(different)}. {remedy}")
    there, here = found["architecture"], wanted["architecture"]
    if there != here:
        names = [*here["trained"], *(name for name in there["trained"] if name not in here["trained"])]
        different = [
            f"{name} is {_shown(there['trained'].get(name))} there and {_shown(here['trained'].get(name))} here"
            for name in names
            if there["trained"].get(name) != here["trained"].get(name)
        ]
        known, settings = there["config"], here["config"]
        different += [
            f"{name}={known.get(name)} there and {value} here"
            for name, value in settings.items()
            if known.get(name) != value
        ]
        for line, other in zip(there["repr"].splitlines(), here["repr"].splitlines(), strict=False):
            if line != other:
                different.append(f"the module has {line.strip()} there and {other.strip()} here")
        raise OtherRunError(f"{refuse}{'; '.join(different[:3]) or 'frozen parameters have other values'}. {remedy}")


def _shown(tensor: list[Any] | None) -> str:
    return "absent" if tensor is None else f"{tensor[1]} {tuple(tensor[0])}"


def _replace(path: Path, content: bytes) -> None:
    partial = partial_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"Cannot write the checkpoint {path}: {error.strerror}. Choose another path.") from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(folder: Path) -> None:
    if os.name != "posix":
        return
    # The name is safe only when the folder that holds it is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
