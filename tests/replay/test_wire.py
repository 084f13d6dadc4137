"""Books to bytes: what is parsed back equals what went in, and the spelling is the venues' own."""

import gzip
import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.errors import ConfigError
from arbl2_replay.wire import (
    Book,
    DepthChange,
    UpbitTrade,
    binance_book_ticker,
    binance_combined,
    binance_depth,
    binance_diff,
    binance_trade,
    upbit_orderbook,
    upbit_rest_orderbook,
    upbit_trade,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
E8 = 10**8

level_sizes = st.one_of(st.integers(1, 10**6), st.integers(1, 10**16), st.integers(1, 10**6).map(lambda lots: lots * 10**5))
tick_sizes = st.sampled_from([1, 100, 10**4, 10**6, E8, 1_000 * E8])


@st.composite
def books(draw, levels=30):
    tick = draw(tick_sizes)

    def side(sign, start):
        gaps = draw(st.lists(st.integers(1, 50), min_size=1, max_size=levels))
        px, prices = start, []
        for gap in gaps:
            prices.append(px * tick)
            px += sign * gap
        sizes = draw(st.lists(level_sizes, min_size=len(prices), max_size=len(prices)))
        return tuple(prices), tuple(sizes)

    mid = draw(st.integers(2_000, 10**6))
    bid_px, bid_size = side(-1, mid)
    ask_px, ask_size = side(1, mid + draw(st.integers(1, 20)))
    return Book(bid_px, bid_size, ask_px, ask_size)


def parse(payload):
    return json.loads(payload, parse_float=Decimal)


def e8(number):
    scaled = Decimal(number) * E8
    assert scaled == int(scaled)
    return int(scaled)


def padded(values, n):
    return [*values[:n], *[0] * (n - len(values))]


@given(books(), st.sampled_from([1, 5, 15, 30]), st.booleans(), st.booleans(), st.integers(0, 2**43))
def test_upbit_parses_back_to_the_book_in_wire_key_order(book, units, simple, snapshot, timestamp_ms):
    message = parse(upbit_orderbook("KRW-BTC", book, timestamp_ms, units=units, simple=simple, snapshot=snapshot))
    names = (
        ("ty", "cd", "tms", "tas", "tbs", "obu", "st", "lv")
        if simple
        else (
            *("type", "code", "timestamp", "total_ask_size", "total_bid_size"),
            *("orderbook_units", "stream_type", "level"),
        )
    )
    unit_names = ("ap", "bp", "as", "bs") if simple else ("ask_price", "bid_price", "ask_size", "bid_size")
    assert tuple(message) == names
    kind, code, stamp, total_ask, total_bid, rows, stream, level = message.values()
    assert (kind, code, stamp, level) == ("orderbook", "KRW-BTC", timestamp_ms, 0)
    assert stream == ("SNAPSHOT" if snapshot else "REALTIME")
    assert all(tuple(row) == unit_names for row in rows)
    ask_px, bid_px, ask_size, bid_size = zip(*(map(e8, row.values()) for row in rows), strict=True)
    assert list(ask_px) == padded(book.ask_px_e8, units)
    assert list(bid_px) == padded(book.bid_px_e8, units)
    assert list(ask_size) == padded(book.ask_size_e8, units)
    assert list(bid_size) == padded(book.bid_size_e8, units)
    assert (e8(total_ask), e8(total_bid)) == (sum(ask_size), sum(bid_size))


@given(books(), st.integers(1, 30))
def test_upbit_rest_parses_back_and_writes_the_bid_first(book, count):
    message = parse(upbit_rest_orderbook("KRW-BTC", book, 1, count=count))
    rows = message["orderbook_units"]
    assert tuple(rows[0]) == ("bid_price", "bid_size", "ask_price", "ask_size")
    assert [e8(row["bid_price"]) for row in rows] == padded(book.bid_px_e8, count)
    assert [e8(row["ask_size"]) for row in rows] == padded(book.ask_size_e8, count)
    assert e8(message["total_bid_size"]) == sum(padded(book.bid_size_e8, count))


@given(books(), st.sampled_from([5, 10, 20]), st.integers(0, 2**60))
def test_binance_parses_back_with_eight_decimals(book, depth, update_id):
    raw = binance_depth(book, update_id, depth=depth)
    wrapped = parse(binance_combined("btcusdt@depth20@100ms", raw))
    assert list(wrapped) == ["stream", "data"]
    data = wrapped["data"]
    assert data == parse(raw)
    assert list(data) == ["lastUpdateId", "bids", "asks"]
    assert data["lastUpdateId"] == update_id
    for rows, px, size in (
        (data["bids"], book.bid_px_e8, book.bid_size_e8),
        (data["asks"], book.ask_px_e8, book.ask_size_e8),
    ):
        assert [e8(row[0]) for row in rows] == list(px[:depth])
        assert [e8(row[1]) for row in rows] == list(size[:depth])
        assert all(re.fullmatch(r"[0-9]+\.[0-9]{8}", text) for row in rows for text in row)


def one_level(bid_px, bid_size, ask_px, ask_size):
    return Book((bid_px,), (bid_size,), (ask_px,), (ask_size,))


def test_default_spells_big_prices_with_an_exponent_and_keeps_trailing_zeros():
    book = one_level(116_538_000 * E8, 79_276, 116_539_000 * E8, 77_720)
    assert upbit_orderbook("KRW-BTC", book, 7, units=1) == (
        b'{"type":"orderbook","code":"KRW-BTC","timestamp":7,"total_ask_size":0.00077720,"total_bid_size":0.00079276,'
        b'"orderbook_units":[{"ask_price":1.16539E8,"bid_price":1.16538E8,"ask_size":0.00077720,"bid_size":0.00079276}],'
        b'"stream_type":"REALTIME","level":0}'
    )


def test_simple_spells_small_sizes_with_an_exponent():
    book = one_level(116_538_000 * E8, 79_276, 116_539_000 * E8, 10 * E8)
    assert upbit_orderbook("KRW-BTC", book, 7, units=1, simple=True, snapshot=True, level_e8=10_000 * E8) == (
        b'{"ty":"orderbook","cd":"KRW-BTC","tms":7,"tas":10.0,"tbs":7.9276E-4,'
        b'"obu":[{"ap":116539000.0,"bp":116538000.0,"as":10.0,"bs":7.9276E-4}],"st":"SNAPSHOT","lv":10000}'
    )


@pytest.mark.parametrize(
    ("px_e8", "text"),
    [
        (127 * E8, b"127.0"),
        (9_999_000 * E8, b"9999000.0"),
        (10_000_000 * E8, b"1.0E7"),
        (100_000, b"0.001"),
        (99_999, b"9.9999E-4"),
        (1, b"1.0E-8"),
    ],
)
def test_default_prices_are_spelled_like_a_double(px_e8, text):
    payload = upbit_orderbook("KRW-X", one_level(0, 0, px_e8, 1), 1, units=1)
    assert b'"ask_price":%b,' % text in payload


def test_a_thin_side_is_padded_with_zeros():
    payload = upbit_orderbook("BTC-X", one_level(5, E8, 7, E8), 1, units=5)
    assert payload.count(b'{"ask_price":0,"bid_price":0,"ask_size":0,"bid_size":0}') == 4


def test_other_depths_than_the_venue_offers_are_refused():
    with pytest.raises(ConfigError, match="1, 5, 15 or 30"):
        upbit_orderbook("KRW-BTC", one_level(1, 1, 2, 1), 1, units=20)


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here: real captures are not part of the project")
    return path


def test_real_binance_frames_are_reproduced_byte_for_byte():
    lines = gzip.decompress(real("binance_spot_btcusdt_depth20_first60s.txt.gz").read_bytes()).splitlines()
    for line in lines:
        payload = line.partition(b" ")[2]
        message = parse(payload)
        sides = [tuple(e8(row[i]) for row in message["data"][side]) for side in ("bids", "asks") for i in (0, 1)]
        raw = binance_depth(Book(*sides), message["data"]["lastUpdateId"])
        assert binance_combined(message["stream"], raw) == payload
    assert len(lines) == 600


def test_real_upbit_frames_are_reproduced_number_for_number():
    frames = [json.loads(line)["raw"] for line in real("upbit_frames_first10s.jsonl").read_text().splitlines()]
    orderbooks = [raw for raw in frames if raw.startswith('{"ty":"orderbook"')]
    for raw in orderbooks:
        message = parse(raw)
        columns = zip(*(map(e8, unit.values()) for unit in message["obu"]), strict=True)
        ask_px, bid_px, ask_size, bid_size = map(tuple, columns)
        book = Book(bid_px, bid_size, ask_px, ask_size)
        ours = parse(upbit_orderbook(message["cd"], book, message["tms"], units=15, simple=True))
        assert ours.pop("lv") == 0  # the capture is older than this key
        assert ours == message
        assert list(ours) == list(message)
    assert len(orderbooks) == 46


def test_real_binance_changes_trades_and_tickers_are_reproduced_byte_for_byte():
    lines = gzip.decompress(real("binance_spot_btcusdt_first30s.txt.gz").read_bytes()).splitlines()
    seen = Counter()
    for line in lines:
        payload = line.partition(b" ")[2]
        message = parse(payload)
        data = message.get("data", {})
        match message.get("stream", "").partition("@")[2]:
            case "depth@100ms":
                bids, asks = ([(e8(px), e8(size)) for px, size in data[side]] for side in "ba")
                ours = binance_diff(data["s"], DepthChange(data["U"], data["u"], bids, asks), data["E"])
            case "bookTicker":
                ours = binance_book_ticker(data["s"], Book(*([e8(data[key])] for key in "bBaA")), data["u"])
            case "trade":
                ours = binance_trade(data["s"], data["t"], e8(data["p"]), e8(data["q"]), data["T"], taker_sells=data["m"])
                ours = ours.replace(b'"E":%d' % data["T"], b'"E":%d' % data["E"], 1)  # the venue takes its time to tell
            case _:
                continue
        assert binance_combined(message["stream"], ours) == payload
        seen[message["stream"]] += 1
    assert seen == {"btcusdt@depth@100ms": 299, "btcusdt@bookTicker": 2_432, "btcusdt@trade": 547}


def test_real_upbit_trades_are_reproduced_number_for_number():
    frames = [json.loads(line)["raw"] for line in real("upbit_frames_first10s.jsonl").read_text().splitlines()]
    trades = [raw for raw in frames if raw.startswith('{"ty":"trade"')]
    for raw in trades:
        message = parse(raw)
        sells = message["ab"] == "ASK"
        trade = UpbitTrade(
            *(message["ttms"], e8(message["tp"]), e8(message["tv"]), sells, message["sid"], e8(message["pcp"])),
            Book((1,), (2,), (3,), (4,)),
        )
        text = upbit_trade(message["cd"], trade, simple=True, snapshot=message["st"] == "SNAPSHOT")
        ours = parse(text)
        assert [ours.pop(key) for key in ("bap", "bas", "bbp", "bbs")] == [Decimal(n).scaleb(-8) for n in (3, 4, 1, 2)]
        ours["tms"] = message["tms"]  # the venue takes its time to tell
        assert ours == message
        assert list(ours) == list(message)  # the capture is older than the best prices
        assert list(parse(upbit_trade("KRW-BTC", trade)))[:3] == ["type", "code", "timestamp"]
    assert len(trades) == 76
