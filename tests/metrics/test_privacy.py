from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics import membership_inference, paired_membership_inference
from cellstill.metrics._donor_attacks import attack_success, paired_success
from cellstill.metrics.privacy import CLOSEST_RECORD_NOTE, distance_to_closest_record

MEMBERS = [f"donor_{i}" for i in range(20)]
REFERENCE = [f"donor_{i}" for i in range(20, 35)]


@pytest.fixture(scope="module")
def cohort():
    """Cells of 50 donors (20 members, 15 for reference, 15 not members), and of 20 donors nobody has seen."""
    cells = simulate_counts(
        n_obs=2100,
        n_vars=150,
        n_cell_types=3,
        n_batches=1,
        conditions=("only",),
        n_donors_per_group=70,
        donor_sd=0.2,
        seed=3,
    )
    cells = cells[np.random.default_rng(0).permutation(cells.n_obs)]
    donors = cells.obs["donor"].to_numpy().astype(str)
    number = np.array([int(name.split("_")[1]) for name in donors])
    return cells.X[number < 50], donors[number < 50], cells.X[number >= 50]


def attack(cohort, synthetic, **options):
    x, donors, _ = cohort
    options = {"members": MEMBERS, "reference": REFERENCE, "n_bootstrap": 500} | options
    return membership_inference(synthetic, x, donors, **options).set_index(["release", "attack"])


def test_the_positive_control_is_detected_and_strangers_are_not(cohort):
    table = attack(cohort, cohort[2][:150])
    for release, name in table.index:
        row = table.loc[(release, name)]
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        if release == "positive_control":
            assert row["detected"]
            assert row["auroc_low"] > 0.5
        else:
            assert not row["detected"]
            assert row["auroc_low"] < 0.5 < row["auroc_high"]
            assert row["auroc"] == pytest.approx(0.5, abs=0.2)
    assert table.loc[("positive_control", "density_ratio"), "auroc"] > 0.95
    assert table.loc[("positive_control", "density_ratio"), "tpr"] > 0.9
    assert table.loc[("synthetic", "density_ratio"), "tpr"] < 0.4
    assert (table["n_members"] == 20).all()
    assert (table["n_non_members"] == 15).all()


def test_the_more_is_copied_the_more_is_told(cohort):
    x, donors, strangers = cohort
    mine = np.flatnonzero(np.isin(donors, MEMBERS))
    found = []
    for n_copied in (0, 10, 150):
        released = sp.vstack([x[mine[:n_copied]], strangers[: 150 - n_copied]]).tocsr()
        found.append(attack(cohort, released).loc[("synthetic", "density_ratio"), "auroc"])
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.95


def test_noise_on_copies_does_not_hide_them_from_many(cohort):
    x, donors, _ = cohort
    mine = x[np.isin(donors, MEMBERS)].toarray()
    noisy = sp.csr_matrix(np.random.default_rng(1).poisson(0.9 * mine))
    table = attack(cohort, noisy)
    assert table.loc[("synthetic", "density_ratio"), "detected"]
    assert table.loc[("synthetic", "density_ratio"), "auroc"] < 1 + 1e-12


def test_permuted_donors_tell_nothing(cohort):
    x, donors, _ = cohort
    copies = x[np.isin(donors, MEMBERS)][:150]
    rng = np.random.default_rng(2)
    found = []
    for _ in range(5):
        table = membership_inference(
            copies, x, rng.permutation(donors), members=MEMBERS, reference=REFERENCE, n_bootstrap=200
        ).set_index(["release", "attack"])
        found.append(table.loc[("synthetic", "density_ratio"), "auroc"])
    assert np.mean(found) == pytest.approx(0.5, abs=0.15)


def test_the_order_of_cells_and_the_names_of_donors_do_not_matter(cohort):
    x, donors, strangers = cohort
    first = attack(cohort, strangers[:150]).loc["synthetic"]
    order = np.random.default_rng(3).permutation(len(donors))
    again = membership_inference(
        strangers[:150][::-1],
        x[order],
        pd.Categorical(["x" + name for name in donors[order]]),
        members=["x" + name for name in MEMBERS[::-1]],
        reference=["x" + name for name in REFERENCE],
        n_bootstrap=500,
    ).set_index(["release", "attack"])
    pd.testing.assert_frame_equal(first, again.loc["synthetic"])


def test_the_seed_repeats_everything_and_draws_the_reference(cohort):
    x, donors, strangers = cohort
    tables = [
        membership_inference(strangers[:150], x, donors, members=MEMBERS, n_bootstrap=100, seed=seed)
        for seed in (0, 0, 1)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])
    assert (tables[0]["n_non_members"] == 15).all()


