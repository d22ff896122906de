from __future__ import annotations

import warnings
from itertools import product

import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellstill import SCDD
from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.genes import variable_genes
from cellstill.condense.problem import CondensationProblem, read_labels
from cellstill.condense.splits import split_classes
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
)

PARTS = ("train", "validation", "test")


def labelled(n_obs: int = 120, n_vars: int = 30, seed: int = 0, **obs) -> AnnData:
    rng = np.random.default_rng(seed)
    kind = np.arange(n_obs) % 3
    rate = np.full((n_obs, n_vars), 0.5)
    for k in range(3):
        rate[np.ix_(kind == k, np.arange(5 * k, 5 * k + 5))] = 3
    table = pd.DataFrame({"cell_type": [f"t{k}" for k in kind], **obs}, index=[f"c{i}" for i in range(n_obs)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(n_vars)])
    return AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=table, var=var)


def mudata_of(adata: AnnData) -> mudata.MuData:
    with mudata.set_options(pull_on_update=False):
        return mudata.MuData({"rna": adata})


def assert_same(one: CondensationProblem, other: CondensationProblem) -> None:
    assert one.classes == other.classes
    np.testing.assert_array_equal(one.genes, other.genes)
    for name in PARTS:
        np.testing.assert_array_equal(one.rows[name], other.rows[name])
        np.testing.assert_array_equal(getattr(one, name).codes, getattr(other, name).codes)
        np.testing.assert_array_equal(getattr(one, name).counts.toarray(), getattr(other, name).counts.toarray())


# Cells


def test_cells_are_chosen_by_position_mask_and_class():
    cells = LabelledCells(sp.csr_matrix(np.arange(1, 13, dtype=np.float32).reshape(4, 3)), np.array([0, 1, 0, 2]))
    assert (len(cells), cells.n_vars) == (4, 3)
    for chosen in (np.array([0, 2]), cells.codes == 0, cells.of_class(0)):
        np.testing.assert_array_equal(cells[chosen].counts.toarray(), [[1, 2, 3], [7, 8, 9]])
        assert cells[chosen].codes.tolist() == [0, 0]
    assert len(cells.of_class(3)) == 0


def test_size_is_that_of_what_is_kept():
    counts = sp.csr_matrix(np.eye(3, dtype=np.float32))
    assert LabelledCells(counts, np.arange(3)).n_bytes == 3 * 4 + 3 * 4 + 4 * 4
    assert Features(np.zeros((3, 5), dtype=np.float32), np.arange(3), len).n_bytes == 3 * 5 * 4


def test_features_of_cells_are_those_of_the_encoder():
    cells = LabelledCells(sp.csr_matrix(np.eye(3, dtype=np.float32)), np.arange(3))
    features = Features(np.zeros((2, 3), dtype=np.float32), np.arange(2), lambda cells: 2 * cells.counts.toarray())
    found = features.encode(cells)
    assert (len(features), found.dtype) == (2, np.float32)
    np.testing.assert_array_equal(found, 2 * np.eye(3))


