"""A Prometheus endpoint on loopback: renders the newest status when it is asked. Needs ``pip install 'arbl2[metrics]'``.

Metrics have a registry of their own, so that a program which has some already keeps them apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arbl2.errors import ConfigError
from arbl2_recorder import clock
from arbl2_recorder.ledger import Cause

try:
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError("metrics need the Prometheus client library. Run: pip install 'arbl2[metrics]'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from prometheus_client import Metric

    from arbl2_recorder.status import Status

HOST = "127.0.0.1"


class Metrics:
    """Serves ``http://127.0.0.1:port/metrics`` as a context; hand it to ``record`` as ``on_status``. Port 0 takes a free one.

    Raises ConfigError on entry if the port is taken.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._latest = _Latest()

    def __enter__(self) -> Metrics:
        registry = CollectorRegistry()
        registry.register(self._latest)
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(self.port, HOST, registry)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"metrics cannot be served on {HOST}:{self.port}: {reason}. Choose another port.") from error
        self.port = self._server.server_port
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __call__(self, status: Status) -> None:
        """Serve this snapshot from now on."""
        self._latest.newest = status, clock.mono_ns()


class _Latest(Collector):
    newest: tuple[Status, int] | None = None

    def collect(self) -> Iterator[Metric]:
        """Everything the newest status says; nothing before the first."""
        if self.newest is None:
            return
        status, taken_ns = self.newest
        age_s = max(clock.mono_ns() - taken_ns, 0) / 1e9
        yield _metric("status_age_seconds", "since the recorder last said something; grows if it hangs", [((), age_s)])
        yield _metric("session_info", "1 for the session being recorded", [((status.session, status.phase), 1)], "session phase")
        for name, text, read in _SIMPLE:
            yield _metric(name, text, [((), read(status))])
        yield from _by_venue(status)
        yield from _by_stream(status)
        if status.clock is not None:
            yield _metric("clock_offset_seconds", "wall clock ahead of true time", [((), status.clock.offset_ns / 1e9)])
            yield _metric("clock_error_seconds", "the most that the offset can be wrong", [((), status.clock.error_ns / 1e9)])
            yield _metric("clock_synchronised", "1 if a time service steers the clock", [((), status.clock.synchronised)])
        delay = status.queue
        quantiles = (("0.5", delay.p50_us), ("0.99", delay.p99_us), ("1", delay.max_us))
        rows = [((quantile,), us / 1e6) for quantile, us in quantiles]
        yield _metric("queue_delay_seconds", "from the arrival of the bytes to the seq of their frame", rows, "quantile")
        # a cause that never happened counts 0: an alarm on its growth sees the first one too
        counts = {**{cause.value: 0 for cause in Cause}, **status.gaps}
        rows = [((cause,), n) for cause, n in counts.items()]
        yield _metric("gaps_total", "entries of the gap ledger", rows, "cause")


_SIMPLE: tuple[tuple[str, str, Callable[[Status], float | None]], ...] = (
    ("session_seconds", "since the session began", lambda status: status.elapsed_s),
    ("frames_total", "frames that have a seq", lambda status: status.frames),
    ("late_frames_total", "frames that came while the event loop was stalled", lambda status: status.late_frames),
    ("dropped_messages_total", "messages that found no room in the queue", lambda status: status.dropped),
    ("alarms_total", "ALARM frames", lambda status: status.alarms),
    ("queued_bytes", "frames that wait for the disk", lambda status: status.queued_bytes),
    ("logged_bytes_total", "bytes appended to logs", lambda status: status.logged_bytes),
    ("waiting_logs", "logs that wait to be sealed", lambda status: status.waiting_logs),
    ("sealed_bytes", "bytes of sealed segments", lambda status: status.sealed_bytes),
    ("sealed_segments", "sealed segments", lambda status: status.segments),
    ("shipped_segments_total", "segments shipped to object storage", lambda status: status.shipped_segments),
    ("ship_problem", "1 if sealed segments could not be shipped", lambda status: bool(status.ship_problem)),
    ("disk_free_bytes", "free space below the folder of recordings", lambda status: status.disk_free_bytes),
)


def _by_venue(status: Status) -> Iterator[Metric]:
    venues = status.venues
    columns = (
        ("venue_messages_total", "messages of a venue", [venue.messages for venue in venues]),
        ("venue_bytes_total", "payload bytes of a venue's messages", [venue.bytes for venue in venues]),
        ("venue_last_message_age_seconds", "age of a venue's last message", [venue.last_message_s for venue in venues]),
        ("connections_open", "open connections", [venue.open_connections for venue in venues]),
        ("connections_total", "connections opened", [venue.connections for venue in venues]),
        ("reconnects_total", "connections that replaced a lost one", [venue.reconnects for venue in venues]),
        ("copies_total", "messages that another connection had delivered", [venue.copies for venue in venues]),
    )
    for name, text, values in columns:
        rows = (((venue.name,), value) for venue, value in zip(venues, values, strict=True))
        yield _metric(name, text, rows, "venue")


def _by_stream(status: Status) -> Iterator[Metric]:
    labels = [(stream.venue, stream.name) for stream in status.streams]
    counts = [stream.messages for stream in status.streams]
    ages = [stream.last_message_s for stream in status.streams]
    yield _metric("messages_total", "messages of a stream", zip(labels, counts, strict=True), "venue stream")
    name, text = "last_message_age_seconds", "age of a stream's last message"
    yield _metric(name, text, zip(labels, ages, strict=True), "venue stream")


def _metric(name: str, text: str, rows: Iterable[tuple[tuple[str, ...], float | None]], labels: str = "") -> Metric:
    """A counter if its name ends so, else a gauge; what is not known has no row."""
    family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    metric = family(f"arbl2_{name}", text, labels=labels.split())
    for values, value in rows:
        if value is not None:
            metric.add_metric(values, float(value))
    return metric
