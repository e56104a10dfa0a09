"""How large a model is: parameters from the numbers of its configuration, bytes in memory at each precision.

The formulas count what the published code of each family allocates (tests hold them against transformers itself), so
a catalogue entry, a local folder and a config.json of a stranger are all sized the same way, without opening weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# `model_type` of config.json. Encoders: the forward takes ids and a mask and returns the last hidden states.
ENCODERS = ("bert", "camembert", "deberta-v2", "distilbert", "modernbert", "roberta", "xlm-roberta")
DECODERS = ("gemma2", "llama", "ministral3", "mistral", "mistral3", "phi", "qwen2", "stablelm", "starcoder2")
SEQ2SEQ = ("bart", "marian", "mbart", "pegasus", "t5")
PRECISIONS = ("fp16", "int8", "int4")
INT4_GROUP = 128  # weights that share one fp16 scale: what `pack` writes, and NNCF's default
# The engine, its graph and one prompt's activations, beside weights and cache.
RUNTIME_BYTES = 300_000_000
CACHED_TOKENS = 4_096  # conversation that "fits" provides for, unless the model reads less
_VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Shape:
    """The numbers of a configuration that decide its size.

    Attributes:
        hidden: width of the residual stream.
        layers: of the encoder or of the decoder; of an encoder-decoder, those of its encoder.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        ffn: width inside the feed-forward part.
        vocabulary: rows of the token embedding.
        tied: the output layer is the token embedding.
        decoder_layers: of an encoder-decoder.
        positions: rows of learned (or stored) positions; relative ones of DeBERTa.
        types: rows of token types.
        gated: T5 v1.1's gated feed-forward.
        vision: parameters of a vision tower and its projector, which text work leaves out.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool = True
    decoder_layers: int = 0
    positions: int = 0
    types: int = 0
    gated: bool = False
    vision: int = 0

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values are as wide."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Memory:
    """Bytes of weights at each of `PRECISIONS`, and of the key-value cache (fp16) a token; 0 where nothing is kept."""

    fp16: int
    int8: int
    int4: int
    kv_token: int

    def needed(self, precision: str, tokens: int) -> int:
        """Return the bytes to run at `precision` with `tokens` in the cache, the engine itself included."""
        return int(getattr(self, precision)) + self.kv_token * tokens + RUNTIME_BYTES


def count_parameters(architecture: str, shape: Shape) -> int:
    """Return the parameters of a model of this family and shape, vision tower included.

    Raises:
        KeyError: there is no formula for `architecture`.
    """
    return _FORMULAS[architecture](shape) + shape.vision


def memory_of(parameters: int, shape: Shape) -> Memory:
    """Return what the text part of a model takes in memory.

    int8 is one byte a weight and one fp16 scale a row; int4 is four bits and one fp16 scale a group of 128, with token
    embeddings and output layer kept at int8 (NNCF's and llama.cpp's habit: they are the sensitive ones).
    """
    text = parameters - shape.vision
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    inner = max(text - embeddings, 0)
    int8 = text * (1 + 2 / shape.hidden)
    int4 = inner * (0.5 + 2 / INT4_GROUP) + embeddings * (1 + 2 / shape.hidden)
    return Memory(2 * text, round(int8), round(int4), kv_bytes_per_token(shape))


def kv_bytes_per_token(shape: Shape, *, value_bytes: int = 2) -> int:
    """Return the bytes that one token keeps in the cache: keys and values of each layer that decodes.

    Of an encoder-decoder every token of the input (cross-attention) and of the answer (self-attention) keeps as much.
    Sliding windows (Gemma 2, Mistral) make this an upper bound. An encoder keeps nothing; its shape says so by
    `kv_heads` = 0.
    """
    layers = shape.decoder_layers or shape.layers
    return 2 * layers * shape.keys * value_bytes


