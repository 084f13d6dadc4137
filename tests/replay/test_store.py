"""The decoded store: the run is the same as from the raw bytes, whatever the tape, and what is damaged is never believed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.errors import EngineError, StorageError, TapeError
from arbl2.frames import BINANCE, UPBIT, Frame, FrameBlock, FrameKind, Op
from arbl2.tape import MANIFEST, SEGMENTS, TapeReader, load_manifest, save_manifest, sha256_of
from arbl2.updates import HOME_LEVELS, MAX_BLOCK, MAX_CHANGES, MAX_LEVELS, UpdateBlock, What
from arbl2_replay import replay, store_build, store_format
from arbl2_replay.reading import open_reading
from arbl2_replay.store import build_session, find_store, make_store
from arbl2_replay.store_format import (
    DECODED,
    LEVELS_AT_ONCE,
    MAX_SLICE_LEVELS,
    Files,
    Kept,
    Stamp,
    instrument_names,
    load_index,
    save_index,
)
from arbl2_replay.store_read import read_slices
from arbl2_replay.wire import Book, DepthChange, binance_combined, binance_depth, binance_diff
from markets import ANCHOR, INSTRUMENTS, Market, threshold
from properties import soup as soups
from properties.effort import EFFORT, examples
from properties.wild import BINANCE_BOOKS, UPBIT_BOOKS, any_bytes, mutated
from tapes import tape_of

pytest_plugins = ("object_store",)

CONFIG = threshold()
WILD = {"upbit": list(UPBIT_BOOKS), "binance": list(BINANCE_BOOKS)}
SEGMENT = "000001.parquet"
PARTS = ("000001.rows.parquet", "000001.levels.parquet", "000001.index")
seeds = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tapes")


@pytest.fixture(scope="module", autouse=True)
def small_slices():
    """So that short tapes have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_build, "SLICE_ROWS", 50)
        yield


def market(rounds=40):
    found = Market()
    for ms in range(0, rounds * 200, 200):
        found.premium(ms)
    return found


@pytest.fixture
def tape(tmp_path):
    return market().write(tmp_path / "tape")


def used(result):
    return result.reading["decoded_segments"], result.reading["raw_segments"]


def wild_frames(seed, count=300):
    """Anything the venues might send or the recorder might write down, good and bad."""
    rng = Random(seed)
    frames, mono_ns = [], 0
    for seq in range(1, count + 1):
        mono_ns += rng.choice((0, 1, 10**6, 10**8, -(10**6)))
        venue = rng.choice((UPBIT, BINANCE))
        kind, payload = FrameKind.MESSAGE, any_bytes(rng, venue)
        if rng.random() < 0.3:
            payload = mutated(rng, payload)
        if rng.random() < 0.1:
            kind = rng.choice((*FrameKind,))
            payload = rng.choice(
                (
                    payload,
                    b"{}",
                    b'{"alarm":"dropped"}',
                    b'{"covered":true}',
                    b'{"symbols":[]}',
                    b'{"url":"/api/v3/depth?symbol=BTCUSDT"}',
                )
            )
        name = rng.choice(("", "upbit", "binance")) if kind is FrameKind.CLOCK else ("upbit", "binance")[venue - UPBIT]
        frames.append(Frame(seq, mono_ns, mono_ns, name, rng.choice((1, 2, 3)), kind, Op.TEXT, payload))
    return frames


# ------------------------------------------------------------------------------------------- the same run, whatever the tape


def same_digests(tape, config, **options):
    raw = replay(tape, config, decoded=False, **options)
    decoded = replay(tape, config, decoded=True, **options)
    assert raw.reading["decoded_segments"] == decoded.reading["raw_segments"] == 0
    assert decoded.reading["decoded_segments"] > 0
    assert (decoded.digest, decoded.reasons, decoded.alarms) == (raw.digest, raw.reasons, raw.alarms)
    assert (decoded.frames, decoded.tape_s) == (raw.frames, raw.tape_s)


