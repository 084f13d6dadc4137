"""Shipping to a real S3 server: what is deleted here was read back from there, whatever is killed or changed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbl2.config import load
from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.frames import FrameKind
from arbl2.tape import (
    LEDGER,
    MANIFEST,
    SEGMENTS,
    SHIPPED,
    SegmentWriter,
    TapeReader,
    find_session,
    load_manifest,
    load_shipped,
    save_manifest,
    sessions,
    sha256_of,
)
from arbl2_recorder.ship import Shipper, is_shipped, session_lock, ship_session, verify_copy
from arbl2_replay import replay
from markets import ANCHOR, Market, manifest

pytest_plugins = ("object_store",)
GOLDEN = Path(__file__).parents[2] / "datasets" / "golden" / "two-venue-60s"


def add_segments(folder, count, *, state="sealed", payload=2_000):
    """``count`` more segments of random payloads, and a ledger file for each."""
    old = list(load_manifest(folder).segments) if (folder / MANIFEST).exists() else []
    market = Market()
    for number in range(len(old) + count):
        market.add(number, "upbit", FrameKind.MESSAGE, random.Random(number).randbytes(payload))
    for number in range(len(old) + 1, len(old) + count + 1):
        writer = SegmentWriter(folder, number, folder.name, ANCHOR)
        writer.append(market.frames[number - 1])
        old.append(writer.seal())
        (folder / LEDGER).mkdir(exist_ok=True)
        pq.write_table(pa.table({"cause": ["reconnect"], "start_mono_ns": [number]}), folder / LEDGER / f"{number:06d}.parquet")
    save_manifest(folder, manifest(folder.name, state=state, segments=old))
    return folder


def local(folder):
    return sorted(path.name for path in (folder / SEGMENTS).iterdir())


@pytest.fixture
def name(request):
    """A session of its own in the bucket that all tests share."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:80]


@pytest.fixture
def session(tmp_path, name):
    return add_segments(tmp_path / "tapes" / name, 3)


# -------------------------------------------------------------------------------------------------------------- the whole way


def test_a_shipped_tape_replays_to_the_same_digest(store, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "tape", tmp_path / "tape"))
    report = ship_session(folder, store.url("golden"))
    url = store.url(f"golden/{report.session}")
    assert report.url == url
    assert report.whole
    config = load(GOLDEN / "config.toml")
    assert replay(url, config).digest == replay(folder, config).digest
    assert sessions(store.url("golden")) == [url]
    assert find_session(store.url("golden"), tmp_path) == find_session(url, tmp_path) == url
    assert list(TapeReader(url).frames()) == list(TapeReader(folder).frames())


@pytest.mark.parametrize("form", ["s3", "file", "folder"])
def test_everything_sealed_is_there_and_then_may_go(store, session, tmp_path, form):
    url = {"s3": store.url("forms"), "file": f"file://{tmp_path}/far", "folder": str(tmp_path / "far")}[form]
    before = list(TapeReader(session).frames())
    first = ship_session(session, url)
    assert (first.files, first.deleted, first.whole) == (7, 0, True)
    assert is_shipped(session)
    assert is_shipped(session, url)
    assert not is_shipped(session, str(tmp_path / "elsewhere"))
    assert local(session) == ["000001.parquet", "000002.parquet", "000003.parquet"]
    second = ship_session(session, url, delete_local=True)
    assert (second.files, second.deleted, second.whole) == (0, 3, True)
    assert local(session) == []
    assert sorted(path.name for path in session.iterdir()) == [LEDGER, MANIFEST, SEGMENTS, SHIPPED]
    verify_copy(session)
    far = TapeReader(first.url)
    far.verify_hashes()
    assert list(far.frames()) == before
    with pytest.raises(TapeError, match=r"its segments were shipped. Read it from") as error:
        TapeReader(session)
    assert first.url in str(error.value)
    assert ship_session(session, url, delete_local=True).deleted == 0


