"""The main job on real captures: import, replay, and an independent reading of the same lines."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from arbl2.aggregator import LevelFrom
from arbl2.book import ladder, window
from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.frames import FrameKind
from arbl2.tape import TapeReader
from arbl2_replay import replay
from arbl2_replay.importer import import_capture

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
UPBIT = DATA / "upbit_frames_first10s.jsonl"
BINANCE = DATA / "binance_spot_btcusdt_first30s.txt.gz"
DEPTH20 = DATA / "binance_spot_btcusdt_depth20_first60s.txt.gz"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real captures are not here (../shared/data)")


def _import(source, tmp_path):
    return import_capture(source, tmp_path / "tapes").path


def _lines(source):
    with gzip.open(source, "rb") as file:
        return [line.rstrip(b"\n").split(b" ", 1) for line in file]


def _e8(text):
    return int(Decimal(text) * 10**8)


def test_upbit_all_46_books(tmp_path):
    tape = _import(UPBIT, tmp_path)
    result = replay(tape)
    assert result.reasons["upbit"] == {"book": 46, "trade": 76, "opened": 1, "sent": 1}
    rows = [json.loads(line, parse_float=str, parse_int=str) for line in UPBIT.read_text().splitlines()]
    books = [json.loads(row["raw"], parse_float=Decimal) for row in rows if row["kind"] == "recv" and '"orderbook"' in row["raw"]]
    last = {book["cd"]: book["obu"] for book in books}
    updates = Counter(book["cd"] for book in books)
    seen = {book["instrument"]: book for book in result.books if book["updates"]}
    assert seen.keys() == last.keys()
    for code, units in last.items():
        assert seen[code]["updates"] == updates[code]
        assert seen[code]["best_bid_e8"] == _e8(units[0]["bp"])
        assert seen[code]["best_ask_e8"] == _e8(units[0]["ap"])
    payloads = [frame.payload for frame in TapeReader(tape).frames() if frame.kind.name == "MESSAGE"]
    assert payloads == [row["raw"].encode() for row in rows if row["kind"] == "recv"]
    assert {replay(tape, block_rows=rows).digest for rows in (None, 1, 13)} == {result.digest}


def test_binance_all_600_partial_depths(tmp_path):
    tape = _import(DEPTH20, tmp_path)
    result = replay(tape)
    assert result.reasons == {"binance": {"book": 600}}
    lines = _lines(DEPTH20)
    data = json.loads(lines[-1][1])["data"]
    (book,) = result.books
    assert book["updates"] == 600
    assert (book["best_bid_e8"], book["best_ask_e8"]) == (_e8(data["bids"][0][0]), _e8(data["asks"][0][0]))
    assert [frame.payload for frame in TapeReader(tape).frames()] == [payload for _, payload in lines]
    assert replay(tape, scanner=False).digest == result.digest


def test_top_of_book_after_every_frame(tmp_path):
    """The engine's book after each of the 600 frames, against a decode with json and Decimal."""
    reader = TapeReader(_import(DEPTH20, tmp_path))
    engine = Engine(reader.manifest.instruments, RunConfig())
    compared = 0
    for block in reader.blocks():
        for i in range(len(block)):
            engine.feed(block.slice(i, i + 1))
            data = json.loads(block.payload(i))["data"]
            for side, name in enumerate(("bids", "asks")):
                levels = list(zip(*(column.tolist() for column in window(engine.state, 0, side)), strict=True))
                assert levels == [(_e8(price), _e8(size)) for price, size in data[name]]
                compared += 1
    assert compared == 1_200


def test_messages_that_are_no_books_are_counted_by_kind(tmp_path):
    tape = _import(BINANCE, tmp_path)
    result = replay(tape)
    assert result.reasons == {"binance": {"diff": 299, "book_ticker": 2_432, "trade": 547, "rest": 1}}
    assert result.frames == 3_279
    assert [frame.payload for frame in TapeReader(tape).frames()] == [payload for _, payload in _lines(BINANCE)]
    assert replay(tape, block_rows=100).digest == result.digest


