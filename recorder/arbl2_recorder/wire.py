"""The edge itself: a WebSocket connection that stamps what it receives before anything else happens to it.

The stamp is the first statement after the event loop hands over the bytes; unframing, inflating and looking into the message
come later. Messages never enter the library's own queue, so no consumer that wakes late, and no high-water mark that stops
reading, can make old data look fresh.

Where nothing is compressed, whole messages below 64 KiB, which is nearly all that a venue sends, are cut out here: the library's
parser takes most of a core at the rates that a burst can have. Everything else - the handshake, pings, fragments, long messages,
the close, whatever breaks the protocol - the library gets, byte for byte and in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from websockets.asyncio.client import ClientConnection
from websockets.frames import Opcode
from websockets.protocol import State

from arbl2.frames import Op
from arbl2_recorder import clock

if TYPE_CHECKING:
    from websockets.client import ClientProtocol
    from websockets.protocol import Event

_TEXT, _BINARY, _CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
_WHOLE = {0x80 | Opcode.TEXT: Op.TEXT, 0x80 | Opcode.BINARY: Op.BINARY}
"""First byte of a message that is neither compressed nor in fragments."""
_MOST_BYTES = 2**16 - 1
_LENGTH_16 = 126
"""Second byte of a frame whose length stands in the next 2 bytes; if it is larger, in the next 8."""


class Tap(Protocol):
    """Who is told what happens on a connection, in the order it happens."""

    def opened(self, recv_ns: int, mono_ns: int) -> None:
        """The handshake succeeded."""

    def message(self, op: Op, payload: bytes, recv_ns: int, mono_ns: int) -> None:
        """A whole message: the exact bytes, inflated and joined from its fragments."""

    def closed(self, code: int, reason: str, recv_ns: int, mono_ns: int) -> None:
        """The connection ended; code 1006 stands for an end without a close frame."""


class RecordingConnection(ClientConnection):
    """A client connection of ``websockets`` that tells a tap instead of queueing."""

    def __init__(self, protocol: ClientProtocol, *, tap: Tap, **options: Any) -> None:
        super().__init__(protocol, **options)
        self._tap = tap
        self._recv_ns = 0
        self._mono_ns = 0
        self._op = Op.NONE
        self._fragments: bytearray | None = None
        self._is_open = False
        self._is_plain = False
        self._rest = b""
        self._owed = 0

    def data_received(self, data: bytes) -> None:
        """Stamp, then take the bytes apart."""
        self._recv_ns, self._mono_ns = clock.stamp()
        if self.response is None:
            data = self._finish_handshake(data)
        if self._is_plain:
            self._take(data)
        else:
            self._leave(data)

    def _leave(self, data: bytes) -> bool:
        """Let the library take these bytes apart. Returns whether the connection is still open."""
        if data:
            super().data_received(data)
        return self.protocol.state is State.OPEN

    def _finish_handshake(self, data: bytes) -> bytes:
        """Feed the library to the end of the response and not a byte further; returns what lies behind it."""
        lines = data.splitlines(keepends=True)
        fed = 0
        while self.response is None and fed < len(lines):
            super().data_received(lines[fed])
            fed += 1
        self._is_plain = self._is_open and not self.protocol.extensions
        return b"".join(lines[fed:])

    def _take(self, data: bytes) -> None:
        """Cut out whole messages; leave every other frame to the library, which therefore always stands between two frames."""
        at = min(self._owed, len(data))
        self._owed -= at
        self._is_plain = self._leave(data[:at])
        data, self._rest = self._rest + data[at:], b""
        message, recv_ns, mono_ns = self._tap.message, self._recv_ns, self._mono_ns
        most = min(self.protocol.max_message_size or _MOST_BYTES, _MOST_BYTES)
        known = _WHOLE if self._fragments is None else {}
        at, size = 0, len(data)
        while self._is_plain and size - at >= 2:
            op, length, start = known.get(data[at]), data[at + 1], at + 2
            if length == _LENGTH_16:
                start += 2
            elif length > _LENGTH_16:
                # Longer, or masked: that is an error, and the library says so.
                op, start = None, start + 8
            if start > size:
                break
            if length >= _LENGTH_16:
                length = int.from_bytes(data[at + 2 : start], "big")
            end = start + length
            if op is None or length > most:
                self._is_plain = self._leave(data[at:end])
                self._owed = max(0, end - size)
                known = _WHOLE if self._fragments is None else {}
            elif end <= size:
                message(op, data[start:end], recv_ns, mono_ns)
            else:
                break
            at = min(end, size)
        if self._is_plain:
            self._rest = data[at:]
        else:
            self._leave(data[at:])

    def process_event(self, event: Event) -> None:
        """Called by the library for the handshake response and for every frame, in order."""
        if self.response is None:
            super().process_event(event)
            if self.protocol.handshake_exc is None:
                self._is_open = True
                self._tap.opened(self._recv_ns, self._mono_ns)
            return
        opcode = event.opcode  # type: ignore[union-attr]  # after the response there are only frames
        if opcode is _TEXT or opcode is _BINARY:
            self._op = Op.TEXT if opcode is _TEXT else Op.BINARY
            if event.fin:  # type: ignore[union-attr]
                self._tap.message(self._op, bytes(event.data), self._recv_ns, self._mono_ns)  # type: ignore[union-attr]
            else:
                self._fragments = bytearray(event.data)  # type: ignore[union-attr]
        elif opcode is _CONT:
            fragments = self._fragments
            assert fragments is not None  # the library lets no continuation through that continues nothing
            fragments += event.data  # type: ignore[union-attr]
            if event.fin:  # type: ignore[union-attr]
                payload, self._fragments = bytes(fragments), None
                self._tap.message(self._op, payload, self._recv_ns, self._mono_ns)
        else:
            super().process_event(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop once, however the connection ended."""
        recv_ns, mono_ns = clock.stamp()
        super().connection_lost(exc)
        if self._is_open:
            received, sent = self.protocol.close_rcvd, self.protocol.close_sent
            if received is not None:
                self._tap.closed(received.code, received.reason, recv_ns, mono_ns)
            else:
                reason = sent.reason if sent is not None else str(exc or "the connection was cut")
                self._tap.closed(1006, reason, recv_ns, mono_ns)
