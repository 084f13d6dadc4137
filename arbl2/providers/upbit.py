"""Upbit: what its messages mean.

Every order book frame is a full window (1, 5, 15 or 30 units) that replaces the book; there are no deltas and no sequence ids.
Frames are binary and hold UTF-8 JSON in one of two spellings, DEFAULT (``orderbook_units``) and SIMPLE (``obu``). Thin sides are
padded with price 0, size 0. Big prices come as ``1.16539E8``, small sizes as ``7.9276E-4``. The frame's code carries no ``.n``
suffix. Errors come as ``{"error": ...}`` and ``PING`` is answered by ``{"status":"UP"}``; neither has a type.

Source: docs.upbit.com websocket-guide, websocket-orderbook (2026-09).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from arbl2.frames import UPBIT, ExchangeId
from arbl2.providers.base import (
    Instrument,
    Provider,
    Reading,
    RefusedError,
    read_as,
    read_count,
    read_e8,
    read_object,
    read_string,
)
from arbl2.scan import scan_upbit
from arbl2.updates import MAX_LEVELS, Reason

if TYPE_CHECKING:
    from msgspec import Raw

_UNITS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_KINDS = {"trade": Reason.TRADE, "ticker": Reason.TICKER}
# DEFAULT spelling to SIMPLE
_SHORT = {
    "code": "cd",
    "timestamp": "tms",
    "total_ask_size": "tas",
    "total_bid_size": "tbs",
    "orderbook_units": "obu",
    "level": "lv",
    "ask_price": "ap",
    "bid_price": "bp",
    "ask_size": "as",
    "bid_size": "bs",
}


class UpbitL2Provider(Provider):
    """Full-window order books of Upbit."""

    venue = ExchangeId.UPBIT
    venue_code = UPBIT
    _scan = staticmethod(scan_upbit)

    @staticmethod
    def instrument(name: str) -> Instrument:
        """``KRW-BTC`` is BTC priced in KRW."""
        quote, dash, base = name.partition("-")
        return (
            Instrument(ExchangeId.UPBIT, name, base=base, quote=quote) if dash else Instrument(ExchangeId.UPBIT, name, name, "")
        )

    def read(self, payload: bytes) -> Reading:
        """Decode one message strictly. Raises RefusedError for bad input."""
        if payload[:1] == b"[":
            return Reading(Reason.OTHER_MESSAGE)  # list formats carry several books a frame; arbl2 does not subscribe to them
        members = read_object(payload)
        if "error" in members:
            return Reading(Reason.VENUE_ERROR)
        if "status" in members and "type" not in members:
            return Reading(Reason.UP)
        if "method" in members or "mthd" in members:
            return Reading(Reason.ACK)
        kind = read_string(members.get("type", members.get("ty")))
        if kind != "orderbook":
            return Reading(_KINDS.get(kind, Reason.OTHER_MESSAGE))
        code = read_string(_member(members, "code"))
        if code not in self.books:
            return Reading(Reason.UNKNOWN_INSTRUMENT)
        return self._book(members, code)

    def _book(self, members: dict[str, Raw], code: str) -> Reading:
        level = _member(members, "level")
        if level is not None and _number(level, code) != 0:
            return Reading(Reason.GROUPED_BOOK)
        units = read_as(_UNITS, _member(members, "orderbook_units"), code)
        if len(units) > MAX_LEVELS:
            raise RefusedError(Reason.TOO_MANY_LEVELS, code)
        totals = [_member(members, key) for key in ("total_bid_size", "total_ask_size")]
        return Reading(
            Reason.BOOK,
            instrument=code,
            exchange_ms=read_count(_member(members, "timestamp"), code),
            bids=tuple(
                (_number(_member(u, "bid_price"), code, exact=True), _number(_member(u, "bid_size"), code)) for u in units
            ),
            asks=tuple(
                (_number(_member(u, "ask_price"), code, exact=True), _number(_member(u, "ask_size"), code)) for u in units
            ),
            total_bid_e8=-1 if None in totals else _number(totals[0], code),
            total_ask_e8=-1 if None in totals else _number(totals[1], code),
        )


def _member(members: dict[str, Raw], key: str) -> Raw | None:
    return members.get(key, members.get(_SHORT[key]))


def _number(raw: Raw | None, code: str, *, exact: bool = False) -> int:
    if raw is None:
        raise RefusedError(Reason.WRONG_SHAPE, code)
    text = bytes(raw).strip()
    if text[:1] not in b"-0123456789":
        raise RefusedError(Reason.WRONG_SHAPE, code)
    return read_e8(text, code, exact=exact)
