"""Trained models of ours as encoders that teach the latent space of a condensation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellstill import SCDD, AmbientRegularizedSCVI, Distiller
from cellstill.condense import GeneratorConfig, LatentConfig, MatchingConfig
from cellstill.condense.output import provenance_of
from cellstill.foundation import FoundationEncoder

from .conftest import labelled_cells

SMALL = {
    "latent_settings": LatentConfig(n_latent=4, n_hidden=12, max_epochs=8, lr=4e-3),
    "generator_settings": GeneratorConfig(n_hidden=12, n_blocks=1, n_steps=9, n_tuning_steps=6, n_teacher_steps=2),
}
HOW = {"accelerator": "cpu", "progress": False}


def regularised_vi(adata: AnnData) -> AmbientRegularizedSCVI:
    AmbientRegularizedSCVI.setup_anndata(adata, layer="counts", batch_key="donor")
    model = AmbientRegularizedSCVI(adata, n_latent=3, n_hidden=8, ambient_rate=0.0)
    return model.train(max_epochs=1, early_stopping=False, **HOW)


def distiller(adata: AnnData) -> Distiller:
    return Distiller(adata, batch_key="donor", layer="counts", n_latent=3, teacher="identity").train(1, 1, **HOW)


def taught_by(latent: str | FoundationEncoder, adata: AnnData) -> SCDD:
    SCDD.setup_anndata(adata, "cell_type", layer="counts", donor_key="donor")
    return SCDD(adata, latent=latent, **SMALL).train(**HOW)


@pytest.mark.parametrize("train", [regularised_vi, distiller])
def test_trained_models_teach_what_their_embedding_in_obsm_teaches(train):
    """The same weights and cells, bit for bit, as with the embedding of the same cells; others with another one."""
    adata = labelled_cells()
    encoder = train(adata)
    assert isinstance(encoder, FoundationEncoder)
    told = encoder.get_latent_representation(adata.copy())
    adata.obsm["X_told"], adata.obsm["X_other"] = told, np.roll(told, 1, axis=0)

    models = {name: taught_by(latent, adata) for name, latent in (("model", encoder), ("key", "X_told"))}
    weights = {name: model.module.state_dict() for name, model in models.items()}
    assert weights["model"].keys() == weights["key"].keys()
    assert all(torch.equal(weights["model"][name], part) for name, part in weights["key"].items())
    other = taught_by("X_other", adata).module.state_dict()["autoencoder.encoder.output.weight"]
    assert not torch.allclose(weights["model"]["autoencoder.encoder.output.weight"], other, atol=1e-4)

    losses = models["model"].history_["latent"]["train_knowledge"]
    assert losses.iloc[-1] < losses.iloc[0]
    quick = {"counts": "rounded", "start": "centroids", "matching": MatchingConfig(n_steps=0)}
    found, same = (model.condense(2, **quick) for model in models.values())
    assert (found.X != same.X).nnz == 0
    assert found.obs["cell_type"].value_counts().tolist() == [2, 2, 2]
    assert provenance_of(found)["latent"] == type(encoder).__name__
