from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cellstill.de import BayesianConfig, Contrast, DEResult, PseudobulkConfig, bayesian_de, pseudobulk_de, stratify
from cellstill.errors import CellstillWarning, InvalidArgumentError, InvalidCountsError, MissingKeyError

TREATED = {"groupby": "condition", "group1": "treated", "group2": "control", "sample_key": "donor"}
DONORS = [(f"d{i}", "treated" if i % 2 else "control", "ab"[i // 3]) for i in range(6)]


@pytest.fixture(scope="module")
def typed(simulate):
    """Cells of three types with effects of their own, in a random order; donor d5 has few B cells."""
    parts = [simulate(DONORS, n_genes=60, n_cells=20, seed=seed) for seed in range(3)]
    obs = pd.concat([part.obs.assign(type=name) for part, name in zip(parts, "TBM", strict=True)])
    counts = np.concatenate([part.counts.toarray() for part in parts])
    few = np.flatnonzero((obs["donor"] == "d5") & (obs["type"] == "B"))[5:]
    keep = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(obs)), few))
    return counts[keep], obs.iloc[keep], parts[0].genes


def by_pseudobulk(counts, obs, genes):
    return pseudobulk_de(counts, obs, genes, batch_key="batch", config=PseudobulkConfig(min_total_count=1), **TREATED)


def by_draws(counts, obs, genes):
    """Shares of the counts, jittered alike whatever other cells there are."""
    shares = (counts + 0.1) / (counts + 0.1).sum(axis=1, keepdims=True)
    draws = ([(np.arange(len(obs)), shares * 2.0 ** (0.1 * number))] for number in range(2))
    return bayesian_de(draws, obs, genes, config=BayesianConfig(), **TREATED)


@pytest.mark.parametrize("compare", [by_pseudobulk, by_draws])
def test_each_level_is_compared_as_if_alone(typed, compare):
    counts, obs, genes = typed
    with pytest.warns(CellstillWarning, match="'B': 1 of 6 samples left out: 'd5' in 'treated'") as caught:
        result = stratify(obs, "type", lambda level, rows: compare(counts[rows], obs.iloc[rows], genes))
    assert len(caught) == 1
    assert list(result) == list(result.results) == ["B", "M", "T"]
    assert result.skipped.empty
    parts = []
    for level in "BMT":
        own = (obs["type"] == level).to_numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CellstillWarning)
            alone = compare(counts[own], obs[own], genes)
        pd.testing.assert_frame_equal(result[level].table, alone.table)
        assert result[level].design == alone.design
        assert result.de_genes[level] == alone.de_genes
        parts.append(alone.table.assign(type=level))
    table = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(result.table, table[["type", *table.columns[:-1]]])
    assert result.table["is_de"].sum() > 5


def made_up(called: int = 1, n_genes: int = 4) -> DEResult:
    fdr = np.where(np.arange(n_genes) < called, 0.01, 0.5)
    table = pd.DataFrame({"gene": [f"g{i}" for i in range(n_genes)], "base_mean": 1.0, "lfc": 1.0, "p_value": fdr / 2})
    table = table.assign(fdr=fdr, is_de=fdr < 0.05, direction=np.where(fdr < 0.05, "up", "none"))
    units = pd.DataFrame({"donor": list("abcd"), "when": ["on", "on", "off", "off"], "n_cells": [10, 2000, 30, 40]})
    return DEResult(
        table=table,
        contrast=Contrast("when", "on", "off"),
        design="~ when",
        method="ttest",
        units=units,
        left_out=units[:0].assign(reason=""),
        params={"fdr": 0.05},
    )


@pytest.fixture
def levels():
    return pd.DataFrame({"kind": pd.Categorical(list("ccbaab"), categories=list("zcba"))})


