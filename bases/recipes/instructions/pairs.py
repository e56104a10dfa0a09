"""Preference pairs for short grounded answers: the better from the passage, the worse with a named fault."""

from __future__ import annotations

from collections.abc import Iterator

from instructions.frame import Frame, numbered
from instructions.grammar import pick
from instructions.grounded import Invented
from instructions.row import OWN, OWN_LICENCE, Pair, fits, talk
from instructions.sentences import sentence_of, shorten, split, unglue
from instructions.sources import SOURCES, Library

_PASSAGE_TOKENS = 300
_PADDING = {
    "fr": [
        "Bonne question ! D'après ma lecture attentive du texte, il me semble que la réponse est : {answer}. "
        "N'hésitez pas à me demander plus de détails si vous le souhaitez.",
        "Le texte aborde plusieurs points intéressants. On peut retenir que {answer} est mentionné, ce qui "
        "constitue probablement la réponse que vous cherchez.",
        "{answer}. Il faut toutefois replacer cette information dans son contexte, qui est plus large et mérite une "
        "réflexion approfondie.",
    ],
    "en": [
        "Great question! From a careful reading of the text, it seems to me that the answer is: {answer}. "
        "Do not hesitate to ask for more details.",
        "The text raises several interesting points. Among them, {answer} is mentioned, which is probably the answer "
        "that you are looking for.",
        "{answer}. One should however put this into its wider context, which deserves further thought.",
    ],
}


def pairs(frame: Frame, library: Library, count: int) -> Iterator[Pair]:
    """`count` pairs about invented documents, and in French one or two for each question of PIAF's training part."""
    yield from _invented(frame, count)
    if frame.language == "fr":
        yield from _piaf(frame, library)


def _invented(frame: Frame, count: int) -> Iterator[Pair]:
    made = 0
    while made < count:
        document = Invented(frame)
        text = " ".join(document.sentences)
        name = pick(frame.rng, document.held)
        others = [document.values[n] for n in document.held if n != name]
        absent = pick(frame.rng, document.absent)
        strangers = (document.values.get(absent, pick(frame.rng, others)), document.question(absent))
        for pair in _of(
            frame, text, document.question(name), document.values[name], pick(frame.rng, others), strangers
        ):
            made += 1
            yield _signed(pair, frame, OWN, OWN_LICENCE, text)


def _piaf(frame: Frame, library: Library) -> Iterator[Pair]:
    rows = library.rows("piaf")
    for number, row in enumerate(rows):
        answer = unglue(row["answer"])
        passage, _ = shorten(unglue(row["context"]), _PASSAGE_TOKENS, keep=answer)
        if not passage or answer not in passage or len(answer) > 120 or len(rows) < 2:
            continue
        same = [r for r in rows[max(0, number - 4) : number + 5] if r["context"] == row["context"] and r is not row]
        wrong = unglue(pick(frame.rng, same)["answer"]) if same else ""
        other = rows[(number + frame.rng.randrange(1, len(rows))) % len(rows)]
        strangers = ("", "") if other["title"] == row["title"] else (unglue(other["answer"]), unglue(other["question"]))
        for pair in _of(frame, passage, unglue(row["question"]), answer, wrong, strangers):
            yield _signed(pair, frame, "piaf", SOURCES["piaf"].licence, passage)


def _of(
    frame: Frame, text: str, question: str, answer: str, wrong: str, strangers: tuple[str, str]
) -> list[tuple[str, str, str, str]]:
    """Return prompt, chosen, rejected and the fault of the rejected: two drawn of those that apply.

    Args:
        frame: wordings.
        text: the passage.
        question: that it answers.
        answer: to it.
        wrong: another thing that the passage says; empty: unknown.
        strangers: an answer that the passage does not hold, and a question that it does not answer; empty: unknown.
    """
    sentences = split(text)
    at = sentence_of(sentences, answer)
    asked = frame.ask("answer", text=text, question=question)
    stranger, unheld = strangers
    found = [(asked, answer, pick(frame.rng, _PADDING[frame.language]).replace("{answer}", answer), "long")]
    if len(sentences) > 1:
        found.append((asked, answer, text, "copies the passage"))
    if wrong and wrong not in answer and answer not in wrong:
        found.append((asked, answer, wrong, "another answer of the passage"))
    if stranger and stranger != answer:
        found.append((asked, answer, stranger, "not in the passage"))
    found.append((asked, answer, frame.one("refuse"), "refuses what the passage holds"))
    if unheld:
        missing = frame.ask("answer", text=text, question=unheld)
        if stranger:
            found.append((missing, frame.one("refuse"), stranger, "invents"))
        found.append((missing, frame.one("refuse"), answer, "answers another question"))
    if at is not None and len(sentences) > 1:
        cited = frame.ask("cite", text=numbered(sentences), question=question)
        away = (at + frame.rng.randrange(1, len(sentences))) % len(sentences)
        found.append((cited, f"{answer} [{at + 1}]", f"{answer} [{away + 1}]", "cites another sentence"))
        found.append((cited, f"{answer} [{at + 1}]", answer, "cites nothing"))
    return frame.rng.sample(found, min(2, len(found)))


def _signed(pair: tuple[str, str, str, str], frame: Frame, source: str, licence: str, text: str) -> Pair:
    asked, chosen, rejected, fault = pair
    return Pair(talk(asked), chosen, rejected, fault, frame.language, source, licence, group=f"{source}:{text[:60]}")


def usable(pair: Pair) -> bool:
    """Tell whether both sides fit and differ."""
    asked = [message["content"] for message in pair.prompt]
    return pair.chosen != pair.rejected and all(fits([*asked, side]) for side in (pair.chosen, pair.rejected))
