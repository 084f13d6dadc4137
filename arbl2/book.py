"""The state that the compiled loop works on: books, pairs, orders and balances as arrays, and the index that names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.config import amount_e8, ns_of_ms, ppm_of_bps, starting_coins_e8
from arbl2.errors import ConfigError
from arbl2.frames import BINANCE, UPBIT, VENUES, ExchangeId
from arbl2.jit import as_records, zeros
from arbl2.kernels import AUTO, CHANGES_ONLY, SIZES, WINDOW_ONLY, state_dtype
from arbl2.providers import PROVIDERS
from arbl2.rules import binance_rules, pair_rules
from arbl2.updates import MAX_LEVELS, UpdateBlock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from arbl2.config import RunConfig
    from arbl2.providers import Instrument
    from arbl2.rules import BinanceRules

QUOTES = {ExchangeId.UPBIT: "KRW", ExchangeId.BINANCE: "USDT"}
"""The currency that pairs are priced in on each venue."""
_DEPTH = {"auto": AUTO, "partial": WINDOW_ONLY, "diff": CHANGES_ONLY}


@dataclass(frozen=True, slots=True)
class Universe:
    """Which books a run keeps, and which of them form pairs.

    Book i is ``instruments[i]``; pair k trades ``symbols[k]``. ``fx_book`` is Upbit's KRW-USDT or -1, ``asked_book`` the book
    that a Binance snapshot without a request is of, or -1.
    """

    instruments: tuple[Instrument, ...]
    symbols: tuple[str, ...]
    upbit_books: tuple[int, ...]
    binance_books: tuple[int, ...]
    fx_book: int
    asked_book: int

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], symbols: Sequence[str]) -> Universe:
        """From instrument names by venue, in sorted order. Raises ConfigError for a symbol that a venue lacks.

        With ``symbols``, only their books and the KRW-USDT book are kept.
        """
        instruments: list[Instrument] = [
            PROVIDERS[venue].instrument(name) for venue in ExchangeId for name in sorted(dict.fromkeys(names.get(venue, ())))
        ]
        ours = [i for i in instruments if i.venue == ExchangeId.BINANCE]
        if symbols:
            wanted = {*symbols, "USDT"}
            instruments = [i for i in instruments if i.base in wanted and i.quote == QUOTES[i.venue]] or instruments
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
            # captures of others do not say what they asked for, but of one instrument there is no doubt
            asked_book=instruments.index(ours[0]) if len(ours) == 1 and ours[0] in instruments else -1,
        )

    def books(self, venue: ExchangeId) -> dict[str, int]:
        """Book index by instrument name of one venue."""
        return {i.name: k for k, i in enumerate(self.instruments) if i.venue == venue}


class State:
    """What the loop works on: views of one record of ``kernels.state_dtype``, cut to the books and pairs that there are.

    Kernels get ``records``; without the compiler this object stands in for them.
    """

    def __init__(self, books: int, pairs: int) -> None:
        size = next((size for size in SIZES if books <= size and pairs <= size // 2), 0)
        if not size:
            raise ConfigError(f"{books:,} books are more than the {SIZES[-1]:,} of one run. Choose with --symbols.")
        records = zeros(state_dtype(size))
        self.records: Any = as_records(records, self)
        self.u = UpdateBlock(records["u"])
        rows = {**dict.fromkeys(_OF_BOOKS, books), "pairs": pairs}
        for name in records.dtype.names or ():
            if name != "u":
                setattr(self, name, records[name][0][: rows.get(name)])
        self.balance, self.locked = self.balance[:, : 1 + pairs], self.locked[:, : 1 + pairs]
        self.counters["books"], self.counters["pairs"] = books, pairs

    books: NDArray[Any]
    window: NDArray[np.int64]
    eaten: NDArray[np.int64]
    gaps: NDArray[np.int64]
    rung_px: NDArray[np.int64]
    rung_qty: NDArray[np.int64]
    rung_from: NDArray[np.uint8]
    held: NDArray[Any]
    held_px: NDArray[np.int64]
    held_qty: NDArray[np.int64]
    pairs: NDArray[Any]
    config: NDArray[Any]
    balance: NDArray[np.int64]
    locked: NDArray[np.int64]
    orders: NDArray[Any]
    no_order: NDArray[Any]
    order_state: NDArray[np.int64]
    taken: NDArray[np.int64]
    counters: NDArray[Any]
    reasons: NDArray[np.int64]
    decisions: NDArray[Any]
    fills: NDArray[Any]
    seen: NDArray[Any]
    ask: NDArray[np.int64]


_OF_BOOKS = (
    "books", "window", "eaten", "gaps", "rung_px", "rung_qty", "rung_from", "held", "held_px", "held_qty",
)  # fmt: skip


def new_state(universe: Universe, config: RunConfig) -> State:
    """Fresh state: empty books, opening balances, the rules that the configuration or arbl2 knows. Raises ConfigError."""
    n, p = len(universe.instruments), len(universe.symbols)
    state = State(n, p)
    books, pairs, balance, counters = state.books, state.pairs, state.balance, state.counters
    books["pair"] = -1
    for k, instrument in enumerate(universe.instruments):
        books[k]["venue"] = VENUES.index(instrument.venue)
    if universe.fx_book >= 0:
        books[universe.fx_book]["is_fx"] = 1
    balance[UPBIT, 0] = amount_e8("paper.upbit_krw", config.paper.upbit_krw)
    balance[BINANCE, 0] = amount_e8("paper.binance_usdt", config.paper.binance_usdt)
    _set_config(state.config[0], universe, config)
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
    counters["next_due_ns"] = 2**62
    counters["asked"] = -1
    counters["asked"][0, BINANCE] = universe.asked_book
    state.window[:, :, 0] = np.arange(n * 2).reshape(-1, 2) * MAX_LEVELS
    return state


def window(state: State, book: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Displayed levels of one side (0 bids, 1 asks), best first: prices and sizes, views."""
    at, n = int(state.window[book, side, 0]), int(state.window[book, side, 1])
    return state.u.px_e8[at : at + n], state.u.qty_e8[at : at + n]


