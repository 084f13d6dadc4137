"""``arbl2 live`` (or ``paper``) and ``arbl2 verify``: a paper run on live feeds, and the proof that its replay is the same."""
# ruff: noqa: PLC0415 - heavy imports inside the commands keep --help quick

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2_replay.live import LiveRun

DIFFERENT = 1
"""Exit code of a live run that its replay is not: a result, not an error."""


class L2Source(StrEnum):
    """Where the books come from."""

    MOCK = "mock"
    UPBIT = "upbit"
    BINANCE = "binance"
    MULTI = "multi"


def live(
    l2_source: Annotated[
        L2Source,
        typer.Option("--l2-source", help="multi: both venues; upbit, binance: one, no trades; mock: a local exchange server."),
    ] = L2Source.MULTI,
    symbols: Annotated[
        str | None, typer.Option("--symbols", "-s", help="Coins; default: those of --config, else BTC,ETH,XRP.")
    ] = None,
    duration: Annotated[float | None, typer.Option("--duration", "-d", help="Seconds; without it until Ctrl-C.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML configuration; see docs/configuration.md.")] = None,
    entry_bps: Annotated[float | None, typer.Option(help="Enter when the gross edge is at least this.")] = None,
    tp_bps: Annotated[float | None, typer.Option(help="Close when entry threshold + edge back reach this.")] = None,
    size_krw: Annotated[str | None, typer.Option(help="Size of one entry in KRW.")] = None,
    max_position_krw: Annotated[str | None, typer.Option(help="Largest position of a symbol in KRW.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Say at the end what this calibration (file or folder) had predicted, and what came.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of runs.")] = Path("runs"),
    tapes: Annotated[Path, typer.Option(help="Folder of recordings.")] = Path("tapes"),
    streams: Annotated[
        str, typer.Option(help="depth, diff, trade, book_ticker, comma separated, or all. Upbit has depth and trade.")
    ] = "depth",
    legs: Annotated[int, typer.Option(help="2 = every stream over two connections, so that a drop of one loses nothing.")] = 1,
    upbit_ws: Annotated[str | None, typer.Option(envvar="ARBL2_UPBIT_WS", help="Upbit WebSocket URL.")] = None,
    upbit_rest: Annotated[str | None, typer.Option(envvar="ARBL2_UPBIT_REST", help="Upbit REST URL.")] = None,
    binance_ws: Annotated[str | None, typer.Option(envvar="ARBL2_BINANCE_WS", help="Binance WebSocket URL (/stream).")] = None,
    binance_rest: Annotated[str | None, typer.Option(envvar="ARBL2_BINANCE_REST", help="Binance REST URL.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the market of --l2-source mock.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of tables.")] = False,
) -> None:
    """Trade on paper on live books while they are recorded, until Ctrl-C or for --duration seconds. `paper` is the same command.

    The tape lands in --tapes and the run in --out, as `arbl2 replay` writes it; `arbl2 verify` proves that both are one run.
    """
    from arbl2 import cli
    from arbl2.live_feed import live as run_live

    policy = {"entry_bps": entry_bps, "tp_bps": tp_bps, "size_krw": size_krw, "max_position_krw": max_position_krw}
    run_config = cli._run_config(config, symbols, **policy)
    table = cli._calibration(calibration)
    with ExitStack() as stack:
        urls: dict[str, str | None] = {
            "upbit_ws": upbit_ws, "upbit_rest": upbit_rest, "binance_ws": binance_ws, "binance_rest": binance_rest,
        }  # fmt: skip
        if l2_source is L2Source.MOCK:
            urls = dict(stack.enter_context(cli._exchange(seed)))
        recording = _record_config(
            l2_source, run_config.symbols, out=tapes, duration_s=duration, streams=cli._streams(streams), legs=legs, urls=urls
        )
        with cli._said_if_slow("compiling the kernels, once after an installation: some ten seconds"):
            from arbl2_replay.live_view import live_report
            from arbl2_replay.warm import warm_up

            warm_up()
        outcome = run_live(
            recording, run_config, runs=out, calibration=table, on_run=lambda run: _watched(run, stack, quiet=as_json)
        )
    if as_json:
        recorded = outcome.recording
        cli._print_json(
            outcome.live.to_json()
            | {"tape": str(recorded.path), "ended": recorded.ended, "clean": recorded.clean, "reconnects": recorded.reconnects}
        )
        return
    from arbl2_recorder.report import result_report

    cli._show(result_report(outcome.recording))
    cli._show(live_report(outcome.live))


def _record_config(
    source: L2Source,
    symbols: tuple[str, ...],
    *,
    out: Path,
    duration_s: float | None,
    streams: tuple[str, ...],
    legs: int,
    urls: dict[str, str | None],
) -> Any:
    from arbl2 import cli
    from arbl2_recorder import RecordConfig

    config = RecordConfig(
        out=out, duration_s=duration_s, streams=streams, legs=legs, endpoints=cli._endpoints(**urls),
        venues=(source.value,) if source in (L2Source.UPBIT, L2Source.BINANCE) else ("upbit", "binance"),
    )  # fmt: skip
    return dataclasses.replace(config, symbols=symbols) if symbols else config


def _watched(run: LiveRun, stack: ExitStack, *, quiet: bool) -> Callable[[Any], None]:
    """Who is told the recorder's status: the view, in a thread of its own."""
    from arbl2_recorder.live import Aside, alarms_to_stderr
    from arbl2_replay.live_view import TradingView

    if quiet or not sys.stderr.isatty():
        alarms_to_stderr()
    return stack.enter_context(Aside(stack.enter_context(TradingView(run))))


def verify(
    session: Annotated[
        str | None, typer.Argument(help="Session of a live run, by folder, URL or name; default: the newest recording.")
    ] = None,
    run: Annotated[
        str | None, typer.Argument(help="Its run, by folder or the start of its name; default: the one in --runs.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    tapes: Annotated[str, typer.Option(help="Folder or URL of recordings.")] = "tapes",
    truncate: Annotated[
        int, typer.Option(min=0, max=1000, help="Cut the tape at so many random frames: what was decided before must stay.")
    ] = 0,
    jitter_ties: Annotated[
        int, typer.Option(min=0, max=1000, help="Permute what came at once from both venues so many times, and say what flips.")
    ] = 0,
    window_ms: Annotated[float, typer.Option(min=0.001, max=10_000, help="What counts as at once for --jitter-ties.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of cuts and permutations.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Replay the tape of a live run and compare: same frames, decisions, fills, books and money, or the first difference.

    Ends with 0 if both are one run and with 1 if not. Of a run that was killed everything that it left is compared, after
    `arbl2 recover`.
    """
    from arbl2 import cli

    with cli._said_if_slow("compiling the kernels, once after an installation: some ten seconds"):
        from arbl2_replay.verify import find_tape, verify_live
        from arbl2_replay.verify_report import verification_report
        from arbl2_replay.warm import warm_up

        warm_up()
    folder = find_tape(session, tapes)
    with nullcontext() if as_json else cli._progress("verify") as progress:
        found = verify_live(
            folder,
            run,
            runs=runs,
            cuts=truncate,
            jitters=jitter_ties,
            window_ms=window_ms,
            seed=seed,
            on_progress=progress,
        )
    if as_json:
        cli._print_json(found.to_json())
    else:
        cli._show(verification_report(found))
    raise typer.Exit(0 if found.same else DIFFERENT)
