"""Months of trouble in minutes: ``python -m benchmarks.soak --minutes 30``.

Both exchanges run in a process of their own and let every kind of fault strike again and again; the real recorder, in another
process, records everything they offer. In the end the server's account of what it sent (SHA-256 of each payload, in order, per
connection) is laid beside the tape, its list of faults beside the gap ledger, and the recorder's memory beside a flat line.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.frames import ExchangeId, FrameKind
from arbl2.tape import TapeReader, ledger
from arbl2_recorder import Endpoints, RecordConfig, record
from arbl2_recorder.ledger import Cause
from benchmarks.record import _answer, _run, here, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from arbl2.frames import Frame
    from arbl2_replay.faults import FaultRecord
    from arbl2_replay.server import SentLog

SYMBOLS = ("BTC", "ETH", "XRP", "SOL")
STALL_S = 4.0
ACK_S = 4.0
SAMPLE_S = 5.0
IN_FLIGHT_S = 1.0
"""Sent this shortly before a connection was ended from the recorder's side, a message may not have arrived any more."""
MOST_SLOPE_MB_PER_H = 20.0
MOST_GROWN_MB = 40.0
SLOPE_FROM_MIN = 15.0
FLAT_AFTER_S = 60.0
EVERY_S = {
    **dict.fromkeys(("corrupt", "truncate", "garbage", "duplicate", "gap", "delay", "reorder"), 20.0),
    **dict.fromkeys(("drop", "close", "stall", "throttle", "clock_step"), 45.0),
    **dict.fromkeys(("error", "shutdown", "half_open", "wrong_ack", "missing_ack", "rest"), 60.0),
}

# What a fault must look like in the ledger: any of these causes, on its venue, in its time. A kind that is not here cannot be
# seen in what arrives: a delay, a reorder across connections and a slow connection change no content, and no order within a
# connection. ``_is_visible`` says which strikes of a kind can be seen.
CAUSES: dict[str, tuple[Cause, ...]] = {
    "drop": (Cause.DISCONNECT,),
    "close": (Cause.DISCONNECT,),
    "error": (Cause.VENUE_ERROR,),
    "shutdown": (Cause.VENUE_SHUTDOWN,),
    "half_open": (Cause.DISCONNECT, Cause.STALLED),
    "stall": (Cause.GAP, Cause.STALLED),
    "gap": (Cause.GAP,),
    "duplicate": (Cause.DUPLICATE,),
    "corrupt": (Cause.UNDECODABLE,),
    "truncate": (Cause.UNDECODABLE,),
    "garbage": (Cause.UNDECODABLE,),
    "wrong_ack": (Cause.NO_ACK, Cause.VENUE_ERROR),
    "missing_ack": (Cause.NO_ACK,),
    "rest": (Cause.REST_FAILED,),
    "clock_step": (Cause.STALE_TIME, Cause.REGRESSION),
}


def _is_visible(fault: FaultRecord, closed_ns: int) -> bool:
    """Whether what arrives differs from what would have arrived; ``closed_ns`` is the end of the connection (or of all)."""
    if fault.kind not in CAUSES:
        return False
    match fault.kind:
        case "duplicate":  # books and tickers say the same twice anyway, and the last trade is told again on purpose
            return ("@depth@" in fault.stream or "trade" in fault.stream) and not fault.detail
        case "corrupt":  # a flipped digit is only another number
            return fault.detail == "not JSON any more"
        case "garbage":  # venues add new kinds of messages at any time
            return fault.detail != "an unknown object"
        case "stall":  # Upbit numbers nothing
            return fault.venue == ExchangeId.BINANCE or fault.lasts_ms > 1e3 * (STALL_S + 1)
        case "wrong_ack" | "missing_ack":  # the connection must live until the patience is over
            return closed_ns > fault.mono_ns + (ACK_S + 1) * 1e9
        case "clock_step":  # less than the pause between two messages does not turn time back
            return abs(int(fault.detail.split()[0])) > 500 and closed_ns > fault.mono_ns + (fault.lasts_ms + 1_000) * 1e6
        case _:
            return True


# ------------------------------------------------------------------------------------------------------------ the processes


@dataclass(frozen=True, slots=True)
class Account:
    """What the server says of one connection. Times are monotonic ns."""

    conn: int
    venue: str
    opened_ns: int
    ended_by: str
    request: bytes
    digests: list[bytes]
    at_ns: list[int]


@dataclass(frozen=True, slots=True)
class Told:
    """All that the server has to tell in the end."""

    accounts: list[Account]
    faults: list[FaultRecord]


