"""New batches for a trained model: they are learned, and nothing that was known moves."""

from __future__ import annotations

import math
import warnings

import mudata
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning, GeneMismatchError, InvalidArgumentError, NotTrainedError
from cellstill.metrics import ilisi, ilisi_ceiling
from cellstill.vi import rates

pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    # Few cells of few types do not tell soup, and there is none.
    pytest.mark.filterwarnings("ignore:The share of ambient RNA:cellstill.errors.CellstillWarning"),
]

FAST = {"accelerator": "cpu", "progress": False, "early_stopping": False}


@pytest.fixture(scope="module")
def parts():
    """Two batches to learn from, and a third held out, with effects of 0.4 on the log of every gene."""
    cells = simulate_counts(
        n_obs=900,
        n_vars=200,
        n_batches=3,
        n_cell_types=4,
        library_size_median=2000,
        batch_sd=0.4,
        de_fraction=0.0,
        marker_fraction=0.1,
        seed=3,
    )
    cells.obs["site"] = np.where(cells.obs["batch"] == "batch_0", "x", "y")
    new = (cells.obs["batch"] == "batch_2").to_numpy()
    return cells[~new].copy(), cells[new].copy()


@pytest.fixture(scope="module")
def reference(parts):
    adata = parts[0].copy()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch", nn_conditioning_covariate_keys=["batch"])
    return small_reference(adata)


def small_reference(adata, seed=0):
    model = AmbientRegularizedSCVI(adata, n_hidden=64, n_latent=16, seed=seed)
    return model.train(max_epochs=50, batch_size=64, lr=8e-3, **FAST)


@pytest.fixture(scope="module")
def many_keys(parts):
    """A model, hardly trained, whose covariates have purposes of their own."""
    adata = parts[0].copy()
    AmbientRegularizedSCVI.setup_anndata(
        adata,
        ambient_covariate_keys=["batch", "site"],
        nn_conditioning_covariate_keys=["batch"],
        feature_scaling_covariate_keys=["site", "batch"],
        library_size_key="batch",
        dispersion_key="batch",
    )
    return AmbientRegularizedSCVI(adata, n_hidden=8, n_latent=2, background="free").train(max_epochs=2, **FAST)


@pytest.fixture(scope="module")
def mapped(reference, parts):
    model = AmbientRegularizedSCVI.load_query_data(parts[1].copy(), reference)
    with pytest.raises(NotTrainedError):
        model.get_latent_representation()
    return model.train(max_epochs=30, batch_size=64, lr=5e-3, weight_decay=0.1, **FAST)


def test_new_cells_find_their_kind_and_mix(reference, mapped, parts):
    """On average over three models: one so small mixes by its seed, 0.85 to 0.98 of the ceiling in six of them."""
    known, new = (one.obs["cell_type"].astype(str) for one in parts)
    pairs = [(reference.get_latent_representation(), mapped.get_latent_representation())]
    for seed in (1, 2):
        other = small_reference(reference.adata, seed)
        pairs.append((other.get_latent_representation(), other.get_latent_representation(parts[1])))
    accuracy, mixing = [], []
    for z, query in pairs:
        accuracy.append(KNeighborsClassifier(15).fit(z, known).score(query, new))
        together, origin = np.vstack([z, query]), np.repeat(["reference", "query"], [len(z), len(query)])
        mixing.append(ilisi(together, origin) / ilisi_ceiling(together, origin))
    assert np.mean(accuracy) > 0.99
    assert np.mean(mixing) > 0.85


def test_known_cells_stay_where_they_were(reference, mapped, parts):
    known = parts[0]
    np.testing.assert_array_equal(mapped.get_latent_representation(known), reference.get_latent_representation(known))
    np.testing.assert_array_equal(mapped.get_normalized_expression(known), reference.get_normalized_expression(known))
    # The sums over groups of the likelihood may be taken in another order.
    np.testing.assert_allclose(
        mapped.get_elbo(known, return_mean=False), reference.get_elbo(known, return_mean=False), rtol=1e-6
    )
    own, others = reference.module.state_dict(), mapped.module.state_dict()
    for name, tensor in own.items():
        torch.testing.assert_close(others[name][: len(tensor)] if tensor.ndim else others[name], tensor, rtol=0, atol=0)


