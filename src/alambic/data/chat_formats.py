"""The forms in which conversations are stored, found by their keys and by what is in the first rows.

messages    OpenAI: a list of role and content (and `tools`); tool calls as objects or JSON text
sharegpt    the same with `from` and `value`; `system`, `tools`
alpaca      `instruction`, `input`, `output`; `system`, `history`; Dolly's `context`, `response`
completion  `prompt` and `completion`: texts, or lists of messages (TRL)
columns     two columns of any table, named by the task or guessed; the prompt may be written from several
tags, spans, slots, fields   `extract` only: marked texts, or one column for each property of the schema
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alambic.data import chat_rows
from alambic.data.chat_answers import Answers, written
from alambic.data.chat_columns import Guess, guess
from alambic.data.chat_marks import marked_form
from alambic.data.chat_rows import Fields, Read
from alambic.data.columns import listing, named
from alambic.errors import DataError

_TALKS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_ANSWERS = ("expected", "answer", "response", "completion", "output")
_ALPACA = {
    "input": ("input", "context"),
    "output": ("output", "response"),
    "system": ("system",),
    "history": ("history",),
}
_FIELD = re.compile(r"\{([^{}\n]+)\}")


@dataclass(frozen=True)
class Form:
    """How the rows of a file become conversations.

    Attributes:
        name: of the form.
        read: fields and ``file:line`` to what they say.
        used: columns that are read.
        notes: what was guessed.
    """

    name: str
    read: Read
    used: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the task says of its rows; what is None is found out.

    Attributes:
        text: column of what is asked.
        output: column of the answer.
        prompt: how the user message is written from columns.
        schema: of the answers (`extract`).
    """

    text: str | None = None
    output: str | None = None
    prompt: str | None = None
    schema: Mapping[str, Any] | None = None

    @property
    def nothing(self) -> bool:
        """Whether no column is named in any way."""
        return self.text is None and self.output is None and self.prompt is None


def find_form(names: Sequence[str], sample: Sequence[Fields], wanted: Wanted, *, where: str) -> Form:
    """Tell the form of a file from its columns and its first rows.

    Args:
        names: columns or keys of its rows.
        sample: its first rows.
        wanted: what the task says.
        where: the file, for messages.

    Raises:
        DataError: a column that the task names is not there, or the form cannot be told.
    """
    text, output = named(wanted.text, "text", names, where), named(wanted.output, "output", names, where)
    wanted, answers = replace(wanted, text=text, output=output), Answers(wanted.schema)
    prompt = wanted.prompt
    marked = marked_form(names, sample, text=text, output=output, schema=wanted.schema)
    if marked is not None:
        fill = _fill(prompt, marked.source, names, where)
        return Form(marked.name, marked.reader(fill, answers), marked.used, tuple(_left(prompt, names, where)))
    talk = _talk(names, sample, text)
    if talk is not None and prompt is not None and text is None:
        raise DataError(
            f"{where}: data.prompt is for columns, and the rows are whole conversations",
            hint="remove data.prompt, or name the columns to write from in data.text and data.output",
        )
    if talk is not None and prompt is None and not {"prompt", "completion"} <= set(names):
        return _conversations(talk, names, sample, output, answers)
    if {"chosen", "rejected"} <= set(names) and output is None:
        raise DataError(
            f"{where}: pairs of a chosen and a rejected answer, not answers to learn",
            hint='write output = "chosen" under [data] to learn the chosen ones alone; to learn from both, name the '
            "file under [preferences]",
        )
    if wanted.nothing and "instruction" in names:
        columns = {part: next((n for n in known if n in names), None) for part, known in _ALPACA.items()}
        if columns["output"] is not None:
            found = {"instruction": "instruction", **{part: name for part, name in columns.items() if name is not None}}
            return Form("alpaca", chat_rows.alpaca(found, answers), tuple(found.values()))
    return _columns(names, sample, wanted, answers, where=where)


def _conversations(
    talk: str, names: Sequence[str], sample: Sequence[Fields], output: str | None, answers: Answers
) -> Form:
    """Whole conversations in one column; where they end with a question, another column has the answer."""
    answer = output or next((name for name in _ANSWERS if name in names and name != talk), None)
    used = [name for name in (talk, "system", "tools") if name in names]
    if answer is not None and _lacks_answer(sample, talk):
        used.append(answer)
    kind = "sharegpt" if _is_sharegpt(sample, talk) else "messages"
    return Form(kind, chat_rows.conversation(talk, answer, answers), tuple(used))


