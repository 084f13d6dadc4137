"""A synthetic two-venue market, the same on every machine for the same config.

Per symbol a fair USDT price walks on a 100 ms grid. Binance quotes it; Upbit quotes fair x KRW-per-USDT x (1 + premium), where
the premium reverts to zero and now and then makes an excursion of some tens of bps that decays within seconds: these are the
gaps an arbitrageur trades, and while they last the touch is swept more often on both venues, so that what was displayed is often
gone a latency later. Cadence, level gaps, sizes and the share of levels that change per message follow measurements of real
captures. There is no clock here: time is an offset, and all chance comes from ``random.Random(f"{seed}:{code}").random()``.

``market_events`` is the market itself; ``synth_frames`` is what a recorder would have written of it, faults included.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import re
from datetime import UTC, datetime
from enum import StrEnum
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Frame, FrameKind, Op
from arbl2.rules import binance_rules, upbit_date, upbit_tick_e8
from arbl2.tape import TAPE_VERSION, Manifest
from arbl2_replay.wire import (
    BINANCE_DEPTHS,
    E8,
    UPBIT_UNITS,
    Book,
    binance_combined,
    binance_depth,
    upbit_orderbook,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP_NS = 100_000_000
_MS = 1_000_000
_UPBIT_LEVELS = 34
_BINANCE_LEVELS = 24
UPBIT_WS_URL = "wss://api.upbit.com/websocket/v1"
BINANCE_WS_URL = "wss://stream.binance.com:9443/stream"


class SynthSymbol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one coin trades on both venues. Sizes are medians in coins, gaps in ticks, phases in ms of the 100 ms grid."""

    base: str
    price_usdt: float
    volatility_bps: float = 0.31
    binance_touch: float
    binance_size: float
    binance_gap_ticks: float
    binance_phase_ms: int
    upbit_touch: float
    upbit_size: float
    upbit_spread_ticks: float
    upbit_phase_ms: int
    upbit_quiet: float
    """Share of the grid on which Upbit has nothing to say although nothing forbids it."""


SYMBOLS: dict[str, SynthSymbol] = {
    "BTC": SynthSymbol(
        base="BTC",
        price_usdt=100_000.0,
        binance_touch=1.99,
        binance_size=0.06,
        binance_gap_ticks=18.0,
        binance_phase_ms=37,
        upbit_touch=0.06,
        upbit_size=0.03,
        upbit_spread_ticks=12.0,
        upbit_phase_ms=6,
        upbit_quiet=0.08,
    ),
    "ETH": SynthSymbol(
        base="ETH",
        price_usdt=3_500.0,
        volatility_bps=0.4,
        binance_touch=18.0,
        binance_size=1.4,
        binance_gap_ticks=3.0,
        binance_phase_ms=12,
        upbit_touch=1.4,
        upbit_size=0.8,
        upbit_spread_ticks=1.0,
        upbit_phase_ms=64,
        upbit_quiet=0.22,
    ),
    "XRP": SynthSymbol(
        base="XRP",
        price_usdt=2.2,
        volatility_bps=0.45,
        binance_touch=9_000.0,
        binance_size=4_000.0,
        binance_gap_ticks=1.0,
        binance_phase_ms=71,
        upbit_touch=12_000.0,
        upbit_size=20_000.0,
        upbit_spread_ticks=1.0,
        upbit_phase_ms=79,
        upbit_quiet=0.15,
    ),
    "SOL": SynthSymbol(
        base="SOL",
        price_usdt=210.0,
        volatility_bps=0.5,
        binance_touch=120.0,
        binance_size=60.0,
        binance_gap_ticks=1.0,
        binance_phase_ms=54,
        upbit_touch=90.0,
        upbit_size=70.0,
        upbit_spread_ticks=1.0,
        upbit_phase_ms=33,
        upbit_quiet=0.2,
    ),
}
"""The coins that come ready made."""


