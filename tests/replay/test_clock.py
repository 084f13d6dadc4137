"""Pacing: speeds as people write them, bursts that stay bursts, and how late frames are."""

from __future__ import annotations

import gc
import sys
import time
from itertools import pairwise

import pytest

from arbl2.errors import ConfigError
from arbl2_replay import replay
from arbl2_replay.clock import Pacer, Speed, punctual
from markets import FREE, Market, buy_binance, play, threshold

# ------------------------------------------------------------------------------------------------------------------ speed


@pytest.mark.parametrize(
    ("text", "factor", "shown"),
    [
        ("max", 0.0, "max"),
        ("MAX", 0.0, "max"),
        (" max ", 0.0, "max"),
        ("1x", 1.0, "1x"),
        ("1", 1.0, "1x"),
        ("10x", 10.0, "10x"),
        ("10X", 10.0, "10x"),
        ("0.5x", 0.5, "0.5x"),
        ("2.50", 2.5, "2.5x"),
        ("0.000001x", 1e-06, "1e-06x"),
        ("999999x", 999_999.0, "999999x"),
        ("007x", 7.0, "7x"),
    ],
)
def test_speeds_as_people_write_them(text, factor, shown):
    assert Speed.parse(text).factor == factor
    assert str(Speed.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "x",
            "0",
            "0x",
            "0.0",
            "0.000000x",
            "-1x",
            "+1x",
            ".5x",
            "5.x",
            "1e3",
            "1e3x",
            "nan",
            "inf",
            "1 x",
            "1xx",
            "1,5x",
        ),
        *("1000000x", "0.0000001x", "\u0661x", "1x\n2x", "maxx", "fast", "1x max", "9" * 5_000),
    ],
)
def test_what_is_no_speed_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not a speed\. Write 1x, 10x, 0\.5x or max"):
        Speed.parse(text)


# ------------------------------------------------------------------------------------------------------------------ pacer


def ticks(*times_ms):
    """Frames at these milliseconds."""
    market = Market()
    for ms in times_ms:
        market.rate(ms)
    return market.block()


def pieces(pacer, block):
    """The block in pieces, each when it is due."""
    at = 0
    while at < len(block):
        count = pacer.due(block.time_ns[at:])
        yield block.slice(at, at + count)
        at += count


def paced(pacer, *blocks):
    """(frames, seconds since the first call) of every piece."""
    started = time.monotonic()
    return [(len(piece), time.monotonic() - started) for block in blocks for piece in pieces(pacer, block)]


def test_as_fast_as_possible_is_one_piece_and_measures_nothing():
    pacer = Pacer(Speed.parse("max"))
    block = ticks(0, 10_000, 20_000)
    assert [len(piece) for piece in pieces(pacer, block)] == [3]
    assert pacer.lateness() is None


def test_frames_of_one_instant_are_handed_on_together():
    handed_on = paced(Pacer(Speed(0.2)), ticks(0, 0, 0, 60, 60, 120))
    assert [count for count, _ in handed_on] == [3, 2, 1]
    for (_, found), due in zip(handed_on, (0, 0.3, 0.6), strict=True):
        assert due - 0.002 <= found < due + 0.25


def test_a_burst_is_not_spread():
    """50 frames within 1 ms, then silence of 300 ms: the burst is over long before the frame after it."""
    handed_on = paced(Pacer(Speed(1.0)), ticks(*(k / 50 for k in range(50)), 300))
    assert sum(count for count, _ in handed_on) == 51
    assert handed_on[-1][0] == 1
    assert handed_on[-2][1] < 0.2
    assert handed_on[-1][1] >= 0.298


@pytest.mark.parametrize(("speed", "seconds"), [("1x", 0.6), ("2x", 0.3), ("10x", 0.06)])
def test_twice_the_speed_takes_half_the_time(speed, seconds):
    found = paced(Pacer(Speed.parse(speed)), ticks(*range(0, 601, 10)))[-1][1]
    assert seconds - 0.002 <= found < seconds + 0.25


def test_pieces_are_never_early_and_hold_every_frame_in_order():
    block = ticks(*range(0, 100, 7))
    pacer = Pacer(Speed(1.0))
    started = time.monotonic_ns()
    seqs = []
    for piece in pieces(pacer, block):
        now = time.monotonic_ns()
        assert now - started >= int(piece.time_ns[-1]) - int(block.time_ns[0]) - 2_000_000
        seqs += piece.seq.tolist()
    assert seqs == block.seq.tolist()


