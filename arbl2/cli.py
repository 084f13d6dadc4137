"""The command line: parse, one call, a table, an exit code. Parts are imported where they are used, so that --help is quick."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arbl2 import cli_book, cli_datasets, cli_live, cli_runs
from arbl2.errors import Arbl2Error, ConfigError, EvidenceError, TapeError, VenueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from arbl2.zones import CalibrationTable

app = typer.Typer(
    name="arbl2",
    help="Record and replay Upbit and Binance order books so truthfully that a backtest can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 not healthy or not the same, 2 option or configuration, 3 tape or run, 4 venue, "
    "5 disk or lock, 6 not supported by the data, 70 a defect of arbl2, 130 interrupted, 143 terminated.",
)
app.add_typer(cli_datasets.app, name="datasets")

TAPES = Path("tapes")
RUNS = Path("runs")
CALIBRATIONS = Path("calibrations")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
UpbitWs = Annotated[str | None, typer.Option(envvar="ARBL2_UPBIT_WS", help="Upbit WebSocket URL.")]
UpbitRest = Annotated[str | None, typer.Option(envvar="ARBL2_UPBIT_REST", help="Upbit REST URL.")]
BinanceWs = Annotated[str | None, typer.Option(envvar="ARBL2_BINANCE_WS", help="Binance WebSocket URL (/stream).")]
BinanceRest = Annotated[str | None, typer.Option(envvar="ARBL2_BINANCE_REST", help="Binance REST URL.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML configuration; see docs/configuration.md.")]


def main() -> None:
    """Entry point: every error is a sentence and an exit code, never a traceback."""
    # a run that is told to stop cleans up behind itself; the recorder has handlers of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app(standalone_mode=True)
    except Arbl2Error as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted.", 130)
    except Exception as error:
        if os.environ.get("ARBL2_DEBUG"):
            raise
        _fail(
            f"this is a defect of arbl2 ({type(error).__name__}: {error}). "
            "Run again with ARBL2_DEBUG=1 for the details, and please report it.",
            70,
        )


def _fail(message: str, code: int) -> None:
    print(f"arbl2: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _show(what: RenderableType) -> None:
    from rich.console import Console

    console = Console()
    # in a pipe rich assumes 80 columns; whoever reads a file has more
    (console if console.is_terminal else Console(width=max(console.width, 120))).print(what)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))  # noqa: T201


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip().upper() for part in text.split(",") if part.strip()))


@contextmanager
def _said_if_slow(message: str, after_s: float = 2.0) -> Iterator[None]:
    """Say why it takes long, if it does."""
    timer = threading.Timer(after_s, lambda: print(message, file=sys.stderr, flush=True))  # noqa: T201
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def _print_version(asked: bool) -> None:
    if asked:
        from arbl2 import __version__

        print(f"arbl2 {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: arbl2 record --symbols BTC,ETH,XRP --duration 60")
def record(
    symbols: Annotated[str, typer.Option("--symbols", "-s", help="Coins, comma separated.")] = "BTC,ETH,XRP",
    venues: Annotated[
        str, typer.Option(help="Venues, comma separated. KRW-USDT is added when both are recorded.")
    ] = "upbit,binance",
    streams: Annotated[
        str, typer.Option(help="depth, diff, trade, book_ticker, comma separated, or all. Upbit has depth and trade.")
    ] = "depth",
    duration: Annotated[float | None, typer.Option("--duration", "-d", help="Seconds; without it until Ctrl-C.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of recordings.")] = TAPES,
    upbit_ws: UpbitWs = None,
    upbit_rest: UpbitRest = None,
    binance_ws: BinanceWs = None,
    binance_rest: BinanceRest = None,
    upbit_format: Annotated[str, typer.Option(help="DEFAULT or SIMPLE.")] = "DEFAULT",
    upbit_units: Annotated[int, typer.Option(help="Levels a side on Upbit: 1, 5, 15 or 30.")] = 30,
    binance_depth: Annotated[int, typer.Option(help="Levels a side on Binance: 5, 10 or 20.")] = 20,
    legs: Annotated[int, typer.Option(help="2 = every stream over two connections, so that a drop of one loses nothing.")] = 1,
    session_hours: Annotated[float, typer.Option(help="A new session folder starts this often, without a hole.")] = 24.0,
    segment_minutes: Annotated[float, typer.Option(max=1e6, help="A new Parquet file starts this often ...")] = 15.0,
    segment_mib: Annotated[int, typer.Option(help="... or when this much was logged.")] = 128,
    ship: Annotated[
        str | None, typer.Option(help="Copy sealed segments to this folder or URL (s3://bucket/tapes) while recording.")
    ] = None,
    ship_delete: Annotated[bool, typer.Option("--ship-delete", help="Delete them here once the copy was read back.")] = False,
    keep_days: Annotated[float | None, typer.Option(help="Delete sessions that ended longer ago.")] = None,
    keep_gib: Annotated[float | None, typer.Option(max=1e9, help="Delete the oldest while the folder holds more.")] = None,
    flush_ms: Annotated[int, typer.Option(help="What a kill may cost at most.")] = 250,
    compress: Annotated[
        bool, typer.Option("--compress", help="Offer permessage-deflate: fewer bytes on the line, twice the work a message.")
    ] = False,
    give_up_s: Annotated[float, typer.Option(help="Stop if no venue has delivered anything by then.")] = 15.0,
    metrics: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Serve Prometheus metrics on this port of 127.0.0.1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: the status every second, last the result.")] = False,
) -> None:
    """Record the raw order book messages of Upbit and Binance, byte for byte, until Ctrl-C or for --duration seconds."""
    from arbl2_recorder import RecordConfig

    config = RecordConfig(
        out=out,
        venues=tuple(name.lower() for name in _names(venues)),
        symbols=_names(symbols),
        duration_s=duration,
        endpoints=_endpoints(upbit_ws=upbit_ws, upbit_rest=upbit_rest, binance_ws=binance_ws, binance_rest=binance_rest),
        upbit_format=upbit_format.upper(),
        upbit_units=upbit_units,
        binance_depth=binance_depth,
        streams=_streams(streams),
        legs=legs,
        session_s=session_hours * 3600,
        segment_seconds=round(segment_minutes * 60),
        segment_bytes=segment_mib * 2**20,
        ship=ship,
        ship_delete=ship_delete,
        keep_days=keep_days,
        keep_bytes=round(keep_gib * 2**30) if keep_gib is not None else None,
        flush_ms=flush_ms,
        compress=compress,
        first_connect_s=give_up_s,
    )
    _record(config, as_json=as_json, metrics=metrics)


def _streams(names: str) -> tuple[str, ...]:
    from arbl2_recorder.config import Stream

    return tuple(Stream) if names == "all" else tuple(name.lower() for name in _names(names))


def _endpoints(**urls: str | None) -> Any:
    from arbl2_recorder import Endpoints

    return Endpoints(**{name: url for name, url in urls.items() if url})


def _record(config: Any, *, as_json: bool, metrics: int | None = None) -> Any:
    from arbl2_recorder import LiveView, record
    from arbl2_recorder.live import Aside, JsonLines, alarms_to_stderr
    from arbl2_recorder.report import result_report

    lines = JsonLines(sys.stdout.fileno()) if as_json else None
    if as_json or not sys.stderr.isatty():
        alarms_to_stderr()
    with ExitStack() as stack:
        viewers: list[Any] = [lines or stack.enter_context(LiveView())]
        if metrics is not None:
            from arbl2_recorder.metrics import Metrics

            viewers.append(stack.enter_context(Metrics(metrics)))
        with Aside(*viewers) as aside:
            result = record(config, on_status=aside)
    if lines is not None:
        lines.result(result)
    else:
        _show(result_report(result))
    return result


@app.command(epilog="Example: arbl2 health --tapes tapes --max-silence-s 120")
def health(
    tapes: Annotated[str, typer.Option(help="Folder of recordings.", metavar="FOLDER")] = str(TAPES),
    max_age_s: Annotated[float, typer.Option(help="Unhealthy if the recorder's last status is older.")] = 10.0,
    max_silence_s: Annotated[float, typer.Option(help="Unhealthy if a venue has said nothing for longer.")] = 60.0,
    min_free_gib: Annotated[float, typer.Option(help="Unhealthy if less of the disk is free.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Say in one line whether the recorder of a folder is well. Ends with 0 if it is and with 1 if it is not."""
    from arbl2_recorder.health import health as look

    for name, value in (("max-age-s", max_age_s), ("max-silence-s", max_silence_s), ("min-free-gib", min_free_gib)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"--{name} is {value:g}; it must be a number from 0 on.")
    found = look(
        cli_datasets.recordings_here(tapes),
        max_age_s=max_age_s,
        max_silence_s=max_silence_s,
        min_free_bytes=int(min_free_gib * 2**30),
    )
    if as_json:
        _print_json({"healthy": found.healthy, **{name: getattr(found, name) for name in found.__slots__}})
    else:
        print(found.sentence())  # noqa: T201
    raise typer.Exit(0 if found.healthy else 1)


