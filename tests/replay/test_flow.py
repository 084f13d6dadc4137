"""Trades and changes made of books: laid beside a slow twin that keeps every level in a dictionary."""

from arbl2_replay.flow import MOST_LEVELS, BinanceFlow, DeepBook, UpbitFlow, taken
from arbl2_replay.synth import SynthConfig, market_events
from arbl2_replay.wire import Book


def events(code, seconds=60.0):
    return [event for event in market_events(SynthConfig(seed=4, duration_s=seconds)) if event.code == code]


def test_changes_applied_to_the_first_book_give_every_later_one():
    first, *rest = events("BTCUSDT")
    flow = BinanceFlow(first)
    start = flow.deep.book(5_000)
    twins = [{"b": dict(zip(*start[:2], strict=True)), "a": dict(zip(*start[2:], strict=True))} for _ in "fs"]
    last_ids = [first.mark, first.mark]
    for number, event in enumerate(rest, 1):
        moved = flow.advance(event, 1, slow_is_due=number % 10 == 0)
        for k, change in enumerate((moved.change, moved.slow)):
            if change is None:
                continue
            assert change.first_id == last_ids[k] + 1
            last_ids[k] = change.last_id
            assert change.last_id == event.mark
            for side, levels in (("b", change.bids), ("a", change.asks)):
                for px, size in levels:
                    if size:
                        twins[k][side][px] = size
                    else:
                        twins[k][side].pop(px, None)
            bids, asks = sorted(twins[k]["b"].items(), reverse=True), sorted(twins[k]["a"].items())
            book = Book(*zip(*bids[:20], strict=True), *zip(*asks[:20], strict=True))
            assert book == event.book
            deep = flow.deep.book(5_000)
            assert (list(zip(*deep[:2], strict=True)), list(zip(*deep[2:], strict=True))) == (bids, asks)
            assert bids[0][0] < asks[0][0]
        assert moved.touch == (_touch(event.book) != _touch(rest[number - 2].book if number > 1 else first.book))
    assert len(twins[0]["b"]) > 30
    assert last_ids[0] == rest[-1].mark


def _touch(book):
    return [side[0] for side in book]


def test_the_farthest_levels_are_deleted_and_the_change_says_so():
    def ladder(top):
        px = tuple(range(top, top - 20, -1))
        return Book(px, (1,) * 20, (10**9,), (1,))

    deep, twin = DeepBook(ladder(1_000), 1), set(range(981, 1_001))
    for step in range(1, 200):
        change = deep.advance(ladder(1_000 + 20 * step), 1 + step)
        twin |= {px for px, size in change.bids if size}
        twin -= {px for px, size in change.bids if not size}
        assert sorted(twin, reverse=True) == list(deep.book(5_000).bid_px_e8)
    assert len(twin) == MOST_LEVELS
    assert deep.advance(ladder(1), 200) is None  # the id has not moved


def test_a_side_that_shows_few_levels_shows_all():
    deep = DeepBook(Book((5, 4, 3), (1, 1, 1), (6,), (1,)), 1)
    change = deep.advance(Book((5, 3), (1, 2), (7,), (1,)), 3)
    assert change == (2, 3, [(4, 0), (3, 2)], [(6, 0), (7, 1)])


def test_what_was_displayed_and_is_gone_was_traded():
    before = Book((99, 98), (5, 6), (101, 102, 103), (1, 2, 3))
    assert taken(before, before) == []
    assert taken(before, before._replace(ask_px_e8=(103,), ask_size_e8=(1,))) == [
        (101, 1, False),
        (102, 2, False),
        (103, 2, False),
    ]
    assert taken(before, before._replace(bid_size_e8=(2, 6))) == [(99, 3, True)]
    assert taken(before, before._replace(bid_size_e8=(9, 6))) == []
    assert taken(before, Book((), (), (), ())) == []


def test_trades_count_on_and_the_last_one_is_kept():
    first, *rest = events("KRW-BTC")
    flow = UpbitFlow(first, first.mark)
    seen = [flow.last.sequential_id]
    for event in rest:
        moved = flow.advance(event, event.mark, slow_is_due=False)
        rows = [flow.row(event, moved, number) for number in range(len(moved.trades))]
        seen += [row.sequential_id for row in rows]
        if rows:
            assert flow.last == rows[-1]
            assert rows[-1].book == event.book
    assert seen == sorted(set(seen))
    assert len(seen) > 50
