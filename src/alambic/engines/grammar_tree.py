"""Finite grammars as trees: how long their texts can be, what may still follow a beginning, and their EBNF.

Every tree describes finitely many texts (repetitions have an upper bound, nothing is recursive), so a length limit that
surely suffices is known before a model writes: a token stands for at least one byte. A `Tracker` takes Brzozowski's
derivative (J. ACM 11(4), 1964) character by character; `tightened` shortens what is left without changing its form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Text:
    """Exactly `text`."""

    text: str


@dataclass(frozen=True, eq=False)
class Class:
    """One character of some ranges, both ends included."""

    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, char: str) -> bool:
        return any(low <= ord(char) <= high for low, high in self.ranges)


@dataclass(frozen=True, eq=False)
class Seq:
    """All parts, one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    """`item`, `low` to `high` times; `item` itself is never empty. `free`: text whose length is a matter of taste."""

    item: Node
    low: int
    high: int
    free: bool = False


Node = Text | Class | Seq | Choice | Repeat
EMPTY = Text("")
_FEW = 4  # a repetition up to here keeps its bounds in EBNF
_Stack = tuple[Node, "_Stack"] | None  # what is still to be written, first things first; None: nothing


def longest(node: Node) -> int:
    """Most bytes of a text of `node` in UTF-8."""
    return _Lengths().longest(node)


def shortest(node: Node) -> int:
    """Fewest bytes of a text of `node` in UTF-8."""
    return _Lengths().shortest(node)


def tightened(node: Node, *, free: int, prune: bool = False) -> Node:
    """Return `node` with free texts of at most `free` characters and other repetitions at their fewest.

    Args:
        node: what is to be written.
        free: most characters of a free text, where its own lower bound allows.
        prune: keep only the shortest option of each choice between things of different length.
    """
    return _Tightener(free, prune).of(node)


def closing_bytes(node: Node) -> int:
    """Most bytes that `tightened(rest, free=0, prune=True)` can have, whatever the beginning."""
    return _Lengths().closing(node)


class Tracker:
    """Follows a text through a tree as it is written."""

    def __init__(self, node: Node) -> None:
        self._stacks: list[_Stack] = [(node, None)]

    def push(self, text: str) -> int:
        """Go on by as much of `text` as the tree allows; return how many characters that is."""
        for taken, char in enumerate(text):
            after = [left for stack in self._stacks for left in _step(stack, char)]
            if not after:
                return taken
            self._stacks = _unique(after) if len(after) > 1 else after
        return len(text)

    @property
    def whole(self) -> bool:
        """Whether the text may end here."""
        return any(shortest(Seq(tuple(_items(stack)))) == 0 for stack in self._stacks)

    @property
    def rest(self) -> Node:
        """What may follow."""
        options = tuple(Seq(tuple(_items(stack))) for stack in self._stacks)
        return options[0] if len(options) == 1 else Choice(options)


def matches(node: Node, text: str) -> bool:
    """Tell whether `text` is a text of `node`."""
    tracker = Tracker(node)
    return tracker.push(text) == len(text) and tracker.whole


def ebnf(node: Node, *, without: str = "") -> str:
    """Return the grammar in the EBNF of xgrammar, its start symbol ``root``, without the bounds of repetitions.

    xgrammar looks at the vocabulary once per place of a bounded repetition: half a second for each token of a string of
    at most 1000 characters, with a vocabulary of 50,000. A `Tracker` holds the bounds instead.

    Args:
        node: what may be written.
        without: characters that are left out wherever others may stand too.
    """
    return _Printer(without).text(node)


