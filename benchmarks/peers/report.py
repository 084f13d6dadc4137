"""Figures of all rounds to the table in docs/performance.md, and the ratios that are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEGIN, END = "<!-- peers: written by `python -m benchmarks.peers --write` -->", "<!-- end of peers -->"

CONVERT, BUILD = "convert", "build"
"""Keys of what is measured beside the engines: the peers' conversion, and the first replay that makes the decoded store."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to run the rule: ``peer``'s environment runs ``module`` with ``arguments`` and the folder it reads."""

    key: str
    name: str
    peer: str
    module: str
    arguments: tuple[str, ...]
    feed: str = ""
    """Which events it is fed: their conversion is part of its own."""


@dataclass(slots=True)
class Figures:
    """What the processes of one engine said, a mapping a round."""

    messages: int
    rounds: list[Mapping[str, Any]] = field(default_factory=list)

    def us(self, *names: str) -> list[float]:
        """Microseconds a message of the named steps together, by round."""
        return [sum(one[f"{name}_s"] for name in names) / self.messages * 1e6 for one in self.rounds]

    def median_us(self, *names: str) -> float:
        """Their median."""
        return median(self.us(*names))

    def most(self, name: str) -> float:
        """The largest value of a figure."""
        return max(float(one[name]) for one in self.rounds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """One claim: ``theirs`` / ``ours`` in us per message, and the least it must be (0: for information)."""

    text: str
    ours: float
    theirs: float
    least: float

    @property
    def holds(self) -> bool:
        """Whether it is as large as asked."""
        return self.theirs >= self.least * self.ours

    def line(self) -> str:
        """As a line of the list."""
        asked = f"asked: at least {self.least:g}, {'holds' if self.holds else 'DOES NOT HOLD'}" if self.least else "not asked"
        return f"- {self.text}: {self.theirs:.2f} / {self.ours:.2f} = {self.theirs / self.ours:.1f} times ({asked})"


def conversion_us(engine: Engine, figures: Mapping[str, Figures]) -> float | None:
    """From raw messages to what the engine takes; None if it takes raw messages."""
    convert = figures[CONVERT]
    if engine.peer == "hft":
        return convert.median_us("decode", f"{engine.feed}_events", f"{engine.feed}_file")
    if engine.peer == "nautilus":
        steps = ("decode", "diff_events") if engine.feed == "diff" else ("decode",)
        return convert.median_us(*steps) + figures[engine.key].median_us("objects")
    return figures[BUILD].median_us("run") if engine.key == "decoded" else None


def table(engines: Sequence[Engine], figures: Mapping[str, Figures]) -> list[str]:
    """Rows of the main table."""
    heads = (
        "median",
        "fastest",
        "slowest",
        "CPU",
        "first run of the process",
        "conversion from raw, apart",
        "peak RSS MB (after imports)",
        "BTC filled",
    )
    lines = [
        f"| engine | us per message: {' | '.join(heads)} |",
        f"|---{'|---' * len(heads)}|",
    ]
    for engine in engines:
        one = figures[engine.key]
        us, cpu = one.us("run"), one.us("run_cpu")
        apart = conversion_us(engine, figures)
        cells = [
            engine.name,
            *(f"{value:.2f}" for value in (median(us), min(us), max(us), median(cpu))),
            f"{one.median_us('first'):.2f}" if "first_s" in one.rounds[0] else "-",
            "-" if apart is None else f"{apart:.1f}",
            f"{one.most('rss_mb'):,.0f} ({one.most('rss_imports_mb'):,.0f})",
            f"{one.rounds[-1]['filled']:.5f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def conversion_table(convert: Figures) -> list[str]:
    """The steps that lead to hftbacktest's input."""
    lines = ["| conversion for hftbacktest, us per message | differences | whole windows |", "|---|---|---|"]
    for text, step in (
        ("Parquet and JSON to arrays (pyarrow, typed msgspec)", "decode"),
        ("arrays to event rows (compiled)", "{}_events"),
        ("rows to a compressed .npz, as its own converters write", "{}_file"),
    ):
        both = (convert.median_us(step.format(way)) for way in ("diff", "snap"))
        lines.append(f"| {text} | {' | '.join(f'{value:.1f}' for value in both)} |")
    rows = (convert.rounds[-1][f"{way}_rows"] / convert.messages for way in ("diff", "snap"))
    lines.append(f"| rows a message | {' | '.join(f'{value:.1f}' for value in rows)} |")
    return lines


def ratios(engines: Sequence[Engine], figures: Mapping[str, Figures]) -> list[Ratio]:
    """What arbl2 is held to."""
    convert = figures[CONVERT]

    def best(peer: str) -> Engine:
        return min((engine for engine in engines if engine.peer == peer), key=lambda engine: figures[engine.key].median_us("run"))

    def run(key: str) -> float:
        return figures[key].median_us("run")

    hft, nautilus = best("hft"), best("nautilus")
    in_memory = convert.median_us("decode", f"{hft.feed}_events") + run(hft.key)
    whole = in_memory + convert.median_us(f"{hft.feed}_file")
    found = [
        Ratio(f"arbl2 raw against {hft.name} with its conversion", run("raw"), whole, 8.0),
        Ratio(f"arbl2 raw against {hft.name} with its conversion, no file written", run("raw"), in_memory, 0.0),
        Ratio(f"arbl2 raw against the run of {nautilus.name} alone", run("raw"), run(nautilus.key), 3.0),
        Ratio("arbl2 raw against the plain loop", run("raw"), run("plain"), 0.0),
    ]
    if "decoded" in figures:
        found += [
            Ratio(f"arbl2 decoded against the run of {hft.name} alone", run("decoded"), run(hft.key), 3.0),
            Ratio(
                f"arbl2 decoded against {hft.name} with its rows loaded from a plain file",
                run("decoded"),
                figures[hft.key].median_us("load", "run"),
                0.0,
            ),
            Ratio(f"arbl2 decoded against the run of {nautilus.name} alone", run("decoded"), run(nautilus.key), 3.0),
        ]
    return found
