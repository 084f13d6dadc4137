"""The estimators against slow twins, references and a market whose truth is known."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats

from arbl2.zones import ZoneCuts, ZoneTable
from arbl2_calibration.fit import (
    BLOCK_NS,
    SUMS,
    Blocks,
    cluster_ratio,
    combine,
    fit,
    lag1,
    merge,
    share,
    t_quantile,
    wilson,
)

TWELVE = ZoneTable(ZoneCuts(edge_bps=(0.0, 5.0, 10.0), size_over_depth=(0.0,), latency_ns=(0,)))
AT = {name: i for i, name in enumerate(SUMS)}


def blocks_of(zone: Any, block: Any, **sums: Any) -> Blocks:
    table = np.zeros((len(zone), len(SUMS)), dtype=np.int64)
    for name, values in sums.items():
        table[:, AT[name]] = values
    return Blocks(np.asarray(zone, dtype=np.int64), np.asarray(block, dtype=np.int64), table)


def events(seed: int, blocks: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Single values in [0, 1] and the block of each, unequal block sizes, shared shocks."""
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), rng.integers(1, 30, blocks))
    return np.clip(0.6 + 0.2 * rng.normal(size=blocks)[block] + 0.2 * rng.normal(size=len(block)), 0, 1), block


@pytest.mark.parametrize("seed", range(5))
def test_cluster_variance_equals_a_double_loop_over_the_events(seed: int) -> None:
    y, block = events(seed)
    weight, total = np.bincount(block).astype(float), np.bincount(block, y)
    ratio = cluster_ratio(weight, total)
    mean, count = sum(y) / len(y), block.max() + 1
    meat = sum((y[i] - mean) * (y[j] - mean) for i in range(len(y)) for j in range(len(y)) if block[i] == block[j])
    assert ratio.mean == pytest.approx(mean, rel=1e-13)
    assert ratio.variance == pytest.approx(count / (count - 1) * meat / len(y) ** 2, rel=1e-12)
    assert cluster_ratio(weight, total, 3.0).variance == pytest.approx(3.0 * ratio.variance)
    assert ratio.df == pytest.approx(min(count, len(y) ** 2 / sum(weight**2)) - 1)


@pytest.mark.parametrize("seed", range(5))
def test_cluster_variance_equals_statsmodels(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed; the loop twin still runs")
    y, block = events(seed)
    ratio = cluster_ratio(np.bincount(block).astype(float), np.bincount(block, y))
    found = models.OLS(y, np.ones(len(y))).fit(
        cov_type="cluster", cov_kwds={"groups": block, "use_correction": False, "df_correction": False}
    )
    count = block.max() + 1
    assert ratio.variance == pytest.approx(found.cov_params()[0, 0] * count / (count - 1), rel=1e-12)


def test_t_quantile_is_within_one_percent_from_three_degrees_of_freedom_on() -> None:
    for df in (3.0, 3.5, 4.0, 7.9, 8.0, 15.5, 40.0, 1_000.0):
        limit = 0.01 if df < 8 else 2e-4
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=limit)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 30), (29, 30), (300, 1_000), (0, 10_000)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    exact = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert wilson(k / n, n) == pytest.approx((exact.low, exact.high), abs=1.5 / n)


def test_n_eff_is_the_number_of_events_when_they_are_independent_and_of_blocks_when_they_agree() -> None:
    rng = np.random.default_rng(1)
    weight = np.full(2_000, 10.0)
    alone = cluster_ratio(weight, rng.binomial(10, 0.7, 2_000).astype(float))
    assert share(alone, 20_000, None).n_eff == pytest.approx(20_000, rel=0.08)
    together = cluster_ratio(weight, 10.0 * rng.binomial(1, 0.7, 2_000))
    assert share(together, 20_000, None).n_eff == pytest.approx(2_000, rel=0.08)