class _Lengths:
    """Bounds of a tree; shared nodes are measured once."""

    def __init__(self) -> None:
        self._longest: dict[int, int] = {}
        self._shortest: dict[int, int] = {}
        self._whole: dict[int, int] = {}

    def whole(self, node: Node) -> int:
        """Most bytes of `node` when it is tightened as far as can be."""
        if id(node) not in self._whole:
            match node:
                case Seq(parts):
                    value = sum(map(self.whole, parts))
                case Choice(options):
                    value = min(map(self.whole, options))
                case Repeat(item, low, _, free):
                    value = low * (self.longest(item) if free else self.whole(item)) if low else 0
                case _:
                    value = self.longest(node)
            self._whole[id(node)] = value
        return self._whole[id(node)]

    def closing(self, node: Node) -> int:
        match node:
            case Seq(parts):
                after = [sum(map(self.whole, parts[i + 1 :])) for i in range(len(parts))]
                return max((self.closing(part) + left for part, left in zip(parts, after, strict=True)), default=0)
            case Choice(options):
                return max(map(self.closing, options))
            case Repeat(item, low, high, free):
                return self.closing(item) + self.whole(Repeat(item, max(low - 1, 0), high, free)) if high else 0
            case _:
                return self.longest(node)

    def longest(self, node: Node) -> int:
        if id(node) not in self._longest:
            match node:
                case Text(text):
                    value = len(text.encode())
                case Class(ranges):
                    value = max(len(chr(high).encode()) for _, high in ranges)
                case Seq(parts):
                    value = sum(map(self.longest, parts))
                case Choice(options):
                    value = max(map(self.longest, options))
                case Repeat(item, _, high):
                    value = high * self.longest(item) if high else 0
            self._longest[id(node)] = value
        return self._longest[id(node)]

    def shortest(self, node: Node) -> int:
        if id(node) not in self._shortest:
            match node:
                case Text(text):
                    value = len(text.encode())
                case Class(ranges):
                    value = min(len(chr(low).encode()) for low, _ in ranges)
                case Seq(parts):
                    value = sum(map(self.shortest, parts))
                case Choice(options):
                    value = min(map(self.shortest, options))
                case Repeat(item, low, _):
                    value = low * self.shortest(item) if low else 0
            self._shortest[id(node)] = value
        return self._shortest[id(node)]


class _Tightener:
    def __init__(self, free: int, prune: bool) -> None:
        self._free = free
        self._prune = prune
        self._done: dict[int, Node] = {}
        self._lengths = _Lengths()
        self._kept: list[Node] = []  # ids stay unique while the nodes live

    def of(self, node: Node) -> Node:
        if id(node) not in self._done:
            self._kept.append(node)
            self._done[id(node)] = self._make(node)
        return self._done[id(node)]

    def _make(self, node: Node) -> Node:
        match node:
            case Seq(parts):
                return Seq(tuple(map(self.of, parts)))
            case Choice(options):
                made = tuple(map(self.of, options))
                if self._prune:
                    best = min(map(self._lengths.longest, made))
                    made = tuple(option for option in made if self._lengths.longest(option) == best)
                self._kept.extend(made)
                return Choice(made)
            case Repeat(item, low, high, free):
                if free:
                    return Repeat(item, low, max(low, min(high, self._free)), free)
                return Repeat(self.of(item), low, low)
            case _:
                return node


def _step(stack: _Stack, char: str) -> Iterator[_Stack]:
    """Yield what is left of `stack` once `char` is written."""
    if stack is None:
        return
    node, tail = stack
    match node:
        case Text(text):
            if not text:
                yield from _step(tail, char)
            elif text[0] == char:
                yield (Text(text[1:]), tail) if len(text) > 1 else tail
        case Class():
            if char in node:
                yield tail
        case Seq(parts):
            for part in reversed(parts):
                tail = (part, tail)
            yield from _step(tail, char)
        case Choice(options):
            for option in options:
                yield from _step((option, tail), char)
        case Repeat(item, low, high, free):
            if high > 0:
                again = (Repeat(item, max(low - 1, 0), high - 1, free), tail)
                yield from _step((item, again), char)
            if low == 0:
                yield from _step(tail, char)


