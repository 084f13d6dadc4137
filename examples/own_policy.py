"""A policy of one's own, on the same books, executor and ledger as the built-in one.

It sells on Upbit whenever that pays 25 bp, once per coin, and never closes.

python examples/own_policy.py
"""

from __future__ import annotations

from pathlib import Path

import arbl2
from arbl2.events import Direction, Intent

TAPE = Path(__file__).resolve().parents[1] / "datasets" / "golden" / "two-venue-60s" / "tape"
ONE = 100_000_000  # sizes are integers of 10^-8 coin
SIZES = {"BTC": ONE // 100, "ETH": ONE // 4, "XRP": 400 * ONE}


class SellTheGap:
    """Looks at one pair at a time and asks for a trade, or not."""

    def decide(self, view: arbl2.View) -> arbl2.Ask | None:
        """Called after every update that may have changed the pair, unless its orders are in flight."""
        if view.held_upbit_e8 == 0 and view.sell_upbit_bps >= 25.0:
            size = SIZES[view.symbol]
            return arbl2.Ask(Direction.SELL_UPBIT, Intent.ENTRY, upbit_size_e8=size, binance_size_e8=size)
        return None


result = arbl2.replay(TAPE, arbl2.RunConfig(), policy=SellTheGap())
for row in result.kpi["symbols"]:
    print(row["symbol"], row["decisions"]["accepted"], "decisions,", row["pnl"]["total_krw"], "KRW")