@pytest.mark.parametrize(
    ("values", "encoder", "match"),
    [
        (np.zeros((3, 2)), len, r"values has shape \(3, 2\) and codes 2 entries"),
        (np.zeros(2), len, r"values has shape \(2,\)"),
        (np.full((2, 2), np.nan), len, "values has NaN or infinity"),
        (np.zeros((2, 2)), lambda cells: np.zeros((3, 1)), r"encoder gives shape \(3, 1\) of 3 cells.* 2 features"),
        (np.zeros((2, 2)), lambda cells: np.full((3, 2), np.inf), "6 values not finite"),
    ],
    ids=["too_many", "no_matrix", "nan", "other_width", "infinite"],
)
def test_features_that_are_none_are_refused(values, encoder, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Features(values, np.arange(2), encoder).encode(
            LabelledCells(sp.csr_matrix(np.eye(3, dtype=np.float32)), np.arange(3))
        )


def test_expression_is_log1p_of_ten_thousand_shares():
    counts = np.array([[1, 3, 0], [0.5, 0, 1.5]])
    cells = LabelledCells(sp.csr_matrix(counts), np.array([0, 1]))
    expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(cells.expression().toarray(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "codes", "match"),
    [
        (np.eye(3), np.arange(3), "counts is of type ndarray, and a CSR matrix is needed"),
        (sp.csc_matrix(np.eye(3)), np.arange(3), "counts is of type csc_matrix, and a CSR"),
        (
            sp.csr_matrix(np.eye(3)),
            np.arange(3.0),
            r"codes is an array of float64 and shape \(3,\), and an .* integers",
        ),
        (sp.csr_matrix(np.eye(3)), np.array(list("abc")), "codes is an array of <U1"),
        (sp.csr_matrix(np.eye(3)), np.zeros((3, 1), dtype=np.int64), r"codes is an array of int64 and shape \(3, 1\)"),
        (sp.csr_matrix(np.eye(3)), [0, 1, 2], "codes is of type list"),
    ],
    ids=["dense", "csc", "fractions", "names", "column", "list"],
)
def test_cells_of_other_types_are_refused(counts, codes, match):
    with pytest.raises(InvalidArgumentError, match=match):
        LabelledCells(counts, codes)
    if match.startswith("codes"):
        with pytest.raises(InvalidArgumentError, match=match):
            Features(np.eye(3), codes, len)


@pytest.mark.parametrize(
    ("adata", "key", "match"),
    [
        ("cells.h5ad", "cell_type", "adata is of type str, and an AnnData is needed. Read a file with"),
        (pd.DataFrame({"cell_type": list("ab")}), "cell_type", "adata is of type DataFrame"),
        (mudata_of(AnnData(np.eye(2))), "cell_type", r"adata is of type MuData, .*mdata\['rna'\]"),
        (AnnData(np.eye(2)), None, "labels_key=None has to name a column"),
        (AnnData(np.eye(2)), 3, "labels_key=3 has to name a column of adata.obs, or several in a list"),
        (AnnData(np.eye(2)), ["cell_type", 3], r"labels_key=\['cell_type', 3\] has to name"),
    ],
    ids=["path", "frame", "mudata", "no-key", "number", "number-in-list"],
)
def test_other_containers_and_keys_are_refused(adata, key, match):
    for call in (
        CondensationProblem.from_anndata,
        SCDD.setup_anndata,
        lambda adata, key: CondensationProblem.from_rows(adata, key, {}, np.array(["g0"])),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            call(adata, key)


def test_cells_without_a_class_each_are_refused():
    with pytest.raises(InvalidArgumentError, match="codes has 3 entries; 2 cells"):
        LabelledCells(sp.csr_matrix((2, 4), dtype=np.float32), np.zeros(3, dtype=np.int64))


# Splits


@pytest.mark.parametrize("shares", [(0.7, 0.1), (0.5, 0.25), (0.1, 0.8), (0.9, 0.05), (0.8, 0.2), (0.34, 0.66)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_cell_is_in_one_part_and_each_class_in_the_shares_asked_for(shares, seed):
    sizes = [1, 2, 3, 4, 7, 10, 53, 400]
    codes = np.random.default_rng(9).permutation(np.repeat(np.arange(len(sizes)), sizes))
    parts = split_classes(codes, train_size=shares[0], validation_size=shares[1], seed=seed)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(codes)))
    assert all((np.diff(rows) > 0).all() for rows in parts.values())
    wanted = np.array([*shares, 1 - sum(shares)])
    n_parts = 2 if wanted[2] < 1e-9 else 3
    for code, size in enumerate(sizes):
        held = np.array([(codes[parts[name]] == code).sum() for name in PARTS])
        if n_parts == 2:
            assert held[2] == 0
        if size >= n_parts:
            assert (held[:n_parts] >= 1).all()
        # Within rounding of each part, plus what the parts of one cell at least take from the others.
        assert (np.abs(held - wanted * size)[:n_parts] <= 1.0 + (size < 30)).all()


@pytest.mark.parametrize(
    ("size", "validation_size", "held"),
    [(1, 0.1, (1, 0, 0)), (2, 0.1, (1, 0, 1)), (3, 0.1, (1, 1, 1)), (1, 0.3, (1, 0, 0)), (2, 0.3, (1, 1, 0))],
    ids=["one-trains", "two-train-and-test", "three-are-one-each", "one-trains-no-test", "two-choose-no-test"],
)
def test_smallest_classes(size, validation_size, held):
    codes = np.repeat([0, 1], [50, size])
    parts = split_classes(codes, train_size=0.7, validation_size=validation_size)
    assert tuple(int((codes[parts[name]] == 1).sum()) for name in PARTS) == held


def test_seeds_decide_the_split():
    codes = np.arange(200) % 4
    one, same, other = (split_classes(codes, seed=seed)["train"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    # A cell trains as often as the share says, wherever it stands.
    often = np.mean([np.isin(np.arange(200), split_classes(codes, seed=seed)["train"]) for seed in range(150)], axis=0)
    assert abs(often.mean() - 0.7) < 0.01
    assert often.min() > 0.5
    assert often.max() < 0.9


def test_donors_are_on_one_side_only():
    rng = np.random.default_rng(0)
    donors = rng.permutation(np.repeat([f"d{i}" for i in range(9)], rng.integers(10, 60, 9)))
    codes = rng.integers(3, size=len(donors))
    parts = split_classes(codes, donors, train_size=0.6, validation_size=0.2)
    found = [set(donors[parts[name]]) for name in PARTS]
    assert [len(part) for part in found] == [5, 2, 2]
    assert len(set().union(*found)) == sum(map(len, found)) == 9
    for name, share in zip(PARTS, (0.6, 0.2, 0.2), strict=True):
        assert abs(len(parts[name]) / len(codes) - share) < 0.05


def test_training_keeps_the_classes_of_few_donors():
    # One class of a single donor: wherever the order of donors puts it by chance, it has to train.
    donors = np.repeat(np.arange(8), 20)
    codes = np.where(donors == 5, 1, 0)
    for seed in range(10):
        parts = split_classes(codes, donors, seed=seed)
        assert (codes[parts["train"]] == 1).sum() == 20
    # Of two donors with a class, one trains and the other tests.
    codes = np.where((donors == 5) | (donors == 2), 1, 0)
    parts = split_classes(codes, donors)
    assert [int((codes[parts[name]] == 1).sum()) for name in PARTS] == [20, 0, 20]


def test_donors_without_a_test_part():
    donors = np.repeat(np.arange(4), 10)
    parts = split_classes(np.tile([0, 1], 20), donors, train_size=0.75, validation_size=0.25)
    assert [len(parts[name]) for name in PARTS] == [30, 10, 0]


def test_too_few_donors():
    donors = np.repeat(["x", "y"], 10)
    with pytest.raises(InvalidArgumentError, match=r"donor_key has 2 donors \(x, y\); 3 at least"):
        split_classes(np.tile([0, 1], 10), donors)
    assert len(split_classes(np.tile([0, 1], 10), donors, train_size=0.5, validation_size=0.5)["train"]) == 10


@pytest.mark.parametrize(
    ("train", "validation"), [(0, 0.1), (0.7, 0), (0.9, 0.2), (-0.1, 0.5), (float("nan"), 0.1), ("x", 0.1), (0.7, None)]
)
def test_shares_out_of_range(train, validation):
    with pytest.raises(InvalidArgumentError, match=r"train_size=.* validation_size=.* have to be above 0"):
        split_classes(np.arange(20) % 2, train_size=train, validation_size=validation)


@pytest.mark.parametrize("setting", [{"seed": -2}, {"seed": "a"}, {"n_top_genes": "x"}, {"n_top_genes": 0}])
def test_problems_refuse_what_is_no_number(setting):
    ((name, value),) = setting.items()
    with pytest.raises(InvalidArgumentError, match=f"{name}={value!r} has to be an integer of at least"):
        CondensationProblem.from_anndata(labelled(), "cell_type", **setting)


# Problem


def test_parts_hold_the_cells_of_their_rows():
    adata = labelled()
    problem = CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=None)
    assert problem.classes == ("t0", "t1", "t2")
    assert problem.genes.tolist() == adata.var_names.tolist()
    names = np.array(problem.classes)
    for part in PARTS:
        rows = problem.rows[part]
        np.testing.assert_array_equal(getattr(problem, part).counts.toarray(), adata.X[rows].toarray())
        assert names[getattr(problem, part).codes].tolist() == adata.obs["cell_type"].iloc[rows].tolist()


def test_from_rows_rebuilds_what_from_anndata_built():
    adata = labelled(donor=[f"d{i % 7}" for i in range(120)])
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X.astype(np.float32) / 2
    how = {"layer": "raw", "donor_key": "donor"}
    built = CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=12, seed=3, **how)
    again = CondensationProblem.from_rows(adata, ["cell_type"], built.rows, built.genes, **how)
    assert_same(built, again)
    np.testing.assert_array_equal(built.donors, again.donors)
    assert built.donors.tolist() == adata.obs["donor"].iloc[built.rows["train"]].tolist()


def test_from_rows_refuses_other_cells_and_genes():
    adata = labelled()
    problem = CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=12)
    with pytest.raises(InvalidArgumentError, match="adata has 50 cells; the split names cell 119"):
        CondensationProblem.from_rows(adata[:50].copy(), "cell_type", problem.rows, problem.genes)
    lacking = adata[:, [name for name in adata.var_names if name != problem.genes[0]]].copy()
    with pytest.raises(GeneMismatchError, match="Only 11 of the model's 12 genes"):
        CondensationProblem.from_rows(lacking, "cell_type", problem.rows, problem.genes)


def test_order_of_genes_changes_neither_split_nor_cells():
    adata = labelled(n_vars=60)
    order = np.random.default_rng(4).permutation(60)
    one = CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=20)
    other = CondensationProblem.from_anndata(adata[:, order].copy(), "cell_type", n_top_genes=20)
    assert set(one.genes) == set(other.genes)
    back = pd.Index(other.genes).get_indexer(one.genes)
    for part in PARTS:
        np.testing.assert_array_equal(one.rows[part], other.rows[part])
        moved = getattr(other, part).counts.toarray()[:, back]
        np.testing.assert_array_equal(getattr(one, part).counts.toarray(), moved)


