"""The scan: SQL against slow twins, and everything that must be refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.errors import EvidenceError, StorageError, TapeError
from arbl2.zones import ZoneCuts, ZoneTable
from arbl2_calibration import calibrate
from arbl2_calibration.fit import BLOCK_NS, SUMS
from arbl2_calibration.runs import open_runs
from arbl2_calibration.store import Store, zone_macro

if TYPE_CHECKING:
    from pathlib import Path

TABLES = (ZoneTable(), ZoneTable(ZoneCuts(edge_bps=(0.0, 0.1, 1 / 3), size_over_depth=(0.0, 1e-9), latency_ns=(0, 1, 2**61))))
edges = st.one_of(
    st.sampled_from([0.0, -0.0, 5.0, -5.0, 7.0, -7.0, 12.0, 20.0, 0.1, -0.1, 1 / 3, math.inf, -math.inf, math.nan]),
    st.sampled_from([math.nextafter(cut, way) for cut in (0.0, 5.0, 7.0, 0.1, 1 / 3) for way in (-math.inf, math.inf)]),
    st.floats(),
)
sizes = st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1e-9, math.inf, math.nan]), st.floats())
latencies = st.one_of(st.sampled_from([-1, 0, 1, 24_999_999, 25_000_000, 2**61]), st.integers(-(2**63), 2**63 - 1))
names = st.sampled_from(["upbit", "binance", "kraken", ""]), st.sampled_from(["buy", "sell", "BUY"])


@pytest.fixture(scope="module")
def databases() -> Any:
    opened = [duckdb.connect() for _ in TABLES]
    for database, table in zip(opened, TABLES, strict=True):
        database.execute(zone_macro(table))
    yield opened
    for database in opened:
        database.close()


@given(st.lists(st.tuples(*names, edges, sizes, latencies), min_size=1, max_size=40), st.integers(0, len(TABLES) - 1))
def test_sql_and_python_choose_the_same_zone(databases: Any, states: list[tuple[Any, ...]], which: int) -> None:
    rows = ", ".join(
        f"({i}, '{venue}', '{side}', '{edge!r}'::DOUBLE, '{size!r}'::DOUBLE, '{latency}'::BIGINT)"
        for i, (venue, side, edge, size, latency) in enumerate(states)
    )
    query = f"SELECT zone_no(v, s, e, d, l) FROM (VALUES {rows}) AS t(i, v, s, e, d, l) ORDER BY i"
    found = [row[0] for row in databases[which].execute(query).fetchall()]
    assert found == [TABLES[which].index(*state) for state in states]


def test_a_missing_ratio_has_no_zone_in_sql(databases: Any) -> None:
    assert databases[0].execute(
        "SELECT zone_no('upbit', 'buy', 1.0, NULL, 1), zone_no('upbit', 'buy', NULL, 0.1, 1)"
    ).fetchone() == (
        None,
        None,
    )


def test_block_sums_equal_a_loop_over_the_rows(lab: Any, tmp_path: Path) -> None:
    columns = awkward(lab)
    table = ZoneTable()
    with Store(table) as store:
        store.load(open_runs([lab.write_run(tmp_path / "run", columns)])[0])
        blocks, sessions = store.block_sums(BLOCK_NS)
        refused = store.summary().refused
    expected, counted = slow_block_sums(columns, table, 2 * lab.GAP_NS)
    found = {
        (int(zone), int(block)): dict(zip(SUMS, sums.tolist(), strict=True))
        for zone, block, sums in zip(blocks.zone, blocks.block, blocks.sums, strict=True)
    }
    assert found.keys() == expected.keys()
    for key, sums in expected.items():
        for name, value in sums.items():
            assert found[key][name] == pytest.approx(value, abs=2 * max(1, sums["n"])), (key, name)
            if name in {"n", "unresolved", "priced", "y_none", "y_all"}:
                assert found[key][name] == value
    assert refused == counted
    assert all(counted.values()), "every verdict must be exercised"
    assert set(sessions) == {"20260921T000000Z"}


def awkward(lab: Any) -> dict[str, np.ndarray]:
    """A market with every way of not being fitted, and brackets around the decision book."""
    columns = lab.market(5, n=4_000, latency_ns=40_000_000)
    rng = np.random.default_rng(6)
    same_book = columns["before_ns"] == columns["decision_book_ns"]
    columns["before_e8"] = np.where(same_book, columns["visible_e8"], columns["before_e8"])
    columns["after_ns"] = columns["before_ns"] + rng.choice([100_000_000, 190_000_000, 260_000_000], 4_000)
    columns["first_in_episode"] = rng.random(4_000) < 0.9
    columns["resolved"] = rng.random(4_000) < 0.9
    columns["after_ns"] = np.where(columns["resolved"], columns["after_ns"], 0)
    columns["edge_bps"] = np.where(rng.random(4_000) < 0.02, math.inf, columns["edge_bps"])
    blind = rng.random(4_000) < 0.02
    for name in ("visible_e8", "depth_e8", "before_e8", "after_e8", "filled_e8", "visible_quote_e8", "quote_e8"):
        columns[name] = np.where(blind, 0, columns[name])
    columns["bid_px_e8"] = np.where(rng.random(4_000) < 0.02, 0, columns["bid_px_e8"])
    on_the_book = rng.random(4_000) < 0.05
    for name in ("time_ns", "decision_book_ns"):
        columns[name] = np.where(on_the_book & same_book, columns["before_ns"] - 40_000_000, columns[name])
    columns["decision_book_ns"] = np.where(on_the_book & same_book, columns["time_ns"], columns["decision_book_ns"])
    columns["arrive_ns"] = columns["time_ns"] + 40_000_000
    return columns


def slow_block_sums(columns: dict[str, np.ndarray], table: ZoneTable, g_max: int) -> tuple[dict[Any, Any], dict[str, int]]:
    sums: dict[Any, Any] = {}
    refused = dict.fromkeys(("repeated", "nothing_visible", "no_zone", "unresolved"), 0)
    for i in range(len(columns["order_id"])):
        row = {name: column[i].item() for name, column in columns.items()}
        x, depth = row["visible_e8"], row["depth_e8"]
        if not row["first_in_episode"]:
            refused["repeated"] += 1
            continue
        if x == 0:
            refused["nothing_visible"] += 1
            continue
        zone = table.index(row["venue"], row["side"], row["edge_bps"], x / depth, row["arrive_ns"] - row["time_ns"])
        if zone is None:
            refused["no_zone"] += 1
            continue
        at = sums.setdefault((zone, row["time_ns"] // BLOCK_NS), dict.fromkeys(SUMS, 0))
        lag, lead = row["arrive_ns"] - row["before_ns"], row["after_ns"] - row["arrive_ns"]
        newer = row["before_ns"] > row["decision_book_ns"]
        if not (row["resolved"] and (newer or (lag > 0 and lag <= g_max and lead <= g_max))):
            refused["unresolved"] += 1
            at["unresolved"] += 1
            continue
        y_before, y_after = row["before_e8"] / x, row["after_e8"] / x
        y = y_before + lag / (lag + lead) * (y_after - y_before)
        at["n"] += 1
        at["y_e9"] += y * 1e9
        at["y2_e9"] += y * y * 1e9
        at["y_lo_e9"] += min(y_before, y_after) * 1e9
        at["y_hi_e9"] += max(y_before, y_after) * 1e9
        at["y_none"] += y == 0
        at["y_all"] += y == 1
        at["fill_e9"] += y * x / row["size_e8"] * 1e9
        if row["filled_e8"] > 0 and row["bid_px_e8"] > 0:
            mid = (row["bid_px_e8"] + row["ask_px_e8"]) / 2
            sign, touch = (1, row["ask_px_e8"]) if row["side"] == "buy" else (-1, row["bid_px_e8"])
            seen, got = row["visible_quote_e8"] / x * 1e8, row["quote_e8"] / row["filled_e8"] * 1e8
            at["priced"] += 1
            at["half_spread_e6"] += sign * (touch - mid) / mid * 1e10
            at["walk_e6"] += sign * (seen - touch) / mid * 1e10
            at["drift_e6"] += sign * (got - seen) / mid * 1e10
    return sums, refused


def test_outcomes_of_a_model_are_refused(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(1)
    for source, words in (("model", "a fill model made"), (None, "does not say"), ("backtest", "'backtest'")):
        with pytest.raises(EvidenceError, match=words):
            calibrate([lab.write_run(tmp_path / str(source), columns, source=source)], out=tmp_path / "out")
    with pytest.raises(EvidenceError, match="contradicts itself"):
        calibrate([lab.write_run(tmp_path / "liar", columns, said="model")], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def origin_d86(lab: Any, *, noise: float = 0.0) -> dict[str, np.ndarray]:
    """The origin's session as its reports describe it: twenty minutes, 1,000 available of 3,826 ordered, buys fill 26.15 % and
    sells all of what the buys gave."""
    columns = lab.market(2, n=240, hours=1 / 3)
    rng = np.random.default_rng(3)
    share = np.where(columns["side"] == "sell", 1.0, 0.2615) - noise * rng.random(240)
    columns["size_e8"] = columns["visible_e8"] = (3_826 + np.arange(240) % 12) * 10**6
    columns["depth_e8"] = columns["size_e8"] * 2
    columns["before_e8"] = columns["after_e8"] = columns["filled_e8"] = np.round(share * columns["size_e8"]).astype(np.int64)
    return columns


def test_the_origins_circular_calibration_is_refused(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="a fill model made"):
        calibrate([lab.write_run(tmp_path / "honest", origin_d86(lab), source="model")], out=tmp_path / "out")
    with pytest.raises(EvidenceError, match="a formula, not a market"):
        calibrate([lab.write_run(tmp_path / "mislabelled", origin_d86(lab))], out=tmp_path / "out")


def test_twenty_minutes_publish_no_zone_even_when_the_outcomes_vary(lab: Any, tmp_path: Path) -> None:
    result = calibrate([lab.write_run(tmp_path / "run", origin_d86(lab, noise=0.2))], out=tmp_path / "out")
    assert result.table.record("all").n == 240
    assert result.table.record("all").blocks <= 2
    for record in result.table.artefact.zones:
        assert record.state == "insufficient"
        assert record.uses_zone_id is None
        assert record.survival.point is None
        assert record.survival.ci95 is None
        assert record.slippage_bps.mean is None


def test_latency_zero_is_a_self_test_and_never_evidence(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(3, latency_ns=0)
    with pytest.raises(EvidenceError, match="even fail it"):
        calibrate([lab.write_run(tmp_path / "bad", columns)], out=tmp_path / "out")
    columns["before_e8"] = columns["visible_e8"]
    with pytest.raises(EvidenceError, match=r"self-test, never evidence\. Replay"):
        calibrate([lab.write_run(tmp_path / "zero", columns)], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolved": False}, "no order is resolved"),
        ({"edge_bps": 0.0}, "every edge is 0"),
        ({"visible_e8": 10**6, "depth_e8": 10**8, "before_e8": 10**5, "after_e8": 0}, "different quantities"),
    ],
)
def test_data_that_cannot_carry_a_calibration_is_refused(lab: Any, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    columns = lab.market(4)
    for name, value in change.items():
        columns[name] = np.full_like(columns[name], value)
    with pytest.raises(EvidenceError, match=words):
        calibrate([lab.write_run(tmp_path / "run", columns)], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("venue", "kraken", "unknown venue"),
        ("side", "hold", "unknown side"),
        ("symbol", "DOGE", "no line for its venue and symbol"),
        ("arrive_ns", 5, "an arrival before its decision"),
        ("decision_book_ns", 2**60 * 4, "a decision book from after the decision"),
        ("visible_e8", 10**12, "a visible quantity outside"),
        ("filled_e8", 10**12, "a fill outside the order"),
        ("after_ns", 5, "do not lie around the arrival"),
        ("before_e8", 10**12, "a survival outside 0 and 1"),
        ("after_e8", -1, "a survival outside 0 and 1"),
        ("time_ns", -(2**63), "cannot be read .*verflow"),
        ("order_id", 1, "more than once"),
    ],
)
def test_rows_that_no_honest_run_holds_name_the_order(lab: Any, tmp_path: Path, name: str, value: Any, words: str) -> None:
    columns = lab.market(4, n=50)
    columns[name] = columns[name].astype(object) if isinstance(value, str) else columns[name]
    columns[name][7] = value
    with pytest.raises(TapeError, match=words):
        calibrate([lab.write_run(tmp_path / "run", columns)], out=tmp_path / "out")


def test_damaged_files_are_named(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(4, n=2_000)
    with pytest.raises(TapeError, match=r"no fills\.parquet"):
        calibrate([tmp_path / "nowhere"], out=tmp_path / "out")
    for number, (old, new, words) in enumerate(
        [
            ("visible_e8", None, "no column 'visible_e8'"),
            ("visible_e8", np.full(2_000, 0.5), "'visible_e8' is double, not int64"),
            ("resolved", np.ones(2_000, dtype=np.int64), "'resolved' is int64, not bool"),
        ]
    ):
        changed = {name: column for name, column in columns.items() if name != old} | ({} if new is None else {old: new})
        with pytest.raises(TapeError, match=words):
            calibrate([lab.write_run(tmp_path / f"columns{number}", changed)], out=tmp_path / "out")
    with pytest.raises(TapeError, match="version 1"):
        calibrate([lab.write_run(tmp_path / "version", columns, version="2")], out=tmp_path / "out")
    with pytest.raises(EvidenceError, match="no run sent an order"):
        calibrate([lab.write_run(tmp_path / "empty", lab.take(columns, slice(0)))], out=tmp_path / "out")
    run = lab.write_run(tmp_path / "cut", columns)
    whole = (run / "fills.parquet").read_bytes()
    (run / "fills.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TapeError, match="cannot be read"):
        calibrate([run], out=tmp_path / "out")
    (run / "fills.parquet").write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    with pytest.raises(TapeError, match="cannot be read"):
        calibrate([run], out=tmp_path / "out")


def test_a_null_is_named_by_its_column(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(4, n=50)
    columns["quote_e8"] = [None, *columns["quote_e8"][1:].tolist()]
    with pytest.raises(TapeError, match="column 'quote_e8' is empty in 1 rows"):
        calibrate([lab.write_run(tmp_path / "run", columns)], out=tmp_path / "out")


@pytest.mark.parametrize("key", ["run", "tape", "digest", "outcome_source", "books", "config", "rules"])
def test_every_missing_key_of_the_run_file_is_named(lab: Any, tmp_path: Path, key: str) -> None:
    run = lab.write_run(tmp_path / "run", lab.market(4, n=50), change=lambda run: run.pop(key))
    with pytest.raises(TapeError, match=f"missing required field `{key}`"):
        calibrate([run], out=tmp_path / "out")


def test_a_damaged_run_file_is_named(lab: Any, tmp_path: Path) -> None:
    run = lab.write_run(tmp_path / "run", lab.market(4, n=50))
    for text in ("", "[]", "[" * 100_000, '{"run": \xff}'):
        (run / "run.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(TapeError, match=r"run\.json"):
            calibrate([run], out=tmp_path / "out")
    (run / "run.json").unlink()
    with pytest.raises(TapeError, match=r"no run\.json"):
        calibrate([run], out=tmp_path / "out")


def test_the_same_market_never_counts_twice(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(8)
    run = lab.write_run(tmp_path / "run", columns)
    copy = lab.write_run(tmp_path / "copy", columns)
    alone = calibrate([run], out=tmp_path / "alone")
    twice = calibrate([run, copy, run], out=tmp_path / "twice")
    assert twice.counted_once == (copy, run)
    assert twice.table.id == alone.table.id
    other = lab.write_run(tmp_path / "other", columns, change=lambda run: run.update(digest="another"))
    with pytest.raises(EvidenceError, match="different runs of the same tape"):
        calibrate([run, other], out=tmp_path / "out")
    elsewhere = lab.write_run(tmp_path / "elsewhere", lab.market(9), tape="second recorder")
    with pytest.raises(EvidenceError, match="overlapping times"):
        calibrate([run, elsewhere], out=tmp_path / "out")
    with pytest.raises(EvidenceError, match="nothing to calibrate from"):
        calibrate([], out=tmp_path / "out")


def test_a_store_that_is_no_duckdb_is_left_alone(lab: Any, tmp_path: Path) -> None:
    run = lab.write_run(tmp_path / "run", lab.market(8))
    foreign = tmp_path / "notes.txt"
    foreign.write_text("my notes, long enough to be taken for a header\n" * 200)
    before = foreign.read_bytes()
    with pytest.raises(StorageError, match="DuckDB store"):
        calibrate([run], out=tmp_path / "out", store=foreign)
    assert foreign.read_bytes() == before


def test_a_store_file_keeps_the_events_readable(lab: Any, tmp_path: Path) -> None:
    run = lab.write_run(tmp_path / "it's a [run]*", lab.market(8))
    for _ in range(2):
        result = calibrate([run], out=tmp_path / "out", store=tmp_path / "events.duckdb")
    with duckdb.connect(str(tmp_path / "events.duckdb"), read_only=True) as database:
        counted = database.execute(
            "SELECT count(*), sum(y_e9) / 1e9 / count(*) FROM fill_event WHERE verdict = 'fitted'"
        ).fetchone()
    assert counted is not None
    assert counted[0] == result.table.record("all").n == 3_000
    assert counted[1] == pytest.approx(result.table.record("all").survival.raw, abs=1e-12)
