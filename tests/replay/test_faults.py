"""Faults on the wire: what is on the log happened, what was sent is accounted for, and a seed repeats itself."""

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import time
from collections import Counter

import pytest
from websockets.asyncio import client as websockets_client
from websockets.exceptions import ConnectionClosed

from arbl2.errors import ConfigError
from arbl2.frames import Op
from arbl2_replay.faults import FaultConfig, WireFault, fault_config, planned
from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource
from arbl2_replay.synth import SynthConfig

DIFF = "btcusdt@depth@100ms"
BINANCE = json.dumps({"method": "SUBSCRIBE", "params": [DIFF, "btcusdt@depth20@100ms"], "id": 1})
UPBIT = json.dumps([{"ticket": "t"}, {"type": "orderbook", "codes": ["KRW-BTC", "KRW-XRP"]}])
QUICK = FaultConfig(
    stall_s=(0.5, 0.5),
    half_open_s=(0.8, 0.8),
    delay_s=(0.5, 0.5),
    reorder_s=(0.1, 0.1),
    throttle_s=(0.6, 0.6),
    throttle_bytes_per_s=(10_000, 10_000),
    clock_step_ms=(-9_000, -9_000),
    clock_step_s=(0.5, 0.5),
    shutdown_lead_s=(0.3, 0.3),
    close_codes=(1012,),
)


def connect(url, **options):
    # a client that stops reading when its queue is full would be a fault of its own
    return websockets_client.connect(url, max_queue=None, max_size=None, **options)


class Listener:
    """A real client that keeps everything: payload, form and arrival."""

    def __init__(self, ws):
        self.ws = ws
        self.got = []
        self.task = asyncio.create_task(self._listen())

    async def _listen(self):
        with contextlib.suppress(ConnectionClosed):
            while True:
                payload = await self.ws.recv(decode=False)
                self.got.append((time.monotonic(), payload))

    async def more(self, count=5):
        """Wait for so many further messages."""
        wanted = len(self.got) + count
        async with asyncio.timeout(10):
            while len(self.got) < wanted:
                await asyncio.sleep(0.01)

    async def ended(self):
        await asyncio.wait_for(self.task, 10)
        return self.ws.close_code

    @property
    def digests(self):
        return [hashlib.sha256(payload).digest() for _, payload in self.got]

    @property
    def pauses(self):
        return [b - a for (a, _), (b, _) in itertools.pairwise(self.got)]


def struck(kind, check, *, url="binance_ws_url", request=BINANCE, config=QUICK, **options):
    """Let one fault hit a client that has data; then ``check(server, listener, record)``."""

    async def main():
        source = SyntheticSource(SynthConfig(seed=3), speed=3.0)
        async with (
            ExchangeServer(source, ServerOptions(record_sent=True, faults=config, **options)) as server,
            connect(getattr(server, url), ping_interval=None) as ws,
        ):
            await ws.send(request)
            listener = Listener(ws)
            await listener.more()
            assert server.faults.inject(kind)
            async with asyncio.timeout(10):
                while not server.faults.records:
                    await asyncio.sleep(0.01)
            (record,) = server.faults.records
            assert (record.kind, record.conn) == (kind, 1)
            assert 0 <= time.monotonic_ns() - record.mono_ns < 5e9
            await asyncio.wait_for(check(server, listener, record), 20)

    asyncio.run(main())


async def all_arrived(server, listener):
    """After the end: the very payloads, in order, none missing."""
    (sent,) = server.sent
    async with asyncio.timeout(5):
        while not sent.closed_ns:
            await asyncio.sleep(0.01)
    assert sent.ended_by == "server"
    assert [digest for _, digest in sent.payloads] == listener.digests
    assert list(sent.at_ns) == sorted(sent.at_ns)
    assert len(sent.at_ns) == sent.count


def test_a_drop_comes_after_everything_that_was_sent():
    async def check(server, listener, record):
        assert await listener.ended() == 1006
        await all_arrived(server, listener)

    for seed in (1, 2, 3):  # with and without a torn message
        struck(WireFault.DROP, check, config=FaultConfig(seed=seed), compression=None)


