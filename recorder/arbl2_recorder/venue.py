"""Everything that counts against the limits of one venue: its connections and its REST side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arbl2_recorder.desk import Desk
from arbl2_recorder.leg import Group
from arbl2_recorder.limits import Gate, Limit
from arbl2_recorder.status import VenueStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.session import Session
    from arbl2_recorder.venues import VenueFeed


class Venue:
    """One venue while it is recorded. The event loop owns it."""

    def __init__(self, venue_feeds: list[VenueFeed], session: Session, config: RecordConfig) -> None:
        feed = venue_feeds[0]
        self.name = feed.name
        self.url = feed.url
        self._feeds = venue_feeds
        gate = Gate(Limit(1, config.dial_interval_s), *feed.dial_limits)
        self.desk = Desk(feed.venue, session, Gate(*feed.rest_limits), config.rest_timeout_s)
        self.groups = [Group(one, session, config, gate, self._first) for one in venue_feeds]
        self.legs = [leg for group in self.groups for leg in group.legs]
        self._rated = 0

    def _first(self, feed: VenueFeed, stream: str) -> None:
        if (ask := feed.snapshot(stream)) is not None:
            self.desk.ask(ask)

    def restate(self) -> None:
        """A new session begins: it must stand alone, so it gets its own rules and the books that diff streams start from."""
        for leg in self.legs:
            leg.restate()
        self.desk.restate()
        self.ask_rules()
        for feed in self._feeds:
            for stream in feed.streams:
                self._first(feed, stream)

    def ask_rules(self) -> None:
        """Ticks, lots and filters of everything that is recorded."""
        for feed in self._feeds:
            for ask in feed.rules:
                self.desk.ask(ask)

    def ask_snapshots(self, symbols: Iterable[str]) -> None:
        """The diff chains of these symbols are broken: each needs a whole book to go on from."""
        wanted = set(symbols)
        for feed in self._feeds:
            for stream in feed.streams:
                ask = feed.snapshot(stream)
                if ask is not None and stream.partition("@")[0].upper() in wanted:
                    self.desk.ask_again(ask)

    @property
    def delivered(self) -> bool:
        """Whether any data has come."""
        return any(leg.delivered for leg in self.legs)

    @property
    def problem(self) -> str:
        """The last one."""
        return next((leg.problem for leg in self.legs if leg.problem), "")

    @property
    def reconnects(self) -> int:
        """Connections that were lost and dialled again."""
        return sum(leg.lost for leg in self.legs)

    @property
    def messages(self) -> int:
        """Messages received, copies not counted twice."""
        return sum(leg.messages - leg.copies for leg in self.legs)

    def longest_silence_s(self, start_ns: int, end_ns: int) -> float:
        """The longest time in which one of the feeds said nothing on any of its legs, at most."""
        return max(min(leg.longest_silence_s(start_ns, end_ns) for leg in group.legs) for group in self.groups)

    def status(self, now_ns: int, span_s: float) -> VenueStatus:
        """A snapshot for people; ``span_s`` has passed since the last one."""
        last_ns = max(leg.last_ns for leg in self.legs)
        rate_per_s, self._rated = (self.messages - self._rated) / span_s, self.messages
        states = [leg.state for leg in self.legs]
        opened = sum(leg.connections for leg in self.legs)
        return VenueStatus(
            name=self.name,
            state=next((state for state in states if state != "open"), "open"),
            connections=opened,
            messages=self.messages,
            bytes=sum(leg.bytes for leg in self.legs),
            rate_per_s=rate_per_s,
            last_message_s=(now_ns - last_ns) / 1e9 if last_ns else None,
            problem=self.problem,
            open_connections=states.count("open"),
            reconnects=self.reconnects,
            copies=sum(leg.copies for leg in self.legs),
        )
