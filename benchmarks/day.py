"""The day that is measured: up to ten coins on both venues for 24 hours, as a recorder would have written them.

Nothing is repeated: one synthetic market walks through the whole day (``arbl2_replay.synth``). Two processes walk it alike, since
that is cheap and the same everywhere; each makes messages and segments of its own part only. So the tape does not depend on how
many processes made it, and every segment knows its first ``seq`` without waiting for the one before.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from arbl2.frames import BINANCE, KIND_NAMES, UPBIT, VENUES, ExchangeId, FrameBlock, FrameKind, Op
from arbl2.money import format_e8
from arbl2.rules import binance_rules
from arbl2.tape import ROW_GROUP_ROWS, TAPE_VERSION, Manifest, Segment, SegmentWriter, save_manifest
from arbl2_replay.synth import (
    BINANCE_WS_URL,
    STEP_NS,
    SYMBOLS,
    UPBIT_WS_URL,
    MarketEvent,
    SynthConfig,
    SynthSymbol,
    market_events,
)
from arbl2_replay.wire import binance_book_ticker, binance_combined, binance_depth, upbit_orderbook

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

T = TypeVar("T", int, "NDArray[np.int64]")

DATA = Path(__file__).with_name(".data")
START_NS = SynthConfig().start_ns
MONO_START_NS = 5_000_000_000_000
DRIFT_PPB = 1_500
MS = 1_000_000
SECOND_NS = 1_000 * MS
SEGMENT_NS = 480 * SECOND_NS
"""Some 120 MiB of messages of ten coins; the recorder ends a segment at 128 MiB."""
CLOCK_NS = 10 * SECOND_NS
LEAD_NS = 200 * MS
"""From the start of the session to the first message: connections open, subscriptions, rules."""
ROTATE_AT = {UPBIT: 0.5, BINANCE: 23 / 24}
"""When a connection is replaced, as a share of the day; 23 h is the recorder's own limit for Binance."""
DELAY_MS = {UPBIT: 4.0, BINANCE: 6.0}
SPACING_NS = 2_000
ZSTD_LEVEL = 3
UNITS, DEPTH = 15, 20
FIRST_PART = 0.6
"""Share of the first process: the second one has the first part's market to walk before its own."""


def _coin(base: str, price_usdt: float, quiet: float, phases_ms: tuple[int, int], usd: float) -> SynthSymbol:
    """A coin whose levels are worth about ``usd`` dollars."""
    return SynthSymbol(
        base=base,
        price_usdt=price_usdt,
        volatility_bps=0.5,
        binance_touch=usd / price_usdt,
        binance_size=usd / 2 / price_usdt,
        binance_gap_ticks=1.0,
        binance_phase_ms=phases_ms[0],
        upbit_touch=usd / price_usdt,
        upbit_size=usd / price_usdt,
        upbit_spread_ticks=1.0,
        upbit_phase_ms=phases_ms[1],
        upbit_quiet=quiet,
    )


class Coin(NamedTuple):
    """``symbol.base`` is the coin whose ticks and lots it has, which may be another one."""

    name: str
    symbol: SynthSymbol


COINS = (
    *(Coin(name, SYMBOLS[name]) for name in ("BTC", "ETH", "XRP", "SOL")),
    Coin("DOGE", _coin("DOGE", 0.75, 0.1, (29, 21), 20_000)),
    Coin("BCH", _coin("BTC", 560.0, 0.4, (63, 88), 12_000)),
    Coin("LTC", _coin("ETH", 115.0, 0.35, (82, 15), 12_000)),
    Coin("ADA", _coin("XRP", 0.8, 0.15, (5, 42), 20_000)),
    Coin("LINK", _coin("SOL", 22.0, 0.25, (91, 57), 15_000)),
    Coin("TRX", _coin("DOGE", 0.32, 0.3, (46, 71), 15_000)),
)
"""arbl2 has ticks and lots of five coins built in, so the other five take theirs from these, and a second seed."""
PER_MARKET = 5


