"""Zones and the calibration artefact: the only zone matcher of arbl2.

A zone is a box of market state at decision: venue, side, observed edge, share of the displayed depth that the order takes, and
latency. The user writes cut points, not boxes: cut points from 0 to inf cannot leave a gap or overlap, and every interval is
half-open, [lo, hi), so that a value on a cut belongs to exactly one zone. What is not a finite number of the right sign is no
market state and selects no zone.

Each zone falls back along one chain: zone -> (venue, side, latency, size) -> (venue, side, latency) -> all. A zone whose samples
do not carry a number points at its nearest ancestor that does, or at nothing; it never reads 0 or 1 because it is empty.

Pure: text and bytes in, values out. ``arbl2 calibrate`` writes the artefact; the engine and the reports read it.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np

from arbl2.errors import ConfigError, TapeError
from arbl2.frames import ExchangeId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SCHEMA_NAME = "arbl2.calibration"
SCHEMA_MAJOR = 1
VENUES: tuple[str, ...] = (ExchangeId.UPBIT.value, ExchangeId.BINANCE.value)
SIDES: tuple[str, ...] = ("buy", "sell")
ALL = "all"
MAX_ZONES = 20_000
LARGEST_CUT = 2**62  # a latency in ns must fit in 64 bits

N = TypeVar("N", int, float)
State = Literal["ok", "insufficient", "unresolved", "unvalidated", "degenerate"]
PUBLISHED: frozenset[str] = frozenset({"ok", "unvalidated", "degenerate"})
"""States whose numbers may be used; the others point at an ancestor (``uses_zone_id``)."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The box of a zone, half-open; ``None`` for a whole dimension = any, for an upper end = none."""

    venue: str | None = None
    side: str | None = None
    edge_bps: tuple[float, float | None] | None = None
    size_over_depth: tuple[float, float | None] | None = None
    latency_ns: tuple[int, int | None] | None = None


class Zone(msgspec.Struct, frozen=True):
    """One box and the zone it falls back to (``None`` only for ``all``)."""

    zone_id: str
    parent_id: str | None
    bounds: Bounds


class ZoneCuts(msgspec.Struct, frozen=True, kw_only=True):
    """Lower ends of the intervals per dimension; the first is 0 and the last interval has no upper end.

    ``edge_bps``: absolute gross edge of the direction in basis points. ``size_over_depth``: visible quantity over displayed
    depth at the limit or better (at most 1). ``latency_ns``: decision to arrival.
    """

    edge_bps: tuple[float, ...] = (0.0, 5.0, 7.0, 12.0, 20.0)
    size_over_depth: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    latency_ns: tuple[int, ...] = (0, 25_000_000, 50_000_000, 100_000_000, 200_000_000, 400_000_000, 800_000_000)


class _ZonesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    edge_bps: list[float] | None = None
    size_over_depth: list[float] | None = None
    latency_ms: list[float] | None = None


