"""Foreign captures become tapes, with the payload bytes unchanged.

Two forms are read, plain or gzipped, told apart by content and never by name:

``recv_ns SPACE json``
    one Binance message a line, as hftbacktest's collector writes it. A body with ``lastUpdateId``, ``bids`` and
    ``asks`` at its top level and neither ``stream`` nor ``e`` is a REST depth body (RESPONSE), everything else a
    MESSAGE of connection 1.
``{"recv_ns": ..., "conn": ..., "kind": ..., "op": ..., "raw": ...}``
    one Upbit event a line; ``kind`` is recv, send, open or close, ``raw`` the text of the frame.

Such files have one clock. ``recv_ns`` is kept as it stands and ``mono_ns`` is its running maximum, so that engine time
never steps back; the anchor is the first stamp. The order of the tape is the order of the file.

What is damaged is said, never guessed: a line that cannot be read becomes an ALARM frame with the exact bytes of
the line, a torn end is left out and counted, and both stand in the manifest's notes.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.frames import ExchangeId, Frame, FrameKind, Op
from arbl2.tape import SESSION_NAME, TAPE_VERSION, Manifest, save_manifest, sha256_of, write_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedReader
    from pathlib import Path

log = logging.getLogger("arbl2.replay")

MAX_LINE_BYTES = 8 * 2**20
"""A longer line is not a capture; it bounds the memory that a hostile file can take."""

MAX_NAMES = 10_000
"""Instruments and connections that one capture may name, for the same reason."""

_CHUNK_BYTES = 2**18
_HEAD_LINES = 20
_GZIP_MAGIC = b"\x1f\x8b"
_STAMPED = re.compile(rb"([0-9]{19}) (.+)", re.DOTALL)
_NS_RANGE = range(10**18, 2**63)  # 2001 to 2262: a stamp in another unit is refused instead of misread


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What became of a capture: the session folder ``path`` and what its manifest says.

    ``malformed`` lines were kept as ALARM frames. ``torn_bytes`` at the end were no whole line and were left out;
    None = the file ends whole (0 = cut between two lines).
    """

    path: Path
    frames: int
    counts: dict[str, int]
    instruments: dict[str, list[str]]
    notes: list[str]
    malformed: int
    torn_bytes: int | None


def import_capture(source: Path, root: Path, *, session: str | None = None) -> ImportResult:
    """Write the capture ``source`` as the session folder ``root/session`` and return what became of it.

    ``session`` defaults to the UTC time of the first stamp and the file's name. The folder appears when it is complete.
    Memory does not depend on the length of the file.

    Raises TapeError for a file that is missing, empty, foreign or damaged inside, ConfigError for a session name that
    cannot be used or exists already, StorageError when the folder cannot be written.
    """
    if session is not None and not SESSION_NAME.fullmatch(session):
        raise ConfigError(f"{session!r} cannot name a session. Use letters, digits, dots, dashes and underscores.")
    with _opened(source) as stream:
        lines = _lines(stream, source)
        head = list(itertools.islice(lines, _HEAD_LINES))
        form, first_ns = _recognise(head, source)
        name = session or _session_name(source, first_ns)
        session_dir = root / name
        if session_dir.exists():
            raise ConfigError(f"{session_dir} exists already. Remove it or give the import another session name.")
        manifest = Manifest(
            tape_version=TAPE_VERSION,
            session=name,
            state="imported",
            anchor_wall_ns=first_ns,
            anchor_mono_ns=first_ns,
        )
        reading = _Reading(source, form, first_ns)
        with _folder_when_complete(session_dir) as aside:
            manifest = write_session(aside, manifest, reading.frames(itertools.chain(head, lines)))
            manifest = msgspec.structs.replace(
                manifest, instruments={str(form.venue): sorted(reading.instruments)}, notes=reading.notes()
            )
            save_manifest(aside, manifest)
    log.info("imported %s frames of %s into %s", manifest.rows, source.name, session_dir)
    return ImportResult(
        path=session_dir,
        frames=manifest.rows,
        counts=manifest.counts,
        instruments=manifest.instruments,
        notes=manifest.notes,
        malformed=reading.malformed,
        torn_bytes=reading.torn_bytes,
    )


def _session_name(source: Path, first_ns: int) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", source.name.partition(".")[0])[:60]
    return f"{datetime.fromtimestamp(first_ns // 10**9, UTC):%Y%m%dT%H%M%SZ}-{stem}"


