"""What is to be annotated: texts without labels (some may have theirs already), and the names that may be given."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alambic.data.annotations import Decisions, text_id
from alambic.data.clean import clean_name, clean_text
from alambic.data.language import languages_of
from alambic.data.read import BadRow, cell_text, columns_of, iter_rows
from alambic.errors import DataError, TaskError, nearest
from alambic.task import DataSpec

MOST_LABELS = 1000
_FOREIGN = 0.2  # share of texts in a language that the known ones hardly have, from which it is said
_TOLD = 5  # names that an error lists
_LEAST_TOLD = 20  # texts whose language can be told, under which nothing is said


@dataclass(frozen=True)
class PoolText:
    """A text to annotate; `labels` is None unless the file gives them."""

    id: str
    text: str
    where: str
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Pool:
    """The texts of a file, each once, in its order."""

    texts: tuple[PoolText, ...]
    notes: tuple[str, ...]
    bad: tuple[BadRow, ...] = ()

    def __add__(self, other: Pool) -> Pool:
        """Join two files; a text in both keeps the labels that either gives."""
        merged = {one.id: one for one in self.texts}
        for one in other.texts:
            known = merged.get(one.id)
            if known is None or (known.labels is None and one.labels is not None):
                merged[one.id] = one
        return Pool(tuple(merged.values()), (*self.notes, *other.notes), (*self.bad, *other.bad))


def read_pool(path: Path, spec: DataSpec, *, labels: Mapping[str, str], multi_label: bool = False) -> Pool:
    """Read the texts of the file at `path`, and the labels that some of its rows may have.

    Args:
        path: csv, tsv, jsonl, json, parquet, a text file of one text a line, or a folder of .txt files.
        spec: column names and encoding; a label column that is only guessed counts if it holds names of `labels`.
        labels: the label names, if they are known.
        multi_label: a row may have several labels: a JSON list, or names between `spec.label_separator` (``|``).

    Raises:
        DataError: the file cannot be read or has no usable text.
    """
    guess = columns_of(path, spec, need_label=False)
    column, notes = spec.label, list(guess.notes)
    if column is None:
        column = _label_column(path, spec, labels, notes)
    found: dict[str, PoolText] = {}
    bad: list[BadRow] = []
    twice = 0
    for row in iter_rows(path, spec):
        text = "" if row.error is not None else clean_text(cell_text(row.fields.get(guess.columns.text))).text
        if not text:
            bad.append(BadRow(row.where, row.error or f"the text ({guess.columns.text!r}) is empty"))
            continue
        given = _given(row.fields.get(column), spec, multi_label) if column else None
        key = text_id(text)
        twice += key in found
        if key not in found or found[key].labels is None:
            found[key] = PoolText(key, text, row.where, given)
    if not found:
        reason = f"; first: {bad[0].where}: {bad[0].reason}" if bad else ""
        raise DataError(f"{path.name}: no text to annotate{reason}")
    if twice:
        notes.append(f"{path.name}: {twice} text(s) are there more than once; each is shown once")
    if bad:
        notes.append(f"{path.name}: {len(bad)} row(s) left out; first: {bad[0].where}: {bad[0].reason}")
    return Pool(tuple(found.values()), tuple(notes), tuple(bad))


def read_labels(value: str) -> dict[str, str]:
    """Return label names with their descriptions, from ``"a, b, c"`` or a .toml file of ``name = "description"``.

    Raises:
        TaskError: a name is empty or there twice, or the file cannot be read.
    """
    if not value.lower().endswith(".toml"):
        return _checked([(name, "") for name in value.split(",")], "--labels")
    path = Path(value)
    try:
        raw = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        raise TaskError(f"{path}: no such file of labels") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(
            f"{path.name}: not valid TOML: {error}", hint='one line a label: name = "description"'
        ) from error
    table = raw.get("labels", raw)
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise TaskError(f"{path.name}: expected lines of the form", hint='name = "description" (it may be empty: "")')
    return _checked(list(table.items()), path.name)


def check_names(decisions: Decisions, labels: Mapping[str, str], journal: str) -> None:
    """Refuse to go on when decisions of the journal have names that are not labels any more.

    Raises:
        DataError: naming each, how often it was given, and what to do.
    """
    gone = {name: count for name, count in decisions.names_used().items() if name not in labels}
    if not gone:
        return
    told = [f"{name!r} ({count} texts{_meant(name, labels)})" for name, count in gone.items()]
    more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
    name = next(iter(gone))
    raise DataError(
        f"{journal}: annotated with label names that are gone: {', '.join(told[:_TOLD])}{more}",
        hint=f"--rename {json.dumps(name + '=NEW NAME', ensure_ascii=False)} gives them a new name; "
        f"--rename {json.dumps(name + '=', ensure_ascii=False)} asks for these texts again",
    )


def _meant(name: str, labels: Mapping[str, str]) -> str:
    said = nearest(name, labels)
    return f"; {said[: said.index('?') + 1]}" if said.startswith("did you mean") else ""


def language_notes(texts: Sequence[str], known: Sequence[str], *, what: str) -> list[str]:
    """Say so when many of `texts` are in a language that `known` texts hardly have; `what` names these."""
    own, other = languages_of(texts), languages_of(known)
    if own.total() < _LEAST_TOLD or other.total() < min(_LEAST_TOLD, max(1, len(known) // 2)):
        return []
    foreign = {
        language: count
        for language, count in own.items()
        if count >= _FOREIGN * own.total() and other[language] < 0.05 * other.total()
    }
    if not foreign:
        return []
    told = ", ".join(f"{count / own.total():.0%} {language}" for language, count in Counter(foreign).most_common())
    main = other.most_common(1)[0][0]
    return [
        f"texts to annotate are in another language than {what}: {told} against mostly {main} "
        f"(by function words, {own.total()} texts that tell); guesses will be poor there until some are annotated"
    ]


def _label_column(path: Path, spec: DataSpec, labels: Mapping[str, str], notes: list[str]) -> str | None:
    """Return a guessed label column if what it holds are label names."""
    try:
        guess = columns_of(path, spec, need_label=True)
    except DataError:
        return None
    column = guess.columns.label
    assert column is not None
    values = Counter(clean_name(cell_text(row.fields.get(column))) for row in iter_rows(path, spec) if not row.error)
    del values[""]
    known = sum(count for name, count in values.items() if name in labels)
    if values and (not labels or known >= 0.5 * values.total()):
        notes += [note for note in guess.notes if note.startswith("label")]
        return column
    if values:
        notes.append(f"column {column!r} is not read as labels: it holds {', '.join(map(repr, list(values)[:3]))} ...")
    return None


def _given(value: object, spec: DataSpec, multi_label: bool) -> tuple[str, ...] | None:
    """Return the labels in a cell, None when it is empty."""
    if not multi_label:
        name = clean_name(cell_text(value))
        return (name,) if name else None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    parts = value if isinstance(value, list) else cell_text(value).split(spec.label_separator or "|")
    names = tuple(sorted({name for part in parts if (name := clean_name(cell_text(part)))}))
    return names or (() if isinstance(value, list) else None)


def _checked(pairs: Sequence[tuple[str, str]], where: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for raw, description in pairs:
        name = clean_name(raw)
        if not name:
            raise TaskError(f"{where}: a label name is empty", hint='--labels "first, second, third"')
        if name in labels:
            raise TaskError(f"{where}: the label {name!r} is there twice")
        labels[name] = clean_text(description).text
    if len(labels) > MOST_LABELS:
        raise TaskError(f"{where}: {len(labels)} labels; at most {MOST_LABELS} can be chosen from")
    return labels
