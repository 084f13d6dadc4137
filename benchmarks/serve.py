"""How fast a recording is served: ``python -m benchmarks.serve``.

A tape of 1.4 kB depth messages is served flat out by ``arbl2 serve`` to bare ``websockets`` clients in processes of their own,
beside a server that does nothing but push frames that are ready in memory: what it reaches, nobody can beat with these clients.
In turn, so that a busy moment hits both alike. Then the same with many clients, and with one that reads almost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from arbl2.frames import ExchangeId, Frame, FrameKind, Op
from arbl2.tape import write_session
from arbl2_replay.sources import frame_head
from arbl2_replay.synth import SYMBOLS, SynthConfig, market_events, synth_manifest
from arbl2_replay.wire import binance_combined, binance_depth
from benchmarks.record import _answer, _run, here, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from typing import Self

    from websockets.asyncio.server import ServerConnection

STREAM = "btcusdt@depth20@100ms"
SUBSCRIBE = json.dumps({"method": "SUBSCRIBE", "params": [STREAM], "id": 1})
DISTINCT = 20_000
PUSH_BYTES = 64 * 2**10
LEAST_PER_S = 150_000
CLIENT_BOUND = 0.8
"""Served this near to what the pushing server reaches, the client is the limit."""
SLOW_SHARE = 0.9
"""With a slow client beside it, a fast one must keep this share of its rate."""
MOST_RSS_MB = 450.0
SLOW_PER_S = 1_000
SLOW_NAP_S = 0.05
"""A slow client sleeps for so long and then reads what is due: it must not take the CPU that the others need."""


# ----------------------------------------------------------------------------------------------------------- what is served


def payloads() -> list[bytes]:
    """Depth messages of a synthetic BTC market, as they come over the combined endpoint."""
    config = SynthConfig(seed=3, symbols=(SYMBOLS["BTC"],))
    books = (event for event in market_events(config, endless=True) if event.venue == ExchangeId.BINANCE)
    return [binance_combined(STREAM, binance_depth(event.book, event.mark)) for event in islice(books, DISTINCT)]


def write_tape(folder: Path, messages: int) -> None:
    """So many messages, the distinct ones again and again, 10 us apart."""
    known = payloads()
    manifest = synth_manifest(SynthConfig(seed=3, symbols=(SYMBOLS["BTC"],)))
    wall_ns, mono_ns = manifest.anchor_wall_ns, manifest.anchor_mono_ns

    def frames() -> Iterator[Frame]:
        yield Frame(1, wall_ns, mono_ns, "binance", 1, FrameKind.OPENED, Op.NONE, b'{"url":"wss://example/stream"}')
        for seq in range(2, messages + 2):
            at_ns = seq * 10_000
            payload = known[seq % DISTINCT]
            yield Frame(seq, wall_ns + at_ns, mono_ns + at_ns, "binance", 1, FrameKind.MESSAGE, Op.TEXT, payload)

    write_session(folder, manifest, frames())


# ------------------------------------------------------------------------------------------------------------ the processes


def _push(pipe: Connection, messages: int, clients: int) -> None:
    """Process: the least that a server can do. Frames are ready in memory; each client gets them when all are there."""
    ready = [frame_head(len(payload), Op.TEXT) + payload for payload in payloads()]
    a_push = max(1, PUSH_BYTES // len(ready[0]))
    pushes = [b"".join(ready[k : k + a_push]) for k in range(0, DISTINCT - a_push + 1, a_push)]

    async def work() -> None:
        there, done = asyncio.Barrier(clients), asyncio.Event()
        left = clients

        async def handle(ws: ServerConnection) -> None:
            nonlocal left
            await ws.recv()
            await there.wait()
            sent = k = 0
            while sent < messages:
                ws.transport.write(pushes[k % len(pushes)])
                await ws.drain()
                sent, k = sent + a_push, k + 1
            await ws.close()
            left -= 1
            if not left:
                done.set()

        async with serve(handle, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            pipe.send(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/stream".encode())
            await done.wait()

    asyncio.run(work())


def _read(pipe: Connection, url: bytes, count: int, per_s: float) -> None:
    """Process: bare clients that count, as many messages a second as come, or so few.

    Sends (messages, first, last) of each, and the CPU seconds of all.
    """

    async def one() -> tuple[int, float, float]:
        seen, first, last = 0, 0.0, 0.0
        async with connect(url.decode(), max_size=None) as ws:
            await ws.send(SUBSCRIBE)
            with contextlib.suppress(ConnectionClosed):
                async for _ in ws:
                    seen += 1
                    if seen == 2:  # the first may be the acknowledgement, long before
                        first = time.monotonic()
                    if per_s and seen % round(per_s * SLOW_NAP_S) == 0:
                        await asyncio.sleep(SLOW_NAP_S)
            last = time.monotonic()
        return seen, first, last

    async def work() -> list[tuple[int, float, float]]:
        return await asyncio.gather(*(one() for _ in range(count)))

    began_s = time.process_time()
    rows = asyncio.run(work())
    pipe.send((rows, time.process_time() - began_s))


@dataclass(frozen=True, slots=True)
class Round:
    """Messages a second of all fast clients together, CPU of both ends, what became of the slow one, the server's memory."""

    per_s: float
    client_us: float
    """CPU of the clients for a message."""
    server_us: float = 0.0
    slow_seen: int = 0
    cut: int = 0
    rss_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class Read:
    """What the clients of a round saw."""

    per_s: float
    messages: int
    least: int
    """Messages of the one that saw least."""
    client_us: float
    slow_seen: int