def test_interval_is_wilson_with_the_effective_number_widened_for_few_blocks() -> None:
    y, block = events(3)
    ratio = cluster_ratio(np.bincount(block).astype(float), np.bincount(block, y))
    assert ratio.variance is not None
    n_eff = min(len(y), ratio.mean * (1 - ratio.mean) / ratio.variance)
    n_star = n_eff * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, ratio.df)) ** 2
    z = stats.norm.ppf(0.975)
    middle, half = ratio.mean + z * z / 2 / n_star, z * np.sqrt(ratio.mean * (1 - ratio.mean) / n_star + (z / 2 / n_star) ** 2)
    expected = ((middle - half) / (1 + z * z / n_star), (middle + half) / (1 + z * z / n_star))
    assert share(ratio, len(y), None).interval == pytest.approx(expected, abs=1e-5)


def test_combine_adds_rows_of_the_same_zone_and_block() -> None:
    rng = np.random.default_rng(2)
    zone, block, n = rng.integers(0, 4, 200), rng.integers(-3, 5, 200), rng.integers(0, 9, 200)
    combined = combine(blocks_of(zone, block, n=n))
    expected: dict[tuple[int, int], int] = {}
    for key in zip(zone.tolist(), block.tolist(), strict=True):
        expected[key] = expected.get(key, 0)
    for z, b, value in zip(zone.tolist(), block.tolist(), n.tolist(), strict=True):
        expected[z, b] += value
    found = dict(
        zip(zip(combined.zone.tolist(), combined.block.tolist(), strict=True), combined.column("n").tolist(), strict=True)
    )
    assert list(found) == sorted(expected)
    assert found == expected


def test_lag1_equals_a_loop_and_counts_only_true_neighbours() -> None:
    rng = np.random.default_rng(3)
    keys = sorted({(int(z), int(b)) for z, b in zip(rng.integers(0, 3, 150), rng.integers(0, 60, 150), strict=True)})
    n = rng.integers(1, 9, len(keys))
    y = (rng.random(len(keys)) * n * 1e9).astype(np.int64)
    blocks = blocks_of([z for z, _ in keys], [b for _, b in keys], n=n, y_e9=y)
    mean = {
        z: sum(y[i] for i, k in enumerate(keys) if k[0] == z) / sum(n[i] for i, k in enumerate(keys) if k[0] == z)
        for z in range(3)
    }
    residual = {key: (y[i] - mean[key[0]] * n[i]) / 1e9 for i, key in enumerate(keys)}
    above = sum(e * residual.get((z, b - 1), 0.0) for (z, b), e in residual.items())
    assert lag1(blocks) == pytest.approx(above / sum(e * e for e in residual.values()), rel=1e-9)
    assert lag1(blocks_of([0, 0, 1], [1, 3, 4], n=[5, 5, 5], y_e9=[0, 10**9, 10**9])) is None


def chain(seed: int, count: int, ar: float) -> Blocks:
    """One zone, thirty events per block, a shock that decays by ``ar`` per block."""
    rng = np.random.default_rng(seed)
    shock = np.zeros(count)
    for b in range(1, count):
        shock[b] = ar * shock[b - 1] + rng.normal()
    y = rng.binomial(30, 1 / (1 + np.exp(-shock)))
    return blocks_of(np.zeros(count), np.arange(count), n=30, y_e9=y * 10**9)