@app.command(epilog="Example: arbl2 doctor --out tapes")
def doctor(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of recordings.")] = TAPES,
    venues: Annotated[str, typer.Option(help="Venues to reach, comma separated.")] = "upbit,binance",
    upbit_ws: UpbitWs = None,
    upbit_rest: UpbitRest = None,
    binance_ws: BinanceWs = None,
    binance_rest: BinanceRest = None,
    offline: Annotated[bool, typer.Option("--offline", help="Check this machine only, not the venues.")] = False,
    as_json: Json = False,
) -> None:
    """Check clock, disk, limits, versions and the way to the venues. Ends with 0 unless a check failed, then with 1."""
    from arbl2_recorder import RecordConfig
    from arbl2_recorder.doctor import examine
    from arbl2_recorder.report import doctor_report

    endpoints = _endpoints(upbit_ws=upbit_ws, upbit_rest=upbit_rest, binance_ws=binance_ws, binance_rest=binance_rest)
    config = RecordConfig(out=out, venues=tuple(name.lower() for name in _names(venues)), endpoints=endpoints)
    with _said_if_slow("waiting for what does not answer: at most five seconds", after_s=1.0):
        checks = examine(out, config.endpoints, () if offline else config.venues)
    if as_json:
        _print_json([{name: getattr(check, name) for name in check.__slots__} for check in checks])
    else:
        _show(doctor_report(checks))
    raise typer.Exit(1 if any(check.state == "fail" for check in checks) else 0)


