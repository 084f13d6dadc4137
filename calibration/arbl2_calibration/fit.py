"""Estimates from block sums: points, effective sample sizes and intervals that know about dependence.

Orders that are sent within the same minutes meet the same market; they are not independent samples. Events are therefore summed
per time block, blocks are the unit of variance (a cluster-robust ratio estimator), and neighbouring blocks are merged while they
still resemble each other. From the variance follows the number of independent samples that would be worth as much (n_eff); the
interval is Wilson's with that number, widened for the few blocks it was estimated from (Korn & Graubard 1998).

Everything is NumPy over a small table; sums of integers come in, so equal data gives equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from arbl2.zones import PUBLISHED, FillRatio, Mean, Survival, ZoneRecord, nearest_published

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arbl2.zones import State, Zone, ZoneTable

SUMS = (
    "unresolved",
    "n",
    "y_e9",
    "y2_e9",
    "y_lo_e9",
    "y_hi_e9",
    "y_none",
    "y_all",
    "fill_e9",
    "priced",
    "half_spread_e6",
    "walk_e6",
    "drift_e6",
)
_AT = {name: place for place, name in enumerate(SUMS)}
E9, E6 = 1e9, 1e6

BLOCK_NS = 15 * 60 * 10**9
RHO_MERGE = 0.15
MIN_MERGE_BLOCKS = 40
Z95 = 1.959963984540054
MIN_N_EFF = 30.0
MIN_DF = 8.0
MIN_T_DF = 3.0  # below it the series for t is off by more than 1 %
MAX_WIDTH = 0.30
MAX_UNRESOLVED = 0.20


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sums of ``SUMS`` (int64[m, 13]) per zone (int64[m]) and time block (int64[m], block number since the epoch)."""

    zone: NDArray[np.int64]
    block: NDArray[np.int64]
    sums: NDArray[np.int64]

    def column(self, name: str) -> NDArray[np.int64]:
        """One sum by name."""
        column: NDArray[np.int64] = self.sums[:, _AT[name]]
        return column


@dataclass(frozen=True, slots=True)
class Dependence:
    """Length of the merged blocks, their number, and their lag-1 autocorrelation per level (None: no block follows another)."""

    block_ns: int
    blocks: int
    rho1: tuple[float | None, ...]

    @property
    def rho_max(self) -> float:
        """The largest resemblance of any level, 0 where none was measured."""
        return max(rho or 0.0 for rho in self.rho1)

    def inflation(self, level: int) -> float:
        """Factor on the variance for the resemblance that merging left over."""
        rho = self.rho1[level] or 0.0
        return max(1.0, (1.0 + rho) / (1.0 - rho))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of sums over blocks, the variance of that ratio, and its degrees of freedom. ``variance`` needs two blocks."""

    mean: float
    variance: float | None
    df: float
    blocks: int

    def t_interval(self) -> tuple[float, float] | None:
        """95 % interval of an unbounded mean; None where the blocks cannot carry one."""
        if not self.variance or self.df < MIN_DF:
            return None
        half = t_quantile(self.df) * sqrt(self.variance)
        return (self.mean - half, self.mean + half)


@dataclass(frozen=True, slots=True)
class Share:
    """A mean of values in [0, 1] with the sample size it is worth and Wilson's interval."""

    mean: float
    n_eff: float
    interval: tuple[float, float] | None


def combine(blocks: Blocks) -> Blocks:
    """Add up the rows that share zone and block; rows come back sorted by zone, then block."""
    order = np.lexsort((blocks.block, blocks.zone))
    zone, block, sums = blocks.zone[order], blocks.block[order], blocks.sums[order]
    first = np.ones(len(zone), dtype=bool)
    first[1:] = (np.diff(zone) != 0) | (np.diff(block) != 0)
    at = np.flatnonzero(first)
    return Blocks(zone[at], block[at], np.add.reduceat(sums, at, axis=0) if len(at) else sums)


def lag1(blocks: Blocks) -> float | None:
    """Autocorrelation of the survival residuals of neighbouring blocks, pooled over zones; blocks must be combined."""
    n, s = blocks.column("n").astype(np.float64), blocks.column("y_e9") / E9
    zones, at = np.unique(blocks.zone, return_inverse=True)
    weight, total = np.bincount(at, n, len(zones)), np.bincount(at, s, len(zones))
    residual = s - n * np.divide(total, weight, out=np.zeros(len(zones)), where=weight > 0)[at]
    follows = (np.diff(blocks.zone) == 0) & (np.diff(blocks.block) == 1)
    power = float(np.sum(residual * residual))
    if not follows.any() or power == 0.0:
        return None
    return float(np.sum((residual[1:] * residual[:-1])[follows])) / power


