"""What is known of each instrument at the market's present moment, for snapshots, for REST and for derived streams."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from arbl2_replay.encode import Merged, diff, event, or_none
from arbl2_replay.flow import BinanceFlow, UpbitFlow
from arbl2_replay.full_book import FullBook
from arbl2_replay.sources import What
from arbl2_replay.synth import MarketEvent

if TYPE_CHECKING:
    from arbl2_replay.sources import Channel, Message, Offer
    from arbl2_replay.wire import Book

SLOW = 10
"""The 1000 ms streams tell every tenth change of the 100 ms streams."""
_DEPTH = 20


class UpbitBoard:
    """One Upbit code. ``is_dark`` while the recorded connection is lost: who subscribes then waits for the next message."""

    def __init__(self, code: str, offer: Offer | None) -> None:
        self.code = code
        self.newest: Message | None = None
        self.trade: Message | None = None
        self.flow: UpbitFlow | None = None
        self.is_dark = False
        books = [channel for channel in offer.shapes.values() if channel.what is What.BOOK] if offer else []
        self._preview = offer.preview if offer else None
        self._source = max(books, key=lambda channel: (channel.level_e8 == 0, channel.depth), default=None)

    def is_source(self, channel: Channel) -> bool:
        """Whether books of other shapes are derived from this one: the deepest, ungrouped."""
        if self._source is None and channel.what in (What.BOOK, What.MARKET):
            self._source = channel
        source = self._source
        return source is not None and (channel.form, channel.depth, channel.level_e8) == (
            source.form,
            source.depth,
            source.level_e8,
        )

    def lost(self) -> None:
        """The recorded connection was lost."""
        self.is_dark = True

    def is_quiet(self, channel: Channel) -> bool:
        """Whether only the last message of a channel matters."""
        return self.flow is None or channel.what is not What.MARKET

    def hear(self, message: Message, time_ms: int) -> None:
        """The venue says something of this code."""
        what = message.channel.what
        if what is What.TRADE:
            self.trade = message
        elif what is not What.OTHER:
            if self.newest is None or self.is_source(message.channel):
                self.newest = message
            self.is_dark = False
            if self.flow is not None and message.event is not None:
                message.moved = self.flow.advance(message.event, message.event.mark, slow_is_due=False)

    def event(self) -> MarketEvent | None:
        """The newest book, or the first before the market begins."""
        shown = self.newest or self._preview
        return event(shown) if shown is not None else None

    def follow(self) -> UpbitFlow | None:
        """The trades of a synthetic market, from now on: it costs nothing as long as nobody asks."""
        if self.flow is None and self.newest is not None and self.newest.channel.what is What.MARKET:
            shown = self.newest.event
            assert shown is not None
            self.flow = UpbitFlow(shown, shown.mark)
        return self.flow


class BinanceBoard:
    """One Binance symbol."""

    def __init__(self, code: str, offer: Offer | None) -> None:
        self.code = code
        self.newest: Message | None = None
        self.flow: BinanceFlow | None = None
        self._merged: Merged | None = None
        self._shows_books = False
        self._count = -1
        self._changes = 0
        self._full = FullBook()
        channels = list(offer.shapes.values()) if offer else []
        self._preview = offer.preview if offer else None
        partials = [channel for channel in channels if channel.what is What.DEPTH]
        self.has_diffs = any(channel.what is What.DIFF for channel in channels)
        best = max(partials, key=lambda channel: (channel.name.endswith("@100ms"), channel.depth), default=None)
        fast = (channel for channel in channels if channel.what is What.DIFF)
        self._source = best or max(fast, key=lambda channel: channel.name.endswith("@100ms"), default=None)

    def is_source(self, channel: Channel) -> bool:
        """Whether books, changes and tickers that were not recorded are derived from this channel."""
        if self._source is None and channel.what in (What.DEPTH, What.DIFF, What.MARKET):
            self._source = channel
        return self._source is not None and channel.name == self._source.name

    def serves(self, channel: Channel, what: What) -> bool:
        """Whether a stream of that kind that was not recorded is derived from this channel."""
        if what is What.DIFF and self.has_diffs:
            return channel.what is What.DIFF
        return self.is_source(channel)

    def expect(self, body: bytes) -> None:
        """A REST book that was recorded about now."""
        self._full.expect(body)

    def lost(self) -> None:
        """The recorded connection was lost: changes are missing."""
        self._full.lost()

    def is_quiet(self, channel: Channel) -> bool:
        """Whether only the last message of a channel matters."""
        return not self._shows_books and channel.what is not What.DIFF

    def hear(self, message: Message, time_ms: int) -> None:
        """The venue says something of this symbol, at ``time_ms`` of its clock."""
        channel = message.channel
        is_source = self.is_source(channel)
        if is_source:
            self.newest = message
            self._count += 1
            message.is_slow_turn = self._count % SLOW == 0
        if channel.what is What.DIFF:
            self._hear_change(message, is_source=is_source)
        if is_source and self.flow is not None and (shown := event(message)) is not None:
            message.moved = self.flow.advance(shown, time_ms, slow_is_due=message.is_slow_turn)

    def _hear_change(self, message: Message, *, is_source: bool) -> None:
        self._full.hear(message)
        if self._merged is not None:
            change = diff(message)
            if change is not None:
                or_none(partial(self._merged.add, change))
            self._changes += 1
            if self._changes % SLOW == 0:
                message.merged = self._merged.take()
        if is_source and self._shows_books:
            message.event = self._top(message)

    def _top(self, message: Message) -> MarketEvent | None:
        change = diff(message)
        found = self._whole(_DEPTH)
        if change is None or found is None or found[0] != change.last_id:
            return None
        return MarketEvent(0, message.channel.venue, self.code, *found)

    def _whole(self, limit: int) -> tuple[int, Book] | None:
        found: tuple[int, Book] | None = or_none(lambda: self._full.book(limit))
        return found

    def merge(self) -> None:
        """Gather recorded changes for the 1000 ms stream from now on."""
        self._merged = self._merged or Merged()

    def show_books(self) -> None:
        """Tell the best levels after each recorded change from now on, if nobody recorded them."""
        self._shows_books = True

    def follow(self) -> BinanceFlow | None:
        """Changes and tickers from books, from now on; trades too, in a synthetic market."""
        self.show_books()
        if self.flow is None and (shown := self.event()) is not None:
            self.flow = BinanceFlow(shown)
        return self.flow

    def event(self) -> MarketEvent | None:
        """The newest book that was told (the best levels), or the first before the market begins."""
        shown = self.newest or self._preview
        return event(shown) if shown is not None else None

    def rest(self, limit: int) -> tuple[int, Book] | None:
        """The whole book as REST gives it: an id that fits the diff stream, and so many levels a side."""
        found = self._whole(limit) if self.has_diffs else None
        flow = self.follow() if not self.has_diffs else None
        if found is not None:
            return found
        if flow is not None:
            return flow.deep.last_id, flow.deep.book(limit)
        # the best levels with their own id are true as well, if there is nothing better
        shown = self.event()
        return (shown.mark, shown.book) if shown is not None else None
