from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import special, stats

from cellstill.de import BayesianConfig, bayesian_de, comparison_cells
from cellstill.de.floor import estimate_floor
from cellstill.de.trend import variance_trend
from cellstill.errors import CellstillWarning, InvalidArgumentError, InvalidCountsError, MissingKeyError

TREATED = {"groupby": "condition", "group1": "treated", "group2": "control", "sample_key": "donor"}


def donors_obs(n_treated, n_control, n_cells=10):
    names = [(f"t{i}", "treated") for i in range(n_treated)] + [(f"c{i}", "control") for i in range(n_control)]
    return pd.DataFrame([name for name in names for _ in range(n_cells)], columns=["donor", "condition"])


def donor_rates(rng, obs, true, donor_sd, prior_df=8.0, base=1e-3):
    """Rates of each cell, all cells of a donor alike: base x 2^(effect + donor)."""
    sd = donor_sd * np.sqrt(prior_df / rng.chisquare(prior_df, len(true)))
    donors, code = np.unique(obs["donor"], return_inverse=True)
    log_rates = rng.normal(0, sd, (len(donors), len(true)))
    log_rates[[name.startswith("t") for name in donors]] += true
    return base * 2.0 ** log_rates[code]


def draws_of(rates, n_draws, rng=None, mask_sd=0.0, chunk=37):
    """The same rates, every draw with a shift of its own between the groups (first half of the cells)."""
    for _ in range(n_draws):
        shift = np.ones(rates.shape)
        if mask_sd:
            shift[: len(rates) // 2] = 2.0 ** rng.normal(0, mask_sd, rates.shape[1])
        draw = rates * shift
        yield ((np.arange(i, min(i + chunk, len(draw))), draw[i : i + chunk]) for i in range(0, len(draw), chunk))


def genes(number):
    return [f"gene{i}" for i in range(number)]


@pytest.mark.parametrize(("n_treated", "n_control"), [(2, 2), (3, 3), (4, 4), (2, 8)])
@pytest.mark.parametrize("effect", [0.0, 1.5])
def test_intervals_cover_the_truth_as_often_as_they_say(n_treated, n_control, effect):
    rng = np.random.default_rng(7)
    n_genes, n_sets, covered, below = 1000, 3, 0, 0
    obs = donors_obs(n_treated, n_control)
    for _ in range(n_sets):
        rates = donor_rates(rng, obs, np.full(n_genes, effect), 0.4)
        table = bayesian_de(draws_of(rates, 2), obs, genes(n_genes), **TREATED).table
        covered += ((table["ci_low"] <= effect) & (effect <= table["ci_high"])).sum()
        below += (table["ci_high"] < effect).sum()
    # The prior of the variances is estimated, which adds a little to the binomial error.
    assert covered / (n_genes * n_sets) == pytest.approx(
        0.95, abs=3 * np.sqrt(0.95 * 0.05 / (n_genes * n_sets)) + 0.008
    )
    assert below / (n_genes * n_sets) == pytest.approx(0.025, abs=0.015)


def test_intervals_cover_where_the_model_is_uncertain_too():
    """Between draws the fold change varies, and the data were made with one such draw that nobody knows."""
    rng = np.random.default_rng(8)
    obs = donors_obs(4, 4)
    n_genes = 3000
    hidden = rng.normal(0, 0.5, n_genes)
    rates = donor_rates(rng, obs, hidden, 0.3)
    table = bayesian_de(draws_of(rates, 60, rng, mask_sd=0.5), obs, genes(n_genes), **TREATED).table
    assert ((table["ci_low"] <= 0) & (table["ci_high"] >= 0)).mean() == pytest.approx(0.95, abs=0.02)
    certain = bayesian_de(draws_of(rates, 2), obs, genes(n_genes), **TREATED).table
    assert ((certain["ci_low"] <= 0) & (certain["ci_high"] >= 0)).mean() < 0.75


def test_known_effects_are_found_with_their_size():
    rng = np.random.default_rng(9)
    true = np.where(rng.random(1500) < 0.1, rng.choice([-1, 1], 1500) * rng.uniform(0.8, 2.5, 1500), 0.0)
    obs = donors_obs(5, 5)
    rates = donor_rates(rng, obs, true, 0.25)
    result = bayesian_de(draws_of(rates, 5, rng, mask_sd=0.05), obs, genes(1500), **TREATED)
    table, called = result.table, result.table["is_de"].to_numpy()
    assert called[true != 0].mean() > 0.85
    assert (true[called] == 0).mean() < 0.05 + 2 * np.sqrt(0.05 * 0.95 / called.sum())
    assert np.polyfit(true, table["lfc_mean"], 1)[0] == pytest.approx(1, abs=0.06)
    np.testing.assert_array_equal(table["direction"][called], np.where(table["lfc_mean"][called] > 0, "up", "down"))
    assert table["fdr"][called].max() <= 0.05 < table["fdr"][~called].min()
    assert result.method == "bayesian"
    assert result.params["n_samples"] == 5
    assert result.n_samples == {"treated": 5, "control": 5}


def test_a_null_calls_nothing():
    rng = np.random.default_rng(10)
    obs = donors_obs(3, 3)
    for _ in range(3):
        rates = donor_rates(rng, obs, np.zeros(1000), 0.5)
        assert bayesian_de(draws_of(rates, 2), obs, genes(1000), **TREATED).table["is_de"].sum() <= 1


def test_without_moderation_the_interval_is_that_of_a_t_test():
    """Many donors leave the prior of the variances no say, and equal draws add nothing."""
    rng = np.random.default_rng(11)
    obs = donors_obs(150, 120)
    rates = donor_rates(rng, obs, np.zeros(40), 0.4, prior_df=0.5)
    table = bayesian_de(draws_of(rates, 2), obs, genes(40), **TREATED).table
    logs = pd.DataFrame(np.log2(rates + 1e-6)).groupby(obs["donor"].to_numpy()).first()
    treated = [name.startswith("t") for name in logs.index]
    oracle = stats.ttest_ind(logs[treated], logs[np.logical_not(treated)])
    np.testing.assert_allclose(table["lfc_mean"], logs[treated].mean() - logs[np.logical_not(treated)].mean())
    interval = oracle.confidence_interval(0.95)
    np.testing.assert_allclose(table["ci_high"] - table["ci_low"], interval.high - interval.low, rtol=0.02)


def test_draws_are_combined_by_rubins_rules():
    """Oracle: every draw on its own, by hand."""
    rng = np.random.default_rng(12)
    obs = donors_obs(4, 3, n_cells=30)
    obs = obs.drop(index=[*range(15), *range(100, 107)]).reset_index(drop=True)
    draws = [rng.gamma(2.0, 1e-3, (len(obs), 30)) for _ in range(7)]
    order = rng.permutation(len(obs))
    shuffled = ([(part, draw[part]) for part in np.array_split(order, 5)] for draw in draws)
    config = BayesianConfig(credible_mass=0.8, pseudo_rate=1e-4)
    table = bayesian_de(shuffled, obs, genes(30), config=config, **TREATED).table
    changes, residuals = [], []
    for draw in draws:
        logs = np.log2(pd.DataFrame(draw).groupby([obs["condition"], obs["donor"]]).mean() + 1e-4)
        changes.append(logs.loc["treated"].mean() - logs.loc["control"].mean())
        residuals.append((logs.loc["treated"].var(ddof=1) * 3 + logs.loc["control"].var(ddof=1) * 2) / 5)
    from cellstill.de.variances import moderate_variances

    moderated, df = moderate_variances(np.mean(residuals, axis=0), 5)
    total = moderated * (1 / 4 + 1 / 3) + (1 + 1 / 7) * np.var(changes, axis=0, ddof=1)
    np.testing.assert_allclose(table["lfc_mean"], np.mean(changes, axis=0))
    np.testing.assert_allclose(table["ci_high"], np.mean(changes, axis=0) + stats.t.ppf(0.9, df) * np.sqrt(total))


def test_pairs_take_out_what_is_particular_to_a_donor():
    rng = np.random.default_rng(13)
    obs = pd.DataFrame(
        [(f"d{i}", group) for i in range(4) for group in ("treated", "control") for _ in range(10)],
        columns=["donor", "condition"],
    )
    donor = np.repeat(rng.normal(0, 2.0, (4, 300)), 20, axis=0)
    own = np.repeat(rng.normal(0, 0.1, (8, 300)), 10, axis=0)
    effect = 0.5 * (obs["condition"] == "treated").to_numpy()[:, None]
    rates = 1e-3 * 2.0 ** (donor + own + effect)
    result = bayesian_de(draws_of(rates, 2), obs, genes(300), **TREATED)
    assert result.design == "~ donor + condition"
    assert result.table["lfc_mean"].mean() == pytest.approx(0.5, abs=0.03)
    assert (result.table["ci_high"] - result.table["ci_low"]).median() < 0.4


def test_a_larger_floor_calls_fewer_and_a_larger_mass_is_wider():
    rng = np.random.default_rng(14)
    true = np.where(rng.random(400) < 0.3, rng.normal(0, 1, 400), 0.0)
    obs = donors_obs(5, 5)
    rates = donor_rates(rng, obs, true, 0.2)

    def table(**options):
        return bayesian_de(draws_of(rates, 2), obs, genes(400), config=BayesianConfig(**options), **TREATED).table

    called = [table(delta=delta)["is_de"].sum() for delta in (0.0, 0.25, 1.0)]
    assert called[0] > called[1] > called[2] > 0
    wide, narrow = table(credible_mass=0.99), table(credible_mass=0.5)
    assert (wide["ci_low"] < narrow["ci_low"]).all()
    assert (wide["ci_high"] > narrow["ci_high"]).all()
    weak = table(pseudo_rate=0.1)
    assert weak["lfc_mean"].abs().max() < 0.1 * narrow["lfc_mean"].abs().max()


def test_memory_grows_with_neither_draws_nor_cells():
    n_genes = 2000

    def peak(n_draws, n_cells):
        obs = donors_obs(3, 3, n_cells)
        names = genes(n_genes)

        def chunks(seed):
            rng = np.random.default_rng(seed)
            for start in range(0, len(obs), 60):
                yield np.arange(start, start + 60), rng.random((60, n_genes), dtype=np.float32)

        tracemalloc.start()
        bayesian_de((chunks(seed) for seed in range(n_draws)), obs, names, **TREATED)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(2, 10)
    few = peak(3, 20)
    assert peak(30, 20) < few + 100_000
    assert peak(3, 400) < few + 1_000_000


def test_the_order_of_genes_does_not_matter():
    rng = np.random.default_rng(15)
    obs = donors_obs(3, 3)
    rates = donor_rates(rng, obs, np.where(np.arange(200) < 30, 2.0, 0.0), 0.3)
    order = rng.permutation(200)
    table = bayesian_de(draws_of(rates, 3), obs, genes(200), **TREATED).table
    shuffled = bayesian_de(draws_of(rates[:, order], 3), obs, np.array(genes(200))[order], **TREATED).table
    pd.testing.assert_frame_equal(shuffled.set_index("gene").loc[genes(200)].reset_index(), table)


def test_wrong_arguments_are_found_before_the_first_draw():
    def never():
        raise AssertionError("a draw was asked for")
        yield

    obs = donors_obs(1, 3)
    with pytest.raises(InvalidArgumentError, match="'treated' has 1 and 'control' has 3"):
        bayesian_de(never(), obs, genes(3), **TREATED)
    with pytest.raises(MissingKeyError, match="batch_key='lane'"):
        bayesian_de(never(), donors_obs(3, 3), genes(3), batch_key="lane", **TREATED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, rates: (rows[:-1], rates[:-1]), "A draw has 9 cells of .'t2', 'treated'., which has 10 in obs"),
        (
            lambda rows, rates: (np.append(rows, 0), np.vstack([rates, rates[:1]])),
            "A draw has 11 cells of .'c0', 'control'., which has 10",
        ),
        (lambda rows, rates: (rows, rates[:, :2]), "gene_names has 3 entries, but there are 2 columns of rates"),
        (lambda rows, rates: (rows[:4], rates), "rows has 4 entries, but there are 60 rows of rates"),
        (lambda rows, rates: (rows, rates - 0.5), "finite and non-negative"),
        (lambda rows, rates: (rows, rates * np.nan), "finite and non-negative"),
    ],
    ids=["cell_missing", "cell_twice", "gene_missing", "rows_short", "negative", "nan"],
)
def test_draws_that_are_not_whole_are_refused(change, message):
    obs = donors_obs(3, 3)
    obs = obs.sort_values("donor").reset_index(drop=True)
    rates = np.full((60, 3), 0.01)
    with pytest.raises(InvalidArgumentError, match=message):
        bayesian_de([[change(np.arange(60), rates)]] * 2, obs, genes(3), **TREATED)


