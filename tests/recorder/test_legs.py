"""Several connections: twins that lose nothing, replacement before the end, many symbols, books that need a snapshot."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.frames import FrameKind
from arbl2.tape import TapeReader, sessions
from arbl2_recorder import RecordConfig, record
from arbl2_recorder.copies import Copies
from arbl2_recorder.ledger import Cause
from arbl2_recorder.limits import Gate, Limit
from arbl2_recorder.recovery import inspect_session
from arbl2_recorder.venues import feeds

if TYPE_CHECKING:
    import random

TICK_S = 0.005


class Market:
    """The same messages on every connection, one each 5 ms, numbered by the clock."""

    def __init__(self, on_tick=None):
        self.start = time.monotonic()
        self.on_tick = on_tick

    @staticmethod
    def data(stream, i):
        if "@depth@" in stream:
            return f'{{"e":"depthUpdate","E":1770000000000,"s":"BTCUSDT","U":{i},"u":{i},"b":[],"a":[]}}'
        return f'{{"lastUpdateId":{i},"bids":[],"asks":[]}}'

    async def __call__(self, ws, venue, n):
        request = json.loads(venue.received[n])
        if isinstance(request, dict):
            await ws.send(json.dumps({"result": None, "id": request["id"]}))
        sent = int((time.monotonic() - self.start) / TICK_S)
        while True:
            await asyncio.sleep(TICK_S)
            for i in range(sent + 1, int((time.monotonic() - self.start) / TICK_S) + 1):
                for stream in request["params"]:
                    await ws.send(f'{{"stream":"{stream}","data":{self.data(stream, i)}}}')
                sent = i
                if self.on_tick is not None and await self.on_tick(ws, n, i):
                    return


def numbers(found, stream="btcusdt@depth20@100ms"):
    messages = (json.loads(f.payload) for f in found if f.kind is FrameKind.MESSAGE)
    return [m["data"]["lastUpdateId"] for m in messages if m.get("stream") == stream]


def of_kind(found, kind):
    return [json.loads(f.payload) | {"conn": f.conn, "seq": f.seq} for f in found if f.kind is kind]


def assert_whole(ids):
    assert len(ids) > 100
    assert ids == list(range(ids[0], ids[-1] + 1))


def test_a_drop_of_one_leg_loses_nothing_and_says_nothing_twice(venue, make_config, frames):
    together = itertools.count()

    async def drop(ws, n, i):
        if n == 0 and len(server.received) > 1 and next(together) == 60:
            ws.transport.abort()
            return True
        return False

    server = venue(Market(drop))
    result = record(make_config(binance=server, legs=2, duration_s=2.5, backoff_cap_s=0.2))
    found = frames(result.path)
    closed = of_kind(found, FrameKind.CLOSED)
    assert len(server.received) >= 3
    assert any(c["code"] == 1006 and c["covered"] for c in closed)
    assert_whole(numbers(found))
    assert result.messages["binance"] == sum(f.kind is FrameKind.MESSAGE for f in found)


def test_what_is_said_again_after_an_outage_of_both_legs_is_recorded_again(venue, make_config, frames):
    """A quiet book: each connection gets it once, at its start."""

    async def script(ws, server, n):
        request = json.loads(server.received[n])
        await ws.send(json.dumps({"result": None, "id": request["id"]}))
        await ws.send('{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":7,"bids":[],"asks":[]}}')
        first.append(ws)
        while n < 2 and len(first) < 2:
            await asyncio.sleep(0.01)
        if n > 1:
            await ws.wait_closed()
        await asyncio.sleep(0.5)
        for one in first[:2]:
            one.transport.abort()

    first = []
    server = venue(script)
    found = frames(record(make_config(binance=server, legs=2, duration_s=2.5)).path)
    assert len(server.received) >= 4
    closed = of_kind(found, FrameKind.CLOSED)
    outage = next(c["seq"] for c in closed if not c.get("covered"))
    books = [f.seq for f in found if f.kind is FrameKind.MESSAGE and b"lastUpdateId" in f.payload]
    assert min(books) < outage < max(books)
    acks = [f for f in found if f.kind is FrameKind.MESSAGE and b'"result"' in f.payload]
    assert len(acks) == len(server.received)


def test_a_connection_is_replaced_before_it_ends(venue, make_config, frames):
    server = venue(Market())
    result = record(make_config(binance=server, rotate_s=0.5, duration_s=2.5))
    found = frames(result.path)
    opened, closed = of_kind(found, FrameKind.OPENED), of_kind(found, FrameKind.CLOSED)
    assert len(opened) >= 3
    for new, old in zip(opened[1:], closed, strict=False):
        assert new["seq"] < old["seq"]
        assert old["covered"]
        assert (old["code"], old["clean"]) == (1000, True)
    assert_whole(numbers(found))


def test_an_announced_shutdown_costs_nothing(venue, make_config, frames):
    async def shut_down(ws, n, i):
        if n == 0 and i % 50 == 49:
            await ws.send('{"e":"serverShutdown","E":1770123456789}')
            asyncio.get_running_loop().call_later(0.6, ws.transport.abort)
        return False

    server = venue(Market(shut_down))
    result = record(make_config(binance=server, duration_s=2.0))
    found = frames(result.path)
    assert result.alarms["venue_shutdown"] >= 1
    assert [c["conn"] for c in of_kind(found, FrameKind.CLOSED) if c.get("covered")] == [1]
    assert_whole(numbers(found))


def test_a_successor_that_stays_silent_does_not_replace_anything(venue, make_config, frames):
    market = Market()

    async def mute(ws, server, n):
        await (ws.wait_closed() if n else market(ws, server, n))

    server = venue(mute)
    result = record(make_config(binance=server, rotate_s=0.3, duration_s=2.0, snapshot_timeout_s=0.2))
    found = frames(result.path)
    assert len(server.received) >= 2
    assert not [c for c in of_kind(found, FrameKind.CLOSED) if c["conn"] == 1 and c["seq"] < found[-10].seq]
    assert {f.conn for f in found if f.kind is FrameKind.MESSAGE and b"lastUpdateId" in f.payload} == {1}
    assert_whole(numbers(found))


def test_a_long_recording_goes_on_in_a_new_session_without_a_hole(venue, make_config, frames):
    server = venue(Market(), rest=b'{"lastUpdateId":7,"bids":[],"asks":[]}')
    config = make_config(binance=server, session_s=0.8, duration_s=3.0, streams=("depth", "diff"))
    result = record(config)
    assert len(result.sessions) >= 3
    assert [path.name for path in sorted(sessions(config.out))] == sorted(result.sessions)
    ids, total = [], 0
    for name in result.sessions:
        found = frames(config.out / name)
        manifest = TapeReader(config.out / name).manifest
        assert manifest.state == "sealed"
        assert ("goes on in" in manifest.notes[0]) == (name != result.session)
        assert found[0].kind is FrameKind.CLOCK
        opened, sent = of_kind(found, FrameKind.OPENED), of_kind(found, FrameKind.SENT)
        assert [o.get("carried_over", False) for o in opened] == [name != result.sessions[0]]
        assert "btcusdt@depth20@100ms" in sent[0]["params"]
        assert [r["url"] for r in of_kind(found, FrameKind.REQUEST) if "/depth?" in r["url"]]
        assert {gap.cause for gap in inspect_session(config.out / name)} <= {Cause.NO_SNAPSHOT, Cause.LOOP_STALL}
        ids += numbers(found)
        total += len(found)
    assert_whole(ids)
    assert len(server.received) == 1
    assert result.frames == total
    assert abs(result.counts["binance.message"] - 2 * len(ids)) <= 2  # the acknowledgement, and the end between two streams


def test_many_symbols_are_spread_over_connections(venue, scripts, make_config, frames):
    upbit, binance = venue(scripts["upbit"]), venue(scripts["binance"])
    coins = ("BTC", "ETH", "XRP", "SOL", "DOGE")
    result = record(make_config(upbit=upbit, binance=binance, symbols=coins, connection_symbols=2, duration_s=2.0))
    found = frames(result.path)
    codes = [json.loads(r)[1]["codes"] for r in upbit.received]
    params = [json.loads(r)["params"] for r in binance.received]
    assert sorted(itertools.chain(*codes)) == sorted(f"KRW-{coin}.30" for coin in (*coins, "USDT"))
    assert sorted(itertools.chain(*params)) == sorted(f"{coin.lower()}usdt@depth20@100ms" for coin in coins)
    assert (len(codes), len(params)) == (3, 3)
    assert max(map(len, codes + params)) == 2
    assert set(result.counts) >= {"upbit.message", "binance.message"}
    assert len({f.conn for f in found if f.kind is FrameKind.MESSAGE}) == 6
    assert not result.alarms


def test_defaults_keep_the_limits_of_the_venues():
    coins = tuple(f"C{i}" for i in range(700))
    config = RecordConfig(symbols=coins, streams=("depth", "diff", "trade", "book_ticker"), connection_symbols=1000)
    upbit = [feed for feed in feeds(config) if feed.name == "upbit"]
    binance = [feed for feed in feeds(config) if feed.name == "binance"]
    assert max(len(feed.streams) for feed in binance) <= 1_024
    assert max(len(feed.streams) for feed in upbit) <= 400
    assert sum(len(feed.streams) for feed in binance) == 2_800
    assert len({feed.label for feed in upbit + binance}) == len(upbit + binance)
    for feed in upbit + binance:
        messages = feed.subscriptions("t")
        assert len(messages) == max(feed.acks, 1)
        if feed.name == "binance":  # which does not answer more than 4 kB
            assert max(map(len, messages)) < 4_000
            named = [json.loads(message) for message in messages]
            assert [message["id"] for message in named] == list(range(1, len(messages) + 1))
            assert tuple(itertools.chain(*(message["params"] for message in named))) == feed.streams


def test_a_diff_stream_gets_its_snapshots_as_frames(venue, scripts, make_config, frames):
    body = b'{"lastUpdateId":7,"bids":[],"asks":[]}'
    server = venue(scripts["binance"], rest=body)
    config = make_config(binance=server, symbols=("BTC", "ETH"), streams=("diff", "trade", "book_ticker"), duration_s=1.0)
    found = frames(record(config).path)
    urls = [request["url"] for request in of_kind(found, FrameKind.REQUEST)]
    for symbol in ("BTCUSDT", "ETHUSDT"):
        assert urls.count(f"{server.rest_url}/api/v3/depth?symbol={symbol}&limit=1000") == 1
    rest = [f.kind for f in found if f.kind in (FrameKind.REQUEST, FrameKind.RESPONSE)]
    assert rest == [FrameKind.REQUEST, FrameKind.RESPONSE] * 3
    first = {}
    for f in found:
        if f.kind is FrameKind.MESSAGE and b"@depth@" in f.payload:
            first.setdefault(json.loads(f.payload)["stream"], f.seq)
    asked = {f.seq for f in found if f.kind is FrameKind.REQUEST and b"/depth?" in f.payload}
    assert min(asked) > min(first.values())


def test_a_covered_close_disconnects_no_book(venue, make_config):
    server = venue(Market())
    result = record(make_config(binance=server, rotate_s=0.4, duration_s=1.5))
    reader = TapeReader(result.path)
    engine = Engine(reader.manifest.instruments, RunConfig())
    for block in reader.blocks():
        engine.feed(block)
    covered = sum(b'"covered":true' in f.payload for f in reader.frames() if f.kind is FrameKind.CLOSED)
    assert covered >= 2


def test_one_dial_limit_for_all_connections_of_a_venue(venue, scripts, make_config):
    server = venue(scripts["binance"])
    coins = ("BTC", "ETH", "XRP", "SOL")
    record(make_config(binance=server, symbols=coins, connection_symbols=1, legs=2, dial_interval_s=0.1, duration_s=1.5))
    assert len(server.dialled) == 8
    gaps = [b - a for a, b in itertools.pairwise(server.dialled)]
    assert sum(gaps) >= 0.1 * 7 * 0.8


LIMITS = (Limit(5, 1.0), Limit(12, 10.0))


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 7)), max_size=60), st.floats(0, 3))
def test_a_gate_never_lets_too_much_through(arrivals, closed_s):
    gate = Gate(*LIMITS)
    gate._closed_until_s = closed_s
    now, passed = 0.0, []
    for pause_s, weight in arrivals:
        now += pause_s
        while (wait_s := gate.wait_s(now, weight)) > 0:
            now += wait_s + 1e-9
        gate.take(now, weight)
        passed.append((now, weight))
    assert all(at >= closed_s for at, _ in passed)
    for limit in LIMITS:
        for last, (end, _) in enumerate(passed):
            inside = [weight for at, weight in passed[: last + 1] if at > end - limit.seconds + 1e-6]
            # one thing heavier than the whole limit passes alone
            assert sum(min(weight, limit.weight) for weight in inside) <= limit.weight


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(0, 10),
    st.integers(0, 10),
    st.randoms(use_true_random=False),
)
def test_two_legs_say_everything_once_and_in_order(said, late, cut, rng: random.Random):
    """Leg 2 comes later and goes earlier than leg 1; it repeats what leg 1 repeats."""
    payloads = [b"%d" % n for n in said]
    legs = {1: list(payloads), 2: payloads[late : len(payloads) - cut]}
    copies = Copies(10**9)
    kept = []
    position = {1: 0, 2: 0}
    while legs[1] or legs[2]:
        # a leg cannot be ahead of the other by more than it knows: leg 2 starts when leg 1 has said the first messages
        ready = [leg for leg in (1, 2) if legs[leg] and (leg == 1 or position[1] >= late)]
        leg = rng.choice(ready)
        payload = legs[leg].pop(0)
        position[leg] += 1
        if not copies.is_copy(leg, payload, 0):
            kept.append(payload)
    if late == 0 or len(set(said)) == len(said):
        assert kept == payloads
    assert len(kept) >= len(payloads)


def test_old_messages_are_forgotten():
    copies = Copies(1_000)
    assert not copies.is_copy(1, b"a", 0)
    assert copies.is_copy(2, b"a", 1_000)
    assert not copies.is_copy(1, b"b", 2_500)
    assert not copies.is_copy(2, b"a", 2_600)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"streams": ()}, "choose from depth"),
        ({"streams": ("book",)}, "choose from depth"),
        ({"streams": ("diff",)}, "Upbit offers"),
        ({"legs": 3}, "legs is 3"),
        ({"snapshot_limit": 7}, "snapshot_limit is 7"),
        ({"connection_symbols": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_recorded_is_said(changes, words):
    with pytest.raises(Exception, match=words):
        RecordConfig(**changes)
