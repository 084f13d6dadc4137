"""What a kill costs: ``python -m benchmarks.kills``.

Both exchanges run in a process of their own at many times real speed and keep account of every payload with the moment when it
was sent. A real recorder is started, killed with SIGKILL at a random moment, and what it left is compared with that account;
then the next one starts in the same folder. What must be recoverable is counted on the disk by a reader that shares no code with
the recorder's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import struct
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pyarrow.parquet as pq

from arbl2.errors import TapeError
from arbl2.frames import FrameKind
from arbl2.tape import LOG, SEGMENTS, Manifest, TapeReader, sessions
from arbl2_recorder import Endpoints, RecordConfig, record, recover
from benchmarks.record import _answer, _run, here, spread, verdict

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

    from arbl2_recorder import RecoveryReport
    from arbl2_replay.server import ExchangeServer, SentLog

FLUSH_MS = 250
VENUES = ("upbit", "binance")
LOG_FRONT = struct.Struct("<4sIII")
LOG_HEAD_BYTES = 8 + 8 + 8 + 4 + 4 + 1 + 1 + 1 + 1 + 4
SEGMENT_BYTES = (2**27, 2_000_000)
"""Lives take turns: one long log, and logs so short that segments are sealed all the time."""


# ------------------------------------------------------------------------------------------------------------ the exchanges


class _Stamped(list[Any]):
    """A list that also keeps when each item was added, monotonic ns."""

    def __init__(self) -> None:
        super().__init__()
        self.at_ns: list[int] = []

    def append(self, item: Any) -> None:
        self.at_ns.append(time.monotonic_ns())
        super().append(item)


class _SentLogs(list["SentLog"]):
    """The server's list of connections; the payloads of each get their times."""

    def append(self, sent: SentLog) -> None:
        sent.payloads = _Stamped()
        super().append(sent)


def _exchange(pipe: Connection, speed: float) -> None:
    """Process: both exchanges. Answers "dialled" (number of connections so far) and "sent" (and forgets)."""
    from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource  # noqa: PLC0415 - only here needed
    from arbl2_replay.synth import SynthConfig  # noqa: PLC0415

    async def work() -> None:
        async with ExchangeServer(SyntheticSource(SynthConfig(), speed=speed), ServerOptions(record_sent=True)) as server:
            server.sent = _SentLogs()
            pipe.send((server.upbit_ws_url, server.upbit_rest_url, server.binance_ws_url, server.binance_rest_url))
            while True:
                while not pipe.poll():  # noqa: ASYNC110 - another process asks
                    await asyncio.sleep(0.005)
                if pipe.recv() == "ready":
                    pipe.send(sum(sent.count > 0 for sent in server.sent))
                else:
                    await _all_gone(server)
                    pipe.send([_told(sent) for sent in server.sent])
                    server.sent.clear()

    asyncio.run(work())


async def _all_gone(server: ExchangeServer) -> None:
    while any(server.clients(venue) for venue in VENUES):  # noqa: ASYNC110 - the server has no such event
        await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Sent:
    """What one connection was sent: SHA-256 of each payload, and when (monotonic ns)."""

    venue: str
    digests: list[bytes]
    at_ns: list[int]


def _told(sent: SentLog) -> Sent:
    payloads = cast("_Stamped", sent.payloads)
    return Sent(sent.venue, [digest for _, digest in payloads], payloads.at_ns)


# ------------------------------------------------------------------------------------------------------------- the recorder


def _recorder(pipe: Connection, root: str, urls: tuple[str, str, str, str], segment_bytes: int) -> None:
    """Process: the real recorder, until it is killed."""
    upbit_ws, upbit_rest, binance_ws, binance_rest = urls
    ends = Endpoints(upbit_ws=upbit_ws, upbit_rest=upbit_rest, binance_ws=binance_ws, binance_rest=binance_rest)
    record(RecordConfig(out=Path(root), endpoints=ends, flush_ms=FLUSH_MS, segment_bytes=segment_bytes))
    pipe.send("the recorder ended by itself")


