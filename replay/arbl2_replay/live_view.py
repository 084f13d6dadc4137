"""What a live run looks like: books, edges, positions and figures on a terminal, one line in a pipe, tables at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from arbl2.aggregator import SourceStatus
from arbl2.events import FillStatus
from arbl2.frames import ExchangeId
from arbl2.money import E8, format_e8
from arbl2_replay.report import run_figures

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType

    from arbl2.aggregator import BookTop, MultiExchangeL2Snapshot
    from arbl2_replay.live import Latencies, LiveResult, LiveRun, Trading

_LINES_AROUND = 9
_STYLES = {SourceStatus.ACTIVE: "green", SourceStatus.STALE: "yellow", SourceStatus.DISCONNECTED: "red"}


class Recording(Protocol):
    """What is shown of the recorder: the session, seconds, frames, messages dropped, alarms."""

    @property
    def session(self) -> str: ...  # noqa: D102
    @property
    def elapsed_s(self) -> float: ...  # noqa: D102
    @property
    def frames(self) -> int: ...  # noqa: D102
    @property
    def dropped(self) -> int: ...  # noqa: D102
    @property
    def alarms(self) -> int: ...  # noqa: D102


class TradingView:
    """Use as a context and hand it to the recorder as a viewer of its status."""

    def __init__(self, run: LiveRun, console: Console | None = None) -> None:
        self._run = run
        self._console = console or Console(stderr=True)
        self._announced = False
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> TradingView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, recording: Recording) -> None:
        """Draw the run as it is now."""
        if self._live is None:
            if not self._announced:
                self._announced = True
                self._console.print(f"paper run on {recording.session}; Ctrl-C or SIGTERM ends it")
            return
        trading = self._run.look()
        if trading is not None:
            self._live.update(render(recording, trading, self._console.height), refresh=True)


def render(recording: Recording, trading: Trading, height: int = 24) -> Group:
    """The run as a table of books and lines of figures, at most ``height`` lines: coins that do not fit are counted."""
    room = max(1, (height - _LINES_AROUND) // 2)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("coin", "venue", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("bid", "ask", "age ms", "edge bps", "held", "legs", "filled"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, book in enumerate(trading.books[:room]):
        for exchange in ExchangeId:
            table.add_row(*_row(trading, number, book, exchange))
    minutes, seconds = divmod(int(recording.elapsed_s), 60)
    lines = [Text(f"{trading.session}   paper run, {minutes:,d}:{seconds:02d}   (Ctrl-C ends it)", style="bold")]
    rest: list[Text] = []
    if len(trading.books) > room:
        rest.append(Text(f"and {len(trading.books) - room:,} more coins", style="dim"))
    rest += map(Text, _figures(recording, trading))
    if trading.problem:
        rest.append(Text(f"The run has stopped, the recording goes on: {trading.problem}", style="bold red"))
    for line in [*lines, *rest]:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines, table, *rest)


def _row(trading: Trading, number: int, book: MultiExchangeL2Snapshot, exchange: ExchangeId) -> list[Text]:
    top = book.per_exchange[exchange]
    first = exchange is ExchangeId.UPBIT
    edge = book.sell_upbit_bps if first else book.buy_upbit_bps
    legs = trading.kpi["symbols"][number]["venues"][exchange.value]
    filled = legs[FillStatus.FILLED.name.lower()] + legs[FillStatus.PARTIAL.name.lower()]
    held = trading.positions[book.symbol][exchange.value]
    return [
        Text(book.symbol if first else ""),
        Text(exchange.value),
        Text(top.status.value, style=_STYLES[top.status]),
        *(Text(_price(top, side)) for side in ("bids", "asks")),
        Text(f"{top.age_ns / 1e6:,.0f}" if top.bids or top.asks else "-"),
        # the edge of a row is that of selling there and buying on the other venue
        Text("-" if edge is None else f"{edge:+.1f}"),
        Text(_held(held)),
        Text(f"{legs['legs']:,}"),
        Text(f"{filled:,}"),
    ]


def _price(top: BookTop, side: str) -> str:
    levels = getattr(top, side)
    return f"{levels[0][0] / E8:,.8f}".rstrip("0").rstrip(".") if levels else "-"


def _held(coin_e8: int) -> str:
    return "0" if not coin_e8 else f"{'+' if coin_e8 > 0 else ''}{format_e8(coin_e8, 4)}"


def _figures(recording: Recording, trading: Trading) -> list[str]:
    kpi = trading.kpi
    pnl = f"PnL {_krw(kpi['pnl_krw'])}"
    if kpi["pnl_krw_band"] and kpi["pnl_krw_band"]["pessimistic"]:
        band = kpi["pnl_krw_band"]
        pnl += f" ({_krw(band['pessimistic'])} to {_krw(band['optimistic'])})"
    refused = ", ".join(f"{reason} {count:,}" for reason, count in kpi["refused_asks"].items()) or "none"
    fills = f"{kpi['legs']:,} legs: {kpi['legs_filled']:,} filled, {kpi['legs_partial']:,} partial"
    latency = trading.latency
    behind = max(0, recording.frames - trading.frames)
    return [
        f"{kpi['decisions']:,} decisions, {fills}   {pnl}",
        f"refused: {refused}",
        f"decision {latency.decision}   frame {latency.frame}",
        f"{recording.frames:,} frames, {behind:,} of them waiting, dropped {recording.dropped:,}, alarms {recording.alarms:,}",
    ]


def _krw(text: str | None) -> str:
    return "unknown" if text is None else f"{float(text):+,.0f} KRW"


def live_report(result: LiveResult) -> RenderableType:
    """A live run that has ended, ready to print."""
    run = result.run
    head = Text(
        f"{run.session}: paper run on {run.frames:,} frames over {run.tape_s:,.1f} s, as they were recorded", style="bold"
    )
    return Group(head, *run_figures(run), latency_report(result.latency), Text(f"next    arbl2 verify {run.session}"))


def latency_report(latency: Latencies) -> RenderableType:
    """What was measured, in milliseconds."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("latency, ms")
    for name in ("count", "p50", "p99", "max"):
        table.add_column(name, justify="right")
    for name, what in (
        ("decision", "arrival of a frame to the order intent"),
        ("frame", "arrival of a frame to the engine's answer"),
        ("feed", "of this, the engine"),
        ("stamp", "arrival of a frame to its seq"),
    ):
        row: Any = getattr(latency, name)
        table.add_row(what, f"{row.count:,}", *(f"{us / 1e3:.3f}" for us in (row.p50_us, row.p99_us, row.max_us)))
    return table
