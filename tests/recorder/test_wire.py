"""Every byte as it was sent, with the time it came."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time

import pytest

from arbl2.frames import FrameKind, Op
from arbl2_recorder import record


def payloads(rng):
    """Text, binary, empty, 1 MiB, non-ASCII, binary that is no UTF-8, and the same in fragments."""
    whole = [
        "plain",
        "",
        b"",
        "premium 김치 프리미엄 €\u0000\U0001f600",
        bytes(range(256)),
        rng.randbytes(2**20),
        "한" * 350_000,
        b'{"type":"orderbook","code":"KRW-BTC"}',
    ]
    fragments = [["가나", "다", "라"], [b"\xff", b"", b"\x00\xfe"], [b"", b""], [rng.randbytes(200_000) for _ in range(7)]]
    small = [rng.choice([str(i), rng.randbytes(rng.randrange(300))]) for i in range(3000)]
    mixed = whole + fragments + small
    rng.shuffle(mixed)
    return mixed


@pytest.mark.parametrize("compression", ["deflate", None])
def test_recorded_bytes_are_the_bytes_sent(compression, venue, make_config, frames, stop_when):
    messages = payloads(random.Random(7))

    async def script(ws, _server, _n):
        for message in messages:
            await ws.send(message)
        await ws.wait_closed()

    def flat(message):
        if isinstance(message, list):
            return flat(message[0])[0], b"".join(flat(part)[1] for part in message)
        return ("text", message.encode()) if isinstance(message, str) else ("binary", message)

    want = [flat(message) for message in messages]
    server = venue(script, compression=compression)
    seen = [0]
    result = record(
        make_config(upbit=server),
        on_status=lambda status: seen.append(status.venues[0].messages),
        stop=stop_when(lambda: seen[-1] == len(want)),
    )
    got = [f for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    digest = hashlib.sha256(b"".join(f.payload for f in got)).hexdigest()
    assert digest == hashlib.sha256(b"".join(payload for _, payload in want)).hexdigest()
    assert [(f.op.name.lower(), f.payload) for f in got] == want
    assert "Origin" not in server.headers[0]
    assert "permessage-deflate" in server.headers[0]["Sec-WebSocket-Extensions"]
    assert result.clean


def test_a_message_above_the_limit_ends_the_connection_and_says_so(venue, make_config, frames, stop_when):
    async def script(ws, server, n):
        if n == 0:
            await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC"}')
            await ws.send(b"x" * 5000)
        await ws.wait_closed()

    server = venue(script)
    result = record(make_config(upbit=server, max_message_bytes=4096), stop=stop_when(lambda: len(server.received) >= 2))
    closed = next(f for f in frames(result.path) if f.kind is FrameKind.CLOSED)
    facts = json.loads(closed.payload)
    assert not facts["clean"]
    assert "4096" in facts["reason"]


def test_stamps_are_taken_on_arrival_while_the_consumer_is_blocked(venue, make_config, frames):
    """The hook sleeps 0.8 s on the first message; the messages behind it keep true stamps."""

    async def script(ws, server, _n):
        for i in range(40):
            await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC","n":%d}' % i)
            await asyncio.sleep(0.01)
        await ws.wait_closed()

    server = venue(script)
    handed = []

    def hook(frame):
        if frame.kind is FrameKind.MESSAGE:
            if not handed:
                time.sleep(0.8)
            handed.append((frame, time.monotonic_ns()))

    result = record(make_config(upbit=server, duration_s=1.2), on_frame=hook)
    got = [f for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    assert len(got) == 40
    assert [frame for frame, _ in handed] == got
    delays_ms = sorted((f.mono_ns - sent) / 1e6 for f, (_, _, sent) in zip(got, server.sent, strict=True))
    print(f"arrival minus send, ms: median {delays_ms[20]:.2f}, max {delays_ms[-1]:.2f}")
    assert delays_ms[0] >= 0
    assert delays_ms[-3] < 100
    # The blocked consumer saw them only much later: a stamp taken there would have been wrong by most of the sleep.
    assert (handed[5][1] - got[5].mono_ns) / 1e6 > 500
    assert all(abs((f.recv_ns - got[0].recv_ns) - (f.mono_ns - got[0].mono_ns)) < 50e6 for f in got)


def test_ops_are_those_of_the_wire(venue, scripts, make_config, frames):
    upbit, binance = venue(scripts["upbit"]), venue(scripts["binance"])
    result = record(make_config(upbit=upbit, binance=binance, duration_s=0.5))
    messages = [f for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    assert {f.op for f in messages if f.venue == "upbit"} == {Op.BINARY}
    assert {f.op for f in messages if f.venue == "binance"} == {Op.TEXT}
    assert result.messages == {name: sum(f.venue == name for f in messages) for name in ("upbit", "binance")}
    assert min(result.messages.values()) > 20
