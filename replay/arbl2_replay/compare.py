"""Two runs compared: what differs in what went in, the first event that differs, and how much differs after it.

One order holds across both tables, that of engine time: a decision stands at the time it was decided, a fill event at the time
it was resolved (by the first book after its arrival; unresolved ones at their arrival, and never before the row above them).
At one instant fills that were resolved go before decisions, as in the loop, and legs of that very instant go after them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from arbl2.errors import Arbl2Error, ConfigError, TapeError
from arbl2.frames import VENUES
from arbl2_replay.compare_events import Counts, EventDifference, count_differences, first_difference_of_events
from arbl2_replay.compare_tapes import (
    TapeRef,
    Window,
    beside,
    clock_changes,
    differing,
    first_difference,
    open_tape,
    payload_change,
)
from arbl2_replay.sinks import DECISIONS, FILLS, RUN_JSON
from arbl2_replay.steering import SESSION_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from arbl2_replay.compare_tapes import Recording, Seen

MAX_RUN_BYTES = 64 * 2**20
PAYLOAD_SHOWN = 200
"""Bytes of a payload that machine output holds."""
_RESULTS = ("reasons", "alarms", "kpi", "books", "run")
_NO_INPUT = ("digest", "tape", *_RESULTS)


class Change(NamedTuple):
    """One value that differs; None where a run has none."""

    name: str
    a: Any
    b: Any


class BookRow(msgspec.Struct, frozen=True):
    """Whose book it was."""

    venue: str
    instrument: str


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder: ``run.json`` checked and as it is, and the recordings that it names."""

    path: Path
    digest: str
    tapes: tuple[TapeRef, ...]
    books: tuple[BookRow, ...]
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs have in common and what not. ``same``: one digest, so the same decisions, fills, books and money.

    ``first`` is the first event that differs and ``other`` the first of the other table, None if there is none. ``windows`` are
    frames of the recordings, and ``notes`` say what could not be shown, and why.
    """

    a: Run
    b: Run
    same: bool
    inputs: tuple[Change, ...]
    first: EventDifference | None = None
    other: EventDifference | None = None
    counts: tuple[Counts, ...] = ()
    results: tuple[Change, ...] = ()
    windows: tuple[Window, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; prices, sizes and amounts as on the tape, in 10^-8 of their unit."""
        return {
            "same": self.same,
            **{name: {"run": str(run.path), "digest": run.digest} for name, run in (("a", self.a), ("b", self.b))},
            "inputs": [change._asdict() for change in self.inputs],
            "first_event": _event_json(self.first),
            "first_of_other_table": _event_json(self.other),
            "counts": [{name: getattr(count, name) for name in count.__slots__} for count in self.counts],
            "results": [change._asdict() for change in self.results],
            "frames": [_window_json(window) for window in self.windows],
            "notes": list(self.notes),
        }


