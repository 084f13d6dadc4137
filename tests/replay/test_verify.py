"""Live equals replay, or the difference is found: live runs on tapes that were written before, compared, changed and cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from arbl2.config import PaperConfig, PolicyConfig, RunConfig
from arbl2.errors import ConfigError, EngineError, TapeError
from arbl2.events import DECISION_DTYPE, Direction, Intent
from arbl2.frames import FrameBlock, FrameKind
from arbl2.policy import Ask
from arbl2.tape import TapeReader, load_manifest, write_session
from arbl2_replay import replay
from arbl2_replay.altered import with_ties_permuted
from arbl2_replay.histogram import Histogram
from arbl2_replay.journal import FedDigest, read_live_file
from arbl2_replay.live import LiveRun
from arbl2_replay.synth import SynthConfig, synth_frames, synth_manifest
from arbl2_replay.verify import find_live_run, find_tape, verify_live
from tests.markets import Market

CONFIG = RunConfig(policy=PolicyConfig(entry_bps=12.0, tp_bps=14.0))
SYNTH = SynthConfig(seed=11, duration_s=12.0, excursion_every_s=2.0)


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    """Twelve synthetic seconds of three coins."""
    manifest = synth_manifest(SYNTH)
    folder = tmp_path_factory.mktemp("tapes") / manifest.session
    write_session(folder, manifest, synth_frames(SYNTH))
    return folder


def run_live(tape, runs, *, upto=None, policy=None, config=CONFIG, logged=None, mark_every=100):
    """The run on the frames of a tape, by one or more as a recorder hands them on; ``upto``: killed there, right after a mark."""
    run = LiveRun(config, runs, policy=policy)
    seq = [0]
    run.begin(tape, load_manifest(tape), logged or (lambda: seq[0]))
    frames = list(itertools.islice(TapeReader(tape).frames(), upto))
    sizes = itertools.cycle([1, 1, 3] if mark_every > 1 else [1])
    while frames:
        count = next(sizes)
        batch, frames = frames[:count], frames[count:]
        seq[0] = batch[-1].seq
        run.take(batch)
        if seq[0] % mark_every == 0:
            run.mark()
    if upto is None:
        return run.finish(tape, 1.0)
    run.mark()
    run.abandon()
    return run


@pytest.fixture(scope="module")
def live(tape, tmp_path_factory):
    """The folder of runs with the live run on the tape."""
    runs = tmp_path_factory.mktemp("runs")
    run_live(tape, runs)
    return runs


def test_a_live_run_is_what_its_replay_writes(tape, live, tmp_path):
    folder = find_live_run(tape.name, None, live)
    replayed = replay(tape, CONFIG, out=tmp_path, decoded=False)
    assert replayed.kpi["decisions"] > 5
    for name in ("run.json", "decisions.parquet", "fills.parquet"):
        assert (folder / name).read_bytes() == (replayed.run_dir / name).read_bytes(), name
    found = verify_live(tape, runs=live)
    assert found.same, found
    assert not found.killed
    assert found.digest == found.replay_digest == replayed.digest
    assert [path.name for path in live.iterdir()] == [folder.name], "the journal was left behind"


def copy_of(tape, folder, change):
    """The tape with frames changed, and a manifest that says that all is well."""
    manifest = load_manifest(tape)
    copied = folder / tape.name
    write_session(copied, msgspec.structs.replace(manifest, segments=[]), (change(f) for f in TapeReader(tape).frames()))
    return copied


def test_a_changed_byte_fails_even_where_the_engine_does_not_look(tape, live, tmp_path):
    def in_an_alarm(frame):
        if frame.kind is not FrameKind.CLOCK:
            return frame
        return replace(frame, payload=frame.payload + b" ")

    found = verify_live(copy_of(tape, tmp_path, in_an_alarm), runs=live)
    assert not found.same
    assert found.digest == found.replay_digest
    assert "tape.sha256" in found.checks[-1].problem
    assert "payload" in found.checks[0].problem or "stamp" in found.checks[0].problem


def test_a_changed_price_is_shown_with_both_sides(tape, live, tmp_path):
    decided = replay(tape, CONFIG, out=tmp_path / "runs").decisions()
    seq = decided["seq"][3]

    def one_price(frame):
        return replace(frame, payload=frame.payload.replace(b'"', b"'", 1)) if frame.seq == seq else frame

    found = verify_live(copy_of(tape, tmp_path, one_price), runs=live)
    assert not found.same
    assert found.digest != found.replay_digest
    assert found.comparison.first.a["seq"] == seq
    assert found.comparison.first.b is None or found.comparison.first.b["seq"] != seq
    assert found.comparison.first.row == 3
    assert found.to_json()["comparison"]["first_event"]["row"] == 3


def test_a_damaged_segment_is_refused(tape, live, tmp_path):
    copied = copy_of(tape, tmp_path, lambda frame: frame)
    segment = copied / "segments" / "000001.parquet"
    body = bytearray(segment.read_bytes())
    body[len(body) // 2] ^= 1
    segment.write_bytes(body)
    with pytest.raises(TapeError, match="000001"):
        verify_live(copied, runs=live)


def test_what_a_killed_run_left_is_the_beginning_of_the_replay(tape, tmp_path):
    frames = load_manifest(tape).rows
    run_live(tape, tmp_path, upto=frames * 2 // 3)
    found = verify_live(tape, runs=tmp_path)
    assert found.same, found
    assert found.killed
    live = read_live_file(found.run)
    assert live.mark.fed.frames == frames * 2 // 3
    assert live.mark.rows["decisions"]["rows"] > 3
    assert [check.name for check in found.checks][:3] == ["frames", "decisions", "fill events"]


def test_rows_are_not_written_before_their_frames_are_logged(tape, tmp_path):
    seq = int(replay(tape, CONFIG, out=tmp_path / "replayed").decisions()["seq"][4])
    run_live(tape, tmp_path, upto=load_manifest(tape).rows - 10, logged=lambda: seq, mark_every=1)
    folder = find_live_run(tape.name, None, tmp_path)
    live = read_live_file(folder)
    assert live.mark.fed.seq == seq
    rows = np.fromfile(folder / "decisions.rows", DECISION_DTYPE)
    assert len(rows) == live.mark.rows["decisions"]["rows"] == 5
    assert verify_live(tape, runs=tmp_path).same


def test_rows_of_a_killed_run_that_were_changed_or_lost_are_found(tape, tmp_path):
    run_live(tape, tmp_path, upto=load_manifest(tape).rows - 10)
    file = find_live_run(tape.name, None, tmp_path) / "decisions.rows"
    whole = file.read_bytes()
    rows = np.frombuffer(whole, DECISION_DTYPE).copy()
    rows["upbit_px_e8"][2] += 1
    file.write_bytes(rows.tobytes())
    found = verify_live(tape, runs=tmp_path)
    assert not found.same
    assert found.comparison.first.row == 2
    assert found.comparison.first.columns == ("upbit_px_e8",)
    rows["outcome"][2] = 99
    file.write_bytes(rows.tobytes())
    with pytest.raises(TapeError, match=r"decisions\.rows is damaged"):
        verify_live(tape, runs=tmp_path)
    file.write_bytes(whole[: DECISION_DTYPE.itemsize * 2])
    found = verify_live(tape, runs=tmp_path)
    problems = [check.problem for check in found.checks if check.name == "decisions"]
    assert problems == [f"the run wrote {len(rows):,}, of which 2 are left"]


def test_a_tape_that_lost_what_the_run_was_fed_fails(tape, tmp_path):
    run_live(tape, tmp_path, upto=load_manifest(tape).rows)
    folder = tmp_path / "tapes" / tape.name
    manifest = msgspec.structs.replace(load_manifest(tape), segments=[])
    write_session(folder, manifest, itertools.islice(TapeReader(tape).frames(), 400))
    found = verify_live(folder, runs=tmp_path)
    assert not found.same
    assert "the tape has 400 up to 400" in found.checks[0].problem


class Raises:
    """A policy with a mistake."""

    def decide(self, view):
        raise ZeroDivisionError(view.symbol)


def test_what_goes_wrong_in_a_run_is_raised_at_its_end(tape, tmp_path):
    run = LiveRun(CONFIG, tmp_path, policy=Raises())
    run.begin(tape, load_manifest(tape), lambda: 10**9)
    frames = list(TapeReader(tape).frames())
    with pytest.raises(ZeroDivisionError) as raised:
        run.take(frames)
    run.lost(raised.value)
    assert run.look().problem == str(raised.value)
    with pytest.raises(ZeroDivisionError):
        run.finish(tape, 1.0)
    run.abandon()


class RaisesAtTheThird:
    def __init__(self):
        self.asks = 0

    def decide(self, view):
        self.asks += 1
        if self.asks > 2:
            raise ZeroDivisionError("the third")
        return Ask(Direction.SELL_UPBIT, Intent.ENTRY, 10**6, 10**6)


def test_a_run_that_fails_in_a_burst_can_still_be_looked_at(tape, tmp_path):
    """What it had decided in the same burst is of a block that was never fed whole."""
    run = LiveRun(CONFIG, tmp_path, policy=RaisesAtTheThird())
    run.begin(tape, load_manifest(tape), lambda: 10**9)
    frames = list(TapeReader(tape).frames())
    run.take(frames[:1])
    with pytest.raises(ZeroDivisionError) as raised:
        run.take(frames[1:])
    run.lost(raised.value)
    assert run.look().problem == "the third"
    run.abandon()


def test_a_run_is_one_session(tape, tmp_path):
    run = LiveRun(CONFIG, tmp_path)
    run.begin(tape, load_manifest(tape), lambda: 0)
    with pytest.raises(EngineError, match="one session"):
        run.begin(tape, load_manifest(tape), lambda: 0)
    run.abandon()


# ------------------------------------------------------------------------------------------------- cuts and permutations


def test_no_cut_changes_what_was_decided_before(tape, live):
    found = verify_live(tape, runs=live, cuts=4, seed=3)
    assert found.same
    assert len(found.cuts.seqs) == 4
    assert found.cuts.decisions > 0


class Peeks:
    """Decides on what another run has shown it: a policy that knows what comes later."""

    def __init__(self):
        self.latest_ns = 0

    def decide(self, view):
        rising, self.latest_ns = view.time_ns > self.latest_ns, max(view.time_ns, self.latest_ns)
        return Ask(Direction.SELL_UPBIT, Intent.ENTRY, 10**6, 10**6) if rising and view.sell_upbit_bps > 10 else None


def test_a_policy_that_looks_ahead_is_caught(tape, tmp_path):
    run_live(tape, tmp_path, policy=Peeks())
    honest = verify_live(tape, runs=tmp_path, policy=Peeks, cuts=3)
    assert honest.same
    peeking = Peeks()
    runs = [Peeks(), Peeks()]  # for the replay and the engine that is fed once more
    found = verify_live(tape, runs=tmp_path, policy=lambda: runs.pop() if runs else peeking, cuts=3)
    assert not found.same
    assert found.cuts.looked_ahead


def test_a_run_with_a_policy_of_its_own_needs_it(tape, tmp_path):
    run_live(tape, tmp_path, policy=Peeks())
    with pytest.raises(ConfigError, match="Peeks"):
        verify_live(tape, runs=tmp_path)


def tie(folder):
    """Upbit's jump and Binance's that follows it, 0.4 ms apart: whoever hears Binance first sees no gap."""
    market = Market()
    for ms in range(0, 3_000, 250):
        market.parity(ms)
    market.upbit(3_000, [(142_900_000, 10)], [(143_100_000, 10)]).binance(3_000.4, [(102_000, 10)], [(102_150, 10)])
    for ms in range(3_100, 4_000, 100):
        market.rate(ms).upbit(ms + 1, [(142_900_000, 10)], [(143_100_000, 10)]).binance(ms + 2, [(102_000, 10)], [(102_150, 10)])
    return market.write(folder / "market")


def test_a_decision_that_hangs_on_a_tie_flips(tmp_path):
    session = tie(tmp_path / "tapes")
    config = RunConfig(
        symbols=("BTC",), policy=PolicyConfig(entry_bps=100.0, tp_bps=400.0), paper=PaperConfig(upbit_krw="1000000000")
    )
    run_live(session, tmp_path / "runs", config=config)
    found = verify_live(session, runs=tmp_path / "runs", jitters=12, window_ms=2.0)
    assert found.same
    assert found.jitter.decisions == 1
    assert found.jitter.flips[0] == 0
    assert found.jitter.flips[2] == 2  # one decision less, and another one instead
    assert found.jitter.pnl_krw[0] != found.jitter.pnl_krw[2]


@pytest.mark.parametrize("window_ns", [1_000_000, 40_000_000])
def test_permuted_frames_keep_stamps_and_the_order_of_each_venue(tape, window_ns):
    whole = list(TapeReader(tape).frames())
    moved = [f for block in with_ties_permuted(TapeReader(tape).blocks(), window_ns, 7) for f in block.frames()]
    assert [(f.seq, f.mono_ns, f.recv_ns) for f in moved] == [(f.seq, f.mono_ns, f.recv_ns) for f in whole]
    for venue in ("", "upbit", "binance"):
        before, after = ([(f.conn, f.kind, f.payload) for f in frames if f.venue == venue] for frames in (whole, moved))
        assert before == after
        assert all(abs(a.mono_ns - b.mono_ns) < window_ns for a, b in zip(
            *([f for f in frames if f.venue == venue] for frames in (whole, moved)), strict=True))  # fmt: skip
    changed = sum(a.payload != b.payload for a, b in zip(whole, moved, strict=True))
    assert changed > 0 or window_ns == 1_000_000


# -------------------------------------------------------------------------------------------------------------- small parts


def test_frames_add_up_to_one_digest_one_by_one_or_in_blocks(tape):
    single, blocks = FedDigest(), FedDigest()
    reader = TapeReader(tape)
    for frame in reader.frames():
        single.add(FrameBlock.from_frames([frame], reader.anchor))
    for block in TapeReader(tape).blocks():
        blocks.add(block.slice(0, 100))
        blocks.add(block.slice(100, len(block)))
    assert single.fed() == blocks.fed()


def test_joined_blocks_hold_the_same_frames(tape):
    reader = TapeReader(tape)
    frames = list(itertools.islice(reader.frames(), 90))
    whole = FrameBlock.from_frames(frames, reader.anchor)
    singles = [FrameBlock.from_frames([frame], reader.anchor) for frame in frames]
    for parts in ([whole.slice(0, 1), whole.slice(1, 40), whole.slice(40, 40), whole.slice(40, 90)], singles):
        joined = FrameBlock.joined(parts)
        assert list(joined.frames()) == frames
        assert joined.time_ns.tolist() == whole.time_ns.tolist()
        assert joined.offsets.tolist() == whole.offsets.tolist()


def test_a_histogram_is_within_two_percent():
    chance = np.random.default_rng(5)
    values = np.exp(chance.normal(11, 2, 20_000)).astype(np.int64)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    histogram.add(values[:0])
    found = histogram.latency()
    assert found.count == 20_000
    assert found.max_us == values.max() / 1e3
    for share, quantile_us in ((50, found.p50_us), (99, found.p99_us)):
        assert quantile_us == pytest.approx(np.percentile(values, share) / 1e3, rel=0.02)
    assert Histogram().latency().p99_us == 0.0


def test_sessions_and_runs_are_found_by_name(tape, live, tmp_path):
    assert find_tape(tape.name, str(tape.parent)) == tape
    assert find_tape(str(tape), "elsewhere") == tape
    folder = find_live_run(tape.name, None, live)
    assert find_live_run("x", str(folder), tmp_path) == folder
    with pytest.raises(TapeError, match="arbl2 live"):
        find_live_run("20200101T000000Z-0000", None, live)


def test_a_run_on_another_tape_is_refused(tape, live, tmp_path):
    other = tie(tmp_path)
    with pytest.raises(TapeError, match="Name its own tape"):
        verify_live(other, find_live_run(tape.name, None, live), runs=live)
