"""Opening recordings: parts of them, several of them, in the one order there is, and reading no more than that needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import arbl2.tape
from arbl2.cli import app
from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.errors import ConfigError, TapeError
from arbl2.frames import Anchor, FrameBlock, FrameKind
from arbl2.kernels import SESSION_CONNS
from arbl2.tape import SEGMENTS, TapeReader
from arbl2_replay import replay, store_build
from arbl2_replay.compare import compare
from arbl2_replay.interleave import gather, interleave, only
from arbl2_replay.reading import open_reading
from arbl2_replay.store import build_session
from markets import ANCHOR, INSTRUMENTS, START_NS, Market, at_ns, threshold
from properties import soup as soups
from properties.effort import examples
from tapes import tape_of

CONFIG = threshold()
MS = 10**6
seeds = st.integers(0, 10**9)


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """So that short tapes have several row groups and slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_build, "SLICE_ROWS", 50)
        patch.setattr(arbl2.tape, "ROW_GROUP_ROWS", 20)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tapes")


def fed(blocks, instruments, config):
    """The run of frames that are given in the order that is expected."""
    engine = Engine(instruments, config)
    for block in blocks:
        engine.feed(block)
    engine.finish()
    return engine.digest()


def of(frames, anchor=soups.ANCHOR):
    return FrameBlock.from_frames(frames, anchor)


# --------------------------------------------------------------------------------------------------------- parts of a tape


def between(frames, anchor, start_ns, stop_ns):
    """From the first frame at or after ``start_ns`` to the last before the first at ``stop_ns``, frame by frame."""
    kept, has_begun = [], start_ns is None
    for frame in frames:
        time_ns = anchor.time_ns(frame.mono_ns)
        if stop_ns is not None and time_ns >= stop_ns:
            break
        has_begun = has_begun or time_ns >= start_ns
        if has_begun:
            kept.append(frame)
    return kept


@given(seed=seeds)
@examples(6)
def test_a_part_is_the_run_of_its_frames(seed, folder):
    """On tapes whose stamps go back, too, from raw bytes and from the store."""
    rng = Random(seed)
    frames = soups.soup(seed, 250).frames
    tape = tape_of(folder / f"part-{seed}", frames, soups.ANCHOR, soups.INSTRUMENTS, segment_rows=rng.choice((90, 300)))
    stamps = sorted(soups.ANCHOR.time_ns(frame.mono_ns) for frame in frames)
    for _ in range(3):
        start_ns, stop_ns = sorted(rng.choice(stamps) + rng.choice((-1, 0, 0, 1)) for _ in range(2))
        start, stop = (start_ns if rng.random() < 0.7 else None), (stop_ns if rng.random() < 0.7 else None)
        venues = rng.choice(((), (), ("upbit",), ("binance",)))
        kept = [f for f in between(frames, soups.ANCHOR, start, stop) if not venues or f.venue in ("", *venues)]
        if not kept or (start is not None and start == stop):
            continue
        known = {venue: names for venue, names in soups.INSTRUMENTS.items() if not venues or venue in venues}
        expected = fed([of(kept)], known, RunConfig())
        for decoded in (False, True):
            result = replay(tape, RunConfig(), start=start, stop=stop, venues=venues, decoded=decoded)
            assert (result.digest, result.frames) == (expected, len(kept)), (start, stop, venues, decoded)
    shutil.rmtree(tape)


def calm(rounds=100):
    """300 frames, one round of three books every 200 ms: 15 row groups of 20 frames."""
    found = Market()
    for ms in range(0, rounds * 200, 200):
        found.premium(ms)
    return found


