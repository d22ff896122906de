from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from anndata import AnnData

from cellstill.errors import InvalidArgumentError, MissingKeyError
from cellstill.foundation import FoundationEncoder, embed

Z = np.arange(12, dtype=np.float64).reshape(4, 3)


class Encoder:
    """Embeds as told, whatever the cells."""

    def __init__(self, found: object) -> None:
        self.found = found
        self.asked: list[AnnData] = []

    def get_latent_representation(self, adata: AnnData) -> object:
        self.asked.append(adata)
        return self.found


@pytest.fixture
def adata() -> AnnData:
    return AnnData(np.ones((4, 2), dtype=np.float32), obsm={"X_pca": Z})


@pytest.mark.parametrize(
    "form",
    [
        lambda z: z,
        sp.csr_matrix,
        torch.from_numpy,
        lambda z: torch.tensor(z, dtype=torch.bfloat16, requires_grad=True),
        lambda z: pd.DataFrame(z, columns=list("abc")),
        np.ndarray.tolist,
    ],
    ids=["array", "sparse", "tensor", "tensor_with_gradient", "frame", "list"],
)
def test_encoders_are_asked_once_and_give_float32(adata, form):
    encoder = Encoder(form(Z))
    found = embed(encoder, adata)
    np.testing.assert_array_equal(found, Z)
    assert found.dtype == np.float32
    assert len(encoder.asked) == 1
    assert encoder.asked[0] is adata


@pytest.mark.parametrize("form", [lambda z: z, sp.csr_matrix, lambda z: pd.DataFrame(z, index=list("0123"))])
def test_embeddings_that_are_there_are_read(adata, form):
    adata.obsm["other"] = form(Z)
    np.testing.assert_array_equal(embed("other", adata), Z)


def test_the_protocol_is_told_by_its_method():
    assert isinstance(Encoder(Z), FoundationEncoder)
    assert not isinstance(np.zeros(3), FoundationEncoder)


def test_an_encoder_that_takes_no_cells_is_refused(adata):
    class Deaf:
        def get_latent_representation(self):
            return Z

    message = r"latent: Deaf.get_latent_representation\(\) cannot be called with the cells"
    with pytest.raises(InvalidArgumentError, match=message):
        embed(Deaf(), adata)


def test_absent_key_is_an_error_that_lists_those_that_exist(adata):
    with pytest.raises(MissingKeyError, match="latent='X_scvi' is not in adata.obsm. adata.obsm has: 'X_pca'"):
        embed("X_scvi", adata)


@pytest.mark.parametrize("source", [5, None, Encoder, Z], ids=["number", "None", "class", "array"])
def test_what_embeds_nothing_is_refused(adata, source):
    with pytest.raises(
        InvalidArgumentError, match="(?s)teacher=.* embeds no cells. Give a key of adata.obsm, or a trained"
    ):
        embed(source, adata, "teacher")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Z[:3], r"shape \(3, 3\).*each of the 4 cells"),
        (Z[:, 0], r"shape \(4,\)"),
        (np.where(Z == 5, np.nan, Z), "1 values that are not finite"),
        (np.where(Z > 9, np.inf, Z), "2 values that are not finite"),
        (np.full((4, 2), "x"), "Encoder.get_latent_representation.*holds no numbers"),
        (None, "Encoder.get_latent_representation"),
        (Z[:, :0], r"shape \(4, 0\)"),
    ],
    ids=["too-few-rows", "vector", "NaN", "infinite", "text", "None", "no-dimension"],
)
def test_what_is_no_finite_matrix_is_refused(adata, found, message):
    with pytest.raises(InvalidArgumentError, match=f"latent: .*{message}"):
        embed(Encoder(found), adata)


def test_text_in_obsm_is_refused_with_its_key(adata):
    adata.obsm["notes"] = pd.DataFrame({"a": list("wxyz")}, index=adata.obs_names)
    with pytest.raises(InvalidArgumentError, match=r"latent: adata.obsm\['notes'\] holds no numbers"):
        embed("notes", adata)


@pytest.mark.parametrize("place", ["adata.X", "adata.layers['counts']"])
def test_an_encoder_that_normalises_in_place_is_named(adata, place):
    adata.layers["counts"] = sp.csr_matrix(adata.X * 2)
    adata.layers["odd"] = np.full((4, 2), np.nan)

    class InPlace(Encoder):
        def get_latent_representation(self, adata: AnnData) -> object:
            adata.layers["new"] = adata.X.copy()
            sc.pp.normalize_total(adata, target_sum=1e4, layer=None if place == "adata.X" else "counts")
            return self.found

    class OnCopy(InPlace):
        def get_latent_representation(self, adata: AnnData) -> object:
            return super().get_latent_representation(adata.copy())

    np.testing.assert_array_equal(embed(OnCopy(Z), adata), Z)
    with pytest.raises(InvalidArgumentError, match=re.escape(f"InPlace.get_latent_representation changed {place} of")):
        embed(InPlace(Z), adata)


def test_only_what_is_wrong_with_an_embedding_is_said(adata):
    for found, fault in ((Z[:3], "shape (3, 3)"), (np.where(Z == 4, np.nan, Z), "1 values that are not finite")):
        with pytest.raises(InvalidArgumentError, match=re.escape(f"has {fault}. A finite matrix")):
            embed(Encoder(found), adata)
    adata.obsm["constant"] = np.tile(Z[:1], (4, 1))
    with pytest.raises(InvalidArgumentError, match="is the same for all 4 cells, so that it tells nothing"):
        embed("constant", adata)