def _clients(url: str, count: int, *, slow: int) -> Read:
    """``count`` fast clients in two processes, and ``slow`` slow ones in one."""
    shares = [share for share in ((count + 1) // 2, count // 2) if share]
    fast = [_run(_read, url.encode(), share, 0.0) for share in shares]
    dawdling = [_run(_read, url.encode(), slow, SLOW_PER_S)] if slow else []
    told = [_answer(pipe, 600, "a client") for _, pipe in fast]
    seen = [_answer(pipe, 600, "the slow client") for _, pipe in dawdling]
    for process, _ in fast + dawdling:
        process.join(30)
    rows = [row for those, _ in told for row in those]
    messages = sum(n for n, _, _ in rows)
    span_s = max(last for _, _, last in rows) - min(first for _, first, _ in rows)
    cpu_us = sum(cpu_s for _, cpu_s in told) / messages * 1e6
    return Read(messages / span_s, messages, min(n for n, _, _ in rows), cpu_us, sum(n for those, _ in seen for n, _, _ in those))


def serve_round(tape: Path, messages: int, clients: int, *, slow: int = 0) -> Round:
    """One round of ``arbl2 serve``. Raises SystemExit if a fast client missed a message."""
    options = ["--speed", "max", "--start-when-subscribed", "--subscribers", str(clients + slow), "--json"]
    command = [sys.executable, "-m", "arbl2", "serve", str(tape), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            said = server.stdout.readline()
            if not said:
                raise SystemExit(f"arbl2 serve did not start: {server.stderr.read().strip()}")
            url = json.loads(said)["binance_ws"]
            with _Watch(server.pid) as watch:
                read = _clients(url, clients, slow=slow)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    if read.least < messages:
        raise SystemExit(f"a client was sent {read.least:,} of {messages:,} messages: {errors.strip()}")
    server_us = watch.cpu_s / read.messages * 1e6
    return Round(read.per_s, read.client_us, server_us, read.slow_seen, errors.count("dropped"), watch.peak_mb)


def push_round(messages: int, clients: int) -> Round:
    """One round of the pushing server."""
    process, pipe = _run(_push, messages, clients)
    url = _answer(pipe, 60, "the pushing server").decode()
    with _Watch(process.pid) as watch:
        read = _clients(url, clients, slow=0)
    process.join(30)
    return Round(read.per_s, read.client_us, watch.cpu_s / read.messages * 1e6)


class _Watch:
    """Peak memory of a process and the CPU that it used meanwhile, as long as it lives."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak_mb = 0.0
        self.cpu_s = 0.0

    def __enter__(self) -> Self:
        self._process, self._pipe = _run(_watch, self._pid)
        _answer(self._pipe, 30, "the watcher")
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(0)
        self.peak_mb, self.cpu_s = _answer(self._pipe, 10, "the watcher")
        self._process.join(10)


def _watch(pipe: Connection, pid: int) -> None:
    """Process: looks at another one until told that it is enough."""
    folder = Path(f"/proc/{pid}")

    def look() -> tuple[float, float]:
        rows = (folder / "status").read_text().splitlines()
        kilobytes = next((int(row.split()[1]) for row in rows if row.startswith("VmHWM")), 0)
        used = (folder / "stat").read_text().rpartition(") ")[2].split()
        return kilobytes / 1024, (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")

    (peak_mb, began_s) = look()
    cpu_s = began_s
    pipe.send(0)
    while not pipe.poll(0.05):
        with contextlib.suppress(OSError):
            seen_mb, cpu_s = look()
            peak_mb = max(peak_mb, seen_mb)
    pipe.send((peak_mb, cpu_s - began_s))


# ---------------------------------------------------------------------------------------------------------------- the report


def _figure(rounds: Sequence[Round]) -> str:
    rates = [each.per_s for each in rounds]
    return f"{median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f})"


def bench(messages: int, rounds: int, counts: Sequence[int]) -> bool:
    """Run it, print it, judge it."""
    holds = True
    with tempfile.TemporaryDirectory(prefix="arbl2-serve-") as temporary:
        size = sum(map(len, payloads())) / DISTINCT
        tapes = {count: Path(temporary) / f"tape-{count}" for count in {*counts, 1}}
        lengths = {count: max(DISTINCT, messages // count) for count in tapes}
        for count, tape in tapes.items():
            write_tape(tape, lengths[count])
        print(
            f"frames of {size:,.0f} bytes, flat out; messages/s of all clients together, median (min - max) of {rounds} rounds\n"
        )
        print("| clients | arbl2 serve | pushing server | share | CPU us/message: served | pushed | read | peak RSS MB |")
        print("|---|---|---|---|---|---|---|---|")
        for count in counts:
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(serve_round(tapes[count], lengths[count], count))
                theirs.append(push_round(lengths[count], count))
            share = median(each.per_s for each in ours) / median(each.per_s for each in theirs)
            rss = max(each.rss_mb for each in ours)
            served, pushed = (median(each.server_us for each in those) for those in (ours, theirs))
            cpu = f"{served:.1f} | {pushed:.1f} | {median(each.client_us for each in ours):.1f}"
            print(f"| {count} | {_figure(ours)} | {_figure(theirs)} | {share:.0%} | {cpu} | {rss:.0f} |", flush=True)
            holds &= verdict_row(count, ours, share, rss)
        alone, beside = [], []
        for _ in range(rounds):
            alone.append(serve_round(tapes[1], lengths[1], 1))
            beside.append(serve_round(tapes[1], lengths[1], 1, slow=1))
        kept = median(each.per_s for each in beside) / median(each.per_s for each in alone)
        print(f"\none client beside one that reads {SLOW_PER_S:,} messages/s: {_figure(beside)}; alone: {_figure(alone)}")
        was_cut = all(each.cut == 1 and each.slow_seen < lengths[1] for each in beside)
        holds &= verdict("a slow client slows nobody", kept >= SLOW_SHARE, f"{kept:.0%} of the rate without it")
        holds &= verdict("it is cut off", was_cut, f"after {median(each.slow_seen for each in beside):,.0f} messages")
        rss = max(each.rss_mb for each in beside)
        holds &= verdict("memory is bounded", rss < MOST_RSS_MB, f"{rss:.0f} MB (asked: {MOST_RSS_MB:.0f})")
    print(f"\nMeasured on: {here()}")
    return holds


def verdict_row(count: int, ours: Sequence[Round], share: float, rss: float) -> bool:
    """Whether the asked rate is reached, or what the clients can read."""
    rate = median(each.per_s for each in ours)
    said = f"{rate:,.0f} messages/s, {share:.0%} of the pushing server, {rss:.0f} MB"
    return verdict(f"{count} client(s)", (rate >= LEAST_PER_S or share >= CLIENT_BOUND) and rss < MOST_RSS_MB, said)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="How fast a recording is served.")
    parser.add_argument("--messages", type=int, default=400_000, help="messages in all (default: 400,000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in turn (default: 5)")
    parser.add_argument("--clients", default="1,10,50", help="how many at once (default: 1,10,50)")
    options = parser.parse_args()
    counts = [int(part) for part in options.clients.split(",")]
    sys.exit(0 if bench(options.messages, options.rounds, counts) else 1)


if __name__ == "__main__":
    main()