def test_the_copy_of_a_session_in_the_making_grows_and_is_never_ahead_of_its_files(store, session, name):
    add_segments(session, 0, state="recording")
    assert not ship_session(session, store.url("live")).whole
    assert not is_shipped(session, store.url("other"))
    add_segments(session, 2, state="recording")
    assert TapeReader(store.url(f"live/{name}")).manifest.rows == 3
    assert ship_session(session, store.url("live"), delete_local=True).deleted == 5
    add_segments(session, 1)
    last = ship_session(session, store.url("live"), delete_local=True)
    assert (last.files, last.deleted, last.whole) == (3, 1, True)
    assert [frame.seq for frame in TapeReader(store.url(f"live/{name}")).frames()] == [1, 2, 3, 4, 5, 6]
    assert store.names(f"live/{name}/ledger") == [f"{n:06d}.parquet" for n in range(1, 7)]


def test_the_manifest_goes_last(store, session, name):
    with pytest.raises(RuntimeError):
        ship_session(session, store.url("last"), on_progress=fail_at(2))
    assert store.names(f"last/{name}") == ["segments/000001.parquet", "segments/000002.parquet"]
    with pytest.raises(TapeError, match="not a recording"):
        TapeReader(store.url(f"last/{name}"))
    assert ship_session(session, store.url("last"), stopped=lambda: True).files == 0
    assert ship_session(session, store.url("last")).files == 5


def fail_at(file):
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == file:
            raise RuntimeError

    return progress


# ----------------------------------------------------------------------------------------------------------------------- kills


CHILD = """
import sys
from pathlib import Path
from arbl2_recorder.ship import ship_session
print("ready", flush=True)
ship_session(Path(sys.argv[1]), sys.argv[2], delete_local=True, on_progress=lambda done, total: print(done, flush=True))
"""


def start(session, url):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(session), url], stdout=subprocess.PIPE, text=True)


def assert_nothing_is_lost(session, store, path, hashes):
    """Every segment is here or there, whole; a manifest there names only what is there."""
    there = {}
    for file in store.names(path):
        if file.startswith(SEGMENTS):
            there[Path(file).name] = hashlib.sha256(store.read(f"{path}/{file}")).hexdigest()
    for file, sha256 in hashes.items():
        here = session / SEGMENTS / file
        assert (here.exists() and sha256_of(here) == sha256) or there.get(file) == sha256, file
    if MANIFEST in store.names(path):
        TapeReader(store.url(path)).verify_hashes()


def test_killed_in_the_middle_it_goes_on_where_it_stopped(store, session, name):
    add_segments(session, 5)
    with start(session, store.url("killed")) as child:
        for line in child.stdout:
            if line.strip().isdecimal():
                child.kill()
                break
        child.wait()
    assert child.returncode == -signal.SIGKILL
    done = load_shipped(session).files
    assert 1 <= len(done) < 8 + 8 + 1
    assert len(local(session)) == 8
    report = ship_session(session, store.url("killed"), delete_local=True)
    # what was sent before is not sent again; the file in work at the kill may be
    assert 17 - len(done) - 1 <= report.files <= 17 - len(done)
    assert report.deleted == 8
    TapeReader(store.url(f"killed/{name}")).verify_hashes()


def test_killed_at_any_moment_nothing_is_lost(store, session, name):
    add_segments(session, 3, payload=200_000)
    path, hashes = f"kills/{name}", {segment.file: segment.sha256 for segment in load_manifest(session).segments}
    kills, dice = 0, random.Random(7)
    for _ in range(10):
        with start(session, store.url("kills")) as child:
            assert child.stdout.readline() == "ready\n"
            try:
                child.wait(dice.uniform(0.0, 0.2))
            except subprocess.TimeoutExpired:
                child.kill()
                kills += 1
            child.stdout.close()
        assert_nothing_is_lost(session, store, path, hashes)
        if local(session) == []:
            break
    else:
        ship_session(session, store.url("kills"), delete_local=True)
    assert kills >= 1
    assert_nothing_is_lost(session, store, path, hashes)
    TapeReader(store.url(path)).verify_hashes()


