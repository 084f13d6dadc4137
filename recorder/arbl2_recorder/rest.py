"""One REST body, fetched beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import urllib.error
import urllib.request
from http.client import HTTPException

from arbl2.errors import VenueError

_MAX_BODY_BYTES = 16 * 2**20
_SLOW_DOWN = (418, 429, 503)
_PAUSE_S = 10.0


class RefusedError(VenueError):
    """There was no body; ``status`` is HTTP's or 0, ``retry_after_s`` is how long the venue wants to be left alone."""

    def __init__(self, problem: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(problem)
        self.status = status
        self.retry_after_s = retry_after_s


async def fetch(url: str, timeout_s: float) -> bytes:
    """The body of a GET that was answered with 200. Raises RefusedError with the reason.

    Runs in a daemon thread, not in the loop's pool: a pool is joined at the end, and a venue that does not answer must not
    hold up the end of a recording.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def deliver(found: bytes | RefusedError) -> None:
        if answer.done():
            return
        if isinstance(found, bytes):
            answer.set_result(found)
        else:
            answer.set_exception(found)

    def work() -> None:
        found = _get(url, timeout_s)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile, nobody waits any more
            loop.call_soon_threadsafe(deliver, found)

    threading.Thread(target=work, name="arbl2-rest", daemon=True).start()
    return await answer


def _get(url: str, timeout_s: float) -> bytes | RefusedError:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:  # noqa: S310 - http(s) by RecordConfig
            body: bytes = reply.read(_MAX_BODY_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode("utf-8", "replace")
        asked = error.headers.get("Retry-After", "")
        patience_s = float(asked) if asked.isascii() and asked.isdigit() and len(asked) < 7 else _PAUSE_S
        pause_s = patience_s if error.code in _SLOW_DOWN else 0.0
        return RefusedError(f"HTTP {error.code} {error.reason}: {said}", error.code, pause_s)
    except (OSError, HTTPException, ValueError) as error:
        return RefusedError(str(error) or type(error).__name__)
    if len(body) > _MAX_BODY_BYTES:
        return RefusedError(f"the body is larger than {_MAX_BODY_BYTES} bytes")
    return body
