"""What must be done now and then beside a recording and must never hold it up: the status file, the free disk, retention."""

from __future__ import annotations

import logging
import shutil
import threading
from typing import TYPE_CHECKING

from arbl2.errors import Arbl2Error
from arbl2_recorder import clock
from arbl2_recorder.health import write_status
from arbl2_recorder.retention import prune

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from arbl2_recorder.retention import Retention
    from arbl2_recorder.status import Status

_logger = logging.getLogger("arbl2.recorder")
EVERY_S = 2.0
PRUNE_NS = 600 * 10**9


class Chores:
    """A thread of its own, so that on a disk that hangs only it hangs. ``latest`` gives the newest status."""

    def __init__(self, root: Path, latest: Callable[[], Status | None], retention: Retention | None) -> None:
        self._root = root
        self._latest = latest
        self._retention = retention
        self._prune_ns = 0
        self._over = threading.Event()
        self.disk_free_bytes: int | None = None
        self._thread = threading.Thread(target=self._run, name="arbl2-chores", daemon=True)
        self._thread.start()

    def prune_soon(self) -> None:
        """A session has ended: others may go now."""
        self._prune_ns = 0

    def close(self, timeout_s: float = 1.0) -> None:
        """Write the last status, and stop."""
        self._over.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s, over = 0.1, False
        while not over:
            over, pause_s = self._over.wait(pause_s), EVERY_S
            try:
                self.disk_free_bytes = shutil.disk_usage(self._root).free
            except OSError:
                self.disk_free_bytes = None
            status = self._latest()
            if status is not None:
                write_status(self._root, status)
            if self._retention is not None and clock.mono_ns() >= self._prune_ns:
                self._prune_ns = clock.mono_ns() + PRUNE_NS
                # Comparing a copy far away may take minutes, in which the status must not grow old.
                threading.Thread(target=self._prune, args=(self._retention,), name="arbl2-prune", daemon=True).start()

    def _prune(self, retention: Retention) -> None:
        try:
            for pruned in prune(self._root, retention, now_ns=clock.wall_ns()):
                _logger.info("deleted %s (%s bytes) %s", pruned.session, pruned.bytes, pruned.problem)
        except Arbl2Error as error:
            _logger.warning("nothing was deleted: %s", error)
