"""Time travel gives what a linear replay gives, whatever happened to the index; and it says so when it cannot."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

import arbl2.tape
import arbl2_replay.keyframes as kf
from arbl2.aggregator import LevelFrom, SourceStatus
from arbl2.config import AggregatorConfig, RunConfig
from arbl2.errors import ConfigError, TapeError
from arbl2.frames import FrameKind
from arbl2.tape import SEGMENTS, SegmentWriter, TapeReader, load_manifest, save_manifest
from arbl2_replay.moments import Kind, Moment, utc
from arbl2_replay.travel import Travel, Why
from arbl2_replay.travel_report import book_report, find, to_json
from arbl2_replay.wire import DepthChange, binance_combined, binance_depth, binance_diff
from benchmarks import restless
from markets import Market, at_ns, book, e8

pytest_plugins = ("object_store",)

GOLDEN = Path(__file__).parents[2] / "datasets" / "golden" / "two-venue-60s" / "tape"
FILE = "000001.keys"


@pytest.fixture(scope="module")
def restless_tape(tmp_path_factory):
    """Row groups of 97 frames in one segment, keyframes every 32 to 64 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arbl2.tape, "ROW_GROUP_ROWS", 97)
        return restless.tape(tmp_path_factory.mktemp("restless") / "tape", frames=2_000)


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(kf, "STEP_FRAMES", 32)
    monkeypatch.setattr(kf, "MOST_FRAMES", 128)


@pytest.fixture
def golden(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "tape"))


def told(book):
    return {
        "name": book.instrument.name,
        "status": book.status,
        "age_ns": book.age_ns,
        "update_id": book.update_id,
        "exchange_ms": book.exchange_ms,
        "bids": book.bids,
        "asks": book.asks,
    }


def compare(folder, count, seed, names):
    """Ask in random order; returns what kinds of answers there were."""
    linear = restless.Linear(folder)
    asked = restless.questions(linear.times, count, seed, names)
    expected = list(zip(asked, linear.answers(asked), strict=True))
    travel = Travel(folder)
    random.Random(seed).shuffle(expected)
    kinds = set()
    for (time_ns, name), seen in expected:
        instant = travel.at(time_ns)
        view = instant.view(name)
        where = f"{name} at {time_ns}"
        assert instant.seq == seen.seq, where
        assert tuple(told(book) for book in (*view.books, *([view.fx] if view.fx else []))) == seen.books, where
        assert instant.valid_through(name) == seen.validity, where
        if seen.snapshot is not None:
            assert instant.snapshot(name) == seen.snapshot, where
            assert (view.sell_upbit_bps, view.buy_upbit_bps) == (seen.snapshot.sell_upbit_bps, seen.snapshot.buy_upbit_bps)
            assert instant.full_book(view.books[1].instrument.name) == seen.full, where
            kinds |= {level.origin for side in seen.full for level in side}
            kinds |= {"edge" if view.sell_upbit_bps is not None else "no edge"}
        kinds |= {seen.validity.why, *(book["status"] for book in seen.books)}
    return kinds


def test_every_instant_is_that_of_a_linear_replay(restless_tape, small_steps):
    kinds = compare(restless_tape, 700, 1, restless.NAMES)
    assert kinds >= {*SourceStatus, *LevelFrom, *Why, "edge", "no edge"}


def test_a_keyframe_may_stand_anywhere_between_a_request_and_its_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(kf, "STEP_FRAMES", 5)
    monkeypatch.setattr(kf, "MOST_FRAMES", 5)
    tape = restless.tape(tmp_path / "tape", frames=600, seed=2, snapshots=0.05)
    assert compare(tape, 300, 3, ("BTC", "eth")) >= {LevelFrom.SNAPSHOT, LevelFrom.BEYOND}


def change(market, ms, first, last, bids):
    payload = binance_diff("BTCUSDT", DepthChange(first, last, [(e8(px), e8(size)) for px, size in bids], []), 1)
    return market.add(ms, "binance", FrameKind.MESSAGE, binance_combined("btcusdt@depth@100ms", payload))


