"""What a replay looks like to a person: tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arbl2.updates import Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from arbl2_replay.driver import RunResult

_LABELS = {reason.label: reason for reason in Reason}
_LEFT_OUT = ("repeated", "nothing_visible", "no_zone", "unresolved")
_MOST_ZONES = 20


def run_report(result: RunResult) -> RenderableType:
    """Everything a replay found, ready to print."""
    return Group(_headline(result), *run_figures(result))


def run_figures(result: RunResult) -> list[RenderableType]:
    """What is to be said of a run, whether it was replayed or live."""
    parts: list[RenderableType] = []
    if result.kpi["symbols"] and result.kpi["decisions"]:
        parts += [_trades(result.kpi), _money(result.kpi), _notes(result.kpi)]
    elif result.kpi["symbols"]:
        parts += [_books(result), Text("No decision: no edge reached its threshold while both books and KRW-USDT were fresh.")]
    elif any(book["updates"] for book in result.books):
        parts += [_books(result), Text("No coin was recorded on both venues, so there was nothing to trade.", style="dim")]
    if not any(book["updates"] for book in result.books):
        parts.append(Text("No full-window book on this tape: what is on it is counted below and not used yet.", style="yellow"))
    parts.append(_messages(result))
    if result.calibration is not None:
        parts += _calibrated(result.calibration)
    if result.alarms:
        alarms = ", ".join(f"{name} {n:,}" for name, n in result.alarms.items())
        parts.append(Text(f"alarms of the recorder: {alarms} (their frames have kind 'alarm')", style="yellow"))
    if result.lateness is not None:
        late = result.lateness
        parts.append(
            Text(
                f"pacing: {late.frames:,} frames, late by {late.p50_ms:.2f} ms (median), {late.p99_ms:.2f} ms (p99), "
                f"{late.max_ms:.2f} ms (max)"
            )
        )
    parts.append(Text(f"digest  {result.digest}"))
    if result.checkpoint is not None:
        parts.append(Text(f"kept in the middle: go on with --resume {result.checkpoint}", style="yellow"))
    if result.run_dir is not None:
        parts.append(Text(f"run     {result.run_dir}"))
    return parts


def _table(title: str, *columns: str) -> Table:
    """Narrow enough for 80 columns: numbers are never cut off."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _headline(result: RunResult) -> Text:
    rate = result.frames / result.elapsed_s if result.elapsed_s else 0.0
    return Text(
        f"{result.session}: {result.frames:,} frames over {result.tape_s:,.1f} s of tape, "
        f"replayed in {result.elapsed_s:.2f} s ({rate:,.0f} frames/s)",
        style="bold",
    )


def _trades(kpi: dict[str, Any]) -> Table:
    table = _table("Decisions and fills", "symbol", "venue")
    for name in ("entries", "exits", "legs", "filled", "partial", "unfilled", "no\nbook", "fill\nratio", "slippage\nbps"):
        table.add_column(name, justify="right")
    for row in kpi["symbols"]:
        for k, (venue, legs) in enumerate(row["venues"].items()):
            decisions = row["decisions"]
            table.add_row(
                row["symbol"] if k == 0 else "",
                venue,
                str(decisions["entries"]) if k == 0 else "",
                str(decisions["exits"]) if k == 0 else "",
                str(legs["legs"]),
                str(legs["filled"]),
                str(legs["partial"]),
                str(legs["unfilled"]),
                str(legs["no_book"] + legs["in_flight"]),
                "-" if legs["fill_ratio"] is None else f"{legs['fill_ratio']:.1%}",
                "-" if legs["slippage_bps"] is None else f"{legs['slippage_bps']:+.2f}",
            )
    return table


def _money(kpi: dict[str, Any]) -> Table:
    table = _table('Money (each coin marked alone; "all" nets the accounts, then marks the rest)', "symbol")
    for what, currencies in (("fees", ("KRW", "USDT", "coin")), ("change", ("KRW", "USDT", "coin")), ("PnL in", ("KRW", "USDT"))):
        for currency in currencies:
            table.add_column(f"{what}\n{currency}", justify="right", overflow="fold")
    for row in kpi["symbols"]:
        name, pnl = row["symbol"], row["pnl"]
        upbit, binance = row["venues"]["upbit"]["fees"], row["venues"]["binance"]["fees"]
        table.add_row(
            name,
            _number(upbit["KRW"], 0),
            _number(binance["USDT"], 2),
            _number(binance[name], 5),
            _number(pnl["krw"], 0),
            _number(pnl["usdt"], 2),
            _number(pnl[name], 5),
            _number(pnl["total_krw"], 0),
            _number(pnl["total_usdt"], 2),
        )
    table.add_row("all", *[""] * 6, _number(kpi["pnl_krw"], 0), _number(kpi["pnl_usdt"], 2), style="bold")
    return table


