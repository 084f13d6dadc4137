"""What is shown of a live run: on a terminal of any height, and in a pipe."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from arbl2.config import PolicyConfig, RunConfig
from arbl2.tape import TapeReader, load_manifest, write_session
from arbl2_replay.live import LiveRun
from arbl2_replay.live_view import TradingView, live_report, render
from arbl2_replay.synth import SynthConfig, synth_frames, synth_manifest

SYNTH = SynthConfig(seed=11, duration_s=8.0, excursion_every_s=2.0)


@dataclass
class Recorded:
    """What the view reads of a recorder's status."""

    session: str = "20260102T000000Z-1a2b"
    elapsed_s: float = 75.0
    frames: int = 600
    dropped: int = 0
    alarms: int = 2


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    manifest = synth_manifest(SYNTH)
    folder = tmp_path_factory.mktemp("tapes") / manifest.session
    write_session(folder, manifest, synth_frames(SYNTH))
    return folder


@pytest.fixture
def run(tape, tmp_path):
    """A run that has decided something and goes on."""
    run = LiveRun(RunConfig(policy=PolicyConfig(entry_bps=12.0, tp_bps=14.0)), tmp_path)
    run.begin(tape, load_manifest(tape), lambda: 10**9)
    run.take(list(TapeReader(tape).frames()))
    yield run
    run.abandon()


def lines(what, **options):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, **options)
    console.print(what)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("height", [12, 24, 60])
def test_the_view_fits_the_terminal(run, height):
    trading = run.look()
    shown = lines(render(Recorded(), trading, height), width=100, height=height)
    assert len(shown) < height
    text = "\n".join(shown)
    assert "BTC" in text
    assert ("XRP" in text) == (height > 12)
    assert ("more coins" in text) == (height == 12)
    assert "paper run, 1:15" in text
    assert f"{trading.kpi['decisions']:,} decisions, {trading.kpi['legs']:,} legs" in text
    assert trading.kpi["decisions"] > 0
    assert "refused" in text
    assert "p99" in text


def test_the_view_says_that_a_run_has_stopped(run):
    run.lost(ZeroDivisionError("a policy's mistake"))
    assert "the recording goes on: a policy's mistake" in "\n".join(lines(render(Recorded(), run.look()), width=120))


def test_a_pipe_gets_one_line(run):
    console = Console(file=io.StringIO(), width=100)
    with TradingView(run, console) as view:
        for _ in range(3):
            view(Recorded())
    assert console.file.getvalue() == "paper run on 20260102T000000Z-1a2b; Ctrl-C or SIGTERM ends it\n"


def test_a_terminal_is_drawn_on(run):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    with TradingView(run, console) as view:
        view(Recorded())
    assert "binance" in console.file.getvalue()


def test_the_report_has_figures_and_latencies(tape, tmp_path):
    run = LiveRun(RunConfig(policy=PolicyConfig(entry_bps=12.0, tp_bps=14.0)), tmp_path)
    assert run.look() is None
    run.begin(tape, load_manifest(tape), lambda: 10**9)
    run.take(list(TapeReader(tape).frames()))
    result = run.finish(tape, 8.0)
    text = "\n".join(lines(live_report(result), width=130))
    assert "arrival of a frame to the order intent" in text
    assert f"arbl2 verify {tape.name}" in text
    assert result.run.digest in text
    assert "Decisions and fills" in text
