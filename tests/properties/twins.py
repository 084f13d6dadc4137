"""Where the books of the engine are not those of the slow twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arbl2.book import ladder, window
from arbl2.kernels import GAP_MS

if TYPE_CHECKING:
    from arbl2.engine import Engine
    from naive import NaiveEngine

SIDES = ("bid", "ask")


def differences(engine: Engine, twin: NaiveEngine) -> list[tuple[str, str, Any, Any]]:
    """(instrument, what, engine's, twin's) of everything that a book is: state, window, ladder and how each level is known."""
    found = []
    for k, instrument in enumerate(engine.universe.instruments):
        row, book = engine.state.books[k], twin.books[str(instrument.venue)][instrument.name]
        names = ["updates", "trusted", "connected", "synced", "windowed"]
        names += ["last_ns", "conn", "exchange_ms"] if book.updates else []
        names += ["update_id"] if book.synced or book.windowed else []
        ours = {name: int(row[name]) for name in names} | {"held": int(row["held_rows"])}
        theirs = {name: int(getattr(book, name)) for name in names} | {"held": len(book.held)}
        counts = {bucket: int(engine.state.gaps[k, bucket]) for bucket in engine.state.gaps[k].nonzero()[0].tolist()}
        ours["gaps"] = {f"{n} ms" if n < GAP_MS else f"{n - GAP_MS + 1} s": count for n, count in counts.items()}
        theirs["gaps"] = dict(book.gaps)
        for s, side in enumerate(SIDES):
            ours[side], theirs[side] = _levels(window(engine.state, k, s)), book.levels(side)
            if book.synced and not book.windowed:
                ours[f"full {side}"], theirs[f"full {side}"] = _levels(ladder(engine.state, k, s)), book.rungs(side)
        found += [(instrument.name, name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]
    counted = {(venue, reason): n for venue, counts in engine.reasons().items() for reason, n in counts.items()}
    if counted != twin.reasons:
        found.append(("", "reasons", counted, dict(twin.reasons)))
    return found


def _levels(columns: tuple[Any, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))
