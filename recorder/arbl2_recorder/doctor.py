"""What a person would look at before leaving a recorder alone: clock, disk, endpoints, limits, versions.

Every check runs in a daemon thread of its own and has the same few seconds: a name server, a disk or a venue that never
answers becomes a line in the table, not a doctor who hangs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec
from websockets.exceptions import InvalidHandshake, InvalidMessage, WebSocketException
from websockets.sync.client import connect

from arbl2_recorder import clock
from arbl2_recorder.health import holder
from arbl2_recorder.live import size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from arbl2_recorder.config import Endpoints

TIMEOUT_S = 4.0
_GRACE_S = 1.0
_PACKAGES = ("arbl2", "websockets", "pyarrow", "msgspec", "numpy", "rich")
_OPTIONAL = ("prometheus_client",)
_FREE_FAIL, _FREE_WARN = 2**30, 10 * 2**30
_FLUSH_BYTES, _FLUSHES, _FLUSH_WARN_MS = 2**18, 12, 250.0
_FILES_FAIL, _FILES_WARN = 64, 256
_MEMORY_FAIL, _MEMORY_WARN = 300 * 2**20, 600 * 2**20
_CLOCK_WARN_MS = 50.0
_EXCHANGE_WARN_MS, _EXCHANGE_FAIL_MS = 250.0, 1_000.0
_REST_PATHS = {"upbit": "/v1/orderbook/instruments?markets=KRW-BTC", "binance": "/api/v3/time"}
_MAX_BODY_BYTES = 2**20
_NETWORK_ADVICE = "check the network, a proxy or firewall, and the endpoint options"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. ``state``: ok, warn, fail. ``advice`` says what to do, and is empty if there is nothing to do."""

    name: str
    state: str
    found: str
    advice: str = ""


Probe = Callable[[], "Check | list[Check]"]


def examine(root: Path, endpoints: Endpoints, venues: Iterable[str], *, timeout_s: float = TIMEOUT_S) -> list[Check]:
    """Check the machine and the endpoints of the venues (none: the machine only). Takes at most ``timeout_s`` and a second."""
    probes: dict[str, Probe] = {
        "versions": _versions,
        "clock": _clock,
        "time zone": _time_zone,
        "folder": partial(_folder, root),
        "disk": partial(_disk, root),
        "open files": _open_files,
        "memory": _memory,
    }
    for venue in venues:
        ws, rest = getattr(endpoints, f"{venue}_ws"), getattr(endpoints, f"{venue}_rest").rstrip("/")
        probes[f"{venue} socket"] = partial(_socket, f"{venue} socket", ws, timeout_s)
        probes[f"{venue} REST"] = partial(_rest, venue, rest, timeout_s)
    return _run(probes, timeout_s + _GRACE_S)


def _run(probes: dict[str, Probe], limit_s: float) -> list[Check]:
    results: dict[str, list[Check]] = {}

    def work(name: str, probe: Probe) -> None:
        try:
            answer = probe()
        except Exception as error:
            answer = Check(name, "fail", f"{type(error).__name__}: {error}", "this is unexpected: please report it")
        results[name] = answer if isinstance(answer, list) else [answer]

    threads = [threading.Thread(target=work, args=item, name="arbl2-doctor", daemon=True) for item in probes.items()]
    for thread in threads:
        thread.start()
    end_ns = clock.mono_ns() + int(limit_s * 1e9)
    for thread in threads:
        thread.join(max(end_ns - clock.mono_ns(), 0) / 1e9)
    late = f"no answer in {limit_s:g} s"
    return [check for name in probes for check in results.get(name, [Check(name, "fail", late, "something below it hangs")])]


def _versions() -> Check:
    found, missing = [f"Python {platform.python_version()}"], []
    for package in (*_PACKAGES, *_OPTIONAL):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            if package not in _OPTIONAL:
                missing.append(package)
    if missing:
        return Check(
            "versions", "fail", f"missing: {', '.join(missing)}", "install arbl2 again: pip install --force-reinstall arbl2"
        )
    return Check("versions", "ok", ", ".join(found))


def _clock() -> Check:
    offset = clock.offset()
    advice = "run chrony or systemd-timesyncd on this machine (for a container: on its host)"
    if offset is None:
        return Check("clock", "warn", "no time service can be asked here", advice)
    if not offset.synchronised:
        return Check("clock", "warn", f"not synchronised, says {offset.source}", advice)
    found = f"{offset.offset_ns / 1e6:+.3f} ms, at most {offset.error_ns / 1e6:.3f} ms wrong, says {offset.source}"
    if abs(offset.offset_ns) + offset.error_ns > _CLOCK_WARN_MS * 1e6:
        return Check("clock", "warn", found, "wait until the time service has settled, or name nearer time servers")
    return Check("clock", "ok", found)


def _time_zone() -> Check:
    return Check("time zone", "ok", f"{time.strftime('%Z')}; it does not matter, all stamps are UTC")


def _existing(root: Path) -> Path:
    """The folder itself, or the one that it would be made in."""
    root = root.absolute()
    while not root.exists() and root != root.parent:
        root = root.parent
    return root


def _folder(root: Path) -> Check:
    at = _existing(root)
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        return Check("folder", "fail", f"{at} cannot be written to", "choose another folder with --out, or change its owner")
    pid = holder(root)
    if pid is not None:
        found = f"{root} is in use by the recorder with process {pid}"
        return Check("folder", "warn", found, "a second recorder would be refused: stop that one, or choose another --out")
    return Check("folder", "ok", f"{root} is free for a recorder" + ("" if at == root.absolute() else ", and will be made"))