def test_scores_are_the_formulas(cohort, monkeypatch):
    """Every distance by brute force, in the coordinates that were used."""
    from cellstill.metrics import _donor_attacks, membership

    seen, scores = [], []
    project = _donor_attacks.Projection.__call__

    def spy(self, counts):
        seen.append(project(self, counts))
        return seen[-1]

    def collect(members, non_members, **options):
        scores.append((members, non_members))
        return attack_success(members, non_members, **options)

    monkeypatch.setattr(_donor_attacks.Projection, "__call__", spy)
    monkeypatch.setattr(membership, "attack_success", collect)
    _, donors, strangers = cohort
    attack(cohort, strangers[:40], n_neighbors=3)
    reference, targets, released = seen[:3]
    of_targets = donors[~np.isin(donors, REFERENCE)]

    def sorted_distances(points):
        return np.sort(np.sqrt(((targets[:, None] - points) ** 2).sum(axis=2)), axis=1)

    to_released, to_reference = sorted_distances(released), sorted_distances(reference)
    leak, ratio = -to_released[:, 0], np.log(to_reference[:, 2] / to_released[:, 2])
    for (members, non_members), values, how in zip(
        scores[:3], (leak, ratio, ratio), ("mean", "mean", "max"), strict=True
    ):
        mean = pd.Series(values).groupby(of_targets).agg(how)
        is_member = mean.index.isin(MEMBERS)
        np.testing.assert_allclose(np.sort(members), np.sort(mean[is_member]), rtol=1e-8)
        np.testing.assert_allclose(np.sort(non_members), np.sort(mean[~is_member]), rtol=1e-8)


def test_success_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 6, 30) + 1.0, rng.integers(0, 6, 25)
    found = attack_success(a, b)
    expected = roc_auc_score(np.repeat([1, 0], [30, 25]), np.r_[a, b])
    assert found["auroc"] == pytest.approx(expected)
    assert found["tpr"] == pytest.approx((a > b.max()).mean())


def test_true_positives_are_counted_above_one_per_cent_of_false_ones():
    non_members = np.arange(300.0)  # three of them may pass
    assert attack_success([295.5, 296.5, 297.5, 1000.0], non_members)["tpr"] == pytest.approx(0.75)
    assert attack_success([97.5, 98.5, 1000.0], non_members[:100])["tpr"] == pytest.approx(2 / 3)
    assert attack_success([97.5, 97.9, 1000.0], non_members[:99])["tpr"] == pytest.approx(1 / 3)  # none may pass


def test_intervals_cover_what_they_should():
    rng = np.random.default_rng(5)
    true = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    covered, false_alarms = [], []
    for trial in range(200):
        found = attack_success(rng.normal(1, 1, 20), rng.normal(size=15), n_bootstrap=300, seed=trial)
        covered.append(found["auroc_low"] <= true <= found["auroc_high"])
        false_alarms.append(
            attack_success(rng.normal(size=20), rng.normal(size=15), n_bootstrap=300, seed=trial)["detected"]
        )
    assert 0.88 < np.mean(covered) < 0.99
    assert np.mean(false_alarms) < 0.08  # 2.5 % if donors were many


def test_a_control_that_nobody_detects_is_said(cohort):
    with pytest.warns(CellstillWarning, match="No attack detects the positive control"):
        table = attack(cohort, cohort[2][:2])
    assert not table.loc["positive_control", "detected"].any()


FIRST, SECOND = MEMBERS[:10], [*MEMBERS[10:], *(f"donor_{i}" for i in range(45, 50))]


def paired(cohort, first, second, halves=(FIRST, SECOND), **options):
    x, donors, _ = cohort
    options = {"members": halves, "reference": REFERENCE, "n_bootstrap": 500} | options
    return paired_membership_inference((first, second), x, donors, **options).set_index(["release", "attack"])


def of(cohort, names):
    x, donors, _ = cohort
    return x[np.isin(donors, names)]


def test_each_donor_is_compared_with_itself(cohort):
    """Copies with noise, of every third cell: told by pairs, and strangers are not."""
    rng = np.random.default_rng(7)
    noisy = [sp.csr_matrix(rng.poisson(0.5 * of(cohort, half)[::3].toarray())) for half in (FIRST, SECOND)]
    table = paired(cohort, *noisy)
    assert table.loc[("synthetic", "density_ratio"), "detected"]
    assert table.loc["positive_control", "detected"].all()
    assert (table.loc["positive_control", "auroc"] > 0.9).all()
    assert (table[["n_members", "n_non_members"]] == 25).all(axis=None)
    strangers = cohort[2]
    assert not paired(cohort, strangers[:80], strangers[80:160]).loc["synthetic", "detected"].any()


