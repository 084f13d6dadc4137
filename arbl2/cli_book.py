"""``arbl2 book``: what the books were at an instant of a recording."""
# ruff: noqa: PLC0415 - heavy imports inside the commands keep --help quick

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def book(
    symbol: Annotated[str, typer.Argument(help="Coin, such as BTC, or a market by the venue's name: KRW-XRP, BTCUSDT.")],
    tape: Annotated[
        str | None, typer.Argument(help="Session, or a folder of them, here or at a URL; default: the newest recording.")
    ] = None,
    at: Annotated[
        str,
        typer.Option(
            help="2026-01-02T03:04:05.678 (UTC), +12m or +1h30m from the beginning, nanoseconds since 1970, #12345 (right after "
            "that frame), or end."
        ),
    ] = "end",
    levels: Annotated[int, typer.Option("--levels", "-n", min=1, help="Levels a side to show.")] = 10,
    full: Annotated[
        bool,
        typer.Option("--full", help="Show every known level of a book built from depth changes, and where each is known from."),
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML configuration: when a book is stale, what makes Binance's books.")
    ] = None,
    tapes: Annotated[str, typer.Option(help="Folder or URL to look in for the newest recording.")] = "tapes",
    cache: Annotated[
        Path,
        typer.Option(
            envvar="ARBL2_CACHE", help="Folder for the keyframes of recordings at a URL or in a folder that is read-only."
        ),
    ] = Path("~/.cache/arbl2/keyframes"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show both venues' books of a coin at any instant of a recording, the edges, and until when that holds.

    The first time, keyframes are made in one pass over the recording; after that every instant is found in milliseconds.
    """
    from arbl2 import cli
    from arbl2.tape import find_session

    with cli._said_if_slow("compiling the kernels, once after an installation: some ten seconds"):
        from arbl2_replay.moments import Moment
        from arbl2_replay.travel import Travel
        from arbl2_replay.travel_report import book_report, find, to_json
        from arbl2_replay.warm import warm_up

        moment = Moment.parse(at)
        session = find_session(tape, tapes)
        warm_up()
    with cli._progress("keyframes") as progress:
        travel = Travel(session, cli._run_config(config, None), cache=cache.expanduser(), on_progress=progress)
    found = find(travel, moment, symbol, full=full)
    if as_json:
        cli._print_json(to_json(found, levels=levels))
    else:
        cli._show(book_report(found, levels=levels))
