"""Which columns hold the text, the label and the group: named by the task, or guessed and explained.

A guess goes by the column's name first (French and English), then by what is in it. When neither tells, it is an error
that lists the columns: a wrong guess costs more than a question.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alambic.data.clean import clean_name
from alambic.errors import DataError, nearest

if TYPE_CHECKING:
    from alambic.task import DataSpec

# Surest first.
_TEXT_NAMES = (
    "text", "texte", "message", "utterance", "enonce", "sentence", "phrase", "content", "contenu", "body", "corps",
    "question", "query", "requete", "demande", "request", "comment", "commentaire", "review", "avis", "verbatim",
    "description", "tweet", "sms", "email", "mail", "courriel", "instruction", "input", "document", "title",
    "titre", "objet", "subject",
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "etiquette", "etiquettes", "intent", "intents", "intention", "category", "categories",
    "categorie", "class", "classe", "team", "equipe", "service", "topic", "theme", "sentiment", "target", "cible",
    "tag", "tags", "rubrique", "motif", "department", "departement", "queue", "domain", "domaine", "type", "output",
    "polarity", "polarite",
)  # fmt: skip
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Columns:
    """Names of the columns used; `label` is None for data without labels."""

    text: str
    label: str | None
    group: str | None = None


@dataclass(frozen=True)
class Guess:
    """The columns, and one note per column that was guessed, with the reason."""

    columns: Columns
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """What the first rows hold in one column."""

    filled: int
    distinct: int
    mean_length: float
    numeric: bool


def choose_columns(
    names: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    spec: DataSpec | None,
    *,
    where: str,
    need_label: bool = True,
) -> Guess:
    """Settle the columns of a table from the task, else from their names, else from its first rows.

    Raises:
        DataError: a column named by the task is not there, or a column cannot be guessed.
    """
    wanted = {what: named(getattr(spec, what, None), what, names, where) for what in ("text", "label", "group")}
    text, label, notes = wanted["text"], wanted["label"], []
    free = [n for n in names if n not in wanted.values()]
    profiles = {n: profile([row.get(n) for row in rows]) for n in free}
    # Names settle both columns before contents settle any, so that the label is not taken for a text.
    if label is None and need_label and (label := by_name([n for n in free if n != text], _LABEL_NAMES)) is not None:
        free.remove(label)
        notes.append(f"label = {label!r} (guessed from its name)")
    if text is None and (text := by_name(free, _TEXT_NAMES)) is not None:
        free.remove(text)
        notes.append(f"text = {text!r} (guessed from its name)")
    if text is None:
        text = _text_by_content(free, profiles)
        if text is None:
            raise _cannot_guess("text", names, where)
        free.remove(text)
        notes.append(
            f"text = {text!r} (guessed: {profiles[text].mean_length:.0f} characters a row, the longest column)"
        )
    if label is None and need_label:
        label = _label_by_content(free, profiles)
        if label is None:
            raise _cannot_guess("label", names, where)
        notes.append(f"label = {label!r} (guessed: {profiles[label].distinct} values in {profiles[label].filled} rows)")
    return Guess(Columns(text, label, wanted["group"]), tuple(sorted(notes, reverse=True)))


def named(wanted: str | None, what: str, names: Sequence[str], where: str) -> str | None:
    """Return the column that the task names as `what`, None when it names none.

    Raises:
        DataError: there is no such column.
    """
    if wanted is None:
        return None
    for name in names:
        if clean_name(name) == clean_name(wanted):
            return name
    raise DataError(
        f"{where}: no column {wanted!r} (data.{what}); it has {listing(names)}", hint=nearest(wanted, names)
    )


def _cannot_guess(what: str, names: Sequence[str], where: str) -> DataError:
    return DataError(
        f"{where}: cannot tell which column holds the {what}; the columns are {listing(names)}",
        hint=f'write {what} = "COLUMN" under [data]; the first line of a file must hold the column names',
    )


def listing(names: Sequence[str]) -> str:
    """Return the names quoted, twenty at most."""
    shown = [repr(n if len(n) <= 40 else n[:39] + "…") for n in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z])", " ", name)).casefold()
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def by_name(names: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the first name that is a known word, else the first that contains one (`customer_message`)."""
    words = {name: _words(name) for name in names}
    for word in known:
        for name in names:
            if words[name] == [word]:
                return name
    for word in known:
        for name in names:
            if word in words[name] and not {"id", "date", "length", "len", "count", "lang", "langue"} & set(
                words[name]
            ):
                return name
    return None


def profile(values: Sequence[object]) -> Profile:
    """Look at the first values of one column."""
    texts = [str(v).strip() for v in values if v is not None and str(v).strip()]
    mean = sum(map(len, texts)) / len(texts) if texts else 0.0
    numeric = all(re.fullmatch(r"[-+]?[\d\s.,:/T-]+Z?", t) for t in texts)
    return Profile(len(texts), len(set(texts)), mean, numeric)


def _text_by_content(names: Sequence[str], profiles: Mapping[str, Profile]) -> str | None:
    """Return the column of mostly distinct, clearly longest text; the only column whatever it holds."""
    if len(names) == 1 and len(profiles) == 1:
        return names[0]
    fit = [n for n in names if profiles[n].filled and not profiles[n].numeric]
    fit = [n for n in fit if profiles[n].distinct > 0.5 * profiles[n].filled or profiles[n].mean_length > 40]
    fit.sort(key=lambda n: -profiles[n].mean_length)
    if not fit or (len(fit) > 1 and profiles[fit[0]].mean_length < 1.5 * profiles[fit[1]].mean_length):
        return None
    return fit[0]


def _label_by_content(names: Sequence[str], profiles: Mapping[str, Profile]) -> str | None:
    """Return the only column of short values that repeat; words are preferred to numbers."""
    fit = [n for n in names if profiles[n].distinct > 1 and profiles[n].mean_length <= 60]
    fit = [n for n in fit if profiles[n].distinct <= 0.5 * profiles[n].filled]
    worded = [n for n in fit if not profiles[n].numeric]
    fit = worded or fit
    return fit[0] if len(fit) == 1 else None
