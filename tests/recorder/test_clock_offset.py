"""How far the wall clock is from true time: chrony's own words, the kernel's fields, and neither of them."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from arbl2_recorder import clock
from arbl2_recorder.clock import ClockOffset, chrony_offset, kernel_offset

# As chrony 4.3 printed them with -c: following a server (whose text form says "0.000001923 seconds fast of NTP time"),
# before its first answer, and serving its own clock.
FOLLOWING = (
    "7F000001,127.0.0.1,9,1795271840.154579380,-0.000001923,-0.000000032,0.000000704,-0.010,-0.001,0.236,"
    "0.000005260,0.000001652,0.3,Normal\n"
)
STARTING = "00000000,,0,0.000000000,0.000000000,0.000000000,0.000000000,0.000,0.000,0.000,1.000000000,1.000000000,0.0,"
STARTING += "Not synchronised\n"
LOCAL = "7F7F0101,,8,1795271799.718691788,0.000000000,0.000000000,0.000000000,0.000,0.000,0.000,0.000000000,0.000000000,"
LOCAL += "0.0,Normal\n"


def test_chrony_that_follows_a_server():
    assert chrony_offset(FOLLOWING) == ClockOffset(1_923, 4_282, synchronised=True, source="chrony")
    behind = chrony_offset(FOLLOWING.replace("-0.000001923", "0.250000000"))
    assert behind is not None
    assert behind.offset_ns == -250_000_000


@pytest.mark.parametrize("report", [STARTING, LOCAL])
def test_chrony_that_follows_nobody_is_not_synchronised(report):
    offset = chrony_offset(report)
    assert offset is not None
    assert not offset.synchronised


@pytest.mark.parametrize(
    "report",
    [
        "",
        "506 Cannot talk to daemon\n",
        FOLLOWING.replace("5260", "x"),
        FOLLOWING + FOLLOWING,
        FOLLOWING.replace("0.000001652", "nan"),
        FOLLOWING.replace("0.000001652", "inf"),
    ],
)
def test_other_words_say_nothing(report):
    assert chrony_offset(report) is None


def test_the_kernels_fields():
    nano, unsync = 0x2000, 0x0040
    assert kernel_offset(-1_500, 20, nano) == ClockOffset(1_500, 20_000, synchronised=True, source="kernel")
    assert kernel_offset(3, 16_000_000, unsync) == ClockOffset(-3_000, 16_000_000_000, synchronised=False, source="kernel")


def _chronyc(folder, script):
    path = folder / "chronyc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_chrony_is_asked_first_and_the_kernel_if_it_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    _chronyc(tmp_path, f'test "$*" = "-n -c tracking" && printf "%s" "{FOLLOWING.strip()}"')
    assert clock.offset() == chrony_offset(FOLLOWING)
    monkeypatch.setattr(clock, "_CHRONY_TIMEOUT_S", 0.2)
    for script in ('echo "506 Cannot talk to daemon"; exit 1', "exec sleep 30", r"printf '\377\376'"):
        _chronyc(tmp_path, script)
        found = clock.offset()
        assert found is None or found.source == "kernel"


@pytest.mark.skipif(sys.platform != "linux", reason="adjtimex is Linux's")
def test_this_kernel_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = clock.offset()
    if found is None:
        pytest.skip("this container does not let the kernel's clock be read")
    assert found.source == "kernel"
    assert abs(found.offset_ns) < 10**9
    assert 0 < found.error_ns <= 17 * 10**9