def test_pacing_goes_on_from_block_to_block():
    """The second block is due 300 ms after the first, however long the first took to work on."""
    pacer = Pacer(Speed(1.0))
    started = time.monotonic()
    for piece in pieces(pacer, ticks(0)):
        assert len(piece) == 1
        time.sleep(0.2)
    (last,) = [time.monotonic() - started for _ in pieces(pacer, ticks(300))]
    assert 0.298 <= last < 0.45


def test_a_frame_that_claims_to_be_earlier_does_not_hold_up_the_tape():
    handed_on = paced(Pacer(Speed(1.0)), ticks(50, 0, 60))
    assert sum(count for count, _ in handed_on) == 3
    assert handed_on[-1][1] < 0.1


def test_lateness_of_a_consumer_that_keeps_up():
    pacer = Pacer(Speed(1.0))
    paced(pacer, ticks(*range(0, 100, 5)))
    late = pacer.lateness()
    assert late.frames == 20
    assert 0 <= late.p50_ms <= late.p99_ms <= late.max_ms < 50


def test_lateness_of_a_consumer_that_does_not():
    """It takes 100 ms over the first of 100 frames that are 1 ms apart, so the others are 99 ms late down to nothing."""
    pacer = Pacer(Speed(1.0))
    handed_on = pieces(pacer, ticks(*range(100)))
    assert len(next(handed_on)) < 50
    time.sleep(0.1)
    assert sum(len(piece) for piece in handed_on) > 50
    late = pacer.lateness()
    assert late.frames == 100
    assert 90 <= late.max_ms < 200
    assert 40 <= late.p50_ms <= late.max_ms / 2 + 15
    assert late.p50_ms < late.p99_ms <= late.max_ms


def test_lateness_beyond_a_second_is_known_at_its_worst():
    pacer = Pacer(Speed(10.0))
    handed_on = pieces(pacer, ticks(0, 200))
    assert len(next(handed_on)) == 1
    time.sleep(1.1)
    assert [len(piece) for piece in handed_on] == [1]
    assert 1_079 <= pacer.lateness().max_ms < 1_500
    assert pacer.lateness().frames == 2


def test_standing_still_and_jumping():
    """Half of a gap before a stop of 200 ms, half after it; then the clock is put to the middle of another gap."""
    pacer = Pacer(Speed(1.0), wait=lambda seconds: time.sleep(min(seconds, 0.1)) or seconds > 0.1)
    block = ticks(0, 200, 1_000)
    assert pacer.due(block.time_ns) == 1
    assert pacer.due(block.time_ns[1:]) == 0
    pacer.hold()
    time.sleep(0.2)
    started = time.monotonic()
    while not pacer.due(block.time_ns[1:]):
        pass
    assert 0.05 <= time.monotonic() - started < 0.3
    pacer.jump(int(block.time_ns[2]) - 50_000_000)
    started = time.monotonic()
    assert pacer.due(block.time_ns[2:]) == 1
    assert 0.048 <= time.monotonic() - started < 0.3


def test_what_is_set_for_pacing_is_put_back():
    before = sys.getswitchinterval()
    found = []

    def work():
        found.append((sys.getswitchinterval() < before, gc.get_freeze_count() > 0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), punctual():
        work()
    assert found == [(True, True)]
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (before, 0)


# ------------------------------------------------------------------------------------------------- the run stays the same


def test_a_paced_run_is_the_same_run(tmp_path):
    market = Market()
    for ms in range(0, 400, 100):
        market.premium(ms)
    tape = market.write(tmp_path / "tape")
    fast, paced_run = replay(tape, threshold()), replay(tape, threshold(), speed="2x")
    assert paced_run.digest == fast.digest
    assert (fast.lateness, paced_run.lateness.frames) == (None, len(market.frames))
    assert 0.15 <= paced_run.elapsed_s < 2
    assert fast.kpi["decisions"] > 0


def test_the_engine_sees_no_clock():
    """A policy sees the times of the frames only, so blocks of one and of all give the same views."""
    outcome = play(Market().premium(0).premium(100).premium(200), {2: buy_binance(1)}, FREE)
    times = list(outcome.views)
    assert all(first < second for first, second in pairwise(times))
    assert times[-1] == 202
