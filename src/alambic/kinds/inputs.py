"""Inputs: a tuple of parts. The modality belongs to the input, not to the kind of task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A part that is plain text."""

    text: str


Part = Text
Input = tuple[Part, ...]


def text_of(value: str | Input) -> str:
    """Return the text of an input whose parts are all text, joined by a blank line."""
    return value if isinstance(value, str) else "\n\n".join(part.text for part in value)