def test_blocks_are_merged_while_neighbours_resemble_each_other_and_forty_are_left() -> None:
    _, independent = merge(chain(1, 400, 0.0), TWELVE, BLOCK_NS)
    assert (independent.block_ns, independent.blocks) == (BLOCK_NS, 400)
    levels, dependent = merge(chain(1, 400, 0.8), TWELVE, BLOCK_NS)
    assert dependent.block_ns in {4 * BLOCK_NS, 8 * BLOCK_NS, 16 * BLOCK_NS}
    assert dependent.blocks == -(-400 * BLOCK_NS // dependent.block_ns) >= 20
    assert int(levels[-1].column("n").sum()) == 400 * 30
    _, short = merge(chain(1, 39, 0.9), TWELVE, BLOCK_NS)
    assert short.blocks == 39
    assert short.rho_max > 0.15
    rho = short.rho1[0]
    assert rho is not None
    assert short.inflation(0) == pytest.approx((1 + rho) / (1 - rho))


def test_a_zone_without_samples_is_unknown_and_points_at_what_is_known() -> None:
    rng = np.random.default_rng(4)
    block = np.arange(200)
    only = blocks_of(np.zeros(200), block, n=10, y_e9=rng.binomial(10, 0.8, 200) * 10**9, fill_e9=10**9)
    records, _ = fit(only, TWELVE)
    by_id = {record.zone_id: record for record in records}
    first, *rest = [by_id[zone.zone_id] for zone in TWELVE.zones]
    assert (first.state, first.uses_zone_id, first.n, first.blocks) == ("unvalidated", first.zone_id, 2_000, 200)
    assert first.survival.next_session95 is None
    for record in rest:
        assert (record.state, record.n, record.blocks) == ("insufficient", 0, 0)
        assert (record.n_eff, record.df, record.deff, record.unresolved_share, record.id_bounds) == (None,) * 5
        survival = record.survival
        assert (survival.raw, survival.point, survival.ci95, survival.p0, survival.p1) == (None,) * 5
        assert record.fill_ratio.point is None
        assert record.slippage_bps.mean is None
        same_group = record.zone_id.startswith("upbit.buy")
        assert record.uses_zone_id == (first.parent_id if same_group else "all")
    nothing, _ = fit(blocks_of([], []), TWELVE)
    assert {(record.state, record.uses_zone_id) for record in nothing} == {("insufficient", None)}


def test_calm_zones_are_degenerate_and_publish_a_bound_but_no_point() -> None:
    rng = np.random.default_rng(5)
    calm = blocks_of(np.zeros(100), np.arange(100), n=20, y_e9=20 * 10**9)
    calm_alone = fit(calm, TWELVE)[0][0]
    assert (calm_alone.state, calm_alone.n_eff) == ("degenerate", 100.0)
    assert calm_alone.survival.point is None
    assert calm_alone.survival.ci95 is not None
    low, high = calm_alone.survival.ci95
    assert (high, low) == (1.0, pytest.approx(1 / (1 + t_quantile(99) ** 2 / 100), abs=1e-12))
    shock = rng.binomial(1, 0.7, 100) * 20 * 10**9  # a sibling whose blocks agree with themselves: deff about 20
    both = blocks_of(
        np.repeat([0, 1], 100), np.tile(np.arange(100), 2), n=20, y_e9=np.concatenate([np.full(100, 20 * 10**9), shock])
    )
    assert fit(both, TWELVE)[0][0].n_eff == pytest.approx(100.0, rel=0.03)
    spread = rng.binomial(20, 0.7, 100) * 10**9  # a sibling of independent events: deff about 1
    both = blocks_of(
        np.repeat([0, 1], 100), np.tile(np.arange(100), 2), n=20, y_e9=np.concatenate([np.full(100, 20 * 10**9), spread])
    )
    assert 1_000 < (fit(both, TWELVE)[0][0].n_eff or 0) <= 2_000


@pytest.mark.parametrize(
    ("blocks", "per_block", "p", "published"),
    [(8, 50, 0.8, False), (10, 50, 0.8, True), (25, 1, 0.96, False), (60, 1, 0.5, True), (35, 1, 0.5, False)],
)
def test_weak_zones_are_not_published(blocks: int, per_block: int, p: float, published: bool) -> None:
    """8 blocks: df 7. 25 x 1: n_eff 25 with a narrow interval. 35 x 1: n_eff passes, the interval is wider than 0.30."""
    spread = np.resize([1, -1], blocks) * max(1, per_block // 20) if per_block > 1 else np.zeros(blocks)
    y = np.round(per_block * p + spread) if per_block > 1 else np.arange(blocks) % round(1 / (1 - p)) > 0
    record = fit(blocks_of(np.zeros(blocks), np.arange(blocks), n=per_block, y_e9=y.astype(np.int64) * 10**9), TWELVE)[0][0]
    assert record.published is published
    assert record.state == ("unvalidated" if published else "insufficient")
    assert (record.survival.ci95 is not None) is published
    assert record.survival.raw is not None


@pytest.mark.parametrize(("unresolved", "state"), [(2, "unvalidated"), (3, "unresolved")])
def test_more_than_a_fifth_unresolved_says_so(unresolved: int, state: str) -> None:
    rng = np.random.default_rng(6)
    blocks = blocks_of(np.zeros(100), np.arange(100), n=8, unresolved=unresolved, y_e9=rng.binomial(8, 0.8, 100) * 10**9)
    record = fit(blocks, TWELVE)[0][0]
    assert (record.state, record.unresolved, record.unresolved_share) == (state, 100 * unresolved, unresolved / (8 + unresolved))
    assert (record.survival.point is None) is (state == "unresolved")


def known_market(
    rng: np.random.Generator, count: int, ar: float, *, rate: float = 5.0, sd: float = 0.7
) -> tuple[Blocks, list[np.ndarray]]:
    """Twelve zones with one shock per block for all of them; returns the true mean of every zone, level by level.

    An event survives whole with chance q = logistic(base + shock); of the others one in five survives by half.
    """
    base, rates = np.linspace(-0.5, 2.0, 12), rate * np.exp(np.linspace(-0.5, 0.5, 12))
    shock = rng.normal(size=count)
    for b in range(1, count):
        shock[b] = ar * shock[b - 1] + np.sqrt(1 - ar * ar) * shock[b]
    q = 1 / (1 + np.exp(-(base[:, None] + sd * shock)))
    n = rng.poisson(rates[:, None], q.shape)
    whole = rng.binomial(n, q)
    half = rng.binomial(n - whole, 0.2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    truth = (1 / (1 + np.exp(-(base[:, None] + sd * nodes)))) @ (weights / weights.sum())
    truth = truth + (1 - truth) * 0.1
    zone, block = np.nonzero(n)
    sums = blocks_of(zone, block, n=n[zone, block], y_e9=whole[zone, block] * 10**9 + half[zone, block] * 5 * 10**8)
    levels = []
    for level, above in zip(TWELVE.levels, TWELVE.above, strict=True):
        weight = np.bincount(above, rates, len(level))
        levels.append(np.bincount(above, rates * truth, len(level)) / weight)
    return sums, levels


@pytest.mark.parametrize(("ar", "count", "least"), [(0.0, 192, 0.93), (0.6, 192, 0.92), (0.6, 480, 0.93)])
def test_intervals_cover_the_truth(ar: float, count: int, least: float) -> None:
    """200 seeded markets. Intervals must hold for zones and for what they fall back to; an i.i.d. interval must not."""
    covered: list[list[bool]] = [[], [], [], []]
    naive: list[bool] = []
    per_zone: list[list[bool]] = [[] for _ in TWELVE.zones]
    for seed in range(200):
        sums, truth = known_market(np.random.default_rng([seed, count]), count, ar)
        records = iter(fit(sums, TWELVE)[0])
        for step, level in enumerate(TWELVE.levels):
            for place in range(len(level)):
                record, true = next(records), truth[step][place]
                assert record.survival.ci95 is not None
                low, high = record.survival.ci95
                covered[step].append(low <= true <= high)
                if step == 0:
                    per_zone[place].append(covered[0][-1])
                if step == 3:
                    low, high = wilson(record.survival.raw or 0.0, record.n)
                    naive.append(low <= true <= high)
    shares = [float(np.mean(level)) for level in covered]
    worst = min(float(np.mean(zone)) for zone in per_zone)
    print(f"AR {ar}, {count} blocks: coverage by level {shares}, worst zone {worst}, i.i.d. at the top {np.mean(naive)}")
    assert least <= shares[0] <= 0.98
    assert min(shares) >= 0.90
    assert worst >= 0.88
    assert np.mean(naive) < 0.80
