"""Foreign captures become tapes: counts, bytes, stamps, and what is said about each kind of damage."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.frames import BINANCE, UPBIT, Frame, FrameKind, Op
from arbl2.tape import TapeReader, load_manifest, sessions, sha256_of
from arbl2_replay import importer
from arbl2_replay.importer import ImportResult, import_capture

DATA = Path(__file__).parents[2].parent / "shared" / "data"
T0 = 1_723_161_253_937_085_768


def real(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the real capture {name} is not here (looked in ../shared/data beside the checkout)")
    return path


def frames_of(result: ImportResult) -> list[Frame]:
    reader = TapeReader(result.path)
    reader.verify_hashes()
    return list(reader.frames())


def binance_line(recv_ns: int, body: object) -> bytes:
    return b"%d %s\n" % (recv_ns, json.dumps(body, separators=(",", ":")).encode())


def trade(recv_ns: int, symbol: str = "BTCUSDT") -> bytes:
    stream = f"{symbol.lower()}@trade"
    return binance_line(recv_ns, {"stream": stream, "data": {"e": "trade", "s": symbol, "p": "1.0"}})


def upbit_line(recv_ns: int, kind: str, op: str | None, raw: str | None, conn: str = "upbit-1") -> bytes:
    row = {"recv_ns": recv_ns, "conn": conn, "kind": kind, "op": op, "raw": raw}
    return json.dumps(row).encode() + b"\n"


def write(tmp_path: Path, body: bytes, name: str = "capture") -> Path:
    path = tmp_path / name
    path.write_bytes(body)
    return path


# the real captures


def test_real_upbit_capture(tmp_path: Path) -> None:
    source = real("upbit_frames_first10s.jsonl")
    result = import_capture(source, tmp_path)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    frames = frames_of(result)
    assert result.counts == {"upbit.message": 122, "upbit.opened": 1, "upbit.sent": 1}
    assert (result.malformed, result.torn_bytes) == (0, None)
    assert len(frames) == len(rows) == 124
    for frame, row in zip(frames, rows, strict=True):
        expected = row["raw"] if row["kind"] != "open" else f'{{"url":"{row["raw"]}"}}'
        assert frame.payload == expected.encode()
        assert frame.recv_ns == row["recv_ns"]
        assert (frame.venue, frame.conn) == ("upbit", 1)
        assert frame.op == {None: Op.NONE, "text": Op.TEXT, "binary": Op.BINARY}[row["op"]]
    books = [json.loads(f.payload) for f in frames if f.payload.startswith(b'{"ty":"orderbook"')]
    trades = [f for f in frames if f.payload.startswith(b'{"ty":"trade"')]
    assert (len(books), len(trades)) == (46, 76)
    assert result.instruments == {"upbit": sorted({book["cd"] for book in books})}


def test_real_binance_capture(tmp_path: Path) -> None:
    source = real("binance_spot_btcusdt_first30s.txt.gz")
    result = import_capture(source, tmp_path)
    lines = gzip.decompress(source.read_bytes()).splitlines()
    frames = frames_of(result)
    assert result.counts == {"binance.message": 3_278, "binance.response": 1}
    assert (result.malformed, result.torn_bytes) == (0, None)
    assert len(frames) == len(lines) == 3_279
    for frame, line in zip(frames, lines, strict=True):
        assert b"%d %s" % (frame.recv_ns, frame.payload) == line
    streams = [json.loads(f.payload).get("stream") for f in frames]
    counted = {name: streams.count(name) for name in set(streams)}
    assert counted == {"btcusdt@depth@100ms": 299, "btcusdt@bookTicker": 2_432, "btcusdt@trade": 547, None: 1}
    rest = frames[7]
    assert (rest.kind, rest.conn, rest.op) == (FrameKind.RESPONSE, 0, Op.TEXT)
    book = json.loads(rest.payload)
    assert (len(book["bids"]), len(book["asks"])) == (1_000, 1_000)
    assert result.instruments == {"binance": ["BTCUSDT"]}


def test_real_partial_depth_capture(tmp_path: Path) -> None:
    source = real("binance_spot_btcusdt_depth20_first60s.txt.gz")
    result = import_capture(source, tmp_path)
    lines = gzip.decompress(source.read_bytes()).splitlines()
    assert result.counts == {"binance.message": 600}
    assert [b"%d %s" % (f.recv_ns, f.payload) for f in frames_of(result)] == lines
    assert {f.conn for f in frames_of(result)} == {1}


def test_a_real_gzip_cut_anywhere_gives_a_prefix_of_the_whole(tmp_path: Path) -> None:
    packed = real("binance_spot_btcusdt_depth20_first60s.txt.gz").read_bytes()
    lines = gzip.decompress(packed).splitlines()
    for cut in (len(packed) // 7, len(packed) // 2, len(packed) - 1):
        result = import_capture(write(tmp_path, packed[:cut]), tmp_path, session=f"cut-{cut}")
        found = [b"%d %s" % (f.recv_ns, f.payload) for f in frames_of(result)]
        assert found == lines[: len(found)]
        assert found
        assert result.torn_bytes is not None
        assert result.malformed == 0
        assert any("torn" in note for note in result.notes)


# what a tape says


def test_manifest_says_where_the_tape_comes_from(tmp_path: Path) -> None:
    source = write(tmp_path, trade(T0) + trade(T0 + 1, "ADAUSDT"), name="my capture.log")
    result = import_capture(source, tmp_path / "tapes")
    manifest = load_manifest(result.path)
    assert (manifest.rows, manifest.counts) == (result.frames, result.counts) == (2, {"binance.message": 2})
    assert manifest.notes == result.notes
    assert manifest.state == "imported"
    assert manifest.session == result.path.name == "20240808T235413Z-my-capture"
    assert (manifest.anchor.wall_ns, manifest.anchor.mono_ns) == (T0, T0)
    assert manifest.instruments == {"binance": ["ADAUSDT", "BTCUSDT"]}
    notes = "\n".join(manifest.notes)
    assert "my capture.log" in notes
    assert sha256_of(source) in notes
    assert str(tmp_path) not in notes
    assert "unknown: " in notes
    assert "torn" not in notes
    assert "could not be read" not in notes
    assert sessions(tmp_path / "tapes") == [result.path]


def test_engine_time_never_steps_back_and_the_stamps_are_kept(tmp_path: Path) -> None:
    stamps = [T0, T0 + 5, T0 + 3, T0 - 9, T0 + 5, T0 + 6]
    result = import_capture(write(tmp_path, b"".join(map(trade, stamps))), tmp_path)
    blocks = list(TapeReader(result.path).blocks())
    frames = frames_of(result)
    assert [f.recv_ns for f in frames] == stamps
    assert [f.mono_ns for f in frames] == [T0, T0 + 5, T0 + 5, T0 + 5, T0 + 5, T0 + 6]
    assert blocks[0].time_ns.tolist() == [f.mono_ns for f in frames]
    assert [f.seq for f in frames] == [1, 2, 3, 4, 5, 6]
    assert any("in 2 frames" in note for note in result.notes)


def test_the_form_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    plain = write(tmp_path, trade(T0), name="a.gz")
    packed = write(tmp_path, gzip.compress(trade(T0)), name="a.jsonl")
    upbit = write(tmp_path, upbit_line(T0, "recv", "binary", '{"type":"orderbook","code":"KRW-BTC"}', "c"), "b.txt")
    assert import_capture(plain, tmp_path, session="one").counts == {"binance.message": 1}
    assert import_capture(packed, tmp_path, session="two").counts == {"binance.message": 1}
    assert import_capture(upbit, tmp_path, session="three").instruments == {"upbit": ["KRW-BTC"]}


def test_upbit_events_and_connections(tmp_path: Path) -> None:
    book = '{"type":"orderbook","code":"KRW-XRP","x":"\u20a9"}'
    body = b"".join(
        [
            upbit_line(T0, "open", None, "wss://api.upbit.com/websocket/v1", "upbit-7"),
            upbit_line(T0 + 1, "send", "text", '[{"ticket":"t"}]', "upbit-7"),
            upbit_line(T0 + 2, "open", None, "wss://api.upbit.com/websocket/v1", "upbit-9"),
            upbit_line(T0 + 3, "recv", "binary", book, "upbit-9"),
            upbit_line(T0 + 4, "recv", "text", '{"status":"UP"}', "upbit-7"),
            upbit_line(T0 + 5, "recv", "binary", '{"type":"trade","code":"KRW-ETH"}', "upbit-7"),
            upbit_line(T0 + 6, "close", None, 'lost "it"', "upbit-7"),
            upbit_line(T0 + 7, "close", None, None, "upbit-9"),
        ]
    )
    result = import_capture(write(tmp_path, body), tmp_path)
    frames = frames_of(result)
    assert [(f.kind.name, f.op.name, f.conn) for f in frames] == [
        ("OPENED", "NONE", 1),
        ("SENT", "TEXT", 1),
        ("OPENED", "NONE", 2),
        ("MESSAGE", "BINARY", 2),
        ("MESSAGE", "TEXT", 1),
        ("MESSAGE", "BINARY", 1),
        ("CLOSED", "NONE", 1),
        ("CLOSED", "NONE", 2),
    ]
    assert frames[0].payload == b'{"url":"wss://api.upbit.com/websocket/v1"}'
    assert frames[3].payload == book.encode()
    assert json.loads(frames[6].payload) == {"code": None, "reason": 'lost "it"', "clean": None}
    assert result.instruments == {"upbit": ["KRW-XRP"]}
    block = next(TapeReader(result.path).blocks())
    assert set(block.venue.tolist()) == {UPBIT}


def test_binance_messages_of_any_shape_are_messages(tmp_path: Path) -> None:
    bodies: list[object] = [
        {"result": None, "id": 1},
        [{"e": "24hrTicker", "s": "ETHUSDT"}],
        {"stream": "!miniTicker@arr", "data": []},
        {"stream": "solusdt@depth20@100ms", "data": {"lastUpdateId": 7, "bids": [], "asks": []}},
        {"e": "trade", "s": "XRPUSDT"},
        {"e": "depthUpdate", "s": "XRPUSDT", "lastUpdateId": 7, "bids": [], "asks": []},
        {"lastUpdateId": 7, "bids": []},
        {"lastUpdateId": 7, "bids": [], "asks": []},
    ]
    body = b"".join(binance_line(T0 + i, item) for i, item in enumerate(bodies))
    result = import_capture(write(tmp_path, body), tmp_path)
    frames = frames_of(result)
    assert [f.kind for f in frames] == [FrameKind.MESSAGE] * 7 + [FrameKind.RESPONSE]
    assert [json.loads(f.payload) for f in frames] == bodies
    assert result.instruments == {"binance": ["SOLUSDT", "XRPUSDT"]}
    block = next(TapeReader(result.path).blocks())
    assert set(block.venue.tolist()) == {BINANCE}


def test_a_file_name_that_is_no_text_does_not_stop_the_import(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xff capture")
    source.write_bytes(trade(T0))
    result = import_capture(source, tmp_path / "tapes")
    assert r"\udcff capture" in load_manifest(result.path).notes[0]


# damage


BAD_BINANCE_LINES = [
    b"",
    b"garbage",
    b'1723161253937 {"stream":"milliseconds"}',
    b"%d" % T0,
    b"%d " % T0,
    b'9999999999999999999 {"stream":"out of range"}',
    b'%d {"stream":"btcus' % T0,
    b'%d {"stream":"btcusdt@trade"} trailing' % T0,
    b"%d \xff\xfe\x00" % T0,
    b"%d " % T0 + b"[" * 5_000,
]


@pytest.mark.parametrize("bad", BAD_BINANCE_LINES)
def test_a_bad_line_in_the_middle_is_kept_as_an_alarm(tmp_path: Path, bad: bytes) -> None:
    result = import_capture(write(tmp_path, trade(T0) + bad + b"\n" + trade(T0 + 9)), tmp_path)
    first, alarm, last = frames_of(result)
    assert (result.malformed, result.torn_bytes) == (1, None)
    assert (alarm.kind, alarm.payload, alarm.conn, alarm.venue) == (FrameKind.ALARM, bad, 0, "binance")
    assert (alarm.recv_ns, alarm.mono_ns) == (T0, T0)
    assert (first.kind, last.kind) == (FrameKind.MESSAGE, FrameKind.MESSAGE)
    assert any("1 lines could not be read" in note for note in result.notes)


BAD_UPBIT_LINES = [
    b"{}",
    b"[1]",
    upbit_line(T0, "recv", "binary", None)[:-1],
    upbit_line(T0, "recv", "smoke signal", "{}")[:-1],
    upbit_line(T0, "recv", None, "{}")[:-1],
    upbit_line(T0, "whatever", "text", "{}")[:-1],
    upbit_line(T0, "open", None, None)[:-1],
    upbit_line(T0 // 10**6, "recv", "text", "{}")[:-1],
    upbit_line(10**30, "recv", "text", "{}")[:-1],
    upbit_line(T0, "recv", "text", "{}")[:-2] + b',"more":1}',
    upbit_line(T0, "recv", "text", "SURROGATE")[:-1].replace(b"SURROGATE", b"\\ud800"),
    upbit_line(T0, "recv", "text", "BYTES")[:-1].replace(b"BYTES", b"\xff"),
]


@pytest.mark.parametrize("bad", BAD_UPBIT_LINES)
def test_a_bad_upbit_line_is_kept_as_an_alarm(tmp_path: Path, bad: bytes) -> None:
    good = upbit_line(T0, "recv", "binary", '{"ty":"orderbook","cd":"KRW-BTC"}')
    result = import_capture(write(tmp_path, bad + b"\n" + good), tmp_path)
    alarm, message = frames_of(result)
    assert (alarm.kind, alarm.payload, alarm.recv_ns) == (FrameKind.ALARM, bad, T0)
    assert message.kind == FrameKind.MESSAGE
    assert result.malformed == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, pack: type[bytes]) -> None:
    torn = trade(T0 + 2)[:-9]
    result = import_capture(write(tmp_path, pack(trade(T0) + trade(T0 + 1) + torn)), tmp_path)
    assert len(frames_of(result)) == 2
    assert (result.malformed, result.torn_bytes) == (0, len(torn))
    assert any(f"its last {len(torn)} bytes" in note for note in result.notes)


def test_a_whole_last_line_without_newline_is_imported(tmp_path: Path) -> None:
    result = import_capture(write(tmp_path, trade(T0) + trade(T0 + 1)[:-1]), tmp_path)
    assert len(frames_of(result)) == 2
    assert result.torn_bytes is None


def test_a_gzip_without_its_end_says_so_even_if_every_line_is_whole(tmp_path: Path) -> None:
    result = import_capture(write(tmp_path, gzip.compress(trade(T0) + trade(T0 + 1))[:-8]), tmp_path)
    assert len(frames_of(result)) == 2
    assert result.torn_bytes == 0


def test_gzip_members_one_after_another_are_one_capture(tmp_path: Path) -> None:
    body = gzip.compress(trade(T0)) + gzip.compress(trade(T0 + 1))
    assert import_capture(write(tmp_path, body), tmp_path).frames == 2


def test_a_gzip_damaged_inside_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"".join(trade(T0 + i) for i in range(5_000))))
    packed[-8] ^= 1
    with pytest.raises(TapeError, match="damaged inside"):
        import_capture(write(tmp_path, bytes(packed)), tmp_path / "tapes")
    assert list((tmp_path / "tapes").iterdir()) == []


FOREIGN = [
    b"hello\nworld\n",
    b'{"a":1}\n',
    b"PAR1\x00\x01",
    b"\n" * 40 + b"x",
    trade(T0 // 1_000),
    binance_line(T0, {"topic": "orderbook.50.BTCUSDT", "type": "snapshot", "data": {"s": "BTCUSDT"}}),
    upbit_line(T0, "recv", "text", '{"stream":"btcusdt@trade","data":{}}', "binance-3"),
    b"\x1f\x8b\x08\x00garbage",
]


@pytest.mark.parametrize("body", FOREIGN)
def test_a_foreign_file_is_refused_and_leaves_nothing(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(TapeError, match=r"no capture that arbl2 reads|damaged inside|no line"):
        import_capture(write(tmp_path, body), tmp_path / "tapes")
    assert not (tmp_path / "tapes").exists()


@pytest.mark.parametrize("body", [b"", b"\n", gzip.compress(b"", mtime=0), b"\x1f\x8b"])
def test_an_empty_file_is_refused(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(TapeError, match="no line to import"):
        import_capture(write(tmp_path, body), tmp_path)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TapeError, match="cannot be read"):
        import_capture(tmp_path / name, tmp_path)


def test_an_existing_session_is_never_touched(tmp_path: Path) -> None:
    source = write(tmp_path, trade(T0))
    before = import_capture(source, tmp_path).path / "manifest.json"
    stamp = before.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="exists already"):
        import_capture(source, tmp_path)
    assert before.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/x", ".hidden", "a\n", "x" * 101])
def test_a_session_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a session"):
        import_capture(write(tmp_path, trade(T0)), tmp_path, session=name)


def test_a_root_that_is_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    source = write(tmp_path, trade(T0))
    with pytest.raises(StorageError, match="cannot write"):
        import_capture(source, source)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    bomb = trade(T0) + b"%d " % T0 + b"x" * (3 * importer.MAX_LINE_BYTES)
    with pytest.raises(TapeError, match="has a line over"):
        import_capture(write(tmp_path, gzip.compress(bomb)), tmp_path)


def test_names_without_end_do_not_fill_the_memory(tmp_path: Path) -> None:
    body = b"".join(trade(T0, f"C{i}USDT") for i in range(importer.MAX_NAMES + 1))
    with pytest.raises(TapeError, match="instruments or connections"):
        import_capture(write(tmp_path, body), tmp_path / "tapes")
    assert list((tmp_path / "tapes").iterdir()) == []


def test_memory_does_not_depend_on_the_length(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        with gzip.open(tmp_path / f"{lines}.gz", "wb", compresslevel=1) as file:
            for i in range(lines):
                file.write(trade(T0 + i))
        tracemalloc.start()
        try:
            import_capture(tmp_path / f"{lines}.gz", tmp_path, session=f"s{lines}")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short, long = peak(10_000), peak(50_000)
    assert long < 1.2 * short


# any capture


stamps = st.integers(10**18, 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=5
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(stamps, values), max_size=6))
@example([(2**63 - 1, {"s": 5, "e": [], "stream": None}), (10**18, {"lastUpdateId": "x", "bids": 1, "asks": 2})])
def test_every_stamped_line_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, object]]) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    lines = [trade(T0), *(binance_line(recv_ns, body) for recv_ns, body in rows)]
    result = import_capture(write(tmp_path, b"".join(lines)), tmp_path)
    assert [b"%d %s\n" % (f.recv_ns, f.payload) for f in frames_of(result)] == lines
    assert result.malformed == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(stamps, st.sampled_from(["recv", "send"]), st.sampled_from(["text", "binary"]), text), max_size=6))
def test_every_upbit_row_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, str, str]]) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    start = (T0, "open", None, "wss://api.upbit.com/websocket/v1")
    body = b"".join(upbit_line(*row) for row in [start, *rows])
    result = import_capture(write(tmp_path, body), tmp_path)
    kinds = {FrameKind.MESSAGE: "recv", FrameKind.SENT: "send"}
    found = [(f.recv_ns, kinds[f.kind], f.op.name.lower(), f.payload.decode()) for f in frames_of(result)[1:]]
    assert found == rows


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_after_a_good_line_are_kept_or_said(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, packed: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    body = trade(T0) + noise
    result = import_capture(write(tmp_path, gzip.compress(body) if packed else body), tmp_path)
    back = trade(T0) + b"".join(f.payload + b"\n" for f in frames_of(result)[1:] if f.kind == FrameKind.ALARM)
    left_out = result.torn_bytes or 0
    assert len(frames_of(result)) == 1 + noise.count(b"\n")
    assert back == body[: len(body) - left_out]