@pytest.mark.parametrize(
    ("kind", "url", "request_text", "code"),
    [
        (WireFault.CLOSE, "binance_ws_url", BINANCE, 1012),
        (WireFault.ERROR, "upbit_ws_url", UPBIT, 1000),
        (WireFault.SHUTDOWN, "binance_ws_url", BINANCE, 1001),
    ],
)
def test_orderly_ends(kind, url, request_text, code):
    async def check(server, listener, record):
        assert await listener.ended() == code
        await all_arrived(server, listener)
        said = [json.loads(payload) for _, payload in listener.got]
        if kind is WireFault.ERROR:
            assert sum("error" in message for message in said) == 1
        if kind is WireFault.SHUTDOWN:
            assert sum(message.get("stream") == "!serverShutdown" for message in said) == 1

    struck(kind, check, url=url, request=request_text)


def changes(listener):
    messages = [json.loads(payload) for _, payload in listener.got]
    return [m["data"] for m in messages if m.get("stream") == DIFF]


def test_a_stall_loses_messages_and_the_ids_show_it():
    async def check(server, listener, record):
        await asyncio.sleep(0.6)
        await listener.more()
        assert record.lasts_ms == 500
        assert max(listener.pauses) > 0.4
        jumps = [b["U"] - a["u"] for a, b in itertools.pairwise(changes(listener)) if b["U"] != a["u"] + 1]
        assert len(jumps) == 1
        assert listener.digests == [digest for _, digest in server.sent[0].payloads][: len(listener.digests)]

    struck(WireFault.STALL, check)


def test_a_half_open_connection_answers_nothing_for_a_while():
    async def check(server, listener, record):
        pong = await listener.ws.ping()
        before = len(listener.got)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(pong), 0.4)
        assert len(listener.got) - before <= 2  # what was on its way
        await asyncio.wait_for(pong, 5)
        await listener.more()

    struck(WireFault.HALF_OPEN, check, binance_ping_s=0.1)


@pytest.mark.parametrize(("kind", "pause_s"), [(WireFault.DELAY, 0.4), (WireFault.THROTTLE, 0.1)])
def test_a_slow_connection_loses_nothing(kind, pause_s):
    async def check(server, listener, record):
        await listener.more(80)
        assert max(listener.pauses) > pause_s
        ids = changes(listener)
        assert all(b["U"] == a["u"] + 1 for a, b in itertools.pairwise(ids))
        assert listener.digests == [digest for _, digest in server.sent[0].payloads][: len(listener.digests)]

    struck(kind, check)


def test_other_connections_overtake_the_one_that_is_held_up():
    async def main():
        options = ServerOptions(record_sent=True, faults=QUICK)
        async with ExchangeServer(SyntheticSource(SynthConfig(seed=3), speed=3.0), options) as server:
            async with contextlib.AsyncExitStack() as stack:
                listeners = []
                for _ in range(2):
                    ws = await stack.enter_async_context(connect(server.binance_ws_url))
                    await ws.send(BINANCE)
                    listeners.append(Listener(ws))
                    if len(listeners) == 1:
                        await listeners[0].more()
                        assert not server.faults.inject(WireFault.REORDER)  # nobody there to overtake
                await listeners[1].more()
                held = server.open_clients()[0]
                assert server.faults.inject(WireFault.REORDER, held)
                await listeners[0].more(30)
                await listeners[1].more(30)
            arrivals = [
                {e["u"]: at for (at, _), e in zip(messages, map(json_of, messages), strict=True) if "u" in e}
                for messages in ([m for m in listener.got if DIFF.encode() in m[1]] for listener in listeners)
            ]
            late = [arrivals[0][u] - arrivals[1][u] for u in arrivals[0].keys() & arrivals[1].keys()]
            assert max(late) > 0.03
            assert all(e["U"] for e in changes(listeners[0]))

    def json_of(message):
        return json.loads(message[1])["data"]

    asyncio.run(main())


