"""Runs beside a calibration: what had been said, what came, and nothing of the run changed by it."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import pytest
from rich.console import Console

import arbl2
from arbl2.config import PaperConfig, PolicyConfig, RunConfig, load
from arbl2.engine import Engine
from arbl2.errors import ConfigError, TapeError
from arbl2.tape import TapeReader, load_manifest, write_session
from arbl2.zones import CalibrationTable, Survival, dumps, nearest_published
from arbl2_calibration import calibrate, load_calibration
from arbl2_calibration.artefact import BLOCKS, CALIBRATION
from arbl2_calibration.runs import open_runs
from arbl2_calibration.store import Store
from arbl2_replay import replay
from arbl2_replay.live import LiveRun
from arbl2_replay.live_view import live_report
from arbl2_replay.moments import Moment
from arbl2_replay.report import run_report
from arbl2_replay.steering import Steering
from arbl2_replay.synth import SYMBOLS, SynthConfig, synth_frames, synth_manifest
from arbl2_replay.verify import verify_live
from markets import Market, threshold

GOLDEN = Path(__file__).resolve().parents[2] / "datasets" / "golden" / "two-venue-60s"
TAPE, CONFIG = GOLDEN / "tape", load(GOLDEN / "config.toml")
# a day after the golden tape; gaps every few seconds and orders larger than the touch, so that ten minutes have all kinds
LIVELY = SynthConfig(
    seed=3, start_ns=1_767_398_400 * 10**9, duration_s=600.0, symbols=(SYMBOLS["BTC"], SYMBOLS["XRP"]), excursion_every_s=2.0
)
EAGER = RunConfig(
    policy=PolicyConfig(entry_bps=12.0, tp_bps=14.0, size_krw="20000000", max_position_krw="60000000"),
    paper=PaperConfig(upbit_latency_ms=30.0, binance_latency_ms=45.0),
)


def shown(what, width=130):
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()


def beside(run_dir):
    """What ``run.json`` says of the calibration."""
    return json.loads((run_dir / "run.json").read_text())["run"].get("calibration")


def published(table, next_session=()):
    """The same calibration as if its zones had carried numbers, each its own: a point, a bound, or nothing but an ancestor's.

    Recordings of hours would publish zones; what is compared with them is the same.
    """
    records, met = {}, 0
    for k, record in enumerate(table.artefact.zones):
        point = 0.5 + k / 2_000
        fields = {"state": "insufficient"}
        if record.n and ".edge" in record.zone_id and (met := met + 1) % 4:
            bound = met % 4 == 1
            survival = Survival(
                raw=point, point=None if bound else point, ci95=(point - 0.25, point + 0.1),
                next_session95=(point - 0.3, point + 0.2) if record.zone_id in next_session else None,
            )  # fmt: skip
            fields = {"state": "degenerate" if bound else "unvalidated", "survival": survival}
        elif record.n and record.zone_id.count(".") == 2:
            fields = {"state": "unvalidated", "survival": Survival(raw=0.9, point=0.9, ci95=(0.8, 0.95))}
        records[record.zone_id] = msgspec.structs.replace(record, **fields)
    zones = [msgspec.structs.replace(r, uses_zone_id=nearest_published(r.zone_id, records)) for r in records.values()]
    return CalibrationTable.loads(dumps(msgspec.structs.replace(table.artefact, zones=zones)), name="made")


def calibrated_by_sql(run_dir, table):
    """By the calibrator's own SQL: verdicts, and per zone orders, sums of survival, share and drift, with DuckDB."""
    (run,), _ = open_runs([run_dir])
    with Store(table.table) as store:
        store.load([run])
        db = store._db
        verdicts = dict(db.execute("SELECT verdict, count(*) FROM fill_event GROUP BY ALL").fetchall())
        rows = db.execute(
            "SELECT zone_no, count(*) FILTER (verdict = 'unresolved'), count(*) FILTER (verdict = 'fitted'), "
            "sum(y_e9) FILTER (verdict = 'fitted') / 1e9, sum(fill_e9) FILTER (verdict = 'fitted') / 1e9, "
            "count(drift_e6) FILTER (verdict = 'fitted'), sum(drift_e6) FILTER (verdict = 'fitted') / 1e6, "
            "avg(visible_e8 / size_e8) FILTER (verdict = 'fitted') "
            "FROM fill_event WHERE verdict IN ('fitted', 'unresolved') GROUP BY ALL ORDER BY zone_no"
        ).fetchall()
    return verdicts, rows


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The golden run and a calibration made from it."""
    folder = tmp_path_factory.mktemp("golden")
    plain = replay(TAPE, CONFIG, out=folder / "runs")
    found = calibrate([plain.run_dir], out=folder / "calibrations")
    return plain, found


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A longer tape of another day, its run, and a calibration made from it."""
    folder = tmp_path_factory.mktemp("lively")
    manifest = synth_manifest(LIVELY)
    tape = folder / "tapes" / manifest.session
    write_session(tape, manifest, synth_frames(LIVELY))
    plain = replay(tape, EAGER, out=folder / "runs")
    return tape, plain, calibrate([plain.run_dir], out=folder / "calibrations")


