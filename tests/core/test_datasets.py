"""The list of recordings: what it says of sessions that are here, shipped, deleted here, in the making, or ill."""

from __future__ import annotations

import io
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from arbl2.cli import app
from arbl2.cli_datasets import DatasetTable, gap_list
from arbl2.datasets import BOTH, DAMAGED, LOCAL, PARTLY, REMOTE, Dataset, dataset, datasets, verify
from arbl2.errors import Arbl2Error, ConfigError, TapeError
from arbl2.frames import FrameKind
from arbl2.tape import LEDGER, MANIFEST, SEGMENTS, SegmentWriter, ledger, load_manifest, save_manifest
from arbl2_recorder.gaps import gap_rows, gaps_by_cause
from arbl2_recorder.ledger import Cause, Gap, LedgerWriter
from arbl2_recorder.ship import ship_session
from arbl2_recorder.storage import LOCK_FILE, RootLock
from markets import ANCHOR, INSTRUMENTS, START_NS, Market, manifest

pytest_plugins = ("object_store",)


def market():
    """Four rounds of three books."""
    found = Market()
    for ms in range(0, 800, 200):
        found.premium(ms)
    return found


@pytest.fixture
def root(tmp_path):
    market().write(tmp_path / "tapes" / "plain", "plain")
    return tmp_path / "tapes"


def write_ledger(folder, number, rows):
    (folder / LEDGER).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / LEDGER / f"{number:06d}.parquet")


def gap(cause, start, missed=None):
    return {"cause": cause, "venue": "upbit", "conn": 1, "stream": "KRW-BTC", "start_mono_ns": start, "missed": missed}


def test_a_session_is_told_from_its_manifest(root):
    payloads = [frame.payload for frame in market().frames]
    [found] = datasets(root)
    assert found == Dataset(
        session="plain",
        place=str(root / "plain"),
        state="sealed",
        start_ns=START_NS,
        end_ns=market().frames[-1].recv_ns,
        instruments=INSTRUMENTS,
        frames=12,
        messages=12,
        raw_bytes=sum(map(len, payloads)),
        sealed_bytes=(root / "plain" / SEGMENTS / "000001.parquet").stat().st_size,
        kept=LOCAL,
    )
    assert found.duration_s == (found.end_ns - START_NS) / 1e9
    assert datasets(root.parent / "none") == []


def test_gaps_and_drops_come_from_the_ledger(root):
    write_ledger(root / "plain", 1, [gap("reconnect", 1), gap("dropped", 2, 40)])
    write_ledger(root / "plain", 2, [gap("dropped", 3, 2)])
    found = dataset(root / "plain")
    assert (found.gaps, found.dropped) == (3, 42)
    assert gaps_by_cause(root / "plain") == {"dropped": 2, "reconnect": 1}
    assert [(row["cause"], row["start_mono_ns"]) for row in gap_rows(root / "plain", 2)] == [("dropped", 2), ("dropped", 3)]
    assert ledger(root / "plain", ("missed", "unknown")).to_pydict() == {"missed": [None, 40, 2]}


