"""What the recorder costs, keeps and survives, on real sockets: ``python -m benchmarks.record``.

A venue in a process of its own sends as fast as a connection takes it, or at a set pace, and keeps account of what it sent. The
real recorder and a bare client, each in a fresh process, take turns on the other end. Everything stays on the loopback address
and in folders that are removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import os
import platform
import random
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from websockets.asyncio.client import connect
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame as WireFrame
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from arbl2.errors import Arbl2Error
from arbl2.frames import HEAD, UPBIT, Anchor, Flag, FrameKind, Op
from arbl2.tape import LOG, TAPE_VERSION, Manifest, TapeReader
from arbl2_recorder import Endpoints, RecordConfig, record
from arbl2_recorder.clock import stamp
from arbl2_recorder.log import encode_batch
from arbl2_recorder.seal import seal_log
from arbl2_recorder.session import Session
from arbl2_recorder.writer import LogWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from arbl2_recorder import Status

CAPTURES = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES = (245, 1_400)
RING = 16_381
CHUNK = 64 * 2**10
LEAST_SHARE, LEAST_RATE, MOST_RSS_MB, LEAST_LOG_RATE = 0.8, 100_000, 300, 450_000
MOST_SHIFT_MS = 1.0
LEASE_LIMIT = Path("/proc/sys/fs/lease-break-time")
_spawn = get_context("spawn")


# ---------------------------------------------------------------------------------------------------------------- the venue


class Account:
    """The order-sensitive SHA-256 of payloads: form, length and bytes of each."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.count = 0

    def add(self, op: int, payload: bytes) -> None:
        self._hash.update(struct.pack("<BQ", op, len(payload)))
        self._hash.update(payload)
        self.count += 1

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@functools.cache
def market_text() -> list[bytes]:
    """``RING`` books of a synthetic market as Upbit writes them, without quotes."""
    from arbl2_replay.synth import SynthConfig, synth_frames  # noqa: PLC0415 - its memory must not count as the recorder's

    config = SynthConfig(seed=7, duration_s=RING / 20, upbit_units=15)
    messages = (frame for frame in synth_frames(config) if frame.kind is FrameKind.MESSAGE and frame.venue == "upbit")
    return [frame.payload.replace(b'"', b"'") for frame in islice(messages, RING)]


