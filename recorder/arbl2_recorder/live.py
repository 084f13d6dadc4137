"""The live view of a recording on a terminal; one line in a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from arbl2_recorder.status import Status, VenueStatus


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
            self._live.update(render(status), refresh=True)
        elif not self._announced:
            self._announced = True
            self._console.print(f"recording {status.session}; Ctrl-C or SIGTERM ends it")


def render(status: Status) -> Group:
    """A snapshot as a table of venues, a line of sizes, and the last alarm."""
    table = Table(box=None, pad_edge=False)
    for name in ("venue", "state", "msg/s", "messages", "last", "dials"):
        table.add_column(name, justify="left" if name in ("venue", "state") else "right")
    for venue in status.venues:
        table.add_row(*_row(venue))
    sizes = (
        f"{status.phase} {_clock(status.elapsed_s)}  queue {_size(status.queued_bytes)}  log {_size(status.logged_bytes)}"
        f"  sealed {_size(status.sealed_bytes)} in {status.segments}  dropped {status.dropped:,}"
    )
    alarm = f"{status.alarms} alarms, last: {status.last_alarm}" if status.alarms else "no alarms"
    style = "yellow" if status.alarms else "dim"
    return Group(Text(f"{status.session}   (Ctrl-C ends it)", style="bold"), table, Text(sizes), Text(alarm, style=style))


def _row(venue: VenueStatus) -> tuple[str, ...]:
    last = "-" if venue.last_message_s is None else f"{venue.last_message_s:.1f} s"
    state = venue.state if venue.state == "open" or not venue.problem else f"{venue.state}: {venue.problem}"
    return venue.name, state, f"{venue.rate_per_s:,.0f}", f"{venue.messages:,}", last, str(venue.connections)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:d}:{minutes % 60:02d}:{rest:02d}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