def test_a_ledger_that_is_none_is_refused(root):
    write_ledger(root / "plain", 1, [{"colour": "red"}])
    assert "lacks columns" in dataset(root / "plain").problem
    with pytest.raises(TapeError, match="does not have the columns"):
        gaps_by_cause(root / "plain")
    (root / "plain" / LEDGER / "000001.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in dataset(root / "plain").problem
    with pytest.raises(TapeError, match="cannot be read"):
        verify(root / "plain")


def test_what_cannot_be_read_is_listed_with_its_problem(root):
    market().write(root / "ill", "ill")
    (root / "ill" / MANIFEST).write_text("{")
    found = {item.session: item for item in datasets(root)}
    assert "cannot be read" in found["ill"].problem
    assert found["plain"].problem == ""


def test_a_session_in_the_making_holds_nothing_yet(tmp_path):
    (tmp_path / "new").mkdir()
    save_manifest(tmp_path / "new", manifest("new", state="recording"))
    found = dataset(tmp_path / "new")
    assert (found.state, found.frames, found.end_ns, found.duration_s, found.raw_bytes) == ("recording", 0, None, None, None)


def test_where_it_is_kept(store, root):
    folder, url = root / "plain", store.url("kept")
    report = ship_session(folder, url)
    assert (dataset(folder).kept, dataset(folder).copy) == (BOTH, report.url)
    writer = SegmentWriter(folder, 2, "plain", ANCHOR)
    later = Market()
    later.frames = market().frames
    writer.append(later.add(900, "upbit", FrameKind.MESSAGE, b"later").frames[-1])
    sealed = [*load_manifest(folder).segments, writer.seal()]
    save_manifest(folder, manifest("plain", segments=sealed))
    assert dataset(folder).kept == PARTLY
    ship_session(folder, url, delete_local=True)
    here, there = dataset(folder), datasets(url)[0]
    assert (here.kept, there.kept, there.place) == (REMOTE, REMOTE, report.url)
    assert (there.frames, there.sealed_bytes, there.start_ns) == (here.frames, here.sealed_bytes, here.start_ns)
    verify(report.url)


@pytest.mark.parametrize(("body", "words"), [(None, "is missing"), (b"short", "has 5 bytes instead of")])
def test_a_segment_that_is_not_what_it_was_is_seen_without_reading(root, tmp_path, body, words):
    path = root / "plain" / SEGMENTS / "000001.parquet"
    path.unlink() if body is None else path.write_bytes(body)
    found = dataset(root / "plain")
    assert (found.kept, found.problem) == (DAMAGED, "")
    assert f"000001.parquet {words}" in found.damage
    with pytest.raises(TapeError, match=r"000001\.parquet"):
        verify(root / "plain")


def test_verify_says_what_it_has_not_read(root, tmp_path):
    folder, far = root / "plain", str(tmp_path / "far")
    assert verify(folder) == ""
    done = load_manifest(folder)
    save_manifest(folder, manifest("plain", state="recording", segments=done.segments))
    assert verify(folder) == "killed or being recorded: 1 segments are whole, the log was not read"
    save_manifest(folder, done)
    ship_session(folder, far, delete_local=True)
    assert verify(folder) == f"not read: segments are at {far}/plain; use --copies"
    writer = SegmentWriter(folder, 2, "plain", ANCHOR)
    writer.append(market().add(900, "upbit", FrameKind.MESSAGE, b"later").frames[-1])
    save_manifest(folder, manifest("plain", segments=[*done.segments, writer.seal()]))
    assert verify(folder).startswith(f"not read: 1 segments are at {far}/plain only")


# ---------------------------------------------------------------------------------------------------------------- command line


def arbl2(*arguments, columns=220):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})


@pytest.mark.parametrize(
    "command",
    [
        ("datasets", "prune", "--keep-days", "1", "--tapes", "s3://bucket/tapes"),
        ("datasets", "ship", "far", "--tapes", "s3://bucket/tapes"),
        ("datasets", "ship", "far", "s3://bucket/tapes/x"),
        ("recover", "s3://bucket/tapes"),
        ("health", "--tapes", "s3://bucket/tapes"),
    ],
)
def test_a_url_where_a_folder_is_needed_is_refused(store, root, monkeypatch, command):
    monkeypatch.chdir(root.parent)
    error = arbl2(*(word.replace("s3://bucket/tapes", store.url("tapes")) for word in command)).exception
    assert isinstance(error, ConfigError)
    assert "a folder of this machine" in str(error)


def test_a_recording_where_its_parent_is_needed_is_refused(store, root):
    session = root / "plain"
    ship_session(session, store.url("parent"))
    for command in (
        ("datasets", "--tapes", str(session)),
        ("datasets", "prune", "--keep-days", "1", "--tapes", str(session)),
        ("recover", str(session)),
        ("health", "--tapes", str(session)),
    ):
        error = arbl2(*command).exception
        assert isinstance(error, ConfigError), command
        assert str(error).endswith(f": {root}")
    assert not (session / LOCK_FILE).exists()
    far = arbl2("datasets", "--tapes", store.url("parent/plain")).exception
    assert str(far).endswith(f": {store.url('parent')}")


def test_without_recordings_it_says_how_to_make_one(tmp_path):
    assert "`arbl2 demo` shows the whole way" in arbl2("datasets", "--tapes", str(tmp_path)).stdout
    assert json.loads(arbl2("datasets", "--tapes", str(tmp_path), "--json").stdout) == []


@pytest.mark.parametrize("limits", [(), ("--only-shipped",), ("--keep-gib", "nan"), ("--keep-gib", "0")])
def test_a_prune_without_a_limit_is_refused(root, limits):
    assert isinstance(arbl2("datasets", "prune", "--tapes", str(root), *limits).exception, ConfigError)


