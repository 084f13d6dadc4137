"""Integrity: what is missing or doubtful in a recording, found by looking at its frames once, in ``seq`` order.

The inspector has no clock and no file: the same frames give the same rows, live or years later, whatever the size of the
blocks. Binance diffs are chained by the venue's own rule (``U`` to ``u``, anchored by a REST book that covers the next id),
trades by their ids, partial books and book tickers by ids that never go back. Upbit numbers nothing, so its books are held to
their own totals and to the venue's clock. A stream that has talked steadily for minutes is expected to go on; one that never
did may be as quiet as it likes.

What may come from several connections at once is judged per connection where an order is asked for, and per stream where
completeness is: a late message of one leg fills the hole that another left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from arbl2.frames import BINANCE, UPBIT, VENUES, Flag, FrameKind
from arbl2_recorder.ledger import At, Cause, Gap, Heal
from arbl2_recorder.shapes import (
    BINANCE_SHAPES,
    BROKEN,
    MOST_NS,
    STREAM,
    UPBIT_SHAPES,
    bare_name,
    best_price,
    binance_kind,
    depth_symbol,
    other_spelling,
    read_alarm,
    read_closed,
    read_request,
    read_snapshot,
    read_wrapper,
    subject,
    wrong_total,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2.frames import FrameBlock
    from arbl2_recorder.shapes import Alarm, Book, Closed, Diff, Partial, ShortBook, Ticker, Trade

_S = 1_000_000_000
_TICK_NS = _S
LEARN_NS = 300 * _S
"""A stream must have talked for this long, ``LEARN_MESSAGES`` at least, before its silence means anything ..."""
LEARN_MESSAGES = 50
SILENT_NS = 60 * _S
"""... and then for this long, and ``SILENT_TIMES`` its longest pause of the last minutes, before it is called silent."""
SILENT_TIMES = 10
BLIND_NS = 15 * _S
"""Without any frame for this long nobody was looking: that time is nobody's silence."""
STALE_MS = 2_000
"""Exchange time may be this far from its usual distance to engine time."""
_SAMPLES = 64
TRADE_PATIENCE_NS = 2 * _S
"""For this long a missing trade may still come from the other leg."""
ANCHOR_NS = 180 * _S
"""A diff stream without a book to start from for longer gets a row; the books of many symbols take minutes of REST weight."""
ASK_NS = 10 * _S
"""A book that nobody has asked for by then is wanted."""
END_NS = 10 * _S
"""A connection that ended this shortly before the last frame, and was not dialled again, ended with the session."""
QUIET_NS = 100_000_000
"""Late frames that are closer together belong to one stall, whatever comes between them."""
CLOCK_NS, CLOCK_PPM = 5_000_000, 500
"""A clock that is only slewed moves less than either between two samples."""
MOST_STREAMS = 5_000
MOST_HOLES = 256
MOST_FAILURES = 256
MOST_NAME = 100
_MOST_TEXT = 200
_RECENT_TRADES = 64
_PART = 1_024
_MESSAGE, _LATE = int(FrameKind.MESSAGE), int(Flag.LATE)


class _Stream(Struct):
    """What is known of one stream of a venue: ``own`` ids, ``times`` and ``recent`` ids by connection.

    Stamps from ``heard_ns`` to ``before_ns`` count only the time that was witnessed.
    """

    venue: str
    name: str
    count: int = 0
    conn: int = 0
    last: At | None = None
    heard_ns: int = 0
    since_ns: int = 0
    window_ns: int = 0
    longest_ns: int = 0
    before_ns: int = 0
    open: dict[Cause, Gap] = {}
    own: dict[int, tuple[int, int]] = {}
    times: dict[int, int] = {}
    totals: tuple[float | None, float | None] = (None, None)
    recent: dict[int, list[int]] = {}
    # the chain of a diff or trade stream
    snapshots: bool = False
    first_id: int = -1
    last_id: int = -1
    first_at: At | None = None
    last_at: At | None = None
    anchor: int = -1
    wants: bool = False
    holes: list[_Hole] = []

    @property
    def anchored(self) -> bool:
        """Whether a book and every diff after it are there."""
        return self.anchor >= 0 and not self.holes


class _Hole(Struct):
    """Ids that are missing, and the frame that showed it."""

    gap: Gap
    seen: At


class _Venue(Struct):
    """What is known of a venue as a whole: ``asked`` is the URL of the request that has no answer yet, ``rests`` holds what
    has failed by what it was about.
    """

    asked: str = ""
    dialled_seq: int = 0
    usual_ms: int | None = None
    samples: list[int] = []
    sampled_ns: int = 0
    dials: Gap | None = None
    rests: dict[str, Gap] = {}
    books: dict[str, int] = {}


