"""Two connections that carry the same streams say everything twice: the second copy is left out.

What counts is the exact bytes. A message of one connection is a copy if another one has said the same more often so far; a
message that one connection repeats is no copy, so that a duplicate made by the venue stays on the tape.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

_MOST_PAYLOADS = 100_000


class Copies:
    """What the connections of one group have said lately."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._said: OrderedDict[bytes, tuple[int, dict[int, int]]] = OrderedDict()

    def is_copy(self, conn: int, payload: bytes, mono_ns: int) -> bool:
        """Count the message, and say whether another connection has delivered it before."""
        while self._said:
            at_ns, _ = next(iter(self._said.values()))
            if mono_ns - at_ns <= self._window_ns and len(self._said) < _MOST_PAYLOADS:
                break
            self._said.popitem(last=False)
        key = blake2b(payload, digest_size=16).digest()
        found = self._said.get(key)
        if found is None:
            self._said[key] = (mono_ns, {conn: 1})
            return False
        times = found[1]
        before = times.get(conn, 0)
        times[conn] = before + 1
        return any(said > before for other, said in times.items() if other != conn)

    def clear(self) -> None:
        """One connection is left: nothing said so far can come again from another."""
        self._said.clear()
