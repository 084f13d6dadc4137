"""Paper runs on live feeds, with real processes: faults, kills, clean ends, and the proof that each run is its replay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import pytest

from arbl2.config import PolicyConfig, RunConfig
from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId
from arbl2.live_feed import MarketDataProvider, MultiExchangeL2Provider, live
from arbl2.tape import TapeReader, load_manifest, sessions, write_session
from arbl2_recorder import Endpoints, RecordConfig, recover
from arbl2_replay.journal import read_live_file
from arbl2_replay.verify import find_live_run, verify_live
from arbl2_replay.warm import warm_up

RUN_S = 32.0
LIMIT_S = 240
POLICY = ("--entry-bps", "12", "--tp-bps", "14")
FAULTS = ("drop=9", "close=9", "stall=8", "corrupt=3", "garbage=3", "truncate=4", "duplicate=4", "delay=6")
URLS = ("upbit_ws", "upbit_rest", "binance_ws", "binance_rest")


def arbl2(*words, cwd, **options):
    command = [sys.executable, "-m", "arbl2", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@contextlib.contextmanager
def exchange(folder, *options):
    """`arbl2 serve` with a lively market; yields its URLs as environment variables and as endpoints."""
    process = arbl2("serve", "--seed", "7", "--gap-every", "2", "--json", *options, cwd=folder)
    try:
        urls = json.loads(process.stdout.readline())
        yield {f"ARBL2_{name.upper()}": urls[name] for name in URLS}, Endpoints(**{name: urls[name] for name in URLS})
    finally:
        process.terminate()
        process.communicate()


def told(process):
    """What a process that has to end well printed."""
    out, errors = process.communicate(timeout=LIMIT_S)
    assert "Traceback" not in errors, errors
    return out, errors


def wait_for(check, seconds=60.0):
    limit = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < limit, "what the test waits for did not happen"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """No run here has to wait for the compiler."""
    warm_up()


@pytest.mark.timeout(LIMIT_S)
def test_a_run_among_faults_is_its_replay_killed_or_not(tmp_path):
    """Two runs of 32 s on servers that drop, stall and send rubbish: one is killed, one is told to end."""
    folders = [tmp_path / "killed", tmp_path / "ended"]
    options = [part for fault in FAULTS for part in ("--fault", fault)]
    with contextlib.ExitStack() as stack:
        processes = []
        for folder in folders:
            folder.mkdir()
            # this seed lets every kind strike in the first 30 s
            faults = (*options, "--fault-seed", "4", "--fault-log", str(folder / "faults.jsonl"))
            urls, _ = stack.enter_context(exchange(folder, *faults))
            processes.append(arbl2("live", *POLICY, "--json", cwd=folder, env={**os.environ, **urls}))
        wait_for(lambda: all(any(folder.glob("runs/*-live/live.json")) for folder in folders))
        began = time.monotonic()
        time.sleep(RUN_S)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].communicate()
        lasted_s = time.monotonic() - began
        processes[1].send_signal(signal.SIGTERM)
        out, _ = told(processes[1])
    for folder in folders:
        kinds = {json.loads(line)["kind"] for line in (folder / "faults.jsonl").read_text().splitlines()}
        assert kinds >= {"drop", "close", "stall", "corrupt", "garbage", "truncate"}
    _check_ended(folders[1], json.loads(out))
    _check_killed(folders[0], lasted_s)


def _check_ended(folder, result):
    assert not list(folder.glob("runs/*-live")), "a journal was left behind"
    assert result["ended"] == "signal"
    assert result["clean"]
    assert result["kpi"]["legs"] > 0
    assert sum(result["reconnects"].values()) > 0
    refused = {name for counts in result["reasons"].values() for name in counts}
    assert refused & {"not_json", "wrong_shape", "not_utf8"}, refused
    assert result["latency"]["frame"]["count"] == result["frames"]
    found = verify_live(folder / "tapes" / result["session"], runs=folder / "runs", cuts=2, jitters=2)
    assert found.same, found
    assert found.digest == result["digest"]
    assert len(found.cuts.seqs) == 2


def _check_killed(folder, lasted_s):
    assert lasted_s >= 30
    [session] = sessions(folder / "tapes")
    with pytest.raises(Exception, match="arbl2 recover"):
        verify_live(session, runs=folder / "runs")
    [report] = recover(folder / "tapes")
    assert report.frames_recovered > 500
    found = verify_live(session, runs=folder / "runs")
    assert found.same, found
    assert found.killed
    live_file = read_live_file(found.run)
    frames = load_manifest(session).rows
    # a mark a second, and what a kill costs the log besides; the machine may have stalled
    assert live_file.mark.fed.seq <= frames
    assert live_file.mark.fed.frames > frames * 0.8
    assert live_file.mark.rows["decisions"]["rows"] > 0
    assert live_file.mark.rows["fills"]["rows"] > 0


def test_the_commands_say_what_they_find(tmp_path):
    """A clean run on the mock market; then one byte of the tape is another."""
    limits = ("--duration", "5", "--symbols", "BTC,ETH")
    out, errors = told(arbl2("paper", "--l2-source", "mock", *limits, *POLICY, cwd=tmp_path))
    assert "paper run on" in errors
    assert "arrival of a frame to the order intent" in out
    [session] = sessions(tmp_path / "tapes")
    verified = arbl2("verify", session.name, "--truncate", "2", "--jitter-ties", "2", cwd=tmp_path)
    out, _ = told(verified)
    assert verified.returncode == 0
    assert "are the same" in out
    assert "cut at 2 random frames" in out
    assert "permuted 2 times" in out
    copied = tmp_path / "changed" / session.name
    middle = len(list(TapeReader(session).frames())) // 2
    altered = (
        replace(frame, payload=b"x" + frame.payload[1:]) if frame.seq == middle else frame
        for frame in TapeReader(session).frames()
    )
    write_session(copied, msgspec.structs.replace(load_manifest(session), segments=[]), altered)
    differs = arbl2("verify", str(copied), cwd=tmp_path)
    out, _ = told(differs)
    assert differs.returncode == 1
    assert "NOT the same" in out
    assert "differs  frames" in out
    assert "A is the live run, B the replay." in out
    segment = next((session / "segments").iterdir())
    body = bytearray(segment.read_bytes())
    body[len(body) // 3] ^= 1
    segment.write_bytes(body)
    refused = arbl2("verify", session.name, cwd=tmp_path)
    _, errors = told(refused)
    assert refused.returncode == 3
    assert segment.name in errors


def test_one_venue_alone_is_recorded_and_not_traded(tmp_path):
    venues = ("upbit", "binance")
    with exchange(tmp_path) as (urls, _):
        environment, limits = {**os.environ, **urls}, ("--duration", "3", "--json")
        for venue in venues:
            (tmp_path / venue).mkdir()
        processes = [arbl2("live", "--l2-source", venue, *limits, cwd=tmp_path / venue, env=environment) for venue in venues]
        results = [json.loads(told(process)[0]) for process in processes]
    for venue, result in zip(venues, results, strict=True):
        assert set(result["reasons"]) - {"-"} == {venue}
        assert result["kpi"]["legs"] == 0
        assert verify_live(tmp_path / venue / result["tape"], runs=tmp_path / venue / "runs").same


class Raises:
    """A policy with a mistake, once it has seen enough."""

    def __init__(self):
        self.seen = 0

    def decide(self, view):
        self.seen += 1
        if self.seen > 20:
            raise ZeroDivisionError(view.symbol)


def test_a_run_that_fails_does_not_end_the_recording(tmp_path):
    with exchange(tmp_path) as (_, endpoints):
        recording = RecordConfig(out=tmp_path / "tapes", endpoints=endpoints, duration_s=4.0)
        with pytest.raises(ZeroDivisionError):
            live(recording, RunConfig(), runs=tmp_path / "runs", policy=Raises())
    [session] = sessions(tmp_path / "tapes")
    manifest = load_manifest(session)
    assert manifest.state == "sealed"
    assert manifest.notes[-1] == "ended by duration"
    # what the run had seen until then is there, and true
    folder = find_live_run(session.name, None, tmp_path / "runs")
    assert read_live_file(folder).state == "running"


def test_books_can_be_pulled_while_the_run_goes_on(tmp_path):
    """The provider's books are those of the run; asking for them all the time changes nothing of it."""
    with exchange(tmp_path) as (_, endpoints):
        provider = MultiExchangeL2Provider(
            ("BTC", "ETH"),
            config=RunConfig(policy=PolicyConfig(entry_bps=12.0, tp_bps=14.0)),
            tapes=tmp_path / "tapes",
            runs=tmp_path / "runs",
            endpoints=endpoints,
            staleness_threshold_seconds=3.0,
            status_s=0.1,
        )
        keeps: MarketDataProvider = provider
        assert keeps.get_latest_snapshot("BTC") is None
        assert {status.state for status in provider.get_connection_status().values()} == {"stopped"}
        asyncio.run(keeps.astart())
        with pytest.raises(ConfigError, match="runs already"):
            provider.start()
        wait_for(lambda: all(status.state == "open" for status in provider.get_connection_status().values()))
        wait_for(lambda: provider.get_source_status("BTC") == dict.fromkeys(ExchangeId, "active"))
        taken_ns = []
        until = time.monotonic() + 4.0
        while time.monotonic() < until:
            asked_ns = time.perf_counter_ns()
            snapshot = provider.get_latest_snapshot("BTC")
            taken_ns.append(time.perf_counter_ns() - asked_ns)
            assert snapshot.symbol == "BTC"
            time.sleep(0.001)
        assert asyncio.run(keeps.aget_latest_snapshot("ETH")).per_exchange[ExchangeId.UPBIT].bids
        with pytest.raises(ConfigError, match="not one of BTC, ETH"):
            provider.get_latest_snapshot("DOGE")
        outcome = asyncio.run(keeps.astop())
    taken_ms = sorted(ns / 1e6 for ns in taken_ns)
    print(f"get_latest_snapshot, ms: median {taken_ms[len(taken_ms) // 2]:.3f}, p99 {taken_ms[len(taken_ms) * 99 // 100]:.3f}")
    assert taken_ms[len(taken_ms) // 2] < 1.0
    assert "active" not in provider.get_source_status("BTC").values()
    assert outcome.recording.clean
    found = verify_live(outcome.recording.path, outcome.live.run.run_dir)
    assert found.same, found
    assert provider.stop() is None


def test_a_provider_says_why_it_cannot_run(tmp_path):
    nobody = Endpoints(**{name: f"{'ws' if name.endswith('ws') else 'http'}://127.0.0.1:1/" for name in URLS})
    folders = {"tapes": tmp_path / "tapes", "runs": tmp_path / "runs"}
    provider = MultiExchangeL2Provider(("BTC",), **folders, endpoints=nobody, first_connect_s=0.5)
    with pytest.raises(Exception, match="no venue delivered anything"):
        provider.start()
    assert provider.stop() is None
