"""A recording behind the venues' protocols: recorded bytes where they were asked for, derived ones beside them, one clock."""

import asyncio
import contextlib
import itertools
import json
import logging
import time
from decimal import Decimal
from pathlib import Path

import pytest
from websockets.asyncio import client as websockets_client
from websockets.exceptions import ConnectionClosed

from arbl2.errors import ConfigError, TapeError
from arbl2.frames import Frame, FrameKind, Op
from arbl2.tape import TapeReader, write_session
from arbl2_replay.clock import Speed
from arbl2_replay.importer import import_capture
from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource
from arbl2_replay.synth import (
    SYMBOLS,
    Fault,
    FaultKind,
    SynthConfig,
    subscription,
    synth_frames,
    synth_manifest,
)
from arbl2_replay.tape_source import TapeSource

MARKET = SynthConfig(
    seed=2,
    duration_s=20.0,
    symbols=(SYMBOLS["BTC"], SYMBOLS["XRP"]),
    faults=(
        Fault(kind=FaultKind.DISCONNECT, at_ms=8_000, venue="upbit", lasts_ms=1_500, close_code=1001),
        Fault(kind=FaultKind.TRUNCATED, at_ms=12_000, venue="binance", code="BTCUSDT"),
        Fault(kind=FaultKind.BINANCE_ACK, at_ms=13_000, venue="binance"),
    ),
)
SIMPLE = SynthConfig(seed=2, duration_s=3.0, symbols=(SYMBOLS["BTC"],), upbit_format="SIMPLE", upbit_units=15)
CAPTURE = Path(__file__).parents[2].parent / "shared" / "data" / "binance_spot_btcusdt_first30s.txt.gz"
UPBIT_CAPTURE = CAPTURE.with_name("upbit_frames_first10s.jsonl")


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    path = tmp_path_factory.mktemp("tapes") / "market"
    write_session(path, synth_manifest(MARKET), synth_frames(MARKET))
    return path


@pytest.fixture(scope="module")
def payloads(tape):
    """What each connection was told, without acknowledgements."""
    told = {}
    for frame in TapeReader(tape).frames():
        if frame.kind is FrameKind.MESSAGE and not frame.payload.startswith(b'{"result"'):
            told.setdefault(frame.conn, []).append(frame.payload)
    return told


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A real recording: all changes, trades and tickers of BTCUSDT for half a minute, and one REST book."""
    if not CAPTURE.exists():
        pytest.skip("the real captures are not beside the repository")
    return import_capture(CAPTURE, tmp_path_factory.mktemp("captures")).path


def connect(url, **keys):
    keys = {"max_queue": None, "compression": None, **keys}
    return websockets_client.connect(url, **keys)


async def everything(ws):
    """All that comes until the end, and the close code."""
    messages = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            messages.append(await ws.recv(decode=False))
    return messages, ws.close_code


async def take(ws, count):
    return [json.loads(await asyncio.wait_for(ws.recv(), 10)) for _ in range(count)]


def run(tape, scenario, *, speed=0.0, **options):
    async def main():
        async with ExchangeServer(TapeSource(tape, speed=speed), ServerOptions(**options)) as server:
            return await asyncio.wait_for(scenario(server), 40)

    return asyncio.run(main())


async def get(server, path):
    """Status and body of a REST answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body, parse_float=Decimal) if body else None


def streams(*names):
    return json.dumps({"method": "SUBSCRIBE", "params": names, "id": 1})


def upbit(*codes, form="DEFAULT", kind="orderbook", **keys):
    return json.dumps([{"ticket": "t"}, {"type": kind, "codes": codes, **keys}, {"format": form}])


# recorded bytes ---------------------------------------------------------------------------------------------------------------


async def listen(url, requests, told):
    """A client that comes back after every end, until nobody is there any more."""
    with contextlib.suppress(OSError, TimeoutError):
        while True:
            async with connect(url) as ws:
                for request in requests:
                    await ws.send(request)
                told.append(await everything(ws))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_who_asks_for_what_was_recorded_gets_the_very_bytes_and_the_recorded_ends(tape, payloads, compression):
    async def scenario(server):
        told = {"upbit": [], "binance": []}
        clients = [
            asyncio.create_task(listen(url, [subscription(MARKET, venue).decode()], told[venue]))
            for venue, url in (("upbit", server.upbit_ws_url), ("binance", server.binance_ws_url))
        ]
        await server.market_ended()
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return told

    told = run(tape, scenario, subscribers=2, compression=compression)
    opened = [frame for frame in TapeReader(tape).frames() if frame.kind is FrameKind.OPENED]
    first, second = [frame.conn for frame in opened if frame.venue == "upbit"]
    (binance,) = [frame.conn for frame in opened if frame.venue == "binance"]
    assert told["upbit"][:2] == [(payloads[first], 1001), (payloads[second], 1000)]
    acks, rest = told["binance"][0][0][:1], told["binance"][0][0][1:]
    assert acks == [b'{"result":null,"id":1}']
    assert rest == payloads[binance]  # the torn message too