def test_genes_are_chosen_on_training_cells_only(caplog):
    adata = labelled(n_vars=60)
    rows = CondensationProblem.from_anndata(adata, "cell_type").rows
    counts = adata.X.toarray()
    rng = np.random.default_rng(1)
    counts[:, 50:52] = 1
    away = np.concatenate([rows["validation"], rows["test"]])
    counts[away, 50] = rng.poisson(200 * rng.integers(2, size=len(away)))
    counts[rows["train"], 51] = rng.poisson(200 * rng.integers(2, size=len(rows["train"])))
    counts[:, 52] = 0
    counts[away, 52] = 5
    adata.X = sp.csr_matrix(counts)
    chosen = CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=16).genes
    assert len(chosen) == 16
    assert "g51" in chosen
    assert "g50" not in chosen
    for n_top_genes, told in ((None, True), (60, True), (59, False), (20, False)):
        caplog.clear()
        with caplog.at_level("INFO", logger="cellstill"):
            genes = CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=n_top_genes).genes
        assert len(genes) == min(n_top_genes or 59, 59)
        assert "g52" not in genes
        assert ("Left out, without counts in the training cells: 1 of 60 genes." in caplog.text) == told


def test_chosen_genes_are_those_with_the_largest_pearson_residuals():
    counts = labelled(n_vars=40).X
    dense = counts.toarray().astype(np.float64)
    mean = dense.sum(axis=1, keepdims=True) * dense.sum(axis=0) / dense.sum()
    limit = np.sqrt(len(dense))
    residuals = np.clip((dense - mean) / np.sqrt(mean + mean**2 / 100), -limit, limit)
    expected = np.sort(np.argsort(residuals.var(axis=0))[-10:])
    np.testing.assert_array_equal(variable_genes(counts, 10), expected)
    with pytest.raises(InvalidArgumentError, match="n_top_genes=1 has to be at least 2"):
        variable_genes(counts, 1)


