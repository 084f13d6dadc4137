"""The ledger's files: written while recording, whole after a kill, made again from any tape, and readable by DuckDB alone."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import msgspec
import pyarrow.parquet as pq
import pytest

from arbl2.errors import StorageError, TapeError
from arbl2.frames import VENUES, Flag, FrameBlock, FrameKind
from arbl2.tape import LEDGER, LOG, SEGMENTS, Manifest, TapeReader, load_manifest, save_manifest, write_session
from arbl2_recorder import Endpoints, RecordConfig, arecord
from arbl2_recorder.config import Stream
from arbl2_recorder.integrity import Inspector
from arbl2_recorder.ledger import END, Cause, Gap, Heal, LedgerWriter, read_state
from arbl2_recorder.log import HEAD, encode_batch
from arbl2_recorder.recovery import inspect_session, recover, write_ledger
from arbl2_recorder.seal import LogTail, Sealer, Watch, seal_log
from arbl2_recorder.writer import LogWriter, log_path
from arbl2_replay.server import ExchangeServer, SyntheticSource
from arbl2_replay.synth import SynthConfig
from scripts import ANCHOR, MS, Script, chain

DOC = Path(__file__).resolve().parents[2] / "docs" / "gap-ledger.md"
NAME = "20261121T113443Z-0a1b"


def troubled():
    """A healed gap, garbage, an outage, and a gap that stays open."""
    script = chain().diff(20, 21).ask().body(30).diff(22, 31).message(b"{").trade(1)
    script.closed().opened(2).diff(32, 33, conn=2).trade(2, conn=2, flags=Flag.LATE).trade(3, conn=2, ms=2_000)
    return script.diff(40, 41, conn=2).diff(42, 43, conn=2)


def packed(frame):
    row = (frame.seq, frame.recv_ns, frame.mono_ns, frame.conn, frame.queue_us, VENUES.index(frame.venue), frame.kind, frame.op)
    return HEAD.pack(*row, frame.flags, len(frame.payload))


def batch(frames):
    return bytes(encode_batch([packed(frame) for frame in frames], [frame.payload for frame in frames]))


def manifest_of(state="recording"):
    return Manifest(tape_version=1, session=NAME, state=state, anchor_wall_ns=ANCHOR.wall_ns, anchor_mono_ns=ANCHOR.mono_ns)


def session_folder(root, logs):
    """A session as a kill leaves it; ``logs`` are lists of batches of frames."""
    session = root / NAME
    (session / LOG).mkdir(parents=True)
    for number, batches in logs.items():
        log_path(session, number).write_bytes(b"".join(map(batch, batches)))
    save_manifest(session, manifest_of())
    return session


def rows(session):
    """Every row of a session's ledger, as gaps, in the order of the files."""
    found = []
    for path in sorted((session / LEDGER).glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            gap = msgspec.convert({name: value for name, value in row.items() if name != "symbol"}, Gap)
            assert gap.symbol == row["symbol"]
            found.append(gap)
    return found


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(check):
    limit = time.monotonic() + 30
    while not check():
        assert time.monotonic() < limit, "what the test waits for did not happen"
        time.sleep(0.01)


class Recording:
    """The disk side of a recorder: the real log writer and the real sealer."""

    def __init__(self, root, **options):
        self.session = root / NAME
        self.session.mkdir()
        save_manifest(self.session, manifest_of())
        self.gaps, self.wanted, self.errors = [], [], []
        self.threads = set()
        self.sealer = Sealer(self.session, manifest_of(), self.errors.append, on_gaps=self._gaps, on_wanted=self.wanted.append)
        self.log = LogWriter(
            self.session,
            flush_ms=20,
            fsync=False,
            segment_seconds=10**6,
            **({"segment_bytes": 2**20} | options),
            on_rotated=self.sealer.put,
            on_error=self.errors.append,
        )

    def _gaps(self, gaps):
        self.threads.add(threading.current_thread().name)
        self.gaps += gaps

    def append(self, frames):
        for frame in frames:
            self.log.append(packed(frame), frame.payload)

    def close(self):
        self.log.close()
        self.sealer.close()
        if not self.errors:
            save_manifest(self.session, msgspec.structs.replace(self.sealer.manifest, state="sealed"))


def test_gaps_and_wanted_books_are_known_while_the_log_is_open(tmp_path):
    recording = Recording(tmp_path)
    script = chain().diff(20, 21).message(b"{").trade(1)
    recording.append(script.frames)
    wait_for(lambda: recording.gaps and recording.wanted and recording.sealer.gaps)
    assert (recording.session / LOG / "000001.log").exists()
    assert [gap.cause for gap in recording.gaps] == [Cause.UNDECODABLE]
    assert set(recording.wanted) == {("BTCUSDT",)}
    assert recording.threads == {"arbl2-sealer"}
    assert recording.sealer.gaps == {"undecodable": 1, "gap": 1}
    assert recording.sealer.last_gap.startswith("binance connection 1: undecodable, 1 missed")
    assert not (recording.session / LEDGER / "000001.parquet").exists()
    more = script.seq
    recording.append(script.ask().body(30).diff(22, 31).frames[more:])
    wait_for(lambda: len(recording.gaps) == 2)
    told = len(recording.wanted)
    recording.close()
    assert recording.errors == []
    assert recording.gaps[-1].healed_by is Heal.SNAPSHOT
    assert len(recording.wanted) == told
    assert rows(recording.session) == recording.gaps == inspect_session(recording.session)
    assert [path.name for path in (recording.session / LEDGER).iterdir()] == ["000001.parquet"]


def test_every_segment_has_its_ledger_and_all_of_them_say_what_the_tape_says(tmp_path):
    recording = Recording(tmp_path, segment_bytes=300)
    for frame in troubled().frames:
        recording.append([frame])
        wait_for(lambda: not recording.log.queued_bytes)
    recording.close()
    assert recording.errors == []
    names = sorted(path.name for path in (recording.session / SEGMENTS).iterdir())
    assert len(names) > 5
    assert sorted(path.name for path in (recording.session / LEDGER).iterdir()) == [*names, f"{END}.parquet"]
    found = rows(recording.session)
    assert found == recording.gaps == inspect_session(recording.session)
    assert [gap.cause for gap in found] == ["gap", "undecodable", "disconnect", "loop_stall", "gap"]
    assert found[-1].end_seq is None
    # Made again from the tape it is the same, file by file.
    before = {path.name: pq.read_table(path) for path in (recording.session / LEDGER).iterdir()}
    states = {name: read_state(recording.session / LEDGER / name) for name in names}
    assert write_ledger(recording.session) == len(found)
    assert {path.name: pq.read_table(path) for path in (recording.session / LEDGER).iterdir()} == before
    assert {name: read_state(recording.session / LEDGER / name) for name in names} == states


def test_queue_delays_and_late_frames_are_counted_once(tmp_path):
    recording = Recording(tmp_path)
    script = Script()
    for number in range(100):
        script.trade(number, flags=Flag.LATE if number == 50 else 0)
    slow = replace(Script().tick(10).frames[0], seq=101, queue_us=10**6)
    recording.append([*(replace(frame, queue_us=frame.seq) for frame in script.frames), slow])
    wait_for(lambda: recording.sealer.late_frames)
    recording.close()
    delay = recording.sealer.queue_us
    assert (delay.p50_us, delay.p99_us, delay.max_us) == (50, 99, 100)
    assert recording.sealer.late_frames == 1


def test_a_session_without_frames_has_no_ledger(tmp_path):
    recording = Recording(tmp_path)
    recording.close()
    assert recording.errors == []
    assert not (recording.session / LEDGER).exists()


def test_a_ledger_that_cannot_be_written_costs_no_data(tmp_path):
    recording = Recording(tmp_path)
    (recording.session / LEDGER).write_bytes(b"in the way")
    recording.append(chain().diff(20, 21).frames)
    recording.close()
    [error] = recording.errors
    assert isinstance(error, StorageError)
    assert "ledger" in str(error)
    assert log_path(recording.session, 1).exists()
    (recording.session / LEDGER).unlink()
    [report] = recover(tmp_path)
    assert report.frames_recovered == 8
    assert [gap.cause for gap in rows(recording.session)] == ["gap", "killed"]


def test_the_tail_sees_whole_batches_only_and_each_once(tmp_path):
    frames = troubled().frames
    first, second = batch(frames[:3]), batch(frames[3:7])
    session = session_folder(tmp_path, {1: []})
    tail = LogTail(session, 1, manifest_of())
    log = log_path(session, 1)
    for cut in range(len(first)):
        log.write_bytes(first[:cut])
        assert tail.next() is None
    log.write_bytes(first + second[:20])
    assert list(tail.next().frames()) == frames[:3]
    assert tail.next() is None
    log.write_bytes(first + second)
    assert list(tail.next().frames()) == frames[3:7]
    assert tail.next() is None
    assert tail.read_bytes == tail.size == len(first + second)


def recovered_rows(root, session):
    [report] = recover(root)
    assert report.problem == ""
    assert not list(session.rglob("*.part"))
    found = rows(session)
    assert found[-1].cause is Cause.KILLED
    return found[:-1], found[-1]


def rows_of(frames):
    inspector = Inspector()
    return [*inspector.inspect(FrameBlock.from_frames(frames, ANCHOR)), *inspector.finish()]


def watch(session):
    return Watch(session, NAME, Inspector())


@pytest.mark.parametrize("cut", [0, 5, 9, 14])
def test_recovery_goes_on_where_the_ledger_ended(tmp_path, cut):
    """Whatever was sealed when the kill came, the rows are those of the whole tape."""
    frames = troubled().frames
    logs = {1: [frames[:cut]], 2: [frames[cut:18], frames[18:]]}
    session = session_folder(tmp_path, logs if cut else {2: logs[2]})
    log_path(session, 2).write_bytes(log_path(session, 2).read_bytes() + b"A2L1torn")
    if cut:
        seal_log(session, 1, manifest_of(), salvage=False, watch=watch(session))
    (session / LEDGER).mkdir(exist_ok=True)
    (session / LEDGER / "000002.parquet.part").write_bytes(b"PAR1 half")
    found, killed = recovered_rows(tmp_path, session)
    assert found == rows_of(frames)
    assert (killed.start_seq, killed.start_mono_ns) == (frames[-1].seq, frames[-1].mono_ns)
    assert (killed.end_seq, killed.healed_by) == (None, Heal.OPEN)
    assert "8 torn bytes" in killed.detail
    assert inspect_session(session)[:-1] == found
    before = everything_below(session)
    assert recover(tmp_path) == []
    assert everything_below(session) == before


def test_killed_between_manifest_and_log_and_between_ledger_and_manifest(tmp_path):
    frames = troubled().frames
    session = session_folder(tmp_path, {1: [frames[:12]], 2: [frames[12:]]})
    logs = {number: log_path(session, number).read_bytes() for number in (1, 2)}
    seen = watch(session)
    first = seal_log(session, 1, manifest_of(), salvage=False, watch=seen).manifest
    seal_log(session, 2, first, salvage=False, watch=seen)
    ledgers = {path: path.read_bytes() for path in (session / LEDGER).iterdir()}
    for number, body in logs.items():
        log_path(session, number).write_bytes(body)
    save_manifest(session, first)
    found, _ = recovered_rows(tmp_path, session)
    assert found == rows_of(frames)
    assert {path: path.read_bytes() for path in ledgers} == ledgers
    assert load_manifest(session).rows == len(frames)


def test_damage_inside_a_log_is_a_row(tmp_path):
    frames = Script().trade(1).trade(2).trade(3).trade(4).frames
    session = session_folder(tmp_path, {1: [frames[:1], frames[1:3], frames[3:]]})
    body = bytearray(log_path(session, 1).read_bytes())
    body[len(batch(frames[:1])) + 30] ^= 1
    log_path(session, 1).write_bytes(bytes(body))
    (lost, gap), _ = recovered_rows(tmp_path, session)
    assert (lost.cause, lost.start_seq, lost.end_seq, lost.missed) == (Cause.LOST_FRAMES, 1, 4, 2)
    assert (gap.cause, gap.first_id, gap.last_id) == (Cause.GAP, 2, 3)


def test_segments_of_an_older_recorder_are_left_alone(tmp_path):
    """Without a ledger to go on from, the restored log is looked at by itself; a ledger that cannot be read counts as none."""
    frames = chain().diff(15, 16).partial(1).partial(2).message(b"{").partial(3).frames
    for n, spoil in enumerate((None, b"PAR1")):
        root = tmp_path / str(n)
        session = session_folder(root, {1: [frames[:8]], 2: [frames[8:]]})
        seal_log(session, 1, manifest_of(), salvage=False)
        if spoil:
            (session / LEDGER).mkdir()
            (session / LEDGER / "000001.parquet").write_bytes(spoil)
        recover(root)
        names = sorted(path.name for path in (session / LEDGER).iterdir())
        assert names[-2:] == ["000002.parquet", f"{END}.parquet"]
        assert [row["cause"] for row in pq.read_table(session / LEDGER / "000002.parquet").to_pylist()] == ["undecodable"]


def test_a_kill_before_the_first_frame(tmp_path):
    session = session_folder(tmp_path, {})
    found, killed = recovered_rows(tmp_path, session)
    assert (found, killed.start_seq, killed.start_recv_ns) == ([], 0, ANCHOR.wall_ns)


def test_what_has_no_ledger_to_make(tmp_path):
    session = session_folder(tmp_path, {1: [chain().frames]})
    with pytest.raises(TapeError, match="Run `arbl2 recover` first"):
        write_ledger(session)
    with pytest.raises(TapeError, match="is not a recording"):
        inspect_session(tmp_path)


def test_a_file_without_its_end_is_never_seen(tmp_path):
    gap = Gap(cause=Cause.KILLED, start_seq=1, start_recv_ns=2, start_mono_ns=3)
    writer = LedgerWriter(tmp_path, 7, NAME)
    writer.append([gap] * 10_000)
    assert [path.name for path in (tmp_path / LEDGER).iterdir()] == ["000007.parquet.part"]
    writer.seal(b"state")
    assert rows(tmp_path) == [gap] * 10_000
    assert read_state(tmp_path / LEDGER / "000007.parquet") == b"state"
    assert read_state(tmp_path / LEDGER / "000008.parquet") is None
    (tmp_path / LEDGER / "000009.parquet").write_bytes(b"PAR1")
    with pytest.raises(TapeError, match="a ledger can be made again"):
        read_state(tmp_path / LEDGER / "000009.parquet")
    other = LedgerWriter(tmp_path, END, NAME)
    other.discard()
    assert len(list((tmp_path / LEDGER).iterdir())) == 2


QUERIES = re.findall(r"```sql\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def tapes(tmp_path):
    """Two sessions below one root: one with troubles, one without."""
    write_session(tmp_path / NAME, manifest_of("imported"), iter(troubled().frames))
    calm = msgspec.structs.replace(manifest_of("imported"), session="calm")
    write_session(tmp_path / "calm", calm, iter(chain().frames))
    assert (write_ledger(tmp_path / NAME), write_ledger(tmp_path / "calm")) == (5, 0)
    return tmp_path


def ask(query, root):
    with duckdb.connect() as connection:
        return connection.execute(query.replace("'tapes/", f"'{root}/")).fetchall()


def test_the_questions_of_the_documentation(tapes):
    by_cause, unhealed, ids, trusted = (ask(query, tapes) for query in QUERIES)
    assert sum(entries for _, _, entries, _, _ in by_cause) == 5
    assert ("gap", "snapshot", 1, 5, 0.3) in by_cause
    assert [(row[1], row[2], row[4], row[5]) for row in unhealed] == [("binance", "BTCUSDT", "gap", 6)]
    assert ids == [(NAME, "btcusdt@depth@100ms", 11, 2, 15)]
    frames = troubled().frames
    messages = [frame.seq for frame in frames if frame.kind is FrameKind.MESSAGE]
    spans = [(gap.start_seq, gap.end_seq or 10**9) for gap in rows_of(frames)]
    good = [seq for seq in messages if not any(start < seq < end for start, end in spans)]
    assert trusted == [("binance", len(messages), len(good))]
    assert 0 < len(good) < len(messages)


def test_the_documentation_names_every_cause_and_heal(tapes):
    text = DOC.read_text(encoding="utf-8")
    assert [name for name in (*Cause, *filter(None, Heal)) if f"`{name}`" not in text and f"'{name}'" not in text] == []
    columns = pq.read_schema(next((tapes / NAME / LEDGER).iterdir())).names
    assert [name for name in columns if f"`{name}`" not in text] == []


def test_a_ledger_of_a_stream_that_steps_in_time(tmp_path):
    """Stamps of both clocks are those of the frames, whatever the wall clock does."""
    script = chain()
    script.step_ns = -5_000 * MS
    script.diff(20, 21).ask().body(30)
    write_session(tmp_path / NAME, manifest_of("imported"), iter(script.frames))
    write_ledger(tmp_path / NAME)
    [gap] = rows(tmp_path / NAME)
    assert gap.end_mono_ns - gap.start_mono_ns == 300 * MS
    assert gap.end_recv_ns - gap.start_recv_ns == -4_700 * MS


JUDGED = {Cause.GAP, Cause.DUPLICATE, Cause.OVERLAP, Cause.REGRESSION, Cause.CROSSED, Cause.WRONG_TOTAL, Cause.UNDECODABLE}


async def _record(out):
    """Every stream of both venues over real sockets, with one Binance connection cut on the way."""
    async with ExchangeServer(SyntheticSource(SynthConfig(seed=5, duration_s=3_600.0))) as server:
        endpoints = Endpoints(
            upbit_ws=server.upbit_ws_url,
            upbit_rest=server.upbit_rest_url,
            binance_ws=server.binance_ws_url,
            binance_rest=server.binance_rest_url,
        )
        streams = tuple(stream.value for stream in Stream)
        config = RecordConfig(out=out, duration_s=6.0, endpoints=endpoints, streams=streams, dial_interval_s=0.1)
        recording = asyncio.create_task(arecord(config))
        await asyncio.sleep(3.0)
        await server.disconnect("binance", code=1006)
        return await recording


def test_a_recording_of_every_stream_with_one_outage(tmp_path):
    """Nothing is flagged but the outage, and what the diff and trade streams said meanwhile."""
    result = asyncio.run(_record(tmp_path))
    found = rows(result.path)
    assert found == inspect_session(result.path)
    [outage] = [gap for gap in found if gap.cause is Cause.DISCONNECT]
    assert (outage.venue, outage.healed_by) == ("binance", Heal.RECONNECT)
    lost = [gap for gap in found if gap.cause in JUDGED]
    assert {gap.cause for gap in lost} <= {Cause.GAP}
    assert all(gap.start_seq < outage.end_seq and (gap.end_seq or 10**9) > outage.start_seq for gap in lost)
    messages = [f.payload for f in TapeReader(result.path).frames() if f.venue == "binance" and f.kind is FrameKind.MESSAGE]
    assert all(sum(name in payload for payload in messages) > 5 for name in (b"@depth@", b"@depth20@", b"@bookTicker"))
