"""Watching a recorder: the live view, JSON lines, Prometheus, health."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from arbl2.cli import app
from arbl2.errors import ConfigError
from arbl2_recorder import RecordResult, Status, VenueStatus, clock, record
from arbl2_recorder.clock import ClockOffset
from arbl2_recorder.health import STATUS_FILE, health, holder, write_status
from arbl2_recorder.ledger import Cause
from arbl2_recorder.live import Aside, JsonLines, LiveView, render
from arbl2_recorder.metrics import Metrics
from arbl2_recorder.report import result_report
from arbl2_recorder.status import QueueDelay, StreamStatus, as_json
from arbl2_recorder.storage import RootLock

ROOT = Path(__file__).resolve().parents[2]
UPBIT = VenueStatus("upbit", "open", 2, 1234, 99_000, 12.5, 0.1, "", open_connections=1, reconnects=1)
BINANCE = VenueStatus("binance", "waiting", 3, 7, 10, 0.0, 3.0, "refused", open_connections=0, reconnects=2)
STATUS = Status(
    session="20261121T113443Z-0a1b",
    phase="recording",
    elapsed_s=3725.0,
    venues=(UPBIT, BINANCE),
    frames=1300,
    queued_bytes=2048,
    logged_bytes=3 * 2**20,
    sealed_bytes=512,
    segments=4,
    waiting_logs=1,
    dropped=5,
    alarms=1,
    last_alarm="binance connection 2: no ack",
    streams=(
        StreamStatus("upbit", "KRW-BTC", 1234, 12.5, 0.1),
        StreamStatus("binance", "btcusdt@depth20@100ms", 7, 0.0, None),
    ),
    queue=QueueDelay(150, 2_500, 40_000),
    late_frames=6,
    gaps={"reconnect": 2, "sequence": 1},
    last_gap="binance BTCUSDT: 12 ids missed",
    shipped_segments=3,
    disk_free_bytes=5 * 2**30,
    clock=ClockOffset(-1_500_000, 300_000, synchronised=True, source="chrony"),
    wall_ns=1_795_000_000_000_000_000,
)
RESULT = RecordResult(
    session=STATUS.session,
    path=Path("tapes") / STATUS.session,
    frames=123_456_789,
    payload_bytes=10 * 2**30,
    sealed_bytes=2**30,
    messages={"upbit": 61_234_567, "binance": 61_234_567},
    counts={"upbit.opened": 3, "binance.opened": 12},
    alarms={"clock_step": 1},
    silent=("krw-nothing",),
    longest_silence_s={"upbit": 1.0, "binance": 12_345.6},
    dropped=0,
    duration_s=86_400.0,
    ended="signal",
    clean=True,
    recovered=(),
    queue=STATUS.queue,
    late_frames=6,
    gaps=STATUS.gaps,
    reconnects={"upbit": 2, "binance": 11},
)


def drawn(what, width=80):
    said = io.StringIO()
    Console(file=said, width=width).print(what)
    return said.getvalue()


def wait_for(check, timeout_s=30.0):
    limit = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < limit, "what the test waits for did not happen"
        time.sleep(0.01)
    return found


# ---------------------------------------------------------------------------------------------------------------- live view


def test_the_view_shows_everything_on_80_columns():
    shown = drawn(render(STATUS))
    for words in (
        "KRW-BTC",
        "btcusdt@depth20@100ms",
        "1,234",
        "waiting: refused",
        "1:02:05",
        "queue 2.0 KiB",
        "free 5.0 GiB",
        "delay p50 0.15  p99 2.50  max 40.00 ms",
        "dropped 5",
        "late 6",
        "gaps 3",
        "clock -1.5 ms",
        "12 ids missed",
        "sealed 512 B in 4",
        "shipped 3",
        "no ack",
    ):
        assert words in shown, words
    rows = re.findall(r"^(upbit|binance) +(open|waiting) .* (\d+) +(\d+)$", shown, re.MULTILINE)
    assert rows == [("upbit", "open", "1", "1"), ("binance", "waiting", "0", "2")]
    unknown = drawn(render(replace(STATUS, clock=ClockOffset(0, 0, synchronised=False, source="kernel"), disk_free_bytes=None)))
    assert "clock not synchronised" in unknown
    assert "free" not in unknown


@pytest.mark.parametrize("height", [10, 16, 24, 50])
def test_many_symbols_keep_the_view_within_the_terminal(height):
    streams = tuple(StreamStatus("upbit", f"KRW-C{i:03d}", i, 1.0, 0.5 + (i % 7) / 10) for i in range(300))
    quiet = StreamStatus("binance", "quiet@depth", 5, 0.0, 70.0)
    never = StreamStatus("binance", "never@depth", 0, 0.0, None)
    status = replace(STATUS, streams=(*streams, quiet, never), last_alarm="long " * 100, last_gap="long " * 100)
    status = replace(status, venues=(UPBIT, replace(BINANCE, problem="long " * 100)))
    lines = drawn(render(status, height)).splitlines()
    assert len(lines) <= max(height - 1, 11)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    shown = len(re.findall(r"^  \S", text, re.MULTILINE))
    assert f"and {302 - shown} streams that are less quiet" in text
    if shown >= 2:
        assert "quiet@depth" in text
        assert "never@depth" in text
    few = drawn(render(replace(STATUS, streams=streams[:3]), height))
    assert ("less quiet" in few) == (height < 14)
    assert "btcusdt@depth20@100ms" in drawn(render(STATUS, height)) or height < 14


def test_words_of_a_venue_cannot_steer_the_terminal():
    evil = "\x1b[2J\x1b]0;owned\x07\r\nnext"
    status = replace(
        STATUS,
        last_alarm=evil,
        last_gap=evil,
        venues=(replace(BINANCE, problem=evil),),
        streams=(StreamStatus("binance", evil, 1, 1.0, 1.0),),
    )
    assert not set(drawn(render(status))) & {"\x1b", "\x07", "\r"}
    assert not set(drawn(result_report(replace(RESULT, silent=(evil,))))) & {"\x1b", "\x07", "\r"}


def test_the_result_fits_80_columns_and_says_what_was_noticed():
    shown = drawn(result_report(RESULT))
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    for words in (
        "p50 0.15, p99 2.50, max 40.00 ms",
        "6 frames came late",
        "reconnects: upbit 2, binance 11",
        "gaps: reconnect 2, sequence 1",
        "alarms: clock_step 1",
    ):
        assert words in text, words
    few = replace(RESULT, payload_bytes=2_048, sealed_bytes=1_024, late_frames=1, messages={"upbit": 5, "binance": 0})
    told = " ".join(drawn(result_report(replace(few, sessions=("a", "b", "c")))).split())
    assert "2.0 KiB raw, 1.0 KiB sealed, 2.0 times smaller, in 3 sessions" in told
    assert "1 frame came late" in told
    assert "binance sent nothing" in told
    assert "upbit sent nothing" not in told
    quiet = drawn(result_report(replace(RESULT, gaps={}, reconnects={"upbit": 0})))
    assert "gaps" not in quiet
    assert "reconnects" not in quiet


# -------------------------------------------------------------------------------------------------------------------- aside


def test_a_viewer_that_hangs_or_breaks_never_delays_the_recorder():
    release, seen = threading.Event(), []

    def slow(status):
        seen.append(status.frames)
        release.wait(30)

    def broken(status):
        raise BrokenPipeError(status.session)

    with Aside(broken, slow) as aside:
        aside(STATUS)
        wait_for(lambda: seen)
        before = time.monotonic()
        for frames in range(10_000):
            aside(replace(STATUS, frames=frames))
        assert time.monotonic() - before < 10
        release.set()
        wait_for(lambda: len(seen) > 1)
    assert seen[:2] == [1300, 9_999]


def test_the_last_status_is_shown_before_the_end():
    seen = []
    with Aside(seen.append) as aside:
        aside(STATUS)
    assert seen == [STATUS]


# --------------------------------------------------------------------------------------------------------------- JSON lines


def test_json_lines_are_one_a_second_and_the_result():
    read, write = os.pipe()
    lines = JsonLines(write)
    for tenth in range(25):
        lines(replace(STATUS, elapsed_s=tenth / 10))
    lines(replace(STATUS, elapsed_s=2.45, phase="sealing"))
    lines.result(RESULT)
    os.close(write)
    with os.fdopen(read) as reader:
        said = [json.loads(line) for line in reader]
    assert [line["type"] for line in said] == ["status"] * 4 + ["result"]
    assert [line["elapsed_s"] for line in said[:4]] == [0.0, 1.0, 2.0, 2.45]
    first = said[0]
    assert first["streams"][1] == {
        "venue": "binance",
        "name": "btcusdt@depth20@100ms",
        "messages": 7,
        "rate_per_s": 0.0,
        "last_message_s": None,
    }
    assert first["queue"] == {"p50_us": 150, "p99_us": 2500, "max_us": 40000}
    assert first["clock"] == {"offset_ns": -1500000, "error_ns": 300000, "synchronised": True, "source": "chrony"}
    assert said[-1]["path"] == str(RESULT.path)
    assert said[-1]["gaps"] == {"reconnect": 2, "sequence": 1}


def test_a_reader_that_left_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    lines = JsonLines(write)
    with pytest.raises(BrokenPipeError):
        lines(STATUS)
    lines.result(RESULT)
    os.close(write)


def test_a_line_of_any_length_arrives_whole():
    read, write = os.pipe()
    streams = tuple(StreamStatus("upbit", f"KRW-{i}", i, 1.0, None) for i in range(20_000))
    status, got = replace(STATUS, streams=streams), []
    with os.fdopen(read, "rb") as reader:
        thread = threading.Thread(target=lambda: got.append(reader.readline()))
        thread.start()
        JsonLines(write)(status)
        thread.join(30)
    os.close(write)
    assert got == [as_json(status)]


# ------------------------------------------------------------------------------------------------------------------ metrics


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return text, {name: float(value) for name, value in values.items()}


def test_prometheus_reads_the_newest_status():
    with Metrics(0) as metrics:
        _, before = scraped(metrics.port)
        assert not any(name.startswith("arbl2_") for name in before)
        metrics(STATUS)
        metrics(replace(STATUS, frames=1301))
        text, values = scraped(metrics.port)
    expected = {
        "arbl2_frames_total": 1301,
        'arbl2_messages_total{stream="KRW-BTC",venue="upbit"}': 1234,
        'arbl2_last_message_age_seconds{stream="KRW-BTC",venue="upbit"}': 0.1,
        'arbl2_venue_messages_total{venue="upbit"}': 1234,
        'arbl2_reconnects_total{venue="binance"}': 2,
        'arbl2_queue_delay_seconds{quantile="0.99"}': 0.0025,
        'arbl2_gaps_total{cause="reconnect"}': 2,
        "arbl2_late_frames_total": 6,
        "arbl2_dropped_messages_total": 5,
        "arbl2_disk_free_bytes": 5 * 2**30,
        "arbl2_clock_offset_seconds": -0.0015,
        "arbl2_clock_synchronised": 1,
        'arbl2_session_info{phase="recording",session="20261121T113443Z-0a1b"}': 1,
    }
    assert {name: values.get(name) for name in expected} == expected
    assert 0 <= values["arbl2_status_age_seconds"] < 60
    # a stream that has said nothing has no age
    assert 'arbl2_last_message_age_seconds{stream="btcusdt@depth20@100ms",venue="binance"}' not in values
    assert "# TYPE arbl2_messages_total counter" in text
    assert "# TYPE arbl2_queue_delay_seconds gauge" in text


def test_what_the_machine_does_not_say_is_no_metric():
    with Metrics(0) as metrics:
        metrics(replace(STATUS, clock=None, disk_free_bytes=None, gaps={}, streams=()))
        _, values = scraped(metrics.port)
    assert not any(name.startswith(("arbl2_clock", "arbl2_disk", "arbl2_messages")) for name in values)
    assert values["arbl2_frames_total"] == 1300
    # but a cause that never came is one that came 0 times
    assert {name: values.get(f'arbl2_gaps_total{{cause="{name}"}}') for name in Cause} == dict.fromkeys(Cause, 0.0)


def test_what_is_not_shipped_is_seen_everywhere(root):
    reason = "s3://bucket/tapes cannot be used: no route"
    shown = drawn(render(replace(STATUS, ship_problem=reason)))
    assert f"NOT shipped: {reason}" in shown
    assert "NOT shipped" not in drawn(render(STATUS))
    told = drawn(result_report(replace(RESULT, shipped_segments=1, ship_problem=reason)))
    assert "shipped: 1 segment\n" in told
    assert f"NOT shipped: {reason}" in told
    assert "shipped" not in drawn(result_report(RESULT))
    with Metrics(0) as metrics:
        metrics(STATUS)
        before = scraped(metrics.port)[1]["arbl2_ship_problem"]
        metrics(replace(STATUS, ship_problem=reason))
        assert (before, scraped(metrics.port)[1]["arbl2_ship_problem"]) == (0, 1)
    write_status(root, replace(FRESH, ship_problem=reason))
    found = health(root, max_age_s=60.0, min_free_bytes=1)
    assert found.healthy
    assert found.sentence() == f"healthy: {STATUS.session}; warning: not shipped: {reason}"


def test_two_recorders_in_one_process_and_a_port_that_is_taken():
    with Metrics(0) as first, Metrics(0) as second:
        first(STATUS)
        second(replace(STATUS, frames=1))
        assert scraped(first.port)[1]["arbl2_frames_total"] == 1300
        assert scraped(second.port)[1]["arbl2_frames_total"] == 1
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{first.port}.*Choose another port"), Metrics(first.port):
            pass
    with socket.create_server(("127.0.0.1", first.port)):
        pass  # free again


def test_metrics_without_the_library_say_what_to_install():
    script = "import sys; sys.modules['prometheus_client'] = None\nfrom arbl2.errors import ConfigError\n"
    script += "try: import arbl2_recorder.metrics\nexcept ConfigError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'arbl2[metrics]'" in done.stdout


def test_the_library_is_imported_only_when_it_is_used():
    script = "import sys, arbl2_recorder, arbl2_recorder.live, arbl2_recorder.health; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------------------- health


@pytest.fixture
def root(tmp_path):
    """A root folder that this process holds, as a recorder would."""
    with RootLock(tmp_path):
        yield tmp_path


FRESH = replace(STATUS, venues=(UPBIT,), dropped=0)


def test_a_recorder_that_is_well(root):
    write_status(root, FRESH)
    found = health(root, min_free_bytes=1)
    assert (found.healthy, found.reasons, found.session) == (True, (), STATUS.session)
    assert found.sentence() == f"healthy: {STATUS.session}"
    assert [path.name for path in root.iterdir() if path.name.endswith(".part")] == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (replace(FRESH, venues=(UPBIT, replace(UPBIT, name="binance", last_message_s=61.0))), "binance has been silent for 61 s"),
        (replace(FRESH, venues=(replace(BINANCE, last_message_s=None),)), r"silent for 3725 s \(waiting: refused\)"),
        (replace(FRESH, dropped=12, last_drop_s=3.0), "messages are being dropped, 12 so far"),
    ],
)
def test_what_is_wrong_is_said(root, status, reason):
    write_status(root, status)
    [said] = health(root, min_free_bytes=1).reasons
    assert re.search(reason, said)


@pytest.mark.parametrize(
    "status",
    [
        replace(FRESH, elapsed_s=5.0, venues=(replace(UPBIT, last_message_s=None),)),
        replace(FRESH, phase="sealing", venues=(replace(UPBIT, last_message_s=900.0),)),
        replace(FRESH, dropped=12, last_drop_s=3_600.0),
    ],
    ids=["starting", "sealing", "recovered"],
)
def test_what_is_no_illness(root, status):
    write_status(root, status)
    assert health(root, min_free_bytes=1).healthy


def test_an_old_status_and_a_full_disk(root, monkeypatch):
    write_status(root, FRESH)
    found = health(root, max_age_s=0.0, min_free_bytes=2**62)
    assert "the recorder or its disk hangs" in found.reasons[0]
    assert re.search(r"only .* of disk are free", found.reasons[1])
    now_ns = clock.mono_ns()
    monkeypatch.setattr(clock, "mono_ns", lambda: now_ns - 10**12)
    assert "an earlier boot" in health(root).sentence()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"{}", b'{"pid":"x"}', b'{"pid":1,"wall_ns":1,"mono_ns":1}']
)
def test_a_status_that_cannot_be_read(root, content):
    (root / STATUS_FILE).write_bytes(content)
    assert "cannot be read" in health(root).sentence()


def test_before_the_first_status_and_after_another_recorder(root):
    assert "has not written its status yet" in health(root).sentence()
    write_status(root, FRESH)
    text = (root / STATUS_FILE).read_text()
    (root / STATUS_FILE).write_text(text.replace(f'"pid":{os.getpid()}', '"pid":1'))
    assert "has not written its status yet" in health(root).sentence()


def test_no_recorder_at_all(tmp_path):
    assert "no recorder is running" in health(tmp_path).sentence()
    (tmp_path / ".recorder.lock").write_text("not a number")
    assert holder(tmp_path) is None
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        pass
    (tmp_path / ".recorder.lock").write_text(f"{gone.pid}\n")
    write_status(tmp_path, FRESH)
    assert "no recorder is running" in health(tmp_path).sentence()


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path):
    write_status(tmp_path / "gone", FRESH)


def test_a_reader_never_sees_half_a_status(root):
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(health(root, max_age_s=60.0, min_free_bytes=1).reasons)

    write_status(root, FRESH)
    thread = threading.Thread(target=read)
    thread.start()
    for frames in range(300):
        write_status(root, replace(FRESH, frames=frames, last_alarm="x" * frames))
    stop.set()
    thread.join()
    assert set(seen) == {()}


# ----------------------------------------------------------------------------------------------------- with a real recorder


def test_a_real_recording_is_watched(venue, scripts, make_config):
    """Status by status through the live view, JSON lines, Prometheus and the health file at once."""
    upbit, binance = venue(scripts["upbit"]), venue(scripts["binance"])
    config = make_config(upbit=upbit, binance=binance, duration_s=1.5)
    terminal, answers, scrapes = io.StringIO(), [], []
    read, write = os.pipe()

    def look(status):
        write_status(config.out, status)
        answers.append(health(config.out, min_free_bytes=1).healthy)
        scrapes.append(scraped(metrics.port)[1])

    view = LiveView(Console(file=terminal, force_terminal=True, width=100))
    with view, Metrics(0) as metrics, Aside(metrics, view, JsonLines(write), look) as aside:
        result = record(config, on_status=aside)
    os.close(write)
    with os.fdopen(read) as reader:
        said = [json.loads(line) for line in reader]
    assert all(answers)
    assert "binance" in terminal.getvalue()
    assert [line["type"] for line in said] == ["status"] * len(said)
    assert 0 < scrapes[-1]['arbl2_venue_messages_total{venue="upbit"}'] <= result.messages["upbit"]
    assert "no recorder is running" in health(config.out / "elsewhere").sentence()


def arbl2(*arguments, cwd, **environment):
    return [sys.executable, "-m", "arbl2", *map(str, arguments)], {"cwd": cwd, "env": {**os.environ, **environment}}


def test_json_and_metrics_of_the_command(venue, scripts, tmp_path):
    upbit = venue(scripts["upbit"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ends = ("--venues", "upbit", "--symbols", "BTC", "--upbit-ws", upbit.ws_url, "--upbit-rest", upbit.rest_url)
        command, options = arbl2("record", *ends, "--metrics", port, "-d", 1, cwd=tmp_path)
        refused = subprocess.run(command, **options, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "Choose another port" in refused.stderr
    command, options = arbl2("record", *ends, "--json", "--metrics", port, cwd=tmp_path)
    with subprocess.Popen(command, **options, stdout=subprocess.PIPE, text=True) as recorder:
        first = json.loads(recorder.stdout.readline())
        counted = 'arbl2_venue_messages_total{venue="upbit"}'
        values = wait_for(lambda: (found := scraped(port)[1]) and counted in found and found)
        recorder.terminate()
        last = json.loads(recorder.communicate(timeout=60)[0].splitlines()[-1])
    assert recorder.returncode == 0
    assert (first["type"], first["phase"], last["type"], last["ended"]) == ("status", "recording", "result", "signal")
    assert values[counted] > 0
    assert values["process_resident_memory_bytes"] > 0


@pytest.mark.parametrize("options", [(), ("--compress",)])
def test_the_command_offers_to_deflate_only_if_asked_to(options, venue, scripts, tmp_path):
    upbit = venue(scripts["upbit"])
    ends = ("--venues", "upbit", "--symbols", "BTC", "--upbit-ws", upbit.ws_url, "--upbit-rest", upbit.rest_url)
    command, run = arbl2("record", *ends, *options, "-d", 1, cwd=tmp_path)
    subprocess.run(command, **run, capture_output=True, timeout=60, check=True)
    assert ("permessage-deflate" in upbit.headers[0].get("Sec-WebSocket-Extensions", "")) == bool(options)


def test_the_health_command_ends_with_the_answer(root):
    def ask(*extra):
        command, options = arbl2("health", "--tapes", root, "--min-free-gib", 0, *extra, cwd=root)
        return subprocess.run(command, **options, capture_output=True, text=True, timeout=60, check=False)

    write_status(root, FRESH)
    well = ask("--max-age-s", 60, "--json")
    assert (well.returncode, json.loads(well.stdout)["healthy"]) == (0, True)
    ill = ask("--max-age-s", 60, "--max-silence-s", 0.01)
    assert (ill.returncode, ill.stdout.count("\n")) == (1, 1)
    assert "upbit has been silent" in ill.stdout


@pytest.mark.parametrize("option", ["--max-age-s", "--max-silence-s", "--min-free-gib"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_limit_of_health_that_says_nothing_is_refused(root, option, value):
    error = CliRunner().invoke(app, ["health", "--tapes", str(root), option, value]).exception
    assert isinstance(error, ConfigError)
    assert option in str(error)


# --------------------------------------------------------------------------------------------------------------- the manual


MANUAL = (ROOT / "docs" / "operating.md").read_text()


def test_every_alarm_is_in_the_manual():
    sources = "".join(path.read_text() for path in (ROOT / "recorder" / "arbl2_recorder").glob("*.py"))
    alarms = set(re.findall(r"alarm\(\s*\"([a-z_]+)\"", sources))
    assert len(alarms) >= 8
    assert [name for name in sorted(alarms) if f"| `{name}` |" not in MANUAL] == []


def test_every_metric_is_in_the_manual():
    with Metrics(0) as metrics:
        metrics(STATUS)
        text, _ = scraped(metrics.port)
    names = re.findall(r"^# TYPE (arbl2_\w+)", text, re.MULTILINE)
    assert len(names) > 20
    assert [name for name in names if f"`{name}" not in MANUAL] == []


def test_the_commands_of_the_manual_exist():
    commands = re.findall(r"arbl2 ((?:record|recover|health|doctor)\b[^`\n|\\]*)", MANUAL)
    assert {command.split()[0] for command in commands} == {"record", "recover", "health", "doctor"}
    help_of = {}
    for command in commands:
        name, *words = command.split()
        if name not in help_of:
            line, options = arbl2(name, "--help", cwd=ROOT, COLUMNS="200", NO_COLOR="1")
            help_of[name] = subprocess.run(line, **options, capture_output=True, text=True, check=True, timeout=60).stdout
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in help_of[name], command


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    [unit] = re.findall(r"```ini\n(.*?)```", MANUAL, re.DOTALL)
    program = tmp_path / "arbl2"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = tmp_path / "arbl2-recorder.service"
    path.write_text(unit.replace("/opt/arbl2/.venv/bin/arbl2", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False, timeout=60)
    about_ours = [line for line in done.stderr.splitlines() if "arbl2-recorder" in line]
    assert about_ours == []
