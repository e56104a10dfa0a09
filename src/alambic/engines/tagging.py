"""From scores of tokens to spans of a text: what training and the packed tagger share, so that both read alike.

A text is tokenised with offsets, cut into overlapping windows, and each token's scores are taken from the window that
shows most around it. Tags are BIO; the best valid sequence is found by the Viterbi algorithm, over words unless the
training spans cut through them. numpy only.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.data.clean import clean_text
from alambic.errors import EngineError, InputTooLong

Floats = NDArray[np.float32]
UNITS = ("word", "token")


@dataclass(frozen=True)
class Span:
    """A piece of a text.

    Attributes:
        start: offset of its first character.
        end: offset after its last character.
        label: what it is.
        score: mean probability of its tags, 1.0 for a span that a person marked.
    """

    start: int
    end: int
    label: str
    score: float = 1.0

    def text(self, whole: str) -> str:
        """Return the piece itself."""
        return whole[self.start : self.end]


@dataclass(frozen=True)
class Reading:
    """A tokenised text without its special tokens.

    Attributes:
        ids: of its tokens, [T].
        offsets: start and end of each token in the text.
        words: number of the unit that each token belongs to, never falling.
        breaks: units that are ends of lines.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    words: tuple[int, ...]
    breaks: frozenset[int] = frozenset()

    @property
    def heads(self) -> list[int]:
        """First token of each unit."""
        return [i for i, word in enumerate(self.words) if i == 0 or self.words[i - 1] != word]

    @property
    def units(self) -> list[tuple[int, int]]:
        """Offsets of each unit."""
        starts = self.heads
        ends = [*starts[1:], len(self.ids)]
        return [(self.offsets[a][0], self.offsets[b - 1][1]) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Window:
    """A piece of a reading: tokens [start, stop), of which [keep, until) take their scores from it."""

    start: int
    stop: int
    keep: int
    until: int


def read(encoding: Any, text: str, *, unit: str, line_id: int | None = None) -> Reading:
    """Return the reading of an encoding of the tokenizers library.

    Args:
        encoding: of `text`.
        text: what was encoded.
        unit: ``word`` or ``token``.
        line_id: token put where a line ends, a unit by itself. Most tokenizers of encoders read a line end as a space,
            and addresses, receipts and letters lose what tells their parts from each other. None: nothing is put.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    words: list[int] = []
    breaks: set[int] = set()
    previous: int | None = None
    for i, special in enumerate(encoding.special_tokens_mask):
        start, end = encoding.offsets[i]
        while start < end and text[start].isspace():  # some tokens hold the space before a word
            start += 1
        if special or start == end:
            continue
        if line_id is not None and ids and (at := text.find("\n", offsets[-1][1], start)) >= 0:
            breaks.add(words[-1] + 1)
            ids.append(line_id)
            offsets.append((at, at + 1))
            words.append(words[-1] + 1)
            previous = None
        word = None if unit == "token" else encoding.word_ids[i]
        same = word is not None and word == previous
        words.append((words[-1] + (not same)) if words else 0)
        ids.append(encoding.ids[i])
        offsets.append((start, end))
        previous = word
    return Reading(tuple(ids), tuple(offsets), tuple(words), frozenset(breaks))


def line_mark(suffix: Sequence[int]) -> int | None:
    """Return the token that stands for the end of a line: the separator that ends every text; None without one."""
    return suffix[-1] if suffix else None


def windows(length: int, *, room: int, overlap: int, long: str = "windows") -> list[Window]:
    """Cut `length` tokens into windows of at most `room`, neighbours sharing `overlap` at least.

    Args:
        length: tokens of the text.
        room: tokens that a window has place for.
        overlap: tokens shared by neighbours; each half is scored by the window that sees more around it.
        long: ``windows``, ``head`` (what comes after is not read), or ``error``.

    Raises:
        InputTooLong: the text is longer than a window, and `long` is ``error``.
        EngineError: no such way to read long texts.
    """
    if long not in ("windows", "head", "error"):
        raise EngineError(f"a tagger cannot read long texts by {long!r}", hint="allowed: windows, head, error")
    if length <= room or long == "head":
        return [Window(0, min(length, room), 0, min(length, room))]
    if long == "error":
        raise InputTooLong(
            f"the text has {length} tokens and the model reads {room}", hint='shorten it, or set long = "windows"'
        )
    count = -(-(length - overlap) // (room - overlap))
    starts = [round(i * (length - room) / (count - 1)) for i in range(count)]
    cuts = [0, *((after + before + room) // 2 for before, after in itertools.pairwise(starts)), length]
    return [Window(start, start + room, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


def tag_names(labels: Sequence[str]) -> list[str]:
    """Return the tags of `labels`: O, then B- of each, then I- of each."""
    return ["O", *(f"B-{label}" for label in labels), *(f"I-{label}" for label in labels)]


def tags_of(spans: Sequence[Span], reading: Reading, labels: Sequence[str]) -> list[int]:
    """Return the tag of each unit [U]; a unit belongs to the span that its middle lies in, the longest first."""
    index = {label: i for i, label in enumerate(labels)}
    units = reading.units
    tags = [0] * len(units)
    for span in sorted(spans, key=lambda span: span.start - span.end):
        inside = [i for i, (start, end) in enumerate(units) if span.start <= (start + end - 1) / 2 < span.end]
        inside = list(_trimmed(inside, reading.breaks))
        if inside and not any(tags[i] for i in inside):
            for i in inside:
                tags[i] = 1 + len(labels) + index[span.label]
            tags[inside[0]] = 1 + index[span.label]
    return tags


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def best_tags(scores: Floats) -> NDArray[np.int64]:
    """Return the most probable valid sequence [U] of log-probabilities [U, 1 + 2K] (Viterbi).

    An I- comes only after a B- or I- of its own label, so a step looks at the best of all tags, and for each I- at two.
    """
    steps, width = scores.shape
    k = (width - 1) // 2
    back = np.zeros((steps, width), dtype=np.int64)
    inside = np.arange(1 + k, width)
    total = scores[0].astype(np.float64)
    total[inside] = -np.inf
    for step in range(1, steps):
        before = int(total.argmax())
        back[step] = before
        began, went_on = total[1 : 1 + k], total[inside]
        back[step, inside] = np.where(began >= went_on, inside - k, inside)
        after = np.full(width, total[before])
        after[inside] = np.maximum(began, went_on)
        total = after + scores[step]
    tags = np.zeros(steps, dtype=np.int64)
    tags[-1] = total.argmax()
    for step in range(steps - 1, 0, -1):
        tags[step - 1] = back[step, tags[step]]
    return tags


def decode(scores: Floats, reading: Reading, labels: Sequence[str]) -> list[Span]:
    """Return the spans that log-probabilities [U, 1 + 2K] of the units of `reading` say."""
    if not len(scores):
        return []
    tags, k, units = best_tags(scores), len(labels), reading.units
    shares = np.exp(scores[np.arange(len(tags)), tags])
    spans: list[Span] = []
    start: int | None = None
    for i, tag in enumerate([*tags.tolist(), 0]):
        if start is not None and tag <= k:
            label = labels[int(tags[start]) - 1]
            if inside := _trimmed(range(start, i), reading.breaks):
                first, last = inside[0], inside[-1]
                spans.append(Span(units[first][0], units[last][1], label, float(shares[first : last + 1].mean())))
            start = None
        if 1 <= tag <= k:
            start = i
    return spans


def _trimmed(inside: Sequence[int], breaks: frozenset[int]) -> Sequence[int]:
    """Return units without the ends of lines that they begin or end with."""
    first, last = 0, len(inside)
    while first < last and inside[first] in breaks:
        first += 1
    while last > first and inside[last - 1] in breaks:
        last -= 1
    return inside[first:last]


def guess(scores: Floats, reading: Reading, labels: Sequence[str], label: str) -> Span | None:
    """Return the likeliest span of `label`, however unlikely: for a field that must not stay empty."""
    if not len(scores):
        return None
    k, at = len(labels), labels.index(label)
    begins = scores[:, 1 + at].copy()
    begins[sorted(reading.breaks)] = -np.inf
    first = int(begins.argmax())
    last = first
    while last + 1 < len(scores) and int(scores[last + 1].argmax()) == 1 + k + at:
        last += 1
    last = _trimmed(range(first, last + 1), reading.breaks)[-1]
    units = reading.units
    return Span(units[first][0], units[last][1], label, float(np.exp(scores[first, 1 + at])))


def aligned(text: str) -> tuple[str, list[int] | None]:
    """Clean `text` as training data is cleaned, and return where each character of the result came from.

    The places are None when nothing changed; otherwise they have one more entry, the end.
    """
    cleaned = clean_text(text).text
    if cleaned == text:
        return text, None
    pieces: list[tuple[str, int]] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or _apart(text[start:end], text[end]):
            pieces.append((_clean_piece(text[start:end]), start))
            start = end
    joined = "".join(piece for piece, _ in pieces)
    places = [place for piece, place in pieces for _ in piece]
    left = len(joined) - len(joined.lstrip())
    if joined.strip() != cleaned:  # Unicode has rarer compositions: then the text is read as it stands
        return text, None
    return cleaned, [*places[left : left + len(cleaned)], len(text.rstrip())]


def _apart(before: str, after: str) -> bool:
    """Tell whether cleaning treats `after` apart from what is before it."""
    if before.endswith("\r") and after == "\n":
        return False
    if before.isascii() and after.isascii():
        return True
    whole = unicodedata.normalize("NFC", before + after)
    return whole == unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", after)


def _clean_piece(piece: str) -> str:
    # Ends are stripped by `clean_text`, and a space in the middle of a text must stay.
    return clean_text(f"|{piece}|").text[1:-1]


def restored(span: Span, places: Sequence[int] | None) -> Span:
    """Return a span of a cleaned text as a span of the text it came from."""
    if places is None:
        return span
    return Span(places[span.start], places[span.end], span.label, span.score)
