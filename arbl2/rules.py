"""Dated venue rules: tick tiers, lots, smallest orders and fees, as frozen tables.

A venue's rules have a date, and a recording is replayed under the rules of its own day. What is not known
for a day is an error that says so; nothing is extrapolated from today's table. Binance states its filters in
``exchangeInfo``, whose body is recorded on the tape: the table here is the fallback for a tape that lacks it.
A config may override a rule (``[rules.ADA]`` with ``lot = "0.1"``), which wins over both.

All prices, sizes and amounts are int64 of 10^-8 of their unit (suffix ``_e8``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import msgspec

from arbl2.errors import ConfigError, TapeError
from arbl2.money import E8, INT64_MAX, NumberRefusedError, format_e8, parse_e8

if TYPE_CHECKING:
    from collections.abc import Mapping

_EPOCH_DAY = date(1970, 1, 1).toordinal()
_DAY_NS = 86_400 * 10**9
_KST_NS = 9 * 3_600 * 10**9

UPBIT_LOT_E8 = 1
"""Upbit takes volumes of 8 decimals."""

UPBIT_MIN_NOTIONAL_E8 = 5_000 * E8
"""Smallest order of Upbit's KRW market, KRW."""

BINANCE_MIN_NOTIONAL_E8 = 5 * E8
"""Smallest order of a Binance USDT pair that neither the tape nor the table below knows, USDT."""


@dataclass(frozen=True, slots=True)
class TickTable:
    """Tick tiers that held from ``since`` up to ``until`` (exclusive; None = still), both as dates in Korea.

    ``bases`` names the coins it holds for (empty = all). ``bands`` are (lower bound inclusive, upper bound
    exclusive, tick), all in 10^-8 KRW.
    """

    since: date
    until: date | None
    bases: tuple[str, ...]
    bands: tuple[tuple[int, int, int], ...]

    def tick_e8(self, base: str, price_e8: int, on: date) -> int | None:
        """The tick of ``base`` at ``price_e8`` on that day, or None where this table says nothing."""
        if on < self.since or (self.until is not None and on >= self.until):
            return None
        if self.bases and base not in self.bases:
            return None
        return next((tick for lower, upper, tick in self.bands if lower <= price_e8 < upper), None)


