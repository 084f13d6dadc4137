"""Books from Binance depth changes: the venue's numbered steps case by case, and the limits. The slow twin watches every frame.

A script is frames in order, separated by ``;``. ``11-12 b100=1 a101=0`` is a change of ids 11 to 12 that sets the bid at 100 to 1
and removes the ask at 101; ``=10 ...`` is a snapshot of id 10 and its request before it; ``?BTCUSDT`` a request alone and
``!10 ...`` a snapshot alone; ``w10 ...`` a partial window; ``bad 13-14`` a change that cannot be read; ``x`` closes the
connection and ``lost`` says that messages of it were dropped. ``@2`` is connection 2 instead of 1.
"""

from __future__ import annotations

from itertools import count

import pytest

from arbl2.aggregator import Level, LevelFrom, SourceStatus
from arbl2.book import ladder, window
from arbl2.config import AggregatorConfig, RunConfig
from arbl2.engine import Engine
from arbl2.frames import Anchor, ExchangeId, Frame, FrameBlock, FrameKind, Op
from arbl2.kernels import LADDER, WAIT_LEVELS, WAIT_ROWS
from arbl2.updates import MAX_CHANGES
from arbl2_replay.wire import Book, DepthChange, binance_combined, binance_depth, binance_diff
from naive import NaiveEngine
from properties.twins import differences

E8 = 10**8
MS = 10**6
ANCHOR = Anchor(wall_ns=1_767_312_000_000_000_000, mono_ns=1_000)
ONE = {"upbit": ["KRW-BTC", "KRW-USDT"], "binance": ["BTCUSDT"]}
TWO = {"upbit": ["KRW-BTC", "KRW-ETH", "KRW-USDT"], "binance": ["BTCUSDT", "ETHUSDT"]}
BTCUSDT = 2
"""The book of that name where there is one Binance instrument."""
SESSION = 1 << 20


def levels(words):
    """(price, size) in 10^-8 by side of words like ``b100=1``."""
    sides = {"b": [], "a": []}
    for word in words:
        px, _, size = word[1:].partition("=")
        sides[word[0]].append((round(float(px) * E8), round(float(size) * E8)))
    return sides["b"], sides["a"]


def book(bids, asks):
    return Book(*([level[k] for level in side] for side in (bids, asks) for k in (0, 1)))


def request(name):
    return b'{"method":"GET","url":"https://api.binance.com/api/v3/depth?symbol=%b&limit=5000"}' % name.encode()


def change(first_id, last_id, bids=(), asks=(), name="BTCUSDT"):
    data = binance_diff(name, DepthChange(first_id, last_id, bids, asks), 1_700_000_000_000 + last_id)
    return binance_combined(f"{name.lower()}@depth@100ms", data)


