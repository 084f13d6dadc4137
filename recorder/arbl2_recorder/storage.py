"""The folder side of a recording: one recorder per root folder, and errors in words a person can act on."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from arbl2.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

LOCK_FILE = ".recorder.lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(path: Path, error: OSError) -> StorageError:
    """An OSError as a StorageError that says what to do next."""
    if error.errno in _FULL:
        return StorageError(
            f"{path} cannot grow: {error.strerror}. What was logged before stays; free some space, then run `arbl2 recover`."
        )
    return StorageError(f"cannot use {path}: {error.strerror or error}. Choose a folder that can be written to.")


class RootLock:
    """Held while a recorder or a recovery works below a root folder; the kernel frees it however the process ends."""

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK_FILE
        self._handle = -1

    def __enter__(self) -> RootLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error(self._path.parent, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise StorageError(
                f"{self._path.parent} is in use by another recorder (process {holder}). Stop it, or choose another folder."
            ) from None
        except OSError as error:
            os.close(handle)
            raise storage_error(self._path, error) from error
        self._handle = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._handle)
