"""What a venue says, what it does not say, and how the recorder stays connected."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import threading
import time

import pytest

from arbl2.errors import StorageError, VenueError
from arbl2.frames import FrameKind
from arbl2.tape import TapeReader, save_manifest, sessions
from arbl2_recorder import record, recover
from arbl2_recorder.backoff import BASE_S, Backoff


def facts(found, kind, **wanted):
    read = [json.loads(f.payload) | {"_frame": f} for f in found if f.kind is kind]
    return [r for r in read if all(r.get(key) == value for key, value in wanted.items())]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_reconnects_and_subscribes_again(venue, make_config, frames, stop_when):
    async def script(ws, server, n):
        await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC","n":%d}' % n)
        if n == 1:
            ws.transport.abort()
        elif n < 3:
            await ws.close(1001, "bye")
        await ws.wait_closed()

    server = venue(script)
    result = record(make_config(upbit=server), stop=stop_when(lambda: len(server.sent) >= 4))
    found = frames(result.path)
    assert len(server.received) == 4
    bodies = [json.loads(body) for body in server.received]
    assert all(body[1:] == bodies[0][1:] for body in bodies)
    assert len({body[0]["ticket"] for body in bodies}) == 4
    assert bodies[0][1:] == [{"type": "orderbook", "codes": ["KRW-BTC.30"]}, {"format": "DEFAULT"}]
    by_conn = {n: [f.kind.name for f in found if f.conn == n] for n in (1, 2, 3, 4)}
    assert by_conn == {n: ["OPENED", "SENT", "MESSAGE", "CLOSED"] for n in (1, 2, 3, 4)}
    assert [f.payload for f in found if f.kind is FrameKind.SENT] == server.received
    ends = facts(found, FrameKind.CLOSED)
    assert [(end["code"], end["clean"]) for end in ends] == [(1001, True), (1006, False), (1001, True), (1000, True)]
    assert ends[0]["reason"] == "bye"


def test_dials_keep_their_distance(venue, make_config, stop_when):
    async def script(ws, server, _n):
        await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC"}')
        await ws.close()

    server = venue(script)
    record(make_config(upbit=server, dial_interval_s=0.2), stop=stop_when(lambda: len(server.dialled) >= 5))
    gaps = [b - a for a, b in zip(server.dialled, server.dialled[1:], strict=False)]
    print("seconds between dials:", [round(gap, 3) for gap in gaps])
    # the server notes a dial when it accepts it, which may be late for one and not for the next: the sum is what must hold
    assert server.dialled[4] - server.dialled[0] > 4 * 0.2 - 0.05


def test_a_venue_that_asks_for_time_gets_it(venue, scripts, make_config, frames, stop_when):
    server = venue(scripts["upbit"], refuse=1)
    result = record(make_config(upbit=server), stop=stop_when(lambda: server.sent))
    assert server.dialled[1] - server.dialled[0] >= 1.0
    refused = facts(frames(result.path), FrameKind.CLOSED)[0]
    assert "429" in refused["reason"]
    assert not refused["clean"]


def test_an_upbit_error_before_a_polite_close_is_no_clean_end(venue, make_config, frames, stop_when):
    async def script(ws, server, n):
        if n == 0:
            await ws.send('{"error":{"message":"형식이 올바르지 않습니다","name":"WRONG_FORMAT"}}'.encode())
            await ws.close(1000)
        else:
            await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC"}')
        await ws.wait_closed()

    server = venue(script)
    result = record(make_config(upbit=server), stop=stop_when(lambda: server.sent))
    found = frames(result.path)
    end = facts(found, FrameKind.CLOSED)[0]
    assert (end["code"], end["clean"]) == (1000, False)
    assert end["error"].startswith("WRONG_FORMAT")
    alarm = facts(found, FrameKind.ALARM, alarm="venue_error")[0]
    assert "WRONG_FORMAT" in alarm["said"]
    assert alarm["_frame"].venue == "upbit"
    assert alarm["_frame"].conn == 1


def test_an_alarm_between_messages_of_one_read_does_not_turn_time_back(venue, make_config, frames, stop_when):
    """An error, a shutdown notice and data leave the venue in one write and arrive in one read."""
    notices = [b'{"error":{"code":2,"msg":"x"},"id":1}', b'{"e":"serverShutdown","E":1}']
    data = [b'{"stream":"btcusdt@depth20@100ms","data":{}}'] * 3

    async def script(ws, _server, _n):
        for payload in [*notices, *data]:
            ws.protocol.send_text(payload)
        ws.transport.write(b"".join(ws.protocol.data_to_send()))
        await ws.wait_closed()

    server = venue(script)
    seen = [0]
    result = record(
        make_config(binance=server),
        on_status=lambda status: seen.append(status.venues[0].messages),
        stop=stop_when(lambda: seen[-1] == 5),
    )
    found = [f for f in frames(result.path) if f.conn == 1]
    assert [f.kind.name for f in found][2:-1] == ["MESSAGE", "ALARM", "MESSAGE", "ALARM", "MESSAGE", "MESSAGE", "MESSAGE"]
    assert len({(f.recv_ns, f.mono_ns) for f in found[2:-1]}) == 1


@pytest.mark.parametrize(
    ("answer", "alarms"),
    [
        ('{"result":null,"id":1}', {}),
        (None, {"no_ack": 1}),
        ('{"result":null,"id":9}', {"no_ack": 1}),
        ('{"error":{"code":2,"msg":"Invalid request"},"id":1}', {"venue_error": 1}),
        ('{"code":2,"msg":"Invalid request","id":1}', {"venue_error": 1}),
    ],
)
def test_binance_acknowledgement(venue, make_config, frames, answer, alarms):
    async def script(ws, server, _n):
        if answer:
            await ws.send(answer)
        while True:
            await server.send(ws, '{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":1}}')
            await asyncio.sleep(0.02)

    server = venue(script)
    result = record(make_config(binance=server, duration_s=0.7, snapshot_timeout_s=0.25))
    assert result.alarms == alarms
    assert json.loads(server.received[0]) == {"method": "SUBSCRIBE", "params": ["btcusdt@depth20@100ms"], "id": 1}
    found = frames(result.path)
    assert len(facts(found, FrameKind.ALARM)) == sum(alarms.values())
    if answer:
        assert answer.encode() in [f.payload for f in found if f.kind is FrameKind.MESSAGE]


def test_a_code_that_stays_silent_is_named(venue, scripts, make_config, frames):
    async def script(ws, server, n):
        server.received[-1] = server.received[-1].replace(b"KRW-NOPE.30", b"KRW-BTC.30")
        await scripts["upbit"](ws, server, n)

    server = venue(script)
    result = record(
        make_config(upbit=server, symbols=("BTC", "NOPE", "ETH"), duration_s=0.8, snapshot_timeout_s=0.3, upbit_format="SIMPLE")
    )
    alarms = facts(frames(result.path), FrameKind.ALARM)
    assert [(a["alarm"], a["stream"]) for a in alarms] == [("silent", "KRW-NOPE@orderbook")]
    sent = next(f for f in frames(result.path) if f.kind is FrameKind.SENT)
    assert 0.3 <= (alarms[0]["_frame"].mono_ns - sent.mono_ns) / 1e9 < 0.6


def test_a_connection_that_goes_silent_is_replaced(venue, make_config, frames, stop_when):
    async def script(ws, server, n):
        await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC","n":%d}' % n)
        await ws.wait_closed()

    server = venue(script)
    result = record(make_config(upbit=server, stall_s=0.2), stop=stop_when(lambda: len(server.sent) >= 3))
    found = frames(result.path)
    assert facts(found, FrameKind.ALARM, alarm="stalled")[0]["silent_s"] >= 0.2
    assert facts(found, FrameKind.CLOSED)[0]["error"] == "stalled"


def test_rest_bodies_are_on_the_tape(venue, scripts, make_config, frames):
    body = '[{"market":"KRW-BTC","tick_size":"1000"},{"설명":"호가"}]'.encode()
    upbit, binance = venue(scripts["upbit"], rest=body), venue(scripts["binance"], rest=b'{"code":-1}', rest_status=503)
    result = record(make_config(upbit=upbit, binance=binance, symbols=("BTC", "ETH"), duration_s=0.5))
    found = frames(result.path)
    urls = sorted(json.loads(f.payload)["url"] for f in found if f.kind is FrameKind.REQUEST)
    assert urls == sorted(
        [
            f"{upbit.rest_url}/v1/orderbook/instruments?markets=KRW-BTC,KRW-ETH,KRW-USDT",
            f"{upbit.rest_url}/v1/market/all?is_details=true",
            f"{binance.rest_url}/api/v3/exchangeInfo?symbols=%5B%22BTCUSDT%22%2C%22ETHUSDT%22%5D",
        ]
    )
    assert [f.payload for f in found if f.kind is FrameKind.RESPONSE] == [body, body]
    alarm = facts(found, FrameKind.ALARM, alarm="rest_failed")[0]
    assert "503" in alarm["said"]
    assert '"code":-1' in alarm["said"]
    assert alarm["_frame"].venue == "binance"


def test_one_unknown_symbol_does_not_cost_the_rules_of_the_others(venue, scripts, make_config, frames):
    binance = venue(scripts["binance"], rest=b'{"code":-1121,"msg":"Invalid symbol."}', rest_status=400)
    result = record(make_config(binance=binance, symbols=("BTC", "NOPE"), duration_s=1.0))
    urls = [json.loads(f.payload)["url"] for f in frames(result.path) if f.kind is FrameKind.REQUEST]
    head = f"{binance.rest_url}/api/v3/exchangeInfo?symbols="
    assert urls == [head + f"%5B%22{names}%22%5D" for names in ("BTCUSDT%22%2C%22NOPEUSDT", "BTCUSDT", "NOPEUSDT")]


def test_nothing_listens_anywhere(make_config):
    config = make_config(upbit_ws=f"ws://127.0.0.1:{free_port()}/ws", first_connect_s=0.5)
    with pytest.raises(VenueError, match="no venue delivered anything") as caught:
        record(config)
    assert "Check the network" in str(caught.value)
    reader = TapeReader(sessions(config.out)[-1])
    assert reader.manifest.state == "sealed"
    assert reader.manifest.counts["upbit.closed"] >= 2
    assert all(not json.loads(f.payload)["clean"] for f in reader.frames() if f.kind is FrameKind.CLOSED)


def test_a_duration_that_ends_before_anything_came(make_config):
    with pytest.raises(VenueError, match="no venue delivered anything"):
        record(make_config(upbit_ws=f"ws://127.0.0.1:{free_port()}/ws", duration_s=0.2))


def test_one_venue_down_does_not_stop_the_other(venue, scripts, make_config):
    binance = venue(scripts["binance"])
    config = make_config(binance=binance, upbit_ws=f"ws://127.0.0.1:{free_port()}/ws", first_connect_s=0.3, duration_s=0.9)
    result = record(config)
    assert result.messages["binance"] > 20
    assert result.messages["upbit"] == 0
    assert result.counts["upbit.closed"] >= 3


def test_backoff_is_capped_jittered_and_starts_anew():
    backoff = Backoff(30.0, random.Random(1))
    delays = [backoff.delay_s() for _ in range(2000)]
    for n, delay in enumerate(delays):
        assert 0.0 <= delay <= min(30.0, BASE_S * 2.0 ** min(n, 40))
    assert max(delays) > 29.0
    assert min(delays[10:]) < 1.0
    backoff.reset()
    assert backoff.delay_s() <= BASE_S


class Answering:
    """A TCP server that answers every request with the same bytes, one by one or at once."""

    def __init__(self, answer, *, pause_s=0.0):
        self.answer, self.pause_s = answer, pause_s
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self.server.accept()[0],), daemon=True).start()

    def _answer(self, client):
        with client, contextlib.suppress(OSError):
            client.recv(65_536)
            for i in range(len(self.answer)) if self.pause_s else [slice(None)]:
                part = self.answer[i] if isinstance(i, slice) else self.answer[i : i + 1]
                client.sendall(part)
                time.sleep(self.pause_s)


@pytest.mark.parametrize("location", ["ws://127.0.0.1:99999/", "ws://[::1/", "ws://a..b/", "http://127.0.0.1/", "//"])
def test_a_redirect_to_nowhere_ends_a_dial_and_not_the_recording(venue, scripts, make_config, location):
    upbit = venue(scripts["upbit"])
    odd = Answering(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
    config = make_config(upbit=upbit, binance=upbit, duration_s=1.0)
    ends = dataclasses.replace(config.endpoints, binance_ws=f"ws://127.0.0.1:{odd.port}/stream")
    result = record(dataclasses.replace(config, endpoints=ends))
    assert result.ended == "duration"
    assert result.messages["upbit"] > 50
    assert result.counts["binance.closed"] >= 2


def test_a_body_that_trickles_does_not_hold_up_the_desk(venue, scripts, make_config, frames):
    upbit = venue(scripts["upbit"])
    slow = Answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"[" * 1000, pause_s=0.02)
    config = make_config(upbit=upbit, duration_s=2.0, rest_timeout_s=0.2)
    ends = dataclasses.replace(config.endpoints, upbit_rest=f"http://127.0.0.1:{slow.port}")
    found = frames(record(dataclasses.replace(config, endpoints=ends)).path)
    assert [a for a in facts(found, FrameKind.ALARM, alarm="rest_failed") if "no whole answer" in a["said"]]
    assert len({r["url"] for r in facts(found, FrameKind.REQUEST)}) == 2


def test_a_session_that_could_not_be_sealed_is_no_success(venue, scripts, make_config, monkeypatch):
    def refuse(path, manifest):
        if manifest.state == "sealed":
            raise StorageError("no room")
        save_manifest(path, manifest)

    monkeypatch.setattr("arbl2_recorder.files.save_manifest", refuse)
    config = make_config(upbit=venue(scripts["upbit"]), duration_s=0.5)
    with pytest.raises(StorageError, match="no room"):
        record(config)
    assert [report.frames_sealed > 50 for report in recover(config.out)] == [True]
