"""The synthetic market is deterministic, plausible, and writes the faults it was told to."""

import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from arbl2.errors import ConfigError
from arbl2.frames import FrameKind, Op
from arbl2.rules import binance_rules
from arbl2.tape import TapeReader, write_session
from arbl2_replay.synth import (
    SYMBOLS,
    Fault,
    FaultKind,
    SynthConfig,
    market_events,
    synth_frames,
    synth_manifest,
)

E8 = 10**8
MS = 10**6


def fingerprint(config):
    digest = hashlib.sha256()
    for frame in synth_frames(config):
        digest.update(repr((frame.seq, frame.recv_ns, frame.mono_ns, frame.conn, frame.kind.name)).encode())
        digest.update(frame.payload)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def minute():
    return list(market_events(SynthConfig(duration_s=60.0)))


def by_code(events):
    books = defaultdict(list)
    for event in events:
        books[event.code].append(event)
    return books


def test_same_config_same_bytes_whatever_the_hash_seed():
    config = SynthConfig(duration_s=3.0, seed=9)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_synth import fingerprint, SynthConfig\n"
        "print(fingerprint(SynthConfig(duration_s=3.0, seed=9)))"
    )
    prints = {fingerprint(config)}
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        prints.add(done.stdout.strip())
    assert len(prints) == 1
    assert fingerprint(msgspec.structs.replace(config, seed=10)) not in prints


def test_another_symbol_does_not_change_the_others():
    def events_of(config, code):
        return [event for event in market_events(config) if event.code == code]

    alone = SynthConfig(duration_s=3.0, symbols=(SYMBOLS["BTC"],))
    both = SynthConfig(duration_s=3.0, symbols=(SYMBOLS["XRP"], SYMBOLS["BTC"]))
    for code in ("BTCUSDT", "KRW-BTC", "KRW-USDT"):
        assert events_of(alone, code) == events_of(both, code)


def test_books_are_sorted_uncrossed_full_and_on_the_grid(minute):
    ticks = {"KRW-BTC": 1_000 * E8, "KRW-ETH": 1_000 * E8, "KRW-XRP": E8, "KRW-USDT": E8}
    offsets = [event.offset_ns for event in minute]
    assert offsets == sorted(offsets)
    for event in minute:
        book = event.book
        depth = 30 if event.venue == "upbit" else 20
        rules = binance_rules(event.code)
        tick, lot = (rules.tick_e8, rules.lot_e8) if rules else (ticks[event.code], 1)
        assert all(len(side) == depth for side in book)
        assert all(better > worse for better, worse in itertools.pairwise(book.bid_px_e8))
        assert all(better < worse for better, worse in itertools.pairwise(book.ask_px_e8))
        assert 0 < book.bid_px_e8[0] < book.ask_px_e8[0]
        assert not any(px % tick for px in (*book.bid_px_e8, *book.ask_px_e8))
        assert not any(size % lot for size in (*book.bid_size_e8, *book.ask_size_e8))
        assert min(*book.bid_size_e8, *book.ask_size_e8) > 0


def test_upbit_publishes_changes_on_its_own_phase_and_is_silent_otherwise(minute):
    for code, phase_ms, fewest, most in (
        ("KRW-BTC", 6, 500, 590),
        ("KRW-ETH", 64, 420, 560),
        ("KRW-XRP", 79, 440, 570),
        ("KRW-USDT", 48, 180, 330),
    ):
        events = by_code(minute)[code]
        assert {event.mark % 100 for event in events} == {phase_ms}
        assert all(before.book != after.book for before, after in itertools.pairwise(events))
        assert fewest < len(events) < most


