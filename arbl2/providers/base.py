"""What every venue's provider does: bytes of a block in, book updates out. Pure, and without memory between frames.

A provider is two readers of the same messages: the compiled scanner for the exact wire form, and ``read``, a strict library
decoder for everything else. The second one decides what is bad input and why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from arbl2.frames import FrameKind
from arbl2.jit import frozen
from arbl2.money import NumberRefusedError, parse_e8
from arbl2.scan import Names, instrument_hash, write_book, write_levels
from arbl2.updates import MAX_BLOCK, MAX_LEVELS, Reason, What

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from arbl2.frames import ExchangeId, FrameBlock
    from arbl2.updates import UpdateBlock

# plain numbers: a member of an enum takes longer to look up than a small block takes to scan
_MESSAGE, _REQUEST, _RESPONSE = int(FrameKind.MESSAGE), int(FrameKind.REQUEST), int(FrameKind.RESPONSE)
_UNREAD = int(What.UNREAD)
_EVERY_ROW = np.arange(MAX_BLOCK)
_NUMBER_REASONS = {
    "number": Reason.BAD_NUMBER,
    "negative": Reason.NEGATIVE,
    "large": Reason.TOO_LARGE,
    "scale": Reason.OFF_SCALE,
}


class RefusedError(Exception):
    """Bad input: why, and the instrument it concerns where that could still be read."""

    def __init__(self, reason: Reason, instrument: str = "") -> None:
        super().__init__(reason.label)
        self.reason = reason
        self.instrument = instrument


@dataclass(frozen=True, slots=True)
class Instrument:
    """One market of a venue, in the venue's spelling, and the coin and currency it trades."""

    venue: ExchangeId
    name: str
    base: str
    quote: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the strict decoder made of one message. Levels are (price_e8, size_e8), as sent (nothing dropped).

    ``what`` says what they are: a BOOK (best first), a CHANGE of one, or a SNAPSHOT to build one on.
    """

    reason: Reason
    instrument: str = ""
    what: What = What.BOOK
    exchange_ms: int = 0
    first_id: int = 0
    update_id: int = 0
    bids: tuple[tuple[int, int], ...] = ()
    asks: tuple[tuple[int, int], ...] = ()
    total_bid_e8: int = -1
    total_ask_e8: int = -1


class Provider(ABC):
    """Decodes one venue. ``books`` maps the venue's instrument names to book indices of the run."""

    venue: ExchangeId
    venue_code: int
    _scan: Callable[..., int]
    _scan_response: Callable[..., None] | None = None

    def __init__(self, books: Mapping[str, int], *, scanner: bool = True) -> None:
        self.books = dict(books)
        self._scanner = scanner
        self._names = _names({self.wire_name(name).encode(): book for name, book in self.books.items()})
        self._totals = np.full(2, -1, np.int64)  # room for the totals of a frame; -1 where a venue states none

    @staticmethod
    @abstractmethod
    def instrument(name: str) -> Instrument:
        """The instrument of a venue's name; base is the whole name where its parts cannot be told."""

    @staticmethod
    def wire_name(name: str) -> str:
        """How the name stands in a message."""
        return name

    @abstractmethod
    def read(self, payload: bytes) -> Reading:
        """Decode one message strictly. Raises RefusedError for bad input."""

    def decode(self, block: FrameBlock, updates: UpdateBlock) -> None:
        """Fill the rows of this venue's messages, which were laid out before; every other row is left alone."""
        u, n = updates, len(block)
        if not (count := block.venues().count(self.venue_code)):
            return
        are_all = count == n and block.kinds().count(_MESSAGE) == n
        ours = _EVERY_ROW[:n] if are_all else (block.venue == self.venue_code).nonzero()[0]
        rows = ours if are_all else ours[block.kind[ours] == _MESSAGE]
        unread = len(rows)
        if self._scanner:
            unread = self._scan(frozen(block.data), rows, self._names, u.records, self._totals)
        else:
            u.what[rows] = _UNREAD
        if unread:
            for i in rows[u.what[rows] == _UNREAD].tolist():
                self._read_into(self.read, block.payload(i), u, i)
        if len(rows) == count:
            return
        kinds = block.kind[ours]
        for i in ours[kinds == _REQUEST].tolist():
            u.what[i] = What.ASKED
            u.book[i] = self.books.get(self.asked(block.payload(i)), -1)
        for i in ours[kinds == _RESPONSE].tolist():
            u.what[i] = _UNREAD
            if self._scanner and self._scan_response is not None:
                self._scan_response(frozen(block.data), i, u.records)
            if u.what[i] == _UNREAD:
                self._read_into(self.read_response, block.payload(i), u, i)

    def asked(self, request: bytes) -> str:
        """The instrument whose snapshot a REST request asks for; "" if it asks for something else."""
        return ""

    def read_response(self, body: bytes) -> Reading:
        """Decode the body of a REST answer strictly. Raises RefusedError for bad input."""
        return Reading(Reason.REST)

    def _read_into(self, read: Callable[[bytes], Reading], payload: bytes, u: UpdateBlock, i: int) -> None:
        try:
            reading = read(payload)
        except RefusedError as refused:
            book = self.books.get(refused.instrument, -1)
            u.what[i] = What.NOTHING if book < 0 else What.DOUBT
            u.reason[i], u.book[i] = refused.reason, book
            u.n_bid[i] = u.n_ask[i] = u.first_id[i] = u.update_id[i] = u.exchange_ms[i] = 0
            return
        u.what[i], u.reason[i], u.book[i] = What.NOTHING, reading.reason, -1
        if reading.reason not in _WITH_LEVELS or (reading.reason is Reason.REST and not reading.update_id):
            return
        at = int(u.cursor[0])
        n, m = len(reading.bids), len(reading.asks)
        ask_at = at + (MAX_LEVELS if reading.what is What.BOOK else n)
        if n:
            u.px_e8[at : at + n], u.qty_e8[at : at + n] = zip(*reading.bids, strict=True)
        if m:
            u.px_e8[ask_at : ask_at + m], u.qty_e8[ask_at : ask_at + m] = zip(*reading.asks, strict=True)
        u.exchange_ms[i], u.first_id[i], u.update_id[i] = reading.exchange_ms, reading.first_id, reading.update_id
        book = self.books.get(reading.instrument, -1)
        if reading.what is What.BOOK:
            write_book(u.records, i, book, at, n, m, np.array([reading.total_bid_e8, reading.total_ask_e8], np.int64))
        else:
            write_levels(u.records, i, book, int(reading.what), int(reading.reason), at, n, m)


