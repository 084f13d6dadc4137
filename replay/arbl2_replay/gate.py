"""What stands between a venue and one client's socket when things go wrong: it swallows, holds up, slows down and spoils."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from arbl2.frames import Op

Spoiler = Callable[[bytes, "Op", str, int, int], list[bytes] | None]
"""Given payload, form, stream, first and last id: what goes out instead, or None to wait for another message."""


class Gate:
    """The messages of one connection stay in order, whatever happens to them. Times are in seconds."""

    def __init__(self, write: Callable[[bytes, Op], None], loop: asyncio.AbstractEventLoop) -> None:
        self._write = write
        self._loop = loop
        self._held: deque[tuple[bytes, Op]] = deque()
        self._spoilers: list[Spoiler] = []
        self._muted_until = 0.0
        self._free_at = 0.0
        self._slow_until = 0.0
        self._bytes_per_s = 0.0
        self.swallowed = 0
        """Messages that never left."""

    def mute(self, seconds: float) -> None:
        """Swallow what is said."""
        self._muted_until = self._loop.time() + seconds

    def hold(self, seconds: float) -> None:
        """Hold up what is said, then let it go at once."""
        self._free_at = max(self._free_at, self._loop.time() + seconds)

    def throttle(self, bytes_per_s: float, seconds: float) -> None:
        """Let no more through than this, for so long."""
        self._bytes_per_s = bytes_per_s
        self._slow_until = self._loop.time() + seconds

    def spoil(self, spoiler: Spoiler) -> None:
        """Ask for each message until the spoiler has taken one."""
        self._spoilers.append(spoiler)

    def send(self, payload: bytes, op: Op, stream: str, first_id: int, last_id: int) -> None:
        """Let a message through, now or later, or not."""
        if self._loop.time() < self._muted_until:
            self.swallowed += 1
            return
        payloads = [payload]
        for spoiler in self._spoilers:
            spoiled = spoiler(payload, op, stream, first_id, last_id)
            if spoiled is not None:
                self._spoilers.remove(spoiler)
                payloads = spoiled
                break
        waits = bool(self._held)
        self._held.extend((each, op) for each in payloads)
        if not waits:
            self._pump()

    def _pump(self) -> None:
        while self._held:
            now = self._loop.time()
            free_at = max(self._free_at, self._muted_until)
            if now < free_at:
                self._loop.call_at(free_at, self._pump)
                return
            payload, op = self._held.popleft()
            self._write(payload, op)
            if now < self._slow_until:
                self._free_at = now + len(payload) / self._bytes_per_s
