"""Faults on the wire, at random moments of a seed, each of them written down.

``FaultConfig`` says how often each kind strikes, ``planned`` turns that into moments (always the same ones for a seed), and
``Faults`` does it to the connections that are open by then. A fault may have to wait a little for a connection that can suffer
it; what is on the log did happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import json
import logging
import random
import time
from collections import deque
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from websockets.exceptions import ConnectionClosed

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Op
from arbl2_replay.binance_server import BinanceClient
from arbl2_replay.gate import Gate
from arbl2_replay.serving import is_sendable, reply
from arbl2_replay.upbit_server import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from websockets.http11 import Response

    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.serving import Client

log = logging.getLogger("arbl2.server.faults")


class WireFault(StrEnum):
    """What can go wrong."""

    DROP = "drop"  # the connection ends without a close frame, at times within a message
    CLOSE = "close"  # the venue closes the connection with some code
    ERROR = "error"  # Upbit: an error frame, then close 1000
    SHUTDOWN = "shutdown"  # Binance: the notice, then a close
    STALL = "stall"  # a connection lives but its messages are lost
    HALF_OPEN = "half_open"  # the other end is gone and nobody says so: no data, no pong, no ping
    DELAY = "delay"  # a connection falls behind and catches up at once
    REORDER = "reorder"  # a moment's delay, so that other connections overtake this one
    THROTTLE = "throttle"  # a connection delivers slowly for a while
    DUPLICATE = "duplicate"  # a message comes twice
    GAP = "gap"  # a message of a diff stream is lost
    CORRUPT = "corrupt"  # bits of a message flip
    TRUNCATE = "truncate"  # only the beginning of a message comes
    GARBAGE = "garbage"  # a message that is none
    WRONG_ACK = "wrong_ack"  # Binance: another answer to a subscription than the one that was due
    MISSING_ACK = "missing_ack"  # Binance: no answer to a subscription
    REST = "rest"  # a REST request is refused: the venue is busy, or asks to be left alone for a second
    CLOCK_STEP = "clock_step"  # the venue's clock is off for a while


_BINANCE_ONLY = (WireFault.SHUTDOWN, WireFault.GAP)
_SPOILING = (WireFault.DUPLICATE, WireFault.GAP, WireFault.CORRUPT, WireFault.TRUNCATE)
_ACKS = (WireFault.WRONG_ACK, WireFault.MISSING_ACK)
_PATIENCE_S = 30.0


class FaultConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often things go wrong, and how badly. Pairs are the smallest and the largest of what is drawn, evenly.

    Raises ConfigError for a value that cannot be used.
    """

    seed: int = 1
    every_s: dict[WireFault, float] = {}
    """Mean seconds from one fault of a kind to the next; a kind that is left out never happens."""
    stall_s: tuple[float, float] = (2.0, 6.0)
    half_open_s: tuple[float, float] = (10.0, 20.0)
    delay_s: tuple[float, float] = (0.2, 1.5)
    reorder_s: tuple[float, float] = (0.01, 0.15)
    throttle_s: tuple[float, float] = (1.0, 3.0)
    throttle_bytes_per_s: tuple[float, float] = (20_000.0, 60_000.0)
    clock_step_ms: tuple[float, float] = (-5_000.0, 5_000.0)
    clock_step_s: tuple[float, float] = (2.0, 6.0)
    shutdown_lead_s: tuple[float, float] = (0.5, 3.0)
    close_codes: tuple[int, ...] = (1000, 1001, 1008, 1011, 1012, 1013)

    def __post_init__(self) -> None:
        for kind, mean_s in self.every_s.items():
            if not 0 < mean_s < float("inf"):
                raise ConfigError(f"the fault {kind} cannot strike every {mean_s} s. Give seconds above zero, or leave it out.")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.endswith(("_s", "_ms")) and name != "every_s":
                low, high = value
                if not low <= high or (low <= 0 and name != "clock_step_ms"):
                    raise ConfigError(f"{name} is {value}; it needs a smaller and a larger number, both above zero. Change it.")
        if not self.close_codes or not all(map(is_sendable, self.close_codes)):
            raise ConfigError(f"close_codes {list(self.close_codes)} cannot all be sent. Use codes such as 1001, 1011, 1012.")