def test_releases_of_the_other_half_are_further_away(cohort):
    with pytest.warns(CellstillWarning, match="check the order of synthetic and members"):
        table = paired(cohort, of(cohort, SECOND), of(cohort, FIRST))
    assert (table.loc["synthetic", "auroc"] < 0.1).all()
    assert not table.loc["synthetic", "detected"].any()


def test_the_order_of_the_two_releases_does_not_matter(cohort):
    strangers = cohort[2]
    there = paired(cohort, strangers[:60], strangers[60:160]).loc["synthetic"]
    back = paired(cohort, strangers[60:160], strangers[:60], halves=(SECOND, FIRST)).loc["synthetic"]
    np.testing.assert_allclose(there["auroc"], back["auroc"])
    np.testing.assert_allclose(there["tpr"], back["tpr"])


def test_a_release_that_everybody_is_close_to_tells_nothing(cohort):
    """The means of both halves are taken away: a release of many cells is nearer to all than one of a few."""
    _, donors, strangers = cohort
    rng = np.random.default_rng(8)
    others = [name for name in np.unique(donors) if name not in REFERENCE]
    found, detected = [], []
    for _ in range(25):
        names = rng.permutation(others)
        halves = (names[:17], names[17:])
        with warnings.catch_warnings():  # chance may have it that donors are closer to the other release
            warnings.simplefilter("ignore", CellstillWarning)
            table = paired(cohort, strangers[:150], strangers[150:160], halves=halves, n_bootstrap=200)
        table = table.loc["synthetic"]
        found.append(table["auroc"])
        detected.append(table["detected"])
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)
    assert np.mean(detected) < 0.12


def test_the_paired_score_is_the_formula(cohort, monkeypatch):
    from cellstill.metrics import membership
    from cellstill.metrics._donor_attacks import DonorAttacks

    scores = []

    def collect(first, second, **options):
        scores.append((first, second))
        return paired_success(first, second, **options)

    monkeypatch.setattr(membership, "paired_success", collect)
    strangers = cohort[2]
    table = paired(cohort, strangers[:60], strangers[60:120]).loc["synthetic"]
    x, donors, _ = cohort
    names, codes = np.unique(donors, return_inverse=True)
    attacks = DonorAttacks(x, codes, len(names), np.isin(donors, REFERENCE), 30, 1, 0)
    sides = [attacks.scores(cells) for cells in (strangers[:60], strangers[60:120])]
    for k, attack in enumerate(("gan_leaks", "density_ratio", "closest_cell")):
        own_donors = ~np.isin(names, REFERENCE)
        gap = pd.Series((sides[0][attack][own_donors] - sides[1][attack][own_donors]), names[own_donors])
        for found, half in zip(scores[k], (FIRST, SECOND), strict=True):
            np.testing.assert_allclose(np.sort(found), np.sort(gap[half]), atol=1e-9)
        common = (gap[FIRST].mean() + gap[SECOND].mean()) / 2
        own = np.concatenate([gap[FIRST] - common, common - gap[SECOND]])
        weights = np.repeat([0.5 / len(FIRST), 0.5 / len(SECOND)], [len(FIRST), len(SECOND)])
        assert table.loc[attack, "auroc"] == pytest.approx(weights @ (own[:, None] + own > 0) @ weights)
        highest = own > (-own).max()
        assert table.loc[attack, "tpr"] == pytest.approx(weights @ highest)


