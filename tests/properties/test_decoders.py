"""Any bytes at all: the scanner, the strict decoder and the naive reader say the same, and nothing is ever raised."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import naive
from arbl2.frames import BINANCE, UPBIT
from properties.effort import EFFORT, examples
from properties.wild import ANY_VENUE, BINANCE_BOOKS, NUMBERS, UPBIT_BOOKS, any_bytes, decode, mutated

BOOKS = [*UPBIT_BOOKS, *BINANCE_BOOKS]
READ = {UPBIT: naive.read_upbit, BINANCE: naive.read_binance}


def agreed(payloads, venue):
    """Rows on which the scanner and the strict decoder agree."""
    scanned, strict = (decode(payloads, venue, scanner=scanner) for scanner in (True, False))
    for payload, one, other in zip(payloads, scanned, strict, strict=True):
        assert one == other, payload
    return scanned


def naively(payload, venue):
    """The levels of a good book, or None."""
    try:
        message = READ[venue](payload, set(BOOKS))
    except naive.Refused:
        return None
    return (message.name, message.bids, message.asks) if message.reason == "book" else None


@pytest.mark.parametrize("venue", ANY_VENUE)
def test_spoiled_messages(venue):
    # DEFECT (scanner): see test_numbers_that_are_refused in tests/core/test_scan.py; some of these bytes meet it.
    seen = set()
    for seed in range(60 * EFFORT):
        rng = Random(1_000 * seed + venue)
        payloads = [mutated(rng, any_bytes(rng, venue)) for _ in range(50)]
        try:
            for payload, row in zip(payloads, agreed(payloads, venue), strict=True):
                seen.add(row.reason)
                if b"\\u" in payload:
                    continue  # half a surrogate pair in a string is JSON to Python's decoder only
                good = (BOOKS[row.book], row.bids, row.asks) if row.reason == "book" else None
                assert naively(payload, venue) == good, payload
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    # the accidents are rich enough to reach every refusal
    expected = {"book", "not_json", "wrong_shape", "negative", "too_large", "off_scale", "too_many_levels", "unsorted", "crossed"}
    assert expected | ({"total_mismatch", "grouped_book"} if venue == UPBIT else {"bad_number"}) <= seen


@pytest.mark.parametrize("venue", ANY_VENUE)
def test_every_number_spelling_everywhere(venue):
    """Each spelling in the place of each number of a small message."""
    if venue == UPBIT:
        parts = [
            *(b'{"type":"orderbook","code":"KRW-BTC","timestamp":', b',"total_ask_size":', b',"total_bid_size":'),
            *(b',"orderbook_units":[{"ask_price":', b',"bid_price":', b',"ask_size":', b',"bid_size":'),
            *(b'}],"stream_type":"REALTIME","level":', b"}"),
        ]
        good = [b"5", b"1", b"2", b"101", b"100", b"1", b"2", b"0"]
    else:
        parts = [
            *(b'{"stream":"btcusdt@depth', b'","data":{"lastUpdateId":', b',"bids":[["', b'","', b'"]],"asks":[["', b'","'),
            b'"]]}}',
        ]
        good = [b"20", b"5", b"100", b"2", b"101", b"1"]
    payloads = []
    for place in range(len(good)):
        for spelling in NUMBERS:
            numbers = [*good[:place], spelling, *good[place + 1 :]]
            payloads.append(b"".join(part + number for part, number in zip(parts, [*numbers, b""], strict=True)))
    rows = agreed(payloads, venue)
    assert sum(row.reason == "book" for row in rows) > 30


@given(payload=st.binary(max_size=200), venue=st.sampled_from(ANY_VENUE))
@examples(150)
def test_noise(payload, venue):
    agreed([payload, b"{" + payload, b'{"stream":"btcusdt@depth5","data":' + payload], venue)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["KRW-BTC", "btcusdt@depth5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_KEYS = [
    *("type", "ty", "code", "cd", "timestamp", "tms", "orderbook_units", "obu", "total_ask_size", "level", "error", "status"),
    *("stream", "data", "lastUpdateId", "bids", "asks", "e", "result", "msg", "id"),
]


@given(
    members=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=8),
    inner=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=6),
    venue=st.sampled_from(ANY_VENUE),
)
@examples(150)
def test_json_of_other_shapes(members, inner, venue):
    upbit = {"type": "orderbook", "code": "KRW-BTC", "timestamp": 1, "orderbook_units": [inner, inner]} | members
    binance = {"stream": "btcusdt@depth20", "data": {"lastUpdateId": 1, "bids": [], "asks": []} | inner} | members
    agreed([json.dumps(value).encode() for value in (members, upbit, binance, [upbit])], venue)
