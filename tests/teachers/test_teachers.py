from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cellstill.data.covariates import CovariateDesign
from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError
from cellstill.teachers import (
    TEACHERS,
    CombatTeacher,
    HarmonyTeacher,
    IdentityTeacher,
    LatentTeacher,
    TeacherInfo,
    TeacherInput,
    get_teacher,
)
from cellstill.teachers.harmony import subtract_batch


@pytest.fixture(scope="module")
def cells():
    """Three types, two batches shifted apart, a condition that is partly confounded with the batch."""
    rng = np.random.default_rng(0)
    n = 1200
    kind, batch = rng.integers(0, 3, n), rng.integers(0, 2, n)
    treated = rng.random(n) < np.where(batch == 0, 0.2, 0.8)
    centres = rng.normal(0, 6, (3, 10))
    shift, effect = np.zeros(10), np.zeros(10)
    shift[:4], effect[4:6] = 3.0, 2.5
    pca = centres[kind] + np.outer(batch, shift) + np.outer(treated, effect) + rng.normal(0, 1, (n, 10))
    condition = np.where(treated, "treat", "ctrl")
    obs = pd.DataFrame({"condition": condition, "age": rng.normal(50, 10, n), "kind": kind.astype(str)})
    return {"pca": pca.astype(np.float32), "batch": batch, "kind": kind, "obs": obs, "treated": treated}


def inputs(cells, keys=()) -> TeacherInput:
    return TeacherInput(
        pca=cells["pca"], batch=cells["batch"], obs=cells["obs"], design=CovariateDesign.fit(cells["obs"], keys)
    )


def differences(embedding, cells) -> tuple[float, float]:
    """Distance between batches at equal type and condition, and between conditions at equal type and batch."""
    kind, batch, treated = cells["kind"], cells["batch"], cells["treated"]

    def mean(*masks):
        return embedding[np.logical_and.reduce(masks)].mean(axis=0)

    between_batches = [
        np.linalg.norm(mean(kind == k, treated == t, batch == 0) - mean(kind == k, treated == t, batch == 1))
        for k in range(3)
        for t in (0, 1)
    ]
    between_conditions = [
        np.linalg.norm(mean(kind == k, treated == 0, batch == b) - mean(kind == k, treated == 1, batch == b))
        for k in range(3)
        for b in (0, 1)
    ]
    return float(np.mean(between_batches)), float(np.mean(between_conditions))


def test_the_simulated_cells_have_the_batch_and_condition_effects(cells):
    batch, condition = differences(cells["pca"], cells)
    assert batch == pytest.approx(6.0, rel=0.05)
    assert condition == pytest.approx(np.hypot(2.5, 2.5), rel=0.1)


def test_identity_changes_nothing(cells):
    np.testing.assert_array_equal(IdentityTeacher().teach(inputs(cells)).embedding, cells["pca"])


def test_harmony_is_harmonypys_own_result_whatever_the_orientation(cells):
    import harmonypy

    ours = HarmonyTeacher(max_iter=30).teach(inputs(cells)).embedding
    theirs = harmonypy.run_harmony(
        cells["pca"].astype(float),
        pd.DataFrame({"b": cells["batch"]}),
        "b",
        theta=2.0,
        max_iter_harmony=30,
        epsilon_harmony=1e-4,
        verbose=False,
    )
    np.testing.assert_allclose(ours, theirs.Z_corr, atol=1e-4)


def test_the_regression_without_covariates_is_harmonys_own_correction(cells):
    import harmonypy

    result = harmonypy.run_harmony(
        cells["pca"].astype(float), pd.DataFrame({"b": cells["batch"]}), "b", max_iter_harmony=5, verbose=False
    )
    ours = subtract_batch(cells["pca"], result.R, np.eye(2)[cells["batch"]], np.empty((1200, 0)))
    np.testing.assert_allclose(ours, result.Z_corr, atol=1e-3)