def test_only_the_streams_asked_for_are_served_in_their_order(tape, payloads):
    async def scenario(server):
        async with connect(server.binance_ws_url + "?streams=xrpusdt@depth20@100ms/nopeusdt@depth20@100ms") as ws:
            return await everything(ws)

    told, code = run(tape, scenario, subscribers=1)
    everything_said = [payload for conn in payloads.values() for payload in conn]
    wanted = [payload for payload in everything_said if payload.startswith(b'{"stream":"xrpusdt@')]
    assert told == wanted
    assert code == 1000


def test_without_disconnects_nobody_is_cut_off(tape, payloads):
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-BTC"))
            reading = asyncio.create_task(everything(ws))
            await server.market_ended()
            await server.goodbye()
            return await reading

    told, code = run(tape, scenario, subscribers=1, disconnects=False)
    said = [p for conn in payloads.values() for p in conn if p.startswith(b'{"type":"orderbook","code":"KRW-BTC"')]
    assert told == said
    assert code == 1001
    assert sum(b'"SNAPSHOT"' in payload for payload in told) == 2  # the second heals what the outage hid


def test_who_comes_late_is_shown_the_newest_book_as_a_snapshot(tape, payloads):
    async def scenario(server):
        await get(server, "/arbl2/pause")
        async with connect(server.upbit_ws_url) as ws, connect(server.upbit_ws_url) as other:
            await ws.send(upbit("KRW-BTC", "KRW-NOPE"))
            await other.send(upbit("KRW-BTC", form="JSON_LIST", is_only_snapshot=True))
            plain = await asyncio.wait_for(ws.recv(decode=False), 10)
            listed = await asyncio.wait_for(other.recv(decode=False), 10)
            _, (rest,) = await get(server, "/v1/orderbook?markets=KRW-BTC")
            return plain, listed, rest

    async def later(server):
        while server.clock.now_ns() < server.source.start_ns + 2e9:
            await asyncio.sleep(0.01)
        return await scenario(server)

    plain, listed, rest = run(tape, later, speed=10.0)
    assert json.loads(plain)["stream_type"] == "SNAPSHOT"
    known = {payload.replace(b'"REALTIME"', b'"SNAPSHOT"') for conn in payloads.values() for payload in conn}
    assert plain in known
    assert listed == b"[" + plain + b"]"
    shown = json.loads(plain, parse_float=Decimal)
    assert rest["timestamp"] == shown["timestamp"]
    assert {tuple(sorted(unit.items())) for unit in rest["orderbook_units"]} == {
        tuple(sorted(unit.items())) for unit in shown["orderbook_units"]
    }


# derived streams --------------------------------------------------------------------------------------------------------------


def cut(message, units):
    side = message["orderbook_units"][:units]
    return [tuple(Decimal(str(unit[name])) for name in ("ask_price", "bid_price", "ask_size", "bid_size")) for unit in side]


