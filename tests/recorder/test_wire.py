"""Every byte as it was sent, with the time it came."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import time

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from arbl2.frames import FrameKind, Op
from arbl2_recorder import record
from arbl2_recorder.wire import RecordingConnection


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


@pytest.mark.parametrize(("compress", "compression"), [(True, "deflate"), (True, None), (False, "deflate")])
def test_recorded_bytes_are_the_bytes_sent(compress, compression, venue, make_config, frames, stop_when):
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
        make_config(upbit=server, **({"compress": True} if compress else {})),
        on_status=lambda status: seen.append(status.venues[0].messages),
        stop=stop_when(lambda: seen[-1] == len(want)),
    )
    got = [f for f in frames(result.path) if f.kind is FrameKind.MESSAGE]
    digest = hashlib.sha256(b"".join(f.payload for f in got)).hexdigest()
    assert digest == hashlib.sha256(b"".join(payload for _, payload in want)).hexdigest()
    assert [(f.op.name.lower(), f.payload) for f in got] == want
    assert "Origin" not in server.headers[0]
    assert ("permessage-deflate" in server.headers[0].get("Sec-WebSocket-Extensions", "")) == compress
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


class Heard:
    """A tap that writes down what it is told."""

    def __init__(self):
        self.messages = []
        self.ends = []

    def opened(self, recv_ns, mono_ns):
        self.messages.append("opened")

    def message(self, op, payload, recv_ns, mono_ns):
        assert isinstance(payload, bytes)
        self.messages.append((op, payload))

    def closed(self, code, reason, recv_ns, mono_ns):
        self.ends.append((code, reason))


def served(opcode, data=b"", *, fin=True):
    """A frame as a server writes it."""
    return Frame(opcode, data, fin).serialize(mask=False)


async def played(pieces, *, most=2**20, close_after=None):
    """What a connection tells when exactly these pieces reach it, one read each; the first has the handshake before it."""
    tap = Heard()
    client = ClientProtocol(parse_uri("ws://127.0.0.1/"), max_size=most)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: RecordingConnection(client, tap=tap), sock=ours)
    handshake = asyncio.create_task(connection.handshake())
    server = ServerProtocol()
    server.receive_data(await loop.sock_recv(theirs, 65_536))
    server.send_response(server.accept(server.events_received()[0]))
    answer = b"".join(server.data_to_send())
    for i, piece in enumerate([answer + pieces[0], *pieces[1:]]):
        await loop.sock_sendall(theirs, piece)
        # One turn of the loop for the read, one for what follows from it.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if i == close_after:
            closing = asyncio.create_task(connection.close())
            await asyncio.sleep(0)
    await handshake
    theirs.shutdown(socket.SHUT_WR)
    await connection.wait_closed()
    if close_after is not None:
        await closing
    said = b""
    while chunk := await loop.sock_recv(theirs, 65_536):
        said += chunk
    theirs.close()
    return tap, said


# Payloads that look like frames show whether the ends of frames are found, not guessed.
LONG = random.Random(9).randbytes(70_000)
PLAIN = [
    (served(Opcode.TEXT, b"one"), (Op.TEXT, b"one")),
    (served(Opcode.BINARY), (Op.BINARY, b"")),
    (served(Opcode.PING, b"are you there"), None),
    (served(Opcode.BINARY, b"\r\n\r\n" * 40), (Op.BINARY, b"\r\n\r\n" * 40)),
    (served(Opcode.TEXT, b"fr", fin=False), None),
    (served(Opcode.PONG), None),
    (served(Opcode.CONT, b"\x82\x01x" * 50, fin=False), None),
    (served(Opcode.CONT, b"ment"), (Op.TEXT, b"fr" + b"\x82\x01x" * 50 + b"ment")),
    (b"\x82\x7f" + (3).to_bytes(8, "big") + b"\x82\x01x", (Op.BINARY, b"\x82\x01x")),
    (served(Opcode.TEXT, "끝".encode()), (Op.TEXT, "끝".encode())),
]
STREAM = b"".join(wired for wired, _ in PLAIN)
TOLD = ["opened", *(told for _, told in PLAIN if told is not None)]


def test_wherever_the_bytes_are_cut():
    """Between any two bytes of the stream, and after each of them."""

    async def work():
        for cut in range(len(STREAM) + 1):
            tap, said = await played([STREAM[:cut], STREAM[cut:]] if cut < len(STREAM) else [STREAM])
            assert tap.messages == TOLD, cut
            # The ping was answered: a masked pong of the same length.
            assert said[:2] == bytes((0x8A, 0x80 | len(b"are you there")))
        tap, _ = await played([bytes([byte]) for byte in STREAM])
        assert tap.messages == TOLD
        assert tap.ends[0][0] == 1006

    asyncio.run(work())


def test_long_messages_among_short_ones_in_random_pieces():
    rng = random.Random(4)
    payloads = [rng.randbytes(rng.choice([0, 3, 125, 126, 127, 1_400, 65_535, 65_536, 70_000])) for _ in range(60)] + [LONG]
    stream = b"".join(served(Opcode.BINARY, payload) for payload in payloads)

    async def work():
        for _ in range(4):
            cuts = sorted(rng.sample(range(1, len(stream)), 80))
            pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
            tap, _ = await played(pieces)
            assert tap.messages == ["opened", *((Op.BINARY, payload) for payload in payloads)]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (b"\x82\x85abcdhello", 1002),
        (b"\xc2\x03abc", 1002),
        (b"\x83\x03abc", 1002),
        (served(Opcode.CONT, b"of nothing"), 1002),
        (served(Opcode.TEXT, b"a", fin=False) + served(Opcode.TEXT, b"b"), 1002),
        (b"\x89\x7e\x00\x80" + bytes(128), 1002),
        (served(Opcode.BINARY, bytes(1_001)), 1009),
        (b"\x82\x7f" + (2**62).to_bytes(8, "big"), 1009),
    ],
    ids=["masked", "reserved bit", "unknown opcode", "continues nothing", "inside fragments", "long ping", "too long", "endless"],
)
def test_what_breaks_the_protocol_ends_the_connection(broken, code):
    before, after = served(Opcode.TEXT, b"before"), served(Opcode.TEXT, b"after")

    async def work():
        for pieces in ([before + broken + after], [before, broken, after], [before + broken[:1], broken[1:] + after]):
            tap, said = await played(pieces, most=1_000)
            assert tap.messages == ["opened", (Op.TEXT, b"before")]
            assert tap.ends[0][0] == 1006
            # We said why: a masked close frame whose first two bytes are the code.
            assert said[0] == 0x88
            assert int.from_bytes(bytes(a ^ b for a, b in zip(said[6:8], said[2:4], strict=True)), "big") == code

    asyncio.run(work())


def test_nothing_counts_after_a_close():
    goodbye = served(Opcode.CLOSE, (1001).to_bytes(2, "big") + b"maintenance")

    async def work():
        for after in (served(Opcode.TEXT, b"after"), b"\x81"):
            for pieces in ([goodbye + after], [goodbye, after], [goodbye[:3], goodbye[3:] + after]):
                tap, _ = await played(pieces)
                assert (tap.messages, tap.ends) == (["opened"], [(1001, "maintenance")])

    asyncio.run(work())


def test_messages_count_until_our_close_is_answered():
    """The socket is full of them when we close; the one that was cut by our close comes whole too."""
    last = served(Opcode.BINARY, b"last one")
    stream = b"".join(wired for wired, _ in PLAIN) + last + served(Opcode.CLOSE, (1000).to_bytes(2, "big"))

    async def work():
        for cut in range(1, len(stream)):
            tap, _ = await played([stream[:cut], stream[cut:]], close_after=0)
            assert tap.messages == [*TOLD, (Op.BINARY, b"last one")]
            assert tap.ends == [(1000, "")]

    asyncio.run(work())
