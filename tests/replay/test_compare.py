"""Two runs beside each other: the first event that differs, the frames behind it, and that no changed byte goes unseen."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from arbl2.engine import Events
from arbl2.errors import Arbl2Error, ConfigError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE
from arbl2.frames import FrameKind
from arbl2.tape import (
    MANIFEST,
    SCHEMA,
    SEGMENTS,
    SegmentWriter,
    TapeReader,
    load_manifest,
    save_manifest,
    sha256_of,
    write_session,
)
from arbl2_replay import replay
from arbl2_replay.compare import compare, find_run
from arbl2_replay.compare_events import count_differences, first_difference_of_events
from arbl2_replay.compare_report import comparison_report
from arbl2_replay.compare_tapes import payload_change
from arbl2_replay.sinks import DECISIONS, FILLS, RUN_JSON, RunSink
from markets import ANCHOR, Market, at_ns, threshold

pytest_plugins = ("object_store",)

CONFIG = threshold()
SEGMENT = "000001.parquet"
ASK = b'"asks":[["100000.00000000","10.00000000"]]'
BID = b'"bids":[["99990.00000000","10.00000000"]]'


def market(rounds=6):
    """Binance's book is every third frame; a decision falls on frame 3 and on frames 4, 7, 10, ... (KRW-USDT)."""
    found = Market()
    for ms in range(0, rounds * 200, 200):
        found.premium(ms)
    return found


@pytest.fixture
def tape(tmp_path):
    return market().write(tmp_path / "tapes" / "market")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs"


def forged(tape, folder, change):
    """A recording of the same frames, some of them changed; honest in itself."""
    reader = TapeReader(tape)
    write_session(folder, reader.manifest, (change(frame) for frame in reader.frames()))
    return folder


def replaced(seq, old, new):
    """``old`` becomes ``new``, once, in the payload of one frame."""

    def change(frame):
        if frame.seq != seq:
            return frame
        assert old in frame.payload
        return dataclasses.replace(frame, payload=frame.payload.replace(old, new, 1))

    return change


def runs_of(out, *pairs):
    return [replay(tape, config, out=out).run_dir for tape, config in pairs]


