"""Recordings that do not hold what they say are refused before a frame of them is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbl2.errors import TapeError
from arbl2.frames import COLUMNS, VENUES, Anchor, Frame, FrameBlock, FrameKind, Op
from arbl2.tape import (
    MANIFEST,
    MAX_GROUP_ROWS,
    SCHEMA,
    SEGMENTS,
    Manifest,
    SegmentWriter,
    TapeReader,
    find_session,
    load_manifest,
    save_manifest,
    sessions,
    sha256_of,
)
from arbl2_replay import replay
from arbl2_replay.wire import upbit_orderbook
from markets import ANCHOR, INSTRUMENTS, Market, book, manifest


def market():
    """Four rounds of three books."""
    found = Market()
    for ms in range(0, 800, 200):
        found.premium(ms)
    return found


def edit(folder, **fields):
    """Change the manifest of a recording behind its back."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def segments(folder):
    return json.loads((folder / MANIFEST).read_text())["segments"]


def write_in_parts(folder, *parts, state="sealed", session="market"):
    """One segment for each part."""
    entries = []
    for number, frames in enumerate(parts, start=1):
        writer = SegmentWriter(folder, number, session, ANCHOR)
        for frame in frames:
            writer.append(frame)
        entries.append(writer.seal())
    save_manifest(folder, manifest(session, state=state, segments=entries))
    return folder


def read(folder):
    """Sequence numbers of every frame."""
    reader = TapeReader(folder)
    reader.verify_hashes()
    return [frame.seq for frame in reader.frames()]


# ------------------------------------------------------------------------------------------------------- names and clocks


NAMES = [
    "../evil",
    "../../evil",
    "a/b",
    "/etc",
    "a\0b",
    "x" * 300,
    "x" * 101,
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "a b",
    "수",
    "a\n",
]


@pytest.mark.parametrize("session", NAMES)
def test_a_session_name_that_is_no_folder_name_is_refused(tmp_path, session):
    folder = market().write(tmp_path / "tape")
    edit(folder, session=session)
    with pytest.raises(TapeError, match="session name"):
        load_manifest(folder)
    with pytest.raises(TapeError, match="session name"):
        replay(folder, out=tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tape"]


@pytest.mark.parametrize("session", ["x", "X" * 100, "20261121T130000Z-ab12", "my.tape_2"])
def test_a_session_name_that_is_one_is_taken(tmp_path, session):
    assert read(market().write(tmp_path / "tape", session)) == list(range(1, 13))


@pytest.mark.parametrize(
    "fields",
    [
        {"session": "other"},
        {"anchor_wall_ns": ANCHOR.wall_ns + 1},
        {"anchor_wall_ns": ANCHOR.wall_ns + 3_600 * 10**9},
        {"anchor_mono_ns": ANCHOR.mono_ns - 1},
    ],
)
def test_a_manifest_and_a_segment_that_contradict_each_other_are_refused(tmp_path, fields):
    folder = edit(market().write(tmp_path / "tape"), **fields)
    with pytest.raises(TapeError, match=r"000001\.parquet belongs to another session, or another clock"):
        read(folder)
    with pytest.raises(TapeError, match="another session"):
        replay(folder)


def test_a_segment_of_another_session_is_refused(tmp_path):
    mine, other = market().write(tmp_path / "mine", "mine"), market().write(tmp_path / "other", "other")
    (mine / SEGMENTS / "000001.parquet").write_bytes((other / SEGMENTS / "000001.parquet").read_bytes())
    edit(mine, segments=segments(other))
    with pytest.raises(TapeError, match="another session"):
        read(mine)


@pytest.mark.parametrize(
    "fields",
    [
        {"anchor_wall_ns": 10**30},
        {"anchor_wall_ns": 2**62},
        {"anchor_wall_ns": -1},
        {"anchor_mono_ns": 2**63 - 1},
        {"anchor_mono_ns": -(2**63)},
    ],
)
def test_a_clock_anchor_beyond_any_clock_is_refused(tmp_path, fields):
    folder = edit(market().write(tmp_path / "tape"), **fields)
    with pytest.raises(TapeError, match=MANIFEST):
        load_manifest(folder)


@pytest.mark.parametrize("name", ["../../evil.parquet", "/etc/passwd", "a/b", "..", ""])
def test_a_segment_outside_its_folder_is_refused(tmp_path, name):
    folder = market().write(tmp_path / "tape")
    edit(folder, segments=[{**segments(folder)[0], "file": name}])
    with pytest.raises(TapeError):
        TapeReader(folder)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"\xff"', b"[" * 100_000, b'{"tape_version":1}', b'{"tape_version":9}']
)
def test_a_manifest_that_is_none_is_refused(tmp_path, body):
    folder = market().write(tmp_path / "tape")
    (folder / MANIFEST).write_bytes(body)
    with pytest.raises(TapeError, match=MANIFEST):
        load_manifest(folder)


