"""``arbl2 datasets``: what recordings there are, whether they are whole, where their copies lie, and what may go."""
# ruff: noqa: PLC0415 - heavy imports inside the commands keep --help quick

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arbl2.errors import Arbl2Error, StorageError, TapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from arbl2.datasets import Dataset

app = typer.Typer(
    help="List the recordings below a folder or URL; verify, ship and prune them; show their gaps.",
    epilog="Example: arbl2 datasets --tapes s3://bucket/tapes",
)
GIB = 2**30

Tapes = Annotated[str | None, typer.Option("--tapes", help="Folder or URL of recordings; default: tapes.", metavar="PLACE")]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[SESSION]...", help="Names below --tapes, folders or URLs; default: all.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.")]


@app.callback(invoke_without_command=True)
def _datasets(context: typer.Context, tapes: Tapes = None, as_json: Json = False) -> None:
    context.obj = tapes
    if context.invoked_subcommand is None:
        _list(tapes or "tapes", as_json=as_json)


@app.command("list", epilog="Example: arbl2 datasets list --tapes s3://bucket/tapes --json")
def list_(context: typer.Context, tapes: Tapes = None, as_json: Json = False) -> None:
    """List sessions: span, contents, gaps, sizes, and where they are kept. `arbl2 datasets` alone does the same."""
    _list(_root(context, tapes), as_json=as_json)


def _list(root: str, *, as_json: bool) -> None:
    from msgspec import to_builtins

    from arbl2 import cli
    from arbl2.datasets import datasets

    found = datasets(root)
    if as_json:
        cli._print_json([to_builtins(item) for item in found])
    else:
        cli._show(dataset_table(found, root) if found else f"there is no recording below {root}")