# ----------------------------------------------------------------------------------------------------- what changed over there


def flip(store, path):
    body = bytearray(store.read(path))
    body[len(body) // 2] ^= 1
    store.overwrite(path, bytes(body))


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_changed_object_is_found_before_anything_is_deleted(store, session, name, harm):
    path = f"harm/{name}/segments/000002.parquet"
    ship_session(session, store.url("harm"))
    if harm == "flipped":
        flip(store, path)
    elif harm == "cut":
        store.overwrite(path, store.read(path)[:-1])
    else:
        store.delete(path)
    with pytest.raises(StorageError):
        verify_copy(session)
    with pytest.raises(TapeError):
        TapeReader(store.url(f"harm/{name}")).verify_hashes()
    with pytest.raises(StorageError, match=r"000002.parquet.* is not what was shipped"):
        ship_session(session, store.url("harm"), delete_local=True)
    assert len(local(session)) == 3
    # it is still here, so that the next call mends it
    again = ship_session(session, store.url("harm"), delete_local=True)
    assert (again.files, again.deleted) == (1, 3)
    TapeReader(store.url(f"harm/{name}")).verify_hashes()


def test_a_copy_that_is_gone_from_a_folder_is_found_too(session, tmp_path):
    ship_session(session, str(tmp_path / "far"))
    (tmp_path / "far" / session.name / SEGMENTS / "000002.parquet").unlink()
    with pytest.raises(StorageError, match="is not what was shipped"):
        ship_session(session, str(tmp_path / "far"), delete_local=True)
    assert len(local(session)) == 3


def test_what_comes_back_otherwise_than_it_went_is_not_trusted(store, session, name):
    """The store takes every byte and says all is well; what it gives out has one bit changed."""
    with Forgetful(store.endpoint) as endpoint:
        url = store.url("forgetful").replace(store.endpoint, endpoint)
        with pytest.raises(StorageError, match=r"000001.parquet.* is not what was shipped"):
            ship_session(session, url, delete_local=True)
    assert len(local(session)) == 3
    assert load_shipped(session) is None
    assert store.names(f"forgetful/{name}") == ["segments/000001.parquet"]


class Forgetful:
    """A real HTTP server before the store that changes a bit of each segment it hands out."""

    def __init__(self, endpoint):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                chunked = self.headers.get("Transfer-Encoding") == "chunked"
                body = b"".join(self.chunks()) if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {key: value for key, value in self.headers.items() if key.lower() != "transfer-encoding"}
                with contextlib.closing(http.client.HTTPConnection(endpoint, timeout=30)) as store:
                    store.request(self.command, self.path, body, headers)
                    answer = store.getresponse()
                    got = bytearray(answer.read())
                if self.command == "GET" and self.path.split("?")[0].endswith(".parquet") and got:
                    got[0] ^= 1
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in {"transfer-encoding", "connection", "content-length", "server", "date"}:
                        self.send_header(key, value)
                self.send_header("Content-Length", answer.headers["Content-Length"] if self.command == "HEAD" else str(len(got)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(got)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def chunks(self):
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_changed_manifest_over_there_is_written_anew(store, session, name):
    ship_session(session, store.url("manifest"))
    path = f"manifest/{name}/{MANIFEST}"
    store.overwrite(path, store.read(path).replace(b'"sealed"', b'"sealet"'))
    assert ship_session(session, store.url("manifest"), delete_local=True).deleted == 3
    assert store.read(path) == (session / MANIFEST).read_bytes()


def test_a_copy_that_vanished_as_a_whole_is_made_anew(store, session, name):
    ship_session(session, store.url("vanished"))
    for file in store.names(f"vanished/{name}"):
        store.delete(f"vanished/{name}/{file}")
    assert ship_session(session, store.url("vanished"), delete_local=True).files == 7
    TapeReader(store.url(f"vanished/{name}")).verify_hashes()


def test_another_recording_of_that_name_is_not_touched(store, session, name, tmp_path):
    ship_session(session, store.url("same"))
    other = add_segments(tmp_path / "other" / name, 1, payload=10)
    before = store.read(f"same/{name}/segments/000001.parquet")
    with pytest.raises(StorageError, match="another recording of that name"):
        ship_session(other, store.url("same"), delete_local=True)
    assert store.read(f"same/{name}/segments/000001.parquet") == before
    store.overwrite(f"same/{name}/{MANIFEST}", b"{}")
    with pytest.raises(StorageError, match="Move it away"):
        ship_session(session, store.url("same"), delete_local=True)
    assert len(local(session)) == 3


def test_what_is_damaged_here_does_not_go_there(store, session, name):
    path = session / SEGMENTS / "000002.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(TapeError, match=r"000002.parquet does not match its manifest; it was not shipped"):
        ship_session(session, store.url("damaged"), delete_local=True)
    assert store.names(f"damaged/{name}") == ["segments/000001.parquet"]
    assert len(local(session)) == 3


# ------------------------------------------------------------------------------------------------------------ places that fail


def test_a_missing_bucket_is_said(store, session):
    with pytest.raises(StorageError, match=r"NO_SUCH_BUCKET.*nothing was deleted here"):
        ship_session(session, store.url("x", bucket="none"), delete_local=True)
    with pytest.raises(TapeError, match="not a recording"):
        TapeReader(store.url("x", bucket="none"))
    assert len(local(session)) == 3


def test_a_store_that_does_not_answer_is_said(store, session):
    with pytest.raises(StorageError, match=r"NETWORK_CONNECTION.*nothing was deleted here"):
        ship_session(session, "s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:1", delete_local=True)


@pytest.mark.parametrize("url", ["foo://bucket/x", "s3://", "s3://key:secret@bucket/x", "s3://bucket/x?colour=red"])
def test_a_url_of_no_use_is_refused(session, url):
    for use in (lambda: ship_session(session, url), lambda: TapeReader(url), lambda: Shipper(session.parent, url)):
        with pytest.raises(ConfigError) as error:
            use()
        assert "secret" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_said(session, tmp_path):
    (tmp_path / "far").write_text("a file")
    with pytest.raises(StorageError, match="cannot be used"):
        ship_session(session, str(tmp_path / "far"), delete_local=True)
    assert len(local(session)) == 3


def test_a_session_is_not_its_own_copy(session, tmp_path):
    with pytest.raises(ConfigError, match="the session itself"):
        ship_session(session, str(session.parent), delete_local=True)
    (tmp_path / "link").symlink_to(session.parent)
    with pytest.raises(ConfigError, match="the session itself"):
        ship_session(session, str(tmp_path / "link"), delete_local=True)
    far = tmp_path / "far" / session.name
    far.mkdir(parents=True)
    (far / SEGMENTS).symlink_to(session / SEGMENTS)
    with pytest.raises(StorageError, match="the same file by another name"):
        ship_session(session, str(tmp_path / "far"), delete_local=True)
    TapeReader(session).verify_hashes()


def test_what_was_deleted_here_is_not_shipped_to_a_second_place(session, tmp_path):
    ship_session(session, str(tmp_path / "one"), delete_local=True)
    with pytest.raises(StorageError, match=r"was shipped to '.*one/"):
        ship_session(session, str(tmp_path / "two"))


def test_one_shipment_of_a_session_at_a_time(session, tmp_path):
    with session_lock(session), pytest.raises(StorageError, match="by another process"):
        ship_session(session, str(tmp_path / "far"))
    with pytest.raises(TapeError, match="there is no recording"):
        ship_session(tmp_path / "none", str(tmp_path / "far"))


# ----------------------------------------------------------------------------------------------------------- beside a recorder


def wait_for(condition, seconds=30):
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.02)


def test_a_shipper_follows_what_is_sealed(store, session, name, tmp_path):
    add_segments(session, 0, state="recording")
    broken = add_segments(tmp_path / "tapes" / "broken", 1)
    (broken / SEGMENTS / "000001.parquet").write_bytes(b"")
    url = store.url("shipper")
    shipper = Shipper(tmp_path / "tapes", url, delete_local=True, every_s=0.02)
    try:
        wait_for(lambda: local(session) == [])
        add_segments(session, 2, state="recording")
        wait_for(lambda: local(session) == [])
        add_segments(session, 1)
    finally:
        shipper.close()
    assert not any(thread.name == "arbl2-ship" for thread in threading.enumerate())
    assert (shipper.files, shipper.segments) == (15, 6)
    assert re.fullmatch(r"broken is not shipped: .*000001.parquet does not match its manifest.*", shipper.problem)
    assert TapeReader(store.url(f"shipper/{name}")).manifest.state == "sealed"
    assert [frame.seq for frame in TapeReader(store.url(f"shipper/{name}")).frames()] == list(range(1, 7))
    assert local(broken) == ["000001.parquet"]


def test_a_shipper_outlives_a_store_that_does_not_take_it(session, tmp_path):
    far = tmp_path / "far"
    far.write_text("in the way")
    shipper = Shipper(tmp_path / "tapes", str(far), every_s=0.02)
    try:
        wait_for(lambda: shipper.problem)
        assert "cannot be used" in shipper.problem
        far.unlink()
        wait_for(lambda: is_shipped(session, str(far)))
    finally:
        shipper.close()
    assert shipper.problem == ""


def test_a_shipper_tries_a_session_again_that_was_ill(session, tmp_path):
    path = session / SEGMENTS / "000002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    later = add_segments(tmp_path / "tapes" / "later", 1)
    shipper = Shipper(tmp_path / "tapes", str(tmp_path / "far"), every_s=0.02)
    try:
        wait_for(lambda: is_shipped(later) and shipper.problem)
        assert session.name in shipper.problem
        path.write_bytes(whole)
        wait_for(lambda: is_shipped(session) and not shipper.problem)
    finally:
        shipper.close()
    assert (shipper.segments, shipper.files) == (4, 10)


def test_a_shipper_leaves_a_session_that_is_held_to_others(session, tmp_path):
    os.utime(session / MANIFEST, (1, 1))  # the older one is looked at first
    later = add_segments(tmp_path / "tapes" / "later", 1)
    with session_lock(session):
        shipper = Shipper(tmp_path / "tapes", str(tmp_path / "far"), every_s=0.02)
        try:
            wait_for(lambda: is_shipped(later))
            assert shipper.problem == ""
            assert not is_shipped(session)
        except BaseException:
            shipper.close()
            raise
    try:
        wait_for(lambda: is_shipped(session))
    finally:
        shipper.close()


def test_a_recording_in_the_way_over_there_holds_up_no_other(session, tmp_path):
    ship_session(add_segments(tmp_path / "other" / session.name, 1, payload=10), str(tmp_path / "far"))
    os.utime(session / MANIFEST, (1, 1))
    later = add_segments(tmp_path / "tapes" / "later", 1)
    shipper = Shipper(tmp_path / "tapes", str(tmp_path / "far"), every_s=0.02)
    try:
        wait_for(lambda: is_shipped(later) and "another recording of that name" in shipper.problem)
    finally:
        shipper.close()


def test_a_shipper_takes_no_core_from_the_sockets(session, tmp_path):
    shipper = Shipper(tmp_path / "tapes", str(tmp_path / "far"), every_s=0.02)
    try:
        wait_for(lambda: is_shipped(session))
        native = next(thread.native_id for thread in threading.enumerate() if thread.name == "arbl2-ship")
        assert os.getpriority(os.PRIO_PROCESS, native) > os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        shipper.close()
