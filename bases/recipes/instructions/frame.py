"""How instruction and text are put together: wordings, now and then a system message, a passage in its frame."""

from __future__ import annotations

import random
from typing import Any

from instructions.grammar import book, pick
from instructions.row import Row, talk


class Frame:
    """The wordings of one language, drawn with one generator."""

    def __init__(self, language: str, rng: random.Random) -> None:
        self.language, self.rng = language, rng
        self.grammar, self.text = book(language)
        self.wordings: dict[str, list[str]] = self.text["wordings"]

    def fill(self, pattern: str, values: dict[str, str] | None = None) -> str:
        """Return a pattern of the grammar with its holes filled."""
        return self.grammar.fill(self.rng, pattern, values)

    def one(self, name: str) -> str:
        """Draw one of the wordings `name`."""
        return str(pick(self.rng, self.wordings[name]))

    def passage(self, text: str) -> str:
        """Return a text in one of the frames of a passage."""
        return self.one("passage").replace("{text}", text)

    def ask(self, name: str, **values: str) -> str:
        """Return wording `name` with its values; `text` also stands as {passage} in a frame of its own."""
        asked = self.one(name)
        if "text" in values:
            asked = asked.replace("{passage}", self.passage(values["text"]))
        if "question" in values:
            question = values["question"]
            # A name keeps its capital: only a word that begins questions is written small inside a sentence.
            asked = asked.replace("{question_low}", question[:1].lower() + question[1:])
        for key in ("question", "labels", "list", "schema", "refusal", "answer"):
            if key in values:
                asked = asked.replace("{" + key + "}", values[key])
        return asked.replace("{text}", values.get("text", ""))

    def row(self, family: str, asked: str, answer: str, *, system: str = "", **about: Any) -> Row:
        """Return a row of one exchange; of the system wordings `system`, one in four rows brings one."""
        first = self.one(system) if system and self.rng.random() < 0.25 else ""
        return Row(talk(asked, answer, system=first), family, self.language, **about)


def numbered(sentences: list[str]) -> str:
    """Return sentences as numbered lines: [1] first, [2] second."""
    return "\n".join(f"[{i}] {sentence}" for i, sentence in enumerate(sentences, 1))