def merge(blocks: Blocks, table: ZoneTable, block_ns: int) -> tuple[list[Blocks], Dependence]:
    """Merge neighbouring blocks while they resemble each other and enough of them are left; one ``Blocks`` per level.

    Resemblance is measured on every level: a shock that all zones share hides in the noise of a single zone and shows in sums
    over many, and those sums are what small zones fall back to.
    """
    blocks = combine(blocks)
    while True:
        levels = [combine(Blocks(np.array(above)[blocks.zone], blocks.block, blocks.sums)) for above in table.above]
        found = Dependence(block_ns, len(np.unique(blocks.block)), tuple(lag1(level) for level in levels))
        if found.rho_max <= RHO_MERGE or found.blocks < MIN_MERGE_BLOCKS:
            return levels, found
        blocks, block_ns = combine(Blocks(blocks.zone, blocks.block // 2, blocks.sums)), 2 * block_ns


def cluster_ratio(weight: NDArray[np.float64], total: NDArray[np.float64], inflation: float = 1.0) -> Ratio:
    """Ratio of two sums over blocks (float64[G] each, weights > 0) with the variance between blocks.

    ``variance`` = G/(G-1) sum (S - pW)^2 / (sum W)^2 x ``inflation``; ``df`` = min(G, (sum W)^2 / sum W^2) - 1.
    """
    count, all_weight = len(weight), float(np.sum(weight))
    mean = float(np.sum(total)) / all_weight
    df = min(float(count), all_weight**2 / float(np.sum(weight * weight))) - 1.0
    if count < 2:
        return Ratio(mean, None, df, count)
    residual = total - mean * weight
    variance = count / (count - 1) * float(np.sum(residual * residual)) / all_weight**2
    return Ratio(mean, variance * inflation, df, count)


def share(ratio: Ratio, n: int, pooled_deff: float | None) -> Share:
    """Effective sample size and interval of a share.

    Where every value is 0 or every value is 1 the blocks show no variance; the zone then counts as many samples as the design
    effect of its siblings leaves it (``pooled_deff``), and at least its blocks.
    """
    boundary = ratio.mean in {0.0, 1.0} or not ratio.variance
    if boundary:
        n_eff = float(ratio.blocks) if pooled_deff is None else max(float(ratio.blocks), n / pooled_deff)
    else:
        assert ratio.variance is not None
        n_eff = min(float(n), ratio.mean * (1.0 - ratio.mean) / ratio.variance)
    n_eff = min(float(n), n_eff)
    if ratio.df < MIN_T_DF or n_eff <= 0.0:
        return Share(ratio.mean, n_eff, None)
    return Share(ratio.mean, n_eff, wilson(ratio.mean, n_eff * (Z95 / t_quantile(ratio.df)) ** 2))


def t_quantile(df: float) -> float:
    """97.5 % point of Student's t for ``df`` >= 3 by the Cornish-Fisher series, within 1 %."""
    z, d = Z95, df
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * d**4)
    )


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval for a share ``p`` of ``n`` (effective, not whole) samples."""
    z2 = Z95 * Z95
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if p == 0.0 else low, 1.0 if p == 1.0 else high)


def fit(blocks: Blocks, table: ZoneTable, block_ns: int = BLOCK_NS) -> tuple[list[ZoneRecord], Dependence]:
    """Every zone and ancestor of ``table``, level by level, and the dependence they were estimated under.

    ``blocks`` are sums per leaf zone and block of ``block_ns``.
    """
    levels, dependence = merge(blocks, table, block_ns)
    records: dict[str, ZoneRecord] = {}
    for step, (level, zones) in enumerate(zip(levels, table.levels, strict=True)):
        for record in _fit_level(level, zones, dependence.inflation(step)):
            records[record.zone_id] = record
    return [_with_fallback(record, records) for record in records.values()], dependence


def _with_fallback(record: ZoneRecord, records: dict[str, ZoneRecord]) -> ZoneRecord:
    return msgspec.structs.replace(record, uses_zone_id=nearest_published(record.zone_id, records))


def _fit_level(blocks: Blocks, level: tuple[Zone, ...], inflation: float) -> list[ZoneRecord]:
    edges = np.searchsorted(blocks.zone, np.arange(len(level) + 1))
    parts = [Blocks(blocks.zone[a:b], blocks.block[a:b], blocks.sums[a:b]) for a, b in pairwise(edges)]
    survivals = [_ratio(part, "y_e9", "n", E9, inflation) for part in parts]
    worth = [
        (n, share(ratio, n, None).n_eff)
        for part, ratio in zip(parts, survivals, strict=True)
        if ratio is not None and ratio.variance and (n := _total(part, "n"))
    ]
    pooled = sum(n for n, _ in worth) / sum(n_eff for _, n_eff in worth) if worth else None
    return [_record(zone, part, ratio, pooled, inflation) for zone, part, ratio in zip(level, parts, survivals, strict=True)]


def _ratio(part: Blocks, total: str, weight: str, scale: float, inflation: float) -> Ratio | None:
    counted = part.column(weight) > 0
    if not counted.any():
        return None
    return cluster_ratio(part.column(weight)[counted].astype(np.float64), part.column(total)[counted] / scale, inflation)


def _total(part: Blocks, name: str) -> int:
    return int(np.sum(part.column(name)))


def _record(zone: Zone, part: Blocks, ratio: Ratio | None, pooled: float | None, inflation: float) -> ZoneRecord:
    n, unresolved = _total(part, "n"), _total(part, "unresolved")
    unresolved_share = unresolved / (n + unresolved) if n + unresolved else None
    survival = None if ratio is None else share(ratio, n, pooled)
    state = _state(survival, ratio, unresolved_share)
    published = survival is not None and state in PUBLISHED
    fill = _ratio(part, "fill_e9", "n", E9, inflation)
    return ZoneRecord(
        zone_id=zone.zone_id,
        parent_id=zone.parent_id,
        bounds=zone.bounds,
        state=state,
        uses_zone_id=None,
        n=n,
        n_eff=survival.n_eff if survival else None,
        blocks=ratio.blocks if ratio else 0,
        df=ratio.df if ratio else None,
        deff=n / survival.n_eff if survival and survival.n_eff > 0 else None,
        unresolved=unresolved,
        unresolved_share=unresolved_share,
        id_bounds=(_total(part, "y_lo_e9") / E9 / n, _total(part, "y_hi_e9") / E9 / n) if n else None,
        survival=Survival(
            raw=survival.mean if survival else None,
            point=survival.mean if survival and state == "unvalidated" else None,
            ci95=survival.interval if survival and published else None,
            p0=_total(part, "y_none") / n if published else None,
            p1=_total(part, "y_all") / n if published else None,
        ),
        fill_ratio=_fill_ratio(fill, n, pooled, published=state == "unvalidated"),
        half_spread_bps=_mean(part, ("half_spread_e6",), inflation),
        walk_bps=_mean(part, ("walk_e6",), inflation),
        drift_bps=_mean(part, ("drift_e6",), inflation),
        slippage_bps=_mean(part, ("half_spread_e6", "walk_e6", "drift_e6"), inflation),
    )


def _state(survival: Share | None, ratio: Ratio | None, unresolved_share: float | None) -> State:
    """``ok`` is kept for zones that were also checked out of sample; nothing here does that, hence ``unvalidated``."""
    if unresolved_share is not None and unresolved_share > MAX_UNRESOLVED:
        return "unresolved"
    if survival is None or ratio is None or survival.interval is None:
        return "insufficient"
    low, high = survival.interval
    if survival.n_eff < MIN_N_EFF or ratio.df < MIN_DF or high - low > MAX_WIDTH:
        return "insufficient"
    return "degenerate" if not ratio.variance else "unvalidated"


def _fill_ratio(ratio: Ratio | None, n: int, pooled: float | None, *, published: bool) -> FillRatio:
    if ratio is None or not published:
        return FillRatio()
    estimate = share(ratio, n, pooled)
    return FillRatio(point=estimate.mean, ci95=estimate.interval)


def _mean(part: Blocks, names: tuple[str, ...], inflation: float) -> Mean:
    """Mean in bps of a sum of columns over filled legs; published from as many legs and blocks as a share would need."""
    counted = part.column("priced") > 0
    legs = _total(part, "priced")
    if not counted.any():
        return Mean()
    total = np.sum([part.column(name)[counted] for name in names], axis=0) / E6
    ratio = cluster_ratio(part.column("priced")[counted].astype(np.float64), total, inflation)
    if legs < MIN_N_EFF or ratio.df < MIN_DF:
        return Mean(n=legs)
    return Mean(n=legs, mean=ratio.mean, ci95=ratio.t_interval())
