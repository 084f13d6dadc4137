"""What the inspector reads of a message: shapes of both venues, no more of each than is judged.

Everything else in a message is skipped, so that a new field changes nothing. Numbers are bounded here, or a foreign tape could
bring some that fit into no column.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct, field

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_NS = 2**61
BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no JSON, or of another shape."""

_Id = Annotated[int, Meta(ge=0, le=2**62)]
_Stamp = Annotated[int, Meta(ge=0, le=MOST_NS)]


class Diff(Struct, gc=False):
    """A Binance ``depthUpdate``: ids from ``first`` to ``last``, both included."""

    first: _Id = field(name="U")
    last: _Id = field(name="u")
    time: _Id | None = field(name="E", default=None)


class Partial(Struct, gc=False):
    """A Binance partial book."""

    last_id: _Id = field(name="lastUpdateId")
    bids: Raw
    asks: Raw


class Ticker(Struct, gc=False):
    """A Binance ``bookTicker``."""

    last_id: _Id = field(name="u")
    bid: str = field(name="b")
    ask: str = field(name="a")


class Trade(Struct, gc=False):
    """A Binance trade."""

    number: _Id = field(name="t")


class _WrappedDiff(Struct, gc=False):
    data: Diff


class _WrappedPartial(Struct, gc=False):
    data: Partial


class _WrappedTicker(Struct, gc=False):
    data: Ticker


class _WrappedTrade(Struct, gc=False):
    data: Trade


class _Wrapper(Struct, gc=False):
    stream: str | None = None
    data: Raw = Raw()
    event: str = field(name="e", default="")
    symbol: str = field(name="s", default="")
    size: Raw = field(name="B", default=Raw())


class Snapshot(Struct, gc=False):
    """A REST book of Binance."""

    last_id: _Id = field(name="lastUpdateId")


class _Unit(Struct, gc=False):
    ask: float = field(name="ask_price")
    bid: float = field(name="bid_price")
    ask_size: float
    bid_size: float


class _ShortUnit(Struct, gc=False):
    ask: float = field(name="ap")
    bid: float = field(name="bp")
    ask_size: float = field(name="as")
    bid_size: float = field(name="bs")


class Book(Struct, gc=False):
    """An Upbit book in format DEFAULT."""

    code: str
    time: _Id = field(name="timestamp")
    units: list[_Unit] = field(name="orderbook_units")
    asks: float | None = field(name="total_ask_size", default=None)
    bids: float | None = field(name="total_bid_size", default=None)
    stream: str = field(name="stream_type", default="")


class ShortBook(Struct, gc=False):
    """An Upbit book in format SIMPLE."""

    code: str = field(name="cd")
    time: _Id = field(name="tms")
    units: list[_ShortUnit] = field(name="obu")
    asks: float | None = field(name="tas", default=None)
    bids: float | None = field(name="tbs", default=None)
    stream: str = field(name="st", default="")


class _UpbitTrade(Struct, gc=False):
    code: str
    number: _Id = field(name="sequential_id")
    stream: str = field(name="stream_type", default="")


class _ShortTrade(Struct, gc=False):
    code: str = field(name="cd")
    number: _Id = field(name="sid")
    stream: str = field(name="st", default="")


class _UpbitHead(Struct, gc=False):
    type: str = ""
    ty: str = ""


class Alarm(Struct):
    """The facts of an ALARM frame that the ledger tells."""

    alarm: str
    stream: str = ""
    url: str = ""
    said: str = ""
    silent_s: float = 0.0
    frames: _Id = 0
    from_recv_ns: _Stamp = 0
    to_recv_ns: _Stamp = 0


class Closed(Struct):
    """The facts of a CLOSED frame."""

    code: int | None = None
    reason: str | None = ""
    clean: bool | None = None
    error: str | None = ""
    covered: bool = False


class _Request(Struct):
    url: str = ""


def _decoder(shape: type) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(shape).decode


read_wrapper, read_snapshot = _decoder(_Wrapper), _decoder(Snapshot)
_upbit_head, read_alarm, read_closed, read_request = _decoder(_UpbitHead), _decoder(Alarm), _decoder(Closed), _decoder(_Request)
BINANCE_SHAPES = {
    "diff": (_decoder(_WrappedDiff), _decoder(Diff)),
    "partial": (_decoder(_WrappedPartial), _decoder(Partial)),
    "ticker": (_decoder(_WrappedTicker), _decoder(Ticker)),
    "trade": (_decoder(_WrappedTrade), _decoder(Trade)),
}
UPBIT_SHAPES = {
    b'{"type":"orderbook"': ("book", _decoder(Book)),
    b'{"ty":"orderbook"': ("book", _decoder(ShortBook)),
    b'{"type":"trade"': ("trade", _decoder(_UpbitTrade)),
    b'{"ty":"trade"': ("trade", _decoder(_ShortTrade)),
}
STREAM = b'{"stream":"'
"""How every message of the combined endpoint begins."""
_MOST_PATH = 500
_BEST = re.compile(rb'\[\s*\[\s*"([0-9]{1,20}(?:\.[0-9]{1,20})?)"')
_DEPTH_SYMBOL = re.compile(r"/api/v3/depth\?(?:.*&)?symbol=([A-Z0-9]{1,40})(?:&|$)")


def binance_kind(stream: str) -> str:
    """The key of ``BINANCE_SHAPES`` for a stream name, "other" if there is none."""
    rest = stream.partition("@")[2]
    name = rest.partition("@")[0]
    if name == "depth":
        return "diff"
    if name.startswith("depth"):
        return "partial"
    return {"bookTicker": "ticker", "trade": "trade"}.get(rest, "other")


def best_price(levels: Raw) -> float | None:
    """The best price of a side; None if the side is empty. Raises ValueError for anything else."""
    found = _BEST.match(levels)
    if found is not None:
        return float(found[1])
    if bytes(levels).strip() == b"[]":
        return None
    raise ValueError("levels that are none")


def other_spelling(payload: bytes) -> tuple[str, Callable[[bytes], Any]] | None:
    """What a message is that does not begin as the venue writes data; None for status lines, errors and lists."""
    if payload.lstrip()[:1] == b"[":
        msgspec.json.decode(payload)
        return None
    head = _upbit_head(payload)
    key, kind = ("type", head.type) if head.type else ("ty", head.ty)
    return UPBIT_SHAPES.get(f'{{"{key}":"{kind}"'.encode())


def depth_symbol(url: str) -> str:
    """The symbol whose book the request is for, "" if it is for anything else."""
    found = _DEPTH_SYMBOL.search(url)
    return found[1] if found is not None else ""


def subject(url: str) -> str:
    """What a request is about: any response to the same path will do, unless it is the book of another symbol."""
    return f"{url.partition('?')[0][:_MOST_PATH]} {depth_symbol(url)}".strip()


def bare_name(message: _Wrapper) -> str:
    """The stream of a message that came without the wrapper of the combined endpoint; a partial book does not say."""
    kind = {"depthUpdate": "depth", "trade": "trade"}.get(message.event, "bookTicker" if bytes(message.size) else "")
    return f"{message.symbol.lower()}@{kind}" if message.symbol and kind else ""


def wrong_total(side: str, total: float | None, sizes: list[float]) -> str:
    """What is wrong with the total of a side, "" if nothing; both are printed with about 16 digits."""
    if total is None or abs(sum(sizes) - total) <= 2e-8 + 1e-12 * abs(total):
        return ""
    return f"the {side} sizes add up to {sum(sizes):.8f}, said to be {total:.8f}"
