"""What `make bench-peers` feeds to other engines is what arbl2 decodes, and the rule they run is the one arbl2 runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.frames import FrameKind
from arbl2.tape import TapeReader
from benchmarks import market, plain
from benchmarks.document import put
from benchmarks.peers import books, events, feed
from benchmarks.peers.__main__ import ENGINES
from benchmarks.peers.decisions import BINANCE, FX, UPBIT, checksum, decide
from benchmarks.peers.ours import run_config
from benchmarks.peers.report import BEGIN, BUILD, CONVERT, END, Figures, Ratio, conversion_us, ratios

ENTRY_BPS = 8.0
"""Low enough for a short tape."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(market, "DATA", tmp_path_factory.mktemp("data"))
        return market.tape(3_000)


@pytest.fixture(scope="module")
def feeds(session):
    return feed.read(session)


def levels(one: books.BookFeed, row: int) -> list[list[tuple[float, float]]]:
    return [[(px, qty) for px, qty in side[row].tolist()] for side in (one.bids, one.asks)]


def shown(payload: bytes) -> list[list[tuple[float, float]]]:
    """Both sides of a message, read in the slow and obvious way."""
    message = json.loads(payload)
    if "data" in message:
        return [[(float(px), float(qty)) for px, qty in message["data"][side]] for side in ("bids", "asks")]
    units = message["orderbook_units"]
    return [[(unit[f"{side}_price"], unit[f"{side}_size"]) for unit in units] for side in ("bid", "ask")]


def test_the_neutral_feed_is_what_arbl2_decodes(session, feeds):
    reader = TapeReader(session)
    engine = Engine(reader.manifest.instruments, RunConfig())
    at = {name: row for row, name in feed.INSTRUMENTS.items()}
    seen = dict.fromkeys(feed.INSTRUMENTS, 0)
    for block in reader.blocks():
        for row in range(len(block)):
            engine.feed(block.slice(row, row + 1))
            if block.kind[row] != FrameKind.MESSAGE:
                continue
            for known in engine.books():
                book = at[known["instrument"]]
                if known["updates"] > seen[book]:
                    assert feeds[book].time_ns[seen[book]] == block.time_ns[row]
                    fed = levels(feeds[book], seen[book])
                    assert fed == shown(block.payload(row))
                    assert [round(side[0][0] * 1e8) for side in fed] == [known["best_bid_e8"], known["best_ask_e8"]]
                    seen[book] += 1
    assert seen == {book: len(one.time_ns) for book, one in feeds.items()}


def test_every_engine_here_runs_the_same_rule(session, feeds):
    reader = TapeReader(session)
    engine = Engine(reader.manifest.instruments, run_config(ENTRY_BPS))
    for block in reader.blocks():
        engine.feed(block)
    engine.finish()
    rows = engine.drain().decisions
    expected = decide(feeds, ENTRY_BPS)
    assert len(expected) > 20
    assert {direction for _, direction in expected} == {1, -1}
    assert list(zip(rows["time_ns"].tolist(), rows["direction"].tolist(), strict=True)) == expected
    assert not engine.refusals()
    looped: list[tuple[int, int]] = []
    plain.run(session, run_config(ENTRY_BPS), reader.anchor.wall_ns - reader.anchor.mono_ns, looped)
    assert checksum(looped) == checksum(expected)


@pytest.mark.parametrize("way", [events.differences, events.windows])
def test_events_lead_to_the_same_books(feeds, way):
    for book in (UPBIT, BINANCE, FX):
        one = feeds[book]
        rows = way(one, traded=book != FX)
        assert bool(rows["ev"][0] & books.AT_EXCHANGE) == (book != FX)
        sides: dict[int, dict[float, float]] = {books.BID: {}, books.ASK: {}}
        ends = np.flatnonzero(np.diff(rows["local_ts"])) + 1
        # the closing row is the last part
        for message, part in enumerate(np.split(rows, ends)[:-1]):
            assert part["local_ts"][0] == one.time_ns[message]
            for ev, px, qty in zip(part["ev"].tolist(), part["px"].tolist(), part["qty"].tolist(), strict=True):
                side = sides[books.BID if ev & books.BID else books.ASK]
                if ev & 0xFF == books.CLEAR:
                    for level in [level for level in side if (level >= px if ev & books.BID else level <= px)]:
                        del side[level]
                elif qty:
                    side[px] = qty
                else:
                    del side[px]
            assert sorted(sides[books.BID].items(), reverse=True) == list(map(tuple, one.bids[message].tolist()))
            assert sorted(sides[books.ASK].items()) == list(map(tuple, one.asks[message].tolist()))
        assert len(ends) == len(one.time_ns)


def test_a_ratio_below_what_is_asked_does_not_hold():
    assert Ratio("", ours=1.0, theirs=3.0, least=3.0).holds
    assert "DOES NOT HOLD" in Ratio("", ours=1.0, theirs=2.99, least=3.0).line()


def test_the_best_peer_and_its_whole_conversion_are_what_counts():
    def figures(**seconds: float) -> Figures:
        return Figures(1_000_000, [{f"{name}_s": value for name, value in seconds.items()}])

    engines = [engine for engine in ENGINES if engine.key in {"decoded", "roivec-diff", "hashmap-snap", "deltas"}]
    measured = {
        "raw": figures(run=2.0),
        "plain": figures(run=9.0),
        "decoded": figures(run=0.25),
        "roivec-diff": figures(run=0.7, load=0.3),
        "hashmap-snap": figures(run=3.0, load=0.3),
        "deltas": figures(run=8.0, objects=7.0),
        CONVERT: figures(decode=9.0, diff_events=1.0, diff_file=8.0, snap_events=2.0, snap_file=16.0),
        BUILD: figures(run=3.0),
    }
    asked = [(claim.theirs, claim.ours, claim.holds) for claim in ratios(engines, measured) if claim.least]
    assert asked == [(pytest.approx(18.7), 2.0, True), (8.0, 2.0, True), (0.7, 0.25, False), (8.0, 0.25, True)]
    apart = {engine.key: conversion_us(engine, measured) for engine in engines}
    assert apart == pytest.approx({"decoded": 3.0, "roivec-diff": 18.0, "hashmap-snap": 27.0, "deltas": 17.0})


def test_figures_go_between_their_markers_and_nowhere_else():
    assert put(f"a {BEGIN} old {END} b", "new", BEGIN, END) == f"a {BEGIN}\n\nnew\n\n{END} b"
    with pytest.raises(SystemExit, match="no markers"):
        put("a b", "new", BEGIN, END)
