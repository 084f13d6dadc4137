"""How hard the property tests try: ``ARBL2_EFFORT=50`` multiplies the examples and makes each run draw new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EFFORT = int(os.environ.get("ARBL2_EFFORT", "1"))


def examples(count: int) -> settings:
    """Settings of a property test with ``count`` examples at the usual effort, the same ones each time."""
    return settings(
        max_examples=count * EFFORT,
        derandomize=EFFORT == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
