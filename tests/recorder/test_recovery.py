"""Kills and torn logs: what was logged stays, and the report is exact."""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib

import msgspec
import pytest

from arbl2.errors import StorageError, TapeError
from arbl2.frames import FrameKind, Op
from arbl2.tape import LOG, SEGMENTS, Manifest, TapeReader, save_manifest, sessions
from arbl2_recorder import record, recover
from arbl2_recorder.log import HEAD, encode_batch
from arbl2_recorder.seal import seal_log
from arbl2_recorder.storage import RootLock
from arbl2_recorder.writer import log_path

CHILD = """
import sys
from pathlib import Path
from arbl2.errors import Arbl2Error
from arbl2_recorder import Endpoints, RecordConfig, record
root, ws, rest, flush_ms, segment_bytes = sys.argv[1:]
config = RecordConfig(
    out=Path(root), venues=("upbit",), symbols=("BTC",), endpoints=Endpoints(upbit_ws=ws, upbit_rest=rest),
    flush_ms=int(flush_ms), segment_bytes=int(segment_bytes),
)
try:
    result = record(config)
except Arbl2Error as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
print("ended by", result.ended, result.frames)
"""


def child(root, server, *, flush_ms=250, segment_bytes=2**27):
    arguments = [root, server.ws_url, server.rest_url, flush_ms, segment_bytes]
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def whole_batches(log: bytes) -> tuple[int, int]:
    """The naive twin of the log reader: frames in whole batches from the start, and the bytes after them."""
    at = frames = 0
    while at + 16 <= len(log):
        magic, crc, rows, size = struct.unpack_from("<4sIII", log, at)
        end = at + 16 + rows * HEAD.size + size
        if magic != b"A2L1" or end > len(log) or zlib.crc32(log[at + 8 : end]) != crc:
            break
        frames, at = frames + rows, end
    return frames, len(log) - at


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def numbered(ws, server, _n):
    """Bursts of numbered books of changing size, as fast as the connection takes them."""
    for i in range(10_000_000):
        await server.send(ws, b'{"type":"orderbook","code":"KRW-BTC","n":%d,"pad":"%s"}' % (i, b"x" * (i * 37 % 90)))
        if i % 20 == 19:
            await asyncio.sleep(0.004)


def test_sigkill_under_load(venue, tmp_path, frames):
    """Kill at random moments; each next start recovers the session before; nothing older changes."""
    rng = random.Random(11)
    root = tmp_path / "tapes"
    server = venue(numbered)
    earlier = {}
    lines = []
    for round_number in range(5):
        sent_before, dialled = len(server.sent), len(server.received)
        process = child(root, server, segment_bytes=2**27 if round_number % 2 else 100_000)
        limit = time.monotonic() + 30
        while len(server.received) == dialled:
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(rng.uniform(0.6, 1.3))
        killed_ns = time.monotonic_ns()
        process.kill()
        process.communicate()
        sent = server.sent[sent_before:]

        session = sessions(root)[-1]
        manifest = msgspec.json.decode((session / "manifest.json").read_bytes(), type=Manifest)
        assert manifest.state == "recording"
        sealed = manifest.rows
        counted = {int(p.stem): whole_batches(p.read_bytes()) for p in sorted((session / LOG).glob("*.log"))}
        named = {segment.file for segment in manifest.segments}
        fresh = sum(n for number, (n, _) in counted.items() if f"{number:06d}.parquet" not in named)
        torn = sum(size for _, size in counted.values())

        [report] = recover(root)
        assert (report.session, report.problem) == (session.name, "")
        assert (report.frames_sealed, report.frames_recovered, report.bytes_dropped) == (sealed, fresh, torn)
        found = frames(session)
        assert len(found) == sealed + fresh
        reader = TapeReader(session)
        assert reader.manifest.state == "recovered"
        assert sum(reader.manifest.counts.values()) == len(found)
        payloads = [f.payload for f in found if f.kind is FrameKind.MESSAGE]
        assert payloads == [payload for _, payload, _ in sent[: len(payloads)]]
        # Were it not for the flush, nothing would be there: in this time no batch fills up by itself.
        assert payloads
        last_kept_ns = sent[len(payloads) - 1][2]
        lost_ms = (killed_ns - last_kept_ns) / 1e6
        lines.append(f"kept {len(payloads)} of {len(sent)}, newest kept {lost_ms:.0f} ms before the kill, torn {torn} B")
        # One flush interval, and what the machine needs to write and sync.
        assert lost_ms < 250 + 400
        assert not list(session.rglob("*.part"))
        assert not list(session.rglob("*.log"))
        for path, content in earlier.items():
            assert everything_below(path) == content
        earlier[session] = everything_below(session)
    print("\n".join(lines))
    assert recover(root) == []


def test_the_next_start_recovers_by_itself(venue, tmp_path, make_config, scripts):
    server = venue(scripts["upbit"])
    config = make_config(upbit=server, duration_s=0.3)
    first = record(config)
    before = everything_below(first.path)
    process = child(config.out, server, flush_ms=50)
    limit = time.monotonic() + 30
    while len(server.received) < 2 or not any(p.stat().st_size for p in config.out.glob("*/log/*.log")):
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.kill()
    process.communicate()
    result = record(config)
    [report] = result.recovered
    assert report.frames_recovered > 0
    assert TapeReader(report.path).manifest.state == "recovered"
    assert everything_below(first.path) == before


