"""Keyframes: what the books were at many places of a tape, so that any instant is a few thousand frames away.

One file a segment (``<session>/keyframes/<depth>/000001.keys``): JSON that says what is in it, then the states, each compressed
with zstd. Its key chains the SHA-256 of the segment and of all before it with the sources that make books of bytes, so a file of
another tape or another arbl2 is not used; nor is one that is damaged. All of them can be deleted at any time.

A segment begins with a state, and there are as many after it as fit in ``SHARE`` of the segment's size, but one at least every
``MOST_FRAMES`` frames and one behind every large REST body: so neither the disk nor the time of a query depends on how deep the
books are or how long the session is. Of a full book a state keeps only the levels that differ from an earlier state, its base,
until that is more than half of them; then it is kept as a whole and is the base of those that follow.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa

from arbl2 import book, decoding, engine, frames, kernels, money, scan, updates
from arbl2.book import pack_books, unpack_books
from arbl2.errors import TapeError
from arbl2.frames import FrameKind
from arbl2.providers import base as provider
from arbl2.providers import binance, upbit
from arbl2.updates import MAX_BLOCK
from arbl2_replay.store_format import source_version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.book import State
    from arbl2.engine import Engine
    from arbl2.frames import FrameBlock
    from arbl2.tape import Manifest

    Arrays = Mapping[str, NDArray[Any]]

FOLDER = "keyframes"
SUFFIX = ".keys"
STEP_FRAMES = MAX_BLOCK
"""Frames from one keyframe to the next where books are small."""
MOST_FRAMES = 8_192
COSTLY_BYTES = 32_768
"""A REST body of this size takes milliseconds to read: nobody should have to twice."""
SHARE = 0.125
"""Keyframes take at most this much of the segment's bytes, beyond those that ``MOST_FRAMES`` asks for."""
_MAGIC = b"ARBL2KF2"
_MAX_HEADER = 64 * 2**20
_MAX_STATE = 2**30
_CODEC = "zstd"
_MADE_BY = (book, decoding, engine, frames, kernels, money, scan, updates, provider, binance, upbit)
_RUNGS = ("rung_px", "rung_qty", "rung_from")
_LADDER = (*_RUNGS, "kept")
_LOG = logging.getLogger("arbl2.travel")


class Group(msgspec.Struct, frozen=True, array_like=True):
    """One row group: its number in the segment, what it holds, and ``marks``: the ``mark`` of each book at its beginning.

    ``first_ns`` and ``last_ns`` are the engine time of its first and last frame.
    """

    number: int
    rows: int
    first_seq: int
    first_ns: int
    last_ns: int
    marks: list[int]


class _Keyframe(msgspec.Struct, frozen=True, array_like=True):
    """The state before frame ``row`` of row group ``group``: where it stands in the file, and the shapes of its arrays.

    ``base`` is the number of the keyframe that it is a difference to, -1 if it stands alone.
    """

    group: int
    row: int
    base: int
    at: int
    size: int
    raw: int
    crc: int
    shapes: list[tuple[str, list[int]]]


class _Header(msgspec.Struct, frozen=True):
    key: str
    groups: list[Group]
    keyframes: list[_Keyframe]


_HEADER = msgspec.json.Decoder(_Header)


def chain(manifest: Manifest, depth: str) -> list[str]:
    """The key of each segment's keyframes; ``depth`` is ``AggregatorConfig.binance_depth``."""
    instruments = {str(venue): sorted(names) for venue, names in manifest.instruments.items()}
    above = [source_version(*_MADE_BY), instruments, [manifest.anchor_wall_ns, manifest.anchor_mono_ns], depth]
    key = hashlib.sha256(msgspec.json.encode(above, order="deterministic")).hexdigest()
    keys = []
    for segment in manifest.segments:
        key = hashlib.sha256(f"{key}{segment.sha256}".encode()).hexdigest()
        keys.append(key)
    return keys


def mark(state: State, number: int) -> int:
    """A number that is another one whenever something of a book has changed that can be seen, its age apart."""
    row = state.books[number : number + 1].copy()
    # What changes without anything to be seen: most of it with messages that a book waits with until its snapshot comes.
    for name in ("held_rows", "held_levels", "checksum", "synced", "conn"):
        row[name] = 0
    return int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------------------------ one state