def fault_config(texts: Sequence[str], seed: int = 1, close_codes: tuple[int, ...] | None = None) -> FaultConfig:
    """Faults as they are named on a command line: ``drop=30`` strikes every 30 s on average, ``all=60`` is every kind.

    Later ones win; ``half-open`` is ``half_open``. Raises ConfigError for a text that is not understood.
    """
    every_s: dict[WireFault, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            kinds = list(WireFault) if name == "all" else [WireFault(name.replace("-", "_"))]
            every_s |= dict.fromkeys(kinds, float(number))
        except ValueError:
            known = ", ".join(WireFault)
            raise ConfigError(f"the fault {text!r} is not NAME=SECONDS. Use one of {known}, or all.") from None
    if close_codes is None:
        return FaultConfig(seed=seed, every_s=every_s)
    return FaultConfig(seed=seed, every_s=every_s, close_codes=close_codes)


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One fault that happened. Both clocks are those of the server at its beginning; ``conn`` is the server's own count."""

    kind: WireFault
    wall_ns: int
    mono_ns: int
    venue: str
    conn: int = 0
    stream: str = ""
    lasts_ms: int = 0
    first_id: int = 0
    """Ids of the message concerned, where it has some; those that were lost for a gap."""
    last_id: int = 0
    detail: str = ""


class Planned(NamedTuple):
    """A fault to come, seconds after the start; ``chance`` decides all that is left open."""

    at_s: float
    kind: WireFault
    chance: random.Random


def planned(config: FaultConfig) -> Iterator[Planned]:
    """All faults, without an end, in the order of their times (which are those of a Poisson process for each kind)."""

    def of_kind(kind: WireFault, mean_s: float) -> Iterator[Planned]:
        chance = random.Random(f"{config.seed}:{kind}")  # noqa: S311 - a test, not a secret
        at_s = 0.0
        for number in itertools.count():
            at_s += chance.expovariate(1 / mean_s)
            yield Planned(at_s, kind, random.Random(f"{config.seed}:{kind}:{number}"))  # noqa: S311

    streams = [of_kind(kind, mean_s) for kind, mean_s in sorted(config.every_s.items())]
    return heapq.merge(*streams, key=lambda fault: fault.at_s)


class Faults:
    """Lets a server's connections suffer. ``records`` is what happened so far, in the order of happening."""

    def __init__(self, server: ExchangeServer, config: FaultConfig, path: Path | None = None) -> None:
        """``path`` gets one line of JSON per fault as it happens."""
        self.config = config
        self.records: list[FaultRecord] = []
        self._server = server
        self._path = path
        self._tasks: set[asyncio.Task[None]] = set()
        self._acks: deque[tuple[WireFault, random.Random]] = deque()
        self._rest: deque[random.Random] = deque()
        self._stepped: set[str] = set()

    async def run(self) -> None:
        """Until cancelled: every planned fault at its time."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for fault in planned(self.config):
            await asyncio.sleep(max(0.0, began + fault.at_s - loop.time()))
            self._begin(self._patiently(fault))

    async def stop(self) -> None:
        """End what is still going on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _patiently(self, fault: Planned) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _PATIENCE_S
        while not self.inject(fault.kind, chance=fault.chance):
            if loop.time() > give_up_at:
                log.info("the fault %s found no connection for %g s and is left out", fault.kind, _PATIENCE_S)
                return
            await asyncio.sleep(0.25)

    def inject(self, kind: WireFault, client: Client | None = None, chance: random.Random | None = None) -> bool:
        """Let it happen now, or to the next message that fits. False if no connection (or not this one) can suffer it now."""
        chance = chance or random.Random(f"{self.config.seed}:{len(self.records)}")  # noqa: S311
        if kind in _ACKS:
            self._acks.append((kind, chance))
            return True
        if kind is WireFault.REST:
            self._rest.append(chance)
            return True
        if kind is WireFault.CLOCK_STEP:
            return self._step_clock(chance)
        able = [each for each in ([client] if client else self._server.open_clients()) if self._is_able(each, kind)]
        if not able or (kind is WireFault.REORDER and len(self._server.open_clients()) < 2):
            return False
        self._strike(kind, able[int(chance.random() * len(able))], chance)
        return True

    def _is_able(self, client: Client, kind: WireFault) -> bool:
        if client.frozen or not client.subscribed or (kind in _BINANCE_ONLY and client.venue != ExchangeId.BINANCE):
            return False
        return not (
            (kind is WireFault.ERROR and client.venue != ExchangeId.UPBIT)
            or (kind is WireFault.GAP and not (isinstance(client, BinanceClient) and client.tells_changes))
        )

    def _strike(self, kind: WireFault, client: Client, chance: random.Random) -> None:
        config, gate = self.config, self._gate(client)
        if kind in _SPOILING:
            gate.spoil(self._spoiler(kind, client, chance))
            return
        match kind:
            case WireFault.DROP:
                torn = _torn(chance) if chance.random() < 0.5 else b""
                self._note(kind, client, detail="within a message" if torn else "")
                self._begin(client.cut(torn))
            case WireFault.CLOSE:
                code = chance.choice(config.close_codes)
                self._note(kind, client, detail=str(code))
                self._begin(client.close(code))
            case WireFault.ERROR:
                self._note(kind, client, detail="INVALID_PARAM")
                self._begin(self._refuse(client))
            case WireFault.SHUTDOWN:
                lead_s = chance.uniform(*config.shutdown_lead_s)
                self._note(kind, client, lead_s)
                self._begin(self._shut_down(client, lead_s))
            case WireFault.STALL:
                seconds = chance.uniform(*config.stall_s)
                self._note(kind, client, seconds)
                gate.mute(seconds)
            case WireFault.HALF_OPEN:
                seconds = chance.uniform(*config.half_open_s)
                self._note(kind, client, seconds)
                gate.mute(seconds)
                self._begin(self._freeze(client, seconds))
            case WireFault.DELAY | WireFault.REORDER:
                seconds = chance.uniform(*(config.delay_s if kind is WireFault.DELAY else config.reorder_s))
                self._note(kind, client, seconds)
                gate.hold(seconds)
            case WireFault.THROTTLE:
                seconds, rate = chance.uniform(*config.throttle_s), chance.uniform(*config.throttle_bytes_per_s)
                self._note(kind, client, seconds, detail=f"{rate:.0f} bytes/s")
                gate.throttle(rate, seconds)
            case WireFault.GARBAGE:
                payload, op, what = _garbage(chance)
                self._note(kind, client, detail=what)
                client.send(payload, op)

    def _gate(self, client: Client) -> Gate:
        if client.gate is None:
            client.gate = Gate(client.write, asyncio.get_running_loop())
        return client.gate

    def _spoiler(self, kind: WireFault, client: Client, chance: random.Random) -> Callable[..., list[bytes] | None]:
        def spoil(payload: bytes, op: Op, stream: str, first_id: int, last_id: int) -> list[bytes] | None:
            if not stream or (kind is WireFault.GAP and not stream.endswith(_DIFF_STREAMS)):
                return None
            if chance.random() < 0.8:
                return None  # or the stream that happens to be told first would always be the one
            spoiled, detail = _spoiled(kind, payload, op, chance)
            self._note(kind, client, stream=stream, first_id=first_id, last_id=last_id, detail=detail)
            return spoiled

        return spoil

    def acknowledged(self, client: Client, answer: dict[str, object]) -> dict[str, object] | None:
        """What goes out instead of Binance's answer to a request; None for nothing."""
        if answer.get("result", "") is not None or not self._acks:
            return answer
        kind, chance = self._acks.popleft()
        number = answer["id"]
        if kind is WireFault.MISSING_ACK:
            self._note(kind, client)
            return None
        error = {"code": 2, "msg": "Invalid request: request was refused"}
        wrong: list[dict[str, object]] = [
            {"result": None, "id": 987_654_321},
            {**error, "id": number},
            {"error": error, "id": number},
        ]
        spoiled = chance.choice(wrong)
        self._note(kind, client, detail=json.dumps(spoiled))
        return spoiled

    def refused(self, venue: ExchangeId, path: str) -> Response | None:
        """What goes out instead of the answer to a REST request, if something does."""
        if not self._rest:
            return None
        busy = self._rest.popleft().random() < 0.5
        status = HTTPStatus.SERVICE_UNAVAILABLE if busy else HTTPStatus.TOO_MANY_REQUESTS
        self._note(WireFault.REST, None, venue=venue, stream=path, detail=str(status.value))
        return reply(status, b"", {} if busy else {"Retry-After": "1"})

    def _step_clock(self, chance: random.Random) -> bool:
        still = [venue for venue in (ExchangeId.UPBIT, ExchangeId.BINANCE) if venue not in self._stepped]
        if not still:
            return False
        venue = chance.choice(still)
        step_ms, seconds = round(chance.uniform(*self.config.clock_step_ms)), chance.uniform(*self.config.clock_step_s)
        self._note(WireFault.CLOCK_STEP, None, seconds, venue=venue, detail=f"{step_ms:+d} ms")
        self._stepped.add(venue)
        self._server.set_clock(venue, step_ms)
        self._begin(self._set_clock_right(venue, seconds))
        return True

    async def _set_clock_right(self, venue: ExchangeId, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._server.set_clock(venue, 0)
        self._stepped.discard(venue)

    async def _refuse(self, client: Client) -> None:
        client.send(refusal("INVALID_PARAM"), Op.BINARY)
        await asyncio.sleep(client.options.upbit_error_close_s)
        await client.close(1000)

    async def _shut_down(self, client: Client, lead_s: float) -> None:
        assert isinstance(client, BinanceClient)
        client.announce_shutdown(self._server.now_ms(ExchangeId.BINANCE))
        await asyncio.sleep(lead_s)
        await client.close(1001)

    async def _freeze(self, client: Client, seconds: float) -> None:
        transport = client.ws.transport
        client.frozen = True
        transport.pause_reading()
        await asyncio.sleep(seconds)
        client.frozen = False
        if not transport.is_closing():
            transport.resume_reading()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        async def guarded() -> None:
            with contextlib.suppress(ConnectionClosed, OSError):
                await work

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _note(
        self,
        kind: WireFault,
        client: Client | None,
        seconds: float = 0.0,
        *,
        venue: str = "",
        stream: str = "",
        first_id: int = 0,
        last_id: int = 0,
        detail: str = "",
    ) -> None:
        record = FaultRecord(
            kind=kind,
            wall_ns=time.time_ns(),
            mono_ns=time.monotonic_ns(),
            venue=str(client.venue) if client else str(venue),
            conn=client.sent.conn if client else 0,
            stream=stream,
            lasts_ms=round(seconds * 1e3),
            first_id=first_id,
            last_id=last_id,
            detail=detail,
        )
        self.records.append(record)
        if self._path is not None:
            with self._path.open("ab") as lines:
                lines.write(msgspec.json.encode(record) + b"\n")


_DIFF_STREAMS = ("@depth", "@depth@100ms", "@depth@1000ms")


def _spoiled(kind: WireFault, payload: bytes, op: Op, chance: random.Random) -> tuple[list[bytes], str]:
    if kind is WireFault.GAP:
        return [], ""
    if kind is WireFault.DUPLICATE:
        return [payload, payload], "a snapshot" if b'"SNAPSHOT"' in payload else ""
    if kind is WireFault.TRUNCATE:
        kept = 1 + int(chance.random() * (len(payload) - 1))
        return [payload[:kept]], f"{kept} of {len(payload)} bytes"
    flipped = bytearray(payload)
    for _ in range(1 + int(chance.random() * 3)):
        # a text frame must stay text, or the fault is one of the connection and not of the message
        flipped[int(chance.random() * len(flipped))] ^= 1 << int(chance.random() * (7 if op is Op.TEXT else 8))
    try:
        msgspec.json.decode(flipped)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return [bytes(flipped)], "not JSON any more"
    return [bytes(flipped)], "still JSON"


def _garbage(chance: random.Random) -> tuple[bytes, Op, str]:
    choices = [
        (chance.randbytes(1 + int(chance.random() * 2_000)), Op.BINARY, "random bytes"),
        (b"", Op.BINARY, "empty"),
        (b"\xff\xfe{" * 20, Op.TEXT, "text that is not UTF-8"),
        (b"[" * 50_000, Op.TEXT, "50,000 open brackets"),
        (b'{"what":"is this"}', Op.TEXT, "an unknown object"),
        (b"<html><body>502 Bad Gateway</body></html>", Op.TEXT, "a web page"),
    ]
    return chance.choice(choices)


def _torn(chance: random.Random) -> bytes:
    """The head of a binary frame of 60,000 bytes and the first few of them."""
    return b"\x82\x7e" + (60_000).to_bytes(2) + chance.randbytes(1 + int(chance.random() * 500))
