"""The map that gives samples the covariance within classes of real cells, on Gaussians whose covariances are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cellstill.condense.spread import N_SAMPLES, fit_spread

WRONG = torch.tensor([[0.5, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 3.0]])
"""Factor of the generator's covariance."""
TRUE = torch.tensor([[2.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.4, 0.0, 0.1]])
"""Factor of the real one."""
MEANS = torch.tensor([[0.0, 4.0, -2.0], [5.0, 0.0, 1.0]])


class WrongGenerator(nn.Module):
    """Right class means, wrong covariance."""

    def forward(self, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return MEANS[label] + noise @ WRONG.T


WRONG_GENERATOR = WrongGenerator()


class LevelGenerator(nn.Module):
    """No variance in the last two directions."""

    def forward(self, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return MEANS[label] + noise * torch.tensor([1.0, 0.0, 0.0])


def real_cells(sizes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    codes = np.repeat(np.arange(len(sizes)), sizes)
    noise = torch.randn(len(codes), 3, generator=torch.Generator().manual_seed(seed))
    return MEANS[torch.from_numpy(codes)] + noise @ TRUE.T, codes


def samples(spread, generator: nn.Module = WRONG_GENERATOR, n: int = 40_000) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.arange(n) % 2
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(5))
    return spread(generator(noise, label), label), label


def test_samples_get_the_covariance_of_real_cells_and_keep_their_means():
    spread = fit_spread(WRONG_GENERATOR, *real_cells((20_000, 5_000)), 2)
    made, label = samples(spread)
    # The generator's means are known from N_SAMPLES of it, a third of them of the smaller class.
    error = float(WRONG.norm(dim=1).max()) / (N_SAMPLES / 3) ** 0.5
    for code in range(2):
        own = made[label == code]
        np.testing.assert_allclose(torch.cov(own.T), TRUE @ TRUE.T, atol=0.25)
        np.testing.assert_allclose(own.mean(dim=0), MEANS[code], atol=4 * error)


def test_no_other_map_to_that_covariance_moves_samples_less():
    """The distance to the generator's own samples is that of Bures, in closed form."""
    spread = fit_spread(WRONG_GENERATOR, *real_cells((60_000, 60_000)), 2)
    label = torch.zeros(40_000, dtype=torch.int64)
    z = WRONG_GENERATOR(torch.randn(40_000, 3, generator=torch.Generator().manual_seed(6)), label)
    moved = float((spread(z, label) - z).square().sum(dim=1).mean())
    one, other = (factor.double() @ factor.double().T for factor in (WRONG, TRUE))
    bures = torch.trace(one + other) - 2 * torch.linalg.eigvals(one @ other).real.clamp(min=0).sqrt().sum()
    assert moved == pytest.approx(float(bures), rel=0.06)
    assert torch.allclose(spread.map, spread.map.T, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5], ids=["no_deviation", "one_deviation", "few"])
def test_few_cells_leave_samples_nearly_as_they_are(n):
    """Real covariance weighs n - 1 of each class, that of samples as much as there are dimensions."""
    few = fit_spread(WRONG_GENERATOR, *real_cells((n, n)), 2)
    assert torch.isfinite(few.map).all()
    made, label = samples(few)
    own = torch.cov(made[label == 0].T)
    z, codes = real_cells((n, n))
    away = torch.cat([z[codes == code] - z[codes == code].mean(dim=0) for code in range(2)])
    n_free = 2 * (n - 1)
    wanted = (away.T @ away + 3 * WRONG @ WRONG.T) / (n_free + 3)
    np.testing.assert_allclose(own, wanted, atol=0.35)


def test_classes_of_one_cell_or_none_have_a_center_and_no_say():
    z, codes = real_cells((3_000, 1))
    alone = fit_spread(WRONG_GENERATOR, z, codes, 2)
    other = fit_spread(WRONG_GENERATOR, torch.cat([z[:-1], z[-1:] + 50]), codes, 2)
    assert torch.equal(alone.map, other.map)
    np.testing.assert_allclose(alone.center, MEANS, atol=0.5)
    absent = fit_spread(WRONG_GENERATOR, z[:-1], codes[:-1], 2)
    assert torch.isfinite(absent.center).all()
    assert torch.isfinite(absent.map).all()


def test_directions_that_are_never_generated_do_not_explode():
    spread = fit_spread(LevelGenerator(), *real_cells((3_000, 3_000)), 2)
    made, label = samples(spread, LevelGenerator())
    assert torch.isfinite(made).all()
    variance = made[label == 0].var(dim=0)
    assert float(variance.max()) < 3 * float((TRUE @ TRUE.T).diagonal().max())


def test_the_random_state_is_left_alone_and_the_map_repeats():
    state = torch.get_rng_state()
    one, same, other = (fit_spread(WRONG_GENERATOR, *real_cells((50, 50)), 2, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.map, same.map)
    assert not torch.equal(one.map, other.map)