class Feed:
    """Frames one at a time, 10 ms apart, into the engine and its twin, which must agree after each."""

    def __init__(self, script="", depth="auto", instruments=ONE):
        self.config = RunConfig(aggregator=AggregatorConfig(binance_depth=depth))
        self.instruments = instruments
        self.engine = Engine(instruments, self.config)
        self.twin = NaiveEngine(instruments, self.config)
        self.frames = []
        self.play(script)

    def add(self, payload, kind=FrameKind.MESSAGE, conn=1):
        n = len(self.frames) + 1
        op = Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE
        self.frames.append(Frame(n, 0, ANCHOR.mono_ns + n * 10 * MS, "binance", conn, kind, op, payload))
        before = self.twin.reasons.copy()
        self.engine.feed(FrameBlock.from_frames(self.frames[-1:], ANCHOR))
        self.twin.feed(self.frames[-1:], ANCHOR)
        assert not differences(self.engine, self.twin)
        ((_, self.reason),) = self.twin.reasons - before
        return self

    def play(self, script, name="BTCUSDT"):
        for line in filter(None, map(str.strip, script.split(";"))):
            head, *words = line.split()
            conn = next((int(word[1:]) for word in words if word[0] == "@"), 1)
            words = [word for word in words if word[0] != "@"]
            rest = conn // SESSION * SESSION
            if head == "x":
                self.add(b"{}", FrameKind.CLOSED, conn)
            elif head == "lost":
                self.add(b'{"alarm":"dropped"}', FrameKind.ALARM, conn)
            elif head == "bad":
                first_id, last_id = map(int, words[0].split("-"))
                self.add(change(first_id, last_id, name=name).replace(b'"b":[]', b'"b":null'), conn=conn)
            elif head[0] == "?":
                self.add(request(head[1:]), FrameKind.REQUEST, rest)
            elif head[0] in "=!":
                if head[0] == "=":
                    self.add(request(name), FrameKind.REQUEST, rest)
                self.add(binance_depth(book(*levels(words)), int(head[1:]), depth=10**6), FrameKind.RESPONSE, rest)
            elif head[0] == "w":
                data = binance_depth(book(*levels(words)), int(head[1:]))
                self.add(binance_combined(f"{name.lower()}@depth20@100ms", data), conn=conn)
            else:
                first_id, last_id = map(int, head.split("-"))
                self.add(change(first_id, last_id, *levels(words), name=name), conn=conn)
        return self

    def shown(self, name="BTCUSDT"):
        """``status b100=1 ... a101=1 ...`` of what is displayed."""
        k = self.engine.universe.books(ExchangeId.BINANCE)[name]
        words = [str(self.engine.aggregator.status(k))]
        for side, letter in enumerate("ba"):
            pairs = zip(*(column.tolist() for column in window(self.engine.state, k, side)), strict=True)
            words += [f"{letter}{px / E8:g}={size / E8:g}" for px, size in pairs]
        return " ".join(words)


SNAP = "=12 b100=1 b99=2 a101=3 a102=4"  # the book most cases start from, active once 13-13 has come
SYNCED = f"{SNAP}; 13-13 b99=5"
ACTIVE = "active b100=1 b99=5 a101=3 a102=4"


