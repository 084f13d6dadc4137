"""Shipping: a session's sealed files are copied to an object store, read back, and only then may go from here.

The order makes a kill harmless at every step: segments and ledger first, the manifest last, so that whoever reads the copy never
finds a manifest that names what is not there; ``shipped.json`` lists a file after what came back from there had the SHA-256 that
it has here; local segments are deleted after all that was written down. Shipping again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from arbl2.errors import Arbl2Error, ConfigError, StorageError, TapeError
from arbl2.places import CHUNK_BYTES, place, reason, sync_folder
from arbl2.tape import (
    LEDGER,
    MANIFEST,
    RECORDING,
    SEGMENTS,
    SHIPPED,
    Shipped,
    load_manifest,
    load_shipped,
    read_manifest,
    sessions,
    sha256_of,
    write_atomically,
)
from arbl2_recorder import clock
from arbl2_recorder.seal import SEALER_NICENESS
from arbl2_recorder.storage import storage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from arbl2.places import Place
    from arbl2.tape import Manifest

_logger = logging.getLogger("arbl2.ship")
LONGEST_PAUSE_S = 60.0
LONGEST_SESSION_PAUSE_S = 3_600.0
"""Between two tries of a session that could not be shipped while others could."""


class SessionInUseError(StorageError):
    """Another process ships or deletes that session now."""


class StoreError(StorageError):
    """The store does not answer or refuses: this is no matter of one session."""


@dataclass(frozen=True, slots=True)
class ShipReport:
    """What one call did: ``files`` and ``bytes`` sent, ``segments`` among the files, local segments ``deleted``.

    ``whole``: the session has ended and every file of it was read back from ``url`` as it is, or was, here.
    """

    session: str
    url: str
    files: int
    segments: int
    bytes: int
    deleted: int
    whole: bool


def ship_session(
    path: Path,
    url: str,
    *,
    delete_local: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_sent: Callable[[str, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> ShipReport:
    """Copy what is sealed of the local session ``path`` to ``url/<session>``; call it again for what was sealed since.

    It may run beside the recorder of that session. ``delete_local`` removes the local segments (never the manifest or the
    ledger) after all of them, and the manifest, were read back from there in this call. ``on_progress`` gets bytes of segments
    done and to do, ``on_sent`` the name and the bytes of each file that was sent and compared; ``stopped`` is asked between
    files. Raises ConfigError for a URL that cannot be used, TapeError for a local
    session that is not what its manifest says, StorageError for a store that does not take it, gives something else back or
    already holds another recording of that name. Nothing local has been deleted then.
    """
    with session_lock(path):
        return _Shipment(path, url, on_sent).run(delete_local=delete_local, on_progress=on_progress, stopped=stopped)


def is_shipped(path: Path, url: str | None = None) -> bool:
    """Whether all of a local session, as it is now, was verified in its copy (at ``url``, if that is given). Raises TapeError."""
    copy = load_shipped(path)
    if copy is None:
        return False
    manifest, body = read_manifest(path)
    if url is not None and copy.url != str(_copy_of(manifest, url)):
        return False
    names = {f"{LEDGER}/{file.name}" for file in _ledger(path)}
    return names <= copy.files.keys() and copy.files.get(MANIFEST) == _sha256(body)


def verify_copy(path: Path) -> None:
    """Read the copy of a local session back and compare. Raises TapeError if there is none, StorageError if it differs."""
    copy = load_shipped(path)
    if copy is None:
        raise TapeError(f"{path} was never shipped. `arbl2 datasets ship` does it.")
    with _asking(copy.url):
        far = place(copy.url)
    manifest, body = read_manifest(path)
    expected = {f"{SEGMENTS}/{segment.file}": segment.sha256 for segment in manifest.segments}
    for name, sha256 in {**copy.files, **expected, MANIFEST: _sha256(body)}.items():
        with _asking(far / name):
            found = (far / name).sha256()
        if found != sha256:
            raise _differs(far / name)


@contextlib.contextmanager
def session_lock(path: Path) -> Iterator[None]:
    """Hold a session folder against a second shipment and against deletion; the kernel frees it however the process ends."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise TapeError(f"there is no recording at {path}. Name a session folder of this machine.") from None
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise SessionInUseError(f"{path} is being shipped or deleted by another process. Wait for it to end.") from None
    finally:
        os.close(handle)


def _copy_of(manifest: Manifest, url: str) -> Place:
    root = place(url)
    # Written down, a path has to mean the same whatever folder one is in.
    return (root if root.local is None else place(root.local.absolute())) / manifest.session


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _ledger(path: Path) -> list[Path]:
    return sorted((path / LEDGER).glob("*.parquet"))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _same(far: Place, near: Path) -> bool:
    with _asking(far):
        return far.local is not None and far.local.exists() and far.local.samefile(near)


