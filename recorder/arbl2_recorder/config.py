"""What to record, from where, and the limits to keep: one frozen value, checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId

MIB = 2**20
UPBIT_UNITS = (1, 5, 15, 30)
UPBIT_FORMATS = ("DEFAULT", "SIMPLE")
BINANCE_DEPTHS = (5, 10, 20)
BINANCE_SPEEDS_MS = (100, 1000)
SNAPSHOT_LIMITS = (100, 500, 1000, 5000)
FX_COIN = "USDT"
_COIN = re.compile(r"[A-Z0-9]{1,20}")


class Stream(StrEnum):
    """What can be recorded of a symbol."""

    DEPTH = "depth"  # Upbit's order book, Binance's partial depth: every message is a whole window
    DIFF = "diff"  # Binance's changes of the full book, with REST snapshots to start from
    TRADE = "trade"  # both venues
    BOOK_TICKER = "book_ticker"  # Binance's best bid and ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where the venues are: WebSocket URLs (ws, wss) and REST base URLs (http, https)."""

    upbit_ws: str = "wss://api.upbit.com/websocket/v1"
    upbit_rest: str = "https://api.upbit.com"
    binance_ws: str = "wss://stream.binance.com:9443/stream"
    binance_rest: str = "https://api.binance.com"

    def __post_init__(self) -> None:
        for name in self.__slots__:
            schemes = ("ws", "wss") if name.endswith("_ws") else ("http", "https")
            url = getattr(self, name)
            parts = urlsplit(url)
            if parts.scheme not in schemes or not parts.hostname:
                raise ConfigError(f"endpoint {name} is {url!r}; it must begin with {' or '.join(schemes)}://host")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """One recording. Units are in the names; every limit has a default that suits a small machine.

    ``symbols`` are base coins (``BTC``); Upbit's ``KRW-USDT`` book is added whenever both venues are recorded. ``duration_s``
    None records until stopped. Raises ConfigError for a value that cannot be used.
    """

    out: Path = Path("tapes")
    venues: tuple[str, ...] = (ExchangeId.UPBIT.value, ExchangeId.BINANCE.value)
    symbols: tuple[str, ...] = ("BTC", "ETH", "XRP")
    streams: tuple[str, ...] = (Stream.DEPTH.value,)
    duration_s: float | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)
    upbit_format: str = "DEFAULT"
    upbit_units: int = 30
    binance_depth: int = 20
    binance_speed_ms: int = 100

    legs: int = 1  # 2: every stream over two connections, of which either may drop
    rotate_s: float = 82_800.0  # Binance ends connections after 24 h: replace them, make before break, at this age
    connection_symbols: int = 100  # more symbols are spread over several connections
    snapshot_limit: int = 1000  # levels a side of the REST books that a diff stream starts from
    rules_s: float = 86_400.0  # ticks, lots and filters are fetched anew this often

    ship: str | None = None  # copy what is sealed to this folder or URL, such as s3://bucket/tapes
    ship_delete: bool = False  # ... and delete segments here once their copy was read back
    keep_days: float | None = None  # delete whole sessions that ended longer ago (shipped ones only, if they are shipped)
    keep_bytes: int | None = None  # ... or the oldest ones while the folder holds more

    flush_ms: int = 250  # what a kill may cost at most
    fsync: bool = True  # also survive a power cut, not only a kill
    session_s: float = 86_400.0  # a recording that lasts longer goes on in a new session, without a hole
    segment_seconds: int = 900  # segments end on multiples of this in UTC ...
    segment_bytes: int = 128 * MIB  # ... or when their log has grown to this
    queue_bytes: int = 96 * MIB  # frames waiting for the disk; beyond it messages are dropped, and the drop is declared
    max_message_bytes: int = 16 * MIB
    compress: bool = False  # offer permessage-deflate: a third of the bytes on the line, twice the work for each message

    open_timeout_s: float = 10.0
    close_timeout_s: float = 2.0
    rest_timeout_s: float = 10.0
    first_connect_s: float = 15.0  # no venue delivered anything by then: give up
    snapshot_timeout_s: float = 10.0  # no first message of a code, or no ack, by then: alarm
    stall_s: float = 60.0  # a connection that delivered nothing for this long is replaced
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    dial_interval_s: float = 0.25  # at least this between two dials of one venue, besides the venue's own limits
    backoff_cap_s: float = 30.0
    stable_s: float = 10.0  # data must have flowed for this long before the back-off starts anew
    clock_s: float = 10.0
    status_s: float = 0.5

    def __post_init__(self) -> None:
        known = [venue.value for venue in ExchangeId]
        if not self.venues or len(set(self.venues)) != len(self.venues) or set(self.venues) - set(known):
            raise ConfigError(f"venues {list(self.venues)} cannot be recorded; choose from {', '.join(known)}")
        if not self.symbols or len(set(self.symbols)) != len(self.symbols):
            raise ConfigError("name at least one symbol, each once, such as BTC ETH XRP")
        for coin in self.symbols:
            if not _COIN.fullmatch(coin):
                raise ConfigError(f"symbol {coin!r} is not a base coin; write BTC, not KRW-BTC or BTCUSDT")
            if coin == FX_COIN:
                raise ConfigError("leave out USDT: its KRW book is recorded whenever both venues are")
        self._check_ship()
        self._check_streams()
        self._check_choices()
        self._check_limits()

    def _check_ship(self) -> None:
        if self.ship is None and self.ship_delete:
            raise ConfigError("--ship-delete needs --ship: say where the copies go.")
        if self.ship is not None and "://" not in self.ship:
            there, here = Path(self.ship).resolve(), self.out.resolve()
            if there == here or here in there.parents:
                raise ConfigError(f"--ship {self.ship} lies in the folder of the recordings itself. Ship to another one.")

    def _check_streams(self) -> None:
        known = [stream.value for stream in Stream]
        if not self.streams or len(set(self.streams)) != len(self.streams) or set(self.streams) - set(known):
            raise ConfigError(f"streams {list(self.streams)} cannot be recorded; choose from {', '.join(known)}")
        if ExchangeId.UPBIT in self.venues and not {Stream.DEPTH, Stream.TRADE} & set(self.streams):
            raise ConfigError("Upbit offers the streams depth and trade. Add one of them, or record --venues binance only.")
        if self.connection_symbols < 1:
            raise ConfigError("connection_symbols must be at least 1")

    def _check_choices(self) -> None:
        choices: tuple[tuple[str, tuple[object, ...]], ...] = (
            ("upbit_format", UPBIT_FORMATS),
            ("upbit_units", UPBIT_UNITS),
            ("binance_depth", BINANCE_DEPTHS),
            ("binance_speed_ms", BINANCE_SPEEDS_MS),
            ("snapshot_limit", SNAPSHOT_LIMITS),
            ("legs", (1, 2)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                listed = ", ".join(map(str, allowed))
                raise ConfigError(f"{name} is {getattr(self, name)!r}; the venue offers {listed}")

    def _check_limits(self) -> None:
        if self.duration_s is not None and not self.duration_s > 0:
            raise ConfigError(f"duration is {self.duration_s} s; it must be above 0, or left out to record until stopped")
        for name in self.__slots__:
            if name.endswith(("_ms", "_s", "_seconds", "_bytes", "_days")) and name != "duration_s":
                value = getattr(self, name)
                if value is not None and not value > 0:
                    raise ConfigError(f"{name} is {value}; it must be above 0")

    def instruments(self) -> dict[str, list[str]]:
        """The venues' own names of what is recorded: ``{"upbit": ["KRW-BTC", ...], "binance": ["BTCUSDT", ...]}``."""
        fx = [FX_COIN] if len(self.venues) > 1 else []
        names = {
            ExchangeId.UPBIT.value: [f"KRW-{coin}" for coin in [*self.symbols, *fx]],
            ExchangeId.BINANCE.value: [f"{coin}USDT" for coin in self.symbols],
        }
        return {venue: names[venue] for venue in self.venues}
