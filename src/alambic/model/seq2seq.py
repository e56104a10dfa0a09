"""Seq2Seq: an encoder-decoder that reads one text and writes another. Saved in Hugging Face layout.

    model = Seq2Seq.load(Path("opus-mt-en-fr"))
    source, target = model.labelled(Chat.of("A dog runs.", completion="Un chien court."))

It knows no conversations: a row is one user message (after a system message, if any) and one answer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from alambic import render
from alambic.errors import BaseModelError, DataError
from alambic.kinds.chat import Chat
from alambic.model.bases import read_json
from alambic.model.decoder import FAMILIES as DECODERS
from alambic.model.decoder import Decoder, DecoderSpec, check_weights, load_weights, save_tokenizer, saved_model
from alambic.model.encoder import _quiet as quiet
from alambic.model.tokenizer import SPIECE, read_tokenizer

# `model_type` of config.json.
FAMILIES = ("bart", "marian", "mbart", "pegasus", "t5")
_MARIAN_FILES = ("source.spm", "target.spm", "vocab.json", "target_vocab.json", "tokenizer_config.json")


class Seq2Seq:
    """An encoder-decoder with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | Any, spec: DecoderSpec) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.special: dict[str, str] = {}
        self.extra_files: tuple[Path, ...] = ()

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype | None = None) -> Seq2Seq:
        """Open an encoder-decoder in Hugging Face layout.

        Marian's own pair of SentencePiece files is read through transformers' MarianTokenizer; everything else is one
        tokenizer for both sides.

        Raises:
            BaseModelError: a file is missing or damaged, the weights are pickled or do not fit, the kind is unknown.
        """
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise BaseModelError(
                f"{folder / 'config.json'}: model_type {kind!r} is not an encoder-decoder that alambic can train",
                hint="allowed: " + ", ".join(FAMILIES) + " (code that comes with a model is never run)",
            )
        check_weights(folder)
        stored = "auto" if dtype is None else dtype
        model = load_weights(transformers.AutoModelForSeq2SeqLM, folder, dtype=stored)
        tokenizer, files = load_tokenizer(folder)
        positions = config.get("max_position_embeddings") or config.get("n_positions") or 512
        spec = DecoderSpec(str(kind), int(positions), sum(p.numel() for p in model.parameters()))
        if (folder / "alambic.json").is_file():
            raw = read_json(folder / "alambic.json")
            stated = int(raw.get("context_tokens", positions))
            spec = replace(spec, context_tokens=stated, base=raw.get("base") or {})
        found = cls(model, tokenizer, spec)
        found.special = render.special_tokens(folder)
        found.extra_files = files
        return found

    def save(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write Hugging Face layout: beside first, then moved into place."""
        generation = self.model.generation_config
        with saved_model(self.model, folder, self.spec, of="seq2seq", generation=generation, dtype=dtype) as beside:
            if isinstance(self.tokenizer, Tokenizer):
                limits = {"model_max_length": self.spec.context_tokens}
                save_tokenizer(self.tokenizer, beside, {**self.special, **limits}, copies=self.extra_files)
            else:
                for path in self.extra_files:
                    shutil.copyfile(path, beside / path.name)

    @property
    def architecture(self) -> str:
        """`model_type`."""
        return self.spec.architecture

    @property
    def context_tokens(self) -> int:
        """Most tokens of the text read, and of the text written."""
        return self.spec.context_tokens

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch."""
        return int(self.model.config.pad_token_id or 0)

    @property
    def start_id(self) -> int:
        """Id that the decoder begins with."""
        start = self.model.config.decoder_start_token_id
        return self.ends[0] if start is None else int(start)  # mBART begins with what ends a text

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        value = self.model.config.eos_token_id
        return tuple(value) if isinstance(value, list) else (int(value),)

    @property
    def head(self) -> nn.Linear:
        """The output matrix [V, H]."""
        return self.model.lm_head

    @property
    def head_bias(self) -> Tensor | None:
        """What is added to the logits [V] (all but T5)."""
        bias = getattr(self.model, "final_logits_bias", None)
        return None if bias is None else bias[0]

    @property
    def head_scale(self) -> float:
        """What the last states are multiplied by first (T5 with tied tables)."""
        config = self.model.config
        tied = self.architecture == "t5" and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        return float(config.d_model**-0.5) if tied else 1.0

    def states(self, source: Tensor, source_mask: Tensor, target: Tensor) -> Tensor:
        """Return the decoder's last hidden states [B, T, H] for source ids [B, S] and what is written so far [B, T]."""
        if self.architecture == "t5":
            read = self.model.encoder(input_ids=source, attention_mask=source_mask).last_hidden_state
            out = self.model.decoder(
                input_ids=target, encoder_hidden_states=read, encoder_attention_mask=source_mask, use_cache=False
            )
        else:
            out = self.model.model(
                input_ids=source, attention_mask=source_mask, decoder_input_ids=target, use_cache=False
            )
        states: Tensor = out.last_hidden_state
        return states

    def source_text(self, chat: Chat) -> str:
        """Return what the encoder reads: the system message, if any, and the user's.

        Raises:
            DataError: the conversation has several turns or tools.
        """
        roles = [message.role for message in chat.prompt.messages]
        if roles not in (["user"], ["system", "user"]) or chat.tools:
            raise DataError(
                f"an encoder-decoder reads one user message, got {', '.join(roles)}"
                + (" and tools" * bool(chat.tools)),
                hint="use a decoder as base for conversations",
            )
        return "\n\n".join(message.content for message in chat.prompt.messages)

    def source_ids(self, text: str) -> list[int]:
        """Return the ids of a text that is read, special tokens included."""
        if isinstance(self.tokenizer, Tokenizer):
            ids: list[int] = self.tokenizer.encode(text).ids
            return ids
        return list(self.tokenizer(text)["input_ids"])

    def target_ids(self, text: str) -> list[int]:
        """Return the ids of a text that is written, end token included."""
        if isinstance(self.tokenizer, Tokenizer):
            return self.source_ids(text)
        return list(self.tokenizer(text_target=text)["input_ids"])

    def labelled(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Return what is read, and what is written after the start token.

        Raises:
            DataError: it is not one question and one answer.
        """
        answer = chat.completion
        if answer is None:
            raise DataError("the conversation has no answer")
        return self.source_ids(self.source_text(chat)), self.target_ids(answer.content)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def greedy(self, source: Sequence[int], *, max_tokens: int) -> list[int]:
        """Return the likeliest next tokens one by one, up to and with an end token: the reference of every engine."""
        device = next(self.model.parameters()).device
        ids = torch.tensor([list(source)], device=device)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, num_beams=1
            )
        written: list[int] = out[0].tolist()
        return written[1:]


def load_writer(folder: Path, *, dtype: torch.dtype | None = None) -> Decoder | Seq2Seq:
    """Open a model that writes, of whichever kind its config.json says.

    Raises:
        BaseModelError: see the two `load`.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind in FAMILIES:
        return Seq2Seq.load(folder, dtype=dtype)
    if kind not in (*DECODERS, "mistral3"):
        raise BaseModelError(
            f"{folder / 'config.json'}: model_type {kind!r} is not a model that alambic can train to write",
            hint="allowed: " + ", ".join([*DECODERS, "mistral3", *FAMILIES]),
        )
    return Decoder.load(folder, dtype=dtype)


def load_tokenizer(folder: Path) -> tuple[Tokenizer | Any, tuple[Path, ...]]:
    """Return the tokenizer and the files that a saved model needs besides tokenizer.json."""
    if (folder / "source.spm").is_file() and not (folder / "tokenizer.json").is_file():
        try:
            with quiet():
                tokenizer = transformers.MarianTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BaseModelError(f"{folder}: the tokenizer cannot be read ({error})") from error
        return tokenizer, tuple(p for name in _MARIAN_FILES if (p := folder / name).is_file())
    return read_tokenizer(folder), tuple(p for name in SPIECE if (p := folder / name).is_file())