@app.command(epilog="Example: arbl2 datasets verify 20260102T000000Z-1a2b")
def verify(
    context: typer.Context,
    names: Names = None,
    tapes: Tapes = None,
    copies: Annotated[bool, typer.Option("--copies", help="Also read the copies of shipped sessions back.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with the SHA-256 that was recorded. Ends with exit code 3 if anything differs."""
    from arbl2 import cli
    from arbl2.datasets import BOTH, REMOTE, dataset
    from arbl2.datasets import verify as verify_here

    found: dict[str, str] = {}
    sessions = _sessions(names, _root(context, tapes))
    with cli._progress("verify") as progress:
        for number, session in enumerate(sessions, start=1):
            try:
                item = dataset(session)
                deleted_here = item.kept == REMOTE and item.copy != ""
                if not deleted_here:
                    verify_here(session)
                if deleted_here or (copies and item.kept == BOTH):
                    from arbl2_recorder.ship import verify_copy

                    verify_copy(Path(session))
                found[session] = ""
            except Arbl2Error as error:
                found[session] = str(error)
            progress(number, len(sessions))
    if as_json:
        cli._print_json(found)
    else:
        cli._show(_table("Verified", ("session", "result"), [(name, problem or "whole") for name, problem in found.items()]))
    if any(found.values()):
        raise TapeError("not every recording is what it was. The table says which, and what to do.")


@app.command(epilog="Example: arbl2 datasets ship s3://bucket/tapes --delete-local")
def ship(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where copies go: s3://bucket/folder, file:///folder or a folder.")],
    names: Names = None,
    tapes: Tapes = None,
    delete_local: Annotated[
        bool, typer.Option("--delete-local", help="Delete local segments once the copy was read back and compared.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy sealed segments, ledgers and manifests to an object store, and compare what comes back."""
    from arbl2 import cli
    from arbl2_recorder.ship import ship_session

    reports = []
    for session in _sessions(names, _root(context, tapes)):
        with cli._progress(f"ship {Path(session).name}") as progress:
            reports.append(ship_session(Path(session), url, delete_local=delete_local, on_progress=progress))
    if as_json:
        cli._print_json([{name: getattr(report, name) for name in report.__slots__} for report in reports])
        return
    rows = [
        (report.session, f"{report.files:,}", _mib(report.bytes), f"{report.deleted:,}", "whole" if report.whole else "so far")
        for report in reports
    ]
    cli._show(_table(f"Shipped to {url}", ("session", "files sent", "sent", "segments deleted here", "copy"), rows))


@app.command(epilog="Example: arbl2 datasets prune --keep-days 30 --only-shipped --dry-run")
def prune(
    context: typer.Context,
    tapes: Tapes = None,
    keep_days: Annotated[float | None, typer.Option(help="Delete what ended longer ago.")] = None,
    keep_gb: Annotated[float | None, typer.Option(help="Delete the oldest while there is more (GiB).")] = None,
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

    retention = Retention(
        keep_days=keep_days, keep_bytes=None if keep_gb is None else round(keep_gb * GIB), only_shipped=only_shipped
    )
    pruned = delete(Path(_root(context, tapes)), retention, now_ns=clock.stamp()[0], dry_run=dry_run)
    if as_json:
        cli._print_json([{name: getattr(item, name) for name in item.__slots__} for item in pruned])
    elif pruned:
        done = "would be deleted" if dry_run else "deleted"
        rows = [(item.session, _mib(item.bytes), item.problem or done) for item in pruned]
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
    cli._show(gap_table(str(folder), rows))


def _root(context: typer.Context, tapes: str | None) -> str:
    """``--tapes`` of the command, or of the group before it."""
    return tapes or context.obj or "tapes"


def _sessions(names: Sequence[str] | None, root: str) -> list[str]:
    """The sessions that were named, as folders or URLs; without names all below ``root``. Raises TapeError."""
    from arbl2.tape import session_place, sessions

    if names:
        return [name if "://" in name or Path(name).is_dir() else str(session_place(root) / name) for name in names]
    found = [str(session) for session in sessions(root)]
    if not found:
        raise TapeError(f"there is no recording below {root}. `arbl2 record` makes one; --tapes names another place.")
    return found


def dataset_table(found: Sequence[Dataset], root: str) -> Table:
    """Sessions as a table for a terminal."""
    head = ("session", "state", "start (UTC)", "lasted", "venues", "frames", "gaps", "raw", "sealed", "kept")
    rows = []
    for item in found:
        if item.problem:
            rows.append((item.session, item.problem, *[""] * (len(head) - 2)))
            continue
        venues = "\n".join(f"{venue} {len(names)}" for venue, names in item.instruments.items())
        gaps = _count(item.gaps) + (f"\n{item.dropped:,} dropped" if item.dropped else "")
        sizes = (_mib(item.raw_bytes), _mib(item.sealed_bytes))
        when = (_utc(item.start_ns), _duration(item.duration_s))
        rows.append((item.session, item.state, *when, venues, _count(item.frames), gaps, *sizes, item.kept))
    return _table(f"Recordings below {root}", head, rows)


def gap_table(session: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of a ledger as a table for a terminal: the columns that people ask for first; ``--json`` has all."""
    head = ("from (UTC)", "lasted", "cause", "stream", "missed", "healed by", "detail")
    shown = []
    for row in rows:
        at = datetime.fromtimestamp(row["start_recv_ns"] / 1e9, UTC)
        end = row["end_mono_ns"]
        lasted = "open" if end is None else f"{(end - row['start_mono_ns']) / 1e9:,.3f} s"
        where = row["stream"] or row["venue"] + (f" connection {row['conn']}" if row["conn"] else "")
        missed = "" if row["missed"] is None else f"{row['missed']:,}"
        shown.append((f"{at:%m-%d %H:%M:%S}", lasted, row["cause"], where, missed, row["healed_by"], row["detail"]))
    return _table(f"{session}: rows of the gap ledger", head, shown)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def _utc(wall_ns: int | None) -> str:
    return "-" if wall_ns is None else datetime.fromtimestamp(wall_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
