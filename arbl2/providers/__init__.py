"""Providers: what each venue's messages mean. One file a venue; adding a venue is adding a file and a line here."""

from __future__ import annotations

from arbl2.frames import ExchangeId
from arbl2.providers.base import Instrument, Provider
from arbl2.providers.binance import BinanceL2Provider
from arbl2.providers.upbit import UpbitL2Provider

PROVIDERS: dict[ExchangeId, type[Provider]] = {
    ExchangeId.UPBIT: UpbitL2Provider,
    ExchangeId.BINANCE: BinanceL2Provider,
}

__all__ = ["PROVIDERS", "BinanceL2Provider", "Instrument", "Provider", "UpbitL2Provider"]
