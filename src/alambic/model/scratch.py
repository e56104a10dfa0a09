"""A new model made from nothing but a task's own text: a Llama-shaped decoder, or a Pegasus-shaped encoder-decoder.

The tokenizer is a byte-level BPE trained on that text: any text can be read and written back exactly, and words are
split as Qwen2 splits them, which every engine knows. Saved in Hugging Face layout, so that every exporter takes it.

The chat template (`TEMPLATE`) spends one token a turn:

    <|system|>Answer in French.<|user|>Hello!<|assistant|>Bonjour !<|end|>

Tools come first, one JSON object a line, after ``<|tools|>``; a call is ``<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`` before the end; what a tool answers follows ``<|tool|>``. ``<|end|>`` ends a turn of the assistant.
Fill-in-the-middle has ``<|fim_prefix|>``, ``<|fim_suffix|>`` and ``<|fim_middle|>`` (as in Bavarian et al. 2022).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, processors
from torch import nn

from alambic.errors import BaseModelError
from alambic.kinds.chat import Chat
from alambic.model import tokenizer_training
from alambic.model.decoder import save_spec, save_tokenizer
from alambic.model.encoder import _quiet as quiet
from alambic.model.folder import whole_model
from alambic.model.tokenizer_training import END, PAD, START, TEMPLATE

SPECIAL = (START, PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>", "<|fim_prefix|>",
           "<|fim_suffix|>", "<|fim_middle|>")  # fmt: skip
MARKS = ("<tool_call>", "</tool_call>")  # the reader of an answer must see them: not special
ModelShape = Literal["decoder", "encoder-decoder"]

# (parameters up to, layers, vocabulary). A small model is better off with fewer words and more layers.
_SIZES = (
    (3_000_000, 4, 2048), (10_000_000, 6, 6144), (30_000_000, 8, 10240), (80_000_000, 12, 16384),
    (10**10, 16, 32768),
)  # fmt: skip
_BYTES_A_WORD = 200  # of text for each entry of the vocabulary, at least: rarer ones are never learnt
_PARAMETERS = (1_000_000, 30_000_000)
_SMALL_TEXT = 20_000_000  # bytes under which an encoder-decoder is regularised strongly


def make_scratch(
    chats: Sequence[Chat],
    out: Path,
    *,
    parameters: int = 0,
    shape: ModelShape = "decoder",
    context_tokens: int | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a new model and tokenizer for `chats` as folder `out`; return what it is.

    Args:
        chats: the text that the tokenizer learns.
        out: an existing one is replaced.
        parameters: wanted, met within a few percent; 0: by the amount of text, 1 to 30 million.
        shape: ``decoder`` (Llama) or ``encoder-decoder`` (Pegasus).
        context_tokens: most it reads and writes together; twice the longest row when None.
        vocabulary: entries of the tokenizer; by size and text when None.
        seed: of the weights.

    Raises:
        BaseModelError: so few parameters are asked for that no model can be made of them, or an unknown shape.
    """
    if shape not in ("decoder", "encoder-decoder"):
        raise BaseModelError(f"base.shape = {shape!r}; allowed: decoder, encoder-decoder")
    size = sum(len(text.encode()) for text in _texts(chats))
    parameters = parameters or min(max(3 * size, _PARAMETERS[0]), _PARAMETERS[1])
    layers, usual = next((layers, words) for most, layers, words in _SIZES if parameters <= most)
    wanted = vocabulary or min(usual, max(512, size // _BYTES_A_WORD))
    tokenizer = train_tokenizer(_texts(chats), vocabulary=wanted, seq2seq=shape == "encoder-decoder")
    if context_tokens is None:
        context_tokens = _context(tokenizer, chats)
    make = _decoder_config if shape == "decoder" else _seq2seq_config
    config = make(
        tokenizer, parameters=parameters, layers=layers, context_tokens=context_tokens, small_text=size < _SMALL_TEXT
    )
    model = _random(config, seed=seed)
    record = {
        "architecture": config.model_type,
        "context_tokens": context_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "base": {"name": "scratch", "source": "scratch", "licence": "none: made from the task's own text"},
    }
    _save(model, tokenizer, out, record, shape)
    return {**record, "vocabulary": tokenizer.get_vocab_size(), "layers": layers, "shape": shape}


def train_tokenizer(texts: Iterator[str], *, vocabulary: int, seq2seq: bool = False) -> Tokenizer:
    """Train a byte-level BPE with the special tokens of `SPECIAL` and `MARKS`.

    Args:
        texts: read once.
        vocabulary: entries, special ones included; fewer when the texts have fewer words to offer.
        seq2seq: each text ends with the end token, as an encoder-decoder reads it.
    """
    tokenizer = tokenizer_training.train_tokenizer(texts, vocabulary=vocabulary, special=SPECIAL, marks=MARKS)
    if seq2seq:
        end = (END, tokenizer.token_to_id(END))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[end]
        )
    return tokenizer


def _texts(chats: Sequence[Chat]) -> Iterator[str]:
    for chat in chats:
        for tool in chat.tools:
            yield json.dumps(tool, ensure_ascii=False)
        for message in chat.messages:
            if message.content:
                yield message.content
            for call in message.tool_calls:
                yield json.dumps(call.to_dict()["function"], ensure_ascii=False)


def _context(tokenizer: Tokenizer, chats: Sequence[Chat]) -> int:
    """Return twice the longest row, as a power of two of at least 512."""
    longest = 0
    for chat in chats:
        texts = list(_texts([chat]))
        longest = max(longest, sum(len(e.ids) for e in tokenizer.encode_batch(texts)) + 2 * len(texts) + 8)
    return max(512, 1 << (2 * longest - 1).bit_length())


def _decoder_config(
    tokenizer: Tokenizer, *, parameters: int, layers: int, context_tokens: int, small_text: bool
) -> Any:
    rows = _rows(tokenizer)

    def count(width: int) -> int:
        # Tied table; query and output square, key and value a half; three matrices of 8/3 of the width; norms.
        return rows * width + layers * (3 * width * width + 3 * width * _inner(width) + 2 * width) + width

    width = _width(count, parameters, step=64)
    heads = width // (64 if width >= 256 and width % 128 == 0 else 32)  # even: two share one key and value
    return transformers.LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=_inner(width), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // (2 - heads % 2), head_dim=width // heads,
        max_position_embeddings=context_tokens, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=tokenizer.token_to_id(START),
        eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(PAD),
    )  # fmt: skip


