"""What the inspector flags, what it must not flag, and that blocks and restarts do not matter to it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.frames import Anchor, Flag, Frame, FrameBlock, FrameKind, Op
from arbl2.tape import TapeReader
from arbl2_recorder.integrity import (
    ANCHOR_NS,
    ASK_NS,
    LEARN_NS,
    MOST_FAILURES,
    MOST_STREAMS,
    SILENT_NS,
    STALE_MS,
    Inspector,
)
from arbl2_recorder.ledger import Cause, Gap, Heal
from arbl2_recorder.recovery import inspect_session
from arbl2_replay.importer import import_capture
from arbl2_replay.synth import Fault, FaultKind, SynthConfig, synth_frames, synth_manifest
from arbl2_replay.wire import upbit_orderbook
from properties.effort import examples
from scripts import ANCHOR, BOOK, DEPTH_URL, E8, MS, WALL_NS, Script, chain

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def block_of(frames):
    return FrameBlock.from_frames(frames, ANCHOR)


def inspect(script):
    inspector = Inspector()
    return [*inspector.inspect(block_of(script.frames)), *inspector.finish()]


def summary(gaps):
    return [(g.cause.value, g.start_seq, g.end_seq, g.first_id, g.last_id, g.missed, g.healed_by.value) for g in gaps]


def books(count=80, **options):
    script = Script().opened(2, "upbit")
    for _ in range(count):
        script.book(**options)
    return script


def steady_diffs():
    script = chain()
    for number in range(15, 95):
        script.diff(number, number)
    return script


def without(seq, script):
    del script.frames[seq - 1]
    return script


def WRONG(payload):
    return payload.replace(b'"total_ask_size":', b'"total_ask_size":1')


CROSSED_BOOK = BOOK._replace(bid_px_e8=(101 * E8, 99 * E8))

CASES = {
    "a whole chain": (chain(), []),
    "a gap that nobody heals": (chain().diff(20, 21), [("gap", 7, None, 15, 19, 5, "")]),
    "a gap that a book heals": (
        chain().diff(20, 21).ask().body(30).diff(22, 40),
        [("gap", 7, 10, 15, 19, 5, "snapshot")],
    ),
    "a book that is too old heals nothing": (chain().diff(20, 21).ask().body(18), [("gap", 7, None, 15, 19, 5, "")]),
    "a book just before the next diff does": (chain().diff(20, 21).ask().body(19), [("gap", 7, 10, 15, 19, 5, "snapshot")]),
    "a gap before the book that is ahead": (
        Script().opened().diff(1, 5).ask().body(30).diff(9, 31),
        [("gap", 2, 5, 6, 8, 3, "snapshot")],
    ),
    "a gap that the other leg heals": (
        chain().diff(20, 21, conn=1).diff(15, 19, conn=3).diff(22, 23, conn=1),
        [("gap", 7, 9, 15, 19, 5, "other_leg")],
    ),
    "a gap that the other leg heals in part": (
        chain().diff(20, 21, conn=1).diff(16, 17, conn=3),
        [("gap", 7, 9, 16, 17, 2, "other_leg"), ("gap", 7, None, 15, 15, 1, ""), ("gap", 7, None, 18, 19, 2, "")],
    ),
    "the other leg repeats what it had not said": (chain().diff(10, 10, conn=3).diff(11, 14, conn=3).diff(15, 16, conn=3), []),
    "a diff twice": (chain().diff(11, 14), [("duplicate", 8, 8, 11, 14, None, "nothing_lost")]),
    "a diff that overlaps": (chain().diff(13, 20), [("overlap", 8, 8, 13, 14, None, "nothing_lost")]),
    "a diff from before": (chain().diff(6, 9).diff(15, 15), [("regression", 8, 8, 6, 9, None, "nothing_lost")]),
    "a diff that ends before it begins": (
        chain().diff(20, 15).diff(15, 15),
        [("undecodable", 8, 9, None, None, 1, "next_message")],
    ),
    "a chain over a new connection": (
        chain().closed().opened(2).diff(15, 16, conn=2),
        [("disconnect", 7, 10, *[None] * 3, "reconnect")],
    ),
    "a gap over a new connection": (
        chain().closed().opened(2).diff(17, 18, conn=2),
        [("disconnect", 7, 10, None, None, None, "reconnect"), ("gap", 7, None, 15, 16, 2, "")],
    ),
    "two speeds are two chains": (chain().diff(1, 14, stream="btcusdt@depth"), []),
    "a book of a capture without requests": (Script().diff(1, 5).body(3).diff(6, 7), []),
    "a book before the diffs": (Script().body(3).diff(1, 5).diff(6, 7).tick(190), []),
    "no book for long": (
        Script().opened().diff(1, 5).tick(190).diff(6, 7),
        [("no_snapshot", 2, None, 1, None, None, "")],
    ),
    "a late book": (
        Script().opened().diff(1, 5).tick(190).ask().body(4).diff(6, 7),
        [("no_snapshot", 2, 23, 1, None, None, "snapshot")],
    ),
    "trades in order": (Script().trade(5).trade(6).trade(7), []),
    "trades that are missing": (Script().trade(5).trade(9).trade(10, ms=3000), [("gap", 1, 2, 6, 8, 3, "next_message")]),
    "trades missing at the end": (Script().trade(5).trade(9), [("gap", 1, 2, 6, 8, 3, "next_message")]),
    "a trade that the other leg brings": (
        Script().trade(5).trade(7).trade(6, conn=3).trade(8),
        [("gap", 1, 3, 6, 6, 1, "other_leg")],
    ),
    "a trade twice": (Script().trade(5).trade(5), [("duplicate", 2, 2, 5, 5, None, "nothing_lost")]),
    "a trade from before": (Script().trade(5).trade(6).trade(5), [("regression", 3, 3, 5, 5, None, "nothing_lost")]),
    "a partial book may repeat itself": (Script().partial(5).partial(5).partial(9), []),
    "a partial book goes back": (Script().partial(5).partial(4).partial(6), [("regression", 2, 2, 4, 4, None, "nothing_lost")]),
    "another connection may be behind": (Script().partial(5).partial(4, conn=3), []),
    "a crossed partial book": (
        Script().partial(5).partial(6, bid="1.02").partial(7, bid="1.01").partial(8),
        [("crossed", 2, 4, *[None] * 3, "next_message")],
    ),
    "a partial book with an empty side": (
        Script().wrapped("x@depth5", {"lastUpdateId": 5, "bids": [], "asks": [["1", "1"]]}),
        [],
    ),
    "a ticker goes back": (Script().ticker(5).ticker(4), [("regression", 2, 2, 4, 4, None, "nothing_lost")]),
    "a crossed ticker": (Script().ticker(5, bid="2").ticker(6), [("crossed", 1, 2, *[None] * 3, "next_message")]),
    "a ticker with an empty side": (Script().ticker(5, ask="0.00000000"), []),
    "books that add up": (books(), []),
    "short books that add up": (books(simple=True), []),
    "a wrong total": (books(3).book(change=WRONG).book(), [("wrong_total", 5, 6, *[None] * 3, "next_message")]),
    "a crossed book": (books(3).book(book=CROSSED_BOOK).book(), [("crossed", 5, 6, *[None] * 3, "next_message")]),
    "a book with one side": (books(3).book(book=BOOK._replace(bid_px_e8=(), bid_size_e8=())), []),
    "an old snapshot": (books().book(late_ms=143_000, snapshot=True).book(), []),
    "exchange time goes back": (books(3).book(late_ms=500).book(), [("regression", 5, 5, *[None] * 3, "nothing_lost")]),
    "exchange time is ahead for a while": (
        books(80).book(late_ms=-STALE_MS - 1).book(late_ms=-STALE_MS - 1).book(),
        [
            ("regression", 84, 84, *[None] * 3, "nothing_lost"),
            ("stale_time", 82, 84, *[None] * 3, "next_message"),
        ],
    ),
    "a venue far away, always": (books(200, late_ms=1_273), []),
    "late frames are not judged by their stamps": (
        books(80).book(ms=5_000, late_ms=4_900, flags=Flag.LATE).book(ms=2_000),
        [("loop_stall", 81, 82, None, None, None, "next_message")],
    ),
    "diffs that are stale": (
        steady_diffs().diff(95, 95, late_ms=-9_000),
        [("stale_time", 88, None, *[None] * 3, "")],
    ),
    "Upbit repeats the last trade to a new connection": (
        Script().upbit_trade(9, snapshot=True).upbit_trade(9).upbit_trade(4).upbit_trade(9, conn=5),
        [],
    ),
    "an Upbit trade twice": (
        Script().upbit_trade(9).upbit_trade(4).upbit_trade(9),
        [("duplicate", 3, 3, 9, 9, None, "nothing_lost")],
    ),
    "messages that are none": (
        Script().partial(1).message(b"").message(b'{"stream":"btcusdt@depth20@100ms","da').message(b"\xff\xfe").partial(2),
        [("undecodable", 2, 5, None, None, 3, "next_message")],
    ),
    "not the shape of its stream": (
        Script().partial(1).wrapped("btcusdt@depth20@100ms", {"lastUpdateId": 2, "bids": None, "asks": []}).partial(3),
        [("undecodable", 2, 3, None, None, 1, "next_message")],
    ),
    "messages that are no data": (
        Script()
        .message(b'{"result":null,"id":1}')
        .message(b'{"error":{"code":2,"msg":"no"},"id":1}')
        .message(b'{"e":"serverShutdown","E":1}')
        .message(b'{"stream":"!serverShutdown","data":{"e":"serverShutdown"}}')
        .message(b'{"status":"UP"}', "upbit", 2)
        .message(b'{"error":{"name":404,"message":"none"}}', "upbit", 2)
        .message(b'[{"type":"trade"}]', "upbit", 2),
        [],
    ),
    "raw streams": (
        Script().message(b'{"e":"trade","s":"BTCUSDT","t":5}').message(b'{"e":"trade","s":"BTCUSDT","t":7}'),
        [("gap", 1, 2, 6, 6, 1, "next_message")],
    ),
    "keys in another order": (
        Script().message(b'{ "data": {"t": 5}, "stream": "btcusdt@trade"}').message(b'{"data":{"t":7},"stream":"btcusdt@trade"}'),
        [("gap", 1, 2, 6, 6, 1, "next_message")],
    ),
    "a session that ends": (books(3).closed(2, "upbit", code=1000, clean=True), []),
    "an outage to the end": (
        books(3).closed(2, "upbit").closed(3, "upbit"),
        [("disconnect", 4, None, *[None] * 3, ""), ("dial_failed", 6, None, None, None, 1, "")],
    ),
    "an outage that nobody mends": (books(3).closed(2, "upbit").tick(20), [("disconnect", 4, None, *[None] * 3, "")]),
    "dials that fail": (
        Script().closed(1, "upbit").closed(2, "upbit").opened(3, "upbit").book(conn=3),
        [("dial_failed", 1, 3, None, None, 2, "reconnect")],
    ),
    "a covered end of a leg": (
        Script().opened(1).opened(2).trade(1).closed(1, covered=True).trade(2, conn=2),
        [("disconnect", 4, 4, None, None, 0, "other_leg")],
    ),
    "a hand-over": (Script().opened(1).trade(1).opened(2).trade(2, conn=2).closed(1, covered=True, clean=True, code=1000), []),
    "a connection that said nothing": (
        Script().opened(1).closed(1).opened(2).trade(1, conn=2),
        [("disconnect", 2, 3, *[None] * 3, "reconnect")],
    ),
    "garbage, then the end": (
        Script().opened().trade(1).message(b"{").closed().opened(2).trade(2, conn=2),
        [("undecodable", 3, 4, None, None, 1, "closed"), ("disconnect", 3, 6, *[None] * 3, "reconnect")],
    ),
    "a stall of the loop": (
        Script().trade(1).trade(2, ms=300, flags=Flag.LATE).trade(3, ms=0, flags=Flag.LATE).trade(4, ms=1).trade(5, ms=2000),
        [("loop_stall", 1, 3, None, None, None, "next_message")],
    ),
    "a process that was frozen, and what waited for it": (
        Script()
        .trade(1)
        .trade(2, ms=13_000, flags=Flag.LATE)
        .trade(3, ms=400, flags=Flag.LATE)
        .trade(4, ms=60)
        .trade(5, ms=30, flags=Flag.LATE)
        .trade(6, ms=1),
        [("loop_stall", 1, 5, None, None, None, "next_message")],
    ),
    "two stalls": (
        Script().trade(1).trade(2, ms=300, flags=Flag.LATE).trade(3, ms=50).trade(4, ms=9_000, flags=Flag.LATE).trade(5),
        [
            ("loop_stall", 1, 2, None, None, None, "next_message"),
            ("loop_stall", 3, 4, None, None, None, "next_message"),
        ],
    ),
    "a connection that was dead for long before its end": (
        Script().opened().trade(1).partial(1).closed(ms=2_540, error="no pong").opened(2).trade(2, conn=2),
        [("disconnect", 3, 6, *[None] * 3, "reconnect")],
    ),
    "a connection that the venue closed properly": (
        Script().opened().trade(1).closed(clean=True, code=1000).opened(2).trade(2, conn=2),
        [("disconnect", 3, 5, *[None] * 3, "reconnect")],
    ),
    "a dead connection at the end of the session": (books(3).closed(2, "upbit", ms=60_000), []),
    "both legs lost, the second one without a word of its own": (
        Script().opened(1).opened(2).trade(1, conn=1).closed(1, covered=True, ms=3_000).closed(2).opened(3).trade(2, conn=3),
        [("disconnect", 4, 4, None, None, 0, "other_leg"), ("disconnect", 3, 7, *[None] * 3, "reconnect")],
    ),
    "a copying leg lost, the other one goes on": (
        Script()
        .opened(1)
        .opened(2)
        .trade(1, conn=1)
        .closed(2, covered=True)
        .trade(2, conn=1)
        .closed(1)
        .opened(3)
        .trade(3, conn=3),
        [("disconnect", 4, 4, None, None, 0, "other_leg"), ("disconnect", 5, 8, *[None] * 3, "reconnect")],
    ),
    "messages dropped": (
        Script().trade(1).alarm("dropped", frames=40, bytes=9, from_recv_ns=WALL_NS, to_recv_ns=WALL_NS + 5),
        [("dropped", 2, 2, None, None, 40, "next_message")],
    ),
    "REST requests that fail": (
        Script()
        .ask()
        .alarm("rest_failed", conn=0, url=DEPTH_URL, said="HTTP 429")
        .ask()
        .alarm("rest_failed", conn=0, url=DEPTH_URL, said="no")
        .ask()
        .body(1),
        [("rest_failed", 2, 6, None, None, 2, "response")],
    ),
    "a REST request that something else does not heal": (
        Script()
        .ask("https://rest/v1/instruments?markets=A,B")
        .alarm("rest_failed", conn=0, url="https://rest/v1/instruments?markets=A,B", said="HTTP 404")
        .ask("https://rest/v1/market/all")
        .body(1),
        [("rest_failed", 2, None, None, None, 1, "")],
    ),
    "a REST request that was made in parts instead": (
        Script()
        .ask("https://rest/v1/instruments?markets=A,B")
        .alarm("rest_failed", conn=0, url="https://rest/v1/instruments?markets=A,B", said="HTTP 404")
        .ask("https://rest/v1/market/all")
        .body(1)
        .ask("https://rest/v1/instruments?markets=A")
        .body(2),
        [("rest_failed", 2, 6, None, None, 1, "response")],
    ),
    "the book of another symbol": (
        Script().ask().alarm("rest_failed", conn=0, url=DEPTH_URL, said="HTTP 429").ask(DEPTH_URL.replace("BTC", "ETH")).body(1),
        [("rest_failed", 2, None, None, None, 1, "")],
    ),
    "no ack": (Script().opened().alarm("no_ack", timeout_s=10), [("no_ack", 2, 2, *[None] * 3, "nothing_lost")]),
    "the venue refuses": (
        Script().opened().alarm("venue_error", said="no"),
        [("venue_error", 2, 2, *[None] * 3, "nothing_lost")],
    ),
    "the venue goes": (Script().opened().alarm("venue_shutdown"), [("venue_shutdown", 2, 2, *[None] * 3, "nothing_lost")]),
    "a stalled connection": (Script().opened().alarm("stalled", silent_s=60.5), [("stalled", 2, 2, *[None] * 3, "closed")]),
    "a stream that never spoke": (
        Script().opened().alarm("silent", stream="btcusdt@trade").trade(1),
        [("silent", 2, 3, *[None] * 3, "next_message")],
    ),
    "any other alarm": (Script().alarm("moon", stream="x"), [("alarm", 1, 1, *[None] * 3, "nothing_lost")]),
    "a line of a capture that could not be read": (
        Script().add("binance", 0, FrameKind.ALARM, b"17 {"),
        [("undecodable", 1, 1, None, None, 1, "nothing_lost")],
    ),
    "a hole in the tape": (
        without(4, Script().partial(1).partial(2).partial(3).partial(4).partial(5)),
        [("lost_frames", 3, 5, None, None, 1, "next_message")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    script, expected = CASES[name]
    gaps = inspect(script)
    assert summary(gaps) == expected
    frames = {frame.seq: frame for frame in script.frames}
    for gap in gaps:
        start = frames[gap.start_seq]
        if gap.cause not in (Cause.DROPPED, Cause.STALLED):
            assert (gap.start_recv_ns, gap.start_mono_ns) == (start.recv_ns, start.mono_ns)
            if gap.end_seq is not None:
                end = frames[gap.end_seq]
                assert (gap.end_recv_ns, gap.end_mono_ns) == (end.recv_ns, end.mono_ns)


def test_an_identical_book_may_come_again_much_later():
    script = books()
    moment = script.time_ms
    for _ in range(3):
        script.mono_ns += 10_000 * MS
        script.message(upbit_orderbook("KRW-BTC", BOOK, moment, units=5), "upbit", 2, ms=0)
    assert inspect(script) == []


def test_a_frozen_exchange_clock_is_stale():
    script = books()
    moment = script.time_ms
    for n in range(30):
        script.mono_ns += 1_000 * MS
        book = BOOK._replace(ask_size_e8=((3 + n) * E8, 4 * E8))
        script.message(upbit_orderbook("KRW-BTC", book, moment, units=5), "upbit", 2, ms=0)
    [gap] = inspect(script)
    assert (gap.cause, gap.end_seq, gap.stream) == (Cause.STALE_TIME, None, "KRW-BTC@orderbook")
    assert "behind" in gap.detail


def test_the_venue_may_move_its_clock_for_good():
    """After a while the new distance is the usual one."""
    script = books()
    for _ in range(1_000):
        script.book(late_ms=-60_000)
    gaps = inspect(script)
    assert [gap.cause for gap in gaps] == [Cause.STALE_TIME]
    assert gaps[0].end_mono_ns - gaps[0].start_mono_ns > 30 * 10**9
    assert gaps[0].healed_by is Heal.NEXT_MESSAGE


def test_a_steady_stream_that_falls_silent_is_flagged_while_it_is():
    script = Script().opened()
    number = 0
    while script.mono_ns - ANCHOR.mono_ns < LEARN_NS + 2_000 * MS:
        number += 1
        script.partial(number).wrapped("ethusdt@depth20@100ms", {"lastUpdateId": number, "bids": [], "asks": []}, ms=400)
    spoke = script.seq - 1
    inspector = Inspector()
    assert inspector.inspect(block_of(script.frames)) == []
    alone = Script()
    alone.frames, alone.mono_ns = list(script.frames), script.mono_ns
    for _ in range(SILENT_NS // (500 * MS) + 5):
        number += 1
        alone.wrapped("ethusdt@depth20@100ms", {"lastUpdateId": number, "bids": [], "asks": []}, ms=500)
    assert inspector.inspect(block_of(alone.frames)) == []
    assert inspector.gaps == {"silent": 1}
    alone.partial(number)
    [gap] = inspector.inspect(block_of(alone.frames))
    assert (gap.cause, gap.stream, gap.symbol) == (Cause.SILENT, "btcusdt@depth20@100ms", "BTCUSDT")
    assert (gap.start_seq, gap.end_seq, gap.healed_by) == (spoke, alone.seq, Heal.NEXT_MESSAGE)


def test_silence_that_means_nothing():
    """Quiet by nature, closed connections, and times when nobody looked."""
    quiet = Script().opened()
    for n in range(100):
        quiet.partial(n).tick(20 if n % 9 else 200)
    assert inspect(quiet) == []
    busy = Script().opened()
    while busy.mono_ns - ANCHOR.mono_ns < LEARN_NS + 2_000 * MS:
        busy.partial(1)
    suspended = Script()
    suspended.frames, suspended.mono_ns = list(busy.frames), busy.mono_ns
    suspended.trade(1, ms=600_000, flags=Flag.LATE).partial(1)
    assert {gap.cause for gap in inspect(suspended)} == {Cause.LOOP_STALL}
    busy.closed().tick(300).opened(2).partial(1, conn=2)
    assert {gap.cause for gap in inspect(busy)} == {Cause.DISCONNECT}


def test_wall_clock_steps_show_in_the_samples():
    script = Script().tick(30)
    script.step_ns = 200 * MS
    script.tick(20).alarm("clock_step", moved_ns=200 * MS)
    [gap] = inspect(script)
    assert (gap.cause, gap.start_seq, gap.end_seq) == (Cause.CLOCK_STEP, 3, 4)
    assert gap.detail == "the wall clock moved by +200.0 ms"


def test_drops_have_both_clocks():
    script = Script().trade(1)
    first = ANCHOR.time_ns(script.mono_ns)
    script.alarm("dropped", frames=3, bytes=1, from_recv_ns=first, to_recv_ns=first + 20 * MS)
    [gap] = inspect(script)
    assert (gap.start_recv_ns, gap.start_mono_ns) == (first, script.mono_ns - 100 * MS)
    assert (gap.end_recv_ns, gap.end_mono_ns) == (first + 20 * MS, script.mono_ns - 80 * MS)


def wanted(script):
    inspector = Inspector()
    inspector.inspect(block_of(script.frames))
    return inspector.wanted()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (Script().opened().diff(1, 5), ()),  # the recorder asks by itself when a stream begins
        (Script().opened().diff(1, 5).tick(ASK_NS // 10**9 + 10), ("BTCUSDT",)),
        (Script().opened().diff(1, 5).tick(20).ask(), ()),
        (chain(), ()),
        (chain().diff(20, 21), ("BTCUSDT",)),
        (chain().diff(20, 21).ask(), ()),
        (chain().diff(20, 21).ask().body(18), ("BTCUSDT",)),
        (chain().diff(20, 21).ask().body(19), ()),
        (chain().diff(20, 21).ask("https://rest/api/v3/exchangeInfo?symbols=BTCUSDT"), ("BTCUSDT",)),
        (chain().diff(20, 21).ask().alarm("rest_failed", url=DEPTH_URL, said="x"), ("BTCUSDT",)),
        (chain().diff(20, 21).ask().add("binance", 0, FrameKind.RESPONSE, b"{}"), ("BTCUSDT",)),
        (chain().diff(20, 21).diff(15, 19, conn=3), ()),
        (Script().opened().diff(10, 15).ask().body(8), ("BTCUSDT",)),
        (Script().opened().diff(10, 15).ask().body(9), ()),
        (Script().opened().trade(1).trade(9), ()),
    ],
)
def test_wanted_books(script, expected):
    assert wanted(script) == expected


def rows_in_blocks(frames, cuts, restart):
    """The rows when the frames come in blocks that end at ``cuts``, with a new inspector at each if ``restart``."""
    inspector, gaps = Inspector(), []
    for start, stop in zip([0, *cuts], [*cuts, len(frames)], strict=True):
        gaps += inspector.inspect(block_of(frames[start:stop]))
        if restart:
            inspector = Inspector(inspector.state())
    return [*gaps, *inspector.finish()]


@pytest.mark.parametrize("name", CASES)
def test_blocks_and_restarts_do_not_matter(name):
    frames = CASES[name][0].frames
    whole = rows_in_blocks(frames, [], restart=False)
    ones = list(range(1, len(frames)))
    assert rows_in_blocks(frames, ones, restart=False) == whole
    assert rows_in_blocks(frames, ones, restart=True) == whole
    # Frames that were seen before are skipped.
    inspector = Inspector()
    twice = [*inspector.inspect(block_of(frames)), *inspector.inspect(block_of(frames)), *inspector.finish()]
    assert twice == whole


@st.composite
def legal_chains(draw):
    """(U, u) of a legal chain, and after which of them a book with which id comes."""
    at = draw(st.integers(0, 2**40))
    links = []
    for size in draw(st.lists(st.integers(1, 30), min_size=3, max_size=25)):
        links.append((at + 1, at + size))
        at += size
    after = draw(st.integers(0, len(links) - 1))
    book_id = draw(st.integers(links[0][0] - 1, links[after][1] + 20))
    return links, after, book_id


def chain_script(links, after, book_id):
    script = Script().opened()
    for n, (first, last) in enumerate(links):
        script.diff(first, last)
        if n == after:
            script.ask().body(book_id)
    return script


@given(legal_chains(), st.data())
@examples(60)
def test_legal_chains_and_one_fault_in_them(drawn, data):
    links, after, book_id = drawn
    assert inspect(chain_script(links, after, book_id)) == []

    at = data.draw(st.integers(1, len(links) - 1))
    first, last = links[at]
    before_first, before_last = links[at - 1]
    kind = data.draw(st.sampled_from(["gap", "duplicate", "overlap", "regression"]))
    if kind == "gap" and at < len(links) - 1:
        spoiled, ids = links[:at] + links[at + 1 :], (first, last)
    elif kind == "overlap":
        begin = data.draw(st.integers(before_first, before_last))
        spoiled, ids = [*links[:at], (begin, last), *links[at + 1 :]], (begin, before_last)
    elif kind == "regression" and at > 1:
        old = data.draw(st.integers(0, at - 2))
        spoiled, ids = [*links[:at], links[old], *links[at:]], links[old]
    else:
        kind, spoiled, ids = "duplicate", [*links[:at], links[at - 1], *links[at:]], links[at - 1]
    # The book comes at the end, so that it covers everything.
    script = chain_script(spoiled, len(spoiled) - 1, links[-1][1])
    [gap] = inspect(script)
    assert (gap.cause, gap.first_id, gap.last_id) == (kind, *ids)
    if kind == "gap":
        assert (gap.missed, gap.healed_by) == (last - first + 1, Heal.SNAPSHOT)
    cuts = sorted(data.draw(st.sets(st.integers(1, script.seq - 1), max_size=5)))
    assert rows_in_blocks(script.frames, cuts, restart=True) == [gap]


PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([frame.payload for script, _ in CASES.values() for frame in script.frames]).flatmap(
        lambda good: st.one_of(
            st.just(good),
            st.integers(0, len(good)).map(lambda cut: good[:cut]),
            st.tuples(st.integers(0, max(len(good) - 1, 0)), st.binary(max_size=3)).map(
                lambda edit: good[: edit[0]] + edit[1] + good[edit[0] + 1 :]
            ),
            st.sampled_from([b"-1", b"1e999", b"9223372036854775808", b"null", b'"x"', b"\xf0\x9f", b"[]", b"NaN"]).map(
                lambda value: good.replace(b":1", b":" + value)
            ),
        )
    ),
)
STAMPS = st.one_of(st.integers(0, 2**42), st.sampled_from([-(2**63), 2**63 - 1, 0, -1]))
WILD = st.lists(
    st.tuples(
        st.sampled_from(["", "upbit", "binance"]),
        st.integers(0, 3),
        st.sampled_from([FrameKind.MESSAGE] * 5 + list(FrameKind)),
        PAYLOADS,
        STAMPS,
        STAMPS,
        st.integers(0, 1),
        st.integers(1, 3),
    ),
    max_size=30,
)


@given(WILD)
@examples(150)
def test_whatever_comes_it_neither_raises_nor_forgets(rows):
    seq, frames = 0, []
    for venue, conn, kind, payload, recv_ns, mono_ns, flags, step in rows:
        seq += step
        frames.append((seq, recv_ns, mono_ns, venue, conn, kind, Op.NONE, payload, 0, flags))
    block = FrameBlock.from_frames([Frame(*row) for row in frames], Anchor(0, 0))
    whole = Inspector()
    gaps = [*whole.inspect(block), *whole.finish()]
    inspector, parts = Inspector(), []
    for i in range(len(block)):
        parts += inspector.inspect(block.slice(i, i + 1))
        inspector = Inspector(inspector.state())
    assert [*parts, *inspector.finish()] == gaps
    for gap in gaps:
        numbers = [getattr(gap, name) for name in Gap.__struct_fields__ if isinstance(getattr(gap, name), int)]
        assert all(-(2**63) <= number < 2**63 for number in numbers)
        assert len(gap.detail) <= 250
        assert gap.words


def test_a_venue_that_names_streams_without_end_takes_no_memory_without_end():
    script = Script()
    for n in range(MOST_STREAMS + 50):
        script.wrapped(f"s{n}@trade", {"t": 1}, ms=1)
    inspector = Inspector()
    assert inspector.inspect(block_of(script.frames)) == []
    assert inspector.state().count(b"@trade") <= 2 * MOST_STREAMS


def test_a_diff_stream_full_of_holes_keeps_the_last_ones():
    script = Script().opened()
    for n in range(1, 700):
        script.diff(2 * n, 2 * n, ms=1)
    gaps = inspect(script)
    assert [gap.first_id for gap in gaps] == list(range(3, 1399, 2))
    assert {gap.healed_by for gap in gaps} == {Heal.OPEN}


def test_requests_that_fail_without_end_take_no_memory_without_end():
    script = Script()
    for n in range(MOST_FAILURES + 50):
        script.alarm("rest_failed", conn=0, url=f"https://rest/{n}", said="HTTP 500")
    inspector = Inspector()
    given_up = inspector.inspect(block_of(script.frames))
    assert [gap.start_seq for gap in [*given_up, *inspector.finish()]] == list(range(1, MOST_FAILURES + 51))
    assert (len(given_up), {gap.healed_by for gap in given_up}) == (50, {Heal.OPEN})


SYNTH = SynthConfig(seed=3, duration_s=150.0)


def test_a_clean_market_raises_nothing():
    frames = list(synth_frames(SYNTH))
    block = FrameBlock.from_frames(frames, synth_manifest(SYNTH).anchor)
    inspector = Inspector()
    assert inspector.inspect(block) + inspector.finish() == []
    assert len(frames) > 8_000


def test_scripted_faults_are_found():
    at, kinds = (
        30_000,
        [FaultKind.TRUNCATED, FaultKind.NOT_UTF8, FaultKind.NAN, FaultKind.WRONG_TOTAL, FaultKind.CROSSED, FaultKind.BACKWARDS],
    )
    faults = [Fault(kind=kind, at_ms=at + 1_000 * n, venue="upbit", code="KRW-BTC") for n, kind in enumerate(kinds)]
    faults += [
        Fault(kind=kind, at_ms=at + 10_000 + 1_000 * n, venue="binance", code="BTCUSDT")
        for n, kind in enumerate([FaultKind.TRUNCATED, FaultKind.WRONG_TYPE, FaultKind.CROSSED, FaultKind.BACKWARDS])
    ]
    faults += [
        Fault(kind=FaultKind.DISCONNECT, at_ms=50_000, venue="upbit", lasts_ms=2_000),
        Fault(kind=FaultKind.CLOCK_STEP, at_ms=55_000, step_ms=-300),
    ]
    config = SynthConfig(seed=3, duration_s=70.0, faults=tuple(faults))
    inspector = Inspector()
    gaps = (
        inspector.inspect(FrameBlock.from_frames(list(synth_frames(config)), synth_manifest(config).anchor)) + inspector.finish()
    )
    counts = Counter((gap.venue, gap.cause.value) for gap in gaps)
    assert counts == {
        ("upbit", "undecodable"): 3,
        ("upbit", "wrong_total"): 1,
        ("upbit", "crossed"): 1,
        ("upbit", "regression"): 1,
        ("upbit", "stale_time"): 1,
        ("upbit", "disconnect"): 1,
        ("binance", "undecodable"): 2,
        ("binance", "crossed"): 1,
        ("binance", "regression"): 1,
        ("", "clock_step"): 1,
    }


@pytest.mark.skipif(not DATA.is_dir(), reason="the real captures are not here (../shared/data)")
class TestRealCaptures:
    @pytest.mark.parametrize(
        "name",
        ["upbit_frames_first10s.jsonl", "binance_spot_btcusdt_first30s.txt.gz", "binance_spot_btcusdt_depth20_first60s.txt.gz"],
    )
    def test_no_false_flag(self, tmp_path, name):
        assert inspect_session(import_capture(DATA / name, tmp_path).path) == []

    def test_a_diff_taken_out_of_the_real_chain(self, tmp_path):
        """Three real diffs are lost; the only book came before them."""
        with gzip.open(DATA / "binance_spot_btcusdt_first30s.txt.gz") as file:
            lines = file.readlines()
        diffs = [n for n, line in enumerate(lines) if b"@depth@" in line]
        lost = [json.loads(lines[n].split(b" ", 1)[1])["data"] for n in diffs[100:103]]
        (tmp_path / "cut.txt").write_bytes(b"".join(line for n, line in enumerate(lines) if n not in diffs[100:103]))
        tape = import_capture(tmp_path / "cut.txt", tmp_path).path
        [gap] = inspect_session(tape)
        assert (gap.cause, gap.first_id, gap.last_id) == (Cause.GAP, lost[0]["U"], lost[-1]["u"])
        assert (gap.missed, gap.healed_by) == (gap.last_id - gap.first_id + 1, Heal.OPEN)
        assert len(list(TapeReader(tape).frames())) == len(lines) - 3


def test_the_patience_for_a_book_is_longer_than_the_one_for_asking():
    assert ASK_NS < ANCHOR_NS