@pytest.mark.parametrize(
    ("script", "shown", "reason"),
    [
        # steps 1 to 3: changes are kept until the snapshot comes; alone they say nothing, and neither does a snapshot alone
        ("11-12 b100=1 a101=1", "disconnected", "diff"),
        (SNAP, "disconnected", "rest"),
        (SYNCED, ACTIVE, "diff"),
        # step 4: a snapshot older than the first change kept does not reach it; the next one may
        ("11-12 b100=1; =9 b99=1 a101=1", "disconnected", "rest"),
        ("11-12 b100=1; =9 b99=1 a101=1; =10 b98=1 a101=1", "active b100=1 b98=1 a101=1", "rest"),
        # step 5: what the snapshot has is dropped, also at the same id; the first one kept covers the id after it
        ("11-12 b100=9; 13-14 b99=3; =12 b100=1 b99=1 a101=1", "active b100=1 b99=3 a101=1", "rest"),
        ("11-12 b100=9; 13-15 b99=3; =13 b100=1 b99=1 a101=1", "active b100=1 b99=3 a101=1", "rest"),
        ("11-12 b100=9; 13-13 b100=8; =20 b100=1 a101=1", "disconnected", "rest"),
        ("11-12 b100=9; =20 b100=1 b99=1 a101=1; 13-20 b100=8", "disconnected", "diff"),
        ("11-12 b100=9; =20 b100=1 b99=1 a101=1; 13-20 b100=8; 21-22 b99=3", "active b100=1 b99=3 a101=1", "diff"),
        ("11-12 b100=9; =20 b100=1 b99=1 a101=1; 13-19 b100=8; 20-22 b99=3", "active b100=1 b99=3 a101=1", "diff"),
        # step 6 and the update procedure: known already, next, overlapping, missing
        (f"{SYNCED}; 13-13 b100=9", ACTIVE, "diff"),
        (f"{SYNCED}; 9-12 b100=9", ACTIVE, "diff"),
        (f"{SYNCED}; 14-16 b100=9", "active b100=9 b99=5 a101=3 a102=4", "diff"),
        (f"{SYNCED}; 12-14 b100=9", "active b100=9 b99=5 a101=3 a102=4", "diff"),
        (f"{SYNCED}; 14-14", ACTIVE, "diff"),
        (f"{SYNCED}; 15-15 b100=9", ACTIVE.replace("active", "stale"), "sequence_gap"),
        (f"{SNAP}; 14-14 b100=9", "disconnected", "sequence_gap"),
        (f"{SYNCED}; 15-15 b100=9; 16-16 b99=0", ACTIVE.replace("active", "stale"), "diff"),
        (f"{SYNCED}; 15-15 b100=9; 14-14 b99=7", ACTIVE.replace("active", "stale"), "diff"),
        (f"{SYNCED}; 15-15 b100=9; 16-16 b99=4; =15 b99=1 b98=1 a101=1", "active b99=4 b98=1 a101=1", "rest"),
        (f"{SYNCED}; 15-15 b100=9; =13 b99=1 b98=1 a101=1", ACTIVE.replace("active", "stale"), "rest"),
        # sizes are absolute, 0 removes, removing what is not there is normal; no price is no level
        (f"{SYNCED}; 14-14 b100=0 b97=0 a101=3 a102=7 a555=0", "active b99=5 a101=3 a102=7", "diff"),
        (f"{SYNCED}; 14-14 b100=0 b100=6 b0=5 a0=5", ACTIVE.replace("b100=1", "b100=6"), "diff"),
        (f"{SYNCED}; 14-14 b100.5=0.00000001 b99.5=0.000000001", ACTIVE.replace("b100=1", "b100.5=1e-08 b100=1"), "diff"),
        # a gap among the changes kept: only a snapshot from behind it helps
        ("11-12 b100=1; 14-15 b99=1; =11 b98=1 a101=1", "disconnected", "rest"),
        ("11-12 b100=1; 14-15 b99=1; =12 b98=1 a101=1", "disconnected", "rest"),
        ("11-12 b100=1; 14-15 b99=1; =13 b98=1 a101=1", "active b99=1 b98=1 a101=1", "rest"),
        ("11-12 b100=1; 14-15 b99=1; =11 b98=1 a101=1; =13 b97=1 a101=1", "active b99=1 b97=1 a101=1", "rest"),
        # a snapshot while the book is whole: an old one says nothing, a newer one is the book from then on
        (f"{SYNCED}; =13 b50=1 a60=1; 14-14 b98=0", ACTIVE, "diff"),
        (f"{SYNCED}; =20 b50=1 a60=1", ACTIVE, "rest"),
        (f"{SYNCED}; =20 b100=8 b99=1 a101=1; 14-20 b100=9", ACTIVE, "diff"),
        (f"{SYNCED}; =20 b100=8 b99=1 a101=1; 14-20 b100=9; 21-21 b99=7", "active b100=8 b99=7 a101=1", "diff"),
        (f"{SYNCED}; =20 b100=8 b99=1 a101=1; 22-22 b99=7", ACTIVE.replace("active", "stale"), "sequence_gap"),
        # a snapshot that is no book says nothing
        (f"{SYNCED}; =20 b99=1 b100=1 a101=1; 14-14 b98=0", ACTIVE, "diff"),
        (f"{SYNCED}; =20 b99=1 b100=1 a101=1", ACTIVE, "unsorted"),
        (f"{SYNCED}; =20 b99=1 a98=1", ACTIVE, "crossed"),
        (f"{SYNCED}; =0 b99=1 a101=1", ACTIVE, "rest"),
        ("=12 b100=1 b99=0 b98=1 a0=5 a101=1; 13-13", "active b100=1 b98=1 a101=1", "diff"),
        # the connection closes: another one may go on with the chain, or must start over
        (f"{SYNCED}; x", ACTIVE.replace("active", "disconnected"), "closed"),
        (f"{SYNCED}; x @2", ACTIVE, "closed"),
        (f"{SYNCED}; x; 14-15 b99=7 @2", ACTIVE.replace("b99=5", "b99=7"), "diff"),
        (f"{SYNCED}; x; 13-13 b99=7 @2", ACTIVE.replace("active", "disconnected"), "diff"),
        (f"{SYNCED}; x; 16-17 b99=7 @2", ACTIVE.replace("active", "disconnected"), "sequence_gap"),
        (f"{SYNCED}; x; 16-17 b99=7 @2; =16 b99=1 a101=1", "active b99=7 a101=1", "rest"),
        ("11-12 b100=1; x; =11 b99=1 b98=1 a101=1", "disconnected", "rest"),
        ("11-12 b100=1; x; =11 b99=1 b98=1 a101=1; 13-14 b98=7 @2", "active b100=1 b99=1 b98=7 a101=1", "diff"),
        ("11-12 b100=1; x; =11 b99=1 b98=1 a101=1; 14-14 b98=7 @2", "disconnected", "sequence_gap"),
        ("11-12 b100=1; 11-12 @2; x; 13-13 @2; =11 b99=1 b98=1 a101=1", "active b100=1 b99=1 b98=1 a101=1", "rest"),
        ("11-12 b100=1; 13-13 @2; x @2; =11 b99=1 b98=1 a101=1; 14-14", "active b100=1 b99=1 b98=1 a101=1", "diff"),
        ("11-12 b100=1; x @2; =11 b99=1 b98=1 a101=1", "active b100=1 b99=1 b98=1 a101=1", "rest"),
        ("11-12 b100=1; lost; =11 b99=1 b98=1 a101=1", "disconnected", "rest"),
        # messages were lost, or one cannot be read: in doubt until the next good one, which says whether any is missing
        (f"{SYNCED}; lost", ACTIVE.replace("active", "stale"), "alarm"),
        (f"{SYNCED}; lost; 14-14", ACTIVE, "diff"),
        (f"{SYNCED}; lost; 13-13 @2", ACTIVE.replace("active", "stale"), "diff"),
        (f"{SYNCED}; lost; 15-15", ACTIVE.replace("active", "stale"), "sequence_gap"),
        (f"{SYNCED}; bad 14-15", ACTIVE.replace("active", "stale"), "wrong_shape"),
        (f"{SYNCED}; bad 14-15; 16-16", ACTIVE.replace("active", "stale"), "sequence_gap"),
        (f"{SYNCED}; bad 14-15; 14-15 b99=7 @2", ACTIVE.replace("b99=5", "b99=7"), "diff"),
        (f"{SYNCED}; bad 12-13; 14-14", ACTIVE, "diff"),
        # two connections tell the same
        (f"{SYNCED}; 14-15 b99=7; 14-15 b99=7 @2; 16-16 b98=0 @2; 16-16 b98=0", ACTIVE.replace("b99=5", "b99=7"), "diff"),
        ("11-12 b100=1; 11-12 b100=1 @2; 13-14 b99=1 @2; 13-14; =10 b98=1 a101=1", "active b100=1 b99=1 b98=1 a101=1", "rest"),
        # a crossed book is in doubt until it is not crossed any more
        (f"{SYNCED}; 14-14 b101=1", "stale b101=1 b100=1 b99=5 a101=3 a102=4", "crossed"),
        (f"{SYNCED}; 14-14 b101=1; 15-15 a101=0", "active b101=1 b100=1 b99=5 a102=4", "diff"),
        ("11-12 b102=1; =11 b99=1 a101=1", "stale b102=1 b99=1 a101=1", "crossed"),
        # beyond the range of the snapshot nothing is displayed: levels between may be missing
        (f"{SYNCED}; 14-14 b98.99=1 a102.01=1", ACTIVE, "diff"),
        (f"{SYNCED}; 14-14 b98=1 a101=0 a102=0 a103=1", "active b100=1 b99=5", "diff"),
        (f"{SYNCED}; 14-14 a101=0 a102=0 a103=1; 15-15 a101.5=2", "active b100=1 b99=5 a101.5=2", "diff"),
        (f"{SYNCED}; 14-14 b103=1 a101=0 a102=0 a105=1", "active b103=1 b100=1 b99=5", "diff"),
        ("=12 a101=1; 13-13 b100=1", "active a101=1", "diff"),
    ],
)  # fmt: skip
def test_the_steps_of_the_venue(script, shown, reason):
    feed = Feed(script, depth="diff")
    assert (feed.shown(), feed.reason) == (shown, reason)


