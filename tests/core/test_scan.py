"""The scanner and the strict decoder on messages in the exact wire form, and at the edges of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from arbl2.frames import BINANCE, UPBIT
from arbl2.providers import BinanceL2Provider, UpbitL2Provider
from arbl2.updates import MAX_CHANGES, MAX_LEVELS
from arbl2_replay.wire import Book
from properties.effort import EFFORT
from properties.wild import (
    ANY_VENUE,
    BINANCE_BOOKS,
    UPBIT_BOOKS,
    any_bytes,
    binance_bytes,
    block_of,
    change_bytes,
    decode,
    levels_of,
    provider,
    rows_of,
    told_beside,
    upbit_bytes,
    upbit_told,
    wild_book,
    wild_change,
)

E8 = 10**8


class ScannedUpbit(UpbitL2Provider):
    def read(self, payload):
        raise AssertionError(payload)


class ScannedBinance(BinanceL2Provider):
    def read(self, payload):
        raise AssertionError(payload)


@pytest.mark.parametrize("units", [1, 5, 15, 30])
def test_upbit_books_are_scanned(units):
    rng = Random(units)
    books = [wild_book(rng, units) for _ in range(150 * EFFORT)]
    payloads = [upbit_bytes(rng, book, units, code="KRW-1INCH") for book in books]
    scanned = rows_of(block_of(payloads, UPBIT), ScannedUpbit(UPBIT_BOOKS))
    assert scanned == decode(payloads, UPBIT, scanner=False)
    for row, book in zip(scanned, books, strict=True):
        assert row == ("BOOK", "book", 2, 1_767_312_000_123, 0, 0, *levels_of(book))


@pytest.mark.parametrize("depth", [5, 10, 20])
def test_binance_books_are_scanned(depth):
    rng = Random(depth)
    books = [wild_book(rng, depth) for _ in range(150 * EFFORT)]
    payloads = [binance_bytes(rng, book, depth, symbol="1000SATSUSDT") for book in books]
    scanned = rows_of(block_of(payloads, BINANCE), ScannedBinance(BINANCE_BOOKS))
    assert scanned == decode(payloads, BINANCE, scanner=False)
    for row, book in zip(scanned, books, strict=True):
        assert (row.what, row.reason, row.book) == ("BOOK", "book", 5)
        assert (row.bids, row.asks) == levels_of(book)


@pytest.mark.parametrize("venue", ANY_VENUE)
def test_a_thousand_instruments_are_told_apart(venue):
    """Names of one, two and three letters and their neighbours: each message finds its own book or none."""
    names = [f"{'KRW-' if venue == UPBIT else ''}{k:X}A{k % 7}{'' if venue == UPBIT else 'USDT'}" for k in range(1_024)]
    books = {name: k for k, name in enumerate(names[::2])}
    book, rng = wild_book(Random(1), 5), Random(2)
    make = (
        (lambda name: upbit_bytes(rng, book, 5, code=name))
        if venue == UPBIT
        else (lambda name: binance_bytes(rng, book, 5, symbol=name))
    )
    kind = ScannedUpbit if venue == UPBIT else ScannedBinance
    found = rows_of(block_of([make(name) for name in names], venue), kind(books))
    assert [row.book for row in found] == [books.get(name, -1) for name in names]
    assert {row.reason for row in found[1::2]} == {"unknown_instrument"}


@pytest.mark.parametrize(
    ("venue", "kind", "tell", "reasons"),
    [
        (UPBIT, ScannedUpbit, lambda rng: upbit_told(rng, "KRW-BTC"), {"trade", "ticker"}),
        (BINANCE, ScannedBinance, lambda rng: told_beside(rng, "BTCUSDT"), {"trade", "book_ticker"}),
    ],
    ids=["upbit", "binance"],
)
def test_trades_and_tickers_are_scanned(venue, kind, tell, reasons):
    rng = Random(5)
    payloads = [tell(rng) for _ in range(200)]
    scanned = rows_of(block_of(payloads, venue), kind(UPBIT_BOOKS if venue == UPBIT else BINANCE_BOOKS))
    assert scanned == decode(payloads, venue, scanner=False)
    assert {row.reason for row in scanned} == reasons


_TOLD = {
    b"": "itself",
    b',"x":1,"y":"z","n":null,"t":true,"f":false,"d":-12.5E-7': "itself",
    b',"error":{"name":"x"}': "venue_error",
    b',"error":1': "venue_error",
    b',"method":"LIST"': "ack",
    b',"mthd":1': "ack",
    b',"typed":1': "itself",
    rb',"x":"\u0041"': "itself",
    rb',"x":"\ud55c"': "itself",
    b',"x":{"y":[1]}': "itself",
    b',"x": 1': "itself",
    b',"x":1e99': "itself",
    b',"x":01': "not_json",
    b',"x":-': "not_json",
    b',"x":1.': "not_json",
    b',"x":1e': "not_json",
    b',"x":tru': "not_json",
    b',"x"': "not_json",
    b',"x":': "not_json",
    b'"x":1': "not_json",
    b",": "not_json",
    b',"x":"\x01"': "not_json",
    b',"x":"\xff"': "not_json",
}
_SAYS_WHAT = {
    b',"type":"orderbook"': ("unknown_instrument", "unknown_instrument"),
    b',"ty":"orderbook"': ("itself", "unknown_instrument"),
    b',"type":"myOrder"': ("other_message", "other_message"),
    b',"ty":"myOrder"': ("itself", "other_message"),
    rb',"t\u0079pe":"myOrder"': ("other_message", "other_message"),
    rb',"t\u0079":"myOrder"': ("itself", "other_message"),
    b',"status":"UP"': ("itself", "up"),
}
"""Members that may say anew what a message is: what it is then if it began with ``type``, and with ``ty``."""


@pytest.mark.parametrize("kind", ["trade", "ticker"])
@pytest.mark.parametrize("spelling", [0, 1])
@pytest.mark.parametrize("rest", [*_TOLD, *_SAYS_WHAT])
def test_what_upbit_tells_is_what_its_members_say_and_not_only_the_first(rest, spelling, kind):
    key, code = (b"type", b"code") if spelling == 0 else (b"ty", b"cd")
    payload = b'{"%b":"%b","%b":"KRW-NOPE"' % (key, kind.encode(), code) + rest + b"}"
    expected = _TOLD[rest] if rest in _TOLD else _SAYS_WHAT[rest][spelling]
    assert _both(payload, UPBIT).reason == (kind if expected == "itself" else expected)
    assert _both(payload[:-1], UPBIT).reason == "not_json"
    assert _both(payload + b"}", UPBIT).reason == "not_json"


@pytest.mark.parametrize("most", [1, 20, 3_000])
def test_binance_changes_are_scanned(most):
    rng = Random(most)
    changes = [wild_change(rng, most) for _ in range(2 * EFFORT if most == 3_000 else 150 * EFFORT)]
    payloads = [change_bytes(rng, change, symbol="1000SATSUSDT") for change in changes]
    scanned = rows_of(block_of(payloads, BINANCE), ScannedBinance(BINANCE_BOOKS))
    assert scanned == decode(payloads, BINANCE, scanner=False)
    for row, change in zip(scanned, changes, strict=True):
        assert row == ("CHANGE", "diff", 5, 1_767_312_000_123, change.first_id, change.last_id, change.bids, change.asks)


@pytest.mark.parametrize(("levels", "reason"), [(MAX_CHANGES, "diff"), (MAX_CHANGES + 1, "too_many_levels")])
def test_ten_thousand_levels_of_a_change_fit(levels, reason):
    side = b",".join(b'["%d","1"]' % (k + 1) for k in range(levels))
    frame = b'{"stream":"btcusdt@depth","data":{"e":"depthUpdate","E":1,"s":"BTCUSDT","U":1,"u":2,"b":[%b],"a":[%b]}}'
    for bids, asks in ((side, b""), (b"", side), (side, side)):
        assert _both(frame % (bids, asks), BINANCE).reason == reason
    assert [row.reason for row in decode([frame % (side, side)] * 3, BINANCE, scanner=True)] == [reason] * 3


def _both(payload, venue):
    scanned, strict = (decode([payload], venue, scanner=scanner)[0] for scanner in (True, False))
    assert scanned == strict
    return scanned


def _full(levels):
    bids, asks = [1_000 * E8 - k for k in range(levels)], [1_001 * E8 + k for k in range(levels)]
    return Book(bids, [E8 + k for k in range(levels)], asks, [E8 + k for k in range(levels)])


def test_thirty_levels_fit_and_thirty_one_are_refused():
    level = b'["0.5","1"]'
    upbit = upbit_bytes(Random(1), _full(30), 30)
    assert _both(upbit, UPBIT).what == "BOOK"
    unit = upbit[upbit.index(b'[{"') + 1 : upbit.index(b"},{") + 1]
    row = _both(upbit.replace(unit, unit + b"," + unit, 1), UPBIT)
    assert (row.what, row.reason, row.bids, row.asks) == ("DOUBT", "too_many_levels", [], [])
    for levels, reason in ((30, "book"), (31, "too_many_levels")):
        bids = b",".join(b'["%d","1"]' % (100 - k) for k in range(levels))
        asks = b",".join(b'["%d","1"]' % (101 + k) for k in range(levels))
        for one, other in ((bids, asks), (level, asks), (bids, b""), (b"", asks)):
            payload = b'{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":1,"bids":[%b],"asks":[%b]}}' % (one, other)
            assert _both(payload, BINANCE).reason == reason


@pytest.mark.parametrize("venue", ANY_VENUE)
def test_a_block_full_of_the_deepest_books(venue):
    """Level buffers are sized for this and no more."""
    if venue == UPBIT:
        payload = upbit_bytes(Random(1), _full(30), 30)
    else:
        payload = b'{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":1,"bids":[%b],"asks":[%b]}}' % (
            b",".join(b'["%d","1"]' % (100 - k) for k in range(MAX_LEVELS)),
            b",".join(b'["%d","1"]' % (101 + k) for k in range(MAX_LEVELS)),
        )
    for scanner in (True, False):
        found = decode([payload] * 500, venue, scanner=scanner)
        assert found == [found[0]] * 500
        assert (len(found[0].bids), len(found[0].asks)) == (30, 30)


@pytest.mark.parametrize("venue", ANY_VENUE)
def test_nothing_is_read_beyond_the_end_of_a_message(venue):
    """Cut anywhere, with the rest of the message right behind the cut: the same as if nothing came behind it."""
    rng = Random(venue)
    for _ in range(3 * EFFORT):
        payload = any_bytes(rng, venue)
        cuts = [payload[:k] for k in {*range(0, len(payload), 7), *range(len(payload) - 40, len(payload))} if k >= 0]
        for cut in cuts:
            inside = rows_of(block_of([cut], venue, data=payload), provider(venue))
            assert inside == decode([cut], venue, scanner=False)
            assert inside == rows_of(block_of([cut], venue), provider(venue))


@pytest.mark.parametrize(
    ("number", "level"),
    [
        (b"1", (E8, E8)),
        (b"1e0", (E8, E8)),
        (b"1E+00", (E8, E8)),
        (b"0.00000001", (1, 1)),
        (b"1e-8", (1, 1)),
        (b"0.000000010000000000000000000000000000", (1, 1)),
        (b"100e-10", (1, 1)),
        (b"92233720368.54775807", (2**63 - 1, 2**63 - 1)),
        (b"9223372036854775807e-8", (2**63 - 1, 2**63 - 1)),
        (b"1000000000000000000e-8", (10**18, 10**18)),
        (b"12345678901.12345678", (1_234_567_890_112_345_678,) * 2),
    ],
)
def test_number_spellings(number, level):
    template = b'{"stream":"btcusdt@depth5","data":{"lastUpdateId":1,"bids":[["%b","%b"]],"asks":[]}}'
    assert _both(template % (number, number), BINANCE).bids == [level]
    template = (
        b'{"type":"orderbook","code":"KRW-BTC","timestamp":1,"total_ask_size":0,"total_bid_size":%b,"orderbook_units":'
        b'[{"ask_price":0,"bid_price":%b,"ask_size":0,"bid_size":%b}],"stream_type":"REALTIME","level":0}'
    )
    assert _both(template % (number, number, number), UPBIT).bids == [level]


@pytest.mark.parametrize(
    ("price", "size", "reason"),
    [
        (b"0.000000001", b"1", "off_scale"),
        (b"1", b"-1", "negative"),
        (b"1", b"92233720368.54775808", "too_large"),
        (b"92233720368.54775808", b"1", "too_large"),
        (b"9223372036854775808", b"1", "too_large"),
        (b"1", b"9999999999999999999", "too_large"),
        (b"1", b"9999999999999999999999999999999999", "too_large"),
        (b"1e400", b"1", "too_large"),
        (b"NaN", b"1", "bad_number"),
        (b"1", b"Infinity", "bad_number"),
        (b"01", b"1", "bad_number"),
        (b"1", b"", "bad_number"),
        (b" 1", b"1", "bad_number"),
    ],
)
def test_numbers_that_are_refused(price, size, reason):
    # DEFECT (scanner, serious): the 19th digit can wrap to a negative int64, which the "18 digits" test then does not count, so
    # that 92233720368.54775808 becomes a negative price or size in a book that is trusted. See the report.
    template = b'{"stream":"btcusdt@depth5","data":{"lastUpdateId":1,"bids":[["%b","%b"]],"asks":[]}}'
    row = _both(template % (price, size), BINANCE)
    assert (row.what, row.reason, row.book) == ("DOUBT", reason, 3)


def test_size_digits_below_the_scale_are_cut_off():
    template = b'{"stream":"btcusdt@depth5","data":{"lastUpdateId":1,"bids":[["2","1.999999999"],["1","0.000000009"]],"asks":[]}}'
    assert _both(template, BINANCE).bids == [(2 * E8, 199_999_999)]


def test_a_stream_without_a_name():
    # DEFECT (scanner, harmless): the scanner says unknown_instrument where the strict decoder says other_message.
    payload = b'{"stream":"@depth20@100ms","data":{"lastUpdateId":1,"bids":[],"asks":[]}}'
    assert _both(payload, BINANCE).what == "NOTHING"


_CHILD = """
from random import Random
import numpy as np
from arbl2.scan import settle
from properties.wild import ANY_VENUE, any_bytes, decode, mutated
one = np.zeros(1, np.int64)
try:
    settle(one, one, 0, 2, 2, 0, np.zeros(2, np.int64))
except IndexError:
    print("checks are on")
rng = Random(7)
for venue in ANY_VENUE:
    payloads = [any_bytes(rng, venue) for _ in range(150)]
    payloads += [mutated(rng, payload) for payload in payloads]
    payloads += [payload[:rng.randrange(len(payload))] for payload in payloads if payload]
    decode(payloads, venue, scanner=True)
print("within bounds")
"""


def test_kernels_stay_within_bounds(tmp_path):
    """The same scanner compiled with bounds checks, in a cache of its own."""
    tests = Path(__file__).resolve().parents[1]
    out = subprocess.run(
        [sys.executable, "-c", _CHILD],
        env={**os.environ, "PYTHONPATH": str(tests), "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert out.stdout == "checks are on\nwithin bounds\n", out.stderr