def take(state: State) -> dict[str, NDArray[Any]]:
    """What the books are, and what decides what comes of the next frame."""
    kernels.come_home(state.records)
    packed = pack_books(state)
    # The loop's own takes and statistics: nobody trades here.
    del packed["eaten"], packed["gaps"]
    return packed | {"counters": state.counters.copy()}


def put(state: State, arrays: Arrays) -> None:
    """Make the books what they were. Raises ValueError where the arrays are those of other instruments."""
    books = {name: array for name, array in arrays.items() if name != "counters"}
    unpack_books(state, {**books, "eaten": state.eaten, "gaps": state.gaps})
    for name in ("time_ns", "asked"):
        state.counters[name] = arrays["counters"][name]


def _ladders(arrays: Arrays) -> list[tuple[str, int, int]]:
    """Book and side of every ladder, with its levels."""
    rungs = arrays["books"]["rungs"]
    return [(f"{k}", side, int(rungs[k, side])) for k in range(len(rungs)) for side in (0, 1) if f"rung_px.{k}" in arrays]


def difference(arrays: Arrays, base: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays, with each ladder as what it shares with that of ``base`` (one bit a level) and what it does not."""
    packed = {name: a for name, a in arrays.items() if name.partition(".")[0] not in _RUNGS}
    for k, side, n in _ladders(arrays):
        rows = [arrays[f"{name}.{k}"][side, :n] for name in _RUNGS]
        old = _old(base, k, side)
        # worst first: bids rise, asks fall
        sign = 1 if side == 0 else -1
        at = np.minimum(np.searchsorted(sign * old[0], sign * rows[0]), len(old[0]) - 1)
        same = np.full(n, bool(len(old[0])))
        if len(old[0]):
            for before, now in zip(old, rows, strict=True):
                same &= before[at] == now
        kept = np.zeros(len(old[0]), np.bool_)
        kept[at[same]] = True
        packed[f"kept.{k}.{side}"] = np.packbits(kept)
        px = rows[0][~same]
        packed[f"rung_px.{k}.{side}"] = np.diff(px, prepend=np.int64(0))
        packed[f"rung_qty.{k}.{side}"], packed[f"rung_from.{k}.{side}"] = rows[1][~same], rows[2][~same]
    return packed


def whole(packed: Arrays, base: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays that ``difference`` was made of."""
    arrays = {name: a for name, a in packed.items() if name.partition(".")[0] not in _LADDER}
    rungs = arrays["books"]["rungs"]
    for name in packed:
        if not name.startswith("kept."):
            continue
        _, k, text = name.split(".")
        side = int(text)
        old = _old(base, k, side)
        kept = np.unpackbits(packed[name], count=len(old[0])).astype(np.bool_)
        px = np.cumsum(packed[f"rung_px.{k}.{side}"])
        new = (px, packed[f"rung_qty.{k}.{side}"], packed[f"rung_from.{k}.{side}"])
        prices = np.concatenate([old[0][kept], px])
        order = np.argsort(prices if side == 0 else -prices, kind="stable")
        for which, (before, now) in zip(_RUNGS, zip(old, new, strict=True), strict=True):
            room = arrays.setdefault(f"{which}.{k}", np.zeros((2, int(rungs[int(k)].max())), before.dtype))
            room[side, : len(order)] = np.concatenate([before[kept], now])[order]
    return arrays


def _old(base: Arrays, k: str, side: int) -> list[NDArray[Any]]:
    if f"rung_px.{k}" not in base:
        return [np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)]
    n = int(base["books"]["rungs"][int(k), side])
    return [base[f"{name}.{k}"][side, :n] for name in _RUNGS]


def _shuffled(array: NDArray[Any]) -> bytes:
    """Bytes of equal weight beside each other: the high ones of prices are all the same, which packs better."""
    if array.dtype != np.int64:
        return array.tobytes()
    return np.ascontiguousarray(np.ascontiguousarray(array).view(np.uint8).reshape(-1, 8).T).tobytes()