def best_px_e8(state: State, book: int, side: int) -> int:
    """Best displayed price of a side, 0 if there is none."""
    px, _ = window(state, book, side)
    return int(px[0]) if len(px) else 0


def ladder(state: State, book: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Every known level of a book that is built from depth changes, best first: prices, sizes, ``LevelFrom``; views.

    Empty for a book that is made of whole windows.
    """
    n = 0 if state.books[book]["windowed"] else int(state.books[book]["rungs"][side])
    return tuple(rungs[book, side, :n][::-1] for rungs in (state.rung_px, state.rung_qty, state.rung_from))  # type: ignore[return-value]


_BOOKS = ("books", "window", "eaten", "gaps")
_RUN = ("pairs", "balance", "locked", "orders", "order_state", "taken", "counters", "reasons")
_RUNGS = ("rung_px", "rung_qty", "rung_from")


def pack_books(state: State) -> dict[str, NDArray[Any]]:
    """Copies of everything that the books are. Windows must be at home (``kernels.come_home``)."""
    home = len(state.books) * 2 * MAX_LEVELS
    packed = {name: getattr(state, name).copy() for name in _BOOKS}
    packed["px"], packed["qty"] = state.u.px_e8[:home].copy(), state.u.qty_e8[:home].copy()
    for k, book in enumerate(state.books):
        n, rows, levels = int(book["rungs"].max()), int(book["held_rows"]), int(book["held_levels"])
        if n:
            packed |= {f"{name}.{k}": getattr(state, name)[k, :, :n].copy() for name in _RUNGS}
        if rows:
            packed[f"held.{k}"] = state.held[k, :rows].copy()
            packed |= {f"{name}.{k}": getattr(state, name)[k, :levels].copy() for name in ("held_px", "held_qty")}
    return packed


def unpack_books(state: State, packed: Mapping[str, NDArray[Any]]) -> None:
    """Put the books back. Raises ValueError where the arrays are not those of the same instruments."""
    _put(state, packed, _BOOKS)
    home = len(state.books) * 2 * MAX_LEVELS
    state.u.px_e8[:home], state.u.qty_e8[:home] = packed["px"], packed["qty"]
    for name, values in packed.items():
        array, dot, k = name.partition(".")
        if dot:
            getattr(state, array)[int(k)][..., : values.shape[-1]] = values


def pack_run(state: State) -> dict[str, NDArray[Any]]:
    """Copies of everything else: positions, balances, orders, counters. The event buffers must be empty."""
    return {name: getattr(state, name).copy() for name in _RUN}


def unpack_run(state: State, packed: Mapping[str, NDArray[Any]]) -> None:
    """Put the run back. Raises ValueError where the arrays are not those of the same configuration."""
    _put(state, packed, _RUN)


def _put(state: State, packed: Mapping[str, NDArray[Any]], names: Sequence[str]) -> None:
    for name in names:
        array, values = getattr(state, name), packed[name]
        if array.shape != values.shape or array.dtype != values.dtype:
            raise ValueError(name)
        array[...] = values


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


def _set_config(row: Any, universe: Universe, config: RunConfig) -> None:
    row["depth"] = _DEPTH[config.aggregator.binance_depth]
    row["stale_ns"] = round(config.aggregator.stale_s * 1e9)
    row["fx_stale_ns"] = round(config.aggregator.fx_stale_s * 1e9)
    row["fx_book"] = universe.fx_book
    row["latency_ns"][UPBIT] = ns_of_ms(config.paper.upbit_latency_ms)
    row["latency_ns"][BINANCE] = ns_of_ms(config.paper.binance_latency_ms)
    row["fee_ppm"][UPBIT] = ppm_of_bps(config.paper.upbit_fee_bps)
    row["fee_ppm"][BINANCE] = ppm_of_bps(config.paper.binance_fee_bps)
    row["fee_in_base"][BINANCE] = config.paper.binance_fee_in == "received"
