"""The engine against its slow obvious twin, and the rules of fills on sessions small enough to follow by hand."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from arbl2.config import AggregatorConfig, PaperConfig, PolicyConfig, RunConfig, load
from arbl2.decoding import lay_out
from arbl2.engine import Engine
from arbl2.errors import EngineError
from arbl2.events import Direction, FillStatus, Intent, Outcome
from arbl2.frames import COLUMNS, Frame, FrameBlock, FrameKind, Op
from arbl2.policy import Ask
from arbl2.rules import RuleOverride
from arbl2.tape import TapeReader
from arbl2.updates import MAX_BLOCK, UPDATES, Reason, UpdateBlock
from arbl2_replay.synth import SYMBOLS, Fault, FaultKind, SynthConfig, synth_frames, synth_manifest
from arbl2_replay.wire import Book, binance_combined, binance_depth, upbit_orderbook
from golden.goldens import GOLDEN, NAMES
from naive import NaiveEngine
from properties.effort import EFFORT
from properties.soup import ANCHOR, INSTRUMENTS, soup

E8 = 10**8
MS = 10**6


def rows(events):
    return [dict(zip(events.dtype.names, row.tolist(), strict=True)) for row in events]


def compiled(instruments, config, frames, anchor, **options):
    engine = Engine(instruments, config, **options)
    engine.feed(FrameBlock.from_frames(frames, anchor))
    engine.finish()
    return engine, engine.drain()


def assert_same(engine, events, twin):
    assert rows(events.decisions) == twin.decisions
    assert rows(events.fills) == twin.fills
    assert engine.ledger.balances() == twin.balance
    assert {(venue, reason): n for venue, counts in engine.reasons().items() for reason, n in counts.items()} == twin.reasons
    assert engine.refusals() == twin.refusals
    names = engine.universe.instruments
    assert [row["updates"] for row in engine.books()] == [twin.books[str(i.venue)][i.name].updates for i in names]


def test_frames_are_laid_out_alike_packed_or_in_columns():
    others = [Frame(10**6 + kind, kind, 5, "binance", 7, kind, Op.NONE, b"{}", 3, 1) for kind in FrameKind]
    packed = FrameBlock.from_frames([*soup(3, 400).frames, *others], ANCHOR)
    columns = FrameBlock(**{name: getattr(packed, name) for name in (*COLUMNS, "offsets", "data")})
    found = []
    for block in (packed, columns):
        u = UpdateBlock()
        for name in ("what", "reason", "book"):
            getattr(u, name)[:] = 77
        lay_out(block, u)
        reasons = [Reason(reason).label for reason in u.reason[len(block) - len(FrameKind) : len(block)].tolist()]
        assert reasons == ["other_message", "sent", "opened", "closed", "request", "rest", "clock", "alarm"]
        assert u.time_ns[: len(block)].tolist() == [ANCHOR.time_ns(frame.mono_ns) for frame in block.frames()]
        assert u.offsets[1 : len(block) + 1].tolist() == list(itertools.accumulate(len(f.payload) for f in block.frames()))
        found.append([getattr(u, name)[: len(block) + 1].tolist() for name in UPDATES.names if name not in ("px_e8", "qty_e8")])
    assert found[0] == found[1]


@pytest.mark.parametrize("frames", [MAX_BLOCK, MAX_BLOCK + 1])
def test_no_more_frames_are_laid_out_than_there_is_room_for(frames):
    block = FrameBlock.from_frames([Frame(1, 2, 3, "upbit", 1, FrameKind.MESSAGE, Op.TEXT, b"")] * frames, ANCHOR)
    u = UpdateBlock()
    if frames > MAX_BLOCK:
        with pytest.raises(ValueError, match="4,097 frames"):
            lay_out(block, u)
    else:
        lay_out(block, u)
        assert u.seq.tolist() == [1] * frames


# ------------------------------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize("name", NAMES)
def test_golden_tapes(name):
    reader = TapeReader(GOLDEN / name / "tape")
    config = load(GOLDEN / name / "config.toml")
    frames = list(reader.frames())
    twin = NaiveEngine(reader.manifest.instruments, config).feed(frames, reader.anchor).finish()
    assert_same(*compiled(reader.manifest.instruments, config, frames, reader.anchor), twin)
    assert len(twin.fills) >= 4


TINY = msgspec.structs.replace(
    SYMBOLS["XRP"], binance_touch=300.0, binance_size=200.0, upbit_touch=250.0, upbit_size=150.0, upbit_spread_ticks=1.0
)
FAULTS = (
    Fault(kind=FaultKind.DISCONNECT, at_ms=3_000, venue="upbit", lasts_ms=700),
    Fault(kind=FaultKind.DISCONNECT, at_ms=5_000, venue="binance", lasts_ms=400),
    Fault(kind=FaultKind.STALE, at_ms=1_500, venue="binance", lasts_ms=900),
    Fault(kind=FaultKind.BACKWARDS, at_ms=2_000, venue="binance", code="XRPUSDT"),
    Fault(kind=FaultKind.UNSORTED, at_ms=2_700, venue="upbit", code="KRW-XRP"),
    Fault(kind=FaultKind.CROSSED, at_ms=6_100, venue="binance", code="XRPUSDT"),
    Fault(kind=FaultKind.TRUNCATED, at_ms=6_300, venue="upbit", code="KRW-XRP"),
    Fault(kind=FaultKind.WRONG_TOTAL, at_ms=6_500, venue="upbit", code="KRW-XRP"),
)


@pytest.mark.parametrize(
    ("seed", "faults", "upbit_ms", "binance_ms", "fee_in", "units", "form", "krw", "xrp"),
    [
        (1, (), 20.0, 60.0, "received", 30, "DEFAULT", "100000000", "50000"),
        (2, FAULTS, 20.0, 60.0, "quote", 15, "SIMPLE", "100000000", "50000"),
        (3, FAULTS, 0.0, 0.0, "received", 1, "DEFAULT", "3000000", "1500"),
        (4, (), 250.0, 5.0, "quote", 5, "SIMPLE", "2000000", "900"),
    ],
)
def test_synthetic_markets(seed, faults, upbit_ms, binance_ms, fee_in, units, form, krw, xrp):
    market = SynthConfig(
        seed=seed,
        duration_s=8.0,
        symbols=(TINY,),
        excursion_every_s=1.5,
        faults=faults,
        upbit_units=units,
        upbit_format=form,
        binance_depth=5 if units < 15 else 20,
    )
    coins = {"XRP": xrp}
    config = RunConfig(
        aggregator=AggregatorConfig(stale_s=0.5),
        policy=PolicyConfig(entry_bps=10.0, tp_bps=8.0, size_krw="1000000", max_position_krw="5000000"),
        paper=PaperConfig(
            upbit_latency_ms=upbit_ms,
            binance_latency_ms=binance_ms,
            binance_fee_in=fee_in,
            upbit_krw=krw,
            upbit_coins=coins,
            binance_coins=coins,
        ),
    )
    manifest, frames = synth_manifest(market), list(synth_frames(market))
    twin = NaiveEngine(manifest.instruments, config).feed(frames, manifest.anchor).finish()
    assert_same(*compiled(manifest.instruments, config, frames, manifest.anchor), twin)
    assert len(twin.fills) >= 4


def test_random_sessions():
    outcomes, statuses, most_levels = set(), set(), 0
    for seed in range(40 * EFFORT):
        config, frames = soup(seed, messages=300)
        twin = NaiveEngine(INSTRUMENTS, config).feed(frames, ANCHOR).finish()
        try:
            assert_same(*compiled(INSTRUMENTS, config, frames, ANCHOR), twin)
        except AssertionError as error:
            error.add_note(f"soup({seed}, messages=300)")
            raise
        outcomes |= {decision["outcome"] for decision in twin.decisions}
        statuses |= {fill["status"] for fill in twin.fills}
        most_levels = max(most_levels, *(fill["levels"] for fill in twin.fills), 0)
    assert outcomes == {Outcome.ACCEPTED, Outcome.MIN_NOTIONAL, Outcome.NO_BALANCE}
    assert statuses == set(FillStatus)
    assert most_levels >= 2


# ---------------------------------------------------------------------------------------------------- sessions by hand


XRP = {"upbit": ["KRW-USDT", "KRW-XRP"], "binance": ["XRPUSDT"]}


class Session:
    """Frames of one pair, XRP: prices in whole KRW and USDT, sizes in whole coins."""

    def __init__(self):
        self.frames = []
        self.conn = {"upbit": 1, "binance": 2}

    def _add(self, at_ms, venue, kind, payload):
        mono_ns = ANCHOR.mono_ns + round(at_ms * MS)
        op = Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE
        frame = Frame(len(self.frames) + 1, mono_ns, mono_ns, venue, self.conn[venue], kind, op, payload)
        self.frames.append(frame)
        return self

    def raw(self, at_ms, venue, payload):
        return self._add(at_ms, venue, FrameKind.MESSAGE, payload)

    def fx(self, at_ms, bid=1_000, ask=1_001):
        return self.raw(at_ms, "upbit", upbit_orderbook("KRW-USDT", _book([(bid, 10**6)], [(ask, 10**6)]), 1, units=1))

    def upbit(self, at_ms, bids, asks, units=5):
        return self.raw(at_ms, "upbit", upbit_orderbook("KRW-XRP", _book(bids, asks), 1, units=units))

    def binance(self, at_ms, bids, asks, update_id=1):
        return self.raw(at_ms, "binance", binance_combined("xrpusdt@depth20@100ms", binance_depth(_book(bids, asks), update_id)))

    def close(self, at_ms, venue):
        self._add(at_ms, venue, FrameKind.CLOSED, b"{}")
        self.conn[venue] += 2
        return self

    def run(self, config=None, **options):
        return compiled(XRP, config or RunConfig(), self.frames, ANCHOR, **options)


def _book(bids, asks):
    return Book(*([round(level[k] * E8) for level in side] for side in (bids, asks) for k in (0, 1)))


class Always:
    """Asks for the same trade whenever it is asked."""

    def __init__(self, direction, upbit, binance=0):
        self.ask = Ask(direction, Intent.ENTRY, round(upbit * E8), round(binance * E8))

    def decide(self, view):
        return self.ask


AT_ONCE = RunConfig(paper=PaperConfig(upbit_latency_ms=0.0, binance_latency_ms=0.0))


def test_orders_cannot_share_what_one_of_them_took():
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    for n in range(20):  # the same 100 coins are shown again and again
        session.upbit(10 + n, [(1_000, 1)], [(1_010, 100)])
    _, events = session.run(AT_ONCE, policy=Always(Direction.BUY_UPBIT, 9))
    assert (events.fills["filled_e8"] // E8).tolist() == [9] * 11 + [1]


def test_what_was_taken_comes_back_when_the_level_does():
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    ask = [(1_010, 10)]
    session.upbit(10, [(1_000, 1)], ask)  # decides, takes 10
    session.upbit(20, [(1_000, 1)], ask)  # nothing left: no ask price, refused
    session.upbit(30, [(1_000, 1)], [(1_011, 7)])  # gone inside the window: forgotten; takes 7
    session.upbit(40, [(1_000, 1)], ask)  # shown anew: takes 10 again
    session.upbit(50, [(1_000, 1)], ask)
    _, events = session.run(AT_ONCE, policy=Always(Direction.BUY_UPBIT, 10))
    assert (events.fills["filled_e8"] // E8).tolist() == [10, 7, 10]


def test_taken_levels_beyond_the_window_are_remembered():
    def at(ms, asks):
        session.upbit(ms, [(900, 1)], asks)

    deep = [(1_010, 10)]
    near = [(1_000 + k, 0.001) for k in range(5)]  # five units shown, all below 1,010
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    at(10, deep)  # takes 10
    session.fx(30_000).binance(30_000, [(1, 1e6)], [(1.1, 1e6)])
    at(30_010, deep)  # still displayed: the minute out of sight begins here
    at(30_020, near)  # 1,010 is out of sight; takes dust at 1,000 now and then
    session.fx(90_000).binance(90_000, [(1, 1e6)], [(1.1, 1e6)])
    at(90_005, near)
    at(90_010, deep)  # all of it ours
    at(90_020, near)
    session.fx(150_050).binance(150_050, [(1, 1e6)], [(1.1, 1e6)])
    at(150_060, near)  # not seen for more than a minute: forgotten
    at(150_070, deep)
    at(150_080, deep)
    _, events = session.run(AT_ONCE, policy=Always(Direction.BUY_UPBIT, 10))
    tens = events.fills[events.fills["limit_px_e8"] == 1_010 * E8]
    assert (tens["filled_e8"] // E8).tolist() == [10, 10]
    assert ((tens["time_ns"] - ANCHOR.wall_ns) // MS).tolist() == [10, 150_070]


def test_a_full_table_of_takes_forgets_the_farthest():
    """Seven sweeps of twenty levels, each below the one before, which is then out of sight."""
    config = RunConfig(paper=PaperConfig(upbit_latency_ms=10.0))
    session = Session().fx(0).binance(0, [(1, 1e6)], [(1.1, 1e6)])
    for n in range(7):
        top, at_ms = 1_000 - 30 * n, 1 + 30 * n
        session.upbit(at_ms, [(500, 1)], [(top, 1_000)], 30)  # decides: 20 coins at top or better
        session.upbit(at_ms + 5, [(500, 1)], [(top - 20 + k, 1) for k in range(20)], 30)
    session.upbit(300, [(500, 1)], [(980 + k, 1) for k in range(20)], 30)  # the first sweep's levels again
    session.upbit(400, [(500, 1)], [(980 + k, 1) for k in range(20)], 30)
    policy = Always(Direction.BUY_UPBIT, 20)
    _, events = session.run(config, policy=policy)
    upbit = events.fills
    assert (upbit["filled_e8"][:7] // E8).tolist() == [20] * 7
    assert upbit["limit_px_e8"][7] == 980 * E8  # free for us: 140 levels do not fit


def test_displayed_size_that_shrinks_shrinks_what_was_taken():
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    session.upbit(10, [(900, 1)], [(1_010, 10)])  # takes 6
    session.upbit(20, [(900, 1)], [(1_010, 5)])  # only 5 shown: all of it ours, nothing to take
    session.upbit(30, [(900, 1)], [(1_010, 8)])  # 3 came on top
    session.upbit(40, [(900, 1)], [(1_010, 8)])
    _, events = session.run(AT_ONCE, policy=Always(Direction.BUY_UPBIT, 6))
    assert (events.fills["filled_e8"] // E8).tolist() == [6, 3]


def test_an_order_meets_the_book_received_at_or_before_its_arrival():
    config = RunConfig(paper=PaperConfig(upbit_latency_ms=20.0))
    for last_before_ms, filled in ((29.0, 4), (30.0, 4), (30.000001, 9)):
        session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
        session.upbit(10, [(900, 1)], [(1_010, 9)])  # arrives at 30
        session.upbit(last_before_ms, [(900, 1)], [(1_010, 4)])
        session.upbit(60, [(900, 1)], [(1_009, 2), (1_010, 1)])
        _, events = session.run(config, policy=Always(Direction.BUY_UPBIT, 9))
        fill = events.fills[0]
        assert fill["filled_e8"] == filled * E8
        assert fill["arrive_ns"] - fill["time_ns"] == 20 * MS
        assert fill["after_filled_e8"] == (3 if filled == 4 else 4) * E8  # the other bracket
        assert fill["resolved"] == 1


@pytest.mark.parametrize(
    ("spoil", "status", "resolved"),
    [
        (lambda s: s.close(25, "upbit"), FillStatus.NO_BOOK, 0),
        (lambda s: s.close(35, "upbit"), FillStatus.FILLED, 0),
        (lambda s: s.upbit(25, [(1_020, 1)], [(1_010, 1)]), FillStatus.NO_BOOK, 0),
        (lambda s: s.upbit(35, [(1_020, 1)], [(1_010, 1)]), FillStatus.FILLED, 0),
        (lambda s: s, FillStatus.FILLED, 1),
    ],
    ids=["closed before", "closed after", "doubt before", "doubt after", "good"],
)
def test_no_book_no_fill(spoil, status, resolved):
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    spoil(session).upbit(50, [(900, 1)], [(1_010, 9)])
    config = RunConfig(paper=PaperConfig(upbit_latency_ms=20.0))
    engine, events = session.run(config, policy=Always(Direction.BUY_UPBIT, 9))
    fill = events.fills[0]
    assert (fill["status"], fill["resolved"]) == (status, resolved)
    assert (fill["filled_e8"] == 0) == (status == FillStatus.NO_BOOK)
    assert engine.ledger.changes()["upbit"]["XRP"] == events.fills["filled_e8"].sum()


def test_an_order_that_arrives_after_the_tape_is_not_filled():
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    engine, events = session.run(policy=Always(Direction.BUY_UPBIT, 9))
    assert events.fills["status"].tolist() == [FillStatus.IN_FLIGHT]
    assert set(engine.ledger.changes()["upbit"].values()) == {0}


def test_exactly_stale_still_decides():
    for age_ns, decisions in ((2_000_000_000, 1), (2_000_000_001, 0)):
        session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
        session.upbit(1 + age_ns / MS, [(900, 1)], [(1_010, 9)])
        _, events = session.run(policy=Always(Direction.BUY_UPBIT, 9))
        assert len(events.decisions) == decisions


def test_a_refusal_is_written_once_an_episode_and_always_counted():
    config = RunConfig(paper=PaperConfig(upbit_krw="100"), policy=PolicyConfig(entry_bps=-200.0, tp_bps=-400.0, size_krw="9090"))
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    for n in range(5):
        session.upbit(10 + n, [(900, 1)], [(1_010, 9)])
    session.upbit(20, [(900, 1)], [(1_200, 9)])  # the edge goes below the threshold, and comes back
    session.upbit(21, [(900, 1)], [(1_010, 9)])
    engine, events = session.run(config)
    assert events.decisions["seq"].tolist() == [3, 9]
    assert events.decisions["outcome"].tolist() == [Outcome.NO_BALANCE] * 2
    assert engine.refusals() == {"no_balance": 6}


@pytest.mark.parametrize(
    ("size", "outcome"),
    [
        (0.1, Outcome.MIN_NOTIONAL),
        (9e9, Outcome.OVERFLOW),
        (9e10, Outcome.OVERFLOW),
        (9e11, Outcome.BAD_ASK),
        (0, Outcome.BAD_ASK),
        (-9, Outcome.BAD_ASK),
        (9.05, Outcome.BAD_ASK),  # not a whole lot
    ],
)
def test_asks_that_cannot_be_sent_are_refused(size, outcome):
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    _, events = session.run(policy=Always(Direction.BUY_UPBIT, size))
    assert events.decisions["outcome"].tolist() == [outcome]
    assert len(events.fills) == 0


def test_a_refusal_after_an_accepted_ask_is_written_again():
    """All in one episode: too small, again too small, good, too small."""

    class Script:
        sizes = iter((0.1, 0.1, 9, 0.1))

        def decide(self, view):
            return Ask(Direction.BUY_UPBIT, Intent.ENTRY, round(next(self.sizes) * E8), 0)

    config = RunConfig(policy=PolicyConfig(entry_bps=-200.0, tp_bps=-400.0), paper=PaperConfig(upbit_latency_ms=0.0))
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    for n in range(4):
        session.upbit(10 + n, [(900, 1)], [(1_010, 99)])
    _, events = session.run(config, policy=Script())
    small, good = Outcome.MIN_NOTIONAL, Outcome.ACCEPTED
    assert events.decisions["outcome"].tolist() == [small, good, small]
    assert events.decisions["first_in_episode"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(("krw", "outcome"), [("9094.5", Outcome.NO_BALANCE), ("9095", Outcome.ACCEPTED)])
def test_a_buy_sets_the_fee_aside_too(krw, outcome):
    """9 coins at 1,010 KRW and 5 bp: 9,094.545 KRW."""
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    config = RunConfig(paper=PaperConfig(upbit_krw=krw))
    _, events = session.run(config, policy=Always(Direction.BUY_UPBIT, 9))
    assert events.decisions["outcome"].tolist() == [outcome]


@pytest.mark.parametrize(("krw", "outcomes"), [("19000", [0, 0]), ("17000", [0, Outcome.NO_BALANCE])])
def test_money_of_an_order_in_flight_is_not_spent_again(krw, outcomes):
    """One KRW-USDT book makes both coins ask at once, for 9,095 KRW each."""
    config = RunConfig(paper=PaperConfig(upbit_krw=krw), symbols=("XRP", "XYZ"), rules={"XYZ": RuleOverride(lot="0.1")})
    session = Session().binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(2, [(900, 1)], [(1_010, 9)])
    for frame in session.frames[:2]:
        session.raw(3, frame.venue, frame.payload.replace(b"XRP", b"XYZ").replace(b"xrp", b"xyz"))
    names = {"upbit": ["KRW-USDT", "KRW-XRP", "KRW-XYZ"], "binance": ["XRPUSDT", "XYZUSDT"]}
    _, events = compiled(names, config, session.fx(4).frames, ANCHOR, policy=Always(Direction.BUY_UPBIT, 9))
    assert events.decisions["outcome"].tolist() == outcomes


@pytest.mark.parametrize(("most", "entries"), [("20020", 2), ("20019", 1)])
def test_the_position_may_reach_its_limit(most, entries):
    """Entries of 10 coins at an ask of 1,001 KRW."""
    config = RunConfig(
        policy=PolicyConfig(entry_bps=10.0, tp_bps=1_000.0, size_krw="10010", max_position_krw=most),
        paper=PaperConfig(upbit_latency_ms=0.0, binance_latency_ms=0.0),
    )
    session = Session().fx(0).binance(1, [(1.2, 1e6)], [(1.3, 1e6)])
    for n in range(5):
        session.upbit(10 + n, [(900, 1)], [(1_001, 1e6)])
    _, events = session.run(config)
    assert events.decisions["intent"].tolist() == [Intent.ENTRY] * entries


def test_no_entry_while_one_leg_is_open_the_other_way():
    """The Upbit leg of a purchase misses, its Binance leg is sold: a sale on Upbit may only close that."""
    config = RunConfig(
        policy=PolicyConfig(entry_bps=10.0, tp_bps=1_000.0, size_krw="10010", max_position_krw="100000"),
        paper=PaperConfig(upbit_latency_ms=20.0, binance_latency_ms=0.0),
    )
    session = Session().fx(0).binance(1, [(1.2, 1e6)], [(1.3, 1e6)]).upbit(2, [(900, 1)], [(1_001, 1e6)])
    session.upbit(10, [(900, 1)], [(1_100, 1e6)])  # the ask is gone when the order arrives
    session.binance(100, [(0.9, 1e6)], [(1, 1e6)], 2).upbit(101, [(1_006, 1e6)], [(1_200, 1e6)])  # 50 bp the other way
    _, events = session.run(config)
    assert events.fills["status"].tolist() == [FillStatus.FILLED, FillStatus.UNFILLED]
    assert len(events.decisions) == 1


def test_a_coin_without_rules_is_not_traded():
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    renamed = {"upbit": ["KRW-USDT", "KRW-ZZZ"], "binance": ["ZZZUSDT"]}
    frames = [replace(f, payload=f.payload.replace(b"XRP", b"ZZZ").replace(b"xrp", b"zzz")) for f in session.frames]
    _, events = compiled(renamed, RunConfig(), frames, ANCHOR, policy=Always(Direction.BUY_UPBIT, 9))
    assert events.decisions["outcome"].tolist() == [Outcome.NO_RULES]


def test_an_account_that_outgrows_64_bits_stops_the_run():
    """Two sales of 40 billion KRW on top of 40 billion: 120 billion do not fit, and a wrong balance would be worse than none."""
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    for n in range(4):
        session.upbit(10 + n, [(100, 4e9)], [(101, 9)])
    config = RunConfig(paper=PaperConfig(upbit_latency_ms=0.0, upbit_krw="40000000000", upbit_coins={"XRP": "4000000000"}))
    with pytest.raises(EngineError, match="does not fit in 64 bits"):
        session.run(config, policy=Always(Direction.SELL_UPBIT, 4e8))


def test_a_finished_run_takes_no_more_frames():
    session = Session().fx(0)
    engine, _ = session.run()
    with pytest.raises(EngineError, match="has ended"):
        engine.feed(FrameBlock.from_frames(session.frames, ANCHOR))


@pytest.mark.parametrize(("entry_bps", "intents"), [(0.0, [Intent.ENTRY, Intent.EXIT]), (1e-9, [])])
def test_thresholds_are_inclusive(entry_bps, intents):
    """Both edges are exactly 0: 2,002 KRW for 2 USDT at 1,001, and 2,000 KRW for 2 USDT at 1,000."""
    config = RunConfig(policy=PolicyConfig(entry_bps=entry_bps, tp_bps=entry_bps))
    session = Session().fx(0).binance(1, [(1.9, 1e6)], [(2, 1e6)]).upbit(2, [(2_002, 1e6)], [(2_200, 1e6)])
    session.binance(200, [(2, 1e6)], [(2.1, 1e6)], 2).upbit(201, [(1_900, 1e6)], [(2_000, 1e6)])
    _, events = session.run(config)
    assert events.decisions["intent"].tolist() == intents
    assert events.decisions["edge_bps"].tolist() == [0.0] * len(intents)


@pytest.mark.parametrize(("stale_s", "status"), [(0.020, FillStatus.FILLED), (0.019999999, FillStatus.NO_BOOK)])
def test_a_book_may_be_exactly_stale_when_an_order_arrives(stale_s, status):
    config = RunConfig(aggregator=AggregatorConfig(stale_s=stale_s), paper=PaperConfig(upbit_latency_ms=20.0))
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    _, events = session.upbit(40, [(900, 1)], [(1_010, 9)]).run(config, policy=Always(Direction.BUY_UPBIT, 9))
    assert events.fills["status"][0] == status


def test_orders_that_arrive_together_go_in_the_order_sent():
    config = RunConfig(paper=PaperConfig(upbit_latency_ms=20.0, binance_latency_ms=20.0))
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    session.close(20, "binance").close(21, "upbit").fx(50)
    _, events = session.run(config, policy=Always(Direction.BUY_UPBIT, 9, 9))
    assert events.fills["order_id"].tolist() == [1, 2]
    assert events.fills["status"].tolist() == [FillStatus.NO_BOOK] * 2


def test_messages_lost_by_the_recorder_put_books_in_doubt():
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)]).upbit(10, [(900, 1)], [(1_010, 9)])
    session._add(15, "upbit", FrameKind.ALARM, b'{"alarm":"dropped","count":3}')
    session.fx(50).upbit(51, [(900, 1)], [(1_010, 9)])
    _, events = session.run(policy=Always(Direction.BUY_UPBIT, 9))
    assert events.fills["status"].tolist() == [FillStatus.NO_BOOK, FillStatus.IN_FLIGHT]


def test_full_tables_refuse_and_do_not_overflow():
    """Binance is silent while Upbit goes on, and its legs wait by the hundred for the book after their arrival."""
    session = Session().fx(0).binance(1, [(1, 1e6)], [(1.1, 1e6)])
    for n in range(700):
        session.upbit(2 + n / 10, [(1_200, 1e6 + n)], [(1_210, 1e6)])
    session.binance(90, [(1, 1e6)], [(1.1, 1e6)], 2)
    config = RunConfig(
        policy=PolicyConfig(size_krw="12100", max_position_krw="1000000000"),
        paper=PaperConfig(upbit_latency_ms=0.0, binance_latency_ms=0.0, upbit_coins={"XRP": "100000"}),
    )
    twin = NaiveEngine(XRP, config).feed(session.frames, ANCHOR).finish()
    engine, events = session.run(config)
    assert_same(engine, events, twin)
    assert engine.refusals()["orders_full"] == 700 - 511
    binance = events.fills[events.fills["venue"] == 2]
    assert len(binance) == 512  # one more once the others were resolved


# each level of a walk rounds up by itself, so that many tiny better levels cost more than ceil(limit x size)
def test_rounding_never_overdraws_an_account():
    limit = 1.0000003
    dust = [((E8 + 1 + k) / E8, 1 / E8) for k in range(19)]
    most = 0
    for spare in range(40):
        session = Session().fx(0).upbit(1, [(1_100, 1_000)], [(1_101, 1_000)]).binance(2, [(0.5, 1)], [(limit, 20)])
        session.binance(5, [(0.5, 1)], [*dust, (limit, 20)], 2).binance(90, [(0.5, 1)], [(limit, 20)], 3)
        config = RunConfig(
            policy=PolicyConfig(entry_bps=100.0, size_krw="11010", max_position_krw="11010"),
            paper=PaperConfig(binance_usdt=f"10.{300 + spare:08d}"),
        )
        engine, events = session.run(config)
        assert engine.ledger.balances()["binance"]["USDT"] >= 0
        most = max(most, *events.fills["levels"].tolist(), 0)
    assert most == 20


# ------------------------------------------------------------------------------------------------------- other machines

_CHILD = """
import sys
from properties.soup import ANCHOR, INSTRUMENTS, soup
from arbl2.engine import Engine
from arbl2.frames import FrameBlock
for seed in range(int(sys.argv[1])):
    config, frames = soup(seed, messages=int(sys.argv[2]))
    engine = Engine(INSTRUMENTS, config)
    engine.feed(FrameBlock.from_frames(frames, ANCHOR))
    engine.finish()
    print(engine.digest())
"""


def _digests(sessions, messages, **environment):
    tests = Path(__file__).resolve().parents[1]
    out = subprocess.run(
        [sys.executable, "-c", _CHILD, str(sessions), str(messages)],
        env={**os.environ, "PYTHONPATH": str(tests), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    return out.stdout.split()


def test_the_same_digests_without_the_jit():
    here = []
    for seed in range(6):
        config, frames = soup(seed, messages=120)
        here.append(compiled(INSTRUMENTS, config, frames, ANCHOR)[0].digest())
    assert _digests(6, 120, NUMBA_DISABLE_JIT="1", PYTHONHASHSEED="5") == here
