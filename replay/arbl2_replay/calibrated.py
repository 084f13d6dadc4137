"""A run beside a calibration: what had been said of the orders' zones, and what the recorded books then held.

Nothing here touches a run. Its fill rows are read again, in groups, when it has ended: decisions, fills and digest are those of a
run without a calibration, no outcome is made from a prediction, and a run that was resumed needs nothing kept for this.

Like is compared with like. An order counts here if it would count in ``arbl2 calibrate`` (the first of its opportunity, something
visible, resolved by the same rule), and what is observed is what calibrate averages: survival y, the visible share times y, and
drift. A zone whose numbers do not hold says what its nearest published ancestor says, or unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.events import Side
from arbl2.frames import VENUES
from arbl2.zones import SIDES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arbl2.engine import Engine
    from arbl2.zones import CalibrationTable, ZoneRecord, ZoneTable
    from arbl2_replay.sinks import EventLog

_SUMS = ("unresolved", "n", "y_e9", "visible_e9", "fill_e9", "priced", "drift_e6")
"""Per zone: orders not resolved, orders counted, and of these the sums of survival, of the visible share and of their product
(units of 10^-9), how many were filled and had a mid, and the sum of their drift (10^-6 bps). Sums of integers are exact."""
_AT = {name: place for place, name in enumerate(_SUMS)}
_QUANTITIES = ("survival", "fill_ratio", "drift_bps")


class _Tally:
    """Orders added up by zone, and counted by the reason why they are in none of the sums."""

    def __init__(self, table: ZoneTable, longest_ns: NDArray[np.int64]) -> None:
        self._table = table
        self._longest_ns = longest_ns
        self.sums = np.zeros((len(table.zones), len(_SUMS)), dtype=np.int64)
        self.orders = 0
        self.left_out = dict.fromkeys(("repeated", "nothing_visible", "no_zone"), 0)

    def add(self, fills: NDArray[Any]) -> None:
        """Add fill rows."""
        self.orders += len(fills)
        fills = self._kept(fills, fills["first_in_episode"] == 1, "repeated")
        fills = self._kept(fills, fills["visible_e8"] > 0, "nothing_visible")
        zone = _zones(self._table, fills)
        fills, zone = self._kept(fills, zone >= 0, "no_zone"), zone[zone >= 0]
        known = _is_resolved(fills, self._longest_ns)
        self.sums[:, _AT["unresolved"]] += np.bincount(zone[~known], minlength=len(self.sums))
        np.add.at(self.sums, zone[known], _values(fills[known]))

    def _kept(self, fills: NDArray[Any], keep: NDArray[np.bool_], reason: str) -> NDArray[Any]:
        self.left_out[reason] += int(np.count_nonzero(~keep))
        return fills[keep]


def beside(table: CalibrationTable, engine: Engine, log: EventLog, span_ns: tuple[int, int]) -> dict[str, Any]:
    """What ``table`` says of the orders of a run and what came, as plain JSON values.

    ``log`` has the events of the run and ``span_ns`` is the time of its first and last frame. ``rows`` are the zones that orders
    fell in. Each quantity has ``n`` orders, ``predicted`` (None: unknown, or a bound only), ``interval`` (95 %, None: unknown)
    and ``observed`` (None: no order was resolved). ``interval_of`` says what those of survival and fill ratio are for: the
    ``mean`` of the calibrated sessions, or that of the ``next_session``; never one order. ``total`` compares the orders whose
    zone has a point with the mean of these points; it has no interval, because zones are estimated from the same blocks of time.
    """
    tally = _Tally(table.table, _longest_gaps_ns(engine))
    for fills in log.groups("fills"):
        tally.add(fills)
    met = np.flatnonzero(tally.sums[:, : _AT["n"] + 1].any(axis=1)).tolist()
    rows = [_row(table, zone, dict(zip(_SUMS, tally.sums[zone].tolist(), strict=True))) for zone in met]
    return {
        "id": table.id,
        "name": table.name,
        "in_sample": table.in_sample(*span_ns),
        "orders": tally.orders,
        **tally.left_out,
        "unresolved": sum(row["unresolved"] for row in rows),
        "counted": sum(row["n"] for row in rows),
        "unknown": sum(row["n"] for row in rows if row["uses_zone_id"] is None),
        "total": {name: _total([row[name] for row in rows]) for name in _QUANTITIES},
        "rows": rows,
    }


def _longest_gaps_ns(engine: Engine) -> NDArray[np.int64]:
    """By symbol and venue code: how far from an arrival a book may be that says something about it.

    Twice the median gap of the book, of the faster one where two instruments share a symbol, as in calibrate.
    """
    medians: dict[tuple[str, str], int] = {}
    for book in engine.books():
        key, gap_ns = (str(book["symbol"]), str(book["venue"])), int(book["gap_median_ns"])
        medians[key] = min(gap_ns, medians.get(key, gap_ns))
    longest = [[2 * medians.get((symbol, venue), 0) for venue in VENUES] for symbol in engine.universe.symbols]
    return np.array(longest, dtype=np.int64).reshape(-1, len(VENUES))


def _zones(table: ZoneTable, fills: NDArray[Any]) -> NDArray[np.int64]:
    zone = np.full(len(fills), -1, dtype=np.int64)
    for venue in np.unique(fills["venue"]).tolist():
        for side in SIDES:
            at = np.flatnonzero((fills["venue"] == venue) & (fills["side"] == Side[side.upper()]))
            some = fills[at]
            size = some["visible_e8"] / some["depth_e8"]
            zone[at] = table.places(VENUES[venue], side, some["edge_bps"], size, some["arrive_ns"] - some["time_ns"])
    return zone


def _is_resolved(fills: NDArray[Any], longest_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the books tell of the arrival: one newer than that of the decision, or two that lie close around it."""
    before = fills["arrive_ns"] - fills["before_ns"]
    after = fills["after_ns"] - fills["arrive_ns"]
    longest = longest_ns[fills["symbol"], fills["venue"]]
    close = (before > 0) & (before <= longest) & (after <= longest)
    resolved: NDArray[np.bool_] = (fills["resolved"] == 1) & ((fills["before_ns"] > fills["decision_book_ns"]) | close)
    return resolved


