"""What holds for every run, on random sessions (see soup.py)."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

import naive
from arbl2.engine import Engine
from arbl2.events import Direction, FillStatus, Intent, Outcome, Side
from arbl2.frames import FrameBlock
from arbl2.kernels import exit_size_e8, size_for_e8
from arbl2.policy import Ask
from arbl2.rules import pair_rules
from properties.effort import examples
from properties.soup import ANCHOR, INSTRUMENTS, soup
from properties.twins import differences

MESSAGES = 250
seeds = st.integers(0, 10**9)


def run(config, frames, cuts=(), **options):
    """A finished engine and its events; ``cuts`` are where the session is split into blocks."""
    block = FrameBlock.from_frames(frames, ANCHOR)
    engine = Engine(INSTRUMENTS, config, **options)
    edges = [0, *sorted(cuts), len(block)]
    for start, stop in pairwise(edges):
        engine.feed(block.slice(start, stop))
    engine.finish()
    return engine, engine.drain()


def same_events(one, other):
    return one.decisions.tobytes() == other.decisions.tobytes() and one.fills.tobytes() == other.fills.tobytes()


@given(seed=seeds, cuts=st.lists(st.integers(0, MESSAGES), max_size=30))
@examples(40)
def test_blocks_change_nothing(seed, cuts):
    config, frames = soup(seed, MESSAGES)
    whole, events = run(config, frames)
    pieces, again = run(config, frames, cuts)
    assert pieces.digest() == whole.digest()
    assert same_events(again, events)
    single, once_more = run(config, frames, range(len(frames)))
    assert single.digest() == whole.digest()
    assert same_events(once_more, events)


@given(seed=seeds, cuts=st.lists(st.integers(0, MESSAGES), max_size=30))
@examples(60)
def test_books_are_those_of_the_slow_twin(seed, cuts):
    """State, window and full book with the origin of each level, wherever one looks."""
    config, frames = soup(seed, MESSAGES)
    block = FrameBlock.from_frames(frames, ANCHOR)
    engine, twin = Engine(INSTRUMENTS, config), naive.NaiveEngine(INSTRUMENTS, config)
    for start, stop in pairwise([0, *sorted(cuts), MESSAGES]):
        engine.feed(block.slice(start, stop))
        twin.feed(frames[start:stop], ANCHOR)
        assert not differences(engine, twin)


def test_sessions_reach_every_way_of_a_full_book():
    """What the comparisons above are worth: full books of every origin, gaps, copies, snapshots of all ages."""
    origins, reasons, most = set(), Counter(), 0
    for seed in range(60):
        config, frames = soup(seed, MESSAGES)
        twin = naive.NaiveEngine(INSTRUMENTS, config).feed(frames, ANCHOR)
        reasons += twin.reasons
        for book in twin.books["binance"].values():
            if book.synced and not book.windowed:
                origins |= {origin for side in ("bid", "ask") for _, _, origin in book.rungs(side)}
                most = max(most, book.updates)
    assert origins == {naive.SNAPSHOT, naive.CHANGE, naive.BEYOND}
    assert most > 30
    for reason in ("sequence_gap", "crossed", "unsorted", "copy", "futures", "wrong_shape", "not_json", "id_regress"):
        assert reasons["binance", reason], reason


@given(seed=seeds)
@examples(15)
def test_the_strict_decoder_changes_nothing(seed):
    config, frames = soup(seed, MESSAGES)
    assert run(config, frames, scanner=False)[0].digest() == run(config, frames)[0].digest()


class ThresholdInPython:
    """The threshold rule as a Python policy."""

    def __init__(self, config):
        self.policy = config.policy
        self.rules = {symbol: pair_rules(symbol, config.rules) for symbol in ("AAA", "BBB")}
        self.size_krw, self.most_krw = (
            round(float(text) * 10**8) for text in (config.policy.size_krw, config.policy.max_position_krw)
        )

    def decide(self, view):
        rules, exit_bps = self.rules[view.symbol], self.policy.tp_bps - self.policy.entry_bps
        at = view.upbit_ask_e8 or view.upbit_bid_e8
        size, most = size_for_e8(self.size_krw, at), size_for_e8(self.most_krw, at)
        if size <= 0 or most <= 0:
            return None
        size -= size % rules.lot_e8

        def close(held, px, least):
            return exit_size_e8(held, size, rules.lot_e8, px, least)

        back = (
            close(-view.held_upbit_e8, view.upbit_ask_e8, rules.upbit_min_notional_e8),
            close(view.held_binance_e8, view.binance_bid_e8, rules.binance_min_notional_e8),
        )
        forth = (
            close(view.held_upbit_e8, view.upbit_bid_e8, rules.upbit_min_notional_e8),
            close(-view.held_binance_e8, view.binance_ask_e8, rules.binance_min_notional_e8),
        )
        if any(back) and view.buy_upbit_bps >= exit_bps:
            return Ask(Direction.BUY_UPBIT, Intent.EXIT, *back)
        if any(forth) and view.sell_upbit_bps >= exit_bps:
            return Ask(Direction.SELL_UPBIT, Intent.EXIT, *forth)
        if not size or max(abs(view.held_upbit_e8), abs(view.held_binance_e8)) + size > most:
            return None
        if view.sell_upbit_bps >= self.policy.entry_bps and not any(forth):
            return Ask(Direction.SELL_UPBIT, Intent.ENTRY, size, size)
        if view.buy_upbit_bps >= self.policy.entry_bps and not any(back):
            return Ask(Direction.BUY_UPBIT, Intent.ENTRY, size, size)
        return None


@given(seed=seeds)
@examples(20)
def test_a_python_policy_with_the_same_rule_gives_the_same_run(seed):
    config, frames = soup(seed, MESSAGES)
    assume(config.rules)  # a policy does not see rules that the tape brings
    compiled, events = run(config, frames)
    python, again = run(config, frames, policy=ThresholdInPython(config))
    assert same_events(again, events)
    assert python.digest() == compiled.digest()


@given(seed=seeds, cut=st.integers(1, MESSAGES - 1))
@examples(40)
def test_the_past_does_not_depend_on_the_future(seed, cut):
    """What is written by a frame is the same whatever comes after it, even in the same block."""
    config, frames = soup(seed, MESSAGES)
    past = Engine(INSTRUMENTS, config)
    past.feed(FrameBlock.from_frames(frames[:cut], ANCHOR))
    known = past.drain()
    for future in (frames[cut:], soup(seed + 1, MESSAGES).frames[cut:]):
        _, events = run(config, [*frames[:cut], *future])
        assert events.decisions.tobytes().startswith(known.decisions.tobytes())
        assert events.fills.tobytes().startswith(known.fills.tobytes())
        later = events.decisions[len(known.decisions) :]
        assert (later["seq"] > cut).all()


def displayed(config, frames):
    """(time_ns, sizes by price) of every book that was displayed, by (venue, coin, side); the slow twin built it."""
    books = defaultdict(list)
    twin = naive.NaiveEngine(INSTRUMENTS, config)
    updates = Counter()
    for frame in frames:
        twin.frame(frame, ANCHOR.time_ns(frame.mono_ns))
        for venue, kept in twin.books.items():
            for name, book in kept.items():
                if book.updates > updates[name]:
                    updates[name] = book.updates
                    coin = name.removeprefix("KRW-").removesuffix("USDT")
                    books[venue, coin, Side.SELL].append((twin.time_ns, dict(book.bids)))
                    books[venue, coin, Side.BUY].append((twin.time_ns, dict(book.asks)))
    return books


@given(seed=seeds)
@examples(60)
def test_money_and_coins_are_conserved(seed):
    config, frames = soup(seed, MESSAGES)
    engine, events = run(config, frames)
    symbols, venues = engine.universe.symbols, ("", "upbit", "binance")
    expected = engine.ledger.balances(opening=True)
    for fill in events.fills:
        venue, coin = venues[fill["venue"]], symbols[fill["symbol"]]
        quote = "KRW" if venue == "upbit" else "USDT"
        sign = 1 if fill["side"] == Side.BUY else -1
        expected[venue][coin] += sign * int(fill["filled_e8"])
        expected[venue][quote] -= sign * int(fill["quote_e8"])
        expected[venue][coin if fill["fee_in_base"] else quote] -= int(fill["fee_e8"])
        limit_value = int(fill["limit_px_e8"]) * int(fill["filled_e8"])
        # never a worse price than the limit, but for rounding against us once a level
        assert sign * (int(fill["quote_e8"]) * 10**8 - limit_value) <= int(fill["levels"]) * 10**8
        assert 0 <= fill["filled_e8"] <= fill["size_e8"]
        assert (fill["status"] == FillStatus.FILLED) == (fill["filled_e8"] == fill["size_e8"])
    assert engine.ledger.balances() == expected
    assert min(min(row.values()) for row in expected.values()) >= 0
    assert len(events.fills) == sum(np.count_nonzero(events.decisions[f"{venue}_order_id"]) for venue in venues[1:])
    assert sorted(events.fills["order_id"].tolist()) == list(range(1, len(events.fills) + 1))
    refused = events.decisions[events.decisions["outcome"] != Outcome.ACCEPTED]
    assert not refused["upbit_order_id"].any()
    assert not refused["binance_order_id"].any()


@given(seed=seeds)
@examples(40)
def test_nothing_displayed_is_spent_twice(seed):
    """While the venue shows a level unchanged, all our orders together take no more from it than it shows."""
    config, frames = soup(seed, MESSAGES)
    engine, events = run(config, frames)
    books, venues = displayed(config, frames), ("", "upbit", "binance")
    taken = defaultdict(int)
    for fill in events.fills[events.fills["filled_e8"] > 0]:
        key = venues[fill["venue"]], engine.universe.symbols[fill["symbol"]], Side(int(fill["side"]))
        history = [levels for at, levels in books[key] if at <= fill["before_ns"]]
        limit = int(fill["limit_px_e8"])
        reach = {px: qty for px, qty in history[-1].items() if (px <= limit if key[2] is Side.BUY else px >= limit)}
        assert fill["filled_e8"] <= sum(reach.values())
        if fill["levels"] == 1 and len(reach) == 1:
            (px, shown), back = next(iter(reach.items())), len(history)
            while back and history[back - 1].get(px) == shown:
                back -= 1
            taken[key, px, back] += int(fill["filled_e8"])  # since the level came to show this much
            assert taken[key, px, back] <= shown
