"""The recorder: every byte that Upbit and Binance send, with the time it came, safe against kills.

    from arbl2_recorder import RecordConfig, record

    result = record(RecordConfig(symbols=("BTC", "ETH"), duration_s=60))

See the README beside this package for what a recording is and what a crash can cost.
"""

from __future__ import annotations

import logging

from arbl2_recorder.config import Endpoints, RecordConfig
from arbl2_recorder.live import LiveView
from arbl2_recorder.recorder import Listener, arecord, record
from arbl2_recorder.recovery import RecoveryReport, recover
from arbl2_recorder.status import RecordResult, Status, VenueStatus

__all__ = [
    "Endpoints",
    "Listener",
    "LiveView",
    "RecordConfig",
    "RecordResult",
    "RecoveryReport",
    "Status",
    "VenueStatus",
    "arecord",
    "record",
    "recover",
]

# Alarms are warnings; a program that sets up no logging should not find them on its terminal.
logging.getLogger("arbl2.recorder").addHandler(logging.NullHandler())