def test_several_labels_are_classes_of_combinations_that_occur():
    kind = np.arange(120) % 3
    stage = np.where(kind == 2, "late", np.where(np.arange(120) % 2, "late", "early"))
    adata = labelled(stage=pd.Categorical(stage, categories=["unused", "late", "early"]))
    problem = CondensationProblem.from_anndata(adata, ["cell_type", "stage"])
    assert problem.classes == ("t0 | late", "t0 | early", "t1 | late", "t1 | early", "t2 | late")
    assert [task.key for task in problem.tasks] == ["cell_type", "stage"]
    assert problem.tasks[1].names == ("late", "early")
    for task, part in product(problem.tasks, PARTS):
        back = np.array(task.names)[task.of_class[getattr(problem, part).codes]]
        assert back.tolist() == adata.obs[task.key].iloc[problem.rows[part]].astype(str).tolist()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (np.arange(120) % 3 + 8, ("8", "9", "10")),
        (np.arange(120) % 2 == 0, ("False", "True")),
        (pd.Categorical.from_codes(np.arange(120) % 2, ["z", "a", "never"]), ("z", "a")),
    ],
    ids=["integers-in-their-order", "booleans", "categories-in-their-order"],
)
def test_labels_of_other_types(values, names):
    adata = labelled(label=values)
    codes, classes, _ = read_labels(adata, ["label"])
    assert classes == names
    assert np.array(classes)[codes].tolist() == pd.Series(values).astype(str).tolist()