def _unshuffled(raw: bytes, dtype: np.dtype[Any], shape: list[int]) -> NDArray[Any]:
    if dtype != np.int64:
        return np.frombuffer(raw, dtype).reshape(shape)
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(8, -1).T).view(np.int64).reshape(shape)


def _dtype(state: State, name: str) -> np.dtype[Any]:
    part = name.partition(".")[0]
    if part in ("px", "qty"):
        return np.dtype(np.int64)
    return np.dtype(np.uint8) if part == "kept" else getattr(state, part).dtype


# --------------------------------------------------------------------------------------------------------- one segment


class SegmentKeys:
    """The keyframes of one segment. ``stops`` are (row group, row), in order, the first at the segment's beginning."""

    def __init__(self, source: Path | bytes, header: _Header, head: int) -> None:
        self._source = source
        self._head = head
        self._keyframes = header.keyframes
        self.groups = header.groups
        self.stops = [(keyframe.group, keyframe.row) for keyframe in header.keyframes]
        self.bytes = head + sum(keyframe.size for keyframe in header.keyframes)

    @classmethod
    def opened(cls, source: Path | bytes, key: str) -> SegmentKeys | None:
        """The keyframes in a file; None if it is not there, is of another tape or arbl2, or is damaged."""
        try:
            head = _read(source, 0, 16)
            size = int.from_bytes(head[8:12], "little")
            body = _read(source, 16, size) if head[:8] == _MAGIC and size <= _MAX_HEADER else b""
            if not body or zlib.crc32(body) != int.from_bytes(head[12:16], "little"):
                return None
            header = _HEADER.decode(body)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if header.key != key or not header.groups or not header.keyframes:
            return None
        found = cls(source, header, 16 + size)
        return found if isinstance(source, bytes) or source.stat().st_size == found.bytes else None

    def load(self, number: int, state: State, books: Collection[int]) -> dict[str, NDArray[Any]]:
        """The state of keyframe ``number``, of full books only those of ``books``; ``state`` says what types its arrays have.

        Raises DamagedError.
        """
        keyframe = self._keyframes[number]
        if keyframe.base < 0:
            return whole(self._arrays(keyframe, state, books), {})
        base = self._keyframes[keyframe.base]
        if base.base >= 0:
            raise DamagedError(f"the keyframes {self._name()} are damaged (one has no base). Delete them: they are made anew.")
        return whole(self._arrays(keyframe, state, books), whole(self._arrays(base, state, books), {}))

    def _arrays(self, keyframe: _Keyframe, state: State, books: Collection[int]) -> dict[str, NDArray[Any]]:
        try:
            raw = _unpacked(_read(self._source, self._head + keyframe.at, keyframe.size), keyframe)
            arrays, at = {}, 0
            for name, shape in keyframe.shapes:
                dtype = _dtype(state, name)
                size = dtype.itemsize * int(np.prod(shape))
                part, _, of = name.partition(".")
                if part not in _LADDER or int(of.partition(".")[0]) in books:
                    arrays[name] = _unshuffled(raw[at : at + size], dtype, shape)
                at += size
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DamagedError(f"the keyframes {self._name()} are damaged ({error}). Delete them: they are made anew.") from None
        return arrays

    def _name(self) -> str:
        return "in memory" if isinstance(self._source, bytes) else str(self._source)


def _unpacked(packed: bytes, keyframe: _Keyframe) -> bytes:
    if zlib.crc32(packed) != keyframe.crc or keyframe.raw > _MAX_STATE:
        raise ValueError("a checksum differs")
    return bytes(pa.decompress(packed, decompressed_size=keyframe.raw, codec=_CODEC, asbytes=True))


class DamagedError(TapeError):
    """A keyframe cannot be read."""


def _read(source: Path | bytes, at: int, size: int) -> bytes:
    if isinstance(source, bytes):
        return source[at : at + size]
    with source.open("rb") as file:
        file.seek(at)
        return file.read(size)