class ZoneTable:
    """Every zone and ancestor that a set of cut points makes, and the one rule that matches a market state to a zone.

    ``zones`` are the leaves in the order of ``index``; ``levels[k]`` are the zones k steps up the chain (``levels[0]`` is
    ``zones``, ``levels[-1]`` is ``all`` alone); ``above[k][i]`` is the place in ``levels[k]`` of the ancestor of leaf ``i``.
    Raises ConfigError when the cut points do not rise from 0 or make too many zones.
    """

    __slots__ = ("above", "cuts", "levels", "zones")

    def __init__(self, cuts: ZoneCuts | None = None, *, where: str = "zones") -> None:
        self.cuts = cuts or ZoneCuts()
        for name in ("edge_bps", "size_over_depth", "latency_ns"):
            _check_cuts(name, getattr(self.cuts, name), where)
        edge, size, latency = self.cuts.edge_bps, self.cuts.size_over_depth, self.cuts.latency_ns
        count = len(VENUES) * len(SIDES) * len(edge) * len(size) * len(latency)
        if count > MAX_ZONES:
            raise ConfigError(f"{where}: the cut points make {count:,} zones; use at most {MAX_ZONES:,}.")
        levels: list[dict[str, Zone]] = [{}, {}, {}, {}]
        for venue in VENUES:
            for side in SIDES:
                for edge_in in _intervals(edge):
                    for size_in in _intervals(size):
                        for latency_in in _intervals(latency):
                            for level, zone in zip(levels, _chain(venue, side, edge_in, size_in, latency_in), strict=True):
                                level[zone.zone_id] = zone
        self.levels: tuple[tuple[Zone, ...], ...] = tuple(tuple(level.values()) for level in levels)
        self.zones = self.levels[0]
        self.above = _ancestors(self.levels)

    @classmethod
    def from_toml(cls, text: str, *, where: str = "zones") -> ZoneTable:
        """Read the user's table: ``edge_bps``, ``size_over_depth``, ``latency_ms``, each a list from 0 to inf.

        A dimension that is left out keeps its default. Raises ConfigError with what to mend.
        """
        try:
            file = msgspec.convert(tomllib.loads(text), _ZonesFile)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
            raise ConfigError(f"{where} is not a table of zones ({error}). See calibration/README.md for an example.") from None
        default = ZoneCuts()
        latency_ms = _lower_ends("latency_ms", file.latency_ms, where)
        return cls(
            ZoneCuts(
                edge_bps=_lower_ends("edge_bps", file.edge_bps, where) or default.edge_bps,
                size_over_depth=_lower_ends("size_over_depth", file.size_over_depth, where) or default.size_over_depth,
                latency_ns=tuple(round(ms * 1e6) for ms in latency_ms) or default.latency_ns,
            ),
            where=where,
        )

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the cut points, the same however they were written."""
        return hashlib.sha256(msgspec.json.encode(self.cuts, order="sorted")).hexdigest()

    def index(self, venue: str, side: str, edge_bps: float, size_over_depth: float, latency_ns: int) -> int | None:
        """Place in ``zones`` of the zone that holds this market state, or None when none does.

        The sign of ``edge_bps`` does not matter: it says which direction was traded, not how wide the gap was.
        """
        if venue not in VENUES or side not in SIDES:
            return None
        state = np.array([edge_bps]), np.array([size_over_depth]), np.array([latency_ns])
        place = int(self.places(venue, side, *state)[0])
        return None if place < 0 else place

    def places(
        self,
        venue: str,
        side: str,
        edge_bps: NDArray[np.float64],
        size_over_depth: NDArray[np.float64],
        latency_ns: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """As ``index``, for many market states of one venue and side at once; -1 where no zone holds one."""
        place = np.full(len(edge_bps), VENUES.index(venue) * len(SIDES) + SIDES.index(side), dtype=np.int64)
        outside = np.zeros(len(edge_bps), dtype=bool)
        cuts = self.cuts
        for lower, values in (
            (cuts.edge_bps, np.abs(edge_bps)), (cuts.size_over_depth, size_over_depth), (cuts.latency_ns, latency_ns),
        ):  # fmt: skip
            place = place * len(lower) + np.searchsorted(np.array(lower), values, side="right") - 1
            outside |= ~((values >= 0) & (values < math.inf))
        place[outside] = -1
        return place

    def select(self, venue: str, side: str, edge_bps: float, size_over_depth: float, latency_ns: int) -> Zone | None:
        """The zone that holds this market state, or None when none does."""
        place = self.index(venue, side, edge_bps, size_over_depth, latency_ns)
        return None if place is None else self.zones[place]


class Mean(msgspec.Struct, frozen=True, kw_only=True):
    """A mean in bps of the decision mid over ``n`` filled legs, with its 95 % interval; null = not supported by the data."""

    n: int = 0
    mean: float | None = None
    ci95: tuple[float, float] | None = None
    p50: None = None
    p90: None = None
    p99: None = None


class Survival(msgspec.Struct, frozen=True, kw_only=True):
    """Share of the visible quantity that is still takeable at arrival.

    ``raw`` is the mean of the samples, whatever their number. ``point``, ``ci95``, ``p0`` and ``p1`` (shares of events with
    nothing and with everything left) are published numbers. A degenerate zone has a one-sided bound only: no ``point``.
    """

    raw: float | None = None
    point: float | None = None
    ci95: tuple[float, float] | None = None
    next_session95: tuple[float, float] | None = None
    p0: float | None = None
    p1: float | None = None


class FillRatio(msgspec.Struct, frozen=True, kw_only=True):
    """Share of the ordered quantity that fills: visible share at decision times survival."""

    point: float | None = None
    ci95: tuple[float, float] | None = None


class ZoneRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the data says about one zone. ``n`` counts resolved opportunities; ``blocks`` the time blocks they fall in."""

    zone_id: str
    parent_id: str | None
    bounds: Bounds
    state: State
    uses_zone_id: str | None
    n: int
    n_eff: float | None
    blocks: int
    df: float | None
    deff: float | None
    unresolved: int
    unresolved_share: float | None
    id_bounds: tuple[float, float] | None
    survival: Survival
    fill_ratio: FillRatio
    half_spread_bps: Mean
    walk_bps: Mean
    drift_bps: Mean
    slippage_bps: Mean
    markout_bps: None = None

    @property
    def published(self) -> bool:
        """Whether the numbers of this zone itself may be used."""
        return self.state in PUBLISHED


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """Cadence of one recorded book: what "between two snapshots" means for it."""

    venue: str
    symbol: str
    updates: int
    gap_median_ms: float | None
    gap_p99_ms: float | None


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """One run that was counted. ``dataset_id`` is the recorded session, ``sha256`` its tape, ``digest`` the run's events."""

    kind: Literal["book", "paper_live", "exchange"]
    dataset_id: str
    sha256: str
    digest: str
    rows: int
    first_ns: int
    last_ns: int
    venues: list[str]
    symbols: list[str]
    books: list[Book]
    sequence_gaps: int | None = None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of the fitted events of one venue, in ms. ``assumed`` = the run's setting, not a measured clock."""

    source: Literal["measured", "assumed"]
    p50: float
    p90: float
    p99: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the numbers were made.

    ``rho1`` is the resemblance of neighbouring blocks that merging left, per level of the chain from zone to ``all``; null where
    no block was followed by another.
    """

    zones: ZoneCuts
    zones_sha256: str
    block_ns_first: int
    block_ns_final: int
    blocks: int
    rho1: tuple[float | None, ...]
    weights: Literal["opportunity"] = "opportunity"
    latency: dict[str, Latency] = {}
    sessions: int
    grid: None = None
    fees: None = None
    fx_source: None = None
    kappa: None = None


class Artefact(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in ``calibration.json``. What was not computed is null."""

    schema: str = f"{SCHEMA_NAME}/{SCHEMA_MAJOR}"
    id: str = ""
    created_utc: str = ""
    tool: dict[str, str | None]
    inputs: list[Input]
    refused_rows: dict[str, int]
    config: Settings
    zones: list[ZoneRecord]
    blocks_sha256: str
    limits: list[str]
    legs: None = None
    tests: None = None
    oos: None = None
    supersedes: str | None = None


