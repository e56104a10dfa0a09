"""Grammar trees of what JSON is made of: strings, lists, dates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alambic.engines.grammar_numbers import DIGIT, decimals
from alambic.engines.grammar_tree import EMPTY, Choice, Class, Node, Repeat, Seq, Text

# Any character that JSON takes as it is, but for controls and U+FFFD, which stands for broken bytes. Each range has the
# same lengths and bounds of bytes in UTF-8 throughout: across such a border xgrammar makes grammars without a way on.
_PLAIN = Class((
    (0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xBF), (0xC0, 0x7FF), (0x800, 0xFFF), (0x1000, 0xCFFF),
    (0xD000, 0xD7FF), (0xE000, 0xEFFF), (0xF000, 0xFFBF), (0xFFC0, 0xFFFC), (0x10000, 0x3FFFF), (0x40000, 0xFFFFF),
    (0x100000, 0x10FFFF),
))  # fmt: skip
_ESCAPES = Class(tuple((ord(sign), ord(sign)) for sign in '"/\\bfnrt'))
CHARACTER = Choice((_PLAIN, Seq((Text("\\"), _ESCAPES))))


def choice(options: Sequence[Node]) -> Node | None:
    """Return one of `options`, None when there is none."""
    if not options:
        return None
    return options[0] if len(options) == 1 else Choice(tuple(options))


def optional(node: Node, otherwise: Node | None) -> Node:
    """Return `node`, or `otherwise` where there is one."""
    return node if otherwise is None else Choice((node, otherwise))


def listed(heads: Sequence[Node], item: Node | None, low: int, high: int) -> Node:
    """Write `low` to `high` things with commas: first the heads, then items."""
    tail: Node = EMPTY
    if item is not None and high > len(heads):
        fewest, most = max(low - len(heads), 0), high - len(heads)
        if heads:
            tail = Repeat(Seq((Text(","), item)), fewest, most)
        else:
            some = Seq((item, Repeat(Seq((Text(","), item)), max(fewest - 1, 0), most - 1)))
            tail = some if fewest else Choice((some, EMPTY))
    for i in range(len(heads) - 1, -1, -1):
        node = Seq((*((Text(","),) if i else ()), heads[i], tail))
        tail = node if i < low else Choice((node, EMPTY))
    return tail


def subset(values: Sequence[Node], low: int, high: int) -> Node:
    """Write `low` to `high` of the values, in their order, with commas."""
    count = len(values)
    tails: dict[int, Node | None] = {
        n: EMPTY if low <= n <= high else None for n in range(count + 1)
    }  # by how many came
    for i in range(count - 1, -1, -1):
        step: dict[int, Node | None] = {}
        for n in range(i + 1):
            with_it = tails[n + 1]
            taken = None if with_it is None else Seq((*((Text(","),) if n else ()), values[i], with_it))
            step[n] = choice([node for node in (taken, tails[n]) if node is not None])
        tails = step
    found = tails[0]
    assert found is not None, "the caller saw that there are enough values"
    return found


def free_string(most: int) -> Node:
    """Return a JSON string of at most `most` characters."""
    return Seq((Text('"'), Repeat(CHARACTER, 0, most, free=True), Text('"')))


def free_number() -> Node:
    """Return any number of moderate length."""
    found = decimals(None, None, open_low=False, open_high=False, places=6)
    assert found is not None, "without bounds there are numbers"
    return found


def _two(low: int, high: int) -> Node:
    found = choice([Text(f"{value:02d}") for value in range(low, high + 1)])
    assert found is not None, "the range is not empty"
    return found


def _formats() -> Iterator[tuple[str, Node]]:
    months: dict[int, list[int]] = {31: [1, 3, 5, 7, 8, 10, 12], 30: [4, 6, 9, 11], 28: [2]}
    days = tuple(
        Seq((Choice(tuple(Text(f"{month:02d}") for month in months[length])), Text("-"), _two(1, length)))
        for length in months
    )
    date = Seq((Class(((0x31, 0x32),)), Repeat(DIGIT, 3, 3), Text("-"), Choice(days)))
    clock = (_two(0, 23), Text(":"), _two(0, 59), Text(":"), _two(0, 59))
    zone = Choice((Text("Z"), Seq((Choice((Text("+"), Text("-"))), _two(0, 23), Text(":"), _two(0, 59)))))
    hexadecimal = Class(((0x30, 0x39), (0x61, 0x66)))
    yield "date", date
    yield "time", Seq((*clock, zone))
    yield "date-time", Seq((date, Text("T"), *clock, zone))
    groups = [Repeat(hexadecimal, length, length) for length in (8, 4, 4, 4, 12)]
    yield "uuid", Seq(tuple(part for group in groups for part in (Text("-"), group))[1:])


FORMATS: dict[str, Node] = dict(_formats())
