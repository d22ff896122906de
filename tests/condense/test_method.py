from __future__ import annotations

import gc

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellstill.condense import shared
from cellstill.condense.baselines import BASELINES
from cellstill.condense.baselines import latent as latent_module
from cellstill.condense.baselines.latent import feat_distill, kmeans_latent, kmeans_latent_medoids, text_distill
from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.counts import Rendering
from cellstill.condense.evaluate import evaluate
from cellstill.condense.evaluators import EVALUATORS
from cellstill.condense.generator import GeneratorConfig, generate_in_steps
from cellstill.condense.latent import LatentConfig
from cellstill.condense.matching import MatchingConfig
from cellstill.condense.method import TRAINED_WITH, Variant, scdd, scdd_features
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.shared import share_space, shared_space, use_space
from cellstill.condense.space import fit_space
from cellstill.condense.stored import restore_space, space_config, space_tensors
from cellstill.errors import InvalidArgumentError

LATENT = ("kmeans_latent", "kmeans_latent_medoids", "generator", "text_distill")
SMALL = {
    "latent": LatentConfig(n_latent=8, n_hidden=32, max_epochs=40, batch_size=16),
    "generator": GeneratorConfig(n_hidden=32, n_steps=150, n_tuning_steps=40),
}


def make_problem(seed: int = 0) -> CondensationProblem:
    """Three classes with fifteen marker genes each, the smallest of eight cells."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(3), [70, 60, 8])
    rate = np.full((len(kind), 60), 0.4)
    for k in range(3):
        rate[np.ix_(kind == k, np.arange(15 * k, 15 * k + 15))] = 2.5
    obs = pd.DataFrame({"cell_type": np.array(["a", "b", "c"])[kind]}, index=[f"c{i}" for i in range(len(kind))])
    return CondensationProblem.from_anndata(AnnData(rng.poisson(rate).astype(np.float32), obs=obs), "cell_type")


@pytest.fixture(scope="module")
def trained():
    """A problem, and its small space in place of the one of default settings."""
    problem = make_problem()
    space = fit_space(problem, **SMALL, seed=0)
    use_space(problem, space)
    share_space(problem, 0, space)
    return problem, space


@pytest.mark.parametrize("samples_per_class", [1, 3, 1000], ids=["one", "some", "more_than_there_are"])
@pytest.mark.parametrize("name", LATENT)
def test_latent_baselines_keep_the_budget(trained, name, samples_per_class):
    problem, _ = trained
    state = torch.get_rng_state()
    cells = BASELINES[name].condense(problem, samples_per_class, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.bincount(cells.codes, minlength=3), problem.budget(samples_per_class))
    assert np.isfinite(cells.counts.data).all()
    assert (cells.counts.data > 0).all()
    assert (cells.counts.sum(axis=1) > 0).all()
    again = BASELINES[name].condense(problem, samples_per_class, 0)
    assert (cells.counts != again.counts).nnz == 0
    if name == "generator":
        assert (cells.counts.data == np.round(cells.counts.data)).all()


@pytest.mark.parametrize("name", LATENT)
def test_latent_baselines_make_cells_of_their_class(trained, name):
    """Each class's markers are what its cells have most of."""
    problem, _ = trained
    cells = BASELINES[name].condense(problem, 5, 0)
    marker = np.array([int(gene) // 15 for gene in problem.genes])
    for code in range(3):
        mean = np.asarray(cells.counts[cells.codes == code].mean(axis=0)).ravel()
        of_block = [mean[marker == k].mean() for k in range(4)]
        assert np.argmax(of_block) == code


def test_one_centroid_of_a_class_is_its_decoded_mean(trained):
    problem, space = trained
    z = space.encode(problem.train)
    mean = torch.stack([z[torch.from_numpy(problem.train.of_class(code))].mean(dim=0) for code in range(3)])
    with torch.inference_mode():
        share = torch.expm1(space.autoencoder.expect(mean)).numpy()
    made = kmeans_latent(problem, 1, 0).counts.toarray()
    np.testing.assert_allclose(
        made / made.sum(axis=1, keepdims=True), share / share.sum(axis=1, keepdims=True), rtol=1e-4
    )


def test_one_medoid_of_a_class_is_the_real_cell_closest_to_its_mean(trained):
    problem, space = trained
    z = space.encode(problem.train).numpy()
    cells = kmeans_latent_medoids(problem, 1, 0)
    for code in range(3):
        own = problem.train.of_class(code)
        wanted = own[((z[own] - z[own].mean(axis=0)) ** 2).sum(axis=1).argmin()]
        assert (cells.counts[cells.codes == code] != problem.train.counts[wanted]).nnz == 0
    several = kmeans_latent_medoids(problem, 5, 0).counts.toarray()
    assert len(np.unique(several, axis=0)) == 15
    real = {row.tobytes() for row in problem.train.counts.toarray()}
    assert all(row.tobytes() in real for row in several)


@pytest.mark.parametrize("samples_per_class", [1, 3, 1000], ids=["one", "some", "more_than_there_are"])
def test_features_keep_the_budget_and_are_what_text_distill_decodes(trained, samples_per_class, monkeypatch):
    monkeypatch.setattr(latent_module, "N_STEPS", 8)
    problem, space = trained
    state = torch.get_rng_state()
    found = feat_distill(problem, samples_per_class, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.bincount(found.codes, minlength=3), problem.budget(samples_per_class))
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, feat_distill(problem, samples_per_class, 0).values)
    decoded = text_distill(problem, samples_per_class, 0)
    assert np.array_equal(decoded.codes, found.codes)
    wanted = space.render(Rendering("expected"), torch.from_numpy(found.values), found.codes)
    assert (decoded.counts != wanted.counts).nnz == 0


def test_other_features_with_another_seed(trained, monkeypatch):
    monkeypatch.setattr(latent_module, "N_STEPS", 8)
    problem, _ = trained
    assert not np.array_equal(feat_distill(problem, 2, 0).values, feat_distill(problem, 2, 1).values)


def test_classifiers_of_features_see_the_test_cells_through_their_encoder(trained):
    """Scores are those of fitting on z by hand, and of predicting z of the test cells."""
    problem, space = trained
    names = ("logistic", "mlp_small", "knn")
    how = {"samples_per_class": (2,), "seeds": (0,), "evaluators": names}
    found = evaluate(problem, ["feat_distill"], **how)
    features, z = feat_distill(problem, 2, 0), space.encode(problem.test).numpy()
    np.testing.assert_array_equal(features.encode(problem.test), z)
    for name in names:
        predicted = EVALUATORS[name].fit(features, 3, 0).predict(z)
        assert np.array_equal(found.condensed[0].predictions[name, "cell_type"], predicted)
    scores = found.scores
    assert (scores["n_cells"] == 6).all()
    assert (scores["bytes"] == 6 * 8 * 4).all()
    assert scores["macro_f1"].min() > 0.8
    assert scores["retention"].mean() > 0.9

    def blind(*given):
        return Features(features.values, features.codes, lambda cells: np.zeros((len(cells), 8)))

    # An encoder that tells nothing of the test cells leaves one class to guess for all.
    assert evaluate(problem, {"blind": blind}, **how, full=found.full).scores["macro_f1"].max() < 0.4


def test_features_come_closer_to_the_moments_of_their_class(trained, monkeypatch):
    """Mean z of matched cells is nearer to that of the class than the mean of the real cells they start from."""
    problem, space = trained
    true = space.encode(problem.train)
    true = torch.stack([true[torch.from_numpy(problem.train.of_class(code))].mean(dim=0) for code in (0, 1)])
    off = []
    for n_steps in (0, 200):
        monkeypatch.setattr(latent_module, "N_STEPS", n_steps)
        found = feat_distill(problem, 3, 0)
        means = torch.stack([torch.from_numpy(found.values[found.codes == code].mean(axis=0)) for code in (0, 1)])
        off.append(float((means - true).norm()))
    assert off[1] < 0.5 * off[0]


def test_variants_share_a_space_which_goes_with_its_problem(monkeypatch):
    calls = []

    def counted(problem, latent, generator, *, seed):
        calls.append(seed)
        return fit_space(problem, latent, generator, seed=seed)

    monkeypatch.setattr(shared, "fit_space", counted)
    problem = make_problem(1)
    few = MatchingConfig(n_steps=4)
    first = Variant(**SMALL, matching=few, counts="rounded", start="centroids").condense(problem, 1)
    Variant(**SMALL, counts="expected", start="random").unmatched()(problem, 2)
    assert calls == [0]
    assert {*first.choice["start"]} == {"centroids"}
    assert {*first.choice["steps"]} == {0, 1, 4}
    Variant(**SMALL, counts="expected", start="random").unmatched()(problem, 1, seed=3)
    assert calls == [0, 3]
    n_kept = len(shared._spaces)
    del problem
    gc.collect()
    assert len(shared._spaces) == n_kept - 1


def test_unmatched_codes_stay_where_they_start(trained):
    problem, _ = trained
    found = Variant(start="random", counts="expected").unmatched().condense(problem, 2, 0)
    noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(found.codes, noise)
    assert {*found.choice["steps"]} == {0}


def test_a_variant_generates_in_the_steps_of_the_teacher(trained):
    """Three deterministic steps from the codes, in place of the one: another z, and the cells that it decodes to."""
    problem, space = trained
    found = Variant(start="random", counts="expected", teacher_steps=3).unmatched().condense(problem, 2, 0)
    noise, label = torch.from_numpy(found.codes), torch.from_numpy(found.cells.codes)
    z = generate_in_steps(space.teacher, noise, label, 3)
    wanted = space.render(found.rendering, z, found.cells.codes)
    np.testing.assert_allclose(found.cells.counts.toarray(), wanted.counts.toarray(), rtol=1e-4, atol=1e-5)
    one = Variant(start="random", counts="expected").unmatched()(problem, 2, 0)
    assert abs(one.counts - found.cells.counts).max() > 0.1


def test_gradients_reach_the_codes_through_the_steps_of_the_teacher(trained):
    problem, _ = trained
    few = MatchingConfig(n_steps=12)
    found = Variant(start="random", counts="expected", teacher_steps=2, matching=few).condense(problem, 2, 0)
    assert {*found.choice["steps"]} == {0, 3, 12}
    losses = found.history["random"]["outcome"]
    assert losses.iloc[-4:].mean() < losses.iloc[:4].mean()


def test_samples_have_the_spread_that_is_stored_with_the_space(trained):
    """Of a space stored before there was one, and of several steps, samples are what is generated."""
    _, space = trained
    noise, label = torch.randn(30, 8, generator=torch.Generator().manual_seed(3)), torch.arange(30) % 3
    tensors = space_tensors(space)
    same = restore_space(tensors, space_config(space))
    assert torch.equal(same.sample(noise, label), space.sample(noise, label))
    with torch.inference_mode():
        generated = space.generator(noise, label)
        stepped = space.in_steps(2).generator(noise, label)
    assert not torch.allclose(space.sample(noise, label), generated, atol=1e-2)
    old = restore_space({k: v for k, v in tensors.items() if not k.startswith("spread.")}, space_config(space))
    assert torch.equal(old.sample(noise, label), generated)
    assert torch.equal(space.in_steps(2).sample(noise, label), stepped)


@pytest.mark.parametrize("n_steps", [0, -1, 1.5], ids=["none", "negative", "fraction"])
def test_a_number_of_steps_that_is_none_is_refused(trained, n_steps):
    with pytest.raises(InvalidArgumentError, match="n_steps"):
        Variant(teacher_steps=n_steps).condense(trained[0], 1, 0)


def test_ours_is_evaluated_beside_baselines(trained):
    problem, _ = trained
    quick = Variant(matching=MatchingConfig(n_steps=8), start="centroids", counts="rounded")
    found = evaluate(
        problem,
        {"scdd": quick, "random": "random"},
        samples_per_class=(1,),
        seeds=(0,),
        evaluators=("logistic", "knn", "mlp_large"),
        trained_with={"scdd": TRAINED_WITH},
    )
    table = found.summary().set_index("method")
    assert 0.3 < table.loc["scdd", "retention"] <= 1.5
    assert np.isfinite(table.loc["scdd", "cross_architecture_gap"])
    assert isinstance(quick(problem, 1, 0), LabelledCells)


def test_scdd_is_the_variant_of_defaults(trained, monkeypatch):
    problem, _ = trained
    asked = []

    def noted(self, problem, samples_per_class, seed=0):
        asked.append((self, samples_per_class, seed))
        return problem.train

    monkeypatch.setattr(Variant, "__call__", noted)
    scdd(problem, 7, 2)
    assert asked == [(Variant(), 7, 2)]


def test_features_of_scdd_are_the_points_chosen_beside_its_cells(trained, monkeypatch):
    problem, _ = trained
    given, made = [], Variant(start="random", counts="expected").unmatched().condense(problem, 2, 0)
    monkeypatch.setattr(Variant, "condense", lambda *asked: given.append(asked) or made)
    scores = evaluate(problem, {"points": scdd_features}, samples_per_class=(2,), seeds=(0,), evaluators=["knn"]).scores
    assert given == [(Variant(), problem, 2, 0)]
    assert scores["macro_f1"].item() > 0.8
    assert scores["bytes"].item() == made.points.values.nbytes


def test_a_shared_space_is_found_by_its_settings(trained):
    problem, space = trained
    assert shared_space(problem, 0, SMALL["latent"], SMALL["generator"]) is space


def test_a_space_to_use_is_that_of_all_seeds_but_not_of_other_settings(trained, monkeypatch):
    problem, space = trained
    monkeypatch.setattr(shared, "fit_space", lambda *settings, seed: (*settings[1:], seed))
    assert [shared_space(problem, seed) for seed in (0, 5)] == [space, space]
    other = LatentConfig(n_latent=3)
    assert shared_space(problem, 5, other) == (other, GeneratorConfig(), 5)
    assert shared_space(make_problem(), 5) == (LatentConfig(), GeneratorConfig(), 5)
