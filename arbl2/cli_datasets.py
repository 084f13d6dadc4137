"""``arbl2 datasets``: what recordings there are, whether they are whole, where their copies lie, and what may go."""
# ruff: noqa: PLC0415 - heavy imports inside the commands keep --help quick

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arbl2.errors import Arbl2Error, ConfigError, StorageError, TapeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType

    from arbl2.datasets import Dataset

app = typer.Typer(
    help="List the recordings below a folder or URL; verify, ship, build and prune them; show their gaps.",
    epilog="Example: arbl2 datasets --tapes s3://bucket/tapes",
)
GIB = 2**30
KILLED = "killed"
"""Shown for a session whose manifest says that it is being recorded, while nobody records there."""
ROOMY, NARROW = 120, 100
"""Columns of a terminal below which a list is shortened, and leaves out the start, which the name of a session holds."""
_QUERY = re.compile(r"(\w+://[^\s?]+)\?[^\s;,]+")

Tapes = Annotated[str | None, typer.Option("--tapes", help="Folder or URL of recordings; default: tapes.", metavar="PLACE")]
Folder = Annotated[str | None, typer.Option("--tapes", help="Folder of recordings; default: tapes.", metavar="FOLDER")]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[SESSION]...", help="Names below --tapes, folders or URLs; default: all.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.")]


@app.callback(invoke_without_command=True)
def _datasets(context: typer.Context, tapes: Tapes = None, as_json: Json = False) -> None:
    context.obj = tapes
    if context.invoked_subcommand is None:
        _list(_root(context, None), as_json=as_json)


@app.command("list", epilog="Example: arbl2 datasets list --tapes s3://bucket/tapes --json")
def list_(context: typer.Context, tapes: Tapes = None, as_json: Json = False) -> None:
    """List sessions: span, contents, gaps, sizes, and where they are kept. `arbl2 datasets` alone does the same."""
    _list(_root(context, tapes), as_json=as_json)


def _list(root: str, *, as_json: bool) -> None:
    from msgspec import to_builtins

    from arbl2 import cli
    from arbl2.datasets import datasets

    found = [_alive(item) for item in datasets(root)]
    if as_json:
        cli._print_json([to_builtins(item) for item in found])
    else:
        cli._show(DatasetTable(found, root) if found else _none_below(root))


def _alive(item: Dataset) -> Dataset:
    """Marked as killed if it claims to be recorded and no recorder holds its folder."""
    from msgspec.structs import replace

    from arbl2.tape import RECORDING
    from arbl2_recorder.health import holder

    if item.state != RECORDING or "://" in item.place or holder(Path(item.place).parent) is not None:
        return item
    return replace(item, state=KILLED)


def _none_below(root: str) -> str:
    return f"there is no recording below {root}. `arbl2 record` makes one; `arbl2 demo` shows the whole way."