class FaultKind(StrEnum):
    """What can go wrong on the scripted tape."""

    DISCONNECT = "disconnect"  # venue, lasts_ms, close_code: closed, then opened, sent and fresh snapshots
    STALE = "stale"  # venue, code ("" = all), lasts_ms: connected but silent
    CLOCK_STEP = "clock_step"  # step_ms: the wall clock jumps, the monotonic clock does not
    # one extra message each; venue, code
    TRUNCATED = "truncated"
    NOT_UTF8 = "not_utf8"
    WRONG_TYPE = "wrong_type"
    NAN = "nan"
    NEGATIVE = "negative"
    UNSORTED = "unsorted"
    CROSSED = "crossed"
    UNKNOWN_SYMBOL = "unknown_symbol"
    BACKWARDS = "backwards"  # exchange time (Upbit) or update id (Binance) earlier than the one before
    WRONG_TOTAL = "wrong_total"  # Upbit only
    UP = "up"  # Upbit only, as are errors by this name
    UPBIT_ERROR = "upbit_error"
    BINANCE_ACK = "binance_ack"
    BINANCE_ERROR = "binance_error"


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One scripted fault, ``at_ms`` after the start. Which other fields count is said at ``FaultKind``."""

    kind: FaultKind
    at_ms: int
    venue: str = ""
    code: str = ""
    lasts_ms: int = 0
    close_code: int = 1006
    step_ms: int = 0


class SynthConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a synthetic market and its recording depend on."""

    seed: int = 1
    duration_s: float = 20.0
    start_ns: int = 1_767_312_000_000_000_000
    """Wall clock at the start, ns since the epoch (2026-01-02T00:00:00Z)."""
    symbols: tuple[SynthSymbol, ...] = (SYMBOLS["BTC"], SYMBOLS["ETH"], SYMBOLS["XRP"])
    krw_per_usdt: float = 1_400.5
    premium_sd_bps: float = 4.0
    premium_reverts_s: float = 20.0
    excursion_every_s: float = 14.0
    """Mean time between excursions of one symbol."""
    excursion_bps: tuple[float, float] = (32.0, 60.0)
    excursion_hold_s: tuple[float, float] = (0.2, 1.6)
    upbit_format: str = "DEFAULT"
    upbit_units: int = 30
    binance_depth: int = 20
    upbit_delay_ms: float = 4.0
    """Smallest time from the venue to the recorder; jitter comes on top."""
    binance_delay_ms: float = 6.0
    faults: tuple[Fault, ...] = ()


class MarketEvent(NamedTuple):
    """A book as a venue publishes it, ``offset_ns`` after the market began.

    ``mark`` is what the venue itself says of the state: ``timestamp`` on Upbit (ms since the epoch of the last change),
    ``lastUpdateId`` on Binance.
    """

    offset_ns: int
    venue: str
    code: str
    mark: int
    book: Book


def upbit_codes(config: SynthConfig) -> list[str]:
    """The market codes of Upbit, KRW-USDT last."""
    return [*(f"KRW-{symbol.base}" for symbol in config.symbols), "KRW-USDT"]


def binance_symbols(config: SynthConfig) -> list[str]:
    """The symbols of Binance."""
    return [f"{symbol.base}USDT" for symbol in config.symbols]


# ---------------------------------------------------------------------------------------------------------------- the market

_NORMAL = tuple(NormalDist().inv_cdf((i + 0.5) / 4_096) for i in range(4_096))
_TABLE = 2_048


def _lognormal(median: float, sigma: float) -> list[float]:
    normal = NormalDist()
    return [median * math.exp(sigma * normal.inv_cdf((i + 0.5) / _TABLE)) for i in range(_TABLE)]


class _Chance:
    """Draws that depend on ``random()`` alone, whose sequence Python guarantees."""

    def __init__(self, seed: int, name: str) -> None:
        self.random = random.Random(f"{seed}:{name}").random  # noqa: S311 - a market, not a secret

    def normal(self) -> float:
        return _NORMAL[int(self.random() * 4_096)]


class _Side:
    """One side of a book: ``sign`` is +1 for asks, -1 for bids; prices leave the touch in the direction of the sign."""

    __slots__ = ("_random", "gaps_e8", "keep", "px", "sign", "size", "sizes_e8", "touches_e8")

    def __init__(
        self,
        chance: _Chance,
        sign: int,
        keep: int,
        gaps_e8: list[int],
        sizes_e8: list[int],
        touches_e8: list[int],
    ) -> None:
        self._random = chance.random
        self.sign = sign
        self.keep = keep
        self.gaps_e8 = gaps_e8
        self.sizes_e8 = sizes_e8
        self.touches_e8 = touches_e8
        self.px: list[int] = []
        self.size: list[int] = []

    def _draw(self, table: list[int]) -> int:
        return table[int(self._random() * _TABLE)]

    def quote(self, touch_e8: int) -> None:
        """Make ``touch_e8`` the best price: drop what is better, fill in what lies between."""
        px, size, sign = self.px, self.size, self.sign
        gone = 0
        while gone < len(px) and (px[gone] - touch_e8) * sign < 0:
            gone += 1
        del px[:gone], size[:gone]
        if not px or px[0] != touch_e8:
            fresh: list[int] = []
            price = touch_e8
            while len(fresh) < self.keep and (not px or (px[0] - price) * sign > 0):
                fresh.append(price)
                price += sign * self._draw(self.gaps_e8)
            px[:0] = fresh
            size[:0] = [self._draw(self.sizes_e8) for _ in fresh]
            size[0] = self._draw(self.touches_e8)
        self._refill()

    def sweep(self, levels: int) -> None:
        """A taker eats whole levels."""
        del self.px[:levels], self.size[:levels]
        self._refill()

    def churn(self) -> None:
        """One order comes, changes or goes, more often near the touch."""
        draw = self._random()
        rank = int(self.keep * self._random() * self._random())
        if draw < 0.8 or rank == 0:
            self.size[rank] = self._draw(self.touches_e8 if rank == 0 else self.sizes_e8)
            return
        price = self.px[rank - 1] + self.sign * self._draw(self.gaps_e8)
        if (self.px[rank] - price) * self.sign > 0:
            self.px.insert(rank, price)
            self.size.insert(rank, self._draw(self.sizes_e8))
        elif draw < 0.9:
            del self.px[rank], self.size[rank]
            self._refill()

    def _refill(self) -> None:
        px, size, keep = self.px, self.size, self.keep
        while len(px) < keep:
            px.append(px[-1] + self.sign * self._draw(self.gaps_e8))
            size.append(self._draw(self.sizes_e8))
        if len(px) > 2 * keep:
            del px[keep:], size[keep:]


