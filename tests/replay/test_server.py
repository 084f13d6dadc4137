"""The exchange server, spoken to by real WebSocket and HTTP clients."""

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from decimal import Decimal
from typing import ClassVar

import pytest
from websockets.asyncio import client as websockets_client
from websockets.exceptions import ConnectionClosed

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Op
from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource
from arbl2_replay.sources import Batch, Channel, Message, What
from arbl2_replay.synth import MarketEvent, SynthConfig
from arbl2_replay.wire import Book

E8 = 10**8


@contextlib.asynccontextmanager
async def serving(speed=5.0, **options):
    async with ExchangeServer(SyntheticSource(SynthConfig(seed=3), speed=speed), ServerOptions(**options)) as server:
        yield server


def connect(url, **keys):
    # a client that stops reading when its queue is full would also miss the answer to its close frame
    return websockets_client.connect(url, max_queue=None, **keys)


def run(scenario, **serving_options):
    async def main():
        async with serving(**serving_options) as server:
            await asyncio.wait_for(scenario(server), 30)

    asyncio.run(main())


def upbit(*codes, form="DEFAULT", **keys):
    return json.dumps([{"ticket": "t"}, {"type": "orderbook", "codes": codes, **keys}, {"format": form}])


async def take(ws, count, seconds=5.0):
    return [await asyncio.wait_for(ws.recv(), seconds) for _ in range(count)]


async def take_for(ws, seconds):
    messages = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                messages.append(await ws.recv())
    return messages


async def closing(ws, seconds=5.0):
    """What came before the end, and the close code."""
    messages = []
    async with asyncio.timeout(seconds):
        try:
            while True:
                messages.append(await ws.recv())
        except ConnectionClosed:
            return messages, ws.close_code


async def get(url):
    def fetch():
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, refusal.headers, refusal.read()

    status, headers, body = await asyncio.to_thread(fetch)
    return status, headers, json.loads(body, parse_float=Decimal)


# Upbit ----------------------------------------------------------------------------------------------------------------


def test_upbit_sends_snapshots_then_realtime_in_binary_frames():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-BTC", "KRW-ETH.5", "KRW-XRP.20", "krw-btc", "KRW-NOPE", "KRW-BTC.x"))
            frames = await take(ws, 30)
        assert all(isinstance(frame, bytes) for frame in frames)
        messages = [json.loads(frame) for frame in frames]
        assert {m["code"] for m in messages[:3]} == {"KRW-BTC", "KRW-ETH", "KRW-XRP"}
        assert {m["stream_type"] for m in messages[:3]} == {"SNAPSHOT"}
        assert Counter(m["stream_type"] for m in messages) == {"SNAPSHOT": 3, "REALTIME": 27}
        assert {(m["code"], len(m["orderbook_units"])) for m in messages} == {
            ("KRW-BTC", 30),
            ("KRW-ETH", 5),
            ("KRW-XRP", 30),
        }

    run(scenario)


def test_upbit_exchange_time_is_now_and_keeps_the_phase():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-ETH.1", is_only_realtime=True))
            for _ in range(5):
                (frame,) = await take(ws, 1)
                stamp = json.loads(frame)["timestamp"]
                assert stamp % 100 == 64
                assert 0 <= time.time() * 1e3 - stamp < 400

    run(scenario, speed=1.0)


def test_upbit_second_subscription_replaces_the_first_and_switches_the_format():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-BTC"))
            await take(ws, 5)
            await ws.send(upbit("KRW-XRP.1", form="SIMPLE"))
            messages = [json.loads(frame) for frame in await take(ws, 20)]
        strays = [m for m in messages if m.get("code") == "KRW-BTC"]
        ours = [m for m in messages if m.get("cd") == "KRW-XRP"]
        assert len(strays) <= 2
        assert len(ours) == 20 - len(strays)
        assert [m["st"] for m in ours[:2]] == ["SNAPSHOT", "REALTIME"]

    run(scenario)


@pytest.mark.parametrize("key", ["is_only_snapshot", "isOnlySnapshot"])
def test_upbit_only_snapshot(key):
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-BTC", "KRW-XRP", **{key: True}))
            messages = [json.loads(frame) for frame in await take_for(ws, 0.4)]
        assert {(m["code"], m["stream_type"]) for m in messages} == {("KRW-BTC", "SNAPSHOT"), ("KRW-XRP", "SNAPSHOT")}
        assert len(messages) == 2

    run(scenario)


