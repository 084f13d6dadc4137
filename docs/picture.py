"""Draws docs/replay.svg, the README's picture, from a real replay of the golden recording. `make docs` runs it."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from arbl2.config import load
from arbl2_replay import replay
from arbl2_replay.report import run_report

DOCS = Path(__file__).resolve().parent
GOLDEN = DOCS.parent / "datasets" / "golden" / "two-venue-60s"


def main() -> None:
    """Replay, draw, save."""
    replay(GOLDEN / "tape")  # compiles the kernels, so that the picture shows what every later replay takes
    result = replay(GOLDEN / "tape", load(GOLDEN / "config.toml"))
    console = Console(record=True, width=126, file=io.StringIO(), force_terminal=True)
    console.print("[bold green]$[/] arbl2 replay")
    console.print(run_report(result))
    console.save_svg(str(DOCS / "replay.svg"), title="arbl2", unique_id="arbl2")


if __name__ == "__main__":
    main()
