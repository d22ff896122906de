from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from torch import nn

from cellstill.condense import diffusion as diffusion_module
from cellstill.condense.cells import LabelledCells
from cellstill.condense.diffusion import (
    Diffusion,
    OneStepTuning,
    _balanced,
    energy_distance_within,
    fit_generator,
)
from cellstill.condense.generator import Denoiser, GeneratorConfig, OneStepGenerator, generate_in_steps, schedule
from cellstill.condense.latent import Autoencoder, LatentConfig

MEANS = torch.tensor([[1.5, 0.0, 0.5], [-1.5, 0.5, 0.0]])
SPREAD = torch.tensor([[0.4, 0.3, 0.6], [0.5, 0.5, 0.2]])


class GaussianDenoiser(nn.Module):
    """The best denoiser there is where each class is normal with known means and standard deviations.

    E[z0 | zt] = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (zt - alpha m), and the same of the noise.
    """

    n_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (part[:, None] for part in schedule(time))
        mean, variance = MEANS[label], SPREAD[label].square()
        away = (z - alpha * mean) / (alpha.square() * variance + sigma.square())
        clean, noise = mean + alpha * variance * away, sigma * away
        return alpha * noise - sigma * clean

    clean = Denoiser.clean


def ratio_of_variances(made: torch.Tensor, label: torch.Tensor) -> np.ndarray:
    return np.array([(made[label == k].var(dim=0) / SPREAD[k].square()).tolist() for k in range(2)])


# Denoiser and schedule


def test_schedule_keeps_variance_and_goes_from_signal_to_noise():
    time = torch.linspace(0, 1, 101)
    alpha, sigma = schedule(time)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(101))
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert [float(part[k]) for part in (alpha, sigma) for k in (0, 100)] == pytest.approx([1, 0, 0, 1], abs=1e-6)


def test_the_right_velocity_gives_the_clean_point_back_at_any_time():
    torch.manual_seed(0)
    z, noise, time = torch.randn(40, 5), torch.randn(40, 5), torch.linspace(0, 1, 40)
    alpha, sigma = (part[:, None] for part in schedule(time))

    class Exact(Denoiser):
        def forward(self, z_t, time, label):
            return alpha * noise - sigma * z

    found = Exact(5, 2, 8, 1).clean(alpha * z + sigma * noise, time, torch.zeros(40, dtype=torch.int64))
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-5)


def test_denoiser_heeds_point_time_and_class():
    torch.manual_seed(0)
    denoiser = Denoiser(3, 2, 16, 2)
    z, time, label = torch.randn(4, 3), torch.full((4,), 0.3), torch.tensor([0, 0, 1, 2])
    # It starts at velocity 0, and can learn.
    assert not denoiser(z, time, label).any()
    nn.init.normal_(denoiser.leave.weight)
    base = denoiser(z, time, label)
    assert ((denoiser(z + 1, time, label) - base).abs().sum(dim=1) > 1e-3).all()
    assert ((denoiser(z, time + 0.2, label) - base).abs().sum(dim=1) > 1e-3).all()
    assert ((denoiser(z, time, (label + 1) % 3) - base).abs().sum(dim=1) > 1e-3).all()


@pytest.mark.parametrize("kept_noise", [0.1, 0.2, 0.4])
def test_one_step_is_taken_where_the_share_of_signal_is_the_one_asked_for(kept_noise):
    generator = OneStepGenerator(GaussianDenoiser(), kept_noise)
    alpha, sigma = schedule(torch.tensor([generator.time]))
    assert float(alpha.square()) == pytest.approx(kept_noise, rel=1e-5)
    torch.manual_seed(0)
    noise, label = torch.randn(50, 3), torch.arange(50) % 2
    # The posterior mean, in closed form.
    variance = SPREAD[label].square()
    expected = MEANS[label] + alpha * variance / (alpha**2 * variance + sigma**2) * (noise - alpha * MEANS[label])
    torch.testing.assert_close(generator(noise, label), expected, rtol=1e-4, atol=1e-5)


