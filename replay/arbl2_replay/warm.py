"""The first start after an installation: compile the kernels, on two processor cores.

numba compiles one kernel at a time in a process. The decoders and the loop share none, so a second process compiles the decoders
meanwhile and leaves them in numba's cache, where this one finds them.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from arbl2 import engine, scan

_COMPILE_DECODERS = "from arbl2.engine import warm_decoders; warm_decoders()"


@functools.cache
def warm_up() -> None:
    """Compile every kernel of a replay (some ten seconds, once), or load it from numba's cache."""
    helper = None
    if not _compiled_before() and (os.cpu_count() or 1) > 1:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        helper = subprocess.Popen(  # noqa: S603 - this interpreter, our own words
            [sys.executable, "-c", _COMPILE_DECODERS],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        engine.warm_loop()
    finally:
        if helper is not None:
            helper.wait()  # whatever became of it: what is not in the cache is compiled here
    engine.warm_decoders()


def _compiled_before() -> bool:
    # no stats without the compiler, no path where no folder can be written: a helper would compile for nobody
    folder = getattr(getattr(scan.scan_upbit, "stats", None), "cache_path", None)
    return folder is None or any(Path(folder).glob("scan.scan_upbit-*.nbi"))
