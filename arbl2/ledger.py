"""The ledger: what each venue's account holds, and the proof that it adds up.

The loop posts every fill to integer balances. ``add`` adds the fill rows up again, independently, in Python integers, and
``reconcile`` demands that cash change + fees + position change leave a residual of exactly zero in every currency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arbl2.book import best_px_e8
from arbl2.errors import EngineError
from arbl2.frames import BINANCE, UPBIT, VENUES
from arbl2.money import E8, FxQuote, Krw, Usdt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arbl2.book import State, Universe

QUOTE = {UPBIT: "KRW", BINANCE: "USDT"}


class Ledger:
    """Balances by venue and currency, in 10^-8 of each."""

    def __init__(self, universe: Universe, state: State) -> None:
        self._universe = universe
        self._state = state
        self._opening = state.balance.copy()
        self._posted = {venue: dict.fromkeys(row, 0) for venue, row in self.balances().items()}

    def balances(self, *, opening: bool = False) -> dict[str, dict[str, int]]:
        """Balance by venue and currency (10^-8)."""
        table = self._opening if opening else self._state.balance
        names = self._universe.symbols
        return {
            VENUES[v]: {QUOTE[v]: int(table[v, 0]), **{name: int(table[v, 1 + k]) for k, name in enumerate(names)}}
            for v in (UPBIT, BINANCE)
        }

    def changes(self) -> dict[str, dict[str, int]]:
        """Change since the start by venue and currency (10^-8), fees included."""
        then, now = self.balances(opening=True), self.balances()
        return {venue: {name: now[venue][name] - then[venue][name] for name in now[venue]} for venue in now}

    def pack(self) -> dict[str, Any]:
        """What a later run needs to go on from here; plain JSON values."""
        return {"opening": self._opening.tolist(), "posted": {venue: dict(row) for venue, row in self._posted.items()}}

    def unpack(self, packed: dict[str, Any]) -> None:
        """Go on from there."""
        self._opening[...] = packed["opening"]
        self._posted = {venue: dict(row) for venue, row in packed["posted"].items()}

    def add(self, fills: NDArray[Any]) -> None:
        """Add fill rows to the independent sum, in Python integers, which hold any sum."""
        for venue, symbol in sorted(dict.fromkeys(zip(fills["venue"].tolist(), fills["symbol"].tolist(), strict=True))):
            rows = fills[(fills["venue"] == venue) & (fills["symbol"] == symbol)]
            sign = rows["side"].astype(object)  # 1 buys, -1 sells
            fee, in_base = rows["fee_e8"].astype(object), rows["fee_in_base"] == 1
            row = self._posted[VENUES[venue]]
            row[QUOTE[venue]] -= (sign * rows["quote_e8"]).sum() + fee[~in_base].sum()
            row[self._universe.symbols[symbol]] += (sign * rows["filled_e8"]).sum() - fee[in_base].sum()

    def reconcile(self) -> None:
        """Check the balances against the sum of the fills. Raises EngineError naming the residual."""
        for venue, row in self.changes().items():
            for currency, change in row.items():
                residual = change - self._posted[venue][currency]
                if residual:
                    raise EngineError(
                        f"the ledger does not add up: {venue} {currency} is off by {residual} x 10^-8. This is a defect of "
                        "arbl2; please report it with the tape and the configuration."
                    )

    def mark_krw(self, symbol: int, coin_e8: int) -> int | None:
        """KRW value of a coin change at the closing Upbit book: a surplus at the bid, a shortage at the ask. None: no book."""
        return self._mark(self._universe.upbit_books[symbol], coin_e8)

    def usdt_to_krw(self, amount_e8: int) -> int | None:
        """KRW value of a USDT change at the closing KRW-USDT book: a surplus at the bid, a shortage at the ask. None: no book."""
        return None if self._universe.fx_book < 0 else self._mark(self._universe.fx_book, amount_e8)

    def closing_rate(self, side: str) -> FxQuote[Usdt, Krw] | None:
        """The rate that marks USDT at the end: the last KRW-USDT book of the tape, with its age. None: there was none."""
        book, index = self._universe.fx_book, 0 if side == "bid" else 1
        rate = best_px_e8(self._state, book, index) if book >= 0 else 0
        if rate == 0:
            return None
        age_ns = int(self._state.counters[0]["time_ns"] - self._state.books[book]["last_ns"])
        return FxQuote(Usdt, Krw, rate, side, "last upbit KRW-USDT book", age_ns)

    def krw_to_usdt(self, amount_e8: int) -> int | None:
        """USDT value of a KRW change: a surplus buys USDT at the ask, a shortage is met by selling USDT at the bid."""
        book = self._universe.fx_book
        if amount_e8 == 0:
            return 0
        side = 1 if amount_e8 > 0 else 0
        rate = best_px_e8(self._state, book, side) if book >= 0 else 0
        return amount_e8 * E8 // rate if rate else None

    def _mark(self, book: int, amount_e8: int) -> int | None:
        if amount_e8 == 0:
            return 0
        side = 0 if amount_e8 > 0 else 1
        price = best_px_e8(self._state, book, side)
        return amount_e8 * price // E8 if price else None