def test_several_steps_of_the_best_denoiser_recover_a_gaussian():
    torch.manual_seed(0)
    noise, label = torch.randn(4000, 3), torch.arange(4000) % 2
    made = generate_in_steps(GaussianDenoiser(), noise, label, 100)
    for code in range(2):
        for dim in range(3):
            z = ((made[label == code, dim] - MEANS[code, dim]) / SPREAD[code, dim]).numpy()
            # Of the discretisation's error, 5 % of the standard deviation is allowed.
            assert z.mean() == pytest.approx(0, abs=0.08)
            assert z.std() == pytest.approx(1, abs=0.08)
            assert stats.kstest((z - z.mean()) / z.std(), "norm").pvalue > 1e-3
    # Without noise of its own, the flow of a Gaussian is the map that keeps order.
    order = noise[label == 0, 0].argsort()
    assert (made[label == 0, 0][order].diff() > -1e-5).all()
    # More steps are nearer to it: z = m + s u.
    exact = MEANS[label] + SPREAD[label] * noise
    errors = [
        float((generate_in_steps(GaussianDenoiser(), noise, label, n) - exact).square().mean()) for n in (5, 20, 80)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_gradients_reach_the_noise_through_all_steps():
    noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    label = torch.tensor([0, 1, 0])
    for make in (
        lambda noise: OneStepGenerator(GaussianDenoiser(), 0.2)(noise, label),
        lambda noise: generate_in_steps(GaussianDenoiser(), noise, label, 4),
    ):
        assert torch.autograd.gradcheck(make, noise)


# Losses


def test_diffusion_loss_of_the_best_denoiser_is_the_variance_that_no_one_can_explain():
    torch.manual_seed(0)
    label = torch.arange(40_000) % 2
    z = MEANS[label] + SPREAD[label] * torch.randn(40_000, 3)
    module = Diffusion(GaussianDenoiser(), GeneratorConfig(label_dropout=0.0)).eval()
    found = float(module.loss({"z": z, "label": label}).mean())
    # Var(v | zt): that of alpha e - sigma z0 given alpha z0 + sigma e is s^2 / (alpha^2 s^2 + sigma^2).
    alpha, sigma = schedule(torch.linspace(0.0005, 0.9995, 1000))
    variance = SPREAD.square()[:, :, None]
    expected = (variance / (alpha**2 * variance + sigma**2)).mean()
    assert found == pytest.approx(float(expected), rel=0.03)


def test_classes_are_hidden_as_often_as_asked_for():
    seen = []

    class Watching(Denoiser):
        def forward(self, z, time, label):
            seen.append(label)
            return super().forward(z, time, label)

    torch.manual_seed(0)
    module = Diffusion(Watching(3, 2, 8, 1), GeneratorConfig(label_dropout=0.25))
    label = torch.arange(20_000) % 2
    module.loss({"z": torch.zeros(20_000, 3), "label": label})
    hidden = seen[0] == 2
    assert float(hidden.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(seen[0][~hidden], label[~hidden])


def test_average_follows_the_weights():
    torch.manual_seed(0)
    module = Diffusion(Denoiser(3, 2, 8, 1), GeneratorConfig(decay=0.25))
    batch = {"z": torch.zeros(4, 3), "label": torch.zeros(4, dtype=torch.int64)}
    expected = [weight.detach().clone() for weight in module.denoiser.parameters()]
    for kept in (2 / 11, 0.25, 0.25, 0.25):
        with torch.no_grad():
            for weight in module.denoiser.parameters():
                weight.add_(1.0)
        module.loss(batch)
        weights = [weight.detach() for weight in module.denoiser.parameters()]
        expected = [kept * mean + (1 - kept) * weight for mean, weight in zip(expected, weights, strict=True)]
    # Not while it is evaluated.
    module.eval().loss(batch)
    averaged = module.averaged()
    for mean, wanted in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(mean, wanted)
        assert not mean.requires_grad
    # A copy: what is done to it does not come back.
    next(averaged.parameters()).data.zero_()
    torch.testing.assert_close(next(module.averaged().parameters()), expected[0])


def test_nothing_of_the_untrained_weights_is_left_in_the_average_after_few_steps():
    module = Diffusion(Denoiser(3, 2, 8, 1), GeneratorConfig(decay=0.999))
    module.average.fill_(1.0)
    with torch.no_grad():
        for weight in module.denoiser.parameters():
            weight.zero_()
    for _ in range(60):
        module.loss({"z": torch.zeros(2, 3), "label": torch.zeros(2, dtype=torch.int64)})
    assert 0 < float(module.average.max()) < 1e-6


def by_brute_force(x: np.ndarray, y: np.ndarray, label: np.ndarray) -> float:
    total, n_counted = 0.0, 0
    for code in np.unique(label):
        a, b = x[label == code], y[label == code]
        n = len(a)
        if n < 2:
            continue
        within = sum(np.linalg.norm(p[i] - p[j]) for p in (a, b) for i in range(n) for j in range(n) if i != j)
        across = sum(np.linalg.norm(a[i] - b[j]) for i in range(n) for j in range(n))
        total += n * (2 * across / n**2 - within / (n * (n - 1)))
        n_counted += n
    return total / n_counted


def test_energy_distance_is_that_of_a_loop_and_single_cells_do_not_count():
    rng = np.random.default_rng(0)
    label = np.array([0, 1, 0, 2, 1, 0, 0, 1, 3, 3])
    x, y = rng.normal(size=(10, 4)), rng.normal(1, 2, size=(10, 4))
    found = energy_distance_within(*(torch.from_numpy(part) for part in (x, y, label)))
    assert float(found) == pytest.approx(by_brute_force(x, y, label), rel=1e-4)
    x[3] = 100
    again = energy_distance_within(*(torch.from_numpy(part) for part in (x, y, label)))
    assert float(again) == pytest.approx(float(found), rel=1e-4)
    alone = energy_distance_within(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1]))
    assert float(alone) == 0


