"""Configuration of a run: frozen values, read from TOML, with a canonical text that enters the digest.

Amounts are decimal text in TOML (``size_krw = "1000000"``), because a float cannot hold every amount; they are checked when the
file is read. Every field has a default, so an empty file is a valid configuration.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec

from arbl2.errors import ConfigError
from arbl2.money import NumberRefusedError, parse_e8
from arbl2.rules import UPBIT_MIN_NOTIONAL_E8, RuleOverride

if TYPE_CHECKING:
    from pathlib import Path


MAX_TEXT = 100_000
MAX_AMOUNT_E8 = 40_000_000_000 * 10**8
"""Half of what 64 bits hold, so that a run has room to add to it."""
STARTING_COINS = {"BTC": "1", "ETH": "30", "XRP": "50000", "SOL": "500", "DOGE": "400000"}
"""Coins that each venue's paper account holds at the start where the configuration does not say; of others it holds none."""


class AggregatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a source stops being ACTIVE, in seconds of engine time since its last book (exactly that old is still ACTIVE)."""

    stale_s: float = 2.0
    fx_stale_s: float = 10.0
    binance_depth: Literal["auto", "partial", "diff"] = "auto"
    """What Binance's books are made of: "partial" depth windows, "diff" changes with REST snapshots (full books), or "auto":
    windows as soon as one has come, changes until then."""


class PolicyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The entry / take-profit threshold policy. Edges are gross, in basis points."""

    entry_bps: float = 20.0
    """Enter a direction when its edge is at least this."""
    tp_bps: float = 35.0
    """Close when the entry threshold plus the edge of the way back is at least this."""
    size_krw: str = "1000000"
    """Size of one entry, in KRW at the Upbit price; rounded down to a whole lot of coin."""
    max_position_krw: str = "3000000"
    """Largest position a symbol may reach, in KRW at the Upbit price."""


class PaperConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper venue: how late orders arrive, what a trade costs, what the accounts hold at the start."""

    upbit_latency_ms: float = 20.0
    """Decision to arrival at the book as we see it: compute + order entry + feed delay (about one round trip)."""
    binance_latency_ms: float = 60.0
    upbit_fee_bps: float = 5.0
    binance_fee_bps: float = 10.0
    binance_fee_in: Literal["received", "quote"] = "received"
    """Binance takes the fee of a buy from the coin received; "quote" models a fee paid in USDT."""
    upbit_krw: str = "100000000"
    binance_usdt: str = "100000"
    upbit_coins: dict[str, str] = {}
    """Coins held on Upbit at the start, e.g. BTC = "1"; coins not named here hold STARTING_COINS."""
    binance_coins: dict[str, str] = {}


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides the result of a run besides the tape."""

    symbols: tuple[str, ...] = ()
    """Coins to trade, e.g. BTC; empty = every coin that the tape has on both venues, in alphabetical order."""
    aggregator: AggregatorConfig = AggregatorConfig()
    policy: PolicyConfig = PolicyConfig()
    paper: PaperConfig = PaperConfig()
    rules: dict[str, RuleOverride] = {}
    """Order rules by coin, e.g. [rules.ADA] lot = "0.1"; they go before recorded and built-in rules."""

    def canonical(self) -> bytes:
        """The same bytes for the same configuration, on every machine."""
        return msgspec.json.encode(self, order="deterministic")


def loads(text: str, source: str = "the configuration") -> RunConfig:
    """Read and check TOML. Raises ConfigError naming the field."""
    try:
        if len(text) > MAX_TEXT:
            raise ConfigError(f"{source} is longer than {MAX_TEXT:,} characters. A configuration is a page or two.")
        config = msgspec.toml.decode(text, type=RunConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}. docs/configuration.md lists every field.") from None
    return checked(config)


def load(path: Path) -> RunConfig:
    """Read and check a TOML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Name a TOML file; docs/configuration.md has an example.") from None
    return loads(text, str(path))


def checked(config: RunConfig) -> RunConfig:
    """The configuration itself if every value makes sense. Raises ConfigError naming the field."""
    for name, value, least, most in (
        ("aggregator.stale_s", config.aggregator.stale_s, 0.0, 86_400.0),
        ("aggregator.fx_stale_s", config.aggregator.fx_stale_s, 0.0, 86_400.0),
        ("policy.entry_bps", config.policy.entry_bps, -10_000.0, 1_000_000.0),
        ("policy.tp_bps", config.policy.tp_bps, -20_000.0, 1_000_000.0),
        ("paper.upbit_latency_ms", config.paper.upbit_latency_ms, 0.0, 60_000.0),
        ("paper.binance_latency_ms", config.paper.binance_latency_ms, 0.0, 60_000.0),
        ("paper.upbit_fee_bps", config.paper.upbit_fee_bps, 0.0, 1_000.0),
        ("paper.binance_fee_bps", config.paper.binance_fee_bps, 0.0, 1_000.0),
    ):
        if not math.isfinite(value) or not least <= value <= most:
            raise ConfigError(f"{name} = {value} is out of range: it must be from {least:g} to {most:g}.")
    for name, text in (
        ("policy.size_krw", config.policy.size_krw),
        ("policy.max_position_krw", config.policy.max_position_krw),
        ("paper.upbit_krw", config.paper.upbit_krw),
        ("paper.binance_usdt", config.paper.binance_usdt),
    ):
        amount_e8(name, text)
    if amount_e8("policy.size_krw", config.policy.size_krw) > amount_e8(
        "policy.max_position_krw", config.policy.max_position_krw
    ):
        raise ConfigError("policy.max_position_krw is below policy.size_krw, so that nothing could ever be traded. Raise it.")
    if amount_e8("policy.size_krw", config.policy.size_krw) < UPBIT_MIN_NOTIONAL_E8:
        raise ConfigError("policy.size_krw is below Upbit's smallest order of 5,000 KRW. Raise it.")
    for field, coins in (("upbit_coins", config.paper.upbit_coins), ("binance_coins", config.paper.binance_coins)):
        for coin, text in coins.items():
            amount_e8(f"paper.{field}.{coin}", text)
    return config


def amount_e8(name: str, text: str) -> int:
    """Decimal text of a field as an integer of 10^-8. Raises ConfigError naming the field."""
    try:
        amount = parse_e8(text.encode(), exact=True)
    except NumberRefusedError:
        amount = -1
    if not 0 <= amount <= MAX_AMOUNT_E8:
        raise ConfigError(
            f'{name} = "{text}" is not a plain amount up to 40 billion. Write digits with at most eight decimals, '
            'for example "1000000" or "0.01".'
        )
    return amount


def starting_coins_e8(config: PaperConfig, coin: str) -> tuple[int, int]:
    """Coins held at the start on (Upbit, Binance): as configured, else STARTING_COINS, else none."""
    known = STARTING_COINS.get(coin, "0")
    upbit, binance = config.upbit_coins.get(coin, known), config.binance_coins.get(coin, known)
    return amount_e8(f"paper.upbit_coins.{coin}", upbit), amount_e8(f"paper.binance_coins.{coin}", binance)


def ns_of_ms(value_ms: float) -> int:
    """Milliseconds to whole nanoseconds."""
    return round(value_ms * 1_000_000)


def ppm_of_bps(value_bps: float) -> int:
    """Basis points to millionths: 5 bp = 500 ppm."""
    return round(value_bps * 100)
