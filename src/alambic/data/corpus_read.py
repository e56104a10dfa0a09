"""Read the documents of a corpus as a stream: memory does not grow with the files.

`.txt` holds documents separated by a line `<|endoftext|>`; `.jsonl` one object a line with `text`, or `messages`
(OpenAI's form, with `tools`), or `prompt` and `completion`. Both may be packed (.xz, .gz, .bz2, .zst). Text is UTF-8. A
long document is cut into pieces where a paragraph ends, which keep the number of their document.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from alambic import _extras
from alambic.data.clean import clean_text
from alambic.errors import DataError
from alambic.kinds.chat import Chat, parse_chat

SEPARATOR = "<|endoftext|>"
PIECE = 32_000  # characters from which a document is cut at the next empty line, and at twice that at any line
_LINE = 1 << 20  # characters of a line read at once
_PACKED = (".xz", ".gz", ".bz2", ".zst")
_FORMS = (".txt", ".md", ".jsonl")
Render = Callable[[Chat], str]


@dataclass(frozen=True)
class Document:
    """One document, or a piece of a long one.

    Attributes:
        text: as it is to be learnt; empty when `fault` says why it cannot be read.
        words: the text that rules and duplicates look at; a chat's without the marks of its template.
        parent: number of the document in the source, the same for all its pieces.
        where: ``file:line``.
        chat: whether the text has the template's special tokens.
        fault: why the row cannot be used.
    """

    text: str
    words: str
    parent: int
    where: str
    chat: bool = False
    fault: str | None = None


def files_of(pattern: str, root: Path) -> list[Path]:
    """Return the files that a path or glob names, in order.

    Raises:
        DataError: there is none, or one of a form that is not read.
    """
    place = Path(pattern).expanduser()
    whole = str(place if place.is_absolute() else root / place)
    found = [Path(whole)] if Path(whole).is_file() else [Path(p) for p in sorted(glob.glob(whole, recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        hint = "name the folder of the corpus with --corpus, or correct source.path"
        raise DataError(f"{whole}: no such file", hint=hint)
    for path in files:
        form_of(path)
    return files


def form_of(path: Path) -> str:
    """Return ``.txt`` or ``.jsonl``, whatever the file is packed with.

    Raises:
        DataError: neither.
    """
    name = path.with_suffix("") if path.suffix in _PACKED else path
    if name.suffix not in _FORMS:
        allowed = ", ".join(_FORMS) + ", plain or packed with " + ", ".join(_PACKED)
        raise DataError(
            f"{path}: documents are not read from {path.suffix or 'such files'}", hint=f"allowed: {allowed}"
        )
    return ".jsonl" if name.suffix == ".jsonl" else ".txt"


def read_documents(files: list[Path], render: Render) -> Iterator[Document]:
    """Stream the documents of `files`, cleaned (NFC, plain line ends, no control characters).

    Args:
        files: see `files_of`.
        render: writes a conversation as text.

    Raises:
        DataError: a file is cut short or not packed as its name says; a bad row is a document with a fault instead.
    """
    parent = -1
    for path in files:
        read = _objects if form_of(path) == ".jsonl" else _texts
        last = None
        for number, document in read(path, render):
            if number != last:
                parent, last = parent + 1, number
            yield Document(document.text, document.words, parent, document.where, document.chat, document.fault)


def open_text(path: Path) -> TextIO:
    """Open a file, packed or not, as UTF-8 text; bytes that are not UTF-8 become U+FFFD.

    Raises:
        DataError: it cannot be opened.
    """
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zst}
    try:
        raw = openers.get(path.suffix, open)(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline=None)


def digest_of(files: list[Path]) -> str:
    """Return the SHA-256 (hex) of the bytes of `files` in order."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _open_zst(path: Path, mode: str) -> Any:
    arrow = _extras.load("pyarrow")
    return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path), mode), "zstd"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_text(path) as file:
        number = 0
        try:
            while line := file.readline(_LINE):
                number += 1
                yield number, line
        except (OSError, EOFError, lzma.LZMAError) as error:
            hint = "copy or download the file again"
            raise DataError(f"{path}:{number + 1}: cannot be unpacked ({error})", hint=hint) from error


def _texts(path: Path, render: Render) -> Iterator[tuple[int, Document]]:
    parts: list[str] = []
    size, count, began = 0, 0, 1

    def made() -> Iterator[tuple[int, Document]]:
        text = clean_text("".join(parts)).text
        if text:
            yield count, Document(text, text, 0, f"{path.name}:{began}")

    for number, line in _lines(path):
        ends = line.startswith(SEPARATOR) and line.strip() == SEPARATOR
        if ends or size > 2 * PIECE or (size > PIECE and line.isspace()):
            yield from made()
            parts, size, began = [], 0, number + ends
            count += ends
        if not ends:
            parts.append(line)
            size += len(line)
    yield from made()


def _objects(path: Path, render: Render) -> Iterator[tuple[int, Document]]:
    row, number = "", 0
    for number, line in _lines(path):
        row += line
        if len(line) == _LINE and not line.endswith("\n"):
            continue  # the rest of a very long row follows
        if row.strip():
            yield number, _row(row, f"{path.name}:{number}", render)
        row = ""
    if row.strip():
        yield number, _row(row, f"{path.name}:{number}", render)


def _row(row: str, where: str, render: Render) -> Document:
    try:
        data = json.loads(row)
        if not isinstance(data, dict):
            return Document("", "", 0, where, fault="not a JSON object")
        if isinstance(data.get("text"), str):
            text = clean_text(data["text"]).text
            return Document(text, text, 0, where)
        chat = _chat(data, where)
    except (ValueError, DataError) as error:
        return Document("", "", 0, where, fault=str(error))
    if chat is None:
        return Document("", "", 0, where, fault="neither text, nor messages, nor prompt and completion")
    said = "\n".join(message.content for message in chat.messages)
    return Document(clean_text(render(chat)).text, clean_text(said).text, 0, where, chat=True)


def _chat(data: dict[str, Any], where: str) -> Chat | None:
    if "messages" in data:
        return parse_chat(data["messages"], data.get("tools"), where=where)
    prompt, completion = data.get("prompt"), data.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        # Some collections end each answer with the mark; the template ends the turn, and the shards the document.
        completion = completion.rstrip().removesuffix(SEPARATOR)
        return Chat.of(prompt, completion=completion, system=data.get("system") or None)
    return None
