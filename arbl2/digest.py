"""The digest of a run: one number for "the same decisions, fills, books and money".

BLAKE2b over the canonical configuration, every decision row and every fill row in the order written, then the closing balances,
the checksum of every book and the counters. Rows are packed little-endian integers and IEEE doubles, so the digest depends on
nothing but the tape and the configuration.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RunDigest:
    """Feeds on event rows as they are drained; the split into blocks does not matter."""

    def __init__(self, config: bytes) -> None:
        self._config = config
        self._decisions = hashlib.blake2b(digest_size=32)
        self._fills = hashlib.blake2b(digest_size=32)

    def update(self, decisions: NDArray[Any], fills: NDArray[Any]) -> None:
        """Add rows in the order written."""
        self._decisions.update(decisions.tobytes())
        self._fills.update(fills.tobytes())

    def result(self, closing: dict[str, Any]) -> str:
        """The run's digest, given its closing state (plain integers and strings only)."""
        whole = hashlib.blake2b(digest_size=32)
        whole.update(self._config)
        whole.update(self._decisions.digest())
        whole.update(self._fills.digest())
        whole.update(msgspec.json.encode(closing, order="deterministic"))
        return whole.hexdigest()