def stored_bytes(parameters: int, stored: str) -> int:
    """Return the bytes of the weight files, from the type that they are stored in."""
    return parameters * _VALUE_BYTES[stored]


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """Read the shape in a config.json, None when numbers are missing; an encoder gets `kv_heads` = 0."""
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)
    names = {
        "hidden": ("hidden_size", "d_model", "dim"),
        "layers": ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers"),
        "heads": ("num_attention_heads", "encoder_attention_heads", "num_heads", "n_heads"),
        "ffn": ("intermediate_size", "encoder_ffn_dim", "d_ff", "hidden_dim"),
        "vocabulary": ("vocab_size",),
    }
    found = {field: next((text[key] for key in keys if text.get(key)), None) for field, keys in names.items()}
    if not all(isinstance(value, int) and value > 0 for value in found.values()):
        return None
    numbers: dict[str, Any] = {key: int(value) for key, value in found.items() if value is not None}
    decoder = text.get("decoder_layers") or (text.get("num_decoder_layers") or numbers["layers"]) * bool(
        config.get("is_encoder_decoder")
    )
    writes = bool(config.get("is_encoder_decoder")) or config.get("model_type") in DECODERS
    return Shape(
        **numbers,
        kv_heads=int(text.get("num_key_value_heads") or numbers["heads"]) if writes else 0,
        head_dim=int(text.get("head_dim") or text.get("d_kv") or numbers["hidden"] // numbers["heads"]),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        decoder_layers=int(decoder) if config.get("is_encoder_decoder") else 0,
    )


def _embeddings(shape: Shape) -> int:
    return shape.vocabulary * shape.hidden * (1 if shape.tied else 2)


def _rotary(shape: Shape, *, mlp: int, norms: int, bias: int = 0, last_norm: int = 1) -> int:
    """Count a decoder: projections, `mlp` and `bias` a layer, `norms` vectors a layer, the last norm, embeddings."""
    attention = 2 * shape.hidden * (shape.queries + shape.keys)
    layer = attention + mlp + norms * shape.hidden + bias
    return shape.layers * layer + last_norm * shape.hidden + _embeddings(shape)


def _llama(s: Shape) -> int:
    return _rotary(s, mlp=3 * s.hidden * s.ffn, norms=2)


def _qwen2(s: Shape) -> int:
    return _rotary(s, mlp=3 * s.hidden * s.ffn, norms=2, bias=s.queries + 2 * s.keys)


def _gemma2(s: Shape) -> int:
    return _rotary(s, mlp=3 * s.hidden * s.ffn, norms=4)


def _stablelm(s: Shape) -> int:
    return _rotary(s, mlp=3 * s.hidden * s.ffn, norms=4, last_norm=2)  # LayerNorm: weight and bias


def _biased_mlp(s: Shape) -> int:
    return 2 * s.hidden * s.ffn + s.ffn + s.hidden


def _starcoder2(s: Shape) -> int:
    bias = s.queries + 2 * s.keys + s.hidden
    return _rotary(s, mlp=_biased_mlp(s), norms=4, bias=bias, last_norm=2)


def _phi(s: Shape) -> int:
    bias = s.queries + 2 * s.keys + s.hidden
    return _rotary(s, mlp=_biased_mlp(s), norms=2, bias=bias, last_norm=2) + s.vocabulary  # the output layer's bias


def _attention(s: Shape) -> int:
    return 4 * (s.hidden * s.hidden + s.hidden)


def _encoder_layers(s: Shape) -> int:
    return s.layers * (_attention(s) + _biased_mlp(s) + 4 * s.hidden)


def _token_embeddings(s: Shape) -> int:
    return (s.vocabulary + s.positions + s.types) * s.hidden + 2 * s.hidden


def _bert(s: Shape) -> int:
    return _token_embeddings(s) + _encoder_layers(s) + s.hidden * s.hidden + s.hidden  # with the pooler


def _distilbert(s: Shape) -> int:
    return _token_embeddings(s) + _encoder_layers(s)


def _deberta(s: Shape) -> int:
    # `positions` are relative ones: a table of their own with a norm, shared by all layers.
    return (s.vocabulary + s.types) * s.hidden + 2 * s.hidden + _encoder_layers(s) + (s.positions + 2) * s.hidden


def _modernbert(s: Shape) -> int:
    layer = 4 * s.hidden * s.hidden + 3 * s.hidden * s.ffn + 2 * s.hidden
    # Norms have no bias, and the first layer has none before its attention (the embeddings are normed already).
    return s.vocabulary * s.hidden + s.hidden + s.layers * layer  # one norm less, and the last norm


def _t5(s: Shape) -> int:
    attention = 4 * s.hidden * s.queries
    ffn = (3 if s.gated else 2) * s.hidden * s.ffn
    encoder = s.layers * (attention + ffn + 2 * s.hidden)
    decoder = s.decoder_layers * (2 * attention + ffn + 3 * s.hidden)
    relative = 2 * 32 * s.heads  # 32 buckets of distance, in the first layer of each side
    return encoder + decoder + relative + 2 * s.hidden + _embeddings(s)


def _bart_like(s: Shape, *, norms: int) -> int:
    decoder = s.decoder_layers * (2 * _attention(s) + _biased_mlp(s) + 6 * s.hidden)
    sides = 2 * s.positions * s.hidden + norms * 2 * s.hidden
    return _embeddings(s) + _encoder_layers(s) + decoder + sides


def _marian(s: Shape) -> int:
    return _bart_like(s, norms=0)


def _bart(s: Shape) -> int:
    return _bart_like(s, norms=2)  # after the embeddings of each side


def _pegasus(s: Shape) -> int:
    return _bart_like(s, norms=2)  # after the last layer of each side


def _mbart(s: Shape) -> int:
    return _bart_like(s, norms=4)  # as BART and as Pegasus


_FORMULAS: dict[str, Callable[[Shape], int]] = {
    "llama": _llama, "mistral": _llama, "ministral3": _llama, "mistral3": _llama, "qwen2": _qwen2, "gemma2": _gemma2,
    "phi": _phi, "stablelm": _stablelm, "starcoder2": _starcoder2,
    "bert": _bert, "roberta": _bert, "xlm-roberta": _bert, "camembert": _bert, "distilbert": _distilbert,
    "deberta-v2": _deberta, "modernbert": _modernbert,
    "t5": _t5, "marian": _marian, "bart": _bart, "mbart": _mbart, "pegasus": _pegasus,
}  # fmt: skip