@pytest.mark.parametrize("key", ["is_only_realtime", "isOnlyRealtime"])
def test_upbit_only_realtime(key):
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-BTC", **{key: True}))
            assert {json.loads(frame)["stream_type"] for frame in await take(ws, 5)} == {"REALTIME"}

    run(scenario)


def test_upbit_several_types_levels_and_the_list_of_them():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            request = [
                {"ticket": "mine"},
                {"type": "orderbook", "codes": ["KRW-BTC.15"]},
                {"type": "orderbook", "codes": ["KRW-XRP"], "level": 10, "is_only_snapshot": True},
                {"type": "orderbook", "codes": ["KRW-ETH"], "level": 7},
                {"type": "ticker", "codes": ["KRW-ETH"]},
            ]
            await ws.send(json.dumps(request))
            messages = [json.loads(frame) for frame in await take(ws, 12)]
            grouped = [m for m in messages if m["code"] == "KRW-XRP"]
            assert {m["code"] for m in messages} == {"KRW-BTC", "KRW-XRP"}
            (grouped,) = grouped
            assert grouped["level"] == 10
            prices = [u["ask_price"] for u in grouped["orderbook_units"] if u["ask_price"]]
            assert all(price % 10 == 0 for price in prices)
            assert 1 < len(prices) < 30
            await ws.send(json.dumps([{"ticket": "ask"}, {"method": "LIST_SUBSCRIPTIONS"}, {"format": "DEFAULT"}]))
            replies = [json.loads(frame) for frame in await take(ws, 12)]
            (reply,) = [m for m in replies if "method" in m]
            assert reply == {
                "method": "LIST_SUBSCRIPTIONS",
                "result": [
                    {"type": "orderbook", "codes": ["KRW-BTC.15"], "level": 0},
                    {"type": "orderbook", "codes": ["KRW-XRP"], "level": 10},
                    {"type": "orderbook", "codes": ["KRW-ETH"], "level": 7},
                    {"type": "ticker", "codes": ["KRW-ETH"]},
                ],
                "ticket": "ask",
            }
            await ws.send(json.dumps([{"ticket": "ask"}, {"method": "LIST_SUBSCRIPTIONS"}, {"format": "SIMPLE"}]))
            later = [json.loads(frame) for frame in await take(ws, 12)]
            (reply,) = [m for m in later if "mthd" in m]
            assert reply["rslt"][1] == {"ty": "orderbook", "cds": ["KRW-XRP"], "lv": 10}
            assert reply["tckt"] == "ask"
            assert "cd" in later[-1]  # the format belongs to the connection

    run(scenario)


@pytest.mark.parametrize(
    ("request_text", "name"),
    [
        ("{", "WRONG_FORMAT"),
        ('{"ticket":"t"}', "WRONG_FORMAT"),
        ("[1]", "WRONG_FORMAT"),
        ("[" * 5_000, "WRONG_FORMAT"),
        ('[{"type":"orderbook","codes":["KRW-BTC"]}]', "NO_TICKET"),
        ('[{"ticket":"t"},{"format":"SIMPLE"}]', "NO_TYPE"),
        ('[{"ticket":"t"},{"type":"orderbook"}]', "NO_CODES"),
        ('[{"ticket":"t"},{"type":"orderbook","codes":[]}]', "NO_CODES"),
        ('[{"ticket":"t"},{"type":"orderbook","codes":[5]}]', "INVALID_PARAM"),
        ('[{"ticket":"t"},{"type":"orderbook","codes":["KRW-BTC"],"level":"x"}]', "INVALID_PARAM"),
        ('[{"ticket":"t"},{"type":"books","codes":["KRW-BTC"]}]', "INVALID_PARAM"),
        ('[{"ticket":"t"},{"type":"orderbook","codes":["KRW-BTC"]},{"format":"XML"}]', "INVALID_PARAM"),
    ],
)
def test_upbit_names_what_is_wrong_and_then_closes_as_if_all_were_well(request_text, name):
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(request_text)
            (error,) = await take(ws, 1)
            told = time.monotonic()
            messages, code = await closing(ws)
        assert isinstance(error, bytes)
        assert json.loads(error)["error"]["name"] == name
        assert (messages, code) == ([], 1000)
        assert 0.1 < time.monotonic() - told < 1.0

    run(scenario)