class CalibrationTable:
    """A loaded calibration: matches a market state to its zone and says which numbers hold there.

    ``name`` is what the file or folder is called that it was read from, "" if from none.
    """

    __slots__ = ("_records", "artefact", "name", "table")

    def __init__(self, artefact: Artefact, *, where: str = "calibration", name: str = "") -> None:
        self.artefact = artefact
        self.name = name
        try:
            self.table = ZoneTable(artefact.config.zones, where=where)
        except ConfigError as error:
            raise TapeError(f"{error} Calibrate again.") from None
        self._records = {record.zone_id: record for record in artefact.zones}
        self._check(where)

    @property
    def id(self) -> str:
        """Identity of the artefact, to be kept in the provenance of whatever used it."""
        return self.artefact.id

    def record(self, zone_id: str) -> ZoneRecord:
        """The record of a zone or ancestor by its id. Raises KeyError."""
        return self._records[zone_id]

    def select(self, venue: str, side: str, edge_bps: float, size_over_depth: float, latency_ns: int) -> ZoneRecord | None:
        """The record of the zone that holds this market state, published or not; None when no zone does."""
        zone = self.table.select(venue, side, edge_bps, size_over_depth, latency_ns)
        return None if zone is None else self._records[zone.zone_id]

    def resolve(self, record: ZoneRecord) -> ZoneRecord | None:
        """The record whose numbers hold for ``record``: itself, its nearest published ancestor, or None (unknown)."""
        return None if record.uses_zone_id is None else self._records[record.uses_zone_id]

    def in_sample(self, first_ns: int, last_ns: int) -> bool:
        """Whether the span [first_ns, last_ns] overlaps the data that this calibration was made from."""
        return any(used.first_ns <= last_ns and first_ns <= used.last_ns for used in self.artefact.inputs)

    def dumps(self) -> bytes:
        """The artefact as it stands in ``calibration.json``."""
        return dumps(self.artefact)

    @classmethod
    def loads(cls, data: bytes, *, where: str = "calibration", name: str = "") -> CalibrationTable:
        """Read ``calibration.json``. Raises TapeError when it is foreign, of an unknown major schema, or was changed."""
        advice = "Restore it from a copy, or calibrate again."
        try:
            raw = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise TapeError(f"{where} cannot be read ({error}). {advice}") from None
        schema = raw.get("schema") if isinstance(raw, dict) else None
        kind, _, version = schema.partition("/") if isinstance(schema, str) else ("", "", "")
        if kind != SCHEMA_NAME:
            raise TapeError(f"{where} is not a calibration (schema {schema!r}). Name a file that `arbl2 calibrate` wrote.")
        if version.partition(".")[0] != str(SCHEMA_MAJOR):
            raise TapeError(f"{where} has schema {schema}; this arbl2 reads major {SCHEMA_MAJOR}. Use a matching arbl2.")
        if raw.get("id") != identity(raw):
            raise TapeError(f"{where} does not match its id: it was changed after it was written. {advice}")
        try:
            artefact = msgspec.convert(raw, Artefact)
        except (msgspec.ValidationError, RecursionError) as error:
            raise TapeError(f"{where} does not follow its schema ({error}). {advice}") from None
        return cls(artefact, where=where, name=name)

    def _check(self, where: str) -> None:
        """Hold the zones against the cut points, and every fallback against the chain."""
        expected = [zone for level in self.table.levels for zone in level]
        found = [Zone(record.zone_id, record.parent_id, record.bounds) for record in self.artefact.zones]
        if found != expected:
            raise TapeError(f"{where}: its zones are not those of its cut points. Calibrate again.")
        for record in self.artefact.zones:
            if record.uses_zone_id != nearest_published(record.zone_id, self._records):
                raise TapeError(f"{where}: zone {record.zone_id} falls back wrongly. Calibrate again.")


