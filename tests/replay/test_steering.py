"""Whatever is asked of a replay on the way, it is the same run: asked by programs, lines in a pipe, keys on a real terminal."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import arbl2_replay.course
from arbl2.config import load
from arbl2.errors import ConfigError, TapeError
from arbl2.frames import Anchor, FrameBlock
from arbl2_replay import replay
from arbl2_replay.checkpoint import Marks
from arbl2_replay.console import Keys, Lines
from arbl2_replay.moments import Moment
from arbl2_replay.steering import SESSION_BITS, Goal, Place, Steering
from markets import Market, at_ns, buy_binance, threshold

GOLDEN = Path(__file__).resolve().parents[2] / "datasets" / "golden" / "two-venue-60s"
TAPE = GOLDEN / "tape"
CONFIG = load(GOLDEN / "config.toml")
FRAMES = 3_465
WAIT_S = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return replay(TAPE, CONFIG, out=tmp_path_factory.mktemp("whole"))


@pytest.fixture
def many_marks(monkeypatch):
    """Checkpoints in memory as often as in a run of days."""
    monkeypatch.setattr(arbl2_replay.course, "Marks", functools.partial(Marks, every=100, most=8))


@contextmanager
def steered(tape=TAPE, config=CONFIG, *, paused=True, **options):
    """A replay in a thread, its wheel and its result to come."""
    steering = Steering(paused=paused)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(replay, tape, config, steering=steering, **options)
        try:
            yield steering, run
        finally:
            steering.stop()


def files(result):
    return {path.name: path.read_bytes() for path in result.run_dir.iterdir()}


# ------------------------------------------------------------------------------------------------------------------ programs


@pytest.mark.parametrize("seed", range(6))
def test_a_steered_run_is_the_undisturbed_run(whole, many_marks, tmp_path, seed):
    """Steps, and seeks forward and back by seq and by time, at random: the same digest, figures and files."""
    chance = random.Random(seed)
    with steered(out=tmp_path, speed=chance.choice(["max", "100x"]), block_rows=chance.choice([None, 1, 64])) as (steering, run):
        for _ in range(12):
            frames = chance.randrange(FRAMES)
            match chance.randrange(5):
                case 0:
                    before = steering.status().result(WAIT_S).frames
                    count = chance.choice([1, 7, 300])
                    assert steering.step(count).result(WAIT_S).frames == min(before + count, FRAMES)
                case 1:
                    assert steering.seek(f"+{chance.uniform(0, 60):.3f}s").result(WAIT_S).paused
                case _:
                    assert steering.seek(f"#{frames}").result(WAIT_S).seq == frames
        steering.resume()
        steering.set_speed("max")
        result = run.result(WAIT_S)
    assert (result.digest, result.kpi, result.frames) == (whole.digest, whole.kpi, FRAMES)
    assert (result.reasons, result.books, result.alarms, result.tape_s) == (
        whole.reasons,
        whole.books,
        whole.alarms,
        whole.tape_s,
    )
    assert files(result) == files(whole)


def test_what_was_delivered_is_the_prefix(many_marks):
    """Wherever a steered run is stopped, it ends as a run that was told to end there."""
    for seed in range(3):
        chance = random.Random(seed)
        seq = chance.randrange(100, FRAMES)
        with steered() as (steering, run):
            for _ in range(3):
                steering.seek(f"#{chance.randrange(FRAMES)}").result(WAIT_S)
            steering.seek(f"#{seq - 5}").result(WAIT_S)
            assert steering.step(5).result(WAIT_S).frames == seq
            assert steering.stop().result(WAIT_S).frames == seq
            stopped = run.result(WAIT_S)
        assert stopped.digest == replay(TAPE, CONFIG, until=f"#{seq}").digest


def test_until_while_it_runs():
    with steered() as (steering, run):
        steering.seek("#100").result(WAIT_S)
        with pytest.raises(ConfigError, match="Seek back first"):
            steering.until("#99").result(WAIT_S)
        steering.until("+30s").result(WAIT_S)
        steering.seek("end")
        assert run.result(WAIT_S).digest == replay(TAPE, CONFIG, until="+30s").digest


def test_a_paused_run_stays_at_the_end_and_can_go_back(whole, many_marks):
    with steered() as (steering, run):
        assert steering.seek("end").result(WAIT_S).frames == FRAMES
        assert steering.step().result(WAIT_S).frames == FRAMES
        assert steering.seek("#10").result(WAIT_S).frames == 10
        steering.set_speed("max")
        steering.resume()
        assert run.result(WAIT_S).digest == whole.digest


def test_a_seek_that_another_request_cuts_short():
    with steered() as (steering, run):
        first, second = steering.seek("+50s"), steering.seek("#20")
        assert first.result(WAIT_S).frames <= FRAMES
        assert second.result(WAIT_S).frames == 20
        steering.stop()
        assert run.result(WAIT_S).frames == 20


def test_a_pause_is_not_late(tmp_path):
    """A second of tape, a pause of two: not one frame is late by it, and none is skipped over."""
    market = Market()
    for ms in range(0, 1_000, 100):
        market.premium(ms)
    tape = market.write(tmp_path / "tape")
    started = time.monotonic()
    with steered(tape, threshold(), paused=False, speed="1x") as (steering, run):
        deadline = time.monotonic() + WAIT_S
        while steering.position is None or steering.position.frames < 9:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        at = steering.pause().result(WAIT_S)
        assert at.paused
        assert at.frames < len(market.frames)
        time.sleep(2.0)
        assert steering.status().result(WAIT_S).frames == at.frames
        assert not steering.resume().result(WAIT_S).paused
        result = run.result(WAIT_S)
    assert time.monotonic() - started >= 2.9
    assert result.lateness.frames == len(market.frames)
    assert result.lateness.max_ms < 1_800
    assert result.digest == replay(tape, threshold()).digest


def test_the_speed_can_change_in_the_middle_of_a_gap(tmp_path):
    """A minute of silence at 1x, cut short by 1000x."""
    tape = Market().premium(0).premium(60_000).write(tmp_path / "tape")
    with steered(tape, threshold(), paused=False, speed="1x") as (steering, run):
        assert steering.set_speed("1000x").result(WAIT_S).speed == "1000x"
        assert run.result(WAIT_S).frames == 6


def test_a_program_may_ask_from_many_threads(whole, many_marks):
    with steered() as (steering, run):

        def ask(seed):
            chance = random.Random(seed)
            for _ in range(10):
                steering.seek(f"#{chance.randrange(FRAMES)}").result(WAIT_S)
                steering.step(chance.randrange(1, 50)).result(WAIT_S)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(4)))
        steering.set_speed("max")
        steering.resume()
        assert run.result(WAIT_S).digest == whole.digest


class Counting:
    """A policy that looks back; with ``packs`` it can be kept."""

    def __init__(self):
        self.seen = []

    def decide(self, view):
        self.seen.append(view.seq)
        return buy_binance("0.01") if len(self.seen) % 50 == 0 else None


class Packing(Counting):
    def pack(self):
        return self.seen

    def unpack(self, packed):
        self.seen = list(packed)


def test_a_python_policy_goes_back_with_the_run(many_marks):
    alone, steered_one = Packing(), Packing()
    digest = replay(TAPE, CONFIG, policy=alone).digest
    with steered(policy=steered_one) as (steering, run):
        for seq in (900, 300, 1_200, 150):
            steering.seek(f"#{seq}").result(WAIT_S)
        steering.set_speed("max")
        steering.resume()
        assert run.result(WAIT_S).digest == digest
    assert steered_one.seen == alone.seen


def test_a_python_policy_that_cannot_be_kept_goes_forward_only():
    digest = replay(TAPE, CONFIG, policy=Counting()).digest
    with steered(policy=Counting()) as (steering, run):
        steering.seek("#500").result(WAIT_S)
        with pytest.raises(ConfigError, match=r"Counting cannot be kept.*pack\(\)"):
            steering.seek("#300").result(WAIT_S)
        assert steering.seek("#600").result(WAIT_S).frames == 600
        steering.set_speed("max")
        steering.resume()
        assert run.result(WAIT_S).digest == digest


def test_a_resumed_run_goes_back_to_its_checkpoint_and_no_further(whole, tmp_path):
    replay(TAPE, CONFIG, until="#1000", checkpoint=tmp_path / "kept")
    with steered(resume=tmp_path / "kept", out=tmp_path / "runs") as (steering, run):
        steering.seek("#2000").result(WAIT_S)
        with pytest.raises(ConfigError, match="before the checkpoint"):
            steering.seek("#999").result(WAIT_S)
        assert steering.seek("#1000").result(WAIT_S).frames == 1_000
        steering.set_speed("max")
        steering.resume()
        assert files(run.result(WAIT_S)) == files(whole)


def test_a_stopped_run_with_a_checkpoint_goes_on_later(whole, many_marks, tmp_path):
    """Stopped after a seek back: rows that were written before, beyond the checkpoint, do not count."""
    with steered(out=tmp_path / "runs", checkpoint=tmp_path / "kept") as (steering, run):
        steering.seek("#3000").result(WAIT_S)
        steering.seek("#1234").result(WAIT_S)
        steering.stop()
        assert run.result(WAIT_S).checkpoint == tmp_path / "kept"
    assert files(replay(TAPE, CONFIG, resume=tmp_path / "kept", out=tmp_path / "runs")) == files(whole)


def test_a_decoded_store_is_steered_alike(whole, many_marks, tmp_path):
    shutil.copytree(TAPE, tmp_path / "tape")
    chance = random.Random(5)
    with steered(tmp_path / "tape", decoded=True, out=tmp_path / "runs", checkpoint=tmp_path / "kept") as (steering, run):
        for _ in range(8):
            seq = chance.randrange(FRAMES)
            assert steering.seek(f"#{seq}").result(WAIT_S).seq == seq
            steering.step(chance.randrange(1, 9)).result(WAIT_S)
        steering.seek("#777").result(WAIT_S)
        steering.stop()
        assert run.result(WAIT_S).frames == 777
    result = replay(tmp_path / "tape", CONFIG, decoded=True, out=tmp_path / "runs", resume=tmp_path / "kept")
    assert (result.digest, result.kpi) == (whole.digest, whole.kpi)
    assert [files(result)[name] == files(whole)[name] for name in ("decisions.parquet", "fills.parquet")] == [True, True]


def test_several_sessions_are_steered_as_one_run(many_marks, tmp_path):
    """Overlapping sessions: their frames take turns, and a seq may mean a frame of either."""
    tapes = []
    for number, begin in enumerate((0, 50)):
        market = Market()
        for ms in range(begin, begin + 5_000, 100):
            market.premium(ms)
        tapes.append(market.write(tmp_path / f"tape-{number}", f"session-{number}"))
    whole = replay(tapes, threshold(), out=tmp_path / "whole")
    frames = 2 * len(market.frames)
    chance = random.Random(6)
    with steered(tapes, threshold(), out=tmp_path / "runs") as (steering, run):
        for _ in range(6):
            seq = chance.randrange(1, frames // 2) + (chance.randrange(2) << SESSION_BITS)
            at = steering.seek(f"#{seq}").result(WAIT_S)
            assert at.frames == replay(tapes, threshold(), until=f"#{seq}").frames
            steering.seek(f"+{chance.randrange(5_100)}ms").result(WAIT_S)
        steering.set_speed("max")
        steering.resume()
        result = run.result(WAIT_S)
    assert (result.frames, whole.frames) == (frames, frames)
    assert files(result) == files(whole)


def test_nothing_waits_for_a_run_that_is_over():
    class Broken:
        def decide(self, view):
            raise ZeroDivisionError

    with steered(policy=Broken()) as (steering, run):
        with pytest.raises(ConfigError, match="ended on the way"):
            steering.seek("end").result(WAIT_S)
        with pytest.raises(ZeroDivisionError):
            run.result(WAIT_S)
        with pytest.raises(ConfigError, match="is over"):
            steering.pause().result(WAIT_S)
    with steered(tape=GOLDEN) as (steering, run):
        with pytest.raises(ConfigError, match="is over"):
            steering.seek("end").result(WAIT_S)
        assert run.exception() is not None


def test_a_tape_that_breaks_under_a_seek_back_leaves_nobody_waiting(many_marks, tmp_path):
    shutil.copytree(TAPE, tmp_path / "tape")
    with steered(tmp_path / "tape", decoded=False) as (steering, run):
        steering.seek("#500").result(WAIT_S)
        shutil.rmtree(tmp_path / "tape")
        with pytest.raises(ConfigError, match="ended on the way"):
            steering.seek("#100").result(WAIT_S)
        with pytest.raises(TapeError):
            run.result(WAIT_S)


def test_what_cannot_be_asked_is_refused():
    steering = Steering()
    with pytest.raises(ConfigError, match="leads nowhere"):
        steering.step(0)
    with pytest.raises(ConfigError, match="is not a speed"):
        steering.set_speed("fast")
    with pytest.raises(ConfigError, match="is no instant"):
        steering.seek("yesterday")
    asked = steering.pause()
    assert asked.cancel()
    assert steering.next_request() is None


# ------------------------------------------------------------------------------------------------------- goals over sessions


def block_of(*frames):
    """Frames of (session, seq, time in ms)."""
    block = FrameBlock.from_frames(Market().rate(0).frames * len(frames), Anchor(0, 0))
    seq = np.array([(session << SESSION_BITS) + number for session, number, _ in frames], np.int64)
    return dataclasses.replace(block, seq=seq, time_ns=np.array([at_ns(ms) for *_, ms in frames], np.int64))


def test_a_seq_means_a_frame_of_its_session():
    block = block_of((0, 1, 0), (1, 1, 1), (0, 2, 2), (1, 2, 3), (1, 3, 4), (0, 3, 5))
    first = at_ns(0)
    assert Goal.of(Moment.parse("#2"), first).rows(block) == 5
    assert Goal.of(Moment.parse(f"#{(1 << SESSION_BITS) + 2}"), first).rows(block) == 4
    assert Goal.of(Moment.parse("+3ms"), first).rows(block) == 4
    assert Goal.of(Moment.parse("end"), first).rows(block) == 6
    place = Place().after(block)
    assert place == Place(6, at_ns(5), {0: 3, 1: (1 << SESSION_BITS) + 3})
    assert not Goal.of(Moment.parse("#3"), first).is_behind(place)
    assert Goal.of(Moment.parse(f"#{(1 << SESSION_BITS) + 2}"), first).is_behind(place)
    assert Goal.of(Moment.parse("+4ms"), first).is_behind(place)
    assert not Goal.of(Moment.parse("+5ms"), first).is_behind(place)


def test_a_time_ends_before_the_first_frame_beyond_it():
    """Engine time of foreign captures may step back; what comes after the first later frame is later too."""
    block = block_of((0, 1, 0), (0, 2, 7), (0, 3, 2), (0, 4, 9))
    assert Goal.of(Moment.parse("+5ms"), at_ns(0)).rows(block) == 1
    assert Place().after(block.slice(0, 3)).last_ns == at_ns(7)


# --------------------------------------------------------------------------------------------------------------------- lines


def test_lines_are_answered_in_order(whole):
    said = []
    steering = Steering(paused=True)
    lines = Lines(steering, said.append)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(replay, TAPE, CONFIG, steering=steering)
        lines.read(b"step 5\nseek +10")
        lines.read(b"s\n\n  seek #7  \nstep x\nnonsense\nseek\nspeed 10 x\npause now\nuntil #3\n" + b"a" * 5_000)
        lines.read(b"\nspeed max")
        lines.read(b"")
        steering.resume()
        assert run.result(WAIT_S).digest == whole.digest
    assert [(answer["ok"], answer.get("seq")) for answer in said[:3]] == [(True, 5), (True, 608), (True, 7)]
    assert said[0]["time"] == "2026-01-02T00:00:00.166000000Z"
    assert [answer["ok"] for answer in said] == [True] * 3 + [False] * 7 + [True]
    assert all(len(answer["error"]) < 300 for answer in said[3:-1])
    assert json.dumps(said)


def start(*arguments, cwd, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "arbl2", "replay", str(TAPE), "--config", str(GOLDEN / "config.toml"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1"},
        **options,
    )


def test_a_script_steers_by_a_pipe(tmp_path, whole):
    with start("-i", cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        assert ask("status")["frames"] == 0
        assert ask("seek +20s")["paused"] is True
        assert ask("seek #100")["frames"] == 100
        assert ask("step 3")["seq"] == 103
        assert ask("speed 1x")["speed"] == "1x"
        assert ask("resume")["paused"] is False
        assert ask("pause")["paused"] is True
        assert "is no command" in ask("fly")["error"]
        assert ask("speed max")["ok"]
        assert ask("resume")["ok"]
        out, _ = process.communicate(timeout=WAIT_S)
    assert json.loads(out)["digest"] == whole.digest
    assert process.returncode == 0


def test_a_replay_goes_on_when_its_script_has_ended(tmp_path, whole):
    commands = "step 3\nseek +10s"
    with start("-i", "-x", "1000x", cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(commands, timeout=WAIT_S)
    assert json.loads(out.splitlines()[-1])["digest"] == whole.digest
    assert len(out.splitlines()) == 1 + len(commands.splitlines())


# ------------------------------------------------------------------------------------------------------------------ terminal


class Terminal:
    """`arbl2 replay -i` on a terminal of its own."""

    def __init__(self, *arguments, cwd):
        command = [sys.executable, "-m", "arbl2", "replay", "-i", *map(str, arguments)]
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
            os.chdir(cwd)
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"})
        self.before = termios.tcgetattr(self.fd)

    def until(self, *words):
        """Read until all of these were shown since the last call."""
        deadline = time.monotonic() + WAIT_S
        seen = ""
        while not all(word in seen for word in words):
            assert time.monotonic() < deadline, f"{words} not in {seen[-2000:]}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    seen += os.read(self.fd, 65_536).decode("utf-8", "replace")
                except OSError:  # it has ended
                    raise AssertionError(f"{words} not in {seen[-2000:]}") from None
        self.seen += seen

    def press(self, keys):
        os.write(self.fd, keys)

    def is_raw(self):
        return not termios.tcgetattr(self.fd)[3] & (termios.ECHO | termios.ICANON)

    def end(self):
        """Exit code, once it has ended; the terminal must be as it was."""
        deadline = time.monotonic() + WAIT_S
        while select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                self.seen += os.read(self.fd, 65_536).decode("utf-8", "replace")
            except OSError:  # nobody has the terminal any more
                break
        else:
            os.kill(self.pid, signal.SIGKILL)
        ended = os.waitpid(self.pid, 0)
        after = termios.tcgetattr(self.fd)
        os.close(self.fd)
        assert after == self.before
        assert self.seen.count("\x1b[?25l") == self.seen.count("\x1b[?25h"), "the cursor is hidden"
        return os.waitstatus_to_exitcode(ended[1])


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(TAPE, tmp_path / "tape")
    return tmp_path


def test_keys_on_a_terminal(copied, whole):
    at = Terminal("tape", "--config", GOLDEN / "config.toml", cwd=copied)
    at.until("playing", "1x", "BTC", "sell Upbit", "space pause")
    assert at.is_raw()
    at.press(b" ")
    at.until("paused")
    at.press(b"g+20s\r")
    at.until("2026-01-02 00:00:20.000")
    at.press(b"g#1000\x7f1\r")
    at.until("#1,001")
    at.press(b"n")
    at.until("#1,002")
    at.press(b"\x1b[C")
    at.until("#1,003")
    at.press(b"]")
    at.until("2026-01-02 00:00:27.")
    at.press(b"[")
    at.until("2026-01-02 00:00:17.")
    at.press(b"gnonsense\r")
    at.until("is no instant")
    at.press(b"g\x1b")
    at.press(b"++")
    at.until("5x")
    at.press(b"--")
    at.until("1x")
    at.press(b"g#600\r")
    at.until("#600")
    at.press(b"q")
    assert at.end() == 0
    assert f"digest  {replay(TAPE, CONFIG, until='#600').digest}" in at.seen


@pytest.mark.parametrize(("how", "code"), [("ctrl-c", 130), ("term", 143), ("error", 5)])
def test_the_terminal_is_put_back(copied, how, code):
    (copied / "file").write_text("")
    at = Terminal("tape", *(("--out", "file/runs") if how == "error" else ()), cwd=copied)
    if how != "error":
        at.until("playing")
        assert at.is_raw()
    if how == "ctrl-c":
        at.press(b"\x03")
    elif how == "term":
        os.kill(at.pid, signal.SIGTERM)
    assert at.end() == code
    assert not list(copied.glob("runs/.part-*"))


def test_keys_that_mean_nothing_do_nothing():
    shown = []
    steering = Steering()
    keys = Keys(steering, shown.append)
    keys.draw()
    for body in (b"x\x00\xff\xc3\xa9\x1b[Z\x1b", b" ][+-", b"g" + b"9" * 200 + b"\xff\x1b[C\x1b"):
        keys.read(body)
    assert (shown, steering.next_request()) == ([], None)
    keys.read(b"gsoon\rnq")
    assert [steering.next_request().name for _ in range(2)] == ["step", "stop"]
    assert steering.next_request() is None
