"""Telling messages apart, on spellings from the wire."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from arbl2.errors import ConfigError
from arbl2_recorder import Endpoints, RecordConfig
from arbl2_recorder.venues import Note, Sign, feeds

CAPTURES = Path(__file__).parents[3] / "shared" / "data"
UPBIT, BINANCE = feeds(RecordConfig(symbols=("BTC", "ETH", "XRP")))


@pytest.mark.parametrize(
    ("feed", "payload", "note", "data"),
    [
        (UPBIT, b'{"type":"orderbook","code":"KRW-BTC","stream_type":"SNAPSHOT"}', Note(Sign.DATA, "KRW-BTC@orderbook"), True),
        (UPBIT, b'{"ty":"orderbook","cd":"KRW-USDT"}', Note(Sign.DATA, "KRW-USDT@orderbook"), True),
        (UPBIT, b'{"type":"trade","code":"KRW-BTC","sequential_id":1}', Note(Sign.DATA, "KRW-BTC@trade"), True),
        (UPBIT, b'{"status":"UP"}', Note(Sign.OTHER), False),
        (UPBIT, b'{"error":{"name":"NO_CODES","message":"x"}}', Note(Sign.ERROR, "NO_CODES: x"), False),
        (UPBIT, b'{"code":5}', Note(Sign.OTHER), False),
        (UPBIT, b"\xff\x00", Note(Sign.OTHER), False),
        (UPBIT, b"[" * 100_000, Note(Sign.OTHER), False),
        (BINANCE, b'{"stream":"btcusdt@depth20@100ms","data":{}}', Note(Sign.DATA, "btcusdt@depth20@100ms"), True),
        (BINANCE, b'{"result":null,"id":1}', Note(Sign.ACK), False),
        (BINANCE, b'{"id":1}', Note(Sign.OTHER), False),
        (BINANCE, b'{"e":"serverShutdown","E":1770123456789}', Note(Sign.SHUTDOWN), False),
        (BINANCE, b'{"stream":"!serverShutdown","data":{"e":"serverShutdown"}}', Note(Sign.SHUTDOWN), False),
        (BINANCE, b"", Note(Sign.OTHER), False),
    ],
)
def test_notes(feed, payload, note, data):
    assert feed.read(payload) == note
    assert feed.is_data(payload) is data


def test_real_captures_are_data():
    if not CAPTURES.is_dir():
        pytest.skip("the real captures are not beside this checkout")
    rows = [json.loads(line) for line in (CAPTURES / "upbit_frames_first10s.jsonl").read_text().splitlines()]
    books = [row["raw"].encode() for row in rows if '"ty":"orderbook"' in str(row.get("raw"))]
    assert len(books) > 20
    assert {UPBIT.read(book).sign for book in books} == {Sign.DATA}
    assert all(UPBIT.is_data(book) for book in books)
    with gzip.open(CAPTURES / "binance_spot_btcusdt_depth20_first60s.txt.gz") as file:
        lines = [line.split(b" ", 1)[1] for line in file]
    assert {BINANCE.read(line) for line in lines} == {Note(Sign.DATA, "btcusdt@depth20@100ms")}


def test_instruments_and_defaults():
    both = RecordConfig(symbols=("BTC", "XRP"))
    assert both.instruments() == {"upbit": ["KRW-BTC", "KRW-XRP", "KRW-USDT"], "binance": ["BTCUSDT", "XRPUSDT"]}
    assert RecordConfig(venues=("upbit",), symbols=("BTC",)).instruments() == {"upbit": ["KRW-BTC"]}
    assert (UPBIT.url, BINANCE.url) == ("wss://api.upbit.com/websocket/v1", "wss://stream.binance.com:9443/stream")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"venues": ("bithumb",)}, "choose from upbit, binance"),
        ({"venues": ()}, "choose from"),
        ({"symbols": ()}, "at least one symbol"),
        ({"symbols": ("KRW-BTC",)}, "write BTC"),
        ({"symbols": ("USDT",)}, "leave out USDT"),
        ({"upbit_units": 20}, "1, 5, 15, 30"),
        ({"upbit_format": "JSON"}, "DEFAULT, SIMPLE"),
        ({"binance_depth": 7}, "5, 10, 20"),
        ({"duration_s": 0}, "above 0"),
        ({"duration_s": float("nan")}, "above 0"),
        ({"flush_ms": 0}, "flush_ms"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        RecordConfig(**changes)


def test_an_endpoint_needs_its_scheme():
    with pytest.raises(ConfigError, match="upbit_ws"):
        Endpoints(upbit_ws="https://api.upbit.com")