def test_new_rows_are_learned(reference, mapped, parts):
    # The soup is not learned, but found in the counts.
    assert {name.split(".")[2]: n for name, n in mapped._known_rows.items()} == {"decoder": 2, "dispersion": 2}
    start = AmbientRegularizedSCVI.load_query_data(parts[1].copy(), reference)
    before, after = start.module.state_dict(), mapped.module.state_dict()
    for name, n in mapped._known_rows.items():
        assert (before[name][n:] != after[name][n:]).float().mean() > 0.9, name
    start.is_trained_ = True
    error = start.get_reconstruction_error()["reconstruction_loss"]
    # Soup is there from the start, at the rate that the reference identified.
    assert mapped.get_reconstruction_error()["reconstruction_loss"] < 0.95 * error
    assert list(mapped.get_ambient_profile().index) == ["batch_0", "batch_1", "batch_2"]
    as_new = mapped.get_normalized_expression(parts[0], transform_batch="batch_2", return_numpy=True)
    assert not np.allclose(as_new, mapped.get_normalized_expression(parts[0], return_numpy=True), rtol=1e-2)


def test_new_rows_start_from_the_new_cells_in_the_unit_of_the_reference(many_keys, parts):
    # Deeper cells have larger library sizes and the same expression.
    query = parts[1].copy()
    query.X = query.X * 4
    model = AmbientRegularizedSCVI.load_query_data(query, many_keys)
    start, known = model.module.modality("rna"), many_keys.module.modality("rna")
    # The query's site is a known one, its batch is not.
    assert [len(table) for table in start.background.beta.tables] == [3, 2]
    assert [len(table) for table in start.scaling.gamma.tables] == [2, 3]
    assert model.registry["field_registries"]["covariate_batch"]["summary_stats"]["n_covariate_batch"] == 3
    totals = np.asarray(query.X.sum(axis=1)).ravel()
    center = float(known.library.center)
    assert float(start.library.center) == center
    np.testing.assert_allclose(start.library.group_mean[2], np.log(totals).mean() - center, rtol=1e-4)
    np.testing.assert_allclose(start.library.group_variance[2], np.log(totals).var(), rtol=1e-3)
    size = totals / math.exp(center)
    mean = np.asarray(query.X.sum(axis=0)).ravel() / size.sum()
    shown = mean > 1e-2
    found = start.background.beta.tables[0][2].detach().exp().numpy()
    # A fifth of the mean expression, half of it from each of the two columns.
    np.testing.assert_allclose(found[shown], 0.1 * mean[shown], rtol=1e-3)
    for own, before in (
        (start.dispersion.mean, known.dispersion.mean),
        (start.decoder.shifts[0], known.decoder.shifts[0]),
        (start.scaling.gamma.tables[1], known.scaling.gamma.tables[1]),
    ):
        torch.testing.assert_close(own[2].detach(), before.detach().mean(dim=0))


def test_soup_of_new_cells_is_found_or_stated_in_the_unit_of_the_reference(reference, parts):
    query = parts[1].copy()
    query.X = query.X * 4
    start = AmbientRegularizedSCVI.load_query_data(query, reference, ambient_rate=0.07).module.modality("rna")
    known, new = reference.module.modality("rna").background, start.background
    np.testing.assert_allclose(new.rate[2], 0.07)
    torch.testing.assert_close(new.rate[:2], known.rate, rtol=0, atol=0)
    torch.testing.assert_close(new.expected[:2], known.expected, rtol=0, atol=0)
    totals = np.asarray(query.X.sum(axis=1)).ravel()
    mean = np.asarray(query.X.sum(axis=0)).ravel() / (totals.sum() / math.exp(float(start.library.center)))
    shown = mean > 1e-2
    np.testing.assert_allclose(new.expected[2].exp()[shown], 0.07 * mean[shown], rtol=1e-3)


