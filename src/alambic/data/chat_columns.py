"""Which column is asked and which one answers: named by the task, or guessed from names (French and English).

A guess is explained. When names do not tell, and there are not just two columns of text, it is an error that lists
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alambic.data.chat_answers import written
from alambic.data.columns import Profile, by_name, listing, profile
from alambic.errors import DataError

# Surest first.
_INPUTS = (
    "prompt", "instruction", "input", "entree", "question", "query", "requete", "source", "src", "text", "texte",
    "document", "article", "message", "utterance", "request", "demande", "enonce", "sentence", "phrase", "context",
    "contexte", "content", "contenu", "body", "corps", "email", "mail", "nl", "triples",
)  # fmt: skip
_OUTPUTS = (
    "completion", "response", "output", "sortie", "answer", "answers", "reponse", "reply", "target", "tgt", "cible",
    "summary", "resume", "headline", "title", "titre", "abstract", "translation", "traduction", "command", "cmd",
    "commande", "correction", "corrections", "corrected", "reference", "references", "rewrite", "paraphrase", "sql",
    "code", "solution", "json", "fields", "champs", "expected", "result", "resultat", "texts", "label",
)  # fmt: skip
_LANGUAGES = frozenset({
    "ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "et", "fi", "fr", "ga", "he", "hi", "hr", "hu", "it", "ja",
    "ko", "lt", "lv", "mt", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sv", "tr", "uk", "vi", "zh",
})  # fmt: skip
_SURE = 11  # of the names of inputs: none of them is also one of answers
_FEW = 20
_VARIED = 0.1


@dataclass(frozen=True)
class Guess:
    """The two columns, and one note for each that was guessed."""

    text: str
    output: str
    notes: tuple[str, ...]


def guess(
    names: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    *,
    where: str,
    text: str | None = None,
    output: str | None = None,
    apart: Sequence[str] = (),
) -> Guess:
    """Settle the column of what is asked and that of the answer.

    Args:
        names: columns of the table.
        sample: its first rows.
        where: the file, for messages.
        text: named by the task.
        output: named by the task.
        apart: columns that the prompt is written from: none of them answers.

    Raises:
        DataError: one of them cannot be told.
    """
    profiles = {name: profile([written(row.get(name)) or None for row in sample]) for name in names}
    texts = [name for name in names if name not in (text, output, *apart) and _is_text(profiles[name])]
    notes: list[str] = []
    languages = [name for name in texts if name.casefold() in _LANGUAGES]
    if text is None and output is None and len(languages) == 2:
        return _in_order(languages)
    if output is None:
        free = [name for name in texts if by_name([name], _INPUTS[:_SURE]) is None]
        # A column of few values or of none may be named as answers all the same: then its rows say what is wrong.
        rest = [name for name in names if name not in (text, *texts, *apart)]
        output = by_name(free, _OUTPUTS) or by_name(rest, _OUTPUTS)
        if output is not None:
            notes.append(f"output = {output!r} (guessed from its name)")
    if text is None:
        text = by_name([name for name in texts if name != output], _INPUTS)
        if text is not None:
            notes.append(f"text = {text!r} (guessed from its name)")
    left = [name for name in texts if name not in (text, output)]
    if text is None and output is None:
        if len(left) != 2:
            raise _cannot("text" if len(left) > 2 else "output", names, where)
        return _in_order(left)
    if text is None or output is None:
        if len(left) != 1:
            raise _cannot("text" if text is None else "output", names, where)
        notes.append(f"{'text' if text is None else 'output'} = {left[0]!r} (guessed: no other column has texts)")
        text, output = text or left[0], output or left[0]
    return Guess(text, output, tuple(sorted(notes, reverse=True)))


def _is_text(column: Profile) -> bool:
    """Tell whether a column may be asked or answer: neither numbers, nor few values that come back."""
    if not column.filled or column.numeric:
        return False
    return column.filled < _FEW or column.distinct >= _VARIED * column.filled


def _in_order(pair: Sequence[str]) -> Guess:
    text, output = pair
    said = f"text = {text!r}, output = {output!r} (the two columns of text, in their order; name them to turn it)"
    return Guess(text, output, (said,))


def _cannot(what: str, names: Sequence[str], where: str) -> DataError:
    said = "the answer (data.output)" if what == "output" else "what is asked (data.text)"
    return DataError(
        f"{where}: which column is {said}? There are {listing(names)}",
        hint=f'write {what} = "COLUMN" under [data]; known forms are messages, conversations, instruction and output, '
        "prompt and completion",
    )
