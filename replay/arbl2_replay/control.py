"""The remote control of a served market: plain GET requests below /arbl2/, for scripts and for people with curl.

Each answers with the state after it, as JSON. A page in somebody's browser could send such requests too, so whatever says that it
comes from a page is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId
from arbl2_replay.clock import Speed
from arbl2_replay.faults import WireFault
from arbl2_replay.serving import reply, to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from websockets.http11 import Request, Response

    from arbl2_replay.server import ExchangeServer

PREFIX = "/arbl2/"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_NO_PAGE = ("Origin", "Sec-Fetch-Site", "Referer")


def control(server: ExchangeServer, action: str, query: Mapping[str, str], request: Request) -> Response:
    """Do what a path below /arbl2/ says."""
    if any(name in request.headers for name in _NO_PAGE):
        return reply(HTTPStatus.FORBIDDEN, to_json({"error": "not for web pages: use curl or a script"}), {})
    try:
        if not _do(server, action, query):
            known = "status, pause, resume, speed?to=10x, seek?to=SECONDS, disconnect?venue=, shutdown, fault?kind="
            return reply(HTTPStatus.NOT_FOUND, to_json({"error": f"unknown request. There are {known}."}), {})
    except ConfigError as error:
        return reply(HTTPStatus.BAD_REQUEST, to_json({"error": str(error)}), {})
    return reply(HTTPStatus.OK, to_json(state(server)), {})


def _do(server: ExchangeServer, action: str, query: Mapping[str, str]) -> bool:
    match action:
        case "status":
            pass
        case "pause":
            server.clock.pause()
        case "resume":
            server.clock.resume()
        case "speed":
            server.set_speed(Speed.parse(query.get("to", "")))
        case "seek":
            server.seek(moment_ns(query.get("to", ""), server.source.start_ns))
        case "disconnect":
            server.disconnect_soon(_venue(query), _code(query))
        case "shutdown":
            server.announce_shutdown()
        case "fault":
            server.inject(_kind(query))
        case _:
            return False
    return True


def moment_ns(text: str, start_ns: int) -> int:
    """A moment of the market, ns since the epoch: seconds from its beginning, or a date and time (UTC unless it says otherwise).

    Raises ConfigError.
    """
    if _SECONDS.fullmatch(text):
        return start_ns + round(float(text) * 1e9)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no moment. Write seconds from the beginning, such as 12.5, or 2026-01-02T03:04:05."
        ) from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e3) * 1_000_000


def _venue(query: Mapping[str, str]) -> ExchangeId:
    try:
        return ExchangeId(query.get("venue", ""))
    except ValueError:
        raise ConfigError("say which venue: venue=upbit or venue=binance.") from None


def _code(query: Mapping[str, str]) -> int:
    text = query.get("code", "1006")
    if not (text.isascii() and text.isdigit() and 1000 <= int(text[:5]) < 5000):
        raise ConfigError(f"{text!r} is no close code. Use one such as 1001, or 1006 for a cut without a close frame.")
    return int(text)


def _kind(query: Mapping[str, str]) -> WireFault:
    try:
        return WireFault(query.get("kind", ""))
    except ValueError:
        raise ConfigError(f"say which fault: kind= one of {', '.join(WireFault)}.") from None


def state(server: ExchangeServer) -> dict[str, object]:
    """What the market and its connections are at."""
    now_ns = server.clock.now_ns()
    return {
        "time": datetime.fromtimestamp(now_ns // 1_000_000 / 1e3, tz=UTC).isoformat(timespec="milliseconds"),
        "seconds": round((now_ns - server.source.start_ns) / 1e9, 3),
        "speed": f"{server.clock.speed:g}x" if server.clock.speed else "max",
        "paused": server.clock.paused,
        "waiting": server.clock.held,
        "ended": server.has_ended,
        "messages": server.messages,
        "late_ms": round(server.clock.late_s * 1e3, 1),
        "clients": [
            {
                "conn": client.sent.conn,
                "venue": str(client.venue),
                "subscribed": client.subscribed,
                "sent_bytes": client.outlet.taken,
                "unread_bytes": client.outlet.backlog,
            }
            for client in server.open_clients()
        ],
        "cut_clients": server.cut_clients,
    }