def test_energy_distance_is_zero_in_expectation_only_for_equal_distributions():
    rng = np.random.default_rng(1)
    label = torch.arange(40) % 4

    def distances(loc: float, scale: float, of: torch.Tensor = label) -> np.ndarray:
        draws = (torch.from_numpy(rng.normal(size=(2, 40, 3))) for _ in range(300))
        return np.array([float(energy_distance_within(loc + scale * x, y, of)) for x, y in draws])

    equal = distances(0, 1)
    assert abs(equal.mean()) < 4 * equal.std() / np.sqrt(300)
    for loc, scale in ((1.0, 1.0), (0.0, 0.4), (0.0, 2.0)):
        other = distances(loc, scale)
        assert other.mean() > 10 * other.std() / np.sqrt(300)
    # The closed form for two normals of one dimension.
    x, y = rng.normal(1, 0.5, (2000, 1)), rng.normal(0, 1, (2000, 1))

    def mean_distance(mean: float, sd: float) -> float:
        return stats.foldnorm.mean(mean / sd, scale=sd)

    truth = 2 * mean_distance(1, math.sqrt(1.25)) - mean_distance(0, math.sqrt(0.5)) - mean_distance(0, math.sqrt(2))
    found = energy_distance_within(torch.from_numpy(x), torch.from_numpy(y), torch.zeros(2000, dtype=torch.int64))
    assert float(found) == pytest.approx(truth, abs=0.04)
    # Cells of another class are no neighbours: with classes exchanged the same points are far apart.
    points = torch.from_numpy(rng.normal(size=(40, 3))) + 5 * label[:, None]
    assert float(energy_distance_within(points, points.flip(0), label)) > 1


def test_energy_distance_has_finite_gradients_where_points_meet():
    x = torch.zeros(4, 3, requires_grad=True)
    energy_distance_within(x, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)).backward()
    assert torch.isfinite(x.grad).all()
    assert cdist(np.zeros((1, 3)), x.detach().numpy()).max() == 0


