"""Distiller: a fast neural student of any batch-correction method, with a count decoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd

from cellstill._compat.scvi import category_registry, register, setup_args
from cellstill.data.covariates import CovariateDesign, obs_column
from cellstill.distill.analysis import Analysis
from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted
from cellstill.distill.getters import Getters
from cellstill.distill.setup import check_setup, find_counts, warn_if_depths_differ
from cellstill.distill.training import ComponentsMethod, TrainingSettings, distill
from cellstill.errors import InvalidArgumentError, StoreError, below_one, check_option, whole_number
from cellstill.io.store import load_store, save_store
from cellstill.nn.compiled import CompileMode
from cellstill.teachers import HarmonyTeacher, Teacher, get_teacher
from cellstill.train.progress import OnEpoch

if TYPE_CHECKING:
    from anndata import AnnData


class Distiller(Getters, Analysis):
    """A fast neural student of a batch-correction method, with a count decoder.

    Phase 1 trains an encoder to reproduce the teacher's batch-corrected coordinates z* from the counts of a cell
    alone; phase 2 freezes it and trains a decoder, given latent, batch and covariates, on the likelihood of the
    counts. New cells are then mapped without running the teacher again, and expression can be decoded as any batch.

    Parameters
    ----------
    adata
        Counts, cells x genes; sparse counts stay sparse. Registered here if ``batch_key`` is given, otherwise before,
        with :meth:`setup_anndata`.
    batch_key
        Column of ``adata.obs`` with the batch to remove.
    layer, labels_key, covariate_keys, allow_noninteger
        See :meth:`setup_anndata`.
    teacher
        Batch-correction method to learn from: a :class:`~cellstill.teachers.Teacher`, or the name of one with its
        default settings. Harmony by default.
    n_latent
        Number of principal components, and so of latent dimensions (a
        :class:`~cellstill.teachers.LatentTeacher` brings its own). More keep finer structure, and more noise.
    n_hidden, n_layers
        Width and number of the hidden layers of both networks. Larger fit the teacher more closely on the training
        cells, and take longer.
    dropout
        Probability of dropping an input of a hidden layer. Larger regularises more; it is also what the Bayesian
        differential expression draws from, so 0 leaves it without model uncertainty.
    pca_method
        ``"standard"`` (log2 CPM) or ``"pearson_residuals"``, which puts cells of different depth on one scale of noise:
        choose it where batches differ in depth (:func:`~cellstill.data.fit_pca`). ``"scaled_residuals"``: the same of
        counts whose genes are first scaled, batch by batch, to one composition
        (:class:`~cellstill.data.gene_scaling.GeneScaling`). Choose it where batches differ gene by gene, as those of
        different chemistries do, with few components: of those beyond biology batches keep a trace (``n_latent=10`` is
        a good start). It is wrong where batches hold cell types, or other biology, in different shares that
        ``covariate_keys`` does not name: what one batch has more of is taken for its effect on genes and scaled away.
    use_batch_conditioning
        The decoder knows the batch, so it can decode a cell as another batch.
    n_batch_embedding
        Size of the decoder's embedding of a batch. Larger lets batches differ in more ways.
    seed
        Seeds teacher, split, initial weights, shuffling and dropout: two models with the same seed on the same machine
        and number of threads agree bit for bit.

    Attributes
    ----------
    latent
        ``latent.teacher`` and ``latent.student``, shape ``(n_obs, n_latent)``.
    history
        ``"encoder"`` and ``"decoder"``: DataFrames of ``train_loss`` and ``validation_loss`` per epoch.
    gene_names
        Genes, in the order of decoded expression.

    Notes
    -----
    With x~ = log2(CPM + 1), of scaled counts for ``"scaled_residuals"``, and z* standardised per dimension, phase 1
    minimises ``|E(x~) - z*|^2``, where ``E(x~) = A pca(x~) + c + MLP(x~)`` and the linear part is frozen. Phase 2
    minimises ``-log NB(x | l rho, theta)`` with ``rho = softmax(D([z, e(batch), covariates]))``, l the cell's library
    size and theta one inverse dispersion per gene. Each phase keeps a validation split, stops early, and ends with its
    best weights.

    Examples
    --------
    >>> model = Distiller(adata, batch_key="batch")
    >>> model.train()
    >>> adata.obsm["X_distilled"] = model.latent.student
    >>> adata.layers["corrected"] = model.corrected_expression(target_batch=None)
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        batch_key: str | None = None,
        *,
        layer: str | None = None,
        labels_key: str | None = None,
        covariate_keys: Sequence[str] | None = None,
        allow_noninteger: bool = False,
        teacher: Teacher | str | None = None,
        n_latent: int = 50,
        n_hidden: int = 128,
        n_layers: int = 2,
        dropout: float = 0.1,
        pca_method: ComponentsMethod = "standard",
        use_batch_conditioning: bool = True,
        n_batch_embedding: int = 10,
        seed: int = 0,
        _registry: dict[str, Any] | None = None,
    ) -> None:
        if adata is not None and batch_key is not None:
            type(self).setup_anndata(
                adata,
                batch_key,
                layer=layer,
                labels_key=labels_key,
                covariate_keys=covariate_keys,
                allow_noninteger=allow_noninteger,
            )
        elif layer is not None or labels_key is not None or covariate_keys is not None or allow_noninteger:
            raise InvalidArgumentError(
                "layer, labels_key, covariate_keys and allow_noninteger belong to the registration: give batch_key "
                "with them, or give them to Distiller.setup_anndata."
            )
        super().__init__(adata, _registry)
        check_option("pca_method", pca_method, get_args(ComponentsMethod))
        sizes = {"n_latent": n_latent, "n_hidden": n_hidden, "n_layers": n_layers}
        for name, value in {**sizes, "n_batch_embedding": n_batch_embedding, "seed": seed}.items():
            whole_number(name, value, least=1 if name in sizes else 0)
        below_one("dropout", dropout)
        self.teacher = get_teacher(teacher) if isinstance(teacher, str) else teacher or HarmonyTeacher()
        self.n_latent = n_latent
        self.pca_method = pca_method
        self.seed = seed
        self._network = {
            "n_hidden": n_hidden,
            "n_layers": n_layers,
            "dropout": dropout,
            "n_batch_embedding": n_batch_embedding if use_batch_conditioning else 0,
        }
        self._setup = setup_args(self.registry)
        self._fit_result = None
        self._model_summary_string = (
            f"Distiller of the teacher {self.teacher.info.name!r}: n_latent {n_latent}, pca_method {pca_method!r}, "
            f"batch_key {self._setup['batch_key']!r}"
        )

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str,
        *,
        layer: str | None = None,
        labels_key: str | None = None,
        covariate_keys: Sequence[str] | None = None,
        allow_noninteger: bool = False,
    ) -> None:
        """Check a data set and register it.

        Parameters
        ----------
        adata
            Counts, cells x genes. Not a view.
        batch_key
            Column of ``adata.obs`` with the batch to remove; at least two batches.
        layer
            Layer with raw counts; ``None`` reads ``adata.X``, or ``layers["counts"]`` (with a warning) where ``X``
            holds no counts.
        labels_key
            Column with labels, such as cell types, that :meth:`map_query` transfers. Not used in training.
        covariate_keys
            Columns with biology that must survive the correction, such as condition or cell type. The teacher protects
            them and the decoder is given them. Text, categories, booleans and integers are levels; floats are linear.
        allow_noninteger
            Accept counts that were corrected before and are no longer integers.

        Raises
        ------
        MissingKeyError
            A column or layer does not exist; the message lists those that do.
        InvalidCountsError
            The layer does not hold counts, or a cell is empty.
        GeneMismatchError
            A gene name occurs twice.
        InvalidArgumentError
            Missing values in a column, or a single batch.

        Warns
        -----
        CellstillWarning
            Batch and a covariate cannot be told apart.
        """
        layer = find_counts(adata, layer)
        covariate_keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or ())
        check_setup(adata, batch_key, layer, labels_key, covariate_keys, allow_noninteger=allow_noninteger)
        register(
            cls,
            adata,
            layer=layer,
            categorical={"batch": batch_key} if labels_key is None else {"batch": batch_key, "labels": labels_key},
            setup_args={
                "batch_key": batch_key,
                "layer": layer,
                "labels_key": labels_key,
                "covariate_keys": covariate_keys,
                "allow_noninteger": allow_noninteger,
            },
        )

    def train(
        self,
        n_epochs_encoder: int = 100,
        n_epochs_decoder: int = 100,
        lr: float = 1e-3,
        *,
        batch_size: int = 256,
        train_size: float = 0.9,
        validation_size: float | None = None,
        early_stopping: bool = True,
        patience: int = 20,
        weight_decay: float = 1e-2,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        compile: CompileMode = "auto",
        progress: bool | OnEpoch | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> Distiller:
        """Run the teacher and train both phases.

        Parameters
        ----------
        n_epochs_encoder, n_epochs_decoder
            Most passes over the training cells in each phase.
        lr
            Learning rate of Adam. Larger learns faster until it no longer settles.
        batch_size
            Cells per step. Larger is faster per epoch and takes fewer steps.
        train_size, validation_size
            Shares of the cells to train on and to watch; the rest is left for testing
            (:meth:`get_teacher_agreement`). ``None`` watches all that is not trained on. The teacher sees all cells.
        early_stopping
            Stop a phase when its validation loss (without validation cells, its training loss) has not fallen for
            ``patience`` epochs. The best weights are kept either way.
        patience
            See ``early_stopping``. Larger trains longer.
        weight_decay
            Decay of the weights towards zero. Larger regularises more.
        accelerator
            ``"auto"`` (a CUDA device if there is one), ``"cpu"`` or ``"gpu"``.
        devices
            Devices to train on, each with a process that runs the same script (:func:`cellstill.train.fit` says how
            they are started). The first process runs PCA and teacher for all of them. All of them end with the same
            model; let the one where ``torch.distributed.get_rank() == 0`` save it.
        precision
            ``"32-true"``, or ``"bf16-mixed"``: matrix products in bfloat16, which hardware that has it does faster, for
            the last digits of the loss.
        compile
            Compile the loops of the CPU: ``True`` does, which takes some seconds, once on a machine; ``False`` does
            not; ``"auto"`` does where that pays, from 1e9 cells x genes x epochs on. Results agree to rounding.
        progress
            Show progress bars; ``None`` shows them in a terminal. A function is called after each epoch, as
            ``progress(phase, epoch, losses)`` with ``phase`` ``"encoder"`` or ``"decoder"``.
        checkpoint
            Folder for the state of training, written after each epoch.
        resume
            Go on from ``checkpoint``, if there is one: PCA and teacher are run again, training continues after the last
            complete epoch and ends with the same weights, bit for bit, as if it had not been interrupted.

        Returns
        -------
        The model itself.

        Raises
        ------
        TrainingError
            A loss or gradient is not finite; the message says where.
        InvalidArgumentError
            An argument is out of range, all cells are of one batch, or ``devices`` cannot be had.
        StoreError
            ``checkpoint`` holds a run already and ``resume`` is false, or one with other data or settings.
        """
        settings = TrainingSettings(
            n_epochs_encoder=n_epochs_encoder,
            n_epochs_decoder=n_epochs_decoder,
            lr=lr,
            batch_size=batch_size,
            train_size=train_size,
            validation_size=validation_size,
            patience=patience if early_stopping else None,
            weight_decay=weight_decay,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            compile=compile,
            progress=os.isatty(2) if progress is None else progress,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            resume=resume,
            seed=self.seed,
        )
        # Everything is read afresh: the data may be others than those the model was trained on before.
        adata = self._require_adata()
        genes, batch_names = adata.var_names.astype(str).tolist(), self._observed_batches()
        if len(batch_names) < 2:
            raise InvalidArgumentError(f"All cells are of the batch {batch_names[0]!r}: there is nothing to integrate.")
        cells = Cells.read(
            adata,
            self._setup["layer"],
            genes,
            self._setup["batch_key"],
            {name: code for code, name in enumerate(batch_names)},
            allow_noninteger=self._setup["allow_noninteger"],
        )
        warn_if_depths_differ(cells, self.pca_method)
        labels_key = self._setup["labels_key"]
        labels = None
        if labels_key is not None:
            labels = obs_column(adata.obs, labels_key, "labels_key").astype(str).tolist()
        self._fit_result, self.history_ = distill(
            cells,
            genes=genes,
            batch_names=batch_names,
            labels=labels,
            design=CovariateDesign.fit(adata.obs, self._setup["covariate_keys"]),
            obsm=adata.obsm,
            teacher=self.teacher,
            pca_method=self.pca_method,
            n_latent=self.n_latent,
            network=self._network,
            settings=settings,
        )
        self._set_trained()
        return self

    def save(self, dir_path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model to a folder: safetensors and JSON, no pickle, no counts.

        Parameters
        ----------
        dir_path
            Folder; it appears only when it is complete.
        overwrite
            Replace a folder that exists.

        Raises
        ------
        StoreError
            The folder exists, or cannot be written.
        """
        fitted = self._fitted()
        config = {
            "setup": self._setup,
            "teacher": self.teacher.to_dict(),
            "n_latent": self.n_latent,
            "pca_method": self.pca_method,
            "seed": self.seed,
            "network": self._network,
            "fitted": fitted.config(),
            "history": {phase: frame.to_dict(orient="list") for phase, frame in self.history_.items()},
        }
        save_store(dir_path, type(self).__name__, fitted.tensors(), config, overwrite=overwrite)

    @classmethod
    def load(cls, dir_path: str | os.PathLike[str], adata: AnnData | None = None) -> Distiller:
        """Read a model that :meth:`save` wrote.

        Parameters
        ----------
        dir_path
            Folder.
        adata
            Data to attach, such as those of training; genes are matched by name, in any order. Without it the model
            can map and decode any data given to its getters.

        Raises
        ------
        StoreError
            The folder is absent, damaged, of another class, or from a newer cellstill.
        GeneMismatchError
            ``adata`` has too few of the model's genes.
        InvalidArgumentError
            ``adata`` has batches that the model has not seen; map those with :meth:`map_query`.
        """
        tensors, config = load_store(dir_path, cls.__name__)
        try:
            fitted = Fitted.restore(tensors, config["fitted"], config["network"])
            setup = config["setup"]
            if config["pca_method"] == "scaled_residuals" and fitted.scaling is None:
                raise KeyError("scaling")
        except (KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{dir_path} is damaged ({error}). Save the model again.") from error
        registry = category_registry(cls.__name__, setup, {"batch": list(fitted.batch_codes)})
        if adata is not None:
            _register_known(cls, adata, setup, fitted, registry)
        model = cls(
            adata,
            teacher=get_teacher(config["teacher"]["name"], **config["teacher"]["settings"]),
            n_latent=config["n_latent"],
            pca_method=config["pca_method"],
            use_batch_conditioning=config["network"]["n_batch_embedding"] > 0,
            seed=config["seed"],
            **config["network"],
            _registry=registry if adata is None else None,
        )
        model._fit_result = fitted
        model.history_ = {
            phase: pd.DataFrame(columns).rename_axis(index="epoch") for phase, columns in config["history"].items()
        }
        model._set_trained()
        return model

    @staticmethod
    def load_registry(dir_path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read how a saved model's data were set up: its batches and the arguments of :meth:`setup_anndata`."""
        _, config = load_store(dir_path, Distiller.__name__)
        known = {"batch": [*config["fitted"]["batch_names"], *config["fitted"]["query_batches"]]}
        return category_registry(Distiller.__name__, config["setup"], known)


def _register_known(
    cls: type[Distiller], adata: AnnData, setup: dict[str, Any], fitted: Fitted, registry: dict[str, Any]
) -> None:
    """Register data with the batches of a trained model."""
    batch_key = setup["batch_key"]
    batches = obs_column(adata.obs, batch_key, "batch_key").astype(str)
    unseen = sorted(set(batches) - set(fitted.batch_codes))
    if unseen:
        raise InvalidArgumentError(
            f"adata.obs[{batch_key!r}] has batches that the model has not seen: {unseen}. Load the model without adata "
            "and map these cells with map_query."
        )
    Cells.read(
        adata,
        setup["layer"],
        fitted.genes,
        batch_key,
        fitted.batch_codes,
        allow_noninteger=setup["allow_noninteger"],
    )
    register(
        cls, adata, layer=setup["layer"], categorical={"batch": batch_key}, setup_args=setup, source_registry=registry
    )
