"""Arguments of scvi-tools that are called otherwise here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from cellstill.errors import InvalidArgumentError

P = ParamSpec("P")
R = TypeVar("R")

_FROZEN = "what the reference knows is frozen, and unfrozen=True trains all of it"

_INSTEAD = {
    "labels_key": "leave it out: no part of the model knows labels",
    "categorical_covariate_keys": (
        "name columns by what they are for, nn_conditioning_covariate_keys=[...] being the closest"
    ),
    "size_factor_key": "use library_size_key, for groups whose library sizes share a prior",
    "gene_likelihood": "use likelihood='negative_binomial' or 'poisson'",
    "dispersion": "set the data up with dispersion_key",
    "use_observed_lib_size": "use residual_library",
    "plan_kwargs": "give its entries as arguments, such as lr=, weight_decay= and kl_warmup=",
    "trainer_kwargs": "give its entries as arguments",
    "n_epochs_kl_warmup": "use kl_warmup=0.5, a share of all steps, or a number of steps",
    "n_steps_kl_warmup": "use kl_warmup, a number of steps",
    "prefix": "give each model a folder of its own, such as dir_path='models/first'",
    "save_kwargs": "leave it out: models are stored as safetensors and JSON, and not by torch.save",
    "legacy_mudata_format": "leave it out: names of features are stored by modality, and load() reads them so",
    "compression": "write the data yourself, with adata.write_h5ad or mdata.write, and give them to load()",
    "datamodule": "give the data themselves, an AnnData or MuData",
    "backup_url": "download the folder first, and load it from there",
    "allowed_classes_names_list": "load the model with the class that wrote it",
    "inplace_subset_query_vars": "leave it out: features are matched by name, and prepare_query_anndata changes data",
    "freeze_dropout": _FROZEN,
    "freeze_expression": _FROZEN,
    "freeze_decoder_first_layer": _FROZEN,
    "freeze_batchnorm_encoder": _FROZEN,
    "freeze_batchnorm_decoder": _FROZEN,
    "freeze_classifier": _FROZEN,
}


def names_what_to_use(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments that scvi-tools has, and the function has not, saying what takes their place."""
    moved = _INSTEAD.keys() - inspect.signature(function).parameters.keys()

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in moved & kwargs.keys():
            raise InvalidArgumentError(
                f"{name} is an argument of scvi-tools, not of {function.__name__} here: {_INSTEAD[name]}."
            )
        return function(*args, **kwargs)

    return checked