def test_levels_that_cannot_be_compared_are_skipped_aloud(levels):
    def compare(level, rows):
        warnings.warn("Of a level that is not compared.", CellstillWarning, stacklevel=2) if level != "a" else None
        if level == "b":
            raise InvalidArgumentError("Too few samples.\nsample n\nx 1")
        if level == "c":
            raise InvalidCountsError("No counts.")
        np.testing.assert_array_equal(rows, [3, 4])
        return made_up()

    with pytest.warns(CellstillWarning) as caught:
        result = stratify(levels, "kind", compare)
    assert [str(item.message).splitlines() for item in caught] == [
        ["Comparisons within 'kind':", "Not compared, 'b': Too few samples.", "Not compared, 'c': No counts."]
    ]
    assert list(result.results) == ["a"]
    assert result.skipped.to_numpy().tolist() == [["b", "Too few samples.\nsample n\nx 1"], ["c", "No counts."]]
    with pytest.raises(InvalidArgumentError, match="kind='b' was not compared: Too few samples"):
        result["b"]
    with pytest.raises(InvalidArgumentError, match="kind='z' is not known. Use one of: 'a'"):
        result["z"]
    assert repr(result).splitlines() == [
        "StratifiedDEResult: when: on over off within kind (ttest)",
        "  a  2 vs 2 samples, 2,010 vs 70 cells: 1 DE, 1 up, 0 down",
        "  skipped  b: Too few samples.",
        "  skipped  c: No counts.",
    ]


def test_if_no_level_can_be_compared_all_reasons_are_given_once(levels):
    def compare(level, rows):
        raise InvalidArgumentError("Wrong." if level == "a" else "Worse.\nTable")

    with pytest.raises(InvalidArgumentError) as error:
        stratify(levels, "kind", compare)
    assert str(error.value).splitlines() == [
        "within='kind': none of the 3 levels could be compared.",
        "'a': Wrong.",
        "'b', 'c': Worse.",
        "Table",
    ]


def test_what_levels_warn_of_is_said_once(levels):
    def compare(level, rows):
        warnings.warn("Cells are not replicates.", CellstillWarning, stacklevel=2)
        if level == "b":
            warnings.warn("Something else.", CellstillWarning, stacklevel=2)
        return made_up()

    before = list(warnings.filters)
    with pytest.warns(CellstillWarning) as caught:
        stratify(levels, "kind", compare)
    assert [str(item.message).splitlines() for item in caught] == [
        ["Comparisons within 'kind':", "'a', 'b', 'c': Cells are not replicates.", "'b': Something else."]
    ]
    assert warnings.filters == before


def test_warnings_and_repr_are_short_however_many_levels_there_are():
    many = pd.DataFrame({"kind": [f"k{i:03}" for i in range(200)]})

    def compare(level, rows):
        if level >= "k100":
            raise InvalidArgumentError(f"Reason of {level}, " + "long " * 1000)
        return made_up()

    with pytest.warns(CellstillWarning) as caught:
        result = stratify(many, "kind", compare)
    assert len(str(caught[0].message)) < 4000
    assert "... and 92 more." in str(caught[0].message)
    assert len(repr(result).splitlines()) < 50
    assert "... 80 more levels" in repr(result)


@pytest.mark.parametrize("error", [MissingKeyError, ZeroDivisionError])
def test_other_errors_are_not_swallowed(levels, error):
    def compare(level, rows):
        raise error("oh")

    with pytest.raises(error):
        stratify(levels, "kind", compare)


def test_other_warnings_pass(levels):
    def compare(level, rows):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return made_up()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stratify(levels, "kind", compare)
    assert [item.category for item in caught] == [DeprecationWarning] * 3


def test_a_column_with_missing_values_or_none_at_all_is_refused(levels):
    with pytest.raises(InvalidArgumentError, match=r"within='kind': obs\['kind'\] has missing values in 1 of 6"):
        stratify(levels.assign(kind=["a", None, *"bcde"]), "kind", lambda *_: made_up())
    with pytest.raises(MissingKeyError, match="within='type' is not in obs. obs has: 'kind'"):
        stratify(levels, "type", lambda *_: made_up())


def test_csv_and_figures_have_every_level(levels, tmp_path):
    result = stratify(levels, "kind", lambda level, rows: made_up(called=ord(level) - ord("a")))
    result.to_csv(tmp_path / "new" / "genes.csv")
    back = pd.read_csv(tmp_path / "new" / "genes.csv")
    pd.testing.assert_frame_equal(back, result.table, check_dtype=False)
    assert back.groupby("kind")["is_de"].sum().tolist() == [0, 1, 2]
    for figure in (result.volcano(), result.ma(n_labels=1)):
        assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
        assert [sum(len(points.get_offsets()) for points in axes.collections) for axes in figure.axes] == [4] * 3


def test_notes_are_shown(levels):
    result = stratify(levels, "kind", lambda *_: made_up())
    assert repr(replace(result, notes=("Borrowed.",))).endswith("  note     Borrowed.")