@given(seed=seeds)
@examples(6)
def test_random_sessions_give_one_digest(seed, folder):
    rng = Random(seed)
    config, frames = soups.soup(seed, 250)
    tape = tape_of(folder / f"soup-{seed}", frames, soups.ANCHOR, soups.INSTRUMENTS, segment_rows=rng.choice((70, 400)))
    same_digests(tape, config, block_rows=rng.choice((None, 1, 7, 64)))
    same_digests(tape, RunConfig(symbols=("BBB",), rules=config.rules))
    same_digests(tape, config, venues=[rng.choice(("upbit", "binance"))]) if not config.symbols else None
    shutil.rmtree(tape)


@given(seed=seeds)
@examples(10)
def test_wild_sessions_give_one_digest(seed, folder):
    tape = tape_of(folder / f"wild-{seed}", wild_frames(seed), ANCHOR, WILD)
    same_digests(tape, RunConfig())
    same_digests(tape, RunConfig(symbols=("BTC",)))
    same_digests(tape, RunConfig(), venues=("binance",))
    shutil.rmtree(tape)


def row(u, i):
    """What a run can tell of a row."""
    what = What(int(u.what[i]))
    head = (what.name, int(u.reason[i]), int(u.book[i]) if what is not What.NOTHING else -1)
    if what not in (What.BOOK, What.CHANGE, What.SNAPSHOT):
        return head
    at, n = int(u.start[i]), int(u.n_bid[i]) + int(u.n_ask[i])
    numbers = tuple(int(getattr(u, name)[i]) for name in ("exchange_ms", "first_id", "update_id", "check", "n_bid", "n_ask"))
    return *head, *numbers, u.px_e8[at : at + n].tolist(), u.qty_e8[at : at + n].tolist()


def decoded_rows(decode, block, step):
    rows, start, u = [], 0, UpdateBlock()
    while start < len(block):
        u.cursor[0] = HOME_LEVELS
        with np.errstate(over="ignore"):
            n = decode(block.slice(start, min(start + step, len(block))), u)
        assert 0 < n <= step
        rows += [row(u, i) for i in range(n)]
        start += n
    return rows


@given(seed=seeds, wild=st.booleans())
@examples(12)
def test_columns_are_those_of_the_engine(seed, wild, folder):
    rng = Random(seed)
    frames, anchor, instruments = (
        (wild_frames(seed), ANCHOR, WILD) if wild else (soups.soup(seed, 250).frames, soups.ANCHOR, soups.INSTRUMENTS)
    )
    tape = tape_of(folder / f"columns-{seed}", frames, anchor, instruments)
    reader = TapeReader(tape)
    found = make_store(reader, 0)
    known = {venue: [name for name in names if rng.random() < 0.7] for venue, names in instruments.items()}
    engine = Engine(known, RunConfig())
    books = [f"{i.venue}:{i.name}" for i in engine.universe.instruments]
    numbers = np.array([*(books.index(name) if name in books else -1 for name in found.index.instruments), -1], np.int32)
    whole = FrameBlock.from_frames(frames, anchor)
    expected = decoded_rows(engine.decode, whole, 100)
    got = []
    for part in read_slices(found.files, found.index, range(len(found.index.slices)), anchor, numbers):
        got += decoded_rows(part.updates.decode, part.frames, rng.choice((1, 17, 100)))
        assert part.frames.kind.tolist() == whole.kind[len(got) - len(part.frames) : len(got)].tolist()
    assert got == expected
    shutil.rmtree(tape)


def after(side, rng, grid, *, asks):
    """What may become of one side of a window, however unlikely: levels gone, come and of other sizes; all of them, or none."""
    going, coming, resizing = (rng.choice((0.0, 0.1, 1.0)) for _ in range(3))
    levels = {px: size for px, size in side if rng.random() >= going}
    levels |= {px: rng.choice((0, size, size + 1)) for px, size in levels.items() if rng.random() < resizing}
    levels |= {rng.choice(grid): rng.choice((0, 1, 10**12)) for _ in range(30) if rng.random() < coming}
    return sorted(levels.items(), reverse=not asks)[: rng.choice((0, 1, 20, 30, 30, 30))]


