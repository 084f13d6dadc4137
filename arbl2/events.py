"""What a run leaves behind: decisions and fill events, as packed little-endian rows.

The bytes of these rows, in order, are what the digest is taken over, and the columns are what lands in ``decisions.parquet``
and ``fills.parquet``. All prices, sizes and amounts are integers of 10^-8 of their unit (suffix ``_e8``); all times are engine
time in ns.

A decision is written when the policy asks for a trade, accepted or refused. A fill event is written once per leg (order), when
everything that can be known about it is known: it *executes* against the book before its arrival (B-, the last book received
at or before ``arrive_ns``) and is *resolved* by the first book after it (B+). A leg whose connection closes, or whose tape
ends, before B+ is written unresolved.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Side(IntEnum):
    """Side of an order."""

    BUY = 1
    SELL = -1


class Direction(IntEnum):
    """Which way the gap is traded."""

    SELL_UPBIT = 1  # buy on Binance, sell on Upbit: takes a positive premium
    BUY_UPBIT = -1  # buy on Upbit, sell on Binance: takes a negative premium


class Intent(IntEnum):
    """Why the policy trades."""

    ENTRY = 1
    EXIT = 2


class Outcome(IntEnum):
    """What became of a decision at the risk check. Only ACCEPTED sends orders."""

    ACCEPTED = 0
    MIN_NOTIONAL = 1  # a leg is below the venue's smallest order
    NO_BALANCE = 2  # a venue lacks the currency to pay or the coin to sell
    OVERFLOW = 3  # an amount does not fit in 64 bits
    ORDERS_FULL = 4  # too many orders wait to be resolved
    NO_RULES = 5  # lot and smallest order of the coin are not known
    BAD_ASK = 6  # a policy asked for no leg, a negative size, or a part of a lot


class FillStatus(IntEnum):
    """What became of a leg."""

    FILLED = 1
    PARTIAL = 2  # the rest of an IOC order expires
    UNFILLED = 3  # the book had nothing left at the limit or better
    NO_BOOK = 4  # no trusted, active book at arrival: no fill is invented
    IN_FLIGHT = 5  # the tape ended before the order arrived


DECISION_DTYPE = np.dtype(
    [
        ("decision_id", "<i8"),  # 1, 2, 3, ... in the order decided
        ("time_ns", "<i8"),
        ("seq", "<i8"),  # of the frame that triggered it
        ("edge_bps", "<f8"),  # gross edge of the direction, after FX, before fees
        ("upbit_px_e8", "<i8"),  # limit of the Upbit leg, KRW
        ("binance_px_e8", "<i8"),  # limit of the Binance leg, USDT
        ("fx_px_e8", "<i8"),  # KRW per USDT, the side of the KRW-USDT book that the direction must use
        ("upbit_size_e8", "<i8"),  # 0 = no leg
        ("binance_size_e8", "<i8"),
        ("upbit_order_id", "<i8"),  # 0 = none sent
        ("binance_order_id", "<i8"),
        ("upbit_age_ns", "<i8"),  # time since the book was received
        ("binance_age_ns", "<i8"),
        ("fx_age_ns", "<i8"),
        ("symbol", "<i2"),  # index into the run's pairs
        ("direction", "<i1"),  # Direction
        ("intent", "<i1"),  # Intent
        ("outcome", "<i1"),  # Outcome
        ("first_in_episode", "<i1"),  # 1: first accepted since the displayed edge rose over the lower of both thresholds
    ]
)

FILL_DTYPE = np.dtype(
    [
        ("order_id", "<i8"),  # 1, 2, 3, ... in the order sent; rows are in the order resolved
        ("decision_id", "<i8"),
        ("time_ns", "<i8"),  # decided
        ("arrive_ns", "<i8"),  # time_ns + latency
        ("seq", "<i8"),  # of the frame that triggered the decision
        ("edge_bps", "<f8"),
        ("limit_px_e8", "<i8"),  # quote currency per coin
        ("size_e8", "<i8"),  # ordered, coin
        ("bid_px_e8", "<i8"),  # best displayed bid and ask at decision
        ("ask_px_e8", "<i8"),
        ("visible_e8", "<i8"),  # x = min(size, displayed at the limit or better at decision)
        ("depth_e8", "<i8"),  # displayed at the limit or better at decision
        ("visible_quote_e8", "<i8"),  # what taking x from the decision book would have cost or paid
        ("decision_book_ns", "<i8"),  # when the decision book was received
        ("filled_e8", "<i8"),  # coin
        ("quote_e8", "<i8"),  # paid (buy) or received (sell) before fee, quote currency
        ("fee_e8", "<i8"),  # in the quote currency, or in the coin if fee_in_base
        ("before_ns", "<i8"),  # receive time of B-; 0 = none
        ("before_e8", "<i8"),  # min(x, displayed in B- at the limit or better)
        ("after_ns", "<i8"),  # receive time of B+; 0 = unresolved
        ("after_e8", "<i8"),  # min(x, displayed in B+ at the limit or better)
        (
            "after_filled_e8",
            "<i8",
        ),  # what B+ would have filled, net of what we had consumed: the other bracket of the band
        ("after_quote_e8", "<i8"),
        ("symbol", "<i2"),  # index into the run's pairs
        ("levels", "<i2"),  # price levels taken
        ("venue", "<i1"),  # code in arbl2.frames.VENUES
        ("side", "<i1"),  # Side
        ("direction", "<i1"),  # Direction
        ("intent", "<i1"),  # Intent
        ("status", "<i1"),  # FillStatus
        ("fee_in_base", "<i1"),
        ("first_in_episode", "<i1"),
        ("resolved", "<i1"),  # 1: B+ was seen on the same connection, trusted
    ]
)
