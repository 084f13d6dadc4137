"""The engine: frames in, decisions and fills out; no clock, no socket, no file.

``feed`` takes a block of frames (one when live, thousands when replaying) through providers, books, aggregator, policy and
executor; ``drain`` hands over the event rows made since the last call; ``finish`` closes the books of the run. The split into
blocks changes nothing: a test holds it.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2 import kernels
from arbl2.aggregator import MultiExchangeL2Aggregator
from arbl2.book import State, Universe, set_rules
from arbl2.config import RunConfig
from arbl2.digest import RunDigest
from arbl2.errors import EngineError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE, FillStatus, Outcome
from arbl2.frames import BINANCE, VENUES, Anchor, ExchangeId, FrameBlock, FrameKind
from arbl2.kernels import GAP_MS
from arbl2.ledger import Ledger
from arbl2.money import INT64_MAX
from arbl2.policy import Ask, Policy, ThresholdPolicy, View
from arbl2.providers import PROVIDERS
from arbl2.rules import BinanceRules, binance_rules_from_exchange_info
from arbl2.updates import Reason, UpdateBlock, What

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


_LOG = logging.getLogger("arbl2.engine")

MAX_BLOCK = 2_048
"""Frames taken through the loop at once: their levels stay in the processor's cache."""

_KIND_REASONS = {
    FrameKind.MESSAGE: Reason.OTHER_MESSAGE,  # until the venue's provider has read it
    FrameKind.SENT: Reason.SENT,
    FrameKind.OPENED: Reason.OPENED,
    FrameKind.CLOSED: Reason.CLOSED,
    FrameKind.REQUEST: Reason.REQUEST,
    FrameKind.RESPONSE: Reason.REST,
    FrameKind.CLOCK: Reason.CLOCK,
    FrameKind.ALARM: Reason.ALARM,
}


@dataclass(frozen=True, slots=True)
class Events:
    """Event rows in the order written (``DECISION_DTYPE``, ``FILL_DTYPE``)."""

    decisions: NDArray[Any]
    fills: NDArray[Any]