def test_sigterm_seals(venue, tmp_path, scripts, frames):
    server = venue(scripts["upbit"])
    process = child(tmp_path, server)
    limit = time.monotonic() + 30
    while len(server.sent) < 100:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert output.startswith("ended by signal")
    [session] = sessions(tmp_path)
    found = frames(session)
    assert output.split()[-1] == str(len(found))
    assert TapeReader(session).manifest.state == "sealed"
    assert not (session / LOG).exists()
    assert len([f for f in found if f.kind is FrameKind.MESSAGE]) >= 100
    closed = json.loads(found[-2].payload)
    assert (found[-2].kind, closed["code"], closed["clean"]) == (FrameKind.CLOSED, 1000, True)


def head(seq, size, *, kind=FrameKind.MESSAGE):
    return HEAD.pack(seq, 10**18 + seq, 1000 + seq, 1, 7, 1, kind, Op.BINARY, 0, size)


def batch(first, payloads):
    return encode_batch([head(first + i, len(p)) for i, p in enumerate(payloads)], payloads)


def session_folder(root, logs, **changes):
    """A session as a kill leaves it."""
    session = root / "20261121T113443Z-0a1b"
    (session / LOG).mkdir(parents=True)
    for number, data in logs.items():
        log_path(session, number).write_bytes(data)
    manifest = Manifest(tape_version=1, session=session.name, state="recording", anchor_wall_ns=10**18, anchor_mono_ns=1000)
    save_manifest(session, msgspec.structs.replace(manifest, **changes))
    return session


@pytest.mark.parametrize("filled", [b"", b"\x00"], ids=["cut", "zeroed"])
def test_every_cut_of_the_last_batch(filled, tmp_path):
    """A power cut ends a file anywhere, or leaves zeros where its size was written but its data was not."""
    kept = batch(1, [b"one", b"", b"three"])
    last = batch(4, [b"A2L1 four", b"five"])
    for cut in range(len(last) + 1):
        root = tmp_path / str(cut)
        tail = last[:cut] + filled * (len(last) - cut)
        session = session_folder(root, {1: kept + tail})
        [report] = recover(root)
        whole = cut == len(last)
        assert (report.frames_recovered, report.bytes_dropped) == (5 if whole else 3, 0 if whole else len(tail))
        payloads = [b"one", b"", b"three"] + ([b"A2L1 four", b"five"] if whole else [])
        assert [f.payload for f in TapeReader(session).frames()] == payloads


def test_every_flipped_byte_of_a_middle_batch_costs_that_batch_only(tmp_path):
    parts = [batch(1, [b"one"]), batch(2, [b"two", b"A2L1"]), batch(4, [b"four"])]
    for at in range(len(parts[1])):
        damaged = bytearray(parts[1])
        damaged[at] ^= 0x40
        root = tmp_path / str(at)
        session = session_folder(root, {1: parts[0] + bytes(damaged) + parts[2]})
        [report] = recover(root)
        assert (report.frames_recovered, report.bytes_dropped) == (2, len(parts[1]))
        assert [f.seq for f in TapeReader(session).frames()] == [1, 4]


def test_a_segment_and_its_log_count_once(tmp_path):
    """Killed between the manifest and the deletion of the log, and between the segment and the manifest."""
    logs = {1: batch(1, [b"one", b"two"]), 2: batch(3, [b"three"]) + batch(4, [b"four"]), 3: batch(5, [b"five"]) + b"A2L1to"}
    session = session_folder(tmp_path, logs)
    manifest = TapeReader(session).manifest
    manifest = seal_log(session, 1, manifest, salvage=False).manifest
    unnamed = seal_log(session, 2, manifest, salvage=False).manifest.segments[-1]
    save_manifest(session, manifest)
    for number in (1, 2):
        log_path(session, number).write_bytes(logs[number])
    (session / SEGMENTS / "000003.parquet.part").write_bytes(b"PAR1 half")
    [report] = recover(tmp_path)
    assert (report.frames_sealed, report.frames_recovered, report.bytes_dropped) == (2, 3, 6)
    reader = TapeReader(session)
    reader.verify_hashes()
    assert [f.payload for f in reader.frames()] == [b"one", b"two", b"three", b"four", b"five"]
    assert reader.manifest.segments[1] == unnamed
    assert reader.manifest.counts == {"upbit.message": 5}
    assert sorted(p.name for p in (session / SEGMENTS).iterdir()) == [f"00000{n}.parquet" for n in (1, 2, 3)]
    before = everything_below(session)
    assert recover(tmp_path) == []
    assert everything_below(session) == before


def test_a_session_that_cannot_be_read_is_reported_and_left_alone(tmp_path):
    session = session_folder(tmp_path, {1: batch(1, [b"one"])})
    (session / "manifest.json").write_bytes(b"{")
    before = everything_below(session)
    [report] = recover(tmp_path)
    assert "manifest.json cannot be read" in report.problem
    assert everything_below(session) == before


def test_a_folder_without_its_first_manifest_is_cleared_away(tmp_path):
    stillborn = tmp_path / "20261121T113443Z-0a1b"
    stillborn.mkdir()
    (stillborn / "manifest.json.part").write_bytes(b"{")
    assert recover(tmp_path) == []
    assert not stillborn.exists()


def test_recover_refuses_while_a_recorder_runs_and_without_a_folder(tmp_path):
    with RootLock(tmp_path), pytest.raises(StorageError, match=rf"in use by another recorder \(process {os.getpid()}\)"):
        recover(tmp_path)
    with pytest.raises(TapeError, match="there is no folder"):
        recover(tmp_path / "nothing")


def test_a_log_that_does_not_read_back_is_kept(tmp_path):
    session = session_folder(tmp_path, {1: batch(1, [b"one"]) + b"rot"})
    with pytest.raises(StorageError, match="does not read back"):
        seal_log(session, 1, TapeReader(session).manifest, salvage=False)
    assert log_path(session, 1).exists()
    assert not list((session / SEGMENTS).iterdir())
