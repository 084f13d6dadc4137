"""Reading ahead: a thread goes through a source while the event loop sends what was read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arbl2_replay.sources import Batch

_MOST_BATCHES = 8


class Ahead:
    """Batches of a source, a few of them read before they are asked for. Needs a running event loop."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._read: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(_MOST_BATCHES)
        self._reading: asyncio.Future[Batch | None] | None = None
        self._task = asyncio.create_task(self._fill())

    async def next(self) -> Batch | None:
        """The next batch, None after the last. Raises what the source raised."""
        batch = await self._read.get()
        if isinstance(batch, Exception):
            raise batch
        return batch

    async def stop(self) -> None:
        """Read no further; returns when the thread is done with the source."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._reading is not None:
            await asyncio.wait([self._reading])
            self._reading.exception()  # whatever it was, nobody waits for it any more

    async def _fill(self) -> None:
        try:
            while True:
                self._reading = asyncio.ensure_future(asyncio.to_thread(next, self._batches, None))
                batch = await asyncio.shield(self._reading)
                await self._read.put(batch)
                if batch is None:
                    return
        except Exception as error:
            await self._read.put(error)
