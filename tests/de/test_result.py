from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from cellstill.de import Contrast, DEResult
from cellstill.de.result import direction, floor_of
from cellstill.errors import MissingKeyError, StoreError


@pytest.fixture
def result():
    lfc, fdr = np.array([2.0, -1.0, 3.0, np.nan]), np.array([0.04, 0.01, 0.5, np.nan])
    table = pd.DataFrame({"gene": list("abcd"), "lfc": lfc, "p_value": fdr / 2, "fdr": fdr, "is_de": fdr <= 0.05})
    table["direction"] = direction(lfc, table["is_de"].to_numpy())
    units = pd.DataFrame({"donor": list("xyxy"), "when": ["on", "on", "off", "off"], "n_cells": [10, 2000, 30, 40]})
    left_out = pd.DataFrame({"donor": ["z"], "when": ["on"], "n_cells": [1], "reason": ["fewer than 10 cells"]})
    return DEResult(
        table=table,
        contrast=Contrast("when", "on", "off"),
        design="~ donor + when",
        method="deseq2",
        units=units,
        left_out=left_out,
        params={"fdr": 0.05},
        notes=("One thing.",),
    )


def test_repr_says_what_was_compared_and_found(result):
    assert repr(result).splitlines() == [
        "DEResult: when: on over off (deseq2)",
        "  design   ~ donor + when",
        "  samples  2 (2,010 cells) vs 2 (70 cells); 1 left out",
        "  genes    4, 3 with an FDR; 2 DE at FDR 0.05: 1 up, 1 down",
        "  note     One thing.",
    ]


def test_called_genes_come_most_certain_first(result):
    assert result.de_genes == ["b", "a"]


def test_of_genes_as_certain_the_largest_change_comes_first(result):
    table = result.table.assign(p_value=0.0, fdr=0.0, is_de=[True, True, True, False])
    assert dataclasses.replace(result, table=table).de_genes == ["c", "a", "b"]
    assert result.table["direction"].tolist() == ["up", "down", "none", "none"]
    assert (result.n_samples, result.n_cells) == ({"on": 2, "off": 2}, {"on": 2010, "off": 70})


def test_a_result_is_a_record(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.design = "~ when"


@pytest.mark.parametrize("name", ["genes.csv", "genes.csv.gz"])
def test_csv_gives_the_table_back(result, tmp_path, name):
    result.table.loc[0, "lfc"] = 0.1 + 0.2
    (tmp_path / name).write_text("old")
    result.to_csv(tmp_path / name)
    back = pd.read_csv(tmp_path / name, float_precision="round_trip")
    pd.testing.assert_frame_equal(back, result.table, check_exact=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_csv_that_cannot_be_written_leaves_what_was_there(result, tmp_path, monkeypatch):
    path = tmp_path / "genes.csv"
    path.write_text("old")

    def break_off(table, partial, **_):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", break_off)
    with pytest.raises(StoreError, match="genes.csv: No space left on device"):
        result.to_csv(path)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["genes.csv"]
    with pytest.raises(StoreError, match="is a folder, not a file"):
        result.to_csv(tmp_path)


def test_figures_are_of_the_table(result):
    (axes,) = result.volcano().axes
    assert axes.get_title() == "when: on over off"
    drawn = np.concatenate([points.get_offsets() for points in axes.collections])
    tested = result.table[result.table["fdr"].notna()]
    expected = np.column_stack([tested["lfc"], -np.log10(tested["fdr"])])
    np.testing.assert_allclose(drawn[drawn[:, 0].argsort()], expected[expected[:, 0].argsort()])
    with pytest.raises(MissingKeyError, match="column='base_mean' is not in the table of 'when: on over off'"):
        result.ma()
    (axes,) = dataclasses.replace(result, table=result.table.assign(base_mean=[1.0, 20, 300, 4])).ma().axes
    drawn = np.concatenate([points.get_offsets() for points in axes.collections])
    np.testing.assert_allclose(drawn[drawn[:, 0].argsort()], [[1, 2], [20, -1], [300, 3]])


@pytest.mark.parametrize(
    ("params", "floor"),
    [({"lfc_threshold": 0.5}, 0.5), ({"delta": 0.25}, 0.25), ({"delta": None}, 0.0), ({"lfc_threshold": 0.0}, 0.0)],
)
def test_floors_go_by_either_name(params, floor):
    assert floor_of(params) == floor
