"""The REST side of one venue: one request at a time, within the venue's weights, everything on the tape.

A response frame belongs to the last request frame of its venue, which is why requests never overlap.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from arbl2.frames import FrameKind, Op
from arbl2_recorder import clock, rest

if TYPE_CHECKING:
    from arbl2_recorder.limits import Gate
    from arbl2_recorder.session import Session
    from arbl2_recorder.venues import Ask

_YOUR_FAULT = (400, 404)
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 120.0
FORGET_S = 3_600.0


class Desk:
    """Fetches what it is asked for, each URL once however often it is asked for meanwhile. The event loop owns it."""

    def __init__(self, venue: int, session: Session, gate: Gate, timeout_s: float) -> None:
        self._venue = venue
        self._session = session
        self._gate = gate
        self._timeout_s = timeout_s
        self._waiting: dict[str, Ask] = {}
        self._asked = asyncio.Event()
        self._asking = ""
        self._pauses: dict[str, tuple[float, float]] = {}

    def ask(self, ask: Ask) -> None:
        """Fetch it as soon as its turn comes."""
        self._waiting.setdefault(ask.url, ask)
        self._asked.set()

    def ask_again(self, ask: Ask) -> None:
        """As ``ask``, for what did not help the last time: the same URL waits longer each time, so that a loop costs little."""
        not_before_s, _ = self._pauses.get(ask.url, (0.0, 0.0))
        if ask.url not in self._waiting and ask.url != self._asking and clock.mono_ns() / 1e9 >= not_before_s:
            self._pause_s(ask.url)
            self.ask(ask)

    def restate(self) -> None:
        """A new session begins: it must hold the request whose answer it will hold."""
        if self._asking:
            self._request(self._asking)

    def _pause_s(self, url: str) -> float:
        """How long this URL has to wait before it is asked again for the same reason; the patience starts anew after an hour."""
        now_s = clock.mono_ns() / 1e9
        not_before_s, last_s = self._pauses.get(url, (0.0, 0.0))
        pause_s = FIRST_PAUSE_S if now_s - not_before_s > FORGET_S else min(2 * last_s, LONGEST_PAUSE_S)
        self._pauses[url] = (now_s + pause_s, pause_s)
        return pause_s

    async def run(self) -> None:
        """Ends by cancellation only."""
        while True:
            await self._asked.wait()
            while self._waiting:
                url = next(iter(self._waiting))
                await self._gate.enter(self._waiting[url].weight)
                ask, self._asking = self._waiting.pop(url), url
                await self._fetch(ask)
                self._asking = ""
            self._asked.clear()

    async def _fetch(self, ask: Ask) -> None:
        session = self._session
        self._request(ask.url)
        try:
            body = await rest.fetch(ask.url, self._timeout_s)
        except rest.RefusedError as error:
            self._gate.close_for(error.retry_after_s)
            session.alarm("rest_failed", venue=self._venue, url=ask.url, said=str(error))
            if error.status in _YOUR_FAULT:
                for one in ask.instead:
                    self.ask(one)
            else:
                asyncio.get_running_loop().call_later(self._pause_s(ask.url), self.ask, ask)
        else:
            session.accept(self._venue, 0, FrameKind.RESPONSE, Op.NONE, body, *clock.stamp())

    def _request(self, url: str) -> None:
        facts = {"method": "GET", "url": url}
        self._session.record(self._venue, 0, FrameKind.REQUEST, facts, *clock.stamp())
