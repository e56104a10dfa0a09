"""The only renderer of chats: training, packing, engines and server all make their prompts here.

A template is a stranger's program: it runs in Jinja2's immutable sandbox, without clock, files or network. What a
template prints for a day (`strftime_now`) is fixed once (`pinned`), otherwise a model would be trained on one prompt
and asked with another the next morning. Filters and options are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic._extras import load
from alambic.errors import TemplateError

if TYPE_CHECKING:
    from alambic.kinds.chat import Chat

# For bases that bring no template. It uses no special token but the base's own, so any tokenizer reads it.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### User:\n{{ message.content }}\n\n"
    "{% elif message.role == 'tool' %}### Tool:\n{{ message.content }}\n\n"
    "{% else %}### Assistant:\n{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
PINNED_DAY = date(2024, 7, 26)  # what Llama 3.2's own template says when it has no clock
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_MAX_CHARACTERS = 20_000_000  # of one rendered chat: a template that loops must not fill the memory


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it names.

    Attributes:
        source: Jinja2 text.
        special: `bos_token`, `eos_token` and others, as texts; absent ones are empty.
        ends: texts of the tokens that end an assistant's turn.
    """

    source: str
    special: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except load("jinja2").TemplateSyntaxError as error:
            raise TemplateError(
                f"chat template, line {error.lineno}: {error.message}",
                hint="correct chat_template.jinja (or chat_template in tokenizer_config.json) of the base",
            ) from error

    def render(self, chat: Chat, *, reply: bool = False) -> str:
        """Return the text of `chat`; with `reply`, up to where the assistant begins to speak.

        Raises:
            TemplateError: the template does not parse, refuses the conversation, or fails on it.
        """
        data = chat.to_dict()
        names = {"bos_token": "", "eos_token": "", **self.special}
        jinja = load("jinja2")
        try:
            pieces, size = [], 0
            for piece in self._compiled.generate(
                messages=data["messages"], tools=data.get("tools"), add_generation_prompt=reply, **names
            ):
                size += len(piece)
                if size > _MAX_CHARACTERS:
                    raise TemplateError(f"chat template: more than {_MAX_CHARACTERS:,} characters for one conversation")
                pieces.append(piece)
        except jinja.TemplateError as error:
            raise TemplateError(f"chat template: {error.message or type(error).__name__}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise TemplateError(f"chat template: {type(error).__name__}: {error}") from error
        return "".join(pieces)

    def spans(self, chat: Chat) -> list[tuple[int, int]]:
        """Return what the assistant says in `render(chat)`, as [start, stop) in characters, end token included.

        Each turn is found by rendering the chat up to it with and without it, so any template works whose text grows by
        each message.

        Raises:
            TemplateError: the template writes earlier turns in another way once later ones follow.
        """
        from alambic.kinds.chat import Chat as _Chat

        whole = self.render(chat)
        found = []
        for i, message in enumerate(chat.messages):
            if message.role != "assistant":
                continue
            before = self.render(_Chat(chat.messages[:i], chat.tools), reply=True)
            until = self.render(_Chat(chat.messages[: i + 1], chat.tools))
            common = _common(until, whole)
            if not whole.startswith(before) or common < len(before):
                raise TemplateError(
                    f"chat template: the prompt before message {i} is not how the whole conversation begins",
                    hint="the model would be trained on other prompts than it is asked; use a template that only adds",
                )
            found.append((len(before), self._end(whole, len(before), common)))
        return found

    def _end(self, text: str, start: int, stop: int) -> int:
        """Cut `text[start:stop]` after its last end token: what follows it is the template's, not the assistant's."""
        ends = [text.rfind(end, start, stop) + len(end) for end in self.ends if end in text[start:stop]]
        return max(ends, default=stop)


def read_template(folder: Path) -> ChatTemplate | None:
    """Return the template of the model in `folder` (`chat_template.jinja`, or in `tokenizer_config.json`).

    Raises:
        TemplateError: it cannot be read, or does not parse.
    """
    config = _json(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    if path.is_file():
        source: object = path.read_text("utf-8")
    else:
        source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default") or named.get("tool_use")
    if not isinstance(source, str) or not source.strip():
        return None
    return checked(ChatTemplate(pinned(source), special_tokens(folder)))


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of `bos_token`, `eos_token`, `pad_token` and `unk_token` of the tokenizer in `folder`."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = _json(folder / name)
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def checked(template: ChatTemplate) -> ChatTemplate:
    """Return `template` once it parses.

    Raises:
        TemplateError: with the line of the fault.
    """
    _ = template._compiled
    return template


def pinned(source: str, day: date = PINNED_DAY) -> str:
    """Replace calls of the clock by the text that they give on `day`, so that every renderer writes the same."""
    return _CLOCK.sub(lambda match: json.dumps(day.strftime(match[2])), source)


def _environment() -> Any:
    sandbox = load("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment


def _generation_tag() -> Any:
    """Let `{% generation %}` (transformers' mark of what the assistant says) print its body."""
    extension = load("jinja2.ext").Extension

    class _Generation(extension):  # type: ignore[misc, valid-type]
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return _Generation


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise load("jinja2").TemplateError(message)


def _common(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TemplateError(f"{path}: cannot be read as JSON ({error})") from error
    return value if isinstance(value, dict) else {}


Tokenize = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]


def labelled(template: ChatTemplate, chat: Chat, tokenize: Tokenize) -> tuple[list[int], list[bool]]:
    """Return the ids of `chat` and which of them the assistant says (those are learnt).

    Args:
        template: how it is written.
        chat: with its answers.
        tokenize: gives ids and their [start, stop) in the text, without adding special tokens.

    Raises:
        TemplateError: see `ChatTemplate.spans`.
    """
    ids, offsets = tokenize(template.render(chat))
    spans = template.spans(chat)
    learnt = [any(start < stop_ and stop > start_ for start_, stop_ in spans) for start, stop in offsets]
    return list(ids), learnt