def load_run(path: Path) -> Run:
    """Read and check a run folder. Raises TapeError."""
    file = path / RUN_JSON
    try:
        if file.stat().st_size > MAX_RUN_BYTES:
            raise TapeError(f"{file} is too large to be of a run. Name the folder of a run that arbl2 made.")
        summary = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        head = msgspec.convert(summary, _Head)
        tapes = tuple(msgspec.convert(head.tape.get("tapes", [head.tape]), list[TapeRef]))
    except (FileNotFoundError, NotADirectoryError):
        raise TapeError(f"{path} is not a run: it has no {RUN_JSON}. `arbl2 replay` makes one.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TapeError(f"{file} cannot be read ({error}). Replay the tape again.") from None
    except OSError as error:
        raise TapeError(f"{file} cannot be read: {error.strerror or error}. Check the disk and its rights.") from None
    return Run(path, head.digest, tapes, head.books, summary)


class _Head(msgspec.Struct):
    digest: str
    tape: dict[str, Any]
    config: dict[str, Any]
    rules: dict[str, Any]
    books: tuple[BookRow, ...]


def find_run(name: str, root: Path) -> Path:
    """The run folder meant by ``name``: itself, or below ``root`` by its name or by the start of its name or digest.

    Raises ConfigError if several are meant, TapeError if none is.
    """
    if "://" in name:
        raise ConfigError(f"{name} is a URL; runs are compared on this machine. Copy the run folder here first.")
    if (Path(name) / RUN_JSON).is_file():
        return Path(name)
    above = Path(name) if name and Path(name).is_dir() else root
    runs = sorted(path.parent for path in above.glob(f"*/{RUN_JSON}"))
    if above is root:
        found = [run for run in runs if run.name == name] or [run for run in runs if _is_meant(run, name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{name} may be any of {_list(found)}. Write more of the name.")
    there = f"There are {_list(runs)}." if runs else "`arbl2 replay` makes runs; --runs names the folder they are in."
    if above is root:
        raise TapeError(f"there is no run {name}, and none below {root} has that name or digest. {there}")
    raise TapeError(f"{name} is not a run: it has no {RUN_JSON}. {there}")


def _is_meant(run: Path, name: str) -> bool:
    # a folder ends with eight digits of the digest; whoever pastes more of it means the same run
    digest = run.name.rpartition("-")[2]
    return bool(name) and (run.name.startswith(name) or digest.startswith(name) or (len(digest) == 8 and name.startswith(digest)))


def _list(runs: Sequence[Path]) -> str:
    shown = ", ".join(run.name for run in runs[:8])
    return f"{shown} and {len(runs) - 8:,} more" if len(runs) > 8 else shown


def compare(run_a: Path, run_b: Path, *, tapes: Path | str | None = None, around: int = 3) -> Comparison:
    """Compare two run folders.

    ``tapes`` is where a recording is looked for that is not where it was when it was replayed; ``around`` is how many frames are
    shown before and after one. Raises TapeError for a run that is damaged; a recording that cannot be read is a note.
    """
    a, b = load_run(run_a), load_run(run_b)
    found = [first_difference_of_events(a.path, b.path, name) for name in (DECISIONS, FILLS)]
    differences = sorted((item for item in found if item is not None), key=lambda item: item.order)
    if a.digest == b.digest and differences:
        raise TapeError(
            f"{a.path} and {b.path} have one digest and other {differences[0].table}: one was changed after its run. "
            "Replay both tapes again."
        )
    first, other = [*differences, None, None][:2]
    shown = _Recordings(a, b, tapes, around)
    shown.difference()
    if first is not None:
        shown.around_event(first)
    return Comparison(
        a=a,
        b=b,
        same=a.digest == b.digest,
        inputs=(*_changed_inputs(a, b), *shown.changes),
        first=first,
        other=other,
        counts=tuple(count_differences(a.path, b.path, item) for item in differences),
        results=tuple(
            _changes({name: a.summary.get(name) for name in _RESULTS}, {name: b.summary.get(name) for name in _RESULTS})
        ),
        windows=tuple(shown.windows),
        notes=tuple(shown.notes),
    )


def _changed_inputs(a: Run, b: Run) -> Iterator[Change]:
    for number, (ours, theirs) in enumerate(_paired(a, b)):
        at = f"tape {number + 1}" if max(len(a.tapes), len(b.tapes)) > 1 else "tape"
        # where it lies says nothing about what it is
        for name in ("session", "sha256", "state", "instruments"):
            values = getattr(ours, name, None), getattr(theirs, name, None)
            if values[0] != values[1]:
                yield Change(f"{at}.{name}", *values)
    instruments = [sorted(f"{row.venue}:{row.instrument}" for row in run.books) for run in (a, b)]
    if instruments[0] != instruments[1]:
        yield Change("instruments", *map(", ".join, instruments))
    names = sorted((a.summary.keys() | b.summary.keys()) - set(_NO_INPUT))
    yield from _changes(_part(a, names), _part(b, names))


def _part(run: Run, names: Sequence[str]) -> dict[str, Any]:
    return {name: run.summary.get(name) for name in names}


def _paired(a: Run, b: Run) -> list[tuple[TapeRef | None, TapeRef | None]]:
    """The recordings of two runs beside each other: those of one name, then the others in their order."""
    theirs = {ref.session: ref for ref in b.tapes}
    pairs: list[tuple[TapeRef | None, TapeRef | None]] = [(ref, theirs.pop(ref.session, None)) for ref in a.tapes]
    alone = [ours for ours, other in pairs if other is None]
    return [pair for pair in pairs if pair[1] is not None] + list(zip_longest(alone, theirs.values()))


def _changes(a: Any, b: Any) -> Iterator[Change]:
    ours, theirs = dict(_leaves(a)), dict(_leaves(b))
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            yield Change(name, ours.get(name), theirs.get(name))


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Every plain value below a JSON value, with its path; rows of a list go by what they are about."""
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        path, here = left.pop()
        if isinstance(here, dict):
            items = [(str(name), item) for name, item in here.items()]
        elif isinstance(here, list):
            items = [(_row_name(item) or str(k), item) for k, item in enumerate(here)]
        else:
            yield path, here
            continue
        left += [(f"{path}.{name}" if path else name, item) for name, item in reversed(items)]


def _row_name(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    parts = (row.get("venue"), row.get("instrument")) if "instrument" in row else (row.get("symbol"),)
    return " ".join(str(part) for part in parts if part)


class _Recordings:
    """What can be shown of the recordings of two runs; everything that cannot be becomes a note."""

    def __init__(self, a: Run, b: Run, tapes: Path | str | None, around: int) -> None:
        self._around = around
        self.changes: list[Change] = []
        self.windows: list[Window] = []
        self.notes: list[str] = []
        self._runs = a, b
        self._refs = _paired(a, b)
        self._pairs: list[tuple[Recording | None, Recording | None]] = []
        for ours, theirs in self._refs:
            mine = self._open(ours, tapes)
            one = ours is not None and theirs is not None and ours.sha256 == theirs.sha256
            self._pairs.append((mine, mine if one and mine is not None else self._open(theirs, tapes)))

    def _open(self, ref: TapeRef | None, tapes: Path | str | None) -> Recording | None:
        try:
            return open_tape(ref, tapes) if ref is not None else None
        except Arbl2Error as error:
            self._note(error)
            return None

    def _note(self, error: Arbl2Error) -> None:
        said = f"frames cannot be shown: {error}"
        if said not in self.notes:
            self.notes.append(said)

    def difference(self) -> None:
        """The first frame that differs in the first two recordings that do."""
        for ours, theirs in self._pairs:
            if ours is None or theirs is None or ours is theirs:
                continue
            self.changes += [Change(f"recording.{name}", *values) for name, *values in clock_changes(ours, theirs)]
            try:
                window = first_difference(ours, theirs, self._around)
            except Arbl2Error as error:
                self._note(error)
                return
            if window is not None:
                self.windows.append(window)
                return
            self.notes.append(f"{ours.place} and {theirs.place} hold the same frames, cut or packed in other segments.")

    def around_event(self, event: EventDifference) -> None:
        """The frames that an event hangs on: the one it was decided at, and for a fill the one where it met its last book."""
        row, which = event.earlier, int(event.earlier is not event.a)
        rank, seq = divmod(int(row["seq"]), 1 << SESSION_BITS)
        # what the run that the row is from read, in the order of ranks; the other run's copy stands in for what is gone
        places = {ref.session: k for k, refs in enumerate(self._refs) if (ref := refs[which]) is not None}
        ranked = [places[ref.session] for ref in self._runs[which].tapes]
        sides = {k: [tape for tape in self._pairs[k][:: -1 if which else 1] if tape is not None] for k in ranked}
        try:
            for k in (*ranked[rank : rank + 1], *ranked):
                if not any(tape.holds(seq, int(row["time_ns"])) for tape in sides[k]):
                    continue
                self._window("frames around the decision", self._pairs[k], seq)
                if event.table == FILLS and row["venue"] in VENUES:  # a table may say anything
                    self._outcome(row, sides, k, seq)
                return
        except Arbl2Error as error:
            self._note(error)
            return
        if any(sides.values()):
            self.notes.append(f"no recording has frame {seq:,} at the time of the event.")

    def _outcome(self, row: dict[str, Any], sides: dict[int, list[Recording]], decided: int, seq: int) -> None:
        """The frame of any recording at which a fill met its last book; it was decided at ``seq`` of recording ``decided``."""
        focus_ns = int(row["after_ns"]) or int(row["arrive_ns"])
        best: tuple[int, int, int] | None = None
        for k, tapes in sides.items():
            found = (tape.first_at(seq if k == decided else 0, focus_ns, row["venue"]) for tape in tapes)
            seen = next((seen for seen in found if seen is not None), None)
            if seen is not None and (best is None or seen.time_ns < best[0]):
                best = seen.time_ns, k, seen.frame.seq
        if best is not None and best[1:] != (decided, seq):
            self._window(f"frames around its {'resolution' if row['after_ns'] else 'arrival'}", self._pairs[best[1]], best[2])

    def _window(self, title: str, pair: tuple[Recording | None, Recording | None], seq: int) -> None:
        ours, theirs = pair
        one_tape = ours is None or theirs is None or ours is theirs
        left, right = (list(tape.frames(seq - self._around, seq + self._around)) if tape else [] for tape in pair)
        pairs = tuple((seen, seen) for seen in left or right) if one_tape else beside(left, right)
        focus = next(k for k, both in enumerate(pairs) if any(seen is not None and seen.frame.seq == seq for seen in both))
        session = next(tape.manifest.session for tape in pair if tape is not None)
        fields = () if one_tape else differing(*pairs[focus])
        window = Window(title, session, pairs, focus, one_tape=one_tape, fields=fields)
        if not any(_holds(shown, session, seq) for shown in self.windows):
            self.windows.append(window)


def _holds(shown: Window, session: str, seq: int) -> bool:
    frames = (seen.frame for both in shown.pairs for seen in both if seen is not None)
    return shown.session == session and any(frame.seq == seq for frame in frames)


def _event_json(event: EventDifference | None) -> dict[str, Any] | None:
    if event is None:
        return None
    sides = {name: row and {key: _finite(value) for key, value in row.items()} for name, row in (("a", event.a), ("b", event.b))}
    return {"table": event.table, "row": event.row, "time_ns": event.time_ns, "columns": list(event.columns), **sides}


def _finite(value: Any) -> Any:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _window_json(window: Window) -> dict[str, Any]:
    return {
        "title": window.title,
        "session": window.session,
        "one_tape": window.one_tape,
        "focus": window.focus,
        "fields": list(window.fields),
        "pairs": [[_frame_json(seen) for seen in both[: 1 if window.one_tape else 2]] for both in window.pairs],
        "payload_differs_at": payload_change(*window.pairs[window.focus]),
    }


def _frame_json(seen: Seen | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    frame = seen.frame
    return {
        "seq": frame.seq,
        "time_ns": seen.time_ns,
        "recv_ns": frame.recv_ns,
        "mono_ns": frame.mono_ns,
        "venue": frame.venue,
        "conn": frame.conn,
        "kind": frame.kind.name.lower(),
        "op": frame.op.name.lower(),
        "bytes": len(frame.payload),
        "payload": frame.payload[:PAYLOAD_SHOWN].decode("utf-8", "backslashreplace"),
    }
