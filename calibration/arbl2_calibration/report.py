"""The report: a table of zones for a terminal, and what the numbers cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich.table import Table

from arbl2_calibration.fit import MAX_WIDTH, MIN_DF, MIN_N_EFF

if TYPE_CHECKING:
    from arbl2.zones import CalibrationTable, ZoneRecord


def zone_table(table: CalibrationTable, *, show: Literal["published", "seen", "all"] = "published") -> Table:
    """Published zones and the two coarsest levels; "seen": every zone that has an event; "all": every zone there is."""
    view = Table(title="Survival of what an order sees, by zone", caption=f"calibration {table.id[:12]}", title_justify="left")
    view.add_column("zone", overflow="fold")
    for name in ("state", "n", "n_eff", "blocks", "survival", "95 %", "slippage bps"):
        view.add_column(name, justify="left" if name == "state" else "right")
    coarse = {zone.zone_id for level in table.table.levels[2:] for zone in level}
    for record in table.artefact.zones:
        seen = record.n > 0 or record.unresolved > 0
        if show == "all" or (seen and (show == "seen" or record.published or record.zone_id in coarse)):
            view.add_row(*_cells(record))
    return view


def limits_text(table: CalibrationTable) -> str:
    """What was read, what was left out and why, and what is not identified; plain text."""
    artefact = table.artefact
    empty = sum(1 for record in artefact.zones if record.n == 0)
    thin = sum(1 for record in artefact.zones if record.n and not record.published)
    known = [rho for rho in artefact.config.rho1 if rho is not None]
    rho1 = f"{max(known):.2f}" if known else "unknown"
    minutes = artefact.config.block_ns_final / 60e9
    resemblance = f"{artefact.config.blocks} block(s) of {minutes:g} min, resemblance of neighbours {rho1}"
    lines = [
        f"{len(artefact.inputs)} run(s), {sum(used.rows for used in artefact.inputs):,} orders; "
        + ", ".join(f"{reason} {n:,}" for reason, n in artefact.refused_rows.items())
        + " were not fitted.",
        f"{resemblance}; {empty} zones without a sample and {thin} with too few: unknown.",
        f"Published from n_eff {MIN_N_EFF:g} and {MIN_DF + 1:g} blocks on, with an interval no wider than {MAX_WIDTH:g}.",
        "Not identified:",
        *(f"- {limit}" for limit in artefact.limits),
    ]
    return "\n".join(lines)


def _cells(record: ZoneRecord) -> tuple[str, ...]:
    n_eff = "-" if record.n_eff is None else f"{record.n_eff:,.0f}"
    mean = record.slippage_bps.mean
    point, interval = _survival(record)
    return (
        record.zone_id,
        record.state,
        f"{record.n:,}",
        n_eff,
        f"{record.blocks:,}",
        point,
        interval,
        "unknown" if mean is None else f"{mean:.2f}{_plus_minus(record.slippage_bps.ci95)}",
    )


def _survival(record: ZoneRecord) -> tuple[str, str]:
    survival = record.survival
    if not record.published or survival.ci95 is None:
        return "unknown", "unknown" if record.uses_zone_id is None else f"uses {record.uses_zone_id}"
    low, high = survival.ci95
    point = "at a bound" if survival.point is None else f"{survival.point:.3f}"
    return point, f"{low:.3f} - {high:.3f}"


def _plus_minus(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.2f}"
