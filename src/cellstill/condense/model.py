"""SCDD: from labelled counts to a few synthetic cells that train a classifier almost as well."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from cellstill._compat.scvi import RegisteredModel, category_registry, register, setup_args
from cellstill.condense.capped import warn_about_capped_classes
from cellstill.condense.cells import LabelledCells
from cellstill.condense.counts import FORMS, CountsForm, Rendering
from cellstill.condense.fitted import Fitted
from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.matching import MatchingConfig
from cellstill.condense.output import CODES, POINTS, to_anndata
from cellstill.condense.problem import CondensationProblem, check_anndata, label_keys, read_donors, read_labels
from cellstill.condense.progress import showing_steps
from cellstill.condense.settings import given_or_default
from cellstill.condense.solver import condense
from cellstill.condense.space import Space, fit_space
from cellstill.condense.starts import Start
from cellstill.data.counts import as_csr, check_counts, get_layer
from cellstill.data.genes import align_genes, check_unique_genes
from cellstill.data.selection import cell_positions
from cellstill.errors import InvalidArgumentError, NotTrainedError, StoreError, check_option, whole_number
from cellstill.foundation import FoundationEncoder, embed
from cellstill.io.store import load_store, save_store
from cellstill.train.progress import OnEpoch

if TYPE_CHECKING:
    from anndata import AnnData

AUTOENCODER = "autoencoder"


class SCDD(RegisteredModel):
    """Condense a labelled data set into a few synthetic cells per class, in the style of scDD.

    A supervised autoencoder with a count decoder gives a latent space; a conditional diffusion model of it is tuned to
    generate in one step; codes, one for each synthetic cell, are matched through generator and decoder until what is
    learned from the synthetic cells is right about the real ones; what is kept is chosen on cells set aside.

    The counts of the condensed cells are for any classifier of genes. Their points of the latent space are for
    classifiers that see :meth:`get_latent_representation` of new cells: these predict best, and need the model. Where
    cells are to look like real ones, :meth:`generate` makes as many as are wanted.

    Parameters
    ----------
    adata
        Registered labelled counts; the cells that are to judge the result belong elsewhere.
    latent
        Whose knowledge of cells shapes the latent space: ``"autoencoder"`` learns from counts and labels alone; a key
        of ``adata.obsm``, or anything with ``get_latent_representation(adata)``, such as a trained model of ours or of
        scvi-tools, is taught to it besides. New cells never need the source again.
    n_top_genes
        Most variable genes kept. More tell more and take longer; ``None`` keeps all that have counts in the cells that
        are learned from.
    validation_size
        Share of the cells, or of the donors, that choose instead of being learned from. More choose better and leave
        less to learn from.
    latent_settings, generator_settings
        Settings of the networks; ``None`` takes the defaults.
    seed
        Of everything drawn: equal seeds give equal files, on one machine and number of threads.

    Examples
    --------
    >>> SCDD.setup_anndata(train, labels_key="cell_type", layer="counts")
    >>> model = SCDD(train)
    >>> model.train()
    >>> tiny = model.condense(samples_per_class=10)
    >>> tiny.write_h5ad("tiny.h5ad")
    >>> many = model.generate("B cell", n=500)

    References
    ----------
    Yu et al. (2025), scDD: latent codes based single-cell data set distillation (arXiv:2503.04357), whose parts this
    follows; its equations are our own.
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        latent: str | FoundationEncoder = AUTOENCODER,
        n_top_genes: int | None = 2000,
        validation_size: float = 0.15,
        latent_settings: LatentConfig | None = None,
        generator_settings: GeneratorConfig | None = None,
        seed: int = 0,
        _registry: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(adata, _registry)
        whole_number("seed", seed, least=0)
        if n_top_genes is not None:
            n_top_genes = whole_number("n_top_genes", n_top_genes, least=1)
        is_number = isinstance(validation_size, Real) and not isinstance(validation_size, bool)
        if not is_number or not 0 < validation_size < 1:
            raise InvalidArgumentError(f"validation_size={validation_size!r} has to be above 0 and below 1.")
        self.latent = latent
        self.n_top_genes = n_top_genes
        self.validation_size = float(validation_size)
        self.latent_settings = given_or_default("latent_settings", latent_settings, LatentConfig)
        self.generator_settings = given_or_default("generator_settings", generator_settings, GeneratorConfig)
        self.seed = int(seed)
        self.history_: dict[str, pd.DataFrame] = {}
        self._setup = setup_args(self.registry)
        self._fit_result: Fitted | None = None
        self._problem: CondensationProblem | None = None
        self._model_summary_string = f"SCDD of the labels {self._setup['labels_key']!r}"

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        labels_key: str | Sequence[str],
        *,
        layer: str | None = None,
        donor_key: str | None = None,
    ) -> None:
        """Check a data set and register it.

        Parameters
        ----------
        adata
            Counts and labels. Not a view.
        labels_key
            Column of ``adata.obs`` with the labels; several, if one set is to serve several tasks: a class is then a
            combination of their categories. Labels are called by their text; integers and truth values come back as
            such with the synthetic cells.
        layer
            Layer of counts; ``None`` reads ``X``.
        donor_key
            Column with donors; cells that choose then come from other donors than cells that are learned from.

        Raises
        ------
        MissingKeyError
            A column or layer does not exist; the message lists those that do.
        InvalidCountsError
            The layer does not hold counts, or a cell is empty.
        InvalidArgumentError
            Missing labels or donors, also as text such as ``"NA"`` or blanks, or a column of one category.
        """
        check_anndata(adata)
        keys = label_keys(labels_key)
        if adata.is_view:
            raise InvalidArgumentError("adata is a view of another AnnData. Pass a copy: adata.copy().")
        check_unique_genes(adata.var_names)
        read_labels(adata, keys)
        check_counts(adata, layer, allow_noninteger=None)
        columns = {f"labels{k or ''}": key for k, key in enumerate(keys)}
        if donor_key is not None:
            read_donors(adata, donor_key)
            columns["donor"] = donor_key
        register(
            cls,
            adata,
            layer=layer,
            categorical=columns,
            setup_args={"labels_key": keys, "layer": layer, "donor_key": donor_key},
        )

    @property
    def problem(self) -> CondensationProblem:
        """Cells that are learned from, and cells that choose."""
        if self._problem is None:
            raise InvalidArgumentError(
                "The model has no data, or is not trained. Call train(), or load it with data: SCDD.load(path, adata)."
            )
        return self._problem

    @property
    def space(self) -> Space:
        """Trained latent space and generator."""
        return self._fitted().space

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their codes."""
        return self._fitted().classes

    @property
    def gene_names(self) -> np.ndarray:
        """Genes of synthetic cells, shape ``(n_vars,)``."""
        return self._fitted().genes

    def train(
        self,
        *,
        accelerator: str = "auto",
        progress: bool | OnEpoch | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> SCDD:
        """Train latent space and generator.

        Parameters
        ----------
        accelerator
            ``"auto"`` (a CUDA device if there is one), ``"cpu"`` or ``"gpu"``.
        progress
            Show progress bars; ``None`` shows them in a terminal. A function is called after each epoch, as
            ``progress(phase, epoch, losses)``.
        checkpoint
            Folder for the state of training, written after each epoch.
        resume
            Go on from ``checkpoint``, if there is one: training ends with the same weights, bit for bit, as if it had
            not been interrupted.

        Returns
        -------
        The model itself.

        Raises
        ------
        InvalidArgumentError
            The cells cannot be split, ``latent`` embeds nothing, or ``resume`` is given without ``checkpoint``.
        TrainingError
            A loss or gradient is not finite.
        StoreError
            ``checkpoint`` holds a run already and ``resume`` is false, or one with other data or settings.
        """
        adata = self._require_adata()
        problem = CondensationProblem.from_anndata(
            adata,
            self._setup["labels_key"],
            layer=self._setup["layer"],
            donor_key=self._setup["donor_key"],
            n_top_genes=self.n_top_genes,
            train_size=1 - self.validation_size,
            validation_size=self.validation_size,
            seed=self.seed,
        )
        told = None
        if not (isinstance(self.latent, str) and self.latent == AUTOENCODER):
            embedding = embed(self.latent, adata)
            told = {name: embedding[rows] for name, rows in problem.rows.items()}
        space = fit_space(
            problem,
            self.latent_settings,
            self.generator_settings,
            told=told,
            seed=self.seed,
            accelerator=accelerator,
            progress=os.isatty(2) if progress is None else progress,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            resume=resume,
        )
        self._take(Fitted.on(problem, space), problem)
        return self

    def condense(
        self,
        samples_per_class: int = 10,
        *,
        counts: CountsForm | Literal["auto"] = "auto",
        start: Start | Literal["auto"] = "auto",
        matching: MatchingConfig | None = None,
        seed: int | None = None,
        progress: bool | None = None,
        on_step: Callable[[str, int, int], None] | None = None,
    ) -> AnnData:
        """Make a few synthetic cells of each class.

        Parameters
        ----------
        samples_per_class
            Cells of each class; of a class with fewer real cells to learn from, as many as these.
        counts
            ``"expected"``, ``"rounded"``, ``"sampled"`` or ``"mixed"`` (:class:`~cellstill.condense.counts.Rendering`);
            ``"auto"`` takes what does best on the cells set aside.
        start
            Where codes start: ``"centroids"``, ``"random"``, or ``"auto"``, which takes what does best.
        matching
            Settings of the matching; ``None`` takes the defaults.
        seed
            Of everything drawn; ``None`` takes that of the model.
        progress
            Show progress bars; ``None`` shows them in a terminal, unless ``on_step`` is given.
        on_step
            Called as ``on_step(phase, step, n_steps)``.

        Returns
        -------
        Synthetic cells: counts in ``X``, labels in ``obs`` (integers, truth values or text, as they were), codes in
        ``obsm["X_scdd"]``, in ``uns["scdd"]`` the candidates' scores and the provenance: keys, settings and seeds, the
        names of the classes, and a fingerprint of the cells of training. In ``obsm["X_scdd_latent"]``
        points of the latent space, each of its row's class but not always its row's cell: chosen for classifiers that
        see :meth:`get_latent_representation` of new cells.

        Raises
        ------
        InvalidArgumentError
            A setting is out of range, or the model was loaded without data.
        NotTrainedError
            The model is not trained.

        Warns
        -----
        CellstillWarning
            Classes with fewer cells than ``samples_per_class``, and a number that compresses nothing.
        """
        space, problem = self.space, self.problem
        seed = self.seed if seed is None else seed
        whole_number("seed", seed, least=0)
        matching = given_or_default("matching", matching, MatchingConfig)
        warn_about_capped_classes(problem, samples_per_class)
        how: dict[str, Any] = {"counts": counts, "start": start, "matching": matching, "seed": seed}
        with showing_steps(progress, on_step) as told:
            found = condense(problem, space, samples_per_class, **how, on_step=told)
        return to_anndata(
            found.cells,
            problem.classes,
            problem.tasks,
            problem.genes,
            {
                "method": "SCDD",
                "seed": seed,
                "samples_per_class": samples_per_class,
                "counts": found.rendering.form,
                "detection": found.rendering.detection,
                "start": found.start,
                "matching_steps": found.n_steps,
                "matching": asdict(matching),
                **self._origin(),
                "n_real": len(problem.train),
                "n_synthetic": len(found.cells),
                "of_class": np.bincount(found.cells.codes, minlength=problem.n_classes),
            },
            obsm={CODES: found.codes, POINTS: found.points.values},
            choices={"choice": found.choice, "point_choice": found.point_choice},
        )

    def generate(
        self,
        label: str | int,
        n: int,
        *,
        counts: Literal["expected", "rounded", "sampled"] = "sampled",
        seed: int | None = None,
    ) -> AnnData:
        """Generate cells of a class, in one step each, without matching.

        The same call returns the same cells. Cells of different classes or seeds are drawn independently and have
        different names, so that they may be put together.

        Parameters
        ----------
        label
            Class, one of :attr:`classes`. With several labels it is called by all of them, in the order of
            ``labels_key``: ``"B cells | ctrl"``.
        n
            Number of cells.
        counts
            Form of the counts; ``"sampled"`` is like real cells.
        seed
            Of everything drawn; ``None`` takes that of the model.

        Raises
        ------
        InvalidArgumentError
            An unknown class, or fewer than one cell.
        """
        fitted, label = self._fitted(), str(label)
        space, classes = fitted.space, fitted.classes
        check_option("label", label, classes)
        check_option("counts", counts, [form for form in FORMS if form != "mixed"])
        whole_number("n", n, least=1)
        seed = self.seed if seed is None else seed
        whole_number("seed", seed, least=0)
        codes = np.full(int(n), classes.index(label))
        # Each class has a stream of its own, or cells of different classes would have noise and depth in common.
        drawn = int(np.random.SeedSequence([seed, classes.index(label)]).generate_state(1, np.uint64)[0])
        noise = torch.randn(
            len(codes), space.autoencoder.config.n_latent, generator=torch.Generator().manual_seed(drawn)
        )
        z = space.sample(noise.to(space.device), torch.from_numpy(codes).to(space.device))
        cells = space.render(Rendering(counts), z, codes, drawn)
        told = {"method": "SCDD.generate", "seed": seed, "counts": counts, **self._origin()}
        found = to_anndata(
            cells, classes, fitted.tasks, fitted.genes, told, obsm={CODES: noise.numpy(), POINTS: z.cpu().numpy()}
        )
        found.obs_names = [f"{label}-{seed}-{k}" for k in range(len(cells))]
        return found

    def get_latent_representation(
        self, adata: AnnData | None = None, indices: np.ndarray | Sequence[int] | None = None
    ) -> np.ndarray:
        """Return z of cells, standardised over the training cells.

        Parameters
        ----------
        adata
            Counts, in the layer of training; genes are matched by name. ``None`` takes the model's own cells.
        indices
            Positions of the cells wanted, or a mask; ``None`` takes all.

        Returns
        -------
        float32, shape ``(n, n_latent)``.

        Raises
        ------
        InvalidArgumentError
            ``indices`` names no cell, or one that does not exist.
        GeneMismatchError
            ``adata`` lacks too many genes of the model.
        """
        space = self.space
        adata = self._require_adata() if adata is None else adata
        check_anndata(adata)
        rows = slice(None) if indices is None else cell_positions(indices, adata.n_obs)
        layer = self._setup["layer"]
        check_counts(adata, layer, set_up=True)
        counts, _ = align_genes(
            as_csr(get_layer(adata, layer)).astype(np.float32), adata.var_names.astype(str), self.gene_names.tolist()
        )
        cells = counts[rows]
        return space.encode(LabelledCells(cells, np.zeros(cells.shape[0], dtype=np.int64))).cpu().numpy()

    def save(self, dir_path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model to a folder: safetensors and JSON, no pickle, no counts.

        Raises
        ------
        StoreError
            The folder exists, or cannot be written.
        """
        fitted = self._fitted()
        config = {
            "setup": self._setup,
            "latent": self._latent_name(),
            "n_top_genes": self.n_top_genes,
            "validation_size": self.validation_size,
            "seed": self.seed,
            **fitted.config(),
        }
        save_store(dir_path, type(self).__name__, fitted.tensors(), config, overwrite=overwrite)

    @classmethod
    def load(cls, dir_path: str | os.PathLike[str], adata: AnnData | None = None) -> SCDD:
        """Read a model that :meth:`save` wrote.

        Parameters
        ----------
        dir_path
            Folder.
        adata
            The cells of training, if more are to be condensed; generating needs none.

        Raises
        ------
        StoreError
            The folder is absent, damaged, of another class, or from a newer cellstill.
        InvalidArgumentError
            ``adata`` has other cells or labels than those of training.
        """
        tensors, config = load_store(dir_path, cls.__name__)
        try:
            setup, fitted = config["setup"], Fitted.restore(tensors, config)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(f"{dir_path} is damaged ({error}). Save the model again.") from error
        registry = problem = None
        where = {"layer": setup["layer"], "donor_key": setup["donor_key"]}
        if adata is None:
            columns = {f"labels{k or ''}": task.key for k, task in enumerate(fitted.tasks)}
            known = {f"labels{k or ''}": list(task.names) for k, task in enumerate(fitted.tasks)}
            registry = category_registry(cls.__name__, setup, known, columns=columns)
        else:
            check_anndata(adata)
            fitted.check_number(adata.n_obs)
            # First, because it says where the model reads counts, of which setting up would offer a choice.
            problem = fitted.attach(adata, **where)
            cls.setup_anndata(adata, setup["labels_key"], **where)
        model = cls(
            adata,
            n_top_genes=config["n_top_genes"],
            validation_size=config["validation_size"],
            latent_settings=fitted.space.autoencoder.config,
            generator_settings=fitted.space.config,
            seed=config["seed"],
            _registry=registry,
        )
        model.latent = config["latent"]
        model._take(fitted, problem)
        return model

    def _take(self, fitted: Fitted, problem: CondensationProblem | None) -> None:
        self._fit_result, self._problem = fitted, problem
        space = fitted.space
        self.module = torch.nn.ModuleDict({"autoencoder": space.autoencoder, "generator": space.generator})
        self.history_ = space.history
        self.train_indices_, self.validation_indices_, self.test_indices_ = (
            fitted.rows[part] for part in ("train", "validation", "test")
        )
        self.is_trained_ = True

    def _origin(self) -> dict[str, Any]:
        """What the model was trained on, and how, for the provenance of its cells."""
        fitted = self._fitted()
        return {
            **{name: self._setup[name] for name in ("labels_key", "layer", "donor_key")},
            "classes": list(fitted.classes),
            "cells": fitted.fingerprint,
            "n_top_genes": self.n_top_genes,
            "validation_size": self.validation_size,
            "latent": self._latent_name(),
            "latent_settings": asdict(fitted.space.autoencoder.config),
            "generator_settings": asdict(fitted.space.config),
            "training_seed": self.seed,
        }

    def _latent_name(self) -> str:
        return self.latent if isinstance(self.latent, str) else type(self.latent).__name__

    def _require_adata(self) -> AnnData:
        if self.adata is None:
            raise InvalidArgumentError("The model was loaded without data. Load it with some: SCDD.load(path, adata).")
        return self.adata

    def _fitted(self) -> Fitted:
        if self._fit_result is None:
            raise NotTrainedError("The model is not trained. Call train() first.")
        return self._fit_result
