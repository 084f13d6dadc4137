"""Calibration: learn from recorded books how much of what an order sees is left when it arrives.

``calibrate`` reads the runs that a replay or a live paper session left behind, refuses what is no evidence, and writes an
artefact whose every number carries its samples and an interval. Zones without samples are unknown, never 0 or 1.
"""

from __future__ import annotations

from arbl2_calibration.artefact import load, read_blocks
from arbl2_calibration.pipeline import CalibrationResult, calibrate
from arbl2_calibration.report import limits_text, zone_table

load_calibration = load
"""The name of ``load`` on the face of arbl2."""

__all__ = ["CalibrationResult", "calibrate", "limits_text", "load", "load_calibration", "read_blocks", "zone_table"]
