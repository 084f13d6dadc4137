"""What an instant of a recording looks like: tables for the terminal, plain values for machines."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from arbl2.aggregator import Level, LevelFrom, SourceStatus
from arbl2.money import E8, format_e8
from arbl2_replay.moments import SECOND_NS, utc
from arbl2_replay.travel import Why

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from arbl2_replay.moments import Moment
    from arbl2_replay.travel import BookAt, Instant, Travel, Validity, View

    Sides = tuple[Sequence[Level], Sequence[Level]]

_STYLES = {SourceStatus.ACTIVE: "green", SourceStatus.STALE: "yellow", SourceStatus.DISCONNECTED: "red"}
_ORIGINS = {LevelFrom.WINDOW: "window", LevelFrom.SNAPSHOT: "snapshot", LevelFrom.CHANGE: "change", LevelFrom.BEYOND: "beyond"}


@dataclass(frozen=True, slots=True)
class Found:
    """One answer. ``full`` has every known level (bids, asks) by market, where that was asked for."""

    travel: Travel
    instant: Instant
    view: View
    full: dict[str, Sides]
    valid: Validity
    query_ms: float

    def sides(self, book: BookAt, levels: int) -> Sides:
        """What is to be shown of a book."""
        if book.instrument.name in self.full:
            return self.full[book.instrument.name]
        bids, asks = ([Level(*level, LevelFrom.WINDOW) for level in side[:levels]] for side in (book.bids, book.asks))
        return bids, asks


def find(travel: Travel, moment: Moment, name: str, *, full: bool = False) -> Found:
    """What is known of a coin or market at a moment. Raises TapeError outside of the tape, ConfigError for an unknown name."""
    started = time.perf_counter()
    instant = travel.find(moment)
    view = instant.view(name)
    markets = [book.instrument.name for book in view.books] if full else []
    levels: dict[str, Sides] = {market: instant.full_book(market) for market in markets}
    valid = instant.valid_through(name)
    return Found(travel, instant, view, levels, valid, (time.perf_counter() - started) * 1e3)


# -------------------------------------------------------------------------------------------------------------- machines


def to_json(found: Found, *, levels: int) -> dict[str, Any]:
    """Plain values. Prices and sizes are decimal text, ``*_ns`` counts of nanoseconds, edges basis points."""
    view, instant, valid = found.view, found.instant, found.valid
    return {
        "symbol": view.name,
        "session": found.travel.session,
        "time": utc(instant.time_ns),
        "time_ns": instant.time_ns,
        "seq": instant.seq,
        "books": [_book_json(found, book, levels) for book in view.books],
        "fx": _book_json(found, view.fx, levels) if view.fx is not None else None,
        "sell_upbit_bps": view.sell_upbit_bps,
        "buy_upbit_bps": view.buy_upbit_bps,
        "valid_through": {
            "time": utc(valid.time_ns),
            "time_ns": valid.time_ns,
            "why": str(valid.why),
            "instrument": valid.instrument or None,
            "seq": valid.seq or None,
        },
        "query_ms": round(found.query_ms, 3),
    }


def _book_json(found: Found, book: BookAt, levels: int) -> dict[str, Any]:
    full = book.instrument.name in found.full
    return {
        "venue": str(book.instrument.venue),
        "instrument": book.instrument.name,
        "base": book.instrument.base,
        "quote": book.instrument.quote,
        "status": str(book.status),
        "age_ns": book.age_ns,
        "update_id": book.update_id or None,
        "exchange_ms": book.exchange_ms or None,
        **{
            side: [[_text(level.px_e8), _text(level.size_e8), *([_ORIGINS[level.origin]] if full else [])] for level in rows]
            for side, rows in zip(("bids", "asks"), found.sides(book, levels), strict=True)
        },
    }


# ---------------------------------------------------------------------------------------------------------------- people


def book_report(found: Found, *, levels: int) -> RenderableType:
    """Everything about the instant, ready to print."""
    view, instant = found.view, found.instant
    since = _since(instant.time_ns - found.travel.first_ns)
    head = Text(f"{view.name} at {utc(instant.time_ns)}, {since}, after frame #{instant.seq:,} of {found.travel.session}")
    head.stylize("bold")
    parts: list[RenderableType] = [head]
    if found.travel.is_growing:
        parts.append(Text("being recorded, or its recorder was killed: only what is sealed is known", style="yellow"))
    tables = [_ladder(found, book, levels) for book in view.books]
    if view.fx is not None:
        tables.append(_ladder(found, view.fx, levels))
    parts += [Text(), Columns(tables, padding=(0, 4, 0, 0)), *_edges(view), _validity(found.valid, instant.time_ns)]
    kept = sum(keys.bytes for keys in found.travel.index)
    parts.append(Text(f"found in {found.query_ms:.1f} ms; keyframes of this recording take {kept / 1e6:,.1f} MB", style="dim"))
    return Group(*parts)


def _ladder(found: Found, book: BookAt, levels: int) -> RenderableType:
    instrument = book.instrument
    title = Text.assemble(
        (f"{instrument.venue} {instrument.name} ", "bold"),
        (str(book.status).upper(), _STYLES[book.status]),
        f", {_age(book.age_ns)}",
    )
    full = instrument.name in found.full
    sides = found.sides(book, levels)
    shown = max(len(book.bids), len(book.asks))
    below = [_spread(book)]
    if book.is_full and not full:
        below.append(Text("built from depth changes: --full shows every level", style="dim"))
    elif shown > levels and not full:
        below.append(Text(f"{levels} of {shown} levels: --levels {shown} shows all", style="dim"))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("", *_columns(instrument.quote, full=full), ""):
        if name:
            table.add_column(name, justify="right", no_wrap=True)
    columns = [_column(side, bid=k == 0, full=full) for k, side in enumerate(sides)]
    for bid, ask in itertools.zip_longest(*columns):
        blank = [""] * (4 if full else 3)
        table.add_row(*reversed(bid or blank), *(ask or blank))
    return Group(title, table, *below, Text())


def _columns(quote: str, *, full: bool) -> list[str]:
    origin = ["from"] if full else []
    return [*origin, "sum", "size", f"bid {quote}", f"ask {quote}", "size", "sum", *origin]


def _column(side: Sequence[Level], *, bid: bool, full: bool) -> list[list[Text | str]]:
    """Price, size, sum of sizes, and how it is known."""
    sums = list(itertools.accumulate(level.size_e8 for level in side))
    decimals = _decimals(max((level.size_e8 for level in side), default=0)), _decimals(sums[-1] if sums else 0)
    rows: list[list[Text | str]] = []
    for level, total in zip(side, sums, strict=True):
        price = Text(_text(level.px_e8, commas=True), style="green" if bid else "red")
        origin = [Text(_ORIGINS[level.origin], style="dim")] if full else []
        rows.append([price, format_e8(level.size_e8, decimals[0]), format_e8(total, decimals[1]), *origin])
    return rows


def _decimals(largest_e8: int) -> int:
    """As many as a screen has room for; --json has all."""
    return 8 if largest_e8 < 10 * E8 else 5 if largest_e8 < 10_000 * E8 else 2


def _spread(book: BookAt) -> Text:
    if not book.bids or not book.asks:
        empty = "no book yet" if book.age_ns is None else "a side is empty"
        return Text(f"no spread: {empty}", style="dim")
    gap = book.asks[0][0] - book.bids[0][0]
    bps = gap / ((book.asks[0][0] + book.bids[0][0]) / 2) * 1e4
    return Text(f"spread {_text(gap, commas=True)} {book.instrument.quote} ({bps:.{2 if bps >= 0.1 else 4}f} bps)")


def _edges(view: View) -> list[Text]:
    if len(view.books) == 1:
        return []
    if view.sell_upbit_bps is not None or view.buy_upbit_bps is not None:
        said = [
            f"{words} {'unknown' if edge is None else f'{edge:+.2f} bps'}"
            for words, edge in (
                ("sell on Upbit, buy on Binance", view.sell_upbit_bps),
                ("buy on Upbit, sell on Binance", view.buy_upbit_bps),
            )
        ]
        return [Text(f"gross edge: {'; '.join(said)}")]
    if view.fx is None:
        return [Text("no edge: KRW-USDT was not recorded, so KRW and USDT cannot be compared", style="yellow")]
    lame = [book for book in (*view.books, view.fx) if book.status is not SourceStatus.ACTIVE]
    why = ", ".join(f"{book.instrument.name} is {str(book.status).upper()}" for book in lame) or "a side is empty"
    return [Text(f"no edge: {why}", style="yellow")]


def _validity(valid: Validity, time_ns: int) -> Text:
    until = {
        Why.FRAME: f"then frame #{valid.seq:,} changes {valid.instrument}",
        Why.STALE: f"then {valid.instrument} is too old to be ACTIVE",
        Why.END: "the end of the tape",
    }[valid.why]
    return Text(f"valid through {utc(valid.time_ns)} ({_duration(valid.time_ns - time_ns)} more): {until}")


def _age(age_ns: int | None) -> str:
    return "no book yet" if age_ns is None else f"{_duration(age_ns)} old"


def _duration(ns: int) -> str:
    if ns < SECOND_NS:
        return f"{ns:,} ns" if ns < 10_000 else f"{ns / 1e6:,.2f} ms"
    return f"{ns / 1e9:,.3f} s" if ns < 120 * SECOND_NS else f"{ns / 60e9:,.1f} min"


def _since(ns: int) -> str:
    seconds, rest = divmod(ns, SECOND_NS)
    hours, seconds = divmod(seconds, 3_600)
    minutes, seconds = divmod(seconds, 60)
    parts = f"{hours}h{minutes:02}m" if hours else f"{minutes}m" if minutes else ""
    return f"+{parts}{seconds}.{rest:09d}s"


def _text(value_e8: int, *, commas: bool = False) -> str:
    text = format_e8(value_e8).rstrip("0").rstrip(".")
    return text if commas else text.replace(",", "")
