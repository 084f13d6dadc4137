"""Checkpoints: a run in the middle, as bytes, as files and as marks in memory to go back to.

A checkpoint on disk is a folder: ``state`` (a line with the version and the SHA-256 of what follows, then engine, key figures
and position) and the event rows so far, ``decisions.rows`` and ``fills.rows``. The rows only grow, ``state`` is replaced as a
whole and says how many of them count, so a run that is killed at any moment leaves the last checkpoint intact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa

from arbl2 import __version__
from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.tape import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2_replay.course import Course

STATE = "state"
_MAGIC = b"arbl2 checkpoint 1 "
_MAX_BYTES = 2**30
"""Packed or unpacked. The largest run that an engine takes needs less; more is no checkpoint."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run in the middle: plain JSON values and named arrays."""

    meta: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def pack(self) -> bytes:
        """As bytes that ``unpack`` reads."""
        names = {name: (array.shape, np.lib.format.dtype_to_descr(array.dtype)) for name, array in self.arrays.items()}
        head = msgspec.json.encode({"meta": self.meta, "arrays": names})
        body = b"".join([head, b"\n", *(array.tobytes() for array in self.arrays.values())])
        return len(body).to_bytes(8, "little") + bytes(pa.compress(body, codec="zstd", asbytes=True))

    @classmethod
    def unpack(cls, packed: bytes) -> Snapshot:
        """Raises ValueError, or an error that is one, for anything else than what ``pack`` gave."""
        size = int.from_bytes(packed[:8], "little")
        if size > _MAX_BYTES:
            raise ValueError("it is too large")
        head, _, body = pa.decompress(packed[8:], size, codec="zstd", asbytes=True).partition(b"\n")
        said = msgspec.json.decode(head)
        arrays, at = {}, 0
        for name, (shape, descr) in said["arrays"].items():
            dtype = _dtype(descr)
            count = int(np.prod(shape, dtype=object))
            arrays[name] = np.frombuffer(body, dtype, count, at).reshape(shape)
            at += arrays[name].nbytes
        return cls(said["meta"], arrays)


def _dtype(descr: Any) -> np.dtype[Any]:
    """From JSON, which has lists where NumPy wants tuples."""
    dtype = np.lib.format.descr_to_dtype(_descr(descr))
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError("it has arrays of no numbers")
    return dtype


def _descr(descr: Any) -> Any:
    return descr if isinstance(descr, str) else [(name, _descr(kind), *map(tuple, shape)) for name, kind, *shape in descr]


def load(folder: Path, tape: Any) -> Snapshot:
    """Read a checkpoint. Raises TapeError for a damaged or foreign one, ConfigError for one of another arbl2 or ``tape``."""
    path = folder / STATE
    try:
        with path.open("rb") as file:
            first = file.readline(200)
            packed = file.read(_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise TapeError(f"{folder} holds no checkpoint. Name the folder that was given as --checkpoint.") from None
    except OSError as error:
        raise TapeError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not first.startswith(_MAGIC):
        raise TapeError(f"{path} is no checkpoint that this arbl2 reads. Replay from the beginning.")
    if first[len(_MAGIC) :].strip() != hashlib.sha256(packed).hexdigest().encode():
        raise TapeError(f"{path} is damaged: its bytes are not those that were written. Replay from the beginning.")
    try:
        snapshot = Snapshot.unpack(packed)
        version, _ = snapshot.meta["arbl2"], snapshot.meta["tape"]
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError, OSError) as error:
        raise TapeError(f"{path} is no checkpoint of arbl2's making ({error}). Replay from the beginning.") from None
    if version != __version__:
        raise ConfigError(f"{folder} was made by arbl2 {version}, this is {__version__}. Replay from the beginning.")
    if snapshot.meta["tape"] != tape:
        raise ConfigError(f"the checkpoint in {folder} is of another tape. Name the one that it was made from.")
    return snapshot


class Keeper:
    """Keeps a run in a folder, whenever it is told and every ``every_ns`` of tape time (0: never by itself).

    ``tape`` is what the tape is known by. Raises ConfigError if the folder holds another run than the one that was ``resumed``,
    or for a policy whose memory cannot be kept; StorageError.
    """

    def __init__(self, folder: Path, tape: Any, every_ns: int, course: Course, resumed: Path | None) -> None:
        if (folder / STATE).exists() and (resumed is None or resumed.resolve() != folder.resolve()):
            raise ConfigError(f"{folder} holds a checkpoint. Go on from it with --resume {folder}, or remove it.")
        course.snapshot()  # what cannot be kept is refused now, not after hours
        self._folder = folder
        self._tape = tape
        self._every_ns = every_ns
        self._course = course
        self._kept_ns = course.place.last_ns
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror or error}. Choose another --checkpoint.") from error

    def look(self) -> None:
        """Keep the run if it is time."""
        if self._every_ns and self._course.place.last_ns >= self._kept_ns + self._every_ns:
            self.keep()

    def keep(self) -> None:
        """Write the rows to the disk, then ``state``, so that a reader sees the old one or the new one. Raises StorageError."""
        if self._course.log is None:
            return
        snapshot = self._course.snapshot()
        meta = {**snapshot.meta, "arbl2": __version__, "tape": self._tape, "events": self._course.log.pack()}
        packed = Snapshot(meta, snapshot.arrays).pack()
        write_atomically(self._folder / STATE, _MAGIC + hashlib.sha256(packed).hexdigest().encode() + b"\n" + packed)
        self._kept_ns = self._course.place.last_ns

    def forget(self) -> None:
        """The run is complete: there is nothing to go on from."""
        (self._folder / STATE).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Leave a whole checkpoint or nothing."""
        if (self._folder / STATE).exists() or self._course.log is None:
            return
        self._course.log.remove()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


@dataclass(frozen=True, slots=True)
class _Mark:
    frames: int
    place: Any
    packed: bytes


class Marks:
    """Checkpoints in memory, at most ``most`` of them and ``most_bytes`` in all: the first, and others evenly spread.

    Whenever there are too many, every second is dropped and they are made half as often.
    """

    def __init__(self, every: int = 16_384, most: int = 64, most_bytes: int = 128 * 2**20) -> None:
        self._every = every
        self._most = most
        self._most_bytes = most_bytes
        self._marks: list[_Mark] = []

    def is_due(self, frames: int) -> bool:
        """Whether there should be one after so many frames."""
        return not self._marks or frames >= self._marks[-1].frames + self._every

    def add(self, frames: int, place: Any, packed: bytes) -> None:
        """Keep one. ``place`` says where it is; ``before`` shows it to its caller."""
        self._marks.append(_Mark(frames, place, packed))
        while len(self._marks) > 1 and (
            len(self._marks) > self._most or sum(len(mark.packed) for mark in self._marks) > self._most_bytes
        ):
            self._every *= 2
            del self._marks[1::2]

    def before(self, passes: Callable[[Any], bool]) -> bytes | None:
        """The last one whose place ``passes``, None if there is none."""
        return next((mark.packed for mark in reversed(self._marks) if passes(mark.place)), None)