@app.command(epilog="Example: arbl2 datasets verify 20260102T000000Z-1a2b")
def verify(
    context: typer.Context,
    names: Names = None,
    tapes: Tapes = None,
    copies: Annotated[bool, typer.Option("--copies", help="Also read the copies of shipped sessions back.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with the SHA-256 that was recorded. Ends with exit code 3 if anything differs.

    A result other than whole that is no error says what was not read.
    """
    from arbl2 import cli
    from arbl2.datasets import BOTH, REMOTE, dataset, log_not_read
    from arbl2.datasets import verify as verify_here

    found: dict[str, dict[str, str]] = {}
    sessions = _sessions(names, _root(context, tapes))
    with cli._progress("verify") as progress:
        for number, session in enumerate(sessions, start=1):
            try:
                item = dataset(session)
                unread = verify_here(session)
                if copies and item.copy and item.kept in (BOTH, REMOTE):
                    from arbl2_recorder.ship import verify_copy

                    verify_copy(Path(session))
                    unread = log_not_read(session)
                found[session] = {"problem": "", "unread": unread}
            except Arbl2Error as error:
                found[session] = {"problem": str(error), "unread": ""}
            progress(number, len(sessions))
    if as_json:
        cli._print_json(found)
    else:
        rows = [(name, result["problem"] or result["unread"] or "whole") for name, result in found.items()]
        cli._show(_table("Verified", ("session", "result"), rows))
    if any(result["problem"] for result in found.values()):
        raise TapeError("not every recording is what it was. The table says which, and what to do.")


@app.command(epilog="Example: arbl2 datasets build 20260102T000000Z-1a2b")
def build(context: typer.Context, names: Names = None, tapes: Tapes = None, as_json: Json = False) -> None:
    """Make decoded stores beside local recordings, so that replays need not read JSON. They may be deleted at any time."""
    from arbl2 import cli
    from arbl2.tape import TapeReader
    from arbl2_replay.store import build_session

    found = []
    for session in _sessions(names, _root(context, tapes)):
        reader = TapeReader(folder_here(session))
        with cli._progress(f"build {reader.manifest.session}") as progress:
            found.append(build_session(reader, progress))
    if as_json:
        cli._print_json([{name: getattr(item, name) for name in item.__slots__} for item in found])
        return
    rows = [(item.session, f"{item.made:,}", f"{item.kept:,}", _size(item.bytes), _size(item.raw_bytes)) for item in found]
    cli._show(_table("Decoded stores", ("session", "made", "there before", "size", "raw"), rows))


@app.command(epilog="Example: arbl2 datasets ship s3://bucket/tapes --delete-local")
def ship(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where copies go: s3://bucket/folder, file:///folder or a folder.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SESSION]...", help="Names below --tapes, or folders; default: all.")
    ] = None,
    tapes: Folder = None,
    delete_local: Annotated[
        bool, typer.Option("--delete-local", help="Delete local segments once the copy was read back and compared.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy sealed segments, ledgers and manifests to an object store, and compare what comes back."""
    from arbl2 import cli
    from arbl2_recorder.ship import ship_session

    found = [folder_here(session) for session in _sessions(names, str(recordings_here(_named(context, tapes))))]
    reports = []
    for session in found:
        with cli._progress(f"ship {session.name}") as progress:
            reports.append(ship_session(session, url, delete_local=delete_local, on_progress=progress))
    if as_json:
        cli._print_json([{name: getattr(report, name) for name in report.__slots__} for report in reports])
        return
    rows = []
    for report in reports:
        sent = (f"{report.segments:,}", f"{report.files:,}", _size(report.bytes))
        rows.append((report.session, *sent, f"{report.deleted:,}", "whole" if report.whole else "so far"))
    cli._show(_table(f"Shipped to {url}", ("session", "segments sent", "files", "size", "deleted here", "copy"), rows))


@app.command(epilog="Example: arbl2 datasets prune --keep-days 30 --only-shipped --dry-run")
def prune(
    context: typer.Context,
    tapes: Folder = None,
    keep_days: Annotated[float | None, typer.Option(help="Delete what ended longer ago.")] = None,
    keep_gib: Annotated[float | None, typer.Option(help="Delete the oldest while the folder holds more.")] = None,
    only_shipped: Annotated[
        bool, typer.Option("--only-shipped", help="Only what has a whole copy elsewhere, which is read back before.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete whole sessions by age or size, oldest first; never the newest, never one that has not ended."""
    from arbl2 import cli
    from arbl2_recorder import clock
    from arbl2_recorder.retention import Retention
    from arbl2_recorder.retention import prune as delete

    if keep_days is None and keep_gib is None:
        raise ConfigError("name a limit: --keep-days 30, --keep-gib 200 or both. Without one everything is kept.")
    if keep_gib is not None and not 0 < keep_gib < math.inf:
        raise ConfigError(f"--keep-gib is {keep_gib:g}; it must be above 0, or left out to keep everything.")
    retention = Retention(
        keep_days=keep_days, keep_bytes=None if keep_gib is None else round(keep_gib * GIB), only_shipped=only_shipped
    )
    pruned = delete(recordings_here(_named(context, tapes)), retention, now_ns=clock.stamp()[0], dry_run=dry_run)
    if as_json:
        cli._print_json([{name: getattr(item, name) for name in item.__slots__} for item in pruned])
    elif pruned:
        done = "would be deleted" if dry_run else "deleted"
        rows = [(item.session, _size(item.bytes), item.problem or done) for item in pruned]
        cli._show(_table("Pruned", ("session", "size", "result"), rows))
    else:
        cli._show("nothing to delete")
    if any(item.problem for item in pruned):
        raise StorageError("a session could not be deleted. The table says why.")


@app.command(epilog="Example: arbl2 datasets gaps 20260102T000000Z-1a2b")
def gaps(
    context: typer.Context,
    session: Annotated[str | None, typer.Argument(help="Name below --tapes, folder or URL; default: the newest.")] = None,
    tapes: Tapes = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show at most.")] = 100,
    as_json: Json = False,
) -> None:
    """Show what the recorder noticed: gaps by cause, and each with its start, end and connection."""
    from arbl2 import cli
    from arbl2.tape import find_session
    from arbl2_recorder.gaps import gap_rows, gaps_by_cause

    root = _root(context, tapes)
    folder = find_session(_sessions([session], root)[0] if session else None, root)
    counts, rows = gaps_by_cause(folder), gap_rows(folder, limit)
    if as_json:
        cli._print_json({"session": str(folder), "gaps": counts, "rows": rows})
        return
    if not rows:
        cli._show(f"{folder}: nothing in the gap ledger")
        return
    cli._show(_table(f"{folder}: gaps by cause", ("cause", "gaps"), [(name, f"{n:,}") for name, n in counts.items()]))
    cli._show(gap_list(str(folder), rows))


def folder_here(where: str) -> Path:
    """A folder of this machine. Raises ConfigError for a URL: a path made of one would name something else."""
    if "://" in where:
        raise ConfigError(f"{where} is a URL; this needs a folder of this machine. Name one, such as tapes.")
    return Path(where)


def recordings_here(where: str) -> Path:
    """A folder of this machine that holds recordings. Raises ConfigError for a URL, and for a recording itself."""
    folder = folder_here(where)
    _not_a_session(where)
    return folder


def _not_a_session(root: str) -> None:
    from arbl2.tape import MANIFEST, session_place

    url, mark, query = root.partition("?") if "://" in root else (root, "", "")
    try:
        is_session = (session_place(root) / MANIFEST).size() is not None
    except OSError:
        return  # who lists it says what is wrong
    if is_session:
        above = f"{url.rstrip('/').rpartition('/')[0]}{mark}{query}" if "://" in root else str(Path(root).absolute().parent)
        raise ConfigError(f"{root} is one recording. Name the folder that it lies in: {above}")


def _root(context: typer.Context, tapes: str | None) -> str:
    """``--tapes`` of the command, or of the group before it. Raises ConfigError for a recording itself."""
    root = _named(context, tapes)
    _not_a_session(root)
    return root


def _named(context: typer.Context, tapes: str | None) -> str:
    return tapes or context.obj or "tapes"


def _sessions(names: Sequence[str] | None, root: str) -> list[str]:
    """The sessions that were named, as folders or URLs; without names all below ``root``. Raises TapeError."""
    from arbl2.tape import session_place, sessions

    if names:
        return [name if "://" in name or Path(name).is_dir() else str(session_place(root) / name) for name in names]
    found = [str(session) for session in sessions(root)]
    if not found:
        raise TapeError(f"{_none_below(root)} --tapes names another place.")
    return found


class DatasetTable:
    """Sessions as a table that fits the terminal it is printed on; below it what is wrong with some of them."""

    def __init__(self, found: Sequence[Dataset], root: str) -> None:
        self._found = found
        self._title = f"Recordings below {_short(root)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """For rich."""
        from rich.text import Text

        short = options.max_width < ROOMY
        left_out = ("start (UTC)",) * (options.max_width < NARROW) + ("raw",) * short
        rows = [_dataset_row(item, short=short) for item in self._found]
        head = [name for name in rows[0] if name not in left_out]
        shown = [[row[name] for name in head] for row in rows]
        yield _table(self._title, head, shown, folded=("kept",), gap=1)
        for item in self._found:
            if item.problem or item.damage:
                yield Text(f"{item.session}: {item.problem or item.damage}", style="red")
            if item.dropped:
                yield Text(f"{item.session}: {item.dropped:,} messages were dropped for want of room", style="yellow")


def _dataset_row(item: Dataset, *, short: bool) -> dict[str, str]:
    from arbl2.tape import RECORDING

    ill = bool(item.problem)
    # what a log holds is not counted before it is sealed
    frames = f"{item.frames / 1e6:,.1f} M" if short and item.frames >= 10**6 else f"{item.frames:,}"
    if ill or item.state in (RECORDING, KILLED):
        frames = "-"
    return {
        "session": item.session,
        "state": "ill" if ill else item.state,
        "start (UTC)": _utc(item.start_ns),
        "lasted": _duration(item.duration_s),
        "venues": ",\n".join(f"{venue} {len(names)}" for venue, names in item.instruments.items()),
        "frames": frames,
        "gaps": "-" if item.gaps is None else f"{item.gaps:,}",
        "raw": _size(item.raw_bytes),
        "sealed": "-" if ill else _size(item.sealed_bytes),
        "kept": item.kept,
    }


def gap_list(session: str, rows: Sequence[dict[str, Any]]) -> RenderableType:
    """Rows of a ledger for a terminal: a line of what people ask for first, below it the words; ``--json`` has all."""
    from rich.console import Group
    from rich.text import Text

    lines = [("from (UTC)", "lasted", "cause", "stream", "missed")]
    words = [""]
    for row in rows:
        at = datetime.fromtimestamp(row["start_recv_ns"] / 1e9, UTC)
        end = row["end_mono_ns"]
        lasted = "open" if end is None else f"{(end - row['start_mono_ns']) / 1e9:,.3f} s"
        where = row["stream"] or row["venue"] + (f" connection {row['conn']}" if row["conn"] else "")
        missed = "" if row["missed"] is None else f"{row['missed']:,}"
        lines.append((f"{at:%m-%d %H:%M:%S}", lasted, row["cause"], where, missed))
        healed = f"healed by {row['healed_by']}" if row["healed_by"] else ""
        words.append(_short("; ".join(filter(None, (healed, row["detail"])))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [Text(f"{_short(session)}: rows of the gap ledger", style="bold")]
    for line, said in zip(lines, words, strict=True):
        shown.append(Text("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()))
        if said:
            shown.append(Text(f"    {said}", style="dim", overflow="fold"))
    return Group(*shown)


def _short(text: str) -> str:
    """URLs without what follows their question mark."""
    return _QUERY.sub(r"\1", text)


def _table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, folded: Sequence[str] | None = None, gap: int = 2
) -> RenderableType:
    """A title on a line of its own and a table; only the columns ``folded`` (None: all) break over lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for name in head:
        table.add_column(name, overflow="fold", no_wrap=folded is not None and name not in folded)
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(Text(title, style="bold"), table)


def _size(count: int | None) -> str:
    from arbl2_recorder.live import size

    return "-" if count is None else size(count)


def _utc(wall_ns: int | None) -> str:
    return "-" if wall_ns is None else datetime.fromtimestamp(wall_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
