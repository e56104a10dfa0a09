"""A folder in Hugging Face layout, read without torch: configuration, tensors by rows, tokenizer, template, ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alambic import render
from alambic._extras import load
from alambic.errors import BaseModelError
from alambic.kinds.chat import Chat
from alambic.model.bases import read_json
from alambic.model.bases_weights import weight_files
from alambic.model.tokenizer import read_tokenizer
from alambic.render import PLAIN_TEMPLATE, ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Models of several senses hold their text model under one of these.
_PREFIXES = ("language_model.model.", "model.language_model.")
_OTHER_SENSES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: in the base, without the prefix of a model of several senses.
        shape: rows, then columns.
        raw: its bytes, mapped from the file; none is read before it is used.
        dtype: ``F32``, ``F16`` or ``BF16``.
    """

    name: str
    shape: tuple[int, ...]
    raw: Callable[[], NDArray[np.uint8]]
    dtype: str

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the rows [start, stop) in float32."""
        kind = np.dtype(np.float32 if self.dtype == "F32" else np.uint16 if self.dtype == "BF16" else np.float16)
        values = self.raw().view(kind.newbyteorder("<")).reshape(self.shape)[start:stop]
        if self.dtype == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


@dataclass(frozen=True)
class Source:
    """A model that can be packed.

    Attributes:
        folder: where it is.
        kind: `model_type` of the text part.
        config: of the text part.
        tensors: by name.
        tokenizer: without truncation and padding.
        template: how chats are written, with the special tokens.
        ends: ids that end an answer, the one that the template writes after a turn first.
        context_tokens: most tokens of prompt and answer together.
        licence: of the base, where it is known.
    """

    folder: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    template: ChatTemplate
    ends: tuple[int, ...]
    context_tokens: int
    licence: str | None = None

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix too."""
        return "lm_head.weight" not in self.tensors

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Open a model folder.

        Raises:
            BaseModelError: a file is missing, damaged or pickled.
            TemplateError: the chat template does not parse.
        """
        config = read_json(folder / "config.json")
        text = config.get("text_config")
        tied = config.get("tie_word_embeddings")
        if isinstance(text, dict):
            tied = text.get("tie_word_embeddings", tied)
            config = text
        tensors = _tensors(folder)
        if tied:  # some files hold the output matrix all the same
            tensors.pop("lm_head.weight", None)
        tokenizer = read_tokenizer(folder)
        template = render.read_template(folder) or render.checked(ChatTemplate(PLAIN_TEMPLATE))
        template = replace(template, special={**_special(folder, config, tokenizer), **template.special})
        ends = _ends(folder, config, tokenizer, template)
        texts = tuple(text for text in (tokenizer.id_to_token(i) for i in ends) if text)
        own = read_json(folder / "alambic.json") if (folder / "alambic.json").is_file() else {}
        return cls(
            folder=folder,
            kind=str(config.get("model_type")),
            config=config,
            tensors=tensors,
            tokenizer=tokenizer,
            template=replace(template, ends=texts),
            ends=ends,
            context_tokens=int(own.get("context_tokens") or config.get("max_position_embeddings") or 2048),
            licence=(own.get("base") or {}).get("licence"),
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    reader = load("gguf.utility").SafetensorsLocal
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            held = reader(path).tensors
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(f"{path}: cannot be read as safetensors ({error})") from error
        for name, entry in held.items():
            if name.startswith(_OTHER_SENSES):
                continue
            if entry.dtype not in ("F32", "F16", "BF16"):
                if name.endswith("rotary_emb.inv_freq") or entry.dtype.startswith(("I", "U", "BOOL")):
                    continue  # buffers
                raise BaseModelError(
                    f"{path}: {name} is stored as {entry.dtype}",
                    hint="take the release of the same model that is not quantised (bf16, fp16 or fp32)",
                )
            plain = name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else name
            for prefix in _PREFIXES:
                if plain.startswith(prefix):
                    plain = "model." + plain.removeprefix(prefix)
            found[plain] = Tensor(plain, tuple(entry.shape), entry.mmap_bytes, entry.dtype)
    return found


def _special(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    found = render.special_tokens(folder)
    for name in ("bos_token", "eos_token", "pad_token"):
        number = config.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        text = tokenizer.id_to_token(number) if isinstance(number, int) else None
        if text is not None:
            found.setdefault(name, text)
    return found


def _ends(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """Return what ends an answer: what follows a turn, what the configurations state, what the tokenizer says."""
    ids: list[int | None] = [_after_turn(tokenizer, template)]
    generation = folder / "generation_config.json"
    for stated in (read_json(generation) if generation.is_file() else {}, config):
        value = stated.get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    text = template.special.get("eos_token")
    ids.append(tokenizer.token_to_id(text) if text else None)
    whole = dict.fromkeys(i for i in ids if isinstance(i, int) and tokenizer.id_to_token(i) is not None)
    if not whole:
        raise BaseModelError(
            f"{folder}: no token is named that ends an answer",
            hint="name eos_token in tokenizer_config.json, or eos_token_id in config.json",
        )
    return tuple(whole)


def _after_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    said = "alambic"
    text = template.render(Chat.of("a", completion=said))
    tail = text[text.rfind(said) + len(said) :]
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.encode(tail, add_special_tokens=False).ids
    return next((i for i in ids if i in added and added[i].special), None)