@pytest.mark.parametrize("sizes", [(17, 17), (5, 30)], ids=["halves", "unequal"])
def test_paired_intervals_cover_what_they_should(sizes):
    """Also where scores are skewed and the halves differ in size."""
    rng = np.random.default_rng(9)
    aurocs, false_alarms, covered = [], [], []
    for trial in range(150):
        first, second = (np.exp(rng.normal(0, 1, n)) for n in sizes)
        found = paired_success(first, second, n_bootstrap=200, seed=trial)
        aurocs.append(found["auroc"])
        false_alarms.append(found["detected"])
        first, second = rng.normal(0.5, 1, sizes[0]), rng.normal(-0.5, 1, sizes[1])
        found = paired_success(first, second, n_bootstrap=200, seed=trial)
        covered.append(found["auroc_low"] <= 0.7602 <= found["auroc_high"])  # P(N(1, 2) > 0)
    assert np.mean(aurocs) == pytest.approx(0.5, abs=0.02)
    assert np.mean(false_alarms) < (0.08 if sizes[0] > 5 else 0.13)
    assert np.mean(covered) > (0.88 if sizes[0] > 5 else 0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halves": (FIRST, [*SECOND, FIRST[0]])}, r"members\[1\] and members\[0\] share donor_0"),
        ({"halves": (FIRST[:4], SECOND)}, "4 of 50 donors are members of the first release; at least 5"),
        ({"halves": (FIRST, ["who"])}, r"members\[1\] names \['who'\]"),
        (
            {"halves": (FIRST, SECOND, MEMBERS)},
            "members has to be two: .* Found 3 of them",
        ),
        ({"n_neighbors": 60}, "number of synthetic cells, 50"),
    ],
)
def test_what_cannot_be_paired_is_named(cohort, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        paired(cohort, cohort[2][:50], cohort[2][50:100], **options)


def test_copies_are_the_closest_records(cohort):
    x, _, strangers = cohort
    training, held_out = x[:400], x[400:700]
    copied = distance_to_closest_record(training[:50], training, held_out)
    assert copied.copies == 1
    assert copied.median < 1e-6 * copied.control_median
    fresh = distance_to_closest_record(strangers[:200], training, held_out)
    assert fresh.copies == 0
    assert fresh.median == pytest.approx(fresh.control_median, rel=0.05)
    assert fresh.low == pytest.approx(fresh.control_low, rel=0.08)
    assert fresh.low < fresh.median
    half = distance_to_closest_record(sp.vstack([training[:30], strangers[:30]]), training, held_out)
    assert half.copies == 0.5
    assert "not evidence" in fresh.note == CLOSEST_RECORD_NOTE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": ["donor_0", "who"]}, r"members names \['who'\]"),
        ({"members": MEMBERS[:4]}, "4 of 50 donors are members; at least 5 are needed"),
        ({"reference": [f"donor_{i}" for i in range(20, 47)]}, "3 of 50 donors are non-members"),
        ({"reference": "donor_20"}, "1 of 50 donors are references"),
        ({"reference": ["donor_3", *REFERENCE]}, "reference and members share donor_3"),
        ({"members": [f"donor_{i}" for i in range(45)], "reference": None}, "3 of 50 donors are non-members"),
        ({"n_neighbors": 60}, "number of synthetic cells, 50"),
        ({"n_neighbors": 0}, "n_neighbors=0"),
        ({"n_comps": 0}, "n_comps=0"),
        ({"n_bootstrap": 0}, "n_bootstrap=0"),
    ],
)
def test_what_cannot_be_attacked_is_named(cohort, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        attack(cohort, cohort[2][:50], **options)


def test_donors_have_to_be_known(cohort):
    x, donors, strangers = cohort
    with pytest.raises(InvalidArgumentError, match="donors is missing"):
        membership_inference(strangers, x, np.where(donors == "donor_1", None, donors), members=MEMBERS)
    with pytest.raises(InvalidArgumentError, match="must have the same genes"):
        membership_inference(strangers[:, :9], x, donors, members=MEMBERS)


def test_held_out_cells_that_are_cells_of_training_are_warned_of(cohort):
    x = cohort[0]
    for held_out, n in ((x[:300], 300), (x[390:600], 10)):
        with pytest.warns(CellstillWarning, match=rf"{n} of {held_out.shape[0]} held_out cells are cells of training"):
            distance_to_closest_record(x[:50], x[:400], held_out)


def test_real_cells_have_to_be_counts_and_synthetic_ones_may_be_expected(cohort):
    x, donors, strangers = cohort
    expected, normalised = strangers[:50] * 0.9, x.log1p()
    for call in (
        lambda real: membership_inference(expected, real, donors, members=MEMBERS),
        lambda real: paired_membership_inference((expected, expected), real, donors, members=(FIRST, SECOND)),
    ):
        with pytest.raises(InvalidArgumentError, match="real has values that are not integers .*raw counts"):
            call(normalised)
    for training, held_out, name in ((normalised, x, "training"), (x, normalised, "held_out")):
        with pytest.raises(InvalidArgumentError, match=f"{name} has values that are not integers"):
            distance_to_closest_record(expected, training, held_out)
    assert distance_to_closest_record(expected, x[:400], x[400:700]).copies == 0


def test_an_anndata_in_place_of_counts_is_named(cohort):
    import anndata

    x, _, strangers = cohort
    with pytest.raises(InvalidArgumentError, match=r"synthetic is an AnnData: pass its counts, such as synthetic.X"):
        distance_to_closest_record(anndata.AnnData(strangers), x, x)
