"""Rate limits, kept by construction: nothing is sent before its turn.

A venue counts requests (or their weights) over windows of time. A ``Gate`` holds every window of one counter and tells each
caller how long to wait; it never lets more through than the venue allows, whatever the caller does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from arbl2_recorder import clock


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``weight`` within any ``seconds``."""

    weight: int
    seconds: float


class Gate:
    """Everything that counts against the same limits passes here. Not thread-safe: the event loop owns it."""

    def __init__(self, *limits: Limit) -> None:
        self._limits = limits
        self._taken: deque[tuple[float, int]] = deque()
        self._closed_until_s = 0.0
        self._turn = asyncio.Lock()

    async def enter(self, weight: int = 1) -> None:
        """Wait for the turn of something of this weight (more than a limit allows at once counts as all of it)."""
        async with self._turn:
            # A sleep may end a moment early, and the gate may be closed meanwhile.
            while (wait_s := self.wait_s(clock.mono_ns() / 1e9, weight)) > 0:  # noqa: ASYNC110
                await asyncio.sleep(wait_s)
            self.take(clock.mono_ns() / 1e9, weight)

    def close_for(self, seconds: float) -> None:
        """The venue asked to be left alone."""
        self._closed_until_s = max(self._closed_until_s, clock.mono_ns() / 1e9 + seconds)

    def wait_s(self, now_s: float, weight: int) -> float:
        """Seconds until something of this weight may pass, 0 if it may now."""
        wait_s = self._closed_until_s - now_s
        for limit in self._limits:
            room = limit.weight - min(weight, limit.weight)
            inside = [(at_s, taken) for at_s, taken in self._taken if at_s > now_s - limit.seconds]
            used = sum(taken for _, taken in inside)
            for at_s, taken in inside:
                if used <= room:
                    break
                used -= taken
                wait_s = max(wait_s, at_s + limit.seconds - now_s)
        return max(wait_s, 0.0)

    def take(self, now_s: float, weight: int) -> None:
        """Count what passes now."""
        longest_s = max((limit.seconds for limit in self._limits), default=0.0)
        while self._taken and self._taken[0][0] <= now_s - longest_s:
            self._taken.popleft()
        self._taken.append((now_s, weight))