def _disk(root: Path) -> Check:
    at = _existing(root)
    try:
        free = shutil.disk_usage(at).free
        if free < _FREE_FAIL:
            return Check("disk", "fail", f"{size(free)} free", "free some space, or choose a larger disk with --out")
        flushes_ms = _flush_times_ms(at)
    except OSError as error:
        return Check("disk", "fail", str(error.strerror or error), "choose a folder that can be written to with --out")
    middle, worst = sorted(flushes_ms)[len(flushes_ms) // 2], max(flushes_ms)
    speed = _FLUSH_BYTES / 2**20 / (middle / 1e3)
    found = f"{size(free)} free; a flush of {size(_FLUSH_BYTES)} takes {middle:.1f} ms (worst {worst:.1f}), {speed:,.0f} MiB/s"
    if middle > _FLUSH_WARN_MS:
        return Check("disk", "warn", found, "slower than the default --flush-ms 250: choose a faster disk or flush less often")
    if free < _FREE_WARN:
        return Check("disk", "warn", found, "a full disk ends the recording: plan for what a day takes")
    return Check("disk", "ok", found)


def _flush_times_ms(folder: Path) -> list[float]:
    """What the log's writes would take: write, fsync, again. Stops early on a slow disk; leaves nothing behind."""
    block, times_ms = os.urandom(_FLUSH_BYTES), list[float]()
    with tempfile.TemporaryFile(dir=folder) as file:
        while len(times_ms) < _FLUSHES and sum(times_ms) < 1_000:
            before_ns = clock.mono_ns()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            times_ms.append((clock.mono_ns() - before_ns) / 1e6)
    return times_ms


def _open_files() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,} may be open"
    state = "ok" if limit == resource.RLIM_INFINITY or limit >= _FILES_WARN else "warn" if limit >= _FILES_FAIL else "fail"
    return Check("open files", state, found, "" if state == "ok" else "raise it: ulimit -n 1024, or LimitNOFILE= in the unit")


def _memory() -> Check:
    available = _available_bytes()
    if available is None:
        return Check("memory", "ok", "this system does not say; a recorder stays below 300 MiB")
    state = "ok" if available >= _MEMORY_WARN else "warn" if available >= _MEMORY_FAIL else "fail"
    advice = "" if state == "ok" else "a recorder needs up to 300 MiB: stop something else, or raise the container's limit"
    return Check("memory", state, f"{size(available)} available", advice)


def _available_bytes() -> int | None:
    """What the kernel would give, or the container's limit if that is less."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        # "max" is no number: there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(found, default=None)


def _socket(name: str, url: str, timeout_s: float) -> Check:
    """Name, TCP, TLS and WebSocket handshake, as the recorder does them; then goodbye."""
    parts = urlsplit(url)
    before_ns = clock.mono_ns()
    try:
        socket.getaddrinfo(parts.hostname, parts.port or (443 if parts.scheme == "wss" else 80), type=socket.SOCK_STREAM)
        named_ms = (clock.mono_ns() - before_ns) / 1e6
        with connect(url, open_timeout=timeout_s, close_timeout=_GRACE_S / 2, ping_interval=None):
            opened_ms = (clock.mono_ns() - before_ns) / 1e6
    except socket.gaierror as error:
        return Check(name, "fail", f"the name {parts.hostname} is not known: {error.strerror}", _NETWORK_ADVICE)
    except ssl.SSLError as error:
        return Check(
            name, "fail", f"TLS with {parts.hostname} failed: {error.reason}", "check the clock, certificates and proxies"
        )
    except (InvalidMessage, OSError) as error:
        return Check(name, "fail", f"no connection with {url}: {error or type(error).__name__}", _NETWORK_ADVICE)
    except (InvalidHandshake, WebSocketException) as error:
        return Check(
            name, "fail", f"{url} refuses a WebSocket: {error}", "check the path of the endpoint; the venue may block this place"
        )
    return Check(name, "ok", f"{url} opened in {opened_ms:.0f} ms, its name found in {named_ms:.0f} ms")


def _rest(venue: str, base: str, timeout_s: float) -> list[Check]:
    name, url = f"{venue} REST", base + _REST_PATHS[venue]
    began = clock.sample()
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:  # noqa: S310 - http(s) by Endpoints
            body = reply.read(_MAX_BODY_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return [
                Check(
                    name, "fail", f"{url}: HTTP {error.code} {error.reason}", "check the endpoint; the venue may block this place"
                )
            ]
    except (OSError, HTTPException, ValueError) as error:
        return [Check(name, "fail", f"no answer from {url}: {error or type(error).__name__}", _NETWORK_ADVICE)]
    trip_ms = (clock.mono_ns() - began.mono_ns) / 1e6
    checks = [Check(name, "ok", f"{base} answered in {trip_ms:.0f} ms")]
    if venue == "binance":
        checks.append(_exchange_clock(body, began.wall_ns / 1e6 + trip_ms / 2, trip_ms))
    return checks


class _Time(msgspec.Struct):
    serverTime: int  # noqa: N815 - the venue's own name


def _exchange_clock(body: bytes, middle_ms: float, trip_ms: float) -> Check:
    """This clock against the venue's, which can be read only as well as half of the way there and back."""
    name = "exchange clock"
    try:
        ahead_ms = middle_ms - msgspec.json.decode(body, type=_Time).serverTime
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Check(name, "fail", "Binance did not answer with its time", "check the REST endpoint")
    found = f"{round(ahead_ms):+,d} ms against Binance's, give or take {trip_ms / 2:.0f} ms"
    certain_ms = abs(ahead_ms) - trip_ms / 2
    state = "ok" if certain_ms < _EXCHANGE_WARN_MS else "warn" if certain_ms < _EXCHANGE_FAIL_MS else "fail"
    return Check(name, state, found, "" if state == "ok" else "set the clock: stamps of sessions and machines would not line up")
