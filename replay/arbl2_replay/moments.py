"""Instants as people write them: a date and time, a time since the beginning, nanoseconds, a frame's number, the end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from arbl2.errors import ConfigError

SECOND_NS = 1_000_000_000
_UNITS_NS = {"h": 3_600 * SECOND_NS, "m": 60 * SECOND_NS, "s": SECOND_NS, "": SECOND_NS, "ms": 1_000_000, "us": 1_000, "ns": 1}
_PART = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?(ms|us|ns|h|m|s|)")
_DATE = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.(?P<fraction>[0-9]{1,9}))?)?)(?P<zone>Z|[+-][0-9]{2}:?[0-9]{2})?)?"
)
_NS = re.compile(r"[0-9]{16,19}")
_SEQ = re.compile(r"#([0-9]{1,18})")


class Kind(Enum):
    """What the number of a moment counts."""

    NS = 1  # since the Unix epoch
    SINCE = 2  # ns since the first frame
    SEQ = 3  # the frame's number; the moment right after it
    END = 4


@dataclass(frozen=True, slots=True)
class Moment:
    """An instant that may depend on the tape. ``value`` is ns, or a frame's ``seq``."""

    kind: Kind
    value: int = 0

    @classmethod
    def parse(cls, text: str) -> Moment:
        """Read what a person wrote; UTC unless it says otherwise. Raises ConfigError."""
        text = text.strip()
        if text == "end":
            return cls(Kind.END)
        if match := _SEQ.fullmatch(text):
            return cls(Kind.SEQ, int(match[1]))
        if _NS.fullmatch(text):
            return cls(Kind.NS, int(text))
        found = _since_ns(text[1:]) if text.startswith("+") else _date_ns(text)
        if found is None:
            raise ConfigError(
                f"{text!r} is no instant. Write 2026-01-02T03:04:05.678 (UTC), +12m or +1h30m from the beginning, "
                "nanoseconds since 1970, #12345 for the frame of that number, or end."
            )
        return cls(Kind.SINCE if text.startswith("+") else Kind.NS, found)


def _since_ns(text: str) -> int | None:
    total = at = 0
    while at < len(text) and (match := _PART.match(text, at)):
        total += _scaled(match[1], match[2], _UNITS_NS[match[3]])
        at = match.end()
    return total if text and at == len(text) else None


def _scaled(whole: str, fraction: str | None, unit_ns: int) -> int:
    return int(whole) * unit_ns + (int(fraction) * unit_ns // 10 ** len(fraction) if fraction else 0)


def _date_ns(text: str) -> int | None:
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    time, _, _ = (match["time"] or "00:00").partition(".")
    try:
        since = datetime.fromisoformat(f"{match['day']}T{time}{match['zone'] or 'Z'}") - _EPOCH
    except ValueError:
        return None
    return (since.days * 86_400 + since.seconds) * SECOND_NS + _scaled("0", match["fraction"], SECOND_NS)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc(time_ns: int) -> str:
    """Date and time to the nanosecond: ``2026-01-02T03:04:05.678000000Z``; nanoseconds where no calendar has it."""
    seconds, ns = divmod(time_ns, SECOND_NS)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ns:09d}Z"
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"
