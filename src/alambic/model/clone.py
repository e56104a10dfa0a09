"""Clones: two random layers in the true configuration of a family, for proofs where no real weights can be had.

    clone("qwen2.5-0.5b", Path("clone"), tokenizers=Path("../shared/data/tokenizers"), width=64)

A clone writes nonsense, but it is of the family's very shape: what trains it, exports it and runs it, does so with the
real one. Norms and biases are random too, so that a converter that forgets one is found out.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from alambic.errors import BaseModelError, nearest
from alambic.model.clone_tokenizers import Made, make_tokenizer
from alambic.model.decoder import save_tokenizer
from alambic.model.encoder import _quiet as quiet
from alambic.model.seq2seq import FAMILIES as SEQ2SEQ


@dataclass(frozen=True)
class Original:
    """The published configuration of a model.

    Attributes:
        hub: where it is published.
        config: what differs from the defaults of its class in transformers; `model_type` names the class.
        tokenizer: folder of the real tokenizer among the public data sets; None: there is none.
        kind: of tokenizer, for a trained one: ``byte-bpe``, ``spm-bpe`` or ``unigram``.
        stands_in: the tokenizer of that folder is another model's, of the same kind.
        extra: tokens added behind the tokenizer's own.
    """

    hub: str
    config: dict[str, Any]
    tokenizer: str | None = None
    kind: str = "byte-bpe"
    stands_in: bool = False
    extra: tuple[str, ...] = field(default=(), repr=False)


_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0,
                "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}  # fmt: skip
_MINISTRAL_ROPE = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                   "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                   "llama_4_scaling_beta": 0.1}  # fmt: skip
_SPACES = tuple(" " * n for n in range(31, 1, -1)) + tuple("\t" * n for n in range(9, 1, -1))


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **rest: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, **rest}  # fmt: skip


# From the config.json of each, as published.
ORIGINALS: dict[str, Original] = {
    "llama-3.2-1b": Original("meta-llama/Llama-3.2-1B", _llama(
        2048, 8192, 16, 32, 8, 128256, head_dim=64, rope_parameters=_LLAMA3_ROPE, rms_norm_eps=1e-5,
        max_position_embeddings=131072, tie_word_embeddings=True)),
    "llama-3.2-3b": Original("meta-llama/Llama-3.2-3B", _llama(
        3072, 8192, 28, 24, 8, 128256, head_dim=128, rope_parameters=_LLAMA3_ROPE, rms_norm_eps=1e-5,
        max_position_embeddings=131072, tie_word_embeddings=True)),
    "tinyllama-1.1b": Original("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(
        2048, 5632, 22, 32, 4, 32000, rms_norm_eps=1e-5, max_position_embeddings=2048),
        "mistral_v1", "spm-bpe", stands_in=True),
    "deepseek-coder-1.3b": Original("deepseek-ai/deepseek-coder-1.3b-base", _llama(
        2048, 5504, 24, 16, 16, 32256, max_position_embeddings=16384, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}), "deepseek-coder"),
    "xgen-7b": Original("Salesforce/xgen-7b-8k-base", _llama(
        4096, 11008, 32, 32, 32, 51200, max_position_embeddings=8192, rms_norm_eps=1e-6),
        "gpt2", extra=_SPACES),
    "qwen2.5-0.5b": Original("Qwen/Qwen2.5-0.5B", {**_llama(
        896, 4864, 24, 14, 2, 151936, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}), "model_type": "qwen2"}, "qwen2.5"),
    "qwen2.5-1.5b": Original("Qwen/Qwen2.5-1.5B", {**_llama(
        1536, 8960, 28, 12, 2, 151936, max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}), "model_type": "qwen2"}, "qwen2.5"),
    "gemma-2-2b": Original("google/gemma-2-2b", {**_llama(
        2304, 9216, 26, 8, 4, 256000, head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6,
        query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        tie_word_embeddings=True), "model_type": "gemma2"}, None, "spm-bpe"),
    "phi-2": Original("microsoft/phi-2", {**_llama(
        2560, 10240, 32, 32, 32, 51200, max_position_embeddings=2048, hidden_act="gelu_new", layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}),
        "model_type": "phi"}, "gpt2", extra=_SPACES),
    "ministral-3-3b": Original("mistralai/Ministral-3-3B-Base-2512", {**_llama(
        3072, 9216, 26, 32, 8, 131072, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144,
        rope_parameters=_MINISTRAL_ROPE, tie_word_embeddings=True), "model_type": "ministral3"}),
    "ministral-8b": Original("mistralai/Ministral-8B-Instruct-2410", {**_llama(
        4096, 12288, 36, 32, 8, 131072, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=32768,
        sliding_window=32768, rope_parameters={"rope_type": "default", "rope_theta": 100000000.0}),
        "model_type": "mistral"}),
    "stablelm-3b": Original("stabilityai/stablelm-3b-4e1t", {**_llama(
        2560, 6912, 32, 32, 32, 50304, max_position_embeddings=4096, layer_norm_eps=1e-5, hidden_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}),
        "model_type": "stablelm"}, "gpt-neox"),
    "starcoder2-3b": Original("bigcode/starcoder2-3b", {**_llama(
        3072, 12288, 30, 24, 2, 49152, max_position_embeddings=16384, norm_epsilon=1e-5, sliding_window=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 999999.4420358813}, tie_word_embeddings=True),
        "model_type": "starcoder2"}, "starcoder2"),
    "t5-small": Original("google-t5/t5-small", {
        "model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": 6,
        "num_heads": 8, "vocab_size": 32128}, None, "unigram"),
    "opus-mt-en-fr": Original("Helsinki-NLP/opus-mt-en-fr", {
        "model_type": "marian", "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 59514,
        "activation_function": "swish", "max_position_embeddings": 512, "scale_embedding": True,
        "static_position_embeddings": True}, None, "unigram"),
    "bart-base": Original("facebook/bart-base", {
        "model_type": "bart", "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "vocab_size": 50265,
        "max_position_embeddings": 1024}),
    "barthez": Original("moussaKam/barthez", {
        "model_type": "mbart", "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "vocab_size": 50002,
        "max_position_embeddings": 1024}, None, "unigram"),
    "pegasus-xsum": Original("google/pegasus-xsum", {  # the shape of new encoder-decoders too (model.scratch)
        "model_type": "pegasus", "d_model": 1024, "encoder_layers": 16, "decoder_layers": 16, "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096, "encoder_attention_heads": 16, "decoder_attention_heads": 16, "vocab_size": 96103,
        "activation_function": "relu", "max_position_embeddings": 512, "scale_embedding": True}, None, "unigram"),
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Clone:
    """What was made.

    Attributes:
        folder: Hugging Face layout.
        original: whose shape it has.
        real_tokenizer: the tokenizer is the original's own.
        tokenizer: what the tokenizer is, in words.
    """

    folder: Path
    original: Original
    real_tokenizer: bool
    tokenizer: str


def clone(
    name: str, out: Path, *, tokenizers: Path | None = None, layers: int = 2, width: int | None = None, seed: int = 0
) -> Clone:
    """Write a random model of the shape of original `name` as folder `out`, with its tokenizer.

    Args:
        name: a key of `ORIGINALS`.
        out: folder to make; an existing one is replaced.
        tokenizers: folder of tokenizer folders (packed with xz or not); without it, or without the original's own, a
            small one of the same kind is trained and the vocabulary is as small.
        layers: kept of the original's.
        width: hidden size, a multiple of 32 (heads of 16); the original's when None.
        seed: of the weights.

    Raises:
        BaseModelError: the name is unknown, or a file of the tokenizer cannot be read.
    """
    if name not in ORIGINALS:
        raise BaseModelError(f"no original is called {name!r}", hint=nearest(name, ORIGINALS))
    original = ORIGINALS[name]
    values = dict(original.config)
    kind = str(values.pop("model_type"))
    made = make_tokenizer(original.tokenizer, original.kind, tokenizers, extra=original.extra, seq2seq=kind in SEQ2SEQ)
    values |= {key: layers for key in _LAYERS if key in values}
    if width is not None:
        values = _narrowed(values, kind, width)
    known = made.tokenizer.get_vocab_size(with_added_tokens=True)
    if made.trained or known > values["vocab_size"]:
        values["vocab_size"] = -(-known // 64) * 64
    model = _model(kind, values, made, seed=seed)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with quiet():
        model.save_pretrained(out)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)
    _save_tokenizer(made, out, positions=int(values.get("max_position_embeddings", 512)))
    if kind not in SEQ2SEQ:
        record = {"bos_token_id": made.id("bos_token"), "eos_token_id": made.id("eos_token")}
        (out / "generation_config.json").write_text(json.dumps(record), encoding="utf-8")
    real = not made.trained and not original.stands_in
    return Clone(out, original, real, made.what)


def _narrowed(values: dict[str, Any], kind: str, width: int) -> dict[str, Any]:
    """Shrink the hidden sizes, keeping the proportions of heads and inner layers."""
    heads = width // 16
    if kind in SEQ2SEQ:
        inner = {"d_ff": 2 * width, "encoder_ffn_dim": 2 * width, "decoder_ffn_dim": 2 * width, "d_kv": 16}
        counts = {"num_heads": heads, "encoder_attention_heads": heads, "decoder_attention_heads": heads}
        return {**values, "d_model": width, **{k: v for k, v in (inner | counts).items() if k in values}}
    groups = values["num_attention_heads"] // values["num_key_value_heads"]
    inner_size = values["intermediate_size"] / values["hidden_size"] * width
    small = {"hidden_size": width, "intermediate_size": max(32, round(inner_size / 32) * 32),
             "num_attention_heads": heads, "num_key_value_heads": max(1, heads // groups)}  # fmt: skip
    if "head_dim" in values:
        small["head_dim"] = 16
    if "query_pre_attn_scalar" in values:
        small["query_pre_attn_scalar"] = 16
    return values | small


def _model(kind: str, values: dict[str, Any], made: Made, *, seed: int) -> nn.Module:
    width = values.get("hidden_size") or values["d_model"]
    ids = {
        "bos_token_id": made.id("bos_token"),
        "eos_token_id": made.id("eos_token"),
        "pad_token_id": made.id("pad_token"),
    }
    spread = {"init_std" if kind in SEQ2SEQ else "initializer_range": width**-0.5}
    if kind == "t5":
        spread = {"initializer_factor": 1.0}
    if kind in SEQ2SEQ:
        ids["decoder_start_token_id"] = ids["eos_token_id"] if kind in ("bart", "mbart") else ids["pad_token_id"]
        ids["forced_eos_token_id"] = None
    config = transformers.AutoConfig.for_model(kind, **values, **spread, **ids)
    loader = transformers.AutoModelForSeq2SeqLM if kind in SEQ2SEQ else transformers.AutoModelForCausalLM
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = loader.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def _save_tokenizer(made: Made, out: Path, *, positions: int) -> None:
    config: dict[str, Any] = {**made.special, "model_max_length": positions}
    if made.template is not None:
        (out / "chat_template.jinja").write_text(made.template, encoding="utf-8")
    save_tokenizer(made.tokenizer, out, config)
    if made.spm is not None:
        (out / "tokenizer.model").write_bytes(made.spm)
