"""The tokenizer of a packed writer as OpenVINO graphs, for C++ and Java programs that have no tokenizer library.

Our own engine reads tokenizer.json and hands ids to OpenVINO GenAI, whose pipelines open a folder without any tokenizer
(2026.4). So `openvino_tokenizer.xml` ships only where it gives the ids of tokenizer.json on every golden conversation.
`openvino_detokenizer.xml` always ships when it can be made: answers that follow a grammar take the vocabulary from it,
which is right even where a joint between two pieces is not; that is said then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from alambic import _extras
from alambic.engines.tokens import Tokenize, graph_tokenizer
from alambic.pack.openvino import _silent as silent
from alambic.pack.tokenizer import _faults as converter_faults
from alambic.render import ChatTemplate

TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
_BATCH = 32


def write_graphs(
    tokenizer: Tokenizer, folder: Path, texts: Sequence[str], *, template: ChatTemplate | None = None
) -> dict[str, str]:
    """Write the graphs of `tokenizer`, checked on `texts`.

    Args:
        tokenizer: without truncation and padding.
        folder: where to write.
        texts: rendered conversations.
        template: named inside the graph, where OpenVINO GenAI looks for it.

    Returns:
        What is not as it should be: each file with its fault.
    """
    try:
        with silent():
            graph, back = convert(tokenizer, template)
    except converter_faults() as error:
        why = f"left out: its kind cannot be converted ({_first_line(error)})"
        return {TOKENIZER: why, DETOKENIZER: why}
    save = _extras.load("openvino").save_model
    faults = {}
    fault = _checked(lambda: _reads_otherwise(graph, tokenizer, texts))
    if fault is None:
        save(graph, str(folder / TOKENIZER), compress_to_fp16=False)
    else:
        faults[TOKENIZER] = f"left out: {fault}"
    if back is None:
        return {**faults, DETOKENIZER: "left out: the converter makes none, so answers cannot follow a grammar"}
    save(back, str(folder / DETOKENIZER), compress_to_fp16=False)
    fault = _checked(lambda: _writes_otherwise(back, tokenizer, texts))
    return faults if fault is None else {**faults, DETOKENIZER: f"for its vocabulary only: {fault}"}


def convert(tokenizer: Tokenizer, template: ChatTemplate | None = None) -> tuple[Any, Any]:
    """Return the graphs text -> ids and ids -> text; the second may be None.

    Raises:
        RuntimeError: and others (`converter_faults`): this kind cannot be converted.
    """
    wrapped = _wrapped(tokenizer, template)
    made = _extras.load("openvino_tokenizers").convert_tokenizer(wrapped, with_detokenizer=True)
    return made if isinstance(made, tuple) else (made, None)


def read_graph(path: Path) -> Tokenize:
    """Open a packed graph as a function from texts to ids, special tokens of raw texts included."""
    openvino = _extras.load("openvino")
    core = openvino.Core()
    core.add_extension(str(_extras.load("openvino_tokenizers")._ext_path))  # the operations that the graph is made of
    return graph_tokenizer(core.compile_model(str(path), "CPU"))


def _wrapped(tokenizer: Tokenizer, template: ChatTemplate | None) -> Any:
    special: Mapping[str, str] = {} if template is None else template.special
    # Naming an ordinary token (SentencePiece's <unk>) would make it one that is found in texts.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    named = {name: text for name, text in special.items() if text in added}
    wrapped = _extras.load("transformers").PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), clean_up_tokenization_spaces=False, **named
    )
    wrapped.padding_side = "left"  # what batches of prompts need
    if template is not None:
        wrapped.chat_template = template.source
    return wrapped


def _checked(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except RuntimeError as error:
        return f"the graph cannot run ({str(error).strip().splitlines()[-1]})"


def _reads_otherwise(graph: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    tokenize = graph_tokenizer(_extras.load("openvino").Core().compile_model(graph, "CPU"))
    for text, got in zip(texts, tokenize(texts), strict=True):
        expected = tokenizer.encode(text).ids
        if got != expected:
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
            at = min(len(got), len(expected)) if at is None else at
            return f"token {at} of {text[:50]!r} is {_shown(tokenizer, got, at)}, not {_shown(tokenizer, expected, at)}"
    return None


def _writes_otherwise(graph: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    compiled = _extras.load("openvino").Core().compile_model(graph, "CPU")
    for rows in _batches([tokenizer.encode(text).ids for text in texts]):
        # Rows of one length, as no padding is taken out again.
        got = compiled(np.array(rows, dtype=np.int64))[0]
        for ids, text in zip(rows, got, strict=True):
            expected = tokenizer.decode(ids, skip_special_tokens=True)
            if str(text) != expected:
                return f"{len(ids)} ids become {str(text)[:50]!r}, not {expected[:50]!r}"
    return None


def _batches(rows: Sequence[list[int]]) -> Iterable[list[list[int]]]:
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        if row:
            by_length.setdefault(len(row), []).append(row)
    for same in by_length.values():
        yield from (same[i : i + _BATCH] for i in range(0, len(same), _BATCH))


def _shown(tokenizer: Tokenizer, ids: Sequence[int], at: int) -> str:
    return f"{ids[at]} ({tokenizer.id_to_token(ids[at])!r})" if at < len(ids) else "missing"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
