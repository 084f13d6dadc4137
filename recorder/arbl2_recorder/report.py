"""What a finished recording, a recovery, the doctor and the health check look like on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arbl2_recorder.live import printable, size

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
    parts_of_it = f", in {len(result.sessions):,} sessions" if len(result.sessions) > 1 else ""
    ratio = f", {result.payload_bytes / result.sealed_bytes:.1f} times smaller" if result.sealed_bytes else ""
    lines = [
        f"{result.frames:,} frames, {size(result.payload_bytes)} raw, {size(result.sealed_bytes)} sealed{ratio}{parts_of_it}",
        f"{result.path}, ended by {result.ended} after {result.duration_s:,.1f} s",
        "every message that arrived is on the tape" if result.clean else f"NOT whole: {result.dropped:,} messages were dropped",
    ]
    delay = result.queue
    delays = f"p50 {delay.p50_us / 1e3:.2f}, p99 {delay.p99_us / 1e3:.2f}, max {delay.max_us / 1e3:.2f} ms"
    lines.append(f"from arrival to seq: {delays}; {_number(result.late_frames, 'frame')} came late (the loop was stalled)")
    lines += [
        f"{venue} sent nothing: `arbl2 doctor` says whether it can be reached" for venue, n in result.messages.items() if not n
    ]
    if any(result.reconnects.values()):
        lines.append("reconnects: " + _counts(result.reconnects))
    if result.gaps:
        lines.append("gaps: " + _counts(result.gaps))
    if result.shipped_segments:
        lines.append(f"shipped: {_number(result.shipped_segments, 'segment')}")
    if result.ship_problem:
        lines.append(f"NOT shipped: {printable(result.ship_problem)}")
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


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


_NAME_WIDTH = 24


def recovery_report(reports: Sequence[RecoveryReport]) -> RenderableType:
    """What recovery restored: frames from the log, those sealed before, and the bytes of a torn tail that were dropped."""
    if not reports:
        return Text("nothing to recover: every session below this folder is whole")
    table = Table(title="Recovered", title_justify="left")
    # generated names fit any terminal; a longer one is folded rather than cut
    table.add_column("session", no_wrap=all(len(report.session) <= _NAME_WIDTH for report in reports), overflow="fold")
    for name in ("from log", "sealed", "torn bytes"):
        table.add_column(name, justify="right")
    table.add_column("problem", overflow="fold")
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
    table.add_column("found", overflow="fold")
    for check in checks:
        found = Text(printable(check.found))
        if check.advice:
            found.append(f"\n{printable(check.advice)}", style=_STYLES[check.state])
        table.add_row(check.name, Text(check.state, style=_STYLES[check.state]), found)
    return table