def _behind_costly(block: FrameBlock) -> set[int]:
    """Rows that come after a large REST body."""
    sizes = np.diff(block.offsets)
    return {int(row) + 1 for row in np.flatnonzero((block.kind == FrameKind.RESPONSE) & (sizes >= COSTLY_BYTES))}


def _is_new(packed: Arrays, arrays: Arrays) -> bool:
    """More than half of the levels are not those of the base."""
    changed = sum(len(a) for name, a in packed.items() if name.startswith("rung_px."))
    return 2 * changed > sum(n for _, _, n in _ladders(arrays))


def segment_body(
    key: str, blocks: Iterator[tuple[int, FrameBlock]], engine: Engine, share: tuple[int, int], on_frames: Callable[[int], None]
) -> bytes:
    """The file of a segment, made by taking its row groups through an engine that stands at its beginning.

    ``share`` is (bytes of the file, frames in it) of the segment: what keyframes may take of it.
    """
    state = engine.state
    sealed_bytes, sealed_rows = share
    groups: list[Group] = []
    keyframes: list[_Keyframe] = []
    parts: list[bytes] = []
    base: tuple[int, dict[str, NDArray[Any]]] = (-1, {})
    used = since = done = 0
    for number, block in blocks:
        marks = [mark(state, k) for k in range(len(state.books))]
        before_ns = int(state.counters[0]["time_ns"])
        costly = _behind_costly(block)
        stops = sorted({*range(0, len(block), STEP_FRAMES), *costly} - {len(block)})
        for row, end in itertools.pairwise([*stops, len(block)]):
            affordable = used < SHARE * sealed_bytes * done / max(sealed_rows, 1)
            if not keyframes or affordable or row in costly or since + end - row > MOST_FRAMES:
                arrays = take(state)
                packed = difference(arrays, base[1])
                if _is_new(packed, arrays):
                    base, packed = (len(keyframes), arrays), difference(arrays, {})
                raw = b"".join(_shuffled(a) for a in packed.values())
                body = pa.compress(raw, codec=_CODEC, asbytes=True)
                shapes = [(name, list(a.shape)) for name, a in packed.items()]
                on = -1 if base[0] == len(keyframes) else base[0]
                keyframes.append(_Keyframe(number, row, on, used, len(body), len(raw), zlib.crc32(body), shapes))
                parts.append(body)
                used, since = used + len(body), 0
            engine.feed(block.slice(row, end))
            done, since = done + end - row, since + end - row
            on_frames(end - row)
        last_ns = int(state.counters[0]["time_ns"])
        groups.append(Group(number, len(block), int(block.seq[0]), max(before_ns, int(block.time_ns[0])), last_ns, marks))
    header = msgspec.json.encode(_Header(key, groups, keyframes))
    head = _MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    return b"".join([head, header, *parts])


# ------------------------------------------------------------------------------------------------------------- the folder


class Shelf:
    """Where the files of a session are kept: the first of ``folders`` that can be written, else in memory."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders

    def find(self, name: str, key: str) -> SegmentKeys | None:
        """The keyframes of a segment if there are good ones."""
        found = (SegmentKeys.opened(folder / f"{name}{SUFFIX}", key) for folder in self._folders)
        return next((keys for keys in found if keys is not None), None)

    def keep(self, name: str, key: str, body: bytes) -> SegmentKeys:
        """Write the keyframes of a segment aside and rename them."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                aside = folder / f"{name}.{os.getpid()}.part"
                try:
                    aside.write_bytes(body)
                    aside.replace(folder / f"{name}{SUFFIX}")
                except BaseException:
                    aside.unlink(missing_ok=True)
                    raise
                keys = SegmentKeys.opened(folder / f"{name}{SUFFIX}", key)
                if keys is not None:
                    return keys
        if self._folders:
            _LOG.warning("keyframes cannot be written to %s; they are kept in memory for now", self._folders[0])
        keys = SegmentKeys.opened(body, key)
        if keys is None:
            raise TapeError(f"the segment {name} holds no frames. Restore it from a copy of the recording.")
        return keys

    def drop(self, name: str) -> None:
        """Delete the keyframes of a segment."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                (folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
