"""What each venue wants to hear and how its answers are told apart: one description per venue, no socket.

The recorder never needs to understand a message to keep it. It looks only as far as it must to notice what is *missing*: a
code without its first message, a subscription without its acknowledgement, an error that precedes a polite close. A message
whose first bytes say "data" is not looked into once every code of the connection was seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import msgspec

from arbl2.frames import BINANCE, UPBIT, ExchangeId
from arbl2_recorder.config import Stream
from arbl2_recorder.limits import Limit

if TYPE_CHECKING:
    from arbl2_recorder.config import RecordConfig


class Sign(Enum):
    """What a message means to the recorder."""

    DATA = "data"  # of one stream; the note names it
    ACK = "ack"  # the subscription was accepted
    ERROR = "error"  # the venue refuses something
    SHUTDOWN = "shutdown"  # the venue announces that it will close
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Note:
    """A sign and what it is about: the stream of DATA, the words of an ERROR."""

    sign: Sign
    text: str = ""


_OTHER = Note(Sign.OTHER)


@dataclass(frozen=True, slots=True)
class Ask:
    """A REST request and what it weighs at the venue; ``instead`` is asked if the venue finds fault with it."""

    url: str
    weight: int
    instead: tuple[Ask, ...] = ()


class VenueFeed(Protocol):
    """One venue as the recorder sees it."""

    @property
    def venue(self) -> int:
        """Code in ``arbl2.frames.VENUES``."""

    @property
    def name(self) -> str:
        """Name in ``arbl2.frames.VENUES``."""

    @property
    def url(self) -> str:
        """WebSocket URL."""

    @property
    def label(self) -> str:
        """Tells the feeds of one venue apart: its name, with a number from the second one on."""

    @property
    def streams(self) -> tuple[str, ...]:
        """What must show a first message after subscribing."""

    @property
    def quiet(self) -> frozenset[str]:
        """Those of them that may say nothing for long although all is well."""

    @property
    def max_age_s(self) -> float:
        """How old a connection may become before it is replaced, seconds."""

    @property
    def acks(self) -> int:
        """How many answers the subscription gets."""

    @property
    def dial_limits(self) -> tuple[Limit, ...]:
        """How often the venue may be dialled."""

    @property
    def rest_limits(self) -> tuple[Limit, ...]:
        """How much may be asked of its REST side, in its own weights."""

    @property
    def rules(self) -> tuple[Ask, ...]:
        """REST bodies to fetch at the start and every day (ticks, lots, filters, what is listed)."""

    def snapshot(self, stream: str) -> Ask | None:
        """What to fetch before the stream means anything, None if it stands on its own."""

    def subscriptions(self, ticket: str) -> tuple[bytes, ...]:
        """The text messages that subscribe to everything; ``ticket`` is unique per connection."""

    def is_data(self, payload: bytes) -> bool:
        """Whether the first bytes are those of a data message. May say no to one, never yes to anything else."""

    def read(self, payload: bytes) -> Note:
        """What the message means. Never raises, whatever the bytes."""


class _UpbitMessage(msgspec.Struct):
    type: str | None = None
    ty: str | None = None
    code: str | None = None
    cd: str | None = None
    error: dict[str, Any] | None = None


_UPBIT_DATA = (b'{"type":"orderbook"', b'{"ty":"orderbook"', b'{"type":"trade"', b'{"ty":"trade"')
_upbit_message = msgspec.json.Decoder(_UpbitMessage)


@dataclass(frozen=True, slots=True)
class UpbitFeed:
    """Order books and trades of Upbit. It acknowledges nothing: the first message of each code is the only sign of success."""

    url: str
    rest: str
    codes: tuple[str, ...]
    types: tuple[str, ...]
    units: int
    format: str
    label: str = ExchangeId.UPBIT.value
    venue: int = UPBIT
    name: str = ExchangeId.UPBIT.value
    acks: int = 0
    quiet: frozenset[str] = frozenset()
    max_age_s: float = math.inf
    dial_limits: tuple[Limit, ...] = (Limit(4, 1.0),)
    rest_limits: tuple[Limit, ...] = (Limit(8, 1.0),)

    @property
    def streams(self) -> tuple[str, ...]:
        """Named as the venue's types and codes are: both come in every message."""
        return tuple(f"{code}@{kind}" for kind in self.types for code in self.codes)

    @property
    def rules(self) -> tuple[Ask, ...]:
        """Tick size per market, and everything that is listed."""
        # One code that the venue does not know spoils the answer for all.
        singles = tuple(self._instruments(code) for code in self.codes) if len(self.codes) > 1 else ()
        together = self._instruments(",".join(self.codes))
        return replace(together, instead=singles), Ask(f"{self.rest}/v1/market/all?is_details=true", 1)

    def _instruments(self, codes: str) -> Ask:
        return Ask(f"{self.rest}/v1/orderbook/instruments?markets={quote(codes, safe=',')}", 1)

    def snapshot(self, stream: str) -> Ask | None:
        """Every message is a whole book, or a trade."""
        return None

    def subscriptions(self, ticket: str) -> tuple[bytes, ...]:
        """The venue wants an array of parts; a later subscription would replace this one, so it names every code."""
        parts: list[dict[str, Any]] = [{"ticket": ticket}]
        for kind in self.types:
            # The depth is written out even where it equals today's default, which the venue has changed before.
            suffix = f".{self.units}" if kind == "orderbook" else ""
            parts.append({"type": kind, "codes": [code + suffix for code in self.codes]})
        parts.append({"format": self.format})
        return (msgspec.json.encode(parts),)

    def is_data(self, payload: bytes) -> bool:
        """Data begins with its type, in either format."""
        return payload.startswith(_UPBIT_DATA)

    def read(self, payload: bytes) -> Note:
        """Data is told by its code, errors by their key."""
        try:
            message = _upbit_message.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _OTHER
        if message.error is not None:
            return Note(Sign.ERROR, f"{message.error.get('name')}: {message.error.get('message')}")
        code, kind = message.code or message.cd, message.type or message.ty
        return Note(Sign.DATA, f"{code}@{kind}") if code and kind else _OTHER


