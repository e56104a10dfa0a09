"""What differs between the families in GGUF: architecture name, tensor transforms and metadata. One entry a family.

The names of tensors come from the map of the `gguf` package; the rest is what llama.cpp's graph of each family expects
(https://github.com/ggml-org/llama.cpp, `src/models`), and every entry is proven by equal logits in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.errors import PackError

Array = NDArray[np.float32]
Config = Mapping[str, Any]
Transform = Callable[[str, Array, Config], Array]
_LLAMA3 = "llama3"


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        architecture: its name in llama.cpp.
        transform: changes a tensor, known by its name in the base, where llama.cpp stores it otherwise.
        metadata: gives the keys that only this family has, as `(name, value)`; names without the architecture.
        rms: normalises by the root mean square (LayerNorm otherwise).
        windowed: llama.cpp reads this family with its sliding window; False: the window bounds the context instead.
        activations: of the feed-forward layers, those that llama.cpp computes for this family.
    """

    architecture: str
    transform: Transform
    metadata: Callable[[Config], Iterator[tuple[str, Any]]]
    rms: bool = True
    windowed: bool = False
    activations: tuple[str, ...] = ("silu", "swish")


def family_of(kind: str) -> Family:
    """Return the family of `model_type`.

    Raises:
        PackError: GGUF is not written for it.
    """
    if kind not in FAMILIES:
        raise PackError(f"model_type {kind!r} has no GGUF form here", hint="allowed: " + ", ".join(FAMILIES))
    return FAMILIES[kind]


def metadata(family: Family, config: Config, *, context_tokens: int) -> dict[str, Any]:
    """Return the keys of `config` under their GGUF names (without the architecture); whole numbers are uint32.

    Raises:
        PackError: the configuration asks for what llama.cpp's graph of this family does not do.
    """
    activation = str(config.get("hidden_activation") or config.get("hidden_act") or family.activations[0])
    if activation not in family.activations:
        raise PackError(
            f"hidden_act {activation!r}: llama.cpp computes {family.architecture} with {family.activations[0]!r}",
            hint="pack this model for OpenVINO or as safetensors",
        )
    heads = int(config["num_attention_heads"])
    found: dict[str, Any] = {
        "vocab_size": int(config["vocab_size"]),
        "context_length": _bounded(family, config, context_tokens),
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "rope.dimension_count": int(head_width(config) * float(rope_of(config).get("partial_rotary_factor", 1.0))),
        "rope.freq_base": float(rope_of(config).get("rope_theta", 10_000.0)),
    }
    epsilon = next((config[k] for k in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon") if config.get(k)), None)
    if epsilon is None:
        raise PackError("config.json states no epsilon of the norms (rms_norm_eps, layer_norm_eps, norm_epsilon)")
    found["attention.layer_norm_rms_epsilon" if family.rms else "attention.layer_norm_epsilon"] = float(epsilon)
    found.update(_scaling(config))
    found.update(family.metadata(config))
    return found


def head_width(config: Config) -> int:
    """Return the width of one attention head."""
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def rope_of(config: Config) -> dict[str, Any]:
    """Return the rotary parameters: one object in new configurations, spread over several keys in older ones."""
    old = dict(config.get("rope_scaling") or {})
    new = dict(config.get("rope_parameters") or {})
    found = {**old, **new}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in found and config.get(key) is not None:
            found[key] = config[key]
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    return found


def rope_factors(config: Config) -> Array | None:
    """Return what each rotary frequency is divided by (Llama 3), float32 [D / 2]; None: nothing is.

    Low frequencies are stretched by `factor`, high ones kept, those between blended
    (https://github.com/meta-llama/llama-models, `apply_scaling`).
    """
    rope = rope_of(config)
    if rope["rope_type"] != _LLAMA3:
        return None
    width, base = head_width(config), float(rope.get("rope_theta", 10_000.0))
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    before = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi * base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    smooth = (before / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < before / high, 1.0, np.where(wavelength > before / low, factor, blended))
    return factors.astype(np.float32)


def _bounded(family: Family, config: Config, context_tokens: int) -> int:
    """Bound the context by a window that llama.cpp does not apply: inside of it both read the same."""
    window = config.get("sliding_window")
    used = window and config.get("use_sliding_window", True) and not family.windowed
    return min(context_tokens, int(window)) if used and window else context_tokens


def _scaling(config: Config) -> dict[str, Any]:
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind in ("default", _LLAMA3):  # Llama 3's own is a tensor of factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind != "yarn":
        raise PackError(f"rope_type {kind!r} has no GGUF form here", hint="allowed: default, linear, llama3, yarn")
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
    }
    if rope.get("attention_factor") is not None:
        raise PackError("rope attention_factor of its own has no GGUF form here", hint="leave it out of config.json")
    for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if rope.get(key) is not None:
            found[f"rope.scaling.{name}"] = float(rope[key])
    return found


def _as_is(name: str, tensor: Array, config: Config) -> Array:
    return tensor


def _paired(name: str, tensor: Array, config: Config) -> Array:
    """Reorder the rows of Q and K: transformers rotates halves of a head, llama.cpp neighbouring pairs."""
    heads = int(config["num_attention_heads"])
    if ".k_proj." in name:
        heads = int(config.get("num_key_value_heads") or heads)
    elif ".q_proj." not in name:
        return tensor
    rest = tensor.shape[1:]
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest)  # heads, half, D / 2, H
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(tensor.shape))


