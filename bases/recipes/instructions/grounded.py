"""Answers from a passage: short, with a citation, with a quotation, and refused when the passage does not hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from instructions.frame import Frame, numbered
from instructions.grammar import capital, pick
from instructions.row import Row
from instructions.sentences import sentence_of, shorten, split, unglue
from instructions.sources import CORPUS, SOURCES, Library

_PASSAGE_TOKENS = 360
_FORMS = ("answer", "cite", "quote", "refuse", "question", "holds")


def piaf(frame: Frame, library: Library) -> Iterator[Row]:
    """Every question of PIAF's training part: answered, cited, asked of another passage, to be written."""
    rows = library.rows("piaf")
    for number, row in enumerate(rows):
        passage, cut = shorten(unglue(row["context"]), _PASSAGE_TOKENS, keep=unglue(row["answer"]))
        answer, question = unglue(row["answer"]), unglue(row["question"])
        if not passage or answer not in passage or not question.endswith("?"):
            continue
        other = rows[(number + frame.rng.randrange(1, len(rows))) % len(rows)] if len(rows) > 1 else row
        asked_of_other = unglue(other["question"]) if other["title"] != row["title"] else ""
        for form in ("answer", "cite", "quote", "refuse", "question", "holds"):
            if form in ("question", "holds") and frame.rng.random() < 0.6:
                continue
            found = one(frame, form, passage, question, answer, asked_of_other, name=row["title"])
            if found is not None:
                yield found.by("piaf", SOURCES["piaf"].licence, group=f"piaf:{row['context'][:40]}", cut=cut)


def one(frame: Frame, form: str, passage: str, question: str, answer: str, other: str, *, name: str = "") -> Row | None:
    """Return a row of `form`; None where the passage does not serve it.

    Args:
        frame: wordings.
        form: one of `_FORMS`.
        passage: that holds the answer.
        question: that it answers.
        answer: as it stands in the passage.
        other: a question that the passage does not answer; empty: none is known.
        name: of what the passage is about, if anything.
    """
    sentences = split(passage)
    at = sentence_of(sentences, answer)
    if form == "answer":
        return frame.row("answer", frame.ask("answer", text=passage, question=question), answer, system="answer_system")
    if form == "cite":
        if at is None or len(sentences) < 2:
            return None
        asked = frame.ask("cite", text=numbered(sentences), question=question)
        return frame.row("cite", asked, f"{answer} [{at + 1}]", system="cite_system")
    if form == "quote":
        if at is None or len(sentences) < 2 or len(sentences[at]) > 300:
            return None
        told = frame.one("quote_answer").replace("{answer}", answer).replace("{sentence}", sentences[at])
        return frame.row("quote", frame.ask("quote", text=passage, question=question), told)
    if form == "question":
        return frame.row("question", frame.ask("question", text=passage, answer=answer), question)
    if not other:
        return None
    if form == "holds":
        yes, no = ("Oui", "Non") if frame.language == "fr" else ("Yes", "No")
        asked, told = (question, yes) if frame.rng.random() < 0.5 else (other, no)
        return frame.row("holds", frame.ask("holds", text=passage, question=asked), told)
    return refusal(frame, passage, question, answer, other)


def refusal(frame: Frame, passage: str, question: str, answer: str, other: str) -> Row:
    """Return a row whose question the passage does not answer.

    Where the words of the refusal are given, one in three has an answer, so that they alone do not give it away.
    """
    draw = frame.rng.random()
    if draw < 0.35:
        words = frame.one("refusal")
        held = draw < 0.12
        asked = frame.ask("refuse_said", text=passage, question=question if held else other, refusal=words)
        return frame.row("refuse", asked, answer if held else words)
    if draw < 0.55:
        sentences = split(passage)
        asked = frame.ask("cite", text=numbered(sentences), question=other)
        return frame.row("refuse", asked, frame.one("refuse"), system="cite_system")
    asked = frame.ask("answer", text=passage, question=other)
    return frame.row("refuse", asked, frame.one("refuse"), system="answer_system")


class Invented:
    """A document written by the grammar: what it says, and what it does not."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.kind: dict[str, Any] = pick(frame.rng, frame.text["documents"])
        fields: dict[str, Any] = self.kind["fields"]
        names = list(fields)
        frame.rng.shuffle(names)
        size = frame.rng.randint(3, min(7, len(names) - 1))
        self.held, self.absent = names[:size], names[size:]
        # Two values that are the same text would make a citation ambiguous.
        self.values: dict[str, str] = {}
        for name in names:
            for _ in range(20):
                value = frame.fill(fields[name]["value"])
                if not any(value in known or known in value for known in self.values.values()):
                    self.values[name] = value
                    break
        self.held = [name for name in self.held if name in self.values]
        order = sorted(self.held, key=names.index) if frame.rng.random() < 0.5 else self.held
        # A sentence may stand on what an earlier one said: what the document is about comes first when it is there.
        first = next(iter(fields))
        self.held = sorted(order, key=lambda name: name != first)
        self.sentences = [self._say(name) for name in self.held]

    def _say(self, name: str) -> str:
        frame = self.frame
        return capital(frame.fill(pick(frame.rng, self.kind["fields"][name]["say"]), self.values))

    @property
    def title(self) -> str:
        """A title whose names the document holds; empty when it has none."""
        titles = [t for t in self.kind["titles"] if all(name in self.held for name in _names(t))]
        return capital(self.frame.fill(pick(self.frame.rng, titles or [""]), self.values))

    @property
    def text(self) -> str:
        """The document as running text, at times with its title or as lines."""
        gap = "\n" if self.frame.rng.random() < 0.15 else " "
        body = gap.join(self.sentences)
        title = self.title if self.frame.rng.random() < 0.3 else ""
        return f"{title}\n{body}" if title else body

    @property
    def summary(self) -> str:
        """One sentence about the document; empty when it lacks what the sentence needs."""
        known = [s for s in self.kind["summary"] if all(name in self.held for name in _names(s))]
        return capital(self.frame.fill(pick(self.frame.rng, known), self.values)) if known else ""

    def question(self, name: str) -> str:
        """A question for the field `name`."""
        return str(pick(self.frame.rng, self.kind["fields"][name]["ask"]))


def _names(pattern: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", pattern)


def invented(frame: Frame, count: int) -> Iterator[Row]:
    """`count` rows about invented documents."""
    made = 0
    while made < count:
        document = Invented(frame)
        text = document.text
        for form in frame.rng.sample(_FORMS, 3):
            held = pick(frame.rng, document.held)
            absent = document.question(pick(frame.rng, document.absent)) if document.absent else ""
            row = one(frame, form, text, document.question(held), document.values[held], absent)
            if row is not None:
                made += 1
                yield row.by(row.source, row.licence, group=f"own:{text[:60]}")


def prompted(library: Library, *, most_a_task: int) -> Iterator[Row]:
    """English tasks of P3 as they are worded there: answers from passages, sentences from words, paraphrases."""
    taken: dict[str, int] = {}
    seen: set[str] = set()
    for row in library.lines("en_prompts"):
        task, prompt, answer = (
            row["task"],
            row["prompt"].strip(),
            row["completion"].removesuffix("<|endoftext|>").strip(),
        )
        if taken.get(task, 0) >= most_a_task or not prompt or not answer or len(answer) > 600:
            continue
        if prompt in seen:
            continue
        seen.add(prompt)
        taken[task] = taken.get(task, 0) + 1
        messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        yield Row(messages, "prompted", "en", "en_prompts", CORPUS["en_prompts"].licence, group=f"p3:{prompt[-80:]}")
