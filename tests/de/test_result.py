from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from cellstill.de import Contrast, DEResult
from cellstill.de.result import direction


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
    assert result.table["direction"].tolist() == ["up", "down", "none", "none"]
    assert (result.n_samples, result.n_cells) == ({"on": 2, "off": 2}, {"on": 2010, "off": 70})


def test_a_result_is_a_record(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.design = "~ when"