class Dicts:
    """A local book as the venue's page on it says, with a dict of texts a side."""

    def __init__(self, body):
        self.last_id, self.first = body["lastUpdateId"], True
        self.bids, self.asks = (dict(body[side]) for side in ("bids", "asks"))
        self.worst = min(map(Decimal, self.bids)), max(map(Decimal, self.asks))
        self.changed = (set(), set())

    def apply(self, event):
        """False: known already."""
        if event["u"] <= self.last_id:
            return False
        assert event["U"] <= self.last_id + 1 if self.first else event["U"] == self.last_id + 1
        for side, changed, levels in zip((self.bids, self.asks), self.changed, (event["b"], event["a"]), strict=True):
            for px, size in levels:
                changed.add(px)
                side[px] = size
                if Decimal(size) == 0:
                    del side[px]
        self.last_id, self.first = event["u"], False
        return True

    def full(self, s):
        """(price, size, origin) of every level, best first; a level outside what the snapshot covered is beyond it."""
        side, rows = (self.bids, self.asks)[s], []
        for px in sorted(side, key=Decimal, reverse=s == 0):
            beyond = Decimal(px) < self.worst[0] if s == 0 else Decimal(px) > self.worst[1]
            origin = LevelFrom.SNAPSHOT if px not in self.changed[s] else LevelFrom.BEYOND if beyond else LevelFrom.CHANGE
            rows.append((_e8(px), _e8(side[px]), origin))
        return rows


def test_full_book_of_the_real_capture(tmp_path):
    """After every diff the whole book is that of the dicts, and its touch is what bookTicker said last up to the same id."""
    reader = TapeReader(_import(BINANCE, tmp_path))
    bodies = [json.loads(payload) for _, payload in _lines(BINANCE)]
    rest = next(body for body in bodies if "lastUpdateId" in body)
    ticks = {body["data"]["u"]: body["data"] for body in bodies if body.get("stream") == "btcusdt@bookTicker"}
    tick_ids = sorted(ticks)
    engine, twin, waiting = Engine(reader.manifest.instruments, RunConfig()), None, []
    compared = touches = same_id = 0
    for block in reader.blocks():
        for i in range(len(block)):
            engine.feed(block.slice(i, i + 1))
            body = json.loads(block.payload(i))
            if block.kind[i] == FrameKind.RESPONSE:
                twin = Dicts(rest)
                assert sum(twin.apply(event) for event in waiting) == 1
            elif body["stream"] == "btcusdt@depth@100ms" and twin is None:
                waiting.append(body["data"])
                continue
            elif body["stream"] != "btcusdt@depth@100ms" or not twin.apply(body["data"]):
                continue
            compared += 1
            for s in (0, 1):
                full = list(zip(*(column.tolist() for column in ladder(engine.state, 0, s)), strict=True))
                assert full == twin.full(s)
                shown = list(zip(*(column.tolist() for column in window(engine.state, 0, s)), strict=True))
                assert shown == [level[:2] for level in full[:30]]
            k = bisect_right(tick_ids, twin.last_id)
            if k:
                tick = ticks[tick_ids[k - 1]]
                touch = [(int(px[0]), int(size[0])) for px, size in (window(engine.state, 0, s) for s in (0, 1))]
                assert touch == [(_e8(tick["b"]), _e8(tick["B"])), (_e8(tick["a"]), _e8(tick["A"]))], twin.last_id
                touches += 1
                same_id += tick["u"] == twin.last_id
    assert (compared, touches) == (297, 297)
    assert same_id == 45
    assert min(len(twin.full(s)) for s in (0, 1)) > 1_000
    assert {origin for s in (0, 1) for _, _, origin in twin.full(s)} == {LevelFrom.SNAPSHOT, LevelFrom.CHANGE, LevelFrom.BEYOND}
