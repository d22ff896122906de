from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
import pytest

from cellstill.condense import GeneratorConfig, LatentConfig, MatchingConfig
from cellstill.condense.pool import WIDTHS
from cellstill.errors import InvalidArgumentError

POSITIVE = "has to be an integer of at least 1."
COUNT = "has to be an integer of at least 0."
ABOVE = "has to be a number above 0."
WEIGHT = "has to be a number of at least 0."
SHARE = "has to be at least 0 and below 1."
POOL = f"has to name some of {tuple(WIDTHS)}."

RULES: dict[type, dict[str, tuple[str, ...]]] = {
    LatentConfig: {
        POSITIVE: ("n_latent", "n_hidden", "batch_size"),
        COUNT: ("max_epochs", "patience"),
        ABOVE: ("lr",),
        WEIGHT: ("expression_weight", "knowledge_weight", "class_weight"),
        SHARE: ("dropout",),
    },
    GeneratorConfig: {
        POSITIVE: ("n_hidden", "n_blocks", "batch_size", "n_teacher_steps"),
        COUNT: ("n_steps", "n_tuning_steps"),
        ABOVE: ("lr",),
        WEIGHT: ("distribution_weight", "teacher_weight", "class_weight", "count_weight"),
        SHARE: ("kept_noise", "label_dropout", "decay"),
    },
    MatchingConfig: {
        POSITIVE: ("real_per_class",),
        COUNT: ("n_steps", "inner_steps"),
        ABOVE: ("lr",),
        WEIGHT: ("gradient_weight", "distribution_weight", "outcome_weight", "class_weight", "shell_weight"),
        POOL: ("pool",),
    },
}
NO_NUMBER = ("1", [1], True, float("nan"))
REFUSED = {
    POSITIVE: (0, -3, 1.5, None, *NO_NUMBER),
    COUNT: (-1, -5, 1.5, float("inf"), *NO_NUMBER),
    ABOVE: (0, -1, float("inf"), None, *NO_NUMBER),
    WEIGHT: (-0.1, float("inf"), None, *NO_NUMBER),
    SHARE: (-0.1, 1, 1.5, 2, None, *NO_NUMBER),
    POOL: ((), "linear", ("mlp_64", "resnet"), ("mlp_64", ["linear"]), {"linear"}, None, 5),
}
KEPT = {
    POSITIVE: (1, np.int64(7)),
    COUNT: (0, np.int32(7)),
    ABOVE: (1e-9, 2, np.float32(0.5)),
    WEIGHT: (0, 0.0, np.float64(3.5)),
    SHARE: (0, 0.999, np.float32(0.5)),
    POOL: (["linear"], ("mlp_64", "linear")),
}


def cases(values: dict[str, tuple]) -> list:
    return [
        pytest.param(kind, name, rule, value, id=f"{kind.__name__}-{name}-{value!r}")
        for kind, rules in RULES.items()
        for rule, names in rules.items()
        for name in names
        for value in values[rule]
    ]


@pytest.mark.parametrize("kind", RULES)
def test_every_setting_has_a_rule(kind):
    ruled = [name for names in RULES[kind].values() for name in names]
    assert sorted(ruled) == sorted(field.name for field in fields(kind))


@pytest.mark.parametrize(("kind", "name", "rule", "value"), cases(REFUSED))
def test_what_is_out_of_range_is_refused(kind, name, rule, value):
    with pytest.raises(InvalidArgumentError) as refused:
        kind(**{name: value})
    assert str(refused.value) == f"{name}={value!r} {rule}"


@pytest.mark.parametrize(("kind", "name", "rule", "value"), cases(KEPT))
def test_what_is_in_range_is_kept_in_a_form_that_is_stored_and_compared(kind, name, rule, value):
    settings = kind(**{name: value})
    found = getattr(settings, name)
    assert found == (tuple(value) if rule == POOL else value)
    assert type(found) is {POSITIVE: int, COUNT: int, POOL: tuple}.get(rule, float)
    assert settings == kind(**asdict(settings))
    assert hash(settings) == hash(kind(**{name: found}))


def test_patience_may_be_endless():
    assert LatentConfig(patience=None).patience is None
