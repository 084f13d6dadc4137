"""The gap ledger: what is missing or doubtful on a tape, one row each, in Parquet beside the segments.

``<session>/ledger/NNNNNN.parquet`` holds what came to an end while segment NNNNNN was recorded, ``ledger/end.parquet`` what was
still open when the session ended. Both are plain Parquet: ``FROM 'tapes/*/ledger/*.parquet'`` in DuckDB reads all of them.
A file carries the state of the inspector after its last frame, so that a recovery goes on from there.

This module knows the rows and the files. What becomes a row is decided in ``integrity``.
"""

from __future__ import annotations

import contextlib
import os
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import TapeError
from arbl2.places import sync_folder
from arbl2.tape import LEDGER
from arbl2_recorder.storage import storage_error

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LEDGER_VERSION = "1"
END = "end"
"""Name of the file with what was not healed when the session ended."""
At = tuple[int, int, int]
"""Where in a session: seq, recv_ns, mono_ns of a frame."""
_ROWS_AT_ONCE = 4_096


class Cause(StrEnum):
    """Why there is a row."""

    GAP = "gap"  # ids of a stream that never came: first_id to last_id
    DUPLICATE = "duplicate"  # one connection said the same ids twice in a row
    OVERLAP = "overlap"  # a diff begins with ids that the diff before it had: first_id to last_id
    REGRESSION = "regression"  # ids or exchange time of a stream went back on one connection
    NO_SNAPSHOT = "no_snapshot"  # a diff stream had no book to start from for a long time
    CROSSED = "crossed"  # the best bid is not below the best ask
    WRONG_TOTAL = "wrong_total"  # the level sizes of a book do not add up to its total
    STALE_TIME = "stale_time"  # exchange time is far from its usual distance to the recorder's clock
    SILENT = "silent"  # a stream that should have spoken long ago
    UNDECODABLE = "undecodable"  # messages that are no JSON, or not of the shape of their stream; missed counts them
    LOST_FRAMES = "lost_frames"  # frames that the tape itself lost (a damaged log); missed counts them
    DROPPED = "dropped"  # messages the recorder had no room for; missed counts them
    LOOP_STALL = "loop_stall"  # the recorder was held up: frames may have come earlier than their stamps say
    CLOCK_STEP = "clock_step"  # the wall clock was set
    DISCONNECT = "disconnect"  # a connection ended
    DIAL_FAILED = "dial_failed"  # a venue could not be reached
    STALLED = "stalled"  # a connection said nothing for so long that it was given up
    NO_ACK = "no_ack"  # a subscription was not acknowledged
    VENUE_ERROR = "venue_error"  # the venue refused something
    VENUE_SHUTDOWN = "venue_shutdown"  # the venue announced that it would close
    REST_FAILED = "rest_failed"  # REST requests that brought no body
    KILLED = "killed"  # the recorder was killed; what came after the last frame kept is not known
    ALARM = "alarm"  # anything else the recorder complained about


class Heal(StrEnum):
    """What ended it."""

    OPEN = ""  # nothing, up to the end of the session
    NEXT_MESSAGE = "next_message"
    SNAPSHOT = "snapshot"  # a book from the REST side that covers the missing ids
    OTHER_LEG = "other_leg"  # another connection carried the same
    RECONNECT = "reconnect"  # a new connection
    RESPONSE = "response"  # a REST body of the same path
    CLOSED = "closed"  # the connection it happened on ended
    NOTHING_LOST = "nothing_lost"  # there was nothing to heal


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """One row. ``seq`` and stamps of start and end are those of frames on the tape; the end is None while it is not healed.

    ``conn`` 0 and ``stream`` "" stand for all of the venue, ``venue`` "" for all of the session. ``first_id`` and ``last_id``
    are venue ids, both included; ``missed`` counts ids or messages, as ``Cause`` says.
    """

    cause: Cause
    venue: str = ""
    conn: int = 0
    stream: str = ""
    start_seq: int
    start_recv_ns: int
    start_mono_ns: int
    end_seq: int | None = None
    end_recv_ns: int | None = None
    end_mono_ns: int | None = None
    first_id: int | None = None
    last_id: int | None = None
    missed: int | None = None
    healed_by: Heal = Heal.OPEN
    detail: str = ""

    @property
    def symbol(self) -> str:
        """The venue's own name of the instrument: ``KRW-BTC``, ``BTCUSDT``; "" where there is none."""
        return self.stream.partition("@")[0].upper()

    @property
    def words(self) -> str:
        """The row in words, for people."""
        where = " ".join(filter(None, (self.venue, self.stream or (f"connection {self.conn}" if self.conn else ""))))
        what = self.cause.value.replace("_", " ")
        missed = f", {self.missed:,} missed" if self.missed else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{where}: {what}{missed}{detail}" if where else f"{what}{missed}{detail}"

    def healed(self, at: At, by: Heal) -> Gap:
        """The same row with its end."""
        return msgspec.structs.replace(self, end_seq=at[0], end_recv_ns=at[1], end_mono_ns=at[2], healed_by=by)


