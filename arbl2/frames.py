"""Frames: everything that happened at the recorder's edge, and blocks of them.

A frame is one thing that happened: a message, a request we sent, a connection opened or closed, a REST call and its body, a
clock sample, an alarm. Whatever may change a decision is a frame; nothing else may. Payloads are the exact bytes.

``Frame`` is the one-at-a-time form that the recorder writes. ``FrameBlock`` is the columnar form that providers decode: live
feeds blocks of one, replay feeds blocks of thousands, through the same code.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag, StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


class ExchangeId(StrEnum):
    """The venues arbl2 speaks to."""

    UPBIT = "upbit"
    BINANCE = "binance"


class FrameKind(IntEnum):
    """What a frame is. The lower-case name is what stands on the tape."""

    MESSAGE = 1  # a WebSocket data message that we received; op says text or binary
    SENT = 2  # a WebSocket message that we sent (subscriptions)
    OPENED = 3  # a connection opened; payload: JSON {"url": ...}
    CLOSED = 4  # a connection ended or could not be opened; payload: JSON {"code": ..., "reason": ..., "clean": ...}
    REQUEST = 5  # a REST request that we sent; payload: JSON {"method": "GET", "url": ...}
    RESPONSE = 6  # the exact body of a REST response
    CLOCK = 7  # a clock sample; payload: JSON {"wall_ns": ..., "mono_ns": ...}
    ALARM = 8  # something the recorder noticed (a silent code, a missing ack); payload: JSON {"alarm": ..., ...}


class Op(IntEnum):
    """Form of a payload on the wire."""

    NONE = 0
    TEXT = 1
    BINARY = 2
    PING = 9
    PONG = 10


class Flag(IntFlag):
    """What else is known about a frame."""

    NONE = 0
    LATE = 1  # the recorder's event loop had been held up before it read these bytes: they may be older than their stamps


VENUES: tuple[str, ...] = ("", ExchangeId.UPBIT.value, ExchangeId.BINANCE.value)
"""Venue names by their code in arrays; code 0 is "no venue" (clock samples)."""

UPBIT = VENUES.index(ExchangeId.UPBIT)
BINANCE = VENUES.index(ExchangeId.BINANCE)

_CODES = {name: code for code, name in enumerate(VENUES)}

HEAD = struct.Struct("<qqqiiBBBBI")
"""A frame but for its payload: seq, recv_ns, mono_ns, conn, queue_us, venue, kind, op, flags, payload length."""
HEAD_DTYPE = np.dtype(
    [
        ("seq", "<i8"),
        ("recv_ns", "<i8"),
        ("mono_ns", "<i8"),
        ("conn", "<i4"),
        ("queue_us", "<i4"),
        ("venue", "u1"),
        ("kind", "u1"),
        ("op", "u1"),
        ("flags", "u1"),
        ("size", "<u4"),
    ]
)

_FIELDS: Any = HEAD_DTYPE.fields
_KIND_AT, _VENUE_AT = _FIELDS["kind"][1], _FIELDS["venue"][1]
COLUMNS = ("time_ns", *(name for name in HEAD_DTYPE.names or () if name != "size"))
"""The columns of a block with a value for each frame."""

KIND_NAMES: dict[int, str] = {kind.value: kind.name.lower() for kind in FrameKind}
OP_NAMES: dict[int, str] = {
    Op.NONE: "",
    Op.TEXT: "text",
    Op.BINARY: "binary",
    Op.PING: "ping",
    Op.PONG: "pong",
}


@dataclass(frozen=True, slots=True)
class Anchor:
    """One instant on both clocks.

    Engine time = ``wall_ns`` + (``mono_ns`` of the frame - ``mono_ns`` here): it never steps back.
    """

    wall_ns: int
    mono_ns: int

    def time_ns(self, mono_ns: int) -> int:
        """Engine time in ns since the Unix epoch for a monotonic stamp of the same session."""
        return self.wall_ns + (mono_ns - self.mono_ns)


@dataclass(frozen=True, slots=True)
class Frame:
    """One thing that happened.

    ``seq`` is the total order within a session; ``recv_ns`` is the wall clock and ``mono_ns`` the monotonic clock when it
    happened; ``venue`` and ``conn`` say where (conn counts connections of the session from 1, 0 = none). ``queue_us`` is the time
    from there to the moment it got its ``seq``, microseconds; ``flags`` are bits of ``Flag``.
    """

    seq: int
    recv_ns: int
    mono_ns: int
    venue: str
    conn: int
    kind: FrameKind
    op: Op
    payload: bytes
    queue_us: int = 0
    flags: int = Flag.NONE


@dataclass(frozen=True, slots=True)
class Packed:
    """Frames as rows of ``HEAD_DTYPE``, and what their ``mono_ns`` is short of engine time."""

    heads: NDArray[Any]
    shift_ns: int


@dataclass(frozen=True, slots=True)
class FrameBlock:
    """``n`` frames as columns, in the order of the tape.

    ``seq``, ``time_ns`` (engine time), ``recv_ns``, ``mono_ns``: int64[n]; ``venue``, ``kind``, ``op``: uint8[n] (codes of
    ``VENUES``, ``FrameKind``, ``Op``); ``conn``, ``queue_us``: int32[n]; ``flags``: uint8[n] (bits of ``Flag``); payload i is
    ``data[offsets[i]:offsets[i + 1]]`` with ``offsets`` int32[n + 1] and ``data`` uint8. Never written to after construction.
    """

    seq: NDArray[np.int64]
    time_ns: NDArray[np.int64]
    recv_ns: NDArray[np.int64]
    mono_ns: NDArray[np.int64]
    venue: NDArray[np.uint8]
    conn: NDArray[np.int32]
    kind: NDArray[np.uint8]
    op: NDArray[np.uint8]
    queue_us: NDArray[np.int32]
    flags: NDArray[np.uint8]
    offsets: NDArray[np.int32]
    data: NDArray[np.uint8]
    packed: Packed | None = field(default=None, init=False, repr=False, compare=False)
    """The frames as ``from_heads`` got them. Columns are then made when they are first asked for: where frames come one at a
    time, the code that makes them has left the processor's caches, and takes longer than all that is decided on a frame."""

    def __getattr__(self, name: str) -> Any:
        """A column that was not made yet."""
        if name != "offsets" and name not in COLUMNS:
            raise AttributeError(name)
        assert self.packed is not None
        heads = self.packed.heads
        column: NDArray[Any]
        if name == "offsets":
            column = np.zeros(len(heads) + 1, dtype=np.int32)
            np.cumsum(heads["size"], out=column[1:])
        elif name == "time_ns":
            column = heads["mono_ns"] + np.int64(self.packed.shift_ns)
        else:
            column = heads[name]
        object.__setattr__(self, name, column)
        return column

    def __len__(self) -> int:
        return len(self.seq) if self.packed is None else len(self.packed.heads)

    def kinds(self) -> bytes:
        """A byte for each frame: its kind. Bytes are counted in a fraction of the time that a column takes to be compared."""
        return self.kind.tobytes() if self.packed is None else self.packed.heads.tobytes()[_KIND_AT :: HEAD.size]

    def venues(self) -> bytes:
        """A byte for each frame: its venue's code."""
        return self.venue.tobytes() if self.packed is None else self.packed.heads.tobytes()[_VENUE_AT :: HEAD.size]

    def payload(self, i: int) -> bytes:
        """The exact bytes of frame ``i``."""
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def payloads(self) -> bytes:
        """The bytes of all frames end to end."""
        data = self.data if self.packed is not None else self.data[self.offsets[0] : self.offsets[-1]]
        return data.tobytes()

    def frame(self, i: int) -> Frame:
        """Frame ``i`` in its one-at-a-time form."""
        return Frame(
            seq=int(self.seq[i]),
            recv_ns=int(self.recv_ns[i]),
            mono_ns=int(self.mono_ns[i]),
            venue=VENUES[self.venue[i]],
            conn=int(self.conn[i]),
            kind=FrameKind(int(self.kind[i])),
            op=Op(int(self.op[i])),
            payload=self.payload(i),
            queue_us=int(self.queue_us[i]),
            flags=int(self.flags[i]),
        )

    def frames(self) -> Iterator[Frame]:
        """Every frame, one at a time."""
        return (self.frame(i) for i in range(len(self)))

    def slice(self, start: int, stop: int) -> FrameBlock:
        """Frames ``start`` up to ``stop`` as views (no copy of payloads)."""
        if start == 0 and stop >= len(self):
            return self
        return FrameBlock(
            seq=self.seq[start:stop],
            time_ns=self.time_ns[start:stop],
            recv_ns=self.recv_ns[start:stop],
            mono_ns=self.mono_ns[start:stop],
            venue=self.venue[start:stop],
            conn=self.conn[start:stop],
            kind=self.kind[start:stop],
            op=self.op[start:stop],
            queue_us=self.queue_us[start:stop],
            flags=self.flags[start:stop],
            offsets=self.offsets[start : stop + 1],
            data=self.data,
        )

    @classmethod
    def from_frames(cls, frames: Sequence[Frame], anchor: Anchor) -> FrameBlock:
        """Columns from single frames; live paper trading calls this with one frame at a time.

        By way of packed heads: one row a frame, a fifth of the time of one array a column.
        """
        heads = b"".join(
            HEAD.pack(f.seq, f.recv_ns, f.mono_ns, f.conn, f.queue_us, _CODES[f.venue], f.kind, f.op, f.flags, len(f.payload))
            for f in frames
        )
        return cls.from_heads(heads, b"".join(f.payload for f in frames), anchor)

    @classmethod
    def from_heads(cls, heads: NDArray[Any] | bytes, data: bytes | memoryview, anchor: Anchor) -> FrameBlock:
        """From packed heads (``HEAD_DTYPE``) and the payloads end to end, each as long as its head says, nothing behind."""
        rows = np.frombuffer(heads, HEAD_DTYPE)
        return cls._of(Packed(rows, anchor.wall_ns - anchor.mono_ns), np.frombuffer(data, np.uint8))

    @classmethod
    def _of(cls, packed: Packed, data: NDArray[np.uint8]) -> FrameBlock:
        block = object.__new__(cls)
        object.__setattr__(block, "packed", packed)
        object.__setattr__(block, "data", data)
        return block

    @classmethod
    def joined(cls, blocks: Sequence[FrameBlock]) -> FrameBlock:
        """A copy of the frames of several blocks in their order. They are of one session, and the first one is not empty."""
        first = blocks[0]
        shift_ns = int(first.time_ns[0] - first.mono_ns[0]) if first.packed is None else first.packed.shift_ns
        heads = b"".join([block.heads().tobytes() for block in blocks])
        data = b"".join([block.payloads() for block in blocks])
        return cls._of(Packed(np.frombuffer(heads, HEAD_DTYPE), shift_ns), np.frombuffer(data, np.uint8))

    def heads(self) -> NDArray[Any]:
        """The packed heads (``HEAD_DTYPE``) of the frames."""
        if self.packed is not None:
            return self.packed.heads
        heads = np.zeros(len(self), HEAD_DTYPE)
        for name in HEAD_DTYPE.names or ():
            if name != "size":
                heads[name] = getattr(self, name)
        heads["size"] = np.diff(self.offsets)
        return heads
