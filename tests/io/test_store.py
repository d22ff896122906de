from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import zarr

from cellstill.errors import InvalidArgumentError, StoreError
from cellstill.io.arrays import output_array
from cellstill.io.files import atomic_file
from cellstill.io.store import array_to_names, atomic_directory, load_store, names_to_array, save_store

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "codes": np.array([3, 1], dtype=np.int64)}
CONFIG = {"batches": ["x", "ü"], "nested": {"n": 3, "none": None}}


def test_round_trip(tmp_path):
    save_store(tmp_path / "model", "Thing", TENSORS, CONFIG)
    tensors, config = load_store(tmp_path / "model", "Thing")
    assert config == CONFIG
    assert tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].dtype == array.dtype
    assert os.listdir(tmp_path) == ["model"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    (tmp_path / "any").write_text("")
    assert modes == {(tmp_path / "any").stat().st_mode & 0o777}, "readable by whom the user's files are readable"


def test_an_existing_folder_is_kept_unless_overwriting(tmp_path):
    save_store(tmp_path / "model", "Thing", TENSORS, CONFIG)
    with pytest.raises(StoreError, match="exists.*overwrite=True"):
        save_store(tmp_path / "model", "Thing", TENSORS, {})
    assert load_store(tmp_path / "model", "Thing")[1] == CONFIG
    save_store(tmp_path / "model", "Thing", TENSORS, {}, overwrite=True)
    assert load_store(tmp_path / "model", "Thing")[1] == {}
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_leaves_nothing_new_and_everything_old(tmp_path):
    def fail(overwrite: bool) -> None:
        with atomic_directory(tmp_path / "out", overwrite=overwrite) as folder:
            (folder / "half.txt").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail(overwrite=False)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError, match="stop"), atomic_directory(tmp_path / "old" / "new" / "newer" / "out"):
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    (tmp_path / "old").rmdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        fail(overwrite=True)
    assert os.listdir(tmp_path / "out") == ["old.txt"]
    assert os.listdir(tmp_path) == ["out"]


def writing(path) -> subprocess.Popen:
    """A process that has begun to write a folder, and waits."""
    script = f"""
        import time
        from cellstill.io.store import atomic_directory
        with atomic_directory({str(path)!r}) as folder:
            (folder / "half.txt").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.stdout.close()
    return process


def killed(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def test_a_killed_process_leaves_no_output_under_the_name(tmp_path):
    killed(writing(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_goes_with_the_next_and_nothing_else_does(tmp_path):
    process = writing(tmp_path / "out")
    (left,) = tmp_path.iterdir()
    killed(process)
    other = writing(tmp_path / "another-out")
    killed(other)
    (of_another_path,) = set(tmp_path.iterdir()) - {left}
    living = writing(tmp_path / "out")
    try:
        (of_the_living,) = set(tmp_path.iterdir()) - {left, of_another_path}
        machine, pid, token = left.name.removeprefix(".partial-").split("-")[:3]
        elsewhere = "0" * 8 if machine != "0" * 8 else "1" * 8
        kept = [
            f".partial-{elsewhere}-{pid}-{token}-out",
            f".partial-{token}-out",
            f".out.partial-{token}",
            f".partial-{machine}-{pid}-{token}-out-2",
            f".partial-{machine}-{pid}-{token}-0-out",
            f".partial-{machine}-{pid}-{token}",
        ]
        for name in kept:
            (tmp_path / name).mkdir()
        link = tmp_path / f".partial-{machine}-{pid}-{'a' * 8}-out"
        link.symlink_to(of_another_path)
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "whole.txt").write_text("whole")
            (inner,) = {path.name for path in tmp_path.iterdir()} - {*kept, of_another_path.name, of_the_living.name}
            assert inner == folder.name
        assert {path.name for path in tmp_path.iterdir()} == {
            *kept,
            "out",
            of_another_path.name,
            of_the_living.name,
        }
        assert os.listdir(of_another_path) == os.listdir(of_the_living) == ["half.txt"]
    finally:
        killed(living)


def test_half_a_file_of_a_killed_process_goes_too(tmp_path):
    script = f"""
        import os, signal
        from cellstill.io.files import atomic_file
        with atomic_file({str(tmp_path / "table.csv.gz")!r}) as partial:
            assert partial.name.endswith(".csv.gz")
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with atomic_file(tmp_path / "table.csv.gz") as partial:
        partial.write_text("whole")
    assert os.listdir(tmp_path) == ["table.csv.gz"]


def test_what_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(StoreError, match=r"not a saved model: it has no model\.json and no tensors\.safetensors"):
        load_store(tmp_path, "Thing")
    path = tmp_path / "model"
    save_store(path, "Thing", TENSORS, CONFIG)
    with pytest.raises(StoreError, match=r"holds a Thing, not a Other. Load it with Thing\.load"):
        load_store(path, "Other")
    whole = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"tensors\.safetensors is damaged"):
        load_store(path, "Thing")
    (path / "tensors.safetensors").write_bytes(whole)
    content = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(StoreError, match="schema version 99.*reads version 1"):
        load_store(path, "Thing")
    (path / "model.json").write_text(json.dumps(content)[:40])
    with pytest.raises(StoreError, match=r"model\.json is damaged"):
        load_store(path, "Thing")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match="is a file"), atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_nothing_but_finite_json_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_store(tmp_path / "model", "Thing", TENSORS, {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_names():
    for names in (["AAAC-1", "Zelle ü", "a b", "two\nlines", ""], []):
        assert array_to_names(names_to_array(names)) == names


def test_outputs_in_memory_in_place_and_on_disk(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    mine = np.empty((3, 2), dtype=np.float64)
    for out in (None, mine, tmp_path / "values.zarr"):
        with output_array(out, (3, 2)) as array:
            array[slice(0, 2)] = values[:2]
            array[slice(2, 3)] = values[2:]
    np.testing.assert_array_equal(mine, values)
    np.testing.assert_array_equal(zarr.open(tmp_path / "values.zarr", mode="r")[:], values)
    with (
        pytest.raises(InvalidArgumentError, match=r"out has shape \(3, 2\); \(4, 2\) is needed"),
        output_array(mine, (4, 2)),
    ):
        pass


def test_an_interrupt_between_the_renames_keeps_the_old(tmp_path, monkeypatch):
    save_store(tmp_path / "model", "Thing", TENSORS, CONFIG)
    rename, calls = pathlib.Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_store(tmp_path / "model", "Thing", TENSORS, {}, overwrite=True)
    assert load_store(tmp_path / "model", "Thing")[1] == CONFIG
    assert os.listdir(tmp_path) == ["model"]


def test_what_appears_in_the_meantime_is_not_replaced(tmp_path):
    def race() -> None:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "ours.txt").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs.txt").write_text("theirs")

    with pytest.raises(StoreError, match="exists"):
        race()
    assert os.listdir(tmp_path / "out") == ["theirs.txt"]
    assert os.listdir(tmp_path) == ["out"]