class _Lost(Struct):
    """A connection that ended, and the streams that have not come back yet; the row may begin long before the end."""

    gap: Gap
    streams: list[str]
    closed: At = (0, 0, 0)


class _State(Struct):
    """Everything an inspector remembers; JSON between two segments."""

    at: At = (0, 0, 0)
    due_ns: int = 0
    blind_ns: int = 0
    streams: dict[str, _Stream] = {}
    conns: dict[int, str] = {}
    said: dict[int, At] = {}
    venues: dict[str, _Venue] = {}
    undecodable: dict[int, Gap] = {}
    lost: list[_Lost] = []
    stall: Gap | None = None
    late_at: At = (0, 0, 0)
    clock: At | None = None
    counts: dict[str, int] = {}


_read_state = msgspec.json.Decoder(_State).decode


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 3] + "..."


# ------------------------------------------------------------------------------------------------------------ the inspector


class Inspector:
    """Fed the frames of a session in ``seq`` order, it says what is wrong with them.

    ``state`` is what another inspector's ``state`` returned: this one goes on where that one stood. Without it, ``after_seq``
    is the last frame that it will not see (0: it sees the first). Frames that were seen before are skipped. Raises msgspec
    errors for a state that is none; never for frames, whatever their bytes.
    """

    def __init__(self, state: bytes = b"", *, after_seq: int = 0) -> None:
        self._state = _read_state(state) if state else _State(at=(after_seq, 0, 0))
        self._at = self._state.at
        self._done: list[Gap] = []
        self._routes: dict[bytes, tuple[Callable[[bytes], Any], Callable[[_Stream, int, Any], None], _Stream]] = {}
        self._judges: dict[str, Callable[[_Stream, int, Any], None]] = {
            "diff": self._diff,
            "partial": self._partial,
            "ticker": self._ticker,
            "trade": self._trade,
        }
        self._time_ms = 0
        self._is_late = False
        self.last_gap = ""

    @property
    def seq(self) -> int:
        """The last frame seen."""
        return self._at[0]

    @property
    def at(self) -> At:
        """Where it stands; stamps are 0 before the first frame."""
        return self._at

    @property
    def gaps(self) -> dict[str, int]:
        """Rows by cause so far, those that are still open included."""
        counts = dict(self._state.counts)
        for gap in self._unhealed():
            counts[gap.cause] = counts.get(gap.cause, 0) + 1
        return counts

    def streams(self) -> list[tuple[str, str, int, int]]:
        """Every stream that has spoken: venue, name, messages, monotonic ns of the last one."""
        known = self._state.streams.values()
        return [(one.venue, one.name, one.count, one.last[2] if one.last else 0) for one in known if one.count]

    def state(self) -> bytes:
        """Everything it remembers."""
        self._state.at = self._at
        return msgspec.json.encode(self._state)

    def wanted(self) -> tuple[str, ...]:
        """Binance symbols (``BTCUSDT``) that need a book from the REST side, and no request for it is on its way."""
        venue = self._state.venues.get(VENUES[BINANCE])
        asked = depth_symbol(venue.asked) if venue is not None else ""
        streams = (stream for stream in self._state.streams.values() if stream.wants and not stream.anchored)
        return tuple(sorted({name for stream in streams if (name := _symbol(stream)) != asked}))

    def inspect(self, block: FrameBlock) -> list[Gap]:
        """Look at the next frames; the rows that came to an end with them."""
        for start in range(0, len(block), _PART):
            self._look(block.slice(start, start + _PART))
        done, self._done = self._done, []
        return done

    def finish(self) -> list[Gap]:
        """The session has ended: the rows that are still open, with their end where that is known."""
        for stream in self._state.streams.values():
            self._give_up_trades(stream, -1)
        if self._state.stall is not None:
            self._end_stall(self._state.stall)
        done, self._done = self._done, []
        return [*done, *self._unhealed(ended=True)]

    def _look(self, block: FrameBlock) -> None:
        low, high = int(block.offsets[0]), int(block.offsets[-1])
        data = block.data[low:high].tobytes()
        offsets = (block.offsets - low).tolist()
        # Stamps of a foreign tape may be anything: what is added to them here has to fit into 64 bits.
        stamps = (np.clip(block.recv_ns, -MOST_NS, MOST_NS), np.clip(block.mono_ns, -MOST_NS, MOST_NS))
        columns = (block.seq, *stamps, block.time_ns, block.venue, block.conn, block.kind, block.flags)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for i, (seq, recv_ns, mono_ns, time_ns, venue, conn, kind, flags) in enumerate(rows):
            before = self._at
            if seq <= before[0]:
                continue
            self._at = at = (seq, recv_ns, mono_ns)
            if seq != before[0] + 1:
                self._lose(before, seq - before[0] - 1)
            if mono_ns >= self._state.due_ns or mono_ns - before[2] > BLIND_NS:
                self._tick(before[2])
            self._is_late = is_late = bool(flags & _LATE)
            if is_late or self._state.stall is not None:
                self._stall(before, is_late=is_late)
            self._time_ms = time_ns // 1_000_000
            payload = data[offsets[i] : offsets[i + 1]]
            if kind != _MESSAGE:
                self._event(FrameKind(kind), VENUES[venue], conn, payload)
                continue
            if conn not in self._state.conns:
                self._state.conns[conn] = VENUES[venue]
            self._state.said[conn] = at
            try:
                if not payload.isascii():
                    # What the decoder skips it does not check.
                    payload.decode()
                if venue == BINANCE:
                    self._binance(conn, payload)
                elif venue == UPBIT:
                    self._upbit(conn, payload)
            except (*BROKEN, ValueError) as error:
                self._spoil(VENUES[venue], conn, payload, error)
            else:
                if conn in self._state.undecodable:
                    self._emit(self._state.undecodable.pop(conn).healed(at, Heal.NEXT_MESSAGE))

    # ---- rows

    def _gap(self, cause: Cause, venue: str, conn: int = 0, stream: str = "", at: At | None = None, **facts: Any) -> Gap:
        seq, recv_ns, mono_ns = at or self._at
        return Gap(
            cause=cause,
            venue=venue,
            conn=conn,
            stream=stream,
            start_seq=seq,
            start_recv_ns=recv_ns,
            start_mono_ns=mono_ns,
            **facts,
        )

    def _emit(self, gap: Gap) -> None:
        self._state.counts[gap.cause] = self._state.counts.get(gap.cause, 0) + 1
        self.last_gap = gap.words
        self._done.append(gap)

    def _point(self, cause: Cause, venue: str, conn: int = 0, stream: str = "", **facts: Any) -> None:
        """A row that begins and ends with this frame."""
        self._emit(self._gap(cause, venue, conn, stream, **facts).healed(self._at, Heal.NOTHING_LOST))

    def _episode(self, stream: _Stream, conn: int, cause: Cause, detail: str) -> None:
        """``detail`` says what is wrong with this message of the stream; "" ends what was wrong with those before."""
        if detail:
            if cause not in stream.open:
                stream.open[cause] = self._gap(cause, stream.venue, conn, stream.name, detail=detail)
        elif cause in stream.open:
            self._emit(stream.open.pop(cause).healed(self._at, Heal.NEXT_MESSAGE))

    def _unhealed(self, *, ended: bool = False) -> list[Gap]:
        found = [*self._state.undecodable.values()]
        for stream in self._state.streams.values():
            found += stream.open.values()
            found += [hole.gap for hole in stream.holes]
            if ended and stream.snapshots and stream.anchor < 0 and not stream.holes and self._is_unanchored(stream):
                found.append(self._unanchored(stream))
        found += [lost.gap for lost in self._state.lost if not (ended and self._ended_with_session(lost))]
        for venue in self._state.venues.values():
            found += [venue.dials] if venue.dials is not None else []
            found += venue.rests.values()
        return sorted(found, key=lambda gap: gap.start_seq)

    def _venue(self, name: str) -> _Venue:
        known = self._state.venues.get(name)
        if known is None:
            known = self._state.venues[name] = _Venue()
        return known

    # ---- time

    def _tick(self, before_ns: int) -> None:
        """About once a second of the tape: what is due by time."""
        state, now_ns = self._state, self._at[2]
        if before_ns and now_ns - before_ns > BLIND_NS:
            state.blind_ns = min(state.blind_ns + now_ns - before_ns, MOST_NS)
        state.due_ns = now_ns + _TICK_NS
        witnessed_ns = now_ns - state.blind_ns
        for stream in state.streams.values():
            if stream.holes and not stream.snapshots:
                self._give_up_trades(stream, now_ns - TRADE_PATIENCE_NS)
            if stream.snapshots and not stream.anchored and stream.first_at and now_ns - stream.first_at[2] > ASK_NS:
                stream.wants = True
            if stream.heard_ns:
                self._listen(stream, witnessed_ns)

    def _listen(self, stream: _Stream, now_ns: int) -> None:
        if now_ns - stream.window_ns > LEARN_NS:
            stream.before_ns, stream.longest_ns, stream.window_ns = stream.longest_ns, 0, now_ns
        if stream.heard_ns - stream.since_ns < LEARN_NS or stream.count < LEARN_MESSAGES or Cause.SILENT in stream.open:
            return
        usual_ns = max(stream.longest_ns, stream.before_ns)
        if now_ns - stream.heard_ns > max(SILENT_NS, SILENT_TIMES * usual_ns):
            detail = f"its longest pause was {usual_ns / _S:.1f} s"
            stream.open[Cause.SILENT] = self._gap(
                Cause.SILENT, stream.venue, stream.conn, stream.name, at=stream.last, detail=detail
            )

    def _heard(self, stream: _Stream, conn: int) -> None:
        """A message of the stream has come."""
        at = self._at
        witnessed_ns = at[2] - self._state.blind_ns
        if stream.heard_ns:
            stream.longest_ns = max(stream.longest_ns, witnessed_ns - stream.heard_ns)
        elif not stream.count:
            stream.since_ns = stream.window_ns = witnessed_ns
        stream.heard_ns = witnessed_ns
        stream.count += 1
        stream.last = at
        changed, stream.conn = stream.conn != conn, conn
        if changed and self._state.lost:
            self._return(stream)
        if stream.open and Cause.SILENT in stream.open:
            heal = Heal.RECONNECT if changed else Heal.NEXT_MESSAGE
            self._emit(stream.open.pop(Cause.SILENT).healed(at, heal))

    def _exchange_time(self, stream: _Stream, conn: int, time_ms: int, *, is_repeat: bool = False) -> None:
        """Judge the venue's clock by one message that was sent because something has just happened."""
        before_ms = stream.times.get(conn)
        stream.times[conn] = time_ms
        if before_ms is not None and time_ms < before_ms:
            detail = f"exchange time went back by {before_ms - time_ms:,} ms"
            self._point(Cause.REGRESSION, stream.venue, conn, stream.name, detail=detail)
        # Stamps of late frames are ours to doubt, and a book that is said again was not sent because it changed.
        if self._is_late or is_repeat:
            return
        venue = self._venue(stream.venue)
        distance_ms = self._time_ms - time_ms
        if venue.usual_ms is not None:
            off_ms = distance_ms - venue.usual_ms
            if abs(off_ms) > STALE_MS:
                way = "behind" if off_ms > 0 else "ahead of"
                self._episode(stream, conn, Cause.STALE_TIME, f"{abs(off_ms):,} ms {way} where it usually is")
            elif stream.open:
                self._episode(stream, conn, Cause.STALE_TIME, "")
        # A clock that is off for a few seconds must not become the usual one.
        if venue.usual_ms is not None and self._at[2] - venue.sampled_ns < _S:
            return
        venue.sampled_ns = self._at[2]
        venue.samples.append(distance_ms)
        if len(venue.samples) >= _SAMPLES:
            venue.usual_ms, venue.samples = sorted(venue.samples)[_SAMPLES // 2], []

    def _stall(self, before: At, *, is_late: bool) -> None:
        stall, late_at = self._state.stall, self._state.late_at
        # Late frames without another between them are one stall, however long it lasts.
        if stall is not None and self._at[2] - late_at[2] >= QUIET_NS and not (is_late and before == late_at):
            self._end_stall(stall)
            stall = None
        if is_late:
            if stall is None:
                waited_ms = (self._at[2] - before[2]) / 1e6
                detail = f"nothing was read for {waited_ms:,.0f} ms before the first of them" if before[1] else ""
                stall = self._gap(Cause.LOOP_STALL, "", at=before if before[1] else None, missed=0, detail=detail)
            self._state.stall = msgspec.structs.replace(stall, missed=(stall.missed or 0) + 1)
            self._state.late_at = self._at

    def _end_stall(self, stall: Gap) -> None:
        self._state.stall = None
        detail = "; ".join(filter(None, (f"{stall.missed:,} frames came late", stall.detail)))
        closed = stall.healed(self._state.late_at, Heal.NEXT_MESSAGE)
        self._emit(msgspec.structs.replace(closed, missed=None, detail=detail))

    def _lose(self, before: At, count: int) -> None:
        start = before if before[1] else (before[0], self._at[1], self._at[2])
        gap = self._gap(Cause.LOST_FRAMES, "", at=start, missed=count)
        self._emit(gap.healed(self._at, Heal.NEXT_MESSAGE))

    # ---- streams

    def _stream(self, venue: str, name: str) -> _Stream | None:
        """What is known of the stream; None for one too many, or a name that is none."""
        key = f"{venue}/{name}"
        stream = self._state.streams.get(key)
        if stream is None and len(self._state.streams) < MOST_STREAMS and len(name) <= MOST_NAME:
            stream = self._state.streams[key] = _Stream(venue, name)
        return stream

    def _binance(self, conn: int, payload: bytes) -> None:
        if payload.startswith(STREAM):
            end = payload.find(b'"', len(STREAM))
            route = self._routes.get(payload[len(STREAM) : end])
            if route is not None:
                decode, judge, stream = route
                judge(stream, conn, decode(payload).data)
                return
        message = read_wrapper(payload)
        if message.stream is not None:
            name, body = message.stream, message.data
        else:
            name, body = bare_name(message), payload
        kind = binance_kind(name)
        if kind == "other":
            # Acks, notices and what is not watched; an ack of a raw connection has no name at all.
            return
        decode_whole, decode = BINANCE_SHAPES[kind]
        data = decode(body)
        found = self._stream(VENUES[BINANCE], name)
        if found is None:
            return
        found.snapshots = kind == "diff"
        judge = self._judges[kind]
        if message.stream is not None and payload.startswith(STREAM):
            self._routes[payload[len(STREAM) : payload.find(b'"', len(STREAM))]] = decode_whole, judge, found
        judge(found, conn, data)

    def _partial(self, stream: _Stream, conn: int, data: Partial) -> None:
        bid, ask = best_price(data.bids), best_price(data.asks)
        self._heard(stream, conn)
        self._never_back(stream, conn, data.last_id)
        self._touch(stream, conn, bid, ask)

    def _ticker(self, stream: _Stream, conn: int, data: Ticker) -> None:
        bid, ask = float(data.bid), float(data.ask)
        self._heard(stream, conn)
        self._never_back(stream, conn, data.last_id)
        self._touch(stream, conn, bid or None, ask or None)

    def _never_back(self, stream: _Stream, conn: int, number: int) -> None:
        before = stream.own.get(conn)
        stream.own[conn] = (number, number)
        if before is not None and number < before[1]:
            detail = f"after {before[1]}"
            self._point(Cause.REGRESSION, stream.venue, conn, stream.name, first_id=number, last_id=number, detail=detail)

    def _touch(self, stream: _Stream, conn: int, bid: float | None, ask: float | None) -> None:
        if bid is not None and ask is not None and bid >= ask:
            self._episode(stream, conn, Cause.CROSSED, f"bid {bid:.8f}, ask {ask:.8f}")
        elif stream.open:
            self._episode(stream, conn, Cause.CROSSED, "")

    def _upbit(self, conn: int, payload: bytes) -> None:
        shape = next((shape for front, shape in UPBIT_SHAPES.items() if payload.startswith(front)), None)
        shape = shape or other_spelling(payload)
        if shape is None:
            return
        kind, decode = shape
        data = decode(payload)
        stream = self._stream(VENUES[UPBIT], f"{data.code}@{'orderbook' if kind == 'book' else 'trade'}")
        if stream is None:
            return
        self._heard(stream, conn)
        if kind == "book":
            self._book(stream, conn, data)
        elif data.stream != "SNAPSHOT":
            self._upbit_trade(stream, conn, data.number)

    def _book(self, stream: _Stream, conn: int, book: Book | ShortBook) -> None:
        units = book.units
        if units:
            best = units[0]
            self._touch(stream, conn, best.bid or None, best.ask or None)
        wrong = wrong_total("ask", book.asks, [unit.ask_size for unit in units])
        wrong = wrong or wrong_total("bid", book.bids, [unit.bid_size for unit in units])
        if wrong or stream.open:
            self._episode(stream, conn, Cause.WRONG_TOTAL, wrong)
        totals = (book.asks, book.bids)
        # The first book after a subscription may be minutes old.
        if book.stream != "SNAPSHOT":
            is_repeat = totals == stream.totals and stream.times.get(conn) == book.time
            self._exchange_time(stream, conn, book.time, is_repeat=is_repeat)
        stream.totals = totals

    def _upbit_trade(self, stream: _Stream, conn: int, number: int) -> None:
        """Ids are unique, not ordered. What was told on another connection may be told again on this one."""
        recent = stream.recent.setdefault(conn, [])
        if number in recent:
            self._point(Cause.DUPLICATE, stream.venue, conn, stream.name, first_id=number, last_id=number)
            return
        recent.append(number)
        if len(recent) > _RECENT_TRADES:
            del recent[0]

    # ---- chains of ids

    def _diff(self, stream: _Stream, conn: int, data: Diff) -> None:
        if data.last < data.first:
            raise ValueError(f"a diff from {data.first} to {data.last}")
        self._heard(stream, conn)
        if self._chain(stream, conn, data.first, data.last) and data.time is not None:
            # Microseconds, if they were asked for.
            self._exchange_time(stream, conn, data.time if data.time < 10**14 else data.time // 1000)

    def _trade(self, stream: _Stream, conn: int, data: Trade) -> None:
        self._heard(stream, conn)
        self._chain(stream, conn, data.number, data.number)

    def _chain(self, stream: _Stream, conn: int, first: int, last: int) -> bool:
        """Take the next link; False if this connection had told it before."""
        before = stream.own.get(conn)
        if before is not None and first <= before[1]:
            if (first, last) == before:
                self._point(Cause.DUPLICATE, stream.venue, conn, stream.name, first_id=first, last_id=last)
                return False
            if last <= before[1]:
                detail = f"after {before[1]}"
                self._point(Cause.REGRESSION, stream.venue, conn, stream.name, first_id=first, last_id=last, detail=detail)
                return False
            self._point(Cause.OVERLAP, stream.venue, conn, stream.name, first_id=first, last_id=before[1])
        stream.own[conn] = (first, last)
        if stream.last_id < 0:
            self._begin(stream, first)
        elif first > stream.last_id + 1:
            self._miss(stream, conn, first)
        elif stream.holes:
            self._fill(stream, first, last)
        if last > stream.last_id:
            stream.last_id, stream.last_at = last, self._at
        return True

    def _begin(self, stream: _Stream, first: int) -> None:
        stream.first_id, stream.first_at = first, self._at
        if stream.snapshots:
            books = self._venue(stream.venue).books
            book_id = books.get(_symbol(stream), books.get("", -1))
            if book_id + 1 >= first:
                stream.anchor = book_id

    def _miss(self, stream: _Stream, conn: int, first: int) -> None:
        missed = first - stream.last_id - 1
        ids: dict[str, int] = {"first_id": stream.last_id + 1, "last_id": first - 1, "missed": missed}
        gap = self._gap(Cause.GAP, stream.venue, conn, stream.name, at=stream.last_at, **ids)
        if stream.snapshots and stream.anchor >= first - 1:
            self._emit(gap.healed(self._at, Heal.SNAPSHOT))
            return
        stream.holes.append(_Hole(gap, self._at))
        stream.wants = stream.snapshots
        if len(stream.holes) > MOST_HOLES:
            oldest = stream.holes.pop(0)
            self._emit(oldest.gap if stream.snapshots else oldest.gap.healed(oldest.seen, Heal.NEXT_MESSAGE))

    def _fill(self, stream: _Stream, first: int, last: int) -> None:
        """What one leg missed has come from another."""
        left: list[_Hole] = []
        for hole in stream.holes:
            low, high = _ids(hole.gap)
            if first > high or last < low:
                left.append(hole)
                continue
            came = _with_ids(hole.gap, max(first, low), min(last, high))
            self._emit(came.healed(self._at, Heal.OTHER_LEG))
            left += [
                _Hole(_with_ids(hole.gap, *rest), hole.seen)
                for rest in ((low, first - 1), (last + 1, high))
                if rest[0] <= rest[1]
            ]
        stream.holes = left
        stream.wants = stream.wants and not stream.anchored

    def _give_up_trades(self, stream: _Stream, seen_before_ns: int) -> None:
        """Trades that are missing since then will not come any more; with -1, since whenever."""
        if stream.snapshots:
            return
        while stream.holes and (seen_before_ns < 0 or stream.holes[0].seen[2] < seen_before_ns):
            hole = stream.holes.pop(0)
            self._emit(hole.gap.healed(hole.seen, Heal.NEXT_MESSAGE))

    def _anchor(self, stream: _Stream, book_id: int) -> None:
        """A book of the REST side has come: its next id must not lie before the diffs that follow the last hole."""
        if stream.last_id < 0:
            return
        first = _ids(stream.holes[-1].gap)[1] + 1 if stream.holes else stream.first_id
        if book_id + 1 < first:
            stream.wants = True
            return
        if stream.anchor < 0 and self._is_unanchored(stream) and not stream.holes:
            self._emit(self._unanchored(stream).healed(self._at, Heal.SNAPSHOT))
        for hole in stream.holes:
            self._emit(hole.gap.healed(self._at, Heal.SNAPSHOT))
        stream.holes = []
        stream.first_id, stream.anchor, stream.wants = first, max(book_id, stream.anchor), False

    def _is_unanchored(self, stream: _Stream) -> bool:
        return stream.first_at is not None and self._at[2] - stream.first_at[2] > ANCHOR_NS

    def _unanchored(self, stream: _Stream) -> Gap:
        return self._gap(Cause.NO_SNAPSHOT, stream.venue, 0, stream.name, at=stream.first_at, first_id=stream.first_id)

    # ---- what is no message

    def _event(self, kind: FrameKind, venue: str, conn: int, payload: bytes) -> None:
        try:
            match kind:
                case FrameKind.OPENED:
                    self._opened(venue, conn)
                case FrameKind.CLOSED:
                    self._ended(venue, conn, read_closed(payload))
                case FrameKind.REQUEST:
                    self._venue(venue).asked = read_request(payload).url[:4096]
                case FrameKind.RESPONSE:
                    self._response(venue, payload)
                case FrameKind.CLOCK:
                    self._clock()
                case FrameKind.ALARM:
                    self._alarm(venue, conn, read_alarm(payload))
        except (*BROKEN, ValueError) as error:
            # The bytes of a foreign capture's line that could not be read are kept as an alarm.
            detail = _short(f"{kind.name.lower()}, {len(payload):,} bytes: {error}")
            self._point(Cause.UNDECODABLE, venue, conn, missed=1, detail=detail)

    def _spoil(self, venue: str, conn: int, payload: bytes, error: Exception) -> None:
        bad = self._state.undecodable
        if conn in bad:
            bad[conn] = msgspec.structs.replace(bad[conn], missed=(bad[conn].missed or 0) + 1)
        else:
            detail = _short(f"{len(payload):,} bytes: {error}")
            bad[conn] = self._gap(Cause.UNDECODABLE, venue, conn, missed=1, detail=detail)

    def _opened(self, venue: str, conn: int) -> None:
        state = self._state
        state.conns[conn] = venue
        known = self._venue(venue)
        known.dialled_seq = self._at[0]
        if known.dials is not None:
            self._emit(known.dials.healed(self._at, Heal.RECONNECT))
            known.dials = None
        for lost in [lost for lost in state.lost if lost.gap.venue == venue and not lost.streams]:
            self._come_back(lost)

    def _ended(self, venue: str, conn: int, closed: Closed) -> None:
        state = self._state
        known = self._venue(venue)
        detail = _short(" ".join(filter(None, (f"code {closed.code}" if closed.code is not None else "", closed.reason))))
        if state.conns.pop(conn, None) is None:
            known.dialled_seq = self._at[0]
            before = known.dials or self._gap(Cause.DIAL_FAILED, venue, missed=0)
            known.dials = msgspec.structs.replace(before, missed=(before.missed or 0) + 1, detail=detail)
            return
        if conn in state.undecodable:
            self._emit(state.undecodable.pop(conn).healed(self._at, Heal.CLOSED))
        said = state.said.pop(conn, None)
        for stream in state.streams.values():
            stream.own.pop(conn, None)
            stream.times.pop(conn, None)
            stream.recent.pop(conn, None)
        if closed.covered:
            # Replaced before it ended: that is how every connection should end.
            if not closed.clean:
                gap = self._gap(Cause.DISCONNECT, venue, conn, missed=0, detail=detail)
                self._emit(gap.healed(self._at, Heal.OTHER_LEG))
            return
        carried = self._carried(venue, conn)
        start = self._at
        if carried and (closed.error or not closed.clean):
            # It may have been dead for long before anybody noticed. What its twin said first is not on the tape as its own.
            start = max([stream.last for stream in carried if stream.last] + ([said] if said else []), default=start)
        for stream in carried:
            stream.heard_ns = 0
        gap = self._gap(Cause.DISCONNECT, venue, conn, at=start, detail=detail)
        state.lost.append(_Lost(gap, [stream.name for stream in carried], self._at))

    def _carried(self, venue: str, conn: int) -> list[_Stream]:
        """The streams that are lost with a connection: what it was the last to say.

        If its twin was first with everything and has ended already, covered by this one, what that one said last is lost now.
        """
        mine = [stream for stream in self._state.streams.values() if stream.venue == venue]
        carried = [stream for stream in mine if stream.conn == conn]
        known = {name for lost in self._state.lost if lost.gap.venue == venue for name in lost.streams}
        left = [stream for stream in mine if stream.last and stream.conn not in self._state.conns and stream.name not in known]
        if carried or not left:
            return carried
        last = max(left, key=lambda stream: stream.last or (0, 0, 0))
        return [stream for stream in left if stream.conn == last.conn]

    def _return(self, stream: _Stream) -> None:
        """The first stream that speaks again on another connection ends the outage of the one before."""
        for lost in [lost for lost in self._state.lost if lost.gap.venue == stream.venue and stream.name in lost.streams]:
            self._come_back(lost)

    def _come_back(self, lost: _Lost) -> None:
        self._state.lost.remove(lost)
        self._emit(lost.gap.healed(self._at, Heal.RECONNECT))

    def _ended_with_session(self, lost: _Lost) -> bool:
        seq, _, mono_ns = lost.closed
        return self._at[2] - mono_ns < END_NS and self._venue(lost.gap.venue).dialled_seq < seq

    def _response(self, venue: str, body: bytes) -> None:
        known = self._venue(venue)
        asked, known.asked = known.asked, ""
        failed = known.rests.pop(subject(asked), None)
        if failed is not None:
            self._emit(failed.healed(self._at, Heal.RESPONSE))
        symbol = depth_symbol(asked)
        if venue != VENUES[BINANCE] or (asked and not symbol):
            return
        chains = [stream for stream in self._state.streams.values() if stream.snapshots and stream.venue == venue]
        if not asked:
            # A foreign capture holds no requests: if one symbol has diffs, the book is its own.
            if b'"lastUpdateId"' not in body[:200]:
                return
            names = {_symbol(stream) for stream in chains}
            if len(names) > 1:
                return
            symbol = names.pop() if names else ""
        mine = [stream for stream in chains if _symbol(stream) == symbol]
        try:
            book_id = read_snapshot(body).last_id
        except BROKEN:
            for stream in mine:
                stream.wants = not stream.anchored
            raise
        if len(known.books) < MOST_STREAMS:
            known.books[symbol] = book_id
        for stream in mine:
            self._anchor(stream, book_id)

    def _clock(self) -> None:
        before, self._state.clock = self._state.clock, self._at
        if before is None:
            return
        passed_ns = self._at[2] - before[2]
        moved_ns = (self._at[1] - before[1]) - passed_ns
        if abs(moved_ns) > max(CLOCK_NS, passed_ns * CLOCK_PPM // 1_000_000):
            gap = self._gap(Cause.CLOCK_STEP, "", at=before, detail=f"the wall clock moved by {moved_ns / 1e6:+,.1f} ms")
            self._emit(gap.healed(self._at, Heal.NOTHING_LOST))

    def _alarm(self, venue: str, conn: int, alarm: Alarm) -> None:
        known = self._venue(venue)
        detail = _short(alarm.said or alarm.url)
        match alarm.alarm:
            case "clock_step":
                pass  # the samples themselves say so
            case "dropped":
                self._dropped(venue, conn, alarm)
            case "silent":
                stream = self._stream(venue, alarm.stream)
                if stream is not None and Cause.SILENT not in stream.open:
                    gap = self._gap(Cause.SILENT, venue, conn, alarm.stream, detail="it has not said anything yet")
                    stream.open[Cause.SILENT], stream.conn = gap, conn
            case "stalled":
                waited_ns = int(min(max(alarm.silent_s, 0.0), 1e6) * _S)
                start = (self._at[0], self._at[1] - waited_ns, self._at[2] - waited_ns)
                self._emit(self._gap(Cause.STALLED, venue, conn, at=start).healed(self._at, Heal.CLOSED))
            case "rest_failed":
                known.asked = ""
                what = subject(alarm.url)
                before = known.rests.get(what) or self._gap(Cause.REST_FAILED, venue, missed=0)
                text = _short(f"{alarm.said}; {alarm.url}")
                known.rests[what] = msgspec.structs.replace(before, missed=(before.missed or 0) + 1, detail=text)
                if len(known.rests) > MOST_FAILURES:
                    self._emit(known.rests.pop(next(iter(known.rests))))
                symbol = depth_symbol(alarm.url)
                for stream in self._state.streams.values():
                    stream.wants = stream.wants or (stream.snapshots and _symbol(stream) == symbol and not stream.anchored)
            case "no_ack" | "venue_error" | "venue_shutdown":
                self._point(Cause(alarm.alarm), venue, conn, detail=detail)
            case _:
                self._point(Cause.ALARM, venue, conn, alarm.stream[:MOST_NAME], detail=_short(f"{alarm.alarm}: {detail}"))

    def _dropped(self, venue: str, conn: int, alarm: Alarm) -> None:
        seq, recv_ns, mono_ns = self._at
        start, end = alarm.from_recv_ns or recv_ns, alarm.to_recv_ns or recv_ns
        gap = self._gap(Cause.DROPPED, venue, conn, at=(seq, start, mono_ns - min(recv_ns - start, MOST_NS)), missed=alarm.frames)
        self._emit(gap.healed((seq, end, mono_ns - min(recv_ns - end, MOST_NS)), Heal.NEXT_MESSAGE))


def _symbol(stream: _Stream) -> str:
    return stream.name.partition("@")[0].upper()


def _ids(gap: Gap) -> tuple[int, int]:
    assert gap.first_id is not None
    assert gap.last_id is not None
    return gap.first_id, gap.last_id


def _with_ids(gap: Gap, first: int, last: int) -> Gap:
    return msgspec.structs.replace(gap, first_id=first, last_id=last, missed=last - first + 1)