def test_upbit_says_up_after_ping_and_not_before():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as asked, connect(server.upbit_ws_url) as silent:
            await asked.send("PING")
            started = time.monotonic()
            frames = await take(asked, 3)
            assert frames == [b'{"status":"UP"}'] * 3
            assert 0.3 < time.monotonic() - started < 1.5
            assert await take_for(silent, 0.1) == []

    run(scenario, upbit_up_s=0.2)


def test_upbit_cuts_an_idle_connection_unless_it_pings():
    async def scenario(server):
        async with (
            connect(server.upbit_ws_url, ping_interval=None) as idle,
            connect(server.upbit_ws_url, ping_interval=0.1) as pinging,
            connect(server.upbit_ws_url, ping_interval=None) as busy,
        ):
            await busy.send(upbit("KRW-BTC"))
            started = time.monotonic()
            assert await closing(idle) == ([], 1006)
            assert 0.4 < time.monotonic() - started < 1.5
            assert server.clients("upbit") == 2
            assert pinging.close_code is None

    run(scenario, upbit_idle_s=0.5)


def test_upbit_rest():
    async def scenario(server):
        base = server.upbit_rest_url
        _, headers, markets = await get(base + "/v1/market/all?is_details=true")
        assert headers["Content-Type"].startswith("application/json")
        assert [m["market"] for m in markets] == ["KRW-BTC", "KRW-ETH", "KRW-XRP", "KRW-USDT"]
        assert markets[0]["market_event"]["warning"] is False
        _, _, plain = await get(base + "/v1/market/all")
        assert plain[0] == {"market": "KRW-BTC", "korean_name": "비트코인", "english_name": "Bitcoin"}

        _, _, instruments = await get(base + "/v1/orderbook/instruments?markets=KRW-BTC,KRW-USDT")
        assert instruments[0] == {
            "market": "KRW-BTC",
            "quote_currency": "KRW",
            "tick_size": "1000",
            "supported_levels": ["0", "10000", "100000", "1000000"],
        }
        assert instruments[1]["tick_size"] == "1"

        status, headers, books = await get(base + "/v1/orderbook?markets=krw-btc,KRW-USDT&count=3&level=0")
        assert status == 200
        assert "sec=" in headers["Remaining-Req"]
        assert [(b["market"], len(b["orderbook_units"])) for b in books] == [("KRW-BTC", 3), ("KRW-USDT", 3)]
        assert isinstance(books[0]["orderbook_units"][0]["bid_price"], int)
        _, _, grouped = await get(base + "/v1/orderbook?markets=KRW-XRP&level=10")
        assert all(u["bid_price"] % 10 == 0 for u in grouped[0]["orderbook_units"])
        assert (await get(base + "/v1/orderbook?markets=KRW-XRP&level=7"))[2] == []

        status, _, error = await get(base + "/v1/orderbook?markets=KRW-BTC,KRW-NOPE")
        assert (status, error["error"]["name"]) == (404, 404)
        assert (await get(base + "/v1/orderbook?markets=KRW-BTC&count=abc"))[0] == 400
        assert (await get(base + "/v1/orderbook"))[0] == 400
        status, _, error = await get(base + "/v1/nothing")
        assert (status, error["error"]["name"]) == (404, "not_found")

    run(scenario)


def test_upbit_rest_and_socket_show_the_same_book_at_the_same_time():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(upbit("KRW-USDT", is_only_snapshot=True))
            _, _, books = await get(server.upbit_rest_url + "/v1/orderbook?markets=KRW-USDT")
            (frame,) = await take(ws, 1)
        socket = json.loads(frame, parse_float=Decimal)
        if socket["timestamp"] == books[0]["timestamp"]:
            ours = {tuple(sorted(unit.items())) for unit in socket["orderbook_units"]}
            assert ours == {tuple(sorted(unit.items())) for unit in books[0]["orderbook_units"]}
        else:
            pytest.fail("the book changed in between although the market is stopped")

    async def main():
        async with ExchangeServer(StillSource(), ServerOptions()) as server:
            await asyncio.wait_for(scenario(server), 30)

    asyncio.run(main())


# Binance --------------------------------------------------------------------------------------------------------------


