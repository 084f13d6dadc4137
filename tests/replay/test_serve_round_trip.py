"""record(serve(tape)) = tape: the command line serves in one process, our own recorder records in another."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict

import pytest

from arbl2 import cli
from arbl2.errors import Arbl2Error
from arbl2.frames import FrameKind
from arbl2.tape import TapeReader
from arbl2_recorder import Endpoints, RecordConfig, arecord
from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource
from arbl2_replay.synth import SYMBOLS, SynthConfig

URLS = ("upbit_ws", "upbit_rest", "binance_ws", "binance_rest")
CONFIG = {
    "symbols": ("BTC", "XRP"),
    "streams": ("depth", "diff", "trade", "book_ticker"),
    "dial_interval_s": 0.1,
    "snapshot_limit": 1000,
}


def config(out, urls, **keys):
    return RecordConfig(out=out, endpoints=Endpoints(**urls), **CONFIG, **keys)


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    """A few seconds of every stream, with a lost connection on each venue."""
    out = tmp_path_factory.mktemp("recorded")

    async def main():
        market = SynthConfig(seed=7, symbols=(SYMBOLS["BTC"], SYMBOLS["XRP"]), excursion_every_s=1.5)
        async with ExchangeServer(SyntheticSource(market, speed=4.0), ServerOptions()) as server:
            urls = {name: getattr(server, f"{name}_url") for name in URLS}
            recording = asyncio.create_task(arecord(config(out, urls, duration_s=4.5)))
            await asyncio.sleep(2.0)
            await server.disconnect("upbit", 1006)
            await asyncio.sleep(1.0)
            await server.disconnect("binance", 1001)
            return await recording

    return asyncio.run(main()).path


def told(path):
    """Every message but acknowledgements, which answer the recorder itself: (venue, connection, payload) in order."""
    frames = [frame for frame in TapeReader(path).frames() if frame.kind is FrameKind.MESSAGE]
    return [(frame.venue, frame.conn, frame.payload) for frame in frames if b'"result":' not in frame.payload]


def by_connection(messages):
    """Payloads of each connection that was told something, in the order of the connections, by venue."""
    conns = defaultdict(lambda: defaultdict(list))
    for venue, conn, payload in messages:
        conns[venue][conn].append(payload)
    return {venue: [of[conn] for conn in sorted(of)] for venue, of in conns.items()}


def serve(tape, *options):
    # ends when the recording is over and everybody has read it
    command = [sys.executable, "-m", "arbl2", "serve", str(tape), "--start-when-subscribed", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    return process, json.loads(process.stdout.readline())


def record_from(process, urls, out):
    class Ended:
        def is_set(self):
            return process.poll() is not None

    result = asyncio.run(arecord(config(out, {name: urls[name] for name in URLS}), stop=Ended()))
    assert process.wait(30) == 0, process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    return result.path


def ends(path):
    closed = [frame for frame in TapeReader(path).frames() if frame.kind is FrameKind.CLOSED]
    return [(frame.venue, json.loads(frame.payload)["code"]) for frame in closed][:2]


@pytest.mark.parametrize("options", [("--speed", "max"), ("--speed", "max", "--lockstep"), ("--speed", "10x", "--lockstep")])
def test_what_was_recorded_is_served_and_recorded_again(tape, tmp_path, options):
    process, urls = serve(tape, *options)
    try:
        path = record_from(process, urls, tmp_path / "again")
    finally:
        process.kill()
    before, after = told(tape), told(path)
    assert ends(path) == ends(tape) == [("upbit", 1006), ("binance", 1001)]
    assert {venue: len(conns) for venue, conns in by_connection(before).items()} == {"upbit": 2, "binance": 2}
    assert len(before) > 800
    assert by_connection(after) == by_connection(before)
    if "--lockstep" in options:
        assert [(venue, payload) for venue, _, payload in after] == [(venue, payload) for venue, _, payload in before]
        assert sum(a[0] != b[0] for a, b in itertools.pairwise(after)) > 100


def test_a_server_ends_at_once_when_told(tape):
    process, urls = serve(tape, "--loop", "--fault", "all=1", "--fault", "half-open=5", "--close-codes", "1011")
    assert urls["control"].endswith("/arbl2/")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("/nowhere/at-all",), 3, "no recording"),
        (("--speed", "max"), 2, "above zero"),
        (("--at", "3"), 2, "--at needs a recording"),
        (("--fault", "flood=3"), 2, "NAME=SECONDS"),
        (("--fault", "close=3", "--close-codes", "1005"), 2, "close_codes"),
        (("--fault", "close=3", "--close-codes", "x"), 2, "--close-codes"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(options, code, said):
    with pytest.raises(Arbl2Error, match=said) as refusal:
        cli.app(["serve", *options], standalone_mode=False)
    assert refusal.value.exit_code == code