def nearest_published(zone_id: str, records: dict[str, ZoneRecord]) -> str | None:
    """Id of the first published zone on the way up from ``zone_id`` (itself included), or None."""
    at: str | None = zone_id
    while at is not None and not records[at].published:
        at = records[at].parent_id
    return at


def identity(raw: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of an artefact without ``id`` and ``created_utc``."""
    body = {key: value for key, value in raw.items() if key not in {"id", "created_utc"}}
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()


def dumps(artefact: Artefact) -> bytes:
    """Sorted, indented JSON with the id computed anew: equal artefacts give equal bytes."""
    raw = msgspec.to_builtins(artefact)
    raw["id"] = identity(raw)
    return msgspec.json.format(msgspec.json.encode(raw, order="sorted"), indent=1) + b"\n"


def _check_cuts(name: str, lower: Sequence[float], where: str) -> None:
    rising = all(a < b for a, b in pairwise(lower))
    if not lower or lower[0] != 0 or not rising or lower[-1] >= LARGEST_CUT:
        raise ConfigError(
            f"{where}: the cut points of {name} must rise from 0, each larger than the one before it and below {LARGEST_CUT}."
        )


def _lower_ends(name: str, cuts: list[float] | None, where: str) -> tuple[float, ...]:
    if cuts is None:
        return ()
    if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != math.inf or not all(map(math.isfinite, cuts[:-1])):
        raise ConfigError(f"{where}: {name} must run from 0 to inf, for example [0, 5, 10, inf], so that no value is left out.")
    return tuple(cuts[:-1])


def _intervals(lower: tuple[N, ...]) -> list[tuple[N, N | None]]:
    upper: list[N | None] = list(lower[1:])
    upper.append(None)
    return list(zip(lower, upper, strict=True))


def _label(name: str, interval: tuple[float, float | None], scale: float = 1.0) -> str:
    low, high = (None if end is None else repr(end / scale).removesuffix(".0") for end in interval)
    return f"{name}{low}+" if high is None else f"{name}{low}-{high}"


def _chain(
    venue: str,
    side: str,
    edge: tuple[float, float | None],
    size: tuple[float, float | None],
    latency: tuple[int, int | None],
) -> tuple[Zone, Zone, Zone, Zone]:
    """A leaf and its ancestors, nearest first."""
    size_label, latency_label = _label("size", size), _label("ms", latency, 1e6)
    leaf = f"{venue}.{side}.{_label('edge', edge)}.{size_label}.{latency_label}"
    by_size = f"{venue}.{side}.{size_label}.{latency_label}"
    by_latency = f"{venue}.{side}.{latency_label}"
    return (
        Zone(
            leaf,
            by_size,
            Bounds(venue=venue, side=side, edge_bps=edge, size_over_depth=size, latency_ns=latency),
        ),
        Zone(by_size, by_latency, Bounds(venue=venue, side=side, size_over_depth=size, latency_ns=latency)),
        Zone(by_latency, ALL, Bounds(venue=venue, side=side, latency_ns=latency)),
        Zone(ALL, None, Bounds()),
    )


def _ancestors(levels: tuple[tuple[Zone, ...], ...]) -> tuple[tuple[int, ...], ...]:
    above = [tuple(range(len(levels[0])))]
    for below, level in pairwise(levels):
        place = {zone.zone_id: i for i, zone in enumerate(level)}
        above.append(tuple(place[below[i].parent_id or ""] for i in above[-1]))
    return tuple(above)