def printed(found, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(comparison_report(found))
    return capture.get()


def squeezed(text):
    """Lines without what only holds columns apart."""
    return [" ".join(line.split()) for line in text.splitlines()]


def names(changes):
    return [change.name for change in changes]


def focus(window):
    """``seq`` of the frame that a window is about, on either side."""
    return [seen and seen.frame.seq for seen in window.pairs[window.focus]]


# ----------------------------------------------------------------------------------------------------- the first event


def test_a_run_is_itself(tape, out):
    (run,) = runs_of(out, (tape, CONFIG))
    found = compare(run, run)
    assert found.same
    assert (found.inputs, found.first, found.counts, found.results, found.windows, found.notes) == ((), None, (), (), (), ())
    assert printed(found).startswith("The same run: same decisions, fills, books and money.\n")


def test_another_size_shows_at_the_first_decision(tape, out):
    a, b = runs_of(out, (tape, CONFIG), (tape, threshold(size_krw="2000000")))
    found = compare(a, b)
    assert not found.same
    assert list(map(tuple, found.inputs)) == [("config.policy.size_krw", "1000000", "2000000")]
    assert (found.first.table, found.first.row, found.first.time_ns) == (DECISIONS, 0, at_ns(2))
    assert found.first.columns == ("upbit_size_e8", "binance_size_e8")
    assert (found.first.a["upbit_size_e8"], found.first.b["upbit_size_e8"]) == (666_000, 1_332_000)
    decisions, fills = found.counts
    assert (decisions.before, decisions.alike, decisions.changed, decisions.only_a, decisions.only_b) == (0, 0, 6, 0, 0)
    assert decisions.columns == {"upbit_size_e8": 6, "binance_size_e8": 6}
    assert (fills.rows_a, fills.rows_b, fills.changed) == (12, 12, 12)
    (window,) = found.windows
    assert (window.one_tape, window.differs, focus(window)) == (True, False, [3, 3])
    assert [ours.frame.seq for ours, _ in window.pairs] == [1, 2, 3, 4, 5, 6]
    text = printed(found)
    assert "First event that differs: decision 1 (6 in A, 6 in B)\n2023-11-14 22:13:20.002000000 UTC\n" in text
    assert "* upbit_size_e8 0.00666 BTC 0.01332 BTC +0.00666 BTC" in squeezed(text)
    assert "upbit_px_e8 150,000,000 KRW 150,000,000 KRW" in squeezed(text)
    assert max(map(len, text.splitlines())) <= 80


def test_a_decision_that_only_one_run_has(tmp_path, out):
    tape = market(2).parity(400).parity(600).premium(800).premium(1_000).write(tmp_path / "tape")
    a, b = runs_of(out, (tape, threshold(entry_bps=100.0)), (tape, threshold(entry_bps=-100.0)))
    found = compare(a, b)
    first = found.first
    assert first.table == DECISIONS
    assert first.time_ns == first.b_time_ns < first.a_time_ns
    assert first.earlier is first.b
    decisions = found.counts[0]
    assert (decisions.before, decisions.rows_a, decisions.rows_b) == (3, 5, 6)
    assert (decisions.only_a, decisions.only_b) == (1, 2)
    assert decisions.alike == 1  # the same decision, though it has another number
    assert "B decides here; A does not, and its next decision stands beside." in printed(found)


def test_another_threshold_that_changed_nothing(tape, out):
    a, b = runs_of(out, (tape, threshold(entry_bps=100.0)), (tape, threshold(entry_bps=101.0)))
    found = compare(a, b)
    assert (found.same, found.first, names(found.inputs), found.windows) == (False, None, ["config.policy.entry_bps"], ())
    assert "The digest covers the configuration too, and that differs." in printed(found, width=120)


def test_a_recording_that_ends_early(tape, tmp_path, out):
    """B lacks frames 16 to 18, so its last orders are written unresolved, and its last decision is not there."""
    a, b = runs_of(out, (tape, CONFIG), (market(5).write(tmp_path / "shorter"), CONFIG))
    found = compare(a, b)
    assert (found.first.table, found.first.row) == (FILLS, 8)
    assert (found.first.a["status"], found.first.b["status"]) == ("filled", "in_flight")
    assert (found.other.table, found.other.row, found.other.b) == (DECISIONS, 5, None)
    counts = {count.table: count for count in found.counts}
    assert (counts[DECISIONS].before, counts[DECISIONS].only_a, counts[DECISIONS].only_b) == (5, 1, 0)
    window = found.windows[0]
    assert (window.differs, focus(window)) == (True, [16, None])
    assert "> B       none" in printed(found)


def test_another_latency_shows_at_a_fill(tape, out):
    slow = msgspec.structs.replace(CONFIG, paper=msgspec.structs.replace(CONFIG.paper, upbit_latency_ms=30.0))
    a, b = runs_of(out, (tape, CONFIG), (tape, slow))
    found = compare(a, b)
    assert (found.first.table, found.first.row, found.first.columns) == (FILLS, 0, ("arrive_ns",))
    assert found.first.time_ns == at_ns(201)  # the next book of Upbit resolves it
    assert found.other is None
    assert list(map(focus, found.windows)) == [[3, 3]]  # frame 5, which resolved it, stands among the neighbours
    assert list(map(focus, compare(a, b, around=0).windows)) == [[3, 3], [5, 5]]
    lines = squeezed(printed(found))
    assert "* arrive_ns 22:13:20.022000000 22:13:20.032000000 +10.000000 ms" in lines
    assert "fee_e8 499.5 KRW 499.5 KRW" in lines


# ------------------------------------------------------------------------------------------------------- the recordings


def test_a_changed_byte_is_shown_where_it_is(tape, tmp_path, out):
    cheaper = forged(tape, tmp_path / "other", replaced(9, ASK, ASK.replace(b"100000.0", b"100000.5")))
    a, b = runs_of(out, (tape, CONFIG), (cheaper, CONFIG))
    found = compare(a, b)
    assert names(found.inputs) == ["tape.sha256"]
    first = found.first
    assert (first.table, first.row, first.a["seq"], first.time_ns) == (FILLS, 3, 4, at_ns(402))  # frame 9 resolves it
    assert first.columns == ("after_e8", "after_filled_e8", "after_quote_e8")
    assert found.other.a["seq"] == 10
    changed, around = found.windows
    assert (changed.differs, changed.fields, focus(changed)) == (True, ("payload",), [9, 9])
    assert (around.differs, around.fields, focus(around)) == (False, (), [4, 4])
    assert [ours.frame.seq for ours, _ in changed.pairs] == [6, 7, 8, 9, 10, 11, 12]
    at = payload_change(*changed.pairs[changed.focus])
    assert changed.pairs[changed.focus][0].frame.payload[at : at + 1] == b"0"
    lines = printed(found, width=120).splitlines()
    row = next(k for k, line in enumerate(lines) if line.startswith("> B"))
    assert lines[row + 2].rstrip()[-1] == "^"
    assert lines[row + 1][lines[row + 2].index("^")] == "5"
    assert lines[row + 3].strip() == f"from byte {at} on: 0x30 '0' in A, 0x35 '5' in B; 1 bytes differ"


def test_a_change_that_no_decision_sees(tape, tmp_path, out):
    """The digest covers every level of every book."""
    deeper = forged(tape, tmp_path / "other", replaced(9, BID, BID.replace(b"10.0", b"11.0")))
    a, b = runs_of(out, (tape, CONFIG), (deeper, CONFIG))
    found = compare(a, b)
    assert (found.same, found.first, found.counts) == (False, None, ())
    assert [focus(window) for window in found.windows] == [[9, 9]]
    assert "Every decision and every fill event is equal." in printed(found)


def test_a_frame_that_is_no_book_any_more(tape, tmp_path, out):
    broken = forged(tape, tmp_path / "other", replaced(18, BID, b'"bids":[["x","10.00000000"]]'))
    a, b = runs_of(out, (tape, CONFIG), (broken, CONFIG))
    found = compare(a, b)
    assert "reasons.binance.book" in names(found.results)


def test_the_same_run_from_recordings_that_differ(tmp_path, out):
    def alarm(text):
        return market().add(1_300, "upbit", FrameKind.ALARM, text)

    one, other = (alarm(b'{"alarm":"%b"}' % name).write(tmp_path / name.decode()) for name in (b"silent", b"asleep"))
    (a,), (b,) = runs_of(out / "1", (one, CONFIG)), runs_of(out / "2", (other, CONFIG))
    found = compare(a, b)
    assert (found.same, found.first, names(found.inputs)) == (True, None, ["tape.sha256"])
    assert [focus(window) for window in found.windows] == [[19, 19]]
    assert printed(found).startswith("Same digest, from recordings that differ")


def test_the_same_frames_in_other_segments(tape, tmp_path, out):
    reader = TapeReader(tape)
    frames = list(reader.frames())
    folder = tmp_path / "other"
    segments = []
    for number, part in enumerate((frames[:7], frames[7:8], frames[8:]), start=1):
        writer = SegmentWriter(folder, number, "market", reader.anchor)
        for frame in part:
            writer.append(frame)
        segments.append(writer.seal())
    save_manifest(folder, msgspec.structs.replace(reader.manifest, segments=segments))
    (a,), (b,) = runs_of(out / "1", (tape, CONFIG)), runs_of(out / "2", (folder, CONFIG))
    found = compare(a, b)
    assert (found.same, found.windows) == (True, ())
    assert "hold the same frames" in found.notes[0]


def test_only_segments_that_differ_are_read(tmp_path, out):
    """What equal hashes say need not be read: frames before the difference come from the segment that stands before it."""
    frames = market().frames
    folders = []
    for name, last in (("one", b"100000.0"), ("two", b"100001.0")):
        folder, segments = tmp_path / name, []
        for number, part in enumerate((frames[:6], frames[6:12], frames[12:]), start=1):
            writer = SegmentWriter(folder, number, "market", ANCHOR)
            for frame in part:
                change = replaced(15, b"100000.0", last)
                writer.append(change(frame))
            segments.append(writer.seal())
        save_manifest(folder, msgspec.structs.replace(load_manifest(market().write(tmp_path / f"as-{name}")), segments=segments))
        folders.append(folder)
    a, b = runs_of(out, *((folder, CONFIG) for folder in folders))
    for folder in folders:
        path = folder / SEGMENTS / SEGMENT
        path.write_bytes(bytes(path.stat().st_size))  # unreadable from now on, and not needed
    found = compare(a, b)
    assert found.notes == ()
    assert [ours.frame.seq for ours, _ in found.windows[0].pairs] == [12, 13, 14, 15, 16, 17, 18]
    assert focus(found.windows[0]) == [15, 15]
    assert [ours.frame.seq for ours, _ in compare(a, b, around=2).windows[0].pairs] == [13, 14, 15, 16, 17]


def test_frames_at_the_edge_of_a_segment_come_from_the_one_before(tmp_path, out):
    frames = market().frames
    manifest = load_manifest(market().write(tmp_path / "whole"))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, change in zip(folders, (replaced(13, b"KRW-USDT", b"KRW-USDT"), replaced(13, b"1400.0", b"1400.5")), strict=True):
        segments = []
        for number, part in enumerate((frames[:12], frames[12:]), start=1):
            writer = SegmentWriter(folder, number, "market", manifest.anchor)
            for frame in part:
                writer.append(change(frame))
            segments.append(writer.seal())
        save_manifest(folder, msgspec.structs.replace(manifest, segments=segments))
    found = compare(*runs_of(out, *((folder, CONFIG) for folder in folders)))
    assert [ours.frame.seq for ours, _ in found.windows[0].pairs] == [10, 11, 12, 13, 14, 15, 16]


def test_a_recording_that_is_gone_or_moved(tape, tmp_path, out):
    a, b = runs_of(out, (tape, CONFIG), (tape, threshold(size_krw="2000000")))
    moved = tmp_path / "archive"
    tape.parent.rename(moved)
    found = compare(a, b)
    assert (found.first.row, found.windows) == (0, ())
    assert "is not a recording" in found.notes[0]
    assert "--tapes" in found.notes[0]
    assert len(found.notes) == 1
    assert "frames cannot be shown" in printed(found)
    there = compare(a, b, tapes=moved)
    assert (focus(there.windows[0]), there.notes) == ([3, 3], ())


def test_a_recording_that_is_not_the_same_any_more(tape, tmp_path, out):
    a, b = runs_of(out, (tape, CONFIG), (tape, threshold(size_krw="2000000")))
    body = bytearray((tape / SEGMENTS / SEGMENT).read_bytes())
    body[len(body) // 3] ^= 1
    (tape / SEGMENTS / SEGMENT).write_bytes(body)
    assert "does not match its manifest" in compare(a, b).notes[0]
    shutil.rmtree(tape)
    market(5).write(tape)
    found = compare(a, b)
    assert "is not the recording of this run any more" in found.notes[0]
    assert found.windows == ()


def test_one_of_two_recordings_is_gone(tape, tmp_path, out):
    other = forged(tape, tmp_path / "other", replaced(9, ASK, ASK.replace(b"100000.0", b"100000.5")))
    a, b = runs_of(out, (tape, CONFIG), (other, CONFIG))
    shutil.rmtree(tape)
    found = compare(a, b)
    assert [(window.one_tape, focus(window)) for window in found.windows] == [(True, [4, 4]), (True, [9, 9])]
    assert len(found.notes) == 1


def test_runs_of_several_recordings(tape, tmp_path, out):
    """Both recordings have a frame 3; the time says which one decided."""
    later = Market()
    for ms in range(5_000, 6_000, 200):
        later.parity(ms)
    later.write(tmp_path / "tapes" / "later", session="later")
    changed = forged(tmp_path / "tapes" / "later", tmp_path / "changed", replaced(7, b"1400.0", b"1400.5"))
    a, b = runs_of(out, (tape, CONFIG), (tape, threshold(size_krw="2000000")))
    refs = [
        json.loads((run.run_dir / RUN_JSON).read_text())["tape"]
        for run in (replay(folder, CONFIG, out=out / "x") for folder in (tmp_path / "tapes" / "later", changed))
    ]
    for run, ref in zip((a, b), refs, strict=True):
        summary = json.loads((run / RUN_JSON).read_text())
        summary["tape"] = {"tapes": [ref, summary["tape"]]}
        (run / RUN_JSON).write_text(json.dumps(summary))
    found = compare(a, b)
    assert names(found.inputs) == ["tape 1.sha256", "config.policy.size_krw"]
    assert [(window.session, window.differs, focus(window)) for window in found.windows] == [
        ("later", True, [7, 7]),
        ("market", False, [3, 3]),
    ]
    summary["tape"]["tapes"].pop(0)
    (b / RUN_JSON).write_text(json.dumps(summary))
    assert names(compare(a, b).inputs)[:3] == ["tape 2.session", "tape 2.sha256", "tape 2.state"]


def split(folder, frames):
    """Each venue recorded by itself."""
    tapes = []
    for venue in ("upbit", "binance"):
        part = Market()
        heard = (frame for frame in frames if frame.venue == venue)
        part.frames = [dataclasses.replace(frame, seq=seq) for seq, frame in enumerate(heard, 1)]
        tapes.append(part.write(folder / venue, venue))
    return tapes


def test_events_of_a_run_of_several_show_frames_of_the_recording_they_are_of(tmp_path, out):
    """An order is decided on a frame of one venue and may be resolved by one of the other."""
    tapes = split(tmp_path / "tapes", market().frames)
    slower = msgspec.structs.replace(CONFIG, paper=msgspec.structs.replace(CONFIG.paper, upbit_latency_ms=120.0))
    a, b, c = (replay(tapes, config, out=out).run_dir for config in (CONFIG, threshold(size_krw="2000000"), slower))
    for other, table, shown in ((b, DECISIONS, [("binance", [1, 1])]), (c, FILLS, [("binance", [1, 1]), ("upbit", [4, 4])])):
        found = compare(a, other, around=0)
        assert (found.first.table, found.notes) == (table, ())
        assert [(window.session, focus(window)) for window in found.windows] == shown


def test_recordings_of_one_moment_are_told_apart_by_their_rank_and_venue(tmp_path, out):
    """Every frame of one has a frame of the other with its number and its time beside it."""
    whole = Market()
    for ms in range(0, 1_200, 200):
        whole.upbit(ms, [(150_000_000, 10)], [(150_100_000, 10)]).rate(ms + 1)
        whole.binance(ms, [(99_990, 10)], [(100_000, 10)]).binance(ms + 1, [(99_990, 10)], [(100_000, 10)])
    tapes = split(tmp_path / "tapes", whole.frames)
    slower = msgspec.structs.replace(CONFIG, paper=msgspec.structs.replace(CONFIG.paper, upbit_latency_ms=120.0))
    a, b = (replay(tapes, config, out=out).run_dir for config in (CONFIG, slower))
    found = compare(a, b, around=0)
    row = found.first.earlier
    sessions = ["binance", "upbit"]  # in the order of their ranks: they begin at one time
    assert [window.session for window in found.windows] == [sessions[row["seq"] >> 40], row["venue"]]


def test_a_fill_of_a_venue_that_there_is_not(tape, out):
    slow = msgspec.structs.replace(CONFIG, paper=msgspec.structs.replace(CONFIG.paper, upbit_latency_ms=30.0))
    runs = runs_of(out, (tape, CONFIG), (tape, slow))
    for run in runs:
        fills = pq.read_table(run / FILLS)
        at = fills.column_names.index("venue")
        foreign = pa.array(["nowhere"] * len(fills)).cast(fills.schema.field("venue").type)
        pq.write_table(fills.set_column(at, fills.schema.field("venue"), foreign), run / FILLS)
    assert list(map(focus, compare(*runs, around=0).windows)) == [[3, 3]]


def test_a_recording_that_a_run_did_not_read_resolves_nothing_of_it(tmp_path, out):
    short, late = market(1), Market()
    for ms in range(5_000, 6_000, 200):
        late.premium(ms)
    x, y = (found.write(tmp_path / "tapes" / name, name) for found, name in ((short, "x"), (late, "y")))
    a, b = (replay(tapes, CONFIG, out=out).run_dir for tapes in ([x], [x, y]))
    assert {window.session for window in compare(a, b, around=0).windows} == {"x"}


def test_recordings_in_an_object_store(tape, tmp_path, out, store):
    other = forged(tape, tmp_path / "other", replaced(9, ASK, ASK.replace(b"100000.0", b"100000.5")))
    for folder in (tape, other):
        for file in (MANIFEST, f"{SEGMENTS}/{SEGMENT}"):
            store.overwrite(f"diff/{folder.name}/{file}", (folder / file).read_bytes())
    a, b = runs_of(out, *((store.url(f"diff/{folder.name}"), CONFIG) for folder in (tape, other)))
    shutil.rmtree(tape)
    shutil.rmtree(other)
    found = compare(a, b)
    assert ([focus(window) for window in found.windows], found.notes) == ([[9, 9], [4, 4]], ())
    assert found.windows[0].fields == ("payload",)
    store.delete(f"diff/market/{SEGMENTS}/{SEGMENT}")
    assert "missing" in compare(a, b).notes[0]


# ---------------------------------------------------------------------------------------------------- against a slow twin


def events(seed, rows=60):
    """Decisions and fills as an engine may write them; a few columns carry values, the others are equal."""
    chance = np.random.default_rng(seed)
    decisions, fills = np.zeros(rows, DECISION_DTYPE), np.zeros(2 * rows, FILL_DTYPE)
    decisions["decision_id"] = np.arange(1, rows + 1)
    decisions["seq"] = np.cumsum(chance.integers(1, 4, rows))
    decisions["time_ns"] = 10**18 + decisions["seq"] * 10**6
    decisions["edge_bps"] = chance.normal(size=rows)
    fills["order_id"] = np.arange(1, 2 * rows + 1)
    for name in ("decision_id", "seq", "time_ns", "edge_bps"):
        fills[name] = np.repeat(decisions[name], 2)
    fills["venue"] = np.tile([1, 2], rows)
    fills["arrive_ns"] = fills["time_ns"] + 2 * 10**6
    fills["after_ns"] = np.where(chance.random(2 * rows) < 0.8, fills["arrive_ns"] + 10**6, 0)
    for table in (decisions, fills):
        table["direction"] = table["intent"] = 1
    fills["side"] = fills["status"] = 1
    return decisions, fills


def mutated(seed, decisions, fills):
    """Another run of the same market: rows dropped, added, changed, numbers counted anew."""
    chance = np.random.default_rng(seed)
    start = chance.integers(0, len(decisions))
    keep = np.ones(len(decisions), bool)
    keep[start:] = chance.random(len(decisions) - start) > 0.1 * chance.integers(0, 3)
    other = decisions[keep].copy()
    legs = fills[np.repeat(keep, 2)].copy()
    for table, column in ((other, "edge_bps"), (legs, "filled_e8"), (legs, "after_ns")):
        hit = (np.arange(len(table)) >= start) & (chance.random(len(table)) < 0.05 * chance.integers(0, 3))
        table[column][hit] += 1
    other["decision_id"] = np.arange(1, len(other) + 1)
    legs["order_id"] = np.arange(1, len(legs) + 1)
    return other, legs


def written(root, name, decisions, fills, step):
    sink = RunSink(root, ["BTC"])
    for start in range(0, max(len(decisions), len(fills)), step):
        sink.write(Events(decisions[start : start + step], fills[start : start + step]))
    tape = {"session": "s", "sha256": "0" * 64, "place": ""}
    return sink.commit(name, {"digest": name, "tape": tape, "config": {}, "rules": {}, "books": []})


def slow_first(a, b):
    """Row, and the time of the earlier side: one row after another."""
    latest = 0
    for row in range(max(len(a), len(b))):
        both = [table[row] if row < len(table) else None for table in (a, b)]
        times = [
            max(latest, int(max(side["after_ns"], side["arrive_ns"]) if "arrive_ns" in a.dtype.names else side["time_ns"]))
            for side in both
            if side is not None
        ]
        if None in both or both[0].tobytes() != both[1].tobytes():
            return row, min(times)
        latest = max(latest, *times)
    return None


def slow_counts(a, b, row, key):
    """Alike, changed, only in A, only in B."""
    numbers = ("decision_id", "order_id", "upbit_order_id", "binance_order_id")
    values = [name for name in a.dtype.names if name not in numbers]
    sides = []
    for table in (a, b):
        found = defaultdict(list)
        for line in table[row:]:
            found[tuple(line[name].item() for name in key)].append(tuple(line[name].item() for name in values))
        sides.append(found)
    alike = changed = only_a = only_b = 0
    for about in {**sides[0], **sides[1]}:
        ours, theirs = sides[0][about], sides[1][about]
        pairs = list(zip(ours, theirs, strict=False))
        alike += sum(x == y for x, y in pairs)
        changed += sum(x != y for x, y in pairs)
        only_a += len(ours) - len(pairs)
        only_b += len(theirs) - len(pairs)
    return alike, changed, only_a, only_b


@pytest.mark.parametrize("seed", range(12))
def test_the_same_answer_as_row_by_row(seed, tmp_path):
    ours = events(seed)
    theirs = mutated(seed + 1_000, *ours)
    a = written(tmp_path, "a", *ours, step=7)
    b = written(tmp_path, "b", *theirs, step=1 + seed)
    expected = []
    for k, (table, key) in enumerate(((DECISIONS, ("time_ns", "seq", "symbol")), (FILLS, ("time_ns", "seq", "symbol", "venue")))):
        slow = slow_first(ours[k], theirs[k])
        found = first_difference_of_events(a, b, table)
        assert (found and (found.row, found.time_ns)) == slow
        if found is not None:
            count = count_differences(a, b, found)
            assert (count.alike, count.changed, count.only_a, count.only_b) == slow_counts(ours[k], theirs[k], slow[0], key)
            assert (count.rows_a, count.rows_b) == (len(ours[k]), len(theirs[k]))
            expected.append((slow[1], table))
    first = compare(a, b).first
    if not expected:
        assert first is None
    else:
        assert (first.time_ns, first.table) in expected
        assert first.time_ns == min(expected)[0]


@pytest.mark.parametrize(("decided_ns", "after_ns", "first"), [(-1, 0, FILLS), (0, -5, DECISIONS), (-1, 1, DECISIONS)])
def test_at_one_instant_fills_of_earlier_decisions_go_first(decided_ns, after_ns, first, tmp_path):
    """A decision and a fill differ at one time: the fill was resolved then, or its leg was decided then, or it is later."""
    ours = events(3)
    at = int(ours[0]["time_ns"][20])
    ours[1]["after_ns"] = ours[1]["arrive_ns"] = 0
    ours[1]["time_ns"][40] = ours[1]["arrive_ns"][40] = at + decided_ns
    ours[1]["after_ns"][40] = at + after_ns
    theirs = tuple(table.copy() for table in ours)
    theirs[0]["edge_bps"][20] += 1
    theirs[1]["filled_e8"][40] += 1
    found = compare(written(tmp_path, "a", *ours, step=50), written(tmp_path, "b", *theirs, step=9))
    assert (found.first.table, found.first.time_ns) == (first, at)
    assert {found.first.table, found.other.table} == {DECISIONS, FILLS}


def test_a_nan_and_a_signed_zero_are_compared_by_their_bits(tmp_path):
    ours = events(1)
    theirs = tuple(table.copy() for table in ours)
    for tables, edge in ((ours, 0.0), (theirs, -0.0)):
        tables[0]["edge_bps"][5] = np.nan
        tables[0]["edge_bps"][9] = edge
    found = compare(written(tmp_path, "a", *ours, step=50), written(tmp_path, "b", *theirs, step=50))
    assert (found.first.row, found.first.columns) == (9, ("edge_bps",))
    json.dumps(found.to_json(), allow_nan=False)


# --------------------------------------------------------------------------------------------------- no changed byte unseen


def reseal(tape):
    """The manifest says that the segment is as it is now: a forger's work."""
    manifest = load_manifest(tape)
    path = tape / SEGMENTS / SEGMENT
    (segment,) = manifest.segments
    sealed = msgspec.structs.replace(segment, bytes=path.stat().st_size, sha256=sha256_of(path))
    save_manifest(tape, msgspec.structs.replace(manifest, segments=[sealed]))


def regions(path):
    """Where in a segment what lies: every column, the index of pages, the footer, the marks at both ends."""
    size = path.stat().st_size
    footer = size - 8 - pq.read_metadata(path).serialized_size
    found = {"mark": [(0, 4), (size - 4, size)], "footer": [(footer, size - 4)]}
    group = pq.read_metadata(path).row_group(0)
    for k in range(group.num_columns):
        column = group.column(k)
        start = column.dictionary_page_offset or column.data_page_offset
        found[column.path_in_schema] = [(start, start + column.total_compressed_size)]
    return found


def test_a_flipped_byte_of_a_segment_is_refused(tape, out):
    path = tape / SEGMENTS / SEGMENT
    whole = path.read_bytes()
    found = regions(path)
    assert set(found) == {*SCHEMA.names, "mark", "footer"}
    for spans in found.values():
        for start, stop in spans:
            for at in range(start, stop, max(1, (stop - start) // 30)):
                body = bytearray(whole)
                body[at] ^= 1 << at % 8
                path.write_bytes(body)
                with pytest.raises(TapeError, match="does not match its manifest"):
                    replay(tape, CONFIG, out=out)
    assert not out.exists()
    path.write_bytes(whole)
    assert replay(tape, CONFIG).digest


def test_a_flipped_byte_under_a_forged_manifest_is_refused_or_told(tape, out):
    (run,) = runs_of(out / "true", (tape, CONFIG))
    manifest = (tape / MANIFEST).read_bytes()
    path = tape / SEGMENTS / SEGMENT
    whole = path.read_bytes()
    refused, told = 0, 0
    for spans in regions(path).values():
        for start, stop in spans:
            for at in range(start, stop, max(1, (stop - start) // 8)):
                body = bytearray(whole)
                body[at] ^= 1 << at % 8
                path.write_bytes(body)
                (tape / MANIFEST).write_bytes(manifest)
                reseal(tape)
                try:
                    (forged_run,) = runs_of(out / "forged", (tape, CONFIG))
                except Arbl2Error:
                    refused += 1
                    continue
                assert "tape.sha256" in names(compare(run, forged_run).inputs), f"byte {at}"
                told += 1
    assert refused > 20
    assert told > 20


@pytest.mark.parametrize("seq", [4, 5, 6])
def test_a_flipped_byte_of_a_payload_is_found_where_it_is(seq, tape, tmp_path, out):
    """Written anew by an honest writer, so that nothing but the payload differs."""
    (run,) = runs_of(out / "true", (tape, CONFIG))
    payload = next(frame.payload for frame in TapeReader(tape).frames() if frame.seq == seq)
    end = payload.index(b"]]") if b"]]" in payload else payload.index(b"}")
    places = [*range(0, end, max(1, end // 5)), payload.index(b"10"), len(payload) - 1]
    unseen = []
    for at in places:
        other = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        folder = forged(tape, tmp_path / f"at-{at}", replaced(seq, payload, other))
        (changed,) = runs_of(out / f"at-{at}", (folder, CONFIG))
        found = compare(run, changed)
        window = found.windows[0]
        assert (names(found.inputs), focus(window), window.fields) == (["tape.sha256"], [seq, seq], ("payload",))
        assert payload_change(*window.pairs[window.focus]) == at
        if found.same:
            unseen.append(payload[max(0, at - 20) : at + 1])
    assert len(unseen) < len(places) // 3, unseen  # of a book's bytes only the venue's own time changes no run


@pytest.mark.parametrize("name", ["recv_ns", "mono_ns", "conn", "venue", "op", "queue_us", "flags"])
def test_a_changed_stamp_is_found_where_it_is(name, tape, tmp_path, out):
    def change(frame):
        value = getattr(frame, name)
        other = {"venue": "upbit", "op": type(frame.op)(2)}.get(name) or value + 1
        return dataclasses.replace(frame, **{name: other}) if frame.seq == 12 else frame

    (a,), (b,) = runs_of(out / "1", (tape, CONFIG)), runs_of(out / "2", (forged(tape, tmp_path / "other", change), CONFIG))
    found = compare(a, b)
    assert found.same == (name in ("recv_ns", "op", "queue_us", "flags"))  # what the engine does not read
    assert (focus(found.windows[0]), found.windows[0].fields) == ([12, 12], (name,))
    assert f"differs in {name}" in printed(found)


def test_a_flipped_byte_of_a_manifest_is_refused_or_told_or_of_no_use(tape, out):
    """What a manifest only tells people may change without changing a run; nothing else may."""
    told_only = {"versions", "host", "endpoints", "subscriptions", "counts", "notes"}
    segment_told_only = {"first_recv_ns", "last_recv_ns", "payload_bytes"}

    def meant(body):
        values = msgspec.to_builtins(msgspec.json.decode(body, type=type(load_manifest(tape))))
        values["segments"] = [{k: v for k, v in s.items() if k not in segment_told_only} for s in values["segments"]]
        return {key: value for key, value in values.items() if key not in told_only}

    (run,) = runs_of(out / "true", (tape, CONFIG))
    whole = (tape / MANIFEST).read_bytes()
    outcomes = defaultdict(int)
    for at in range(0, len(whole), 7):
        body = bytearray(whole)
        body[at] ^= 1
        (tape / MANIFEST).write_bytes(body)
        try:
            (changed,) = runs_of(out / "changed", (tape, CONFIG))
        except Arbl2Error:
            outcomes["refused"] += 1
            continue
        found = compare(run, changed)
        if meant(bytes(body)) == meant(whole):
            outcomes["of no use"] += 1
            assert found.same
        else:
            outcomes["told"] += 1
            assert found.inputs, bytes(body[max(0, at - 30) : at + 10])
    assert outcomes["refused"] > 50, outcomes
    assert outcomes["told"] > 0, outcomes


# ------------------------------------------------------------------------------------------------------ what is refused


def test_damaged_and_foreign_runs(tape, out, tmp_path):
    a, b = runs_of(out, (tape, CONFIG), (tape, threshold(size_krw="2000000")))

    def refused(file, body, says):
        path = b / file
        before = path.read_bytes()
        path.write_bytes(body)
        with pytest.raises(TapeError, match=says) as caught:
            compare(a, b)
        assert str(path) in str(caught.value)
        path.write_bytes(before)

    for body in (b"", b"{", b"[]", b'{"digest":1}', b"\xff\xfe", b"[" * 100_000):
        refused(RUN_JSON, body, "Replay the tape again")
    summary = json.loads((b / RUN_JSON).read_text())
    for change in ({"tape": {"session": "s"}}, {"tape": {"tapes": [1]}}, {"config": []}):
        refused(RUN_JSON, json.dumps({**summary, **change}).encode(), "Replay the tape again")
    for table in (DECISIONS, FILLS):
        body = (b / table).read_bytes()
        for damaged in (b"", b"PAR1", body[: len(body) // 2], body[:-1], bytes(len(body))):
            refused(table, damaged, "Replay the tape again")
        for at in range(4, len(body), 797):
            flipped = bytearray(body)
            flipped[at] ^= 1 << at % 8
            (b / table).write_bytes(flipped)
            with suppress(TapeError):  # or it is compared as it reads; nothing else may come of it
                compare(a, b)
        (b / table).write_bytes(body)
    other = pa.BufferOutputStream()
    pq.write_table(pa.table({"time_ns": [1], "seq": [2]}), other)
    refused(FILLS, other.getvalue().to_pybytes(), "does not hold what this arbl2 writes")
    (b / FILLS).unlink()
    with pytest.raises(TapeError, match=r"fills\.parquet is missing"):
        compare(a, b)
    with (b / RUN_JSON).open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(TapeError, match="too large"):
        compare(a, b)
    with pytest.raises(TapeError, match="is not a run"):
        compare(a, tmp_path)


def test_row_groups_that_are_too_large_are_refused(tape, out, monkeypatch):
    (run,) = runs_of(out, (tape, CONFIG))
    monkeypatch.setattr("arbl2_replay.compare_events.MAX_GROUP_ROWS", 7)
    with pytest.raises(TapeError, match=r"fills\.parquet row group 0 is larger than any that arbl2 writes"):
        compare(run, run)


def test_a_table_that_was_changed_after_its_run(tape, out, tmp_path):
    (run,) = runs_of(out, (tape, CONFIG))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    table = pq.read_table(run / FILLS)
    with pq.ParquetWriter(copy / FILLS, table.schema) as writer:
        writer.write_table(table.slice(0, 5))
    with pytest.raises(TapeError, match=r"have one digest and other fills\.parquet"):
        compare(run, copy)


def test_what_a_payload_holds_does_not_reach_the_terminal(tape, tmp_path, out):
    evil = forged(tape, tmp_path / "other", replaced(9, ASK, b'"asks":\x1b[2J\x07\x00\xec\xa0\x80[["1","1"]]'))
    a, b = runs_of(out, (tape, CONFIG), (evil, CONFIG))
    summary = json.loads((b / RUN_JSON).read_text())
    summary["config"]["policy"]["size_krw"] = "\x1b[31m1"
    (b / RUN_JSON).write_text(json.dumps(summary))
    text = printed(compare(a, b))
    assert not {c for c in text if ord(c) < 32} - {"\n"}
    assert '"asks":.[2J.....[["1","1"]]' in text


# --------------------------------------------------------------------------------------------------------------- names


def test_runs_by_folder_name_and_digest(out, tmp_path):
    for name in ("x-11112222", "x-11113333", "y-44445555", "notes"):
        (out / name).mkdir(parents=True)
        if name != "notes":
            (out / name / RUN_JSON).write_text("{}")
    x1, _, y = (out / name for name in ("x-11112222", "x-11113333", "y-44445555"))
    assert find_run(str(y), tmp_path) == y
    for name in ("y-44445555", "y", "4444", "44445555", "44445555" + "0" * 56):
        assert find_run(name, out) == y
    assert find_run("11112", out) == x1
    for name in ("x", "1111"):
        with pytest.raises(ConfigError, match="may be any of x-11112222, x-11113333"):
            find_run(name, out)
    for name in ("z", "notes", "", "../runs/y"):
        with pytest.raises(TapeError, match="there is no run"):
            find_run(name, out)
    with pytest.raises(TapeError, match=r"is not a run: it has no run\.json\. There are x-11112222"):
        find_run(str(out), tmp_path)
    with pytest.raises(ConfigError, match="is a URL"):
        find_run("s3://bucket/runs/x", out)


# ------------------------------------------------------------------------------------------------------- the command line


def arbl2(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "arbl2", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


def test_the_command(tape, tmp_path, out):
    cheaper = forged(tape, tmp_path / "other", replaced(9, ASK, ASK.replace(b"100000.0", b"100000.5")))
    a, b = runs_of(out, (tape, CONFIG), (cheaper, CONFIG))
    done = arbl2("diff", a.name, b.name[-8:], cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "First frame that differs" in done.stdout
    assert "\x1b" not in done.stdout
    said = arbl2("diff", a, b, "--json", "--frames", "1", cwd=tmp_path)
    found = json.loads(said.stdout)
    assert (said.returncode, found["same"], found["first_event"]["a"]["seq"]) == (1, False, 4)
    assert [change["name"] for change in found["inputs"]] == ["tape.sha256"]
    assert [[side["seq"] for side in pair] for pair in found["frames"][0]["pairs"]] == [[8, 8], [9, 9], [10, 10]]
    same = arbl2("diff", a, a, cwd=tmp_path)
    assert (same.returncode, same.stdout.startswith("The same run")) == (0, True)