def test_combinations_whose_names_would_be_equal_are_refused():
    first = np.where(np.arange(120) % 2, "a | b", "a")
    second = np.where(np.arange(120) % 2, "c", "b | c")
    with pytest.raises(InvalidArgumentError, match=r"labels_key=.*'a \| b \| c'"):
        read_labels(labelled(first=first, second=second), ["first", "second"])


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("absent", MissingKeyError, "labels_key='absent' is not in adata.obs.*'cell_type'"),
        ("holes", InvalidArgumentError, r"adata.obs\['holes'\] is missing for 40 of 120 cells"),
        ("constant", InvalidArgumentError, "labels_key='constant': all cells are labelled 'same'"),
        (["cell_type", "constant"], InvalidArgumentError, "'constant': all cells are labelled 'same'.*Leave it out"),
        ([], InvalidArgumentError, r"labels_key=\[\] has to name"),
        (["cell_type", "cell_type"], InvalidArgumentError, "several different"),
    ],
    ids=["no-column", "NaN", "one-class", "one-category-beside-others", "none", "twice"],
)
def test_bad_labels(key, error, message):
    adata = labelled(constant="same", holes=[None if i % 3 == 0 else "x" for i in range(120)])
    with pytest.raises(error, match=message):
        CondensationProblem.from_anndata(adata, key)