class _BinanceMessage(msgspec.Struct):
    stream: str | None = None
    id: int | str | None = None
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: dict[str, Any] | None = None
    code: int | None = None
    msg: str | None = None
    e: str | None = None


_binance_message = msgspec.json.Decoder(_BinanceMessage)
_SUBSCRIBE_ID = 1
_DEPTH_WEIGHTS = ((100, 5), (500, 25), (1000, 50), (5000, 250))
_MOST_SUBSCRIBE_BYTES = 3_400
_MOST_CODES = 200
_MOST_BINANCE_STREAMS = 1_024


@dataclass(frozen=True, slots=True)
class BinanceFeed:
    """Streams of Binance spot over the combined endpoint: of a partial book only its wrapper names the symbol."""

    url: str
    rest: str
    symbols: tuple[str, ...]
    suffixes: tuple[str, ...]
    max_age_s: float
    snapshot_limit: int
    label: str = ExchangeId.BINANCE.value
    venue: int = BINANCE
    name: str = ExchangeId.BINANCE.value
    # 300 dials in 5 minutes and 6,000 of weight a minute are allowed for an address, which others may use too.
    dial_limits: tuple[Limit, ...] = (Limit(5, 1.0), Limit(240, 300.0))
    rest_limits: tuple[Limit, ...] = (Limit(4_000, 60.0),)

    @property
    def streams(self) -> tuple[str, ...]:
        """Stream names are lower case."""
        return tuple(symbol.lower() + suffix for suffix in self.suffixes for symbol in self.symbols)

    @property
    def quiet(self) -> frozenset[str]:
        """Trades come when there are trades; another stream of the symbol tells whether it is known."""
        return frozenset(name for name in self.streams if name.endswith("@trade")) if len(self.suffixes) > 1 else frozenset()

    @property
    def rules(self) -> tuple[Ask, ...]:
        """Tick, lot and notional filters per symbol."""
        singles = tuple(self._exchange_info((symbol,)) for symbol in self.symbols) if len(self.symbols) > 1 else ()
        return (replace(self._exchange_info(self.symbols), instead=singles),)

    def _exchange_info(self, symbols: tuple[str, ...]) -> Ask:
        listed = quote(msgspec.json.encode(symbols).decode("ascii"))
        return Ask(f"{self.rest}/api/v3/exchangeInfo?symbols={listed}", 20)

    def snapshot(self, stream: str) -> Ask | None:
        """A diff stream starts from a book that only the REST side gives."""
        symbol, _, kind = stream.partition("@")
        if kind.partition("@")[0] != "depth":
            return None
        weight = next(cost for most, cost in _DEPTH_WEIGHTS if self.snapshot_limit <= most)
        return Ask(f"{self.rest}/api/v3/depth?symbol={symbol.upper()}&limit={self.snapshot_limit}", weight)

    @property
    def acks(self) -> int:
        """One for each SUBSCRIBE."""
        return len(self.subscriptions(""))

    def subscriptions(self, ticket: str) -> tuple[bytes, ...]:
        """As many SUBSCRIBE messages as it takes: the venue does not answer one of more than 4 kB."""
        parts: list[list[str]] = []
        left = 0
        for stream in self.streams:
            if left < len(stream) + 3:
                parts.append([])
                left = _MOST_SUBSCRIBE_BYTES
            parts[-1].append(stream)
            left -= len(stream) + 3
        messages = ({"method": "SUBSCRIBE", "params": part, "id": number} for number, part in enumerate(parts, _SUBSCRIBE_ID))
        return tuple(map(msgspec.json.encode, messages))

    def is_data(self, payload: bytes) -> bool:
        """Data is wrapped and names its stream first; notices of the venue have stream names that begin with "!"."""
        return payload.startswith(b'{"stream":"') and payload[11:12] != b"!"

    def read(self, payload: bytes) -> Note:
        """Control answers are never wrapped."""
        try:
            message = _binance_message.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _OTHER
        if message.e == "serverShutdown" or message.stream == "!serverShutdown":
            return Note(Sign.SHUTDOWN)
        if message.stream:
            return Note(Sign.DATA, message.stream)
        if message.error is not None:
            return Note(Sign.ERROR, f"{message.error.get('code')}: {message.error.get('msg')}")
        if message.code is not None:
            return Note(Sign.ERROR, f"{message.code}: {message.msg}")
        if isinstance(message.id, int) and _SUBSCRIBE_ID <= message.id <= self.acks and message.result is not msgspec.UNSET:
            return Note(Sign.ACK)
        return _OTHER


