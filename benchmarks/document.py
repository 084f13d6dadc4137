"""The page that the benchmarks write their figures into, each between markers of its own."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def write(text: str, begin: str, end: str) -> None:
    """Put the figures between the markers of the document."""
    DOCUMENT.write_text(put(DOCUMENT.read_text(encoding="utf-8"), text, begin, end), encoding="utf-8")


def put(document: str, text: str, begin: str, end: str) -> str:
    """The document with the figures between its markers. Raises SystemExit if it has none."""
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"there are no markers for the figures; put {begin} and {end} where they belong.")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"