def test_binance_publishes_every_100_ms_with_rising_ids_and_now_and_then_the_same_book(minute):
    for code in ("BTCUSDT", "ETHUSDT", "XRPUSDT"):
        events = by_code(minute)[code]
        steps = [after.offset_ns - before.offset_ns for before, after in itertools.pairwise(events)]
        assert len(events) == 600
        assert statistics.median(steps) == pytest.approx(100 * MS, abs=MS)
        pairs = list(itertools.pairwise(events))
        assert all((a.mark == b.mark) == (a.book == b.book) and a.mark <= b.mark for a, b in pairs)
        assert 5 < sum(a.mark == b.mark for a, b in pairs) < 60


def test_most_levels_stay_from_one_message_to_the_next():
    """Real captures: 3-7 % of pairs change on Upbit, 18.7 % on Binance BTCUSDT, and its price holds in 88.5 % of steps."""

    def pairs(book):
        bids, asks = zip(book.bid_px_e8, book.bid_size_e8, strict=True), zip(*book[2:], strict=True)
        return {(-1, *level) for level in bids} | {(1, *level) for level in asks}

    changed, still = defaultdict(list), Counter()
    for code, events in by_code(market_events(SynthConfig(duration_s=180.0))).items():
        for before, after in itertools.pairwise(events):
            old, new = pairs(before.book), pairs(after.book)
            changed[code].append(len(new - old) / len(new))
            still[code] += before.book.bid_px_e8[0] == after.book.bid_px_e8[0]
    mean = {code: statistics.fmean(values) for code, values in changed.items()}
    assert 0.02 < mean["KRW-XRP"] < 0.08
    assert 0.02 < mean["KRW-ETH"] < 0.08
    assert 0.02 < mean["KRW-USDT"] < 0.08
    assert 0.10 < mean["BTCUSDT"] < 0.25
    assert 0.80 < still["BTCUSDT"] / len(changed["BTCUSDT"]) < 0.95


def gross_edges(events):
    """(offset_ns, symbol, edge of selling on Upbit, edge of buying on Upbit) in bps after executable FX."""
    last = {}
    for event in events:
        last[event.code] = event.book
        for base in ("BTC", "ETH", "XRP"):
            if {f"KRW-{base}", f"{base}USDT", "KRW-USDT"} <= last.keys() and (base in event.code or event.code == "KRW-USDT"):
                upbit, binance, fx = last[f"KRW-{base}"], last[f"{base}USDT"], last["KRW-USDT"]
                sell = upbit.bid_px_e8[0] * E8 / (binance.ask_px_e8[0] * fx.ask_px_e8[0]) - 1
                buy = binance.bid_px_e8[0] * fx.bid_px_e8[0] / (upbit.ask_px_e8[0] * E8) - 1
                yield event.offset_ns, base, sell * 1e4, buy * 1e4


def test_edges_beyond_30_bps_come_in_both_directions_last_a_while_and_are_rare():
    seconds = 240
    edges = list(gross_edges(market_events(SynthConfig(duration_s=float(seconds)))))
    episodes = []
    for base, side in itertools.product(("BTC", "ETH", "XRP"), (2, 3)):
        series = [(row[0], row[side]) for row in edges if row[1] == base]
        assert abs(statistics.median(edge for _, edge in series)) < 12
        for wide, group in itertools.groupby(series, key=lambda row: row[1] > 30):
            if wide:
                rows = list(group)
                episodes.append((side, rows[-1][0] - rows[0][0]))
    per_20s = len(episodes) / (seconds / 20)
    assert 2 < per_20s < 8
    assert {side for side, _ in episodes} == {2, 3}
    assert 100 * MS < statistics.median(length for _, length in episodes) < 3_000 * MS
    share = sum(length for _, length in episodes) / (3 * seconds * 1e9)
    assert share < 0.12


