"""The arguments of a set-up, which users of scvi-tools look for in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellstill.vi.covariates import CovariateKeys


def setup_arguments(setup: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``setup_anndata`` or ``setup_mudata``, from what a model keeps of them.

    Data that are set up with these are set up alike. Columns of a purpose are a list; feature scaling that follows the
    conditioning keys is ``None``.
    """
    keys, roles, layers = CovariateKeys.from_dict(setup["keys"]), setup.get("roles"), dict(setup["layers"])
    data: dict[str, Any]
    if roles is None:
        data = {"layer": next(iter(layers.values()))}
    else:
        data = {"modalities": layers, "modality_roles": dict(roles)}
    if keys.batch is None:
        purposes = {
            "ambient_covariate_keys": list(keys.ambient),
            "dispersion_key": keys.dispersion,
            "library_size_key": keys.library_size,
        }
    else:
        purposes = dict.fromkeys(("ambient_covariate_keys", "dispersion_key", "library_size_key"))
    # An empty list is none of them, None those of the conditioning.
    follows = bool(keys.feature_scaling) and not keys.scaling_named
    return {
        **data,
        "batch_key": keys.batch,
        **purposes,
        "nn_conditioning_covariate_keys": list(keys.conditioning),
        "feature_scaling_covariate_keys": None if follows else list(keys.feature_scaling),
        "encoder_covariate_keys": list(keys.encoder),
        "continuous_covariate_keys": list(keys.continuous),
        "library_key": keys.library_key,
        "dataset_key": keys.dataset_key,
        "technical_covariate_keys": list(keys.technical),
        "allow_noninteger": setup["allow_noninteger"],
    }