def _values(fills: NDArray[Any]) -> NDArray[np.int64]:
    """What each resolved order adds to the sums of its zone."""
    visible = fills["visible_e8"].astype(np.float64)
    before, after = fills["before_e8"] / visible, fills["after_e8"] / visible
    y = before + (fills["arrive_ns"] - fills["before_ns"]) / (fills["after_ns"] - fills["before_ns"]) * (after - before)
    ones, size = np.ones(len(fills), dtype=np.int64), fills["size_e8"]
    priced = (fills["bid_px_e8"] > 0) & (fills["ask_px_e8"] > 0) & (fills["filled_e8"] > 0)
    drift = np.zeros(len(fills))
    drift[priced] = _drift_e6(fills[priced])
    columns = (0 * ones, ones, _whole(1e9 * y), _whole(1e9 * visible / size), _whole(1e9 * y * visible / size), priced)
    return np.column_stack([*columns, _whole(drift)]).astype(np.int64)


def _drift_e6(fills: NDArray[Any]) -> NDArray[np.float64]:
    """Average price of the fill against that of the visible quantity at decision, in 10^-6 bps of the mid; positive is worse."""
    filled_px = fills["quote_e8"] * 1e8 / fills["filled_e8"]
    visible_px = fills["visible_quote_e8"] * 1e8 / fills["visible_e8"]
    mid = (fills["bid_px_e8"].astype(np.float64) + fills["ask_px_e8"]) / 2
    drift: NDArray[np.float64] = 1e10 * fills["side"] * (filled_px - visible_px) / mid
    return drift


def _whole(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded, halves away from zero, as the SQL of calibrate does."""
    whole: NDArray[np.float64] = np.copysign(np.floor(np.abs(values) + 0.5), values)
    return whole


def _row(table: CalibrationTable, zone: int, sums: dict[str, int]) -> dict[str, Any]:
    record = table.record(table.table.zones[zone].zone_id)
    used = table.resolve(record)
    n, priced = sums["n"], sums["priced"]
    visible = sums["visible_e9"] / 1e9 / n if n else None
    point, interval, what = _survival(used)
    mean = used.drift_bps.mean if used is not None else None
    return {
        "zone_id": record.zone_id,
        "state": record.state,
        "uses_zone_id": record.uses_zone_id,
        "n": n,
        "unresolved": sums["unresolved"],
        "interval_of": what,
        "survival": _quantity(n, point, interval, sums["y_e9"] / 1e9),
        # the share that these orders saw is known at decision, so only the survival of it is predicted
        "fill_ratio": _quantity(n, _times(point, visible), _times_both(interval, visible), sums["fill_e9"] / 1e9),
        "drift_bps": _quantity(priced, mean, used.drift_bps.ci95 if used is not None else None, sums["drift_e6"] / 1e6),
    }


def _survival(used: ZoneRecord | None) -> tuple[float | None, tuple[float, float] | None, str | None]:
    """Point, 95 % interval and what the interval is for."""
    if used is None:
        return None, None, None
    survival = used.survival
    if survival.next_session95 is not None:
        return survival.point, survival.next_session95, "next_session"
    return survival.point, survival.ci95, "mean"


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _times_both(interval: tuple[float, float] | None, factor: float | None) -> tuple[float, float] | None:
    return None if interval is None or factor is None else (interval[0] * factor, interval[1] * factor)


def _quantity(n: int, predicted: float | None, interval: tuple[float, float] | None, total: float) -> dict[str, Any]:
    ends = list(interval) if interval is not None else None
    return {"n": n, "predicted": predicted, "interval": ends, "observed": total / n if n else None}


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the orders whose zone has a point."""
    said = [row for row in rows if row["n"] and row["predicted"] is not None]
    n = sum(row["n"] for row in said)
    means = {name: sum(row["n"] * row[name] for row in said) / n if n else None for name in ("predicted", "observed")}
    return {"n": n, **means}
