"""``calibrate``: runs in, artefact out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import msgspec

from arbl2.errors import ConfigError
from arbl2.zones import Artefact, Book, CalibrationTable, Input, Settings, ZoneTable, dumps
from arbl2_calibration import artefact as files
from arbl2_calibration.fit import BLOCK_NS, MIN_MERGE_BLOCKS, RHO_MERGE, fit
from arbl2_calibration.runs import open_runs
from arbl2_calibration.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arbl2_calibration.fit import Dependence
    from arbl2_calibration.runs import Run
    from arbl2_calibration.store import Span

LIMITS = (
    "How others react to our order: recorded books do not know about it.",
    "Priority in a race inside one book update (the competition share): only real fills show it.",
    "Hidden size, and our own impact beyond the displayed depth.",
    "Rejected orders, and queueing at the venue under load: the latency of a run is its setting, not a measured clock.",
    "Drift is read from the last book before arrival. Where books are far apart it misses the moves since that book.",
    "Whether a feature would change if the recording were cut at the decision: calibration reads runs, not tapes.",
    "Nothing here was checked out of sample, and zones are not pooled: each published zone says so (unvalidated).",
)
"""What the numbers cannot say; stands in every artefact and report."""


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """The loaded artefact, the two files it stands in, and the folders that were the same run as another and not counted."""

    table: CalibrationTable
    path: Path
    blocks_path: Path
    counted_once: tuple[Path, ...]


def calibrate(
    runs: Sequence[Path],
    *,
    out: Path,
    zones: Path | None = None,
    store: Path | None = None,
    threads: int | None = None,
) -> CalibrationResult:
    """Estimate from ``runs`` how much of what an order sees is left when it arrives, zone by zone.

    ``runs`` are folders that ``arbl2 replay`` wrote, one per tape. ``out`` is a folder for ``calibration.json`` and
    ``calibration_blocks.parquet``. ``zones`` is a TOML table of zones, ``store`` a DuckDB file to keep the events in (default: in
    memory), ``threads`` how many DuckDB may use. Equal inputs give equal bytes apart from ``created_utc``.

    Raises EvidenceError when the runs cannot carry a calibration, TapeError when one is damaged, ConfigError for the zones and
    StorageError for the folder or the store.
    """
    table = ZoneTable() if zones is None else _read_zones(zones)
    checked, repeated = open_runs([Path(run) for run in runs])
    with Store(table, path=store, threads=threads) as events:
        events.load(checked)
        summary = events.summary()
        events.guard(summary)
        block_ns = BLOCK_NS
        while block_ns < summary.latency_max_ns:
            block_ns *= 2
        blocks, sessions = events.block_sums(block_ns)
        spans, latency = events.spans(), events.latency()
    records, dependence = fit(blocks, table, block_ns)
    zone_ids = [zone.zone_id for zone in table.zones]
    body = Artefact(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        tool={"version": metadata.version("arbl2"), "git": None, "duckdb": duckdb.__version__},
        inputs=[_input(run, span) for run, span in zip(checked, spans, strict=True)],
        refused_rows=summary.refused,
        config=Settings(
            zones=table.cuts,
            zones_sha256=table.sha256,
            block_ns_first=block_ns,
            block_ns_final=dependence.block_ns,
            blocks=dependence.blocks,
            rho1=dependence.rho1,
            latency=latency,
            sessions=len({run.file.tape.session for run in checked}),
        ),
        zones=records,
        blocks_sha256=files.blocks_sha256(blocks, sessions, zone_ids),
        limits=[*LIMITS, *_limits_of(dependence)],
    )
    data = dumps(body)
    path, blocks_path = files.write(out, data, blocks, sessions, zone_ids, block_ns)
    return CalibrationResult(
        table=CalibrationTable.loads(data, where=str(path)),
        path=path,
        blocks_path=blocks_path,
        counted_once=tuple(repeated),
    )


def _read_zones(path: Path) -> ZoneTable:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the zones at {path} cannot be read ({error}). Name a TOML file.") from None
    return ZoneTable.from_toml(text, where=str(path))


def _input(run: Run, span: Span) -> Input:
    books = [
        Book(
            venue=book.venue,
            symbol=book.symbol,
            updates=book.updates,
            gap_median_ms=None if book.gap_median_ns is None else book.gap_median_ns / 1e6,
            gap_p99_ms=None if book.gap_p99_ns is None else book.gap_p99_ns / 1e6,
        )
        for book in sorted(run.file.books, key=msgspec.structs.astuple)
    ]
    return Input(
        kind=run.source,
        dataset_id=run.file.tape.session,
        sha256=run.file.tape.sha256,
        digest=run.file.digest,
        rows=run.rows,
        first_ns=span.first_ns,
        last_ns=span.last_ns,
        venues=span.venues,
        symbols=span.symbols,
        books=books,
    )


def _limits_of(dependence: Dependence) -> list[str]:
    said = []
    if all(rho is None for rho in dependence.rho1):
        said.append("How far one time block resembles the next: no block follows another, so dependence could not be measured.")
    elif dependence.rho_max > RHO_MERGE:
        said.append(
            f"Neighbouring blocks still resemble each other (rho {dependence.rho_max:.2f}) and fewer than {MIN_MERGE_BLOCKS} "
            "are left to merge: intervals may be too short. Longer recordings cure that."
        )
    return said
