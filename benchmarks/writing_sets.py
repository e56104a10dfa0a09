"""The public data sets of `writing.py` as conversations: what is asked, what is learnt, and every accepted answer."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract_rows import read

TITLE_WORDS = 80  # of an article, from its beginning: the rest is not read


@dataclass(frozen=True)
class Pairs:
    """Rows as `measure_written` reads them, `groups` telling which of them belong together in the table."""

    chats: list[Any]
    references: list[list[str]]
    groups: list[str]


@dataclass(frozen=True)
class Task:
    """A set and what is trained on it.

    Attributes:
        metrics: of written text; the first is what is shown as the score.
        parameters: of the model made from nothing.
        epochs: passes over train, for the minutes of the table on one thread.
        dropout: in training; few passes over few rows need little.
        max_tokens: of an answer.
        context_tokens: that the model reads, and writes.
        published: figures of others, and what keeps them from being compared one to one.
    """

    train: Pairs
    dev: Pairs
    test: Pairs
    metrics: tuple[str, ...]
    parameters: int
    epochs: float
    dropout: float
    max_tokens: int
    context_tokens: int
    published: str


def load(data: Path, name: str) -> Task:
    """Return `nl2bash`, `webnlg` or `titles`."""
    return {"nl2bash": _nl2bash, "webnlg": _webnlg, "titles": _titles}[name](data)


def _nl2bash(data: Path) -> Task:
    parts = (_pairs((row["text"], [row["command"]]) for row in read(data / "nl2bash", part))
             for part in ("train", "dev", "test"))  # fmt: skip
    return Task(
        *parts, metrics=("exact_match", "bleu", "chrf"), parameters=3_000_000, epochs=16, dropout=0.2, max_tokens=120,
        context_tokens=512,
        published="Tellina: about 29 % of first answers correct in full (from memory; judged by people, who accept "
        "other commands that do the same, on the original split; here only the very same text counts)",
    )  # fmt: skip


def _webnlg(data: Path) -> Task:
    rows = {part: read(data / "webnlg_en", part) for part in ("train", "dev", "test")}
    train = _pairs((_triples(row), [text]) for row in rows["train"] for text in row["texts"])
    dev = _pairs((_triples(row), row["texts"]) for row in rows["dev"])
    test = _pairs((_triples(row), row["texts"]) for row in rows["test"])
    groups = ["seen" if row["seen_category"] else "unseen" for row in rows["test"]]
    return Task(
        train, dev, Pairs(test.chats, test.references, groups), metrics=("bleu_moses_en", "bleu", "chrf"),
        parameters=3_000_000, epochs=5, dropout=0.1, max_tokens=160, context_tokens=512,
        published="challenge 2017, BLEU all / seen / unseen: baseline 33.24 / 52.39 / 6.13, Melbourne 45.13 / 54.52 / "
        "33.27 (from memory; lower-cased, up to three references as here)",
    )  # fmt: skip


def _titles(data: Path) -> Task:
    parts = [_pairs((_start(row["text"]), [row["title"]]) for row in read(data / "orangesum", part))
             for part in ("train", "dev", "test")]  # fmt: skip
    dev = Pairs(parts[1].chats[:500], parts[1].references[:500], [])
    return Task(
        parts[0], dev, parts[2], metrics=("rouge_l_ascii", "rouge_1_ascii", "rouge_2_ascii", "rouge_1", "rouge_2",
                                          "rouge_l"),
        parameters=4_000_000, epochs=3, dropout=0.1, max_tokens=60, context_tokens=512,
        published="ROUGE-1 / 2 / L: mBARThez 41.08 / 24.11 / 36.41, BARThez 40.86 / 23.68 / 36.03, "
        "CamemBERT2CamemBERT 34.92 / 18.04 / 30.83, first words 19.84 / 8.11 / 16.13 (from memory of the paper, to be "
        "checked; trained on far more text, whole articles, ASCII tokens)",
    )  # fmt: skip


def _pairs(rows: Any) -> Pairs:
    from alambic.kinds.chat import Chat

    kept = [(asked.strip(), [text.strip() for text in accepted if text.strip()]) for asked, accepted in rows]
    kept = [(asked, accepted) for asked, accepted in kept if accepted]
    return Pairs([Chat.of(asked, completion=accepted[0]) for asked, accepted in kept], [a for _, a in kept], [])


def _triples(row: dict[str, Any]) -> str:
    """Write triples as text: underscores as spaces, the property's words apart, one triple after the other."""
    return " ; ".join(
        f"{_plain(subject)} | {_apart(name)} | {_plain(value)}" for subject, name, value in row["triples"]
    )


_WORDS = re.compile(r"([a-z])([A-Z])")


def _plain(text: str) -> str:
    return text.replace("_", " ").strip('" ')


def _apart(name: str) -> str:
    return _WORDS.sub(r"\1 \2", _plain(name)).lower()


def _start(text: str) -> str:
    return " ".join(text.split()[:TITLE_WORDS])


def first_words(chats: Sequence[Any], count: int) -> list[str]:
    """Return the first words of each input: what a title has to beat."""
    return [" ".join(chat.prompt.messages[-1].content.split()[:count]) for chat in chats]


def utilities(command: str, *, flags: bool) -> str:
    """Return the programs that a command runs, in order, with their flags if asked: its template, roughly.

    A command that the shell could not read is returned as it is, and so equals nothing but itself.
    """
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;()<>`")
        lexer.wordchars += "{}*?[]$%+=,:@^!#\\"
        lexer.commenters = ""
        words = list(lexer)
    except ValueError:
        return command
    kept, first = [], True
    for word in words:
        flag = word.startswith("-") and len(word) > 1
        if set(word) <= set("|&;()`"):
            first = True
        elif flag:
            kept += [word] * flags
            first = first or word in ("-exec", "-execdir", "-ok")
        elif first and "=" not in word:
            kept.append(word)
            first = word in _PREFIXES
    return " ".join(kept)


_PREFIXES = frozenset({"sudo", "time", "nohup", "env", "xargs", "exec", "then", "do", "else", "!"})