SCHEMA = pa.schema(
    [
        pa.field("cause", pa.string(), nullable=False),
        pa.field("venue", pa.string(), nullable=False),
        pa.field("conn", pa.int32(), nullable=False),
        pa.field("stream", pa.string(), nullable=False),
        pa.field("symbol", pa.string(), nullable=False),
        pa.field("start_seq", pa.int64(), nullable=False),
        pa.field("end_seq", pa.int64()),
        pa.field("start_recv_ns", pa.int64(), nullable=False),
        pa.field("start_mono_ns", pa.int64(), nullable=False),
        pa.field("end_recv_ns", pa.int64()),
        pa.field("end_mono_ns", pa.int64()),
        pa.field("first_id", pa.int64()),
        pa.field("last_id", pa.int64()),
        pa.field("missed", pa.int64()),
        pa.field("healed_by", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


class LedgerWriter:
    """Rows in, one ledger file out: ``seal`` renames it, so that a file without the suffix ``.part`` is always whole.

    Memory does not depend on the number of rows. Raises StorageError.
    """

    def __init__(self, session_dir: Path, name: int | str, session: str) -> None:
        stem = name if isinstance(name, str) else f"{name:06d}"
        self.path = session_dir / LEDGER / f"{stem}.parquet"
        self._aside = self.path.with_name(self.path.name + ".part")
        self._waiting: list[Gap] = []
        schema = SCHEMA.with_metadata({"arbl2.ledger": LEDGER_VERSION, "arbl2.session": session})
        self._schema = schema
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._writer = pq.ParquetWriter(self._aside, schema, compression="zstd", use_dictionary=True)
        except OSError as error:
            raise storage_error(self._aside, error) from error

    def append(self, gaps: Iterable[Gap]) -> None:
        """Add rows."""
        self._waiting.extend(gaps)
        if len(self._waiting) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        columns = [pa.array([getattr(row, name) for row in rows], kind) for name, kind in _COLUMNS]
        try:
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        except OSError as error:
            raise storage_error(self._aside, error) from error

    def seal(self, state: bytes = b"") -> None:
        """Close, sync and rename; ``state`` is the inspector's after the last frame that was looked at."""
        self._flush()
        try:
            self._writer.add_key_value_metadata({"arbl2.state": state})
            self._writer.close()
            with self._aside.open("rb") as file:
                os.fsync(file.fileno())
            self._aside.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def discard(self) -> None:
        """Drop the unfinished file."""
        # On a full disk it cannot be ended either; it is thrown away, so that is no loss.
        with contextlib.suppress(OSError):
            self._writer.close()
        self._aside.unlink(missing_ok=True)


_COLUMNS = [(field.name, field.type) for field in SCHEMA]


def read_state(path: Path) -> bytes | None:
    """The inspector's state in one ledger file; None if there is no such file. Raises TapeError if it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            state: bytes | None = (file.metadata.metadata or {}).get(b"arbl2.state")
            return state
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        raise TapeError(f"{path} cannot be read ({error}). Remove it; a ledger can be made again from the tape.") from None
