"""Grammar trees of the numbers between two bounds, written without exponent."""

from __future__ import annotations

from decimal import Decimal

from alambic.engines.grammar_tree import EMPTY, Choice, Class, Node, Repeat, Seq, Text

DIGIT = Class(((0x30, 0x39),))
_NOT_ZERO = Class(((0x31, 0x39),))
LARGEST = 10**15 - 1  # whole numbers up to here survive every JSON reader
_PLACES = 6  # digits after the point


def integers(low: int | None, high: int | None) -> Node | None:
    """Return the whole numbers from `low` to `high`, None when there is none."""
    low, high = _closed(low, high)
    if low > high:
        return None
    options: list[Node] = []
    if high >= 0:
        options.append(_digits(max(low, 0), high))
    if low < 0:
        options.append(Seq((Text("-"), _digits(max(-high, 1), -low))))
    return _choice(options)


def decimals(low: Decimal | None, high: Decimal | None, *, open_low: bool, open_high: bool, places: int) -> Node | None:
    """Return the numbers between two bounds with at most `places` digits after the point, None when there is none.

    Args:
        low: lower bound, None for none.
        high: upper bound, None for none.
        open_low: the lower bound is left out.
        open_high: the upper bound is left out.
        places: digits after the point; 0 gives whole numbers.
    """
    places = min(places, _PLACES)
    unit = 10**places
    first, last = _closed(
        None if low is None else _units(low, unit, up=True, beyond=open_low),
        None if high is None else _units(high, unit, up=False, beyond=open_high),
        most=(LARGEST + 1) * unit - 1,
    )
    if first > last:
        return None
    if places == 0:
        return integers(first, last)
    options: list[Node] = []
    if last >= 0:
        options.append(_fixed(max(first, 0), last, unit, places))
    if first < 0:
        options.append(Seq((Text("-"), _fixed(max(-last, 0), -first, unit, places))))
    return _choice(options)


def places_of(step: Decimal) -> int | None:
    """Return k when `step` is 10^-k (1, 0.1, 0.01, ...), otherwise None."""
    sign, digits, exponent = step.normalize().as_tuple()
    if sign or digits != (1,) or not isinstance(exponent, int) or not -_PLACES <= exponent <= 0:
        return None
    return -exponent


def _closed(low: int | None, high: int | None, most: int = LARGEST) -> tuple[int, int]:
    """Put a bound where none is given, beyond the other one."""
    top = high if high is not None else max(most, 10 * low if low is not None else 0)
    return (low if low is not None else min(-most, 10 * high if high is not None else 0)), top


def _units(bound: Decimal, unit: int, *, up: bool, beyond: bool) -> int:
    scaled = bound * unit
    whole = int(scaled.to_integral_value("ROUND_CEILING" if up else "ROUND_FLOOR"))
    return whole + (1 if up else -1) if beyond and whole == scaled else whole


def _digits(low: int, high: int) -> Node:
    """Return the numbers `low` to `high`, both 0 or more, without leading zeros."""
    options: list[Node] = [Text("0")] if low == 0 else []
    low = max(low, 1)
    full: list[int] = []  # lengths of which every number is in
    for length in range(len(str(low)), len(str(high)) + 1) if low <= high else ():
        first, last = max(low, 10 ** (length - 1)), min(high, 10**length - 1)
        if (first, last) == (10 ** (length - 1), 10**length - 1):
            full.append(length - 1)
        else:
            options.append(_same_length(str(first), str(last)))
    if full:
        options.append(Seq((_NOT_ZERO, Repeat(DIGIT, full[0], full[-1]))))
    return _choice(options)


def _same_length(low: str, high: str) -> Node:
    if low == high:
        return Text(low)
    if set(low) == {"0"} and set(high) == {"9"}:
        return Repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return Seq((Text(low[0]), _same_length(low[1:], high[1:])))
    after = len(low) - 1
    options: list[Node] = [_headed(low[0], after and _same_length(low[1:], "9" * after))]
    if between := _between(low[0], high[0]):
        options.append(Seq((between, Repeat(DIGIT, after, after))) if after else between)
    options.append(_headed(high[0], after and _same_length("0" * after, high[1:])))
    return _choice(options)


def _headed(digit: str, tail: Node | int) -> Node:
    return Text(digit) if isinstance(tail, int) else Seq((Text(digit), tail))


def _between(low: str, high: str) -> Class | None:
    first, last = ord(low) + 1, ord(high) - 1
    return Class(((first, last),)) if first <= last else None


def _fixed(low: int, high: int, unit: int, places: int) -> Node:
    """Return the numbers low/unit to high/unit, both 0 or more."""
    (first, first_part), (last, last_part) = divmod(low, unit), divmod(high, unit)
    nines = unit - 1
    if first == last:
        return Seq((Text(str(first)), _part(first_part, last_part, places)))
    if first_part == 0 and last_part == nines:
        return Seq((_digits(first, last), _part(0, nines, places)))
    options: list[Node] = [Seq((Text(str(first)), _part(first_part, nines, places)))]
    if last - first > 1:
        options.append(Seq((_digits(first + 1, last - 1), _part(0, nines, places))))
    options.append(Seq((Text(str(last)), _part(0, last_part, places))))
    return _choice(options)


def _part(low: int, high: int, places: int) -> Node:
    """Return a point with digits worth `low` to `high`, or nothing where that is 0."""
    digits = Seq((Text("."), _fraction(f"{low:0{places}d}", f"{high:0{places}d}", first=True)))
    return Choice((EMPTY, digits)) if low == 0 else digits


def _fraction(low: str, high: str, *, first: bool = False) -> Node:
    """Return digits that, filled up with zeros, lie between `low` and `high`."""
    if not low:
        return EMPTY
    if set(low) == {"0"} and set(high) == {"9"}:
        return Repeat(DIGIT, int(first), len(low))
    options: list[Node] = [EMPTY] if not first and set(low) == {"0"} else []
    if low[0] == high[0]:
        options.append(Seq((Text(low[0]), _fraction(low[1:], high[1:]))))
        return _choice(options)
    after = len(low) - 1
    options.append(Seq((Text(low[0]), _fraction(low[1:], "9" * after))))
    if between := _between(low[0], high[0]):
        options.append(Seq((between, Repeat(DIGIT, 0, after))))
    options.append(Seq((Text(high[0]), _fraction("0" * after, high[1:]))))
    return _choice(options)


def _choice(options: list[Node]) -> Node:
    return options[0] if len(options) == 1 else Choice(tuple(options))
