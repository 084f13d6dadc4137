"""What every client program says and hears: its endpoint on the command line, one JSON line per book state on standard output."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

LEVELS = 20


def endpoint() -> tuple[str, str, list[str]]:
    """WebSocket base, REST base (no path, no slash at the end), and the venue's own codes to follow."""
    said = json.loads(sys.argv[1])
    return said["ws"], said["rest"], said["codes"]


def state(code: str, mark: int, bids: Iterable[tuple[Any, Any]], asks: Iterable[tuple[Any, Any]], how: str = "stream") -> None:
    """A book as the client has it now, best level first; ``mark`` is the venue's own id of that state."""
    sides = [[(str(px), str(size)) for px, size in side][:LEVELS] for side in (bids, asks)]
    print(json.dumps({"code": code, "mark": mark, "bids": sides[0], "asks": sides[1], "how": how}), flush=True)


def note(what: object) -> None:
    """Anything else worth reading when a test has failed."""
    print(json.dumps({"note": str(what)}), flush=True)
