"""Money: integers of 10^-8 of a named currency, and the only bridge between currencies.

``Amount[Krw] + Amount[Usdt]`` is an error of the type checker and, at run time, a ``CurrencyMismatchError``. The bridge is
``FxQuote``: a rate with its source, side and age, so that every conversion can say how it was made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Generic, TypeVar

E8 = 100_000_000
"""Parts of one unit: prices, sizes and balances are int64 counts of 10^-8."""

INT64_MAX = 2**63 - 1

_NUMBER = re.compile(rb"(-?)(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]+))?\Z")


class NumberRefusedError(ValueError):
    """A decimal text that cannot become int64 of 10^-8; the message is one of: number, negative, large, scale."""


def parse_e8(text: bytes, *, exact: bool) -> int:
    """Decimal text (JSON number grammar) to an integer count of 10^-8.

    ``exact`` refuses digits below 10^-8 (prices); otherwise they are cut off (sizes: never overstated). Raises
    NumberRefusedError: "number" (not a decimal), "negative", "large" (beyond int64) or "scale" (digits below 10^-8).
    """
    match = _NUMBER.match(text)
    if match is None:
        raise NumberRefusedError("number")
    sign, whole, fraction, exponent = match.groups()
    digits = (whole + (fraction or b"")).lstrip(b"0")
    if not digits:
        return 0
    if sign:
        raise NumberRefusedError("negative")
    # the length test keeps a hostile exponent or a million digits from building a giant integer
    power = (exponent or b"0").lstrip(b"+-").lstrip(b"0") or b"0"
    shift = int(power) if len(power) < 12 else 10**12
    scale = 8 - len(fraction or b"") + (-shift if (exponent or b"").startswith(b"-") else shift)
    if len(digits) + scale > 19:
        raise NumberRefusedError("large")
    if len(digits) > 400:
        raise NumberRefusedError("number")
    if scale >= 0:
        value: int = int(digits) * 10**scale
    elif -scale > len(digits):
        if exact:
            raise NumberRefusedError("scale")
        return 0
    else:
        value, rest = divmod(int(digits), 10**-scale)
        if rest and exact:
            raise NumberRefusedError("scale")
    if value > INT64_MAX:
        raise NumberRefusedError("large")
    return value


def format_e8(value: int, decimals: int = 8) -> str:
    """``value`` x 10^-8 as plain decimal text with ``decimals`` digits, rounded half to even."""
    unit = 10 ** (8 - decimals)
    whole, rest = divmod(abs(value), unit)
    if rest * 2 > unit or (rest * 2 == unit and whole % 2):
        whole += 1
    text = f"{whole:0{decimals + 1}d}"
    sign = "-" if value < 0 and whole else ""
    if decimals == 0:
        return f"{sign}{int(text):,}"
    return f"{sign}{int(text[:-decimals]):,}.{text[-decimals:]}"


class CurrencyMismatchError(TypeError):
    """Two currencies met without a rate between them."""


class Currency:
    """Root of the currency marker types."""


class Krw(Currency):
    """South Korean won."""


class Usdt(Currency):
    """Tether."""


C = TypeVar("C", bound=Currency)
D = TypeVar("D", bound=Currency)


@total_ordering
@dataclass(frozen=True, slots=True)
class Amount(Generic[C]):
    """A price or a sum of money: ``value_e8`` x 10^-8 of ``currency``."""

    value_e8: int
    currency: type[C]

    def _same(self, other: Amount[C]) -> int:
        if not isinstance(other, Amount):
            raise CurrencyMismatchError(f"{self} cannot meet {other!r}: only amounts of one currency can.")
        if other.currency is not self.currency:
            raise CurrencyMismatchError(f"{self} and {other} need an FxQuote between them.")
        return other.value_e8

    def __add__(self, other: Amount[C]) -> Amount[C]:
        return Amount(self.value_e8 + self._same(other), self.currency)

    def __sub__(self, other: Amount[C]) -> Amount[C]:
        return Amount(self.value_e8 - self._same(other), self.currency)

    def __neg__(self) -> Amount[C]:
        return Amount(-self.value_e8, self.currency)

    def __lt__(self, other: Amount[C]) -> bool:
        return self.value_e8 < self._same(other)

    def __str__(self) -> str:
        return f"{format_e8(self.value_e8)} {self.currency.__name__.upper()}"


@dataclass(frozen=True, slots=True)
class FxQuote(Generic[C, D]):
    """``rate_e8`` x 10^-8 units of ``quote`` for one unit of ``base``, with where it comes from and how old it is.

    ``side`` is the side of the book it was read from: "ask" is what one pays to get the base currency, "bid" what one gets for
    it.
    """

    base: type[C]
    quote: type[D]
    rate_e8: int
    side: str
    source: str
    age_ns: int

    def convert(self, amount: Amount[C]) -> Amount[D]:
        """The amount in the quote currency, rounded toward minus infinity (never in our favour for what we own)."""
        if amount.currency is not self.base:
            raise CurrencyMismatchError(f"{amount} cannot be converted by a rate for {self.base.__name__}.")
        return Amount(amount.value_e8 * self.rate_e8 // E8, self.quote)

    def __str__(self) -> str:
        pair = f"{self.quote.__name__.upper()} per {self.base.__name__.upper()}"
        return f"{format_e8(self.rate_e8, 2)} {pair} ({self.source} {self.side}, {self.age_ns / 1e9:.1f} s old)"