def test_a_session_without_its_recorder_is_called_killed(root):
    save_manifest(root / "plain", manifest("plain", state="recording", segments=load_manifest(root / "plain").segments))

    def state():
        return json.loads(arbl2("datasets", "--tapes", str(root), "--json").stdout)[0]["state"]

    assert state() == "killed"
    with RootLock(root):
        assert state() == "recording"
    verified = arbl2("datasets", "verify", "--tapes", str(root))
    assert "the log was not read" in verified.stdout
    assert verified.exit_code == 0


def test_the_list_fits_80_columns(root):
    name = "20260102T000000Z-1a2b"
    market().write(root / name, name)
    market().write(root / "ill", "ill")
    (root / "ill" / MANIFEST).write_text("{")
    (root / "plain" / SEGMENTS / "000001.parquet").unlink()
    found = datasets(root)
    console = Console(file=io.StringIO(), width=80)
    console.print(DatasetTable(found, "tapes"))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    assert re.search(rf"{name} sealed 0:00:00 binance \d, 12 - .* KiB local", text)
    assert "start" not in text
    assert "plain: segments/000001.parquet is missing. Restore it" in text
    assert re.search(r"ill: .*cannot be read", text)


def test_gaps_are_a_line_each_with_their_words_below(root):
    at = {"start_seq": 1, "start_recv_ns": 1, "start_mono_ns": 1}
    row = Gap(
        cause=Cause.DIAL_FAILED,
        venue="binance",
        stream="btcusdt@depth20@100ms",
        detail="wss://stream.example/stream?streams=a/b/c/d did not answer",
        **at,
    )
    writer = LedgerWriter(root / "plain", 1, "plain")
    writer.append([row])
    writer.seal()
    shown = io.StringIO()
    Console(file=shown, width=80).print(gap_list("s3://bucket/x?region=y", gap_rows(root / "plain", 9)))
    title, _, line, detail = shown.getvalue().splitlines()
    assert title == "s3://bucket/x: rows of the gap ledger"
    assert re.fullmatch(r"01-01 00:00:00 +\S.* dial_failed +btcusdt@depth20@100ms.*", line)
    assert detail.endswith("wss://stream.example/stream did not answer")


def test_the_commands(store, root, monkeypatch):
    monkeypatch.chdir(root.parent)
    writer = LedgerWriter(root / "plain", 1, "plain")
    writer.append([Gap(cause=Cause.DISCONNECT, venue="upbit", conn=1, start_seq=1, start_recv_ns=1, start_mono_ns=1)])
    writer.seal()
    url = store.url("commands")
    for step, expected in (
        (("datasets",), "plain"),
        (("datasets", "verify"), "whole"),
        (("datasets", "ship", url, "--delete-local"), "whole"),
        (("datasets", "list", "--tapes", url), "remote"),
        (("datasets", "verify", "plain"), "not read: segments are at"),
        (("datasets", "verify", "plain", "--copies"), "whole"),
        (("datasets", "--tapes", url, "gaps"), "disconnect"),
        (("datasets", "prune", "--keep-days", "1"), "nothing to delete"),
    ):
        done = arbl2(*step)
        assert (done.exception, done.stderr) == (None, ""), step
        assert expected in done.stdout
    [listed] = json.loads(arbl2("datasets", "--json").stdout)
    assert (listed["kept"], listed["gaps"], listed["messages"]) == (REMOTE, 1, 12)
    assert json.loads(arbl2("replay", store.url("commands/plain"), "--json").stdout)["frames"] == 12
    refused = arbl2("replay", "tapes/plain").exception
    assert isinstance(refused, TapeError)
    assert listed["copy"] in str(refused)


def test_what_fails_has_an_exit_code(store, root, monkeypatch):
    monkeypatch.chdir(root.parent)
    shutil.copytree(root / "plain", root / "bent")
    path = root / "bent" / SEGMENTS / "000001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    for step, code in (
        (("datasets", "verify"), 3),
        (("datasets", "verify", "nothing"), 3),
        (("datasets", "ship", store.url("x", bucket="none"), "plain"), 5),
        (("datasets", "ship", "foo://x", "plain"), 2),
        (("datasets", "prune", "--keep-days", "0"), 2),
    ):
        error = arbl2(*step).exception
        assert isinstance(error, Arbl2Error), step
        assert error.exit_code == code, step