@app.command(epilog="Example: arbl2 recover tapes")
def recover(
    root: Annotated[str, typer.Argument(help="Folder of recordings.", metavar="FOLDER")] = str(TAPES),
    as_json: Json = False,
) -> None:
    """Restore what a killed recorder left in its log. `arbl2 record` does the same when it starts."""
    from arbl2_recorder import recover as restore
    from arbl2_recorder.report import recovery_report

    reports = restore(cli_datasets.recordings_here(root))
    if as_json:
        _print_json([{name: getattr(report, name) for name in report.__slots__} for report in reports])
    else:
        _show(recovery_report(reports))
    if any(report.problem for report in reports):
        raise TapeError("a session could not be recovered; nothing of it was changed. The table says why.")


@app.command(epilog="Example: arbl2 replay --speed 10x tapes/20260102T000000Z-1a2b")
def replay(
    tape: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TAPE]...",
            help="Sessions here or at URLs, several as one run; of a folder the newest. Default: the newest recording.",
        ),
    ] = None,
    speed: Annotated[str | None, typer.Option("--speed", "-x", help="1x, 10x, 0.5x or max; default: max, or 1x with -i.")] = None,
    config: ConfigFile = None,
    symbols: Annotated[str | None, typer.Option("--symbols", "-s", help="Coins to trade; default: all on both venues.")] = None,
    entry_bps: Annotated[float | None, typer.Option(help="Enter when the gross edge is at least this.")] = None,
    tp_bps: Annotated[float | None, typer.Option(help="Close when entry threshold + edge back reach this.")] = None,
    size_krw: Annotated[str | None, typer.Option(help="Size of one entry in KRW.")] = None,
    max_position_krw: Annotated[str | None, typer.Option(help="Largest position of a symbol in KRW.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Say at the end what this calibration (file or folder) had predicted, and what came.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of runs.")] = RUNS,
    tapes: Annotated[str, typer.Option(help="Folder or URL to look in for the newest recording.")] = str(TAPES),
    every: Annotated[bool, typer.Option("--all", help="Every session of the folders, as one run.")] = False,
    start: Annotated[
        str | None, typer.Option("--from", help="Begin there, with empty books: +90s, or a date and time (UTC).")
    ] = None,
    stop: Annotated[str | None, typer.Option("--to", help="Leave out, unread, what comes from there on.")] = None,
    venues: Annotated[str | None, typer.Option(help="Replay these venues only, comma separated.")] = None,
    decoded: Annotated[
        bool | None,
        typer.Option("--decoded/--raw", help="Make decoded stores first, or use none; default: use those that are there."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="End there: #12345 (a seq), +90s, or a date and time (UTC).")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A run that ends before its tape is kept in this folder, in the middle.", metavar="FOLDER")
    ] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option(help="Keep it there so often too, in tape time (10m), in case it is killed.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run that was kept in this folder.", metavar="FOLDER")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Steer by keys, or by commands from a pipe (docs/replaying.md).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Replay a recording through books, aggregator, policy and paper executor; write decisions, fills and key figures."""
    from arbl2_replay.reading import find_sessions

    run_config = _run_config(
        config, symbols, entry_bps=entry_bps, tp_bps=tp_bps, size_krw=size_krw, max_position_krw=max_position_krw
    )
    _replay(
        find_sessions(tape or [], tapes, every=every),
        run_config,
        speed=speed or ("1x" if interactive else "max"),
        out=out,
        as_json=as_json or (interactive and not (sys.stdin and sys.stdin.isatty())),
        interactive=interactive,
        until=until,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        start=start,
        stop=stop,
        venues=[name.lower() for name in _names(venues or "")],
        decoded=decoded,
        calibration=_calibration(calibration),
    )


def _calibration(path: Path | None) -> CalibrationTable | None:
    """The calibration that is meant, whole and checked. Raises ConfigError: whatever is wrong with it, the option is."""
    if path is None:
        return None
    from arbl2_calibration import load

    try:
        return load(path)
    except TapeError as error:
        raise ConfigError(f"--calibration cannot be used: {error}") from None


def _run_config(path: Path | None, symbols: str | None, **policy: float | str | None) -> Any:
    import msgspec

    from arbl2.config import RunConfig, checked, load

    config = load(path) if path is not None else RunConfig()
    given = {name: value for name, value in policy.items() if value is not None}
    config = msgspec.structs.replace(config, policy=msgspec.structs.replace(config.policy, **given))
    if symbols is not None and not _names(symbols):
        raise ConfigError("--symbols names no coin. Write coins with commas between them: --symbols BTC,ETH.")
    if symbols is not None:
        config = msgspec.structs.replace(config, symbols=_names(symbols))
    return checked(config)


def _replay(
    tapes: list[Path | str],
    config: Any,
    *,
    speed: str,
    out: Path,
    as_json: bool,
    interactive: bool = False,
    **ends: Any,
) -> Any:
    with _said_if_slow("compiling the kernels, once after an installation: some ten seconds"):
        from arbl2_replay import replay as run
        from arbl2_replay.report import run_report
        from arbl2_replay.warm import warm_up

        warm_up()
    if interactive:
        from arbl2_replay.console import hands_on

        with hands_on() as steering:
            result = run(tapes, config, out=out, speed=speed, steering=steering, **ends)
    else:
        with _progress("replay") as progress:
            result = run(tapes, config, out=out, speed=speed, on_progress=progress, **ends)
    if as_json:
        _print_json(result.to_json())
    else:
        _show(run_report(result))
    return result


@app.command(epilog="Example: arbl2 calibrate runs/*")
def calibrate(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; default: the newest run.")] = None,
    zones: Annotated[Path | None, typer.Option(help="TOML table of zones; default: the built-in one.")] = None,
    store: Annotated[Path | None, typer.Option(help="Keep the DuckDB database in this file.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for calibration.json and the block sums.")] = CALIBRATIONS,
    every: Annotated[bool, typer.Option("--every-zone", help="Show every zone that has an event, published or not.")] = False,
    as_json: Json = False,
) -> None:
    """Estimate fill survival and slippage by zone from the fill events of runs; say unknown where the data does not tell."""
    _calibrate(_run_folders(runs) if runs else [_newest_run()], out=out, zones=zones, store=store, every=every, as_json=as_json)


def _run_folders(named: list[Path]) -> list[Path]:
    """Run folders as named; a folder of runs stands for all of them."""
    found: list[Path] = []
    for path in named:
        inside = [] if (path / "run.json").exists() else sorted(run.parent for run in path.glob("*/run.json"))
        found += inside or [path]
    return found


def _newest_run() -> Path:
    found = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise TapeError("there is no run below runs/. `arbl2 replay` makes one.")
    return found[-1].parent


def _calibrate(
    runs: list[Path],
    *,
    out: Path,
    zones: Path | None = None,
    store: Path | None = None,
    every: bool = False,
    as_json: bool = False,
) -> None:
    from rich.text import Text

    from arbl2_calibration import calibrate as fit
    from arbl2_calibration import limits_text, zone_table

    result = fit(runs, out=out, zones=zones, store=store)
    if as_json:
        print(result.path.read_text())  # noqa: T201
        return
    for repeated in result.counted_once:
        _show(Text(f"{repeated} is the same run as another one and counts once", style="yellow"))
    _show(zone_table(result.table, show="seen" if every else "published"))
    _show(Text(f"{limits_text(result.table)}\n\ncalibration {result.path}"))


app.command(epilog="Example: arbl2 live --l2-source mock --duration 60")(cli_live.live)
app.command("paper", hidden=True)(cli_live.live)
app.command(epilog="Example: arbl2 verify 20260102T000000Z-1a2b")(cli_live.verify)
app.command(epilog="Example: arbl2 book BTC --at +12m")(cli_book.book)
app.command(epilog="Example: arbl2 diff 1a2b3c4d 5e6f7a8b --runs runs")(cli_runs.diff)


@app.command("import", epilog="Example: arbl2 import capture.txt.gz --out tapes")
def import_(
    source: Annotated[Path, typer.Argument(help="hftbacktest lines (`recv_ns SPACE json`, plain or .gz) or Upbit JSONL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of recordings.")] = TAPES,
    session: Annotated[
        str | None, typer.Option(help="Name of the session; default: from the first stamp and the file's name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a foreign capture into a tape, payload bytes unchanged."""
    from arbl2_replay.importer import import_capture

    result = import_capture(source, out, session=session)
    if as_json:
        _print_json({name: getattr(result, name) for name in result.__slots__})
        return
    from rich.text import Text

    counts = ", ".join(f"{kind} {n:,}" for kind, n in sorted(result.counts.items()))
    lines = [f"{result.frames:,} frames -> {result.path}", counts, *result.notes, f"next: arbl2 replay {result.path}"]
    _show(Text("\n".join(lines)))


