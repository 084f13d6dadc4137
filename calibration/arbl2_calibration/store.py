"""The store: runs in a DuckDB, one scan to block sums.

The statements are the files in ``sql/``, each readable alone; this module fills in parameters and generates the one thing that
depends on the user's zones, the CASE that maps a market state to a zone.
"""

from __future__ import annotations

import glob
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

import duckdb
import msgspec
import numpy as np

from arbl2.errors import EvidenceError, StorageError, TapeError
from arbl2.zones import SIDES, VENUES, Latency, ZoneTable
from arbl2_calibration.fit import SUMS, Blocks
from arbl2_calibration.runs import COLUMNS, FILLS, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from arbl2_calibration.runs import Run

MIN_SIZES = 10
MAX_REPEATS = 10


class Summary(msgspec.Struct, frozen=True):
    """How many events were fitted, what they vary in, and why the others were not; latency in ns."""

    fitted: int
    sizes: int
    edges: int
    repeated: int
    nothing_visible: int
    no_zone: int
    unresolved: int
    latency_max_ns: int

    @property
    def refused(self) -> dict[str, int]:
        """Events that are not fitted, by reason."""
        names = ("repeated", "nothing_visible", "no_zone", "unresolved")
        return {name: getattr(self, name) for name in names}


class Span(msgspec.Struct, frozen=True):
    """What one run holds."""

    first_ns: int
    last_ns: int
    venues: list[str]
    symbols: list[str]


class Store:
    """A DuckDB with the events of some runs. ``path`` None = in memory; an existing file keeps its other tables."""

    def __init__(self, table: ZoneTable, *, path: Path | None = None, threads: int | None = None) -> None:
        config: dict[str, Any] = {"autoinstall_known_extensions": False}
        if threads is not None:
            config["threads"] = threads
        target = ":memory:" if path is None else str(path)
        try:
            self._db = duckdb.connect(target, config=config)
            self._db.execute("SET enable_progress_bar = false")
            self._db.execute(zone_macro(table))
            self._db.execute(sql("schema"))
        except duckdb.Error as error:
            raise StorageError(f"cannot use {target} as a DuckDB store ({first_line(error)}). Choose another file.") from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def load(self, runs: Sequence[Run]) -> None:
        """Read the fills of every run. Raises TapeError when a file is damaged or holds what no honest run can contain."""
        for run_no, run in enumerate(runs):
            path = glob.escape(str(run.path / FILLS))
            with _reading(run):
                lines = [(run_no, book.venue, book.symbol, book.gap_median_ns) for book in _one_per_symbol(run)]
                if lines:
                    self._db.executemany("INSERT INTO book VALUES (?, ?, ?, ?)", lines)
                self._check_nulls(run, path)
                session = run.file.tape.session
                self._db.execute(sql("load_run"), {"run_no": run_no, "session": session, "path": path})
                self._check_rows(run_no, run)
        for one, other in self._db.execute(sql("overlap")).fetchall():
            raise EvidenceError(
                f"{runs[one].path} and {runs[other].path} hold events of the same book over overlapping times: the same "
                "moments of the market would count twice. Leave one of them out."
            )

    def _check_nulls(self, run: Run, path: str) -> None:
        names = ", ".join(COLUMNS)
        missing = self._db.execute(f"SELECT count(*) - count(COLUMNS(*)) FROM (SELECT {names} FROM read_parquet($1))", [path])  # noqa: S608
        for name, nulls in zip(COLUMNS, missing.fetchone() or (), strict=True):
            if nulls:
                raise TapeError(f"{run.path / FILLS}: column {name!r} is empty in {nulls:,} rows. Replay the tape again.")

    def _check_rows(self, run_no: int, run: Run) -> None:
        where = run.path / FILLS
        defect = self._db.execute(
            "SELECT defect, count(*), min(order_id) FROM fill_event WHERE run_no = ? AND defect IS NOT NULL "
            "GROUP BY ALL ORDER BY ALL",
            [run_no],
        ).fetchone()
        if defect is not None:
            raise TapeError(f"{where}: {defect[1]:,} rows have {defect[0]} (first: order {defect[2]}). Replay the tape again.")
        twice = self._db.execute(
            "SELECT order_id FROM fill_event WHERE run_no = ? GROUP BY order_id HAVING count(*) > 1 ORDER BY ALL LIMIT 1",
            [run_no],
        ).fetchone()
        if twice is not None:
            raise TapeError(f"{where}: order {twice[0]} stands in it more than once. Replay the tape again.")
        tests = dict(
            self._db.execute(
                "SELECT self_test, count(*) FROM fill_event WHERE run_no = ? AND self_test IS NOT NULL GROUP BY ALL", [run_no]
            ).fetchall()
        )
        if tests:
            result = f"; {tests['failed']:,} even fail it" if "failed" in tests else ""
            raise EvidenceError(
                f"{where}: {sum(tests.values()):,} orders arrive the moment they are decided. Latency 0 finds the decision "
                f"book again and is a self-test, never evidence{result}. Replay with the latency you expect on each venue."
            )

    def summary(self) -> Summary:
        """Counts over every loaded run."""
        return Summary(*(self._db.execute(sql("summary")).fetchone() or ()))

    def guard(self, summary: Summary) -> None:
        """Refuse data that cannot carry a calibration. Raises EvidenceError with the reason."""
        if summary.fitted == 0:
            counted = ", ".join(f"{reason} {n:,}" for reason, n in summary.refused.items() if n)
            raise EvidenceError(
                f"no order is resolved by the recorded books ({counted}): nothing is known about any arrival. "
                "Record for longer, or replay with a latency above the gap between two books."
            )
        if summary.edges == 0:
            raise EvidenceError("every edge is 0: the runs do not say what the policy saw. Replay the tapes again.")
        if summary.sizes < MIN_SIZES:
            raise EvidenceError(
                f"the orders saw only {summary.sizes} different quantities; below {MIN_SIZES} an assumed volume cannot be told "
                "from a market. Replay longer tapes, or let the policy size its orders by the book."
            )
        for venue, side, repeats, spread, most_y in self._db.execute(sql("guards")).fetchall():
            if repeats >= MAX_REPEATS and spread == 0 and most_y > 0:
                raise EvidenceError(
                    f"every {venue} {side} with the same visible share has the same outcome ({repeats:,} repeats): that is a "
                    "formula, not a market. Replay the tapes with outcomes from the recorded book."
                )

    def spans(self) -> list[Span]:
        """What each run holds, in the order of the runs."""
        rows = self._db.execute(
            "SELECT min(time_ns), max(time_ns), list_sort(list(DISTINCT venue)), list_sort(list(DISTINCT symbol)) "
            "FROM fill_event GROUP BY run_no ORDER BY run_no"
        )
        return [Span(*row) for row in rows.fetchall()]

    def latency(self) -> dict[str, Latency]:
        """Latency of the fitted events by venue."""
        rows = self._db.execute(
            "SELECT venue, quantile_disc(latency_ns, [0.5, 0.9, 0.99]) FROM fill_event WHERE verdict = 'fitted' "
            "GROUP BY venue ORDER BY venue"
        )
        return {
            venue: Latency(source="assumed", p50=p50 / 1e6, p90=p90 / 1e6, p99=p99 / 1e6)
            for venue, (p50, p90, p99) in rows.fetchall()
        }

    def block_sums(self, block_ns: int) -> tuple[Blocks, list[str]]:
        """Reduce the events to sums per zone, session and time block; also the session of each row."""
        self._db.execute(sql("block_sum"), {"block_ns": block_ns})
        columns = self._db.execute("SELECT * FROM block_sum ORDER BY zone_no, session, block").fetchnumpy()
        sums = np.column_stack([columns[name] for name in SUMS]).astype(np.int64)
        blocks = Blocks(zone=columns["zone_no"].astype(np.int64), block=columns["block"].astype(np.int64), sums=sums)
        return blocks, [str(session) for session in columns["session"]]


