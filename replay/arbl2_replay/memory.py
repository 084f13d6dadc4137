"""Where Arrow takes its buffers from."""

from __future__ import annotations

import functools
import os

import pyarrow as pa


@functools.cache
def settle() -> None:
    """Let Arrow use jemalloc, where it has it and nobody chose another one. Holds for the whole process.

    Its default, mimalloc, gives memory back within hundredths of a second. A replay asks for the same sizes again and again, and
    the system clears each page anew: up to half of the time of a replay from a decoded store, and 50 MB more at the peak.
    """
    if "ARROW_DEFAULT_MEMORY_POOL" in os.environ or pa.default_memory_pool().backend_name != "mimalloc":
        return
    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())