def test_a_newer_version_is_named(tmp_path):
    folder = edit(market().write(tmp_path / "tape"), tape_version=2)
    with pytest.raises(TapeError, match="version 2; this arbl2 reads version 1"):
        load_manifest(folder)


# -------------------------------------------------------------------------------------------------------------- holes


def parts():
    frames = market().frames
    return frames[:4], frames[4:8], frames[8:]


@pytest.mark.parametrize(
    ("gone", "seqs", "lacking"),
    [(0, [*range(5, 13)], "1 to 4"), (1, [*range(1, 5), *range(9, 13)], "5 to 8")],
)
def test_a_segment_taken_out_of_the_manifest_is_a_hole(tmp_path, gone, seqs, lacking):
    folder = write_in_parts(tmp_path / "tape", *parts())
    assert read(folder) == list(range(1, 13))
    edit(folder, segments=[entry for k, entry in enumerate(segments(folder)) if k != gone])
    for state in ("sealed", "imported", "recording"):
        with pytest.raises(TapeError, match=f"no segment with frames {lacking}"):
            TapeReader(edit(folder, state=state))
    assert read(edit(folder, state="recovered")) == seqs


def test_segments_in_the_wrong_order_are_refused_even_of_a_recovered_session(tmp_path):
    folder = write_in_parts(tmp_path / "tape", *parts())
    edit(folder, segments=segments(folder)[::-1], state="recovered")
    with pytest.raises(TapeError, match="lists no segment"):
        TapeReader(folder)


def test_a_hole_inside_a_segment_is_refused_unless_recovered(tmp_path):
    frames = market().frames
    folder = write_in_parts(tmp_path / "tape", frames[:4] + frames[6:])
    with pytest.raises(TapeError, match="lacks frames"):
        read(folder)
    assert read(edit(folder, state="recovered")) == [*range(1, 5), *range(7, 13)]


def test_frames_in_the_wrong_order_are_refused(tmp_path):
    frames = market().frames
    folder = write_in_parts(tmp_path / "tape", [frames[1], frames[0], *frames[2:]])
    for state in ("sealed", "recovered"):
        edit(folder, state=state, segments=[{**segments(folder)[0], "first_seq": 1}])
        with pytest.raises(TapeError, match="wrong order"):
            read(folder)


@pytest.mark.parametrize("fields", [{"rows": 11}, {"rows": 13}, {"last_seq": 11}, {"last_seq": 13}])
def test_a_segment_that_holds_other_frames_than_stated_is_refused(tmp_path, fields):
    folder = market().write(tmp_path / "tape")
    edit(folder, segments=[{**segments(folder)[0], **fields}])
    with pytest.raises(TapeError, match="other frames than its manifest says"):
        read(folder)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_changed_byte_is_found(tmp_path, at):
    folder = market().write(tmp_path / "tape")
    path = folder / SEGMENTS / "000001.parquet"
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(body)
    with pytest.raises(TapeError, match=r"000001\.parquet does not match its manifest"):
        read(folder)
    with pytest.raises(TapeError, match=r"000001\.parquet"):
        replay(folder)


def test_a_cut_or_missing_segment_is_named(tmp_path):
    folder = market().write(tmp_path / "tape")
    path = folder / SEGMENTS / "000001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TapeError, match=r"000001\.parquet has .* bytes, the manifest says"):
        TapeReader(folder)
    path.unlink()
    with pytest.raises(TapeError, match=r"000001\.parquet is missing"):
        TapeReader(folder)


@pytest.mark.parametrize("segments_kept", [True, False])
def test_a_session_being_recorded_is_not_replayed(tmp_path, segments_kept):
    """What is sealed of it is only a part: all or most of it may still stand in its log."""
    folder = market().write(tmp_path / "tapes" / "market")
    edit(folder, state="recording", **({} if segments_kept else {"segments": []}))
    with pytest.raises(TapeError, match=rf"arbl2 recover {tmp_path / 'tapes'}"):
        replay(folder)


def test_a_recovered_or_imported_session_is_replayed(tmp_path):
    digests = {replay(market().write(tmp_path / state, state=state)).digest for state in ("sealed", "recovered", "imported")}
    assert len(digests) == 1


# ------------------------------------------------------------------------------------------------- foreign Parquet files


