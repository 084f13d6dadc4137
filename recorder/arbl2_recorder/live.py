"""How a running recording shows itself: a table on a terminal, one line in a pipe, JSON lines for machines.

A terminal or a pipe can stand still for as long as it likes; ``Aside`` keeps that away from the thread that stamps.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from arbl2_recorder.status import as_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from arbl2_recorder.status import RecordResult, Status, StreamStatus, VenueStatus

_logger = logging.getLogger("arbl2.recorder")
_LINES_AROUND = 4  # title, heads, alarm, and one that is left to the prompt
_LAST_LOOK_S = 1.0


class Aside:
    """Hands snapshots to viewers in a thread of its own, and only the newest one to a viewer that is slow.

    Use as a context and hand it to ``record`` as ``on_status``. A viewer that raises is left out from then on.
    """

    def __init__(self, *viewers: Callable[[Status], None]) -> None:
        self._viewers = list(viewers)
        self._news = threading.Condition()
        self._status: Status | None = None
        self._over = False
        self._thread = threading.Thread(target=self._work, name="arbl2-status", daemon=True)

    def __enter__(self) -> Aside:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join(_LAST_LOOK_S)

    def __call__(self, status: Status) -> None:
        """Take one snapshot; never waits for a viewer."""
        with self._news:
            self._status = status
            self._news.notify()

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._status is not None or self._over)
                status, self._status = self._status, None
            if status is None:
                return
            for viewer in tuple(self._viewers):
                try:
                    viewer(status)
                except Exception:
                    _logger.warning("%s shows no more", type(viewer).__name__, exc_info=True)
                    self._viewers.remove(viewer)


class JsonLines:
    """One status a second and at the end the result, a JSON object a line, until nobody reads them any more.

    Writes to a file descriptor, unbuffered: what a reader who left did not take must not be tried again at exit.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._turn = threading.Lock()
        self._said: tuple[str, int] | None = None

    def __call__(self, status: Status) -> None:
        """Write the first snapshot of each second and phase. Raises OSError once nobody reads."""
        moment = status.phase, int(status.elapsed_s)
        if moment != self._said:
            self._said = moment
            self._say(status)

    def result(self, result: RecordResult) -> None:
        """Write the last line."""
        with suppress(OSError):
            self._say(result)

    def _say(self, what: Status | RecordResult) -> None:
        line = as_json(what)
        with self._turn:
            while line:
                line = line[os.write(self._handle, line) :]


class LiveView:
    """Use as a context and hand it to ``record`` as ``on_status``."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._announced = False
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, status: Status) -> None:
        """Draw one snapshot."""
        if self._live is not None:
            self._live.update(render(status, self._console.height), refresh=True)
        elif not self._announced:
            self._announced = True
            self._console.print(f"recording {status.session}; Ctrl-C or SIGTERM ends it")


def render(status: Status, height: int = 24) -> Group:
    """A snapshot as a table of venues and streams, lines of figures, and the last alarm; never more than ``height`` lines.

    Where not all streams fit, those that have been quiet for longest are shown.
    """
    figures = _figures(status)
    room = max(height - _LINES_AROUND - len(status.venues) - len(figures), 1)
    shown = _quietest(status.streams, room if len(status.streams) <= room else room - 1)
    if len(shown) < len(status.streams):
        figures.insert(0, f"and {len(status.streams) - len(shown):,} streams that are less quiet")
    alarm = f"{status.alarms:,} alarms, last: {printable(status.last_alarm)}" if status.alarms else "no alarms"
    lines = [Text(f"{status.session}   (Ctrl-C ends it)", style="bold"), *map(Text, figures)]
    lines.append(Text(alarm, style="yellow" if status.alarms else "dim"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(lines[0], _table(status.venues, shown), *lines[1:])


def _table(venues: Sequence[VenueStatus], streams: Sequence[StreamStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("venue", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("msg/s", "messages", "last", "open", "reconnects"):
        table.add_column(name, justify="right", no_wrap=True)
    for venue in venues:
        table.add_row(*_venue_row(venue))
        for stream in streams:
            if stream.venue == venue.name:
                table.add_row(*_stream_row(stream), style="dim")
    return table


def _quietest(streams: Sequence[StreamStatus], room: int) -> list[StreamStatus]:
    if len(streams) <= room:
        return list(streams)

    def quiet_s(index: int) -> float:
        age_s = streams[index].last_message_s
        # whole seconds, or the rows would trade places with every message
        return float("inf") if age_s is None else float(int(age_s))

    chosen = sorted(range(len(streams)), key=quiet_s, reverse=True)[:room]
    return [streams[index] for index in sorted(chosen)]


def _figures(status: Status) -> list[str]:
    delay, clock = status.queue, status.clock
    true_time = "" if clock is None else f"  clock {clock.offset_ns / 1e6:+.1f} ms"
    if clock is not None and not clock.synchronised:
        true_time = "  clock not synchronised"
    free = "" if status.disk_free_bytes is None else f"  free {size(status.disk_free_bytes)}"
    shipped = f"  shipped {status.shipped_segments:,}" if status.shipped_segments else ""
    counts = f"dropped {status.dropped:,}  late {status.late_frames:,}  gaps {sum(status.gaps.values()):,}"
    figures = [
        f"{status.phase} {_clock(status.elapsed_s)}  queue {size(status.queued_bytes)}  {counts}",
        f"delay p50 {delay.p50_us / 1e3:.2f}  p99 {delay.p99_us / 1e3:.2f}  max {delay.max_us / 1e3:.2f} ms{true_time}",
        f"log {size(status.logged_bytes)}  sealed {size(status.sealed_bytes)} in {status.segments:,}{shipped}{free}",
    ]
    if status.ship_problem:
        figures.append(f"NOT shipped: {printable(status.ship_problem)}")
    troubled = [venue for venue in status.venues if venue.problem and venue.state != "open"]
    figures += [f"{venue.name} {venue.state}: {printable(venue.problem)}" for venue in troubled]
    if status.last_gap:
        figures.append(f"last gap: {printable(status.last_gap)}")
    return figures


def _venue_row(venue: VenueStatus) -> tuple[str, ...]:
    counts = f"{venue.rate_per_s:,.0f}", f"{venue.messages:,}", _age(venue.last_message_s)
    return venue.name, venue.state, *counts, f"{venue.open_connections:,}", f"{venue.reconnects:,}"


def _stream_row(stream: StreamStatus) -> tuple[str, ...]:
    counts = f"{stream.rate_per_s:,.1f}", f"{stream.messages:,}", _age(stream.last_message_s)
    return f"  {printable(stream.name)}", "", *counts, "", ""


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f} s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:d}:{minutes % 60:02d}:{rest:02d}"


def printable(text: str) -> str:
    """Without line ends and control codes: venues choose words that reach the terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def size(count: float) -> str:
    """Bytes in the unit that suits a reader."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def alarms_to_stderr() -> None:
    """Where nobody sees a live view, alarms are lines with a UTC time, as a journal wants them."""
    form = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(form)
    logging.getLogger("arbl2").addHandler(handler)