def _exchange(pipe: Connection, seed: int) -> None:
    """Process: both exchanges and their faults, until asked what they sent."""
    from arbl2_replay.faults import FaultConfig, WireFault  # noqa: PLC0415 - only here needed
    from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource  # noqa: PLC0415
    from arbl2_replay.synth import SYMBOLS as COINS  # noqa: PLC0415
    from arbl2_replay.synth import SynthConfig  # noqa: PLC0415

    async def work() -> None:
        config = FaultConfig(seed=seed, every_s={WireFault(kind): every_s for kind, every_s in EVERY_S.items()})
        source = SyntheticSource(SynthConfig(seed=seed, symbols=tuple(COINS[coin] for coin in SYMBOLS)))
        async with ExchangeServer(source, ServerOptions(record_sent=True, faults=config)) as server:
            assert server.faults is not None
            pipe.send((server.upbit_ws_url, server.upbit_rest_url, server.binance_ws_url, server.binance_rest_url))
            while not pipe.poll():  # noqa: ASYNC110 - another process asks
                await asyncio.sleep(0.1)
        pipe.send(Told([_account(sent) for sent in server.sent], server.faults.records))

    asyncio.run(work())


def _account(sent: SentLog) -> Account:
    request = sent.requests[0][1] if sent.requests else b""
    digests = [digest for _, digest in sent.payloads]
    return Account(sent.conn, sent.venue, sent.opened_ns, sent.ended_by, request, digests, list(sent.at_ns))


def _recorder(pipe: Connection, root: str, urls: tuple[str, str, str, str], seconds: float) -> None:
    """Process: the real recorder, with timeouts short enough to notice what happens to it."""
    upbit_ws, upbit_rest, binance_ws, binance_rest = urls
    config = RecordConfig(
        out=Path(root),
        symbols=SYMBOLS,
        streams=("depth", "diff", "trade", "book_ticker"),
        duration_s=seconds,
        endpoints=Endpoints(upbit_ws=upbit_ws, upbit_rest=upbit_rest, binance_ws=binance_ws, binance_rest=binance_rest),
        connection_symbols=2,
        rotate_s=300.0,
        segment_seconds=60,
        snapshot_timeout_s=ACK_S,
        stall_s=STALL_S,
        ping_interval_s=2.0,
        ping_timeout_s=3.0,
        backoff_cap_s=2.0,
        stable_s=2.0,
    )
    result = record(config)
    pipe.send((str(result.path), result.clean, dict(result.alarms)))


