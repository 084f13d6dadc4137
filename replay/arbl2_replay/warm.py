"""The first start after an installation: compile the kernels, on two processor cores and outside this process.

numba compiles one kernel at a time in a process, and what it took for that is never given back. So two processes compile the
loop and everything else at the same time and leave the kernels in numba's cache, where this one finds them.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from arbl2 import engine, scan

_PARTS = ("warm_loop", "warm_rest")
# Nothing of what numba builds can be thrown away before it is done, and looking for it took a seventh of the time.
_PROGRAM = "import gc; gc.disable(); from arbl2 import engine; engine.{}()"


@functools.cache
def warm_up() -> None:
    """Compile every kernel of a replay (some ten seconds, once), or load it from numba's cache."""
    if not _compiled_before():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        helpers = [
            subprocess.Popen(  # noqa: S603 - this interpreter, our own words
                [sys.executable, "-c", _PROGRAM.format(part)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for part in _PARTS
        ]
        for helper in helpers:
            helper.wait()  # whatever became of it: what is not in the cache now is compiled below
    engine.warm_loop()
    engine.warm_rest()


def _compiled_before() -> bool:
    # no stats without the compiler, no path where no folder can be written: helpers would compile for nobody
    folder = getattr(getattr(scan.scan_upbit, "stats", None), "cache_path", None)
    return folder is None or any(Path(folder).glob("scan.scan_upbit-*.nbi"))