def foreign(folder, rows, payload, **options):
    """A segment of ``rows`` frames with one and the same payload, written by other means than arbl2's."""
    metadata = pq.read_schema(market().write(folder) / SEGMENTS / "000001.parquet").metadata
    word = pa.dictionary(pa.int8(), pa.string())
    columns = [
        pa.array(range(1, rows + 1), pa.int64()),
        *[pa.array([0], pa.int64()).take(pa.array([0] * rows, pa.int8()))] * 2,
        pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array(["upbit"])).cast(word),
        pa.array([1], pa.int32()).take(pa.array([0] * rows, pa.int8())),
        pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array(["message"])).cast(word),
        pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array(["text"])).cast(word),
        pa.array([0], pa.int32()).take(pa.array([0] * rows, pa.int8())),
        pa.array([0], pa.uint8()).take(pa.array([0] * rows, pa.int8())),
        pa.array([payload], pa.binary()).take(pa.array([0] * rows, pa.int8())),
    ]
    path = folder / SEGMENTS / "000001.parquet"
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
    pq.write_table(table, path, compression="zstd", row_group_size=rows, **options)
    entry = {**segments(folder)[0], "rows": rows, "last_seq": rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return edit(folder, segments=[entry])


PEAK = """
import sys
from pathlib import Path
import pyarrow as pa
from arbl2.errors import TapeError
from arbl2.tape import TapeReader
try:
    rows = sum(len(block) for block in TapeReader(Path(sys.argv[1])).blocks())
except TapeError as error:
    rows = str(error)
print(pa.default_memory_pool().max_memory(), rows)
"""


def peak(folder):
    """(bytes that reading took at most, what came of it), of a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    most, _, rest = done.stdout.partition(" ")
    return int(most), rest


def test_payloads_by_reference_are_refused_with_little_memory(tmp_path):
    """48 rows that refer to one payload of 1 MiB: a small file that would take 48 MiB, or as much as its author likes."""
    folder = foreign(tmp_path / "tape", 48, b"x" * 2**20, use_dictionary=True, dictionary_pagesize_limit=2**22)
    assert segments(folder)[0]["bytes"] < 2**20
    most, said = peak(folder)
    assert "row group 0 was not written by arbl2" in said
    assert "payloads by reference" in said
    assert most < 4 * 2**20


def test_too_many_rows_in_a_group_are_refused_with_little_memory(tmp_path):
    folder = foreign(tmp_path / "tape", MAX_GROUP_ROWS + 1, b"", use_dictionary=["venue", "kind", "op"])
    assert segments(folder)[0]["bytes"] < 8 * 2**20
    most, said = peak(folder)
    assert "1,048,577 rows" in said
    assert most < 4 * 2**20


def test_a_group_that_arbl2_may_have_written_is_read(tmp_path):
    folder = foreign(tmp_path / "tape", 48, b"x" * 1_000, use_dictionary=["venue", "kind", "op"])
    most, said = peak(folder)
    assert (said.strip(), most > 48_000) == ("48", True)


def test_other_columns_are_refused(tmp_path):
    folder = market().write(tmp_path / "tape")
    path = folder / SEGMENTS / "000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["op"]), path)
    edit(folder, segments=[{**segments(folder)[0], "bytes": path.stat().st_size, "sha256": sha256_of(path)}])
    with pytest.raises(TapeError, match="other columns"):
        read(folder)


# ------------------------------------------------------------------------------------------------------ choosing a session


def test_the_newest_recording_is_the_one_written_last(tmp_path):
    """Names say nothing: a synthetic or imported session need not begin with a date."""
    folders = [market().write(tmp_path / name, name) for name in ("20261231T000000Z-bbbb", "foo", "20200101T000000Z-aaaa", "bar")]
    for age, folder in enumerate(reversed(folders)):
        stamp = 1_700_000_000 - age
        os.utime(folder / MANIFEST, (stamp, stamp))
    assert sessions(tmp_path) == folders
    assert find_session(None, tmp_path).name == "bar"
    os.utime(folders[1] / MANIFEST, (1_800_000_000, 1_800_000_000))
    assert find_session(None, tmp_path).name == "foo"
    assert find_session(tmp_path, tmp_path / "elsewhere").name == "foo"
    assert find_session(folders[0], tmp_path) == folders[0]


def test_manifests_of_one_instant_are_told_by_name(tmp_path):
    folders = [market().write(tmp_path / name, name) for name in ("b", "a")]
    for folder in folders:
        os.utime(folder / MANIFEST, ns=(10**18, 10**18))
    assert sessions(tmp_path) == folders[::-1]


def test_what_is_no_recording_is_not_chosen(tmp_path):
    (tmp_path / "notes").mkdir()
    for tape in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(TapeError, match="there is no recording"):
            find_session(tape, tmp_path)
    with pytest.raises(TapeError, match="not a recording"):
        TapeReader(tmp_path / "notes")


# ---------------------------------------------------------------------------------------------------------- other alphabets


@pytest.mark.parametrize("code", ["KRW-수", "KRW-é", "KRW-币安人生", "KRW-", "", "KRW-" + "X" * 500])
def test_codes_of_any_alphabet_replay(tmp_path, code):
    plain = replay(market().write(tmp_path / "plain"))
    names = {"upbit": [*INSTRUMENTS["upbit"], code], "binance": [*INSTRUMENTS["binance"], code.removeprefix("KRW-") + "USDT"]}
    tape = market()
    tape.add(
        900,
        "upbit",
        FrameKind.MESSAGE,
        upbit_orderbook("KRW-BTC", book([(1, 1)], [(2, 1)]), 1).replace(b"KRW-BTC", code.encode()),
    )
    for scanner in (True, False):
        result = replay(tape.write(tmp_path / f"tape-{scanner}", instruments=names), scanner=scanner)
        updates = {(row["venue"], row["instrument"]): row["updates"] for row in result.books}
        assert updates["upbit", code] == 1
        assert result.kpi["decisions"] == plain.kpi["decisions"] > 0


def test_every_frame_comes_back_as_it_was(tmp_path):
    """All kinds and forms, empty payloads, bytes that are no text, stamps that step back, connections beyond 16 bits."""
    frames = [
        replace(
            frame,
            kind=list(FrameKind)[k % len(FrameKind)],
            op=list(Op)[k % len(Op)],
            venue=("", "upbit", "binance")[k % 3],
            conn=(0, 1, 2**31 - 1)[k % 3],
            recv_ns=frame.recv_ns - 10**9 * (k % 2),
            payload=(b"", b"\xff\0\n", frame.payload)[k % 3],
        )
        for k, frame in enumerate(market().frames)
    ]
    folder = write_in_parts(tmp_path / "tape", frames[:5], frames[5:])
    assert list(TapeReader(folder).frames()) == frames


def test_a_manifest_comes_back_as_it_was(tmp_path):
    said = manifest("s", notes=["수"], counts={"upbit.message": 3}, versions={"arbl2": "0.1"}, endpoints={"upbit": "wss://x"})
    save_manifest(tmp_path, said)
    assert load_manifest(tmp_path) == said
    assert load_manifest(tmp_path).anchor == Anchor(ANCHOR.wall_ns, ANCHOR.mono_ns)
    assert msgspec.json.decode((tmp_path / MANIFEST).read_bytes(), type=Manifest) == said
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_block_of_frames_has_their_columns():
    anchor = Anchor(10**18, 77)
    frames = [
        Frame(5, 10**18 + 3, 80, "upbit", 2, FrameKind.MESSAGE, Op.BINARY, b"abc", 9, 1),
        Frame(6, 10**18 + 1, 81, "", 0, FrameKind.CLOCK, Op.NONE, b""),
        Frame(7, 10**18 + 2, 2**62, "binance", 2**20, FrameKind.ALARM, Op.NONE, "한".encode()),
    ]
    for some in (frames, frames[1:2], []):
        block = FrameBlock.from_frames(some, anchor)
        assert [block.frame(i) for i in range(len(block))] == some
        assert block.time_ns.tolist() == [anchor.time_ns(frame.mono_ns) for frame in some]
        columns = (block.seq, block.time_ns, block.conn, block.queue_us, block.venue, block.offsets)
        assert [column.dtype.name for column in columns] == ["int64", "int64", "int32", "int32", "uint8", "int32"]
        again = FrameBlock.from_heads(block.heads(), block.data.tobytes(), anchor)
        assert [again.frame(i) for i in range(len(again))] == some
        columns = {name: getattr(block, name) for name in (*COLUMNS, "offsets", "data")}
        for same in (again, FrameBlock(**columns), replace(again, seq=again.seq)):
            assert same.heads().tobytes() == block.heads().tobytes()
            assert same.kinds() == bytes(int(frame.kind) for frame in some)
            assert same.venues() == bytes(VENUES.index(frame.venue) for frame in some)
            assert same.payloads() == b"".join(frame.payload for frame in some)


def test_a_block_has_no_other_columns():
    with pytest.raises(AttributeError, match="size"):
        _ = FrameBlock.from_frames([], ANCHOR).size
