"""A connection that is kept alive for as long as the recording lasts, and its twins.

A ``Leg`` is the sequence of links to one venue: dial, subscribe, watch, dial again. A link that is about to end (the venue
closes connections after a day, or announces that it will) is replaced before it does: the new one must deliver every stream
first. A ``Group`` is the legs that carry the same streams: one, or two so that a drop of either loses nothing. While several
links of a group are open, the second copy of every message is left out.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from arbl2_recorder import clock, rest
from arbl2_recorder.backoff import Backoff
from arbl2_recorder.copies import Copies
from arbl2_recorder.link import Link, seconds
from arbl2_recorder.wire import RecordingConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    from websockets.client import ClientProtocol

    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.limits import Gate
    from arbl2_recorder.session import Session
    from arbl2_recorder.venues import VenueFeed

_wire_logger = logging.getLogger("arbl2.recorder.wire")
COPY_WINDOW_NS = 30_000_000_000
COPY_TAIL_S = 10.0
# Binance takes 5 messages a second, pings and pongs among them.
SUBSCRIBE_S = 0.3
COVER_NS = 3_000_000_000
MOST_DIALS_ONCE_OPEN = 2


@dataclass(slots=True)
class _Life:
    """One link with the task that dials it and waits for its end."""

    link: Link
    task: asyncio.Task[None]


class Group:
    """The legs that carry one feed's streams, and what their links have said lately."""

    def __init__(
        self,
        feed: VenueFeed,
        session: Session,
        config: RecordConfig,
        gate: Gate,
        on_first: Callable[[VenueFeed, str], None],
    ) -> None:
        self.feed = feed
        self._copies = Copies(COPY_WINDOW_NS)
        self._links: list[Link] = []
        self._heard: set[str] = set()
        self._on_first = on_first
        self.legs = [Leg(self, session, config, gate, number) for number in range(config.legs)]

    def link(self, session: Session) -> Link:
        """A new link; from now on it counts as one of the group."""
        link = Link(
            self.feed,
            session,
            session.connection(),
            is_copy=self._copies.is_copy,
            is_covered=self._is_covered,
            on_first=self._first,
            heard=self._heard,
        )
        self._links.append(link)
        if len(self._links) > 1:
            for one in self._links:
                one.alone = False
        return link

    def drop(self, link: Link) -> None:
        """The link has ended."""
        self._links.remove(link)
        if not any(other.is_open for other in self._links):
            # Nothing covered the end: what comes after an outage is told anew, even if it was said before.
            self._copies.clear()
        if len(self._links) == 1:
            # The slower of two may still be about to say what the other one has said.
            asyncio.get_running_loop().call_later(COPY_TAIL_S, self._settle)

    def _settle(self) -> None:
        if len(self._links) == 1:
            self._links[0].alone = True
            self._copies.clear()

    def _is_covered(self, ended: Link) -> bool:
        now_ns = clock.mono_ns()
        others = (link for link in self._links if link is not ended and link.carries_all)
        # One that has gone silent may be as dead as the one that ended.
        return any(now_ns - link.last_ns < COVER_NS for link in others)

    def _first(self, link: Link, stream: str) -> None:
        if not self._is_covered(link):
            self._on_first(self.feed, stream)


