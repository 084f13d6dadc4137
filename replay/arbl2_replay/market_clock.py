"""The one time of a served market: it runs as many times as fast as ours as it is told, and can be stopped."""

from __future__ import annotations

import asyncio


class MarketClock:
    """Times are ns since the epoch, as the market tells them. Needs a running event loop.

    ``speed`` 0 is as fast as it goes: then the time is that of whatever was waited for last.
    """

    def __init__(self, speed: float, time_ns: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._speed = speed
        self._paused = False
        self._held = True
        self._changed = asyncio.Event()
        self._at_ns = time_ns
        self._since = self._loop.time()
        self.late_s = 0.0
        """How late the last moment came that was waited for, seconds."""

    def now_ns(self) -> int:
        """What the clock shows."""
        if self._paused or self._held or not self._speed:
            return self._at_ns
        return self._at_ns + round((self._loop.time() - self._since) * self._speed * 1e9)

    @property
    def speed(self) -> float:
        """Times as fast as ours; 0 = as fast as it goes."""
        return self._speed

    @speed.setter
    def speed(self, speed: float) -> None:
        self.set(self.now_ns())
        self._speed = speed

    @property
    def paused(self) -> bool:
        """Whether it stands still."""
        return self._paused

    def begin(self, time_ns: int) -> None:
        """Run, from there on."""
        self._held = False
        self.set(time_ns)

    def set(self, time_ns: int) -> None:
        """Show this time now."""
        self._at_ns, self._since = time_ns, self._loop.time()
        self._changed.set()

    def hold(self) -> None:
        """Stand still until it begins: the market is not ready."""
        self.set(self.now_ns())
        self._held = True

    @property
    def held(self) -> bool:
        """Whether the market is not ready."""
        return self._held

    def pause(self) -> None:
        """Stand still."""
        self.set(self.now_ns())
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        self._since = self._loop.time() if self._paused else self._since
        self._paused = False
        self._changed.set()

    async def until(self, time_ns: int) -> None:
        """Return when it is so late, or later."""
        while self._paused or self._speed:
            left_s = (time_ns - self.now_ns()) / 1e9 / self._speed if self._speed else 0.0
            if not self._paused and left_s <= 0:
                self.late_s = -left_s
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self._paused else left_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        self._at_ns = max(self._at_ns, time_ns)
