"""Live equals replay: the tape of a live run, replayed, gives the same frames, decisions, fills, books and money.

A run that ended is compared as a whole. Of one that was killed everything that it left is: its rows must be the first rows of the
replay, and at the frame up to which its journal says they are complete the engine must be in the very same state. Two questions
more are asked of the tape: whether anything was decided with knowledge of what came later (``cuts``), and how much hangs on the
order of messages that came at once (``jitters``).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.errors import ConfigError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE
from arbl2.tape import RECORDING, TapeReader, find_session, session_place
from arbl2_replay.altered import cut
from arbl2_replay.compare import compare
from arbl2_replay.compare_events import first_difference_of_events
from arbl2_replay.journal import LIVE_JSON, FedDigest, read_live_file
from arbl2_replay.questions import Job, ask_cuts, ask_jitter
from arbl2_replay.sinks import DECISIONS, FILLS, RUN_JSON, event_schema, event_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2.policy import Policy
    from arbl2_replay.compare import Comparison
    from arbl2_replay.journal import Fed, LiveFile
    from arbl2_replay.questions import Cuts, Jitter

_TABLES: tuple[tuple[str, str, np.dtype[Any]], ...] = (
    ("decisions", DECISIONS, DECISION_DTYPE),
    ("fills", FILLS, FILL_DTYPE),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was compared, how much of it, and what differs ("" if nothing does)."""

    name: str
    compared: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared and what came of it. ``same``: the live run and the replay of its tape are one run.

    ``comparison`` has the first difference with both sides, where the tables or the digests differ.
    """

    session: str
    run: Path
    killed: bool
    digest: str
    replay_digest: str
    checks: tuple[Check, ...]
    comparison: Comparison
    cuts: Cuts | None = None
    jitter: Jitter | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs, and nothing looked ahead."""
        return not any(check.problem for check in self.checks) and not (self.cuts and self.cuts.looked_ahead)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = {
            "same": self.same,
            "session": self.session,
            "run": str(self.run),
            "killed": self.killed,
            "digest": self.digest,
            "replay_digest": self.replay_digest,
            "checks": [_plain(check) for check in self.checks],
            "comparison": None if self.same else self.comparison.to_json(),
            "cuts": _plain(self.cuts) if self.cuts else None,
            "jitter": _plain(self.jitter) if self.jitter else None,
        }
        return values


def _plain(what: Any) -> Any:
    return msgspec.to_builtins(what)


def find_tape(name: str | None, root: str) -> Path | str:
    """The session folder meant by ``name``: a folder or URL, or a session below ``root``. Raises TapeError."""
    if name is not None and "/" not in name and not Path(name).is_dir():
        inside = session_place(root) / name
        return find_session(inside.local or str(inside), root)
    return find_session(name, root)


def find_live_run(session: str, name: str | None, root: Path) -> Path:
    """The folder of a live run: ``name`` itself or the start of its name below ``root``; else the one of the session that ended,
    or was killed.

    Raises TapeError if there is none, ConfigError if several are meant.
    """
    if name is not None and (Path(name) / LIVE_JSON).is_file():
        return Path(name)
    start = name or f"{session}-live"
    found = sorted(path.parent for path in root.glob(f"*/{LIVE_JSON}") if path.parent.name.startswith(start))
    ended = [path for path in found if (path / RUN_JSON).is_file()]
    meant = [path for path in found if path.name == name] or ended or found
    if len(meant) == 1:
        return meant[0]
    if found:
        raise ConfigError(f"{start} may be any of {', '.join(path.name for path in found[:8])}. Name one as RUN.")
    raise TapeError(f"there is no live run {start} below {root}. `arbl2 live` makes one; --runs names the folder they are in.")


