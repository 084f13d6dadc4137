"""The state that the compiled loop works on: books, pairs, orders and balances as arrays, and the index that names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.config import amount_e8, ns_of_ms, ppm_of_bps, starting_coins_e8
from arbl2.errors import ConfigError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE
from arbl2.frames import BINANCE, UPBIT, VENUES, ExchangeId
from arbl2.kernels import BOOK_STATE, CONFIG, COUNTERS, EATEN_CAP, GAP_MS, GAP_S, PAIR_STATE, VIEW
from arbl2.providers import PROVIDERS
from arbl2.rules import binance_rules, pair_rules
from arbl2.updates import MAX_LEVELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from arbl2.config import RunConfig
    from arbl2.providers import Instrument
    from arbl2.rules import BinanceRules

ORDER_SLOTS = 512
EVENT_ROWS = 8_192
FX_INSTRUMENT = "KRW-USDT"


@dataclass(frozen=True, slots=True)
class Universe:
    """Which books a run keeps, and which of them form pairs.

    Book i is ``instruments[i]``; pair k trades ``symbols[k]``. ``fx_book`` is Upbit's KRW-USDT or -1.
    """

    instruments: tuple[Instrument, ...]
    symbols: tuple[str, ...]
    upbit_books: tuple[int, ...]
    binance_books: tuple[int, ...]
    fx_book: int

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], symbols: Sequence[str]) -> Universe:
        """From instrument names by venue, in sorted order. Raises ConfigError for a symbol that a venue lacks."""
        instruments: list[Instrument] = [
            PROVIDERS[venue].instrument(name) for venue in ExchangeId for name in sorted(dict.fromkeys(names.get(venue, ())))
        ]
        at = {(i.venue, i.base, i.quote): k for k, i in enumerate(instruments)}
        upbit = {base: k for (venue, base, quote), k in at.items() if venue == ExchangeId.UPBIT and quote == "KRW"}
        binance = {base: k for (venue, base, quote), k in at.items() if venue == ExchangeId.BINANCE and quote == "USDT"}
        both = [base for base in upbit if base in binance]
        for symbol in symbols:
            if symbol not in both:
                raise ConfigError(
                    f"{symbol} is not on both venues of this tape. It has {', '.join(sorted(both)) or 'no pair at all'}; "
                    "choose with --symbols."
                )
        chosen = tuple(sorted(dict.fromkeys(symbols))) or tuple(sorted(both))
        fx_book = at.get((ExchangeId.UPBIT, "USDT", "KRW"), -1)
        return cls(
            instruments=tuple(instruments),
            symbols=chosen,
            upbit_books=tuple(upbit[s] for s in chosen),
            binance_books=tuple(binance[s] for s in chosen),
            fx_book=fx_book,
        )

    def books(self, venue: ExchangeId) -> dict[str, int]:
        """Book index by instrument name of one venue."""
        return {i.name: k for k, i in enumerate(self.instruments) if i.venue == venue}


@dataclass(slots=True)
class State:
    """Every array the loop reads and writes. ``B`` books, ``P`` pairs, ``L`` levels a side.

    ``px``, ``qty``: int64[B, 2, L] (side 0 bids, 1 asks, best first); ``counts``: int64[B, 2, 2], levels displayed and takes
    remembered by side; ``eaten``: int64[B, 2, takes, 3] (price, size, last displayed); ``gaps``: int64[B, buckets];
    ``taken``: int64[orders, L, 2], what each order in the table took;
    ``balance``, ``locked``: int64[3, 1 + P] by venue code, column 0 the quote currency, column 1 + k the coin of pair k.
    """

    books: NDArray[Any]
    counts: NDArray[np.int64]
    px: NDArray[np.int64]
    qty: NDArray[np.int64]
    eaten: NDArray[np.int64]
    gaps: NDArray[np.int64]
    pairs: NDArray[Any]
    config: NDArray[Any]
    balance: NDArray[np.int64]
    locked: NDArray[np.int64]
    orders: NDArray[Any]
    order_state: NDArray[np.int64]
    taken: NDArray[np.int64]
    counters: NDArray[Any]
    decisions: NDArray[Any]
    fills: NDArray[Any]
    view: NDArray[Any]
    ask: NDArray[np.int64]
    opening: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.opening = self.balance.copy()

    @classmethod
    def build(cls, universe: Universe, config: RunConfig) -> State:
        """Fresh state: empty books, opening balances, the rules that the configuration or arbl2 knows. Raises ConfigError."""
        n, p = len(universe.instruments), len(universe.symbols)
        books = np.zeros(max(n, 1), BOOK_STATE)
        books["pair"] = -1
        for k, instrument in enumerate(universe.instruments):
            books[k]["venue"] = VENUES.index(instrument.venue)
        if universe.fx_book >= 0:
            books[universe.fx_book]["is_fx"] = 1
        pairs = np.zeros(p, PAIR_STATE)
        balance = np.zeros((3, 1 + p), np.int64)
        balance[UPBIT, 0] = amount_e8("paper.upbit_krw", config.paper.upbit_krw)
        balance[BINANCE, 0] = amount_e8("paper.binance_usdt", config.paper.binance_usdt)
        flat = _flat_config(universe, config)
        for k, symbol in enumerate(universe.symbols):
            row = pairs[k]
            row["upbit_book"], row["binance_book"] = universe.upbit_books[k], universe.binance_books[k]
            row["size_krw_e8"] = amount_e8("policy.size_krw", config.policy.size_krw)
            row["max_position_krw_e8"] = amount_e8("policy.max_position_krw", config.policy.max_position_krw)
            row["entry_bps"] = config.policy.entry_bps
            row["exit_bps"] = config.policy.tp_bps - config.policy.entry_bps
            balance[UPBIT, 1 + k], balance[BINANCE, 1 + k] = starting_coins_e8(config.paper, symbol)
            books[universe.upbit_books[k]]["pair"] = books[universe.binance_books[k]]["pair"] = k
        set_rules(pairs, universe, config, {})
        counters = np.zeros(1, COUNTERS)
        counters["next_due_ns"] = 2**62
        return cls(
            books=books,
            counts=np.zeros((len(books), 2, 2), np.int64),
            px=np.zeros((len(books), 2, MAX_LEVELS), np.int64),
            qty=np.zeros((len(books), 2, MAX_LEVELS), np.int64),
            eaten=np.zeros((len(books), 2, EATEN_CAP, 3), np.int64),
            gaps=np.zeros((len(books), GAP_MS + GAP_S), np.int64),
            pairs=pairs,
            config=flat,
            balance=balance,
            locked=np.zeros_like(balance),
            orders=np.zeros(ORDER_SLOTS, FILL_DTYPE),
            order_state=np.zeros((ORDER_SLOTS, 4), np.int64),
            taken=np.zeros((ORDER_SLOTS, MAX_LEVELS, 2), np.int64),
            counters=counters,
            decisions=np.zeros(EVENT_ROWS + p, DECISION_DTYPE),
            fills=np.zeros(EVENT_ROWS, FILL_DTYPE),
            view=np.zeros(1, VIEW),
            ask=np.zeros(4, np.int64),
        )


def set_rules(pairs: NDArray[Any], universe: Universe, config: RunConfig, recorded: Mapping[str, BinanceRules]) -> None:
    """Write the order rules of every pair that has some: configuration first, then ``recorded``, then built in.

    A pair without rules keeps a lot of 0 and is not traded until the tape brings them (Binance's exchangeInfo).
    """
    for k, symbol in enumerate(universe.symbols):
        override = config.rules.get(symbol)
        known = f"{symbol}USDT" in recorded or binance_rules(f"{symbol}USDT") is not None
        if known or (override is not None and override.lot is not None):
            rules = pair_rules(symbol, config.rules, recorded)
            pairs[k]["lot_e8"] = rules.lot_e8
            pairs[k]["min_notional_e8"][UPBIT] = rules.upbit_min_notional_e8
            pairs[k]["min_notional_e8"][BINANCE] = rules.binance_min_notional_e8


def _flat_config(universe: Universe, config: RunConfig) -> NDArray[Any]:
    flat = np.zeros(1, CONFIG)
    row = flat[0]
    row["stale_ns"] = round(config.aggregator.stale_s * 1e9)
    row["fx_stale_ns"] = round(config.aggregator.fx_stale_s * 1e9)
    row["fx_book"] = universe.fx_book
    row["latency_ns"][UPBIT] = ns_of_ms(config.paper.upbit_latency_ms)
    row["latency_ns"][BINANCE] = ns_of_ms(config.paper.binance_latency_ms)
    row["fee_ppm"][UPBIT] = ppm_of_bps(config.paper.upbit_fee_bps)
    row["fee_ppm"][BINANCE] = ppm_of_bps(config.paper.binance_fee_bps)
    row["fee_in_base"][BINANCE] = config.paper.binance_fee_in == "received"
    return flat
