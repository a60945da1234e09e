"""Polynomials with named symbols, as much of them as tables of costs need: counted, simplified and printed."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TypeAlias

Number: TypeAlias = "int | Fraction"
Monomial: TypeAlias = frozenset[tuple[str, int]]  # symbol and exponent, which may be negative but not 0

# Order in which symbols are written: hs², 4bm/h, 2c²s.
WRITTEN = "hbkmfcs"
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Formula:
    """A polynomial with rational coefficients in single-letter symbols; exponents may be negative.

    Args:
        terms: Coefficient of each monomial.

    Examples:
        >>> s, c, b = (Formula.symbol(name) for name in "scb")
        >>> memory = (2 * b + 3 * c) * s + b * c
        >>> print(memory)
        (2b + 3c)s + bc
        >>> print(memory.substitute(b=c / 2))
        4cs + c²/2
        >>> memory.evaluate(s=4096, c=64, b=32)
        1050624.0
        >>> memory.degree("s")
        1
    """

    def __init__(self, terms: Mapping[Monomial, Number]) -> None:
        self.terms = {monomial: Fraction(coefficient) for monomial, coefficient in terms.items() if coefficient}

    @classmethod
    def symbol(cls, name: str) -> Formula:
        """Return the formula that is one symbol."""
        return cls({frozenset({(name, 1)}): 1})

    @classmethod
    def of(cls, value: Formula | Number) -> Formula:
        """Return a number as a formula, a formula as it is."""
        return value if isinstance(value, Formula) else cls({frozenset(): value})

    def __add__(self, other: Formula | Number) -> Formula:
        terms = dict(self.terms)
        for monomial, coefficient in Formula.of(other).terms.items():
            terms[monomial] = terms.get(monomial, Fraction(0)) + coefficient
        return Formula(terms)

    def __mul__(self, other: Formula | Number) -> Formula:
        product = Formula({})
        for left, left_coefficient in self.terms.items():
            for right, right_coefficient in Formula.of(other).terms.items():
                product = product + Formula({_times(left, right): left_coefficient * right_coefficient})
        return product

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, divisor: Formula | Number) -> Formula:
        ((monomial, coefficient),) = Formula.of(divisor).terms.items()  # a sum cannot be divided by
        inverse = frozenset((name, -exponent) for name, exponent in monomial)
        return self * Formula({inverse: 1 / coefficient})

    def __pow__(self, exponent: int) -> Formula:
        power = Formula.of(1)
        for _ in range(exponent):
            power = power * self
        return power

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Formula) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def substitute(self, **symbols: Formula | Number) -> Formula:
        """Return the formula with symbols replaced by single terms."""
        result = Formula({})
        for monomial, coefficient in self.terms.items():
            term = Formula.of(coefficient)
            for name, exponent in monomial:
                factor = Formula.of(symbols[name]) if name in symbols else Formula.symbol(name)
                term = term * factor**exponent if exponent > 0 else term / factor**-exponent
            result = result + term
        return result

    def evaluate(self, **symbols: Number) -> float:
        """Return the value with every symbol given."""
        value = self.substitute(**symbols).terms
        if any(value):
            raise ValueError(f"values are missing for {Formula(value)}")
        return float(sum(value.values()))

    def degree(self, name: str) -> int:
        """Return the highest exponent of a symbol."""
        return max((dict(monomial).get(name, 0) for monomial in self.terms), default=0)

    def __str__(self) -> str:
        """Write the formula as the paper does, by powers of s: (2k + 3c)s + s²."""
        by_power: dict[int, dict[Monomial, Fraction]] = {}
        for monomial, coefficient in self.terms.items():
            power = dict(monomial).get("s", 0)
            rest = frozenset(item for item in monomial if item[0] != "s")
            by_power.setdefault(power, {})[rest] = coefficient
        groups = []
        for power in sorted(by_power, key=lambda power: (power == 0, power)):
            terms = by_power[power]
            if power == 0 or len(terms) == 1:
                s = {("s", power)} if power else set()
                groups += [_written(coefficient, monomial | s) for monomial, coefficient in terms.items()]
            else:
                inner = " + ".join(_written(coefficient, monomial) for monomial, coefficient in terms.items())
                groups.append(f"({inner}){_power('s', power)}")
        return " + ".join(groups) or "0"

    def __repr__(self) -> str:
        return f"Formula({self})"


def _times(left: Monomial, right: Monomial) -> Monomial:
    exponents = dict(left)
    for name, exponent in right:
        exponents[name] = exponents.get(name, 0) + exponent
    return frozenset((name, exponent) for name, exponent in exponents.items() if exponent)


def _power(name: str, exponent: int) -> str:
    return name if exponent == 1 else f"{name}{str(exponent).translate(SUPERSCRIPTS)}"


def _written(coefficient: Fraction, monomial: Monomial) -> str:
    ordered = sorted(monomial, key=lambda item: WRITTEN.index(item[0]))
    above = "".join(_power(name, exponent) for name, exponent in ordered if exponent > 0)
    below = "".join(_power(name, -exponent) for name, exponent in ordered if exponent < 0)
    if coefficient.numerator != 1 or not above:
        above = f"{coefficient.numerator}{above}"
    if coefficient.denominator != 1:
        below = f"{coefficient.denominator}{below}"
    if not below:
        return above
    return f"{above}/{below}" if len(below) == 1 or below.isdigit() else f"{above}/({below})"
