"""What recordings there are: one row for each session below a folder or URL, from manifests and ledgers alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from arbl2.errors import TapeError
from arbl2.places import Place, sizes
from arbl2.tape import (
    LEDGER,
    RECORDING,
    SEGMENTS,
    TapeReader,
    ledger,
    load_manifest,
    load_shipped,
    session_place,
    sessions,
    unreadable,
)

if TYPE_CHECKING:
    from pathlib import Path

    from arbl2.tape import Manifest, Shipped

LOCAL, REMOTE, BOTH, PARTLY, DAMAGED = "local", "remote", "local + remote", "local + part remote", "damaged"
ASKED_AT_ONCE = 8
DROPPED = "dropped"
"""Cause of a ledger row for messages that the recorder itself had no room for."""


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """One session. Times are wall clock, ns since the Unix epoch; None = not known.

    ``start_ns`` is the session's clock anchor and ``end_ns`` the last sealed frame. ``frames`` are all sealed ones, ``messages``
    those that venues sent, ``gaps`` the rows of its ledger, ``dropped`` the messages that the recorder had no room for.
    ``raw_bytes`` are payloads as received, ``sealed_bytes`` the segments. ``kept`` says where the segments are: LOCAL, REMOTE
    (listed from a URL, or shipped to ``copy`` and deleted here), BOTH, PARTLY (some of them were shipped so far), or DAMAGED: a
    segment is neither here in its size nor in the copy, and ``damage`` names it. That looks at sizes only; ``verify`` reads.
    ``problem`` is "" unless the session cannot be read; the other fields say nothing then.
    """

    session: str
    place: str
    state: str = ""
    start_ns: int | None = None
    end_ns: int | None = None
    instruments: dict[str, list[str]] = {}
    frames: int = 0
    messages: int = 0
    gaps: int | None = None
    dropped: int | None = None
    raw_bytes: int | None = None
    sealed_bytes: int = 0
    kept: str = ""
    copy: str = ""
    damage: str = ""
    problem: str = ""

    @property
    def duration_s(self) -> float | None:
        """Seconds from start to end."""
        return None if self.start_ns is None or self.end_ns is None else (self.end_ns - self.start_ns) / 1e9


def datasets(root: Path | str) -> list[Dataset]:
    """Every session below ``root``, the one written last at the end. Raises TapeError if they cannot be listed."""
    with ThreadPoolExecutor(max_workers=ASKED_AT_ONCE, thread_name_prefix="arbl2-list") as pool:
        return list(pool.map(dataset, sessions(root)))


def dataset(session: Path | str) -> Dataset:
    """One session; what is wrong with it is in ``problem``."""
    folder = session_place(session)
    try:
        return _dataset(folder)
    except TapeError as error:
        return Dataset(session=folder.name, place=str(folder), problem=str(error))


def _dataset(folder: Place) -> Dataset:
    manifest = load_manifest(folder)
    segments = manifest.segments
    kept, copy, damage = _kept(folder, manifest)
    gaps, dropped = _gaps(folder)
    counted = bool(segments) and all(segment.payload_bytes for segment in segments)
    return Dataset(
        session=manifest.session,
        place=str(folder),
        state=manifest.state,
        start_ns=manifest.anchor_wall_ns,
        end_ns=max((segment.last_recv_ns for segment in segments), default=None),
        instruments=manifest.instruments,
        frames=manifest.rows,
        messages=sum(count for name, count in manifest.counts.items() if name.endswith(".message")),
        gaps=gaps,
        dropped=dropped,
        raw_bytes=sum(segment.payload_bytes for segment in segments) if counted else None,
        sealed_bytes=sum(segment.bytes for segment in segments),
        kept=kept,
        copy=copy.url if copy is not None else "",
        damage=damage,
    )


def _gaps(folder: Place) -> tuple[int | None, int | None]:
    table = ledger(folder, ("cause", "missed"))
    if table is None:
        return None, None
    if set(table.column_names) != {"cause", "missed"}:
        raise TapeError(
            f"{folder / LEDGER} holds no gap ledger: it lacks columns of one. Restore it from a copy of the recording."
        )
    rows = table.to_pylist()
    return len(rows), sum(row["missed"] or 0 for row in rows if row["cause"] == DROPPED)


def _kept(folder: Place, manifest: Manifest) -> tuple[str, Shipped | None, str]:
    """Where the segments are, their copy, and what is missing in both."""
    if folder.local is None:
        return REMOTE, None, ""
    # First what is here, then what was shipped: a segment is deleted after its copy was written down.
    found = _sizes(folder, manifest)
    copy = load_shipped(folder.local)
    files = copy.files if copy is not None else {}
    away = 0
    shipped = 0
    for segment, size in zip(manifest.segments, found, strict=True):
        there = files.get(f"{SEGMENTS}/{segment.file}") == segment.sha256
        shipped += there
        away += size is None
        if size != segment.bytes and not (size is None and there):
            lies = "is missing" if size is None else f"has {size:,} bytes instead of {segment.bytes:,}"
            return DAMAGED, copy, f"{SEGMENTS}/{segment.file} {lies}. Restore it from a copy of the recording."
    if copy is None:
        return LOCAL, None, ""
    if shipped < len(manifest.segments):
        return PARTLY, copy, ""
    return (REMOTE if away else BOTH), copy, ""


def _sizes(folder: Place, manifest: Manifest) -> list[int | None]:
    try:
        return sizes([folder / SEGMENTS / segment.file for segment in manifest.segments])
    except OSError as error:
        raise unreadable(folder, error) from None


def verify(session: Path | str) -> str:
    """Read every byte of a session and compare with its manifest; read its ledger. Raises TapeError naming what differs.

    Returns what was not read, in words: "" if that is nothing.
    """
    folder = session_place(session)
    manifest = load_manifest(folder)
    kept, copy, _ = _kept(folder, manifest)
    away = [segment for segment, size in zip(manifest.segments, _sizes(folder, manifest), strict=True) if size is None]
    if kept != DAMAGED and copy is not None and away:
        if kept == REMOTE:
            return f"not read: segments are at {copy.url}; use --copies"
        return f"not read: {len(away):,} segments are at {copy.url} only; `arbl2 datasets verify '{copy.url}'` reads them"
    TapeReader(session).verify_hashes()
    ledger(session)
    return log_not_read(folder)


def log_not_read(session: Place | Path | str) -> str:
    """What is to be said of a session whose segments are whole: "" unless there may be frames in its log. Raises TapeError."""
    manifest = load_manifest(session)
    if manifest.state != RECORDING:
        return ""
    return f"killed or being recorded: {len(manifest.segments):,} segments are whole, the log was not read"
