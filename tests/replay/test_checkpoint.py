"""A run that was kept in the middle goes on to the same end, to the byte; whatever is not its own is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.config import load
from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE
from arbl2.tape import write_session
from arbl2_replay import replay
from arbl2_replay.checkpoint import STATE, Marks, Snapshot
from arbl2_replay.sinks import EventLog
from markets import Market, buy_binance, manifest, sell_binance, threshold
from properties.effort import examples
from properties.soup import ANCHOR, INSTRUMENTS, soup

GOLDEN = Path(__file__).resolve().parents[2] / "datasets" / "golden" / "two-venue-60s"
CONFIG = threshold()
ROUNDS = 4
FRAMES = 3 * ROUNDS


class InTurn:
    """Buys and sells in turn, every third time it may: what it asks depends on all that it saw."""

    def __init__(self):
        self.looks = 0

    def decide(self, view):
        self.looks += 1
        return None if self.looks % 3 else (buy_binance("0.1"), sell_binance("0.1"))[self.looks // 3 % 2]

    def pack(self):
        return {"looks": self.looks}

    def unpack(self, packed):
        self.looks = packed["looks"]


class Forgetful:
    """A policy that cannot be kept."""

    def decide(self, view):
        return None


@pytest.fixture
def tape(tmp_path):
    market = Market()
    for ms in range(0, ROUNDS * 200, 200):
        market.premium(ms)
    return market.write(tmp_path / "tape")


def files(result):
    """Every file of a run."""
    return {path.name: path.read_bytes() for path in result.run_dir.iterdir()}


def figures(result):
    """Everything that is not a time of ours or a place."""
    values = result.to_json()
    return {name: value for name, value in values.items() if name not in {"elapsed_s", "run_dir", "lateness", "reading"}}


def same(one, other):
    assert figures(one) == figures(other)
    assert files(one) == files(other)


# --------------------------------------------------------------------------------------------------- a checkpoint and the rest


@pytest.mark.parametrize("policy", [None, InTurn], ids=["compiled", "python"])
def test_a_checkpoint_at_any_frame_and_the_rest_are_the_whole_run(tape, tmp_path, policy):
    """Also while orders are in flight: each decision is followed by frames before its orders arrive."""
    policy = policy or (lambda: None)
    whole = replay(tape, CONFIG, out=tmp_path / "whole", policy=policy())
    assert whole.kpi["decisions"] >= 2
    kept = tmp_path / "kept"
    for seq in range(1, FRAMES):
        head = replay(tape, CONFIG, out=tmp_path / "runs", policy=policy(), until=f"#{seq}", checkpoint=kept, block_rows=seq % 4)
        assert (head.frames, head.run_dir, head.checkpoint) == (seq, None, kept)
        assert list((tmp_path / "runs").iterdir()) == []
        same(whole, replay(tape, CONFIG, out=tmp_path / "runs", policy=policy(), resume=kept, block_rows=seq % 5))
        shutil.rmtree(tmp_path / "runs")
        shutil.rmtree(kept)


@given(seed=st.integers(0, 10**9), data=st.data())
@examples(12)
def test_checkpoints_anywhere_change_nothing(tmp_path_factory, seed, data):
    """Random sessions, kept and taken up several times at random frames, in blocks of any size."""
    folder = tmp_path_factory.mktemp("soup")
    config, frames = soup(seed, 250)
    anchor = {"anchor_wall_ns": ANCHOR.wall_ns, "anchor_mono_ns": ANCHOR.mono_ns}
    write_session(folder / "tape", manifest(instruments=INSTRUMENTS, **anchor), frames)
    whole = replay(folder / "tape", config, out=folder / "whole", check_hashes=False)
    cuts = sorted(data.draw(st.sets(st.integers(frames[0].seq, frames[-1].seq - 1), min_size=1, max_size=3)))
    options = {"config": config, "out": folder / "runs", "check_hashes": False}
    resume = None
    for number, seq in enumerate(cuts):
        kept = folder / str(number)
        rows = data.draw(st.sampled_from([1, 2, 7, 100, 1_000]))
        head = replay(folder / "tape", **options, until=f"#{seq}", checkpoint=kept, resume=resume, block_rows=rows)
        assert head.checkpoint == resume or head.checkpoint == kept
        resume = kept
    same(whole, replay(folder / "tape", **options, resume=resume, block_rows=data.draw(st.sampled_from([None, 1, 13]))))


def test_a_checkpoint_of_the_golden_tape(tmp_path):
    tape, config = GOLDEN / "tape", load(GOLDEN / "config.toml")
    whole = replay(tape, config, out=tmp_path / "whole")
    assert whole.kpi["legs_filled"] > 10
    chance = random.Random(4)
    for number in range(4):
        kept = tmp_path / str(number)
        cut = f"#{chance.randrange(1, whole.frames)}"
        replay(tape, config, until=cut, checkpoint=kept, block_rows=chance.choice([1, 50, 4_000]))
        same(whole, replay(tape, config, out=tmp_path / "runs", resume=kept))


def test_a_run_goes_on_in_the_folder_that_it_was_kept_in(tape, tmp_path):
    whole = replay(tape, CONFIG, out=tmp_path / "whole")
    kept = tmp_path / "kept"
    for seq in (4, 8, 11):
        resume = kept if kept.exists() else None
        replay(tape, CONFIG, out=tmp_path / "runs", until=f"#{seq}", checkpoint=kept, resume=resume)
    same(whole, replay(tape, CONFIG, out=tmp_path / "runs", checkpoint=kept, resume=kept))
    assert not kept.exists()


def test_a_checkpoint_is_not_used_up(tape, tmp_path):
    kept = tmp_path / "kept"
    replay(tape, CONFIG, until="#7", checkpoint=kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert set(before) == {STATE, "decisions.rows", "fills.rows"}
    first, second = (replay(tape, CONFIG, out=tmp_path / name, resume=kept) for name in ("a", "b"))
    same(first, second)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_run_that_reaches_the_end_of_its_tape_is_complete(tape, tmp_path):
    whole = replay(tape, CONFIG, out=tmp_path / "whole")
    result = replay(tape, CONFIG, out=tmp_path / "runs", until="#99", checkpoint=tmp_path / "kept", checkpoint_every="1ms")
    same(whole, result)
    assert result.checkpoint is None
    assert not (tmp_path / "kept").exists()


def test_a_run_that_cannot_be_written_in_the_end_can_go_on_from_its_checkpoint(tape, tmp_path):
    whole = replay(tape, CONFIG, out=tmp_path / "whole")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / whole.run_dir.name).write_text("in the way")
    kept = tmp_path / "kept"
    with pytest.raises(StorageError, match="Choose another --out"):
        replay(tape, CONFIG, out=tmp_path / "runs", checkpoint=kept, checkpoint_every="100ms", block_rows=1, speed="100x")
    assert (kept / STATE).exists()
    same(whole, replay(tape, CONFIG, out=tmp_path / "elsewhere", resume=kept))


def test_a_run_that_breaks_leaves_no_checkpoint_that_it_has_not_made(tape, tmp_path):
    class Broken(InTurn):
        def decide(self, view):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replay(tape, CONFIG, out=tmp_path / "runs", policy=Broken(), checkpoint=tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "tape"]
    assert list((tmp_path / "runs").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------------ --until


def test_the_run_ends_where_it_is_told(tape, tmp_path):
    whole = replay(tape, CONFIG, out=tmp_path / "whole")
    iso = "2023-11-14T22:13:20.401"
    found = {
        until: replay(tape, CONFIG, out=tmp_path / "runs", until=until, block_rows=4)
        for until in ("#8", "+401ms", "+0.401s", iso, f"{iso}Z", "2023-11-15T07:13:20.401+09:00", "1700000000401000000")
    }
    assert {result.frames for result in found.values()} == {8}
    assert len({result.digest for result in found.values()}) == 1
    prefix = found["#8"]
    assert prefix.digest != whole.digest
    assert prefix.tape_s == 0.401
    assert json.loads((prefix.run_dir / "run.json").read_text())["run"]["frames"] == 8
    cut = Market()
    for ms in range(0, ROUNDS * 200, 200):
        cut.premium(ms)
    del cut.frames[8:]
    assert replay(cut.write(tmp_path / "cut"), CONFIG).digest == prefix.digest
    for until in (f"#{FRAMES}", "+2h", "+999999999999h", "end"):
        assert replay(tape, CONFIG, until=until).digest == whole.digest


def test_nothing_before_the_first_frame(tape):
    assert replay(tape, CONFIG, until="2020-01-01").frames == 0


@pytest.mark.parametrize("text", ["", "#", "12", "+1y", "soon", "2026-13-01", "#" + "9" * 40])
def test_what_is_no_moment_is_refused(tape, text):
    with pytest.raises(ConfigError, match="is no instant"):
        replay(tape, CONFIG, until=text)


# ------------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def kept(tape, tmp_path):
    folder = tmp_path / "kept"
    replay(tape, CONFIG, until="#7", checkpoint=folder)
    return folder


def test_a_checkpoint_of_another_tape_is_refused(kept, tmp_path):
    other = Market().premium(0).premium(300).premium(600).write(tmp_path / "other")
    with pytest.raises(ConfigError, match="of another tape"):
        replay(other, CONFIG, resume=kept)


def test_a_checkpoint_of_another_configuration_is_refused(tape, kept):
    with pytest.raises(ConfigError, match="of another configuration"):
        replay(tape, threshold(entry_bps=21.0), resume=kept)


def test_a_checkpoint_of_another_policy_is_refused(tape, kept):
    with pytest.raises(ConfigError, match="policy"):
        replay(tape, CONFIG, policy=InTurn(), resume=kept)


def test_an_end_before_the_checkpoint_is_refused(tape, kept):
    with pytest.raises(ConfigError, match="before the checkpoint"):
        replay(tape, CONFIG, resume=kept, until="#3")


@pytest.mark.parametrize("place", ["start", "middle", "end", "longer", "shorter", "empty", "other version"])
def test_a_damaged_checkpoint_is_refused(tape, kept, place, tmp_path):
    path = kept / STATE
    body = bytearray(path.read_bytes())
    at = {"start": 0, "middle": len(body) // 2, "end": len(body) - 1}
    if place in at:
        body[at[place]] ^= 1
    else:
        body = {"longer": body + b"x", "shorter": body[:-1], "empty": b"", "other version": body.replace(b" 1 ", b" 2 ", 1)}[
            place
        ]
    path.write_bytes(body)
    with pytest.raises(TapeError, match="from the beginning"):
        replay(tape, CONFIG, resume=kept, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change", ["flip", "cut", "gone"])
def test_rows_that_are_not_those_of_the_checkpoint_are_refused(tape, kept, change, tmp_path):
    path = kept / "fills.rows"
    body = bytearray(path.read_bytes())
    assert len(body) > FILL_DTYPE.itemsize
    if change == "gone":
        path.unlink()
    else:
        body[-1] ^= 1
        path.write_bytes(body if change == "flip" else body[:-1])
    with pytest.raises(TapeError, match="from the beginning"):
        replay(tape, CONFIG, resume=kept, out=tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_rows_beyond_the_checkpoint_do_not_matter(tape, kept, tmp_path):
    """What a killed run had written since."""
    for name in ("decisions.rows", "fills.rows"):
        with (kept / name).open("ab") as file:
            file.write(b"half a row")
    same(replay(tape, CONFIG, out=tmp_path / "a"), replay(tape, CONFIG, out=tmp_path / "b", resume=kept))


def test_a_checkpoint_is_not_written_over(tape, kept, tmp_path):
    before = (kept / STATE).read_bytes()
    with pytest.raises(ConfigError, match=f"--resume {kept}"):
        replay(tape, CONFIG, checkpoint=kept, out=tmp_path / "runs")
    assert (kept / STATE).read_bytes() == before


def test_a_policy_that_cannot_be_kept_is_refused_before_it_runs(tape, tmp_path):
    with pytest.raises(ConfigError, match=r"Forgetful cannot be kept.*pack\(\)"):
        replay(tape, CONFIG, policy=Forgetful(), checkpoint=tmp_path / "kept", out=tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tape"]


def test_other_refusals(tape, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TapeError, match="holds no checkpoint"):
        replay(tape, CONFIG, resume=tmp_path / "nowhere")
    with pytest.raises(TapeError, match="holds no checkpoint"):
        replay(tape, CONFIG, resume=tmp_path / "file")
    with pytest.raises(StorageError, match="--checkpoint"):
        replay(tape, CONFIG, checkpoint=tmp_path / "file" / "kept")
    with pytest.raises(ConfigError, match="--checkpoint FOLDER"):
        replay(tape, CONFIG, checkpoint_every="10m")
    with pytest.raises(ConfigError, match="no length of time"):
        replay(tape, CONFIG, checkpoint_every="often", checkpoint=tmp_path / "kept")


# ---------------------------------------------------------------------------------------------------------------- the format


def test_a_snapshot_is_what_was_packed():
    nested = np.dtype([("a", np.int64), ("b", np.int8, (2, 3)), ("c", [("d", np.float64), ("e", np.uint16, 2)])], align=True)
    arrays = {"plain": np.arange(6).reshape(2, 3), "none": np.zeros((0, 4)), "x.1": np.zeros(3, nested), "one": np.array(7.5)}
    arrays["x.1"]["c"]["e"] = 9
    meta = {"big": 2**90, "text": "\u20a9\n", "list": [1, [2.5, None]]}
    found = Snapshot.unpack(Snapshot(meta, arrays).pack())
    assert found.meta == meta
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("descr", ["|O", "<i0", "V0", [["a", "|O"]], 5, [5]])
def test_arrays_of_objects_are_refused(descr):
    packed = Snapshot({}, {"a": np.zeros(1)}).pack()
    assert Snapshot.unpack(packed).arrays["a"].tolist() == [0.0]
    body = json.dumps({"meta": {}, "arrays": {"a": [[1], descr]}}).encode() + b"\n" + bytes(8)
    forged = len(body).to_bytes(8, "little") + bytes(pa.compress(body, codec="zstd", asbytes=True))
    with pytest.raises((ValueError, TypeError)):
        Snapshot.unpack(forged)


def test_a_size_beyond_reason_is_refused():
    with pytest.raises(ValueError, match="too large"):
        Snapshot.unpack((2**62).to_bytes(8, "little") + b"x")


def test_marks_are_bounded_and_spread():
    marks = Marks(every=10, most=8, most_bytes=10**6)
    for frames in range(0, 10_000, 5):
        if marks.is_due(frames):
            marks.add(frames, frames, bytes(1_000))
    kept = [int(mark.place) for mark in marks._marks]
    assert kept[0] == 0
    assert 4 <= len(kept) <= 8
    assert max(np.diff(kept)) <= 10_000 / 4
    assert marks.before(lambda place: place <= 10) == bytes(1_000)
    assert marks.before(lambda place: place < 0) is None


def test_marks_are_bounded_in_bytes():
    marks = Marks(every=1, most=1_000, most_bytes=5_000)
    for frames in range(200):
        if marks.is_due(frames):
            marks.add(frames, frames, bytes(1_000))
    assert 2 <= len(marks._marks) <= 5


def test_rows_are_written_once(tmp_path):
    class Made:
        def __init__(self, start, stop):
            self.decisions = np.zeros(stop - start, DECISION_DTYPE)
            self.decisions["decision_id"] = np.arange(start, stop)
            self.fills = np.zeros(0, FILL_DTYPE)

    log = EventLog(tmp_path)
    log.write(Made(0, 5))
    five = log.pack()
    log.write(Made(5, 9))
    nine = log.pack()
    log.go_back({"decisions": 5, "fills": 0})
    assert log.pack() == five
    log.write(Made(5, 7))
    assert (tmp_path / "decisions.rows").stat().st_size == 9 * DECISION_DTYPE.itemsize
    log.write(Made(7, 12))
    (rows,) = log.groups("decisions")
    assert rows["decision_id"].tolist() == list(range(12))
    log.go_back({"decisions": 9, "fills": 0})
    assert log.pack() == nine
    log.close()


# --------------------------------------------------------------------------------------------------------------- a real kill


def command(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "arbl2", "replay", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )


def test_a_killed_replay_goes_on(tmp_path):
    """Killed at random moments after a checkpoint was written, and taken up by another process: the whole run, to the byte."""
    tape, config = GOLDEN / "tape", GOLDEN / "config.toml"
    whole = replay(tape, load(config), out=tmp_path / "whole")
    kept, resume = tmp_path / "kept", []
    for pause_s in (0.05, 0.3):
        with command(
            *(tape, "--config", config, "--speed", "20x", "--checkpoint", kept, "--checkpoint-every", "500ms", *resume),
            cwd=tmp_path,
        ) as process:
            before = (kept / STATE).read_bytes() if resume else b""
            deadline = time.monotonic() + 60
            while not (kept / STATE).exists() or (kept / STATE).read_bytes() == before:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(pause_s)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        resume = ["--resume", kept]
    same(whole, replay(tape, load(config), out=tmp_path / "runs", resume=kept))