def test_displayed_depth_often_dies_within_latency_while_the_edge_is_wide():
    """Of the bid that shows an edge beyond 30 bps on Upbit, a good part is gone 200 ms later, and a good part is not."""
    config = SynthConfig(duration_s=240.0)
    events = list(market_events(config))
    wide = {(offset, base) for offset, base, sell, _ in gross_edges(events) if sell > 30}
    survived = []
    for base in ("BTC", "ETH", "XRP"):
        books = by_code(events)[f"KRW-{base}"]
        for i, event in enumerate(books):
            if (event.offset_ns, base) not in wide:
                continue
            limit, shown = event.book.bid_px_e8[0], event.book.bid_size_e8[0]
            later = [b for b in books[i : i + 4] if b.offset_ns <= event.offset_ns + 200 * MS][-1].book
            left = sum(s for px, s in zip(later.bid_px_e8, later.bid_size_e8, strict=True) if px >= limit)
            survived.append(min(1.0, left / shown))
    assert len(survived) > 50
    assert 0.2 < statistics.fmean(survived) < 0.95
    assert sum(share == 0 for share in survived) > 0.05 * len(survived)


def test_a_session_has_the_frames_of_a_recording(tmp_path):
    config = SynthConfig(duration_s=12.0)
    frames = list(synth_frames(config))
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
    assert all(a.mono_ns <= b.mono_ns and a.recv_ns <= b.recv_ns for a, b in itertools.pairwise(frames))
    assert frames[0].kind is FrameKind.CLOCK
    assert json.loads(frames[0].payload) == {"wall_ns": frames[0].recv_ns, "mono_ns": frames[0].mono_ns}
    upbit = [frame for frame in frames if frame.venue == "upbit"]
    binance = [frame for frame in frames if frame.venue == "binance"]
    for side, conn, op in ((upbit, 1, Op.BINARY), (binance, 2, Op.TEXT)):
        assert [frame.kind for frame in side[:2]] == [FrameKind.OPENED, FrameKind.SENT]
        assert side[-1].kind is FrameKind.CLOSED
        assert json.loads(side[-1].payload) == {"code": 1000, "reason": "", "clean": True}
        assert {frame.conn for frame in side} == {conn}
        assert {frame.op for frame in side if frame.kind is FrameKind.MESSAGE} == {op}
    assert json.loads(upbit[1].payload)[1]["codes"] == ["KRW-BTC", "KRW-ETH", "KRW-XRP", "KRW-USDT"]
    streams = [json.loads(frame.payload)["stream_type"] for frame in upbit[2:-1]]
    assert streams[:4] == ["SNAPSHOT"] * 4
    assert set(streams[4:]) == {"REALTIME"}
    assert binance[2].payload == b'{"result":null,"id":1}'
    assert all(frame.recv_ns // MS >= json.loads(frame.payload)["timestamp"] for frame in upbit[2:-1])

    manifest = write_session(tmp_path / "s", synth_manifest(config), iter(frames))
    assert manifest.session == "20260102T000000Z-synth-1"
    assert manifest.instruments == {
        "upbit": ["KRW-BTC", "KRW-ETH", "KRW-XRP", "KRW-USDT"],
        "binance": ["BTCUSDT", "ETHUSDT", "XRPUSDT"],
    }
    assert list(TapeReader(tmp_path / "s").frames()) == frames


def test_disconnect_reconnects_on_a_new_connection_with_snapshots_again():
    cut = Fault(kind=FaultKind.DISCONNECT, venue="upbit", at_ms=3_000, lasts_ms=2_000)
    frames = list(synth_frames(SynthConfig(duration_s=8.0, faults=(cut,))))
    upbit = [frame for frame in frames if frame.venue == "upbit"]
    closed = next(i for i, frame in enumerate(upbit) if frame.kind is FrameKind.CLOSED)
    assert json.loads(upbit[closed].payload) == {"code": 1006, "reason": "", "clean": False}
    after = upbit[closed + 1 :]
    assert [frame.kind for frame in after[:2]] == [FrameKind.OPENED, FrameKind.SENT]
    assert after[0].mono_ns - upbit[closed].mono_ns == 2_000 * MS
    assert {frame.conn for frame in upbit[: closed + 1]} == {1}
    assert {frame.conn for frame in after} == {3}
    assert {json.loads(frame.payload)["code"] for frame in after[2:6]} == {*("KRW-BTC", "KRW-ETH", "KRW-XRP", "KRW-USDT")}
    assert all(json.loads(frame.payload)["stream_type"] == "SNAPSHOT" for frame in after[2:6])
    assert {frame.conn for frame in frames if frame.venue == "binance"} == {2}


@pytest.mark.parametrize("code", ["", "KRW-BTC"])
def test_stale_venue_or_code_is_connected_but_silent(code):
    quiet = Fault(kind=FaultKind.STALE, venue="upbit", code=code, at_ms=2_000, lasts_ms=2_500)
    frames = list(synth_frames(SynthConfig(duration_s=8.0, faults=(quiet,))))
    start = frames[0].mono_ns
    seen = Counter()
    for frame in frames:
        if frame.venue == "upbit" and frame.kind is FrameKind.MESSAGE:
            inside = 2_100 * MS < frame.mono_ns - start < 4_500 * MS
            seen[inside, json.loads(frame.payload)["code"]] += 1
    assert seen[True, "KRW-BTC"] == 0
    assert seen[False, "KRW-BTC"] > 30
    assert (seen[True, "KRW-XRP"] > 10) == (code != "")
    assert sum(frame.kind is FrameKind.CLOSED for frame in frames) == 2


def test_clock_step_moves_the_wall_clock_only():
    step = Fault(kind=FaultKind.CLOCK_STEP, at_ms=2_000, step_ms=-200)
    frames = list(synth_frames(SynthConfig(duration_s=4.0, faults=(step,))))
    lag = [(frame.recv_ns - frame.mono_ns) // MS for frame in frames]
    jumps = {after - before for before, after in itertools.pairwise(lag)} - {0}
    assert jumps == {-200}
    assert all(a.mono_ns <= b.mono_ns for a, b in itertools.pairwise(frames))


def fault_payload(kind, venue, code="", **config):
    fault = Fault(kind=kind, venue=venue, code=code, at_ms=1_500)
    config = SynthConfig(duration_s=3.0, **config)
    # an extra message draws its own jitter, so later stamps move; payloads do not
    clean = Counter(f.payload for f in synth_frames(config) if f.kind is FrameKind.MESSAGE)
    dirty = Counter(
        f.payload for f in synth_frames(msgspec.structs.replace(config, faults=(fault,))) if f.kind is FrameKind.MESSAGE
    )
    (extra,) = (dirty - clean).elements()
    return extra


def levels_of(message):
    if "obu" in message or "orderbook_units" in message:
        rows = [tuple(row.values()) for row in message.get("obu") or message["orderbook_units"]]
        return [row[1] for row in rows], [row[0] for row in rows]
    data = message["data"]
    return tuple([Decimal(row[0]) for row in data[side]] for side in ("bids", "asks"))


VENUES = [
    pytest.param({"venue": "upbit", "code": "KRW-BTC"}, id="upbit-default"),
    pytest.param({"venue": "upbit", "code": "KRW-BTC", "upbit_format": "SIMPLE"}, id="upbit-simple"),
    pytest.param({"venue": "binance", "code": "ETHUSDT"}, id="binance"),
]


@pytest.mark.parametrize("where", VENUES)
def test_broken_text(where):
    with pytest.raises(json.JSONDecodeError):
        json.loads(fault_payload(FaultKind.TRUNCATED, **where))
    with pytest.raises(UnicodeDecodeError):
        fault_payload(FaultKind.NOT_UTF8, **where).decode()


@pytest.mark.parametrize("where", VENUES)
def test_wrong_values(where):
    wrong = json.loads(fault_payload(FaultKind.WRONG_TYPE, **where))
    data = wrong.get("data", wrong)
    assert next(data[key] for key in ("bids", "obu", "orderbook_units") if key in data) is None
    assert b"NaN" in fault_payload(FaultKind.NAN, **where)
    negative = json.loads(fault_payload(FaultKind.NEGATIVE, **where), parse_float=Decimal)
    sizes = (
        [row[1] for row in negative["data"]["bids"]]
        if "data" in negative
        else [row.get("as", row.get("ask_size")) for row in negative.get("obu") or negative["orderbook_units"]]
    )
    assert [Decimal(size) < 0 for size in sizes] == [True, *[False] * (len(sizes) - 1)]


@pytest.mark.parametrize("where", VENUES)
def test_wrong_books(where):
    _, asks = levels_of(json.loads(fault_payload(FaultKind.UNSORTED, **where), parse_float=Decimal))
    assert asks != sorted(asks)
    bids, asks = levels_of(json.loads(fault_payload(FaultKind.CROSSED, **where), parse_float=Decimal))
    assert bids[0] > asks[0]
    assert bids == sorted(bids, reverse=True)
    assert b"NOPE" in fault_payload(FaultKind.UNKNOWN_SYMBOL, **where).upper()
    late = json.loads(fault_payload(FaultKind.BACKWARDS, **where))
    first = next(e for e in market_events(SynthConfig()) if e.code == where["code"])
    said = late["data"]["lastUpdateId"] if "data" in late else late.get("timestamp", late.get("tms"))
    assert said < first.mark


def test_wrong_total_differs_from_the_sum():
    message = json.loads(fault_payload(FaultKind.WRONG_TOTAL, "upbit", "KRW-XRP"), parse_float=Decimal)
    assert sum(row["ask_size"] for row in message["orderbook_units"]) != message["total_ask_size"]
    assert sum(row["bid_size"] for row in message["orderbook_units"]) == message["total_bid_size"]


@pytest.mark.parametrize(
    ("kind", "venue", "payload"),
    [
        (FaultKind.UP, "upbit", {"status": "UP"}),
        (FaultKind.BINANCE_ACK, "binance", {"result": None, "id": 7}),
    ],
)
def test_control_messages(kind, venue, payload):
    assert json.loads(fault_payload(kind, venue)) == payload


def test_error_messages():
    assert json.loads(fault_payload(FaultKind.UPBIT_ERROR, "upbit"))["error"]["name"] == "WRONG_FORMAT"
    assert json.loads(fault_payload(FaultKind.BINANCE_ERROR, "binance"))["code"] == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "stale", "venue": "kraken", "at_ms": 1, "lasts_ms": 1}, "kraken"),
        ({"kind": "up", "venue": "binance", "at_ms": 500}, "binance"),
        ({"kind": "crossed", "venue": "upbit", "at_ms": 500}, "needs the code"),
        ({"kind": "crossed", "venue": "upbit", "code": "KRW-DOGE", "at_ms": 500}, "KRW-DOGE"),
        ({"kind": "crossed", "venue": "upbit", "code": "KRW-BTC", "at_ms": 50}, "not connected"),
        ({"kind": "disconnect", "venue": "upbit", "at_ms": 50, "lasts_ms": 9}, "not connected"),
        ({"kind": "stale", "venue": "upbit", "at_ms": 500}, "lasts_ms"),
        ({"kind": "clock_step", "at_ms": 60_000}, "outside the session"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(fault, said):
    config = SynthConfig(duration_s=1.0, faults=(msgspec.convert(fault, Fault),))
    with pytest.raises(ConfigError, match=said):
        list(synth_frames(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"symbols": ()}, "at least one symbol"),
        ({"symbols": (SYMBOLS["BTC"], SYMBOLS["BTC"])}, "repeated"),
        ({"symbols": (msgspec.structs.replace(SYMBOLS["BTC"], base="DOT"),)}, "DOTUSDT"),
        ({"symbols": (msgspec.structs.replace(SYMBOLS["BTC"], upbit_phase_ms=100),)}, "phases"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"upbit_format": "JSON_LIST"}, "upbit_format"),
        ({"binance_depth": 7}, "binance_depth"),
    ],
)
def test_a_market_that_cannot_be_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        next(market_events(SynthConfig(**change)))
