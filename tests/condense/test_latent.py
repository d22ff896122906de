from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from cellstill.condense.cells import LabelledCells
from cellstill.condense.latent import Autoencoder, LatentConfig, encode, expression, fit_autoencoder
from cellstill.nn.sparse import CSRRows

SMALL = LatentConfig(n_latent=5, n_hidden=24, max_epochs=40, batch_size=32, lr=4e-3)


def cells_of(n: int, n_vars: int = 40, seed: int = 0, n_classes: int = 2) -> tuple[LabelledCells, np.ndarray]:
    """Counts whose classes differ in ten genes each, at library sizes that vary, and the truth of their shares."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(n_classes, size=n)
    rate = np.tile(np.linspace(0.2, 2, n_vars), (n_classes, 1))
    for k in range(n_classes):
        rate[k, 10 * k : 10 * k + 10] += 4
    share = rate / rate.sum(axis=1, keepdims=True)
    library = rng.lognormal(np.log(300), 0.2, n)
    return LabelledCells(sp.csr_matrix(rng.poisson(share[codes] * library[:, None]).astype(np.float32)), codes), share


@pytest.fixture(scope="module")
def cells() -> tuple[LabelledCells, LabelledCells]:
    return cells_of(300)[0], cells_of(80, seed=1)[0]


@pytest.fixture(scope="module")
def fitted(cells) -> tuple[Autoencoder, pd.DataFrame]:
    return fit_autoencoder(*cells, 2, SMALL)


def batch_of(cells: LabelledCells, told: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    counts = cells.counts
    batch = {"data": counts.data, "indices": counts.indices, "indptr": counts.indptr, "label": cells.codes}
    return {
        name: torch.as_tensor(values) for name, values in (batch | ({} if told is None else {"told": told})).items()
    }


def test_loss_is_the_formula_of_its_docstring(fitted, cells):
    torch.manual_seed(0)
    some, told = cells[1][np.arange(30)], np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    config = LatentConfig(
        n_latent=4, n_hidden=8, dropout=0.0, expression_weight=0.7, knowledge_weight=0.3, class_weight=1.9
    )
    module = Autoencoder(torch.linspace(-5, -3, 40), torch.linspace(0, 2, 40), 2, 3, config).eval()
    module.log_theta.data = torch.linspace(-1, 2, 40)
    module.center.fill_(0.4)
    module.scale.fill_(1.7)
    found = module.loss(batch_of(some, told))

    counts = some.counts.toarray().astype(np.float64)
    library = counts.sum(axis=1, keepdims=True)
    seen = np.log1p(1e4 * counts / library)
    with torch.no_grad():
        z = module.encode(CSRRows.of(batch_of(some), 40))
        rho, expected = module.decode(z).double().numpy(), module.expression(module._hidden(z)).double().numpy()
        raw = z * module.scale + module.center
        told_back, logits = module.knowledge(raw).numpy(), module.classifier(raw).double().numpy()
    theta = np.exp(np.linspace(-1, 2, 40))
    mean = library * rho
    nb = -stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum(axis=1) / 40
    error = np.square(expected - seen).sum(axis=1) / 40
    taught = np.square(told_back - told).mean(axis=1)
    entropy = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(30), some.codes]
    by_hand = nb + 0.7 * error + 0.3 * taught + 1.9 * entropy
    np.testing.assert_allclose(found.per_cell.detach().numpy(), by_hand, rtol=2e-4)
    assert float(found.total.detach()) == pytest.approx(by_hand.mean(), rel=1e-4)
    terms = {"nb": nb, "expression": error, "knowledge": taught, "class": entropy}
    assert {name: float(term.detach()) for name, term in found.terms.items()} == pytest.approx(
        {name: term.sum() for name, term in terms.items()}, rel=1e-4
    )
    # The same likelihood, of standardised z, tunes the generator.
    with torch.no_grad():
        again = float(module.count_loss(z, CSRRows.of(batch_of(some), 40)))
    assert again == pytest.approx(nb.mean(), rel=1e-4)


def test_minibatches_are_seen_as_log_expression(cells):
    found = expression(CSRRows.of(batch_of(cells[0]), 40)).to_dense()
    np.testing.assert_allclose(found.numpy(), cells[0].expression().toarray(), rtol=1e-5)


def test_z_is_standardised_over_the_training_cells(fitted, cells):
    z = encode(fitted[0], cells[0].counts)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dim=0), torch.ones(5), rtol=1e-4, atol=0)
    assert encode(fitted[0], cells[1].counts).mean(dim=0).abs().max() < 0.5
    # In parts as in one.
    torch.testing.assert_close(encode(fitted[0], cells[0].counts, batch_size=7), z, rtol=1e-4, atol=1e-5)


def test_decoders_recover_the_classes(fitted, cells):
    module, truth = fitted[0], cells_of(1)[1]
    new = cells_of(400, seed=5)[0]
    with torch.no_grad():
        z = encode(module, new.counts)
        rho, seen = module.decode(z).numpy(), module.expect(z).numpy()
        called = module.classify(z).argmax(dim=1).numpy()
    assert (called == new.codes).mean() > 0.97
    assert (seen >= 0).all()
    np.testing.assert_allclose(rho.sum(axis=1), 1, rtol=1e-5)
    for code in range(2):
        mean = new.expression()[new.codes == code].mean(axis=0)
        off = np.abs(seen[new.codes == code].mean(axis=0) - np.asarray(mean).ravel())
        assert off.mean() < 0.1
        assert np.corrcoef(seen[new.codes == code].mean(axis=0), np.asarray(mean).ravel())[0, 1] > 0.99
        assert np.corrcoef(np.log(rho[new.codes == code].mean(axis=0)), np.log(truth[code]))[0, 1] > 0.97


def test_decoder_starts_at_the_mean_of_all_cells(cells):
    untrained = fit_autoencoder(*cells, 2, LatentConfig(n_latent=3, n_hidden=8, max_epochs=0))[0]
    counts = cells[0].counts
    with torch.no_grad():
        z = torch.zeros(1, 3)
        rho, seen = untrained.decode(z)[0].numpy(), untrained.expect(z)[0].numpy()
    share = np.asarray(counts.sum(axis=0)).ravel()
    np.testing.assert_allclose(rho, share / share.sum(), rtol=0.1)
    np.testing.assert_allclose(seen, np.asarray(cells[0].expression().mean(axis=0)).ravel(), atol=0.1)


def test_an_embedding_that_teaches_is_held_by_a_linear_map(cells):
    train, validation = cells
    # A direction of expression that supervision does not ask for, in units of its own.
    direction = np.random.default_rng(2).normal(size=(40, 2))
    direction[:20] = 0
    told = {
        name: (1000 + 50 * part.expression().toarray() @ direction).astype(np.float32)
        for name, part in (("train", train), ("validation", validation))
    }
    settings = LatentConfig(n_latent=5, n_hidden=24, max_epochs=25, batch_size=16, lr=6e-3, dropout=0.0)

    def explained(module: Autoencoder) -> float:
        design = np.hstack([encode(module, train.counts).numpy(), np.ones((len(train), 1))])
        fit = np.linalg.lstsq(design, told["train"], rcond=None)[0]
        new = np.hstack([encode(module, validation.counts).numpy(), np.ones((len(validation), 1))]) @ fit
        rest = np.square(new - told["validation"]).sum()
        return 1 - rest / np.square(told["validation"] - told["validation"].mean(axis=0)).sum()

    taught, history = fit_autoencoder(train, validation, 2, settings, told=told)
    plain = fit_autoencoder(train, validation, 2, settings)[0]
    assert explained(taught) > 0.6
    assert explained(taught) > explained(plain) + 0.2
    assert history["train_knowledge"].iloc[-1] < 0.5 * history["train_knowledge"].iloc[0]
    assert plain.knowledge is None


def test_cells_without_counts_of_the_chosen_genes_are_harmless(cells):
    counts = cells[0].counts.toarray()
    counts[[0, 50]] = 0
    train = LabelledCells(sp.csr_matrix(counts), cells[0].codes)
    module, history = fit_autoencoder(train, cells[1], 2, LatentConfig(n_latent=3, n_hidden=8, max_epochs=3))
    assert np.isfinite(history.to_numpy()).all()
    assert torch.isfinite(encode(module, train.counts)).all()


def test_seed_decides_all_and_the_callers_random_state_stays(cells):
    config = LatentConfig(n_latent=3, n_hidden=8, max_epochs=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, history = fit_autoencoder(*cells, 2, config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    same, again = fit_autoencoder(*cells, 2, config, seed=3)
    other = fit_autoencoder(*cells, 2, config, seed=4)[0]
    pd.testing.assert_frame_equal(history, again)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    assert not torch.equal(one.center, other.center)


def test_interrupted_training_goes_on_to_the_same_weights(cells, tmp_path):
    config = LatentConfig(n_latent=3, n_hidden=8, max_epochs=4)

    def stop(phase: str, epoch: int, losses: object) -> None:
        assert phase == "latent space"
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_autoencoder(*cells, 2, config, progress=stop, checkpoint=tmp_path / "latent.ckpt")
    resumed, history = fit_autoencoder(*cells, 2, config, checkpoint=tmp_path / "latent.ckpt", resume=True)
    straight, expected = fit_autoencoder(*cells, 2, config)
    pd.testing.assert_frame_equal(history, expected)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_training_goes_on_without_cells_that_choose(cells):
    config = LatentConfig(n_latent=3, n_hidden=8, max_epochs=2)
    history = fit_autoencoder(cells[0], cells[1][np.arange(0)], 2, config)[1]
    assert "validation_loss" not in history
    assert len(history) == 2
