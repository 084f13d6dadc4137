"""Recordings of given frames, in segments and row groups of a given size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.tape import SegmentWriter, save_manifest
from markets import manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from arbl2.frames import Anchor, Frame


def tape_of(
    folder: Path,
    frames: Sequence[Frame],
    anchor: Anchor,
    instruments: Mapping[str, Sequence[str]],
    *,
    segment_rows: int = 10**6,
    **fields: Any,
) -> Path:
    """A recording of these frames; its session is named like the folder."""
    found = manifest(
        folder.name,
        anchor_wall_ns=anchor.wall_ns,
        anchor_mono_ns=anchor.mono_ns,
        instruments={venue: list(names) for venue, names in instruments.items()},
        **fields,
    )
    segments = []
    for start in range(0, len(frames), segment_rows):
        writer = SegmentWriter(folder, len(segments) + 1, found.session, anchor, zstd_level=1)
        for frame in frames[start : start + segment_rows]:
            writer.append(frame)
        segments.append(writer.seal())
    save_manifest(folder, msgspec.structs.replace(found, segments=segments))
    return folder
