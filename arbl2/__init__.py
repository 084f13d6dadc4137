"""arbl2: record and replay Upbit and Binance order books so truthfully that a backtest can be trusted.

The public face. Names are loaded when first used, so that ``import arbl2`` costs nothing::

    import arbl2

    result = arbl2.replay("tapes/20260102T000000Z-1a2b", arbl2.RunConfig())
    print(result.digest, result.kpi["pnl_krw"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arbl2.config import RunConfig
    from arbl2.engine import Engine
    from arbl2.errors import Arbl2Error
    from arbl2.frames import ExchangeId, Frame, FrameBlock, FrameKind
    from arbl2.live_feed import MultiExchangeL2Provider, live
    from arbl2.policy import Ask, Policy, ThresholdPolicy, View
    from arbl2.tape import TapeReader
    from arbl2.zones import CalibrationTable
    from arbl2_calibration import calibrate, load_calibration
    from arbl2_recorder import RecordConfig, record, recover
    from arbl2_replay import replay
    from arbl2_replay.travel import Travel

__version__ = "0.1.0"

_HOMES = {
    "Arbl2Error": "arbl2.errors",
    "Ask": "arbl2.policy",
    "CalibrationTable": "arbl2.zones",
    "Engine": "arbl2.engine",
    "ExchangeId": "arbl2.frames",
    "Frame": "arbl2.frames",
    "FrameBlock": "arbl2.frames",
    "FrameKind": "arbl2.frames",
    "MultiExchangeL2Provider": "arbl2.live_feed",
    "Policy": "arbl2.policy",
    "RecordConfig": "arbl2_recorder",
    "RunConfig": "arbl2.config",
    "TapeReader": "arbl2.tape",
    "ThresholdPolicy": "arbl2.policy",
    "Travel": "arbl2_replay.travel",
    "View": "arbl2.policy",
    "calibrate": "arbl2_calibration",
    "live": "arbl2.live_feed",
    "load_calibration": "arbl2_calibration",
    "record": "arbl2_recorder",
    "recover": "arbl2_recorder",
    "replay": "arbl2_replay",
}

__all__ = [
    "Arbl2Error",
    "Ask",
    "CalibrationTable",
    "Engine",
    "ExchangeId",
    "Frame",
    "FrameBlock",
    "FrameKind",
    "MultiExchangeL2Provider",
    "Policy",
    "RecordConfig",
    "RunConfig",
    "TapeReader",
    "ThresholdPolicy",
    "Travel",
    "View",
    "__version__",
    "calibrate",
    "live",
    "load_calibration",
    "record",
    "recover",
    "replay",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'arbl2' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