def test_known_batches_keep_their_soup_and_are_not_looked_at(reference, parts, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(rates, "estimate_soup", never)
    model = AmbientRegularizedSCVI.load_query_data(parts[0].copy(), reference)
    assert model.get_ambient_rate().equals(reference.get_ambient_rate())
    with pytest.raises(InvalidArgumentError, match=r"whose soup the reference knows.*leave it out"):
        AmbientRegularizedSCVI.load_query_data(parts[0].copy(), reference, ambient_rate=0.4)
    with pytest.raises(InvalidArgumentError, match=r"\['batch_0'\], whose soup .*\['batch_2'\]"):
        AmbientRegularizedSCVI.load_query_data(parts[1].copy(), reference, ambient_rate={"batch_0": 0.4})
    start = AmbientRegularizedSCVI.load_query_data(parts[1].copy(), reference, ambient_rate={"batch_2": 0.4})
    start.is_trained_ = True
    row = start.get_ambient_rate().loc["batch_2"]
    assert row["identified"]
    assert row["rate"] == pytest.approx(0.4)


def test_new_combinations_of_ambient_columns_follow_the_known_ones(parts):
    known, query = (one.copy() for one in parts)
    half = np.arange(query.n_obs) < 100
    query.obs["batch"] = np.where(half, "batch_0", "batch_2")
    keys = {"ambient_covariate_keys": ["batch", "site"], "nn_conditioning_covariate_keys": ["batch", "site"]}
    AmbientRegularizedSCVI.setup_anndata(known, **keys)
    stated = {("batch_0", "x"): 0.1, ("batch_1", "y"): 0.2}
    model = AmbientRegularizedSCVI(known, n_hidden=8, n_latent=2, ambient_rate=stated).train(max_epochs=1, **FAST)
    new = AmbientRegularizedSCVI.load_query_data(
        query, model, ambient_rate={("batch_0", "y"): 0.3, ("batch_2", "y"): 0}
    )
    new.is_trained_ = True
    found = new.get_ambient_rate()
    assert found.index.tolist() == [*stated, ("batch_0", "y"), ("batch_2", "y")]
    np.testing.assert_allclose(found["rate"], [0.1, 0.2, 0.3, 0], rtol=1e-6)
    np.testing.assert_array_equal(new.get_ambient_profile().iloc[:2], model.get_ambient_profile())
    np.testing.assert_array_equal(new.get_ambient_fraction(known), model.get_ambient_fraction())
    share = new.get_ambient_fraction().to_numpy()
    assert share[half].mean() > 0.2
    assert share[~half].max() < 1e-3


def test_a_folder_is_as_good_as_a_model(reference, parts, tmp_path):
    reference.save(tmp_path / "reference")
    one = AmbientRegularizedSCVI.load_query_data(parts[1].copy(), reference)
    other = AmbientRegularizedSCVI.load_query_data(parts[1].copy(), tmp_path / "reference")
    for name, tensor in one.module.state_dict().items():
        torch.testing.assert_close(other.module.state_dict()[name], tensor, rtol=0, atol=0)
    assert len(reference.module.modality("rna").decoder.shifts[0]) == 2


def test_a_stored_query_model_goes_on_where_it_was(mapped, parts, tmp_path):
    mapped.save(tmp_path / "mapped")
    loaded = AmbientRegularizedSCVI.load(tmp_path / "mapped", parts[1].copy())
    np.testing.assert_array_equal(loaded.get_latent_representation(), mapped.get_latent_representation())
    np.testing.assert_array_equal(loaded.get_normalized_expression(), mapped.get_normalized_expression())
    z = loaded.get_latent_representation(parts[0])
    loaded.train(max_epochs=1, **FAST)
    np.testing.assert_array_equal(loaded.get_latent_representation(parts[0]), z)


def test_nothing_new_needs_no_training(reference, parts, caplog):
    adata = parts[0][:50].copy()
    with caplog.at_level("INFO", logger="cellstill"):
        model = AmbientRegularizedSCVI.load_query_data(adata, reference)
    assert any("ready as it is" in message for message in caplog.messages)
    np.testing.assert_array_equal(
        model.get_normalized_expression(), reference.get_normalized_expression(indices=np.arange(50))
    )
    with pytest.raises(InvalidArgumentError, match="unfrozen=True"):
        model.train(max_epochs=1)


def test_unfrozen_trains_everything(reference, parts):
    model = AmbientRegularizedSCVI.load_query_data(parts[1].copy(), reference, unfrozen=True)
    model.train(max_epochs=1, **FAST)
    known, trained = dict(reference.module.named_parameters()), dict(model.module.named_parameters())
    assert not torch.equal(known["encoders.0.output.weight"], trained["encoders.0.output.weight"])


def test_missing_genes_count_as_zero(reference, parts):
    # Another order, too.
    query = parts[1][:, np.arange(190)[::-1]].copy()
    with pytest.warns(CellstillWarning, match="10 of the model's 200 genes are missing"):
        model = AmbientRegularizedSCVI.load_query_data(query, reference)
    assert model._features == reference._features
    filled = parts[1].copy()
    filled.X = filled.X.multiply(np.arange(200) < 190).tocsr()
    filled.X.eliminate_zeros()
    same = AmbientRegularizedSCVI.load_query_data(filled, reference)
    model.is_trained_ = same.is_trained_ = True
    with pytest.warns(CellstillWarning, match="missing"):
        z = model.get_latent_representation()
    np.testing.assert_allclose(z, same.get_latent_representation(), atol=1e-5)
    with pytest.raises(GeneMismatchError, match="at least 96%"):
        AmbientRegularizedSCVI.load_query_data(query, reference, min_gene_overlap=0.96)


def test_what_cannot_be_a_reference_or_query_is_named(reference, parts):
    query = parts[1].copy()
    with pytest.raises(InvalidArgumentError, match="reference_model is a str|reference_model is a dict"):
        AmbientRegularizedSCVI.load_query_data(query, {})
    with pytest.raises(InvalidArgumentError, match="not a RegularizedMultimodalVI"):
        RegularizedMultimodalVI.load_query_data(query, reference)
    with pytest.raises(InvalidArgumentError, match="a view"):
        AmbientRegularizedSCVI.load_query_data(query[:20], reference)
    AmbientRegularizedSCVI.setup_anndata(query, batch_key="batch", nn_conditioning_covariate_keys=["batch"])
    untrained = AmbientRegularizedSCVI(query, n_hidden=8, n_latent=2, background=False)
    with pytest.raises(NotTrainedError):
        AmbientRegularizedSCVI.load_query_data(query, untrained)


@pytest.mark.parametrize("background", ["free", "profile"])
@pytest.mark.parametrize("lacks", [None, "protein"], ids=["both", "without_protein"])
def test_several_modalities(parts, background, lacks):
    def make(cells):
        protein = cells[:, :40].copy()
        protein.var_names = [f"p{i}" for i in range(40)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return mudata.MuData({"rna": cells.copy(), "protein": protein})

    known, query = (make(one) for one in parts)
    if lacks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            query = mudata.MuData({"rna": query["rna"]})
    RegularizedMultimodalVI.setup_mudata(
        known, batch_key="batch", nn_conditioning_covariate_keys=["batch"], modality_roles={"protein": "atac"}
    )
    model = RegularizedMultimodalVI(known, n_hidden=8, n_latent=3, background=background).train(max_epochs=2, **FAST)
    z = model.get_latent_representation()
    new = RegularizedMultimodalVI.load_query_data(query, model).train(max_epochs=2, **FAST)
    np.testing.assert_array_equal(new.get_latent_representation(known), z)
    assert new.get_latent_representation().shape == (len(parts[1]), 6)
    for name in ("rna", "protein"):
        expression = new.get_normalized_expression(modality=name, return_numpy=True)
        assert np.isfinite(expression).all()
        assert np.isfinite(new.get_ambient_profile(modality=name)).to_numpy().all()
        own, before = new.module.modality(name), model.module.modality(name)
        assert len(own.library.group_mean) == 3
        if background == "profile":
            rate = new.get_ambient_rate(modality=name)
            assert rate.iloc[:2].equals(model.get_ambient_rate(modality=name))
            if lacks == name:
                assert not rate["identified"].iloc[2]
                assert rate[["low", "high"]].iloc[2].tolist() == [0, 1]
        if lacks == name:
            torch.testing.assert_close(own.library.group_mean[2], before.library.group_mean.mean())
