"""Rows of conversations, written and read."""

import json
import random

import pytest

from alambic.data.chats import ChatDataset, ChatExample
from alambic.data.pairs import read_pairs
from alambic.data.read_chats import read_chats
from alambic.errors import DataError
from alambic.kinds.chat import Chat
from alambic.task import DataSpec

WORDS = [a + b for a in ("ka", "lo", "mi", "tu", "re", "po", "sa") for b in ("ban", "der", "gol", "fis", "nut", "vem")]
CALL = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "Paris"}'}}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def jsonl(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def talk(*turns, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], **more}


def read(path, *, schema=None, system=None, prompt=None, **spec):
    return read_chats(path, DataSpec(train=str(path), **spec), schema=schema, system=system, prompt=prompt)


def said(chat):
    return [(message.role, message.content) for message in chat.messages]


def sentence(rng, words=9):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def dataset(rows, seed=0):
    rng = random.Random(seed)
    return ChatDataset(
        tuple(ChatExample(Chat.of(sentence(rng), completion=sentence(rng)), f"a.jsonl:{i + 1}") for i in range(rows))
    )


def refused(path, **spec):
    with pytest.raises(DataError) as caught:
        read(path, **spec)
    return str(caught.value)


def pairs(path, **more):
    return read_pairs(path, DataSpec(train=str(path)), **more)