BOTH = "w10 b90=1 a91=1; 11-12 b100=1; =11 b99=1 a101=1; 13-13 b99=2"


@pytest.mark.parametrize(
    ("depth", "script", "shown"),
    [
        ("partial", BOTH, "active b90=1 a91=1"),
        ("diff", BOTH, "active b100=1 b99=2 a101=1"),
        ("auto", BOTH, "active b90=1 a91=1"),
        ("auto", SYNCED, ACTIVE),
        ("auto", f"{SYNCED}; w12 b90=1 a91=1", "active b90=1 a91=1"),
        ("auto", f"{SYNCED}; w14 b90=1 a91=1; 14-14 b99=7", "active b90=1 a91=1"),
        ("auto", f"{SYNCED}; w14 b90=1 a91=1; w13 b80=1 a91=1", "stale b90=1 a91=1"),
        ("diff", f"{SYNCED}; w14 b90=1 a91=1; 14-14 b99=7", ACTIVE.replace("b99=5", "b99=7")),
        ("partial", SYNCED, "disconnected"),
        ("auto", f"{SYNCED}; w14 b90=1 a91=1 @{SESSION + 1}", "active b90=1 a91=1"),
        ("auto", f"{SYNCED}; w13 b90=1 a91=1 @{SESSION + 1}", ACTIVE),
    ],
)
def test_which_messages_make_the_book(depth, script, shown):
    assert Feed(script, depth).shown() == shown