def test_other_depths_and_formats_of_upbit_say_the_same(tape):
    async def scenario(server):
        async with contextlib.AsyncExitStack() as stack:
            told = []
            for request in (
                upbit("KRW-BTC"),
                upbit("KRW-BTC.5"),
                upbit("KRW-BTC", form="SIMPLE"),
                upbit("KRW-BTC.1", form="SIMPLE_LIST", is_only_realtime=True),
                upbit("KRW-XRP", level=10),
            ):
                ws = await stack.enter_async_context(connect(server.upbit_ws_url))
                await ws.send(request)
                told.append(asyncio.create_task(everything(ws)))
            return [(await each)[0] for each in told]

    whole, few, simple, single, grouped = run(tape, scenario, subscribers=5)
    assert len(whole) == len(few) == len(simple) > 40
    for payload, less, other in zip(whole, few, simple, strict=True):
        shown, short, terse = (json.loads(text, parse_float=Decimal) for text in (payload, less, other))
        assert cut(short, 30) == cut(shown, 5)
        assert (terse["cd"], terse["tms"], terse["st"]) == (shown["code"], shown["timestamp"], shown["stream_type"])
        units = [tuple(Decimal(str(unit[name])) for name in ("ap", "bp", "as", "bs")) for unit in terse["obu"]]
        assert units == cut(shown, 30)
        assert sum(unit[2] for unit in units) == terse["tas"]
    assert [json.loads(text)[0]["tms"] for text in single] == [
        json.loads(text)["timestamp"] for text in whole if b'"SNAPSHOT"' not in text
    ]
    assert len(json.loads(single[0])[0]["obu"]) == 1
    assert all(unit["ask_price"] % 10 == 0 for text in grouped for unit in json.loads(text)["orderbook_units"])


def test_a_tape_in_the_simple_format_is_served_in_both(tmp_path):
    write_session(tmp_path / "simple", synth_manifest(SIMPLE), synth_frames(SIMPLE))

    async def scenario(server):
        async with connect(server.upbit_ws_url) as one, connect(server.upbit_ws_url) as two:
            await one.send(upbit("KRW-BTC.15", form="SIMPLE"))
            await two.send(upbit("KRW-BTC", form="DEFAULT"))
            return [(await each)[0] for each in [asyncio.create_task(everything(ws)) for ws in (one, two)]]

    recorded, made = run(tmp_path / "simple", scenario, subscribers=2)
    said = [
        f.payload for f in TapeReader(tmp_path / "simple").frames() if f.payload.startswith(b'{"ty":"orderbook","cd":"KRW-BTC"')
    ]
    assert recorded == said
    for terse, full in zip(recorded, made, strict=True):
        units = json.loads(full, parse_float=Decimal)["orderbook_units"]
        assert [unit["ask_price"] for unit in units[:15]] == [u["ap"] for u in json.loads(terse, parse_float=Decimal)["obu"]]
        assert len(units) == 30  # the others were not recorded
        assert {Decimal(str(value)) for unit in units[15:] for value in unit.values()} == {0}


