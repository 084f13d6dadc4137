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
SLOW_DOWN = (418, 429, 503)
"""HTTP statuses of a venue that wants to be left alone."""
_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 3_600.0
_PATIENCE = 3


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
    try:
        return await asyncio.wait_for(answer, _PATIENCE * timeout_s)
    except TimeoutError:
        raise RefusedError(f"no whole answer in {_PATIENCE * timeout_s:.0f} s") from None


def pause_s(retry_after: str) -> float:
    """Seconds to leave a venue alone, by its Retry-After header or by habit; an hour at most."""
    asked = retry_after.isascii() and retry_after.isdigit()
    return min(float(retry_after), _LONGEST_PAUSE_S) if asked else _PAUSE_S


def _get(url: str, timeout_s: float) -> bytes | RefusedError:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:  # noqa: S310 - http(s) by RecordConfig
            body: bytes = reply.read(_MAX_BODY_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode("utf-8", "replace")
        alone_s = pause_s(error.headers.get("Retry-After", "")) if error.code in SLOW_DOWN else 0.0
        return RefusedError(f"HTTP {error.code} {error.reason}: {said}", error.code, alone_s)
    except (OSError, HTTPException, ValueError) as error:
        return RefusedError(str(error) or type(error).__name__)
    if len(body) > _MAX_BODY_BYTES:
        return RefusedError(f"the body is larger than {_MAX_BODY_BYTES} bytes")
    return body
