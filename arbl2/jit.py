"""The one place that compiles kernels.

Kernels are plain functions over NumPy arrays. ``fastmath`` stays off (it may reorder float operations), numba keeps the machine
code on disk beside the source (or in the user's cache folder), and ``NUMBA_DISABLE_JIT=1`` runs the same functions as Python.
They let go of the interpreter lock, so that the next block is read and unpacked while this one is decoded.

numba notices a change of the file that a kernel stands in, not of files it calls into, so kernels call no kernel of another
module.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# _nrt=False: kernels own no memory, so arrays passed from kernel to kernel need no reference counting (a fifth of the loop's
# time when there were many). It also makes numba refuse a kernel that allocates.
_OPTIONS: Any = {"nogil": True, "_nrt": False}

F = TypeVar("F", bound="Callable[..., Any]")


def kernel(function: F) -> F:
    """Compile ``function`` on first call, with the on-disk cache where a folder can be written."""
    try:
        return cast("F", numba.njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:  # numba found no writable cache folder: compile anew in each process
        return cast("F", numba.njit(**_OPTIONS)(function))


def part(function: F) -> F:
    """Compile a kernel that only kernels call: no door for Python, no copy of its own on disk."""
    options = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast("F", numba.njit(**options)(function))


def zeros(dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of one record of zeros, fresh from the system: room that is never touched takes neither memory nor time."""
    return np.frombuffer(mmap.mmap(-1, dtype.itemsize), dtype)


def as_records(records: NDArray[Any], views: Any) -> Any:
    """What a kernel gets for the array of one record: itself, or without the compiler a list of an object with its views."""
    return [views] if getattr(numba.config, "DISABLE_JIT", 0) else records