def test_binance_combined_streams_by_url_and_by_request():
    async def scenario(server):
        url = server.binance_ws_url + "?streams=btcusdt@depth5@100ms/ethusdt@kline_1m/nopeusdt@depth5"
        async with connect(url) as ws:
            first = [json.loads(text) for text in await take(ws, 3)]
            assert {m["stream"] for m in first} == {"btcusdt@depth5@100ms"}
            assert {len(m["data"]["bids"]) for m in first} == {5}
            await ws.send('{"method":"SUBSCRIBE","params":["xrpusdt@depth20@100ms"],"id":"a1"}')
            texts = await take(ws, 20)
            assert all(isinstance(text, str) for text in texts)
            messages = [json.loads(text) for text in texts]
            assert messages.count({"result": None, "id": "a1"}) == 1
            assert {m["stream"] for m in messages if "stream" in m} == {*("btcusdt@depth5@100ms", "xrpusdt@depth20@100ms")}
            await ws.send('{"method":"UNSUBSCRIBE","params":["btcusdt@depth5@100ms"],"id":2}')
            await ws.send('{"method":"LIST_SUBSCRIPTIONS","id":3}')
            messages = [json.loads(text) for text in await take(ws, 20)]
            acks = [m for m in messages if "id" in m]
            assert acks == [
                {"result": None, "id": 2},
                {"result": ["ethusdt@kline_1m", "nopeusdt@depth5", "xrpusdt@depth20@100ms"], "id": 3},
            ]
            after = messages[messages.index(acks[0]) + 1 :]
            assert {m["stream"] for m in after if "stream" in m} == {"xrpusdt@depth20@100ms"}
            ids = [m["data"]["lastUpdateId"] for m in after if "data" in m]
            assert ids == sorted(ids)

    run(scenario)


def test_binance_raw_endpoint_and_the_combined_property():
    async def scenario(server):
        url = server.binance_ws_url.replace("/stream", "/ws/btcusdt@depth10@100ms")
        async with connect(url) as ws:
            assert list(json.loads((await take(ws, 1))[0])) == ["lastUpdateId", "bids", "asks"]
            await ws.send('{"method":"SET_PROPERTY","params":["combined",true],"id":1}')
            await ws.send('{"method":"GET_PROPERTY","params":["combined"],"id":2}')
            messages = [json.loads(text) for text in await take(ws, 12)]
        assert {"result": None, "id": 1} in messages
        assert {"result": True, "id": 2} in messages
        assert messages[-1]["stream"] == "btcusdt@depth10@100ms"

    run(scenario)


def test_binance_default_speed_is_one_message_a_second():
    async def scenario(server):
        url = server.binance_ws_url + "?streams=btcusdt@depth5/ethusdt@depth5@100ms"
        async with connect(url) as ws:
            counts = Counter(json.loads(text)["stream"] for text in await take(ws, 110))
        assert 9 <= counts["btcusdt@depth5"] <= 11
        assert 99 <= counts["ethusdt@depth5@100ms"] <= 101

    run(scenario, speed=20.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("{", {"code": 3}),
        ("7", {"code": 2}),
        ('{"params":[],"id":1}', {"code": 2, "id": 1}),
        ('{"method":"EAT","id":1}', {"code": 2, "id": 1}),
        ('{"method":"SUBSCRIBE","params":["btcusdt@depth5"],"id":-1}', {"code": 2}),
        ('{"method":"SUBSCRIBE","params":"btcusdt@depth5","id":1}', {"code": 2, "id": 1}),
        ('{"method":"SUBSCRIBE","params":[5],"id":1}', {"code": 2, "id": 1}),
        ('{"method":"GET_PROPERTY","params":["colour"],"id":1}', {"code": 0, "id": 1}),
        ('{"method":"SET_PROPERTY","params":["combined",3],"id":1}', {"code": 1, "id": 1}),
        (
            json.dumps({"method": "SUBSCRIBE", "params": [f"s{n}@depth5" for n in range(1_025)], "id": 1}),
            {"code": 2, "id": 1},
        ),
        ('{"method":"SUBSCRIBE","params":["nopeusdt@depth5"],"id":null}', {"result": None, "id": None}),
    ],
)
def test_binance_answers_requests_unwrapped(text, answer):
    async def scenario(server):
        async with connect(server.binance_ws_url) as ws:
            await ws.send(text)
            (reply,) = await take(ws, 1)
            told = json.loads(reply)
            assert answer.items() <= told.items()
            assert ("msg" in told) == ("code" in answer)
            assert ws.close_code is None

    run(scenario)


def test_binance_ends_a_connection_that_asks_too_often():
    async def scenario(server):
        async with connect(server.binance_ws_url) as ws:
            with contextlib.suppress(ConnectionClosed):
                for number in range(8):
                    await ws.send(json.dumps({"method": "LIST_SUBSCRIPTIONS", "id": number}))
            messages, code = await closing(ws)
        assert len(messages) == 5
        assert code == 1008

    run(scenario)


