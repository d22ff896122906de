"""What is said of a latent that tells next to nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import CellstillWarning
from cellstill.metrics import knn_accuracy
from cellstill.vi.collapse import warn_if_collapsed

HOW = {"accelerator": "cpu", "progress": False, "batch_size": 64, "lr": 3e-3, "early_stopping": False}
SAID = r"The latent tells next to nothing of the cells: its divergence from the prior is 0\.\d+ nats a cell"


def cells_of(n_types: int) -> AnnData:
    """Cells that differ by depth, and by type if there are several."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, n_types, 400)
    mean = rng.gamma(2.0, 1.0, (n_types, 60))[kind] * rng.lognormal(0, 0.3, (400, 1))
    adata = AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))
    adata.obs["cell_type"] = kind.astype(str)
    return adata


def model_of(adata: AnnData, **settings) -> AmbientRegularizedSCVI:
    AmbientRegularizedSCVI.setup_anndata(adata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The share of ambient RNA", category=CellstillWarning)
        return AmbientRegularizedSCVI(adata, **{"n_hidden": 16, "n_latent": 4, **settings})


def test_a_latent_without_anything_to_tell_is_said():
    model = model_of(cells_of(1))
    with pytest.warns(CellstillWarning, match=SAID):
        model.train(max_epochs=50, **HOW)
    assert model.history_["kl_z_train"].iloc[-1, 0] < 0.05


def test_nothing_is_said_of_two_types_that_the_latent_tells_apart():
    adata = cells_of(2)
    # Warnings are errors.
    model = model_of(adata).train(max_epochs=50, **HOW)
    assert knn_accuracy(model.get_latent_representation(), adata.obs["cell_type"]) > 0.99


def test_nothing_is_expected_of_few_steps():
    # 6 in an epoch of 360 training cells.
    model = model_of(cells_of(1)).train(max_epochs=49, **HOW)
    cells, everyone = model._cells(), np.arange(400)
    warn_if_collapsed(model.module, cells, everyone, 299)
    with pytest.warns(CellstillWarning, match=SAID):
        warn_if_collapsed(model.module, cells, everyone, 300)


def test_several_modalities_without_anything_to_tell_are_said():
    mudata = pytest.importorskip("mudata")
    proteins = cells_of(1)[:, :10].copy()
    proteins.var_names = [f"protein {i}" for i in range(10)]
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData({"rna": cells_of(1), "prot": proteins})
    RegularizedMultimodalVI.setup_mudata(mdata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The share of ambient RNA", category=CellstillWarning)
        model = RegularizedMultimodalVI(mdata, n_hidden=16, n_latent=2)
    with pytest.warns(CellstillWarning, match=SAID):
        model.train(max_epochs=50, **HOW)


def test_training_for_no_epoch_leaves_the_model_as_it_started():
    model = model_of(cells_of(1))
    start = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.train(max_epochs=0, **HOW)
    assert model.is_trained_
    assert len(model.train_indices_) == 360
    for name, value in model.module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), start[name].numpy(), err_msg=name)


def latent_after(kl_warmup=None, **settings) -> np.ndarray:
    warmup = {} if kl_warmup is None else {"kl_warmup": kl_warmup}
    return model_of(cells_of(2), **settings).train(max_epochs=4, **HOW, **warmup).get_latent_representation()


def test_the_divergence_has_full_weight_from_the_start():
    np.testing.assert_array_equal(latent_after(), latent_after(0))
    assert not np.array_equal(latent_after(), latent_after(0.1))


def test_sparsity_of_hidden_activations_is_warmed_up_over_a_third():
    np.testing.assert_array_equal(latent_after(hidden_sparsity=4.0), latent_after(1 / 3, hidden_sparsity=4.0))
    assert not np.array_equal(latent_after(hidden_sparsity=4.0), latent_after(0, hidden_sparsity=4.0))
