"""A replay is complete or leaves nothing; what is kept is what happened."""

from __future__ import annotations

import json

import polars as pl
import pytest

import arbl2_replay.reading
from arbl2.config import PolicyConfig, RunConfig
from arbl2.engine import Engine
from arbl2.errors import Arbl2Error, ConfigError, EngineError, StorageError, TapeError
from arbl2.frames import FrameKind
from arbl2.tape import MANIFEST, SEGMENTS
from arbl2_replay import replay
from markets import E8, INSTRUMENTS, Market, Script, at_ns, buy_binance, sell_upbit, threshold

CONFIG = threshold()


def market(rounds=6):
    found = Market()
    for ms in range(0, rounds * 200, 200):
        found.premium(ms)
    return found


@pytest.fixture
def tape(tmp_path):
    return market().write(tmp_path / "tape")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs"


def below(folder):
    """Names of everything below a folder, hidden or not."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


# ------------------------------------------------------------------------------------------------- all of a run or nothing


class Broken:
    """A policy that breaks at its fourth look, after its first trades."""

    def __init__(self):
        self.looks = 0

    def decide(self, view):
        self.looks += 1
        if self.looks == 4:
            raise ZeroDivisionError
        return buy_binance("0.1")


def test_a_policy_that_breaks_leaves_nothing(tape, out):
    with pytest.raises(ZeroDivisionError):
        replay(tape, CONFIG, out=out, policy=Broken(), block_rows=1)
    assert below(out) == []


def test_a_user_who_stops_leaves_nothing(tape, out):
    def stop(done, total):
        assert 0 < done <= total == 18
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(tape, CONFIG, out=out, on_progress=stop)
    assert below(out) == []


def test_an_overflow_leaves_nothing(tmp_path, out):
    absurd = Market().rate(0).binance(1, [(1, 1)], [(2, 1)], "XRP").upbit(2, [(20, 10**6)], [(21, 10**6)], "XRP")
    absurd.upbit(15, [(4_000_000, 30_000)], [(9_000_000, 1)], "XRP").rate(60)
    config = RunConfig(symbols=("XRP",))
    with pytest.raises(EngineError, match="order 1"):
        replay(absurd.write(tmp_path / "tape"), config, out=out, policy=Script({2: sell_upbit(30_000)}, "XRP"))
    assert below(out) == []


@pytest.mark.parametrize("check_hashes", [True, False])
def test_a_damaged_tape_leaves_nothing(tape, out, check_hashes):
    path = tape / SEGMENTS / "000001.parquet"
    body = bytearray(path.read_bytes())
    body[len(body) // 3 : len(body) // 3 + 40] = bytes(40)
    path.write_bytes(body)
    with pytest.raises(TapeError, match=r"000001\.parquet"):
        replay(tape, CONFIG, out=out, check_hashes=check_hashes)
    assert below(out) == []


def test_frames_that_end_too_early_leave_nothing(tape, out):
    """The last thing to be found out, after every frame has been taken."""
    manifest = json.loads((tape / MANIFEST).read_text())
    manifest["segments"][0]["rows"] += 1
    (tape / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TapeError, match="other frames"):
        replay(tape, CONFIG, out=out)
    assert below(out) == []


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (RunConfig(symbols=("NONE",)), {}),
        (CONFIG, {"speed": "0x"}),
        (RunConfig(policy=PolicyConfig(size_krw="x")), {}),
    ],
)
def test_a_run_that_cannot_begin_makes_no_folder(tape, out, config, options):
    with pytest.raises(ConfigError):
        replay(tape, config, out=out, **options)
    assert not out.exists()


def test_a_tape_without_frames_makes_no_folder(tape, out):
    manifest = json.loads((tape / MANIFEST).read_text())
    (tape / MANIFEST).write_text(json.dumps({**manifest, "segments": []}))
    with pytest.raises(TapeError, match="no frames"):
        replay(tape, CONFIG, out=out)
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_named(tape, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        replay(tape, CONFIG, out=tmp_path / "file" / "runs")


def test_the_reading_thread_ends_with_a_failing_run(tape, out, monkeypatch):
    made = []
    real = arbl2_replay.reading.read_ahead
    monkeypatch.setattr(arbl2_replay.reading, "read_ahead", lambda batches: made.append(real(batches)) or made[-1])
    with pytest.raises(ZeroDivisionError):
        replay(tape, CONFIG, out=out, policy=Broken())
    (blocks,) = made
    assert next(blocks, "closed") == "closed"


# ------------------------------------------------------------------------------------------------------------- what is kept


def test_a_run_is_kept_with_everything(tape, out):
    result = replay(tape, CONFIG, out=out)
    name = f"market-{result.digest[:8]}"
    assert below(out) == [name, *(f"{name}/{file}" for file in ("decisions.parquet", "fills.parquet", "run.json"))]
    assert result.run_dir == out / name
    said = json.loads((out / name / "run.json").read_text())
    assert (said["digest"], said["kpi"], said["tape"]["session"]) == (result.digest, result.kpi, "market")
    assert said["run"] == {"frames": 18, "tape_s": 1.002, "symbols": ["BTC"]}
    decisions, fills = result.decisions(), result.fills()
    assert len(decisions) == result.kpi["decisions"] == 6
    assert len(fills) == result.kpi["legs"] == 12
    first = decisions.row(0, named=True)
    assert (first["time_ns"], first["symbol"], first["direction"], first["outcome"]) == (
        at_ns(2),
        "BTC",
        "sell_upbit",
        "accepted",
    )
    assert (first["upbit_px_e8"], first["first_in_episode"]) == (150_000_000 * E8, True)
    assert set(fills["status"]) == {"filled", "in_flight"}
    assert fills.filter(pl.col("order_id") == 1).row(0, named=True)["venue"] == "upbit"


def test_a_run_without_trades_is_kept_too(tmp_path, out):
    tape = Market().parity(0).parity(200).write(tmp_path / "tape")
    result = replay(tape, CONFIG, out=out)
    assert (len(result.decisions()), len(result.fills())) == (0, 0)
    assert result.decisions().columns == replay(market().write(tmp_path / "b"), CONFIG, out=out).decisions().columns


def test_without_a_folder_nothing_is_kept(tape, tmp_path):
    result = replay(tape, CONFIG)
    assert result.run_dir is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tape"]
    with pytest.raises(ConfigError, match="kept no events"):
        result.fills()


def test_speed_block_size_decoder_and_folder_do_not_change_the_run(tape, out):
    digests = {
        replay(tape, CONFIG, **options).digest
        for options in (
            {},
            {"out": out},
            {"block_rows": 1},
            {"block_rows": 5},
            {"block_rows": 10**6},
            {"scanner": False},
            {"speed": "100x"},
            {"check_hashes": False},
            {"on_progress": lambda _done, _total: None},
        )
    }
    assert len(digests) == 1


# ---------------------------------------------------------------------------------------------------------------- reruns


def test_a_rerun_replaces_the_equal_run_only(tape, tmp_path, out):
    first = replay(tape, CONFIG, out=out)
    other = replay(tape, threshold(size_krw="2000000"), out=out)
    longer = replay(market(8).write(tmp_path / "longer"), CONFIG, out=out)
    assert len({first.run_dir, other.run_dir, longer.run_dir}) == 3
    (out / "notes.txt").write_text("mine")
    kept = {path: path.read_bytes() for run in (other, longer) for path in run.run_dir.iterdir()}
    kept[out / "notes.txt"] = b"mine"
    (first.run_dir / "run.json").write_text("old")
    (first.run_dir / "left over").write_text("old")
    again = replay(tape, CONFIG, out=out)
    assert again.run_dir == first.run_dir
    assert sorted(path.name for path in again.run_dir.iterdir()) == ["decisions.parquet", "fills.parquet", "run.json"]
    assert json.loads((again.run_dir / "run.json").read_text())["digest"] == first.digest
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(list(out.iterdir())) == 4


def test_a_rerun_leaves_the_same_bytes(tape, out):
    def files():
        return {path.name: path.read_bytes() for path in replay(tape, CONFIG, out=out).run_dir.iterdir()}

    assert files() == files()


def test_a_foreign_folder_of_that_name_is_not_replaced(tape, out):
    name = f"market-{replay(tape, CONFIG).digest[:8]}"
    (out / name).mkdir(parents=True)
    (out / name / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=name):
        replay(tape, CONFIG, out=out)
    assert below(out) == [name, f"{name}/thesis.txt"]


def test_a_failing_rerun_keeps_the_run_that_is_there(tape, out):
    first = replay(tape, CONFIG, out=out)
    before = {path.name: path.read_bytes() for path in first.run_dir.iterdir()}

    def stop(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(tape, CONFIG, out=out, on_progress=stop)
    assert {path.name: path.read_bytes() for path in first.run_dir.iterdir()} == before
    assert [path.name for path in out.iterdir()] == [first.run_dir.name]


# ------------------------------------------------------------------------------------------------------------- the engine


def test_a_finished_run_takes_no_more_frames():
    block = market().block()
    engine = Engine(INSTRUMENTS, CONFIG)
    engine.feed(block)
    engine.finish()
    digest = engine.digest()
    for more in (block, block.slice(0, 1), block.slice(0, 0)):
        with pytest.raises(EngineError, match="this run has ended"):
            engine.feed(more)
    engine.finish()  # a second end changes nothing
    assert engine.digest() == digest
    assert isinstance(EngineError(""), Arbl2Error)


def test_events_are_handed_over_once():
    engine = Engine(INSTRUMENTS, CONFIG)
    engine.feed(market().block())
    first, second = engine.drain(), engine.drain()
    assert len(first.decisions) == 6
    assert len(second.decisions) == len(second.fills) == 0
    engine.finish()
    assert len(engine.drain().fills) + len(first.fills) == 12


def test_alarms_and_rest_bodies_are_counted_by_their_reason(tmp_path):
    tape = market(1)
    tape.add(300, "upbit", FrameKind.ALARM, b'{"alarm":"silent"}').add(301, "binance", FrameKind.RESPONSE, b"{}")
    result = replay(tape.write(tmp_path / "tape"), CONFIG)
    assert result.reasons == {"upbit": {"book": 2, "alarm": 1}, "binance": {"book": 1, "rest": 1}}