async def open_by_hand(server, path):
    """A client that never answers pings, past the upgrade."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


def test_binance_pings_and_gives_up_on_who_does_not_answer():
    async def scenario(server):
        async with connect(server.binance_ws_url, ping_interval=None) as answering:
            reader, writer = await open_by_hand(server, "/stream")
            head = await reader.readexactly(2)
            assert head[0] == 0x89  # ping
            assert (await reader.readexactly(head[1])).isdigit()
            head = await reader.readexactly(2)
            assert head[0] == 0x88  # close
            assert int.from_bytes((await reader.readexactly(head[1]))[:2]) == 1008
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(0.3)
            assert answering.close_code is None

    run(scenario, binance_ping_s=0.1, binance_pong_s=0.3)


class SlowBook:
    """The venue's own procedure for a local book, as plainly as it can be written."""

    def __init__(self):
        self.last = 0
        self.sides = {}

    def begin(self, snapshot):
        self.last = snapshot["lastUpdateId"]
        self.sides = {side: dict(levels(snapshot[name])) for side, name in (("b", "bids"), ("a", "asks"))}

    def apply(self, event):
        if event["u"] <= self.last:
            return
        assert event["U"] <= self.last + 1, f"gap: {self.last} -> {event['U']}"
        for side in "ba":
            for px, size in event[side]:
                if Decimal(size):
                    self.sides[side][Decimal(px)] = Decimal(size)
                else:
                    self.sides[side].pop(Decimal(px), None)
        self.last = event["u"]

    def top(self, count):
        bids = sorted(self.sides["b"].items(), reverse=True)[:count]
        return bids, sorted(self.sides["a"].items())[:count]


def levels(rows):
    return [(Decimal(px), Decimal(size)) for px, size in rows]


def test_binance_diffs_with_a_rest_snapshot_give_the_books_of_the_other_streams():
    async def scenario(server):
        fast, slow, whole, touch = (f"btcusdt@{name}" for name in ("depth@100ms", "depth", "depth20@100ms", "bookTicker"))
        async with connect(f"{server.binance_ws_url}?streams={fast}/{slow}/{whole}/{touch}") as ws:
            messages = [json.loads(text) for text in await take(ws, 30)]
            _, _, snapshot = await get(server.binance_rest_url + "/api/v3/depth?symbol=BTCUSDT&limit=5000")
            messages += [json.loads(text) for text in await take_for(ws, 3.0)]
        of = {name: [m["data"] for m in messages if m["stream"] == name] for name in (fast, slow, whole, touch)}
        partial = {data["lastUpdateId"]: (levels(data["bids"]), levels(data["asks"])) for data in of[whole]}
        ticker = {data["u"]: [(Decimal(data[p]), Decimal(data[q])) for p, q in ("bB", "aA")] for data in of[touch]}
        for name, least in ((fast, 40), (slow, 3)):
            book = SlowBook()
            book.begin(snapshot)
            compared = agreed = 0
            previous = of[name][0]["U"] - 1
            for event in of[name]:
                assert previous + 1 == event["U"] <= event["u"]
                previous = event["u"]
                assert event["b"] == sorted(event["b"], key=lambda row: -Decimal(row[0]))
                assert event["a"] == sorted(event["a"], key=lambda row: Decimal(row[0]))
                book.apply(event)
                if book.last == event["u"] in partial:
                    assert book.top(20) == partial[book.last]
                    compared += 1
                if book.last in ticker:
                    assert [*book.top(1)[0], *book.top(1)[1]] == ticker[book.last]
                    agreed += 1
            assert compared >= least
            assert agreed or name == slow
            assert len(book.sides["b"]) + len(book.sides["a"]) > 40  # what slid out of the window is still there

    run(scenario)


def test_binance_trades_count_on_and_tell_the_taker_side():
    async def scenario(server):
        url = server.binance_ws_url.replace("/stream", "/ws/btcusdt@trade")
        async with connect(url) as ws:
            trades = [json.loads(text) for text in await take(ws, 12, 10.0)]
        assert list(trades[0]) == ["e", "E", "s", "t", "p", "q", "T", "m", "M"]
        assert [t["t"] for t in trades] == list(range(trades[0]["t"], trades[0]["t"] + 12))
        assert {t["s"] for t in trades} == {"BTCUSDT"}
        assert all(Decimal(t["q"]) > 0 for t in trades)
        assert {t["m"] for t in trades} == {True, False}
        assert abs(trades[0]["E"] - time.time() * 1e3) < 30_000

    run(scenario, speed=20.0)