@dataclass(frozen=True, slots=True)
class Day:
    """Which day: its length, how many of ``COINS`` it has, its chance, and the time between the cuts of its segments."""

    hours: float = 24.0
    symbols: int = len(COINS)
    seed: int = 24
    segment_ns: int = SEGMENT_NS

    @property
    def end_ns(self) -> int:
        """Length of the session."""
        return round(self.hours * 3_600 * SECOND_NS)

    @property
    def segments(self) -> int:
        """How many there are."""
        return -(-self.end_ns // self.segment_ns)

    def coins(self) -> tuple[Coin, ...]:
        """The coins of this day."""
        return COINS[: self.symbols]

    def instruments(self) -> dict[str, list[str]]:
        """The venues' names of what is on the tape."""
        names = [coin.name for coin in self.coins()]
        return {"upbit": [*(f"KRW-{name}" for name in names), "KRW-USDT"], "binance": [f"{name}USDT" for name in names]}


def tape(day: Day) -> Path:
    """The session folder of a day, made on first use and kept in ``benchmarks/.data``."""
    folder = DATA / f"day-{day.hours:g}h-{day.symbols}"
    if not folder.exists():
        print(f"making {folder} (a quarter of an hour for a whole day, once)", flush=True)
        aside = folder.with_name(f"{folder.name}.part")
        make(day, aside, processes=2)
        aside.rename(folder)
    return folder


def make(day: Day, folder: Path, *, processes: int) -> Manifest:
    """Write the session of a day with one or two processes; the files are the same."""
    cut = round(FIRST_PART * day.segments) if processes == 2 else day.segments
    parts = [(first, last) for first, last in ((0, cut), (cut, day.segments)) if first < last]
    with ProcessPoolExecutor(len(parts), mp_context=multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(_write_part, itertools.repeat(day), itertools.repeat(folder), parts))
    counts: Counter[str] = Counter()
    for part in made:
        counts.update(part.counts)
    manifest = msgspec.structs.replace(
        _manifest(day), segments=[segment for part in made for segment in part.segments], counts=dict(sorted(counts.items()))
    )
    save_manifest(folder, manifest)
    return manifest


def _manifest(day: Day) -> Manifest:
    started = datetime.fromtimestamp(START_NS / 1e9, tz=UTC)
    return Manifest(
        tape_version=TAPE_VERSION,
        session=f"{started:%Y%m%dT%H%M%SZ}-day-{day.seed}",
        state="sealed",
        anchor_wall_ns=START_NS,
        anchor_mono_ns=MONO_START_NS,
        endpoints={"upbit_ws": UPBIT_WS_URL, "binance_ws": BINANCE_WS_URL},
        instruments=day.instruments(),
        subscriptions={VENUES[venue]: json.loads(_subscription(day, venue)) for venue in (UPBIT, BINANCE)},
        notes=[f"synthetic market, seed {day.seed}: not data of any venue"],
    )


# ------------------------------------------------------------------------------------------------------------- the market


class Form(Enum):
    """What becomes of a market event on the wire."""

    BOOK = 1
    SNAPSHOT = 2  # Upbit's first message of a code on a new connection
    TICKER = 3  # Binance's best bid and ask


class Row(NamedTuple):
    """A message as its venue publishes it, ``at_ns`` after the session began."""

    at_ns: int
    venue: int
    form: Form
    event: MarketEvent


def market(day: Day) -> Iterator[MarketEvent]:
    """Every book of the day, coins under their own names."""
    markets = []
    for number in range(0, day.symbols, PER_MARKET):
        coins = day.coins()[number : number + PER_MARKET]
        config = SynthConfig(
            seed=day.seed + number,
            start_ns=START_NS + LEAD_NS,
            duration_s=(day.end_ns - 2 * LEAD_NS) / SECOND_NS,
            symbols=tuple(coin.symbol for coin in coins),
        )
        names = {f"KRW-{coin.symbol.base}": f"KRW-{coin.name}" for coin in coins}
        names |= {f"{coin.symbol.base}USDT": f"{coin.name}USDT" for coin in coins}
        if number == 0:
            names["KRW-USDT"] = "KRW-USDT"
        markets.append(_named(market_events(config), names))
    return heapq.merge(*markets, key=lambda event: event.offset_ns)


def _named(events: Iterator[MarketEvent], names: dict[str, str]) -> Iterator[MarketEvent]:
    for event in events:
        name = names.get(event.code)
        if name is not None:
            yield event if name == event.code else event._replace(code=name)


def published(day: Day) -> Iterator[Row]:
    """What both venues publish: books, snapshots after a new subscription, and a ticker whenever the touch is another one."""
    touch: dict[str, tuple[int, int, int, int]] = {}
    last: dict[str, MarketEvent] = {}
    renew_ns = rotation_ns(day, UPBIT)
    for event in market(day):
        at_ns = event.offset_ns + LEAD_NS
        if at_ns >= renew_ns:
            for told in last.values():
                yield Row(renew_ns, UPBIT, Form.SNAPSHOT, told)
            renew_ns = day.end_ns
        if event.venue == ExchangeId.UPBIT:
            last[event.code] = event
            yield Row(at_ns, UPBIT, Form.SNAPSHOT if event.offset_ns < STEP_NS else Form.BOOK, event)
            continue
        book = event.book
        best = (book.bid_px_e8[0], book.bid_size_e8[0], book.ask_px_e8[0], book.ask_size_e8[0])
        if best != touch.get(event.code):
            touch[event.code] = best
            yield Row(at_ns, BINANCE, Form.TICKER, event)
        yield Row(at_ns, BINANCE, Form.BOOK, event)


def rotation_ns(day: Day, venue: int) -> int:
    """When the messages of a venue go on over its second connection."""
    return round(day.end_ns * ROTATE_AT[venue])


def _payload(form: Form, event: MarketEvent) -> bytes:
    if event.venue == ExchangeId.UPBIT:
        return upbit_orderbook(event.code, event.book, event.mark, units=UNITS, snapshot=form is Form.SNAPSHOT)
    stream = event.code.lower()
    if form is Form.TICKER:
        return binance_combined(f"{stream}@bookTicker", binance_book_ticker(event.code, event.book, event.mark))
    return binance_combined(f"{stream}@depth{DEPTH}@100ms", binance_depth(event.book, event.mark, depth=DEPTH))


# ----------------------------------------------------------------------------------------------- what else a recorder writes


class Note(NamedTuple):
    """A frame that is no message of the market, at the instant of its stamp."""

    at_ns: int
    venue: int
    conn: int
    kind: FrameKind
    op: Op
    payload: bytes


def notes(day: Day) -> list[Note]:
    """Clock samples, Binance's rules, and for each venue a connection that is replaced by another, make before break."""
    made = [Note(at, 0, 0, FrameKind.CLOCK, Op.NONE, _clock(at)) for at in range(0, day.end_ns, CLOCK_NS)]
    url = "https://api.binance.com/api/v3/exchangeInfo"
    made.append(Note(2 * MS, BINANCE, 0, FrameKind.REQUEST, Op.NONE, _json({"method": "GET", "url": url})))
    made.append(Note(90 * MS, BINANCE, 0, FrameKind.RESPONSE, Op.NONE, _exchange_info(day)))
    for venue, url in ((UPBIT, UPBIT_WS_URL), (BINANCE, BINANCE_WS_URL)):
        turn_ns = rotation_ns(day, venue)
        for conn, takes_over_ns in ((venue, LEAD_NS), (venue + 2, turn_ns)):
            opened_ns = takes_over_ns - 150 * MS + venue * MS
            made.append(Note(opened_ns, venue, conn, FrameKind.OPENED, Op.NONE, _json({"url": url})))
            made.append(Note(opened_ns + MS, venue, conn, FrameKind.SENT, Op.TEXT, _subscription(day, venue)))
            if venue == BINANCE:
                made.append(Note(opened_ns + 40 * MS, venue, conn, FrameKind.MESSAGE, Op.TEXT, b'{"result":null,"id":1}'))
        farewell: dict[str, object] = {"code": 1000, "reason": "", "clean": True}
        covered = _json({**farewell, "covered": True})
        made.append(Note(turn_ns + 50 * MS, venue, venue, FrameKind.CLOSED, Op.NONE, covered))
        made.append(Note(day.end_ns - MS, venue, venue + 2, FrameKind.CLOSED, Op.NONE, _json(farewell)))
    return sorted(made, key=lambda note: note.at_ns)


def _wall_ns(at_ns: T) -> T:
    """Session time on the wall clock, which is a little fast."""
    return START_NS + at_ns + at_ns * DRIFT_PPB // 10**9


def _clock(at_ns: int) -> bytes:
    return _json({"wall_ns": _wall_ns(at_ns), "mono_ns": MONO_START_NS + at_ns})


def _subscription(day: Day, venue: int) -> bytes:
    if venue == UPBIT:
        codes = [f"{code}.{UNITS}" for code in day.instruments()["upbit"]]
        return _json([{"ticket": f"arbl2-day-{day.seed}"}, {"type": "orderbook", "codes": codes}, {"format": "DEFAULT"}])
    names = [name.lower() for name in day.instruments()["binance"]]
    streams = [name + suffix for suffix in (f"@depth{DEPTH}@100ms", "@bookTicker") for name in names]
    return _json({"method": "SUBSCRIBE", "params": streams, "id": 1})


def _exchange_info(day: Day) -> bytes:
    symbols = []
    for coin in day.coins():
        rules = binance_rules(f"{coin.symbol.base}USDT")
        assert rules is not None
        filters = [
            {"filterType": "PRICE_FILTER", "tickSize": format_e8(rules.tick_e8)},
            {"filterType": "LOT_SIZE", "stepSize": format_e8(rules.lot_e8)},
            {"filterType": "NOTIONAL", "minNotional": format_e8(rules.min_notional_e8)},
        ]
        symbols.append({"symbol": f"{coin.name}USDT", "filters": filters})
    return _json({"timezone": "UTC", "symbols": symbols})


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------------------- the segments


STAMPS = np.dtype([("at_ns", "i8"), ("venue", "u1"), ("conn", "i4"), ("kind", "u1"), ("op", "u1")])


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Frames in the order in which they came: ``STAMPS`` of each, and the market event or the note that it tells."""

    stamps: NDArray[Any]
    what: list[Row | Note]

    def __len__(self) -> int:
        return len(self.what)


def segments(day: Day) -> Iterator[Arrivals]:
    """The frames of each segment. A message that is still on its way at a cut belongs to the next one."""
    last_ns = {UPBIT: 0, BINANCE: 0}
    late = Arrivals(np.zeros(0, STAMPS), [])
    waiting = notes(day)
    for number, rows in itertools.groupby(published(day), key=lambda row: row.at_ns // day.segment_ns):
        chance = np.random.default_rng((day.seed, number))
        stop_ns = (number + 1) * day.segment_ns
        due = [note for note in waiting if note.at_ns < stop_ns]
        del waiting[: len(due)]
        stamps, what = [late.stamps, np.array([note[:5] for note in due], STAMPS)], [*late.what, *due]
        came = list(rows)
        for venue in (UPBIT, BINANCE):
            told = [row for row in came if row.venue == venue]
            stamps.append(_travel(day, venue, [row.at_ns for row in told], last_ns[venue], chance))
            last_ns[venue] = int(stamps[-1]["at_ns"][-1])
            what += told
        found = np.concatenate(stamps)
        order = np.argsort(found["at_ns"], kind="stable")
        cut = int(np.searchsorted(found["at_ns"], stop_ns, sorter=order))
        yield Arrivals(found[order[:cut]], [what[i] for i in order[:cut].tolist()])
        late = Arrivals(found[order[cut:]], [what[i] for i in order[cut:].tolist()])


def _travel(day: Day, venue: int, published_ns: list[int], last_ns: int, chance: np.random.Generator) -> NDArray[Any]:
    """Stamps of messages that were on their way: smallest delay, jitter with a hiccup now and then, no overtaking."""
    n = len(published_ns)
    delay_ms = DELAY_MS[venue] + np.maximum(0.0, chance.normal(3.6, 1.1, n))
    delay_ms += np.where(chance.random(n) < 0.002, chance.uniform(15.0, 75.0, n), 0.0)
    at_ns = np.array(published_ns, np.int64) + (delay_ms * MS).astype(np.int64)
    at_ns[:1] = np.maximum(at_ns[:1], last_ns + SPACING_NS)
    spacing_ns = SPACING_NS * np.arange(n)
    stamps = np.zeros(n, STAMPS)
    stamps["at_ns"] = at_ns = np.maximum.accumulate(at_ns - spacing_ns) + spacing_ns
    stamps["venue"] = venue
    stamps["conn"] = np.where(at_ns < rotation_ns(day, venue), venue, venue + 2)
    stamps["kind"] = FrameKind.MESSAGE
    stamps["op"] = Op.BINARY if venue == UPBIT else Op.TEXT
    return stamps


@dataclass(frozen=True, slots=True)
class Part:
    """What one process wrote."""

    segments: list[Segment] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def _write_part(day: Day, folder: Path, span: tuple[int, int]) -> Part:
    """Process: walk the market from its beginning and write the segments of ``span``."""
    gc.disable()  # a segment's books are a million objects without a cycle
    anchor, session = _manifest(day).anchor, _manifest(day).session
    part, seq = Part(), 1
    for number, came in enumerate(segments(day)):
        if number == span[1]:
            break
        if number >= span[0]:
            writer = SegmentWriter(folder, number + 1, session, anchor, zstd_level=ZSTD_LEVEL)
            chance = np.random.default_rng((day.seed, number, 1))
            for first in range(0, len(came), ROW_GROUP_ROWS):
                writer.append_block(_block(came, first, min(first + ROW_GROUP_ROWS, len(came)), seq, chance))
            part.segments.append(writer.seal())
            kinds = Counter(came.stamps[["venue", "kind"]].tolist())
            part.counts.update({f"{VENUES[venue] or '-'}.{KIND_NAMES[kind]}": count for (venue, kind), count in kinds.items()})
        seq += len(came)
    return part


def _block(came: Arrivals, first: int, last: int, seq: int, chance: np.random.Generator) -> FrameBlock:
    payloads = [item.payload if isinstance(item, Note) else _payload(item.form, item.event) for item in came.what[first:last]]
    n = len(payloads)
    stamps = came.stamps[first:last]
    at_ns = stamps["at_ns"]
    offsets = np.zeros(n + 1, np.int32)
    np.cumsum([len(payload) for payload in payloads], out=offsets[1:])
    return FrameBlock(
        seq=np.arange(seq + first, seq + last, dtype=np.int64),
        time_ns=START_NS + at_ns,
        recv_ns=_wall_ns(at_ns),
        mono_ns=MONO_START_NS + at_ns,
        venue=stamps["venue"],
        conn=stamps["conn"],
        kind=stamps["kind"],
        op=stamps["op"],
        queue_us=chance.integers(20, 90, n, dtype=np.int32),
        flags=np.zeros(n, np.uint8),
        offsets=offsets,
        data=np.frombuffer(b"".join(payloads), np.uint8),
    )
