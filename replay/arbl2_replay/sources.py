"""What the exchange server serves: the messages of a market in the order of their time, whoever made them.

The server speaks the venues' protocols and knows nothing of where a market comes from. A source tells what the venues said, one
``Message`` after the other. A recorded message has its bytes; one of the synthetic market has none, only the book that it
stands for. What a client asks for and is not there as bytes is derived by ``arbl2_replay.encode``, for both alike.
"""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Op
from arbl2_replay.synth import STEP_NS, MarketEvent, SynthConfig, binance_symbols, market_events, upbit_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from arbl2_replay.flow import Moved
    from arbl2_replay.wire import DepthChange

Value = TypeVar("Value")


class What(StrEnum):
    """What a message tells."""

    MARKET = "market"  # the state of an instrument of a synthetic market: everything else follows from it
    BOOK = "orderbook"  # Upbit
    DEPTH = "depth"  # Binance: the best levels
    DIFF = "diff"  # Binance: changes of the whole book
    TRADE = "trade"
    TICKER = "bookTicker"  # Binance: the best level
    OTHER = "other"  # another stream, by its name
    NOTICE = "notice"  # Binance is about to close the connection
    STRAY = "stray"  # bytes that do not say which stream they belong to


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """What all messages of one kind, from one recorded connection, have in common."""

    venue: ExchangeId
    what: What
    code: str = ""
    """Instrument; empty for strays and notices."""
    name: str = ""
    """Name of the stream: ``btcusdt@depth20@100ms`` on Binance, the type on Upbit."""
    conn: int = 0
    """Number of the recorded connection; 0 = not recorded."""
    form: str = ""
    """Upbit: DEFAULT, SIMPLE, JSON_LIST or SIMPLE_LIST. Binance: combined or raw."""
    depth: int = 0
    """Levels a side, of a book."""
    level_e8: int = 0
    """Upbit: price grouping in 10^-8 KRW."""
    snapshot: bool = False
    """Upbit: the venue said SNAPSHOT."""


class Message:
    """One message of a venue at ``time_ns`` of the market (ns since the epoch).

    A recorded one lies in ``frames``, WebSocket frames as they go to every client that gets the recorded bytes: its own from
    ``start`` to ``end``, its payload from ``body``. Those with consecutive numbers lie side by side. A synthetic message has no
    bytes, but an ``event`` from the beginning.
    """

    # Millions are made, and most of them are only passed on: what few of them need is kept aside.
    __slots__ = ("__dict__", "body", "channel", "end", "frames", "number", "start", "time_ns")

    event: MarketEvent | None = None
    """The book that it stands for, once somebody has asked."""
    moved: Moved | None = None
    """What the flow of the instrument makes of it, where there is one."""
    is_slow_turn = False
    """Whether Binance's 1000 ms streams speak with this message."""
    merged: DepthChange | None = None
    """The recorded changes that a 1000 ms stream tells now, where somebody asked for it."""
    _made: dict[object, Any] | None = None

    def __init__(
        self, channel: Channel, time_ns: int, frames: bytes = b"", start: int = 0, body: int = 0, end: int = 0, number: int = 0
    ) -> None:
        self.channel = channel
        self.time_ns = time_ns
        self.frames = frames
        self.start = start
        self.body = body
        self.end = end
        self.number = number

    @classmethod
    def of_event(cls, channel: Channel, time_ns: int, event: MarketEvent) -> Message:
        """A synthetic message."""
        message = cls(channel, time_ns)
        message.event = event
        return message

    def instead(self, payload: bytes) -> Message:
        """The same message with other bytes."""
        head = frame_head(len(payload), self.op)
        return Message(self.channel, self.time_ns, head + payload, 0, len(head), len(head) + len(payload))

    @property
    def payload(self) -> bytes:
        """The recorded bytes."""
        return self.frames[self.body : self.end]

    @property
    def op(self) -> Op:
        """Its form on the wire."""
        return Op.TEXT if self.frames[self.start] == FIRST_BYTE[Op.TEXT] else Op.BINARY

    def made(self, key: object, make: Callable[[], Value]) -> Value:
        """What ``make`` returns, made once for all clients."""
        made = self._made
        if made is None:
            made = self._made = {}
        if key not in made:
            made[key] = make()
        value: Value = made[key]
        return value


def side_by_side(messages: Sequence[Message]) -> bytes | memoryview:
    """The recorded frames of some messages in a row."""
    if not messages:
        return b""
    first, last = messages[0], messages[-1]
    if first.frames is last.frames and last.number - first.number == len(messages) - 1:
        return memoryview(first.frames)[first.start : last.end]
    return b"".join([memoryview(message.frames)[message.start : message.end] for message in messages])