def _bands(*tiers: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    """Bands without gaps from (lower bound, tick), highest first."""
    uppers = [INT64_MAX + 1, *(lower for lower, _ in tiers)]
    return tuple((lower, upper, tick) for (lower, tick), upper in zip(tiers, uppers, strict=False))


_FULL_TABLE_SINCE = date(2025, 7, 31)

# Before the full table only the parts named here are established; whatever lies between them is an error.
UPBIT_KRW_TICKS: tuple[TickTable, ...] = (
    TickTable(
        since=_FULL_TABLE_SINCE,
        until=None,
        bases=(),
        bands=_bands(
            (1_000_000 * E8, 1_000 * E8),
            (500_000 * E8, 500 * E8),
            (100_000 * E8, 100 * E8),
            (50_000 * E8, 50 * E8),
            (10_000 * E8, 10 * E8),
            (5_000 * E8, 5 * E8),
            (100 * E8, E8),
            (10 * E8, E8 // 10),
            (E8, E8 // 100),
            (E8 // 10, E8 // 1_000),
            (E8 // 100, E8 // 10_000),
            (E8 // 1_000, E8 // 100_000),
            (E8 // 10_000, E8 // 1_000_000),
            (E8 // 100_000, E8 // 10_000_000),
            (0, 1),
        ),
    ),
    TickTable(
        since=date(2025, 3, 21),
        until=_FULL_TABLE_SINCE,
        bases=("USDT", "USDC"),
        bands=((1_000 * E8, 10_000 * E8, E8 // 2),),
    ),
    TickTable(
        # announced 2024-10-01, documented 2024-10-14: the later day is the one from which it surely held
        since=date(2024, 10, 14),
        until=_FULL_TABLE_SINCE,
        bases=(
            *("ADA", "ALGO", "BLUR", "CELO", "ELF", "EOS", "GRS", "GRT"),
            *("ICX", "MANA", "MINA", "POL", "SAND", "SEI", "STG", "TRX"),
        ),
        bands=((100 * E8, 1_000 * E8, E8),),
    ),
)


def upbit_date(time_ns: int) -> date:
    """The date in Korea (UTC+9, no summer time) of a time in ns since the epoch: Upbit's rules go by it."""
    return date.fromordinal(_EPOCH_DAY + (time_ns + _KST_NS) // _DAY_NS)


def upbit_tick_e8(instrument: str, price_e8: int, on: date) -> int:
    """Tick (10^-8 KRW) of an Upbit KRW code ("KRW-BTC") at a price on a day in Korea (see ``upbit_date``).

    The tick belongs to the price's band, so it changes along a sweep near 100, 5,000, 10,000 ... KRW. A
    displayed price may legally lie off the grid: orders that rested before a change of the table stay.

    Raises ConfigError for another market, a price that is not positive, or a day whose table is not known.
    """
    quote, _, base = instrument.partition("-")
    if quote != "KRW" or not base:
        raise ConfigError(f"arbl2 knows ticks of Upbit's KRW market, not of {instrument!r}. Name a code like KRW-BTC.")
    if price_e8 <= 0:
        raise ConfigError(f"{instrument} has no tick at a price of {format_e8(price_e8)} KRW. Ask for one above zero.")
    for table in UPBIT_KRW_TICKS:
        tick = table.tick_e8(base, price_e8, on)
        if tick is not None:
            return tick
    raise ConfigError(
        f"the tick of {instrument} at {format_e8(price_e8)} KRW on {on} is not known: the full table begins "
        f"on {_FULL_TABLE_SINCE}. Use a later recording, or add that day's table to arbl2/rules.py."
    )


@dataclass(frozen=True, slots=True)
class BinanceRules:
    """Filters of a Binance spot symbol: price step and smallest order (quote currency), size step (coin)."""

    tick_e8: int
    lot_e8: int
    min_notional_e8: int


def _usdt_pair(tick: str, lot: str) -> BinanceRules:
    return BinanceRules(
        tick_e8=parse_e8(tick.encode(), exact=True),
        lot_e8=parse_e8(lot.encode(), exact=True),
        min_notional_e8=BINANCE_MIN_NOTIONAL_E8,
    )


# As of 2026. They change (in 2021 XRP's lot was 1, the smallest order 10 USDT): a recorded exchangeInfo wins.
_BINANCE_FALLBACK = {
    "BTCUSDT": _usdt_pair(tick="0.01", lot="0.00001"),
    "ETHUSDT": _usdt_pair(tick="0.01", lot="0.0001"),
    "XRPUSDT": _usdt_pair(tick="0.0001", lot="0.1"),
    "SOLUSDT": _usdt_pair(tick="0.01", lot="0.001"),
    "DOGEUSDT": _usdt_pair(tick="0.00001", lot="1"),
}


def binance_rules(instrument: str) -> BinanceRules | None:
    """The built-in filters of a Binance symbol ("BTCUSDT"), or None."""
    return _BINANCE_FALLBACK.get(instrument)


def binance_lot_e8(instrument: str) -> int | None:
    """The built-in size step (10^-8 coin) of a Binance symbol ("BTCUSDT"), or None."""
    rules = binance_rules(instrument)
    return None if rules is None else rules.lot_e8


class _Filter(msgspec.Struct, frozen=True, rename="camel"):
    filter_type: str
    tick_size: str = "0"
    step_size: str = "0"
    min_notional: str = "0"


class _Symbol(msgspec.Struct, frozen=True):
    symbol: str
    filters: list[_Filter]


class _ExchangeInfo(msgspec.Struct, frozen=True):
    symbols: list[_Symbol]


_EXCHANGE_INFO = msgspec.json.Decoder(_ExchangeInfo)


def binance_rules_from_exchange_info(body: bytes) -> dict[str, BinanceRules]:
    """Filters by symbol from the body of Binance's ``GET /api/v3/exchangeInfo``, as recorded on the tape.

    A symbol whose price step, size step or smallest order is not stated, or is switched off (0), is left out:
    asking for it fails by name instead of trading under a made-up rule. Raises TapeError when the body is not
    an exchangeInfo.
    """
    try:
        info = _EXCHANGE_INFO.decode(body)
        return {s.symbol: rules for s in info.symbols if (rules := _stated_rules(s)) is not None}
    except (msgspec.MsgspecError, UnicodeDecodeError, NumberRefusedError, RecursionError) as error:
        raise TapeError(
            f"the recorded Binance exchangeInfo cannot be read ({error}). "
            "Replay without it (built-in rules), or restore the recording from a copy."
        ) from None


def _stated_rules(symbol: _Symbol) -> BinanceRules | None:
    tick = lot = notional = 0
    for item in symbol.filters:
        match item.filter_type:
            case "PRICE_FILTER":
                tick = parse_e8(item.tick_size.encode(), exact=True)
            case "LOT_SIZE":
                lot = parse_e8(item.step_size.encode(), exact=True)
            case "NOTIONAL" | "MIN_NOTIONAL":
                notional = parse_e8(item.min_notional.encode(), exact=True)
    return BinanceRules(tick, lot, notional) if tick and lot and notional else None


class RuleOverride(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a config says about one coin (``[rules.ADA]``): decimal text in coin, KRW and USDT."""

    lot: str | None = None
    upbit_min_notional: str | None = None
    binance_min_notional: str | None = None


@dataclass(frozen=True, slots=True)
class PairRules:
    """What both legs of a pair obey: the common lot (coin) and each venue's smallest order (KRW, USDT)."""

    base: str
    lot_e8: int
    upbit_min_notional_e8: int
    binance_min_notional_e8: int


def pair_rules(base: str, overrides: Mapping[str, RuleOverride], recorded: Mapping[str, BinanceRules] | None = None) -> PairRules:
    """Rules of the pair KRW-``base`` on Upbit and ``base``USDT on Binance.

    ``overrides`` (by base) go first, then ``recorded`` (by Binance symbol, as
    ``binance_rules_from_exchange_info`` gives them), then the built-in table. The lot is one that both venues
    take. Raises ConfigError that says what to add to the config.
    """
    override = overrides.get(base, RuleOverride())
    binance = (recorded or {}).get(f"{base}USDT") or binance_rules(f"{base}USDT")
    lot_e8 = _override_e8(base, "lot", override.lot) or (binance.lot_e8 if binance else None)
    if lot_e8 is None:
        raise ConfigError(
            f'arbl2 has no lot size for {base}. Add [rules.{base}] with lot = "0.1" to the config, '
            f"where 0.1 stands for the stepSize of {base}USDT in Binance's exchangeInfo."
        )
    binance_min_e8 = binance.min_notional_e8 if binance else BINANCE_MIN_NOTIONAL_E8
    return PairRules(
        base=base,
        lot_e8=math.lcm(UPBIT_LOT_E8, lot_e8),
        upbit_min_notional_e8=_override_e8(base, "upbit_min_notional", override.upbit_min_notional) or UPBIT_MIN_NOTIONAL_E8,
        binance_min_notional_e8=_override_e8(base, "binance_min_notional", override.binance_min_notional) or binance_min_e8,
    )


def _override_e8(base: str, key: str, text: str | None) -> int | None:
    """The integer of an override, or None where the config says nothing."""
    if text is None:
        return None
    try:
        value = parse_e8(text.encode(), exact=True)
    except NumberRefusedError:
        value = 0
    if value == 0:
        raise ConfigError(
            f"[rules.{base}] {key} = {text!r} is not a number above zero with at most 8 decimals. "
            'Write it like "0.1", or leave it out to use the rule of the venue.'
        )
    return value
