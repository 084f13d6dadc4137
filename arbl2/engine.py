"""The engine: frames in, decisions and fills out; no clock, no socket, no file.

``feed`` takes a block of frames (one when live, thousands when replaying) through providers, books, aggregator, policy and
executor; ``drain`` hands over the event rows made since the last call; ``finish`` closes the books of the run. The split into
blocks changes nothing: a test holds it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from arbl2 import kernels
from arbl2.aggregator import MultiExchangeL2Aggregator
from arbl2.book import (
    Universe,
    best_px_e8,
    new_state,
    pack_books,
    pack_run,
    set_rules,
    unpack_books,
    unpack_run,
)
from arbl2.config import RunConfig
from arbl2.decoding import Decoder, fitting
from arbl2.digest import RunDigest
from arbl2.errors import ConfigError, EngineError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE, FillStatus, Outcome
from arbl2.frames import BINANCE, VENUES, Anchor, ExchangeId, Frame, FrameBlock, FrameKind, Op
from arbl2.kernels import GAP_MS
from arbl2.ledger import Ledger
from arbl2.money import INT64_MAX
from arbl2.policy import Ask, Policy, ThresholdPolicy, View
from arbl2.rules import BinanceRules, binance_rules_from_exchange_info
from arbl2.updates import HOME_LEVELS, Reason, UpdateBlock, What

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


Decode = Callable[[FrameBlock, UpdateBlock], int]
"""Fills the rows of updates of the first frames of a block, their stamps too (``Engine.decode``); returns how many."""

_LOG = logging.getLogger("arbl2.engine")
_RESPONSE = int(FrameKind.RESPONSE)


@dataclass(frozen=True, slots=True)
class Events:
    """Event rows in the order written (``DECISION_DTYPE``, ``FILL_DTYPE``)."""

    decisions: NDArray[Any]
    fills: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run in the middle: plain JSON values and named arrays."""

    meta: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


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
        self.state = new_state(self.universe, config)
        self._updates = self.state.u
        # views that are made once: they are looked at after every block, be it of one frame
        self._overflow, self._decided, self._filled = (self.state.counters[name] for name in ("overflow", "decisions", "fills"))
        self._compiled = isinstance(self.state.records, np.ndarray)
        self.aggregator = MultiExchangeL2Aggregator(self.universe, self.state)
        self.ledger = Ledger(self.universe, self.state)
        self.policy: Policy | ThresholdPolicy = policy or ThresholdPolicy(config.policy)
        self._decoder = Decoder(self.universe, scanner=scanner)
        self._events: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._posted = 0
        self._digest = RunDigest(config.canonical())
        self._recorded_rules: dict[str, BinanceRules] = {}
        self.frames = 0
        self.finished = False

    def feed(self, block: FrameBlock, decode: Decode | None = None) -> None:
        """Take a block of frames through the whole path, in order. Raises EngineError after ``finish`` or on an overflow.

        ``decode`` stands in for the method of that name where the updates are known already (the decoded store).
        """
        if self.finished:
            raise EngineError("this run has ended; make a new Engine for more frames.")
        # checksums wrap on purpose, which NumPy reports when the kernels run uncompiled
        with nullcontext() if self._compiled else np.errstate(over="ignore"):
            start = 0
            while start < len(block):
                start += self._feed(block.slice(start, fitting(block, start)), decode or self.decode)

    def decode(self, block: FrameBlock, u: UpdateBlock) -> int:
        """Fill the rows of ``u`` from the bytes of a block of at most ``MAX_BLOCK`` frames; returns how many it filled: all."""
        return self._decoder.decode(block, u)

    def _feed(self, block: FrameBlock, decode: Decode) -> int:
        u = self._updates
        kernels.come_home(self.state.records)
        u.cursor[0] = HOME_LEVELS
        n = decode(block, u)
        first = 0
        for stop in [*self._rule_rows(block.slice(0, n)), n]:
            self._run_rows(first, stop)
            if stop < n and not self._read_rules(block.payload(stop)):
                u.reason[stop] = Reason.BAD_RULES
            first = stop
        self.frames += n
        return n

    def _run_rows(self, first: int, last: int) -> None:
        u = self._updates
        while first < last:
            first = self._run(first, last)
            self._stop_on_overflow()
            if not isinstance(self.policy, ThresholdPolicy):
                self._ask_policy(self.policy, u, first - 1, int(u.seq[first - 1]))
            if self._decided[0] or self._filled[0]:
                self._collect()

    def _stop_on_overflow(self) -> None:
        if order_id := int(self._overflow[0]):
            raise EngineError(
                f"order {order_id} moves an amount that does not fit in 64 bits of 10^-8 (92 billion of a currency). "
                "Lower the balances or the size in the configuration, or look for absurd prices on the tape."
            )

    def _rule_rows(self, block: FrameBlock) -> list[int]:
        """Frames that hold a body of Binance's exchangeInfo: order rules that count from there on."""
        if _RESPONSE not in block.kinds():
            return []
        rows = (block.kind == _RESPONSE).nonzero()[0].tolist()
        return [row for row in rows if block.venue[row] == BINANCE and b'"symbols"' in block.payload(row)]

    def _read_rules(self, body: bytes) -> bool:
        try:
            recorded = binance_rules_from_exchange_info(body)
        except TapeError as error:
            _LOG.warning("a recorded exchangeInfo is left out: %s", error)
            return False
        self._recorded_rules.update(recorded)
        set_rules(self.state.pairs, self.universe, self.config, self._recorded_rules)
        return True

    def _run(self, first: int, last: int) -> int:
        return int(kernels.run(self.state.records, first, last, isinstance(self.policy, ThresholdPolicy)))

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
            usable = kernels.look(s.records, k, time_ns, seq)
            ask = policy.decide(self._view(k)) if usable else None
            kernels.end_episodes(s.records, k, usable)
            if ask:
                self._submit(k, ask)

    def _submit(self, pair: int, ask: Ask) -> None:
        s = self.state
        # a size beyond 64 bits is refused like any other that makes no sense
        sizes = (size if 0 <= size <= INT64_MAX else -1 for size in (ask.upbit_size_e8, ask.binance_size_e8))
        s.ask[:] = (ask.direction, ask.intent, *sizes)
        kernels.submit(s.records, pair)

    def _view(self, pair: int) -> View:
        v, p = self.state.seen[0], self.state.pairs[pair]
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
        self._events.append((decisions, fills))

    def _post(self) -> None:
        """Take new rows into ledger and digest. Not where they are made: whoever waits for a decision waits for that, too."""
        events = _together(self._events[self._posted :])
        self._posted = len(self._events)
        self._digest.update(events.decisions, events.fills)
        self.ledger.add(events.fills)

    @property
    def undrained(self) -> int:
        """Event rows made since the last ``drain``."""
        return sum(len(decisions) + len(fills) for decisions, fills in self._events)

    def drain(self) -> Events:
        """The event rows made since the last call, in the order written."""
        self._post()
        events, self._events, self._posted = self._events, [], 0
        return _together(events)

    def finish(self) -> None:
        """The tape ends: orders that arrived by the last frame execute, the rest is written as it stands.

        Raises EngineError if the ledger does not reconcile to zero.
        """
        if self.finished:
            return
        s = self.state
        counters = s.counters[0]
        with np.errstate(over="ignore"):
            kernels.advance(s.records, int(counters["time_ns"]) + 1)
        self._stop_on_overflow()
        left = s.orders[: counters["active"]].copy()
        left["status"][left["status"] == 0] = FillStatus.IN_FLIGHT
        count = int(counters["fills"])
        s.fills[count : count + len(left)] = left
        counters["fills"] += len(left)
        counters["active"] = 0
        self._collect()
        self._post()
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
                    "checksum": f"{int(s.books[k]['checksum']) % 2**64:016x}",
                    "best_bid_e8": best_px_e8(s, k, 0),
                    "best_ask_e8": best_px_e8(s, k, 1),
                }
            )
        return rows

    def reasons(self) -> dict[str, dict[str, int]]:
        """How many frames were what, by venue ("-" = none) and reason label."""
        counts = self.state.reasons
        return {
            VENUES[v] or "-": {Reason(r).label: int(counts[v, r]) for r in np.flatnonzero(counts[v]).tolist()}
            for v in range(len(VENUES))
            if counts[v].any()
        }

    def refusals(self) -> dict[str, int]:
        """Every refused ask by reason, written as a decision or not."""
        counts = self.state.counters[0]["refusals"]
        return {outcome.name.lower(): int(counts[outcome]) for outcome in Outcome if counts[outcome]}

    def digest(self) -> str:
        """The run's digest so far; final after ``finish``."""
        self._post()
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

    def checkpoint(self) -> Checkpoint:
        """Everything a later engine of the same instruments and configuration needs to go on from here; events are drained apart.

        Raises ConfigError for a Python policy without ``pack``/``unpack``, whose memory cannot be kept.
        """
        if self.finished:
            raise EngineError("this run has ended; take checkpoints before.")
        self._post()
        kernels.come_home(self.state.records)
        meta = {
            "instruments": [f"{i.venue}:{i.name}" for i in self.universe.instruments],
            "config": self.config.canonical().decode(),
            "frames": self.frames,
            "digest": self._digest.pack(),
            "ledger": self.ledger.pack(),
            "rules": {name: msgspec.to_builtins(rules) for name, rules in self._recorded_rules.items()},
            "policy": _packed(self.policy),
        }
        return Checkpoint(meta, pack_books(self.state) | pack_run(self.state))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises ConfigError where it is of other instruments or another configuration."""
        meta = checkpoint.meta
        if meta["instruments"] != [f"{i.venue}:{i.name}" for i in self.universe.instruments]:
            raise ConfigError("the checkpoint is of other instruments. Resume with the tapes that it was made from.")
        if meta["config"] != self.config.canonical().decode():
            raise ConfigError("the checkpoint is of another configuration. Resume with the one that it was made with.")
        self.drain()  # what was decided since is of the run that is left here
        try:
            unpack_books(self.state, checkpoint.arrays)
            unpack_run(self.state, checkpoint.arrays)
            self._digest.unpack(meta["digest"])
            self.ledger.unpack(meta["ledger"])
            self._recorded_rules = msgspec.convert(meta["rules"], dict[str, BinanceRules])
            self.frames = int(meta["frames"])
        except (KeyError, ValueError, TypeError, IndexError, msgspec.MsgspecError) as error:
            raise ConfigError(f"the checkpoint does not fit this run ({error}). Make a new one.") from None
        if meta["policy"] is not None:
            self.policy.unpack(meta["policy"])  # type: ignore[union-attr]


def _together(events: list[tuple[NDArray[Any], NDArray[Any]]]) -> Events:
    return Events(
        decisions=_joined([decisions for decisions, _ in events], DECISION_DTYPE),
        fills=_joined([fills for _, fills in events], FILL_DTYPE),
    )


def _joined(parts: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The rows end to end. As bytes: NumPy joins structured rows field by field, which takes a hundred times as long."""
    return np.frombuffer(bytearray().join(part.tobytes() for part in parts), dtype)


