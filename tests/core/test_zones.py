from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.errors import ConfigError
from arbl2.zones import ALL, SIDES, VENUES, Zone, ZoneCuts, ZoneTable

TABLE = ZoneTable()


def holds(zone: Zone, venue: str, side: str, edge: float, size: float, latency: int) -> bool:
    """The bounds of a zone, read one by one: the slow twin of the matcher."""

    def inside(value: float, interval: tuple[float, float | None] | None) -> bool:
        assert interval is not None
        low, high = interval
        return low <= value < (math.inf if high is None else high)

    bounds = zone.bounds
    return (
        bounds.venue == venue
        and bounds.side == side
        and inside(abs(edge), bounds.edge_bps)
        and inside(size, bounds.size_over_depth)
        and inside(latency, bounds.latency_ns)
    )


edges = st.one_of(st.sampled_from([0.0, -0.0, 5.0, -5.0, 7.0, 12.0, 20.0, -20.0, math.inf, -math.inf, math.nan]), st.floats())
sizes = st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, math.nextafter(0.25, 0.0), math.inf, math.nan]), st.floats())
latencies = st.one_of(st.sampled_from([-1, 0, 24_999_999, 25_000_000, 800_000_000]), st.integers(-(2**63), 2**63 - 1))


@given(st.sampled_from(VENUES), st.sampled_from(SIDES), edges, sizes, latencies)
def test_every_market_state_has_exactly_one_zone_and_nothing_else_has_any(
    venue: str, side: str, edge: float, size: float, latency: int
) -> None:
    matching = [zone for zone in TABLE.zones if holds(zone, venue, side, edge, size, latency)]
    is_state = math.isfinite(edge) and math.isfinite(size) and size >= 0 and latency >= 0
    assert len(matching) == int(is_state)
    assert TABLE.select(venue, side, edge, size, latency) == (matching[0] if matching else None)


@pytest.mark.parametrize(
    ("edge", "size", "latency", "zone_id"),
    [
        (7.0, 0.25, 25_000_000, "upbit.buy.edge7-12.size0.25-0.5.ms25-50"),
        (-7.0, 0.25, 25_000_000, "upbit.buy.edge7-12.size0.25-0.5.ms25-50"),
        (math.nextafter(7.0, 0.0), math.nextafter(0.25, 0.0), 24_999_999, "upbit.buy.edge5-7.size0-0.25.ms0-25"),
        (1e300, 1.0, 2**62, "upbit.buy.edge20+.size1+.ms800+"),
    ],
)
def test_a_value_on_a_cut_belongs_to_the_interval_that_it_opens(edge: float, size: float, latency: int, zone_id: str) -> None:
    zone = TABLE.select("upbit", "buy", edge, size, latency)
    assert zone is not None
    assert zone.zone_id == zone_id


def test_unknown_venue_or_side_selects_nothing() -> None:
    assert TABLE.select("kraken", "buy", 1.0, 0.1, 1) is None
    assert TABLE.select("upbit", "BUY", 1.0, 0.1, 1) is None


def test_the_chain_goes_up_by_edge_then_size_then_all() -> None:
    by_id = {zone.zone_id: zone for level in TABLE.levels for zone in level}
    assert len(by_id) == sum(map(len, TABLE.levels)) == 560 + 112 + 28 + 1
    for i, leaf in enumerate(TABLE.zones):
        at: Zone = leaf
        for level, above in zip(TABLE.levels[1:], TABLE.above[1:], strict=True):
            assert at.parent_id is not None
            at = by_id[at.parent_id]
            assert at == level[above[i]]
        assert at.zone_id == ALL
        by_size, by_latency = (TABLE.levels[k][TABLE.above[k][i]].bounds for k in (1, 2))
        assert (by_size.edge_bps, by_size.size_over_depth) == (None, leaf.bounds.size_over_depth)
        assert (by_latency.edge_bps, by_latency.size_over_depth, by_latency.latency_ns) == (None, None, leaf.bounds.latency_ns)


def test_toml_sets_the_cuts_and_leaves_the_rest_at_its_default() -> None:
    table = ZoneTable.from_toml("edge_bps = [0, 4.5, inf]\nlatency_ms = [0, 0.5, 40, inf]\n")
    assert table.cuts == ZoneCuts(edge_bps=(0.0, 4.5), latency_ns=(0, 500_000, 40_000_000))
    assert table.sha256 != TABLE.sha256
    assert ZoneTable.from_toml("").sha256 == TABLE.sha256
    zone = table.select("upbit", "sell", 4.5, 0.0, 500_000)
    assert zone is not None
    assert zone.zone_id == "upbit.sell.edge4.5+.size0-0.25.ms0.5-40"


@pytest.mark.parametrize(
    "text",
    [
        "edge_bps = [1, 5, inf]",
        "edge_bps = [0, 5]",
        "edge_bps = [0, 5, 5, inf]",
        "edge_bps = [0, 7, 5, inf]",
        "edge_bps = [0, nan, inf]",
        "edge_bps = [0, inf, inf]",
        "edge_bps = [inf]",
        "edge_bps = []",
        "edge_bps = ['0', 'inf']",
        "edge_bps = [true, inf]",
        "edges = [0, inf]",
        "latency_ms = [0, 1e-9, inf]",
        "latency_ms = [0, 1e300, inf]",
        "edge_bps = [0,",
        "edge_bps = " + "[" * 5_000,
        "edge_bps = [" + ", ".join(map(str, range(3_000))) + ", inf]",
    ],
)
def test_tables_with_gaps_overlaps_or_foreign_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="my zones"):
        ZoneTable.from_toml(text, where="my zones")
