from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from cellstill.cli import _wording
from cellstill.cli.app import app


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("batch_key='donor' is not in adata.obs.", "--batch-key donor is not in adata.obs."),
        ("batch_key='my donor' is not", "--batch-key 'my donor' is not"),
        ("consider pca_method='pearson_residuals'.", "consider --pca-method pearson_residuals."),
        ("choose with layer=...", "choose with --layer NAME"),
        ("adata.X looks like counts: choose it with layer=None.", "adata.X looks like counts: leave --layer out."),
        ("These do: layer=None (adata.X).", "These do: adata.X (leave --layer out)."),
        ("Pass allow_noninteger=True only", "Pass --allow-noninteger only"),
        ("pass overwrite=True (--overwrite) to", "pass --overwrite to"),
        ("n_latent=50 components", "--n-latent 50 components"),
        ("covariate_keys: obs['a'] has", "--covariate-key: obs['a'] has"),
        ("covariate_keys=['a', 'b']: the teacher", "--covariate-key a --covariate-key b: the teacher"),
        (
            "add nn_conditioning_covariate_keys=['batch'], and feature_scaling_covariate_keys=['my batch'] to",
            "add --conditioning-key batch, and --feature-scaling-key 'my batch' to",
        ),
        (
            "nn_conditioning_covariate_keys=\"['a']\" is not in adata.obs.",
            "--conditioning-key \"['a']\" is not in adata.obs.",
        ),
        ("with ambient_covariate_keys=('batch',).", "with --ambient-key batch."),
        ("evaluators=[] has to name at least one", "--evaluator has to name at least one"),
        ("setting of teacher 'harmony'='foo' is not known", "--teacher-setting foo of harmony is not known"),
        (
            "The teacher 'latent' is a layer of adata.layers['layer']",
            "The teacher 'latent' is a layer of adata.layers['layer']",
        ),
        ("adata.obs['batch_key'] is", "adata.obs['batch_key'] is"),
        ("modality_roles['gex']='dna' is not known", "--role gex=dna is not known"),
        ("Say so: modality_roles={'gex': ...}, with one of", "Say so: --role gex=ROLE, with one of"),
        ("stands for ambient_covariate_keys, dispersion_key, so", "stands for --ambient-key, --dispersion-key, so"),
        ("donor_key has 2 donors (a, b); 3 at least", "--donor-key has 2 donors (a, b); 3 at least"),
        ("fewer than samples_per_class=10 cells", "fewer than --spc 10 cells"),
        (
            "n_top_genes=1 has to be at least 2, or None for all genes.",
            "--n-top-genes 1 has to be at least 2, or 0 for all genes.",
        ),
        ("sample_key='donr' is not in adata.obs.", "--sample-key donr is not in adata.obs."),
        ("Check sample_key; or lower min_cells_per_sample.", "Check --sample-key; or lower --min-cells."),
        ("within and sample_key are both 'a': inside", "--within and --sample-key are both 'a': inside"),
        ("or lower min_total_count.", "or lower --min-total-count."),
        ("group1 and group2 are both 'a': name", "--group1 and --group2 are both 'a': name"),
        ("sample_key and groupby are both 'a': each", "--sample-key and --groupby are both 'a': each"),
        (
            "leave 'b' out (batch_key=None, or batch_keys=[] of models of vi, or fewer covariate_keys) and",
            "leave 'b' out (no --batch-key, or fewer --covariate-key) and",
        ),
        ("PseudobulkConfig(method='deseq2') needs the package", "--method deseq2 needs the package"),
        (
            "covariate_keys=('a', 'b') needs a model, which method='wilcoxon' does not have.",
            "--covariate-key a --covariate-key b needs a model, which --method wilcoxon does not have.",
        ),
        ("set lfc_threshold=0.", "set --lfc-threshold 0."),
        ("within='cell_type': none of", "--within cell_type: none of"),
        ("encoder_covariate_keys=['a']: encoders", "--encoder-key a: encoders"),
        ("Name those, as tuples, or give", "Name those, as category,category=RATE, or give"),
        ("if you know it: ambient_rate=.", "if you know it: --ambient-rate RATE."),
        ("ambient_rate=1.5 is no", "--ambient-rate 1.5 is no"),
        ("ambient_rate['s 1']=1.5 is no", "--ambient-rate 's 1'=1.5 is no"),
        ("ambient_rate['rna'][('s1', 'x')]=1.5 is no", "--ambient-rate rna:s1,x=1.5 is no"),
        ("ambient_rate['rna'] is of no use", "--ambient-rate rna is of no use"),
        ("State it, ambient_rate={'new': 0.1}, or", "State it, --ambient-rate new=0.1, or"),
        ("ambient_rate={'rna': {('s1', 'x'): 0.1}}.", "--ambient-rate rna:s1,x=0.1."),
        ("modalities['rna']='counts' is not in", "--modality rna=counts is not in"),
        ("holds counts: modalities={'rna': ...} (layers", "holds counts: --modality rna=LAYER (layers"),
    ],
)
def test_python_arguments_become_options(message, words):
    assert _wording.in_options(message) == words


def test_every_option_named_exists():
    helps = (
        CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for command in ("integrate", "vi", "condense", "de")
    )
    text = re.sub(r"\s+", " ", " ".join(helps))
    for option in [*_wording._OPTIONS.values(), "--teacher-setting"]:
        assert f" {option} " in text
