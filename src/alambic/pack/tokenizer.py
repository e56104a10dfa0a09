"""The tokenizer of a packed model: a clean tokenizer.json, and the same as an OpenVINO graph where that is exact.

Neither cuts nor pads: what to do with long texts is the task's choice, and the engine pads. The graph lets C++ and
Java programs use the bundle without any tokenizer library. Some converted graphs differ from the original on rare
characters, so it ships only when the golden texts give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic import _extras
from alambic.engines.tokens import fast_tokenizer, graph_tokenizer
from alambic.errors import PackError

if TYPE_CHECKING:
    from alambic.model.encoder import Encoder


@dataclass(frozen=True)
class Difference:
    """The first token that two tokenizers do not share.

    Attributes:
        text: the input.
        at: position of the token.
        expected: id and string in the model's tokenizer; None when it gives no token there.
        got: the same in the packed one.
    """

    text: str
    at: int
    expected: tuple[int, str] | None
    got: tuple[int, str] | None

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        got, expected = _shown(self.got), _shown(self.expected)
        return f"input {shown!r}: token {self.at} is {got}, the model was trained with {expected}"


def write_json(encoder: Encoder, folder: Path) -> None:
    """Write tokenizer.json, truncation and padding cleared."""
    data = json.loads(encoder.tokenizer.to_str())
    data["truncation"] = data["padding"] = None
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_graph(encoder: Encoder, folder: Path, texts: Sequence[str]) -> str | None:
    """Write tokenizer.xml and tokenizer.bin if the converted graph gives the model's ids on `texts`.

    Returns:
        None when it was written, else why not.
    """
    openvino = _extras.load("openvino")
    try:
        graph = _convert(encoder)
    except _faults() as error:
        return f"its kind cannot be converted ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    tokenize = graph_tokenizer(openvino.Core().compile_model(graph, "CPU"))
    try:
        difference = first_difference(encoder, tokenize(texts), texts)
    except RuntimeError as error:
        return f"the graph cannot run ({str(error).strip().splitlines()[-1]})"
    if difference is not None:
        return str(difference)
    openvino.save_model(graph, str(folder / "tokenizer.xml"), compress_to_fp16=False)
    return None


def _faults() -> tuple[type[Exception], ...]:
    """What the converter raises on kinds of tokenizers that it does not know; its own derive from Exception alone."""
    frontend = _extras.load("openvino.frontend")
    names = ("GeneralFailure", "NotImplementedFailure", "OpConversionFailure", "OpValidationFailure")
    own = (getattr(frontend, name) for name in names if hasattr(frontend, name))
    return (RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, *own)


def read_ids(part: Path, name: str, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids that the tokenizer file `name` of a packed part gives."""
    if name.endswith(".json"):
        return fast_tokenizer(part / name, threads=1)(texts)
    openvino = _extras.load("openvino")
    core = openvino.Core()
    core.add_extension(str(_extras.load("openvino_tokenizers")._ext_path))  # the operations that the graph is made of
    return graph_tokenizer(core.compile_model(str(part / name), "CPU"))(texts)


def first_difference(encoder: Encoder, got: Sequence[Sequence[int]], texts: Sequence[str]) -> Difference | None:
    """Compare `got` with the ids that training saw for `texts`."""
    for text, theirs, ours in zip(texts, got, encoder.tokenize(texts), strict=True):
        if list(theirs) == list(ours):
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        return Difference(text, at, _token(encoder, ours, at), _token(encoder, theirs, at))
    return None


def _convert(encoder: Encoder) -> Any:
    transformers = _extras.load("transformers")
    convert = _extras.load("openvino_tokenizers").convert_tokenizer
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=encoder.tokenizer)
    _name_special_tokens(wrapped, encoder)
    return convert(wrapped, with_detokenizer=False)


def _name_special_tokens(wrapped: Any, encoder: Encoder) -> None:
    """Tell the converter which token pads; the rest is in the tokenizer itself."""
    pad = encoder.tokenizer.id_to_token(encoder.pad_id)
    if pad is None:
        raise PackError(
            f"the tokenizer has no token for the pad id {encoder.pad_id}", hint="check config.json of the base"
        )
    wrapped.pad_token = pad


def _token(encoder: Encoder, ids: Sequence[int], at: int) -> tuple[int, str] | None:
    if at >= len(ids):
        return None
    return int(ids[at]), encoder.tokenizer.id_to_token(int(ids[at])) or "(not in the vocabulary)"


def _shown(token: tuple[int, str] | None) -> str:
    return "missing" if token is None else f"{token[0]} ({token[1]!r})"
