"""Runs: the folders that calibration reads, checked before a single row is used.

A run is a folder with ``fills.parquet`` and ``run.json``. What counts is where the outcomes come from: books that were recorded
(``book``, ``paper_live``) are evidence; outcomes that a model made are its own echo and are refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import EvidenceError, TapeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FILLS = "fills.parquet"
RUN = "run.json"
FILLS_VERSION = "1"
Source = Literal["book", "paper_live"]

_TEXT = ("venue", "symbol", "side")
_FLAG = ("first_in_episode", "resolved")
_REAL = ("edge_bps",)
_WHOLE = (
    "order_id",
    "time_ns",
    "arrive_ns",
    "size_e8",
    "bid_px_e8",
    "ask_px_e8",
    "visible_e8",
    "depth_e8",
    "visible_quote_e8",
    "decision_book_ns",
    "filled_e8",
    "quote_e8",
    "before_ns",
    "before_e8",
    "after_ns",
    "after_e8",
)
COLUMNS = (*_TEXT, *_FLAG, *_REAL, *_WHOLE)
"""The columns of fills.parquet that calibration reads."""

log = logging.getLogger("arbl2.calibration")


class TapeRef(msgspec.Struct, frozen=True):
    """The recording that a run was made from."""

    session: str
    sha256: str


class BookLine(msgspec.Struct, frozen=True):
    """How often one book was updated."""

    venue: str
    instrument: str
    symbol: str
    updates: int
    gap_median_ns: float | None
    gap_p99_ns: float | None


class RunFile(msgspec.Struct, frozen=True):
    """``run.json``: what calibration needs of it, and what it insists on being there."""

    run: dict[str, Any]
    tape: TapeRef
    digest: str
    outcome_source: str
    books: list[BookLine]
    config: Any
    rules: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One checked run. ``rows`` are the legs in its fills."""

    path: Path
    file: RunFile
    source: Source
    rows: int


def open_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Check every folder; returns each run once, in an order that does not depend on that of the arguments, and the repeats.

    Raises TapeError for damaged files, EvidenceError for outcomes that are no evidence and for two different runs of one tape.
    """
    if not folders:
        raise EvidenceError("there is nothing to calibrate from. Name at least one folder that `arbl2 replay` wrote.")
    kept: dict[str, Run] = {}
    repeats: list[Path] = []
    opened = [open_run(folder) for folder in folders]
    if not any(run.rows for run in opened):
        raise EvidenceError("no run sent an order, so there is nothing to learn from. Replay with a lower --entry-bps.")
    for run in opened:
        if not run.rows:
            log.warning("%s sent no order and is left out", run.path)
            continue
        tape, digest = run.file.tape.sha256, run.file.digest
        before = kept.setdefault(tape, run)
        if before is run:
            continue
        if before.file.digest != digest or before.rows != run.rows:
            raise EvidenceError(
                f"{before.path} and {run.path} are different runs of the same tape ({run.file.tape.session}): the same moments "
                "of the market would count twice. Give one of them."
            )
        log.warning("%s is the same run as %s; it counts once", run.path, before.path)
        repeats.append(run.path)
    return sorted(kept.values(), key=lambda run: (run.file.tape.session, run.file.tape.sha256)), repeats


def open_run(folder: Path) -> Run:
    """Check one run folder. Raises TapeError, EvidenceError."""
    source, rows = _check_fills(folder / FILLS)
    path = folder / RUN
    try:
        file = msgspec.json.decode(path.read_bytes(), type=RunFile)
    except FileNotFoundError:
        raise TapeError(f"{folder} is not a run: it has no {RUN}. Name a folder that `arbl2 replay` wrote.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TapeError(f"{path} is damaged or of another version ({error}). Replay the tape again.") from None
    except OSError as error:
        raise TapeError(f"{path} cannot be read: {error.strerror}.") from None
    if file.outcome_source != source:
        raise EvidenceError(
            f"{folder} contradicts itself: {RUN} says that its outcomes come from {file.outcome_source!r}, {FILLS} says "
            f"{source!r}. Replay the tape again."
        )
    return Run(path=folder, file=file, source=source, rows=rows)


def _check_fills(path: Path) -> tuple[Source, int]:
    if not path.is_file():
        raise TapeError(f"{path.parent} is not a run: it has no {FILLS}. Name a folder that `arbl2 replay` wrote.")
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise TapeError(f"{path} cannot be read ({first_line(error)}). Replay the tape again.") from None
    metadata = schema.metadata or {}
    version = metadata.get(b"arbl2.fills", b"").decode("ascii", "replace")
    if version != FILLS_VERSION:
        raise TapeError(f"{path} is not a fill table of version {FILLS_VERSION} (found {version!r}). Replay the tape again.")
    source = metadata.get(b"arbl2.outcome_source", b"").decode("ascii", "replace")
    if source not in {"book", "paper_live"}:
        raise EvidenceError(_no_evidence(path, source))
    for names, fits, kind in _KINDS:
        for name in names:
            at = schema.get_field_index(name)
            if at < 0:
                raise TapeError(f"{path} has no column {name!r} (or more than one). Replay the tape again.")
            if not fits(schema.field(at).type):
                raise TapeError(f"{path}: column {name!r} is {schema.field(at).type}, not {kind}. Replay the tape again.")
    return cast("Source", source), rows


def _no_evidence(path: Path, source: str) -> str:
    if source == "model":
        return (
            f"{path} holds outcomes that a fill model made. Calibrating on them would only find the model again. "
            "Replay the tape with outcomes from the recorded book."
        )
    said = f"says {source!r}" if source else "does not say"
    return (
        f"{path} {said} where its outcomes come from; only 'book' and 'paper_live' are evidence. "
        "Replay the tape with outcomes from the recorded book."
    )


def first_line(error: BaseException) -> str:
    """The first line of a library's message, for one of ours."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))


_KINDS = (
    (_TEXT, _is_text, "text"),
    (_FLAG, pa.types.is_boolean, "bool"),
    (_REAL, pa.types.is_float64, "float64"),
    (_WHOLE, pa.types.is_int64, "int64"),
)