@pytest.mark.parametrize("form", ["DEFAULT", "SIMPLE"])
def test_upbit_tells_the_last_trade_and_then_every_new_one(form):
    async def scenario(server):
        names = ("code", "stream_type", "sequential_id", "ask_bid") if form == "DEFAULT" else ("cd", "st", "sid", "ab")
        request = [{"ticket": "t"}, {"type": "trade", "codes": ["KRW-BTC", "KRW-ETH", "KRW-NOPE"]}, {"format": form}]
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(json.dumps(request))
            first = [[json.loads(text)[name] for name in names] for text in await take(ws, 20, 10.0)]
        async with connect(server.upbit_ws_url) as ws:
            await ws.send(json.dumps(request))
            (again,) = [[m[name] for name in names] for m in map(json.loads, await take(ws, 2)) if m[names[0]] == "KRW-BTC"]
        assert {(row[0], row[1]) for row in first[:2]} == {("KRW-BTC", "SNAPSHOT"), ("KRW-ETH", "SNAPSHOT")}
        assert {row[1] for row in first[2:]} == {"REALTIME"}
        assert {row[3] for row in first} == {"ASK", "BID"}
        ids = [row[2] for row in first if row[0] == "KRW-BTC"]
        assert ids == sorted(set(ids))
        assert all(10**16 <= number < 10**17 for number in ids)
        assert again[1] == "SNAPSHOT"
        assert again[2] >= ids[-1]  # the last trade once more, or a newer one

    run(scenario, speed=20.0)


def test_binance_announces_a_shutdown_and_ends_a_connection_that_is_too_old():
    async def scenario(server):
        started = time.monotonic()
        raw = server.binance_ws_url.replace("/stream", "/ws")
        async with connect(server.binance_ws_url) as one, connect(raw) as two:
            assert server.announce_shutdown() == 2
            wrapped, plain = json.loads((await take(one, 1))[0]), json.loads((await take(two, 1))[0])
            assert wrapped["stream"] == "!serverShutdown"
            assert wrapped["data"]["e"] == plain["e"] == "serverShutdown"
            assert [await closing(one), await closing(two)] == [([], 1008), ([], 1008)]
            assert time.monotonic() - started > 0.9

    run(scenario, binance_lifetime_s=1.0, binance_ping_s=0.3)


def test_rest_beyond_the_limits_is_refused_until_the_window_is_over():
    async def scenario(server):
        base = server.binance_rest_url + "/api/v3"
        costs = [(await get(f"{base}/{path}"))[1]["X-MBX-USED-WEIGHT-1M"] for path in ("ping", "time")]
        assert costs == ["1", "2"]
        used = 2
        for limit, weight in ((100, 5), (500, 25), (1_000, 50), (5_000, 250)):
            used += weight
            _, headers, _ = await get(f"{base}/depth?symbol=BTCUSDT&limit={limit}")
            assert headers["X-MBX-USED-WEIGHT-1M"] == str(used)
        status, headers, error = await get(f"{base}/exchangeInfo")
        assert (status, error["code"]) == (429, -1003)
        assert 0 < int(headers["Retry-After"]) <= 60

        upbit = server.upbit_rest_url + "/v1/market/all"
        replies = [await get(upbit) for _ in range(8)]
        refused = [error["error"]["name"] for status, _, error in replies if status == 429]
        assert refused
        assert set(refused) == {"too_many_requests"}
        assert "group=market; min=600; sec=0" in {headers["Remaining-Req"] for _, headers, _ in replies}
        await asyncio.sleep(1.1)
        assert (await get(upbit))[0] == 200

    run(scenario, binance_weight_per_min=340, upbit_rest_per_s=2)