# ------------------------------------------------------------------------------------------------------ nothing is changed


def test_a_calibration_changes_nothing_of_the_run(golden, tmp_path):
    plain, made = golden
    table = load_calibration(made.path)
    again = replay(TAPE, CONFIG, out=tmp_path, calibration=table)
    assert again.digest == plain.digest
    assert again.kpi == plain.kpi
    assert plain.calibration is None
    for name in ("decisions.parquet", "fills.parquet"):
        assert (again.run_dir / name).read_bytes() == (plain.run_dir / name).read_bytes()
    with_it, without = (json.loads((run.run_dir / "run.json").read_text()) for run in (again, plain))
    assert with_it["run"].pop("calibration") == again.calibration == json.loads(json.dumps(again.to_json()["calibration"]))
    assert with_it == without
    assert again.calibration["id"] == made.table.id
    assert again.calibration["name"] == "calibration.json"
    # the run is evidence as before
    assert calibrate([again.run_dir], out=tmp_path / "again").table.artefact.zones == made.table.artefact.zones


def test_without_an_output_folder_nothing_is_left(golden, tmp_path, monkeypatch):
    plain, made = golden
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = replay(TAPE, CONFIG, calibration=made.table)
    assert result.digest == plain.digest
    assert result.calibration["orders"] == plain.kpi["legs"]
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ which time it knows


def test_a_run_on_the_time_that_was_calibrated_is_in_sample(golden, lively):
    _, made = golden
    tape, _, other = lively
    for where, config, own, foreign in ((TAPE, CONFIG, made, other), (tape, EAGER, other, made)):
        for table, in_sample in ((own.table, True), (foreign.table, False)):
            result = replay(where, config, calibration=table)
            assert result.calibration["in_sample"] is in_sample
            assert result.calibration["counted"] > 0
            text = shown(run_report(result))
            assert ("IN SAMPLE" in text, "out of sample" in text) == (in_sample, not in_sample)
            assert table.id[:12] in text


def test_the_part_of_a_tape_before_the_first_order_is_out_of_sample(golden):
    _, made = golden
    before = replay(TAPE, CONFIG, calibration=made.table, stop=made.table.artefact.inputs[0].first_ns)
    assert before.digest != golden[0].digest
    assert (before.calibration["in_sample"], before.calibration["orders"], before.calibration["rows"]) == (False, 0, [])
    assert "0 of 0 orders compared" in shown(run_report(before))