@contextmanager
def _folder_when_complete(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``path`` at the end or removed on any error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Line(NamedTuple):
    """``whole``: the line ended with a newline. ``cut``: it is what is left where a gzip stream breaks off."""

    body: bytes
    whole: bool = True
    cut: bool = False


@contextmanager
def _opened(source: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    try:
        with source.open("rb") as file:
            if file.peek(2)[:2] != _GZIP_MAGIC:
                yield file
            else:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked
    except OSError as error:
        raise TapeError(f"{source} cannot be read: {error.strerror}. Name a capture file.") from error


def _lines(stream: BufferedReader | gzip.GzipFile, source: Path) -> Iterator[_Line]:
    rest, cut = b"", False
    while True:
        try:
            chunk = stream.read1(_CHUNK_BYTES)
        except EOFError:
            cut = True
            break
        except (OSError, zlib.error) as error:
            raise TapeError(f"{source} is damaged inside ({error}). Restore it from a copy.") from None
        if not chunk:
            break
        *whole, rest = (rest + chunk).split(b"\n")
        yield from map(_Line, whole)
        if len(rest) > MAX_LINE_BYTES:
            raise TapeError(f"{source} has a line over {MAX_LINE_BYTES:,} bytes: it is not a capture arbl2 reads.")
    if rest or cut:
        yield _Line(rest, whole=False, cut=cut)


class _Row(NamedTuple):
    """One line understood.

    ``conn`` is the capture's own name of the connection, None where there is none. ``telling``: the line shows by
    itself that it comes from the form's venue; other venues are captured in the same forms.
    """

    recv_ns: int
    kind: FrameKind
    op: Op
    conn: str | None
    payload: bytes
    instruments: tuple[str, ...] = ()
    telling: bool = False


class _Form(NamedTuple):
    """A form of capture: ``parse`` gives the row of a line, or None for a line that is not of this form."""

    venue: str
    title: str
    unknown: str
    parse: Callable[[bytes], _Row | None]


_ABSENT = msgspec.Raw()


class _BinanceEvent(msgspec.Struct):
    symbol: str = msgspec.field(name="s", default="")


class _BinanceBody(msgspec.Struct):
    stream: str = ""
    event: str = msgspec.field(name="e", default="")
    symbol: str = msgspec.field(name="s", default="")
    update_id: int | None = msgspec.field(name="lastUpdateId", default=None)
    bids: msgspec.Raw = _ABSENT
    asks: msgspec.Raw = _ABSENT
    data: _BinanceEvent | None = None

    @property
    def is_rest_depth(self) -> bool:
        bare = not self.stream and not self.event
        return bare and self.update_id is not None and bool(bytes(self.bids)) and bool(bytes(self.asks))


_BINANCE_BODY = msgspec.json.Decoder(_BinanceBody)


def _stamped_line(line: bytes) -> _Row | None:
    match = _STAMPED.fullmatch(line)
    if match is None or int(match[1]) not in _NS_RANGE:
        return None
    recv_ns, payload = int(match[1]), match[2]
    try:
        body = _BINANCE_BODY.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # JSON of another shape is still a message of the venue; what is not JSON is not
        return _Row(recv_ns, FrameKind.MESSAGE, Op.TEXT, "", payload) if _is_json(payload) else None
    if body.is_rest_depth:
        return _Row(recv_ns, FrameKind.RESPONSE, Op.TEXT, None, payload, telling=True)
    streamed = "" if body.stream.startswith("!") else body.stream.partition("@")[0].upper()
    named = (streamed, body.symbol, body.data.symbol if body.data else "")
    telling = bool(body.stream or body.event or body.symbol)
    return _Row(recv_ns, FrameKind.MESSAGE, Op.TEXT, "", payload, tuple(filter(None, named)), telling)


def _is_json(payload: bytes) -> bool:
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


class _JsonLine(msgspec.Struct, forbid_unknown_fields=True):
    recv_ns: int
    conn: str | int
    kind: str
    op: str | None
    raw: str | None


class _UpbitBody(msgspec.Struct):
    type: str = ""
    ty: str = ""
    code: str = ""
    cd: str = ""

    @property
    def kind(self) -> str:
        return self.type or self.ty

    @property
    def name(self) -> str:
        return self.code or self.cd


_JSON_LINE = msgspec.json.Decoder(_JsonLine)
_UPBIT_BODY = msgspec.json.Decoder(_UpbitBody)
_OPS = {"text": Op.TEXT, "binary": Op.BINARY}


def _json_line(line: bytes) -> _Row | None:
    try:
        row = _JSON_LINE.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if row.recv_ns not in _NS_RANGE:
        return None
    conn, raw = str(row.conn), row.raw
    telling = "upbit" in conn.lower()
    match row.kind:
        case "open" if raw is not None:
            url = msgspec.json.encode({"url": raw})
            return _Row(row.recv_ns, FrameKind.OPENED, Op.NONE, conn, url, telling=telling or "upbit" in raw)
        case "close":
            reason = msgspec.json.encode({"code": None, "reason": raw or "", "clean": None})
            return _Row(row.recv_ns, FrameKind.CLOSED, Op.NONE, conn, reason, telling=telling)
        case "send" if raw is not None and row.op in _OPS:
            return _Row(row.recv_ns, FrameKind.SENT, _OPS[row.op], conn, raw.encode(), telling=telling)
        case "recv" if raw is not None and row.op in _OPS:
            payload = raw.encode()
            body = _upbit_body(payload)
            codes = (body.name,) if body.name and body.kind == "orderbook" else ()
            telling = telling or bool(body.name and body.kind)
            return _Row(row.recv_ns, FrameKind.MESSAGE, _OPS[row.op], conn, payload, codes, telling)
    return None


def _upbit_body(payload: bytes) -> _UpbitBody:
    """What the payload says of itself; empty for lists, errors and whatever is no JSON."""
    try:
        return _UPBIT_BODY.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return _UpbitBody()


_FORMS = (
    _Form(
        ExchangeId.BINANCE,
        "recv_ns and JSON a line",
        "subscriptions, opened and closed connections, pings and the requests of REST bodies are not in the file; "
        "all messages count as connection 1",
        _stamped_line,
    ),
    _Form(ExchangeId.UPBIT, "JSON lines", "pings and the code of a close are not in the file", _json_line),
)


def _recognise(head: list[_Line], source: Path) -> tuple[_Form, int]:
    """The form of a capture and its first stamp."""
    if not any(line.body for line in head):
        raise TapeError(f"{source} holds no line to import. Name a capture file that is not empty.")
    for form in _FORMS:
        rows = [row for line in head if (row := form.parse(line.body)) is not None]
        if any(row.telling for row in rows):
            return form, rows[0].recv_ns
    raise TapeError(
        f"{source} is no capture that arbl2 reads: none of its first {len(head)} lines is `recv_ns json` (Binance) "
        'or {"recv_ns","conn","kind","op","raw"} (Upbit), with recv_ns in nanoseconds.'
    )


@dataclass(slots=True)
class _Reading:
    """One pass over a capture: frames out, and what is only known at the end."""

    source: Path
    form: _Form
    mono_ns: int
    instruments: set[str] = field(default_factory=set)
    malformed: int = 0
    torn_bytes: int | None = None
    steps_back: int = 0
    _conns: dict[str, int] = field(default_factory=dict)

    def frames(self, lines: Iterable[_Line]) -> Iterator[Frame]:
        for seq, line in enumerate(lines, start=1):
            row = self.form.parse(line.body)
            if line.cut or (row is None and not line.whole):
                self.torn_bytes = 0 if row else len(line.body)
            if row is None:
                if not line.whole:
                    break
                self.malformed += 1
                row = _Row(self.mono_ns, FrameKind.ALARM, Op.NONE, None, line.body)
            yield self._frame(seq, row)

    def _frame(self, seq: int, row: _Row) -> Frame:
        self.steps_back += row.recv_ns < self.mono_ns
        self.mono_ns = max(self.mono_ns, row.recv_ns)
        self.instruments.update(row.instruments)
        conn = 0 if row.conn is None else self._conns.setdefault(row.conn, len(self._conns) + 1)
        if max(len(self.instruments), len(self._conns)) > MAX_NAMES:
            raise TapeError(f"{self.source} names over {MAX_NAMES:,} instruments or connections: it is no capture.")
        return Frame(seq, row.recv_ns, self.mono_ns, self.form.venue, conn, row.kind, row.op, row.payload)

    def notes(self) -> list[str]:
        """What the manifest says about the origin of the tape and what is not known."""
        name = self.source.name.encode("utf-8", "backslashreplace").decode()  # a file's name may be no text at all
        notes = [
            f"imported from {name} ({self.form.title}), sha256 {sha256_of(self.source)}",
            f"one clock only: mono_ns is the running maximum of recv_ns; recv_ns lies behind it in {self.steps_back:,} frames",
            f"unknown: {self.form.unknown}",
        ]
        if self.malformed:
            notes.append(f"{self.malformed:,} lines could not be read; their exact bytes are kept as alarm frames")
        if self.torn_bytes is not None:
            notes.append(f"the file is torn: its last {self.torn_bytes:,} bytes are no whole line and were left out")
        return notes
