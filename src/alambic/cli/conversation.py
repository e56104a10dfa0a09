"""A conversation in the terminal: what the user types, commands, and answers as they are written.

It reads with `input` (readline gives editing and history, kept in memory only), writes answers to stdout and everything
else to stderr. The model is a `BundleWriter`; nothing here opens a bundle.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import click

from alambic.cli.conversation_words import WORDS, Words
from alambic.engines.bundle_writer import BundleWriter, filled
from alambic.errors import AlambicError, nearest
from alambic.kinds.chat import Chat, Message
from alambic.kinds.generation import Chunk, Sampling

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMANDS = ("/help", "/reset", "/system", "/save", "/quit")


@dataclass(frozen=True)
class Said:
    """An answer, whole or stopped by the user.

    Attributes:
        text: as far as it came.
        last: the writer's last chunk; None when the user stopped it.
    """

    text: str
    last: Chunk | None


class Conversation:
    """The turns so far, and the model that answers them.

    A task of one text and one answer (kinds `generate` and `extract`) knows no earlier turns: each text is asked alone.
    """

    def __init__(
        self, writer: BundleWriter, *, system: str | None = None, sampling: dict[str, Any] | None = None
    ) -> None:
        self._writer = writer
        self._given = {name: value for name, value in (sampling or {}).items() if value is not None}
        self.system = system
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []

    def answer(self, text: str, out: TextIO) -> Said:
        """Write the answer to `text` on `out` as it comes; Ctrl-C stops it, and what was written stays.

        Raises:
            AlambicError: the model cannot answer; the conversation stays as it was.
        """
        # The bundle's prompt goes around the text in the request only; what is kept is what the user said.
        kept = self.messages if self._writer.kind == "chat" else []
        said = Message("user", text)
        written: list[str] = []
        show = _harmless if out.isatty() else str
        last: Chunk | None = None
        request = replace(self._writer.request(self._chat([*kept, said])), sampling=self._sampling())
        with suppress(KeyboardInterrupt), closing(self._writer.stream(request)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                if chunk.text:
                    written.append(chunk.text)
                    out.write(show(chunk.text))
                    out.flush()
                last = chunk if chunk.finish_reason is not None else None
        answer = Said("".join(written), last)
        self.messages = [*kept, said, Message("assistant", answer.text)] if answer.text else [*kept]
        return answer

    def save(self, path: Path) -> None:
        """Add the conversation to `path` as a line of OpenAI's JSON: the form that training data has.

        Raises:
            OSError: the file cannot be written.
        """
        row = Chat(self._with_system(self.messages)).to_dict(as_text=True)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _chat(self, messages: list[Message]) -> Chat:
        prompt = self._writer.spec.prompt
        asked = [
            replace(message, content=filled(prompt, message.content)) if prompt and message.role == "user" else message
            for message in messages
        ]
        return Chat(self._with_system(asked))

    def _with_system(self, messages: list[Message]) -> tuple[Message, ...]:
        return (*([Message("system", self.system)] if self.system else []), *messages)

    def _sampling(self) -> Sampling:
        sampling = replace(self._writer.sampling, **self._given)
        return sampling if "seed" in self._given else replace(sampling, seed=secrets.randbits(31))


def talk(conversation: Conversation, name: str, *, out: TextIO, read: Callable[[str], str] = input) -> None:
    """Answer what the user types until Ctrl-D or /quit."""
    words = WORDS[language()]
    typed = sys.stdin.isatty()
    with suppress(ImportError):
        import readline

        readline.set_auto_history(True)
    if typed:
        click.secho(words.greeting.format(name=name), fg="green", err=True)
    while True:
        try:
            text = _typed(_prompting(read, out) if typed else read, typed=typed)
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        except EOFError:
            if typed:
                click.echo(err=True)
            return
        if not text.strip():
            continue
        if text.startswith("/"):
            if not _command(conversation, text, words):
                return
            continue
        try:
            said = conversation.answer(text, out)
        except AlambicError as error:
            click.secho(f"{words.error}: {error}", fg="red", err=True)
            continue
        out.write("\n")
        out.flush()
        click.secho(summary(said, words), dim=True, err=True)


def summary(said: Said, words: Words) -> str:
    """Return the line under an answer: tokens, milliseconds, and why it ended if not by itself."""
    last = said.last
    if last is None or last.usage is None or last.timings is None:
        return words.stopped
    usage, timings = last.usage, last.timings
    line = words.times.format(
        read=usage.prompt_tokens,
        read_time=_duration(timings.prompt_ms),
        written=usage.completion_tokens,
        write_time=_duration(timings.generation_ms),
    )
    if usage.completion_tokens > 1 and timings.generation_ms > 0:
        line += f" ({1000 * (usage.completion_tokens - 1) / timings.generation_ms:.0f}/s)"
    return f"{line}. {words.cut}" if last.finish_reason == "length" else line


def language() -> str:
    """Return ``fr`` where the locale is French, else ``en``."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "fr" if locale.lower().startswith("fr") else "en"


def _prompting(read: Callable[[str], str], out: TextIO) -> Callable[[str], str]:
    """Return `read` with its prompt on stderr where stdout is a file: answers alone belong there."""

    def asked(prompt: str) -> str:
        click.echo(prompt, nl=False, err=True)
        return read("")

    return read if out.isatty() else asked


def _typed(read: Callable[[str], str], *, typed: bool) -> str:
    """Read a message; a line that ends in a backslash goes on."""
    text = read("> " if typed else "")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + read(". " if typed else "")
    return text


def _command(conversation: Conversation, text: str, words: Words) -> bool:
    """Carry out a command; return whether to go on."""
    name, _, argument = text.strip().partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return False
    if name == "/help":
        note = words.help
    elif name == "/reset":
        conversation.reset()
        note = words.reset
    elif name == "/system":
        if argument:
            conversation.system = argument
        note = words.system.format(text=conversation.system) if conversation.system else words.no_system
    elif name == "/save":
        note = _save(conversation, argument, words)
    else:
        note = words.unknown.format(name=name, known=nearest(name, COMMANDS))
    click.secho(note, dim=True, err=True)
    return True


def _save(conversation: Conversation, argument: str, words: Words) -> str:
    if not argument:
        return words.save_where
    if not conversation.messages:
        return words.nothing
    try:
        conversation.save(Path(argument).expanduser())
    except OSError as error:
        return words.not_saved.format(path=argument, reason=error.strerror)
    return words.saved.format(path=argument, count=len(conversation.messages))


def _harmless(text: str) -> str:
    """Leave control characters out: a terminal would obey what a model writes."""
    return _CONTROL.sub("", text)


def _duration(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
