"""The folder and the first manifest of a new session."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.tape import TAPE_VERSION, Manifest, save_manifest
from arbl2_recorder import clock
from arbl2_recorder.storage import storage_error

if TYPE_CHECKING:
    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.venues import VenueFeed


def create(config: RecordConfig, feeds: list[VenueFeed]) -> tuple[Path, Manifest]:
    """A new session folder and its manifest. Raises StorageError."""
    anchor = clock.sample()
    try:
        while True:
            path = config.out / f"{clock.utc_name(anchor.wall_ns)}-{secrets.token_hex(2)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise storage_error(config.out, error) from error
    manifest = Manifest(
        tape_version=TAPE_VERSION,
        session=path.name,
        state="recording",
        anchor_wall_ns=anchor.wall_ns,
        anchor_mono_ns=anchor.mono_ns,
        versions={
            "arbl2": version("arbl2"),
            "python": platform.python_version(),
            "websockets": version("websockets"),
            "pyarrow": version("pyarrow"),
        },
        host=_host(),
        endpoints={
            f"{feed.name}_{kind}": url
            for feed in feeds
            for kind, url in (("ws", feed.url), ("rest", getattr(config.endpoints, f"{feed.name}_rest")))
        },
        instruments=config.instruments(),
        subscriptions={feed.label: _subscription(feed) for feed in feeds},
    )
    save_manifest(path, manifest)
    return path, manifest


def _subscription(feed: VenueFeed) -> Any:
    """What was asked for: the message, or the list of them."""
    messages = [msgspec.json.decode(message) for message in feed.subscriptions("")]
    return messages[0] if len(messages) == 1 else messages


def _host() -> dict[str, str]:
    host = {
        "name": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": str(os.cpu_count() or 0),
        "pid": str(os.getpid()),
    }
    # Monotonic stamps of two sessions can be compared only within one boot.
    with contextlib.suppress(OSError):
        host["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return host
