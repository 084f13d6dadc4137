"""A live run in one call, and books to pull while it goes on: recorder and engine joined.

``live`` records and trades on paper until it is over. ``MultiExchangeL2Provider`` does the same in a thread of its own and
answers ``get_latest_snapshot`` meanwhile, from the aggregator of the run: there is no second book.
"""
# ruff: noqa: PLC0415 - the parts are joined inside functions only

from __future__ import annotations

import asyncio
import dataclasses
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arbl2.config import RunConfig
from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from arbl2.aggregator import MultiExchangeL2Snapshot, SourceStatus
    from arbl2.policy import Policy
    from arbl2.zones import CalibrationTable
    from arbl2_recorder import Endpoints, RecordConfig, RecordResult, Status
    from arbl2_recorder.recorder import Stop
    from arbl2_replay.live import LiveResult, LiveRun

ONE_SESSION_S = 1e9
"""A live run is one session: it would not go on in another one with the positions that it holds."""
RUNS = Path("runs")


@dataclass(frozen=True, slots=True)
class LiveOutcome:
    """What was recorded, and what was traded on it."""

    recording: RecordResult
    live: LiveResult


def live(
    recording: RecordConfig,
    config: RunConfig | None = None,
    *,
    runs: Path = RUNS,
    policy: Policy | None = None,
    calibration: CalibrationTable | None = None,
    on_run: Callable[[LiveRun], Callable[[Status], None]] | None = None,
    stop: Stop | None = None,
) -> LiveOutcome:
    """Record, trade on paper what comes while it comes, seal the tape and write the run to ``runs/<session>-live-<digest>``.

    What ``calibration`` says of the orders is compared with what came at the end. ``on_run`` gets the run before it begins and
    returns what is told the recorder's status. Ends as ``record`` does. Raises what that raises; and what ended the run, after
    the recording was sealed: it goes on without the run.
    """
    from arbl2_recorder import Listener, record
    from arbl2_replay.clock import punctual
    from arbl2_replay.live import LiveRun

    run = LiveRun(config or RunConfig(), runs, policy=policy)
    run.calibration = calibration
    on_status = on_run(run) if on_run is not None else None
    recording = dataclasses.replace(recording, session_s=ONE_SESSION_S)
    try:
        with punctual():
            listener = Listener(run.feed, on_session=run.begin, on_idle=run.idle, on_error=run.lost)
            recorded = record(recording, on_status=on_status, on_frame=listener, stop=stop)
        return LiveOutcome(recorded, run.finish(recorded.path, recorded.duration_s))
    except BaseException:
        run.abandon()
        raise


class MarketDataProvider(Protocol):
    """Who has the latest book of a symbol: pulled, in a thread or in an event loop."""

    def get_latest_snapshot(self, symbol: str) -> Any:
        """The latest book, None if there is none yet."""

    def start(self) -> None:
        """Begin to listen."""

    def stop(self) -> Any:
        """Stop."""

    async def aget_latest_snapshot(self, symbol: str) -> Any:
        """As ``get_latest_snapshot``."""

    async def astart(self) -> None:
        """As ``start``."""

    async def astop(self) -> Any:
        """As ``stop``."""


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A venue's connections. ``state``: open, dialling, waiting (for the next dial) or stopped."""

    state: str
    open_connections: int
    reconnects: int
    messages: int
    last_message_s: float | None
    problem: str


_STOPPED = ConnectionStatus("stopped", 0, 0, 0, None, "")