@given(seed=seeds)
@examples(12)
def test_windows_come_back_whatever_changes_between_them(seed, folder):
    rng = Random(seed)
    most = rng.choice((60, 10**4, 10**18))
    grid = sorted({rng.randrange(1, most) for _ in range(90)})
    middle = len(grid) // 2
    books = {coin: ([], []) for coin in ("BTC", "XRP")}
    found = Market()
    for k in range(120):
        coin = rng.choice((*books,))
        bids, asks = books[coin]
        if rng.random() < 0.9:
            bids = after(bids, rng, grid[:middle], asks=False) if rng.random() < 0.7 else bids
            asks = after(asks, rng, grid[middle:], asks=True) if rng.random() < 0.7 else asks
        if rng.random() < 0.1:
            bids, asks = [], asks[-1:]
        books[coin] = bids, asks
        book = Book(*([level[j] for level in side] for side in (bids, asks) for j in (0, 1)))
        payload = binance_combined(f"{coin.lower()}usdt@depth20", binance_depth(book, k + 1, depth=MAX_LEVELS))
        found.add(k, "binance", FrameKind.MESSAGE, payload)
    tape = found.write(folder / f"windows-{seed}")
    engine, reader = Engine(INSTRUMENTS, RunConfig()), TapeReader(tape)
    expected = decoded_rows(engine.decode, found.block(), 100)
    assert {row[0] for row in expected} == {"BOOK"}
    store = make_store(reader, 0)
    numbers = np.array([*range(len(store.index.instruments)), -1], np.int32)
    got = []
    for part in read_slices(store.files, store.index, range(len(store.index.slices)), reader.anchor, numbers):
        got += decoded_rows(part.updates.decode, part.frames, rng.choice((1, 7, 100)))
    assert got == expected
    shutil.rmtree(tape)


def test_slices_can_be_entered_anywhere(folder):
    frames = soups.soup(5, 250).frames
    tape = tape_of(folder / "anywhere", frames, soups.ANCHOR, soups.INSTRUMENTS)
    found = make_store(TapeReader(tape), 0)
    books = np.array([0, 1, 2, 3, 4, -1], np.int32)
    names = [f"{i.venue}:{i.name}" for i in Engine(soups.INSTRUMENTS, RunConfig()).universe.instruments]
    assert found.index.instruments == names
    rng = Random(1)
    for part in read_slices(found.files, found.index, range(len(found.index.slices)), soups.ANCHOR, books):
        expected = decoded_rows(part.updates.decode, part.frames, 100)
        for _ in range(30):
            start = rng.randrange(len(part.frames))
            stop = rng.randrange(start, len(part.frames)) + 1
            assert decoded_rows(part.updates.decode, part.frames.slice(start, stop), 100) == expected[start:stop]


@given(seed=seeds)
@examples(12)
def test_rows_without_room_wait_for_the_next_call(seed, folder):
    rng = Random(seed)
    frames = wild_frames(seed) if rng.random() < 0.5 else soups.soup(seed, 250).frames
    anchor, instruments = (ANCHOR, WILD) if rng.random() < 0.5 else (soups.ANCHOR, soups.INSTRUMENTS)
    tape = tape_of(folder / f"room-{seed}", frames, anchor, instruments)
    store = make_store(TapeReader(tape), 0)
    numbers = np.array([*range(len(store.index.instruments)), -1], np.int32)
    u = UpdateBlock()
    for part in read_slices(store.files, store.index, range(len(store.index.slices)), anchor, numbers):
        expected = decoded_rows(part.updates.decode, part.frames, 100)
        got, start = [], 0
        u.px_e8[:HOME_LEVELS] = u.qty_e8[:HOME_LEVELS] = 7
        while start < len(part.frames):
            room = rng.choice((0, 1, 68, 69, 70, 89, 129, 130, 138, 139, 200, 400, 10**5))
            u.cursor[0] = max(len(u.px_e8) - room, HOME_LEVELS)
            n = part.updates.decode(part.frames.slice(start, min(start + 20, len(part.frames))), u)
            assert u.cursor[0] <= len(u.px_e8)
            assert (u.px_e8[:HOME_LEVELS] == 7).all()
            assert (u.qty_e8[:HOME_LEVELS] == 7).all()
            got += [row(u, i) for i in range(n)]
            start += n
        assert got == expected
    shutil.rmtree(tape)


