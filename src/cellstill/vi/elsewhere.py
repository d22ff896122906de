"""Arguments of scvi-tools that are called otherwise here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from cellstill.errors import InvalidArgumentError

P = ParamSpec("P")
R = TypeVar("R")

_NO_SHARE = "leave it out: of the posterior mean there is one, and nothing is averaged"
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
    "plan_config": "give its entries as arguments, such as lr=, weight_decay= and kl_warmup=",
    "trainer_kwargs": "give its entries as arguments",
    "trainer_config": "give its entries as arguments",
    "datasplitter_kwargs": "use train_size, validation_size and stratify_validation_key",
    "shuffle_set_split": "leave it out: cells are split at random, by the model's seed",
    "load_sparse_tensor": "leave it out: counts stay sparse",
    "check_val_every_n_epoch": "leave it out: validation cells are looked at after every epoch",
    "reduce_lr_on_plateau": "use lr, and early_stopping",
    "latent_distribution": "leave it out: the prior of z is normal",
    "n_epochs_kl_warmup": "use kl_warmup=0.5, a share of all steps, or a number of steps",
    "n_steps_kl_warmup": "use kl_warmup, a number of steps",
    "prefix": "give each model a folder of its own, such as dir_path='models/first'",
    "save_kwargs": "leave it out: models are stored as safetensors and JSON, and not by torch.save",
    "legacy_mudata_format": "leave it out: names of features are stored by modality, and load() reads them so",
    "compression": "write the data yourself, with adata.write_h5ad or mdata.write, and give them to load()",
    "datamodule": "give the data themselves, an AnnData or MuData",
    "dataloader": "give the data themselves, an AnnData or MuData",
    "data_loader_kwargs": "use batch_size",
    "silent": "leave it out: no bar is shown",
    "mc_samples": "leave it out: the posterior mean is known, and give_mean=False draws",
    "gene_list": "choose features of the result, which has them in the order of the data",
    "transform_batch": "use get_normalized_expression(transform_batch=...): counts are drawn as they were measured",
    "n_samples": "expression is that of the posterior mean; posterior_predictive_sample(n_samples=...) draws counts",
    "n_samples_overall": _NO_SHARE,
    "return_mean": _NO_SHARE,
    "weights": _NO_SHARE,
    "importance_weighting_kwargs": _NO_SHARE,
    "include_protein_background": "use include_background",
    "scale_protein": "use library_size",
    "protein_list": "use modality, and gene_list",
    "mode": "use how=PseudobulkConfig() or how=BayesianConfig(), of cellstill.de",
    "delta": "use how=BayesianConfig(delta=...), of cellstill.de",
    "fdr_target": "use how=BayesianConfig(fdr=...), of cellstill.de",
    "all_stats": "leave it out: the table has all of them",
    "batch_correction": "batches are in the design, and batch_keys=[] leaves them out",
    "batchid1": "use transform_batch, of both groups",
    "batchid2": "use transform_batch, of both groups",
    "filter_outlier_cells": "leave those cells out of idx1 and idx2",
    "pseudocounts": "leave it out: the table has shrunken fold changes",
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
