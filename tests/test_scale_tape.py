"""The tape of `make scale` is what a recorder would have written, whoever makes it; and its gates can be missed."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from arbl2.frames import FrameKind
from arbl2.providers import PROVIDERS
from arbl2.tape import Manifest, Segment, TapeReader
from arbl2_replay import replay
from arbl2_replay.warm import warm_up
from benchmarks.day import MONO_START_NS, SECOND_NS, START_NS, Day, make
from benchmarks.scale import HOUR_NS, Course, Done, Measured, growth, judge

DAY = Day(hours=0.0125, segment_ns=15 * SECOND_NS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("day")
    return folder, make(DAY, folder, processes=2)


@pytest.fixture(scope="module")
def frames(made):
    reader = TapeReader(made[0])
    reader.verify_hashes()
    return list(reader.frames())


def test_one_process_writes_the_same_bytes_as_two(made, tmp_path):
    assert make(DAY, tmp_path, processes=1) == made[1]
    assert len(made[1].segments) == DAY.segments == 3


def test_seq_has_no_hole_and_no_clock_steps_back(frames, made):
    assert [frame.seq for frame in frames] == list(range(1, made[1].rows + 1))
    for clock, start_ns in (("mono_ns", MONO_START_NS), ("recv_ns", START_NS)):
        stamps = np.array([getattr(frame, clock) for frame in frames]) - start_ns
        assert np.all(np.diff(stamps) >= 0)
        assert stamps[0] == 0
        assert DAY.end_ns - 10 * SECOND_NS < stamps[-1] < DAY.end_ns


def test_both_connections_are_replaced_once_before_they_break(frames):
    for venue in ("upbit", "binance"):
        mine = [frame for frame in frames if frame.venue == venue and frame.conn]
        first, second = sorted({frame.conn for frame in mine})
        kinds = [(frame.conn, frame.kind) for frame in mine if frame.kind != FrameKind.MESSAGE]
        opened, sent, closed = FrameKind.OPENED, FrameKind.SENT, FrameKind.CLOSED
        assert kinds == [
            *((first, opened), (first, sent), (second, opened), (second, sent)),
            *((first, closed), (second, closed)),
        ]
        ends = [msgspec.json.decode(frame.payload) for frame in mine if frame.kind == closed]
        assert [end.get("covered", False) for end in ends] == [True, False]
        for conn in (first, second):
            at = [frame.kind for frame in mine if frame.conn == conn]
            assert (at[0], at[-1]) == (opened, closed)


def test_exchange_times_and_ids_never_go_back(frames):
    last: dict[bytes, int] = {}
    stream = re.compile(rb'\{"(?:type":"orderbook","code|stream)":"([^"]+)".*?"(?:timestamp|lastUpdateId|u)":(\d+)')
    for frame in frames:
        found = stream.match(frame.payload) if frame.kind == FrameKind.MESSAGE else None
        if found:
            assert int(found[2]) >= last.get(found[1], 0)
            last[found[1]] = int(found[2])
    assert len(last) == 11 + 10 + 10


def test_the_scanner_reads_every_book_and_the_policy_trades(made, monkeypatch):
    left = []
    warm_up()  # which shows each decoder a frame that it leaves
    for provider in PROVIDERS.values():
        read = provider.read
        monkeypatch.setattr(provider, "read", lambda self, payload, read=read: left.append(payload) or read(self, payload))
    result = replay(made[0])
    assert set(result.reasons["upbit"]) == {"book", "sent", "opened", "closed"}
    assert set(result.reasons["binance"]) == {
        *("book", "book_ticker", "ack", "sent", "opened", "closed", "request", "rest"),
    }
    assert all(b"@bookTicker" in payload or b"result" in payload for payload in left)
    assert sum(symbol["decisions"]["accepted"] for symbol in result.kpi["symbols"]) > 0
    assert all(book["updates"] > 100 for book in result.books)


def course(us_at_the_end: float, mb_per_h: float) -> tuple[Measured, Course]:
    """Ten hours of 1,000 frames each: 1 us a frame that rises, and memory that rises."""
    frames = np.arange(0, 10_001)
    at_s = np.concatenate([[0.0], np.cumsum(np.linspace(1.0, us_at_the_end, 10_000)) / 1e6])
    marks = list(zip(at_s.tolist(), at_s.tolist(), frames.tolist(), strict=True))
    rss_mb = 300 + mb_per_h * frames / 1_000
    run = Measured(Done(1.0, 10_000, "", 0, float(rss_mb[-1]), marks), at_s.tolist(), rss_mb.tolist())
    stamps = {"first_recv_ns": 0, "last_recv_ns": 10 * HOUR_NS, "first_seq": 0, "last_seq": 10_000, "rows": 10_000}
    segment = Segment(file="000001.parquet", bytes=1, sha256="", **stamps)
    manifest = Manifest(tape_version=1, session="s", state="sealed", anchor_wall_ns=0, anchor_mono_ns=0, segments=[segment])
    return run, Course.of(run, manifest)


@pytest.mark.parametrize(
    ("us_at_the_end", "mb_per_h", "holds"),
    [(1.0, 0.0, True), (1.1, 1.0, True), (1.4, 0.0, False), (1.0, 3.0, False), (1.0, 21.0, False)],
)
def test_the_gates(us_at_the_end, mb_per_h, holds):
    run, found = course(us_at_the_end, mb_per_h)
    assert found.slope_mb_per_h == pytest.approx(mb_per_h, abs=0.01)
    assert growth(found.wall_us) == pytest.approx(1 + 0.75 * (us_at_the_end - 1) / (1 + 0.125 * (us_at_the_end - 1)), rel=0.01)
    assert judge(run, found, 10.0) is holds
