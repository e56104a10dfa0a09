"""Conversations: greetings and what a small model should say of itself, and the French dialogues of OpenAssistant."""

from __future__ import annotations

from collections.abc import Iterator

from instructions.frame import Frame
from instructions.grammar import pick
from instructions.row import Row, talk
from instructions.sources import CORPUS, Library


def greetings(frame: Frame, count: int) -> Iterator[Row]:
    """At most `count` short exchanges; the words run out where few are written."""
    seen: set[str] = set()
    for _ in range(20 * count):
        if len(seen) >= count:
            return
        entry = pick(frame.rng, frame.text["chat"])
        said = frame.fill(pick(frame.rng, entry["said"]))
        if said not in seen:
            seen.add(said)
            yield Row(talk(said, pick(frame.rng, entry["told"])), "chat", frame.language)


def dialogues(library: Library) -> Iterator[Row]:
    """French dialogues as they are; those too long for the context are left out by the caller, and counted."""
    for row in library.lines("fr_chat"):
        messages = tuple(row["messages"])
        yield Row(
            messages, "chat", "fr", "fr_chat", CORPUS["fr_chat"].licence, group=f"oasst:{messages[0]['content'][:60]}"
        )
