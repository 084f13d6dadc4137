"""Arrow's buffers come from where they are kept, unless somebody chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

TAPE = Path(__file__).parents[2] / "datasets/golden/crossed/tape"
PROGRAM = """
import sys, pyarrow as pa
from arbl2_replay import replay
replay(sys.argv[1])
print(pa.default_memory_pool().backend_name)
"""


@pytest.mark.parametrize("chosen", ["", *pa.supported_memory_backends()])
def test_a_replay_settles_where_memory_comes_from(chosen):
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": chosen}
    if not chosen:
        del environment["ARROW_DEFAULT_MEMORY_POOL"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(TAPE)], env=environment, capture_output=True, text=True, check=True)
    backends = pa.supported_memory_backends()
    expected = chosen or ("jemalloc" if {"jemalloc", "mimalloc"} <= set(backends) else backends[0])
    assert done.stdout.split() == [expected]
