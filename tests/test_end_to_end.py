"""Server -> sockets -> recorder -> tape -> replay, with real sockets and a disconnect of each venue in between."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

from arbl2.config import PolicyConfig, RunConfig
from arbl2.frames import FrameKind
from arbl2.tape import TapeReader
from arbl2_recorder import Endpoints, RecordConfig, arecord
from arbl2_replay import replay
from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource
from arbl2_replay.synth import SynthConfig

MARKET = SynthConfig(seed=5, duration_s=3_600.0, excursion_every_s=1.5)


async def _record(out):
    source = SyntheticSource(MARKET)
    async with ExchangeServer(source, ServerOptions(record_sent=True)) as server:
        endpoints = Endpoints(
            upbit_ws=server.upbit_ws_url,
            upbit_rest=server.upbit_rest_url,
            binance_ws=server.binance_ws_url,
            binance_rest=server.binance_rest_url,
        )
        config = RecordConfig(out=out, duration_s=9.0, endpoints=endpoints, dial_interval_s=0.2)
        recording = asyncio.create_task(arecord(config))
        await asyncio.sleep(3.0)
        await server.disconnect("upbit", code=1006)
        await asyncio.sleep(2.0)
        await server.disconnect("binance", code=1001)
        return await recording, server.sent


def test_payload_bytes_equal_the_bytes_sent_and_the_run_repeats(tmp_path):
    result, sent = asyncio.run(_record(tmp_path / "tapes"))
    assert result.clean
    frames = list(TapeReader(result.path).frames())
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
    assert all(a.mono_ns <= b.mono_ns for a, b in itertools.pairwise(frames))

    for venue in ("upbit", "binance"):
        opened = [f.conn for f in frames if f.kind is FrameKind.OPENED and f.venue == venue]
        assert len(opened) == 2  # resubscribed after the disconnect
        logs = [log for log in sent if log.venue == venue]
        assert len(logs) == 2
        for conn, log in zip(opened, logs, strict=True):
            received = [
                (f.op, hashlib.sha256(f.payload).digest()) for f in frames if f.conn == conn and f.kind is FrameKind.MESSAGE
            ]
            # what was still on its way when the connection was cut, or the recording ended, never reached us
            assert len(received) >= 30
            assert log.count - len(received) <= 8
            assert received == log.payloads[: len(received)]
            assert [f.kind for f in frames if f.conn == conn][:2] == [FrameKind.OPENED, FrameKind.SENT]
            assert [f.kind for f in frames if f.conn == conn][-1] is FrameKind.CLOSED
    assert {f.kind for f in frames} >= {FrameKind.REQUEST, FrameKind.RESPONSE, FrameKind.CLOCK}

    config = RunConfig(policy=PolicyConfig(size_krw="20000000", max_position_krw="60000000"))
    first = replay(result.path, config, out=tmp_path / "runs")
    assert first.kpi["decisions"] > 0
    assert sum(book["updates"] for book in first.books) > 300
    assert not any(
        name in counts for counts in first.reasons.values() for name in ("not_json", "wrong_shape", "crossed", "total_mismatch")
    )
    assert {replay(result.path, config, block_rows=rows).digest for rows in (1, 50)} == {first.digest}
    assert replay(result.path, config, speed="20x").digest == first.digest