def test_a_window_shown_in_the_block_that_also_changes_it():
    """Windows of a block are used where they stand, ladders are shown at home: in one block or many, the same."""
    script = f"{SYNCED}; 14-14 b99=6; w15 b90=1 a91=1; 15-16 b99=7; w16 b90=2 a91=1"
    for depth in ("auto", "diff"):
        feed = Feed(script, depth)
        whole = Engine(ONE, feed.config)
        whole.feed(FrameBlock.from_frames(feed.frames, ANCHOR))
        assert whole.digest() == feed.engine.digest()
        assert not differences(whole, feed.twin)


# ---------------------------------------------------------------------------------------------------- whose snapshot it is

BOOK = "b100=1 a101=1"


@pytest.mark.parametrize(
    ("script", "synced"),
    [
        (f"?BTCUSDT; !12 {BOOK}", {"BTCUSDT"}),
        (f"?ETHUSDT; !12 {BOOK}", {"ETHUSDT"}),
        (f"!12 {BOOK}", set()),  # of two instruments nobody knows
        (f"?BTCUSDT; !12 {BOOK}; !13 {BOOK}; ?ETHUSDT; !14 {BOOK}", {"BTCUSDT", "ETHUSDT"}),
        (f"?BTCUSDT; ?ETHUSDT; !12 {BOOK}; !13 {BOOK}", {"ETHUSDT"}),  # the first request was not answered
        (f"?BTCUSDT; ?XRPUSDT; !12 {BOOK}", set()),
        (f"?BTCUSDT; ?ETHUSDT @{SESSION}; !12 {BOOK}", {"BTCUSDT"}),
        (f"?BTCUSDT; ?ETHUSDT @{SESSION}; !12 {BOOK} @{SESSION}", {"ETHUSDT"}),
        (f"?BTCUSDT @{SESSION}; !12 {BOOK}", set()),
    ],
)
def test_a_body_belongs_to_the_last_request(script, synced):
    feed = Feed(script, "diff", TWO)
    names = feed.engine.universe.books(ExchangeId.BINANCE)
    assert {name for name, k in names.items() if feed.engine.state.books[k]["synced"]} == synced