class _Venue:
    """The book of one instrument on one venue, never crossed: bids are quoted below the asks and only ever retreat."""

    def __init__(
        self,
        chance: _Chance,
        *,
        keep: int,
        shown: int,
        tick_e8: int,
        lot_e8: int,
        touch: float,
        size: float,
        gap_ticks: float,
        gap_sigma: float,
    ) -> None:
        self.chance = chance
        self.tick_e8 = tick_e8
        self.shown = shown
        gaps_e8 = [max(1, round(gap)) * tick_e8 for gap in _lognormal(gap_ticks, gap_sigma)]
        sizes_e8, touches_e8 = (
            [max(1, round(coins * E8 / lot_e8)) * lot_e8 for coins in _lognormal(median, sigma)]
            for median, sigma in ((size, 1.4), (touch, 0.8))
        )
        self.asks = _Side(chance, 1, keep, gaps_e8, sizes_e8, touches_e8)
        self.bids = _Side(chance, -1, keep, gaps_e8, sizes_e8, touches_e8)

    def quote(self, mid_e8: float, spread_ticks: int) -> None:
        tick = self.tick_e8
        bid = max(int((mid_e8 - spread_ticks * tick / 2) // tick), 64) * tick
        self.bids.quote(bid)
        self.asks.quote(bid + spread_ticks * tick)

    def churn(self, changes: int) -> None:
        draw = self.chance.random
        for _ in range(changes):
            (self.asks if draw() < 0.5 else self.bids).churn()

    def sweep(self) -> None:
        draw = self.chance.random
        (self.asks if draw() < 0.5 else self.bids).sweep(1 + int(draw() * 3))

    @property
    def spread_ticks(self) -> int:
        return (self.asks.px[0] - self.bids.px[0]) // self.tick_e8

    @property
    def mid_e8(self) -> float:
        return (self.asks.px[0] + self.bids.px[0]) / 2

    def book(self) -> Book:
        n = self.shown
        return Book(tuple(self.bids.px[:n]), tuple(self.bids.size[:n]), tuple(self.asks.px[:n]), tuple(self.asks.size[:n]))


class _Fair:
    """Fair price of a coin in USDT and the premium that Upbit pays over it; one step is 100 ms."""

    def __init__(self, config: SynthConfig, symbol: SynthSymbol) -> None:
        self._chance = _Chance(config.seed, symbol.base)
        self._config = config
        self.price = symbol.price_usdt
        self.moved = True
        self.excited = False
        # 11.5 % of steps move the price; this size gives the configured deviation per step
        self._jump = symbol.volatility_bps * 1e-4 / math.sqrt(_MOVES)
        reverts = STEP_NS / (config.premium_reverts_s * 1e9)
        self._revert = reverts
        self._noise = config.premium_sd_bps * 1e-4 * math.sqrt(2 * reverts)
        self._calm = 0.0
        self._excursion = 0.0
        self._goal = 0.0
        self._hold = 0
        self._starts = STEP_NS / (config.excursion_every_s * 1e9)

    @property
    def premium(self) -> float:
        return self._calm + self._excursion

    def step(self) -> None:
        draw, normal = self._chance.random, self._chance.normal
        self.moved = draw() < _MOVES
        if self.moved:
            self.price *= math.exp(self._jump * normal())
        self._calm += self._noise * normal() - self._revert * self._calm
        if self._hold > 0:
            self._hold -= 1
            self._excursion += 0.6 * (self._goal - self._excursion)
        elif draw() < self._starts:
            low, high = self._config.excursion_bps
            size = (low + (high - low) * draw()) * 1e-4
            self._goal = size if draw() < 0.5 else -size
            shortest, longest = self._config.excursion_hold_s
            self._hold = 1 + round((shortest + (longest - shortest) * draw()) * 1e9 / STEP_NS)
        else:
            self._excursion *= 0.75
        self.excited = abs(self._excursion) > 1e-3


_MOVES = 0.115


class _BinanceFeed:
    def __init__(self, config: SynthConfig, symbol: SynthSymbol, fair: _Fair) -> None:
        self.code = f"{symbol.base}USDT"
        rules = binance_rules(self.code)
        if rules is None:
            raise ConfigError(
                f"arbl2 has no tick and lot for {self.code}. Use coins of its Binance table (BTC, ETH, XRP, SOL, DOGE)."
            )
        self._fair = fair
        self._chance = _Chance(config.seed, self.code)
        self._venue = _Venue(
            self._chance,
            keep=_BINANCE_LEVELS,
            shown=20,
            tick_e8=rules.tick_e8,
            lot_e8=rules.lot_e8,
            touch=symbol.binance_touch,
            size=symbol.binance_size,
            gap_ticks=symbol.binance_gap_ticks,
            gap_sigma=1.17,
        )
        self._venue.quote(fair.price * E8, 1)
        self._phase_ns = symbol.binance_phase_ms * _MS
        self._update_id = 50_000_000_000 + int(self._chance.random() * 1e9)
        self._last = self._venue.book()

    def due_ns(self) -> int:
        """Offset of the next message within its step: the phase and up to 2.5 ms."""
        return self._phase_ns + int(2_500_000 * self._chance.random() ** 3)

    def event(self, offset_ns: int) -> MarketEvent:
        draw, venue, fair = self._chance.random, self._venue, self._fair
        if draw() < (0.05 if fair.excited else 0.003):
            venue.sweep()
        elif fair.moved or (venue.spread_ticks > 1 and draw() < 0.5):
            venue.quote(fair.price * E8, 1)
        if draw() > 0.04:
            venue.churn(1 + int(draw() * 6))
        book = venue.book()
        if book != self._last:
            self._update_id += 1 + int(60 * math.exp(1.2 * self._chance.normal()))
            self._last = book
        return MarketEvent(offset_ns, ExchangeId.BINANCE, self.code, self._update_id, self._last)


class _UpbitFeed:
    """``mid_e8`` says where the KRW price belongs, from the state of the whole market."""

    def __init__(
        self,
        config: SynthConfig,
        code: str,
        mid_e8: Callable[[], float],
        *,
        touch: float,
        size: float,
        spread_ticks: float,
        phase_ms: int,
        quiet: float,
        fair: _Fair | None,
    ) -> None:
        self.code = code
        self._mid_e8 = mid_e8
        self._fair = fair
        self._chance = _Chance(config.seed, code)
        self._quiet = quiet
        self._start_ms = config.start_ns // _MS
        self._phase_ns = phase_ms * _MS
        mid = mid_e8()
        tick_e8 = upbit_tick_e8(code, round(mid), upbit_date(config.start_ns))
        self._spreads = [max(1, round(s)) for s in _lognormal(spread_ticks, 0.5 if spread_ticks > 1 else 0.0)]
        self._slack_e8 = max(0.75 * tick_e8, mid * 1.5e-4)
        self._venue = _Venue(
            self._chance,
            keep=_UPBIT_LEVELS,
            shown=30,
            tick_e8=tick_e8,
            lot_e8=1,
            touch=touch,
            size=size,
            gap_ticks=1.0,
            gap_sigma=0.67,
        )
        self._venue.quote(mid, self._spread())
        self._normal_spread = self._venue.spread_ticks
        self._last: Book | None = None

    def _spread(self) -> int:
        return self._spreads[int(self._chance.random() * _TABLE)]

    def due_ns(self) -> int:
        return self._phase_ns

    def event(self, offset_ns: int) -> MarketEvent | None:
        draw, venue = self._chance.random, self._venue
        mid = self._mid_e8()
        if abs(mid - venue.mid_e8) > self._slack_e8 or (venue.spread_ticks > self._normal_spread and draw() < 0.35):
            venue.quote(mid, self._spread())
            self._normal_spread = venue.spread_ticks
        elif self._fair is not None and draw() < (0.12 if self._fair.excited else 0.008):
            venue.sweep()
        elif draw() < self._quiet and self._last is not None:
            return None
        venue.churn(1 + int(draw() * 4))
        book = venue.book()
        if book == self._last:
            return None
        self._last = book
        return MarketEvent(offset_ns, ExchangeId.UPBIT, self.code, self._start_ms + offset_ns // _MS, book)


def market_events(config: SynthConfig, *, endless: bool = False) -> Iterator[MarketEvent]:
    """The market, event by event, in the order of ``offset_ns``, for ``config.duration_s`` (or for ever).

    Every instrument publishes in the first 100 ms. Raises ConfigError for symbols without known rules.
    """
    _check(config)
    fairs = [_Fair(config, symbol) for symbol in config.symbols]
    fx = _Fx(config)
    feeds: list[_BinanceFeed | _UpbitFeed] = []
    for symbol, fair in zip(config.symbols, fairs, strict=True):
        feeds.append(_BinanceFeed(config, symbol, fair))
        feeds.append(
            _UpbitFeed(
                config,
                f"KRW-{symbol.base}",
                lambda fair=fair: fair.price * (1 + fair.premium) * fx.krw_per_usdt * E8,  # type: ignore[misc]
                touch=symbol.upbit_touch,
                size=symbol.upbit_size,
                spread_ticks=symbol.upbit_spread_ticks,
                phase_ms=symbol.upbit_phase_ms,
                quiet=symbol.upbit_quiet,
                fair=fair,
            )
        )
    feeds.append(
        _UpbitFeed(
            config,
            "KRW-USDT",
            lambda: fx.krw_per_usdt * E8,
            touch=25_000.0,
            size=60_000.0,
            spread_ticks=1.0,
            phase_ms=48,
            quiet=0.6,
            fair=None,
        )
    )
    end_ns = round(config.duration_s * 1e9)
    start_ns = 0
    while endless or start_ns < end_ns:
        for state in fairs:
            state.step()
        fx.step()
        due = sorted((feed.due_ns(), rank) for rank, feed in enumerate(feeds))
        for within_ns, rank in due:
            event = feeds[rank].event(start_ns + within_ns)
            if event is not None and (endless or event.offset_ns < end_ns):
                yield event
        start_ns += STEP_NS


class _Fx:
    """KRW per USDT, reverting slowly: a tick of 1 KRW is 7 bps, so it should not jump about."""

    def __init__(self, config: SynthConfig) -> None:
        self._chance = _Chance(config.seed, "KRW-USDT rate")
        self._mean = config.krw_per_usdt
        self.krw_per_usdt = config.krw_per_usdt

    def step(self) -> None:
        revert = STEP_NS / 30e9
        noise = 4e-4 * math.sqrt(2 * revert) * self._mean
        self.krw_per_usdt += noise * self._chance.normal() - revert * (self.krw_per_usdt - self._mean)


def _check(config: SynthConfig) -> None:
    if not config.symbols:
        raise ConfigError("a synthetic market needs at least one symbol. Name some, such as BTC.")
    bases = [symbol.base for symbol in config.symbols]
    if len(set(bases)) != len(bases) or "USDT" in bases:
        raise ConfigError(f"the synthetic symbols {bases} must differ from each other and from USDT. Drop the repeated one.")
    for symbol in config.symbols:
        if not (0 <= symbol.upbit_phase_ms < 100 and 0 <= symbol.binance_phase_ms <= 95):
            raise ConfigError(
                f"the phases of {symbol.base} must lie on the 100 ms grid: Upbit 0-99 ms, Binance 0-95 ms. Change them."
            )
    if not config.duration_s > 0:
        raise ConfigError("duration_s must be above zero. Give the seconds that the market shall last.")
    if config.upbit_format not in ("DEFAULT", "SIMPLE") or config.upbit_units not in UPBIT_UNITS:
        raise ConfigError("upbit_format must be DEFAULT or SIMPLE and upbit_units 1, 5, 15 or 30. Change them.")
    if config.binance_depth not in BINANCE_DEPTHS:
        raise ConfigError("binance_depth must be 5, 10 or 20. Change it.")


# ------------------------------------------------------------------------------------------------------------- the recording

_MONO_START_NS = 5_000_000_000_000
_WALL_DRIFT_PPB = 1_500
_CLOCK_EVERY_NS = 10_000_000_000
_OPENS_NS = {ExchangeId.UPBIT: 150 * _MS, ExchangeId.BINANCE: 165 * _MS}
_PLAIN = (FaultKind.DISCONNECT, FaultKind.STALE, FaultKind.CLOCK_STEP)
_VENUE_OF = {
    FaultKind.WRONG_TOTAL: ExchangeId.UPBIT,
    FaultKind.UP: ExchangeId.UPBIT,
    FaultKind.UPBIT_ERROR: ExchangeId.UPBIT,
    FaultKind.BINANCE_ACK: ExchangeId.BINANCE,
    FaultKind.BINANCE_ERROR: ExchangeId.BINANCE,
}
_FIXED = {
    FaultKind.UP: b'{"status":"UP"}',
    FaultKind.UPBIT_ERROR: '{"error":{"name":"WRONG_FORMAT","message":"Format이 맞지 않습니다."}}'.encode(),
    FaultKind.BINANCE_ACK: b'{"result":null,"id":7}',
    FaultKind.BINANCE_ERROR: b'{"code":2,"msg":"Invalid request: request ID must be an unsigned integer","id":7}',
}


def subscription(config: SynthConfig, venue: str) -> bytes:
    """The subscription that the synthetic recorder sends to a venue."""
    if venue == ExchangeId.UPBIT:
        suffix = "" if config.upbit_units == 30 else f".{config.upbit_units}"
        codes = [code + suffix for code in upbit_codes(config)]
        request: object = [
            {"ticket": f"arbl2-synth-{config.seed}"},
            {"type": "orderbook", "codes": codes},
            {"format": config.upbit_format},
        ]
    else:
        streams = [_stream(config, symbol) for symbol in binance_symbols(config)]
        request = {"method": "SUBSCRIBE", "params": streams, "id": 1}
    return json.dumps(request, separators=(",", ":")).encode()


def synth_manifest(config: SynthConfig) -> Manifest:
    """The manifest of the session that ``synth_frames`` writes, for ``arbl2.tape.write_session``."""
    started = datetime.fromtimestamp(config.start_ns / 1e9, tz=UTC)
    return Manifest(
        tape_version=TAPE_VERSION,
        session=f"{started:%Y%m%dT%H%M%SZ}-synth-{config.seed}",
        state="sealed",
        anchor_wall_ns=config.start_ns,
        anchor_mono_ns=_MONO_START_NS,
        endpoints={"upbit_ws": UPBIT_WS_URL, "binance_ws": BINANCE_WS_URL},
        instruments={"upbit": upbit_codes(config), "binance": binance_symbols(config)},
        subscriptions={str(venue): json.loads(subscription(config, venue)) for venue in (ExchangeId.UPBIT, ExchangeId.BINANCE)},
        notes=[f"synthetic market, seed {config.seed}: not data of any venue"],
    )


def synth_frames(config: SynthConfig) -> Iterator[Frame]:
    """What a recorder would have written of ``market_events(config)``: ``seq`` from 1, true stamps, scripted faults.

    Ends with the closed frames. Raises ConfigError when a fault names nothing that exists or falls into a time without
    connection.
    """
    _check(config)
    steps = sorted((f.at_ms * _MS, f.step_ms * _MS) for f in config.faults if f.kind == FaultKind.CLOCK_STEP)
    wall_shift = 0
    for seq, (offset, venue, conn, kind, op, payload) in enumerate(_Session(config).frames(), start=1):
        while steps and steps[0][0] <= offset:
            wall_shift += steps.pop(0)[1]
        mono_ns = _MONO_START_NS + offset
        wall_ns = config.start_ns + offset + offset * _WALL_DRIFT_PPB // 10**9 + wall_shift
        if kind is FrameKind.CLOCK:
            payload = _json({"wall_ns": wall_ns, "mono_ns": mono_ns})  # noqa: PLW2901 - known only once stamped
        yield Frame(seq, wall_ns, mono_ns, venue, conn, kind, op, payload)


_Row = tuple[int, str, int, FrameKind, Op, bytes]


class _Window:
    """One connection: open from ``opened_ns`` up to ``closed_ns``; data flows after ``subscribed_ns``."""

    def __init__(self, venue: str, opened_ns: int, closed_ns: int, close_code: int) -> None:
        self.venue = venue
        self.conn = 0
        self.opened_ns = opened_ns
        self.subscribed_ns = opened_ns + 40 * _MS
        self.closed_ns = closed_ns
        self.close_code = close_code
        self.last_ns = opened_ns


class _Session:
    """Merges what happens by itself (connections, faults, clock samples) with the market, in the order of arrival."""

    def __init__(self, config: SynthConfig) -> None:
        self._config = config
        self._end_ns = round(config.duration_s * 1e9)
        self._chance = _Chance(config.seed, "recorder")
        self._last: dict[tuple[str, str], MarketEvent] = {}
        self._stale = [
            (f.venue, f.code, f.at_ms * _MS, (f.at_ms + f.lasts_ms) * _MS) for f in config.faults if f.kind == FaultKind.STALE
        ]
        for fault in config.faults:
            self._check_fault(fault)
        venues = (ExchangeId.UPBIT, ExchangeId.BINANCE)
        self._windows = {str(venue): self._plan_windows(venue) for venue in venues}
        for number, window in enumerate(
            sorted((w for ws in self._windows.values() for w in ws), key=lambda w: w.opened_ns), start=1
        ):
            window.conn = number
        self._out: list[tuple[int, int, _Row]] = []
        self._count = 0

    def _check_fault(self, fault: Fault) -> None:
        config = self._config
        codes = {"upbit": upbit_codes(config), "binance": binance_symbols(config)}
        if not 0 <= fault.at_ms * _MS < self._end_ns:
            raise ConfigError(f"the fault {fault.kind} at {fault.at_ms} ms lies outside the session. Change at_ms.")
        if fault.kind == FaultKind.CLOCK_STEP:
            return
        if fault.venue not in codes or fault.venue != _VENUE_OF.get(fault.kind, fault.venue):
            raise ConfigError(f"the fault {fault.kind} cannot happen on {fault.venue!r}. Name another venue.")
        if fault.code and fault.code not in codes[fault.venue]:
            raise ConfigError(f"the fault {fault.kind} names {fault.code!r}, which is not traded. Name another code.")
        if fault.kind not in _PLAIN and fault.kind not in _FIXED and not fault.code:
            raise ConfigError(f"the fault {fault.kind} needs the code whose message it spoils. Add one.")
        if fault.kind in (FaultKind.DISCONNECT, FaultKind.STALE) and fault.lasts_ms <= 0:
            raise ConfigError(f"the fault {fault.kind} needs lasts_ms above zero. Add it.")

    def _plan_windows(self, venue: str) -> list[_Window]:
        windows: list[_Window] = []
        opened = _OPENS_NS[ExchangeId(venue)]
        cuts = sorted(
            (f for f in self._config.faults if f.kind == FaultKind.DISCONNECT and f.venue == venue),
            key=lambda f: f.at_ms,
        )
        for cut in cuts:
            if cut.at_ms * _MS <= opened:
                raise ConfigError(f"{venue} is not connected at {cut.at_ms} ms, so it cannot disconnect. Change at_ms.")
            windows.append(_Window(venue, opened, cut.at_ms * _MS, cut.close_code))
            opened = (cut.at_ms + cut.lasts_ms) * _MS
        if opened < self._end_ns:
            windows.append(_Window(venue, opened, self._end_ns, 1000))
        return windows

    def frames(self) -> Iterator[_Row]:
        actions = self._plan_actions()
        upcoming = 0
        for event in market_events(self._config):
            while upcoming < len(actions) and actions[upcoming][0] <= event.offset_ns:
                actions[upcoming][2](actions[upcoming][0])
                upcoming += 1
            self._last[event.venue, event.code] = event
            self._deliver(event)
            # whatever is published later arrives later than this
            while self._out and self._out[0][0] <= event.offset_ns:
                yield heapq.heappop(self._out)[2]
        for offset, _, act in actions[upcoming:]:
            act(offset)
        while self._out:
            yield heapq.heappop(self._out)[2]

    def _plan_actions(self) -> list[tuple[int, int, Callable[[int], None]]]:
        actions: list[tuple[int, int, Callable[[int], None]]] = []

        def plan(offset: int, act: Callable[[int], None]) -> None:
            actions.append((offset, len(actions), act))

        for offset in range(0, self._end_ns, _CLOCK_EVERY_NS):
            plan(offset, lambda at: self._emit(at, (at, "", 0, FrameKind.CLOCK, Op.NONE, b"")))
        for windows in self._windows.values():
            for window in windows:
                plan(window.opened_ns, lambda at, w=window: self._open(at, w))  # type: ignore[misc]
                plan(window.subscribed_ns, lambda at, w=window: self._subscribed(at, w))  # type: ignore[misc]
                plan(window.closed_ns, lambda at, w=window: self._close(at, w))  # type: ignore[misc]
        for fault in self._config.faults:
            if fault.kind not in _PLAIN:
                plan(fault.at_ms * _MS, lambda at, f=fault: self._spoil(at, f))  # type: ignore[misc]
        return sorted(actions, key=lambda action: action[:2])

    def _emit(self, offset: int, row: _Row) -> None:
        self._count += 1
        heapq.heappush(self._out, (offset, self._count, row))

    def _open(self, at: int, window: _Window) -> None:
        url = UPBIT_WS_URL if window.venue == ExchangeId.UPBIT else BINANCE_WS_URL
        self._emit(at, (at, window.venue, window.conn, FrameKind.OPENED, Op.NONE, _json({"url": url})))
        sent = at + _MS
        request = subscription(self._config, window.venue)
        self._emit(sent, (sent, window.venue, window.conn, FrameKind.SENT, Op.TEXT, request))

    def _subscribed(self, at: int, window: _Window) -> None:
        """The venue answers the subscription: Upbit with the newest book of each code, Binance with an ack."""
        if window.venue == ExchangeId.BINANCE:
            self._message(at, window, b'{"result":null,"id":1}')
            return
        for code in upbit_codes(self._config):
            event = self._last.get((ExchangeId.UPBIT, code))
            if event is not None and not self._silent(window.venue, code, at):
                self._message(at, window, self._encode(event, snapshot=True))

    def _close(self, at: int, window: _Window) -> None:
        clean = window.close_code == 1000
        payload = _json({"code": window.close_code, "reason": "", "clean": clean})
        self._emit(at, (at, window.venue, window.conn, FrameKind.CLOSED, Op.NONE, payload))

    def _deliver(self, event: MarketEvent) -> None:
        window = self._window(event.venue, event.offset_ns)
        if window is not None and not self._silent(event.venue, event.code, event.offset_ns):
            self._message(event.offset_ns, window, self._encode(event))

    def _window(self, venue: str, offset: int) -> _Window | None:
        for window in self._windows[venue]:
            if window.subscribed_ns <= offset < window.closed_ns:
                return window
        return None

    def _silent(self, venue: str, code: str, offset: int) -> bool:
        for stale_venue, stale_code, start, stop in self._stale:
            if stale_venue == venue and stale_code in ("", code) and start <= offset < stop:
                return True
        return False

    def _message(self, published: int, window: _Window, payload: bytes) -> None:
        """A message on its way: smallest delay, jitter (median 3.6 ms, now and then a hiccup), never overtaking."""
        upbit = window.venue == ExchangeId.UPBIT
        delay_ms = self._config.upbit_delay_ms if upbit else self._config.binance_delay_ms
        delay_ms += max(0.0, 3.6 + 1.1 * self._chance.normal())
        if self._chance.random() < 0.002:
            delay_ms += 15 + 60 * self._chance.random()
        arrives = max(published + int(delay_ms * _MS), window.last_ns + 2_000 + int(self._chance.random() * 30_000))
        if arrives >= window.closed_ns:
            return  # still in flight when the connection ended
        window.last_ns = arrives
        op = Op.BINARY if upbit else Op.TEXT
        self._emit(arrives, (arrives, window.venue, window.conn, FrameKind.MESSAGE, op, payload))

    def _encode(self, event: MarketEvent, *, snapshot: bool = False) -> bytes:
        config = self._config
        if event.venue == ExchangeId.UPBIT:
            return upbit_orderbook(
                event.code,
                event.book,
                event.mark,
                units=config.upbit_units,
                simple=config.upbit_format == "SIMPLE",
                snapshot=snapshot,
            )
        data = binance_depth(event.book, event.mark, depth=config.binance_depth)
        return binance_combined(_stream(config, event.code), data)

    def _spoil(self, at: int, fault: Fault) -> None:
        window = self._window(fault.venue, at)
        if window is None:
            raise ConfigError(f"{fault.venue} is not connected at {fault.at_ms} ms, so it cannot send {fault.kind}.")
        self._message(at, window, _FIXED.get(fault.kind) or self._spoiled(fault))

    def _spoiled(self, fault: Fault) -> bytes:
        event = self._last[fault.venue, fault.code]
        book = event.book
        good = self._encode(event)
        match fault.kind:
            case FaultKind.TRUNCATED:
                return good[: len(good) * 2 // 3]
            case FaultKind.NOT_UTF8:
                return good.replace(b'"', b'"\xff\xfe', 1)
            case FaultKind.WRONG_TYPE:
                return _LEVELS.sub(rb"\1null", good, count=1)
            case FaultKind.NAN:
                return _FIRST_SIZE.sub(rb"\1NaN", good, count=1)
            case FaultKind.NEGATIVE:
                return _FIRST_SIZE.sub(rb"\1-\2", good, count=1)
            case FaultKind.WRONG_TOTAL:
                return _TOTAL.sub(rb"\g<1>1\2", good, count=1)
            case FaultKind.UNSORTED:
                px = book.ask_px_e8
                return self._encode(event._replace(book=book._replace(ask_px_e8=(px[1], px[0], *px[2:]))))
            case FaultKind.CROSSED:
                gap = book.ask_px_e8[0] - book.bid_px_e8[0]
                lifted = tuple(px + 3 * gap for px in book.bid_px_e8)
                return self._encode(event._replace(book=book._replace(bid_px_e8=lifted)))
            case FaultKind.BACKWARDS:
                return self._encode(event._replace(mark=event.mark - 5_000))
            case FaultKind.UNKNOWN_SYMBOL:
                nope = "KRW-NOPE" if fault.venue == ExchangeId.UPBIT else "NOPEUSDT"
                return self._encode(event._replace(code=nope))
        raise ConfigError(f"the fault {fault.kind} spoils no message. Use another kind.")


_LEVELS = re.compile(rb'("(?:orderbook_units|obu|bids)":)\[(?:\[[^\]]*\]|[^\[\]])*\]')
_FIRST_SIZE = re.compile(rb'("(?:ask_size|as)":|"bids":\[\["[0-9.]+",")([0-9.E-]+)')
_TOTAL = re.compile(rb'("(?:total_ask_size|tas)":)([0-9])')


def _stream(config: SynthConfig, symbol: str) -> str:
    return f"{symbol.lower()}@depth{config.binance_depth}@100ms"


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
