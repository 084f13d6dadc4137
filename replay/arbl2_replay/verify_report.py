"""What a verification looks like to a person: what was compared, what differs, what the two questions gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arbl2_replay.compare_report import comparison_report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from arbl2_replay.questions import Cuts, Jitter
    from arbl2_replay.verify import Verification


def verification_report(found: Verification) -> RenderableType:
    """Everything that was compared, and the first difference if there is one."""
    kind = "what the killed run left" if found.killed else "the live run"
    if found.same:
        head = Text(f"Verified: {kind} and the replay of its tape are the same.", style="bold green")
    else:
        head = Text(f"NOT the same: {kind} and the replay of its tape.", style="bold red")
    head.append(f"\nsession {found.session}\nrun     {found.run}\ndigest  {found.digest}", style="not bold default")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for check in found.checks:
        mark = Text("differs", style="bold red") if check.problem else Text("equal", style="green")
        table.add_row(mark, Text(check.name), Text(f"{check.compared}{': ' if check.problem else ''}{check.problem}"))
    parts: list[RenderableType] = [head, table]
    if any(check.problem for check in found.checks):
        parts += [Text("\nA is the live run, B the replay.", style="bold"), comparison_report(found.comparison)]
    if found.cuts is not None:
        parts.append(_cuts(found.cuts))
    if found.jitter is not None:
        parts.append(_jitter(found.jitter))
    return Group(*parts)


def _cuts(cuts: Cuts) -> Text:
    said = f"cut at {len(cuts.seqs):,} random frames: "
    if cuts.looked_ahead:
        listed = ", ".join(f"{seq:,}" for seq in cuts.looked_ahead[:8])
        return Text(f"{said}something else was decided before the cut at {listed}: a policy looked ahead", style="bold red")
    return Text(f"{said}all {cuts.decisions:,} decisions before them are equal to the byte, and there are no others")


def _jitter(jitter: Jitter) -> Text:
    low, middle, high = jitter.flips
    lines = [
        f"order across venues within {jitter.window_ms:g} ms permuted {jitter.times:,} times:",
        f"  {jitter.ties:,} of {jitter.frames:,} frames have one of the other venue that near",
        f"  from arrival to seq, p99 on this tape: {jitter.queue_p99_ms:.2f} ms",
        f"  decisions that flip, of {jitter.decisions:,}: {low:,.0f} min, {middle:,.0f} median, {high:,.0f} max",
    ]
    if jitter.pnl_krw is not None:
        lines.append("  PnL moves by, KRW: {:+,.0f} min, {:+,.0f} median, {:+,.0f} max".format(*jitter.pnl_krw))
    return Text("\n".join(lines))