def test_more_levels_than_there_is_room_for(tmp_path, monkeypatch):
    """Hundreds of snapshots and changes of thousands of levels in one block."""
    monkeypatch.setattr(store_build, "SLICE_ROWS", 65_536)
    monkeypatch.setattr(store_build, "MAX_SLICE_LEVELS", 700_000)
    found = Market()
    rng = Random(2)
    px = sorted(rng.sample(range(1, 10**6), 8_000))
    bids, asks = ([(p, rng.randrange(10**12)) for p in side] for side in (px[3_999::-1], px[4_000:]))
    for k in range(150):
        change = binance_diff("BTCUSDT", DepthChange(k + 1, k + 1, bids[k % 3 :], asks), 1)
        found.add(k, "binance", FrameKind.MESSAGE, binance_combined("btcusdt@depth", change))
        if k % 50 == 0:
            found.add(k, "binance", FrameKind.REQUEST, b'{"method":"GET","url":"x/api/v3/depth?symbol=BTCUSDT"}')
            book = Book(*([level[j] for level in side] for side in (bids, asks) for j in (0, 1)))
            found.add(k, "binance", FrameKind.RESPONSE, binance_depth(book, k, depth=5_000))
    tape = found.write(tmp_path / "tape")
    same_digests(tape, RunConfig())
    assert len(find_store(TapeReader(tape), 0, check_segment=True).index.slices) == 2  # cut by levels, not by rows


def test_the_largest_block_there_can_be_has_room():
    """Changes as they are beside windows that share nothing with the window before, behind a slice that is all but full."""
    u, n, plain = UpdateBlock(), MAX_BLOCK, 5
    u.what[:n], u.book[:n] = What.BOOK, 0
    u.what[:plain] = What.CHANGE
    sizes = np.where(np.arange(n) < plain, MAX_CHANGES, MAX_LEVELS)
    u.n_bid[:n] = u.n_ask[:n] = sizes
    u.start[:n] = HOME_LEVELS + 2 * np.concatenate(([0], np.cumsum(sizes)[:-1]))
    u.px_e8[HOME_LEVELS:] = np.arange(len(u.px_e8) - HOME_LEVELS) + 1  # bids rise, so that no level is where it was
    u.qty_e8[HOME_LEVELS:] = 1
    changes = store_build._Changes(1)
    changes.n = MAX_SLICE_LEVELS - 1
    counts = changes.add(u, n, np.zeros(n, np.int32))
    assert changes.n == MAX_SLICE_LEVELS - 1 + counts[:, 0].astype(int).sum() <= LEVELS_AT_ONCE


def test_a_slice_without_levels(tmp_path):
    frames = [Frame(seq, seq, seq, "", 0, FrameKind.CLOCK, Op.NONE, b"{}") for seq in range(1, 5)]
    same_digests(tape_of(tmp_path / "tape", frames, ANCHOR, INSTRUMENTS), CONFIG)


@pytest.mark.parametrize("speed", ["max", "1000x"])
def test_other_ways_of_a_run_give_one_digest(tape, speed):
    expected = replay(tape, CONFIG, decoded=False).digest
    for options in ({}, {"block_rows": 1}, {"check_hashes": False}, {"scanner": False}):
        assert replay(tape, CONFIG, decoded=True, speed=speed, **options).digest == expected


def test_an_interrupted_run_goes_on_from_the_store(tape, tmp_path):
    expected = replay(tape, CONFIG, decoded=False).digest
    for first, second in ((True, False), (False, None), (None, True)):
        kept = tmp_path / f"kept-{first}"
        replay(tape, CONFIG, decoded=first, until="+3s", checkpoint=kept)
        assert replay(tape, CONFIG, decoded=second, resume=kept).digest == expected


# ---------------------------------------------------------------------------------------------------- when it is believed


