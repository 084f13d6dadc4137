"""The digest of a run: one number for "the same decisions, fills, books and money".

BLAKE2b over the canonical configuration, every decision row and every fill row in the order written, then the closing balances,
the checksum of every book and the counters. Rows are packed little-endian integers and IEEE doubles, so the digest depends on
nothing but the tape and the configuration.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray


_PIECE = 2**16


class RunDigest:
    """Feeds on event rows as they are drained; the split into blocks does not matter.

    Rows go in pieces of a fixed number of bytes into a chain of hashes, so that its state is 32 bytes and a rest, which a
    checkpoint can keep.
    """

    def __init__(self, config: bytes) -> None:
        self._config = config
        self._decisions = _Chain()
        self._fills = _Chain()

    def update(self, decisions: NDArray[Any], fills: NDArray[Any]) -> None:
        """Add rows in the order written."""
        self._decisions.update(decisions.tobytes())
        self._fills.update(fills.tobytes())

    def result(self, closing: dict[str, Any]) -> str:
        """The run's digest, given its closing state (plain integers and strings only)."""
        whole = _hash(self._config)
        whole.update(self._decisions.digest())
        whole.update(self._fills.digest())
        whole.update(msgspec.json.encode(closing, order="deterministic"))
        return whole.hexdigest()

    def pack(self) -> list[str]:
        """What a later run needs to go on from here."""
        return [part.hex() for chain in (self._decisions, self._fills) for part in (chain.head, chain.rest)]

    def unpack(self, packed: list[str]) -> None:
        """Go on from there. Raises ValueError for anything else than what ``pack`` gave."""
        head, rest, other_head, other_rest = (bytes.fromhex(part) for part in packed)
        self._decisions, self._fills = _Chain(head, rest), _Chain(other_head, other_rest)


@dataclass(slots=True)
class _Chain:
    head: bytes = bytes(32)
    rest: bytes = b""

    def update(self, rows: bytes) -> None:
        self.rest += rows
        while len(self.rest) >= _PIECE:
            self.head = _hash(self.head + self.rest[:_PIECE]).digest()
            self.rest = self.rest[_PIECE:]

    def digest(self) -> bytes:
        return _hash(self.head + self.rest).digest()


def _hash(data: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=32)
