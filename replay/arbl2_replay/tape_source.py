"""A recording as a market: its messages at their time, its lost connections, its REST books.

Read a row group at a time, with one more ahead, so that the memory does not depend on the length of the tape.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arbl2.errors import TapeError
from arbl2.frames import VENUES, ExchangeId, FrameKind, Op
from arbl2.tape import TapeReader
from arbl2_replay.channels import Sorter
from arbl2_replay.encode import event, or_none
from arbl2_replay.sources import FIRST_BYTE, Batch, Channel, Closed, Message, Offer, What

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.frames import FrameBlock

_BATCH = 1_024
_SURVEYED_GROUPS = 2
_CODE = re.compile(r"[A-Z0-9-]{1,40}")


class _Request(msgspec.Struct):
    url: str = ""


class _End(msgspec.Struct):
    code: int | None = None
    reason: str | None = None
    covered: bool = False


class _ExchangeInfo(msgspec.Struct):
    symbols: list[msgspec.Raw] = []


class _Symbol(msgspec.Struct):
    symbol: str


class TapeSource:
    """A session, here or at a URL, served ``speed`` times as fast as it was recorded; 0 = as fast as it is read.

    The first messages are read at once, to know what the recording offers. Raises TapeError for one that holds no messages.
    """

    def __init__(self, session: Path | str, *, speed: float = 1.0) -> None:
        self._reader = TapeReader(session)
        self.speed = speed
        self.offers: dict[str, Offer] = {}
        self.exchange_info: dict[str, msgspec.Raw] = {}
        manifest = self._reader.manifest
        self._codes: dict[str, dict[str, None]] = {
            venue: dict.fromkeys(code for code in manifest.instruments.get(venue, ()) if _CODE.fullmatch(code))
            for venue in (ExchangeId.UPBIT, ExchangeId.BINANCE)
        }
        first: Message | None = None
        for number, (batches, _) in enumerate(self._groups()):
            for message in (message for batch in batches for message in batch.messages):
                first = first or message
                self._preview(message)
            if number + 1 >= _SURVEYED_GROUPS and first is not None:
                break
        if first is None:
            raise TapeError(f"{session} holds no messages of a venue, so there is nothing to serve. Name another recording.")
        self.start_ns = first.time_ns

    def _preview(self, message: Message) -> None:
        channel = message.channel
        if channel.what in (What.BOOK, What.DEPTH):
            offer = self.offers[channel.code]
            if offer.preview is None and event(message) is not None:
                offer.preview = message

    @property
    def session(self) -> str:
        """Name of the session."""
        return self._reader.manifest.session

    @property
    def upbit_codes(self) -> tuple[str, ...]:
        """Upbit market codes on the tape."""
        return tuple(self._codes[ExchangeId.UPBIT])

    @property
    def binance_symbols(self) -> tuple[str, ...]:
        """Binance symbols on the tape."""
        return tuple(self._codes[ExchangeId.BINANCE])

    def batches(self) -> Iterator[Batch]:
        """The recording from its beginning. Raises TapeError for what cannot be read."""
        groups = self._groups()
        now = next(groups, None)
        bodies = list(now[1]) if now is not None else []
        while now is not None:
            ahead = next(groups, None)
            bodies += ahead[1] if ahead is not None else []
            for batch in now[0]:
                yield Batch(batch.messages, batch.closed, bodies)
                bodies = []
            now = ahead

    def _groups(self) -> Iterator[tuple[list[Batch], list[tuple[str, bytes]]]]:
        """Every row group: its batches and the REST books in it."""
        groups = _Groups(self)
        for block in self._reader.blocks():
            yield groups.sorted(block)

    def take_note(self, channel: Channel) -> None:
        """A channel of the recording."""
        if channel.code:
            self.offers.setdefault(channel.code, Offer()).add(channel)
            self._codes[channel.venue].setdefault(channel.code)


class _Groups:
    """One pass over the recording."""

    def __init__(self, source: TapeSource) -> None:
        self._source = source
        self._sorter = Sorter(source.take_note)
        self._open: dict[int, ExchangeId] = {}
        self._asked = ""

    def sorted(self, block: FrameBlock) -> tuple[list[Batch], list[tuple[str, bytes]]]:
        """Batches and REST books of one row group."""
        batches: list[Batch] = []
        bodies: list[tuple[str, bytes]] = []
        messages: list[Message] = []
        frames, starts = _framed(block)
        channel_of = self._sorter.channel
        columns = zip(
            block.kind.tolist(),
            block.venue.tolist(),
            block.conn.tolist(),
            block.op.tolist(),
            block.time_ns.tolist(),
            starts,
            starts[1:],
            np.diff(block.offsets).tolist(),
            strict=False,
        )
        for i, (kind, venue_code, conn, op, time_ns, start, end, size) in enumerate(columns):
            if kind == _MESSAGE and op in _IS_DATA and venue_code:
                channel = channel_of(_VENUES[venue_code], conn, frames, end - size, end)
                if channel is not None:
                    messages.append(Message(channel, time_ns, frames, start, end - size, end, i))
                    if len(messages) >= _BATCH:
                        batches.append(Batch(messages))
                        messages = []
            elif venue_code and kind != _MESSAGE:
                closed = self._event(FrameKind(kind), _VENUES[venue_code], conn, block.payload(i), bodies)
                if closed is not None:
                    batches.append(Batch(messages, closed))
                    messages = []
        batches.append(Batch(messages))
        return batches, bodies

    def _event(
        self, kind: FrameKind, venue: ExchangeId, conn: int, payload: bytes, bodies: list[tuple[str, bytes]]
    ) -> Closed | None:
        match kind:
            case FrameKind.OPENED:
                self._open[conn] = venue
                self._sorter.opened(conn, payload)
            case FrameKind.SENT:
                self._sorter.resubscribed(conn)
            case FrameKind.CLOSED:
                return self._closed(venue, conn, payload)
            case FrameKind.REQUEST if venue is ExchangeId.BINANCE:
                request = or_none(lambda: msgspec.json.decode(payload, type=_Request))
                self._asked = request.url if request else ""
            case FrameKind.RESPONSE if venue is ExchangeId.BINANCE:
                self._answered(payload, bodies)
            case _:
                pass
        return None

    def _closed(self, venue: ExchangeId, conn: int, payload: bytes) -> Closed | None:
        end = or_none(lambda: msgspec.json.decode(payload, type=_End)) or _End()
        lost = self._sorter.streams(conn)
        self._sorter.closed(conn)
        self._open.pop(conn, None)
        for other, its_venue in self._open.items():
            if its_venue is venue:
                lost -= self._sorter.streams(other)
        if end.covered or not lost:
            return None
        return Closed(venue, end.code or 1006, (end.reason or "")[:100], frozenset(lost))

    def _answered(self, body: bytes, bodies: list[tuple[str, bytes]]) -> None:
        url = or_none(lambda: urlsplit(self._asked))
        path = url.path if url else ""
        if path.endswith("/exchangeInfo"):
            info = or_none(lambda: msgspec.json.decode(body, type=_ExchangeInfo)) or _ExchangeInfo()
            for entry in info.symbols:
                named = or_none(lambda entry=entry: msgspec.json.decode(entry, type=_Symbol))  # type: ignore[misc]
                if named is not None:
                    self._source.exchange_info[named.symbol] = msgspec.Raw(bytes(entry))
        elif path.endswith("/depth") and url is not None:
            symbol = parse_qs(url.query).get("symbol", [""])[0]
            bodies.append((symbol, body))
        elif not self._asked and len(self._source.binance_symbols) == 1 and body.startswith(b'{"lastUpdateId":'):
            bodies.append((self._source.binance_symbols[0], body))


_VENUES: dict[int, Any] = {code: ExchangeId(name) for code, name in enumerate(VENUES) if name}
_MESSAGE = int(FrameKind.MESSAGE)
_IS_DATA = (Op.TEXT, Op.BINARY)


def _framed(block: FrameBlock) -> tuple[bytes, list[int]]:
    """Every payload of a block behind the head of a WebSocket frame, and where each of these frames begins.

    All at once, in Arrow: one by one it would be a third of what serving a message costs.
    """
    offsets = np.ascontiguousarray(block.offsets)
    sizes = np.diff(offsets)
    head_offsets, heads = _heads(sizes, np.where(block.op == Op.TEXT, FIRST_BYTE[Op.TEXT], FIRST_BYTE[Op.BINARY]))
    columns = ((head_offsets, heads), (offsets, block.data))
    arrays = [
        pa.Array.from_buffers(pa.binary(), len(sizes), [None, pa.py_buffer(ends), pa.py_buffer(data)]) for ends, data in columns
    ]
    _, starts, frames = pc.binary_join_element_wise(*arrays, b"").buffers()
    return frames.to_pybytes(), np.frombuffer(starts, np.int32)[: len(sizes) + 1].tolist()


def _heads(sizes: NDArray[np.int32], first_bytes: NDArray[np.int_]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """The heads of frames of these sizes, one behind the other, and where each begins: see ``sources.frame_head``."""
    lengths = np.where(sizes < 126, 2, np.where(sizes < 65_536, 4, 10))
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    heads = np.zeros(offsets[-1], np.uint8)
    at = offsets[:-1]
    heads[at] = first_bytes
    heads[at + 1] = np.where(sizes < 126, sizes, np.where(sizes < 65_536, 126, 127))
    for k in range(4):  # the last byte of the size first; what is longer than 4 bytes is no payload of a tape
        has = lengths - 2 > k
        heads[at[has] + lengths[has] - 1 - k] = (sizes[has] >> 8 * k) & 0xFF
    return offsets, heads
