"""A venue that follows a script: a real WebSocket and REST server in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from http import HTTPStatus

import pytest
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from arbl2.tape import TapeReader
from arbl2_recorder import Endpoints, RecordConfig

BOOK = b'{"type":"orderbook","code":"%s","timestamp":1,"orderbook_units":[],"n":%d}'


class ScriptedVenue:
    """``script(ws, venue, n)`` plays connection number ``n`` (from 0) after its first message was received."""

    def __init__(self, script, *, rest=b"[]", rest_status=200, compression="deflate", refuse=0):
        self.script = script
        self.rest = rest
        self.rest_status = rest_status
        self.compression = compression
        self.refuse = refuse
        self.received: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.dialled: list[float] = []
        self.sent: list[tuple[int, bytes, int]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._request,
            compression=self.compression,
            max_size=2**25,
            close_timeout=0.2,
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stop.wait()

    def _request(self, connection, request):
        self.paths.append(request.path)
        if request.path.startswith(("/v1", "/api")):
            response = connection.respond(HTTPStatus(self.rest_status), "")
            response.body = self.rest
            del response.headers["Content-Length"]
            response.headers["Content-Length"] = str(len(self.rest))
            return response
        self.headers.append(dict(request.headers.raw_items()))
        self.dialled.append(time.monotonic())
        if len(self.dialled) <= self.refuse:
            response = connection.respond(HTTPStatus.TOO_MANY_REQUESTS, "slow down")
            response.headers["Retry-After"] = "1"
            return response
        return None

    async def _handle(self, ws):
        n = len(self.received)
        with contextlib.suppress(ConnectionClosed):
            self.received.append(await ws.recv(decode=False))
            await self.script(ws, self, n)

    async def send(self, ws, message, text=None):
        """Send and remember (connection, bytes, monotonic ns)."""
        payload = message.encode() if isinstance(message, str) else bytes(message)
        self.sent.append((id(ws), payload, time.monotonic_ns()))
        await ws.send(message, text=text)

    @property
    def ws_url(self):
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def rest_url(self):
        return f"http://127.0.0.1:{self.port}"


async def keep_open(ws, _venue, _n):
    await ws.wait_closed()


async def upbit_books(ws, venue, _n):
    """One book per subscribed code, again and again."""
    codes = [code.split(".")[0] for code in json.loads(venue.received[-1])[1]["codes"]]
    for i in range(1_000_000):
        for code in codes:
            await venue.send(ws, BOOK % (code.encode(), i))
        await asyncio.sleep(0.002)


async def binance_books(ws, venue, _n):
    request = json.loads(venue.received[-1])
    await ws.send(json.dumps({"result": None, "id": request["id"]}))
    for i in range(1_000_000):
        for stream in request["params"]:
            await venue.send(ws, f'{{"stream":"{stream}","data":{{"lastUpdateId":{i},"bids":[],"asks":[]}}}}')
        await asyncio.sleep(0.002)


@pytest.fixture
def venue():
    with contextlib.ExitStack() as stack:
        yield lambda script=upbit_books, **options: stack.enter_context(ScriptedVenue(script, **options))


@pytest.fixture
def scripts():
    return {"upbit": upbit_books, "binance": binance_books, "open": keep_open}


@pytest.fixture
def make_config(tmp_path):
    """A configuration with small limits for the venues given."""

    def make(*, upbit=None, binance=None, upbit_ws=None, **changes):
        ends = {}
        if upbit is not None:
            ends |= {"upbit_ws": upbit.ws_url, "upbit_rest": upbit.rest_url}
        if upbit_ws is not None:
            ends |= {"upbit_ws": upbit_ws, "upbit_rest": "http://127.0.0.1:1"}
        if binance is not None:
            ends |= {"binance_ws": binance.ws_url, "binance_rest": binance.rest_url}
        names = tuple(name for name in ("upbit", "binance") if f"{name}_ws" in ends)
        options = {
            "out": tmp_path / "tapes",
            "venues": names,
            "symbols": ("BTC",),
            "endpoints": Endpoints(**ends),
            "dial_interval_s": 0.05,
            "backoff_cap_s": 0.1,
            "close_timeout_s": 0.5,
            "status_s": 0.05,
            "flush_ms": 50,
        }
        return RecordConfig(**(options | changes))

    return make


@pytest.fixture
def frames():
    """All frames of a session, checked on the way: hashes, seq without holes, monotonic time that never steps back."""

    def read(path):
        reader = TapeReader(path)
        reader.verify_hashes()
        found = list(reader.frames())
        assert [frame.seq for frame in found] == list(range(1, len(found) + 1))
        assert all(a.mono_ns <= b.mono_ns for a, b in itertools.pairwise(found))
        return found

    return read


@pytest.fixture
def stop_when():
    """A stop condition for ``record``: set once ``check`` is true, or after a time that is long enough for any machine."""

    class Until:
        def __init__(self, check, timeout_s=30.0):
            self.check, self.limit = check, time.monotonic() + timeout_s

        def is_set(self):
            assert time.monotonic() < self.limit, "what the test waits for did not happen"
            return bool(self.check())

    return Until