@pytest.mark.parametrize("kind", [WireFault.DUPLICATE, WireFault.CORRUPT, WireFault.TRUNCATE, WireFault.GARBAGE])
@pytest.mark.parametrize(("url", "request_text"), [("upbit_ws_url", UPBIT), ("binance_ws_url", BINANCE)])
def test_a_spoiled_message_counts_as_sent_in_its_spoiled_form(kind, url, request_text):
    async def check(server, listener, record):
        await listener.more(10)
        sent = [digest for _, digest in server.sent[0].payloads]
        assert listener.digests == sent[: len(listener.digests)]
        doubled = [a for a, b in itertools.pairwise(listener.got) if a[1] == b[1]]
        assert doubled or kind is not WireFault.DUPLICATE
        if kind is not WireFault.GARBAGE:
            assert record.stream
        if kind is WireFault.TRUNCATE:
            with pytest.raises(ValueError, match="line 1"):
                [json.loads(payload) for _, payload in listener.got]

    struck(kind, check, url=url, request=request_text)


def test_a_gap_names_the_ids_that_are_missing():
    async def check(server, listener, record):
        await listener.more(30)
        jumps = [(a["u"] + 1, b["U"] - 1) for a, b in itertools.pairwise(changes(listener)) if b["U"] != a["u"] + 1]
        assert record.stream == DIFF
        assert jumps == [(record.first_id, record.last_id)]

    struck(WireFault.GAP, check)


def test_acknowledgements_that_are_wrong_or_missing():
    async def main():
        options = ServerOptions(faults=FaultConfig())
        async with ExchangeServer(SyntheticSource(SynthConfig(seed=3)), options) as server:
            server.faults.inject(WireFault.MISSING_ACK)
            server.faults.inject(WireFault.WRONG_ACK)
            async with connect(server.binance_ws_url) as ws:
                for number in range(3):
                    await ws.send(json.dumps({"method": "SUBSCRIBE", "params": ["nopeusdt@trade"], "id": number}))
                answers = [json.loads(await asyncio.wait_for(ws.recv(), 5)) for _ in range(2)]
            assert answers[0] != {"result": None, "id": 1}
            assert answers[1] == {"result": None, "id": 2}
            assert [record.kind for record in server.faults.records] == ["missing_ack", "wrong_ack"]

    asyncio.run(main())


def test_a_rest_request_is_refused_once():
    async def main():
        async with ExchangeServer(SyntheticSource(SynthConfig(seed=3)), ServerOptions(faults=FaultConfig())) as server:

            def ask():
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
                with contextlib.closing(connection):
                    connection.request("GET", "/api/v3/depth?symbol=BTCUSDT")
                    return connection.getresponse().status

            server.faults.inject(WireFault.REST)
            assert await asyncio.to_thread(ask) in (429, 503)
            assert await asyncio.to_thread(ask) == 200
            (record,) = server.faults.records
            assert (record.kind, record.venue, record.stream) == ("rest", "binance", "/api/v3/depth")

    asyncio.run(main())


def test_a_clock_step_moves_the_times_of_one_venue_and_is_taken_back(tmp_path):
    async def main():
        path = tmp_path / "faults.jsonl"
        options = ServerOptions(faults=QUICK, fault_log=path)
        async with ExchangeServer(SyntheticSource(SynthConfig(seed=3)), options) as server:
            right = {venue: server.now_ms(venue) for venue in ("upbit", "binance")}
            assert server.faults.inject(WireFault.CLOCK_STEP)
            (record,) = server.faults.records
            other = {"upbit": "binance", "binance": "upbit"}[record.venue]
            assert server.now_ms(record.venue) < right[record.venue] - 8_000
            assert server.now_ms(other) >= right[other]
            async with (
                connect(server.upbit_ws_url) as one,
                connect(server.binance_ws_url) as two,
            ):
                await one.send(
                    json.dumps([{"ticket": "t"}, {"type": "orderbook", "codes": ["KRW-BTC"], "is_only_realtime": True}])
                )
                await two.send(json.dumps({"method": "SUBSCRIBE", "params": [DIFF], "id": 1}))
                await two.recv()
                stamps = {
                    "upbit": json.loads(await one.recv())["timestamp"],
                    "binance": json.loads(await two.recv())["data"]["E"],
                }
                assert stamps[record.venue] < time.time() * 1e3 - 7_000
                assert stamps[other] > time.time() * 1e3 - 5_000
            async with asyncio.timeout(10):
                while server.now_ms(record.venue) < right[record.venue]:
                    await asyncio.sleep(0.02)
            (line,) = path.read_bytes().splitlines()
            assert json.loads(line)["kind"] == "clock_step"

    asyncio.run(main())