def test_binance_partial_books_give_every_other_stream(tape, payloads):
    names = [f"btcusdt@{kind}" for kind in ("depth20@100ms", "depth5@100ms", "depth10", "depth@100ms", "bookTicker", "trade")]

    async def scenario(server):
        raw = server.binance_ws_url.replace("/stream", "/ws/btcusdt@depth20@100ms")
        async with connect(f"{server.binance_ws_url}?streams={'/'.join(names)}") as ws, connect(raw) as bare:
            status, snapshot = await get(server, "/api/v3/depth?symbol=BTCUSDT&limit=5000")
            assert status == 200
            told = [asyncio.create_task(everything(each)) for each in (ws, bare)]
            return snapshot, (await told[0])[0], (await told[1])[0]

    snapshot, told, bare = run(tape, scenario, subscribers=2)
    by_stream = {name: [] for name in names}
    for text in told:
        with contextlib.suppress(ValueError):
            message = json.loads(text)
            by_stream[message["stream"]].append(message["data"])
    wrapped = [t for t in told if t.startswith(b'{"stream":"btcusdt@depth20') and t.endswith(b"}}")]
    assert bare == [text[len(b'{"stream":"btcusdt@depth20@100ms","data":') : -1] for text in wrapped]
    whole = by_stream[names[0]]
    assert [m["bids"][:5] for m in whole] == [m["bids"] for m in by_stream[names[1]]]
    assert len(by_stream[names[2]]) == -(-len(whole) // 10)
    assert by_stream[names[5]] == []  # no trade was recorded, so none is told
    # a client that keeps a book by the venue's own rules
    book = {side: dict(snapshot[name]) for side, name in (("b", "bids"), ("a", "asks"))}
    last, compared = snapshot["lastUpdateId"], 0
    partial = {m["lastUpdateId"]: m for m in whole}
    for change in by_stream[names[3]]:
        if change["u"] <= last:
            continue
        assert change["U"] <= last + 1
        for side in "ba":
            for px, size in change[side]:
                book[side][px] = size
                if size == "0.00000000":
                    del book[side][px]
        last = change["u"]
        top = sorted(book["b"].items(), key=lambda row: -Decimal(row[0]))[:20]
        assert [list(row) for row in top] == partial[last]["bids"]
        compared += 1
    assert compared > 150
    touches = {m["u"]: m["b"] for m in by_stream[names[4]]}
    assert len(touches) > 10
    assert all(partial[number]["bids"][0][0] == px for number, px in touches.items())


def test_a_real_recording_of_changes_gives_full_books(captured):
    names = ("btcusdt@depth@100ms", "btcusdt@bookTicker", "btcusdt@trade", "btcusdt@depth20@100ms", "btcusdt@depth")
    said = [frame.payload for frame in TapeReader(captured).frames() if frame.kind is FrameKind.MESSAGE]

    async def scenario(server):
        async with connect(server.binance_ws_url) as recorded, connect(server.binance_ws_url) as made:
            await recorded.send(streams(*names[:3]))
            await made.send(streams(*names[3:]))
            early = await get(server, "/api/v3/depth?symbol=BTCUSDT&limit=1000")
            reading = [asyncio.create_task(everything(ws)) for ws in (recorded, made)]
            await server.market_ended()
            late = await get(server, "/api/v3/depth?symbol=BTCUSDT&limit=5000")
            few = await get(server, "/api/v3/depth?symbol=BTCUSDT&limit=20")
            await server.goodbye()
            return early, late, few, [(await each)[0] for each in reading]

    (status, early), (_, late), (_, few), (recorded, made) = run(captured, scenario, subscribers=2)
    assert recorded[1:] == said
    assert status == 200
    changes = [json.loads(text)["data"] for text in said if b"@depth@" in text]
    # the first answer is the recorded body; the last one is it with every change since
    assert changes[0]["U"] <= early["lastUpdateId"] + 1
    assert late["lastUpdateId"] == changes[-1]["u"]
    sides = {key: dict(early[name]) for key, name in (("b", "bids"), ("a", "asks"))}
    tops, last = {}, early["lastUpdateId"]
    for change in changes:
        if change["u"] <= last:
            continue
        assert change["U"] <= last + 1
        last = change["u"]
        for side in "ba":
            for px, size in change[side]:
                sides[side][px] = size
                if not Decimal(size):
                    sides[side].pop(px)
        tops[last] = [[px, sides["b"][px]] for px in sorted(sides["b"], key=Decimal, reverse=True)[:20]]
    assert dict(late["asks"]) == sides["a"]
    assert few["bids"] == tops[last] == late["bids"][:20]
    told = [json.loads(text) for text in made[1:]]
    partial = [m["data"] for m in told if m["stream"] == names[3]]
    assert len(partial) == len(tops)
    assert all(m["bids"] == tops[m["lastUpdateId"]] for m in partial)
    slow = [m["data"] for m in told if m["stream"] == names[4]]
    assert len(slow) == len(changes) // 10
    assert all(a["u"] + 1 == b["U"] for a, b in itertools.pairwise(slow))
    assert {m["u"] for m in slow} <= {m["u"] for m in changes}


def test_recorded_trades_of_upbit_are_told_in_either_format(tmp_path):
    if not UPBIT_CAPTURE.exists():
        pytest.skip("the real captures are not beside the repository")
    path = import_capture(UPBIT_CAPTURE, tmp_path).path
    said = [
        f.payload for f in TapeReader(path).frames() if f.kind is FrameKind.MESSAGE and f.payload.startswith(b'{"ty":"trade"')
    ]
    codes = sorted({json.loads(text)["cd"] for text in said})

    async def scenario(server):
        async with connect(server.upbit_ws_url) as same, connect(server.upbit_ws_url) as other:
            await same.send(upbit(*codes, form="SIMPLE", kind="trade"))
            await other.send(upbit(*codes, form="DEFAULT", kind="trade"))
            reading = [asyncio.create_task(everything(ws)) for ws in (same, other)]
            await server.market_ended()
            ticker = await get(server, f"/v1/ticker?markets={codes[0]}")
            async with connect(server.upbit_ws_url) as late:
                await late.send(upbit(codes[0], form="SIMPLE", kind="trade"))
                again = await late.recv(decode=False)
            await server.goodbye()
            return [(await each)[0] for each in reading], ticker, again

    (recorded, made), (_, ticker), again = run(path, scenario, subscribers=2)
    assert recorded == said
    assert [json.loads(text)["sequential_id"] for text in made] == [json.loads(text)["sid"] for text in said]
    assert {json.loads(text)["type"] for text in made} == {"trade"}
    last = [json.loads(text, parse_float=Decimal) for text in said if json.loads(text)["cd"] == codes[0]][-1]
    assert json.loads(again)["sid"] == last["sid"]
    assert json.loads(again)["st"] == "SNAPSHOT"
    if ticker:  # only codes whose book was recorded have one
        assert ticker[0]["trade_price"] == last["tp"]


def test_lists_of_what_is_traded_come_from_the_tape(tape):
    async def scenario(server):
        _, markets = await get(server, "/v1/market/all")
        _, info = await get(server, "/api/v3/exchangeInfo")
        _, clock = await get(server, "/api/v3/time")
        _, instruments = await get(server, "/v1/orderbook/instruments?markets=KRW-BTC")
        _, tickers = await get(server, "/v1/ticker/all?quote_currencies=KRW")
        _, books = await get(server, "/v1/orderbook?markets=KRW-BTC,KRW-USDT&count=3")
        return markets, info, clock, instruments, tickers, books

    markets, info, clock, instruments, tickers, books = run(tape, scenario, subscribers=1)
    assert [m["market"] for m in markets] == ["KRW-BTC", "KRW-XRP", "KRW-USDT"]
    assert [s["symbol"] for s in info["symbols"]] == ["BTCUSDT", "XRPUSDT"]
    assert abs(clock["serverTime"] * 1_000_000 - MARKET.start_ns) < 1e9  # it has not begun, but REST knows the first books
    assert instruments[0]["tick_size"] == "1000"
    assert [t["market"] for t in tickers] == ["KRW-BTC", "KRW-XRP", "KRW-USDT"]
    assert [len(book["orderbook_units"]) for book in books] == [3, 3]


# the clock --------------------------------------------------------------------------------------------------------------------


def test_pause_speed_and_seek(tape):
    async def scenario(server):
        async with connect(server.binance_ws_url + "?streams=btcusdt@depth20@100ms") as ws:
            await take(ws, 3)
            _, state = await get(server, "/arbl2/pause")
            assert state["paused"]
            before = server.messages
            await asyncio.sleep(0.3)
            assert server.messages == before
            assert (await get(server, "/arbl2/speed?to=20x"))[1]["speed"] == "20x"
            _, state = await get(server, "/arbl2/resume")
            assert not state["paused"]
            await take(ws, 3)
            await get(server, "/arbl2/pause")
            assert (await get(server, "/arbl2/seek?to=15"))[0] == 200
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await asyncio.wait_for(ws.recv(), 5)
            assert ws.close_code == 1012
        async with connect(server.upbit_ws_url) as ws:
            while server.clock.held:  # until everything before that moment was gone through
                await asyncio.sleep(0.02)
            await ws.send(upbit("KRW-BTC"))
            (shown,) = await take(ws, 1)
            assert abs(shown["timestamp"] - (MARKET.start_ns // 10**6 + 15_000)) < 1_500
            assert (await get(server, "/arbl2/seek?to=2026-01-02T00:00:01"))[0] == 200
            assert (await everything(ws))[1] == 1012
        while (await get(server, "/arbl2/status"))[1]["seconds"] > 2:
            await asyncio.sleep(0.02)
        for path, status in (
            ("seek?to=soon", 400),
            ("speed?to=fast", 400),
            ("dance", 404),
            ("disconnect?venue=moon", 400),
            ("disconnect?venue=upbit&code=5", 400),
            ("fault?kind=none", 400),
        ):
            assert (await get(server, f"/arbl2/{path}"))[0] == status

    run(tape, scenario, speed=5.0)


def test_faults_and_ends_on_demand(tape, tmp_path):
    async def scenario(server):
        async with connect(server.binance_ws_url + "?streams=btcusdt@depth20@100ms") as ws:
            await take(ws, 1)
            assert (await get(server, "/arbl2/shutdown"))[0] == 200
            assert (await get(server, "/arbl2/fault?kind=garbage"))[0] == 200
            assert (await get(server, "/arbl2/disconnect?venue=binance&code=1012"))[0] == 200
            messages, code = await everything(ws)
            assert code == 1012
            assert any(b"serverShutdown" in message for message in messages)
            assert [record.kind for record in server.faults.records] == ["garbage"]

    run(tape, scenario, speed=2.0, fault_log=tmp_path / "faults.jsonl")
    assert json.loads((tmp_path / "faults.jsonl").read_text())["kind"] == "garbage"


def test_a_clock_that_is_off_shows_in_recorded_messages_too(tape, payloads):
    async def scenario(server):
        server.set_clock("upbit", 5_000)
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-BTC"))
            shifted = await take(ws, 3)
            server.set_clock("upbit", 0)
            return shifted, (await everything(ws))[0]

    shifted, after = run(tape, scenario, subscribers=1, speed=5.0)
    said = [p for conn in payloads.values() for p in conn if p.startswith(b'{"type":"orderbook","code":"KRW-BTC"')]
    assert [m["timestamp"] - 5_000 for m in shifted] == [json.loads(text)["timestamp"] for text in said[:3]]
    assert set(after[2:]) <= set(said)


def test_a_page_in_a_browser_controls_nothing(tape):
    async def scenario(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /arbl2/pause HTTP/1.1\r\nHost: x\r\nOrigin: https://example.com\r\n\r\n")
        assert b" 403 " in (await reader.read()).partition(b"\r\n")[0]
        writer.close()
        assert not server.clock.paused

    run(tape, scenario, speed=1.0)


def test_a_recording_in_a_loop_begins_again_with_new_connections(tmp_path):
    path = tmp_path / "short"
    write_session(path, synth_manifest(SIMPLE), synth_frames(SIMPLE))

    async def scenario(server):
        told = []
        request = upbit("KRW-BTC.15", form="SIMPLE")
        client = asyncio.create_task(listen(server.upbit_ws_url, [request], told))
        while len(told) < 3:
            await asyncio.sleep(0.02)
        client.cancel()
        return told

    told = run(path, scenario, subscribers=1, loop=True)
    said = [f.payload for f in TapeReader(path).frames() if f.payload.startswith(b'{"ty":"orderbook","cd":"KRW-BTC"')]
    assert [messages for messages, _ in told if messages][:2] == [said, said]


def test_lockstep_waits_for_whoever_is_behind(tape):
    """The order across connections is the tape's, as each client notes it, though one of them dawdles."""

    async def scenario(server):
        noted = []

        async def note(url, request, pause_s):
            async with connect(url, ping_interval=None) as ws:
                await ws.send(request)
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        message = await ws.recv(decode=False)
                        noted.append(message)
                        await asyncio.sleep(pause_s)

        await asyncio.gather(
            note(server.upbit_ws_url, subscription(MARKET, "upbit").decode(), 0.0),
            note(server.binance_ws_url, subscription(MARKET, "binance").decode(), 0.0),
        )
        return noted

    noted = run(tape, scenario, subscribers=2, rejoin_s=0.1, lockstep=True)
    frames = [f for f in TapeReader(tape).frames() if f.kind is FrameKind.MESSAGE]
    first = next(f.conn for f in frames if f.venue == "upbit")
    order = [f.payload for f in frames if f.venue == "binance" or f.conn == first]
    told = [message for message in noted if not message.startswith(b'{"result"')]
    assert told == [payload for payload in order if not payload.startswith(b'{"result"')]


# slow readers -----------------------------------------------------------------------------------------------------------------


def long_tape(path, messages):
    """One stream, messages of 1.4 kB, a millisecond apart."""
    config = SynthConfig(seed=1, symbols=(SYMBOLS["BTC"],))
    manifest = synth_manifest(config)
    known = [f.payload for f in synth_frames(config) if f.payload.startswith(b'{"stream":"btcusdt')][:200]

    def frames():
        for k in range(messages):
            at = k * 1_000_000
            seq, wall, mono = k + 1, manifest.anchor_wall_ns + at, manifest.anchor_mono_ns + at
            yield Frame(seq, wall, mono, "binance", 1, FrameKind.MESSAGE, Op.TEXT, known[k % len(known)])

    write_session(path, manifest, frames())
    return path


def test_at_full_speed_a_slow_reader_is_cut_off_and_the_others_miss_nothing(tmp_path, caplog):
    path = long_tape(tmp_path / "long", 30_000)

    async def scenario(server):
        url = server.binance_ws_url + "?streams=btcusdt@depth20@100ms"
        # a client that stops reading when its queue is full
        async with connect(url) as one, connect(url) as two, connect(url, max_queue=4, ping_interval=None) as slow:
            reading = [asyncio.create_task(everything(ws)) for ws in (one, two)]
            await server.market_ended()
            await server.goodbye()
            seen = [len((await each)[0]) for each in reading]
            rest, code = await everything(slow)
            return seen, len(rest), code, server.cut_clients

    with caplog.at_level(logging.WARNING, logger="arbl2.server"):
        seen, slow, code, cut_clients = run(path, scenario, subscribers=3, client_buffer_bytes=2 * 2**20)
    assert seen == [30_000, 30_000]
    assert slow < 30_000
    assert code in (1008, 1006)
    assert cut_clients == 1
    assert "read faster" in caplog.text


@pytest.mark.parametrize("reads", [True, False])
def test_at_full_speed_a_slow_reader_hardly_holds_the_others_up(tmp_path, reads):
    """However much of the recording there is: it is waited for once, for a moment."""
    path = long_tape(tmp_path / "long", 30_000)
    held_s = []

    async def scenario(server):
        url = server.binance_ws_url + "?streams=btcusdt@depth20@100ms"
        wait_for_room = server._room.wait

        async def wait():
            others_wait = any(client.outlet.is_clear for client in server.open_clients())
            began = time.monotonic()
            try:
                return await wait_for_room()
            finally:
                held_s.append(time.monotonic() - began if others_wait else 0.0)

        server._room.wait = wait
        async with connect(url) as fast, connect(url, max_queue=4, ping_interval=None) as slow:
            reading = asyncio.create_task(everything(fast))
            dawdling = asyncio.create_task(take_slowly(slow)) if reads else None
            await server.market_ended()
            await server.goodbye()
            seen = len((await reading)[0])
            if dawdling is not None:
                dawdling.cancel()
            return seen, server.cut_clients

    assert run(path, scenario, subscribers=2, client_buffer_bytes=4 * 2**20) == (30_000, 1)
    # each wait may be longer than it was meant to be, on a machine that is busy
    assert sum(min(each, 0.02) for each in held_s) < 0.3


async def take_slowly(ws):
    """About 500 messages a second."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            for _ in range(25):
                await ws.recv()
            await asyncio.sleep(0.05)


def test_at_full_speed_a_lone_reader_is_waited_for(tmp_path):
    path = long_tape(tmp_path / "long", 12_000)

    async def scenario(server):
        async with connect(server.binance_ws_url + "?streams=btcusdt@depth20@100ms", max_queue=4) as ws:
            await asyncio.sleep(1.5)  # longer than the patience with one that keeps others waiting
            reading = asyncio.create_task(everything(ws))
            await server.market_ended()
            await server.goodbye()
            return len((await reading)[0])

    assert run(path, scenario, subscribers=1, client_buffer_bytes=4 * 2**20) == 12_000


# what is on tapes -------------------------------------------------------------------------------------------------------------


def frames_of(*rows):
    """Frames of one connection, a second apart: (venue, kind, payload)."""
    manifest = synth_manifest(SIMPLE)
    return [
        Frame(
            k + 1,
            manifest.anchor_wall_ns + k * 10**9,
            manifest.anchor_mono_ns + k * 10**9,
            venue,
            conn,
            kind,
            Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE,
            payload,
        )
        for k, (venue, conn, kind, payload) in enumerate(rows)
    ]


def test_bare_messages_are_told_apart_and_wrapped_for_who_wants_it(tmp_path):
    depth = b'{"lastUpdateId":7,"bids":[["1.00000000","2.00000000"]],"asks":[["3.00000000","4.00000000"]]}'
    trade = b'{"e":"trade","E":1,"s":"BTCUSDT","t":1,"p":"1.0","q":"1.0","T":1,"m":true,"M":true}'
    ticker = b'{"u":8,"s":"BTCUSDT","b":"1.00000000","B":"2.00000000","a":"3.00000000","A":"4.00000000"}'
    kline = b'{"e":"kline","E":1,"s":"BTCUSDT","k":{}}'
    rows = [
        ("binance", 1, FrameKind.OPENED, b'{"url":"wss://x/ws/btcusdt@depth20@100ms"}'),
        ("binance", 1, FrameKind.MESSAGE, depth),
        ("binance", 2, FrameKind.MESSAGE, trade),
        ("binance", 2, FrameKind.MESSAGE, ticker),
        ("binance", 2, FrameKind.MESSAGE, kline),
        ("binance", 2, FrameKind.MESSAGE, b'{"result":null,"id":4}'),
    ]
    write_session(tmp_path / "bare", synth_manifest(SIMPLE), iter(frames_of(*rows)))
    names = ["btcusdt@depth20@100ms", "btcusdt@trade", "btcusdt@bookTicker", "btcusdt@kline"]

    async def scenario(server):
        raw = server.binance_ws_url.replace("/stream", "/ws")
        async with connect(server.binance_ws_url) as one, connect(raw) as two:
            for ws in (one, two):
                await ws.send(streams(*names))
            reading = [asyncio.create_task(everything(ws)) for ws in (one, two)]
            await server.market_ended()
            await server.goodbye()
            return [(await each)[0][1:] for each in reading]

    wrapped, bare = run(tmp_path / "bare", scenario, subscribers=2)
    assert bare == [depth, trade, ticker, kline]
    assert wrapped == [b'{"stream":"%b","data":%b}' % (name.encode(), data) for name, data in zip(names, bare, strict=True)]


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 5_000,
        b'{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":1',
        b'{"stream":5}',
        b"\xff\xfe",
        b'{"e":[]}',
        b"{}",
    ],
)
def test_messages_that_cannot_be_read_stop_nothing(tmp_path, payload):
    good = b'{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":7,"bids":[["1.0","2.0"]],"asks":[["1e999999","4.0"]]}}'
    rows = [("binance", 1, FrameKind.MESSAGE, body) for body in (good, payload, good)]
    write_session(tmp_path / "odd", synth_manifest(SIMPLE), iter(frames_of(*rows)))

    async def scenario(server):
        async with connect(server.binance_ws_url) as ws:
            await ws.send(streams("btcusdt@depth5@100ms", "btcusdt@depth@100ms", "btcusdt@depth20@100ms"))
            reading = asyncio.create_task(everything(ws))
            await server.market_ended()
            status, _ = await get(server, "/api/v3/depth?symbol=BTCUSDT")
            await server.goodbye()
            return status, (await reading)[0][1:]

    status, told = run(tmp_path / "odd", scenario, subscribers=1)
    assert status == 503  # a price of 10^999999 is no price, so there is no book
    assert told == [good, payload, good]


def test_messages_of_every_size_come_whole(tmp_path):
    sizes = (60, 125, 126, 127, 300, 65_535, 65_536, 65_537, 300_000)
    head = b'{"stream":"btcusdt@anything","data":"'
    bodies = [head + b"x" * (size - len(head) - 2) + b'"}' for size in sizes]
    assert [len(body) for body in bodies] == list(sizes)
    rows = [("binance", 1, FrameKind.MESSAGE, body) for body in bodies]
    write_session(tmp_path / "sizes", synth_manifest(SIMPLE), iter(frames_of(*rows)))

    async def scenario(server):
        async with connect(server.binance_ws_url) as ws:
            await ws.send(streams("btcusdt@anything"))
            return (await everything(ws))[0][1:]

    async def until_the_end(server):
        ending = asyncio.create_task(server.market_ended())
        ending.add_done_callback(lambda _: asyncio.ensure_future(server.goodbye()))
        return await scenario(server)

    assert run(tmp_path / "sizes", until_the_end, subscribers=1) == bodies


def test_what_holds_no_messages_cannot_be_served(tmp_path):
    rows = [("binance", 1, FrameKind.OPENED, b"{}")]
    write_session(tmp_path / "empty", synth_manifest(SIMPLE), iter(frames_of(*rows)))
    with pytest.raises(TapeError, match="no messages"):
        TapeSource(tmp_path / "empty")


def test_a_synthetic_market_cannot_be_sought():
    async def main():
        async with ExchangeServer(SyntheticSource(SIMPLE)) as server:
            with pytest.raises(ConfigError, match="no past"):
                server.seek(0)
            with pytest.raises(ConfigError, match="never ends"):
                server.set_speed(Speed(0.0))

    asyncio.run(main())


def test_who_goes_on_asking_is_banned(tape):
    async def scenario(server):
        seen = [(await get(server, "/v1/market/all"))[0] for _ in range(8)]
        return seen, [(await get(server, "/api/v3/exchangeInfo"))[0] for _ in range(8)]

    upbit_seen, binance_seen = run(tape, scenario, upbit_rest_per_s=2, binance_weight_per_min=40, ban_after=3, subscribers=1)
    assert {429, 418} <= set(upbit_seen)
    assert binance_seen == [200, 200, 429, 429, 429, 418, 418, 418]