@pytest.mark.parametrize(
    "url",
    [
        "https://api.binance.com/api/v3/depth?symbol=BTCUSDT&limit=1000",
        "http://127.0.0.1:9000/api/v3/depth?limit=1000&symbol=BTCUSDT",
        "https://fapi.binance.com/fapi/v1/depth?symbol=BTCUSDT",
        "https://api.binance.com/api/v3/depth?symbol=btcusdt",
        "https://api.binance.com/api/v3/depth?xsymbol=BTCUSDT",
        "https://api.binance.com/api/v3/exchangeInfo?symbol=BTCUSDT",
    ],
)
def test_which_requests_ask_for_a_book(url):
    feed = Feed("", "diff", TWO)
    feed.add(b'{"method":"GET","url":"%b"}' % url.encode(), FrameKind.REQUEST, 0).play("!12 b100=1 a101=1; 13-13")
    assert feed.shown() == (
        "active b100=1 a101=1" if "api/v3/depth?" in url and "BTC" in url and "xs" not in url else "disconnected"
    )


def test_a_capture_without_requests_has_one_instrument_and_any_number_of_snapshots():
    feed = Feed(f"!12 {BOOK}; 13-13; 15-15 b99=1", "auto")
    assert feed.reason == "sequence_gap"
    feed.play("!14 b98=1 a101=1")
    assert feed.shown() == "active b99=1 b98=1 a101=1"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"code":-1121,"msg":"Invalid symbol."}', "rest"),
        (b"", "rest"),
        (b'{"lastUpdateId":20', "not_json"),
        (b'["lastUpdateId"]', "wrong_shape"),
        (b'{"lastUpdateId":20,"bids":[]}', "wrong_shape"),
        (b'{"lastUpdateId":"20","bids":[],"asks":[]}', "wrong_shape"),
        (b'{"lastUpdateId":-1,"bids":[],"asks":[]}', "negative"),
        (b'{"lastUpdateId":20,"bids":[["1"]],"asks":[]}', "wrong_shape"),
        (b'{"lastUpdateId":20,"bids":[["x","1"]],"asks":[]}', "bad_number"),
    ],
)
def test_a_body_that_is_no_book_changes_nothing(body, reason):
    feed = Feed(f"{SYNCED}; ?BTCUSDT", "diff").add(body, FrameKind.RESPONSE, 0)
    assert (feed.shown(), feed.reason) == (ACTIVE, reason)
    assert feed.play("14-14 b99=7").shown() == ACTIVE.replace("b99=5", "b99=7")


def test_more_members_in_a_body_do_not_matter():
    body = b'{"E":5,"lastUpdateId":12,"asks":[["101","1","x"]],"bids":[["100","1"]],"symbol":"ETHUSDT"}'
    feed = Feed("?BTCUSDT", "diff").add(body, FrameKind.RESPONSE, 0).play("13-13")
    assert feed.shown() == "active b100=1 a101=1"


# ------------------------------------------------------------------------------------------------------ other message forms


def test_raw_changes_and_both_speeds():
    feed = Feed(SNAP, "diff")
    feed.add(change(13, 13, [(99 * E8, 5 * E8)]).partition(b'"data":')[2][:-1])
    assert feed.shown() == ACTIVE
    feed.add(change(11, 15, [(99 * E8, 6 * E8)]).replace(b"@100ms", b""))
    assert feed.shown() == ACTIVE.replace("b99=5", "b99=6")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"u":14,', b'"u":14,"pu":13,', "futures"),
        (b'"s":"BTCUSDT"', b'"s":"ETHUSDT"', "wrong_shape"),
        (b'"U":14,', b'"U":15,', "wrong_shape"),
        (b'"u":14,', b"", "wrong_shape"),
        (b'"E":', b'"X":', "wrong_shape"),
        (b'"99.00000000"', b"99", "wrong_shape"),
        (b'"99.00000000"', b'"99.000000001"', "off_scale"),
        (b'"99.00000000"', b'"-99"', "negative"),
    ],
)
def test_a_change_that_cannot_be_read_puts_the_book_in_doubt(old, new, reason):
    payload = change(14, 14, [(99 * E8, 6 * E8)])
    assert old in payload
    feed = Feed(SYNCED, "diff").add(payload.replace(old, new))
    assert (feed.shown(), feed.reason) == (ACTIVE.replace("active", "stale"), reason)


