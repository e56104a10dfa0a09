"""The check of the conversations of a build, against what the model to start from reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alambic.build.writing.context import WritingContext
from alambic.build.writing.ladder import start_of
from alambic.build.writing.prepare import find_base, read_schema
from alambic.data.chat_check import ChatAudit, check_chats
from alambic.data.pair_check import PairAudit, check_pairs
from alambic.data.split_chats import read_parts
from alambic.data.split_pairs import read_pair_parts
from alambic.events import Note, Work
from alambic.kinds.chat import Chat
from alambic.task import Task
from alambic.workspace import StageSpec


def check_writer(task: Task) -> Work[tuple[ChatAudit, PairAudit | None]]:
    """Validate a task that writes, read its rows without writing anything, and audit them and its preferences.

    Lengths are in words when the model is made from scratch: its tokenizer does not exist yet.

    Raises:
        TaskError, DataError, BaseModelError: each says what and where.
    """
    base = find_base(task)
    read_schema(task)
    parts = read_parts(task, lock=None)
    pairs = read_pair_parts(task, parts, lock=None)
    for note in (*parts.notes, *(pairs.notes if pairs is not None else ())):
        yield Note(note)
    named = {"train": parts.train, "dev": parts.dev, "test": parts.test}
    folder = None if base is None else base.folder
    count = None if folder is None else lambda chats: token_counts(folder, chats)
    limit = None if folder is None else context_of(folder)
    preferences = None if pairs is None else check_pairs(pairs, count_tokens=count, limit=limit)
    return check_chats(named, count_tokens=count, limit=limit), preferences


def audit_stage(ctx: WritingContext) -> Work[dict[str, Any]]:
    """Check the rows once, as a stage; lengths are told in tokens when a model is started from."""
    needed = any(c.name not in ("nearest", "tagger") for c in ctx.task.candidates)
    folder, digest = (yield from start_of(ctx)) if needed else (None, "none")
    inputs = {"train": ctx.train.digest, "dev": ctx.dev.digest, "test": ctx.test.digest, "base": digest}
    pairs = ctx.pairs
    if pairs is not None:
        inputs["pairs"] = (pairs.train + pairs.dev).digest

    def work(_: Path) -> Work[dict[str, Any]]:
        yield from ()
        count = None if folder is None else lambda chats: token_counts(folder, chats)
        limit = None if folder is None else context_of(folder)
        parts = {"train": ctx.train, "dev": ctx.dev, "test": ctx.test}
        found = check_chats(parts, count_tokens=count, limit=limit).to_dict()
        if pairs is not None:
            found["preferences"] = check_pairs(pairs, count_tokens=count, limit=limit).to_dict()
        return found

    stage = yield from ctx.workspace.run(StageSpec("audit", {}, inputs), work)
    return stage.result


def token_counts(folder: Path, chats: Sequence[Chat]) -> list[tuple[int, int]]:
    """Return the tokens of prompt and answer of each conversation, as the model in `folder` reads them."""
    from alambic.model.tokens import ChatCounter

    return ChatCounter.load(folder).counts(chats)


def context_of(folder: Path) -> int:
    """Return the most tokens that the model in `folder` reads and writes together."""
    from alambic.model.tokens import ChatCounter

    return ChatCounter.load(folder).context_tokens
