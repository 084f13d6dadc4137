"""Disks that are full, read-only or slow: a clear error or nothing lost, and earlier recordings as they were."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest

from arbl2.errors import StorageError
from arbl2.frames import HEAD, FrameKind, Op
from arbl2.tape import LOG, TapeReader, sessions
from arbl2_recorder import record, recover
from arbl2_recorder.writer import SYNC_BYTES, LogWriter, log_path

NOISE = random.Random(3).randbytes(4_000)
CHILD = """
import resource, sys
from pathlib import Path
from arbl2.errors import Arbl2Error
from arbl2_recorder import Endpoints, RecordConfig, record
root, ws, rest, flush_ms, segment_bytes, file_limit = sys.argv[1:]
if int(file_limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
config = RecordConfig(
    out=Path(root), venues=("upbit",), symbols=("BTC",), endpoints=Endpoints(upbit_ws=ws, upbit_rest=rest),
    flush_ms=int(flush_ms), segment_bytes=int(segment_bytes),
)
try:
    result = record(config)
except Arbl2Error as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
print("dropped", result.dropped)
"""


async def noisy(ws, server, _n):
    """Numbered books that cannot be compressed, each with the moment when it was sent."""
    for i in range(1_000_000):
        await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC","n":%d,"pad":"' % i + NOISE[i % 3_000 :][: i % 900] + b'"}')
        await asyncio.sleep(0.002)


def child(root, server, *, flush_ms=20, segment_bytes=2**27, file_limit=0):
    arguments = [root, server.ws_url, server.rest_url, flush_ms, segment_bytes, file_limit]
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def failure(process):
    """What a recorder that cannot go on prints, after it ended with the exit code of a storage error."""
    output, _ = process.communicate(timeout=30)
    assert process.returncode == StorageError.exit_code
    return output


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole_batches(log):
    """The naive twin of the log reader: frames in whole batches from the start, and the bytes after them."""
    at = frames = 0
    while at + 16 <= len(log):
        magic, crc, rows, size = struct.unpack_from("<4sIII", log, at)
        end = at + 16 + rows * HEAD.size + size
        if magic != b"A2L1" or end > len(log) or zlib.crc32(log[at + 8 : end]) != crc:
            break
        frames, at = frames + rows, end
    return frames, len(log) - at


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, 400 KiB large, and a way to mount it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "arbl2-test", place], capture_output=True, check=False)

    if sys.platform != "linux" or mount("size=400k").returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        yield place, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk(disk, venue, make_config, frames):
    root, remount = disk
    server = venue(noisy)
    first = record(make_config(upbit=server, out=root, duration_s=0.3))
    earlier = everything_below(first.path)
    sent_before = len(server.sent)
    said = failure(child(root, server))
    assert "cannot grow: No space left on device. What was logged before stays; free some space" in said
    session = sessions(root)[-1]
    left = everything_below(session)
    logged, torn = whole_batches(log_path(session, 1).read_bytes())
    assert torn == 0

    with pytest.raises(StorageError, match="ree some space"):
        recover(root)
    assert {path: content for path, content in everything_below(session).items() if path in left} == left
    remount("size=8m")
    [report] = recover(root)
    assert (report.frames_recovered, report.bytes_dropped) == (logged, 0)
    payloads = [f.payload for f in frames(session) if f.kind is FrameKind.MESSAGE]
    assert len(payloads) > 100
    assert payloads == [payload for _, payload, _ in server.sent[sent_before:][: len(payloads)]]
    assert everything_below(first.path) == earlier


def test_a_read_only_disk(disk, venue, make_config):
    root, remount = disk
    server = venue(noisy)
    first = record(make_config(upbit=server, out=root, duration_s=0.3))
    earlier = everything_below(root)
    remount("ro")
    assert "Read-only file system. Choose a folder that can be written to." in failure(child(root, server))
    with pytest.raises(StorageError, match="Read-only file system"):
        recover(root)
    assert everything_below(root) == earlier
    TapeReader(first.path).verify_hashes()


def test_a_folder_without_the_right_to_write(tmp_path, venue):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere; a read-only file system is tested beside this")
    root = tmp_path / "closed"
    root.mkdir(mode=0o555)
    assert "Permission denied. Choose a folder that can be written to." in failure(child(root, venue(noisy)))


def test_a_file_that_may_not_grow(venue, tmp_path, frames):
    """A limit of the kernel on the size of a file: the write fails half-way."""
    root = tmp_path / "tapes"
    server = venue(noisy)
    said = failure(child(root, server, file_limit=150_000))
    assert "cannot grow" in said
    assert "What was logged before stays" in said
    [session] = sessions(root)
    logged, torn = whole_batches(log_path(session, 1).read_bytes())
    assert torn == 0
    [report] = recover(root)
    assert report.frames_recovered == logged > 100
    payloads = [f.payload for f in frames(session) if f.kind is FrameKind.MESSAGE]
    assert payloads == [payload for _, payload, _ in server.sent[: len(payloads)]]


def test_a_device_without_space(tmp_path):
    (tmp_path / LOG).mkdir()
    log_path(tmp_path, 1).symlink_to("/dev/full")
    errors = []
    log = LogWriter(
        tmp_path,
        flush_ms=20,
        fsync=False,
        segment_seconds=900,
        segment_bytes=2**20,
        on_rotated=lambda number: None,
        on_error=errors.append,
    )
    log.append(HEAD.pack(1, 10**18, 1000, 1, 7, 1, FrameKind.MESSAGE, Op.BINARY, 0, 3), b"one")
    log.close()
    assert errors == [log.error]
    assert "No space left on device" in str(log.error)


def writer(folder, errors=None, *, segment_bytes=2**40):
    return LogWriter(
        folder,
        flush_ms=50,
        fsync=True,
        segment_seconds=10**9,
        segment_bytes=segment_bytes,
        on_rotated=lambda number: None,
        on_error=[].append if errors is None else errors.append,
    )


def message(seq, payload):
    return HEAD.pack(seq, 10**18, 1000, 1, 7, 1, FrameKind.MESSAGE, Op.BINARY, 0, len(payload)), payload


def test_all_that_was_written_is_synced(tmp_path, monkeypatch):
    """Soon after the flush, and before ``close`` returns."""
    synced = {}

    def sync(handle):
        os.fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    monkeypatch.setattr(os, "fdatasync", sync)
    log = writer(tmp_path, segment_bytes=2 * SYNC_BYTES)
    first = log_path(tmp_path, 1).stat().st_ino
    log.append(*message(1, b"one"))
    assert wait_for(lambda: synced.get(first)) == log_path(tmp_path, 1).stat().st_size
    for seq in range(2, 2 + 3 * SYNC_BYTES // len(NOISE)):
        log.append(*message(seq, NOISE))
    log.close()
    assert log.error is None
    logs = [path.stat() for path in (tmp_path / LOG).iterdir()]
    assert len(logs) == 2
    assert synced == {log.st_ino: log.st_size for log in logs}


def test_a_sync_that_hangs_holds_up_no_write(tmp_path, monkeypatch):
    answers, asked = threading.Event(), []
    monkeypatch.setattr(os, "fdatasync", lambda handle: (asked.append(handle), answers.wait(30)))
    log = writer(tmp_path)
    log.append(*message(1, b"one"))
    wait_for(lambda: asked)
    for seq in range(2, 20_000):
        log.append(*message(seq, NOISE))
    wait_for(lambda: log.queued_bytes == 0)
    assert whole_batches(log_path(tmp_path, 1).read_bytes()) == (19_999, 0)
    assert len(asked) == 1
    answers.set()
    log.close()
    assert log.error is None


def test_a_sync_that_fails_ends_the_recording(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", refuse)
    errors = []
    log = writer(tmp_path, errors)
    log.append(*message(1, b"one"))
    wait_for(lambda: errors)
    log.append(*message(2, b"too late"))
    log.close()
    assert errors == [log.error]
    assert "Input/output error" in str(log.error)
    assert whole_batches(log_path(tmp_path, 1).read_bytes())[1] == 0


def test_a_disk_that_stalls_and_comes_back(venue, tmp_path, frames):
    """The kernel holds up the writer in open() as long as this test has a lease on the file: nothing is lost or stamped late."""
    server = venue(noisy)
    process = child(tmp_path, server, segment_bytes=50_000)
    waited = wait_for(lambda: next(tmp_path.glob("*/log/000001.log"), None))
    blocked, released = [], []
    with lease(waited.with_name("000002.log"), blocked) as release:
        wait_for(lambda: blocked)
        wait_for(lambda: time.monotonic_ns() - blocked[0] > 1_500_000_000)
        released.append(time.monotonic_ns())
        release()
    sent_by_then = len(server.sent)
    [session] = sessions(tmp_path)
    wait_for(lambda: (session / LOG / "000003.log").exists() or (session / "segments" / "000003.parquet").exists())
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output.strip()) == (0, "dropped 0")
    found = [f for f in frames(session) if f.kind is FrameKind.MESSAGE]
    assert len(found) >= sent_by_then > 100
    assert [f.payload for f in found] == [payload for _, payload, _ in server.sent[: len(found)]]
    sent_ns = [at_ns for _, _, at_ns in server.sent[: len(found)]]
    delays_ms = sorted((f.mono_ns - at) / 1e6 for f, at in zip(found, sent_ns, strict=True) if blocked[0] < at < released[0])
    print(f"while the disk stalled: {len(delays_ms)} messages, send to stamp {delays_ms[len(delays_ms) // 2]:.2f} ms (median)")
    assert len(delays_ms) > 50
    assert delays_ms[len(delays_ms) // 2] < 300


def wait_for(found, timeout_s=30.0):
    limit = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < limit, "what the test waits for did not happen"
        time.sleep(0.01)
    return value


@contextlib.contextmanager
def lease(path, blocked):
    """Whoever opens ``path`` for writing waits in the kernel until the lease is released; ``blocked`` gets the moment."""
    path.touch()
    handle = os.open(path, os.O_RDONLY)
    before = signal.signal(signal.SIGIO, lambda *_: blocked.append(time.monotonic_ns()))
    try:
        try:
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            pytest.skip(f"the file system of the temporary folder knows no leases ({error.strerror})")
        yield lambda: fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        os.close(handle)
        signal.signal(signal.SIGIO, before)
