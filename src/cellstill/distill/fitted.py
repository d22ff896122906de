"""All that a trained distiller is, apart from the data it is attached to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cellstill._compat.malloc import keeping_freed_memory
from cellstill.data.covariates import CovariateDesign
from cellstill.data.gene_scaling import GeneScaling
from cellstill.data.loader import CountsLoader
from cellstill.data.pca import PCA
from cellstill.distill.cells import Cells
from cellstill.distill.student import Decoder, Encoder
from cellstill.io.store import array_to_names, names_to_array
from cellstill.nn.compiled import compiled
from cellstill.nn.layers import Masks

_LARGEST_RESIDUAL = 50.0

_PCA_ARRAYS = ("components", "offset", "explained_variance", "gene_fraction")


@dataclass(kw_only=True)
class Fitted:
    """A trained encoder and decoder, with what is needed to use them on any cells.

    Attributes
    ----------
    pca
        Projection that the encoder starts from.
    encoder, decoder
        The networks.
    center, scale
        Mean and standard deviation of each of the teacher's coordinates, shape ``(n_latent,)``.
    teacher_latent, student_latent
        Coordinates of the training cells, shape ``(n_obs, n_latent)``.
    obs_names, genes, batch_names
        Names of the training cells, of the genes and of the batches, in the order of their codes.
    design
        Covariates.
    labels
        Label of each training cell, or ``None``.
    splits
        Positions of the ``train``, ``validation`` and ``test`` cells.
    usual_misfit
        :meth:`misfit` of the cells that were not trained on (of all cells, if there are no others), sorted.
    record
        How the teacher fared.
    scaling
        Factors of the batches' genes, for ``pca_method="scaled_residuals"``.
    query_batches
        Embedding of each batch that was learned after training.
    query_factors
        Factors of the same batches' genes, if there is a ``scaling``; those with too few cells have none.
    """

    pca: PCA
    encoder: Encoder
    decoder: Decoder
    center: np.ndarray
    scale: np.ndarray
    teacher_latent: np.ndarray
    student_latent: np.ndarray
    obs_names: list[str]
    genes: list[str]
    batch_names: list[str]
    design: CovariateDesign
    labels: list[str] | None
    splits: dict[str, np.ndarray]
    usual_misfit: np.ndarray
    record: dict[str, Any]
    scaling: GeneScaling | None = None
    query_batches: dict[str, np.ndarray] = field(default_factory=dict)
    query_factors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.decoder.log_theta.device

    @property
    def batch_codes(self) -> dict[str, int]:
        """Code of every batch with an embedding: those of training first, then the learned ones."""
        return {name: code for code, name in enumerate([*self.batch_names, *self.query_batches])}

    def batch_vectors(self) -> torch.Tensor:
        """Embeddings by batch code; the last row, code -1, is the mean over the batches of training."""
        trained = self.decoder.batches.weight.detach()
        learned = [torch.from_numpy(vector).to(trained) for vector in self.query_batches.values()]
        return torch.cat([trained, *[vector[None] for vector in learned], trained.mean(dim=0, keepdim=True)])

    def project(self, cells: Cells) -> np.ndarray:
        """Coordinates that the encoder starts from, float32, shape ``(n, n_comps)``."""
        return self.pca.transform(cells.encoded)

    def encode(
        self,
        cells: Cells,
        batch_size: int = 4096,
        masks: Masks | None = None,
        projected: np.ndarray | None = None,
    ) -> np.ndarray:
        """Latent of cells, standardised per dimension, float32, shape ``(n, n_latent)``.

        ``projected`` is what :meth:`project` makes of the cells, where it is at hand.
        """
        latent = np.empty((len(cells), len(self.center)), dtype=np.float32)
        loader = CountsLoader(cells.encoded, batch_size=batch_size)
        n_values = float(np.prod(cells.encoded.shape))
        with torch.inference_mode(), keeping_freed_memory(), compiled("auto", n_values=n_values):
            projected = self.project(cells) if projected is None else projected
            for start in range(0, len(cells), batch_size):
                rows = np.arange(start, min(start + batch_size, len(cells)))
                batch = loader.gather(rows)
                batch["pca"] = torch.from_numpy(projected[start : start + batch_size])
                latent[rows] = self.encoder({k: v.to(self.device) for k, v in batch.items()}, masks).cpu().numpy()
        return latent

    def to_teacher(self, latent: np.ndarray) -> np.ndarray:
        """Standardised latent to the teacher's coordinates."""
        return latent * self.scale + self.center

    def rates(
        self,
        latent: np.ndarray,
        covariates: np.ndarray,
        batch: np.ndarray | Sequence[int],
        *,
        per_cell: bool,
        batch_size: int = 1024,
        masks: Masks | None = None,
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Expected proportions, block by block.

        Parameters
        ----------
        latent
            Standardised latent, shape ``(n, n_latent)``.
        covariates
            Encoded covariates, shape ``(n, n_columns)``.
        batch
            With ``per_cell`` one code per cell; otherwise the batches over which the proportions of every cell are
            averaged.
        per_cell, batch_size, masks
            How ``batch`` is read, cells per block, dropout masks of the decoder.

        Yields
        ------
        Rows, and their proportions, float32, shape ``(n_block, n_vars)``; each row sums to 1.
        """
        vectors = self.batch_vectors()
        codes = torch.as_tensor(np.asarray(batch), dtype=torch.int64, device=self.device)
        for start in range(0, len(latent), batch_size):
            rows = slice(start, min(start + batch_size, len(latent)))
            with torch.inference_mode():
                z = torch.from_numpy(latent[rows]).to(self.device)
                c = torch.from_numpy(covariates[rows]).to(self.device)
                if per_cell:
                    mean = self.decoder(z, vectors[codes[rows]], c, masks).exp_()
                else:
                    mean = torch.zeros(len(z), len(self.genes), device=self.device)
                    for code in codes:
                        mean += self.decoder(z, vectors[code].expand(len(z), -1), c, masks).exp_()
                    mean /= len(codes)
            yield rows, mean.cpu().numpy()

    def misfit(self, cells: Cells, latent: np.ndarray) -> np.ndarray:
        """How badly the decoder explains each cell's counts: mean squared Pearson residual, shape ``(n,)``.

        About 1 for a cell like those of training, whatever its depth. A gene counts 50 at most, so that no single one
        decides.
        """
        theta = self.decoder.log_theta.exp().cpu().numpy()
        misfit = np.empty(len(cells))
        covariates = self.design.encode(cells.obs)
        for rows, rates in self.rates(latent, covariates, cells.batch, per_cell=True):
            counts = cells.counts[rows]
            mean = rates * np.asarray(counts.sum(axis=1))
            squares = np.square(counts.toarray() - mean) / (mean + mean**2 / theta + np.finfo(np.float32).tiny)
            misfit[rows] = np.minimum(squares, _LARGEST_RESIDUAL).mean(axis=1)
        return misfit

    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays, by name."""
        arrays: dict[str, np.ndarray] = {
            "center": self.center,
            "scale": self.scale,
            "teacher_latent": self.teacher_latent,
            "student_latent": self.student_latent,
            "usual_misfit": self.usual_misfit,
            "obs_names": names_to_array(self.obs_names),
            "genes": names_to_array(self.genes),
        }
        if self.labels is not None:
            arrays["labels"] = names_to_array(self.labels)
        for prefix, group in (
            ("pca.", {name: getattr(self.pca, name) for name in _PCA_ARRAYS}),
            ("split.", self.splits),
            ("scaling.", {} if self.scaling is None else vars(self.scaling)),
            ("query_batch.", self.query_batches),
            ("query_factor.", self.query_factors),
            ("encoder.", _weights(self.encoder)),
            ("decoder.", _weights(self.decoder)),
        ):
            arrays.update({prefix + name: array for name, array in group.items()})
        return arrays

    def config(self) -> dict[str, Any]:
        """All that is not an array, in a form that JSON can hold."""
        return {
            "pca": {"method": self.pca.method, "clip": self.pca.clip},
            "batch_names": self.batch_names,
            "design": self.design.to_dict(),
            "record": self.record,
            "query_batches": list(self.query_batches),
        }

    @classmethod
    def restore(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], network: Mapping[str, Any]
    ) -> Fitted:
        """Build from :meth:`tensors`, :meth:`config` and the networks' settings."""

        def group(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}

        settings: dict[str, Any] = {**config["pca"], **group("pca.")}
        pca = PCA(**settings)
        design = CovariateDesign.from_dict(config["design"])
        encoder_weights, decoder_weights = group("encoder."), group("decoder.")
        encoder, decoder = build_networks(
            weight=encoder_weights["weight"],
            bias=encoder_weights["bias"],
            n_batches=len(config["batch_names"]),
            n_covariates=design.n_columns,
            gene_fraction=pca.gene_fraction,
            **network,
        )
        for module, weights in ((encoder, encoder_weights), (decoder, decoder_weights)):
            module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        learned, scaling, factors = group("query_batch."), group("scaling."), group("query_factor.")
        return cls(
            pca=pca,
            encoder=encoder.eval().requires_grad_(False),
            decoder=decoder.eval().requires_grad_(False),
            center=tensors["center"],
            scale=tensors["scale"],
            teacher_latent=tensors["teacher_latent"],
            student_latent=tensors["student_latent"],
            obs_names=array_to_names(tensors["obs_names"]),
            genes=array_to_names(tensors["genes"]),
            batch_names=list(config["batch_names"]),
            design=design,
            labels=array_to_names(tensors["labels"]) if "labels" in tensors else None,
            splits=group("split."),
            usual_misfit=tensors["usual_misfit"],
            record=dict(config["record"]),
            scaling=GeneScaling(**scaling) if scaling else None,
            query_batches={name: learned[name] for name in config["query_batches"]},
            query_factors=factors,
        )


def build_networks(
    *,
    weight: np.ndarray,
    bias: np.ndarray,
    n_batches: int,
    n_covariates: int,
    gene_fraction: np.ndarray,
    n_hidden: int,
    n_layers: int,
    dropout: float,
    n_batch_embedding: int,
) -> tuple[Encoder, Decoder]:
    """Build encoder and decoder; ``weight`` and ``bias`` are the encoder's frozen map."""
    n_vars = len(gene_fraction)
    log_rate = np.log(gene_fraction + 1e-2 / n_vars**2)
    shape: dict[str, Any] = {"n_hidden": n_hidden, "n_layers": n_layers, "dropout": dropout}
    encoder = Encoder(
        n_vars,
        torch.as_tensor(weight, dtype=torch.float32),
        torch.as_tensor(bias, dtype=torch.float32),
        **shape,
    )
    decoder = Decoder(
        weight.shape[1],
        n_vars,
        n_batches,
        n_covariates,
        n_batch_embedding=n_batch_embedding,
        log_rate=torch.as_tensor(log_rate, dtype=torch.float32),
        **shape,
    )
    return encoder, decoder


def _weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in module.state_dict().items()}
