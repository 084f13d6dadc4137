"""Key figures of a run, added up as the events are drained, in integers.

PnL is what changed in each account, in its own currency. A total in KRW or USDT nets every other currency over the whole
run first and marks what is left once, at the closing books: what we have too much of at the bid, what we lack at the ask. Per
coin the same is done for that coin alone, so those figures do not add up to the total: flows that offset each other need no
conversion.

The band replaces each leg's fill at the book before its arrival (B-): *expected* weighs the book after it (B+) by how far between
the two the order arrived, *pessimistic* and *optimistic* take the worse and the better of the two for every leg. Coin that
is filled in one and not in the other is valued at the mid of the decision. Legs without a B+ count as filled at B- and are said
to be unresolved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.events import FillStatus, Intent, Outcome
from arbl2.frames import BINANCE, UPBIT, VENUES
from arbl2.ledger import QUOTE
from arbl2.money import E8, format_e8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from arbl2.engine import Engine, Events


@dataclass(slots=True)
class _Legs:
    """Sums over the legs of one symbol on one venue; amounts in 10^-8."""

    status: dict[int, int] = field(default_factory=dict)
    size: int = 0
    filled: int = 0
    cash: int = 0
    coin: int = 0
    fee_cash: int = 0
    fee_coin: int = 0
    notional_at_mid: int = 0
    slippage: int = 0
    likely: int = 0
    worse: int = 0
    better: int = 0
    resolved: int = 0
    unpriced: int = 0

    def add(self, fills: NDArray[Any], fee_ppm: int) -> None:
        """Add fill rows. Sums and products are Python integers, which hold any amount."""
        for status, count in zip(*(values.tolist() for values in np.unique(fills["status"], return_counts=True)), strict=True):
            self.status[status] = self.status.get(status, 0) + count
        sign, size, filled, quote, fee, bid, ask = (
            fills[name].astype(object)
            for name in ("side", "size_e8", "filled_e8", "quote_e8", "fee_e8", "bid_px_e8", "ask_px_e8")
        )  # side: 1 buys, -1 sells
        in_base = fills["fee_in_base"] == 1
        self.size += size.sum()
        self.filled += filled.sum()
        self.cash -= (sign * quote).sum()
        self.coin += (sign * filled).sum()
        self.fee_coin += fee[in_base].sum()
        self.fee_cash += fee[~in_base].sum()
        # without both sides there is no mid to measure from
        priced = (fills["bid_px_e8"] != 0) & (fills["ask_px_e8"] != 0)
        self.unpriced += int((~priced).sum())
        mid_twice = bid + ask
        at_mid = filled * mid_twice // (2 * E8)
        self.notional_at_mid += at_mid[priced].sum()
        self.slippage += (sign * (quote - at_mid))[priced].sum()
        known = priced & (fills["resolved"] == 1)
        self.resolved += int(known.sum())
        if not known.any():
            return
        extra = fills["after_filled_e8"].astype(object) - filled
        paid = (fills["after_quote_e8"].astype(object) - quote)[known]
        gain = (extra * mid_twice // (2 * E8))[known] - paid
        change = sign[known] * gain - paid * fee_ppm // 1_000_000
        self.worse += np.minimum(change, 0).sum()
        self.better += np.maximum(change, 0).sum()
        passed, span = ((fills[name] - fills["before_ns"])[known].astype(object) for name in ("arrive_ns", "after_ns"))
        self.likely += (change * passed // span).sum()

    def count(self, status: FillStatus) -> int:
        return self.status.get(int(status), 0)

    @property
    def legs(self) -> int:
        return sum(self.status.values())


class Kpi:
    """Figures of a run: ``add`` events as they come, ``result`` at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        n = len(engine.universe.symbols)
        self._legs = {(k, venue): _Legs() for k in range(n) for venue in (UPBIT, BINANCE)}
        self._decisions = [{"accepted": 0, "refused": 0, "entries": 0, "exits": 0, "episodes": 0} for _ in range(n)]

    def add(self, events: Events) -> None:
        """Add drained events."""
        decisions, fills = events.decisions, events.fills
        for k in np.unique(decisions["symbol"]).tolist():
            rows = decisions[decisions["symbol"] == k]
            accepted = rows[rows["outcome"] == Outcome.ACCEPTED]
            entries = int((accepted["intent"] == Intent.ENTRY).sum())
            row = self._decisions[k]
            row["refused"] += len(rows) - len(accepted)
            row["accepted"] += len(accepted)
            row["entries"] += entries
            row["exits"] += len(accepted) - entries
            row["episodes"] += int(accepted["first_in_episode"].sum())
        for (k, venue), legs in self._legs.items():
            rows = fills[(fills["symbol"] == k) & (fills["venue"] == venue)] if len(fills) else fills
            if len(rows):
                legs.add(rows, int(self._engine.state.config[0]["fee_ppm"][venue]))

    def pack(self) -> dict[str, Any]:
        """The sums so far, plain JSON values."""
        legs = [
            {**{name: getattr(leg, name) for name in leg.__slots__}, "status": sorted(leg.status.items())}
            for leg in self._legs.values()
        ]
        return {"legs": legs, "decisions": self._decisions}

    def unpack(self, packed: dict[str, Any]) -> None:
        """Go on from there. Raises ValueError, KeyError or TypeError for anything else than what ``pack`` gave."""
        legs = [_Legs(**{**leg, "status": dict(leg["status"])}) for leg in packed["legs"]]
        self._legs = dict(zip(self._legs, legs, strict=True))
        self._decisions = [dict(row) for _, row in zip(self._decisions, packed["decisions"], strict=True)]

    def result(self) -> dict[str, Any]:
        """Everything as plain JSON values; amounts as decimal text in the currency named."""
        ledger, names = self._engine.ledger, self._engine.universe.symbols
        changes = ledger.changes()
        coins = [sum(changes[VENUES[venue]][name] for venue in (UPBIT, BINANCE)) for name in names]
        total = self._total(changes[VENUES[UPBIT]]["KRW"], changes[VENUES[BINANCE]]["USDT"], coins)
        fx = {side: ledger.closing_rate(side) for side in ("bid", "ask")}
        legs = list(self._legs.values())
        return {
            "symbols": [self._symbol(k, name) for k, name in enumerate(names)],
            "decisions": sum(row["accepted"] for row in self._decisions),
            "refused_asks": self._engine.refusals(),
            "legs": sum(leg.legs for leg in legs),
            "legs_filled": sum(leg.count(FillStatus.FILLED) for leg in legs),
            "legs_partial": sum(leg.count(FillStatus.PARTIAL) for leg in legs),
            "legs_unresolved": sum(leg.legs - leg.resolved for leg in legs),
            "pnl_krw": _text(total[0], 2),
            "pnl_usdt": _text(total[1], 4),
            "pnl_krw_band": self._band(total[0]),
            "marks": {
                "coins": "closing Upbit book, surplus at the bid, shortage at the ask",
                "fx": {side: str(quote) if quote else "none: no KRW-USDT book on the tape" for side, quote in fx.items()},
            },
            "balance_changes": {venue: {name: _text(value, 8) for name, value in row.items()} for venue, row in changes.items()},
        }

    def _total(self, krw: int, usdt: int, coins: Sequence[int]) -> tuple[int | None, int | None]:
        """Changes as one sum in KRW and one in USDT; None where a book to mark at is missing."""
        ledger = self._engine.ledger
        marks = [ledger.mark_krw(k, coin) for k, coin in enumerate(coins)]
        usdt_in_krw = ledger.usdt_to_krw(usdt)
        if None in marks:
            return None, None
        krw += sum(mark for mark in marks if mark is not None)
        krw_in_usdt = ledger.krw_to_usdt(krw)
        return None if usdt_in_krw is None else krw + usdt_in_krw, None if krw_in_usdt is None else usdt + krw_in_usdt

    def _band(self, total: int | None) -> dict[str, str | None] | None:
        if total is None:
            return None
        band: dict[str, str | None] = {}
        for name, part in (("pessimistic", "worse"), ("expected", "likely"), ("optimistic", "better")):
            sums = {
                venue: sum(getattr(legs, part) for (_, v), legs in self._legs.items() if v == venue) for venue in (UPBIT, BINANCE)
            }
            usdt = self._engine.ledger.usdt_to_krw(sums[BINANCE])
            band[name] = None if usdt is None else _text(total + sums[UPBIT] + usdt, 2)
        return band

    def _symbol(self, k: int, name: str) -> dict[str, Any]:
        upbit, binance = self._legs[k, UPBIT], self._legs[k, BINANCE]
        krw, usdt = upbit.cash - upbit.fee_cash, binance.cash - binance.fee_cash
        coin = upbit.coin + binance.coin - upbit.fee_coin - binance.fee_coin
        total = self._total(krw, usdt, [coin if i == k else 0 for i in range(len(self._decisions))])
        return {
            "symbol": name,
            "decisions": self._decisions[k],
            "venues": {VENUES[venue]: _venue(self._legs[k, venue], venue, name) for venue in (UPBIT, BINANCE)},
            "pnl": {
                "krw": _text(krw, 2),
                "usdt": _text(usdt, 4),
                name: _text(coin, 8),
                "total_krw": _text(total[0], 2),
                "total_usdt": _text(total[1], 4),
            },
        }


def _venue(legs: _Legs, venue: int, symbol: str) -> dict[str, Any]:
    return {
        "legs": legs.legs,
        **{status.name.lower(): legs.count(status) for status in FillStatus},
        "resolved": legs.resolved,
        "unpriced": legs.unpriced,
        "fill_ratio": legs.filled / legs.size if legs.size else None,
        "slippage_bps": legs.slippage / legs.notional_at_mid * 10_000 if legs.notional_at_mid else None,
        "fees": {QUOTE[venue]: _text(legs.fee_cash, 8), symbol: _text(legs.fee_coin, 8)},
    }


def _text(value: int | None, decimals: int) -> str | None:
    return None if value is None else format_e8(value, decimals).replace(",", "")
