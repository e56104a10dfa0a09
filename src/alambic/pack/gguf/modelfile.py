"""Ollama's Modelfile beside a GGUF file: where the model is, how chats are written, when an answer ends.

Ollama writes chats by a Go template. It is made here from what the Jinja template prints: conversations of marks are
rendered, what stands between the marks becomes the Go template, and it is kept only if it then gives the same text on
every golden conversation without tools. A template that does more than putting text around messages has no such form,
and the Modelfile says so instead of guessing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from alambic.errors import TemplateError
from alambic.kinds.chat import Chat, Message, order_fault
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.render import ChatTemplate

_SYSTEM, _ASKED, _SAID, _NEXT = "\u2460system\u2460", "\u2461asked\u2461", "\u2462said\u2462", "\u2463next\u2463"


@dataclass(frozen=True)
class Parts:
    """What a template puts around messages.

    Attributes:
        head: before the first user message, when there is no system message.
        asked: between a user message and the assistant's.
        again: between the assistant's message and the next of the user.
        tail: after the last user message: the assistant begins to speak.
        before_system: text before the system message, instead of `head` or (`system_last`) after it; None: the
            template takes none.
        after_system: text between the system message and the user's that follows.
        system_last: the system message stands in the last turn of the user, not in the first.
    """

    head: str
    asked: str
    again: str
    tail: str
    before_system: str | None
    after_system: str = ""
    system_last: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """Do what `go` does, for the proof."""
        system = next((m.content for m in messages if m.role == "system"), "")
        users = [i for i, m in enumerate(messages) if m.role == "user"]
        text = ""
        for i, message in enumerate(messages):
            if message.role == "assistant":
                text += self.asked + message.content
            elif message.role == "user":
                has_system = bool(system) and self.before_system is not None
                inserted = f"{self.before_system}{system}{self.after_system}"
                if i != users[0]:
                    text += self.again
                elif self.system_last or not has_system:
                    text += self.head
                else:
                    text += inserted
                if self.system_last and has_system and i == users[-1]:
                    text += inserted
                text += message.content
        return text + self.tail

    def go(self) -> str:
        """Return the Go template."""
        inserted = f"{_literal(self.before_system or '')}{{{{ $.System }}}}{_literal(self.after_system)}"
        opening, after = _literal(self.head), ""
        if self.system_last:
            after = f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{inserted}{{{{ end }}}}"
        elif self.before_system is not None:
            opening = f"{{{{ if $.System }}}}{inserted}{{{{ else }}}}{opening}{{{{ end }}}}"
        user = f"{{{{ if $first }}}}{opening}{{{{ else }}}}{_literal(self.again)}{{{{ end }}}}{after}"
        return (
            "{{ $first := true }}{{ range $i, $m := .Messages }}"
            f'{{{{ if eq $m.Role "user" }}}}{user}{{{{ $m.Content }}}}{{{{ $first = false }}}}'
            f'{{{{ else if eq $m.Role "assistant" }}}}{_literal(self.asked)}{{{{ $m.Content }}}}{{{{ end }}}}'
            f"{{{{ end }}}}{_literal(self.tail)}"
        )


def modelfile(template: ChatTemplate, file: str, *, context_tokens: int, system: str | None = None) -> str:
    """Return the Modelfile of the GGUF file `file` that stands beside it.

    Args:
        template: of the model.
        file: name of the GGUF file.
        context_tokens: most tokens of prompt and answer together.
        system: system message of conversations that bring none.
    """
    lines = [f"FROM ./{file}"]
    parts = find_parts(template)
    if parts is None:
        lines += [
            "# The chat template of this model has no equal form in Ollama's language: TEMPLATE is left out, and",
            "# Ollama takes the template inside of the GGUF file as far as it knows it. Compare before you rely on it.",
        ]
    else:
        lines += [
            "# Gives the text of the model's own template on conversations without tools, white space around messages",
            "# taken away.",
            f'TEMPLATE """{parts.go()}"""',
        ]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in template.ends]
    lines.append(f"PARAMETER num_ctx {context_tokens}")
    if system:
        quoted = f'"""{system}"""' if '"""' not in system and not system.endswith('"') else json.dumps(
            system, ensure_ascii=False
        )  # fmt: skip
        lines.append(f"SYSTEM {quoted}")
    return "\n".join(lines) + "\n"


def find_parts(template: ChatTemplate) -> Parts | None:
    """Return what `template` puts around messages, None when it does more than that."""
    try:
        parts = _probe(template)
    except TemplateError:
        return None
    if parts is None or not _proven(template, parts):
        return None
    # Ollama writes the first token itself, as the file says (tokenizer.ggml.add_bos_token).
    bos = template.special.get("bos_token") or ""
    head = parts.head.removeprefix(bos)
    before = parts.before_system
    if before is not None and not parts.system_last:
        before = before.removeprefix(bos)
    return replace(parts, head=head, before_system=before)


def _probe(template: ChatTemplate) -> Parts | None:
    asked, said, again = Message("user", _ASKED), Message("assistant", _SAID), Message("user", _NEXT)
    found = _between(template.render(Chat((asked, said, again)), reply=True), (_ASKED, _SAID, _NEXT))
    if found is None:
        return None
    head, asked_to_said, said_to_again, tail = found
    parts = Parts(head, asked_to_said, said_to_again, tail, before_system=None)
    try:
        text = template.render(Chat((Message("system", _SYSTEM), asked, said, again)), reply=True)
    except TemplateError:
        return parts  # takes no system message
    if (first := _between(text, (_SYSTEM, _ASKED, _SAID, _NEXT))) is not None:
        return replace(parts, before_system=first[0], after_system=first[1])
    last = _between(text, (_ASKED, _SAID, _SYSTEM, _NEXT))
    if last is not None and last[2].startswith(parts.again):
        before = last[2].removeprefix(parts.again)
        return replace(parts, before_system=before, after_system=last[3], system_last=True)
    return parts


def _between(text: str, marks: Sequence[str]) -> list[str] | None:
    """Return what stands before, between and after `marks`; None when they are not there once each, in order."""
    found = []
    for mark in marks:
        before, there, text = text.partition(mark)
        if not there or mark in text:
            return None
        found.append(before)
    return [*found, text]


def _proven(template: ChatTemplate, parts: Parts) -> bool:
    """Compare on every golden conversation that Ollama's template can write; at least two must be there."""
    compared = 0
    for chat in GOLDEN_CHATS.values():
        messages = chat.prompt.messages
        if chat.tools or any(m.role == "tool" or m.tool_calls for m in messages) or messages[-1].role != "user":
            continue
        if order_fault(chat) or (messages[0].role == "system" and not messages[0].content.strip()):
            continue  # Ollama joins neighbours of one role, and drops an empty system message
        plain = tuple(replace(message, content=message.content.strip()) for message in messages)
        try:
            expected = template.render(Chat(plain), reply=True)
        except TemplateError:
            continue  # as it refuses it, Ollama cannot be asked for it either
        if parts.render(plain) != expected:
            return False
        compared += 1
    return compared > 1


def _literal(text: str) -> str:
    """Write text as a Go string; Go reads all escapes that JSON has."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