def _unique(stacks: Iterable[_Stack]) -> list[_Stack]:
    """Drop stacks that say the same: ambiguity must not double their number with each character."""
    return list({_key(stack): stack for stack in stacks}.values())


def _key(stack: _Stack) -> tuple[object, ...]:
    key: list[object] = []
    while stack is not None:
        node, stack = stack
        match node:
            case Text(text):
                key.append(text)
            case Repeat(item, low, high, _):
                key.append((id(item), low, high))
            case _:
                key.append(id(node))
    return tuple(key)


def _items(stack: _Stack) -> Iterator[Node]:
    while stack is not None:
        yield stack[0]
        stack = stack[1]


class _Printer:
    """One rule per shared or repeated node; all else is written in place."""

    def __init__(self, without: str) -> None:
        self._without = sorted(map(ord, without))
        self._rules: list[str] = []
        self._names: dict[int, str] = {}
        self._uses: dict[int, int] = {}

    def text(self, node: Node) -> str:
        self._count(node)
        body = self._body(node)
        return "\n".join([f"root ::= {body}", *self._rules]) + "\n"

    def _count(self, node: Node) -> None:
        self._uses[id(node)] = self._uses.get(id(node), 0) + 1
        if self._uses[id(node)] > 1:
            return
        match node:
            case Seq(parts) | Choice(parts):
                for part in parts:
                    self._count(part)
            case Repeat(item, free=False):
                self._count(item)

    def _of(self, node: Node) -> str:
        if isinstance(node, Text | Class) or self._uses.get(id(node), 1) == 1:
            return self._body(node)
        if id(node) not in self._names:
            self._names[id(node)] = name = f"r{len(self._names)}"
            at = len(self._rules)
            self._rules.append("")
            self._rules[at] = f"{name} ::= {self._body(node)}"
        return self._names[id(node)]

    def _body(self, node: Node) -> str:
        match node:
            case Text(text):
                return '"' + "".join(map(_quoted, text)) + '"'
            case Class(ranges):
                kept = _without(ranges, self._without) or ranges
                return "[" + "".join(_range(low, high) for low, high in kept) + "]"
            case Seq(parts):
                return " ".join(self._of(part) for part in parts if not _is_empty(part)) or '""'
            case Choice(options):
                return "(" + " | ".join(self._of(option) for option in options) + ")"
            case Repeat(high=0):
                return '""'
            case Repeat(item, low, high, free):
                # A free text stays in the rule around it: only there does xgrammar know the tokens of several letters.
                body = self._body(item) if free else self._of(item)
                body = body if isinstance(item, Choice | Class) else f"({body})"
                if isinstance(item, Class) or high <= _FEW:
                    return f"{body}{{{low},{high}}}"
                return f"{body}+" if low else f"{body}*"


def _is_empty(node: Node) -> bool:
    return isinstance(node, Text) and not node.text


def _quoted(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if " " <= char <= "~" else _escaped(ord(char))


def _without(ranges: Iterable[tuple[int, int]], codes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return `ranges` with holes where `codes` are."""
    kept = list(ranges)
    for code in codes:
        kept = [part for low, high in kept for part in _split(low, high, code)]
    return tuple(kept)


def _split(low: int, high: int, code: int) -> Iterator[tuple[int, int]]:
    """Yield what is left of a range without `code`."""
    if not low <= code <= high:
        yield low, high
        return
    if low < code:
        yield low, code - 1
    if code < high:
        yield code + 1, high


def _range(low: int, high: int) -> str:
    ends = [_escaped(code) for code in ((low,) if low == high else (low, high))]
    return "-".join(ends)


def _escaped(code: int) -> str:
    if 0x30 <= code <= 0x39 or 0x41 <= code <= 0x5A or 0x61 <= code <= 0x7A:
        return chr(code)
    # Always four or eight digits: xgrammar reads as many digits after \\x as there are.
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