@contextlib.contextmanager
def _asking(far: Place | str) -> Iterator[None]:
    """Errors of the store as errors that say what to do next."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{far} cannot be used: {reason(error)}. Check that the bucket or folder exists, the credentials in the environment "
            "and the network, then ship again; nothing was deleted here."
        ) from error


def _differs(far: Place) -> StorageError:
    return StorageError(
        f"{far} is not what was shipped: it reads back with another SHA-256. Nothing was deleted here. "
        "Find out who changed it, then ship again: it is sent anew if it is still here."
    )


class _Shipment:
    """One call of ``ship_session``."""

    def __init__(self, path: Path, url: str, on_sent: Callable[[str, int], None] | None = None) -> None:
        self._path = path
        self._on_sent = on_sent
        self._manifest, self._body = read_manifest(path)
        with _asking(url):
            self._far = _copy_of(self._manifest, url)
        if _same(self._far, path):
            raise ConfigError(f"{self._far} is the session itself. Ship to another folder: a copy has to lie elsewhere.")
        self._copy = self._known_copy()
        self._read_back: set[str] = set()
        self._files = self._segments = self._bytes = 0

    def run(
        self, *, delete_local: bool, on_progress: Callable[[int, int], None] | None, stopped: Callable[[], bool]
    ) -> ShipReport:
        done, total = 0, sum(segment.bytes for segment in self._manifest.segments)
        for segment in self._manifest.segments:
            if stopped():
                return self._report(0)
            self._ship(f"{SEGMENTS}/{segment.file}", segment.sha256, segment.bytes)
            done += segment.bytes
            if on_progress is not None:
                on_progress(done, total)
        for file in _ledger(self._path):
            try:
                sha256, size = sha256_of(file), file.stat().st_size
            except OSError as error:
                raise storage_error(file, error) from error
            self._ship(f"{LEDGER}/{file.name}", sha256, size)
        self._ship_manifest()
        return self._report(self._delete() if delete_local else 0)

    def _report(self, deleted: int) -> ShipReport:
        whole = self._manifest.state != RECORDING and self._copy.files.get(MANIFEST) == _sha256(self._body)
        return ShipReport(self._manifest.session, str(self._far), self._files, self._segments, self._bytes, deleted, whole)

    def _known_copy(self) -> Shipped:
        """What is known of the copy; nothing if there is no copy at that place (any more)."""
        known = load_shipped(self._path)
        url = str(self._far)
        if known is not None and known.url != url:
            gone = [name for name in known.files if name.startswith(SEGMENTS) and not (self._path / name).exists()]
            if gone:
                raise StorageError(f"{self._path} was shipped to '{known.url}' and deleted here. Ship it there again.")
            known = None
        there = self._far_manifest()
        if known is None or (there is None and MANIFEST in known.files):
            return Shipped(url=url)
        return known

    def _far_manifest(self) -> Manifest | None:
        """The manifest of the copy. Raises StorageError if it is not one of this recording."""
        with _asking(self._far):
            if (self._far / MANIFEST).size() is None:
                return None
        try:
            there = load_manifest(self._far)
        except TapeError as error:
            raise StorageError(f"{error} Move it away, then ship again.") from None
        same_clock = there.anchor == self._manifest.anchor and there.session == self._manifest.session
        if not same_clock or there.segments != self._manifest.segments[: len(there.segments)]:
            raise StorageError(f"{self._far} holds another recording of that name. Ship to another folder.")
        return there

    def _ship(self, name: str, sha256: str, size: int) -> None:
        if self._copy.files.get(name) == sha256:
            return
        near, far = self._path / name, self._far / name
        with _asking(far):
            there = far.size() == size and far.sha256() == sha256
        if not there:
            self._send(near, far, sha256)
            self._count(name, size)
        self._note(name, sha256)

    def _count(self, name: str, size: int) -> None:
        self._files += 1
        self._segments += name.startswith(f"{SEGMENTS}/")
        self._bytes += size
        if self._on_sent is not None:
            self._on_sent(name, size)

    def _send(self, near: Path, far: Place, sha256: str) -> None:
        try:
            found = sha256_of(near)
        except OSError as error:
            raise TapeError(f"{near} cannot be read ({reason(error)}). Restore it from a copy of the recording.") from None
        if found != sha256:
            raise TapeError(f"{near} does not match its manifest; it was not shipped. Restore it from a copy.")
        with _asking(far):
            far.write(_chunks(near))
            if far.sha256() != sha256:
                raise _differs(far)

    def _ship_manifest(self) -> None:
        far, sha256 = self._far / MANIFEST, _sha256(self._body)
        with _asking(far):
            if far.size() != len(self._body) or far.sha256() != sha256:
                far.write([self._body])
                if far.sha256() != sha256:
                    raise _differs(far)
        if self._copy.files.get(MANIFEST) != sha256:
            self._count(MANIFEST, len(self._body))
        self._note(MANIFEST, sha256)

    def _note(self, name: str, sha256: str) -> None:
        """Write down that a file reads back from there as it is here."""
        self._read_back.add(name)
        if self._copy.files.get(name) != sha256:
            self._save({**self._copy.files, name: sha256})

    def _save(self, files: dict[str, str]) -> None:
        self._copy = msgspec.structs.replace(self._copy, files=files)
        write_atomically(self._path / SHIPPED, msgspec.json.format(msgspec.json.encode(self._copy), indent=1) + b"\n")

    def _delete(self) -> int:
        """Delete the local segments, after each was read back in this call; returns how many there were."""
        here = [segment for segment in self._manifest.segments if (self._path / SEGMENTS / segment.file).exists()]
        for segment in here:
            name = f"{SEGMENTS}/{segment.file}"
            far = self._far / name
            if _same(far, self._path / name):
                raise StorageError(f"{far} is no copy but the same file by another name. Ship to another folder.")
            if name in self._read_back:
                continue
            with _asking(far):
                found = far.size() == segment.bytes and far.sha256() == segment.sha256
            if not found:
                # What is not noted is sent anew by the next call.
                self._save({key: value for key, value in self._copy.files.items() if key != name})
                raise _differs(far)
        folder = self._path / SEGMENTS
        try:
            for segment in here:
                (folder / segment.file).unlink()
            if here:
                sync_folder(folder)
        except OSError as error:
            raise storage_error(folder, error) from error
        return len(here)


@dataclass(slots=True)
class _Ill:
    """A session that could not be shipped: why, how long it is left alone, and until when (monotonic, ns)."""

    reason: str
    pause_s: float
    until_ns: int


class Shipper:
    """Ships every session below ``root`` in a thread of its own, again and again until it is closed; a recorder runs beside it.

    A store that does not answer is asked again after a growing pause and ends nothing. A session that cannot be shipped holds
    up no other one and is tried again, after an hour at the latest. ``problem`` says what is wrong, "" if nothing is; ``files``
    and ``bytes`` were sent and compared, ``segments`` are those of the files that are segments. Raises ConfigError for a URL
    that cannot be used.
    """

    def __init__(self, root: Path, url: str, *, delete_local: bool = False, every_s: float = 5.0) -> None:
        with contextlib.suppress(OSError):  # a store that does not answer now may do so later
            place(url)
        self._root = root
        self._url = url
        self._delete_local = delete_local
        self._every_s = every_s
        self._closing = threading.Event()
        self._hurry = threading.Event()
        self._ill: dict[str, _Ill] = {}
        self.problem = ""
        self.files = 0
        self.segments = 0
        self.bytes = 0
        self._thread = threading.Thread(target=self._run, name="arbl2-ship", daemon=True)
        self._thread.start()

    def close(self, patience_s: float = 60.0) -> None:
        """Ship what has been sealed by now, for at most ``patience_s`` and the file in work. The rest goes next time."""
        self._closing.set()
        self._thread.join(patience_s)
        self._hurry.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        # Hashing must not take a core from the thread that stamps (Linux gives every thread its own niceness).
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SEALER_NICENESS)
        pause_s, last = self._every_s, False
        while not last:
            last = self._closing.wait(pause_s)
            refused = self._round()
            problem = "; ".join(filter(None, (refused, *(ill.reason for ill in self._ill.values()))))
            if problem and problem != self.problem:
                _logger.warning("%s", problem)
            self.problem = problem
            pause_s = min(pause_s * 2, max(LONGEST_PAUSE_S, self._every_s)) if refused else self._every_s

    def _round(self) -> str:
        """Ship what is new; returns what went wrong with the store."""
        try:
            found = sessions(self._root)
            for gone in self._ill.keys() - {path.name for path in found}:
                del self._ill[gone]
            for path in found:
                self._ship(path)
        except Arbl2Error as error:
            return str(error)
        except Exception as error:
            return f"shipping failed: {error!r}. It is tried again."
        return ""

    def _ship(self, path: Path) -> None:
        ill = self._ill.get(path.name)
        waits = ill is not None and clock.mono_ns() < ill.until_ns and not self._closing.is_set()
        if self._hurry.is_set() or waits:
            return
        try:
            if not is_shipped(path, self._url) or (self._delete_local and any((path / SEGMENTS).glob("*.parquet"))):
                stopped = self._hurry.is_set
                ship_session(path, self._url, delete_local=self._delete_local, on_sent=self._sent, stopped=stopped)
        except SessionInUseError:
            return  # whoever is at it ships or deletes it; the next round looks again
        except StoreError:
            raise
        except Arbl2Error as error:
            pause_s = min(ill.pause_s * 2 if ill is not None else self._every_s, LONGEST_SESSION_PAUSE_S)
            reason = f"{path.name} is not shipped: {error}"
            self._ill[path.name] = _Ill(reason, pause_s, clock.mono_ns() + int(pause_s * 1e9))
        else:
            self._ill.pop(path.name, None)

    def _sent(self, name: str, size: int) -> None:
        self.files += 1
        self.segments += name.startswith(f"{SEGMENTS}/")
        self.bytes += size