def test_binance_rest():
    async def scenario(server):
        base = server.binance_rest_url
        assert (await get(base + "/api/v3/ping"))[2] == {}
        _, headers, clock = await get(base + "/api/v3/time")
        assert abs(clock["serverTime"] - time.time() * 1e3) < 30_000  # the market's own time runs five times as fast
        assert headers["X-MBX-USED-WEIGHT-1M"]
        _, _, info = await get(base + "/api/v3/exchangeInfo?symbols=%5B%22BTCUSDT%22,%22XRPUSDT%22%5D")
        filters = {s["symbol"]: {f["filterType"]: f for f in s["filters"]} for s in info["symbols"]}
        assert filters["BTCUSDT"]["PRICE_FILTER"]["tickSize"] == "0.01000000"
        assert filters["XRPUSDT"]["LOT_SIZE"]["stepSize"] == "0.10000000"
        assert filters["XRPUSDT"]["NOTIONAL"]["minNotional"] == "5.00000000"
        assert len((await get(base + "/api/v3/exchangeInfo"))[2]["symbols"]) == 3
        assert len((await get(base + "/api/v3/exchangeInfo?symbol=ETHUSDT"))[2]["symbols"]) == 1
        for symbols in ("symbol=NOPE", "symbols=%5B", "symbols=%5B5%5D"):
            status, _, error = await get(f"{base}/api/v3/exchangeInfo?{symbols}")
            assert (status, error["code"]) == (400, -1121)
        _, _, depth = await get(base + "/api/v3/depth?symbol=BTCUSDT&limit=5")
        assert (len(depth["bids"]), len(depth["asks"])) == (5, 5)
        for query, code in (("", -1102), ("symbol=NOPE", -1121), ("symbol=BTCUSDT&limit=0", -1100)):
            status, _, error = await get(f"{base}/api/v3/depth?{query}")
            assert (status, error["code"]) == (400, code)

    run(scenario)


# what tests of recorders need ------------------------------------------------------------------------------------------


def test_sent_proves_every_payload_in_order():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as one, connect(server.binance_ws_url) as two:
            await one.send(upbit("KRW-BTC", "KRW-XRP.5", form="SIMPLE"))
            await two.send('{"method":"SUBSCRIBE","params":["btcusdt@depth20@100ms"],"id":1}')
            received = [await take(one, 40), await take(two, 40)]
        assert [log.venue for log in server.sent] == ["upbit", "binance"]
        for log, frames in zip(server.sent, received, strict=True):
            hashes = [
                (Op.TEXT, hashlib.sha256(f.encode()).digest()) if isinstance(f, str) else (Op.BINARY, hashlib.sha256(f).digest())
                for f in frames
            ]
            assert log.payloads[:40] == hashes
            assert log.count >= 40

    run(scenario, record_sent=True)


@pytest.mark.parametrize("code", [1001, 1012, 1006])
def test_disconnect_ends_the_clients_of_one_venue(code):
    async def scenario(server):
        async with connect(server.upbit_ws_url) as one, connect(server.binance_ws_url) as other:
            assert await server.disconnect("upbit", code) == 1
            assert (await closing(one))[1] == code
            assert server.clients("upbit") == 0
            assert server.clients("binance") == 1
            assert other.close_code is None
        async with connect(server.upbit_ws_url) as again:
            await again.send(upbit("KRW-BTC"))
            assert json.loads((await take(again, 1))[0])["stream_type"] == "SNAPSHOT"

    run(scenario)


def test_stall_silences_one_venue_for_a_while():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as one, connect(server.binance_ws_url) as other:
            await one.send(upbit("KRW-BTC"))
            await other.send('{"method":"SUBSCRIBE","params":["btcusdt@depth5@100ms"],"id":1}')
            await take(one, 3)
            server.stall("upbit", 0.6)
            await take_for(one, 0.1)  # what was on its way
            assert await take_for(one, 0.3) == []
            assert len(await take_for(other, 0.1)) > 2
            assert len(await take(one, 3)) == 3
            server.stall("upbit", 0.3)
            await one.send(upbit("KRW-XRP"))  # the snapshot waits until the venue speaks again
            started = time.monotonic()
            messages = [json.loads(frame) for frame in await take(one, 6)]
            assert time.monotonic() - started > 0.2
            assert next(m["stream_type"] for m in messages if m["code"] == "KRW-XRP") == "SNAPSHOT"

    run(scenario)


def test_send_raw_reaches_every_client_of_the_venue():
    async def scenario(server):
        async with connect(server.upbit_ws_url) as one, connect(server.binance_ws_url) as other:
            assert server.send_raw("upbit", b"\xff\x00{") == 1
            assert server.send_raw("binance", b'{"e":"serverShutdown","E":1}') == 1
            assert await take(one, 1) == [b"\xff\x00{"]
            assert await take(other, 1) == ['{"e":"serverShutdown","E":1}']
            server.send_raw("binance", b"\x01", Op.BINARY)
            assert await take(other, 1) == [b"\x01"]

    run(scenario)


