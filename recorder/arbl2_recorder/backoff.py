"""How long to wait before dialling again: capped exponential growth with full jitter, so that many clients that lost the same
server do not come back at the same instant.
"""

from __future__ import annotations

import random

BASE_S = 0.5


class Backoff:
    """Counts failures; the owner says when things are well again."""

    def __init__(self, cap_s: float, rng: random.Random | None = None) -> None:
        self._cap_s = cap_s
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._failures = 0

    def delay_s(self) -> float:
        """Uniform between 0 and a bound that doubles with every call up to the cap, seconds."""
        bound = min(self._cap_s, BASE_S * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return self._rng.uniform(0.0, bound)

    def reset(self) -> None:
        """Start from the smallest bound again."""
        self._failures = 0