def feeds(config: RecordConfig) -> list[VenueFeed]:
    """The feeds that a configuration asks for, one a connection: as few as the venues' limits allow, evenly filled."""
    built: list[VenueFeed] = []
    for venue, names in config.instruments().items():
        make = _upbit_feed if venue == ExchangeId.UPBIT else _binance_feed
        most = min(config.connection_symbols, _MOST_CODES if venue == ExchangeId.UPBIT else _most_symbols(config))
        count = math.ceil(len(names) / most)
        for number in range(count):
            label = venue if number == 0 else f"{venue}-{number + 1}"
            built.append(make(config, tuple(names[number::count]), label))
    return built


def _upbit_feed(config: RecordConfig, codes: tuple[str, ...], label: str) -> VenueFeed:
    kinds = {Stream.DEPTH: "orderbook", Stream.TRADE: "trade"}
    return UpbitFeed(
        url=config.endpoints.upbit_ws,
        rest=config.endpoints.upbit_rest.rstrip("/"),
        codes=codes,
        types=tuple(name for kind, name in kinds.items() if kind in config.streams),
        units=config.upbit_units,
        format=config.upbit_format,
        label=label,
    )


def _binance_feed(config: RecordConfig, symbols: tuple[str, ...], label: str) -> VenueFeed:
    return BinanceFeed(
        url=config.endpoints.binance_ws,
        rest=config.endpoints.binance_rest.rstrip("/"),
        symbols=symbols,
        suffixes=_suffixes(config),
        max_age_s=config.rotate_s,
        snapshot_limit=config.snapshot_limit,
        label=label,
    )


def _suffixes(config: RecordConfig) -> tuple[str, ...]:
    names = {
        Stream.DEPTH: f"@depth{config.binance_depth}@{config.binance_speed_ms}ms",
        Stream.DIFF: f"@depth@{config.binance_speed_ms}ms",
        Stream.TRADE: "@trade",
        Stream.BOOK_TICKER: "@bookTicker",
    }
    return tuple(name for kind, name in names.items() if kind in config.streams)


def _most_symbols(config: RecordConfig) -> int:
    return _MOST_BINANCE_STREAMS // len(_suffixes(config))
