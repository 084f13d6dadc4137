"""Makes what was written durable, in a thread of its own.

A sync takes milliseconds on a quiet disk and seconds on a busy one. What is written meanwhile lies with the kernel, where a kill
of the recorder does not reach it, instead of in the recorder's own bounded memory.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Syncer:
    """Does what it is asked, one after the other. ``on_error(error)`` is called in its thread with the first OSError."""

    def __init__(self, on_error: Callable[[OSError], None]) -> None:
        self._on_error = on_error
        self._asked: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="arbl2-syncer", daemon=True)
        self._thread.start()

    def ask(self, work: Callable[[], object]) -> None:
        """Queue a sync, or what has to wait for the syncs before it. Never waits for the disk."""
        self._asked.put(work)

    def close(self) -> None:
        """Wait until everything that was asked for is done."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        failed = False
        while (work := self._asked.get()) is not None:
            try:
                work()
            except OSError as error:
                if not failed:
                    self._on_error(error)
                failed = True
