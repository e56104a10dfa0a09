"""Reads what a writer says as content and tool calls, piece by piece, for the forms of OpenAI's API.

`alambic.engines.toolcalls` knows how each template writes its calls; here they get numbers and ids, and blanks around
them are dropped. What may yet turn out to be a call is held back until it is clear.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from alambic.engines.toolcalls import Splitter, ToolStyle
from alambic.kinds.chat import ToolCall

# How a call is written where a schema says so: the whole answer is one JSON object.
WRITTEN_OUT = ToolStyle("", "", "name", "arguments")
_MOST_CALLS = 128


@dataclass(frozen=True, slots=True)
class Said:
    """Content."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A tool call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Said | Called | Argued


class Reads(Protocol):
    """Turns text into pieces; `calls` counts the calls seen."""

    calls: int

    def feed(self, text: str) -> Sequence[Piece]:
        """Return the pieces that `text` completes."""

    def end(self) -> Sequence[Piece]:
        """Return what was held back, once nothing follows."""


class Plain:
    """All text is content."""

    calls = 0

    def feed(self, text: str) -> Sequence[Piece]:
        """Return `text` as content."""
        return (Said(text),) if text else ()

    def end(self) -> Sequence[Piece]:
        """Return nothing: nothing is held back."""
        return ()


class Arguments:
    """The text is the arguments of one call whose function is known (a named `tool_choice`)."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.calls = 0

    def feed(self, text: str) -> Sequence[Piece]:
        """Return `text` as arguments; the call begins before the first."""
        pieces: list[Piece] = []
        if self.calls == 0:
            self.calls = 1
            pieces.append(Called(0, "call_" + secrets.token_hex(12), self._name))
        if text:
            pieces.append(Argued(0, text))
        return pieces

    def end(self) -> Sequence[Piece]:
        """Return nothing: nothing is held back."""
        return ()


class Calls:
    """Free text in which calls may stand, written in `style`.

    A marked call may name any function: the client knows best what to do with an unknown one. Where the whole answer is
    the call it is plain JSON, and a call only if it names one of `names`. Calls beyond `most` are dropped.
    """

    def __init__(self, style: ToolStyle, names: Collection[str], *, most: int = _MOST_CALLS) -> None:
        self._splitter = Splitter(style)
        self._bare = not style.begin
        self._names = names
        self._most = most
        self._blank = ""
        self._heard = ""  # of a bare answer: what to say if it is no call
        self.calls = 0

    def feed(self, text: str) -> Sequence[Piece]:
        """Return the pieces that `text` completes."""
        if self._bare:
            self._heard += text
        return list(self._pieces(self._splitter.push(text)))

    def end(self) -> Sequence[Piece]:
        """Return what was held back: calls that are whole now, or content."""
        found = self._splitter.finish()
        calls = [piece for piece in found if isinstance(piece, ToolCall)]
        if self._bare and any(call.name not in self._names for call in calls):
            found = [self._heard]
        pieces = list(self._pieces(found))
        if self.calls == 0 and self._blank:
            pieces.append(Said(self._blank))
        return pieces

    def _pieces(self, found: Sequence[str | ToolCall]) -> Iterator[Piece]:
        for piece in found:
            if isinstance(piece, str):
                text = self._blank + piece
                said = text.rstrip()
                self._blank = text[len(said) :]
                if said:
                    yield Said(said)
            elif self.calls < self._most:
                yield Called(self.calls, piece.id or "call_" + secrets.token_hex(12), piece.name)
                yield Argued(self.calls, json.dumps(piece.arguments, ensure_ascii=False))
                self.calls += 1
                self._blank = ""