# ------------------------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize("which", ["golden", "lively"])
def test_the_counts_are_those_of_the_calibrator(which, request, tmp_path):
    """Zone by zone, against the SQL of calibrate on the run's own ``fills.parquet``."""
    fixture = request.getfixturevalue(which)
    tape, config = (TAPE, CONFIG) if which == "golden" else (fixture[0], EAGER)
    table = published(fixture[-1].table)
    result = replay(tape, config, out=tmp_path, calibration=table)
    found = beside(result.run_dir)
    verdicts, rows = calibrated_by_sql(result.run_dir, table)
    for name in ("repeated", "nothing_visible", "no_zone", "unresolved"):
        assert found[name] == verdicts.get(name, 0), name
    assert found["counted"] == verdicts["fitted"]
    assert found["orders"] == sum(verdicts.values()) == duckdb.sql(f"FROM '{result.run_dir}/fills.parquet'").shape[0]
    assert [row["zone_id"] for row in found["rows"]] == [table.table.zones[row[0]].zone_id for row in rows]
    for row, (_, unresolved, n, y, fill, priced, drift, share) in zip(found["rows"], rows, strict=True):
        assert (row["unresolved"], row["n"], row["drift_bps"]["n"]) == (unresolved, n, priced)
        assert row["survival"]["observed"] == (pytest.approx(y / n, abs=1e-15) if n else None)
        assert row["fill_ratio"]["observed"] == (pytest.approx(fill / n, abs=1e-15) if n else None)
        assert row["drift_bps"]["observed"] == (pytest.approx(drift / priced, abs=1e-12) if priced else None)
        record = table.record(row["zone_id"])
        used = table.resolve(record)
        assert row["uses_zone_id"] == (used.zone_id if used else None)
        assert row["survival"]["predicted"] == (used.survival.point if used else None)
        assert row["survival"]["interval"] == (list(used.survival.ci95) if used else None)
        if used and used.survival.point and n:
            assert row["fill_ratio"]["predicted"] == pytest.approx(share * used.survival.point, abs=1e-8)
    if which == "lively":
        assert found["unresolved"] > 0
        assert found["repeated"] > 0
        assert {row["uses_zone_id"] == row["zone_id"] for row in found["rows"]} == {True, False}


@pytest.mark.parametrize(("newer", "counted"), [(True, 2), (False, 0)])
def test_a_newer_book_resolves_an_order_however_long_the_next_one_takes(golden, tmp_path, newer, counted):
    """Books come every 10 ms, but for a hole of 1.5 s around the arrival of both legs of the only opportunity."""
    market = Market().premium(0)
    if newer:
        market.premium(10)
    for ms in range(1_500, 2_500, 10):
        market.premium(ms)
    result = replay(market.write(tmp_path / "tape"), threshold(), out=tmp_path / "runs", calibration=golden[1].table)
    found = beside(result.run_dir)
    verdicts, _ = calibrated_by_sql(result.run_dir, golden[1].table)
    assert (found["counted"], found["unresolved"]) == (counted, 2 - counted)
    assert (verdicts.get("fitted", 0), verdicts.get("unresolved", 0)) == (counted, 2 - counted)


def test_the_total_is_over_the_orders_that_have_a_point(lively):
    tape, _, made = lively
    found = replay(tape, EAGER, calibration=published(made.table)).calibration
    said = [row for row in found["rows"] if row["survival"]["predicted"] is not None and row["n"]]
    n = sum(row["n"] for row in said)
    bound = [row for row in found["rows"] if row["survival"]["predicted"] is None and row["survival"]["interval"]]
    assert bound, "no zone has a bound only"
    assert n + found["unknown"] + sum(row["n"] for row in bound) == found["counted"]
    total = found["total"]["survival"]
    assert total["n"] == n
    for name in ("predicted", "observed"):
        assert total[name] == pytest.approx(math.fsum(row["n"] * row["survival"][name] for row in said) / n)
    text = shown(run_report(replay(tape, EAGER, calibration=published(made.table))))
    assert "bound" in text
    assert "said of" in text
    assert "all with a point" in text


def test_unknown_stays_unknown(golden):
    """60 s are one block: nothing is published, and nothing is said."""
    found = replay(TAPE, CONFIG, calibration=golden[1].table).calibration
    assert found["unknown"] == found["counted"] > 0
    assert {row["survival"]["predicted"] for row in found["rows"]} == {None}
    assert {row["drift_bps"]["predicted"] for row in found["rows"]} == {None}
    assert found["total"]["survival"] == {"n": 0, "predicted": None, "observed": None}
    text = shown(run_report(replay(TAPE, CONFIG, calibration=golden[1].table)))
    assert text.count("unknown") >= 2 * len(found["rows"])
    assert "IN SAMPLE" in text
    assert "all with a point" not in text


