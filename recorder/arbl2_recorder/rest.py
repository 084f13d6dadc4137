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


async def fetch(url: str, timeout_s: float) -> bytes:
    """The body of a GET that was answered with 200. Raises VenueError with the reason.

    Runs in a daemon thread, not in the loop's pool: a pool is joined at the end, and a venue that does not answer must not
    hold up the end of a recording.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def deliver(body: bytes | None, problem: str) -> None:
        if answer.done():
            return
        if body is None:
            answer.set_exception(VenueError(problem))
        else:
            answer.set_result(body)

    def work() -> None:
        body, problem = _get(url, timeout_s)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile, nobody waits any more
            loop.call_soon_threadsafe(deliver, body, problem)

    threading.Thread(target=work, name="arbl2-rest", daemon=True).start()
    return await answer


def _get(url: str, timeout_s: float) -> tuple[bytes | None, str]:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:  # noqa: S310 - http(s) by RecordConfig
            body: bytes = reply.read(_MAX_BODY_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode("utf-8", "replace")
        return None, f"HTTP {error.code} {error.reason}: {said}"
    except (OSError, HTTPException, ValueError) as error:
        return None, str(error) or type(error).__name__
    if len(body) > _MAX_BODY_BYTES:
        return None, f"the body is larger than {_MAX_BODY_BYTES} bytes"
    return body, ""
