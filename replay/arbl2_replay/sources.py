"""Where the exchange server's market comes from."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

import msgspec

from arbl2.errors import ConfigError
from arbl2_replay.synth import STEP_NS, MarketEvent, SynthConfig, binance_symbols, market_events, upbit_codes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class MarketSource(Protocol):
    """Where the market comes from."""

    @property
    def upbit_codes(self) -> Sequence[str]:
        """Upbit market codes, such as KRW-BTC."""

    @property
    def binance_symbols(self) -> Sequence[str]:
        """Binance symbols, such as BTCUSDT."""

    def events(self) -> AsyncIterator[MarketEvent]:
        """Every event at the moment when it is due. Called once; when it ends, the connections stay open and silent."""


class SyntheticSource:
    """The synthetic market in real time, ``speed`` times as fast, without an end.

    Exchange times are those of the wall clock at the start and run ``speed`` times as fast too.
    """

    def __init__(self, config: SynthConfig, *, speed: float = 1.0) -> None:
        if not 0 < speed < float("inf"):
            raise ConfigError(f"speed must be a number above zero, not {speed}. Give 1 for real time.")
        self._config = config
        self._speed = speed
        self.upbit_codes = upbit_codes(config)
        self.binance_symbols = binance_symbols(config)

    async def events(self) -> AsyncIterator[MarketEvent]:
        """Every event of the market, paced by the event loop's clock."""
        loop = asyncio.get_running_loop()
        # whole steps, so that each Upbit code keeps its phase of the 100 ms grid
        now_ns = time.time_ns()
        config = msgspec.structs.replace(self._config, start_ns=now_ns // STEP_NS * STEP_NS)
        began = loop.time() - (now_ns - config.start_ns) / 1e9
        for event in market_events(config, endless=True):
            await asyncio.sleep(max(0.0, began + event.offset_ns / 1e9 / self._speed - loop.time()))
            yield event
