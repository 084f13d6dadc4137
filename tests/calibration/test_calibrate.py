"""From run folders to the artefact: truth, stability, and what a reader may rely on."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.events import FILL_DTYPE, Direction, FillStatus, Intent, Side
from arbl2.frames import VENUES as VENUE_CODES
from arbl2.zones import SIDES, VENUES, CalibrationTable, ZoneTable, identity
from arbl2_calibration import calibrate, limits_text, load, read_blocks, zone_table
from arbl2_calibration.fit import fit
from arbl2_replay.sinks import event_schema, event_table

HALF_DAY_NS = 12 * 3600 * 10**9


@pytest.fixture(scope="module")
def result(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("calibration")
    return calibrate([lab.write_run(folder / "run", lab.market(11, n=20_000, hours=48))], out=folder / "out")


def without_date(path: Path) -> bytes:
    return re.sub(rb'"created_utc": "[^"]+"', b"", (path / "calibration.json").read_bytes())


def test_known_truth_comes_back(lab: Any, result: Any) -> None:
    """At 150 ms every event meets a newer book; a second, much larger market of the same kind gives the truth per venue."""
    big = lab.market(12, n=400_000, hours=24 * 30)
    place = (big["arrive_ns"] - big["before_ns"]) / lab.GAP_NS
    y = ((1 - place) * big["before_e8"] + place * big["after_e8"]) / big["visible_e8"]
    for venue in VENUES:
        for side in SIDES:
            record = result.table.record(f"{venue}.{side}.ms100-200")
            low, high = record.survival.ci95
            of_zone = (big["venue"] == venue) & (big["side"] == side)
            assert low <= y[of_zone].mean() <= high
            assert high - low < 0.08
            low, high = record.fill_ratio.ci95
            assert low <= (y * big["visible_e8"] / big["size_e8"])[of_zone].mean() <= high
            bracket = record.id_bounds
            assert bracket[0] <= record.survival.point <= bracket[1]


def test_slippage_is_the_sum_of_its_parts_and_matches_the_fills(lab: Any, result: Any) -> None:
    columns = lab.market(11, n=20_000, hours=48)
    sign = np.where(columns["side"] == "buy", 1, -1)
    mid = (columns["bid_px_e8"] + columns["ask_px_e8"]) / 2
    some = columns["filled_e8"] > 0
    price = columns["quote_e8"][some] / columns["filled_e8"][some] * 1e8
    expected = (sign[some] * (price - mid[some]) / mid[some] * 1e4).mean()
    record = result.table.record("all")
    parts = (record.half_spread_bps, record.walk_bps, record.drift_bps)
    assert record.slippage_bps.n == int(some.sum())
    assert record.slippage_bps.mean == pytest.approx(expected, abs=1e-5)
    assert sum(part.mean for part in parts) == pytest.approx(record.slippage_bps.mean, abs=1e-9)
    for part in (*parts, record.slippage_bps):
        low, high = part.ci95
        assert low < part.mean < high
        assert (part.p50, part.p90, part.p99) == (None, None, None)
    assert all(part.mean > 0 for part in parts)


def test_what_was_not_computed_is_null(result: Any) -> None:
    raw = json.loads(result.path.read_bytes())
    assert [raw[key] for key in ("legs", "tests", "oos", "supersedes")] == [None] * 4
    assert {zone["survival"]["next_session95"] for zone in raw["zones"]} == {None}
    assert {zone["state"] for zone in raw["zones"]} == {"unvalidated", "insufficient"}
    for zone in raw["zones"]:
        if zone["state"] == "insufficient":
            assert (zone["survival"]["point"], zone["survival"]["ci95"], zone["fill_ratio"]["point"]) == (None, None, None)
            assert zone["uses_zone_id"] != zone["zone_id"]
        if zone["n"] == 0:
            assert zone["survival"]["raw"] is None
    assert raw["config"]["latency"]["upbit"] == {"source": "assumed", "p50": 150.0, "p90": 150.0, "p99": 150.0}
    assert raw["inputs"][0]["rows"] == 20_000


def test_order_files_and_threads_do_not_change_a_byte(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(13, n=12_000, hours=24)
    shuffled = lab.take(columns, np.random.default_rng(1).permutation(12_000))
    calibrate([lab.write_run(tmp_path / "a", columns)], out=tmp_path / "one", threads=1)
    calibrate([lab.write_run(tmp_path / "b", shuffled, row_group=700)], out=tmp_path / "other", threads=4)
    assert without_date(tmp_path / "one") == without_date(tmp_path / "other")
    first, second = ((tmp_path / name / "calibration_blocks.parquet").read_bytes() for name in ("one", "other"))
    assert first == second


def test_a_tape_cut_in_two_gives_the_same_zones(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(13, n=6_000, hours=24)
    early = columns["time_ns"] < lab.START_NS + HALF_DAY_NS + 7 * 60 * 10**9  # inside a block
    whole = calibrate([lab.write_run(tmp_path / "whole", columns)], out=tmp_path / "one")
    parts = [
        lab.write_run(tmp_path / name, lab.take(columns, rows), tape=name) for name, rows in (("early", early), ("late", ~early))
    ]
    forward = calibrate(parts, out=tmp_path / "two")
    calibrate(parts[::-1], out=tmp_path / "three")
    assert forward.table.artefact.zones == whole.table.artefact.zones
    assert without_date(tmp_path / "two") == without_date(tmp_path / "three")
    assert [used.dataset_id for used in forward.table.artefact.inputs] == ["early", "late"]


def test_the_table_that_a_replay_writes_is_understood(lab: Any, tmp_path: Path) -> None:
    """The same rows through the sink of the replay: packed codes to words and flags."""
    columns = lab.market(16)
    codes = {
        "symbol": ["BTC"],
        "venue": list(VENUE_CODES),
        "side": {"buy": Side.BUY, "sell": Side.SELL},
        "direction": {"sell_upbit": Direction.SELL_UPBIT, "buy_upbit": Direction.BUY_UPBIT},
        "intent": {"entry": Intent.ENTRY},
        "status": {"filled": FillStatus.FILLED, "partial": FillStatus.PARTIAL, "unfilled": FillStatus.UNFILLED},
    }
    rows = np.zeros(len(columns["order_id"]), dtype=FILL_DTYPE)
    for name, column in columns.items():
        code = codes.get(name)
        known = {word: i for i, word in enumerate(code)} if isinstance(code, list) else code
        rows[name] = column if known is None else [known[word] for word in column.tolist()]
    by_hand = lab.write_run(tmp_path / "by hand", columns)
    by_sink = lab.write_run(tmp_path / "by sink", columns)
    pq.write_table(event_table(rows, event_schema(FILL_DTYPE, "fills"), ["BTC"]), by_sink / "fills.parquet")
    calibrate([by_hand], out=tmp_path / "a")
    calibrate([by_sink], out=tmp_path / "b")
    assert without_date(tmp_path / "a") == without_date(tmp_path / "b")


def test_repeated_triggers_count_once(lab: Any, tmp_path: Path) -> None:
    columns = lab.market(14, n=4_000)
    rows = np.repeat(np.arange(4_000), 3)
    doubled = lab.take(columns, rows)
    doubled["order_id"] = np.arange(1, 12_001)
    doubled["first_in_episode"] = np.arange(12_000) % 3 == 0
    once = calibrate([lab.write_run(tmp_path / "once", columns)], out=tmp_path / "a")
    thrice = calibrate([lab.write_run(tmp_path / "thrice", doubled)], out=tmp_path / "b")
    assert thrice.table.artefact.refused_rows == {"repeated": 8_000, "nothing_visible": 0, "no_zone": 0, "unresolved": 0}
    assert thrice.table.artefact.zones == once.table.artefact.zones


def test_the_artefact_is_loaded_as_it_was_written(result: Any) -> None:
    table = load(result.path.parent)
    assert table.dumps() == result.path.read_bytes()
    assert table.id == identity(json.loads(result.path.read_bytes()))
    record = table.select("upbit", "sell", -9.0, 0.3, 150_000_000)
    assert record is not None
    assert record.zone_id == "upbit.sell.edge7-12.size0.25-0.5.ms100-200"
    assert table.resolve(record) is record
    empty = table.select("upbit", "sell", -9.0, 0.3, 10)
    assert empty is not None
    assert (empty.n, empty.state) == (0, "insufficient")
    used = table.resolve(empty)
    assert used is not None
    assert used.zone_id == "all"
    assert table.select("upbit", "sell", math.nan, 0.3, 10) is None
    first, last = table.artefact.inputs[0].first_ns, table.artefact.inputs[0].last_ns
    assert table.in_sample(last, last + 5)
    assert not table.in_sample(last + 1, last + 5)
    assert table.in_sample(first - 5, first)
    assert not table.in_sample(first - 5, first - 1)


def reidentified(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw | {"id": identity(raw)}).encode()


def test_changed_or_foreign_artefacts_are_refused(result: Any, tmp_path: Path) -> None:
    text = result.path.read_bytes()
    raw = json.loads(text)
    with pytest.raises(TapeError, match="was changed after"):
        CalibrationTable.loads(text.replace(b'"n": 0', b'"n": 1', 1))
    assert CalibrationTable.loads(text.replace(b'"created_utc": "2', b'"created_utc": "3', 1)).id == raw["id"]
    for schema, words in (
        ("arbl2.calibration/2", "Use a matching arbl2"),
        ("other/1", "not a calibration"),
        (None, "not a calibration"),
    ):
        with pytest.raises(TapeError, match=words):
            CalibrationTable.loads(reidentified(raw | {"schema": schema}))
    assert CalibrationTable.loads(reidentified(raw | {"schema": "arbl2.calibration/1.4", "news": 1})).artefact.zones
    for damaged in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, text[:-100]):
        with pytest.raises(TapeError):
            CalibrationTable.loads(damaged)
    with pytest.raises(TapeError, match="does not follow its schema"):
        CalibrationTable.loads(reidentified(raw | {"zones": [{}]}))
    with pytest.raises(TapeError, match="not those of its cut points"):
        CalibrationTable.loads(reidentified(raw | {"zones": raw["zones"][1:]}))
    bad = raw["config"] | {"zones": raw["config"]["zones"] | {"edge_bps": [0.0, 7.0, 5.0]}}
    with pytest.raises(TapeError, match="must rise from 0"):
        CalibrationTable.loads(reidentified(raw | {"config": bad}))
    zones = [zone | {"uses_zone_id": zone["zone_id"]} for zone in raw["zones"]]
    with pytest.raises(TapeError, match="falls back wrongly"):
        CalibrationTable.loads(reidentified(raw | {"zones": zones}))
    with pytest.raises(TapeError, match="`arbl2 calibrate` makes one"):
        load(tmp_path)


def test_anyone_can_recompute_the_zones_from_the_block_sums(result: Any, tmp_path: Path) -> None:
    blocks, sessions = read_blocks(result.blocks_path, result.table)
    assert len(sessions) == len(blocks.zone)
    records, _ = fit(blocks, result.table.table, result.table.artefact.config.block_ns_first)
    assert records == result.table.artefact.zones
    rows = pq.read_table(result.blocks_path)
    pq.write_table(rows.slice(1), tmp_path / "fewer.parquet")
    with pytest.raises(TapeError, match="does not hold the block sums"):
        read_blocks(tmp_path / "fewer.parquet", result.table)
    pq.write_table(rows.drop_columns(["n"]), tmp_path / "columns.parquet")
    with pytest.raises(TapeError, match="cannot be read"):
        read_blocks(tmp_path / "columns.parquet", result.table)


def test_the_users_zones_are_used(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "zones.toml").write_text("edge_bps = [0, 10, inf]\nsize_over_depth = [0, inf]\nlatency_ms = [0, inf]\n")
    run = lab.write_run(tmp_path / "run", lab.market(15))
    found = calibrate([run], out=tmp_path / "out", zones=tmp_path / "zones.toml")
    assert [zone.zone_id for zone in found.table.table.zones][:2] == [
        "upbit.buy.edge0-10.size0+.ms0+",
        "upbit.buy.edge10+.size0+.ms0+",
    ]
    assert sum(found.table.record(zone.zone_id).n for zone in found.table.table.zones) == 3_000
    with pytest.raises(ConfigError, match="cannot be read"):
        calibrate([run], out=tmp_path / "out", zones=tmp_path / "none.toml")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the folder"):
        calibrate([run], out=tmp_path / "file" / "out")


def test_the_readme_shows_the_default_zones() -> None:
    readme = (Path(__file__).parents[2] / "calibration" / "README.md").read_text("utf-8")
    block = re.search(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    assert ZoneTable.from_toml(block[1]).cuts == ZoneTable().cuts


def test_the_report_says_unknown_where_nothing_is_known(result: Any) -> None:
    def shown(**options: Any) -> list[str]:
        out = io.StringIO()
        Console(file=out, width=240).print(zone_table(result.table, **options))
        return out.getvalue().splitlines()

    lines = shown()
    everything = next(line for line in lines if line.split()[1:2] == ["all"])
    point = result.table.record("all").survival.point
    assert f"{point:.3f}" in everything
    assert "unvalidated" in everything
    assert not any(".ms0-25" in line for line in lines)
    unknown = next(line for line in shown(show="all") if "upbit.buy.edge0-5.size0-0.25.ms0-25" in line)
    assert unknown.count("unknown") == 2
    assert "uses all" in unknown
    text = limits_text(result.table)
    assert "1 run(s), 20,000 orders" in text
    assert "no_zone 0, nothing_visible 0, repeated 0, unresolved 0 were not fitted" in text
    assert text.count("\n- ") == len(result.table.artefact.limits) >= 7