def book(number: int, size: int, sent_ns: int = 0) -> bytes:
    """A message of exactly ``size`` bytes that begins as Upbit's data does and is as easy, or hard, to compress as books are."""
    head = b'{"type":"orderbook","code":"KRW-BTC","sent":%d,"n":%d,"pad":"' % (sent_ns, number)
    text = market_text()[number % RING]
    pad = text * (size // len(text) + 1)
    return head + pad[: size - len(head) - 2] + b'"}'


def framed(payload: bytes) -> bytes:
    """A whole binary message on the wire of a server."""
    length = len(payload)
    head = bytes((0x82, length)) if length < 126 else struct.pack("!BBH", 0x82, 126, length)
    return head + payload


class Wire:
    """The venue's side of one connection: a blocking socket and the library's own protocol."""

    def __init__(self, sock: socket.socket, *, deflate: bool) -> None:
        self._sock = sock
        self._protocol = ServerProtocol(extensions=[ServerPerMessageDeflateFactory()] if deflate else None)

    def meet(self) -> bool:
        """The handshake and the subscription. False if it was a REST request, which gets an empty list."""
        while not (events := self._heard()):
            pass
        request = events[0]
        assert isinstance(request, Request)
        is_rest = request.path.startswith("/v1/")
        self._protocol.send_response(self._protocol.reject(200, "[]") if is_rest else self._protocol.accept(request))
        self.flush()
        if is_rest:
            return False
        while not any(isinstance(event, WireFrame) for event in self._heard()):
            pass
        return True

    def _heard(self) -> list[Any]:
        data = self._sock.recv(65_536)
        if not data:
            raise ConnectionResetError("the client left")
        self._protocol.receive_data(data)
        self.flush()
        return self._protocol.events_received()

    def flush(self) -> None:
        """Send what the protocol has made."""
        for data in self._protocol.data_to_send():
            if data:
                self._sock.sendall(data)

    def raw(self, data: bytes) -> None:
        """Send whole frames that were made before; between two of them pings are answered."""
        self._sock.sendall(data)
        while select.select([self._sock], [], [], 0)[0]:
            self._heard()

    def message(self, payload: bytes, op: Op, cut: int = 0) -> None:
        """Send through the protocol: compressed if agreed; ``cut`` > 0 sends two fragments with a ping between them."""
        send = self._protocol.send_text if op is Op.TEXT else self._protocol.send_binary
        if cut:
            send(payload[:cut], fin=False)
            self._protocol.send_ping(b"between")
            self._protocol.send_continuation(payload[cut:], fin=True)
        else:
            send(payload)
        self.flush()
        while select.select([self._sock], [], [], 0)[0]:
            self._heard()

    def wait_closed(self) -> None:
        """Answer until the client has gone."""
        with contextlib.suppress(OSError):
            while self._protocol.state is not State.CLOSED:
                self._heard()


@dataclass(frozen=True, slots=True)
class Flat:
    """As fast as the connection takes it: messages that were made and framed before."""

    size: int
    count: int
    deflate: bool = False

    def play(self, wire: Wire) -> dict[str, Any]:
        ring = [book(i, self.size) for i in range(RING)]
        wired = b"".join(map(framed, ring))
        step = len(framed(ring[0]))
        whole, rest = divmod(self.count, RING)
        batch = max(1, CHUNK // step) * step
        for data in [wired] * whole + [wired[: rest * step]]:
            view = memoryview(data)
            for at in range(0, len(view), batch):
                wire.raw(view[at : at + batch])  # type: ignore[arg-type]
        account = Account()
        for i in range(self.count):
            account.add(Op.BINARY, ring[i % RING])
        return {"sha256": account.sha256, "count": self.count}


@dataclass(frozen=True, slots=True)
class Paced:
    """``rate`` messages a second in steps of 1 ms; each says when it was sent (monotonic ns)."""

    size: int
    rate: int
    seconds: float
    deflate: bool = False

    @property
    def count(self) -> int:
        return int(self.rate * self.seconds)

    def play(self, wire: Wire) -> dict[str, Any]:
        market_text()
        sent, digests = 0, []
        began = time.monotonic()
        while sent < self.count:
            due = min(self.count, int((time.monotonic() - began) * self.rate))
            if due > sent:
                batch = [book(i, self.size, time.monotonic_ns()) for i in range(sent, due)]
                wire.raw(b"".join(map(framed, batch)))
                digests += [hashlib.sha256(payload).digest() for payload in batch]
                sent = due
            time.sleep(0.001)
        return {"digests": digests, "count": sent}


@dataclass(frozen=True, slots=True)
class Mixed:
    """Everything a message may be, compressed as the venues do, with pings in between."""

    count: int
    deflate: bool = True

    def payloads(self) -> Iterator[tuple[Op, bytes]]:
        rng = random.Random(5)
        large = json.dumps([rng.random() for _ in range(60_000)]).encode()[: 2**20]
        for i in range(self.count):
            if i == 0:
                yield Op.BINARY, book(0, 245)
            elif i % 50_000 == 1:
                yield (Op.TEXT if i % 100_000 == 1 else Op.BINARY), large[i % 4_096 :] + large[: i % 4_096]
            elif i % 1_000 == 2:
                yield (Op.TEXT if i % 2_000 == 2 else Op.BINARY), b""
            elif i % 10 == 3:
                yield Op.TEXT, f'{{"korean_name":"비트코인 {i}","마켓":"KRW-BTC","🦊":{i * 7}}}'.encode()
            elif i % 10 == 4:
                yield Op.BINARY, rng.randbytes(i % 600)
            elif i % 10 == 5:
                yield Op.TEXT, b'{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":%d,"bids":[],"asks":[]}}' % i
            else:
                yield Op.BINARY, book(i, 120 + i % 400)

    def play(self, wire: Wire) -> dict[str, Any]:
        account, size = Account(), 0
        for i, (op, payload) in enumerate(self.payloads()):
            wire.message(payload, op, cut=len(payload) // 2 if i % 100 == 7 else 0)
            account.add(op, payload)
            size += len(payload)
        return {"sha256": account.sha256, "count": account.count, "bytes": size}


Plan = Flat | Paced | Mixed


def _venue(pipe: Connection, plan: Plan) -> None:
    """Process: play the plan to the first WebSocket client, then tell what was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        threads = []
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire = Wire(sock, deflate=plan.deflate)
            # One client after the other: a REST request is over in a moment.
            with sock, contextlib.suppress(ConnectionResetError):
                if not wire.meet():
                    continue
                told = plan.play(wire)
                thread = threading.Thread(target=wire.wait_closed)
                thread.start()
                threads.append(thread)
                pipe.send(told)
                thread.join()
                return


# -------------------------------------------------------------------------------------------------------------- the clients


@dataclass(frozen=True, slots=True)
class Client:
    """What a client process says of itself."""

    rate: float
    cpu_us: float
    rss_mb: float
    seal_s: float = 0.0
    dropped: int = 0
    path: str = ""
    alarms: dict[str, int] | None = None


def _peak_rss_mb() -> float:
    # Not getrusage: its maximum is inherited from the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _bare(pipe: Connection, port: int, count: int) -> None:
    """Process: the ``websockets`` client that takes both stamps and throws the message away."""

    async def work() -> Client:
        async with connect(f"ws://127.0.0.1:{port}/websocket/v1", compression=None, max_size=None) as ws:
            await ws.send("[]")
            await ws.recv(decode=False)
            first_ns, cpu = time.monotonic_ns(), time.process_time()
            mono_ns = first_ns
            for _ in range(count - 1):
                await ws.recv(decode=False)
                _recv_ns, mono_ns = time.time_ns(), time.monotonic_ns()
            cpu = time.process_time() - cpu
            return Client((count - 1) / (mono_ns - first_ns) * 1e9, cpu / (count - 1) * 1e6, _peak_rss_mb())

    pipe.send(asyncio.run(work()))


class _Meter:
    """Looks on while the real recorder works; stops it when everything has come."""

    def __init__(self, count: int, still_s: float) -> None:
        self._count = count
        self._still_s = still_s
        self._seen: list[tuple[int, float, float]] = []
        self._stop = False
        self.sealing_at = 0.0

    def is_set(self) -> bool:
        return self._stop

    def look(self, status: Status) -> None:
        if status.phase == "sealing":
            self.sealing_at = self.sealing_at or time.monotonic()
            return
        messages, now = status.venues[0].messages, time.monotonic()
        if messages and (not self._seen or messages > self._seen[-1][0]):
            self._seen.append((messages, time.process_time(), now))
        idle = bool(self._seen) and now - self._seen[-1][2] > self._still_s
        self._stop = messages >= self._count or idle

    @property
    def cpu_us(self) -> float:
        (first, cpu, _), (last, cpu_then, _) = self._seen[0], self._seen[-1]
        return (cpu_then - cpu) / (last - first) * 1e6 if last > first else 0.0


def _recorder(pipe: Connection, port: int, root: str, count: int, options: dict[str, Any]) -> None:
    """Process: the real recorder, until ``count`` messages have come."""
    config = RecordConfig(
        out=Path(root),
        venues=("upbit",),
        symbols=("BTC",),
        endpoints=Endpoints(upbit_ws=f"ws://127.0.0.1:{port}/websocket/v1", upbit_rest=f"http://127.0.0.1:{port}"),
        status_s=0.05,
        **options,
    )
    meter = _Meter(count, still_s=30.0)
    try:
        result = record(config, on_status=meter.look, stop=meter)
    except Arbl2Error as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    seal_s = time.monotonic() - meter.sealing_at
    pipe.send(Client(0.0, meter.cpu_us, _peak_rss_mb(), seal_s, result.dropped, str(result.path), result.alarms))


def _run(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    here, there = _spawn.Pipe()
    process = _spawn.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def _answer(pipe: Connection, timeout_s: float, who: str) -> Any:
    try:
        if pipe.poll(timeout_s):
            answer = pipe.recv()
            if not isinstance(answer, str):
                return answer
            raise SystemExit(f"{who}: {answer}")
    except EOFError:
        pass
    raise SystemExit(f"{who} did not answer within {timeout_s:.0f} s")


@dataclass(frozen=True, slots=True)
class Tape:
    """What a recording holds: messages, the account of their payloads, their rate by the tape's own stamps."""

    sha256: str
    count: int
    rate: float
    bytes: int


def read_tape(path: Path) -> Tape:
    """Read every message of a session. Raises TapeError where a hash or a number does not hold."""
    reader = TapeReader(path)
    reader.verify_hashes()
    account = Account()
    first_ns = last_ns = 0
    for block in reader.blocks():
        data, offsets = block.data.tobytes(), block.offsets.tolist()
        for i in np.flatnonzero(block.kind == FrameKind.MESSAGE).tolist():
            account.add(int(block.op[i]), data[offsets[i] : offsets[i + 1]])
            last_ns = int(block.mono_ns[i])
            first_ns = first_ns or last_ns
    rate = (account.count - 1) / (last_ns - first_ns) * 1e9 if last_ns > first_ns else 0.0
    return Tape(account.sha256, account.count, rate, sum(segment.bytes for segment in reader.manifest.segments))


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording: what the recorder says, what is on the tape, what the venue sent."""

    client: Client
    tape: Tape
    sent: dict[str, Any]

    @property
    def exact(self) -> bool:
        return (self.tape.count, self.tape.sha256) == (self.sent["count"], self.sent["sha256"])


def record_plan(plan: Plan, timeout_s: float = 300.0, **options: Any) -> Recording:
    """Let the real recorder take down what a venue plays."""
    with tempfile.TemporaryDirectory(prefix="arbl2-bench-") as root:
        venue, venue_pipe = _run(_venue, plan)
        port = _answer(venue_pipe, 30, "the venue")
        child, pipe = _run(_recorder, port, root, plan.count, options)
        try:
            sent = _answer(venue_pipe, timeout_s, "the venue")
            client = _answer(pipe, timeout_s, "the recorder")
            return Recording(client, read_tape(Path(client.path)), sent)
        finally:
            for process in (child, venue):
                process.kill()
                process.join()


def bare_plan(plan: Plan, timeout_s: float = 300.0) -> Client:
    """Let the bare client read what a venue plays."""
    venue, venue_pipe = _run(_venue, plan)
    child, pipe = _run(_bare, _answer(venue_pipe, 30, "the venue"), plan.count)
    try:
        answer: Client = _answer(pipe, timeout_s, "the bare client")
        return answer
    finally:
        for process in (child, venue):
            process.kill()
            process.join()


# -------------------------------------------------------------------------------------------------------------- the figures


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median with the smallest and the largest value."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} - {max(values):,.{digits}f})"


def verdict(name: str, holds: bool, said: str) -> bool:
    print(f"{'ok    ' if holds else 'MISSED'}  {name}: {said}", flush=True)
    return holds


def here() -> str:
    """The machine and what the figures depend on."""
    cpus = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    names = ", ".join(f"{name} {version(name)}" for name in ("websockets", "pyarrow", "duckdb", "polars"))
    cpu = f"{cpus[0] if cpus else platform.machine()}, {os.cpu_count()} cores"
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{cpu}, {system}, {names}; load {os.getloadavg()[0]:.1f}"


def throughput(count: int, rounds: int) -> bool:
    """The flat-out venue: recorder beside bare client, in turn."""
    holds = True
    for size in SIZES:
        plan = Flat(size, count)
        bare: list[Client] = []
        large: list[Recording] = []
        small: list[Recording] = []
        for _ in range(rounds):
            bare.append(bare_plan(plan))
            large.append(record_plan(plan))
            small.append(record_plan(plan, segment_bytes=16 * 2**20))
        print(f"\n{count:,} messages of {size:,} bytes, flat out, {rounds} rounds in turn: median (min - max)\n")
        print("| | messages/s | of bare | CPU us/message | peak RSS MB | sealing after the end, s |\n|---|---|---|---|---|---|")
        rates = [client.rate for client in bare]
        cpu, rss = spread([client.cpu_us for client in bare], 2), spread([client.rss_mb for client in bare])
        print(f"| bare websockets client | {spread(rates)} | 1 | {cpu} | {rss} | - |")
        for name, runs in (("recorder, segments of 128 MiB", large), ("recorder, segments of 16 MiB", small)):
            ratio = [run.tape.rate / rate for run, rate in zip(runs, rates, strict=True)]
            cells = (
                spread([run.tape.rate for run in runs]),
                spread(ratio, 2),
                spread([run.client.cpu_us for run in runs], 2),
                spread([run.client.rss_mb for run in runs]),
                spread([run.client.seal_s for run in runs], 1),
            )
            print(f"| {name} | {' | '.join(cells)} |")
        print()
        for name, runs in (("segments of 128 MiB", large), ("segments of 16 MiB", small)):
            exact, lost = sum(run.exact for run in runs), sum(run.sent["count"] - run.tape.count for run in runs)
            share = median(run.tape.rate / rate for run, rate in zip(runs, rates, strict=True))
            peak = max(run.client.rss_mb for run in runs)
            where = f"{size:,} B, {name}"
            said = f"{exact} of {len(runs)} recordings have the SHA-256 of what was sent; {lost:,} messages lost"
            holds &= verdict(f"recorded = sent, {where}", exact == len(runs), said)
            rate = median(run.tape.rate for run in runs)
            said = f"{share:.2f} of the bare client, {rate:,.0f} messages/s (asked: {LEAST_SHARE}, and {LEAST_RATE:,})"
            holds &= verdict(f"R4 rate, {where}", share >= LEAST_SHARE and rate >= LEAST_RATE, said)
            holds &= verdict(f"R4 memory, {where}", peak < MOST_RSS_MB, f"{peak:.0f} MB at most (asked: below {MOST_RSS_MB})")
    return holds & log_rate(1_000_000, rounds)


def log_rate(count: int, rounds: int) -> bool:
    """From memory through the session and the writer's thread to the synced log."""
    payloads = [book(i, SIZES[0]) for i in range(RING)]
    rates, dropped = [], 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="arbl2-bench-") as folder:
            log = LogWriter(
                Path(folder),
                flush_ms=250,
                fsync=True,
                segment_seconds=900,
                segment_bytes=2**40,
                on_rotated=lambda _: None,
                on_error=print,
            )
            session = Session(log, queue_bytes=96 * 2**20)
            began = time.perf_counter()
            for i in range(count):
                if log.queued_bytes > 48 * 2**20:
                    time.sleep(0.001)
                session.accept(UPBIT, 1, FrameKind.MESSAGE, Op.BINARY, payloads[i % RING], *stamp())
            log.close()
            rates.append(count / (time.perf_counter() - began))
            dropped += session.dropped
    said = f"{spread(rates)} messages/s of {SIZES[0]} B into the synced log, {dropped} dropped (asked: {LEAST_LOG_RATE:,})"
    return verdict("R4 from memory", median(rates) >= LEAST_LOG_RATE and not dropped, said)


def frames(count: int) -> bool:
    """Mixed frames, on a compressed connection and on a plain one: recorded = sent."""
    holds = True
    for deflate in (True, False):
        run = record_plan(Mixed(count, deflate), timeout_s=60 + count / 4_000, compress=deflate)
        said = (
            f"{run.tape.count:,} of {run.sent['count']:,} messages, {run.sent['bytes'] / 2**20:,.0f} MiB (text, binary, empty, "
            f"1 MiB, non-ASCII, random bytes, fragments, pings between), SHA-256 {run.tape.sha256[:16]} recorded, "
            f"{run.sent['sha256'][:16]} sent; {run.tape.rate:,.0f} messages/s"
        )
        holds &= verdict(f"R3 recorded = sent, {'compressed' if deflate else 'plain'}", run.exact, said)
    return holds


# ------------------------------------------------------------------------------------------------------- a disk that stalls


class Lease:
    """Holds up whoever opens a file for writing: the kernel lets the opener wait until the lease is given back.

    The log writer is stopped inside a system call, as by a disk that does not answer. Nothing of the recorder is changed.
    """

    def __init__(self, path: Path) -> None:
        self.broken_ns = 0
        signal.signal(signal.SIGIO, self._break)
        path.touch()
        self._handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.fcntl(self._handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            raise SystemExit(f"{path.parent} knows no file leases ({error.strerror}); set TMPDIR to a local disk.") from None

    def _break(self, *_: object) -> None:
        self.broken_ns = self.broken_ns or time.monotonic_ns()

    def release(self) -> int:
        fcntl.fcntl(self._handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(self._handle)
        return time.monotonic_ns()


def stalls(seconds: float, rate: int, size: int) -> bool:
    """A stall that the queue can hold, then one that it cannot."""
    holds = stall(seconds, rate, size)
    return stall(seconds, rate, size, queue_bytes=int(rate * seconds * size / 4)) and holds


def stall(seconds: float, rate: int, size: int, queue_bytes: int = 0) -> bool:
    """The disk does not answer for ``seconds``: nothing is lost, and no stamp moves.

    With ``queue_bytes`` the queue is that small: what finds no room in it is lost, and declared to the last message.
    """
    limit_s = int(LEASE_LIMIT.read_text())
    if not 0 < seconds < limit_s - 1:
        raise SystemExit(f"--stall {seconds}: the kernel ends a lease after {limit_s} s ({LEASE_LIMIT}); choose less.")
    calm_s = 10.0
    plan = Paced(size, rate, calm_s + seconds + 6.0)
    # The log is as long as the calm lasts; opening the next one is what stalls.
    segment_bytes = int(calm_s * rate * (size + HEAD.size))
    with tempfile.TemporaryDirectory(prefix="arbl2-bench-") as folder:
        root = Path(folder)
        venue, venue_pipe = _run(_venue, plan)
        port = _answer(venue_pipe, 30, "the venue")
        options = {"segment_bytes": segment_bytes, "segment_seconds": 10**9}
        if queue_bytes:
            options["queue_bytes"] = queue_bytes
        child, pipe = _run(_recorder, port, folder, plan.count, options)
        try:
            lease = Lease(_wait_for(lambda: next(root.glob("*/log/000001.log"), None), 30).with_name("000002.log"))
            _wait_for(lambda: lease.broken_ns or None, calm_s + 30)
            while time.monotonic_ns() < lease.broken_ns + seconds * 1e9:
                time.sleep(0.01)
            freed_ns = lease.release()
            sent = _answer(venue_pipe, 120, "the venue")
            client: Client = _answer(pipe, 120, "the recorder")
            return _judge_stall(Path(client.path), client, sent, (lease.broken_ns, freed_ns), queue_bytes)
        finally:
            for process in (child, venue):
                process.kill()
                process.join()


def _wait_for(found: Callable[[], Any], timeout_s: float) -> Any:
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        if (value := found()) is not None:
            return value
        time.sleep(0.02)
    raise SystemExit(f"what the benchmark waits for did not happen within {timeout_s:.0f} s")


def _judge_stall(path: Path, client: Client, sent: dict[str, Any], stalled_ns: tuple[int, int], queue_bytes: int) -> bool:
    reader = TapeReader(path)
    reader.verify_hashes()
    found: list[tuple[bytes, int, int]] = []
    declared: list[dict[str, int]] = []
    for frame in reader.frames():
        if frame.kind is FrameKind.MESSAGE:
            sent_ns = int(frame.payload.split(b'"sent":', 1)[1].split(b",", 1)[0])
            found.append((hashlib.sha256(frame.payload).digest(), sent_ns, frame.mono_ns))
        elif frame.kind is FrameKind.ALARM:
            facts = json.loads(frame.payload)
            declared += [facts] if facts["alarm"] == "dropped" else []
    # Everything found must stand among what was sent, in the same order.
    rest = iter(sent["digests"])
    in_order = all(any(digest == other for other in rest) for digest, _, _ in found)
    lost, named = sent["count"] - len(found), sum(facts["frames"] for facts in declared)
    from_ns, to_ns = stalled_ns
    delays: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for _, sent_ns, mono_ns in found:
        phase = "before" if sent_ns < from_ns else "during" if sent_ns < to_ns else "after"
        delays[phase].append((mono_ns - sent_ns) / 1e6)
    room = f"a queue of {queue_bytes / 2**20:.0f} MiB" if queue_bytes else "the default queue"
    print(f"\nthe log writer hung in open() for {(to_ns - from_ns) / 1e9:.2f} s, {room}; peak RSS {client.rss_mb:.0f} MB\n")
    print("| stall | messages | send to stamp, ms: p50 | p99 | p99.9 | most |\n|---|---|---|---|---|---|")
    for phase, values in delays.items():
        p50, p99, p999, most = np.percentile(values, [50, 99, 99.9, 100]) if values else [float("nan")] * 4
        print(f"| {phase} | {len(values):,} | {p50:.2f} | {p99:.2f} | {p999:.2f} | {most:.2f} |")
    print()
    spans = ", ".join(f"{facts['frames']:,} in {(facts['to_recv_ns'] - facts['from_recv_ns']) / 1e9:.2f} s" for facts in declared)
    said = f"sent {sent['count']:,} = recorded {len(found):,} + declared {named:,} ({spans or 'none'}); in order: {in_order}"
    whole = verdict("R5 sent = recorded + declared", in_order and lost == named, said)
    expected = lost > 0 if queue_bytes else lost == 0
    kept = verdict("R5 drops at the limit only", expected, f"{lost:,} lost with {room}")
    shift = float(np.percentile(delays["during"], 99) - np.percentile(delays["before"], 99))
    stamps = verdict("R5 stamps", shift < MOST_SHIFT_MS, f"p99 moved by {shift:+.2f} ms (asked: below {MOST_SHIFT_MS:g})")
    return whole and kept and stamps


# ---------------------------------------------------------------------------------------------------------------- the size


@dataclass(frozen=True, slots=True)
class Line:
    """One message of a capture and when it was received, wall ns."""

    recv_ns: int
    payload: bytes


def _upbit_lines(path: Path) -> list[Line]:
    rows = [json.loads(row) for row in path.read_text("utf-8").splitlines()]
    return [Line(row["recv_ns"], row["raw"].encode()) for row in rows if row["kind"] not in ("open", "send")]


def _text_lines(path: Path, keep: bytes = b"") -> list[Line]:
    split = [row.split(b" ", 1) for row in gzip.decompress(path.read_bytes()).splitlines()]
    return [Line(int(recv), payload) for recv, payload in split if keep in payload]


def tiled(lines: list[Line], seconds: float) -> list[Line]:
    """The capture again and again. Each tile has other digits, or the tape could refer to the tile before."""
    span_ns = lines[-1].recv_ns - lines[0].recv_ns + 1_000_000
    rng = random.Random(3)
    out: list[Line] = []
    for tile in range(max(1, round(seconds * 1e9 / span_ns))):
        digits = list(b"0123456789")
        if tile:
            rng.shuffle(digits)
        table = bytes.maketrans(b"0123456789", bytes(digits))
        out += [Line(line.recv_ns + tile * span_ns, line.payload.translate(table)) for line in lines]
    return out


def sealed_bytes(lines: list[Line]) -> int:
    """Size of the segment that the recorder's own log and sealer make of the messages."""
    recv_ns, mono_ns = stamp()
    anchor = Anchor(recv_ns, mono_ns)
    # How long a message waits for its seq was not in the capture either: about 20 microseconds, and more within a burst.
    rng, began_ns, earlier_ns = random.Random(6), 0, 0
    with tempfile.TemporaryDirectory(prefix="arbl2-bench-") as folder:
        path = Path(folder) / "session"
        (path / LOG).mkdir(parents=True)
        with (path / LOG / "000001.log").open("wb") as log:
            for batch in _flushes(lines):
                heads = []
                for seq, line in batch:
                    began_ns = began_ns if line.recv_ns - earlier_ns < 1_000_000 else line.recv_ns
                    earlier_ns = line.recv_ns
                    queue_us = int((line.recv_ns - began_ns) / 2_000 + rng.lognormvariate(3.0, 0.5))
                    # Both clocks were not in the capture; how far one reading lies after the other is taken from this machine.
                    wall, mono = stamp()
                    at_ns = line.recv_ns - (wall - mono)
                    what = (UPBIT, FrameKind.MESSAGE, Op.TEXT, Flag.NONE)
                    heads.append(HEAD.pack(seq, line.recv_ns, at_ns, 1, queue_us, *what, len(line.payload)))
                log.write(encode_batch(heads, [line.payload for _, line in batch]))
        manifest = Manifest(
            tape_version=TAPE_VERSION,
            session="session",
            state="recording",
            anchor_wall_ns=anchor.wall_ns,
            anchor_mono_ns=anchor.mono_ns,
        )
        done = seal_log(path, 1, manifest, salvage=False)
        read = [frame.payload for frame in TapeReader(path).frames()]
        if read != [line.payload for line in lines]:
            raise SystemExit("the sealed segment does not hold what was logged")
        return done.manifest.segments[0].bytes


def _flushes(lines: list[Line]) -> Iterator[list[tuple[int, Line]]]:
    batch: list[tuple[int, Line]] = []
    for seq, line in enumerate(lines, 1):
        if batch and line.recv_ns - batch[0][1].recv_ns > 200_000_000:
            yield batch
            batch = []
        batch.append((seq, line))
    yield batch


def size() -> bool:
    """Sealed bytes per message of real captures beside gzip -6 of the same lines with one stamp."""
    if not CAPTURES.is_dir():
        print(f"skipped: the captures are not at {CAPTURES}")
        return True
    spot = CAPTURES / "binance_spot_btcusdt_first30s.txt.gz"
    sources: list[tuple[str, list[Line], int]] = [
        ("Binance spot, all streams", _text_lines(spot), 30),
        ("Binance spot, depth changes", _text_lines(spot, b'"stream":"btcusdt@depth'), 275),
        ("Binance spot, depth20", _text_lines(CAPTURES / "binance_spot_btcusdt_depth20_first60s.txt.gz"), 0),
        ("Upbit, SIMPLE, 15 levels and trades", _upbit_lines(CAPTURES / "upbit_frames_first10s.jsonl"), 0),
    ]
    print(
        "\n| capture | messages | raw B | gzip -6, one stamp | sealed, seq and three stamps | sealed/gzip |\n"
        "|---|---|---|---|---|---|"
    )
    verdicts = []
    for name, once, most in sources:
        for what, lines in (("as captured", once), ("10 minutes", tiled(once, 600.0))):
            text = b"".join(b"%d %b\n" % (line.recv_ns, line.payload) for line in lines)
            n = len(lines)
            raw, packed, sealed = len(text) / n, len(gzip.compress(text, 6)) / n, sealed_bytes(lines) / n
            print(f"| {name}, {what} | {n:,} | {raw:,.1f} | {packed:.1f} | {sealed:.1f} | {sealed / packed:.2f} |")
        verdicts.append((name, packed, sealed, most))
    print()
    holds = True
    for name, packed, sealed, most in verdicts:
        holds &= verdict(f"R8 below gzip, {name}", sealed < packed, f"{sealed:.1f} against {packed:.1f} B/message")
        if most:
            holds &= verdict(f"R8 size, {name}", sealed <= most, f"{sealed:.1f} B/message (asked: {most})")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=300_000, help="messages of each flat-out run (default: 300,000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--stall", type=float, metavar="SECONDS", help="let the disk stall for so long instead, twice")
    parser.add_argument("--rate", type=int, default=5_000, help="messages a second meanwhile (default: 5,000)")
    parser.add_argument("--bytes", type=int, default=SIZES[1], help="bytes of each of them (default: 1,400)")
    parser.add_argument("--frames", type=int, metavar="COUNT", help="record so many mixed frames instead")
    parser.add_argument("--size", action="store_true", help="measure the sealed size of real captures instead")
    options = parser.parse_args()
    print(here())
    if options.stall is not None:
        holds = stalls(options.stall, options.rate, options.bytes)
    elif options.frames is not None:
        holds = frames(options.frames)
    elif options.size:
        holds = size()
    else:
        holds = throughput(options.messages, options.rounds)
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
