"""What one client still has to read: a queue with an end.

Whole frames go in, in order, and on to the socket as it takes them. The queue holds references: what many clients are told is in
memory once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from websockets.protocol import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2_replay.serving import Connection


class Outlet:
    """The way out to one connection; ``on_room`` is told what is left whenever its socket has room again."""

    def __init__(self, ws: Connection, on_room: Callable[[int], None]) -> None:
        self._ws = ws
        self._frames: deque[bytes | memoryview] = deque()
        self._waiting = 0
        self._on_room = on_room
        self.taken = 0
        """Bytes ever put in."""
        self.bytes_lately = 0
        """Bytes put in since the stretch began."""
        self.read_before = 0
        """What ``read`` was when the stretch began."""
        ws.outlet = self

    @property
    def backlog(self) -> int:
        """Bytes that the client's socket has not taken yet."""
        return self._waiting + self._ws.transport.get_write_buffer_size()

    @property
    def read(self) -> int:
        """Bytes that it has taken."""
        return self.taken - self.backlog

    @property
    def is_clear(self) -> bool:
        """Whether the client keeps up."""
        return not self._frames and not self._ws.paused

    def put(self, frames: bytes | memoryview) -> None:
        """Send whole frames after everything that waits."""
        self.taken += len(frames)
        self.bytes_lately += len(frames)
        if self.is_clear:
            self._ws.transport.write(frames)
        else:
            self._frames.append(frames)
            self._waiting += len(frames)

    def room(self) -> None:
        """The socket takes more."""
        while self._frames and not self._ws.paused:
            if self._ws.state is not State.OPEN:
                self.drop()
                break
            frames = self._frames.popleft()
            self._waiting -= len(frames)
            self._ws.transport.write(frames)
        self._on_room(self.backlog)

    def begin_stretch(self) -> None:
        """From now on another stretch of time is looked at."""
        self.bytes_lately, self.read_before = 0, self.read

    def drop(self) -> None:
        """Forget what waits."""
        self._frames.clear()
        self._waiting = 0

    async def drained(self, patience_s: float = 2.0) -> bool:
        """Wait until everything has left the process, as long as the client reads on. Returns whether it did."""
        loop = asyncio.get_running_loop()
        least, give_up_at = self.backlog, loop.time() + patience_s
        while self.backlog and not self._ws.transport.is_closing() and loop.time() < give_up_at:
            await asyncio.sleep(0.001)
            if self.backlog < least:
                least, give_up_at = self.backlog, loop.time() + patience_s
        return not self.backlog
