"""What each venue wants to hear and how its answers are told apart: one description per venue, no socket.

The recorder never needs to understand a message to keep it. It looks only as far as it must to notice what is *missing*: a
code without its first message, a subscription without its acknowledgement, an error that precedes a polite close. A message
whose first bytes say "data" is not looked into once every code of the connection was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import msgspec

from arbl2.frames import BINANCE, UPBIT, ExchangeId

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
    def streams(self) -> tuple[str, ...]:
        """What must show a first message after subscribing."""

    @property
    def acknowledges(self) -> bool:
        """Whether the venue answers a subscription."""

    @property
    def rest_urls(self) -> tuple[str, ...]:
        """REST bodies to fetch once at the start (ticks, lots, filters)."""

    def subscription(self, ticket: str) -> bytes:
        """The text message that subscribes to everything at once; ``ticket`` is unique per connection."""

    def is_data(self, payload: bytes) -> bool:
        """Whether the first bytes are those of a data message. May say no to one, never yes to anything else."""

    def read(self, payload: bytes) -> Note:
        """What the message means. Never raises, whatever the bytes."""


class _UpbitMessage(msgspec.Struct):
    code: str | None = None
    cd: str | None = None
    error: dict[str, Any] | None = None


_upbit_message = msgspec.json.Decoder(_UpbitMessage)


@dataclass(frozen=True, slots=True)
class UpbitFeed:
    """Order books of Upbit. There is no acknowledgement: the first book of each code is the only sign of success."""

    url: str
    rest: str
    streams: tuple[str, ...]
    units: int
    format: str
    venue: int = UPBIT
    name: str = ExchangeId.UPBIT.value
    acknowledges: bool = False

    @property
    def rest_urls(self) -> tuple[str, ...]:
        """Tick size per market."""
        return (f"{self.rest}/v1/orderbook/instruments?markets={quote(','.join(self.streams), safe=',')}",)

    def subscription(self, ticket: str) -> bytes:
        """The venue wants an array of parts; a later subscription would replace this one, so it names every code."""
        # The depth is written out even where it equals today's default, which the venue has changed before.
        codes = [f"{code}.{self.units}" for code in self.streams]
        parts = [{"ticket": ticket}, {"type": "orderbook", "codes": codes}, {"format": self.format}]
        return msgspec.json.encode(parts)

    def is_data(self, payload: bytes) -> bool:
        """Data begins with its type, in either format."""
        return payload.startswith((b'{"type":"orderbook"', b'{"ty":"orderbook"'))

    def read(self, payload: bytes) -> Note:
        """Data is told by its code, errors by their key."""
        try:
            message = _upbit_message.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _OTHER
        if message.error is not None:
            return Note(Sign.ERROR, f"{message.error.get('name')}: {message.error.get('message')}")
        code = message.code or message.cd
        return Note(Sign.DATA, code) if code else _OTHER


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


@dataclass(frozen=True, slots=True)
class BinanceFeed:
    """Partial books of Binance spot over the combined endpoint: only its wrapper names the symbol."""

    url: str
    rest: str
    symbols: tuple[str, ...]
    depth: int
    speed_ms: int
    venue: int = BINANCE
    name: str = ExchangeId.BINANCE.value
    acknowledges: bool = True

    @property
    def streams(self) -> tuple[str, ...]:
        """Stream names are lower case."""
        return tuple(f"{symbol.lower()}@depth{self.depth}@{self.speed_ms}ms" for symbol in self.symbols)

    @property
    def rest_urls(self) -> tuple[str, ...]:
        """Tick, lot and notional filters per symbol."""
        listed = quote(msgspec.json.encode(self.symbols).decode("ascii"))
        return (f"{self.rest}/api/v3/exchangeInfo?symbols={listed}",)

    def subscription(self, ticket: str) -> bytes:
        """One SUBSCRIBE for all streams."""
        return msgspec.json.encode({"method": "SUBSCRIBE", "params": self.streams, "id": _SUBSCRIBE_ID})

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
        if message.id == _SUBSCRIBE_ID and message.result is not msgspec.UNSET:
            return Note(Sign.ACK)
        return _OTHER


def feeds(config: RecordConfig) -> list[VenueFeed]:
    """The feeds that a configuration asks for."""
    names = config.instruments()
    ends = config.endpoints
    built: list[VenueFeed] = []
    for venue in config.venues:
        streams = tuple(names[venue])
        if venue == ExchangeId.UPBIT:
            built.append(
                UpbitFeed(
                    url=ends.upbit_ws,
                    rest=ends.upbit_rest.rstrip("/"),
                    streams=streams,
                    units=config.upbit_units,
                    format=config.upbit_format,
                )
            )
        else:
            built.append(
                BinanceFeed(
                    url=ends.binance_ws,
                    rest=ends.binance_rest.rstrip("/"),
                    symbols=streams,
                    depth=config.binance_depth,
                    speed_ms=config.binance_speed_ms,
                )
            )
    return built
