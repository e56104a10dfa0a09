"""Token ids to text as they come: never half a character, never a part of a stop text.

    text = Detokeniser(tokenizer, silent={2})
    for id in ids: print(text.push([id]), end="")
    print(text.flush(), end="")

A character may be spread over several tokens; what a decoder shows for an unfinished one (U+FFFD) is held back until
the next token settles it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

_UNFINISHED = "\ufffd"
_LONGEST = 4  # bytes of a character in UTF-8, so tokens of one at most


class Detokeniser:
    """The text of one answer: what `push` and `flush` return, joined, is what `decode` gives for all ids."""

    def __init__(self, tokenizer: Any, *, silent: Collection[int] = (), before: Sequence[int] = ()) -> None:
        """Start an answer.

        Args:
            tokenizer: of the library tokenizers.
            silent: ids that show nothing (end of turn and other special tokens).
            before: ids that the answer goes on from; they only tell a decoder that it is not at the start of a text.
        """
        self._tokenizer = tokenizer
        self._silent = frozenset(silent)
        self._context = [id for id in before if id not in self._silent][-_LONGEST:]
        self._new: list[int] = []
        self._shown = 0  # characters of the window already given
        self._base = len(self._decode(self._context))
        self._bytes_join = _joins_bytes(tokenizer)

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids and return the text that is certain by now; may be empty."""
        ids = [id for id in ids if id not in self._silent]
        if not ids:
            return ""
        self._new += ids
        text = self._decode(self._context + self._new)[self._base :]
        settled = self._settled(text)
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        if settled == len(text):  # nothing is open: the next window starts here
            self._move_on()
        return piece

    def flush(self) -> str:
        """Return what was held back; the answer is over."""
        text = self._decode(self._context + self._new)[self._base :]
        piece = text[self._shown :]
        self._move_on()
        return piece

    @property
    def held(self) -> bool:
        """Whether a character is open."""
        return bool(self._new)

    def _settled(self, text: str) -> int:
        """Length of the part of `text` that no further token can change."""
        if not text.endswith(_UNFINISHED):
            return len(text)
        if self._bytes_join:  # the bytes of all tokens are joined first: an open character at the end is one sign
            return len(text) - 1
        # A run of byte tokens shows one sign per byte until it is whole; a run this long never will be.
        return len(text) if len(self._new) >= _LONGEST else min(self._shown, len(text))

    def _move_on(self) -> None:
        self._context = (self._context + self._new)[-_LONGEST:]
        self._new = []
        self._shown = 0
        self._base = len(self._decode(self._context))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False) if ids else ""
        return text


def _joins_bytes(tokenizer: Any) -> bool:
    """Tell whether the tokens of `tokenizer` are pieces of bytes (GPT-2's kind of BPE)."""
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return any(kind.get("type") == "ByteLevel" for kind in (decoder, *(decoder.get("decoders") or ())))


class StopFinder:
    """Ends a text at the first of some stop texts, which may be spread over several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take the next piece and return the text that belongs to no stop text; nothing more once one was found."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back; the answer is over."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins, shorter than `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[len(text) - length :]):
            return length
    return 0
