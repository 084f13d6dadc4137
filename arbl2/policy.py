"""Policies: what to trade, given what is seen.

``ThresholdPolicy`` is compiled into the loop. Any other policy is a Python object with ``decide``: the loop stops after each
update and shows it a ``View`` of every pair that the update may have changed. Both kinds see the same and ask the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from arbl2.config import PolicyConfig
    from arbl2.events import Direction, Intent


@dataclass(frozen=True, slots=True)
class View:
    """One pair at one instant. Prices are the best that still have something to take, 10^-8 of KRW or USDT, 0 = none.

    ``sell_upbit_bps`` and ``buy_upbit_bps`` are gross edges after FX (NaN where a side is missing). ``held_*_e8`` is the coin
    bought (+) or sold (-) on each venue since the start.
    """

    symbol: str
    time_ns: int
    seq: int
    sell_upbit_bps: float
    buy_upbit_bps: float
    upbit_bid_e8: int
    upbit_ask_e8: int
    binance_bid_e8: int
    binance_ask_e8: int
    fx_bid_e8: int
    fx_ask_e8: int
    held_upbit_e8: int
    held_binance_e8: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A trade asked for: both legs are IOC at the best prices of the view; a size of 0 leaves that leg out."""

    direction: Direction
    intent: Intent
    upbit_size_e8: int
    binance_size_e8: int


@runtime_checkable
class Policy(Protocol):
    """A policy written in Python. It must not read clocks or draw random numbers: everything it may use is in the view."""

    def decide(self, view: View) -> Ask | None:
        """A trade to ask for, or None. Not called while orders of the pair are in flight."""


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """The compiled entry / take-profit policy; see ``kernels.threshold`` for the rule."""

    config: PolicyConfig

    @property
    def exit_bps(self) -> float:
        """Edge of the way back at which a position is closed."""
        return self.config.tp_bps - self.config.entry_bps
