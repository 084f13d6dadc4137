"""Questions to the gap ledger of a session, answered by DuckDB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import duckdb

from arbl2.errors import TapeError
from arbl2.tape import ledger

if TYPE_CHECKING:
    from pathlib import Path

_BY_CAUSE = "SELECT cause, count(*) AS gaps FROM ledger GROUP BY cause ORDER BY cause"
_ROWS = "SELECT * FROM ledger ORDER BY cause, start_mono_ns LIMIT ?"


def gaps_by_cause(session: Path | str) -> dict[str, int]:
    """Rows of the ledger by cause; empty if the session has none. Raises TapeError."""
    return {row["cause"]: row["gaps"] for row in _ask(session, _BY_CAUSE)}


def gap_rows(session: Path | str, limit: int) -> list[dict[str, Any]]:
    """The first ``limit`` rows of the ledger by cause and start; empty if the session has none. Raises TapeError."""
    return _ask(session, _ROWS, limit)


def _ask(session: Path | str, question: str, *values: int) -> list[dict[str, Any]]:
    table = ledger(session)
    if table is None:
        return []
    with duckdb.connect() as connection:
        connection.register("ledger", table)
        try:
            found = connection.execute(question, list(values))
            names = [column[0] for column in found.description or ()]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise TapeError(f"the ledger of {session} does not have the columns of one ({first}). Do not trust it.") from None
