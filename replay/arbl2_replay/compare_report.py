"""What two runs look like beside each other, for a terminal or a pipe: what differs is marked, coloured or not."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arbl2.money import E8, format_e8
from arbl2_replay.compare_tapes import payload_change
from arbl2_replay.sinks import DECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType

    from arbl2_replay.compare import Change, Comparison
    from arbl2_replay.compare_events import Counts, EventDifference
    from arbl2_replay.compare_tapes import Seen, Window

A, B, DIFFERS = "cyan", "magenta", "bold yellow"
MOST_RESULTS = 20
_MOST_COLUMNS = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")
_QUOTE = {"upbit": "KRW", "binance": "USDT"}
_COIN = ("size_e8", "visible_e8", "depth_e8", "filled_e8", "before_e8", "after_e8", "after_filled_e8")
_UNITS = {"upbit_px_e8": "KRW", "binance_px_e8": "USDT", "fx_px_e8": "KRW per USDT"}
_KINDS = {DECISIONS: "decision"}


def comparison_report(found: Comparison) -> RenderableType:
    """Everything that two runs differ in, ready to print."""
    parts: list[RenderableType] = [_head(found)]
    if found.inputs:
        parts += [_title("What went in"), _changes(found.inputs)]
    parts += _frames(found, differing=True)
    if found.first is not None:
        rows = next(count for count in found.counts if count.table == found.first.table)
        parts += [_title(_event_title(found.first, rows)), Text(_event_words(found.first)), _event(found.first)]
        parts += _frames(found, differing=False)
        parts += [_title("How much differs"), _counts(found.counts)]
        if found.other is not None:
            parts.append(
                Text(f"first {_kind(found.other)} that differs: row {found.other.row + 1:,} at {_utc(found.other.time_ns)} UTC")
            )
    elif not found.same:
        parts.append(Text(f"\n{_why_no_event(found)}"))
    if found.results:
        parts += [_title("What came of it"), _changes(found.results[:MOST_RESULTS], "kpi.")]
        if len(found.results) > MOST_RESULTS:
            parts.append(Text(f"... and {len(found.results) - MOST_RESULTS:,} more values; --json has all", style="dim"))
    if found.first is not None and not found.inputs:
        parts.append(
            Text("\nNothing that went in differs: one of them ran another arbl2 or a policy of its own.", style="yellow")
        )
    parts += [Text(clean(note), style="yellow") for note in found.notes]
    return Group(*parts)


def clean(text: str) -> str:
    """Text from a file without what a terminal would obey."""
    return "".join(c if c.isprintable() else "." for c in text)


def _head(found: Comparison) -> Text:
    if not found.same:
        said = Text("The runs differ.", style=DIFFERS)
    elif found.inputs:
        said = Text("Same digest, from recordings that differ: what differs on them changed nothing.", style=DIFFERS)
    else:
        said = Text("The same run: same decisions, fills, books and money.", style="bold green")
    for name, style, run in (("A", A, found.a), ("B", B, found.b)):
        said.append(f"\n{name}  ", style=f"not bold {style}").append(clean(str(run.path)), style="not bold default")
        said.append(f"\n   digest {clean(run.digest)}", style="not bold dim default")
    return said


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _table(*head: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, style in head:
        table.add_column(name, style=style, overflow="fold")
    return table


def _changes(changes: Sequence[Change], but: str = "") -> Table:
    """Values beside each other, their names without ``but``."""
    table = _table(("", ""), ("A", A), ("B", B), ("B - A", ""))
    for change in changes:
        cells = (change.name.removeprefix(but), *map(_plain, change[1:]), _difference(change.a, change.b))
        table.add_row(*(Text(clean(text)) for text in cells))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return f"{value[:16]}..."
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _difference(a: Any, b: Any) -> str:
    """The difference of two numbers, written as numbers or as decimal text."""
    if not all(not isinstance(value, bool) and _NUMBER.fullmatch(str(value)) for value in (a, b)):
        return ""
    return f"{Decimal(str(b)) - Decimal(str(a)):+,f}"


# One event ------------------------------------------------------------------------------------------------------------------


def _kind(event: EventDifference) -> str:
    return _KINDS.get(event.table, "fill event")


def _event_title(event: EventDifference, rows: Counts) -> str:
    of = f"{rows.rows_a:,} in A, {rows.rows_b:,} in B"
    return f"First event that differs: {_kind(event)} {event.row + 1:,} ({of})\n{_utc(event.time_ns)} UTC"


def _event_words(event: EventDifference) -> str:
    what = "decides" if event.table == DECISIONS else "has an order resolved"
    if event.a is None or event.b is None:
        one, other = ("A", "B") if event.b is None else ("B", "A")
        return f"{one} {what} here; {other} has no more {_kind(event)}s."
    if event.a_time_ns != event.b_time_ns:
        one, other = ("A", "B") if event.time_ns == event.a_time_ns else ("B", "A")
        return f"{one} {what} here; {other} does not, and its next {_kind(event)} stands beside."
    return "Both have it; columns with a * differ."


def _event(event: EventDifference) -> Table:
    table = _table(("", DIFFERS), ("", ""), ("A", A), ("B", B), ("B - A", ""))
    day = _utc(event.time_ns)[:10]
    names = list((event.a or event.b or {}).keys())
    for name in names:
        differs = name in event.columns
        sides = ["-" if row is None else human(row, name, day) for row in (event.a, event.b)]
        change = _delta(event.a, event.b, name) if differs and event.a is not None and event.b is not None else ""
        style = "" if differs or None in (event.a, event.b) else "dim"
        cells = (Text("*" if differs else ""), *(Text(clean(text), style=style) for text in (name, *sides)))
        table.add_row(*cells, Text(change, style=DIFFERS))
    return table


def human(row: dict[str, Any], name: str, day: str = "") -> str:
    """A value of an event row in the unit that people use. A time of ``day`` (2026-01-02) is shown without its date."""
    value = row[name]
    if name.endswith("_age_ns"):
        return f"{_fixed(value, 6)} ms"
    if name.endswith("_ns"):
        return "none" if value == 0 else _utc(value).removeprefix(f"{day} ")
    if name.endswith("_e8"):
        return f"{_amount(value)} {_unit(row, name)}".rstrip()
    if name == "edge_bps":
        return f"{value!r} bps"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _delta(a: dict[str, Any], b: dict[str, Any], name: str) -> str:
    if isinstance(a[name], str | bool):
        return ""
    change = b[name] - a[name]
    if name.endswith("_ns"):
        return "" if 0 in (a[name], b[name]) and not name.endswith("_age_ns") else f"{_sign(change)}{_fixed(abs(change), 6)} ms"
    if name.endswith("_e8"):
        unit = _unit(a, name)
        return f"{_sign(change)}{_amount(abs(change))} {unit}".rstrip() if unit == _unit(b, name) else ""
    return f"{change:+,}" if isinstance(change, int) else f"{change:+.6g} bps"


def _unit(row: dict[str, Any], name: str) -> str:
    coin = str(row["symbol"])
    if name in _UNITS:
        return _UNITS[name]
    if name in _COIN or name.endswith("_size_e8") or (name == "fee_e8" and row["fee_in_base"]):
        return coin
    return _QUOTE.get(str(row.get("venue")), "")


def _amount(value_e8: int) -> str:
    text = format_e8(value_e8)
    return text.rstrip("0").removesuffix(".") if value_e8 % E8 else text.partition(".")[0]


def _fixed(value: int, decimals: int) -> str:
    return f"{value // 10**decimals:,}.{value % 10**decimals:0{decimals}d}"


def _sign(value: int) -> str:
    return "-" if value < 0 else "+"


def _utc(time_ns: int) -> str:
    return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S}.{time_ns % 10**9:09d}"


# How much -------------------------------------------------------------------------------------------------------------------


def _counts(counts: Sequence[Counts]) -> Table:
    table = _table(("", ""), ("equal, then", ""), ("alike", ""), ("changed", DIFFERS), ("only A", A), ("only B", B), ("", "dim"))
    for count in counts:
        numbers = (count.before, count.alike, count.changed, count.only_a, count.only_b)
        shown = [f"{column} {n:,}" for column, n in list(count.columns.items())[:_MOST_COLUMNS]]
        more = len(count.columns) - len(shown)
        words = f"{', '.join(shown)}{f' and {more} more' if more else ''}"
        name = "decisions" if count.table == DECISIONS else "fill events"
        table.add_row(name, *(Text(f"{n:,}", justify="right") for n in numbers), words)
    return table


def _why_no_event(found: Comparison) -> str:
    equal = "Every decision and every fill event is equal."
    names = [change.name for change in found.inputs]
    if any(not name.startswith(("tape", "recording")) for name in names):
        return f"{equal} The digest covers the configuration too, and that differs."
    if found.results:
        return f"{equal} What differs is what the books and counters say at the end."
    if names:
        return f"{equal} The books differ in levels that changed no decision: the digest covers every level of every book."
    return f"{equal} Nothing that run.json states differs either: replay both recordings with one version of arbl2."


# Frames ---------------------------------------------------------------------------------------------------------------------


def _frames(found: Comparison, *, differing: bool) -> list[RenderableType]:
    """The frames that differ between the recordings, or those that only stand around an event."""
    return [
        part for window in found.windows if bool(window.differs) is differing for part in (_window_title(window), _Frames(window))
    ]


def _window_title(window: Window) -> Text:
    title = _title(f"{window.title[0].upper()}{window.title[1:]}, recording {clean(window.session)}")
    if window.fields:
        title.append(f"\ndiffers in {', '.join(window.fields)}", style="not bold")
    return title


class _Frames:
    """Frames below each other, each with the start of its payload; of a pair that differs the bytes that do are pointed at."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """For rich."""
        room = max(20, options.max_width - 8)
        yield Text(f"{'':4}{'seq':>10}  {'time (UTC)':29}  {'venue':7}  {'conn':>4}  {'kind':8}  {'bytes':>8}", style="dim")
        for k, (ours, theirs) in enumerate(self._window.pairs):
            mark = ">" if k == self._window.focus else " "
            if self._window.one_tape or _alike(ours, theirs):
                yield from _frame(ours or theirs, mark, "", "bold" if mark == ">" else "", room, None)
                continue
            at = payload_change(ours, theirs)
            yield from _frame(ours, mark, "A", A, room, at, theirs)
            yield from _frame(theirs, mark, "B", B, room, at, ours)
            if ours is not None and theirs is not None and at is not None:
                yield Text(f"{'':8}{_bytes_words(ours.frame.payload, theirs.frame.payload, at)}", style=DIFFERS)


def _alike(a: Seen | None, b: Seen | None) -> bool:
    return a is not None and b is not None and (a is b or (a.frame == b.frame and a.time_ns == b.time_ns))


def _frame(
    seen: Seen | None, mark: str, side: str, style: str, room: int, at: int | None, other: Seen | None = None
) -> Iterator[Text]:
    if seen is None:
        yield Text(f"{mark} {side:2}{'none':>10}", style=style)
        return
    frame = seen.frame
    yield Text(
        f"{mark} {side:2}{frame.seq:>10,}  {_utc(seen.time_ns)}  {frame.venue or '-':7}  {frame.conn:>4}  "
        f"{frame.kind.name.lower():8}  {len(frame.payload):>8,}",
        style=style,
    )
    start = max(0, at - room // 3) if at is not None else 0
    more = "..." if start else ""
    shown = frame.payload[start : start + room - len(more)]
    line = Text(f"{'':8}{more}{_ascii(shown)}", style="dim", no_wrap=True)
    if at is None or other is None:
        yield line
        return
    theirs = other.frame.payload[start : start + len(shown)]
    differs = [i for i in range(len(shown)) if shown[i : i + 1] != theirs[i : i + 1]]
    indent = 8 + len(more)
    for i in differs:
        line.stylize(f"not dim {DIFFERS}", indent + i, indent + i + 1)
    yield line
    if differs:
        pointers = "".join("^" if shown[i : i + 1] != theirs[i : i + 1] else " " for i in range(len(shown)))
        yield Text(f"{'':{indent}}{pointers.rstrip()}", style=DIFFERS, no_wrap=True)


def _ascii(raw: bytes) -> str:
    """One character a byte, so that what is pointed at stands where it is."""
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in raw)


def _bytes_words(a: bytes, b: bytes, at: int) -> str:
    sides = [f"0x{raw[at]:02x} {_ascii(raw[at : at + 1])!r}" if at < len(raw) else "the end" for raw in (a, b)]
    count = sum(mine != other for mine, other in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return f"from byte {at:,} on: {sides[0]} in A, {sides[1]} in B; {count:,} bytes differ"
