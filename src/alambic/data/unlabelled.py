"""Texts without labels that a teacher answers for its student: read once each, none of them a row of the task.

What is not like the rows teaches little: texts in a language that the rows are not in are left out, a file mostly in
such a language is refused, and words that the rows do not have are counted and told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alambic.data.clean import clean_text
from alambic.data.duplicates import exact_key
from alambic.data.language import language_of, languages_of
from alambic.data.read import cell_text, columns_of, iter_rows
from alambic.data.rows import open_source
from alambic.errors import DataError
from alambic.task import DataSpec

_WORD = re.compile(r"[^\W\d_]+")
_OWN = 0.05  # a language that this share of the rows is in is theirs
_MOSTLY = 0.5  # a file with more in other languages is refused
_STRANGE = 0.5  # share of unseen words from which it is told, unless the rows are as strange to each other
_SAMPLE = 2_000


@dataclass(frozen=True)
class Unlabelled:
    """The texts that are left, what was left out, and what should make one doubt them."""

    texts: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read_unlabelled(path: Path, spec: DataSpec, *, train: Sequence[str], taken: Iterable[str]) -> Unlabelled:
    """Read the texts of a file of any format (a .txt file has one a line).

    Args:
        path: the file.
        spec: the task's `[data]`: its text column is looked for, and guessed where the file has no such column.
        train: texts that the teacher learns from; what is read is compared with them.
        taken: every text of the task; of those none is kept, so that dev and test stay unseen.

    Raises:
        DataError: the file cannot be read, holds no other text, or is mostly in a language that `train` is not in.
    """
    column = _column(path, spec)
    rows = [row for row in iter_rows(path, spec)]
    texts = [clean_text(cell_text(row.fields.get(column))).text for row in rows if row.error is None]
    bad = len(rows) - len(texts)
    once = {exact_key(text): text for text in reversed([text for text in texts if text])}
    own = {exact_key(text) for text in taken}
    fresh = [text for key, text in reversed(once.items()) if key not in own]
    kept, strangers = _in_language(path, fresh, train)
    if not kept:
        raise DataError(
            f"{path}: no text that is not a row of the task ({len(texts):,} read)",
            hint="data.unlabelled wants other texts of the same kind; leave it out if there are none",
        )
    gone = [
        f"{n:,} {why}"
        for n, why in (
            (bad, "unreadable"), (len([t for t in texts if t]) - len(once), "doubles"),
            (len(once) - len(fresh), "rows of the task"), (len(fresh) - len(kept), "in another language"),
        )
        if n
    ]  # fmt: skip
    note = f"{path.name}: {len(kept):,} texts without labels" + (f" (left out: {', '.join(gone)})" if gone else "")
    warnings = [w for w in (strangers, _strange_words(path, kept, train)) if w is not None]
    return Unlabelled(tuple(kept), (note,), tuple(warnings))


def _column(path: Path, spec: DataSpec) -> str:
    source = open_source(path, spec)
    named = spec.text if spec.text in source.columns else None
    alone = spec.model_copy(update={"text": named, "label": None, "group": None})
    return columns_of(path, alone, need_label=False).columns.text


def _in_language(path: Path, texts: list[str], train: Sequence[str]) -> tuple[list[str], str | None]:
    """Leave out texts told to be in a language that `train` is not in; say so when they are many."""
    counts = languages_of(train)
    total = sum(counts.values())
    own = {language for language, n in counts.items() if n >= _OWN * total}
    if not own:
        return texts, None
    told = [language_of(text) for text in texts]
    foreign = [language for language in told if language is not None and language not in own]
    n_told = sum(language is not None for language in told)
    share = len(foreign) / n_told if n_told else 0.0
    names = ", ".join(sorted(set(foreign), key=lambda name: -foreign.count(name)))
    said = (
        f"{path.name}: {share:.0%} of the {n_told:,} texts whose language is told are in a language ({names}) that the "
        f"training rows ({', '.join(sorted(own))}) are not in"
    )
    if share >= _MOSTLY:
        raise DataError(said, hint="the teacher cannot answer them; give texts in the language of the rows")
    kept = [text for text, language in zip(texts, told, strict=True) if language is None or language in own]
    return kept, f"{said}; they are left out" if share >= _OWN else None


def _strange_words(path: Path, texts: Sequence[str], train: Sequence[str]) -> str | None:
    """Say how many words the rows do not have, where they are many more than half of the rows has of its own."""
    halves = _words(train[::2]), _words(train[1::2])
    usual = _unseen(halves[1], set(halves[0]))
    share = _unseen(_words(texts[:: max(1, len(texts) // _SAMPLE)]), set(halves[0]) | set(halves[1]))
    if share < _STRANGE or share < 2 * usual:
        return None
    return (
        f"{path.name}: {share:.0%} of its words are in no training row (half of the rows has {usual:.0%} that the "
        "other half has not): texts this different may teach little"
    )


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in _WORD.findall(text.lower())]


def _unseen(words: Sequence[str], known: set[str]) -> float:
    return sum(word not in known for word in words) / len(words) if words else 0.0