@pytest.mark.parametrize("name", ["NOPEUSDT", "BTCUSDT_261225"])
def test_changes_of_other_instruments_are_counted(name):
    feed = Feed(SYNCED, "diff").add(change(14, 14, name=name))
    assert feed.shown() == ACTIVE
    assert feed.reason in ("unknown_instrument", "wrong_shape")


# ----------------------------------------------------------------------------------------------------- levels and their origin


def test_how_each_level_is_known():
    feed = Feed(f"{SYNCED}; 14-14 b100.5=1 b98=3 a102=9 a103=3; 15-15 a101=0 b98=4", "auto")
    bids, asks = feed.engine.aggregator.full_book("BTC", ExchangeId.BINANCE)
    known = {"bids": [(level.px_e8 / E8, level.size_e8 / E8, level.origin.name) for level in bids]}
    known["asks"] = [(level.px_e8 / E8, level.size_e8 / E8, level.origin.name) for level in asks]
    assert known == {
        "bids": [(100.5, 1, "CHANGE"), (100, 1, "SNAPSHOT"), (99, 5, "CHANGE"), (98, 4, "BEYOND")],
        "asks": [(102, 9, "CHANGE"), (103, 3, "BEYOND")],
    }
    feed.play("w16 b90=1 a91=1")  # auto: from here on it is a window
    assert feed.engine.aggregator.full_book("BTC", ExchangeId.BINANCE) == (
        (Level(90 * E8, E8, LevelFrom.WINDOW),),
        (Level(91 * E8, E8, LevelFrom.WINDOW),),
    )


def test_a_book_has_more_levels_than_are_displayed():
    bids, asks = [f"b{1_000 - k}=1" for k in range(1_000)], [f"a{1_001 + k}=1" for k in range(1_000)]
    feed = Feed(f"=12 {' '.join(bids + asks)}; 13-13 b1000=0 b400=0 a1500=7", "diff")
    assert [len(side) for side in feed.engine.aggregator.full_book("BTC", ExchangeId.BINANCE)] == [998, 1_000]
    top = feed.engine.aggregator.snapshot("BTC").per_exchange[ExchangeId.BINANCE]
    assert (len(top.bids), len(top.asks)) == (30, 30)
    assert (top.bids[0], top.bids[-1]) == ((999 * E8, E8), (970 * E8, E8))


def _rungs(feed, side):
    return list(zip(*(column.tolist() for column in ladder(feed.engine.state, BTCUSDT, side)), strict=True))


def test_a_full_ladder_forgets_the_farthest_levels():
    """Both sides are filled up, then pushed from the best, the worst and the middle; what was forgotten is not known again."""
    middle = 1_000_000
    bids = [(middle - 2 * k, 1) for k in range(LADDER + 100)]
    asks = [(middle + 1 + 2 * k, 1) for k in range(LADDER - 1)]
    feed = Feed("", "diff").add(request("BTCUSDT"), FrameKind.REQUEST, 0)
    feed.add(binance_depth(book(bids, asks), 12, depth=10**6), FrameKind.RESPONSE, 0)
    feed.add(change(13, 13))
    assert [len(_rungs(feed, side)) for side in (0, 1)] == [LADDER, LADDER - 1]
    worst = middle - 2 * (LADDER - 1)
    assert _rungs(feed, 0)[-1] == (worst, 1, LevelFrom.SNAPSHOT)
    ids = count(14)
    for side, levels_ in (
        (0, [(worst - 2, 5)]),  # worse than all: not taken
        (0, [(middle + 1_000, 5)]),  # crosses, and pushes the worst out
        (0, [(middle + 1_000, 0)]),
        (0, [(worst, 5)]),  # forgotten: beyond
        (0, [(worst - 4, 5), (worst + 3, 5), (worst + 3, 0), (middle - 501, 7)]),
        (0, [(worst + 1, 5)]),  # between the forgotten and the worst known
        (1, [(middle + 10**6, 5)]),  # the last free place, beyond the range
        (1, [(middle + 10**6 - 1, 5), (middle + 2, 3)]),  # pushes out levels beyond, the range stays
        (1, [(middle + 4, 3), (middle + 6, 3)]),
        (1, [(middle + 3 * LADDER, 9)]),
    ):
        n = next(ids)
        feed.add(change(n, n, *((levels_, ()) if side == 0 else ((), levels_))))
        assert max(len(_rungs(feed, s)) for s in (0, 1)) <= LADDER
    n = next(ids)
    feed.add(change(n, n, [(px + 1, 2) for px, _ in bids[1:200]], [(px + 1, 2) for px, _ in asks[1:200]]))
    assert {origin for _, _, origin in _rungs(feed, 0)} == {LevelFrom.SNAPSHOT, LevelFrom.CHANGE}


