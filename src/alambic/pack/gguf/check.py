"""What llama.cpp makes of a GGUF file: its own token ids, its greedy answer, its log-probabilities. For proofs.

Computed in the precision of the file with keys and values in float32 and without fused attention, on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alambic.engines.llamacpp_server import LlamaServer
from alambic.errors import EngineError, TemplateError
from alambic.kinds.chat import Chat
from alambic.pack.tokenizer import Difference
from alambic.render import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def gguf_token_ids(gguf_file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids that llama.cpp's own tokenizer gives, without adding any; special tokens are read as such.

    Raises:
        EngineError: the file cannot be opened.
    """
    with opened(gguf_file, context=64) as server:
        return server.token_ids(texts)


def gguf_greedy(gguf_file: Path, ids: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """Return llama.cpp's likeliest next tokens after `ids`, up to and with an end token, and how sure each was.

    Args:
        gguf_file: the model.
        ids: the prompt.
        n: most tokens to write.

    Returns:
        The tokens, and for each the distance between the two best log-probabilities (nats).

    Raises:
        EngineError: the file cannot be opened, or the prompt does not fit its context.
    """
    with opened(gguf_file, context=len(ids) + n) as server:
        return greedy(server, ids, n)


@contextmanager
def opened(gguf_file: Path, *, context: int) -> Iterator[LlamaServer]:
    """Open a file for several checks."""
    server = LlamaServer(gguf_file, context=context, threads=1, exact=True)
    try:
        yield server
    finally:
        server.close()


def greedy(server: LlamaServer, ids: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """Do what `gguf_greedy` does with an open file."""
    whole = server.complete({"prompt": list(ids), "max_tokens": n, "temperature": 0.0})
    tokens: list[int] = []
    gaps = []
    for _ in range(int(whole["usage"]["completion_tokens"])):
        (best, first), (_, second) = server.best([*ids, *tokens], 2)
        tokens.append(best)
        gaps.append(first - second)
    return tokens, gaps


def differences(gguf_file: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Difference]:
    """Return the first differing token of each text that llama.cpp tokenises otherwise than `tokenizer`."""
    found = []
    for text, got in zip(texts, gguf_token_ids(gguf_file, texts), strict=True):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        if got != expected:
            pairs = zip(expected, got, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
            found.append(Difference(text, at, _token(tokenizer, expected, at), _token(tokenizer, got, at)))
    return found


def template_differences(
    gguf_file: Path, template: ChatTemplate, chats: Mapping[str, Chat]
) -> list[tuple[str, str, str | None]]:
    """Return `(name, ours, llama.cpp's)` of the prompts that llama.cpp writes otherwise from the template in the file.

    llama.cpp writes the first token itself where the file says so, so it is left out of both. None: it refuses.

    Raises:
        EngineError: the file cannot be opened.
    """
    bos = template.special.get("bos_token") or ""
    found: list[tuple[str, str, str | None]] = []
    with opened(gguf_file, context=64) as server:
        for name, chat in chats.items():
            try:
                ours = template.render(chat, reply=True).removeprefix(bos)
            except TemplateError:
                continue  # never asked of the model
            try:
                theirs = server.render(chat.to_dict(as_text=True)).removeprefix(bos)
            except EngineError:
                found.append((name, ours, None))
                continue
            if ours != theirs:
                found.append((name, ours, theirs))
    return found


def _token(tokenizer: Tokenizer, ids: Sequence[int], at: int) -> tuple[int, str] | None:
    return None if at >= len(ids) else (ids[at], tokenizer.id_to_token(ids[at]) or "(not in the vocabulary)")