def test_rare_classes_are_shown_by_the_root_of_their_size():
    codes = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [900, 100, 1]))
    shown = _balanced(codes, seed=0)
    often = np.bincount(codes[shown], minlength=4)
    expected = 1001 * np.array([30, 10, 0, 1]) / 41
    assert np.abs(often - expected).max() <= 1
    # No cell of a class is shown twice more often than another.
    repeats = np.bincount(shown, minlength=len(codes))
    assert np.ptp(repeats[codes == 1]) == 1
    assert len(_balanced(np.array([0] * 10_000 + [1]), 0)[-1:]) == 1
    assert (codes[shown] == 3).any()


# Training


CONFIG = GeneratorConfig(
    n_hidden=48, n_blocks=2, n_steps=700, n_tuning_steps=300, batch_size=128, lr=2e-3, decay=0.99,
    class_weight=0.0, count_weight=0.0, n_teacher_steps=6,
)  # fmt: skip


def mixture(n: int = 800) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(2)
    label = torch.arange(n) % 2
    return MEANS[label] + SPREAD[label] * torch.randn(n, 3, generator=generator), label.numpy()


def fit_mixture(monkeypatch, **settings):
    """Train on a latent space that is known, whatever the counts."""
    z, codes = mixture()
    monkeypatch.setattr(diffusion_module, "encode", lambda *_: z)
    counts = sp.csr_matrix(np.ones((len(codes), 2), dtype=np.float32))
    autoencoder = Autoencoder(torch.zeros(2), torch.zeros(2), 2, 0, LatentConfig(n_latent=3, n_hidden=4))
    config = GeneratorConfig(**{**CONFIG.__dict__, **settings})
    return fit_generator(autoencoder.requires_grad_(False), LabelledCells(counts, codes), config)


