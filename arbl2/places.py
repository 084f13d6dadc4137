"""Where recordings lie: a folder of this machine, or a URL of an object store such as ``s3://bucket/tapes``.

One small face over pyarrow's filesystems, so that nobody who reads or writes a recording needs to know which it is.
Credentials come from the environment, as usual for the store; options of the store may follow the URL after ``?``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pyarrow import fs

from arbl2.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CHUNK_BYTES = 4 * 2**20
"""Read at once; an object store is asked once for each."""
_PASSWORD = re.compile(r"(?<=://)[^/@?]*:[^/@?]*@")
_REQUEST_ID = re.compile(r" \(Request ID: [^)]*\)")


class Place:
    """One file or folder, here or in an object store.

    ``local`` is its path if it is on this machine. Every method that touches it raises OSError (``reason`` puts it in words).
    """

    __slots__ = ("_fs", "_path", "_query", "_url", "local")

    def __init__(self, filesystem: fs.FileSystem, path: str, url: str = "", query: str = "") -> None:
        self._fs = filesystem
        self._path = path.rstrip("/") or path
        self._url = url.rstrip("/")
        self._query = query
        self.local = Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def __str__(self) -> str:
        """The path, or the URL: what can be typed to name this place again."""
        return self._path if self.local is not None else f"{self._url}{self._query}"

    def __truediv__(self, name: str) -> Place:
        return Place(self._fs, f"{self._path.rstrip('/')}/{name}", f"{self._url}/{name}", self._query)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    def size(self) -> int | None:
        """Bytes of the file, None if there is none."""
        return sizes([self])[0]

    def open(self) -> pa.NativeFile:
        """The file, open for reading at any position."""
        return self._fs.open_input_file(self._path)

    def read(self, limit: int) -> bytes:
        """The whole file. Raises OSError if it has more than ``limit`` bytes: what is foreign must not fill the memory."""
        with self.open() as file:
            if file.size() > limit:
                raise OSError(f"it has {file.size():,} bytes, more than any of its kind")
            return bytes(file.read())

    def sha256(self) -> str:
        """SHA-256 of the bytes as they read back from there, as hex."""
        digest = hashlib.sha256()
        with self.open() as file:
            while len(chunk := file.read_buffer(CHUNK_BYTES)):
                digest.update(chunk)
        return digest.hexdigest()

    def folders(self) -> list[Place]:
        """The folders below it, by name; none if it is not there."""
        found = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        names = sorted(entry.base_name for entry in found if entry.type == fs.FileType.Directory)
        return [self / name for name in names if not name.startswith(".")]

    def files(self) -> list[Place]:
        """The files below it, by name; none if it is not there."""
        found = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return [self / name for name in sorted(entry.base_name for entry in found if entry.type == fs.FileType.File)]

    def write(self, chunks: Iterable[bytes]) -> None:
        """Write the file, so that under its name there is all of it or what was there before."""
        if self.local is not None:
            _write_local(self.local, chunks)
            return
        stream = self._fs.open_output_stream(self._path)
        try:
            for chunk in chunks:
                stream.write(chunk)
        except BaseException:
            # An upload cannot be called off, only ended; what is there then is not the file.
            with contextlib.suppress(OSError):
                stream.close()
                self._fs.delete_file(self._path)
            raise
        stream.close()


def sizes(places: Sequence[Place]) -> list[int | None]:
    """Bytes of each file of one store, None where there is none; asked all at once."""
    return [info.size if info.type == fs.FileType.File else None for info in _infos(places)]


def changes_ns(places: Sequence[Place]) -> list[int | None]:
    """When each file of one store was written last, ns since the Unix epoch, None where there is none; asked all at once."""
    return [info.mtime_ns if info.type == fs.FileType.File else None for info in _infos(places)]


def _infos(places: Sequence[Place]) -> list[fs.FileInfo]:
    return places[0]._fs.get_file_info([place._path for place in places]) if places else []


def _write_local(path: Path, chunks: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new and removed names in a local folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place(where: Path | str) -> Place:
    """The place that a path or URL names. Raises ConfigError if it cannot be one, OSError if its store does not answer."""
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{text!r} is not written in UTF-8. Rename the folder.") from None
        return Place(fs.LocalFileSystem(), text)
    if _PASSWORD.search(text):
        raise ConfigError(f"leave the key out of {_PASSWORD.sub('', text)}. Credentials belong into the environment.")
    try:
        filesystem, path = _store(text)
    except (pa.ArrowException, ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"{text} names no place that can be used ({reason(error)}). Write s3://bucket/folder, or the path of a folder."
        ) from None
    if not path.strip("/"):
        raise ConfigError(f"{text} names no bucket or folder. Write s3://bucket/folder.")
    url, mark, query = text.partition("?")
    return Place(filesystem, path, url, mark + query)


@functools.lru_cache(maxsize=64)
def _store(url: str) -> tuple[fs.FileSystem, str]:
    # Making one may ask the network for the bucket's region.
    filesystem, path = fs.FileSystem.from_uri(url)
    return filesystem, path


def reason(error: BaseException) -> str:
    """What an error of a store says, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return _REQUEST_ID.sub("", text.splitlines()[0])