@pytest.mark.parametrize(
    ("start", "stop", "frames", "groups"),
    [
        (None, None, 300, 15),
        (None, "+1s", 15, 1),
        ("+10s", "+11s", 15, 2),
        ("+19.9s", None, 0, 0),
        (at_ns(4_000), at_ns(6_000), 30, 2),
        ("2023-11-14T22:13:30Z", "2023-11-14T22:13:32", 30, 2),
    ],
)
def test_row_groups_outside_the_part_are_not_read(tmp_path, start, stop, frames, groups):
    tape = calm().write(tmp_path / "tape")
    if not frames:
        with pytest.raises(TapeError, match="no frames"):
            replay(tape, CONFIG, start=start, stop=stop)
        return
    raw = replay(tape, CONFIG, start=start, stop=stop)
    assert (raw.frames, raw.reading["groups_read"], raw.reading["groups_left_out"]) == (frames, groups, 15 - groups)
    decoded = replay(tape, CONFIG, start=start, stop=stop, decoded=True)
    assert decoded.digest == raw.digest
    every = replay(tape, CONFIG).reading
    assert every["groups_left_out"] + every["groups_read"] == decoded.reading["groups_left_out"] + decoded.reading["groups_read"]
    assert decoded.reading["groups_read"] < every["groups_read"] or frames == 300


def test_segments_outside_the_part_are_not_even_compared(tmp_path):
    """What is not read cannot spoil a run; what is read is held to its hash."""
    tape = tape_of(tmp_path / "tape", calm().frames, ANCHOR, INSTRUMENTS, segment_rows=100)
    whole = (tape / SEGMENTS / "000001.parquet").read_bytes()
    (tape / SEGMENTS / "000001.parquet").write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    assert replay(tape, CONFIG, start=at_ns(7_000)).frames == 195
    with pytest.raises(TapeError, match=r"000001\.parquet does not match"):
        replay(tape, CONFIG, start=at_ns(6_000))


def test_stores_are_made_for_what_is_read_only(tmp_path):
    tape = tape_of(tmp_path / "tape", calm().frames, ANCHOR, INSTRUMENTS, segment_rows=100)
    result = replay(tape, CONFIG, start=at_ns(7_000), stop=at_ns(8_000), decoded=True)
    assert (result.frames, result.reading["decoded_segments"]) == (15, 1)
    assert [path.name for path in (tape / "decoded").glob("*.index")] == ["000002.index"]


def test_levels_of_other_books_are_not_read(tmp_path):
    found = calm(30)
    for ms in range(0, 6_000, 200):
        found.upbit(ms + 5, [(1_000, 1)], [(1_001 + ms % 3, 1)], "XRP").binance(ms + 6, [(1, 1)], [(2, 1 + ms % 3)], "XRP")
    tape = found.write(tmp_path / "tape")
    config = RunConfig(symbols=("BTC",))
    raw = replay(tape, config)
    build_session(TapeReader(tape))
    every, chosen = replay(tape, RunConfig()), replay(tape, config)
    assert chosen.digest == raw.digest
    assert every.reading["groups_left_out"] == 0
    # three slices, with levels of three, five and two books
    assert (every.reading["groups_read"], chosen.reading["groups_read"], chosen.reading["groups_left_out"]) == (13, 9, 4)


