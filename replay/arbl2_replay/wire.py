"""Books and trades to the exact bytes that the venues send.

A venue's text is not canonical JSON: Upbit prints the same number in three spellings (exponent prices and fixed sizes in
DEFAULT, plain prices and exponent sizes in SIMPLE, plain integers over REST) and Binance prints everything with eight
decimals in strings. A decoder is only tested by bytes in those spellings, so the synthetic market and the exchange server
write them through these pure functions. All numbers come from integers of 10^-8, never through floats, so that totals equal
the sum of the levels to the last digit.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

from arbl2.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

E8 = 10**8
UPBIT_UNITS = (1, 5, 15, 30)
BINANCE_DEPTHS = (5, 10, 20)

# Most levels repeat from one message to the next, so their text is remembered; bounded, a level is about 300 bytes.
_REMEMBERED_LEVELS = 1 << 15
_REMEMBERED_NUMBERS = 1 << 16


class Book(NamedTuple):
    """One order book, best level first: prices in 10^-8 quote units per coin, sizes in 10^-8 coins."""

    bid_px_e8: Sequence[int]
    bid_size_e8: Sequence[int]
    ask_px_e8: Sequence[int]
    ask_size_e8: Sequence[int]


class UpbitTrade(NamedTuple):
    """A trade as Upbit tells it: prices and sizes in 10^-8, ``book`` as it was right after."""

    time_ms: int
    px_e8: int
    size_e8: int
    taker_sells: bool
    sequential_id: int
    closing_px_e8: int
    book: Book


class DepthChange(NamedTuple):
    """Changes of a Binance book by the updates ``first_id`` to ``last_id``: absolute sizes, 0 for a level that is gone."""

    first_id: int
    last_id: int
    bids: Sequence[tuple[int, int]]
    asks: Sequence[tuple[int, int]]


def upbit_orderbook(
    code: str,
    book: Book,
    timestamp_ms: int,
    *,
    units: int = 30,
    simple: bool = False,
    snapshot: bool = False,
    level_e8: int = 0,
) -> bytes:
    """An Upbit ``orderbook`` message for ``code`` (no suffix), in DEFAULT or SIMPLE format.

    ``units`` levels per side are shown (1, 5, 15 or 30); a thinner side is padded with zeros. ``level_e8`` is the price
    grouping to print, in 10^-8 KRW. Raises ConfigError for another ``units``.
    """
    if units not in UPBIT_UNITS:
        raise ConfigError(f"Upbit shows 1, 5, 15 or 30 levels, not {units}. Use one of these.")
    bid_px, bid_size = _shown(book.bid_px_e8, units), _shown(book.bid_size_e8, units)
    ask_px, ask_size = _shown(book.ask_px_e8, units), _shown(book.ask_size_e8, units)
    stream = "SNAPSHOT" if snapshot else "REALTIME"
    grouping = _rest_number(level_e8)
    if simple:
        rows = ",".join(map(_simple_unit, ask_px, bid_px, ask_size, bid_size))
        text = (
            f'{{"ty":"orderbook","cd":"{code}","tms":{timestamp_ms},'
            f'"tas":{_simple_size(sum(ask_size))},"tbs":{_simple_size(sum(bid_size))},'
            f'"obu":[{rows}],"st":"{stream}","lv":{grouping}}}'
        )
    else:
        rows = ",".join(map(_default_unit, ask_px, bid_px, ask_size, bid_size))
        text = (
            f'{{"type":"orderbook","code":"{code}","timestamp":{timestamp_ms},'
            f'"total_ask_size":{_default_size(sum(ask_size))},"total_bid_size":{_default_size(sum(bid_size))},'
            f'"orderbook_units":[{rows}],"stream_type":"{stream}","level":{grouping}}}'
        )
    return text.encode()


def upbit_rest_orderbook(code: str, book: Book, timestamp_ms: int, *, count: int = 30, level_e8: int = 0) -> bytes:
    """One element of the reply to ``GET /v1/orderbook``: plain numbers, the bid before the ask."""
    bid_px, bid_size = _shown(book.bid_px_e8, count), _shown(book.bid_size_e8, count)
    ask_px, ask_size = _shown(book.ask_px_e8, count), _shown(book.ask_size_e8, count)
    rows = ",".join(
        f'{{"bid_price":{_rest_number(bp)},"bid_size":{_rest_number(bs)},'
        f'"ask_price":{_rest_number(ap)},"ask_size":{_rest_number(asz)}}}'
        for bp, bs, ap, asz in zip(bid_px, bid_size, ask_px, ask_size, strict=True)
    )
    return (
        f'{{"market":"{code}","timestamp":{timestamp_ms},'
        f'"total_ask_size":{_rest_number(sum(ask_size))},"total_bid_size":{_rest_number(sum(bid_size))},'
        f'"orderbook_units":[{rows}],"level":{_rest_number(level_e8)}}}'
    ).encode()


_TRADE_KEYS = (
    *("type", "code", "timestamp", "trade_date", "trade_time", "trade_timestamp", "trade_price", "trade_volume"),
    *("ask_bid", "prev_closing_price", "change", "change_price", "sequential_id"),
    *("best_ask_price", "best_ask_size", "best_bid_price", "best_bid_size", "stream_type"),
)
_SIMPLE_TRADE_KEYS = (
    *("ty", "cd", "tms", "td", "ttm", "ttms", "tp", "tv", "ab", "pcp", "c", "cp", "sid"),
    *("bap", "bas", "bbp", "bbs", "st"),
)


def upbit_trade(code: str, trade: UpbitTrade, *, simple: bool = False, snapshot: bool = False) -> bytes:
    """An Upbit ``trade`` message in DEFAULT or SIMPLE format; ``snapshot`` marks the last trade told again."""
    moment = datetime.fromtimestamp(trade.time_ms // 1_000, tz=UTC)
    rise = trade.px_e8 - trade.closing_px_e8
    price, size = (_simple_price, _simple_size) if simple else (_default_price, _default_size)
    book = trade.book
    values = (
        '"trade"',
        f'"{code}"',
        trade.time_ms,
        f'"{moment:%Y-%m-%d}"',
        f'"{moment:%H:%M:%S}"',
        trade.time_ms,
        price(trade.px_e8),
        size(trade.size_e8),
        '"ASK"' if trade.taker_sells else '"BID"',
        decimal_text(trade.closing_px_e8),
        '"EVEN"' if rise == 0 else '"RISE"' if rise > 0 else '"FALL"',
        decimal_text(abs(rise)),
        trade.sequential_id,
        price(book.ask_px_e8[0] if book.ask_px_e8 else 0),
        size(book.ask_size_e8[0] if book.ask_size_e8 else 0),
        price(book.bid_px_e8[0] if book.bid_px_e8 else 0),
        size(book.bid_size_e8[0] if book.bid_size_e8 else 0),
        '"SNAPSHOT"' if snapshot else '"REALTIME"',
    )
    keys = _SIMPLE_TRADE_KEYS if simple else _TRADE_KEYS
    pairs = ",".join([f'"{key}":{value}' for key, value in zip(keys, values, strict=True)])
    return f"{{{pairs}}}".encode()


def binance_depth(book: Book, last_update_id: int, *, depth: int = 20) -> bytes:
    """A Binance partial depth payload as the raw endpoint and REST send it: at most ``depth`` levels a side, no symbol."""
    bids = ",".join(map(_binance_level, book.bid_px_e8[:depth], book.bid_size_e8[:depth]))
    asks = ",".join(map(_binance_level, book.ask_px_e8[:depth], book.ask_size_e8[:depth]))
    return f'{{"lastUpdateId":{last_update_id},"bids":[{bids}],"asks":[{asks}]}}'.encode()


def binance_diff(symbol: str, change: DepthChange, time_ms: int) -> bytes:
    """A Binance ``depthUpdate`` payload."""
    bids = ",".join(_binance_level(px, size) for px, size in change.bids)
    asks = ",".join(_binance_level(px, size) for px, size in change.asks)
    return (
        f'{{"e":"depthUpdate","E":{time_ms},"s":"{symbol}","U":{change.first_id},"u":{change.last_id},"b":[{bids}],"a":[{asks}]}}'
    ).encode()


def binance_trade(symbol: str, trade_id: int, px_e8: int, size_e8: int, time_ms: int, *, taker_sells: bool) -> bytes:
    """A Binance ``trade`` payload; ``m`` says that the buyer was the maker, so that the taker sold."""
    maker = "true" if taker_sells else "false"
    return (
        f'{{"e":"trade","E":{time_ms},"s":"{symbol}","t":{trade_id},"p":"{decimal_text(px_e8)}","q":"{decimal_text(size_e8)}",'
        f'"T":{time_ms},"m":{maker},"M":true}}'
    ).encode()


def binance_book_ticker(symbol: str, book: Book, update_id: int) -> bytes:
    """A Binance ``bookTicker`` payload: the best level of each side (zeros for an empty one), no time, no event name."""
    bid, bid_size, ask, ask_size = (decimal_text(side[0] if side else 0) for side in book)
    return f'{{"u":{update_id},"s":"{symbol}","b":"{bid}","B":"{bid_size}","a":"{ask}","A":"{ask_size}"}}'.encode()


def binance_combined(stream: str, data: bytes) -> bytes:
    """A raw payload in the wrapper of the combined endpoint."""
    return b'{"stream":"%b","data":%b}' % (stream.encode(), data)


def decimal_text(value_e8: int) -> str:
    """A number of 10^-8 with eight decimals, as Binance spells every price and quantity."""
    return f"{value_e8 // E8}.{value_e8 % E8:08d}"


def _shown(values: Sequence[int], units: int) -> Sequence[int]:
    if len(values) >= units:
        return values[:units]
    return [*values, *repeat(0, units - len(values))]


@lru_cache(_REMEMBERED_LEVELS)
def _default_unit(ask_px: int, bid_px: int, ask_size: int, bid_size: int) -> str:
    return (
        f'{{"ask_price":{_default_price(ask_px)},"bid_price":{_default_price(bid_px)},'
        f'"ask_size":{_default_size(ask_size)},"bid_size":{_default_size(bid_size)}}}'
    )


@lru_cache(_REMEMBERED_LEVELS)
def _simple_unit(ask_px: int, bid_px: int, ask_size: int, bid_size: int) -> str:
    return (
        f'{{"ap":{_simple_price(ask_px)},"bp":{_simple_price(bid_px)},'
        f'"as":{_simple_size(ask_size)},"bs":{_simple_size(bid_size)}}}'
    )


@lru_cache(_REMEMBERED_LEVELS)
def _binance_level(px: int, size: int) -> str:
    return f'["{decimal_text(px)}","{decimal_text(size)}"]'


@lru_cache(_REMEMBERED_NUMBERS)
def _default_price(px: int) -> str:
    # The venue prints a double: exponent form from 10^7 up and below 10^-3.
    return _plain(px) if 10**5 <= px < 10**15 or px == 0 else _exponent(px)


@lru_cache(_REMEMBERED_NUMBERS)
def _default_size(size: int) -> str:
    return decimal_text(size) if size else "0"


@lru_cache(_REMEMBERED_NUMBERS)
def _simple_price(px: int) -> str:
    return _plain(px)


@lru_cache(_REMEMBERED_NUMBERS)
def _simple_size(size: int) -> str:
    return _plain(size) if size >= 10**5 or size == 0 else _exponent(size)


def _plain(value: int) -> str:
    if value == 0:
        return "0"
    whole, part = divmod(value, E8)
    return f"{whole}.{f'{part:08d}'.rstrip('0') or '0'}"


def _rest_number(value: int) -> str:
    return _plain(value).removesuffix(".0")


def _exponent(value: int) -> str:
    digits = str(value)
    mantissa = digits.rstrip("0")
    return f"{mantissa[0]}.{mantissa[1:] or '0'}E{len(digits) - 9}"
