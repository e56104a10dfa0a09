"""Inputs: a tuple of parts. The modality belongs to the input, not to the kind of task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A part that is plain text."""

    text: str


Part = Text
Input = tuple[Part, ...]


def as_input(value: str | Input) -> Input:
    """Wrap a plain string as an input of one text part."""
    return (Text(value),) if isinstance(value, str) else value


def text_of(value: str | Input) -> str:
    """Return the text of an input whose parts are all text, joined by a blank line."""
    return value if isinstance(value, str) else "\n\n".join(part.text for part in value)


def texts_of(values: Sequence[str | Input]) -> list[str]:
    """Apply `text_of` to each input."""
    return [text_of(value) for value in values]