def test_changes_that_wait_for_their_snapshot_wait_in_the_keyframe_too(tmp_path, monkeypatch):
    monkeypatch.setattr(kf, "STEP_FRAMES", 3)
    monkeypatch.setattr(kf, "MOST_FRAMES", 3)
    market = Market().add(0, "binance", FrameKind.REQUEST, b'{"method":"GET","url":"https://x/api/v3/depth?symbol=BTCUSDT"}')
    change(market, 1, 10, 12, [(99, 1)])
    change(market, 2, 13, 15, [(98, 7), (97, 5)])
    market.rate(3)  # the second keyframe stands before this one
    market.add(4, "binance", FrameKind.RESPONSE, binance_depth(book([(99, 2), (98, 3)], [(101, 1)]), 12))
    for ms in (5, 6, 7, 8):
        change(market, ms, 11 + ms, 11 + ms, [(90 + ms, ms)])
    tape = market.write(tmp_path / "tape")
    expected = Travel(tape).at_seq(5).full_book("BTCUSDT")
    travel = Travel(tape)
    travel.at_seq(9).view("BTC")  # another place, so that what waits comes from nowhere but the keyframe
    travel._engine.state.held_px[:] = travel._engine.state.held_qty[:] = 0
    assert travel.at_seq(5).full_book("BTCUSDT") == expected
    bids = [(level.px_e8 // 10**8, level.size_e8 // 10**8, level.origin) for level in expected[0]]
    assert bids == [(99, 2, LevelFrom.SNAPSHOT), (98, 7, LevelFrom.CHANGE), (97, 5, LevelFrom.BEYOND)]


def test_golden_tape_too(golden):
    assert compare(golden, 200, 2, ("BTC", "ETH", "XRP", "KRW-USDT")) >= {SourceStatus.ACTIVE, Why.FRAME, "edge"}


# ------------------------------------------------------------------------------------------------------- the keyframes


@pytest.fixture
def parts(tmp_path):
    """The golden tape in three segments."""
    reader = TapeReader(GOLDEN)
    (block,) = reader.blocks()
    folder = tmp_path / "parts"
    segments = []
    for k, start in enumerate(range(0, len(block), 1_200)):
        writer = SegmentWriter(folder, k + 1, reader.manifest.session, reader.anchor)
        writer.append_block(block.slice(start, min(start + 1_200, len(block))))
        segments.append(writer.seal())
    save_manifest(folder, msgspec.structs.replace(reader.manifest, segments=segments))
    return folder


def keyframes(folder, depth="auto"):
    return folder / kf.FOLDER / depth


def answers(travel):
    """Of a dozen instants."""
    step = (travel.last_ns - travel.first_ns) // 11
    found = []
    for k in range(12):
        instant = travel.at(travel.first_ns + k * step)
        found.append((instant.seq, instant.view("BTC"), instant.valid_through("BTC")))
    return found


def built(folder, **options):
    """How many frames were gone through to make keyframes, and the travel."""
    steps = [(0, 0)]
    travel = Travel(folder, on_progress=lambda *step: steps.append(step), **options)
    assert steps[-1][0] == steps[-1][1]
    return steps[-1][0], travel


def test_keyframes_are_made_once_and_only_where_they_are_missing(parts):
    frames, travel = built(parts)
    assert frames == 3_465
    first = answers(travel)
    assert sorted(path.name for path in keyframes(parts).iterdir()) == ["000001.keys", "000002.keys", "000003.keys"]
    frames, travel = built(parts)
    assert (frames, answers(travel)) == (0, first)
    before = (keyframes(parts) / "000002.keys").read_bytes()
    (keyframes(parts) / "000002.keys").unlink()
    frames, travel = built(parts)
    assert (frames, answers(travel)) == (1_200, first)
    assert (keyframes(parts) / "000002.keys").read_bytes() == before


def test_a_build_that_was_interrupted_goes_on(parts):
    def stop(done, total):
        if done > 1_500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Travel(parts, on_progress=stop)
    assert [path.name for path in keyframes(parts).iterdir()] == ["000001.keys"]
    assert built(parts)[0] == 2_265


@pytest.mark.parametrize("damage", ["head", "end", "cut", "grown", "empty", "garbage"])
def test_damaged_keyframes_are_noticed_and_made_anew(golden, damage):
    expected = answers(Travel(golden))
    path = keyframes(golden) / FILE
    body = bytearray(path.read_bytes())
    if damage in {"head", "end"}:
        body[30 if damage == "head" else -30] ^= 1
    changed = {"cut": body[:-1], "grown": body + b"x", "empty": b"", "garbage": b"ARBL2KF1" + b"\xff" * 99}.get(damage, body)
    path.write_bytes(changed)
    assert answers(Travel(golden)) == expected
    assert built(golden)[0] == 0
    assert path.read_bytes() != bytes(changed)


def test_keyframes_of_another_tape_or_decoder_are_not_used(golden, monkeypatch):
    expected = answers(Travel(golden))
    path = keyframes(golden) / FILE
    monkeypatch.setattr(kf, "_MADE_BY", (*kf._MADE_BY, kf))  # as if a module had changed
    frames, travel = built(golden)
    assert (frames, answers(travel)) == (3_465, expected)
    monkeypatch.undo()
    market = Market().parity(0).parity(500).write(golden.parent / "other", session="other")
    shutil.copytree(keyframes(golden), keyframes(market))
    frames, travel = built(market)
    assert (frames, travel.at(travel.last_ns).seq) == (6, 6)
    assert path.exists()


def test_keyframes_go_to_the_cache_where_the_folder_cannot_be_written_and_else_into_memory(golden, tmp_path):
    expected = answers(Travel(golden))
    shutil.rmtree(golden / kf.FOLDER)
    (golden / kf.FOLDER).write_text("in the way")
    frames, travel = built(golden)
    assert (frames, answers(travel)) == (3_465, expected)
    cache = tmp_path / "cache"
    assert built(golden, cache=cache)[0] == 3_465
    frames, travel = built(golden, cache=cache)
    assert (frames, answers(travel)) == (0, expected)
    assert [path.name for path in cache.rglob("*.keys")] == [FILE]


def test_a_recording_at_a_url_keeps_its_keyframes_in_the_cache(golden, tmp_path, store):
    expected = answers(Travel(golden))
    for path in (golden / "manifest.json", *(golden / SEGMENTS).iterdir()):
        store.overwrite(f"travel/{path.relative_to(golden)}", path.read_bytes())
    there = store.names("travel")
    cache = tmp_path / "cache"
    frames, travel = built(store.url("travel"), cache=cache)
    assert (frames, answers(travel)) == (3_465, expected)
    assert built(store.url("travel"), cache=cache)[0] == 0
    assert store.names("travel") == there


def test_deep_books_take_little_more_than_their_share(tmp_path, monkeypatch):
    """Keyframes of full books come as often as the time of a query asks for, and not more often."""
    tape = restless.tape(tmp_path / "tape", frames=1_500, seed=3)
    monkeypatch.setattr(kf, "STEP_FRAMES", 16)
    monkeypatch.setattr(kf, "MOST_FRAMES", 256)
    monkeypatch.setattr(kf, "SHARE", 0.0)
    travel = Travel(tape)
    assert [row for _, row in travel.index[0].stops] == list(range(0, 1_500, 256))


# ------------------------------------------------------------------------------------------------------------- instants


def test_every_frame_of_the_instant_counts_and_seq_tells_them_apart(tmp_path):
    market = Market().rate(0).upbit(5, [(100, 1)], [(101, 1)]).upbit(5, [(200, 1)], [(201, 1)]).binance(9, [(1, 1)], [(2, 1)])
    travel = Travel(market.write(tmp_path / "tape"))

    def bid(instant):
        bids = instant.book("KRW-BTC").bids
        return bids[0][0] // 10**8 if bids else None

    assert bid(travel.at(at_ns(5))) == 200
    assert bid(travel.at(at_ns(5) - 1)) is None
    assert [bid(travel.at_seq(seq)) for seq in (1, 2, 3, 4)] == [None, 100, 200, 200]
    late = travel.at_seq(2).valid_through("KRW-BTC")
    assert (late.time_ns, late.why, late.seq) == (at_ns(5), Why.FRAME, 3)
    first, last = travel.at_seq(2), travel.at_seq(4)
    assert (bid(first), bid(last), bid(first)) == (100, 200, 100)  # an instant stays what it is


def test_moments(golden):
    travel = Travel(golden)
    first = travel.first_ns
    for text, time_ns in (
        ("+0", first),
        ("+12.5s", first + 12_500_000_000),
        ("+0h0m20s250ms", first + 20_250_000_000),
        ("2026-01-02T00:00:07.561596219Z", 1_767_312_007_561_596_219),
        ("2026-01-02 00:00:07", 1_767_312_007_000_000_000),
        ("2026-01-02T09:00:07+09:00", 1_767_312_007_000_000_000),
        ("1767312007000000001", 1_767_312_007_000_000_001),
        ("end", travel.last_ns),
    ):
        assert travel.find(Moment.parse(text)).time_ns == time_ns, text
    assert travel.find(Moment.parse("#700")).seq == 700
    assert Moment.parse("2026-01-02") == Moment(Kind.NS, 1_767_312_000_000_000_000)
    assert utc(1_767_312_007_561_596_219) == "2026-01-02T00:00:07.561596219Z"


@pytest.mark.parametrize(
    "text", ["", "now", "+", "+5x", "12:30", "2026-13-01", "2026-01-02T25:00", "#", "#-1", "#1.5", "-5m", "1767"]
)
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(ConfigError, match="Write 2026"):
        Moment.parse(text)


@pytest.mark.parametrize("text", ["2025-01-01", "+2m", "9" * 18, "#0", "#3466"])
def test_outside_of_the_tape_its_range_is_said(golden, text):
    with pytest.raises(TapeError, match=r"from 2026-01-02T00:00:00\.0|frames are 1 to 3,465"):
        Travel(golden).find(Moment.parse(text))


def test_an_unknown_name_is_told_what_there_is(golden):
    with pytest.raises(ConfigError, match="BTC, ETH, XRP on both venues; its markets are KRW-BTC"):
        Travel(golden).at_seq(9).view("DOGE")
    with pytest.raises(ConfigError, match="BTC, ETH, XRP"):
        Travel(golden).at_seq(9).full_book("BTC-USDT")


def test_of_a_session_that_is_being_recorded_the_sealed_part_is_known(golden):
    save_manifest(golden, msgspec.structs.replace(load_manifest(golden), state="recording"))
    travel = Travel(golden)
    assert travel.is_growing
    with pytest.raises(TapeError, match="what is sealed of it so far goes from"):
        travel.find(Moment.parse("+1h"))
    save_manifest(golden, msgspec.structs.replace(load_manifest(golden), segments=[]))
    with pytest.raises(TapeError, match="no sealed frames yet"):
        Travel(golden)


def test_one_venue_alone(tmp_path):
    market = Market().upbit(0, [(100, 1)], [(101, 2)]).upbit(900, [(100, 3)], [(101, 2)]).rate(5_000)
    travel = Travel(market.write(tmp_path / "tape", instruments={"upbit": ["KRW-BTC", "KRW-USDT"]}))
    view = travel.at(at_ns(1_000)).view("btc")
    assert [(book.instrument.name, book.status) for book in view.books] == [("KRW-BTC", SourceStatus.ACTIVE)]
    assert (view.fx, view.sell_upbit_bps) == (None, None)
    assert travel.at(at_ns(1_000)).valid_through("BTC").time_ns == at_ns(2_900)
    assert travel.at(at_ns(2_901)).valid_through("BTC") == travel.at(at_ns(5_000)).valid_through("BTC")


def test_depth_and_staleness_are_those_of_the_configuration(restless_tape):
    travel = Travel(restless_tape, RunConfig(aggregator=AggregatorConfig(stale_s=0.0, binance_depth="partial")))
    view = travel.at(travel.last_ns).view("BTC")
    assert view.books[1].age_ns is None
    assert not view.books[1].is_full
    assert keyframes(restless_tape, "partial").is_dir()
    assert {book.status for book in travel.at(travel.last_ns - 1).view("XRP").books} <= {*SourceStatus} - {SourceStatus.ACTIVE}


# ------------------------------------------------------------------------------------------------------ what people see


def test_the_report_shows_what_was_found(golden):
    travel = Travel(golden)
    found = find(travel, Moment.parse("+30.5"), "BTC")
    console = Console(width=200, record=True)
    console.print(book_report(found, levels=3))
    text = console.export_text()
    bid, ask = found.view.books[1].bids[0][0], found.view.books[1].asks[0][0]
    assert f"{bid / 1e8:,.2f}" in text
    assert f"{ask / 1e8:,.2f}" in text
    assert "gross edge: sell on Upbit, buy on Binance" in text
    assert f"then frame #{found.valid.seq:,} changes KRW-BTC" in text
    assert "3 of 30 levels" in text
    values = json.loads(json.dumps(to_json(found, levels=3)))
    assert [len(book["bids"]) for book in (*values["books"], values["fx"])] == [3, 3, 3]
    assert values["valid_through"]["seq"] == found.valid.seq


def test_full_books_say_where_each_level_is_known_from(restless_tape):
    travel = Travel(restless_tape)
    answers = (find(travel, Moment(Kind.SEQ, seq), "BTC", full=True) for seq in range(10, 2_000, 10))
    kinds = {LevelFrom.SNAPSHOT, LevelFrom.CHANGE}
    found = next(one for one in answers if kinds <= {level.origin for level in one.full["BTCUSDT"][0]})
    bids, asks = found.full["BTCUSDT"]
    console = Console(width=200, record=True)
    console.print(book_report(found, levels=3))
    text = console.export_text()
    assert {word for word in ("window", "snapshot", "change") if word in text} == {"window", "snapshot", "change"}
    rows = to_json(found, levels=3)["books"][1]
    assert [len(rows["bids"]), len(rows["asks"])] == [len(bids), len(asks)]
    assert {row[2] for row in rows["bids"]} == {level.origin.name.lower() for level in bids}


def test_the_command(golden, tmp_path):
    def arbl2(*arguments):
        command = [sys.executable, "-m", "arbl2", "book", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)

    done = arbl2("BTC", str(golden), "--at", "+30.5", "--json", "--levels", "2")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["seq"] == 1_723
    assert [book["instrument"] for book in values["books"]] == ["KRW-BTC", "BTCUSDT"]
    shown = arbl2("KRW-xrp", "--tapes", str(golden.parent))
    assert shown.returncode == 0, shown.stderr
    assert "the end of the tape" in shown.stdout