class Leg:
    """Keeps one link of a group open until cancelled. Totals are over all its links."""

    def __init__(self, group: Group, session: Session, config: RecordConfig, gate: Gate, number: int) -> None:
        self.feed = group.feed
        self._group = group
        self._session = session
        self._config = config
        self._gate = gate
        self._backoff = Backoff(config.backoff_cap_s)
        self._lives: list[_Life] = []
        self._sockets: dict[int, RecordingConnection] = {}
        self._started_ns = clock.mono_ns()
        self._messages = 0
        self._bytes = 0
        self._copies = 0
        self._last_ns = 0
        self._longest_gap_ns = 0
        # Twins must not be replaced at the same moment.
        self._age_s = self._new_age_s() * (1 - number / config.legs)
        self.connections = 0
        self.lost = 0
        self._state = "dialling"
        self.problem = ""
        self.delivered = False

    @property
    def state(self) -> str:
        """open, dialling or waiting (for the next dial)."""
        return "open" if any(life.link.is_open for life in self._lives) else self._state

    @property
    def messages(self) -> int:
        """Messages received so far, copies included."""
        return self._messages + sum(life.link.messages for life in self._lives)

    @property
    def copies(self) -> int:
        """Those of them that another leg, or the link before, had delivered already."""
        return self._copies + sum(life.link.copies for life in self._lives)

    @property
    def bytes(self) -> int:
        """Bytes in them."""
        return self._bytes + sum(life.link.bytes for life in self._lives)

    @property
    def last_ns(self) -> int:
        """When the last message arrived (monotonic ns); 0 before the first."""
        return max([self._last_ns, *(life.link.last_ns for life in self._lives)])

    async def run(self) -> None:
        """Dial, record, replace, dial again. Ends by cancellation only, and then closes its connections properly."""
        try:
            life = self._start()
            while True:
                life = await self._next(life)
        finally:
            tasks = [life.task for life in self._lives]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _next(self, life: _Life) -> _Life:
        """Wait until this life is over or should be, and return the one that goes on."""
        leaving = asyncio.ensure_future(life.link.leaving.wait())
        try:
            await asyncio.wait({life.task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
        if life.task.done():
            self.lost += life.link.opened_ns > 0
            life.task.result()
            await self._rest()
            return self._start()
        return await self._replace(life)

    async def _replace(self, old: _Life) -> _Life:
        """Make before break. If no successor comes up the old link goes on for as long as the venue lets it."""
        for _ in range(MOST_DIALS_ONCE_OPEN):
            new = self._start()
            ready = asyncio.ensure_future(new.link.ready.wait())
            try:
                await asyncio.wait({new.task, ready}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ready.cancel()
            if new.task.done():
                new.task.result()
            elif new.link.first_data_ns:
                self._age_s = self._new_age_s()
                await self._end(old)
                return new
            else:
                await self._end(new)
            await self._rest()
            if old.task.done():
                return self._start()
        old.link.leaving.clear()
        old.link.opened_ns = clock.mono_ns()
        self._age_s = self._config.backoff_cap_s
        return old

    def _new_age_s(self) -> float:
        return self.feed.max_age_s * random.uniform(0.95, 1.0)  # noqa: S311 - jitter, not a secret

    @staticmethod
    async def _end(life: _Life) -> None:
        life.task.cancel()
        await asyncio.wait({life.task})

    async def _rest(self) -> None:
        self._state = "waiting"
        await asyncio.sleep(self._backoff.delay_s())

    def _start(self) -> _Life:
        link = self._group.link(self._session)
        life = _Life(link, asyncio.create_task(self._live(link)))
        self._lives.append(life)
        life.task.add_done_callback(lambda _: self._retire(life))
        return life

    def restate(self) -> None:
        """A new session begins."""
        for life in self._lives:
            life.link.restate()

    def finish(self) -> None:
        """The recording is about to end."""
        for life in self._lives:
            life.link.finish()

    def longest_silence_s(self, start_ns: int, end_ns: int) -> float:
        """The longest time without a message between two instants, the time before the first and after the last included."""
        if not self._last_ns:
            return seconds(end_ns - start_ns)
        return seconds(max(self._longest_gap_ns, end_ns - self._last_ns))

    def check(self, now_ns: int) -> None:
        """Called several times a second: alarms that are due, and the end of a connection that has gone silent."""
        for life in self._lives:
            link, socket = life.link, self._sockets.get(life.link.conn)
            if socket is None or not link.is_open:
                continue
            link.check(now_ns, self._config.snapshot_timeout_s, self._age_s)
            self.delivered = self.delivered or link.first_data_ns > 0
            silent_s = link.silent_s(now_ns)
            if silent_s > self._config.stall_s:
                self._session.alarm("stalled", venue=self.feed.venue, conn=link.conn, silent_s=round(silent_s, 3))
                link.problem = "stalled"
                del self._sockets[link.conn]
                socket.transport.abort()

    async def _live(self, link: Link) -> None:
        """One connection from dial to end."""
        config = self._config

        def create(protocol: ClientProtocol, **options: Any) -> RecordingConnection:
            return RecordingConnection(protocol, tap=link, **options)

        await self._gate.enter()
        self._state = "dialling"
        try:
            opened = await connect(
                self.feed.url,
                open_timeout=config.open_timeout_s,
                close_timeout=config.close_timeout_s,
                ping_interval=config.ping_interval_s,
                ping_timeout=config.ping_timeout_s,
                max_size=config.max_message_bytes,
                compression="deflate" if config.compress else None,
                logger=_wire_logger,
                create_connection=cast("Any", create),
            )
        except (OSError, EOFError, ValueError, InvalidHandshake, InvalidURI, WebSocketException) as error:
            # A redirect may lead to anything: ValueError is what parsing it raises.
            self.problem = str(error) or type(error).__name__
            link.refused(self.problem)
            self._gate.close_for(_asked_s(error))
            return
        socket = self._sockets[link.conn] = cast("RecordingConnection", opened)
        self.connections += 1
        try:
            for number, subscription in enumerate(self.feed.subscriptions(str(uuid.uuid4()))):
                await asyncio.sleep(SUBSCRIBE_S if number else 0)
                link.sent(subscription)
                await socket.send(subscription.decode("utf-8"))
            await socket.wait_closed()
        except (OSError, WebSocketException) as error:
            self.problem = str(error)
        finally:
            self._sockets.pop(link.conn, None)
            await socket.close()
        self.problem = link.problem or "the connection was closed"

    def _retire(self, life: _Life) -> None:
        link = life.link
        self._lives.remove(life)
        self._group.drop(link)
        self._messages += link.messages
        self._bytes += link.bytes
        self._copies += link.copies
        if link.first_ns:
            before_ns = link.first_ns - (self._last_ns or self._started_ns)
            self._longest_gap_ns = max(self._longest_gap_ns, link.longest_gap_ns, before_ns)
        self._last_ns = max(self._last_ns, link.last_ns)
        self.delivered = self.delivered or link.first_data_ns > 0
        if link.first_data_ns and seconds(link.last_ns - link.first_data_ns) >= self._config.stable_s:
            self._backoff.reset()


def _asked_s(error: Exception) -> float:
    """How long the venue wants to be left alone by this address."""
    if not isinstance(error, InvalidStatus) or error.response.status_code not in rest.SLOW_DOWN:
        return 0.0
    return rest.pause_s(error.response.headers.get("Retry-After", ""))