def _norm_plus_one(name: str, tensor: Array, config: Config) -> Array:
    """Gemma multiplies by 1 + weight; llama.cpp by the weight."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


def _nothing(config: Config) -> Iterator[tuple[str, Any]]:
    yield from ()


def _gemma2(config: Config) -> Iterator[tuple[str, Any]]:
    # llama.cpp scales the scores by the width of a head for all sizes but 27B.
    if float(config.get("query_pre_attn_scalar", 256)) != head_width(config):
        raise PackError(
            f"query_pre_attn_scalar is {config.get('query_pre_attn_scalar')}, and llama.cpp scales by the width of a "
            f"head, {head_width(config)}"
        )
    yield "attn_logit_softcapping", float(config["attn_logit_softcapping"])
    yield "final_logit_softcapping", float(config["final_logit_softcapping"])
    yield "attention.sliding_window", int(config["sliding_window"])


def _ministral3(config: Config) -> Iterator[tuple[str, Any]]:
    rope = rope_of(config)
    if rope.get("mscale_all_dim") is not None:
        yield "rope.scaling.yarn_log_multiplier", float(rope["mscale_all_dim"])
    if rope.get("llama_4_scaling_beta"):
        yield "attention.temperature_scale", float(rope["llama_4_scaling_beta"])


def _phi2(config: Config) -> Iterator[tuple[str, Any]]:
    if config.get("qk_layernorm"):
        raise PackError("qk_layernorm: llama.cpp's graph of phi-2 has no norm of queries and keys")
    yield from ()


def _stablelm(config: Config) -> Iterator[tuple[str, Any]]:
    if config.get("qk_layernorm"):
        raise PackError("qk_layernorm: StableLM with a norm of queries and keys has no GGUF form here")
    yield "use_parallel_residual", bool(config.get("use_parallel_residual"))


_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # names of one function; llama.cpp's GELU
FAMILIES: dict[str, Family] = {
    "gemma2": Family("gemma2", _norm_plus_one, _gemma2, windowed=True, activations=_TANH),
    "llama": Family("llama", _paired, _nothing),
    "ministral3": Family("mistral3", _paired, _ministral3),
    "mistral": Family("llama", _paired, _nothing),
    "phi": Family("phi2", _as_is, _phi2, rms=False, activations=_TANH),
    "qwen2": Family("qwen2", _as_is, _nothing),
    "stablelm": Family("stablelm", _as_is, _stablelm, rms=False),
    "starcoder2": Family("starcoder2", _as_is, _nothing, rms=False, activations=_TANH),
}
