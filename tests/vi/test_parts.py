"""Parts of the mean and variance, each alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from cellstill.vi.library import Library
from cellstill.vi.parts import Background, Dispersion, FeatureScaling, NoOverdispersion
from cellstill.vi.tables import CategoryTables, join

CODES = {"lane": torch.tensor([0, 2, 1, 2]), "site": torch.tensor([1, 0, 1, 1])}


@pytest.mark.parametrize("sizes", [(3,), (3, 2), (3, 2, 2), (30, 20)], ids=["one", "two", "three", "many_categories"])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_joined_tables_give_each_cell_the_sum_of_its_rows(sizes, n):
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(size, 5, generator=generator) for size in sizes]
    codes = [torch.randint(size, (n,), generator=generator) for size in sizes]
    table, group = join(tables, codes)
    expected = sum(one[code] for one, code in zip(tables, codes, strict=True))
    torch.testing.assert_close(table[group], expected)
    if len(sizes) > 1:
        assert len(table) <= max(n, math.prod(sizes))
        assert len(table) == min(n, math.prod(sizes))


def test_without_columns_all_cells_are_of_one_group():
    tables = CategoryTables({}, 5, 2.0)
    table, group = tables({}, torch.exp)
    assert group is None
    torch.testing.assert_close(table, torch.full((1, 5), math.exp(2.0)))


def test_background_is_summed_over_columns():
    background = Background({"lane": 3, "site": 2}, 4)
    with torch.no_grad():
        for table in background.beta.tables:
            table.normal_()
    lane, site = (table.detach().exp() for table in background.beta.tables)
    table, group = background(CODES)
    for cell, (i, j) in enumerate(zip(CODES["lane"], CODES["site"], strict=True)):
        torch.testing.assert_close(table.exp()[group[cell]], lane[i] + site[j])


def test_feature_scaling_is_a_product_over_columns_and_starts_at_one():
    scaling = FeatureScaling({"lane": 3, "site": 2}, 4)
    torch.testing.assert_close(scaling(CODES)[0], torch.zeros(4, 4), atol=1e-6, rtol=0)
    with torch.no_grad():
        for table in scaling.gamma.tables:
            table.normal_()
    lane, site = (torch.nn.functional.softplus(table.detach()) / 0.7 for table in scaling.gamma.tables)
    table, group = scaling(CODES)
    for cell, (i, j) in enumerate(zip(CODES["lane"], CODES["site"], strict=True)):
        torch.testing.assert_close(table.exp()[group[cell]], lane[i] * site[j])


@pytest.mark.parametrize(
    ("part", "settled"),
    [(Background({"lane": 2}, 6), 0.01), (FeatureScaling({"lane": 2}, 6), 1.0)],
    ids=["background", "feature_scaling"],
)
def test_a_prior_alone_settles_at_its_mean(part, settled):
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.LBFGS(part.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = part.penalty()
        penalty.backward()
        return penalty

    optimizer.step(closure)
    table, _ = part({"lane": CODES["site"]})
    torch.testing.assert_close(table.exp(), torch.full((2, 6), settled), rtol=2e-3, atol=0)


@pytest.mark.parametrize("n_vars", [1, 50])
def test_the_dispersion_prior_alone_settles_at_its_closed_form(n_vars):
    part = Dispersion(None, 1, n_vars).double()
    optimizer = torch.optim.LBFGS(part.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        penalty = part.penalty()
        penalty.backward()
        return penalty

    optimizer.step(closure)
    np.testing.assert_allclose(part.mean.detach().exp(), 19.3, rtol=2e-3)
    np.testing.assert_allclose(part.log_sigma.detach().exp(), 2.0, rtol=1e-3)
    np.testing.assert_allclose(part.log_rate.detach().exp(), 8 / 3, rtol=1e-3)


@pytest.mark.parametrize("per_cell", [False, True], ids=["per_minibatch", "per_cell"])
def test_dispersion_is_drawn_from_its_posterior(per_cell):
    part = Dispersion("lane", 3, 2000, per_cell=per_cell)
    with torch.no_grad():
        part.mean.copy_(torch.tensor([[0.0], [1.0], [2.0]]).expand(3, 2000))
        part.log_sigma.fill_(math.log(0.5))
    torch.manual_seed(0)
    theta, group = part(CODES, 4)
    drawn = theta[group].log()
    for one, code in zip(drawn, CODES["lane"], strict=True):
        assert one.mean().item() == pytest.approx(code.item(), abs=0.06)
        assert one.std().item() == pytest.approx(0.5, rel=0.08)
    same = [torch.equal(drawn[i], drawn[j]) for i, j in itertools.combinations(range(4), 2)]
    assert sum(same) == (0 if per_cell else 1)  # the second and the last cell are of one group
    assert torch.equal(part.eval()(CODES, 4)[0], part.mean.exp())


def test_no_overdispersion_is_poisson():
    theta, group = NoOverdispersion(5)({}, 3)
    assert group is None
    assert (theta >= 1e8).all()


def library(**settings):
    defaults = {
        "n_hidden": 16,
        "n_continuous": 0,
        "categories": {},
        "dropout": 0.1,
        "column": None,
        "n_groups": 1,
        "sensitivity": 1.0,
        "variance_weight": 0.5,
        "residual": True,
    }
    return Library(20, **{**defaults, **settings})


def test_library_weight_prior_alone_settles_at_mean_one():
    part = library()
    optimizer = torch.optim.LBFGS(part.weight.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = part.penalty()
        penalty.backward()
        return penalty

    optimizer.step(closure)
    assert part.eval().residual_weight().item() == pytest.approx(1.0, rel=1e-3)
    assert part.weight["log_sigma"].exp().item() == pytest.approx(1.0, rel=1e-3)


def test_penalty_of_the_library_weight_is_weighed():
    light, heavy = (library(variance_weight=weight).penalty().item() for weight in (0.5, 1.0))
    assert heavy == pytest.approx(2 * light)
    assert library(residual=False).penalty().item() == 0
