"""The journal of a live run: what is left of it when it is killed.

While it runs, a folder holds the event rows so far and ``live.json``, which says up to which frame they are complete and what
the run was there: the digest of the engine, and one over the bytes of all frames it was fed. A row is written only when the frame
that it hangs on is in the recorder's log, so that a kill never leaves a row that the recovered tape cannot repeat.
"""

from __future__ import annotations

import hashlib
import queue
import shutil
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.errors import StorageError, TapeError
from arbl2.tape import write_atomically
from arbl2_replay.sinks import EventLog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from arbl2.config import RunConfig
    from arbl2.engine import Events
    from arbl2.frames import FrameBlock

LIVE_JSON = "live.json"
_LOOK_S = 0.02
_MAX_BYTES = 2**24


class Fed(msgspec.Struct, frozen=True):
    """Frames that a run was fed: how many, the last ``seq``, and BLAKE2b over their heads and over their payloads."""

    frames: int
    seq: int
    heads: str
    payloads: str


class FedDigest:
    """Adds up frames, one by one or in blocks, to the same ``Fed``."""

    def __init__(self) -> None:
        self._heads = hashlib.blake2b(digest_size=16)
        self._payloads = hashlib.blake2b(digest_size=16)
        self._frames = 0
        self._seq = 0

    def add(self, block: FrameBlock) -> None:
        """Add the frames of a block, with their stamps."""
        if not len(block):
            return
        self._heads.update(block.heads().tobytes())
        self._payloads.update(block.payloads())
        self._frames += len(block)
        self._seq = int(block.seq[-1])

    def fed(self) -> Fed:
        """What was added so far."""
        return Fed(self._frames, self._seq, self._heads.hexdigest(), self._payloads.hexdigest())


class Mark(msgspec.Struct, frozen=True):
    """A live run at one frame: what it was fed, the engine's digest, and rows and SHA-256 by table of its events."""

    fed: Fed
    digest: str
    rows: dict[str, dict[str, int | str]] = {}


class LiveFile(msgspec.Struct, frozen=True, kw_only=True):
    """``live.json``. ``state``: running (or killed), ended. ``latency``: by name, what was measured."""

    session: str
    tape: str
    state: str
    config: dict[str, Any]
    policy: str
    symbols: tuple[str, ...]
    mark: Mark
    latency: dict[str, Any] = {}


def read_live_file(folder: Path) -> LiveFile:
    """Read and check ``live.json``. Raises TapeError."""
    path = folder / LIVE_JSON
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TapeError(f"{path} is too large to be of a live run. Name the folder of one.")
        return msgspec.json.decode(path.read_bytes(), type=LiveFile)
    except (FileNotFoundError, NotADirectoryError):
        raise TapeError(f"{folder} is no live run: it has no {LIVE_JSON}. `arbl2 live` makes one.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TapeError(f"{path} cannot be read ({error}). What it said is lost; replay the tape instead.") from None
    except OSError as error:
        raise TapeError(f"{path} cannot be read: {error.strerror or error}. Check the disk and its rights.") from None


class Journal:
    """Writes marks and rows in a thread of its own, each when the recorder has logged what it hangs on.

    ``logged_seq`` says up to which frame that is. Raises StorageError when it cannot start; what fails later is in ``error``.
    """

    def __init__(
        self, folder: Path, *, session: str, tape: Path, config: RunConfig, policy: str, symbols: tuple[str, ...],
        logged_seq: Callable[[], int],
    ) -> None:  # fmt: skip
        self.folder = folder
        self.error: StorageError | None = None
        self._head = LiveFile(
            session=session,
            tape=str(tape.absolute()),
            state="running",
            config=msgspec.to_builtins(config),
            policy=policy,
            symbols=symbols,
            mark=Mark(FedDigest().fed(), ""),
        )
        self._logged_seq = logged_seq
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror or error}. Choose another folder with --out.") from error
        self._log = EventLog(folder)
        self._marks: queue.SimpleQueue[tuple[Mark, list[Events], dict[str, Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arbl2-journal", daemon=True)
        self._thread.start()

    def put(self, mark: Mark, events: list[Events], latency: dict[str, Any]) -> None:
        """The run is at this mark, and made these events since the last one. Never waits."""
        self._marks.put((mark, events, latency))

    def close(self) -> dict[str, dict[str, int | str]]:
        """Write what waits, whose frames are all logged by now; returns rows and SHA-256 by table. Raises StorageError."""
        self._closing.set()
        self._marks.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error
        packed = self._log.pack()
        self._log.close()
        return packed

    def abandon(self) -> None:
        """Stop where the log is: the recording has failed, and what is not logged stays unwritten."""
        self._closing.set()
        self._marks.put(None)
        self._thread.join()
        self._log.close()

    def ended(self, mark: Mark, latency: dict[str, Any]) -> bytes:
        """``live.json`` of the run that has ended."""
        return _encoded(msgspec.structs.replace(self._head, state="ended", mark=mark, latency=latency))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        try:
            write_atomically(self.folder / LIVE_JSON, _encoded(self._head))
            while (item := self._marks.get()) is not None:
                mark, events, latency = item
                if not self._is_logged(mark.fed.seq):
                    return
                for part in events:
                    self._log.write(part)
                done = msgspec.structs.replace(mark, rows=self._log.pack())
                write_atomically(
                    self.folder / LIVE_JSON, _encoded(msgspec.structs.replace(self._head, mark=done, latency=latency))
                )
        except StorageError as error:
            self.error = error

    def _is_logged(self, seq: int) -> bool:
        while self._logged_seq() < seq:
            if self._closing.wait(_LOOK_S):
                return self._logged_seq() >= seq
        return True


def _encoded(what: LiveFile) -> bytes:
    return msgspec.json.format(msgspec.json.encode(what, order="deterministic"), indent=2) + b"\n"
