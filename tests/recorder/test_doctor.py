"""The doctor on this machine: with a local exchange, with nothing to reach, and with a folder that will not do."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from arbl2_recorder import Endpoints, doctor
from arbl2_recorder.doctor import Check, examine
from arbl2_recorder.report import doctor_report
from arbl2_recorder.storage import RootLock
from arbl2_replay.server import ExchangeServer, SyntheticSource
from arbl2_replay.synth import SynthConfig

VENUES = ("upbit", "binance")


@pytest.fixture
def exchange():
    """The local exchange server in a thread; yields its endpoints."""
    ready, stop, found = threading.Event(), [], []

    async def serve():
        async with ExchangeServer(SyntheticSource(SynthConfig(seed=1, duration_s=3_600.0))) as server:
            names = ("upbit_ws", "upbit_rest", "binance_ws", "binance_rest")
            found.append({name: getattr(server, f"{name}_url") for name in names})
            over = asyncio.Event()
            stop.append((asyncio.get_running_loop(), over))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    loop, over = stop[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(10)


def by_name(checks):
    return {check.name: check for check in checks}


def test_everything_is_well_with_a_local_exchange(exchange, tmp_path):
    checks = by_name(examine(tmp_path, Endpoints(**exchange), VENUES))
    assert [name for name, check in checks.items() if check.state == "fail"] == []
    assert set(checks) == {
        *("versions", "clock", "time zone", "folder", "disk", "open files", "memory"),
        *("upbit socket", "upbit REST", "binance socket", "binance REST", "exchange clock"),
    }
    assert "opened in" in checks["binance socket"].found
    assert "answered in" in checks["upbit REST"].found
    assert "ms against Binance's" in checks["exchange clock"].found
    assert "MiB/s" in checks["disk"].found
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_reached_fails_and_says_how(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        endpoints = Endpoints(
            upbit_ws=f"ws://127.0.0.1:{port}/",
            upbit_rest=f"http://127.0.0.1:{port}",
            binance_ws="wss://no-such-host.invalid/stream",
            binance_rest="https://no-such-host.invalid",
        )
        checks = by_name(examine(tmp_path, endpoints, VENUES))
    failed = [name for name, check in checks.items() if check.state == "fail"]
    assert failed == ["upbit socket", "upbit REST", "binance socket", "binance REST"]
    assert "no connection with" in checks["upbit socket"].found
    assert all(checks[name].advice for name in failed)


def test_a_venue_that_never_answers_costs_seconds_only(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        endpoints = Endpoints(
            **{f"{venue}_{kind}": f"{scheme}://{at}" for venue in VENUES for kind, scheme in (("ws", "ws"), ("rest", "http"))}
        )
        before = time.monotonic()
        checks = by_name(examine(tmp_path, endpoints, VENUES, timeout_s=0.5))
        took_s = time.monotonic() - before
    assert {checks[f"{venue} {kind}"].state for venue in VENUES for kind in ("socket", "REST")} == {"fail"}
    assert took_s < 6


@pytest.mark.parametrize(
    ("body", "status", "socket_says", "rest_says"),
    [(b"no time", 200, "refuses a WebSocket", "did not answer with its time"), (b"{}", 503, "refuses a WebSocket", "HTTP 503")],
)
def test_a_venue_that_is_something_else(venue, tmp_path, body, status, socket_says, rest_says):
    other = venue(rest=body, rest_status=status, refuse=99)
    ends = {"binance_ws": other.ws_url, "binance_rest": other.rest_url}
    checks = by_name(examine(tmp_path, Endpoints(**ends), ("binance",)))
    assert socket_says in checks["binance socket"].found
    assert any(rest_says in check.found and check.state == "fail" for check in checks.values())


@pytest.mark.parametrize(("off_ms", "state"), [(0, "ok"), (-30_000, "fail"), (30_000, "fail"), (600, "warn")])
def test_this_clock_against_the_venues(off_ms, state):
    body = json.dumps({"serverTime": 10**12}).encode()
    assert doctor._exchange_clock(body, 10**12 + off_ms, 20.0).state == state


def test_a_folder_that_will_not_do(tmp_path):
    (tmp_path / "file").write_text("x")
    checks = by_name(examine(tmp_path / "file" / "tapes", Endpoints(), ()))
    assert (checks["folder"].state, checks["disk"].state) == ("fail", "fail")
    assert "choose another folder" in checks["folder"].advice


def test_a_folder_in_use_and_one_to_be_made(tmp_path):
    with RootLock(tmp_path / "tapes"):
        folder = by_name(examine(tmp_path / "tapes", Endpoints(), ()))["folder"]
        assert f"process {os.getpid()}" in folder.found
        assert folder.state == "warn"
        assert folder.advice
    checks = by_name(examine(tmp_path / "new" / "tapes", Endpoints(), ()))
    assert "will be made" in checks["folder"].found
    assert checks["folder"].state == "ok"
    assert not (tmp_path / "new").exists()


def test_a_check_that_hangs_or_breaks_is_a_line_too():
    release = threading.Event()

    def hang():
        release.wait(30)
        return Check("slow", "ok", "at last")

    def break_down():
        raise RuntimeError("surprise")

    before = time.monotonic()
    checks = doctor._run({"slow": hang, "odd": break_down, "fine": lambda: Check("fine", "ok", "yes")}, 0.3)
    release.set()
    assert time.monotonic() - before < 10
    assert [(check.name, check.state) for check in checks] == [("slow", "fail"), ("odd", "fail"), ("fine", "ok")]
    assert "surprise" in checks[1].found


def test_the_table_fits_a_narrow_terminal():
    said = io.StringIO()
    advice = "check the network, a proxy or firewall, and the endpoint options, all of them"
    checks = [Check("binance socket", "fail", "x" * 200 + "\x1b[31m\n", advice), Check("clock", "ok", "fine")]
    Console(file=said, width=80).print(doctor_report(checks))
    assert said.getvalue().count("x") == 200 + advice.count("x")
    assert "\x1b" not in said.getvalue()
    assert max(map(len, said.getvalue().splitlines())) <= 80


def _arbl2(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "arbl2", *arguments]
    env = {**os.environ, "NO_COLOR": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_ends_with_what_it_found(exchange, tmp_path):
    environment = {f"ARBL2_{name.upper()}": url for name, url in exchange.items()}
    well = _arbl2("doctor", "--out", "tapes", "--json", cwd=tmp_path, **environment)
    assert well.returncode == 0, well.stderr + well.stdout
    assert "exchange clock" in {check["name"] for check in json.loads(well.stdout)}
    ill = _arbl2("doctor", "--venues", "upbit", "--upbit-ws", "ws://127.0.0.1:1", cwd=tmp_path, **environment)
    assert ill.returncode == 1
    assert "no connection with ws://127.0.0.1:1" in ill.stdout
    alone = _arbl2("doctor", "--offline", "--upbit-ws", "ws://127.0.0.1:1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout
    assert list(tmp_path.iterdir()) == []