def test_a_seed_plans_the_same_faults_at_the_asked_pace():
    config = fault_config(["all=10", "drop=2"], seed=5)
    plan = [(f.at_s, f.kind, f.chance.random()) for f in itertools.islice(planned(config), 4_000)]
    assert plan == [(f.at_s, f.kind, f.chance.random()) for f in itertools.islice(planned(config), 4_000)]
    assert [at for at, _, _ in plan] == sorted(at for at, _, _ in plan)
    count, span_s = Counter(kind for _, kind, _ in plan), plan[-1][0]
    assert set(count) == set(WireFault)
    assert 1.8 < span_s / count["drop"] < 2.2
    assert 7 < span_s / count["stall"] < 13
    assert plan != [
        (f.at_s, f.kind, f.chance.random()) for f in itertools.islice(planned(fault_config(["all=10", "drop=2"])), 4_000)
    ]


@pytest.mark.parametrize("text", ["drop", "drop=often", "flood=3", "drop=0", "drop=inf"])
def test_faults_that_cannot_be_are_refused(text):
    with pytest.raises(ConfigError, match=r"drop|NAME=SECONDS"):
        fault_config([text])


@pytest.mark.parametrize(
    "keys", [{"stall_s": (3, 1)}, {"delay_s": (0, 1)}, {"close_codes": ()}, {"close_codes": (1006,)}, {"close_codes": (2000,)}]
)
def test_sizes_that_cannot_be_are_refused(keys):
    with pytest.raises(ConfigError, match=next(iter(keys))):
        FaultConfig(**keys)


def test_whatever_happens_what_arrived_is_what_was_sent():
    """Everything at once, every connection dialled again: each got the first part of its account, all if the server ended it."""
    kinds = fault_config(["all=0.4"], seed=11)
    config = FaultConfig(seed=11, every_s=kinds.every_s, stall_s=(0.1, 0.3), half_open_s=(0.5, 1.0), delay_s=(0.05, 0.2))

    async def keep_listening(url, request, listeners):
        while True:
            async with connect(url, ping_interval=0.3, ping_timeout=0.3) as ws:
                with contextlib.suppress(ConnectionClosed):
                    await ws.send(request)
                listener = Listener(ws)
                listeners.append(listener)
                await listener.task

    async def main():
        options = ServerOptions(record_sent=True, faults=config)
        listeners = []
        async with ExchangeServer(SyntheticSource(SynthConfig(seed=3), speed=3.0), options) as server:
            work = [
                asyncio.create_task(keep_listening(url, request, listeners))
                for url, request in (
                    (server.upbit_ws_url, UPBIT),
                    (server.binance_ws_url, BINANCE),
                    (server.binance_ws_url, BINANCE),
                )
            ]
            await asyncio.sleep(4.0)
            records = list(server.faults.records)
        async with asyncio.timeout(5):
            while not all(sent.closed_ns for sent in server.sent):
                await asyncio.sleep(0.05)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        open_accounts = [([digest for _, digest in sent.payloads], sent.ended_by) for sent in server.sent]
        assert len(listeners) > 6
        for listener in listeners:
            got = listener.digests
            told = next(account for account in open_accounts if account[0][: len(got)] == got)
            open_accounts.remove(told)
            if told[1] == "server":
                assert len(told[0]) == len(got)
        assert len({record.kind for record in records}) > 10

    asyncio.run(main())


def test_forms_are_kept():
    async def check(server, listener, record):
        await listener.more(3)
        assert {op for op, _ in server.sent[0].payloads} == {Op.BINARY}
        assert [text for _, text in server.sent[0].requests] == [UPBIT.encode()]

    struck(WireFault.DUPLICATE, check, url="upbit_ws_url", request=UPBIT)