def test_protected_harmony_keeps_what_plain_harmony_removes(cells):
    truth = differences(cells["pca"], cells)[1]
    plain = HarmonyTeacher(max_iter=30).teach(inputs(cells)).embedding
    protected = HarmonyTeacher(max_iter=30).teach(inputs(cells, ["condition"])).embedding

    def gap(embedding) -> float:
        """Difference of the condition's means at equal type, cells of both batches pooled as an analyst would."""
        kinds = [cells["kind"] == k for k in range(3)]
        return float(
            np.mean(
                [
                    np.linalg.norm(
                        embedding[k & cells["treated"]].mean(axis=0) - embedding[k & ~cells["treated"]].mean(axis=0)
                    )
                    for k in kinds
                ]
            )
        )

    assert gap(protected) == pytest.approx(truth, rel=0.15)
    assert gap(plain) < 0.85 * truth
    # Harmony's own ridge penalty, 0.2 of a level's expected cells, leaves about a sixth of any shift.
    before, after = differences(cells["pca"], cells)[0], differences(protected, cells)[0]
    assert after < 0.25 * before
    assert after < differences(plain, cells)[0]


def test_protected_harmony_beats_plain_harmony_on_real_confounded_donors(real_data):
    import anndata as ad

    from cellstill.data import fit_pca
    from cellstill.metrics import ilisi, knn_accuracy

    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"))
    donor, condition = adata.obs["donor"].astype(str), adata.obs["condition"].astype(str)
    gone = (donor.isin(["1015", "101", "107"]) & (condition == "stim")) | (
        donor.isin(["1488", "1244", "1039"]) & (condition == "ctrl")
    )
    adata = adata[~(gone | (donor == "unassigned")).to_numpy()].copy()
    obs = adata.obs.assign(condition=adata.obs["condition"].astype(str))
    pca = fit_pca(adata.X).transform(adata.X)
    batch = pd.Categorical(obs["donor"].astype(str)).codes.astype(int)
    embeddings = {"raw": pca}
    for name, keys in (("plain", []), ("protected", ["condition"])):
        given = TeacherInput(pca=pca, batch=batch, obs=obs, design=CovariateDesign.fit(obs, keys))
        embeddings[name] = HarmonyTeacher(max_iter=100, tol=1e-3).teach(given).embedding
    kept = {name: knn_accuracy(embedding, obs["condition"]) for name, embedding in embeddings.items()}
    assert kept["protected"] > kept["raw"] - 0.03
    assert kept["plain"] < kept["raw"] - 0.1
    for level in ("ctrl", "stim"):
        cells = (obs["condition"] == level).to_numpy()
        mixed = {name: ilisi(embedding[cells], batch[cells]) for name, embedding in embeddings.items()}
        assert mixed["protected"] > mixed["raw"] + 0.1


def test_the_record_says_what_stopped_harmony_and_the_cap_warns(cells):
    record = HarmonyTeacher(max_iter=100, tol=1e-3).teach(inputs(cells)).record
    assert record["stopped_by"] == "tol"
    assert record["n_iter"] < 100
    assert record["last_relative_change"] < 1e-3
    with pytest.warns(CellstillWarning, match=r"stopped at max_iter=1 before it reached tol=1e-12.*Raise max_iter"):
        record = HarmonyTeacher(max_iter=1, tol=1e-12).teach(inputs(cells)).record
    assert record == {**record, "stopped_by": "max_iter", "n_iter": 1, "converged": False}


def test_combat_adjusts_location_and_scale_and_keeps_covariates(cells):
    plain = CombatTeacher().teach(inputs(cells)).embedding
    protected = CombatTeacher().teach(inputs(cells, ["condition", "age", "kind"])).embedding
    truth = differences(cells["pca"], cells)
    assert differences(protected, cells)[0] < 0.1 * truth[0]
    assert differences(protected, cells)[1] == pytest.approx(truth[1], rel=0.1)
    # Without protection the condition goes with the batch it is confounded with.
    plain_gap, protected_gap = (
        (e[cells["batch"] == 1].mean(axis=0) - e[cells["batch"] == 0].mean(axis=0))[4:6].mean()
        for e in (plain, protected)
    )
    assert protected_gap == pytest.approx(0.6 * 2.5, rel=0.2)
    assert abs(plain_gap) < 0.1 * protected_gap