def test_the_band_of_the_next_session_is_used_where_there_is_one(lively):
    tape, _, made = lively
    plain = published(made.table)
    zone = next(r.zone_id for r in plain.artefact.zones if r.survival.point and ".edge" in r.zone_id and r.n > 5)
    result = replay(tape, EAGER, calibration=published(made.table, next_session={zone}))
    row = next(row for row in result.calibration["rows"] if row["zone_id"] == zone)
    point = row["survival"]["predicted"]
    assert row["interval_of"] == "next_session"
    assert row["survival"]["interval"] == pytest.approx([point - 0.3, point + 0.2])
    assert "of the next session" in " ".join(shown(run_report(result)).split())


def test_many_zones_are_cut_short_on_a_terminal_only(lively):
    tape, _, made = lively
    result = replay(tape, EAGER, calibration=published(made.table))
    rows = result.calibration["rows"]
    assert len(rows) > 20, "the test needs more zones"
    assert f"{len(rows) - 20} more zones: --json has all" in shown(run_report(result))


# ------------------------------------------------------------------------------------------------------ resumed, steered, live


def test_a_resumed_run_says_what_the_whole_one_says(lively, tmp_path):
    tape, _, made = lively
    table = published(made.table)
    whole = replay(tape, EAGER, out=tmp_path / "whole", calibration=table)
    for number, until in enumerate(("+100s", "+333s")):
        kept = tmp_path / str(number)
        head = replay(tape, EAGER, until=until, checkpoint=kept, calibration=table)
        assert 0 < head.calibration["orders"] < whole.calibration["orders"]
        resumed = replay(tape, EAGER, out=tmp_path / "runs", resume=kept, calibration=table)
        assert resumed.calibration == whole.calibration
        assert (resumed.run_dir / "run.json").read_bytes() == (whole.run_dir / "run.json").read_bytes()
        # also where nothing is written, and where the calibration comes only now
        replay(tape, EAGER, until=until, checkpoint=tmp_path / f"{number}b")
        assert replay(tape, EAGER, resume=tmp_path / f"{number}b", calibration=table).calibration == whole.calibration


def test_a_run_that_was_wound_back_counts_nothing_twice(golden):
    _, made = golden
    steering = Steering(paused=True)
    steps = [steering.seek(Moment.parse("+50s")), steering.seek(Moment.parse("+20s")), steering.resume()]
    result = replay(TAPE, CONFIG, steering=steering, calibration=made.table)
    assert all(step.result() for step in steps)
    assert result.calibration == replay(TAPE, CONFIG, calibration=made.table).calibration