def sample(generate, n: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.arange(n) % 2
    with torch.no_grad():
        return generate(torch.randn(n, 3, generator=torch.Generator().manual_seed(8)), label), label


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        return fit_mixture(patch)


def test_one_step_samples_have_the_spread_and_the_class_of_real_cells(trained):
    made, label = sample(trained[0])
    ratio = ratio_of_variances(made, label)
    assert ratio.min() > 0.7
    assert ratio.max() < 1.3
    for code in range(2):
        assert ((made[label == code].mean(dim=0) - MEANS[code]).abs() < 0.35 * SPREAD[code] + 0.02).all()
    logp = torch.stack(
        [torch.distributions.Normal(MEANS[k], SPREAD[k]).log_prob(made).sum(dim=1) for k in range(2)], dim=1
    )
    assert float((logp.argmax(dim=1) == label).float().mean()) > 0.99


def test_the_multi_step_teacher_samples_the_classes_as_well(trained):
    made, label = sample(lambda noise, label: generate_in_steps(trained[1], noise, label, 40))
    ratio = ratio_of_variances(made, label)
    assert 0.7 < np.exp(np.log(ratio).mean()) < 1.3
    assert ((made[label == 0].mean(dim=0) - MEANS[0]).abs() < 0.2).all()


def test_one_step_of_the_teacher_alone_returns_class_means(trained):
    # Why the tuning exists: the spread of the posterior mean, in closed form, is a small part of the real one.
    made, label = sample(OneStepGenerator(trained[1], CONFIG.kept_noise))
    variance = SPREAD.square()
    expected = (0.2 * variance / (0.2 * variance + 0.8).square()).numpy()
    assert expected.max() < 0.1
    assert ratio_of_variances(made, label).mean() == pytest.approx(expected.mean(), abs=0.08)


def test_without_the_distribution_term_samples_spread_less(trained, monkeypatch):
    # Regression on real cells through noise, and nothing that looks at the distribution.
    generator = fit_mixture(monkeypatch, distribution_weight=0.0, n_tuning_steps=60)[0]
    without = ratio_of_variances(*sample(generator)).mean()
    with_it = ratio_of_variances(*sample(trained[0])).mean()
    assert without < 0.7 < with_it


def test_histories_hold_the_terms_and_fall(trained):
    histories = trained[2]
    assert list(histories) == ["diffusion", "tuning"]
    n_batches = math.ceil(len(_balanced(mixture()[1], 0)) / 128)
    assert [len(histories[name]) for name in histories] == [math.ceil(700 / n_batches), math.ceil(300 / n_batches)]
    assert histories["diffusion"]["train_loss"].iloc[-5:].mean() < 0.7 * histories["diffusion"]["train_loss"].iloc[0]
    tuning = histories["tuning"]
    assert {f"train_{name}" for name in ("distribution", "teacher", "class", "nb")} < set(tuning)
    assert tuning["train_distribution"].iloc[-5:].mean() < 0.3 * tuning["train_distribution"].iloc[0]
    assert (tuning["train_nb"] == 0).all()


def test_what_is_given_back_is_frozen(trained):
    generator, teacher, _ = trained
    assert not any(part.requires_grad for module in (generator, teacher) for part in module.parameters())
    # The teacher is not what was tuned.
    assert not torch.equal(generator.denoiser.leave.weight, teacher.leave.weight)


def test_tuning_loss_is_the_sum_of_its_weighted_terms():
    torch.manual_seed(0)
    autoencoder = Autoencoder(torch.zeros(6), torch.zeros(6), 2, 0, LatentConfig(n_latent=3, n_hidden=4))
    denoiser = Denoiser(3, 2, 8, 1)
    nn.init.normal_(denoiser.leave.weight, std=0.3)
    config = GeneratorConfig(
        distribution_weight=0.7, teacher_weight=0.3, class_weight=1.1, count_weight=0.9, n_teacher_steps=3
    )
    module = OneStepTuning(denoiser, autoencoder, config)
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(2, (12, 6)).astype(np.float32))
    z, label = torch.randn(12, 3), torch.arange(12) % 2
    arrays = {"data": counts.data, "indices": counts.indices, "indptr": counts.indptr}
    found = module.loss({name: torch.as_tensor(part) for name, part in arrays.items()} | {"z": z, "label": label})
    mean = {name: float(term) / 12 for name, term in found.terms.items()}
    weights = {"distribution": 0.7, "teacher": 0.3, "class": 1.1, "nb": 0.9}
    total = float(found.total.detach())
    assert total == pytest.approx(sum(weights[name] * mean[name] for name in weights), rel=1e-5)
    assert min(mean["teacher"], mean["class"], mean["nb"]) > 0.01
    found.total.backward()
    assert all(part.grad is None for part in [*autoencoder.parameters(), *module.teacher.parameters()])
    assert any(part.grad.abs().sum() > 0 for part in module.generator.parameters())


@pytest.mark.parametrize("stopped", ["diffusion", "one step"])
def test_interrupted_training_goes_on_to_the_same_weights(monkeypatch, tmp_path, stopped):
    z, codes = mixture(120)
    monkeypatch.setattr(diffusion_module, "encode", lambda *_: z)
    cells = LabelledCells(sp.csr_matrix(np.ones((120, 2), dtype=np.float32)), codes)
    config = GeneratorConfig(n_hidden=8, n_blocks=1, n_steps=6, n_tuning_steps=6, batch_size=64, decay=0.9)

    def fitted(**how):
        torch.manual_seed(1)
        autoencoder = Autoencoder(torch.zeros(2), torch.zeros(2), 2, 0, LatentConfig(n_latent=3, n_hidden=4))
        return fit_generator(autoencoder.requires_grad_(False), cells, config, **how)

    def stop(phase, epoch, losses):
        if phase == stopped and epoch == 1:
            raise KeyboardInterrupt

    paths = [{"checkpoint": tmp_path / name} for name in ("diffusion.ckpt", "tuning.ckpt")]
    with pytest.raises(KeyboardInterrupt):
        fitted(progress=stop, checkpoints=paths)
    resumed = fitted(checkpoints=[path | {"resume": True} for path in paths])
    straight = fitted()
    for one, other in zip(straight[:2], resumed[:2], strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
