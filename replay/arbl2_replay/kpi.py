"""Key figures of a run, added up as the events are drained, in integers.

PnL is what changed in each account, in its own currency, plus two totals (KRW, USDT) in which what is not in that currency is
marked at the closing books: what we have too much of at the bid, what we lack at the ask. The band replaces each leg's fill by
the fill it would have had against the book *after* its arrival, with missing coin valued at the mid of the decision: pessimistic
takes the worse of the two for every leg, optimistic the better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arbl2.events import FillStatus, Intent, Outcome, Side
from arbl2.frames import BINANCE, UPBIT, VENUES
from arbl2.ledger import QUOTE
from arbl2.money import E8, format_e8

if TYPE_CHECKING:
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
    worse: int = 0
    better: int = 0
    resolved: int = 0

    def add(self, fill: Any) -> None:
        buys = int(fill["side"]) == Side.BUY
        filled, quote, fee = int(fill["filled_e8"]), int(fill["quote_e8"]), int(fill["fee_e8"])
        mid_twice = int(fill["bid_px_e8"]) + int(fill["ask_px_e8"])
        status = int(fill["status"])
        self.status[status] = self.status.get(status, 0) + 1
        self.size += int(fill["size_e8"])
        self.filled += filled
        self.cash += -quote if buys else quote
        self.coin += filled if buys else -filled
        if fill["fee_in_base"]:
            self.fee_coin += fee
        else:
            self.fee_cash += fee
        at_mid = filled * mid_twice // (2 * E8)
        self.notional_at_mid += at_mid
        self.slippage += quote - at_mid if buys else at_mid - quote
        if fill["resolved"]:
            self.resolved += 1
            extra = int(fill["after_filled_e8"]) - filled
            paid = int(fill["after_quote_e8"]) - quote
            gain = extra * mid_twice // (2 * E8) - paid
            change = gain if buys else -gain
            self.worse += min(change, 0)
            self.better += max(change, 0)

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
        for decision in events.decisions:
            row = self._decisions[decision["symbol"]]
            if int(decision["outcome"]) != Outcome.ACCEPTED:
                row["refused"] += 1
                continue
            row["accepted"] += 1
            row["entries" if int(decision["intent"]) == Intent.ENTRY else "exits"] += 1
            row["episodes"] += int(decision["first_in_episode"])
        for fill in events.fills:
            self._legs[int(fill["symbol"]), int(fill["venue"])].add(fill)

    def result(self) -> dict[str, Any]:
        """Everything as plain JSON values; amounts as decimal text in the currency named."""
        symbols = [self._symbol(k, name) for k, name in enumerate(self._engine.universe.symbols)]
        totals = [row.pop("_pnl_krw") for row in symbols]
        bands = [row.pop("_band") for row in symbols]
        usdt = self._engine.ledger.krw_to_usdt
        fx = {side: self._engine.ledger.closing_rate(side) for side in ("bid", "ask")}
        total = None if None in totals else sum(totals)
        band = None if total is None or None in bands else (sum(b[0] for b in bands), sum(b[1] for b in bands))
        return {
            "symbols": symbols,
            "decisions": sum(row["decisions"]["accepted"] for row in symbols),
            "refused_asks": self._engine.refusals(),
            "legs": sum(leg.legs for leg in self._legs.values()),
            "legs_filled": sum(leg.count(FillStatus.FILLED) for leg in self._legs.values()),
            "legs_partial": sum(leg.count(FillStatus.PARTIAL) for leg in self._legs.values()),
            "pnl_krw": _text(total, 2),
            "pnl_usdt": _text(None if total is None else usdt(total), 4),
            "pnl_krw_band": None
            if band is None
            else {"pessimistic": _text(total + band[0], 2), "optimistic": _text(total + band[1], 2)},
            "marks": {
                "coins": "closing Upbit book, surplus at the bid, shortage at the ask",
                "fx": {side: str(quote) if quote else "none: no KRW-USDT book on the tape" for side, quote in fx.items()},
            },
            "balance_changes": {
                venue: {name: _text(value, 8) for name, value in row.items()}
                for venue, row in self._engine.ledger.changes().items()
            },
        }

    def _symbol(self, k: int, name: str) -> dict[str, Any]:
        ledger = self._engine.ledger
        upbit, binance = self._legs[k, UPBIT], self._legs[k, BINANCE]
        cash_krw = upbit.cash - upbit.fee_cash
        cash_usdt = binance.cash - binance.fee_cash
        coin = upbit.coin + binance.coin - upbit.fee_coin - binance.fee_coin
        parts = (cash_krw, ledger.usdt_to_krw(cash_usdt), ledger.mark_krw(k, coin))
        total = None if None in parts else sum(part for part in parts if part is not None)
        worse, better = ledger.usdt_to_krw(binance.worse), ledger.usdt_to_krw(binance.better)
        return {
            "symbol": name,
            "decisions": self._decisions[k],
            "venues": {VENUES[venue]: _venue(self._legs[k, venue], venue, name) for venue in (UPBIT, BINANCE)},
            "pnl": {
                "krw": _text(cash_krw, 2),
                "usdt": _text(cash_usdt, 4),
                name: _text(coin, 8),
                "total_krw": _text(total, 2),
                "total_usdt": _text(None if total is None else ledger.krw_to_usdt(total), 4),
            },
            "_pnl_krw": total,
            "_band": None if worse is None or better is None else (upbit.worse + worse, upbit.better + better),
        }


def _venue(legs: _Legs, venue: int, symbol: str) -> dict[str, Any]:
    return {
        "legs": legs.legs,
        **{status.name.lower(): legs.count(status) for status in FillStatus},
        "resolved": legs.resolved,
        "fill_ratio": legs.filled / legs.size if legs.size else None,
        "slippage_bps": legs.slippage / legs.notional_at_mid * 10_000 if legs.notional_at_mid else None,
        "fees": {QUOTE[venue]: _text(legs.fee_cash, 8), symbol: _text(legs.fee_coin, 8)},
    }


def _text(value: int | None, decimals: int) -> str | None:
    return None if value is None else format_e8(value, decimals).replace(",", "")
