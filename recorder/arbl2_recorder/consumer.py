"""Hands recorded frames to somebody else (a live engine) without ever waiting for them.

The hooks run in a thread of their own. If they were called where the frames arrive, a slow one would delay the stamps of
everything after it, and a recording would depend on who listened to it.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from arbl2.errors import EngineError
from arbl2.frames import Anchor, FrameBlock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from arbl2.tape import Manifest

    OnSession = Callable[[Path, Manifest, Callable[[], int]], None]
    """Gets the folder and manifest of a session, and what says up to which ``seq`` a kill can take nothing any more."""

MOST_FRAMES = 256
IDLE_S = 0.002
"""The frames of a burst come within this time: who has something to do that can wait does it when it has passed."""
_NOTHING = "nothing waits"


class Consumer:
    """Calls ``on_frames`` with every frame in ``seq`` order, and ``on_session`` before the first one of each session.

    It gets a block of one frame while it keeps up, and after a burst one of those that wait, at most ``MOST_FRAMES``.
    ``on_idle`` is called when none has come for ``IDLE_S``, once until the next one comes.

    ``on_error`` is called once, from either thread. A hook that raises, or that falls behind by more than ``limit_bytes`` of
    payload, gets no more frames: a run that missed one would differ from its replay.
    """

    def __init__(
        self,
        on_frames: Callable[[FrameBlock], None],
        on_error: Callable[[Exception], None],
        *,
        limit_bytes: int,
        on_session: OnSession | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self._on_frames = on_frames
        self._on_error = on_error
        self._on_session = on_session
        self._on_idle = on_idle
        self._limit_bytes = limit_bytes
        self._anchor = Anchor(0, 0)
        # A frame waits as it was packed for the log: the thread that stamps makes it once.
        self._waiting: queue.SimpleQueue[tuple[bytes, bytes] | Callable[[], None] | str | None] = queue.SimpleQueue()
        # Each counter has one writing thread; their difference is what waits.
        self._put_bytes = 0
        self._done_bytes = 0
        self._off = False
        self._thread = threading.Thread(target=self._run, name="arbl2-consumer", daemon=True)
        self._thread.start()

    def begin(self, path: Path, manifest: Manifest, logged_seq: Callable[[], int]) -> None:
        """The frames that are put next are those of a new session."""

        def begin() -> None:
            self._anchor = manifest.anchor
            if self._on_session is not None:
                self._on_session(path, manifest, logged_seq)

        self._waiting.put(begin)

    def put(self, head: bytes, payload: bytes) -> None:
        """Queue a frame (head packed by ``frames.HEAD``). Never waits."""
        if self._off:
            return
        self._put_bytes += len(payload)
        if self._put_bytes - self._done_bytes > self._limit_bytes:
            self._off = True
            self._on_error(EngineError("the live run fell too far behind the market and was stopped; the recording is whole."))
            return
        self._waiting.put((head, payload))

    def close(self) -> None:
        """Wait until the hook has seen every frame that was queued."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        item = self._waiting.get()
        while item is not None:
            frames: list[tuple[bytes, bytes]] = []
            while isinstance(item, tuple):
                frames.append(item)
                item = self._at_hand() if len(frames) < MOST_FRAMES else _NOTHING
            if frames:
                self._hand_on(frames)
            if callable(item):
                self._call(item)
            item = None if item is None else self._next()

    def _hand_on(self, frames: list[tuple[bytes, bytes]]) -> None:
        heads, data = (b"".join(parts) for parts in zip(*frames, strict=True))
        self._call(lambda: self._on_frames(FrameBlock.from_heads(heads, data, self._anchor)))
        self._done_bytes += len(data)

    def _next(self) -> tuple[bytes, bytes] | Callable[[], None] | str | None:
        if self._on_idle is not None:
            try:
                return self._waiting.get(timeout=IDLE_S)
            except queue.Empty:
                self._call(self._on_idle)
        return self._waiting.get()

    def _at_hand(self) -> tuple[bytes, bytes] | Callable[[], None] | str | None:
        return _NOTHING if self._waiting.empty() else self._waiting.get_nowait()

    def _call(self, hook: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            hook()
        except Exception as error:
            self._off = True
            self._on_error(error)