def _packed(policy: Policy | ThresholdPolicy) -> Any:
    if isinstance(policy, ThresholdPolicy):
        return None
    if not hasattr(policy, "pack") or not hasattr(policy, "unpack"):
        raise ConfigError(
            f"{type(policy).__name__} cannot be kept in a checkpoint. Give it pack() -> JSON values and unpack(values)."
        )
    return policy.pack()


@functools.cache
def warm_loop() -> None:
    """Compile the loop, or load it from numba's cache."""
    _small_engine()._run(0, 0)


@functools.cache
def warm_rest() -> None:
    """Compile every other kernel that a replay of raw bytes calls, or load it: together they take as long as the loop."""
    engine = _small_engine()
    # each decoder looks at one frame, which compiles it, and leaves it to the strict one
    frames = [
        Frame(seq, 0, 0, venue, 1, kind, Op.NONE, b"{}")
        for seq, venue, kind in (
            (1, ExchangeId.UPBIT, FrameKind.MESSAGE),
            (2, ExchangeId.BINANCE, FrameKind.MESSAGE),
            (3, ExchangeId.BINANCE, FrameKind.RESPONSE),
        )
    ]
    engine.decode(FrameBlock.from_frames(frames, Anchor(0, 0)), engine.state.u)
    kernels.come_home(engine.state.records)
    engine.finish()


def _small_engine() -> Engine:
    return Engine({"upbit": ["KRW-BTC", "KRW-USDT"], "binance": ["BTCUSDT"]}, RunConfig())


def _quantile_ns(histogram: NDArray[np.int64], share: float) -> int:
    """Upper edge of the bucket that holds the quantile; 0 if there is none or it lies in the last, open bucket."""
    total = int(histogram.sum())
    bucket = int(np.searchsorted(np.cumsum(histogram), share * total))
    if total == 0 or bucket >= len(histogram) - 1:
        return 0
    edge_ms = bucket + 1 if bucket < GAP_MS else (bucket - GAP_MS + 2) * 1_000
    return edge_ms * 1_000_000