@app.command(epilog="Example: arbl2 serve tapes/20260102T000000Z-1a2b --speed 10x --port 8765")
def serve(
    tape: Annotated[
        str | None, typer.Argument(help="Session, or a folder of them, here or at a URL; default: a synthetic market.")
    ] = None,
    speed: Annotated[str, typer.Option("--speed", "-x", help="1x, 10x, 0.5x or, for a recording, max.")] = "1x",
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 = any free port.")] = 0,
    at: Annotated[str | None, typer.Option(help="Begin there: seconds from the beginning, or a date and time.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Begin the recording again when it is over.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="Go on answering, in silence, when it is over.")] = False,
    start_when_subscribed: Annotated[
        bool, typer.Option("--start-when-subscribed", help="Begin when clients have subscribed; wait for them after disconnects.")
    ] = False,
    subscribers: Annotated[
        int | None, typer.Option(min=1, help="How many connections that takes; default: one for each venue.")
    ] = None,
    disconnects: Annotated[bool, typer.Option(help="Let recorded disconnects happen to the clients too.")] = True,
    lockstep: Annotated[
        bool, typer.Option("--lockstep", help="Exact order across connections: what one is told is read before the next is told.")
    ] = False,
    compress: Annotated[
        bool | None, typer.Option(help="Deflate for clients that offer it, as the venues do; default: not at --speed max.")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SECONDS: a fault strikes so often on average; all=60 is every kind. Repeatable.", metavar="X=S"),
    ] = None,
    fault_seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 1,
    fault_log: Annotated[Path | None, typer.Option(help="Append a line of JSON for every fault.", dir_okay=False)] = None,
    close_codes: Annotated[str | None, typer.Option(help="Codes that the fault `close` draws from.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic market.")] = 1,
    gap_every: Annotated[
        float, typer.Option(min=0.5, help="Synthetic: mean seconds between gaps of one coin's prices across the venues.")
    ] = 14.0,
    as_json: Json = False,
) -> None:
    """Serve a recording, or a synthetic market, over Upbit's and Binance's own protocols, on loopback."""
    from arbl2_replay.clock import Speed
    from arbl2_replay.control import moment_ns
    from arbl2_replay.faults import fault_config
    from arbl2_replay.server import ServerOptions, serve_market

    if at is not None and tape is None:
        raise ConfigError("--at needs a recording to go to a moment of. Name one.")
    source = _market(tape, Speed.parse(speed).factor, seed=seed, gap_every=gap_every)
    venues = bool(source.upbit_codes) + bool(source.binance_symbols)
    codes = _whole_numbers("--close-codes", close_codes) if close_codes is not None else None
    options = ServerOptions(
        host=host,
        port=port,
        start_ns=moment_ns(at, source.start_ns) if at is not None else 0,
        loop=loop,
        subscribers=subscribers or (venues if start_when_subscribed else 0),
        disconnects=disconnects,
        lockstep=lockstep,
        compression="deflate" if (bool(source.speed) if compress is None else compress) else None,
        faults=fault_config(fault, fault_seed, codes) if fault else None,
        fault_log=fault_log,
    )

    def ready(server: Any) -> None:
        urls = {name: getattr(server, f"{name}_url") for name in ("upbit_ws", "upbit_rest", "binance_ws", "binance_rest")}
        if as_json:
            _print_json({**urls, "control": server.control_url})
            sys.stdout.flush()
            return
        from rich.text import Text

        exports = (f"  export ARBL2_{name.upper()}={url}" for name, url in urls.items())
        lines = ["record from it with these settings:", *exports, f"pause, seek, speed: curl {server.control_url}status"]
        _show(Text("\n".join(lines)))

    serve_market(source, options, ready, stay=stay)


def _market(tape: str | None, speed: float, *, seed: int, gap_every: float) -> Any:
    """The recording that is meant, or the synthetic market."""
    if tape is None:
        from arbl2_replay.sources import SyntheticSource
        from arbl2_replay.synth import SynthConfig

        return SyntheticSource(SynthConfig(seed=seed, duration_s=86_400.0, excursion_every_s=gap_every), speed=speed)
    from arbl2.tape import find_session
    from arbl2_replay.tape_source import TapeSource

    return TapeSource(find_session(tape, tape), speed=speed)


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no list of numbers. Write 1001,1011.") from None


@app.command(epilog="Example: arbl2 demo --seconds 20")
def demo(
    seconds: Annotated[float, typer.Option(min=1.0, max=3_600.0, help="How long to record.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic market.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where to put tape, run and calibration.")] = Path("demo"),
) -> None:
    """The whole way without network: a local exchange server, recorded, replayed and calibrated."""
    from rich.text import Text

    from arbl2.config import PolicyConfig, RunConfig
    from arbl2_recorder import RecordConfig

    # larger than most of what is displayed at the best price, so that partial fills and leg risk show
    policy = PolicyConfig(size_krw="20000000", max_position_krw="60000000")
    with _exchange(seed) as urls:
        _show(
            Text(
                f"\n1. arbl2 record: {seconds:g} s of BTC, ETH, XRP and KRW-USDT from the local exchange server",
                style="bold cyan",
            )
        )
        recording = _record(
            RecordConfig(out=folder / "tapes", duration_s=seconds, endpoints=_endpoints(**urls)),
            as_json=False,
        )
    _show(Text("\n2. arbl2 replay: the recording at full speed with the threshold policy", style="bold cyan"))
    run = _replay([recording.path], RunConfig(policy=policy), speed="max", out=folder / "runs", as_json=False)
    _show(Text("\n3. arbl2 calibrate: zones from the fill events", style="bold cyan"))
    try:
        _calibrate([run.run_dir], out=folder / "calibrations")
    except EvidenceError as refusal:  # a short demo may hold too little to learn from, and calibrate says so
        _show(Text(f"refused: {refusal}", style="yellow"))
    # the folder of the script may not be on the PATH
    me = "arbl2" if shutil.which("arbl2") else os.path.relpath(sys.argv[0])
    tapes = folder / "tapes"
    next_steps = (
        (f"{me} replay --tapes {tapes} --speed 10x", "the same recording, paced"),
        (f"{me} replay --tapes {tapes} --entry-bps 10 --tp-bps 20", "another policy on the same books"),
        (f"{me} record --symbols BTC,ETH,XRP", "the real venues, until Ctrl-C"),
        (f"{me} --help", "everything else"),
    )
    _show(Text("\nWhat to try next\n" + "\n".join(f"  # {what}\n  {command}" for command, what in next_steps)))


@contextmanager
def _exchange(seed: int) -> Iterator[dict[str, str]]:
    """The local exchange server in a process of its own; yields its URLs."""
    # a gap every few seconds, so that 20 s have something to show
    command = [sys.executable, "-m", "arbl2", "serve", "--seed", str(seed), "--gap-every", "4", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                problem = process.stderr.read().strip() if process.stderr else ""
                raise VenueError(f"the local exchange server did not start: {problem or 'it said nothing'}")
            urls = json.loads(line)
            yield {name: url for name, url in urls.items() if name != "control"}
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