@dataclass(slots=True)
class Memory:
    """Resident memory of a process, in MB, and when (seconds since the first look)."""

    at_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)

    def look(self, pid: int, now_s: float) -> None:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = next((line for line in status if line.startswith("VmRSS")), None)
        if resident is not None:
            self.at_s.append(now_s)
            self.rss_mb.append(int(resident.split()[1]) / 1024)

    def flat_part(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Without the first minute, in which the recorder and its libraries settle."""
        at_s, rss_mb = np.array(self.at_s), np.array(self.rss_mb)
        after = at_s >= FLAT_AFTER_S
        return at_s[after], rss_mb[after]


# ------------------------------------------------------------------------------------------------------- what was recorded


@dataclass(slots=True)
class Recorded:
    """One connection as the tape tells it. Times are monotonic ns."""

    conn: int
    venue: str
    opened_ns: int = 0
    closed_ns: int = 0
    request: bytes = b""
    digests: list[bytes] = field(default_factory=list)
    at_ns: list[int] = field(default_factory=list)


def _recorded(path: Path) -> tuple[list[Recorded], Counter[str], TapeReader]:
    reader = TapeReader(path)
    reader.verify_hashes()
    conns: dict[int, Recorded] = {}
    kinds: Counter[str] = Counter()
    for frame in reader.frames():
        kinds[f"{frame.venue or 'recorder'} {frame.kind.name.lower()}"] += 1
        if frame.conn:
            _take(conns.setdefault(frame.conn, Recorded(frame.conn, str(frame.venue))), frame)
    # A dial that failed has an end, but no beginning.
    return [conn for conn in conns.values() if conn.opened_ns], kinds, reader


def _take(conn: Recorded, frame: Frame) -> None:
    if frame.kind is FrameKind.OPENED:
        conn.opened_ns = frame.mono_ns
    elif frame.kind is FrameKind.CLOSED:
        conn.closed_ns = frame.mono_ns
    elif frame.kind is FrameKind.SENT:
        conn.request = conn.request or frame.payload
    elif frame.kind is FrameKind.MESSAGE:
        conn.digests.append(hashlib.sha256(frame.payload).digest())
        conn.at_ns.append(frame.mono_ns)


def _pairs(accounts: Sequence[Account], recorded: Sequence[Recorded]) -> tuple[list[tuple[Account, Recorded]], list[Recorded]]:
    """Which account belongs to which connection of the tape: the same first request, the nearest time of opening."""
    free = list(accounts)
    pairs, strangers = [], []
    for conn in sorted(recorded, key=lambda conn: conn.opened_ns):
        able = [each for each in free if each.venue == conn.venue and each.request in (conn.request, b"")]
        nearest = min(able, key=lambda each: abs(each.opened_ns - conn.opened_ns), default=None)
        if nearest is None or abs(nearest.opened_ns - conn.opened_ns) > 5e9:
            strangers.append(conn)
            continue
        free.remove(nearest)
        pairs.append((nearest, conn))
    return pairs, strangers


@dataclass(slots=True)
class Compared:
    """Messages of all connections: how they compare."""

    sent: int = 0
    recorded: int = 0
    copies: int = 0
    """Left out of the tape on purpose: another connection had delivered the same."""
    in_flight: int = 0
    lost: int = 0
    invented: int = 0
    worst: str = ""


def _compare(pairs: Sequence[tuple[Account, Recorded]]) -> Compared:
    elsewhere: dict[str, dict[bytes, set[int]]] = defaultdict(lambda: defaultdict(set))
    for _, conn in pairs:
        for digest in conn.digests:
            elsewhere[conn.venue][digest].add(conn.conn)
    total = Compared()
    for account, conn in pairs:
        missing = _missing(account, conn)
        if missing is None:
            total.invented += 1
            total.worst = f"connection {conn.conn} of {conn.venue} holds what was not sent to it, or in another order"
            continue
        total.sent += len(account.digests)
        total.recorded += len(conn.digests)
        last = len(account.digests)
        for at in reversed(missing):
            if elsewhere[conn.venue][account.digests[at]] - {conn.conn}:
                total.copies += 1
            elif account.ended_by == "client" and at == last - 1 and account.at_ns[at] > conn.closed_ns - IN_FLIGHT_S * 1e9:
                total.in_flight += 1
            else:
                total.lost += 1
                total.worst = f"message {at + 1:,} of {len(account.digests):,} of connection {conn.conn} of {conn.venue}"
                continue
            last = min(last, at)
    return total


def _missing(account: Account, conn: Recorded) -> list[int] | None:
    """Indices of what was sent but is not on the tape; None if the tape has something else, or another order."""
    missing, at = [], 0
    for number, digest in enumerate(account.digests):
        if at < len(conn.digests) and conn.digests[at] == digest:
            at += 1
        else:
            missing.append(number)
    return missing if at == len(conn.digests) else None


# ---------------------------------------------------------------------------------------------------------------- the ledger


def _ledger(path: Path) -> list[dict[str, Any]]:
    table = ledger(path)
    return table.to_pylist() if table is not None else []


def _in_ledger(fault: FaultRecord, conn: int, rows: Sequence[dict[str, Any]]) -> bool:
    begin = fault.mono_ns - 1_000_000_000
    end = fault.mono_ns + fault.lasts_ms * 1_000_000 + 12_000_000_000
    return any(
        row["cause"] in CAUSES[fault.kind]
        and row["venue"] == fault.venue
        and (not conn or row["conn"] in (0, conn))
        and (fault.kind != "gap" or row["first_id"] <= fault.first_id <= fault.last_id <= row["last_id"])
        and row["start_mono_ns"] <= end
        and (row["end_mono_ns"] is None or row["end_mono_ns"] >= begin)
        for row in rows
    )


def _faults(told: Told, conns: dict[int, Recorded], rows: Sequence[dict[str, Any]]) -> bool:
    """The table of faults; whether each that can be seen is in the ledger. ``conns`` are by the server's number."""
    print("\n| fault | injected | visible | in the ledger |\n|---|---|---|---|")
    everything = Recorded(0, "", closed_ns=max((conn.closed_ns for conn in conns.values()), default=0))
    absent: list[tuple[FaultRecord, int]] = []
    for kind in sorted(EVERY_S):
        faults = [(fault, conns.get(fault.conn) if fault.conn else everything) for fault in told.faults if fault.kind == kind]
        visible = [(fault, hit.conn) for fault, hit in faults if hit is not None and _is_visible(fault, hit.closed_ns)]
        missed = [(fault, conn) for fault, conn in visible if not _in_ledger(fault, conn, rows)]
        absent += missed
        print(f"| {kind} | {len(faults)} | {len(visible)} | {len(visible) - len(missed)} |")
    print()
    for fault, conn in absent[:20]:
        where = f"{fault.venue} connection {conn} {fault.stream} {fault.first_id}-{fault.last_id} at {fault.mono_ns} ns"
        print(f"  not in the ledger: {fault.kind}, {where}, {fault.detail}")
    causes = Counter(row["cause"] for row in rows)
    print("ledger: " + ", ".join(f"{cause} {n:,}" for cause, n in causes.most_common()) if rows else "ledger: empty")
    return not absent


# ------------------------------------------------------------------------------------------------------------------ the soak


def soak(minutes: float, seed: int, folder: Path | None = None) -> bool:
    """Run it and judge it."""
    with tempfile.TemporaryDirectory(prefix="arbl2-soak-") as temporary:
        root = folder or Path(temporary)
        server, asking = _run(_exchange, seed)
        urls = _answer(asking, 30, "the exchange server")
        recorder, answering = _run(_recorder, str(root), urls, minutes * 60)
        memory = Memory()
        began = time.monotonic()
        while recorder.is_alive() and not answering.poll(SAMPLE_S):
            memory.look(recorder.pid, time.monotonic() - began)
        path, clean, alarms = _answer(answering, 60, "the recorder")
        recorder.join(30)
        asking.send("tell")
        told: Told = _answer(asking, 120, "the exchange server")
        server.join(30)
        return _judge(Path(path), told, memory, clean=clean, alarms=alarms)


def _judge(path: Path, told: Told, memory: Memory, *, clean: bool, alarms: dict[str, int]) -> bool:
    recorded, kinds, _ = _recorded(path)
    pairs, strangers = _pairs(told.accounts, recorded)
    compared = _compare(pairs)
    paired = {account.conn for account, _ in pairs}
    unheard = sum(len(each.digests) for each in told.accounts if each.conn not in paired)
    conns = {account.conn: conn for account, conn in pairs}
    print("\n| frames | count |\n|---|---|")
    for name, count in sorted(kinds.items()):
        print(f"| {name} | {count:,} |")
    print(f"\nalarms: {json.dumps(alarms)}")
    ends = Counter(f"{account.venue} ended by {account.ended_by}" for account, _ in pairs)
    print("connections: " + ", ".join(f"{name} {n:,}" for name, n in sorted(ends.items())))
    seen = _faults(told, conns, _ledger(path))

    said = (
        f"{compared.sent:,} sent on {len(pairs):,} connections, {compared.recorded:,} recorded, {compared.copies:,} copies left "
        f"out, {compared.in_flight:,} in flight when the recorder closed, {compared.lost:,} lost, {compared.invented:,} "
        f"connections with anything else; {unheard:,} sent to connections that the recorder never had"
    )
    whole = not (compared.lost or compared.invented or strangers)
    holds = verdict("sent = recorded, in order, per connection", whole, said + (f" ({compared.worst})" if compared.worst else ""))
    holds &= verdict("nothing dropped by the recorder", clean, f"clean: {clean}")
    least = min(Counter(dict.fromkeys(EVERY_S, 0) | Counter(str(fault.kind) for fault in told.faults)).values())
    holds &= verdict("every kind of fault struck", least > 0, f"{len(told.faults):,} faults, the rarest kind {least} times")
    holds &= verdict("every visible fault is in the ledger", seen, "see the table")
    return holds & _judge_memory(memory)


def _judge_memory(memory: Memory) -> bool:
    at_s, rss_mb = memory.flat_part()
    if len(at_s) < 2:
        return verdict("RSS flat", True, "not judged: the first minute does not count")
    minutes = float(at_s[-1] - at_s[0]) / 60
    last_of_minute = {int(at // 60): rss for at, rss in zip(memory.at_s, memory.rss_mb, strict=True)}
    print("RSS at the end of each minute, MB: " + " ".join(f"{rss:.0f}" for rss in last_of_minute.values()))
    slope = float(np.polyfit(at_s / 3600, rss_mb, 1)[0])
    grown = slope * minutes / 60
    said = f"{slope:+.1f} MB/h over {minutes:.0f} min ({grown:+.1f} MB), {rss_mb.min():.0f} - {rss_mb.max():.0f} MB"
    if minutes < SLOPE_FROM_MIN:
        # What is allocated once looks like a slope in a short run.
        return verdict("RSS flat", grown < MOST_GROWN_MB, f"{said} (asked in so short a run: below {MOST_GROWN_MB:g} MB)")
    return verdict("RSS flat", slope < MOST_SLOPE_MB_PER_H, f"{said} (asked: below {MOST_SLOPE_MB_PER_H:g} MB/h)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the market and the faults (default: 1)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="record into this folder and leave the session there")
    options = parser.parse_args()
    print(here())
    raise SystemExit(not soak(options.minutes, options.seed, options.keep))


if __name__ == "__main__":
    main()
