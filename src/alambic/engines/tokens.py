"""Text to token ids, from `tokenizer.json` (the tokenizers library) or `tokenizer.xml` (an OpenVINO graph).

Both give the same ids; the proof at packing says so. Where a part has both, `tokenizer.json` is used: one short text
takes 0.05 ms instead of 0.5 ms. Truncation and padding are never done here: the former belongs to `windows`, the latter
to the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alambic import _extras
from alambic.engines.windows import batches
from alambic.errors import EngineError

Tokenize = Callable[[Sequence[str]], list[list[int]]]


def choose_tokenizer(folder: Path, wanted: str | None) -> Path:
    """Return the tokenizer file of a part: the one `wanted`, else tokenizer.json, else tokenizer.xml.

    Raises:
        EngineError: there is none.
    """
    names = (wanted,) if wanted is not None else ("tokenizer.json", "tokenizer.xml")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EngineError(f"{folder}: no tokenizer; expected {' or '.join(names)}")


def read_tokenizer(path: Path) -> Any:
    """Open a tokenizer.json with whatever truncation and padding it holds cleared.

    Raises:
        EngineError: it cannot be read.
    """
    tokenizers = _extras.load("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise EngineError(f"{path}: not a readable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def fast_tokenizer(path: Path, *, threads: int | None) -> Tokenize:
    """Use a tokenizer.json.

    Raises:
        EngineError: it cannot be read.
    """
    tokenizer = read_tokenizer(path)

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        # Its batch call uses every core, whatever `threads` says, and costs more than it gains on a few texts.
        if threads == 1 or len(texts) < 8:
            return [tokenizer.encode(text).ids for text in texts]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]

    return tokenize


def graph_tokenizer(compiled: Any) -> Tokenize:
    """Use a compiled OpenVINO tokenizer, whose outputs `input_ids` and `attention_mask` are padded [N, T]."""
    openvino = _extras.load("openvino")
    request = compiled.create_infer_request()
    lock = threading.Lock()

    def tokenize_batch(texts: list[str]) -> list[list[int]]:
        with lock:
            request.infer([openvino.Tensor(texts)])
            ids = request.get_tensor("input_ids").data
            mask = request.get_tensor("attention_mask").data.astype(bool)
            return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1:
            return tokenize_batch([texts[0]])
        out: list[list[int]] = [[] for _ in texts]
        # The graph pads to the longest text, so texts of like length go together.
        for rows in batches([len(text) for text in texts], max_rows=256, max_cells=1 << 18):
            for i, ids in zip(rows, tokenize_batch([texts[i] for i in rows]), strict=True):
                out[i] = ids
        return out

    return tokenize
