from __future__ import annotations

import pytest

from cellstill.errors import StoreError
from cellstill.io.files import atomic_file


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "table.csv.gz"
    for content in ("first", "second"):
        with atomic_file(path) as partial:
            assert partial.parent == path.parent
            assert partial.suffixes == path.suffixes
            partial.write_text(content)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_if_the_block_fails(tmp_path, error):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def break_off():
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        break_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_were_made_go_if_the_block_fails_unless_something_is_in_them(tmp_path):
    def break_off(*left: str):
        with atomic_file(tmp_path / "a" / "b" / "table.csv"):
            for name in left:
                (tmp_path / name).write_text("")
            raise ValueError

    with pytest.raises(ValueError):
        break_off()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError):
        break_off("a/other")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_folders_and_impossible_paths_are_named(tmp_path):
    with pytest.raises(StoreError, match="is a folder, not a file"), atomic_file(tmp_path):
        raise AssertionError("the block ran")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Cannot write .*table.csv"), atomic_file(tmp_path / "file" / "table.csv"):
        raise AssertionError("the block ran")
