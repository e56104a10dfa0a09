"""Train the tokenizer of a model of our own: byte-level BPE, lossless, read alike by every engine.

Any text comes back exactly (`decode(encode(x)) == x`): there is no normalisation and every byte has a token. Words are
cut as Qwen2 cuts them, a way that llama.cpp and OpenVINO know: digits one by one, runs of spaces and line breaks
together.

The chat template (`TEMPLATE`) spends one token a turn on who speaks:

    <|system|>Answer in French.<|user|>Hello!<|assistant|>Bonjour !<|end|>

Tools come first, one JSON object a line, after ``<|tools|>``; a call is ``<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`` before the end; what a tool answers follows ``<|tool|>``. ``<|end|>`` ends a turn of the assistant,
``<|endoftext|>`` a document of pre-training.

Marks that the reader of an answer must see are no special tokens: those of calls, and ``<cite>...</cite>`` around the
words of a passage that an answer quotes. Fill-in-the-middle has ``<|fim_prefix|>``, ``<|fim_suffix|>`` and
``<|fim_middle|>`` (Bavarian et al. 2022, https://arxiv.org/abs/2207.14255). ``<|image|>`` and ``<|audio|>`` hold the
place of what other encoders read; 64 spare ids (``<|spare_0|>`` ...) let a later model add a token without a new row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from alambic.errors import BaseModelError
from alambic.model.clone_tokenizers import QWEN2_WORDS
from alambic.render import ChatTemplate

TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
START, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
MASK = "<|mask|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>")
FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
MODALITIES = ("<|image|>", "<|audio|>")
MARKS = ("<tool_call>", "</tool_call>", "<cite>", "</cite>")
SPARE = 64
SPECIAL = (
    START, PAD, END, MASK, *ROLES, *FILL_IN, *MODALITIES, *(f"<|spare_{i}|>" for i in range(SPARE)),
)  # fmt: skip


def own_template() -> ChatTemplate:
    """Return the chat template with the special tokens that it goes with."""
    return ChatTemplate(TEMPLATE, {"bos_token": START, "eos_token": END, "pad_token": PAD}, (END,))


def train_tokenizer(
    texts: Iterable[str], *, vocabulary: int, special: Sequence[str] = SPECIAL, marks: Sequence[str] = MARKS
) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) of `vocabulary` entries.

    Args:
        texts: read once; of little text fewer entries come out.
        vocabulary: special tokens, marks and spare ids included.
        special: tokens that no text becomes; their ids are the first ones.
        marks: tokens that a text becomes where it spells them; their ids are the last ones.

    Raises:
        BaseModelError: the vocabulary has no room for bytes and special tokens.
    """
    least = 256 + len(special) + len(marks)
    if vocabulary < least:
        raise BaseModelError(f"vocabulary = {vocabulary}: at least {least} (bytes and special tokens)")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(marks), special_tokens=list(special), show_progress=False, min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in marks])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, *, context_tokens: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`, in Hugging Face's layout."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], "bos_token": START, "eos_token": END, "pad_token": PAD,
        "mask_token": MASK, "add_bos_token": False, "add_eos_token": False, "model_max_length": context_tokens,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def encode_plain(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Return the ids of `texts`; without `special`, a text that spells a special token is read as ordinary text."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = not special
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        tokenizer.encode_special_tokens = before


def first_loss(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, str, str] | None:
    """Return where the first text that does not come back differs, and both excerpts; None when all come back."""
    for text, ids in zip(texts, encode_plain(tokenizer, texts, special=False), strict=True):
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if back != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            return at, text[at : at + 20], back[at : at + 20]
    return None
