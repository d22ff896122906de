"""Messages of the library, in the words of the command line."""

from __future__ import annotations

import re

_OPTIONS = {
    "accelerator": "--accelerator",
    "allow_noninteger": "--allow-noninteger",
    "ambient_covariate_keys": "--ambient-key",
    "ambient_rate": "--ambient-rate",
    "baseline": "--baseline",
    "batch_key": "--batch-key",
    "batch_size": "--batch-size",
    "borrow": "--borrow",
    "continuous_covariate_keys": "--continuous-key",
    "covariate_keys": "--covariate-key",
    "dispersion_key": "--dispersion-key",
    "donor_key": "--donor-key",
    "encoder_covariate_keys": "--encoder-key",
    "evaluators": "--evaluator",
    "fdr": "--fdr",
    "feature_scaling_covariate_keys": "--feature-scaling-key",
    "group1": "--group1",
    "group2": "--group2",
    "groupby": "--groupby",
    "labels_key": "--label-key",
    "layer": "--layer",
    "lfc_threshold": "--lfc-threshold",
    "library_size_key": "--library-size-key",
    "max_epochs": "--max-epochs",
    "method": "--method",
    "min_cells_per_sample": "--min-cells",
    "min_counts_per_sample": "--min-counts",
    "min_total_count": "--min-total-count",
    "modalities": "--modality",
    "modality_roles": "--role",
    "n_hidden": "--n-hidden",
    "n_latent": "--n-latent",
    "n_top_genes": "--n-top-genes",
    "nn_conditioning_covariate_keys": "--conditioning-key",
    "obsm_key": "--obsm-key",
    "overwrite": "--overwrite",
    "pca_method": "--pca-method",
    "sample_key": "--sample-key",
    "samples_per_class": "--spc",
    "shrink_lfc": "--shrink-lfc",
    "target_batch": "--target-batch",
    "teacher": "--teacher",
    "within": "--within",
}
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|\([^)]*\)|\.\.\.|[\w.]+"""
_ASSIGNED = re.compile(rf"\b({'|'.join(_OPTIONS)})=({_VALUE})")
_NAMED = re.compile(rf"(?<![\w'\"\[.-])({'|'.join(name for name in _OPTIONS if '_' in name)})(?=[:;, .])")
_PHRASES = {
    "batch_key=None, or batch_keys=[] of models of vi, or fewer covariate_keys": (
        "no --batch-key, or fewer --covariate-key"
    ),
    "PseudobulkConfig(method='deseq2')": "--method deseq2",
    "group1 and group2 are both": "--group1 and --group2 are both",
    "sample_key and groupby are both": "--sample-key and --groupby are both",
    "within and groupby are both": "--within and --groupby are both",
    "within and sample_key are both": "--within and --sample-key are both",
    "layer=None (adata.X)": "adata.X (leave --layer out)",
    "overwrite=True (--overwrite)": "--overwrite",
    "if you know it: ambient_rate=.": "if you know it: --ambient-rate RATE.",
    "or None for all genes": "or 0 for all genes",
    "or give another path for a new run.": "or start afresh: --overwrite without --resume.",
    "choose it with layer=None": "leave --layer out",
    "Name those, as tuples, or": "Name those, as category,category=RATE, or",
    "Leave it out, or set background of the modality to 'profile'.": "Leave it out.",
    "Raise max_iter of HarmonyTeacher to go on": "To go on, raise it: --teacher-setting max_iter=30",
}

_SETTING = re.compile(r"setting of teacher '(\w+)'='(\w+)'")
_WANTED = re.compile(r"\b(modality_roles|modalities)=\{'([^']*)': \.\.\.\}")
_OF_MODALITY = re.compile(r"\b(modality_roles|modalities)\['([^']*)'\]='([^']*)'")
_PLACES = {"modality_roles": "ROLE", "modalities": "LAYER"}
_KEY = r"'[^']*'|\([^)]*\)"
_RATE_OF = re.compile(rf"\bambient_rate\[({_KEY})\](?:\[({_KEY})\])?(=?)")
_RATE_WANTED = re.compile(rf"\bambient_rate=\{{({_KEY}): (?:\{{({_KEY}): )?([\d.]+)\}}+")


def in_options(message: str) -> str:
    """Name options instead of Python arguments: ``batch_key='donor'`` becomes ``--batch-key donor``."""
    for phrase, words in _PHRASES.items():
        message = message.replace(phrase, words)
    message = _SETTING.sub(r"--teacher-setting \2 of \1", message)
    message = _OF_MODALITY.sub(lambda match: f"{_OPTIONS[match[1]]} {match[2]}={match[3]}", message)
    message = _WANTED.sub(lambda match: f"{_OPTIONS[match[1]]} {match[2]}={_PLACES[match[1]]}", message)
    message = _RATE_OF.sub(lambda match: _rate(match) + match[3], message)
    message = _RATE_WANTED.sub(lambda match: f"{_rate(match)}={match[3]}", message)
    return _NAMED.sub(lambda match: _OPTIONS[match[1]], _ASSIGNED.sub(_assigned, message))


def _assigned(match: re.Match[str]) -> str:
    option, value = _OPTIONS[match[1]], match[2]
    if value == "True":
        return option
    if value == "...":
        return f"{option} NAME"
    if value[0] in "[(":
        # An option for each of several.
        values = re.findall(r"""'[^']*'|"[^"]*"|[^\[\](),\s]+""", value)
        return " ".join(f"{option} {_plain(each)}" for each in values) or option
    return f"{option} {_plain(value)}"


def _rate(match: re.Match[str]) -> str:
    """The option of a modality or category, or of one of the other."""
    names = [",".join(_plain(each) for each in re.findall(r"'[^']*'", key)) for key in match.groups()[:2] if key]
    return f"--ambient-rate {':'.join(names)}"


def _plain(value: str) -> str:
    """A value as it is typed: without quotes, where a shell needs none."""
    plain = value[1:-1] if value[0] in "'\"" else value
    return plain if re.fullmatch(r"[\w.]+", plain) else value
