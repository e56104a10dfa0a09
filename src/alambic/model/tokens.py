"""How many tokens a model that writes reads and writes in conversations, told without loading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alambic import render
from alambic.kinds.chat import Chat
from alambic.model.bases import read_json
from alambic.model.seq2seq import FAMILIES, load_tokenizer
from alambic.render import PLAIN_TEMPLATE, ChatTemplate


@dataclass(frozen=True)
class ChatCounter:
    """Counts the tokens of conversations.

    Attributes:
        tokenizer: of the model.
        template: None for an encoder-decoder, which reads the text alone.
        context_tokens: most tokens of prompt and answer together (encoder-decoders: of each).
    """

    tokenizer: Any
    template: ChatTemplate | None
    context_tokens: int

    @classmethod
    def load(cls, folder: Path) -> ChatCounter:
        """Read the tokenizer and the template of the model in `folder`.

        Raises:
            BaseModelError: a file is missing or damaged.
            TemplateError: the template does not parse.
        """
        config = read_json(folder / "config.json")
        config = {**config, **(config.get("text_config") or {})}
        stated = read_json(folder / "alambic.json") if (folder / "alambic.json").is_file() else {}
        positions = config.get("max_position_embeddings") or config.get("n_positions") or 2048
        template = None
        if config.get("model_type") not in FAMILIES:
            special = render.special_tokens(folder)
            template = render.read_template(folder) or render.checked(ChatTemplate(PLAIN_TEMPLATE, special))
        return cls(load_tokenizer(folder)[0], template, int(stated.get("context_tokens", positions)))

    def counts(self, chats: Sequence[Chat]) -> list[tuple[int, int]]:
        """Return the tokens of prompt and of last answer of each conversation (end tokens included).

        Raises:
            TemplateError: the template refuses a conversation.
        """
        return [self._count(chat) for chat in chats]

    def _count(self, chat: Chat) -> tuple[int, int]:
        if self.template is None:
            said = "\n\n".join(message.content for message in chat.prompt.messages)
            answer = chat.completion.content if chat.completion else ""
            return self._length(said) + 1, self._length(answer) + 1
        prompt = self._length(self.template.render(chat.prompt, reply=True))
        return prompt, max(0, self._length(self.template.render(chat)) - prompt)

    def _length(self, text: str) -> int:
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return len(getattr(encoded, "ids", encoded))