def test_what_waits_for_a_snapshot_is_bounded():
    """Of too many changes, or too many levels, only the last are kept: an older snapshot does not do any more."""
    feed = Feed("", "diff")
    for n in range(1, WAIT_ROWS + 1):
        feed.add(change(n, n, [(n, 1)]))
    assert feed.engine.state.books[BTCUSDT]["held_rows"] == WAIT_ROWS
    feed.add(change(WAIT_ROWS + 1, WAIT_ROWS + 1))
    assert feed.engine.state.books[BTCUSDT]["held_rows"] == 1
    feed.play(f"=5 b100=1 a101=1; ={WAIT_ROWS} b100=1 a101=1")
    assert feed.shown() == "active b100=1 a101=1"

    feed = Feed("", "diff")
    most = [(k, 1) for k in range(1, MAX_CHANGES + 1)]
    for n, (bids, asks, held) in enumerate(
        [(most, [], 1), (most[1:], [], 2), ([(7, 1)], [], 3), ([], [(8, 1)], 1), (most, most, 1)]
    ):
        feed.add(change(n + 1, n + 1, bids, asks))
        assert feed.engine.state.books[BTCUSDT]["held_rows"] == held
        assert feed.engine.state.books[BTCUSDT]["held_levels"] <= WAIT_LEVELS
    assert feed.engine.state.books[BTCUSDT]["held_levels"] == WAIT_LEVELS
    feed.add(change(6, 6, [*most, (1, 1)]))
    assert feed.reason == "too_many_levels"


# --------------------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_resumed_anywhere_is_the_same_run():
    """At every frame: while changes wait, with a whole book, in a gap, with an open request, under windows."""
    script = f"11-12 b100=1; 13-13 b98=1; =11 b99=1 a101=1 a102=1; 14-14 b98.5=2 a105=1; x; 16-17 b98=4 @2; =16 {BOOK}; "
    script += (
        f"18-18 a101=7 @2; 19-19 b99=1 b102=1 @2; 20-20 b102=0 @2; ?BTCUSDT; !30 {BOOK}; 21-31 @2; w40 b90=1 a91=1; 32-32 @2"
    )
    feed = Feed(script, "auto")
    block = FrameBlock.from_frames(feed.frames, ANCHOR)
    for cut in range(len(block)):
        head, tail = Engine(ONE, feed.config), Engine(ONE, feed.config)
        head.feed(block.slice(0, cut))
        tail.resume(head.checkpoint())
        tail.feed(block.slice(cut, len(block)))
        assert tail.digest() == feed.engine.digest()
        assert not differences(tail, feed.twin)


def test_a_full_book_ages_like_any_other():
    feed = Feed(f"{SYNCED}; 13-13; =13 b100=1 a101=1", "diff")  # what says nothing new does not make it younger
    last_ns = feed.engine.aggregator.time_ns - 30 * MS
    assert feed.engine.aggregator.status(BTCUSDT, last_ns + 2 * 10**9) is SourceStatus.ACTIVE
    assert feed.engine.aggregator.status(BTCUSDT, last_ns + 2 * 10**9 + 1) is SourceStatus.STALE