def test_combat_explains_confounding_and_single_cells(cells):
    obs = pd.DataFrame({"condition": np.where(cells["batch"] == 0, "ctrl", "treat")})
    given = dataclasses.replace(inputs(cells), obs=obs, design=CovariateDesign.fit(obs, ["condition"]))
    with pytest.raises(InvalidArgumentError, match=r"teacher='combat'.*\['condition'\] are confounded"):
        CombatTeacher().teach(given)
    batch = np.where(np.arange(1200) == 7, 2, cells["batch"])
    with pytest.raises(InvalidArgumentError, match="1 batches have a single cell"):
        CombatTeacher().teach(dataclasses.replace(inputs(cells), batch=batch))


def test_latent_teacher_hands_over_the_embedding_and_refuses_what_it_cannot_do(cells):
    embedding = np.random.default_rng(0).normal(size=(1200, 7))
    given = dataclasses.replace(inputs(cells), obsm={"X_scVI": embedding})
    np.testing.assert_allclose(LatentTeacher("X_scVI").teach(given).embedding, embedding, rtol=1e-6)
    with pytest.raises(MissingKeyError, match=r"obsm_key='X_vi' is not in adata\.obsm.*'X_scVI'"):
        LatentTeacher("X_vi").teach(given)
    embedding[3, 2] = np.nan
    with pytest.raises(InvalidArgumentError, match="1 values that are not finite"):
        LatentTeacher("X_scVI").teach(given)
    protected = dataclasses.replace(given, design=CovariateDesign.fit(cells["obs"], ["condition"]))
    with pytest.raises(InvalidArgumentError, match=r"\['condition'\].*'latent' cannot protect.*'harmony'"):
        LatentTeacher("X_scVI").teach(protected)


def test_a_teacher_that_loses_cells_or_goes_astray_is_stopped(cells):
    from cellstill.teachers.base import Teacher, TeacherOutput

    @dataclasses.dataclass(frozen=True)
    class Broken(Teacher):
        transpose: bool = False
        info = TeacherInfo(name="broken", reference="", backend="", in_pca_space=True, protection="")

        def _teach(self, inputs):
            return TeacherOutput(inputs.pca.T if self.transpose else inputs.pca * np.nan, {})

    try:
        with pytest.raises(InvalidArgumentError, match=r"shape \(10, 1200\) for 1200 cells"):
            Broken(transpose=True).teach(inputs(cells))
        with pytest.raises(InvalidArgumentError, match="not finite"):
            Broken().teach(inputs(cells))
    finally:
        del TEACHERS["broken"]


def test_registry():
    assert set(TEACHERS) == {"harmony", "combat", "latent", "identity"}
    assert get_teacher("harmony", theta=1.0) == HarmonyTeacher(theta=1.0)
    with pytest.raises(InvalidArgumentError, match=r"teacher='mnn' is not known.*'harmony'"):
        get_teacher("mnn")
    with pytest.raises(InvalidArgumentError, match=r"'lambda' is not known.*'theta'"):
        get_teacher("harmony", **{"lambda": 1})
    for teacher in (HarmonyTeacher(tol=1e-3), CombatTeacher(), LatentTeacher("X_vi"), IdentityTeacher()):
        config = teacher.to_dict()
        assert get_teacher(config["name"], **config["settings"]) == teacher


def test_the_orientation_of_old_harmonypy_is_refused(cells, monkeypatch):
    old = SimpleNamespace(Z_corr=cells["pca"].T, R=None, objective_harmony=[])
    monkeypatch.setattr("harmonypy.run_harmony", lambda *args, **kwargs: old)
    with pytest.raises(InvalidArgumentError, match=r"\(10, 1200\) for 1200 cells x 10 components.*harmonypy >= 2\.1"):
        HarmonyTeacher().teach(inputs(cells))
