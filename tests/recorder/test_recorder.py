"""A recording as a whole: folders, rotation, limits, status."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import threading
import time
from multiprocessing import get_context

import pytest
from rich.console import Console

from arbl2.errors import EngineError, StorageError
from arbl2.frames import Anchor, Flag, Frame, FrameBlock, FrameKind, Op
from arbl2.tape import LOG, SEGMENTS, TapeReader, load_manifest, sessions
from arbl2_recorder import Listener, LiveView, RecordConfig, Status, VenueStatus, clock, record
from arbl2_recorder.consumer import Consumer
from arbl2_recorder.live import render
from arbl2_recorder.log import LogReader
from arbl2_recorder.session import Session
from arbl2_recorder.writer import LogWriter, log_path

pytest_plugins = ("object_store",)


def test_the_manifest_says_what_was_recorded(venue, scripts, make_config, frames):
    upbit, binance = venue(scripts["upbit"]), venue(scripts["binance"])
    result = record(make_config(upbit=upbit, binance=binance, symbols=("BTC", "XRP"), duration_s=0.6, clock_s=0.2))
    manifest = load_manifest(result.path)
    found = frames(result.path)
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", manifest.session)
    assert manifest.state == "sealed"
    assert manifest.instruments == {"upbit": ["KRW-BTC", "KRW-XRP", "KRW-USDT"], "binance": ["BTCUSDT", "XRPUSDT"]}
    assert manifest.subscriptions["binance"]["params"] == ["btcusdt@depth20@100ms", "xrpusdt@depth20@100ms"]
    assert manifest.subscriptions["upbit"][1]["codes"] == ["KRW-BTC.30", "KRW-XRP.30", "KRW-USDT.30"]
    assert manifest.endpoints["upbit_ws"] == upbit.ws_url
    assert manifest.endpoints["binance_rest"] == binance.rest_url
    assert set(manifest.versions) == {"arbl2", "python", "websockets", "pyarrow"}
    counts: dict[str, int] = {}
    for frame in found:
        key = f"{frame.venue or '-'}.{frame.kind.name.lower()}"
        counts[key] = counts.get(key, 0) + 1
    assert manifest.counts == result.counts == counts
    assert counts["-.clock"] >= 4
    clocks = [(f, json.loads(f.payload)) for f in found if f.kind is FrameKind.CLOCK]
    assert all((f.recv_ns, f.mono_ns) == (c["wall_ns"], c["mono_ns"]) for f, c in clocks)
    assert found[0].mono_ns >= manifest.anchor_mono_ns
    assert abs(manifest.anchor.time_ns(found[-1].mono_ns) - found[-1].recv_ns) < 50_000_000
    assert result.frames == len(found)
    assert result.payload_bytes == sum(len(f.payload) for f in found)
    assert (result.ended, result.clean, result.dropped, result.alarms) == ("duration", True, 0, {})
    assert not list(result.path.rglob("*.part"))
    assert not (result.path / LOG).exists()


def test_a_step_of_the_wall_clock_is_an_alarm_and_engine_time_goes_on(venue, scripts, make_config, frames, monkeypatch):
    """The one place that reads the wall clock is put back by 200 ms in the middle of a recording."""
    server = venue(scripts["upbit"])
    step_at = time.monotonic() + 0.5
    monkeypatch.setattr(clock, "time_ns", lambda: time.time_ns() - (200_000_000 if time.monotonic() > step_at else 0))
    result = record(make_config(upbit=server, duration_s=1.0, clock_s=0.1))
    found = frames(result.path)
    steps = [json.loads(f.payload) for f in found if f.kind is FrameKind.ALARM]
    assert [step["alarm"] for step in steps] == ["clock_step"]
    assert abs(steps[0]["moved_ns"] + 200_000_000) < 2_000_000
    assert any(b.recv_ns < a.recv_ns for a, b in itertools.pairwise(found))


def test_segments_are_sealed_while_recording(venue, scripts, make_config, frames):
    server = venue(scripts["upbit"])
    sealed_early = []

    def look(status):
        if status.phase == "recording" and status.segments >= 2 and not sealed_early:
            reader = TapeReader(sessions(config.out)[-1])
            reader.verify_hashes()
            sealed_early.append((reader.manifest.state, sum(1 for _ in reader.frames())))

    config = make_config(upbit=server, duration_s=1.5, segment_bytes=20_000, flush_ms=20)
    result = record(config, on_status=look)
    segments = load_manifest(result.path).segments
    assert len(segments) >= 3
    assert sealed_early
    assert sealed_early[0][0] == "recording"
    assert sealed_early[0][1] > 100
    payloads = [f.payload for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    assert payloads == [payload for _, payload, _ in server.sent[: len(payloads)]]
    assert all(a.last_seq + 1 == b.first_seq for a, b in itertools.pairwise(segments))


def test_segments_end_on_whole_seconds_of_utc(venue, scripts, make_config):
    server = venue(scripts["upbit"])
    result = record(make_config(upbit=server, duration_s=2.3, segment_seconds=1, flush_ms=20))
    segments = load_manifest(result.path).segments
    assert len(segments) in (3, 4)
    for segment in segments[1:]:
        # A log is closed at the first flush after the boundary; what waited for that flush was stamped just before it.
        assert (segment.first_recv_ns + 100_000_000) % 10**9 < 400_000_000


def test_frames_that_came_while_the_loop_was_held_up_are_flagged(venue, scripts, make_config, frames):
    server = venue(scripts["upbit"])
    held = []

    def hold_up(status):
        if status.frames > 50 and not held:
            held.append(time.monotonic_ns())
            time.sleep(0.3)
            held.append(time.monotonic_ns())

    result = record(make_config(upbit=server, duration_s=1.5), on_status=hold_up)
    found = [f for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    late = [f for f in found if f.flags & Flag.LATE]
    read_after = [f for f in found if held[1] <= f.mono_ns <= held[1] + 5_000_000]
    assert read_after
    assert read_after[0] in late
    assert result.late_frames >= len(late) > 0
    assert [f for f in found if f.mono_ns < held[0] and not f.flags]
    assert all(0 <= f.queue_us < 1_000_000 for f in found)


def test_a_process_that_was_frozen_flags_what_came_meanwhile(venue, scripts, make_config, frames, tmp_path):
    server = venue(scripts["upbit"])
    config = make_config(upbit=server, duration_s=3.0)
    with get_context("spawn").Pool(1) as pool:
        recording = pool.apply_async(record, (config,))
        limit = time.monotonic() + 30
        while len(server.sent) < 300 and time.monotonic() < limit:
            time.sleep(0.01)
        pid = pool._pool[0].pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.8)
        os.kill(pid, signal.SIGCONT)
        result = recording.get(60)
    found = [f for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    before, after = max(itertools.pairwise(found), key=lambda pair: pair[1].mono_ns - pair[0].mono_ns)
    assert after.mono_ns - before.mono_ns > 700_000_000
    backlog = [f for f in found if 0 <= f.mono_ns - after.mono_ns < 50_000_000]
    assert len(backlog) > 50
    assert all(f.flags & Flag.LATE for f in backlog)
    assert result.gaps["loop_stall"] >= 1


def test_a_second_recorder_on_the_same_folder_is_refused(venue, scripts, make_config, stop_when):
    server = venue(scripts["upbit"])
    config = make_config(upbit=server)
    stop = threading.Event()
    done = []
    first = threading.Thread(target=lambda: done.append(record(config, stop=stop)))
    first.start()
    limit = time.monotonic() + 20
    while not server.sent and time.monotonic() < limit:
        time.sleep(0.01)
    try:
        with pytest.raises(StorageError, match=rf"in use by another recorder \(process {os.getpid()}\)"):
            record(config)
    finally:
        stop.set()
        first.join()
    assert done[0].ended == "stop"
    assert len(sessions(config.out)) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Choose a folder that can be written to"):
        record(RecordConfig(out=tmp_path / "file" / "tapes"))


def test_a_hook_that_raises_ends_the_recording_after_sealing(venue, scripts, make_config, frames):
    server = venue(scripts["upbit"])
    config = make_config(upbit=server)

    def hook(frame):
        if frame.seq == 50:
            raise EngineError("position does not reconcile")

    with pytest.raises(EngineError, match="reconcile"):
        record(config, on_frame=hook)
    [session] = sessions(config.out)
    assert TapeReader(session).manifest.state == "sealed"
    assert len(frames(session)) >= 50


def test_the_hook_sees_every_frame_with_its_seq(venue, scripts, make_config, frames):
    upbit, binance = venue(scripts["upbit"]), venue(scripts["binance"])
    seen = []
    result = record(make_config(upbit=upbit, binance=binance, duration_s=0.5), on_frame=seen.append)
    assert seen == frames(result.path)


def test_a_hook_that_falls_behind_is_cut_off():
    release, errors, seen = threading.Event(), [], []

    def hook(block):
        release.wait(10)
        seen.extend(block.frames())

    consumer = Consumer(hook, errors.append, limit_bytes=2500)
    with_payload = [_frame(seq, b"x" * 1000) for seq in range(1, 6)]
    for frame in with_payload:
        consumer.put(FrameBlock.from_frames([frame], Anchor(0, 0)).heads().tobytes(), frame.payload)
    release.set()
    consumer.close()
    assert "too far behind" in str(errors[0])
    assert len(errors) == 1
    assert seen == with_payload[: len(seen)]
    assert len(seen) <= 2


def test_a_hook_is_told_when_a_burst_is_over():
    told, over = [], threading.Event()

    def idle():
        told.append("idle")
        over.set()

    consumer = Consumer(lambda block: told.extend(block.seq.tolist()), pytest.fail, limit_bytes=2500, on_idle=idle)
    for seqs in ((1, 2, 3), (4,)):
        over.clear()
        for seq in seqs:
            frame = _frame(seq, b"x")
            consumer.put(FrameBlock.from_frames([frame], Anchor(0, 0)).heads().tobytes(), frame.payload)
        assert over.wait(10)
    consumer.close()
    assert [each for each in told if each != "idle"] == [1, 2, 3, 4]
    assert told[-1] == "idle"


def _frame(seq, payload):
    return Frame(seq, seq, seq, "upbit", 1, FrameKind.MESSAGE, Op.TEXT, payload)


def test_a_stalled_disk_holds_nothing_up_and_drops_are_declared(tmp_path):
    """A pipe that nobody reads is a disk that stalls: writes block until the reader comes."""
    (tmp_path / LOG).mkdir()
    os.mkfifo(log_path(tmp_path, 1))
    reading, written = os.open(log_path(tmp_path, 1), os.O_RDONLY | os.O_NONBLOCK), []
    errors = []
    log = LogWriter(
        tmp_path,
        flush_ms=10,
        fsync=False,
        segment_seconds=900,
        segment_bytes=2**40,
        on_rotated=lambda number: None,
        on_error=errors.append,
    )
    session = Session(log, queue_bytes=3_000_000)
    payload = b"x" * 1000
    slowest_ns = 0
    results = []
    for i in range(12_000):
        before = time.perf_counter_ns()
        results.append(session.accept(1, 1 + i % 2, FrameKind.MESSAGE, Op.BINARY, payload, 10**18 + i, i))
        slowest_ns = max(slowest_ns, time.perf_counter_ns() - before)
    peak = log.queued_bytes
    assert peak < 3_000_000 + 2 * 1192
    assert results.count(0) == session.dropped > 8_000

    def drain():
        os.set_blocking(reading, True)
        while chunk := os.read(reading, 2**20):
            written.append(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    limit = time.monotonic() + 20
    while log.queued_bytes > 1_000_000 and time.monotonic() < limit:
        time.sleep(0.01)
    session.accept(1, 1, FrameKind.MESSAGE, Op.BINARY, b"after", 2 * 10**18, 20_000)
    log.close()
    reader.join()
    os.close(reading)
    assert errors == []

    plain = tmp_path / "plain.log"
    plain.write_bytes(b"".join(written))
    blocks = LogReader(plain, Anchor(0, 0))
    found = [frame for block in blocks.blocks() for frame in block.frames()]
    assert blocks.dropped_bytes == 0
    assert [f.seq for f in found] == list(range(1, len(found) + 1))
    alarms = [(f.conn, json.loads(f.payload)) for f in found if f.kind is FrameKind.ALARM]
    lost = {conn: [i for i, seq in enumerate(results) if seq == 0 and 1 + i % 2 == conn] for conn in (1, 2)}
    assert alarms == [
        (
            conn,
            {
                "alarm": "dropped",
                "frames": len(lost[conn]),
                "bytes": 1000 * len(lost[conn]),
                "from_recv_ns": 10**18 + lost[conn][0],
                "to_recv_ns": 10**18 + lost[conn][-1],
            },
        )
        for conn in sorted(lost, key=lambda conn: lost[conn][0])
    ]
    assert found[-1].payload == b"after"
    assert found[-2].kind is FrameKind.ALARM
    assert len(found) == 12_000 - session.dropped + 3
    print(f"slowest accept while the disk stood still: {slowest_ns / 1e6:.2f} ms")


def example_status(**changes):
    venues = (
        VenueStatus("upbit", "open", 1, 1234, 10, 12.5, 0.1, ""),
        VenueStatus("binance", "waiting", 3, 0, 0, 0.0, None, "refused"),
    )
    values = {
        "session": "20261121T113443Z-0a1b",
        "phase": "recording",
        "elapsed_s": 3725.0,
        "venues": venues,
        "frames": 1300,
        "queued_bytes": 2048,
        "logged_bytes": 3 * 2**20,
        "sealed_bytes": 0,
        "segments": 0,
        "waiting_logs": 0,
        "dropped": 0,
        "alarms": 1,
        "last_alarm": "binance connection 2: no ack",
    }
    return Status(**(values | changes))


def test_the_live_view_shows_on_a_terminal_and_says_one_line_in_a_pipe():
    terminal, pipe = io.StringIO(), io.StringIO()
    with LiveView(Console(file=terminal, force_terminal=True, width=120)) as view:
        view(example_status())
    shown = terminal.getvalue()
    for words in ("20261121T113443Z-0a1b", "1,234", "waiting: refused", "1:02:05", "queue 2.0 KiB", "no ack"):
        assert words in shown
    with LiveView(Console(file=pipe)) as view:
        view(example_status())
        view(example_status())
    assert pipe.getvalue().split() == ["recording", "20261121T113443Z-0a1b;", "Ctrl-C", "or", "SIGTERM", "ends", "it"]
    plain = Console(file=pipe, width=120)
    plain.print(render(example_status(alarms=0, last_alarm="")))
    assert "no alarms" in pipe.getvalue()


def test_status_follows_the_recording(venue, scripts, make_config):
    server = venue(scripts["upbit"])
    seen = []
    result = record(make_config(upbit=server, duration_s=0.6), on_status=seen.append)
    assert seen[-1].phase == "sealing"
    assert seen[-1].frames == result.frames
    running = [status for status in seen if status.phase == "recording"]
    assert max(status.venues[0].rate_per_s for status in running) > 50
    assert running[-1].venues[0].state == "open"
    assert running[-1].logged_bytes > 0


def test_what_is_sealed_goes_to_the_store_while_it_is_recorded(venue, scripts, make_config, store):
    server = venue(scripts["upbit"])
    url = store.url("live")
    options = {"session_s": 1.0, "segment_seconds": 1, "ship": url, "ship_delete": True}
    result = record(make_config(upbit=server, duration_s=3.0, **options))
    assert len(result.sessions) >= 2
    assert result.shipped_segments >= len(result.sessions)
    found = []
    for name in result.sessions:
        far = TapeReader(f"{url.partition('?')[0]}/{name}?{url.partition('?')[2]}")
        far.verify_hashes()
        assert far.manifest.state == "sealed"
        found += [frame.payload for frame in far.frames() if frame.kind is FrameKind.MESSAGE]
        assert not list((result.path.parent / name / SEGMENTS).glob("*.parquet"))
    assert found == [payload for _, payload, _ in server.sent[: len(found)]]
    assert len(found) > 200


def test_old_sessions_go_while_a_new_one_is_recorded(venue, scripts, make_config):
    server = venue(scripts["upbit"])
    first = record(make_config(upbit=server, duration_s=0.6))
    second = record(make_config(upbit=server, duration_s=0.6, keep_days=365))
    assert first.path.is_dir()
    third = record(make_config(upbit=server, duration_s=1.0, keep_bytes=1))
    assert not first.path.exists()
    assert not second.path.exists()
    assert TapeReader(third.path).manifest.state == "sealed"


def test_a_listener_is_told_each_session_and_what_of_it_is_logged(venue, scripts, make_config, frames):
    server = venue(scripts["upbit"])
    taken, asked = {}, []

    def begin(path, manifest, logged_seq):
        assert manifest.session == path.name
        assert manifest.anchor_mono_ns > 0
        taken[path] = []
        asked.append(logged_seq)

    def take(block):
        taken[list(taken)[-1]] += block.frames()

    record(make_config(upbit=server, duration_s=1.5, session_s=0.5), on_frame=Listener(take, on_session=begin))
    assert len(taken) >= 2
    for (path, seen), logged_seq in zip(taken.items(), asked, strict=True):
        assert seen == frames(path)
        assert logged_seq() == len(seen)


def test_a_listener_that_fails_leaves_the_recording_alone(venue, scripts, make_config, frames):
    server = venue(scripts["upbit"])
    errors, seen = [], []

    def take(block):
        seen.extend(block.frames())
        if len(seen) > 50:
            raise EngineError("position does not reconcile")

    result = record(make_config(upbit=server, duration_s=1.0), on_frame=Listener(take, on_error=errors.append))
    assert result.ended == "duration"
    assert [str(error) for error in errors] == ["position does not reconcile"]
    assert len(frames(result.path)) > len(seen)
