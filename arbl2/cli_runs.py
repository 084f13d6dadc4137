"""``arbl2 diff``: two runs beside each other."""
# ruff: noqa: PLC0415 - heavy imports inside the commands keep --help quick

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DIFFERENT = 1
"""Exit code of runs that are not the same: a result, not an error."""


def diff(
    run_a: Annotated[str, typer.Argument(help="Run folder, or the start of its name or digest below --runs.")],
    run_b: Annotated[str, typer.Argument(help="The run to compare it with.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    tapes: Annotated[
        str | None, typer.Option(help="Folder or URL to look in for recordings that are not where they were replayed from.")
    ] = None,
    frames: Annotated[int, typer.Option(min=0, max=100, help="Frames to show before and after one.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show where two runs part: what went in, the first event that differs, the frames around it, and how much after it.

    Ends with 0 if both have the same digest and with 1 if not.
    """
    from arbl2 import cli
    from arbl2_replay.compare import compare, find_run

    folders = [find_run(name, runs) for name in (run_a, run_b)]
    with cli._said_if_slow("reading the recordings up to where they differ"):
        found = compare(*folders, tapes=tapes, around=frames)
    if as_json:
        cli._print_json(found.to_json())
    else:
        from arbl2_replay.compare_report import comparison_report

        cli._show(comparison_report(found))
    raise typer.Exit(0 if found.same else DIFFERENT)