def test_it_is_used_where_it_is_there(tape):
    raw = replay(tape, CONFIG)
    assert (used(raw), (tape / DECODED).exists()) == ((0, 1), False)
    assert used(replay(tape, CONFIG, decoded=True)) == (1, 0)
    assert sorted(path.name for path in (tape / DECODED).iterdir()) == sorted(PARTS)
    assert used(replay(tape, CONFIG)) == (1, 0)
    assert used(replay(tape, CONFIG, decoded=False)) == (0, 1)
    assert used(replay(tape, CONFIG, scanner=False)) == (0, 1)
    shutil.rmtree(tape / DECODED)
    assert used(replay(tape, CONFIG)) == (0, 1)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "longer", "folder"])
def test_damage_is_noticed_and_mended(tape, name, damage):
    expected = replay(tape, CONFIG, decoded=True).digest
    path = tape / DECODED / name
    body = path.read_bytes()
    path.unlink()
    middle = len(body) // 2
    match damage:
        case "flipped":
            path.write_bytes(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])
        case "cut" | "empty":
            path.write_bytes(body[: middle if damage == "cut" else 0])
        case "longer":
            path.write_bytes(body + b"x")
        case "folder":
            path.mkdir()
    result = replay(tape, CONFIG)
    assert (result.digest, used(result)) == (expected, (0, 1))
    result = replay(tape, CONFIG, decoded=True)
    assert result.digest == expected
    if damage != "folder":  # which nobody may simply remove
        assert used(result) == used(replay(tape, CONFIG)) == (1, 0)


def test_every_flipped_byte_of_a_store_is_noticed(tmp_path):
    tape = market(4).write(tmp_path / "tape")
    make_store(TapeReader(tape), 0)
    reader = TapeReader(tape)
    for name in PARTS[:2]:
        path = tape / DECODED / name
        body = path.read_bytes()
        for at in range(0, len(body), 5):
            path.write_bytes(body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :])
            assert find_store(reader, 0, check_segment=True) is None
        path.write_bytes(body)
    assert find_store(reader, 0, check_segment=True) is not None


def test_a_half_written_store_is_no_store(tape, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_build, "save_index", stop)
    with pytest.raises(KeyboardInterrupt):
        replay(tape, CONFIG, decoded=True)
    monkeypatch.undo()
    assert used(replay(tape, CONFIG)) == (0, 1)
    (tape / DECODED / ".000001.rows.parquet.99999.part").write_bytes(b"left behind")
    (tape / DECODED / "000009.index").write_bytes(b"of a segment that is no more")
    assert build_session(TapeReader(tape)).made == 1
    assert sorted(path.name for path in (tape / DECODED).iterdir()) == sorted(PARTS)


