"""Read conversations from JSON Lines, JSON, CSV, TSV, Parquet and folders of train, valid and test files.

Rows that a model must not learn (no answer, roles out of order, calls that do not parse) refuse the file: up to 20 are
named as ``file:line``, with what to do. What is left out, changed or guessed is said in the notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.data.chat_formats import Form, Wanted, find_form
from alambic.data.chat_rows import Parsed
from alambic.data.chats import ChatDataset, ChatExample
from alambic.data.clean import clean_exact, clean_name
from alambic.data.columns import named
from alambic.data.read import cell_text
from alambic.data.rows import Row, Source, open_source
from alambic.errors import DataError
from alambic.kinds.chat import Chat, Message, order_fault

if TYPE_CHECKING:
    from alambic.task import DataSpec

_SAMPLE_ROWS = 500
_SHOWN = 20
_KEYS_SHOWN = 8
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PARTS = {"train": ("train",), "dev": ("valid", "validation", "val", "dev"), "test": ("test",)}
# What marks the end of an answer in other tools' files; ours comes from the template.
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<eos>")


@dataclass(frozen=True)
class ReadChats:
    """A ChatDataset and how it was read."""

    dataset: ChatDataset
    notes: tuple[str, ...]
    form: str
    columns: tuple[str, ...]


@dataclass
class Tidied:
    """Puts texts in order, and counts what had to be changed."""

    removed: int = 0
    ends: int = 0
    spaced: int = 0
    places: dict[str, str] = field(default_factory=dict)

    def text(self, text: str, where: str) -> str:
        """Return a text in NFC without control characters; spaces, indentation and line breaks stay."""
        cleaned = clean_exact(text)
        if cleaned.removed:
            self.removed += cleaned.removed
            self.places.setdefault("removed", where)
        return cleaned.text

    def chat(self, chat: Chat, where: str) -> Chat:
        """Return a conversation whose texts, arguments of calls included, are in order."""
        messages = [self.message(message, where) for message in chat.messages]
        if messages and messages[-1].role == "assistant":
            messages[-1] = replace(messages[-1], content=self.answer(messages[-1].content, where))
        return Chat(tuple(messages), chat.tools)

    def message(self, message: Message, where: str) -> Message:
        """Return one message in order."""
        calls = tuple(replace(call, arguments=self._value(call.arguments, where)) for call in message.tool_calls)
        return replace(message, content=self.text(message.content, where), tool_calls=calls)

    def answer(self, text: str, where: str) -> str:
        """Return an answer without the mark of its end that some tools write."""
        end = next((mark for mark in _ENDS if text.rstrip().endswith(mark)), None)
        if end is not None:
            self.ends += 1
            self.places.setdefault("ends", where)
            text = text.rstrip().removesuffix(end)
        if text != text.strip() and text.strip():
            self.spaced += 1
            self.places.setdefault("spaced", where)
        return text

    def _value(self, value: Any, where: str) -> Any:
        if isinstance(value, str):
            return self.text(value, where)
        if isinstance(value, Mapping):
            return {key: self._value(inner, where) for key, inner in value.items()}
        return [self._value(inner, where) for inner in value] if isinstance(value, list) else value

    def notes(self) -> list[str]:
        """Say what was changed, and what is learnt as it stands."""
        said = (
            ("removed", self.removed, "control characters removed"),
            ("ends", self.ends, "answers ended with a mark such as <|endoftext|>, which was removed"),
            ("spaced", self.spaced, "answers begin or end with white space, which is learnt as it stands"),
        )
        return [f"{count:,} {what}; first: {self.places[key]}" for key, count, what in said if count]


def parts_of_folder(folder: Path) -> dict[str, Path]:
    """Return the train, dev and test files of a folder (mlx-lm's names: train, valid, test.jsonl).

    Raises:
        DataError: it has no train file, or two files for one part.
    """
    found: dict[str, Path] = {}
    for part, stems in _PARTS.items():
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES]
        files = [path for path in files if path.is_file()]
        if len(files) > 1:
            names = " and ".join(path.name for path in files)
            raise DataError(f"{folder}: both {names} could be the {part} part", hint=f"name one as data.{part}")
        if files:
            found[part] = files[0]
    if "train" not in found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{folder}: no train.jsonl in this folder (it has {there})", hint="name a file, or put train.jsonl there"
        )
    return found


def read_chats(
    path: Path,
    spec: DataSpec,
    *,
    system: str | None = None,
    prompt: str | None = None,
    schema: Mapping[str, Any] | None = None,
) -> ReadChats:
    """Read conversations that end with an answer.

    Args:
        path: a file; of a folder, its train file.
        spec: the task's `[data]`: columns, prompt, system message, encoding; what is None is found out.
        system: system message of every conversation that brings none, instead of the task's.
        prompt: how the user message is written, instead of the task's; ``{column}`` stands for a column.
        schema: JSON Schema of the answers (`extract`): each is checked, and written in the schema's order.

    Raises:
        DataError: the file cannot be used, or rows are wrong; up to 20 of them are named as ``file:line``.
    """
    path = parts_of_folder(path)["train"] if path.is_dir() else path
    source = open_source(path, spec)
    form, group = _form(source, spec, prompt if prompt is not None else spec.prompt, schema)
    system = system if system is not None else spec.system
    tidied, unread, unheard = Tidied(), Counter[str](), Counter[str]()
    examples: list[ChatExample] = []
    faults: list[DataError] = []
    used = {*form.used, *((group,) if group else ())}
    for row in source.rows():
        try:
            if row.error is not None:
                raise DataError(f"{row.where}: {row.error}")
            parsed = form.read(row.fields, row.where)
            examples.append(_example(parsed, row, group=group, system=system, tidied=tidied))
        except DataError as error:
            faults.append(error)
            continue
        unread.update(key for key, value in row.fields.items() if key not in used and value not in (None, ""))
        unheard.update(parsed.ignored)
    if faults:
        raise refusal(path, faults, rows=len(examples) + len(faults))
    if not examples:
        raise DataError(f"{path}: the file has no rows", hint="it needs at least one conversation with an answer")
    several = sum(bool(example.others) for example in examples)
    notes = [f"read as {form.name} ({', '.join(form.used)})", *form.notes, *tidied.notes()]
    if several:
        notes.append(f"{several:,} rows have several accepted answers: each is learnt, any is right")
    notes += [*_unread("keys not read", unread), *_unread("keys of messages not read", unheard)]
    said = [f"{path.name}: {note}" for note in notes]
    return ReadChats(ChatDataset(tuple(examples)), (*source.notes, *said), form.name, form.used)


def _form(
    source: Source, spec: DataSpec, prompt: str | None, schema: Mapping[str, Any] | None
) -> tuple[Form, str | None]:
    """Return the form of a file and its column of groups."""
    sample = [row.fields for row in islice((r for r in source.rows() if r.error is None), _SAMPLE_ROWS)]
    names = source.columns or list(dict.fromkeys(name for fields in sample for name in fields))
    where = source.path.name
    if not names:
        first = next((row for row in source.rows() if row.error is not None), None)
        reason = f"; first: {first.where}: {first.error}" if first else ""
        raise DataError(f"{source.path}: no usable row{reason}")
    group = named(spec.group, "group", names, where)
    wanted = Wanted(text=spec.text, output=spec.output, prompt=prompt, schema=schema)
    form = find_form([name for name in names if name != group], sample, wanted, where=where)
    return form, group


def _example(parsed: Parsed, row: Row, *, group: str | None, system: str | None, tidied: Tidied) -> ChatExample:
    chat = parsed.chat
    if system and chat.messages[0].role != "system":
        chat = Chat((Message("system", system), *chat.messages), chat.tools)
    chat = tidied.chat(chat, row.where)
    check_order(chat, row.where)
    given = None if parsed.given is None else clean_exact(parsed.given).text
    others = tuple(tidied.answer(tidied.text(other, row.where), row.where) for other in parsed.others)
    name = clean_name(cell_text(row.fields.get(group))) if group else ""
    return ChatExample(chat, row.where, name or None, given, others)


def check_order(chat: Chat, where: str) -> None:
    """Refuse a conversation that a model cannot learn from.

    Raises:
        DataError: it has no answer, or roles are out of order; says what to do.
    """
    answer = chat.completion
    if answer is None:
        said = f"the last message is not the assistant's but a {chat.messages[-1].role}'s"
        raise DataError(f"{where}: {said}: there is no answer to learn", hint="end it with an answer, or remove it")
    if not answer.content.strip() and not answer.tool_calls:
        raise DataError(f"{where}: the answer is empty", hint="every row needs an answer to learn")
    fault = order_fault(chat)
    if fault is not None:
        hint = "a system message first, then user and assistant in turns; a tool answers a call"
        raise DataError(f"{where}: roles out of order: {fault}", hint=hint)
    for i, message in enumerate(chat.messages):
        if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls:
            raise DataError(f"{where}: messages[{i}]: the {message.role} says nothing", hint="remove the row")


def _unread(what: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    names = sorted(counts, key=lambda name: (-counts[name], name))
    more = f" and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
    return [f"{what}: " + ", ".join(f"{name} ({counts[name]:,})" for name in names[:_KEYS_SHOWN]) + more]


def refusal(path: Path, faults: Sequence[DataError], *, rows: int) -> DataError:
    """Return the one error that names the first 20 faults of a file."""
    lines = [fault.message for fault in faults[:_SHOWN]]
    if len(faults) > _SHOWN:
        lines.append(f"... and {len(faults) - _SHOWN:,} more")
    lines.append(f"{path.name}: {len(faults):,} of {rows:,} rows cannot be used")
    hints = list(dict.fromkeys(fault.hint for fault in faults if fault.hint))
    hint = hints[0] if len(hints) == 1 else "correct or remove these rows: a model would learn what they say"
    return DataError("\n".join(lines), hint=hint)