def test_a_client_that_does_not_read_is_dropped(caplog):
    async def scenario(server):
        _, writer = await open_by_hand(server, "/stream")
        async with connect(server.binance_ws_url, max_size=None) as healthy:
            reading = asyncio.create_task(take_for(healthy, 20))
            sent = 0
            while server.clients("binance") == 2 and sent < 100:
                sent += 1
                server.send_raw("binance", b" " * 2**20)
                await asyncio.sleep(0.02)
            assert server.clients("binance") == 1
            assert sent < 40
            assert healthy.close_code is None
            reading.cancel()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    with caplog.at_level(logging.WARNING, logger="arbl2.server"):
        run(scenario, client_buffer_bytes=2 * 2**20, compression=None)
    assert "dropped binance connection" in caplog.text


def test_many_clients_see_the_same_bytes():
    async def scenario(server):
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connect(server.upbit_ws_url)) for _ in range(20)]
            for ws in clients:
                await ws.send(upbit("KRW-BTC", is_only_realtime=True))
            received = await asyncio.gather(*(take(ws, 15) for ws in clients))
        late = max(received, key=lambda frames: json.loads(frames[0])["timestamp"])
        for frames in received:
            start = frames.index(late[0])
            assert frames[start:] == late[: len(frames) - start]

    run(scenario)


BOOK = Book((1_400 * E8, 1_399 * E8), (5 * E8, 7 * E8), (1_401 * E8,), (3 * E8,))


class StillSource:
    """One book, then silence for ever: any source fits behind the protocol."""

    upbit_codes = ("KRW-USDT", "KRW-LATE")
    binance_symbols = ()
    speed = 1.0
    start_ns = 1_767_312_000_000_000_000
    offers: ClassVar = {}
    exchange_info: ClassVar = {}

    def batches(self):
        shown = MarketEvent(0, "upbit", "KRW-USDT", 1_767_312_000_000, BOOK)
        yield Batch([Message.of_event(Channel(ExchangeId.UPBIT, What.MARKET, "KRW-USDT"), self.start_ns, shown)])


class BrokenSource(StillSource):
    def batches(self):
        yield from super().batches()
        raise ConfigError("the source is broken. Mend it.")


def test_any_source_of_events_can_be_served():
    async def main():
        async with ExchangeServer(StillSource()) as server:
            await asyncio.wait_for(server.market_ended(), 5)
            async with connect(server.upbit_ws_url) as ws:
                await ws.send(upbit("KRW-USDT.1", "KRW-LATE", form="SIMPLE"))
                (frame,) = await take(ws, 1)
                assert frame == (
                    b'{"ty":"orderbook","cd":"KRW-USDT","tms":1767312000000,"tas":3.0,"tbs":5.0,'
                    b'"obu":[{"ap":1401.0,"bp":1400.0,"as":3.0,"bs":5.0}],"st":"SNAPSHOT","lv":0}'
                )
                assert await take_for(ws, 0.1) == []
            status, _, books = await get(server.upbit_rest_url + "/v1/orderbook?markets=KRW-USDT,KRW-LATE")
            assert (status, [b["market"] for b in books]) == (200, ["KRW-USDT"])

    asyncio.run(main())


def test_a_source_that_breaks_is_told_and_raised(caplog):
    async def main():
        async with ExchangeServer(BrokenSource()) as server:
            await server.market_ended()

    with pytest.raises(ConfigError, match="the source is broken"):
        asyncio.run(main())
    assert "the market stopped" in caplog.text


def test_a_taken_port_and_a_speed_of_zero_are_refused():
    async def scenario(server):
        with pytest.raises(ConfigError, match="Choose another port"):
            async with ExchangeServer(StillSource(), ServerOptions(port=server.port)):
                pass

    run(scenario)
    with pytest.raises(ConfigError, match="above zero"):
        SyntheticSource(SynthConfig(), speed=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_server_serves_until_a_signal(number):
    script = (
        "from arbl2_replay.server import run_server\n"
        "from arbl2_replay.synth import SynthConfig\n"
        "run_server(SynthConfig(), '127.0.0.1', 0, lambda server: print(server.binance_rest_url, flush=True))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with child:
        url = child.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/api/v3/ping", timeout=5) as reply:
            assert reply.read() == b"{}"
        child.send_signal(number)
        _, errors = child.communicate(timeout=10)
    assert (child.returncode, errors) == (0, "")