class MultiExchangeL2Provider:
    """Both venues' books of some coins, live, while they are recorded and traded on paper.

    ``start`` returns when every coin has a book of at least one venue, or after ``patience_s``. Every method may be called from
    any thread.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        *,
        config: RunConfig | None = None,
        tapes: Path = Path("tapes"),
        runs: Path = RUNS,
        endpoints: Endpoints | None = None,
        staleness_threshold_seconds: float | None = None,
        policy: Policy | None = None,
        patience_s: float = 10.0,
        **recording: Any,
    ) -> None:
        """``recording``: other fields of ``RecordConfig``. Raises ConfigError."""
        from msgspec.structs import replace

        from arbl2_recorder import Endpoints, RecordConfig

        config = config or RunConfig()
        if staleness_threshold_seconds is not None:
            config = replace(config, aggregator=replace(config.aggregator, stale_s=staleness_threshold_seconds))
        self.symbols = tuple(symbols)
        self._config = config
        self._recording = RecordConfig(out=tapes, symbols=self.symbols, endpoints=endpoints or Endpoints(), **recording)
        self._runs = runs
        self._policy = policy
        self._patience_s = patience_s
        self._run: LiveRun | None = None
        self._status: Status | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._outcome: LiveOutcome | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        """Connect to the venues. Raises ConfigError if it runs already, and what keeps it from running."""
        if self._thread is not None:
            raise ConfigError("this provider runs already. Stop it, or make another one.")
        self._stop.clear()
        self._outcome = self._error = self._run = self._status = None
        self._thread = threading.Thread(target=self._work, name="arbl2-live", daemon=True)
        self._thread.start()
        waited = threading.Event()
        for _ in range(round(self._patience_s / 0.02)):
            if not self._thread.is_alive() or all(self.get_latest_snapshot(symbol) for symbol in self.symbols):
                break
            waited.wait(0.02)
        if self._error is not None:
            self.stop()

    def stop(self) -> LiveOutcome | None:
        """Stop, seal the tape and write the run; returns both, None if it did not run. Raises what went wrong meanwhile."""
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        self._stop.set()
        thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome

    def get_latest_snapshot(self, symbol: str) -> MultiExchangeL2Snapshot | None:
        """Both books of a coin as of now; None before the first one. Raises ConfigError for a coin that was not asked for."""
        if symbol not in self.symbols:
            raise ConfigError(f"{symbol} is not one of {', '.join(self.symbols)}. Name it when the provider is made.")
        run = self._run
        if run is None or not run.begun.is_set() or run.error is not None:
            return None
        snapshot = run.snapshot(symbol)
        return snapshot if any(top.bids or top.asks for top in snapshot.per_exchange.values()) else None

    def get_connection_status(self) -> dict[ExchangeId, ConnectionStatus]:
        """How the connections to both venues are."""
        status = self._status
        if status is None or self._thread is None or not self._thread.is_alive():
            return dict.fromkeys(ExchangeId, _STOPPED)
        names = [field.name for field in dataclasses.fields(ConnectionStatus)]
        found = {venue.name: ConnectionStatus(**{name: getattr(venue, name) for name in names}) for venue in status.venues}
        return {exchange: found.get(exchange.value, _STOPPED) for exchange in ExchangeId}

    def get_source_status(self, symbol: str) -> dict[ExchangeId, SourceStatus]:
        """Whether each venue's book of a coin is active, stale or disconnected; empty before the first one."""
        snapshot = self.get_latest_snapshot(symbol)
        return snapshot.source_status if snapshot is not None else {}

    async def aget_latest_snapshot(self, symbol: str) -> MultiExchangeL2Snapshot | None:
        """As ``get_latest_snapshot``; it waits for nothing, so no thread is needed."""
        return self.get_latest_snapshot(symbol)

    async def astart(self) -> None:
        """As ``start``, without holding up the event loop."""
        await asyncio.to_thread(self.start)

    async def astop(self) -> LiveOutcome | None:
        """As ``stop``, without holding up the event loop."""
        return await asyncio.to_thread(self.stop)

    def _work(self) -> None:
        try:
            self._outcome = live(
                self._recording, self._config, runs=self._runs, policy=self._policy, on_run=self._watch, stop=self._stop
            )
        except Exception as error:
            self._error = error

    def _watch(self, run: LiveRun) -> Callable[[Status], None]:
        self._run = run

        def keep(status: Status) -> None:
            self._status = status

        return keep
