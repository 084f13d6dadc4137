"""Hands recorded frames to somebody else (a live engine) without ever waiting for them.

The hooks run in a thread of their own. If they were called where the frames arrive, a slow one would delay the stamps of
everything after it, and a recording would depend on who listened to it.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import TYPE_CHECKING

from arbl2.errors import EngineError
from arbl2.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from arbl2.tape import Manifest

    OnSession = Callable[[Path, Manifest, Callable[[], int]], None]
    """Gets the folder and manifest of a session, and what says up to which ``seq`` a kill can take nothing any more."""

MOST_FRAMES = 256
_NOTHING = "nothing waits"


class Consumer:
    """Calls ``on_frames`` with every frame in ``seq`` order, and ``on_session`` before the first one of each session.

    It gets one frame at a time while it keeps up, and after a burst those that wait, at most ``MOST_FRAMES``.

    ``on_error`` is called once, from either thread. A hook that raises, or that falls behind by more than ``limit_bytes`` of
    payload, gets no more frames: a run that missed one would differ from its replay.
    """

    def __init__(
        self,
        on_frames: Callable[[list[Frame]], None],
        on_error: Callable[[Exception], None],
        *,
        limit_bytes: int,
        on_session: OnSession | None = None,
    ) -> None:
        self._on_frames = on_frames
        self._on_error = on_error
        self._on_session = on_session
        self._limit_bytes = limit_bytes
        self._waiting: queue.SimpleQueue[Frame | Callable[[], None] | str | None] = queue.SimpleQueue()
        # Each counter has one writing thread; their difference is what waits.
        self._put_bytes = 0
        self._done_bytes = 0
        self._off = False
        self._thread = threading.Thread(target=self._run, name="arbl2-consumer", daemon=True)
        self._thread.start()

    def begin(self, path: Path, manifest: Manifest, logged_seq: Callable[[], int]) -> None:
        """The frames that are put next are those of a new session."""
        on_session = self._on_session
        if on_session is not None:
            self._waiting.put(lambda: on_session(path, manifest, logged_seq))

    def put(self, frame: Frame) -> None:
        """Queue a frame. Never waits."""
        if self._off:
            return
        self._put_bytes += len(frame.payload)
        if self._put_bytes - self._done_bytes > self._limit_bytes:
            self._off = True
            self._on_error(EngineError("the live run fell too far behind the market and was stopped; the recording is whole."))
            return
        self._waiting.put(frame)

    def close(self) -> None:
        """Wait until the hook has seen every frame that was queued."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        item = self._waiting.get()
        while item is not None:
            frames: list[Frame] = []
            while isinstance(item, Frame):
                frames.append(item)
                item = self._at_hand() if len(frames) < MOST_FRAMES else _NOTHING
            if frames:
                self._call(partial(self._on_frames, frames))
                self._done_bytes += sum(len(frame.payload) for frame in frames)
            if callable(item):
                self._call(item)
            item = None if item is None else self._waiting.get()

    def _at_hand(self) -> Frame | Callable[[], None] | str | None:
        try:
            return self._waiting.get_nowait()
        except queue.Empty:
            return _NOTHING

    def _call(self, hook: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            hook()
        except Exception as error:
            self._off = True
            self._on_error(error)
