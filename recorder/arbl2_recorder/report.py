"""What a finished recording, a recovery, the doctor and the health check look like on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arbl2_recorder.live import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from arbl2_recorder.doctor import Check
    from arbl2_recorder.recovery import RecoveryReport
    from arbl2_recorder.status import RecordResult


def result_report(result: RecordResult) -> RenderableType:
    """A finished recording: what is on the tape, and what was lost or noticed."""
    table = Table(title=f"Recorded {result.session}", title_justify="left")
    table.add_column("venue")
    for name in ("messages", "per s", "connections", "longest silence"):
        table.add_column(name, justify="right")
    for venue, messages in result.messages.items():
        kinds = {key.split(".", 1)[1]: n for key, n in result.counts.items() if key.split(".", 1)[0] == venue}
        rate = f"{messages / result.duration_s:,.1f}" if result.duration_s else "-"
        silence = f"{result.longest_silence_s[venue]:,.1f} s"
        table.add_row(venue, f"{messages:,}", rate, f"{kinds.get('opened', 0):,}", silence)
    ratio = f", {result.payload_bytes / result.sealed_bytes:.1f} times smaller" if result.sealed_bytes else ""
    lines = [
        f"{result.frames:,} frames, {_mib(result.payload_bytes)} raw, {_mib(result.sealed_bytes)} sealed{ratio}",
        f"{result.path}, ended by {result.ended} after {result.duration_s:,.1f} s",
        "every message that arrived is on the tape" if result.clean else f"NOT whole: {result.dropped:,} messages were dropped",
    ]
    delay = result.queue
    delays = f"p50 {delay.p50_us / 1e3:.2f}, p99 {delay.p99_us / 1e3:.2f}, max {delay.max_us / 1e3:.2f} ms"
    lines.append(f"from arrival to seq: {delays}; {result.late_frames:,} frames came while the loop was stalled")
    if any(result.reconnects.values()):
        lines.append("reconnects: " + _counts(result.reconnects))
    if result.gaps:
        lines.append("gaps: " + _counts(result.gaps))
    if result.shipped_segments:
        lines.append(f"shipped: {result.shipped_segments:,} segments")
    if result.silent:
        lines.append("never said anything: " + ", ".join(map(printable, result.silent)) + " (does the venue know it?)")
    if result.alarms:
        lines.append("alarms: " + _counts(result.alarms))
    parts: list[RenderableType] = [table, Text("\n".join(lines))]
    if result.recovered:
        parts.append(recovery_report(result.recovered))
    return Group(*parts)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def recovery_report(reports: Sequence[RecoveryReport]) -> RenderableType:
    """What recovery restored."""
    if not reports:
        return Text("nothing to recover: every session below this folder is whole")
    table = Table(title="Recovered", title_justify="left")
    table.add_column("session")
    for name in ("frames from log", "frames sealed before", "bytes of a torn tail dropped"):
        table.add_column(name, justify="right")
    table.add_column("problem")
    for report in reports:
        counts = (report.frames_recovered, report.frames_sealed, report.bytes_dropped)
        table.add_row(report.session, *(f"{n:,}" for n in counts), report.problem)
    return table


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor_report(checks: Sequence[Check]) -> RenderableType:
    """Every check with what was found, and below it what to do about it."""
    table = Table(title="arbl2 doctor", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found")
    for check in checks:
        found = Text(printable(check.found))
        if check.advice:
            found.append(f"\n{printable(check.advice)}", style=_STYLES[check.state])
        table.add_row(check.name, Text(check.state, style=_STYLES[check.state]), found)
    return table
