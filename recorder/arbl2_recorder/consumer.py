"""Hands recorded frames to somebody else (a live engine) without ever waiting for them.

The hook runs in a thread of its own. If it were called where the frames arrive, a slow one would delay the stamps of
everything after it, and a recording would depend on who listened to it.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from arbl2.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2.frames import Frame


class Consumer:
    """Calls ``on_frame`` with every frame in ``seq`` order. ``on_error`` is called once, from either thread.

    A hook that raises, or that falls behind by more than ``limit_bytes`` of payload, gets no more frames: a run that missed
    one would differ from its replay.
    """

    def __init__(self, on_frame: Callable[[Frame], None], on_error: Callable[[Exception], None], *, limit_bytes: int) -> None:
        self._on_frame = on_frame
        self._on_error = on_error
        self._limit_bytes = limit_bytes
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        # Each counter has one writing thread; their difference is what waits.
        self._put_bytes = 0
        self._done_bytes = 0
        self._off = False
        self._thread = threading.Thread(target=self._run, name="arbl2-consumer", daemon=True)
        self._thread.start()

    def put(self, frame: Frame) -> None:
        """Queue a frame. Never waits."""
        if self._off:
            return
        self._put_bytes += len(frame.payload)
        if self._put_bytes - self._done_bytes > self._limit_bytes:
            self._off = True
            self._on_error(EngineError("the live run fell too far behind the market and was stopped; the recording is whole."))
            return
        self._frames.put(frame)

    def close(self) -> None:
        """Wait until the hook has seen every frame that was queued."""
        self._frames.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            if self._off:
                continue
            try:
                self._on_frame(frame)
            except Exception as error:
                self._off = True
                self._on_error(error)
            self._done_bytes += len(frame.payload)