def verify_live(
    tape: Path | str,
    run: str | Path | None = None,
    *,
    runs: Path = Path("runs"),
    policy: Policy | Callable[[], Policy] | None = None,
    cuts: int = 0,
    jitters: int = 0,
    window_ms: float = 1.0,
    seed: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Replay a session and compare it with its live run.

    ``policy`` makes (or is, if it remembers nothing) the Python policy that the run had. Raises TapeError for a tape that is
    damaged or not recovered and a run that cannot be read, ConfigError for one that cannot be repeated.
    """
    reader = TapeReader(tape)
    folder = find_live_run(reader.manifest.session, str(run) if run is not None else None, runs)
    live = read_live_file(folder)
    if reader.manifest.state == RECORDING:
        raise TapeError(f"{reader.place} is being recorded, or its recorder was killed. Stop it, or run `arbl2 recover`.")
    if live.session != reader.manifest.session:
        raise TapeError(f"{folder} is a run on {live.session}, not on {reader.manifest.session}. Name its own tape.")
    try:
        config = msgspec.convert(live.config, RunConfig)
    except msgspec.ValidationError as error:
        raise TapeError(f"{folder / LIVE_JSON} has a configuration that this arbl2 does not know ({error}).") from None
    if live.policy != "ThresholdPolicy" and policy is None:
        raise ConfigError(f"the run had a policy of its own, {live.policy}. Call verify_live(..., policy=) from Python.")
    job = Job(reader, config, policy, on_progress)
    with tempfile.TemporaryDirectory(prefix="arbl2-verify-") as aside:
        found = _verify(job, folder, live, Path(aside))
        base = pq.read_table(Path(aside) / "replayed" / DECISIONS)
        return Verification(
            **found,
            cuts=ask_cuts(job, base, cuts, seed, Path(aside)) if cuts else None,
            jitter=ask_jitter(job, base, jitters, round(window_ms * 1e6), seed, Path(aside)) if jitters else None,
        )


def _verify(job: Job, folder: Path, live: LiveFile, aside: Path) -> dict[str, Any]:
    result = job.replayed(out=aside)
    assert result.run_dir is not None
    replayed = result.run_dir.replace(aside / "replayed")
    killed = not (folder / RUN_JSON).is_file()
    fed, digest = _again(job, live.mark.fed.seq)
    checks = [_check_frames(live.mark.fed, fed)]
    if killed:
        theirs, ours = _left(folder, live, replayed, digest, aside)
        comparison = compare(theirs, ours, tapes=job.reader.place.local and job.reader.place.local.parent)
        checks += [_check_rows(live, (theirs, ours), replayed, table, file) for table, file, _ in _TABLES]
        name = f"books, orders, counters and money at frame {live.mark.fed.seq:,}"
        differs = live.mark.fed.frames and digest != live.mark.digest
        checks.append(Check(name, "digest of the engine", f"{live.mark.digest} live, {digest} replayed" if differs else ""))
        digests = (live.mark.digest, digest)
    else:
        comparison = compare(folder, replayed)
        digests = (comparison.a.digest, comparison.b.digest)
        rows = {file: pq.read_metadata(folder / file).num_rows for _, file, _ in _TABLES}
        compared = f"{rows[DECISIONS]:,} decisions, {rows[FILLS]:,} fill events, books, orders, counters and money at the end"
        checks.append(Check("the run", compared, "" if comparison.same else "{} live, {} replayed".format(*digests)))
        if comparison.inputs:
            words = ", ".join(change.name for change in comparison.inputs)
            checks.append(Check("what went in", "tape, configuration, rules", f"differs in {words}"))
    return {
        "session": live.session, "run": folder, "killed": killed, "digest": digests[0], "replay_digest": digests[1],
        "checks": tuple(checks), "comparison": comparison,
    }  # fmt: skip


def _check_frames(live: Fed, tape: Fed) -> Check:
    """The bytes and stamps that the engine was fed are those on the tape."""
    problem = ""
    if tape.frames != live.frames or tape.seq != live.seq:
        problem = f"the run was fed {live.frames:,} up to {live.seq:,}, the tape has {tape.frames:,} up to {tape.seq:,}"
    elif tape.payloads != live.payloads:
        problem = "a payload on the tape is not the one that the run was fed"
    elif tape.heads != live.heads:
        problem = "a stamp, venue, connection, kind or length on the tape is not the one that the run was fed"
    return Check("frames", f"stamps and payload bytes of {live.frames:,} frames", problem)


def _again(job: Job, seq: int) -> tuple[Fed, str]:
    """The frames of the tape up to ``seq``, and the digest of an engine that was fed them."""
    fed = FedDigest()
    engine = Engine(job.reader.manifest.instruments, job.config, policy=job.new_policy())
    for block in cut(job.reader.blocks(), seq):
        fed.add(block)
        engine.feed(block)
        engine.drain()
    return fed.fed(), engine.digest()


def _written(folder: Path, live: LiveFile, table: str, dtype: np.dtype[Any]) -> pa.Table:
    """The whole rows that a killed run has written."""
    try:
        body = (folder / f"{table}.rows").read_bytes()
    except OSError as error:
        raise TapeError(f"{folder / table}.rows cannot be read: {error.strerror or error}. It is part of the run.") from None
    rows = np.frombuffer(body, dtype, len(body) // dtype.itemsize)
    try:
        return event_table(rows, event_schema(dtype, table), live.symbols)
    except (pa.ArrowException, IndexError, ValueError) as error:
        raise TapeError(f"{folder / table}.rows is damaged ({error}). Replay the tape instead.") from None


def _left(folder: Path, live: LiveFile, replayed: Path, digest: str, aside: Path) -> tuple[Path, Path]:
    """What a killed run left, rows after the last mark too, and as much of its replay, as run folders."""
    theirs, ours = aside / folder.name, aside / f"replay of {folder.name}"
    changed = False
    for made in (theirs, ours):
        made.mkdir()
    for table, file, dtype in _TABLES:
        rows = _written(folder, live, table, dtype)
        pq.write_table(rows, theirs / file)
        pq.write_table(pq.read_table(replayed / file).slice(0, len(rows)), ours / file)
        changed |= first_difference_of_events(theirs, ours, file) is not None
    said = live.mark.digest
    if changed and said == digest:  # the engine was right, so what it wrote was changed later
        said += " (but its rows are others)"
    summary = msgspec.json.decode((replayed / RUN_JSON).read_bytes())
    for made, its_digest in ((theirs, said), (ours, digest)):
        (made / RUN_JSON).write_bytes(msgspec.json.encode({**summary, "digest": its_digest}))
    return theirs, ours


def _check_rows(live: LiveFile, folders: tuple[Path, Path], replayed: Path, table: str, file: str) -> Check:
    """Every whole row that was written is a row of the replay in its place, and none of those that the journal counts is gone."""
    written, whole = (pq.read_metadata(folder / file).num_rows for folder in (folders[0], replayed))
    marked = int(live.mark.rows.get(table, {}).get("rows", 0))
    difference = first_difference_of_events(*folders, file)
    problem = ""
    if written < marked:
        problem = f"the run wrote {marked:,}, of which {written:,} are left"
    elif difference is not None:
        problem = f"number {difference.row + 1:,} differs"
    what = "decisions" if file == DECISIONS else "fill events"
    return Check(what, f"the first {written:,} of {whole:,}, {marked:,} of them up to frame {live.mark.fed.seq:,}", problem)
