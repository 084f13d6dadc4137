"""Replay: tapes read, paced and driven through the engine; capture import; the synthetic market and its exchange server."""

from __future__ import annotations

from arbl2_replay.clock import Lateness, Speed
from arbl2_replay.driver import RunResult, replay

__all__ = ["Lateness", "RunResult", "Speed", "replay"]
