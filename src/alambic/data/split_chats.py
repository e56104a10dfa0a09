"""Train, dev and test of conversations: grouped and locked as rows of texts are, with one dev part and no folds.

Training a model that writes takes long, so nothing is trained five times: a tenth of the rows decides, whatever their
number (20 at least where there are three times as many, 1,000 at most). Rows are alike when what they give to answer
is; the words of the task's prompt, and those that all rows share at both ends, do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alambic.data.chats import ChatDataset
from alambic.data.dataset import Dataset, Example
from alambic.data.duplicates import own_words
from alambic.data.read_chats import ReadChats, parts_of_folder, read_chats
from alambic.data.split import Held, assign
from alambic.errors import DataError
from alambic.kinds.schema import load_schema

if TYPE_CHECKING:
    from alambic.task import DataSpec, Task

_LEAST_ROWS = 10
_DEV = Held(least=20, most=1000)
_TEST = "test"


@dataclass(frozen=True)
class ChatParts:
    """The parts of the data; no row is in two.

    Attributes:
        train: rows to fit on, one for each accepted answer.
        dev: rows that decide.
        test: rows scored once, at the end.
        notes: what was guessed and set aside.
    """

    train: ChatDataset
    dev: ChatDataset
    test: ChatDataset
    notes: tuple[str, ...]


def read_parts(task: Task, *, lock: Path | None) -> ChatParts:
    """Read every data file of a task that writes, and split its rows.

    Args:
        task: `data.train` is a file, or a folder of train, valid and test files.
        lock: file that keeps the assignment; None keeps nothing.

    Raises:
        DataError: a file or its content cannot be used, or there are too few rows.
        TaskError: the schema of an `extract` task cannot be used.
    """
    schema = None if task.answer.json_schema is None else load_schema(task.path_of(task.answer.json_schema))
    named: dict[str, Path] = {}
    first = task.path_of(task.data.train)
    if first.is_dir():
        named = parts_of_folder(first)
    else:
        named["train"] = first
    for part, name in (("dev", task.data.dev), ("test", task.data.test)):
        if name is not None:
            named[part] = task.path_of(name)
    read = {"train": read_chats(named["train"], task.data, schema=schema)}
    spec = _settled(task.data, read["train"])
    read |= {part: read_chats(path, spec, schema=schema) for part, path in named.items() if part != "train"}
    notes = list(dict.fromkeys(note for one in read.values() for note in one.notes))
    rows = {part: one.dataset for part, one in read.items()}
    split = split_chats(
        rows["train"], rows.get("dev"), rows.get("test"), seed=task.seed, lock=lock, test_share=task.data.test_share
    )
    return ChatParts(split.train.each_answer(), split.dev, split.test, (*notes, *split.notes))


def _settled(spec: DataSpec, train: ReadChats) -> DataSpec:
    """Return the spec with the columns that were guessed for train: dev and test must not be guessed otherwise."""
    if train.form != "columns" or spec.prompt is not None:
        return spec
    text, output, *_ = train.columns
    return spec.model_copy(update={"text": text, "output": output})


def split_chats(
    rows: ChatDataset,
    dev: ChatDataset | None,
    test: ChatDataset | None,
    *,
    seed: int,
    lock: Path | None,
    test_share: float,
) -> ChatParts:
    """Split `rows` into train, dev and test; what the user gave as dev or test is taken as it is.

    Conversations that ask nearly the same stay together, as do those of one group.

    Raises:
        DataError: there are too few rows, or the lock file is damaged.
    """
    if len(rows) < _LEAST_ROWS:
        raise DataError(f"{len(rows)} conversations are too few to split", hint=f"give at least {_LEAST_ROWS}")
    asked = [example.asked or example.answer for example in rows]
    texts = Dataset(tuple(Example(a, ("",), e.where, e.group) for a, e in zip(asked, rows, strict=True)), ("",))
    places, notes = assign(
        texts, seed=seed, lock=lock, test_share=None if test is not None else test_share,
        dev=_DEV, compared=own_words(asked),
    )  # fmt: skip
    if test is None:
        test = rows.take([i for i, place in enumerate(places) if place == _TEST])
        notes.append(f"test: {len(test):,} of {len(rows):,} rows set aside, grouped")
    rest = [i for i, place in enumerate(places) if place != _TEST]
    if dev is None:
        dev = rows.take([i for i in rest if places[i] == 0])
        rest = [i for i in rest if places[i] != 0]
        notes.append(f"dev: {len(dev):,} of {len(rows):,} rows, grouped")
    if not rest or not len(dev) or not len(test):
        raise DataError("nearly all conversations ask the same; they cannot be split", hint="give dev and test files")
    return ChatParts(rows.take(rest), dev, test, tuple(notes))
