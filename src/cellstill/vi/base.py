"""What both regularised models are: registered data, a torch module, training, and a safe store."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import torch

from cellstill._compat.scvi import MINIFIED, MinifiableModel, category_registry, minified_type, register, setup_record
from cellstill.data.annotations import complete_obs, gather_obs, is_mudata
from cellstill.data.order import order_of
from cellstill.errors import (
    InvalidArgumentError,
    NotTrainedError,
    StoreError,
    above_zero,
    check_key,
    whole_number,
)
from cellstill.io.anndata import read_anndata, read_mudata
from cellstill.io.store import array_to_names, load_store, names_to_array, save_store
from cellstill.nn.compiled import CompileMode
from cellstill.train.devices import chosen_device
from cellstill.train.progress import OnEpoch
from cellstill.vi.arguments import setup_arguments
from cellstill.vi.cells import Cells, code_of
from cellstill.vi.collapse import warn_if_collapsed
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.containers import check_whole
from cellstill.vi.covariates import CovariateKeys
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.expected_fit import fit_expected_libraries
from cellstill.vi.growth import Rows, freeze, holding
from cellstill.vi.minified import read_minified
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.rates import Rates, rates_of_modalities
from cellstill.vi.roles import ROLES
from cellstill.vi.start import start_from_data
from cellstill.vi.training import TrainingSettings, continued, default_epochs, ends_with, split, train_module

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_log = logging.getLogger("cellstill")

_ADATA, _MDATA = "adata.h5ad", "mdata.h5mu"
"""Data beside a saved model, under the names that scvi-tools uses."""


class RegularizedModel(MinifiableModel):
    """The state of a regularised model, and the way to it for everything built on it."""

    module: RegularizedVAE
    history_: dict[str, pd.DataFrame]

    def _start(
        self,
        data: AnnData | MuData | None,
        registry: dict[str, Any] | None,
        seed: int,
        restored: Mapping[str, Any] | None,
    ) -> Cells | None:
        """Take over registered data; returns them read, unless the model is restored from a store."""
        seed = whole_number("seed", seed, least=0)
        super().__init__(data, registry)
        self.seed = seed
        self._known_rows: Rows | None = None
        self._setup = setup_record(self.registry)
        self._keys = CovariateKeys.from_dict(self._setup["keys"])
        self._layers: dict[str, str | None] = dict(self._setup["layers"])
        if restored is not None:
            self._features = {name: list(names) for name, names in restored["features"].items()}
            self._categories = {column: list(names) for column, names in restored["categories"].items()}
            self._scales = {column: (float(a), float(b)) for column, (a, b) in restored["scales"].items()}
            return None
        if data is None:
            raise InvalidArgumentError(f"{type(self).__name__} needs data: register them first, and pass them.")
        cells = Cells.read(data, self._keys, layers=self._layers, allow_noninteger=self._setup["allow_noninteger"])
        self._features = {name: list(names) for name, names in cells.features.items()}
        self._categories = {column: list(names) for column, names in cells.categories.items()}
        self._scales = dict(cells.scales)
        return cells

    def _vae_config(
        self, modalities: Mapping[str, ModalityConfig], *, use_batch_in_decoder: bool, **settings: Any
    ) -> VAEConfig:
        """Join modalities, covariates and settings."""
        keys = self._keys
        keys.check_effects(modalities)
        conditioning = keys.conditioning
        if use_batch_in_decoder:
            if keys.batch is None:
                raise InvalidArgumentError(
                    "use_batch_in_decoder=True needs a batch_key. Set the data up with one, or name the columns in "
                    "nn_conditioning_covariate_keys."
                )
            conditioning = tuple(dict.fromkeys([*conditioning, keys.batch]))
        return VAEConfig(
            modalities=modalities,
            categories={code_of(column): len(names) for column, names in self._categories.items()},
            ambient=tuple(map(code_of, keys.ambient)),
            conditioning=tuple(map(code_of, conditioning)),
            feature_scaling=tuple(map(code_of, keys.feature_scaling)),
            encoder=tuple(map(code_of, keys.encoder)),
            dispersion=None if keys.dispersion is None else code_of(keys.dispersion),
            library=None if keys.library_size is None else code_of(keys.library_size),
            n_continuous=len(keys.continuous),
            **settings,
        )

    def _build(
        self,
        config: VAEConfig,
        cells: Cells | None,
        ambient_rate: Rates = None,
        reference: RegularizedVAE | None = None,
    ) -> None:
        """Make the module, and start it from data."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module = RegularizedVAE(config)
            if cells is not None:
                categories = {code_of(column): names for column, names in self._categories.items()}
                start_from_data(
                    *(self.module, cells.counts, cells.per_cell, cells.present, np.arange(len(cells))),
                    categories=categories,
                    ambient_rates=rates_of_modalities(
                        ambient_rate, config, list(cells.counts), categories, named="roles" in self._setup
                    ),
                    seed=self.seed,
                    reference=reference,
                )
        self.module.eval()
        shown = ", ".join(
            f"{name}: n_hidden {one.n_hidden}, n_latent {one.n_latent}" for name, one in config.modalities.items()
        )
        self._model_summary_string = f"{type(self).__name__} ({shown})"

    def _modality_lr(self, lr: float, given: Mapping[str, float]) -> dict[str, float]:
        """Learning rates of the modalities that have one other than ``lr``: the one given, or that of their role."""
        roles = self._setup.get("roles", {}) if self._known_rows is None else {}
        rates = {name: lr * ROLES[role].relative_lr for name, role in roles.items()} | dict(given)
        return {name: rate for name, rate in rates.items() if rate != lr}

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return next(self.module.parameters()).device

    def to_device(self, device: str | int | torch.device) -> None:
        """Move the module to a device, such as ``"cuda:0"``."""
        self.module.to(device if isinstance(device, torch.device) else torch.device(device))

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray | dict[str, np.ndarray]:
        """Names of the model's features, in its order, whether it has data or not.

        Parameters
        ----------
        legacy_mudata_format
            Join those of all modalities.

        Returns
        -------
        Names, or for models of MuData names by modality.
        """
        names = {name: np.array(features, dtype=object) for name, features in self._features.items()}
        if "roles" in self._setup and not legacy_mudata_format:
            return names
        return np.concatenate(list(names.values()))

    @property
    def modality_names(self) -> list[str]:
        """Names of the modalities, sorted."""
        return sorted(self._layers)

    @names_what_to_use
    def train(
        self,
        max_epochs: int | None = None,
        *,
        lr: float = 1e-3,
        modality_lr: Mapping[str, float] | None = None,
        batch_size: int | None = 128,
        train_size: float | None = 0.9,
        validation_size: float | None = None,
        stratify_validation_key: str | None = None,
        early_stopping: bool = True,
        early_stopping_patience: int = 45,
        early_stopping_min_delta_per_feature: float = 2e-4,
        kl_warmup: int | float | None = None,
        weight_decay: float = 0.0,
        gradient_clip: float | None = None,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        compile: CompileMode = "auto",
        progress: bool | OnEpoch | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> Self:
        """Train the model, or go on training it: ``history_`` is appended to, with epochs counted on.

        Parameters
        ----------
        max_epochs
            Most passes over the training cells; ``None`` is 400, or fewer from 20,000 cells on (8 million cells shown).
        lr
            Learning rate of Adam. Larger learns faster until it no longer settles.
        modality_lr
            Learning rates of the parameters that belong to one modality alone, by its name; 0 leaves them as they are.
            Modalities that are not named learn at ``lr``, those of the role ``"atac"`` at a fifth of it: of many
            features that are each seldom seen, cells are otherwise learned by heart. What several modalities share
            learns at ``lr``, and so does what a query adds.
        batch_size
            Cells per step. Larger is faster per epoch and takes fewer steps. ``None`` is 128.
        train_size, validation_size
            Shares of the cells to train on and to watch; ``None`` is 0.9, and all that is not trained on.
        stratify_validation_key
            Column that names groups of cells, such as samples, each of which is split in these shares.
        early_stopping
            Stop when the watched loss has not fallen for ``early_stopping_patience`` epochs. Without validation cells
            the training loss is watched, which the log says. The best weights are kept either way.
        early_stopping_patience
            Larger trains longer.
        early_stopping_min_delta_per_feature
            Fall of the loss, per feature, that counts as one; 0 counts any. Larger stops sooner.
        kl_warmup
            Steps (int) or share of all steps (float) over which the weight of the divergence of z rises to 1; ``None``
            gives it its full weight from the start, but for models with ``hidden_sparsity``, which need a warm-up and
            get one of a third. Longer lets the model explain the counts first, and large networks learn cells by
            heart. What is given is kept, also where it leaves little of the training at full weight. Epochs before its
            end are not watched for early stopping.
        weight_decay
            Decay of the weights towards zero. Larger regularises more.
        gradient_clip
            Largest norm of a step's gradient; ``None`` does not clip.
        accelerator, devices, precision, compile, progress, checkpoint, resume
            See :func:`cellstill.train.fit` and :meth:`cellstill.Distiller.train`; ``checkpoint`` is a file.

        Returns
        -------
        The model itself.

        Raises
        ------
        InvalidArgumentError
            An argument is out of range.
        TrainingError
            A loss or gradient is not finite; the message says where.
        StoreError
            ``checkpoint`` exists and ``resume`` is false, or holds another run.

        Warns
        -----
        CellstillWarning
            After 300 steps or more, the latent tells next to nothing of the cells.
        """
        cells = self._cells()
        if self._known_rows == {}:
            raise InvalidArgumentError(
                "The query has no new category that anything is learned for: the model is ready as it is. To go on "
                "training all of it, load_query_data(..., unfrozen=True)."
            )
        if max_epochs is not None:
            max_epochs = whole_number("max_epochs", max_epochs, least=0)
        batch_size = whole_number("batch_size", 128 if batch_size is None else batch_size, least=1)
        train_size = 0.9 if train_size is None else train_size
        lr = above_zero("lr", lr)
        if not weight_decay >= 0:
            raise InvalidArgumentError(f"weight_decay={weight_decay} is below 0.")
        if gradient_clip is not None and not gradient_clip > 0:
            raise InvalidArgumentError(f"gradient_clip={gradient_clip} has to be above 0, or None not to clip.")
        patience = whole_number("early_stopping_patience", early_stopping_patience, least=0)
        for name, value in (modality_lr or {}).items():
            check_key("modality_lr", name, "modalities", self.modality_names)
            if not value >= 0:
                raise InvalidArgumentError(f"modality_lr[{name!r}]={value} is below 0.")
        if early_stopping_min_delta_per_feature < 0:
            raise InvalidArgumentError(
                f"early_stopping_min_delta_per_feature={early_stopping_min_delta_per_feature} is below 0."
            )
        groups = None if stratify_validation_key is None else self._column_codes(stratify_validation_key)
        parts = split(len(cells), train_size, validation_size, groups, self.seed)
        if early_stopping and not len(parts[1]):
            _log.info("There are no validation cells: early stopping watches the training loss.")
        n_features = sum(map(len, self._features.values()))
        settings = TrainingSettings(
            max_epochs=default_epochs(len(cells)) if max_epochs is None else max_epochs,
            lr=lr,
            modality_lr=self._modality_lr(lr, modality_lr or {}),
            weight_decay=weight_decay,
            batch_size=batch_size,
            kl_warmup=1 / 3 if kl_warmup is None and self.module.config.hidden_sparsity else kl_warmup,
            patience=patience if early_stopping else None,
            min_delta=early_stopping_min_delta_per_feature * n_features,
            gradient_clip=gradient_clip,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            compile=compile,
            progress=os.isatty(2) if progress is None else progress,
            checkpoint=checkpoint,
            resume=resume,
            seed=self.seed,
        )
        with holding(self.module, self._known_rows):
            run = train_module(self.module, cells, parts[0], parts[1], settings)
        history = self.history_ or {}
        self.history_ = history if resume and ends_with(history, run) else continued(history, run)
        if self._known_rows is None:
            if len(self.modality_names) > 1:
                fit_expected_libraries(self.module, cells[parts[0]])
            n_epochs = max(map(len, self.history_.values()), default=0)
            warn_if_collapsed(self.module, cells, parts[0], n_epochs * -(-len(parts[0]) // batch_size))
        self.train_indices_, self.validation_indices_, self.test_indices_ = parts
        self.is_trained_ = True
        return self

    @names_what_to_use
    def save(self, dir_path: str | os.PathLike[str], *, overwrite: bool = False, save_anndata: bool = False) -> None:
        """Write the model to a folder: safetensors and JSON, no pickle, and no counts unless they are asked for.

        Parameters
        ----------
        dir_path
            Folder; it appears only when it is complete.
        overwrite
            Replace a folder that exists. One with data is not replaced by one without.
        save_anndata
            Write the model's data into the folder too, as ``adata.h5ad`` or ``mdata.h5mu``; :meth:`load` reads them.

        Raises
        ------
        StoreError
            The folder exists, or cannot be written.
        InvalidArgumentError
            ``save_anndata=True``, and the model has no data.
        """
        beside = {}
        if save_anndata:
            data = self._require_data()
            beside = {_MDATA if is_mudata(data) else _ADATA: lambda path: _write_data(data, path)}
        tensors = {f"module.{name}": value.cpu().numpy() for name, value in self.module.state_dict().items()}
        for name, names in self._features.items():
            tensors[f"features.{name}"] = names_to_array(names)
        if self.is_trained_:
            for part in ("train", "validation", "test"):
                tensors[f"split.{part}"] = getattr(self, f"{part}_indices_")
        config = {
            "setup": self._setup,
            "module": self.module.config.to_dict(),
            "categories": self._categories,
            "scales": self._scales,
            "seed": self.seed,
            "trained": self.is_trained_,
            "known_rows": self._known_rows,
            "history": {name: frame[name].tolist() for name, frame in (self.history_ or {}).items()},
            "epochs": {name: frame.index.tolist() for name, frame in (self.history_ or {}).items()},
        }
        save_store(dir_path, type(self).__name__, tensors, config, overwrite=overwrite, beside=beside)

    @classmethod
    def _load(
        cls,
        dir_path: str | os.PathLike[str],
        data: AnnData | MuData | Literal[False] | None,
        accelerator: str = "cpu",
        device: int | str = "auto",
    ) -> Self:
        place = chosen_device(accelerator, device)
        tensors, config = load_store(dir_path, cls.__name__)
        if data is None:
            data = _read_data(Path(dir_path))
        elif data is False:
            data = None
        try:
            keys = CovariateKeys.from_dict(config["setup"]["keys"])
            restored = {
                "features": _group(tensors, "features."),
                "categories": config["categories"],
                "scales": config["scales"],
            }
            restored["features"] = {name: array_to_names(array) for name, array in restored["features"].items()}
            module = VAEConfig.from_dict(config["module"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{dir_path} is damaged ({error}). Save the model again.") from error
        if data is not None:
            check_whole(data, "mdata" if "roles" in config["setup"] else "adata")
        registry = cls._registry_of(config["setup"], config["categories"])
        model = cls.__new__(cls)
        model._start(None, registry, config["seed"], restored)
        model._build(module, None)
        state = {name: torch.from_numpy(array) for name, array in _group(tensors, "module.").items()}
        try:
            model.module.load_state_dict(state)
        except RuntimeError as error:
            raise StoreError(f"{dir_path} is damaged ({error}). Save the model again.") from error
        for part, cells in _group(tensors, "split.").items():
            setattr(model, f"{part}_indices_", cells)
        epochs = config.get("epochs", {})  # models saved before they were kept were trained once
        model.history_ = {
            name: pd.DataFrame({name: values}, index=epochs.get(name)).rename_axis(index="epoch")
            for name, values in config["history"].items()
        }
        model.is_trained_ = config["trained"]
        model._take_only_new(config.get("known_rows"))
        if data is not None:
            model._cells(data, counts=False)  # says what does not fit before anything is written into them
            cls._register(data, keys, config["setup"], registry)
            model._attach_data(data)
        model.to_device(place)
        return model

    @classmethod
    @names_what_to_use
    def load_registry(cls, dir_path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read how a saved model's data were set up: categories, and the arguments of the set-up."""
        config = load_store(dir_path, cls.__name__)[1]
        return cls._registry_of(config["setup"], config["categories"])

    @classmethod
    def _registry_of(cls, setup: dict[str, Any], categories: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        registered = CovariateKeys.from_dict(setup["keys"]).registered
        known = {key: categories[column] for key, column in registered.items()}
        arguments, mudata = setup_arguments(setup), "roles" in setup
        return category_registry(cls.__name__, arguments, known, columns=registered, record=setup, mudata=mudata)

    @classmethod
    def _register(
        cls,
        data: AnnData | MuData,
        keys: CovariateKeys,
        setup: dict[str, Any],
        registry: dict[str, Any],
        *,
        extend: bool = False,
    ) -> None:
        """Register data with the categories of a model, and those they add with ``extend``."""
        layers = setup["layers"]
        where: dict[str, Any]
        if is_mudata(data):
            # Cells may lack modalities, and so may all of them.
            where = {"layers": {name: layer for name, layer in layers.items() if name in data.mod}}
            complete_obs(data, keys.used)
        else:
            where = {"layer": layers[next(iter(layers))]}
        register(
            cls,
            data,
            **where,
            categorical=keys.registered,
            continuous=keys.continuous,
            setup_args=setup_arguments(setup),
            record=setup,
            source_registry=registry,
            extend_categories=extend,
        )

    def _take_only_new(self, known_rows: Rows | None) -> None:
        """Train only what follows the known rows, if there are any."""
        self._known_rows = known_rows
        if known_rows is not None:
            freeze(self.module, known_rows)

    def _require_data(self) -> AnnData | MuData:
        if self.adata is None:
            name = type(self).__name__
            raise InvalidArgumentError(
                f"The model was loaded without data. Load it with some: {name}.load(path, data)."
            )
        return self.adata

    def _require_trained(self) -> None:
        if not self.is_trained_:
            raise NotTrainedError("The model is not trained. Call train() first.")

    def _cells(self, data: AnnData | MuData | None = None, *, covariates: bool = True, counts: bool = True) -> Cells:
        """Read data; checked each time, because users normalise their data in place between two calls.

        Minified data serve where ``counts`` are not needed.
        """
        given = self._require_data() if data is None else data
        # z depends on no covariate but those that encoders are told.
        keys = self._keys if covariates else CovariateKeys(encoder=self._keys.encoder)
        kind = minified_type(given)
        if kind is not None and not counts:
            model = (self._features, self._categories, self._scales, self.module.config.columns_of_z)
            return read_minified(given, keys, *model)
        if kind == MINIFIED:
            name = type(self).__name__
            raise InvalidArgumentError(
                "This needs counts, and the data are minified: they hold posteriors instead. Give cells with counts to "
                f"the method, or to the model: {name}.load(path, data)."
            )
        return Cells.read(
            given,
            keys,
            layers=self._layers,
            features=self._features,
            categories=self._categories,
            scales=self._scales,
            allow_missing_modalities=len(self._layers) > 1,
            allow_noninteger=self._setup["allow_noninteger"],
        )

    def _order(self, data: AnnData | MuData | None, name: str, *, named: bool = False) -> np.ndarray | slice:
        """Positions of a modality's features in the order of data; ``None`` is the model's own."""
        given = self._require_data() if data is None else data
        return order_of(given, self._features[name], name, named=named)

    def _column_codes(self, column: str) -> np.ndarray:
        values = gather_obs(self._require_data(), {column: "stratify_validation_key"})[column]
        return pd.factorize(values.astype(str))[0]


def _write_data(data: AnnData | MuData, path: Path) -> None:
    if is_mudata(data):
        data.write(path)
    else:
        # Columns of text stay what they are, here and in the file.
        data.write_h5ad(path, convert_strings_to_categoricals=False)


def _read_data(folder: Path) -> AnnData | MuData | None:
    """Data that were saved with a model."""
    if (folder / _ADATA).is_file():
        return read_anndata(folder / _ADATA)
    return read_mudata(folder / _MDATA) if (folder / _MDATA).is_file() else None


def _group(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