# --------------------------------------------------------------------------------------------------------- what is checked


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What lies in a session folder: frames in named segments, in whole batches of other logs, bytes that are no batch."""

    sealed: int
    in_logs: int
    torn: int


def whole_batches(log: bytes) -> tuple[int, int]:
    """Frames in whole batches from the start of a log, and the bytes after them."""
    at = frames = 0
    while at + LOG_FRONT.size <= len(log):
        magic, crc, rows, size = LOG_FRONT.unpack_from(log, at)
        end = at + LOG_FRONT.size + rows * LOG_HEAD_BYTES + size
        if magic != b"A2L1" or end > len(log) or zlib.crc32(log[at + 8 : end]) != crc:
            break
        frames, at = frames + rows, end
    return frames, len(log) - at


def on_disk(session: Path) -> OnDisk:
    """Count without the recorder's help. Raises TapeError or pyarrow's error where a sealed file cannot be read."""
    manifest = msgspec.json.decode((session / "manifest.json").read_bytes(), type=Manifest)
    if manifest.state != "recording":
        raise TapeError(f"{session} says {manifest.state} although its recorder was killed")
    TapeReader(session).verify_hashes()
    for segment in (session / SEGMENTS).glob("*.parquet"):
        pq.read_table(segment)
    named = {segment.file for segment in manifest.segments}
    found = {path.stem: whole_batches(path.read_bytes()) for path in (session / LOG).glob("*.log")}
    fresh = sum(frames for stem, (frames, _) in found.items() if f"{stem}.parquet" not in named)
    return OnDisk(manifest.rows, fresh, sum(torn for _, torn in found.values()))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(slots=True)
class Life:
    """One recorder from its start to its kill, and what was wrong afterwards."""

    number: int
    lived_s: float
    segment_bytes: int
    killed_ns: int = 0
    segments: int = 0
    sealed: int = 0
    restored: int = 0
    torn: int = 0
    sent: int = 0
    lost: int = 0
    lost_ms: float = 0.0
    changed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        how = f"{self.sealed:,} | {self.restored:,} | {self.torn:,} | {self.sent:,} | {self.lost:,} | {self.lost_ms:.0f}"
        return f"| {self.number} | {self.lived_s:.2f} | {self.segments} | {how} | {'; '.join(self.wrong) or 'ok'} |"


def examine(life: Life, root: Path, known: dict[str, dict[str, str]], sent: list[Sent]) -> None:
    """Recover what a life left and compare it with the disk before, with what was sent, and with the sessions before."""
    fresh = [path for path in sessions(root) if path.name not in known]
    if len(fresh) > 1:
        life.wrong.append(f"{len(fresh)} new sessions")
    before = None
    if fresh:
        try:
            before = on_disk(fresh[0])
        except (TapeError, OSError, msgspec.MsgspecError) as error:
            life.wrong.append(f"unreadable before recovery: {error}")
    reports = recover(root)
    if fresh:
        _check_report(life, before, reports)
        _check_tape(life, fresh[0], sent)
    elif reports:
        life.wrong.append("a session was recovered that no recorder began")
    for name, files in known.items():
        now = hashes(root / name)
        life.changed += sum(files.get(path) != now.get(path) for path in files | now)
    if life.changed:
        life.wrong.append(f"{life.changed} files of earlier sessions changed")
    for path in fresh:
        known[path.name] = hashes(path)
    if recover(root):
        life.wrong.append("a second recovery found something to do")


def _check_report(life: Life, before: OnDisk | None, reports: list[RecoveryReport]) -> None:
    if len(reports) != 1 or reports[0].problem:
        life.wrong.append(f"recovery reports {[report.problem for report in reports]}")
        return
    report = reports[0]
    life.sealed, life.restored, life.torn = report.frames_sealed, report.frames_recovered, report.bytes_dropped
    if before is not None and (before.sealed, before.in_logs, before.torn) != (life.sealed, life.restored, life.torn):
        life.wrong.append(f"the report differs from the disk: {before}")


def _check_tape(life: Life, session: Path, sent: Iterable[Sent]) -> None:
    try:
        reader = TapeReader(session)
        reader.verify_hashes()
        frames = list(reader.frames())
    except TapeError as error:
        life.wrong.append(f"unreadable after recovery: {error}")
        return
    life.segments = len(reader.manifest.segments)
    if reader.manifest.state != "recovered" or len(frames) != life.sealed + life.restored:
        life.wrong.append(f"{reader.manifest.state} with {len(frames)} frames")
    if [frame.seq for frame in frames] != list(range(1, len(frames) + 1)):
        life.wrong.append("seq has holes")
    if list(session.rglob("*.part")) or list(session.rglob("*.log")):
        life.wrong.append("left-over files")
    oldest_lost_ns = life.killed_ns
    for one in sent:
        kept = [frame.payload for frame in frames if frame.kind is FrameKind.MESSAGE and frame.venue == one.venue]
        if [hashlib.sha256(payload).digest() for payload in kept] != one.digests[: len(kept)]:
            life.wrong.append(f"{one.venue}: recorded differs from sent")
        by_kill = sum(at_ns <= life.killed_ns for at_ns in one.at_ns)
        life.sent += by_kill
        life.lost += max(0, by_kill - len(kept))
        if len(kept) < by_kill:
            oldest_lost_ns = min(oldest_lost_ns, one.at_ns[len(kept)])
    life.lost_ms = (life.killed_ns - oldest_lost_ns) / 1e6
    if life.lost_ms > FLUSH_MS:
        life.wrong.append(f"lost more than {FLUSH_MS} ms")


# ------------------------------------------------------------------------------------------------------------------ the run


def _ask(pipe: Connection, question: str) -> Any:
    pipe.send(question)
    return _answer(pipe, 30, "the exchange")


def live(number: int, root: Path, exchange: Connection, urls: tuple[str, ...], rng: random.Random) -> tuple[Life, list[Sent]]:
    """Start a recorder, wait for its connections, kill it some time later."""
    # One in ten dies before or while it connects.
    early = number % 10 == 9
    life = Life(number, rng.uniform(0.3, 0.9) if early else rng.uniform(0.4, 1.5), SEGMENT_BYTES[number % 2])
    child, pipe = _run(_recorder, str(root), urls, life.segment_bytes)
    try:
        if not early:
            limit = time.monotonic() + 30
            while _ask(exchange, "ready") < len(VENUES):
                if time.monotonic() > limit or not child.is_alive():
                    raise SystemExit(f"recorder {number} did not connect")
                time.sleep(0.01)
        time.sleep(life.lived_s)
        if pipe.poll():
            life.wrong.append("the recorder ended by itself")
    finally:
        child.kill()
        life.killed_ns = time.monotonic_ns()
        child.join()
    return life, cast("list[Sent]", _ask(exchange, "sent"))


def run(kills: int, speed: float, seed: int) -> bool:
    rng = random.Random(seed)
    lives: list[Life] = []
    known: dict[str, dict[str, str]] = {}
    began = time.monotonic()
    exchange, pipe = _run(_exchange, speed)
    try:
        with tempfile.TemporaryDirectory(prefix="arbl2-bench-") as folder:
            urls = _answer(pipe, 30, "the exchange")
            print("| kill | after s | segments | sealed before | restored | torn B | sent | lost | lost ms | |")
            print("|---|---|---|---|---|---|---|---|---|---|")
            for number in range(kills):
                life, sent = live(number, Path(folder), pipe, urls, rng)
                examine(life, Path(folder), known, sent)
                lives.append(life)
                print(life.row, flush=True)
            files = [path for path in Path(folder).glob("*/**/*") if path.is_file()]
            kept = f"{len(files):,} files of {len(known)} sessions, {sum(path.stat().st_size for path in files) / 2**20:,.0f} MiB"
    finally:
        exchange.kill()
        exchange.join()
    return _summary(lives, kept, time.monotonic() - began)


def _summary(lives: list[Life], kept: str, took_s: float) -> bool:
    with_data = [life for life in lives if life.sent]
    lost_ms, lost = sorted(life.lost_ms for life in with_data), [life.lost for life in with_data]
    rate = sum(life.sent for life in with_data) / max(1e-9, sum(life.lived_s for life in with_data))
    at = {share: lost_ms[int(share / 100 * (len(lost_ms) - 1))] for share in (50, 90, 95, 99)}
    several = sum(life.segments > 1 for life in lives)
    said = f"{several} with several segments, about {rate:,.0f} messages/s"
    print(f"\n{len(lives)} kills in {took_s:.0f} s, {said}\n")
    print("| lost by a kill | p50 | p90 | p95 | p99 | most |\n|---|---|---|---|---|---|")
    print(f"| ms before it | {' | '.join(f'{ms:.0f}' for ms in at.values())} | {lost_ms[-1]:.0f} |")
    print(f"\nlost messages per kill: {spread(lost)}\n")
    wrong = [(life.number, said) for life in lives for said in life.wrong]
    late = [entry for entry in wrong if entry[1].startswith("lost more")]
    other = [entry for entry in wrong if entry not in late]
    exact = verdict("R1 files, reports, order", not other, f"{len(other)} violations {other[:5] or ''}")
    changed = sum(life.changed for life in lives)
    said = f"{len(lives)} restarts in one folder, {changed} of {kept} changed after their own recovery"
    exact &= verdict("R2 earlier sessions", not changed, said)
    said = f"{lost_ms[-1]:.0f} ms at most, {len(late)} of {len(with_data)} above (asked: {FLUSH_MS} ms)"
    return verdict("R1 loss within the flush interval", not late, said) and exact


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=100, help="how many recorders are killed (default: 100)")
    parser.add_argument("--speed", type=float, default=60.0, help="how many times real speed the exchanges run (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills (default: 1)")
    options = parser.parse_args()
    print(here())
    raise SystemExit(not run(options.kills, options.speed, options.seed))


if __name__ == "__main__":
    main()
