"""Conversations as rows: ChatExample and ChatDataset, what every reader of the writing kinds returns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from alambic.kinds.chat import Chat


@dataclass(frozen=True)
class ChatExample:
    """One conversation that ends with the expected answer.

    Attributes:
        chat: normalised; its last message is the assistant's.
        where: ``file:line`` of origin, for messages.
        group: rows of one group never fall on both sides of a split.
        given: what the row gives to answer, without the words of the task's prompt around it; None: what the chat
            says. Near duplicates and the lock of the split go by it, so that another wording of the prompt moves
            nothing.
        others: further answers that are as good; learnt from by `each_answer`, accepted when scored.
    """

    chat: Chat
    where: str = ""
    group: str | None = None
    given: str | None = None
    others: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of messages, tools and accepted answers; origin and group do not count."""
        body = json.dumps(self.chat.to_dict(), ensure_ascii=False, sort_keys=True)
        body += "".join(f"\x1f{other}" for other in self.others)
        return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def asked(self) -> str:
        """What is asked, as one text: all messages but the answer, the system's left out."""
        if self.given is not None:
            return self.given
        return "\n".join(m.content for m in self.chat.prompt.messages if m.role != "system")

    @property
    def answer(self) -> str:
        """The expected answer as text; tool calls as JSON after it."""
        message = self.chat.completion
        if message is None:
            return ""
        calls = "".join(json.dumps(call.to_dict(), ensure_ascii=False) for call in message.tool_calls)
        return message.content + calls


@dataclass(frozen=True)
class ChatDataset:
    """Examples in order."""

    examples: tuple[ChatExample, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[ChatExample]:
        return iter(self.examples)

    @property
    def chats(self) -> list[Chat]:
        """The conversations, in order."""
        return [example.chat for example in self.examples]

    @property
    def prompts(self) -> list[Chat]:
        """The conversations up to their answers."""
        return [example.chat.prompt for example in self.examples]

    @property
    def references(self) -> list[list[str]]:
        """The texts accepted as answer of each row, the one to learn first."""
        return [[e.chat.completion.content if e.chat.completion else "", *e.others] for e in self.examples]

    @property
    def where(self) -> list[str]:
        """Where each row comes from."""
        return [example.where for example in self.examples]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the examples in order."""
        whole = hashlib.sha256()
        for example in self.examples:
            whole.update(example.digest.encode())
        return whole.hexdigest()

    def take(self, indices: Sequence[int]) -> ChatDataset:
        """Return the examples at `indices`."""
        return ChatDataset(tuple(self.examples[i] for i in indices))

    def each_answer(self) -> ChatDataset:
        """Return one row for each accepted answer: what is learnt from."""
        rows: list[ChatExample] = []
        for example in self.examples:
            rows.append(replace(example, others=()))
            for other in example.others:
                last = replace(example.chat.messages[-1], content=other)
                chat = Chat((*example.chat.messages[:-1], last), example.chat.tools)
                rows.append(replace(example, chat=chat, others=()))
        return ChatDataset(tuple(rows))

    def __add__(self, other: ChatDataset) -> ChatDataset:
        return ChatDataset(self.examples + other.examples)