@pytest.mark.parametrize("categorical", [True, False])
@pytest.mark.parametrize("written", ["", "  ", "nan", "NaN", "NAN", "NA", " NA ", "N/A", "<NA>", "NaT", "None"])
def test_labels_that_are_missing_as_text_are_refused(written, categorical):
    texts = pd.Series([written if i % 4 == 0 else f"x{i % 2}" for i in range(120)])
    adata = labelled(label=(texts.astype("category") if categorical else texts).array)
    with pytest.raises(InvalidArgumentError) as refused:
        CondensationProblem.from_anndata(adata, ["cell_type", "label"])
    assert str(refused.value) == (
        f"labels_key: adata.obs['label'] is missing for 30 of 120 cells, which are labelled {written!r}. "
        f"Label those cells or remove them: adata[~adata.obs['label'].isin([{written!r}])].copy(). "
        "If it is the name of a class, rename it."
    )
    labels = read_labels(adata[~adata.obs["label"].isin([written])].copy(), ["label"])
    assert labels[1] == ("x0", "x1")


def test_all_texts_that_stand_for_missing_labels_are_named():
    adata = labelled(label=[("NA", "", "T", "B")[i % 4] for i in range(120)])
    with pytest.raises(InvalidArgumentError, match=r"donor_key: adata.obs\['label'\] is missing for 60 .*of a donor"):
        CondensationProblem.from_anndata(adata, "cell_type", donor_key="label")
    with pytest.raises(InvalidArgumentError, match=r"donor_key: adata.obs\['label'\] is missing for 60"):
        SCDD.setup_anndata(adata, "cell_type", donor_key="label")
    with pytest.raises(InvalidArgumentError, match=r"missing for 60 of 120 cells, which are labelled '', 'NA'\. "):
        read_labels(adata, ["label"])


def test_unknown_cells_and_names_that_only_look_missing_are_classes():
    names = ("unknown", "Unassigned", "NA neuron", "Na", "none")
    codes, classes, _ = read_labels(labelled(label=[names[i % 5] for i in range(120)]), ["label"])
    assert classes == tuple(sorted(names))
    assert np.bincount(codes).tolist() == [24] * 5


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan], ids=["fraction", "negative", "nan"])
def test_what_is_no_count_is_refused_before_genes_are_chosen(value):
    adata = labelled()
    adata.X.data[7] = value
    with pytest.raises(InvalidCountsError, match="X"):
        CondensationProblem.from_anndata(adata, "cell_type", n_top_genes=10)


def test_classes_without_training_cells_are_an_error_and_without_test_cells_a_warning():
    adata = labelled(donor=[f"d{i % 3}" for i in range(120)])
    with pytest.raises(InvalidArgumentError, match="No training cell is left of the classes"):
        CondensationProblem.from_anndata(adata, "cell_type", donor_key="donor", train_size=0.34, validation_size=0.33)
    adata.obs["cell_type"] = ["rare"] + ["a", "b"] * 59 + ["a"]
    with pytest.warns(CellstillWarning, match=r"No test cell is left of the classes \['rare'\]"):
        CondensationProblem.from_anndata(adata, "cell_type")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CondensationProblem.from_anndata(adata, "cell_type", train_size=0.8, validation_size=0.2)


def test_budget_is_capped_at_the_training_cells_of_a_class():
    adata = labelled()
    adata.obs["cell_type"] = ["rare"] * 3 + ["a"] * 20 + ["b"] * 97
    problem = CondensationProblem.from_anndata(adata, "cell_type")
    sizes = np.bincount(problem.train.codes)
    for wanted in (1, 5, np.int64(10), 5000):
        np.testing.assert_array_equal(problem.budget(wanted), np.minimum(sizes, wanted))
    assert problem.budget(10).tolist() == [10, 10, 1]
    assert problem.budget(10).dtype == np.int64


@pytest.mark.parametrize("wanted", [0, -3, 1.5, True, "ten", None, float("nan"), float("inf")])
def test_bad_samples_per_class(wanted):
    problem = CondensationProblem.from_anndata(labelled(), "cell_type")
    with pytest.raises(InvalidArgumentError, match="samples_per_class=.* an integer of at least 1"):
        problem.budget(wanted)