def test_a_live_run_says_what_its_replay_says(lively, tmp_path):
    """Frame by frame as they come; and `arbl2 verify` is content."""
    tape, _, made = lively
    table = published(made.table)
    part = tmp_path / "tapes" / tape.name
    frames = [frame for frame in TapeReader(tape).frames() if frame.seq <= 6_000]
    write_session(part, msgspec.structs.replace(load_manifest(tape), segments=[]), frames)
    run = LiveRun(EAGER, tmp_path / "runs")
    run.calibration = table
    run.begin(part, load_manifest(part), lambda: 10**9)
    for start in range(0, len(frames), 50):
        run.take(frames[start : start + 50])
    live = run.finish(part, 8.0)
    replayed = replay(part, EAGER, out=tmp_path / "replayed", calibration=table)
    assert live.run.calibration == replayed.calibration
    assert live.run.calibration["counted"] > 0
    assert live.to_json()["calibration"]["in_sample"]
    assert (live.run.run_dir / "run.json").read_bytes() == (replayed.run_dir / "run.json").read_bytes()
    assert table.id[:12] in shown(live_report(live))
    assert verify_live(part, live.run.run_dir).same


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_is_not_a_whole_calibration_is_refused(golden, tmp_path):
    _, made = golden
    good = tmp_path / "good"
    shutil.copytree(made.path.parent, good)
    assert load_calibration(good).id == made.table.id
    assert load_calibration(good).name == "good"
    assert arbl2.load_calibration(good / CALIBRATION).name == CALIBRATION

    def refused(match, change):
        folder = tmp_path / f"bad-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(TapeError, match=match):
            load_calibration(folder)

    def without(name):
        return lambda folder: (folder / name).unlink()

    def with_body(name, edit):
        return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))

    refused("`arbl2 calibrate` makes one", without(CALIBRATION))
    refused("copy calibration_blocks.parquet beside it", without(BLOCKS))
    refused("was changed after it was written", with_body(CALIBRATION, lambda body: body.replace(b'"n": 1,', b'"n": 9,', 1)))
    refused("cannot be read", with_body(CALIBRATION, lambda body: body[:-200]))
    refused("is not a calibration", with_body(CALIBRATION, lambda _: b'{"schema": "other/1"}'))
    refused("cannot be read", with_body(BLOCKS, lambda body: body[:-50]))
    refused("cannot be read", with_body(BLOCKS, lambda _: b""))
    another = tmp_path / "another.parquet"
    duckdb.sql(f"COPY (SELECT * REPLACE (n + 1 AS n) FROM '{good / BLOCKS}') TO '{another}'")
    refused("does not hold the block sums", lambda folder: shutil.copy(another, folder / BLOCKS))
    duckdb.sql(f"COPY (SELECT * REPLACE ('x' AS n) FROM '{good / BLOCKS}') TO '{another}'")
    refused("cannot be read", lambda folder: shutil.copy(another, folder / BLOCKS))


def command(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "arbl2", *map(str, arguments)],
        cwd=cwd, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr + done.stdout
    return done


def test_the_commands_refuse_before_anything_is_recorded(golden, tmp_path):
    for words in (("replay", TAPE), ("live", "--l2-source", "mock", "--duration", "60")):
        done = command(*words, "--calibration", "nowhere", cwd=tmp_path)
        assert done.returncode == ConfigError.exit_code, done.stderr
        assert "--calibration cannot be used: there is no calibration at nowhere. `arbl2 calibrate` makes one." in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_the_command_shows_it(golden, tmp_path):
    plain, made = golden
    words = ("replay", TAPE, "--config", GOLDEN / "config.toml", "--calibration", made.path.parent)
    text = command(*words, cwd=tmp_path).stdout
    assert f"Calibration {made.table.id[:12]} (calibrations) beside this run: IN SAMPLE" in text
    said = json.loads(command(*words, "--json", cwd=tmp_path).stdout)
    assert said["digest"] == plain.digest
    (run,) = (tmp_path / "runs").iterdir()
    assert beside(run) == said["calibration"]
    assert said["calibration"]["name"] == "calibrations"


# ------------------------------------------------------------------------------------------------------ one matcher


def test_many_at_once_are_matched_as_one_alone(golden):
    """The zones of every order of a run, one by one and together."""
    plain, made = golden
    fills = plain.fills()
    table = made.table.table
    for venue in ("upbit", "binance"):
        for side in ("buy", "sell"):
            some = fills.filter((fills["venue"] == venue) & (fills["side"] == side))
            states = (
                some["edge_bps"].to_numpy(),
                (some["visible_e8"] / some["depth_e8"]).to_numpy(),
                (some["arrive_ns"] - some["time_ns"]).to_numpy(),
            )
            alone = [table.index(venue, side, *state) for state in zip(*(values.tolist() for values in states), strict=True)]
            assert table.places(venue, side, *states).tolist() == alone
    odd = np.array([np.nan, np.inf, -np.inf, 5.0])
    places = table.places("upbit", "buy", odd, np.full(4, 0.1), np.array([1, 1, 1, -1]))
    assert places.tolist() == [-1, -1, -1, -1]


def test_an_engine_without_coins_has_nothing_to_compare(golden, tmp_path):
    """One venue alone is replayed, not traded."""
    result = replay(TAPE, RunConfig(), venues=["upbit"], calibration=golden[1].table, out=tmp_path)
    assert result.calibration["orders"] == 0
    assert Engine({"upbit": ["KRW-BTC"]}, RunConfig()).universe.symbols == ()