def _seq2seq_config(
    tokenizer: Tokenizer, *, parameters: int, layers: int, context_tokens: int, small_text: bool
) -> Any:
    rows, depth = _rows(tokenizer), max(3, layers // 2 + 1)

    def count(width: int) -> int:
        # One shared table; an encoder layer has 4 + 4 squares of the width, a decoder layer 8 + 4; positions are fixed.
        return rows * width + depth * 20 * width * width

    width = _width(count, parameters)
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    # Norms stand before each part of a layer: with Marian's, after it, training from nothing is several times slower
    # (Xiong et al. 2020, https://arxiv.org/abs/2002.04745; our figures: docs/lab-notes.md, 2026-11-21).
    return transformers.PegasusConfig(
        vocab_size=rows, d_model=width, encoder_layers=depth, decoder_layers=depth, encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width, encoder_attention_heads=_heads(width),
        decoder_attention_heads=_heads(width), max_position_embeddings=context_tokens, scale_embedding=True,
        activation_function="relu", dropout=0.2 if small_text else 0.1, attention_dropout=0.0, pad_token_id=pad,
        eos_token_id=end, bos_token_id=None, decoder_start_token_id=pad, forced_eos_token_id=None,
        init_std=width**-0.5,
    )  # fmt: skip


def _inner(width: int) -> int:
    """Return 8/3 of the width, as a multiple of 32."""
    return max(64, round(width * 8 / 3 / 32) * 32)


def _heads(width: int) -> int:
    """Return the number of heads of 64, or of 32 in a narrow or odd model."""
    return width // (64 if width >= 256 and width % 64 == 0 else 32)


def _width(count: Any, parameters: int, *, step: int = 32) -> int:
    """Return the multiple of `step` whose model is nearest to `parameters`: blocks of 4-bit weights are of 32.

    Raises:
        BaseModelError: the smallest is several times too large.
    """
    width = min(range(64, 4096 + step, step), key=lambda width: abs(count(width) - parameters))
    if count(width) > 2 * parameters:
        raise BaseModelError(
            f"base.parameters = {parameters:,}: the smallest model for this vocabulary has {count(width):,}",
            hint="ask for more parameters",
        )
    return width


def _rows(tokenizer: Tokenizer) -> int:
    return -(-int(tokenizer.get_vocab_size(with_added_tokens=True)) // 64) * 64


def _random(config: Any, *, seed: int) -> nn.Module:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        seq2seq = config.is_encoder_decoder
        loader = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        return loader.from_config(config, dtype=torch.float32).eval()
    finally:
        torch.random.set_rng_state(state)


def _save(model: nn.Module, tokenizer: Tokenizer, out: Path, record: dict[str, Any], shape: str) -> None:
    config = {"eos_token": END, "pad_token": PAD, "add_bos_token": False, "add_eos_token": shape != "decoder",
              "model_max_length": record["context_tokens"]}  # fmt: skip
    with whole_model(out) as beside:
        with quiet():
            model.save_pretrained(beside)
        for path in beside.glob("*.safetensors"):
            path.chmod(0o644)
        if shape == "decoder":
            config["bos_token"] = START
            (beside / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        save_tokenizer(tokenizer, beside, config)
        save_spec(beside, record, of="decoder" if shape == "decoder" else "seq2seq")