FIRST_BYTE = {Op.TEXT: 0x81, Op.BINARY: 0x82}
"""Of the frame of a whole message."""
_SHORT, _LONG = struct.Struct("!BBH"), struct.Struct("!BBQ")


@lru_cache(1 << 14)
def frame_head(size: int, op: Op) -> bytes:
    """The head of a whole, unmasked, uncompressed WebSocket frame, as a server sends it."""
    if size < 126:
        return bytes((FIRST_BYTE[op], size))
    return _SHORT.pack(FIRST_BYTE[op], 126, size) if size < 65_536 else _LONG.pack(FIRST_BYTE[op], 127, size)


@dataclass(frozen=True, slots=True)
class Closed:
    """A recorded connection ended: ``streams`` are (instrument, name) of what nobody carries on."""

    venue: ExchangeId
    code: int
    reason: str
    streams: frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages in the order of their time, and what happens after the last of them.

    ``bodies`` are REST books (symbol, body) that the recording holds further on: known in time for who asks for one.
    """

    messages: Sequence[Message]
    closed: Closed | None = None
    bodies: Sequence[tuple[str, bytes]] = ()


@dataclass(slots=True)
class Offer:
    """What a recording has of one instrument: the distinct channels, by (name, form, depth, grouping)."""

    shapes: dict[tuple[str, str, int, int], Channel] = field(default_factory=dict)
    preview: Message | None = None
    """The first book of the recording: what REST tells before the market begins."""

    def add(self, channel: Channel) -> None:
        """Take note of a channel."""
        self.shapes.setdefault((channel.name, channel.form, channel.depth, channel.level_e8), channel)

    def names(self) -> set[str]:
        """Names of the streams."""
        return {name for name, _, _, _ in self.shapes}


class MarketSource(Protocol):
    """Where the market comes from."""

    @property
    def upbit_codes(self) -> Sequence[str]:
        """Upbit market codes, such as KRW-BTC."""

    @property
    def binance_symbols(self) -> Sequence[str]:
        """Binance symbols, such as BTCUSDT."""

    @property
    def speed(self) -> float:
        """How many times as fast as it happened; 0 = as fast as it is read."""

    @property
    def start_ns(self) -> int:
        """Time of the first message, ns since the epoch."""

    @property
    def offers(self) -> Mapping[str, Offer]:
        """What there is as recorded bytes, by instrument; it may grow while batches are read."""

    @property
    def exchange_info(self) -> Mapping[str, msgspec.Raw]:
        """Recorded entries of Binance's exchangeInfo, by symbol."""

    def batches(self) -> Iterator[Batch]:
        """The market from its beginning; called anew for every pass. Read in a thread: it may take its time."""


class SyntheticSource:
    """The synthetic market, ``speed`` times as fast as real time, without an end.

    Exchange times are those of the wall clock at the start and run ``speed`` times as fast too.
    """

    offers: Mapping[str, Offer] = {}
    exchange_info: Mapping[str, msgspec.Raw] = {}

    def __init__(self, config: SynthConfig, *, speed: float = 1.0) -> None:
        if not 0 < speed < math.inf:
            raise ConfigError(f"speed must be a number above zero, not {speed}. Give 1 for real time.")
        # whole steps, so that each Upbit code keeps its phase of the 100 ms grid
        self.start_ns = time.time_ns() // STEP_NS * STEP_NS
        self._config = config
        self.speed = speed
        self.upbit_codes = upbit_codes(config)
        self.binance_symbols = binance_symbols(config)

    def batches(self) -> Iterator[Batch]:
        """One step of the market after the other."""
        self.start_ns = time.time_ns() // STEP_NS * STEP_NS
        config = msgspec.structs.replace(self._config, start_ns=self.start_ns)
        channels = {
            code: Channel(venue, What.MARKET, code)
            for venue, codes in ((ExchangeId.UPBIT, self.upbit_codes), (ExchangeId.BINANCE, self.binance_symbols))
            for code in codes
        }
        step: list[Message] = []
        ends_ns = STEP_NS
        for event in market_events(config, endless=True):
            if event.offset_ns >= ends_ns:
                yield Batch(step)
                step = []
                ends_ns = (event.offset_ns // STEP_NS + 1) * STEP_NS
            step.append(Message.of_event(channels[event.code], self.start_ns + event.offset_ns, event))