def test_row_groups_of_other_venues_are_not_read(tmp_path):
    found = Market()
    for ms in range(60):
        found.rate(ms)
    for ms in range(60, 120):
        found.binance(ms, [(1, 1)], [(2, 1)])
    tape = found.write(tmp_path / "tape")
    for decoded, read in ((False, 3), (True, 4)):
        result = replay(tape, RunConfig(), venues=["binance"], decoded=decoded)
        assert (result.frames, result.reasons, result.reading["groups_read"]) == (60, {"binance": {"book": 60}}, read)
        assert [book["instrument"] for book in result.books] == INSTRUMENTS["binance"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "+5s", "stop": "+5s"}, "not after --from"),
        ({"start": "soon"}, "no instant"),
        ({"stop": "#17"}, "takes a time"),
        ({"venues": ["kraken"]}, "not a venue"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        replay(calm(2).write(tmp_path / "tape"), CONFIG, **options)


def test_what_part_it_was_stands_in_the_run(tmp_path):
    tape = calm(10).write(tmp_path / "tape")
    runs = [replay(tape, CONFIG, out=tmp_path / "runs", stop=stop).run_dir for stop in (None, "+1s")]
    parts = [json.loads((run / "run.json").read_text())["part"] for run in runs]
    assert parts[1] == {"start_ns": None, "stop_ns": START_NS + 10**9, "venues": []}
    assert [change.name for change in compare(*runs).inputs] == ["part.stop_ns"]


def test_a_checkpoint_is_of_one_part(tmp_path):
    tape = calm(20).write(tmp_path / "tape")
    whole = replay(tape, CONFIG, start="+1s", stop="+3s").digest
    for decoded in (False, True):
        kept = tmp_path / f"kept-{decoded}"
        replay(tape, CONFIG, start="+1s", stop="+3s", until="+1s", checkpoint=kept, decoded=decoded)
        assert replay(tape, CONFIG, start="+1s", stop="+3s", resume=kept, decoded=decoded).digest == whole
        with pytest.raises(ConfigError, match="another tape"):
            replay(tape, CONFIG, start="+1s", resume=kept)


# ------------------------------------------------------------------------------------------------------- several sessions


@dataclasses.dataclass
class Recorder:
    """Frames of one session, with its own clocks and numbers."""

    name: str
    anchor: Anchor
    frames: list


def recorders(rng, count=3):
    """Sessions that heard parts of one market: some at the same time, some one after the other, on clocks of their own."""
    frames = soups.soup(rng.randrange(10**9), 300).frames
    first_ns = soups.ANCHOR.time_ns(frames[0].mono_ns)
    found = []
    for k in range(count):
        start, stop = sorted(rng.sample(range(len(frames) + 1), 2))
        mono_ns = rng.randrange(10**12)
        anchor = Anchor(first_ns, mono_ns)
        own = []
        for frame in frames[start:stop]:
            if rng.random() < 0.8:
                late_ns = frame.mono_ns - soups.ANCHOR.mono_ns + rng.choice((0, 0, 1, MS))
                own.append(
                    dataclasses.replace(frame, seq=len(own) + 1, mono_ns=mono_ns + late_ns, conn=frame.conn % SESSION_CONNS)
                )
        if own:
            found.append(Recorder(f"session-{rng.randrange(100)}-{k}", anchor, own))
    return found


def in_order(sessions):
    """Every frame as the one run sees it: by running time, rank and seq; numbers moved by rank."""
    ranked = sorted(sessions, key=lambda s: (s.anchor.time_ns(s.frames[0].mono_ns), s.name))
    rows = []
    for rank, session in enumerate(ranked):
        latest_ns = -(10**30)
        for frame in session.frames:
            time_ns = session.anchor.time_ns(frame.mono_ns)
            latest_ns = max(latest_ns, time_ns)
            moved = dataclasses.replace(
                frame, seq=frame.seq + (rank << 40), conn=frame.conn + rank * SESSION_CONNS, mono_ns=time_ns
            )
            rows.append((latest_ns, rank, frame.seq, moved))
    return [frame for *_, frame in sorted(rows, key=lambda row: row[:3])]


@given(seed=seeds)
@examples(8)
def test_several_sessions_are_one_run(seed, folder):
    rng = Random(seed)
    sessions = recorders(rng, rng.choice((2, 3, 4)))
    if len(sessions) < 2:
        return
    tapes = [
        tape_of(folder / str(seed) / s.name, s.frames, s.anchor, soups.INSTRUMENTS, segment_rows=rng.choice((60, 500)))
        for s in sessions
    ]
    frames = in_order(sessions)
    expected = fed([of(frames, Anchor(0, 0))], soups.INSTRUMENTS, RunConfig())
    for decoded in (False, True):
        rng.shuffle(tapes)
        result = replay(tapes, RunConfig(), decoded=decoded, block_rows=rng.choice((None, 1, 30)))
        assert (result.digest, result.frames) == (expected, len(frames))
    start_ns, stop_ns = sorted(rng.choice(frames).mono_ns + k for k in (0, 1))
    kept = between(frames, Anchor(0, 0), start_ns, stop_ns)
    if kept and start_ns < stop_ns:
        assert replay(tapes, RunConfig(), start=start_ns, stop=stop_ns).frames <= len(frames)
    shutil.rmtree(folder / str(seed))


def two(tmp_path, *, gap_ms):
    """Ten rounds, and ten more by the next session, which begins ``gap_ms`` after the last frame."""
    first, second = calm(10), Market()
    for ms in range(0, 2_000, 200):
        second.premium(1_802 + gap_ms + ms)
    return [found.write(tmp_path / name, name) for found, name in ((first, "b-first"), (second, "a-second"))]


@pytest.mark.parametrize(("gap_ms", "raw"), [(1, 0), (0, 0), (-100, 2)])
def test_stores_are_used_unless_sessions_overlap(tmp_path, gap_ms, raw):
    tapes = two(tmp_path, gap_ms=gap_ms)
    for tape in tapes:
        build_session(TapeReader(tape))
    result = replay(tapes, CONFIG)
    assert (result.reading["raw_segments"], result.reading["decoded_segments"]) == (raw, 2 - raw)
    assert result.digest == replay(tapes[::-1], CONFIG, decoded=False).digest
    assert result.frames == 60
    assert result.session == "b-first+1"


def test_a_run_of_several_names_them_all(tmp_path):
    tapes = two(tmp_path, gap_ms=5)
    run = replay(tapes, CONFIG, out=tmp_path / "runs").run_dir
    said = json.loads((run / "run.json").read_text())["tape"]
    assert (said["session"], [tape["session"] for tape in said["tapes"]]) == ("b-first+1", ["b-first", "a-second"])
    assert [tape["place"] for tape in said["tapes"]] == [str(tape) for tape in tapes]
    other = replay(tapes[:1], CONFIG, out=tmp_path / "runs").run_dir
    assert "session" in json.loads((other / "run.json").read_text())["tape"]
    parts = ("session", "sha256", "state", "instruments")
    assert [change.name for change in compare(run, other).inputs] == [f"tape 2.{part}" for part in parts]
    assert compare(run, run).same


def test_seq_of_events_says_which_session(tmp_path):
    result = replay(two(tmp_path, gap_ms=3_000), CONFIG, out=tmp_path / "runs")
    assert sorted({seq >> 40 for seq in result.decisions()["seq"]}) == [0, 1]


def test_the_same_recording_twice_is_refused(tmp_path):
    tape = calm(2).write(tmp_path / "tape")
    copy = shutil.copytree(tape, tmp_path / "copy")
    with pytest.raises(ConfigError, match="both the recording market"):
        replay([tape, copy], CONFIG)
    with pytest.raises(ConfigError, match="no recording was named"):
        replay([], CONFIG)


def test_instruments_are_those_of_all(tmp_path):
    first = Market().rate(0).write(tmp_path / "one", "one", instruments={"upbit": ["KRW-USDT"]})
    second = Market().binance(5, [(1, 1)], [(2, 1)]).write(tmp_path / "two", "two", instruments={"binance": ["BTCUSDT"]})
    result = replay([first, second], RunConfig())
    assert [book["instrument"] for book in result.books] == ["KRW-USDT", "BTCUSDT"]
    assert [book["updates"] for book in result.books] == [1, 1]


def test_connections_of_sessions_are_told_apart(tmp_path):
    """Both sessions have a connection 1; that of the first closes after the second has taken over."""
    first = Market().binance(0, [(9, 1)], [(10, 1)], update_id=5).add(20, "binance", FrameKind.CLOSED, b"{}")
    second = Market().binance(10, [(9, 1)], [(10, 2)], update_id=6)
    tapes = [found.write(tmp_path / name, name) for found, name in ((first, "a"), (second, "b"))]
    engine = Engine(INSTRUMENTS, RunConfig())
    for block, _ in open_reading(tapes).batches(engine.universe):
        engine.feed(block)
    book = engine.state.books[engine.universe.books("binance")["BTCUSDT"]]
    assert (book["conn"], book["connected"], book["updates"]) == (SESSION_CONNS + 2, 1, 2)


# ---------------------------------------------------------------------------------------------------------- putting together


def block(rng, first_ns, count):
    frames = []
    time_ns = first_ns
    for seq in range(count):
        time_ns += rng.choice((0, 0, 1, 5, -3))
        payload = rng.randbytes(rng.choice((0, 1, 7, 300)))
        frames.append(dataclasses.replace(SAMPLE, seq=seq + 1, mono_ns=time_ns, recv_ns=rng.randrange(10**9), payload=payload))
    return of(frames, Anchor(0, 0))


SAMPLE = Market().rate(0).frames[0]


def cut(rng, whole):
    at = 0
    while at < len(whole):
        stop = min(len(whole), at + rng.choice((1, 2, 9)))
        yield whole.slice(at, stop)
        at = stop


@given(seed=seeds)
@examples(60)
def test_interleaving_is_a_stable_sort(seed):
    rng = Random(seed)
    wholes = [block(rng, rng.randrange(60), rng.choice((0, 1, 5, 40))) for _ in range(rng.choice((1, 2, 3, 5)))]
    rows = []
    for rank, whole in enumerate(wholes):
        keys = np.maximum.accumulate(whole.time_ns) if len(whole) else whole.time_ns
        rows += [(int(key), rank, k) for k, key in enumerate(keys)]
    expected = [wholes[rank].frame(k) for _, rank, k in sorted(rows)]
    found = [frame for part in interleave([cut(rng, whole) for whole in wholes]) for frame in part.frames()]
    assert found == expected


def test_interleaving_holds_one_block_of_each():
    rng = Random(1)
    opened = []

    def watched(k, whole):
        for number, part in enumerate(cut(rng, whole)):
            opened.append((k, number))
            yield part

    wholes = [block(rng, 0, 200), block(rng, 10**6, 200)]
    parts = interleave([watched(k, whole) for k, whole in enumerate(wholes)])
    next(parts)
    assert [k for k, _ in opened] == [0, 1]  # the second one is known to come later after a look at its head
    for _ in range(20):
        next(parts)
    assert [k for k, _ in opened].count(1) == 1


def test_gathered_frames_are_the_frames():
    rng = Random(4)
    blocks = [block(rng, 0, 30), block(rng, 0, 20)]
    source = np.array([rng.randrange(2) for _ in range(100)])
    rows = np.array([rng.randrange(len(blocks[k])) for k in source])
    found = gather(blocks, source, rows)
    assert list(found.frames()) == [blocks[k].frame(row) for k, row in zip(source.tolist(), rows.tolist(), strict=True)]
    keep = np.array([rng.random() < 0.4 for _ in range(30)])
    assert list(only(blocks[0], keep).frames()) == [blocks[0].frame(k) for k in np.flatnonzero(keep).tolist()]
    assert only(blocks[0], np.ones(30, bool)) is blocks[0]


# ---------------------------------------------------------------------------------------------------------- the command line


def said(*arguments):
    """What a command says with --json."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_command_line_reads_parts_and_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tapes = two(tmp_path / "tapes", gap_ms=3_000)
    whole = said("replay", *tapes)
    assert whole["session"] == "b-first+1"
    assert said("replay", "--all")["digest"] == said("replay", "--all", "tapes")["digest"] == whole["digest"]
    assert said("replay", tapes[0])["session"] == "b-first"
    part = said("replay", "--all", "--from", "+1s", "--to", "2023-11-14T22:13:26", "--venues", "Upbit")
    expected = replay(tapes, RunConfig(), start=at_ns(1_000), stop=at_ns(6_000), venues=["upbit"])
    assert (part["digest"], part["frames"]) == (expected.digest, expected.frames)
    for names, match in ((("replay", "--all", "nothing"), "no recording"), (("replay", tapes[0], tapes[0]), "Name each once")):
        with pytest.raises((ConfigError, TapeError), match=match):
            said(*names)


def test_the_command_line_builds_and_uses_stores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tapes = two(tmp_path / "tapes", gap_ms=5)
    built = said("datasets", "build", "a-second")
    assert [(item["session"], item["made"], item["kept"]) for item in built] == [("a-second", 1, 0)]
    assert {item["session"]: item["made"] for item in said("datasets", "build")} == {"a-second": 0, "b-first": 1}
    assert said("replay", tapes[0])["reading"]["decoded_segments"] == 1
    assert said("replay", tapes[0], "--raw")["reading"]["decoded_segments"] == 0
    shutil.rmtree(tapes[0] / "decoded")
    assert said("replay", tapes[0], "--decoded")["reading"]["decoded_segments"] == 1
    assert "Decoded stores" in CliRunner().invoke(app, ["datasets", "build"]).stdout
    with pytest.raises(ConfigError, match="is a URL"):
        said("datasets", "build", "s3://bucket/tapes/one")