def _columns(names: Sequence[str], sample: Sequence[Fields], wanted: Wanted, answers: Answers, *, where: str) -> Form:
    prompt, text = wanted.prompt, wanted.text
    asked = [] if prompt is None else [name for name in dict.fromkeys(_FIELD.findall(prompt)) if name in names]
    if prompt is not None and not asked and "{text}" not in prompt:
        hint = f"write {{column}}; the columns are {listing(names)}"
        raise DataError(f"{where}: data.prompt names no column in braces", hint=hint)
    # A prompt that names its columns needs no other; {text} stands for the input column whatever its name.
    whole = bool(asked) and ("{text}" not in (prompt or "") or "text" in asked)
    if wanted.nothing and {"prompt", "completion"} <= set(names):
        found, name = Guess("prompt", "completion", ()), "completion"
    else:
        text = asked[0] if whole and text is None else text
        found = guess(names, sample, where=where, text=text, output=wanted.output, apart=asked)
        name = "columns"
    fill = _fill(prompt, found.text, names, where)
    used = tuple(dict.fromkeys((*(asked if whole else [*asked, found.text]), found.output)))
    tools = ("tools",) if "tools" in names else ()
    notes = (*found.notes, *_left(prompt, names, where), *_layered(used[:-1], sample))
    return Form(name, chat_rows.columns(found.text, found.output, fill, answers), (*used, *tools), notes)


def _fill(prompt: str | None, source: str, names: Sequence[str], where: str) -> Callable[[Fields], tuple[str, str]]:
    """Return what writes the user message of a row, and what of it comes from the row."""
    if prompt is None:
        return lambda fields: (written(fields.get(source)),) * 2
    known = {name: name for name in names}
    known.setdefault("text", source)
    asked = [known[name] for name in dict.fromkeys(_FIELD.findall(prompt)) if name in known]
    if not asked:
        raise DataError(f"{where}: data.prompt names no column in braces", hint="write {text} where the text goes")

    def fill(fields: Fields) -> tuple[str, str]:
        message = _FIELD.sub(lambda m: written(fields.get(known[m[1]])) if m[1] in known else m[0], prompt)
        return message, "\n".join(written(fields.get(name)) for name in dict.fromkeys(asked))

    return fill


def _left(prompt: str | None, names: Sequence[str], where: str) -> list[str]:
    """Say which braces of the prompt name no column: on purpose, or by a slip of the pen."""
    left = [n for n in dict.fromkeys(_FIELD.findall(prompt or "")) if n not in names and n != "text"]
    words = [name for name in left if re.fullmatch(r"[\w .-]+", name)]
    return [f"data.prompt: no column {', '.join(map(repr, words))}: left as it stands"] if words else []


def _layered(names: Sequence[str], sample: Sequence[Fields]) -> list[str]:
    """Say which columns of what is asked hold more than texts."""
    return [
        f"{name!r} holds lists or objects, which are written as JSON"
        for name in names
        if any(isinstance(row.get(name), list | dict) and not chat_rows.is_talk(row[name]) for row in sample)
    ]


def _talk(names: Sequence[str], sample: Sequence[Fields], text: str | None) -> str | None:
    """Return the column that holds whole conversations."""
    candidates = [text] if text is not None else [n for n in _TALKS if n in names]
    others = [] if text is not None else [n for n in names if n not in (*_TALKS, "prompt", "completion", "history",
                                                                          "chosen", "rejected", "tools")]  # fmt: skip
    for name in (*candidates, *others):
        cells = [row[name] for row in sample if row.get(name) is not None]
        if name == "messages" or (cells and sum(map(chat_rows.is_talk, cells)) * 2 > len(cells)):
            return name
    return None


def _is_sharegpt(sample: Sequence[Fields], column: str) -> bool:
    talks = [chat_rows.decoded(row[column]) for row in sample if chat_rows.is_talk(row.get(column))]
    return bool(talks) and all("from" in talk[0] for talk in talks)


def _lacks_answer(sample: Sequence[Fields], column: str) -> bool:
    talks = [chat_rows.decoded(row[column]) for row in sample if chat_rows.is_talk(row.get(column))]
    return any(talk[-1].get("role", talk[-1].get("from")) not in ("assistant", "gpt", "model", "bot") for talk in talks)
