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
from llvmlite.binding import parse_assembly
from numba.core import codegen, compiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# _nrt=False: kernels own no memory, so arrays passed from kernel to kernel need no reference counting (a fifth of the loop's
# time when there were many). It also makes numba refuse a kernel that allocates.
# No door for C: nobody calls kernels by their address.
_OPTIONS: Any = {"nogil": True, "_nrt": False, "no_cfunc_wrapper": True}

F = TypeVar("F", bound="Callable[..., Any]")


def kernel(function: F) -> F:
    """Compile ``function`` on first call, with the on-disk cache where a folder can be written."""
    try:
        return cast("F", numba.njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:  # numba found no writable cache folder: compile anew in each process
        return cast("F", numba.njit(**_OPTIONS)(function))


def _part_compiler() -> Any:
    """numba's own compiler, but the code of a part is left as it was written until it stands in a kernel.

    numba optimises every function that it compiles and makes machine code of it, each time with all that the function calls: what
    stands ten calls deep is done ten times, and only the last time counts. That was two fifths of the time to compile the loop.
    A numba that is built otherwise takes longer, and nothing else changes.
    """
    library: Any = getattr(codegen, "JITCodeLibrary", None)
    whole: Any = getattr(compiler, "Compiler", None)
    if library is None or whole is None:
        return None

    class Code(library):  # type: ignore[misc]
        _final_module: Any

        def _optimize_final_module(self) -> None:
            pass

        def _finalize_final_module(self) -> None:
            # numba wants the address of one variable of each function at once, so that alone becomes machine code now
            code = self._final_module
            names = [variable.name for variable in code.global_variables if variable.name.startswith("_ZN08NumbaEnv")]
            self._final_module = parse_assembly("".join(f'@"{name}" = common global i64 0\n' for name in names))
            super()._finalize_final_module()
            self._final_module = code

    class PartCompiler(whole):  # type: ignore[misc]
        def define_pipelines(self) -> Any:
            """The passes of numba. Called first of all, when it is known which function is compiled."""
            self.state.library = Code(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
            return super().define_pipelines()

    return PartCompiler


_PART_OPTIONS: Any = {**_OPTIONS, "no_cpython_wrapper": True}
if (_compiler := _part_compiler()) is not None:
    _PART_OPTIONS["pipeline_class"] = _compiler


def part(function: F) -> F:
    """Compile a kernel that only kernels call: no door for Python, no copy of its own on disk."""
    return cast("F", numba.njit(**_PART_OPTIONS)(function))


def zeros(dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of one record of zeros, fresh from the system: room that is never touched takes neither memory nor time."""
    return np.frombuffer(mmap.mmap(-1, dtype.itemsize), dtype)


def as_records(records: NDArray[Any], views: Any) -> Any:
    """What a kernel gets for the array of one record: itself, or without the compiler a list of an object with its views."""
    return [views] if getattr(numba.config, "DISABLE_JIT", 0) else records


def frozen(values: NDArray[Any]) -> NDArray[Any]:
    """The same, not to be written to: that is part of the type that a kernel is compiled for, and not all readers agree in it."""
    if not values.flags.writeable:
        return values
    values = values.view()
    values.flags.writeable = False
    return values