_WITH_LEVELS = (Reason.BOOK, Reason.DIFF, Reason.REST)


def _names(books: Mapping[bytes, int]) -> Names:
    """The lookup table of the scanner: wire name to book."""
    text = np.frombuffer(b"".join(books) or b"\0", dtype=np.uint8)
    ends = np.zeros(len(books) + 1, np.int64)
    np.cumsum([len(name) for name in books], out=ends[1:])
    slots = np.zeros(max(16, 4 * len(books)), np.int64)
    for index in range(len(books)):
        slot = instrument_hash(text, ends[index], ends[index + 1]) % len(slots)
        while slots[slot]:
            slot = (slot + 1) % len(slots)
        slots[slot] = index + 1
    return Names(slots, text, ends, np.array(list(books.values()) or [0], np.int32))


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STRING = msgspec.json.Decoder(str)
_INT = msgspec.json.Decoder(int)


def read_object(payload: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The members of a JSON object as raw bytes. Raises RefusedError(NOT_JSON or WRONG_SHAPE)."""
    try:
        if isinstance(payload, bytes):
            payload.decode("utf-8")
        return _OBJECT.decode(payload)
    except msgspec.ValidationError:
        raise RefusedError(Reason.WRONG_SHAPE) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RefusedError(Reason.NOT_JSON) from None


def read_as(decoder: msgspec.json.Decoder[Any], raw: msgspec.Raw | None, instrument: str = "") -> Any:
    """One member by its type. Raises RefusedError(WRONG_SHAPE)."""
    if raw is None:
        raise RefusedError(Reason.WRONG_SHAPE, instrument)
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RefusedError(Reason.WRONG_SHAPE, instrument) from None


def read_string(raw: msgspec.Raw | None, instrument: str = "") -> str:
    """A JSON string. Raises RefusedError(WRONG_SHAPE)."""
    return str(read_as(_STRING, raw, instrument))


def read_count(raw: msgspec.Raw | None, instrument: str = "") -> int:
    """A JSON integer from 0 to 2^63 - 1. Raises RefusedError(WRONG_SHAPE, NEGATIVE or TOO_LARGE)."""
    value = int(read_as(_INT, raw, instrument))
    if value < 0:
        raise RefusedError(Reason.NEGATIVE, instrument)
    if value > 2**63 - 1:
        raise RefusedError(Reason.TOO_LARGE, instrument)
    return value


def read_e8(text: bytes, instrument: str, *, exact: bool) -> int:
    """Number text to int64 of 10^-8. Raises RefusedError."""
    try:
        return parse_e8(text, exact=exact)
    except NumberRefusedError as error:
        raise RefusedError(_NUMBER_REASONS[str(error)], instrument) from None