def _notes(kpi: dict[str, Any]) -> Text:
    lines = []
    band = kpi["pnl_krw_band"]
    if band is not None:
        lines.append(
            f"PnL band in KRW, by the book before and after each arrival: {_number(band['pessimistic'], 0)} pessimistic, "
            f"{_number(band['expected'], 0)} expected, {_number(band['optimistic'], 0)} optimistic "
            f"({kpi['legs_unresolved']:,} of {kpi['legs']:,} legs unresolved)"
        )
    lines.append(
        f"coins marked at the {kpi['marks']['coins']}; USDT at {kpi['marks']['fx']['bid']} / {kpi['marks']['fx']['ask']}"
    )
    if kpi["refused_asks"]:
        lines.append("refused asks: " + ", ".join(f"{reason} {count:,}" for reason, count in kpi["refused_asks"].items()))
    return Text("\n".join(lines))


def _calibrated(found: dict[str, Any]) -> list[RenderableType]:
    """What a calibration says of the orders beside what came."""
    head = f"Calibration {found['id'][:12]} ({found['name']}) beside this run"
    if found["in_sample"]:
        said = Text(f"{head}: IN SAMPLE. It was made from this time, so what agrees proves nothing.", style="yellow")
    else:
        said = Text(f"{head}: out of sample, it knows nothing of this time.")
    left_out = ", ".join(f"{name.replace('_', ' ')} {found[name]:,}" for name in _LEFT_OUT if found[name])
    counts = f"{found['counted']:,} of {found['orders']:,} orders compared, {found['unknown']:,} of them in unknown zones"
    lines = [f"{counts}; left out: {left_out or 'none'}"]
    fill = found["total"]["fill_ratio"]
    if fill["n"]:
        lines.append(f"fill ratio of all with a point: said {fill['predicted']:.3f}, came {fill['observed']:.3f}")
    if not found["rows"]:
        return [said, *map(Text, lines)]
    ahead = any(row["interval_of"] == "next_session" for row in found["rows"])
    meaning = (
        "survival: of what an order saw, the share left at its arrival; 95 %: of the mean of the "
        f"{'next session' if ahead else 'calibrated sessions, a new one may differ by more'}, never of one order"
    )
    return [said, _zones(found), *map(Text, lines), Text(meaning, style="dim")]


def _zones(found: dict[str, Any]) -> Table:
    """The zones that most orders fell in, in the order of the calibration, and all that have a point together."""
    table = _table("")
    table.add_column("\nzone", overflow="fold")
    for name in ("\norders", "survival\nsaid", "\n95 %", "\ncame", "drift bps\nsaid", "\ncame"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = found["rows"]
    most = set(sorted(range(len(rows)), key=lambda k: -rows[k]["n"])[:_MOST_ZONES])
    for k in sorted(most):
        zone, uses = rows[k]["zone_id"], rows[k]["uses_zone_id"]
        name = zone if uses in (None, zone) else f"{zone}\n  said of {uses}"
        table.add_row(name, f"{rows[k]['n']:,}", *_said_and_came(rows[k]))
    rest = [row["n"] for k, row in enumerate(rows) if k not in most]
    if rest:
        table.add_row(f"{len(rest):,} more zones: --json has all", f"{sum(rest):,}", style="dim")
    if found["total"]["survival"]["n"]:
        table.add_row("all with a point", f"{found['total']['survival']['n']:,}", *_said_and_came(found["total"]), style="bold")
    return table


def _said_and_came(row: dict[str, Any]) -> list[str]:
    survival, drift = row["survival"], row["drift_bps"]
    interval = survival.get("interval")
    return [
        "bound" if interval is not None and survival["predicted"] is None else _share(survival["predicted"]),
        "" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
        _share(survival["observed"]),
        *("unknown" if drift[name] is None else f"{drift[name]:+.2f}" for name in ("predicted", "observed")),
    ]


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _books(result: RunResult) -> Table:
    table = _table("Books", "venue", "instrument")
    for name in ("updates", "median\ngap ms", "best bid", "best ask"):
        table.add_column(name, justify="right")
    for book in result.books:
        if book["updates"]:
            table.add_row(
                str(book["venue"]),
                str(book["instrument"]),
                f"{book['updates']:,}",
                f"{int(book['gap_median_ns']) / 1e6:,.0f}" if book["gap_median_ns"] else "-",
                *(f"{int(book[side]) / 1e8:,.8f}".rstrip("0").rstrip(".") for side in ("best_bid_e8", "best_ask_e8")),
            )
    return table


def _messages(result: RunResult) -> Text:
    lines = []
    for venue, counts in result.reasons.items():
        usual = {name: n for name, n in counts.items() if not _LABELS[name].is_refusal}
        refused = {name: n for name, n in counts.items() if _LABELS[name].is_refusal}
        lines.append(f"{venue if venue != '-' else 'recorder'}: " + ", ".join(f"{name} {n:,}" for name, n in usual.items()))
        if refused:
            lines.append("  refused, kept on the tape: " + ", ".join(f"{name} {n:,}" for name, n in refused.items()))
    return Text("\n".join(lines), style="dim")


def _number(text: str | None, decimals: int) -> str:
    return "unknown" if text is None else f"{float(text):,.{decimals}f}"