def sql(name: str) -> str:
    """The text of one statement file."""
    return resources.files(__package__).joinpath("sql", f"{name}.sql").read_text("utf-8")


def zone_macro(table: ZoneTable) -> str:
    """``zone_no(...)`` in SQL: the same rule as ``ZoneTable.index``, generated from the same cut points; NULL = no zone."""
    cuts = table.cuts
    dims = (
        (_names_case("venue", VENUES), len(VENUES)),
        (_names_case("side", SIDES), len(SIDES)),
        (_cuts_case("abs(edge_bps)", [f"'{cut!r}'::DOUBLE" for cut in (*cuts.edge_bps, float("inf"))]), len(cuts.edge_bps)),
        (
            _cuts_case("size_over_depth", [f"'{cut!r}'::DOUBLE" for cut in (*cuts.size_over_depth, float("inf"))]),
            len(cuts.size_over_depth),
        ),
        (_cuts_case("latency_ns", [str(cut) for cut in cuts.latency_ns]), len(cuts.latency_ns)),
    )
    place = "0"
    for case, count in dims:
        place = f"({place}) * {count} + {case}"
    return f"CREATE OR REPLACE TEMP MACRO zone_no(venue, side, edge_bps, size_over_depth, latency_ns) AS\n  {place}"


def _names_case(value: str, names: Sequence[str]) -> str:
    return f"CASE {value} " + " ".join(f"WHEN '{name}' THEN {i}" for i, name in enumerate(names)) + " END"


def _cuts_case(value: str, cuts: Sequence[str]) -> str:
    """Half-open intervals between the cuts; after the last cut there is no interval, except that integers have no infinity."""
    whole = "::" not in cuts[0]
    arms = [f"WHEN {value} < {cut} THEN {i - 1}" if i else f"WHEN NOT {value} >= {cut} THEN NULL" for i, cut in enumerate(cuts)]
    rest = f" WHEN {value} IS NOT NULL THEN {len(cuts) - 1}" if whole else ""
    return "CASE " + " ".join(arms) + rest + " END"


def _one_per_symbol(run: Run) -> list[Any]:
    """One line per venue and symbol: where two instruments share a symbol, the faster book sets the stricter limit."""
    lines = sorted(run.file.books, key=lambda book: (book.gap_median_ns is None, book.gap_median_ns or 0.0))
    kept = {(book.venue, book.symbol): book for book in reversed(lines)}
    return list(kept.values())


@contextmanager
def _reading(run: Run) -> Iterator[None]:
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise StorageError(f"DuckDB ran out of memory ({first_line(error)}). Give it a store file on a disk with room.") from None
    except duckdb.Error as error:
        raise TapeError(f"{run.path / FILLS} cannot be read ({first_line(error)}). Replay the tape again.") from None