def test_one_draw_is_refused():
    obs = donors_obs(3, 3)
    with pytest.raises(InvalidArgumentError, match="draws held 1; at least 2"):
        bayesian_de(draws_of(np.full((60, 3), 0.01), 1), obs, genes(3), **TREATED)


@pytest.mark.parametrize(
    "options",
    [{"n_samples": 1}, {"delta": -0.1}, {"credible_mass": 1.0}, {"fdr": 0.0}, {"pseudo_rate": 0.0}, {"batch_size": 0}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        BayesianConfig(**options)


def counted(rng, obs, true, donor_sd=0.25, n_counts=3000.0, base_sd=1.5):
    """Cells' counts under rates that differ between donors, and what a model that does not see donors expects."""
    share = np.exp(rng.normal(0, base_sd, len(true)))
    treated = (obs["condition"] == "treated").to_numpy()
    smooth = share * 2.0 ** np.where(treated[:, None], true, 0.0)
    smooth /= smooth.sum(axis=1, keepdims=True)
    donors, code = np.unique(obs["donor"], return_inverse=True)
    own = smooth * 2.0 ** rng.normal(0, donor_sd, (len(donors), len(true)))[code]
    depth = n_counts * rng.lognormal(0, 0.3, (len(obs), 1))
    return rng.poisson(depth * own / own.sum(axis=1, keepdims=True)).astype(np.float32), smooth, depth * smooth


def smooth_draws(smooth, expected=None, chunk=37):
    for _ in range(2):
        parts = (slice(start, start + chunk) for start in range(0, len(smooth), chunk))
        arrays = (smooth,) if expected is None else (smooth, expected)
        yield ((np.arange(len(smooth))[part], *(array[part] for array in arrays)) for part in parts)


@pytest.mark.parametrize("effects", [False, True])
def test_counts_of_the_donors_bring_back_what_a_smooth_model_has_lost(effects):
    rng = np.random.default_rng(21)
    obs = donors_obs(4, 4, n_cells=25)
    n_genes = 800
    true = np.where(rng.random(n_genes) < 0.1 * effects, rng.choice([-1, 1], n_genes) * 1.2, 0.0)
    counts, smooth, expected = counted(rng, obs, true)
    # What the model has learned of the effects is wrong by 0.3.
    learned = np.where(obs["condition"].eq("treated").to_numpy()[:, None], 2.0 ** rng.normal(0, 0.3, n_genes), 1.0)
    smooth, expected = smooth * learned, expected * learned
    ratio = smooth[0] / smooth[-1]
    shares = smooth.mean(axis=0)
    known = np.log2(ratio / learned[0])  # proportions, so all move by a constant

    def covered(result):
        table = result.table
        return ((table["ci_low"] <= known) & (known <= table["ci_high"])).to_numpy()

    blind = bayesian_de(smooth_draws(smooth), obs, genes(n_genes), **TREATED)
    found = bayesian_de(smooth_draws(smooth, expected), obs, genes(n_genes), counts=sp.csr_matrix(counts), **TREATED)
    assert covered(blind).mean() < 0.3
    enough = counts.sum(axis=0) >= 200
    assert covered(found)[enough].mean() == pytest.approx(0.95, abs=0.025)
    compared = found.table["prob_de"].notna().to_numpy()
    assert covered(found)[~enough & compared].mean() > 0.93
    called = found.table["is_de"].to_numpy()
    if not effects:
        assert blind.table["is_de"].sum() > 100
        assert called.sum() == 0
        return
    assert (true[called] == 0).mean() < 0.08
    # 3e-4 is some twenty counts in each donor.
    assert called[(true != 0) & (shares > 3e-4)].mean() > 0.9
    assert np.polyfit(true[compared], found.table["lfc_mean"][compared], 1)[0] == pytest.approx(1, abs=0.06)


def test_genes_without_counts_are_not_compared_even_where_most_genes_change():
    rng = np.random.default_rng(24)
    obs = donors_obs(4, 4, n_cells=25)
    n_genes = 300
    true = np.where(rng.random(n_genes) < 0.9, rng.choice([-1, 1], n_genes) * 1.5, 0.0)
    counts, smooth, expected = counted(rng, obs, true)
    counts[:, :60] = 0
    result = bayesian_de(
        smooth_draws(smooth, expected), obs, genes(n_genes), counts=counts, config=BayesianConfig(delta=0), **TREATED
    )
    absent, rest = result.table[:60], result.table[60:]
    assert absent[["lfc_mean", "ci_low", "prob_de", "fdr"]].isna().all(axis=None)
    assert (absent["base_mean"] == 0).all()
    assert not absent["is_de"].any()
    assert rest["is_de"].mean() > 0.5
    assert any("genes with fewer than 10 counts were not compared" in note for note in result.notes)
    # The others are compared as if these were not there.
    alone = bayesian_de(
        smooth_draws(smooth[:, 60:], expected[:, 60:]),
        obs,
        genes(n_genes)[60:],
        counts=counts[:, 60:],
        config=BayesianConfig(delta=0),
        **TREATED,
    )
    pd.testing.assert_frame_equal(rest.reset_index(drop=True), alone.table)
    with pytest.raises(InvalidCountsError, match="No gene has 10 counts in the 8 replicates"):
        bayesian_de(smooth_draws(smooth, expected), obs, genes(n_genes), counts=0 * counts, **TREATED)


def test_a_gene_with_one_count_is_not_called_however_sure_the_model_is():
    rng = np.random.default_rng(22)
    obs = donors_obs(4, 4, n_cells=25)
    counts, smooth, expected = counted(rng, obs, np.zeros(300))
    treated = (obs["condition"] == "treated").to_numpy()
    counts[:, 0] = 0
    counts[np.flatnonzero(treated)[0], 0] = 1
    rates = smooth.copy()
    rates[:, 0] = np.where(treated, 1e-6, 1e-7)
    expected[:, 0] = 3000 * rates[:, 0]
    how = BayesianConfig(min_total_count=1)
    table = bayesian_de(smooth_draws(rates, expected), obs, genes(300), counts=counts, config=how, **TREATED).table
    assert table["lfc_mean"][0] > 0.5
    assert not table["is_de"][0]
    # Oracle: gamma-distributed rates of which half a count is known in seven donors, and one and a half in one.
    known = 7 * special.polygamma(1, 0.5) + special.polygamma(1, 1.5)
    least = stats.norm.ppf(0.975) * np.sqrt(known / 16 * np.log2(np.e) ** 2)
    assert table["ci_high"][0] - table["lfc_mean"][0] >= least


def test_expression_of_a_donor_is_the_models_times_the_posterior_mean_of_its_departure():
    """Oracle: the same by pandas, and the posterior mean by quadrature."""
    rng = np.random.default_rng(23)
    obs = donors_obs(3, 2, n_cells=12)
    rates, expected = rng.gamma(2.0, 1e-3, (60, 40)), rng.gamma(2.0, 0.2, (60, 40))
    counts = rng.poisson(0.3, (60, 40)).astype(float)
    found = bayesian_de(smooth_draws(rates, expected), obs, genes(40), counts=sp.csr_matrix(counts), **TREATED).table
    by_donor = [obs["condition"], obs["donor"]]
    x, m = (pd.DataFrame(values).groupby(by_donor).sum() for values in (counts, expected))
    departure = (x + 0.5) / (m + 0.5)
    logs = np.log2(pd.DataFrame(rates).groupby(by_donor).mean() * departure + 1e-6)
    np.testing.assert_allclose(found["lfc_mean"], logs.loc["treated"].mean() - logs.loc["control"].mean())

    grid = np.linspace(1e-4, 20, 200_001)
    weight = stats.gamma.pdf(grid, 0.5, scale=2) * stats.poisson.pmf(x.iloc[0, 0], m.iloc[0, 0] * grid)
    assert departure.iloc[0, 0] == pytest.approx((grid * weight).sum() / weight.sum(), rel=0.01)


def test_draws_have_expected_counts_just_where_there_are_counts():
    obs, rates = donors_obs(3, 3), np.full((60, 3), 0.01)
    with pytest.raises(InvalidArgumentError, match=r"without counts \(rows, rates\); they yield 3 values"):
        bayesian_de(smooth_draws(rates, rates), obs, genes(3), **TREATED)
    with pytest.raises(InvalidArgumentError, match="With counts, draws have to yield .rows, rates, expected.*yield 2"):
        bayesian_de(smooth_draws(rates), obs, genes(3), counts=100 * rates, **TREATED)
    with pytest.raises(InvalidArgumentError, match="gene_names has 3 entries, but there are 2 columns of counts"):
        bayesian_de(smooth_draws(rates, rates), obs, genes(3), counts=rates[:, :2], **TREATED)
    with pytest.raises(InvalidArgumentError, match="expected have to be finite and non-negative"):
        bayesian_de(smooth_draws(rates, rates - 1), obs, genes(3), counts=100 * rates, **TREATED)


NO_DONORS = {**TREATED, "sample_key": None}


def test_without_donors_cells_are_the_replicates_and_everything_says_so():
    """Oracle: the standard error of a difference of means of independent cells, in log2."""
    rng = np.random.default_rng(31)
    obs = donors_obs(1, 1, n_cells=600).iloc[:1000]
    n_genes, cv = 800, 0.3
    rates = 1e-3 * rng.gamma(1 / cv**2, cv**2, (1000, n_genes))
    with pytest.warns(CellstillWarning, match="sample_key=None takes cells as the replicates"):
        result = bayesian_de(draws_of(rates, 2), obs, genes(n_genes), **NO_DONORS)
    first = (obs["condition"] == "treated").to_numpy()
    logs = np.log2(rates[first].mean(axis=0)) - np.log2(rates[~first].mean(axis=0))
    np.testing.assert_allclose(result.table["lfc_mean"], logs, atol=0.01)
    error = np.log2(np.e) * cv * np.sqrt(1 / 600 + 1 / 400)
    half_width = (result.table["ci_high"] - result.table["ci_low"]) / 2
    assert half_width.median() / stats.norm.ppf(0.975) == pytest.approx(error, rel=0.05)
    covered = (result.table["ci_low"] <= 0) & (result.table["ci_high"] >= 0)
    assert covered.mean() == pytest.approx(0.95, abs=0.025)
    assert result.n_cells == {"treated": 600, "control": 400}
    assert result.n_samples == {"treated": 10, "control": 10}
    assert result.units["pseudo_sample"].is_unique
    assert "Cells, not donors, are the replicates" in repr(result)


@pytest.mark.filterwarnings("ignore:sample_key=None")
def test_cells_are_dealt_at_random_whatever_their_order():
    rng = np.random.default_rng(34)
    obs = donors_obs(1, 1, n_cells=400)
    drift = np.tile(np.linspace(0.5, 1.5, 400), 2)
    rates = 1e-3 * drift[:, None] * rng.gamma(10.0, 0.1, (800, 100))
    table = bayesian_de(draws_of(rates, 2), obs, genes(100), **NO_DONORS).table
    error = np.log2(np.e) * np.std(rates / 1e-3) * np.sqrt(2 / 400)
    # Parts of neighbours would differ five times as much.
    assert ((table["ci_high"] - table["ci_low"]) / 2).median() / 2 == pytest.approx(error, rel=0.4)


def test_cells_of_few_donors_taken_for_replicates_call_donors_effects():
    """What the warning is about: two donors a side, no effect, and the deal does not know."""
    rng = np.random.default_rng(32)
    obs = donors_obs(2, 2, n_cells=100)
    rates = donor_rates(rng, obs, np.zeros(400), 0.5) * rng.gamma(11.0, 1 / 11, (400, 400))
    assert bayesian_de(draws_of(rates, 2), obs, genes(400), **TREATED).table["is_de"].sum() <= 1
    with pytest.warns(CellstillWarning, match="Cells of one donor are not replicates"):
        result = bayesian_de(draws_of(rates, 2), obs, genes(400), **NO_DONORS)
    assert result.table["is_de"].sum() > 50


@pytest.mark.filterwarnings("ignore:sample_key=None")
def test_cells_are_dealt_within_batches_into_parts_of_like_size():
    rng = np.random.default_rng(33)
    obs = donors_obs(1, 1, n_cells=200).iloc[:260]
    obs["lane"] = rng.choice(["a", "b"], len(obs), p=[0.7, 0.3])
    obs["pseudo_sample"] = "taken"
    rates = rng.gamma(10.0, 1e-4, (len(obs), 20))

    def compare(seed):
        config = BayesianConfig(seed=seed)
        return bayesian_de(draws_of(rates, 2), obs, genes(20), batch_key="lane", config=config, **NO_DONORS)

    result = compare(0)
    units = result.units
    assert result.design == "~ lane + condition"
    assert units["n_cells"].min() >= 10
    assert units["n_cells"].groupby([units["condition"], units["lane"]]).agg(np.ptp).max() <= 1
    # 200 cells make ten parts of 20; the 60 others are parts of at least 10.
    assert {group: (units["condition"] == group).sum() for group in ("treated", "control")} == {
        "treated": pytest.approx(10, abs=1),
        "control": pytest.approx(5, abs=1),
    }
    assert obs["pseudo_sample"].unique().tolist() == ["taken"]
    pd.testing.assert_frame_equal(result.table, compare(0).table)
    assert not np.allclose(result.table["ci_low"], compare(1).table["ci_low"])


@pytest.mark.filterwarnings("ignore:sample_key=None")
def test_too_few_cells_to_deal_is_an_error():
    obs = donors_obs(1, 1, n_cells=15)
    message = "pseudo-samples are parts of .*Pseudo-samples are the replicates.*'treated' has 1 and 'control' has 1"
    with pytest.raises(InvalidArgumentError, match=message):
        bayesian_de(draws_of(np.full((30, 3), 0.01), 2), obs, genes(3), **NO_DONORS)


@pytest.mark.filterwarnings("ignore:sample_key=None")
def test_parts_of_cells_that_are_left_out_are_not_called_samples():
    obs = donors_obs(1, 1, n_cells=100)
    obs["lane"] = np.where(np.arange(200) % 100 < 4, "small", "large")
    rates = np.random.default_rng(0).gamma(10.0, 1e-4, (200, 5))
    with pytest.warns(CellstillWarning, match=r"2 of \d+ pseudo-samples left out: .*\(4 cells\)") as caught:
        result = bayesian_de(draws_of(rates, 2), obs, genes(5), batch_key="lane", **NO_DONORS)
    (left_out,) = (str(item.message) for item in caught if "left out" in str(item.message))
    assert " samples" not in left_out
    assert "it is constant in these pseudo-samples" in " ".join(result.notes)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_estimated_floor_is_twice_the_spread_of_the_bulk(spread, share):
    rng = np.random.default_rng(41)
    n_genes, df = 4000, 8.0
    true = rng.normal(0, spread, n_genes)
    large = rng.random(n_genes) < share
    true[large] = rng.choice([-1, 1], large.sum()) * rng.uniform(2, 4, large.sum())
    scale = rng.uniform(0.05, 0.2, n_genes)
    found = estimate_floor(true + scale * rng.standard_t(df, n_genes), scale, df)
    # The median of all is a higher quantile of the rest: 1.13 and 1.6 times too wide with 10 and 30 % large effects.
    moved = stats.norm.ppf(0.5 + 0.25 / (1 - share)) / stats.norm.ppf(0.75)
    noise = 0.125**2
    expected = 2 * np.sqrt((spread**2 + noise) * moved**2 - noise)
    assert found == pytest.approx(expected, abs=0.08)


def test_estimated_floor_calls_nothing_in_a_null_and_separates_known_effects():
    rng = np.random.default_rng(42)
    obs, config = donors_obs(5, 5), BayesianConfig(delta=None)
    for true in (np.zeros(1500), rng.normal(0, 0.1, 1500)):
        rates = donor_rates(rng, obs, true, 0.25)
        null = bayesian_de(draws_of(rates, 2), obs, genes(1500), config=config, **TREATED)
        assert null.table["is_de"].sum() <= 1
    large = rng.random(1500) < 0.1
    true = np.where(large, rng.choice([-1, 1], 1500) * rng.uniform(0.8, 2.5, 1500), 0.0)
    result = bayesian_de(draws_of(donor_rates(rng, obs, true, 0.25), 2), obs, genes(1500), config=config, **TREATED)
    called = result.table["is_de"].to_numpy()
    assert called[large].mean() > 0.85
    assert (~large[called]).mean() < 0.09
    assert 0 <= result.params["delta"] < 0.4
    assert f"delta was estimated: {result.params['delta']:.3g}" in repr(result)


def test_variances_of_genes_with_other_counts_have_a_trend_of_their_own():
    rng = np.random.default_rng(43)
    level = rng.uniform(0, 8, 3000)
    true = 0.05 + np.exp(-level)
    found = variance_trend(true * rng.chisquare(6, 3000) / 6, level)
    bias = found / (true * np.exp(special.digamma(3) - np.log(3)))
    assert 0.8 < bias.min() < bias.max() < 1.25
    np.testing.assert_allclose(variance_trend(np.full(20, 0.3), level[:20]), 0.3)
    np.testing.assert_allclose(variance_trend(np.full(100, 0.3), np.zeros(100)), 0.3)


def test_interferon_genes_are_found_in_real_cells(real_data):
    """The share of each gene in a cell's own counts stands in for a model's rates."""
    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"))
    rates = adata.X.toarray()
    rates /= rates.sum(axis=1, keepdims=True)
    groups = {"groupby": "condition", "group1": "stim", "group2": "ctrl"}
    used = comparison_cells(adata.obs, **groups)
    draws = (((part, rates[part]) for part in np.array_split(used, 9)) for _ in range(2))
    with pytest.warns(CellstillWarning, match="'unassigned' in 'stim' .5 cells.: fewer than 10 cells"):
        result = bayesian_de(draws, adata.obs, adata.var_names, sample_key="donor", **groups)
    known = result.table.set_index("gene").loc[["ISG15", "IFI6", "IFIT1", "IFIT3", "MX1"]]
    assert (known["direction"] == "up").all()
    assert (known["ci_low"] > 2).all()
    assert result.design == "~ donor + condition"
    assert result.left_out["donor"].tolist() == ["unassigned"]


@pytest.mark.parametrize("half", [["101", "1015", "107", "1244"], ["101", "1016", "1256", "107"]])
def test_halves_of_the_untreated_donors_do_not_differ(real_data, half):
    """Genes of 50 counts per million or more; of rarer ones a cell's own counts are a poor stand-in for rates."""
    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"))
    adata = adata[adata.obs["condition"] == "ctrl"]
    rates = adata.X.toarray()
    rates /= rates.sum(axis=1, keepdims=True)
    expressed = rates.mean(axis=0) >= 5e-5
    rates, names = rates[:, expressed], adata.var_names[expressed]
    obs = adata.obs.assign(half=np.where(adata.obs["donor"].isin(half), "a", "b"))
    groups = {"groupby": "half", "group1": "a", "group2": "b", "sample_key": "donor"}
    table = bayesian_de([[(np.arange(len(rates)), rates)]] * 2, obs, names, **groups).table
    assert ((table["ci_low"] < 0) & (table["ci_high"] > 0)).mean() > 0.88
    assert table["is_de"].sum() <= 1