class Engine:
    """One run. ``instruments`` names what the tape holds by venue.

    ``policy`` is the compiled threshold policy of the configuration unless a Python policy is given. ``scanner=False`` decodes
    every message with the strict library decoder (slow; the result is the same).
    """

    def __init__(
        self,
        instruments: Mapping[str, Sequence[str]],
        config: RunConfig,
        *,
        policy: Policy | None = None,
        scanner: bool = True,
    ) -> None:
        self.config = config
        self.universe = Universe.of(instruments, config.symbols)
        self.state = State.build(self.universe, config)
        self.aggregator = MultiExchangeL2Aggregator(self.universe, self.state)
        self.ledger = Ledger(self.universe, self.state)
        self.policy: Policy | ThresholdPolicy = policy or ThresholdPolicy(config.policy)
        self._providers = [PROVIDERS[venue](self.universe.books(venue), scanner=scanner) for venue in ExchangeId]
        self._updates = UpdateBlock.allocate(MAX_BLOCK)
        self._reasons = np.zeros((len(VENUES), 64), np.int64)
        self._decisions: list[NDArray[Any]] = []
        self._fills: list[NDArray[Any]] = []
        self._digest = RunDigest(config.canonical())
        self._kind_reason = np.zeros(16, np.uint8)
        for kind, reason in _KIND_REASONS.items():
            self._kind_reason[kind] = reason
        self._recorded_rules: dict[str, BinanceRules] = {}
        self.frames = 0
        self.finished = False

    def feed(self, block: FrameBlock) -> None:
        """Take a block of frames through the whole path, in order. Raises EngineError after ``finish`` or on an overflow."""
        if self.finished:
            raise EngineError("this run has ended; make a new Engine for more frames.")
        # the checksum of books wraps on purpose, which NumPy reports when the kernels run uncompiled
        with np.errstate(over="ignore"):
            for start in range(0, len(block), MAX_BLOCK):
                self._feed(block.slice(start, min(start + MAX_BLOCK, len(block))))

    def _feed(self, block: FrameBlock) -> None:
        n = len(block)
        u = self._updates
        u.what[:n] = What.NOTHING
        for row in np.flatnonzero(block.kind == FrameKind.CLOSED).tolist():
            # Another connection goes on with the same streams: their books stay what they are.
            if b'"covered":true' not in block.payload(row):
                u.what[row] = What.CLOSED
        for row in np.flatnonzero(block.kind == FrameKind.ALARM).tolist():
            if b'"alarm":"dropped"' in block.payload(row):
                u.what[row] = What.LOST
        u.reason[:n] = self._kind_reason[block.kind]
        u.book[:n] = -1
        u.cursor[0] = 0
        for provider in self._providers:
            provider.decode(block, u)
        first = 0
        for stop in [*self._rule_rows(block), n]:
            self._run_rows(block, first, stop)
            if stop < n and not self._read_rules(block.payload(stop)):
                u.reason[stop] = Reason.BAD_RULES
            first = stop
        self._reasons += np.bincount(block.venue * 64 + u.reason[:n].astype(np.int64), minlength=64 * len(VENUES)).reshape(-1, 64)
        self.frames += n

    def _run_rows(self, block: FrameBlock, first: int, last: int) -> None:
        u = self._updates
        while first < last:
            first = self._run(block, first, last)
            counters = self.state.counters[0]
            self._stop_on_overflow()
            if not isinstance(self.policy, ThresholdPolicy):
                self._ask_policy(self.policy, u, first - 1, int(block.seq[first - 1]))
            if counters["decisions"] or counters["fills"]:
                self._collect()

    def _stop_on_overflow(self) -> None:
        order_id = int(self.state.counters[0]["overflow"])
        if order_id:
            raise EngineError(
                f"order {order_id} moves an amount that does not fit in 64 bits of 10^-8 (92 billion of a currency). "
                "Lower the balances or the size in the configuration, or look for absurd prices on the tape."
            )

    def _rule_rows(self, block: FrameBlock) -> list[int]:
        """Frames that hold a body of Binance's exchangeInfo: order rules that count from there on."""
        rows = np.flatnonzero((block.kind == FrameKind.RESPONSE) & (block.venue == BINANCE)).tolist()
        return [row for row in rows if b'"symbols"' in block.payload(row)]

    def _read_rules(self, body: bytes) -> bool:
        try:
            recorded = binance_rules_from_exchange_info(body)
        except TapeError as error:
            _LOG.warning("a recorded exchangeInfo is left out: %s", error)
            return False
        self._recorded_rules.update(recorded)
        set_rules(self.state.pairs, self.universe, self.config, self._recorded_rules)
        return True

    def _run(self, block: FrameBlock, first: int, last: int) -> int:
        s, u = self.state, self._updates
        return kernels.run(
            s.books, s.counts, s.px, s.qty, s.eaten, s.gaps, s.pairs, s.config,
            s.balance, s.locked, s.orders, s.order_state, s.taken, s.counters, s.decisions, s.fills, s.view, s.ask,
            block.seq, block.time_ns, block.venue, block.conn,
            u.what, u.reason, u.book, u.exchange_ms, u.update_id, u.start, u.n_bid, u.n_ask, u.px_e8, u.qty_e8,
            first, last, isinstance(self.policy, ThresholdPolicy),
        )  # fmt: skip

    def _ask_policy(self, policy: Policy, u: UpdateBlock, row: int, seq: int) -> None:
        """Show a Python policy every pair that the update may have changed, as the compiled loop does for its own."""
        if u.what[row] != What.BOOK:
            return
        s = self.state
        book = s.books[u.book[row]]
        pairs = range(len(s.pairs)) if book["is_fx"] else range(book["pair"], book["pair"] + 1)
        time_ns = int(s.counters[0]["time_ns"])
        for k in pairs:
            if k < 0 or s.pairs[k]["in_flight"] > 0:
                continue
            usable = kernels.look(s.books, s.counts, s.px, s.qty, s.eaten, s.pairs, s.config, k, time_ns, seq, s.view)
            ask = policy.decide(self._view(k)) if usable else None
            kernels.end_episodes(s.pairs, k, s.view, usable)
            if ask:
                self._submit(k, ask)

    def _submit(self, pair: int, ask: Ask) -> None:
        s = self.state
        # a size beyond 64 bits is refused like any other that makes no sense
        sizes = (size if 0 <= size <= INT64_MAX else -1 for size in (ask.upbit_size_e8, ask.binance_size_e8))
        s.ask[:] = (ask.direction, ask.intent, *sizes)
        kernels.submit(
            s.books, s.counts, s.px, s.qty, s.pairs, s.config, s.balance, s.locked,
            s.orders, s.order_state, s.taken, s.counters, s.decisions, pair, s.view, s.ask,
        )  # fmt: skip

    def _view(self, pair: int) -> View:
        v, p = self.state.view[0], self.state.pairs[pair]
        held = p["position_e8"]
        return View(
            symbol=self.universe.symbols[pair],
            time_ns=int(v["time_ns"]),
            seq=int(v["seq"]),
            sell_upbit_bps=float(v["sell_upbit_bps"]),
            buy_upbit_bps=float(v["buy_upbit_bps"]),
            upbit_bid_e8=int(v["upbit_bid_e8"]),
            upbit_ask_e8=int(v["upbit_ask_e8"]),
            binance_bid_e8=int(v["binance_bid_e8"]),
            binance_ask_e8=int(v["binance_ask_e8"]),
            fx_bid_e8=int(v["fx_bid_e8"]),
            fx_ask_e8=int(v["fx_ask_e8"]),
            held_upbit_e8=int(held[VENUES.index(ExchangeId.UPBIT)]),
            held_binance_e8=int(held[VENUES.index(ExchangeId.BINANCE)]),
        )

    def _collect(self) -> None:
        counters = self.state.counters[0]
        decisions = self.state.decisions[: counters["decisions"]].copy()
        fills = self.state.fills[: counters["fills"]].copy()
        counters["decisions"] = counters["fills"] = 0
        self._digest.update(decisions, fills)
        self.ledger.add(fills)
        self._decisions.append(decisions)
        self._fills.append(fills)

    def drain(self) -> Events:
        """The event rows made since the last call, in the order written."""
        decisions, self._decisions = self._decisions, []
        fills, self._fills = self._fills, []
        return Events(
            decisions=np.concatenate(decisions) if decisions else np.zeros(0, DECISION_DTYPE),
            fills=np.concatenate(fills) if fills else np.zeros(0, FILL_DTYPE),
        )

    def finish(self) -> None:
        """The tape ends: orders that arrived by the last frame execute, the rest is written as it stands.

        Raises EngineError if the ledger does not reconcile to zero.
        """
        if self.finished:
            return
        s = self.state
        counters = s.counters[0]
        with np.errstate(over="ignore"):
            kernels.advance(
                s.books, s.counts, s.px, s.qty, s.eaten, s.pairs, s.config, s.balance, s.locked,
                s.orders, s.order_state, s.taken, s.counters, s.fills, int(counters["time_ns"]) + 1,
            )  # fmt: skip
        self._stop_on_overflow()
        left = s.orders[: counters["active"]].copy()
        left["status"][left["status"] == 0] = FillStatus.IN_FLIGHT
        count = int(counters["fills"])
        s.fills[count : count + len(left)] = left
        counters["fills"] += len(left)
        counters["active"] = 0
        self._collect()
        self.ledger.reconcile()
        self.finished = True

    def books(self) -> list[dict[str, int | str]]:
        """Every book of the run: what it is, how often it was updated, and the time between its updates.

        ``gap_*_ns`` come from a histogram of 1 ms (of 1 s beyond a second); 0: there was no gap, or it is beyond 10 minutes.
        """
        s = self.state
        rows: list[dict[str, int | str]] = []
        for k, instrument in enumerate(self.universe.instruments):
            pair = int(s.books[k]["pair"])
            rows.append(
                {
                    "venue": str(instrument.venue),
                    "instrument": instrument.name,
                    "symbol": self.universe.symbols[pair] if pair >= 0 else "",
                    "updates": int(s.books[k]["updates"]),
                    "gap_median_ns": _quantile_ns(s.gaps[k], 0.5),
                    "gap_p99_ns": _quantile_ns(s.gaps[k], 0.99),
                    "best_bid_e8": int(s.px[k, 0, 0]) if s.counts[k, 0, 0] else 0,
                    "best_ask_e8": int(s.px[k, 1, 0]) if s.counts[k, 1, 0] else 0,
                }
            )
        return rows

    def reasons(self) -> dict[str, dict[str, int]]:
        """How many frames were what, by venue ("-" = none) and reason label."""
        return {
            VENUES[v] or "-": {Reason(r).label: int(self._reasons[v, r]) for r in np.flatnonzero(self._reasons[v]).tolist()}
            for v in range(len(VENUES))
            if self._reasons[v].any()
        }

    def refusals(self) -> dict[str, int]:
        """Every refused ask by reason, written as a decision or not."""
        counts = self.state.counters[0]["refusals"]
        return {outcome.name.lower(): int(counts[outcome]) for outcome in Outcome if counts[outcome]}

    def digest(self) -> str:
        """The run's digest so far; final after ``finish``."""
        s = self.state
        closing = {
            "instruments": [f"{i.venue}:{i.name}" for i in self.universe.instruments],
            "symbols": list(self.universe.symbols),
            "frames": self.frames,
            "reasons": self.reasons(),
            "refusals": self.refusals(),
            "lots": s.pairs["lot_e8"].tolist(),
            "balance": s.balance.tolist(),
            "books": [[int(b["updates"]), int(b["checksum"])] for b in s.books],
        }
        return self._digest.result(closing)


@functools.cache
def warm_up() -> None:
    """Compile every kernel of a replay, or load it from numba's cache: seconds to half a minute the first time, then nothing."""
    engine = Engine({"upbit": ["KRW-BTC", "KRW-USDT"], "binance": ["BTCUSDT"]}, RunConfig())
    empty = FrameBlock.from_frames([], Anchor(0, 0))
    engine._feed(empty)
    engine._run(empty, 0, 0)
    engine.finish()


def _quantile_ns(histogram: NDArray[np.int64], share: float) -> int:
    """Upper edge of the bucket that holds the quantile; 0 if there is none or it lies in the last, open bucket."""
    total = int(histogram.sum())
    bucket = int(np.searchsorted(np.cumsum(histogram), share * total))
    if total == 0 or bucket >= len(histogram) - 1:
        return 0
    edge_ms = bucket + 1 if bucket < GAP_MS else (bucket - GAP_MS + 2) * 1_000
    return edge_ms * 1_000_000