@pytest.mark.parametrize("decoded", [None, True])
def test_a_changed_byte_of_the_tape_is_always_noticed(tape, decoded):
    path = tape / SEGMENTS / SEGMENT
    body = path.read_bytes()
    replay(tape, CONFIG, decoded=True)
    for at in Random(3).sample(range(len(body)), 40):
        path.write_bytes(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
        with pytest.raises(TapeError, match=r"000001\.parquet does not match its manifest"):
            replay(tape, CONFIG, decoded=decoded)
    path.write_bytes(body)
    assert used(replay(tape, CONFIG)) == (1, 0)


def test_another_decoder_makes_it_anew(tape, monkeypatch):
    replay(tape, CONFIG, decoded=True)
    for module in (store_format, store_build):
        monkeypatch.setattr(module, "decoder_version", lambda: "of tomorrow")
    assert used(replay(tape, CONFIG)) == (0, 1)
    assert used(replay(tape, CONFIG, decoded=True)) == used(replay(tape, CONFIG)) == (1, 0)


def test_the_version_is_the_source_of_what_decodes(tmp_path, monkeypatch):
    before = store_format.decoder_version()
    assert before == store_format.decoder_version.__wrapped__()
    for module in ("scan", "money"):
        changed = tmp_path / f"{module}.py"
        changed.write_bytes(Path(getattr(store_format, module).__file__).read_bytes() + b"# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(getattr(store_format, module), "__file__", str(changed))
            assert store_format.decoder_version.__wrapped__() != before


def test_another_tape_or_other_instruments_make_it_anew(tape, tmp_path):
    replay(tape, CONFIG, decoded=True)
    other = market(41).write(tmp_path / "other")
    shutil.copytree(tape / DECODED, other / DECODED)
    expected = replay(other, CONFIG, decoded=False).digest
    assert used(replay(other, CONFIG)) == (0, 1)
    assert (replay(other, CONFIG, decoded=True).digest, used(replay(other, CONFIG))) == (expected, (1, 0))
    values = json.loads((other / MANIFEST).read_text())
    values["instruments"]["upbit"].append("KRW-AAA")
    (other / MANIFEST).write_text(json.dumps(values))
    assert used(replay(other, CONFIG)) == (0, 1)


def test_files_are_read_for_their_hashes_once(tape, monkeypatch):
    replay(tape, CONFIG, decoded=True)
    read = []
    monkeypatch.setattr(store_format, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    monkeypatch.setattr(store_format, "_SETTLED_NS", -(10**18))
    replay(tape, CONFIG)
    assert read == []
    path = tape / DECODED / PARTS[0]
    path.touch()
    (tape / SEGMENTS / SEGMENT).touch()
    replay(tape, CONFIG)
    assert sorted(read) == sorted([PARTS[0], SEGMENT])
    replay(tape, CONFIG)
    assert len(read) == 2
    monkeypatch.setattr(store_format, "_SETTLED_NS", 10**18)  # what has just changed may change again unseen
    replay(tape, CONFIG)
    assert len(read) == 5


@pytest.mark.parametrize("changed", [False, True])
def test_another_replay_may_make_it_anew_meanwhile(tmp_path, changed):
    """With the same bytes all is well, with others it is said."""
    tape = tape_of(tmp_path / "tape", market().frames, ANCHOR, INSTRUMENTS, segment_rows=60)
    expected = replay(tape, CONFIG, decoded=True).digest
    reading = open_reading([tape])
    engine = Engine(reading.instruments, CONFIG)
    batches = reading.batches(engine.universe)
    engine.feed(*next(batches))  # 50 of 60 frames: the second segment is not open yet
    make_store(TapeReader(tape), 1)
    if changed:
        path = tape / DECODED / "000002.levels.parquet"
        body = path.read_bytes()
        path.write_bytes(body[:20] + bytes([body[20] ^ 1]) + body[21:])
        with pytest.raises(TapeError, match="changed while it was read"):
            list(batches)
        return
    for block, decode in batches:
        engine.feed(block, decode)
    engine.finish()
    assert engine.digest() == expected


# ------------------------------------------------------------------------------------------------------ where none can be


def test_where_none_can_be_made_raw_bytes_are_read(tape, caplog):
    (tape / DECODED).write_text("in the way")
    expected = replay(tape, CONFIG, decoded=False).digest
    with caplog.at_level(logging.WARNING):
        result = replay(tape, CONFIG, decoded=True)
    assert (result.digest, used(result)) == (expected, (0, 1))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["replaying raw bytes"]
    with pytest.raises(StorageError, match="decoded"):
        build_session(TapeReader(tape))


def test_nothing_is_written_where_a_link_leads(tape, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tape / DECODED).symlink_to(tmp_path / "elsewhere")
    assert used(replay(tape, CONFIG, decoded=True)) == (0, 1)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_tape_in_an_object_store_is_read_raw(tape, store, caplog):
    expected = replay(tape, CONFIG, decoded=True).digest
    for file in (MANIFEST, f"{SEGMENTS}/{SEGMENT}", *(f"{DECODED}/{name}" for name in PARTS)):
        store.overwrite(f"decoded/market/{file}", (tape / file).read_bytes())
    with caplog.at_level(logging.WARNING, logger="arbl2.replay"):
        result = replay(store.url("decoded/market"), CONFIG, decoded=True)
    assert (result.digest, used(result)) == (expected, (0, 1))
    assert len([record for record in caplog.records if record.name == "arbl2.replay"]) == 1


def test_the_largest_price_and_size_there_can_be(tmp_path):
    most = "92233720368.54775807"
    found = Market().rate(0).binance(1, [("0.00000001", most)], [(most, most)]).binance(2, [(1, 1)], [("92233720368", 1)])
    found.binance(3, [("0.00000001", 2)], [(most, "0.00000001")])
    tape = found.write(tmp_path / "tape")
    same_digests(tape, CONFIG)
    assert replay(tape, CONFIG).reasons["binance"] == {"book": 3}


# ------------------------------------------------------------------------------------------------------------ forged ones


def forge(tape, rng):
    """Change numbers of a store and make its index say that they are right."""
    files = Files(tape, SEGMENT)
    path = rng.choice((files.rows, files.levels))
    table = pq.read_table(path)
    name = rng.choice([name for name in table.column_names if name != "payload"])
    values = table[name].to_numpy().copy()
    info = np.iinfo(values.dtype)
    for _ in range(rng.choice((1, 1, 20))):
        values[rng.randrange(len(values))] = (
            rng.choice((0, 1, 2, 31, 32, 33, 255, info.max, info.min, rng.randrange(0, 100), -1)) % (2**8)
            if info.min == 0
            else rng.choice((0, 1, 2, 31, 32, info.max, info.min, -1, rng.randrange(0, 100)))
        )
    table = table.set_column(
        table.column_names.index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type)
    )
    groups = [pq.ParquetFile(path).metadata.row_group(k).num_rows for k in range(pq.ParquetFile(path).metadata.num_row_groups)]
    with pq.ParquetWriter(path, table.schema) as writer:
        at = 0
        for rows in groups:
            writer.write_table(table.slice(at, rows), row_group_size=rows)
            at += rows
    names = instrument_names(soups.INSTRUMENTS)
    index = load_index(files, load_manifest(tape).segments[0].sha256, names)
    kept = Kept(sha256=sha256_of(path), stamp=Stamp.of(path))
    save_index(files, msgspec.structs.replace(index, **{"rows" if path == files.rows else "levels": kept}))


def rewritten(tape, part, change, **index_too):
    """The rows or the levels with ``change`` made of their table, and an index that says that all is right."""
    files = Files(tape, SEGMENT)
    path = getattr(files, part)
    table = change(pq.read_table(path))
    pq.write_table(table, path, row_group_size=len(table), use_dictionary=False)
    index = load_index(files, load_manifest(tape).segments[0].sha256, instrument_names(INSTRUMENTS))
    kept = Kept(sha256=sha256_of(path), stamp=Stamp.of(path))
    save_index(files, msgspec.structs.replace(index, **{part: kept}, **index_too))


@pytest.mark.parametrize("name", ["changes", "asks"])
def test_more_changes_than_a_kernel_has_room_for_are_refused(tmp_path, name):
    found = Market()
    found.add(
        1,
        "binance",
        FrameKind.MESSAGE,
        binance_combined("btcusdt@depth", binance_diff("BTCUSDT", DepthChange(1, 1, ((1, 1),), ()), 1)),
    )
    tape = found.write(tmp_path / "tape")
    replay(tape, CONFIG, decoded=True)

    def many(table):
        values = np.full(len(table), MAX_CHANGES + 1, np.int16)
        return table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(values))

    rewritten(tape, "rows", many)
    with pytest.raises(TapeError, match="is damaged"):
        replay(tape, CONFIG)


def test_a_forged_row_group_is_refused_before_it_is_read(tape):
    replay(tape, CONFIG, decoded=True)
    rewritten(tape, "rows", lambda table: pa.concat_tables([table.slice(0, 1)] * 4_000))
    with pytest.raises(TapeError, match="is damaged"):
        replay(tape, CONFIG)


def test_a_levels_file_that_promises_more_than_it_has_is_refused(tmp_path):
    """The footer and the index speak of 4,000 changes, and the pages hold 1,000."""
    said, real = 4_000, 1_000
    change = DepthChange(1, 1, [(said - k, 1) for k in range(said)], ())
    found = Market()
    found.add(1, "binance", FrameKind.MESSAGE, binance_combined("btcusdt@depth", binance_diff("BTCUSDT", change, 1)))
    tape = found.write(tmp_path / "tape")
    replay(tape, CONFIG, decoded=True)
    rewritten(tape, "levels", lambda table: table.slice(0, real))
    files = Files(tape, SEGMENT)
    body = files.levels.read_bytes()
    footer = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
    # Thrift writes them as zigzag varints behind a byte that says so
    forged_footer = body[footer:].replace(b"\x16" + bytes((0xD0, 0x0F)), b"\x16" + bytes((0xC0, 0x3E)))
    assert forged_footer != body[footer:]
    files.levels.write_bytes(body[:footer] + forged_footer)
    assert pq.ParquetFile(files.levels).metadata.row_group(0).num_rows == said
    index = load_index(files, load_manifest(tape).segments[0].sha256, instrument_names(INSTRUMENTS))
    assert sum(part.changes for part in index.slices[0].parts) == said
    save_index(files, msgspec.structs.replace(index, levels=Kept(sha256=sha256_of(files.levels), stamp=Stamp.of(files.levels))))
    with pytest.raises(TapeError, match="levels are not those of its index"):
        replay(tape, CONFIG)


@pytest.mark.parametrize("field", ["reason", "otherwise", "what", "venue", "kind"])
def test_codes_that_there_are_not_make_no_store(tape, field):
    expected = replay(tape, CONFIG, decoded=True).digest
    files = Files(tape, SEGMENT)
    body = json.loads(files.index.read_bytes().partition(b"\n")[2])
    for sort in body["sorts"]:
        sort[store_format.Sort.__struct_fields__.index(field)] = {"what": 9, "reason": 9, "otherwise": 9}.get(field, 999)
    text = json.dumps(body).encode()
    files.index.write_bytes(store_format._check(text) + b"\n" + text)
    result = replay(tape, CONFIG)
    assert (result.digest, used(result)) == (expected, (0, 1))


def test_groups_beyond_the_file_are_refused(tape):
    replay(tape, CONFIG, decoded=True)
    files = Files(tape, SEGMENT)
    index = load_index(files, load_manifest(tape).segments[0].sha256, instrument_names(INSTRUMENTS))
    slices = [msgspec.structs.replace(part, first_group=2**31 - 1) for part in index.slices]
    save_index(files, msgspec.structs.replace(index, slices=slices))
    with pytest.raises(TapeError, match="levels are not those of its index"):
        replay(tape, CONFIG)


def test_a_forged_store_breaks_nothing(folder):
    """It may tell another market, as anyone may who writes there; it may not make a kernel look outside its arrays."""
    tape = tape_of(folder / "forged", soups.soup(11, 250).frames, soups.ANCHOR, soups.INSTRUMENTS)
    make_store(TapeReader(tape), 0)
    whole = {path: path.read_bytes() for path in (tape / DECODED).iterdir()}
    outcomes = {"told": 0, "refused": 0}  # and no other error
    for seed in range(60 * EFFORT):
        forge(tape, Random(seed))
        try:
            assert used(replay(tape, RunConfig())) == (1, 0)
            outcomes["told"] += 1
        except TapeError as error:
            outcomes["refused" if "Delete the folder" in str(error) else str(error)] += 1
        except EngineError:  # absurd prices
            outcomes["refused"] += 1
        for path, body in whole.items():
            path.write_bytes(body)
    assert min(outcomes.values()) > 5, outcomes


# ------------------------------------------------------------------------------------------------------ growing with a session


def test_a_store_grows_with_its_session(tmp_path):
    frames = market().frames
    tape = tape_of(tmp_path / "tape", frames, ANCHOR, INSTRUMENTS, segment_rows=30)
    whole = load_manifest(tape)
    assert len(whole.segments) == 4
    save_manifest(tape, msgspec.structs.replace(whole, segments=whole.segments[:2]))
    assert used(replay(tape, CONFIG, decoded=True)) == (2, 0)
    save_manifest(tape, whole)
    result = replay(tape, CONFIG)
    assert used(result) == (2, 2)
    assert result.digest == replay(tape, CONFIG, decoded=False).digest
    built = build_session(TapeReader(tape))
    assert (built.kept, built.made) == (2, 2)
    assert built.bytes == sum(
        (tape / DECODED / f"00000{k}.{part}.parquet").stat().st_size for k in range(1, 5) for part in ("rows", "levels")
    )
    assert used(replay(tape, CONFIG)) == (4, 0)
