"""The golden datasets: where they are, what is pinned of a run, and how expectations are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from arbl2.config import load
from arbl2_replay import RunResult, replay

GOLDEN = Path(__file__).resolve().parents[2] / "datasets" / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def run(name: str, **options: Any) -> RunResult:
    """Replay a golden dataset with its own configuration."""
    return replay(GOLDEN / name / "tape", load(GOLDEN / name / "config.toml"), **options)


def pinned(result: RunResult) -> dict[str, Any]:
    """What is expected to stay the same: digest, counts and key figures."""
    return {
        "digest": result.digest,
        "frames": result.frames,
        "reasons": result.reasons,
        "kpi": _without_none(result.kpi),
        "books": {f"{book['venue']}:{book['instrument']}": book["updates"] for book in result.books},
    }


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def text(name: str) -> str:
    """``expected.toml`` of a fresh run."""
    return "# Made by `make golden`; read the difference before you commit it.\n" + tomli_w.dumps(pinned(run(name)))
