"""The edge itself: a WebSocket connection that stamps what it receives before anything else happens to it.

The stamp is the first statement after the event loop hands over the bytes; unframing, inflating and looking into the message
come later. Messages never enter the library's own queue, so no consumer that wakes late, and no high-water mark that stops
reading, can make old data look fresh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from websockets.asyncio.client import ClientConnection
from websockets.frames import Opcode

from arbl2.frames import Op
from arbl2_recorder import clock

if TYPE_CHECKING:
    from websockets.client import ClientProtocol
    from websockets.protocol import Event

_TEXT, _BINARY, _CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT


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
        self._fragments = bytearray()
        self._is_open = False

    def data_received(self, data: bytes) -> None:
        """Stamp, then let the library take the bytes apart."""
        self._recv_ns, self._mono_ns = clock.stamp()
        super().data_received(data)

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
            self._fragments += event.data  # type: ignore[union-attr]
            if event.fin:  # type: ignore[union-attr]
                payload, self._fragments = bytes(self._fragments), bytearray()
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
