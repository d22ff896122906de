from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.kernel_ridge import KernelRidge
from torch.nn import functional as nnf

from cellstill.condense import matching as matching_module
from cellstill.condense.cells import LabelledCells
from cellstill.condense.matching import MatchingConfig, as_seen, invert, match_codes
from cellstill.condense.objectives import _kernel, distribution_distance, gradient_distance, outcome_loss
from cellstill.condense.pool import WIDTHS, Probe, draw_probe, train_probe
from cellstill.errors import InvalidArgumentError, TrainingError

N_VARS = 20


def probe(name: str = "mlp_64", seed: int = 0, n_vars: int = N_VARS, n_classes: int = 3) -> Probe:
    torch.manual_seed(seed)
    return draw_probe(name, n_vars, n_classes, torch.device("cpu"))


def points(n: int, seed: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative points around the same three centres, and their classes, which take turns."""
    centres = torch.rand(3, N_VARS, generator=torch.Generator().manual_seed(77)) * 3
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 3
    return (centres[label] + spread * torch.randn(n, N_VARS, generator=generator)).relu(), label


# Probes


@pytest.mark.parametrize("name", WIDTHS)
def test_probes_are_what_torch_makes_of_their_parameters(name):
    drawn = probe(name)
    layers = []
    for weight, bias in zip(drawn.parameters[::2], drawn.parameters[1::2], strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.detach().abs().max() <= bound
        layers += [torch.nn.ReLU(), layer]
    x, _ = points(7, 0)
    torch.testing.assert_close(drawn.logits(x), torch.nn.Sequential(*layers[1:])(x))
    torch.testing.assert_close(drawn.features(x), torch.nn.Sequential(*layers[1:-1])(x))


def test_training_a_probe_lowers_its_loss_and_leaves_the_first_one():
    drawn, (x, label) = probe(), points(60, 1)
    before = [part.detach().clone() for part in drawn.parameters]
    trained = train_probe(drawn, x, label, 30)
    assert nnf.cross_entropy(trained.logits(x), label) < 0.8 * nnf.cross_entropy(drawn.logits(x), label)
    for part, was in zip(drawn.parameters, before, strict=True):
        torch.testing.assert_close(part.detach(), was, rtol=0, atol=0)
    assert train_probe(drawn, x, label, 0) is drawn


# Gradients


def test_gradient_distance_is_that_of_gradients_by_hand():
    drawn = probe("linear")
    weight, bias = (part.detach().numpy() for part in drawn.parameters)
    (real, real_label), (made, label) = points(30, 1), points(6, 2)

    def gradient(x: np.ndarray, code: int) -> np.ndarray:
        logits = x @ weight.T + bias
        probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return (probability - np.eye(3)[code]).T @ x / len(x)

    distances = []
    for code in range(3):
        one, other = gradient(real[real_label == code].numpy(), code), gradient(made[label == code].numpy(), code)
        cosine = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        distances.append((1 - cosine).mean())
    found = gradient_distance(drawn, real, real_label, made, label).detach()
    assert float(found) == pytest.approx(np.mean(distances), rel=1e-4)


@pytest.mark.parametrize("name", WIDTHS)
def test_gradients_of_the_same_cells_do_not_differ(name):
    drawn, (x, label) = probe(name), points(12, 1)
    assert float(gradient_distance(drawn, x, label, x.clone(), label).detach()) == pytest.approx(0, abs=1e-4)
    assert float(gradient_distance(drawn, x, label, x.flip(1), label).detach()) > 0.05


@pytest.mark.parametrize("objective", [gradient_distance, distribution_distance])
def test_gradients_with_respect_to_synthetic_cells_are_right(objective):
    drawn = probe("mlp_64", n_vars=4)
    drawn = Probe([part.detach().double().requires_grad_(True) for part in drawn.parameters])
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.rand(n, 4, generator=generator, dtype=torch.float64) for n in (9, 6))
    real_label, label = torch.arange(9) % 3, torch.arange(6) % 3
    call = lambda made: objective(drawn, real, real_label, made, label)  # noqa: E731
    assert torch.autograd.gradcheck(call, made.requires_grad_(True))


# Distributions


def test_distribution_distance_is_that_of_moments_by_hand():
    drawn, (real, real_label), (made, label) = probe(), points(90, 1), points(12, 2)
    one, other = drawn.features(real).detach().numpy(), drawn.features(made).detach().numpy()
    spread = one.std(axis=0, ddof=1).mean()
    total = 0.0
    for code in range(3):
        x, y = one[real_label == code], other[label == code]
        total += np.square((x.mean(axis=0) - y.mean(axis=0)) / spread).mean()
        total += np.square((x.std(axis=0, ddof=1) - y.std(axis=0, ddof=1)) / spread).mean()
    found = distribution_distance(drawn, real, real_label, made, label).detach()
    assert float(found) == pytest.approx(total / 3, rel=1e-3)


def test_distribution_distance_is_zero_for_equals_and_sees_means_and_spread():
    drawn, (real, real_label) = probe(), points(90, 1)
    assert float(distribution_distance(drawn, real, real_label, real.clone(), real_label).detach()) == pytest.approx(
        0, abs=1e-6
    )
    means = torch.stack([real[real_label == code].mean(dim=0) for code in range(3)])[real_label]
    narrow = float(distribution_distance(drawn, real, real_label, means + 0.3 * (real - means), real_label).detach())
    away = float(distribution_distance(drawn, real, real_label, real + 1, real_label).detach())
    assert narrow > 0.05
    assert away > 0.05
    # A single cell has no spread to compare: only its mean counts.
    of_means = means[:3]
    assert float(distribution_distance(drawn, real, real_label, of_means, real_label[:3]).detach()) < 0.5 * narrow


# Outcome


def test_kernel_is_the_mean_product_of_random_relu_features_and_the_linear_one():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 4))
    total = torch.zeros(6, 4, dtype=torch.float64)
    n_draws = 4_000_000
    for _ in range(8):
        weight = torch.randn(n_draws // 8, 5, generator=generator, dtype=torch.float64)
        total += (x @ weight.t()).relu() @ (y @ weight.t()).relu().t()
    # E[relu(w x) relu(w y)] is half of Cho and Saul's kernel.
    expected = (2 * total / n_draws + x @ y.t()) / 2
    lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
    torch.testing.assert_close(_kernel(x, y) / lengths, expected / lengths, rtol=0, atol=2e-3)
    torch.testing.assert_close(_kernel(x, x).diagonal(), x.square().sum(dim=1), rtol=2e-5, atol=0)


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
def test_outcome_loss_is_that_of_kernel_ridge_regression(strength):
    (real, real_label), (made, label) = points(40, 1), points(9, 2)
    real, made = real[5:].double(), made.double()
    real_label = real_label[5:].clone()
    real_label[:9] = 0
    unit = made.norm(dim=1).mean()
    within, across = _kernel(made / unit, made / unit).numpy(), _kernel(real / unit, made / unit).numpy()
    ridge = KernelRidge(alpha=strength * np.trace(within) / len(made), kernel="precomputed")
    ridge.fit(within, np.eye(3)[label] - 1 / 3)
    error = np.square(ridge.predict(across) - (np.eye(3)[real_label] - 1 / 3)).sum(axis=1)
    by_class = np.mean([error[real_label.numpy() == code].mean() for code in range(3)])
    found = outcome_loss(real, real_label, made, label, 3, strength)
    assert float(found) == pytest.approx(by_class, rel=1e-9)


def test_outcome_loss_has_the_right_gradients():
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.rand(n, 4, generator=generator, dtype=torch.float64) for n in (9, 6))
    real_label, label = torch.arange(9) % 3, torch.arange(6) % 3
    call = lambda made: outcome_loss(real, real_label, made, label, 3)  # noqa: E731
    # The unit of length, which is not differentiated, has to cancel for this to hold.
    assert torch.autograd.gradcheck(call, made.requires_grad_(True))
    scaled = outcome_loss(7 * real, real_label, 7 * made, label, 3)
    torch.testing.assert_close(scaled, call(made), rtol=1e-12, atol=0)


def test_outcome_is_best_at_the_centres_and_worst_with_labels_exchanged():
    (real, label), centres = points(300, 3), points(3, 0, spread=0.0)
    right, wrong = (
        float(outcome_loss(real, label, centres[0], codes, 3)) for codes in (centres[1], (centres[1] + 1) % 3)
    )
    noisy = float(outcome_loss(real, label, *points(3, 5, spread=1.5), 3))
    assert right < noisy < wrong
    # Nothing learned is the loss of predicting the mean: (C - 1) / C.
    assert right < 0.35
    assert wrong > 2 / 3


# Matching


def real_cells(n: int = 150, seed: int = 0) -> LabelledCells:
    rng = np.random.default_rng(seed)
    codes = rng.integers(3, size=n)
    rate = np.full((n, N_VARS), 0.5)
    for k in range(3):
        rate[np.ix_(codes == k, np.arange(4 * k, 4 * k + 4))] = 4
    counts = rng.poisson(rate).astype(np.float32)
    counts[:, -1] += 1
    return LabelledCells(sp.csr_matrix(counts), codes)


class Linear:
    """A decoder with a known map: four dimensions to genes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.map = 0.5 * torch.randn(4, N_VARS, generator=generator)
        self.head = torch.randn(4, 3, generator=generator)

    def decode(self, codes: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return codes, nnf.softplus(codes @ self.map + 1)

    def classify(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.head


OFF = {"gradient_weight": 0, "distribution_weight": 0, "outcome_weight": 0, "class_weight": 0, "shell_weight": 0}


def match(config: MatchingConfig, *, seed: int = 0, n: int = 6, **how):
    decoder = Linear()
    codes = torch.randn(n, 4, generator=torch.Generator().manual_seed(9))
    label = torch.arange(n) % 3
    return codes, *match_codes(
        codes, label, real_cells(), 3, decoder.decode, decoder.classify, config, seed=seed, **how
    )


@pytest.mark.parametrize("name", ["gradient", "distribution", "outcome", "class", "shell"])
def test_each_objective_falls_when_codes_follow_it(name):
    config = MatchingConfig(n_steps=80, lr=0.05, **OFF | {f"{name}_weight": 1}, inner_steps=0, pool=("mlp_64",))
    _, kept, history = match(config)
    first, last = history[name].iloc[:8].mean(), history[name].iloc[-8:].mean()
    assert last < {"gradient": 0.97, "shell": 0.2}.get(name, 0.9) * first
    assert len(history) == 80
    assert list(kept) == [80]


def test_shell_holds_codes_at_the_length_of_noise():
    codes, kept, history = match(MatchingConfig(n_steps=150, lr=0.05, **OFF | {"shell_weight": 1}))
    expected = (codes.norm(dim=1) / 2 - 1).square().mean()
    assert history["shell"].iloc[0] == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(kept[150].norm(dim=1), torch.full((6,), 2.0), rtol=0.02, atol=0)


def test_terms_that_weigh_nothing_are_left_out():
    assert set(match(MatchingConfig(n_steps=1))[2]) == {"outcome", "class", "shell"}
    weights = {"gradient_weight": 1, "distribution_weight": 1, "outcome_weight": 0}
    assert set(match(MatchingConfig(n_steps=1, **weights))[2]) == {"gradient", "distribution", "class", "shell"}


def test_snapshots_are_the_codes_of_their_step():
    codes, kept, _ = match(MatchingConfig(n_steps=12), snapshots=(0, 3))
    assert list(kept) == [0, 3, 12]
    torch.testing.assert_close(kept[0], codes, rtol=0, atol=0)
    torch.testing.assert_close(kept[3], match(MatchingConfig(n_steps=3))[1][3], rtol=0, atol=0)
    assert not torch.equal(kept[3], kept[12])
    assert not any(state.requires_grad for state in kept.values())


def test_no_steps_leave_codes_as_they_are():
    codes, kept, history = match(MatchingConfig(n_steps=0))
    torch.testing.assert_close(kept[0], codes, rtol=0, atol=0)
    assert len(history) == 0


def test_seed_decides_all_that_is_drawn_and_the_callers_random_state_stays():
    weights = {"gradient_weight": 1, "distribution_weight": 1}
    config = MatchingConfig(n_steps=5, **weights)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - the global state is what must not move
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, history = match(config)[1:]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    torch.manual_seed(7)
    same, again = match(config)[1:]
    assert torch.equal(one[5], same[5])
    pd.testing.assert_frame_equal(history, again)
    assert not torch.equal(one[5], match(config, seed=1)[1][5])


def test_steps_are_told_as_they_are_recorded():
    told = []
    history = match(MatchingConfig(n_steps=4), on_step=lambda step, terms: told.append((step, terms)))[2]
    assert [step for step, _ in told] == [0, 1, 2, 3]
    pd.testing.assert_frame_equal(pd.DataFrame([terms for _, terms in told]), history, check_names=False)


@pytest.mark.parametrize("n_steps", [3, 200], ids=["the last step", "any step"])
@pytest.mark.parametrize("where", ["term", "gradient"])
def test_what_is_not_finite_is_an_error_that_names_the_step_and_the_term(where, n_steps):
    decoder, calls = Linear(), []

    def decode(codes, label):
        calls.append(1)
        z, expected = decoder.decode(codes, label)
        if len(calls) == 3 and where == "term":
            expected = expected * torch.nan
        if len(calls) == 3 and where == "gradient":
            # At 0 the root is 0 and its slope infinite.
            expected = expected + (codes - codes.detach()).abs().sum().sqrt()
        return z, expected

    number = r"-?\d+\.?\d*(e[-+]\d+)?"
    told = {
        "term": rf"term 'outcome' of the matching is not finite in step 2, where outcome is nan, class is {number}",
        "gradient": rf"gradient of the codes of the matching is not finite in step 2, where outcome is {number}, class",
    }[where]
    with pytest.raises(TrainingError, match=rf"^The {told}.*smaller lr"):
        match_codes(
            torch.ones(3, 4),
            torch.arange(3),
            real_cells(),
            3,
            decode,
            decoder.classify,
            MatchingConfig(n_steps=n_steps),
        )


def test_rare_classes_are_drawn_with_repeats(monkeypatch):
    seen = []
    monkeypatch.setattr(matching_module, "outcome_loss", lambda real, label, made, *_: seen.append(label) or made.sum())
    cells = real_cells()
    rare = cells[np.concatenate([cells.of_class(0), cells.of_class(1)[:5]])]
    decoder = Linear()
    config = MatchingConfig(n_steps=2, real_per_class=16)
    match_codes(torch.ones(3, 4), torch.arange(3), rare, 3, decoder.decode, decoder.classify, config)
    assert [torch.bincount(label, minlength=3).tolist() for label in seen] == [[16, 16, 0]] * 2


@pytest.mark.parametrize("pool", [(), ("mlp_64", "resnet")], ids=["empty", "unknown"])
def test_bad_pool(pool):
    with pytest.raises(InvalidArgumentError, match="pool=.* has to name some of"):
        MatchingConfig(pool=pool)


def test_cells_as_seen_have_the_total_of_every_cell():
    expression = torch.from_numpy(real_cells().expression().toarray())
    torch.testing.assert_close(as_seen(expression), expression, rtol=1e-4, atol=1e-5)
    dimmed = torch.log1p(0.3 * torch.expm1(expression))
    torch.testing.assert_close(as_seen(dimmed), expression, rtol=1e-4, atol=1e-5)


def test_inversion_finds_the_codes_of_points_that_can_be_generated():
    generator = torch.Generator().manual_seed(0)
    shift, turn = torch.randn(3, 4, generator=generator), 0.3 * torch.randn(4, 4, generator=generator) + torch.eye(4)
    generate = lambda codes, label: codes @ turn + shift[label]  # noqa: E731
    truth, label = torch.randn(6, 4, generator=generator), torch.arange(6) % 3
    points = generate(truth, label)
    found, missed = invert(points, label, generate, n_steps=800)
    assert missed < 1e-4
    torch.testing.assert_close(found, truth, rtol=0, atol=0.05)
    # A generator of one dimension misses what lies in the others.
    _, missed = invert(points, label, lambda codes, _: codes * torch.tensor([1.0, 0, 0, 0]), n_steps=300)
    rest = float(points[:, 1:].square().sum() / points.square().sum())
    assert missed == pytest.approx(rest, rel=1e-3)
    assert math.isfinite(missed)
