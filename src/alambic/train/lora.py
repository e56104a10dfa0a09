"""Low-rank adapters through PEFT: LoRA, DoRA, QLoRA; with one multiplication chain of our own for plain LoRA.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353;
QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. All linear layers of the body get an adapter: fewer of
them is what loses to full training (Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/).
"""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alambic._extras import load
from alambic.errors import TrainError
from alambic.model.bases import read_json
from alambic.model.decoder import Decoder
from alambic.model.seq2seq import FAMILIES as SEQ2SEQ

Method = Literal["full", "lora", "dora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "dora", "qlora")


def targets(model: nn.Module, head: nn.Module | None) -> list[str]:
    """Return the last names of all linear layers of `model` but `head`."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(found)


def add_lora(
    model: nn.Module,
    *,
    method: Method,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    head: nn.Module | None = None,
    seed: int = 0,
    seq2seq: bool = False,
) -> Any:
    """Freeze `model`, put adapters in all its linear layers (in place), and return PEFT's model around it.

    Args:
        model: of transformers.
        method: ``lora``, ``dora`` or ``qlora``.
        rank: width of the adapters.
        alpha: the adapters' product is multiplied by `alpha / rank`.
        dropout: of the adapters' input.
        head: the output layer, left as it is.
        seed: of the random half of each adapter; the other is zero, so the model starts out unchanged.
        seq2seq: it is an encoder-decoder.

    Raises:
        MissingExtra: PEFT is not installed.
    """
    peft = load("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets(model, head), bias="none",
        use_dora=method == "dora", task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        exclude_modules=r".*lm_head",
    )  # fmt: skip
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        wrapped = peft.get_peft_model(model, config)
    finally:
        torch.random.set_rng_state(generator)
    if method == "lora" and not dropout:
        chain_products(model)
    return wrapped


def chain_products(model: nn.Module) -> int:
    """Let each plain LoRA layer of `model` compute in one chain of in-place products; return how many do.

    PEFT's own way makes three full-size intermediate results a layer, forward and backward, and computes the adapters
    in float32 beside a bf16 base.
    """
    layer = load("peft.tuners.lora").Linear
    count = 0
    for module in model.modules():
        if isinstance(module, layer) and type(module.get_base_layer()) is nn.Linear:
            module.forward = types.MethodType(_chained, module)
            count += 1
    return count


def _chained(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = self.get_base_layer()
    if self.disable_adapters or self.merged:
        out: Tensor = base(x)
        return out
    name = self.active_adapters[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    out = LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])
    return out


class LoraProduct(torch.autograd.Function):  # type: ignore[misc]
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with W frozen; only x and x Aᵀ are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return y [..., O] for x [..., I]."""
        dtype = weight.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # T, I
        low, high = a.to(dtype), b.to(dtype) * scale
        inner = flat @ low.T  # T, r
        out = torch.mm(flat, weight.T) if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(inner, high.T)
        ctx.save_for_backward(flat, inner, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of x, A and B."""
        flat, inner, weight, a, b = ctx.saved_tensors
        dtype = weight.dtype
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(dtype)  # T, O
        through = torch.mm(grad, b.to(dtype)) * ctx.scale  # T, r
        to_b = (torch.mm(inner.T, grad) * ctx.scale).T.to(b.dtype)  # O, r
        to_a = torch.mm(through.T, flat).to(a.dtype)
        to_x = None
        if ctx.needs_input_grad[0]:  # not the first layer of a frozen table
            to_x = torch.mm(grad, weight)
            to_x.addmm_(through, a.to(dtype))
            to_x = to_x.view(*grads[0].shape[:-1], -1)
        return to_x, None, None, to_a, to_b, None


def check_method(method: str, *, device: torch.device) -> None:
    """Refuse a method that this machine cannot run.

    Raises:
        TrainError: QLoRA without a GPU or without bitsandbytes, or an unknown name.
    """
    if method not in METHODS:
        raise TrainError(f"method {method!r}; allowed: auto, {', '.join(METHODS)}")
    if method != "qlora":
        return
    why = []
    if device.type != "cuda":
        why.append(f"a CUDA GPU (training runs on {device.type})")
    if importlib.util.find_spec("bitsandbytes") is None:
        why.append("the package bitsandbytes")
    if why:
        raise TrainError(
            f"method 'qlora' needs {' and '.join(why)}",
            hint='method = "lora" gives the same adapters; on a CPU 4-bit weights would only cost time',
        )


def load_in_4_bits(folder: Path, *, compute: torch.dtype) -> Decoder:
    """Open a decoder with its linear layers in NF4 on the GPU of this process, all else in float32 and frozen (QLoRA).

    See `check_method` first.

    Args:
        folder: Model directory or base in Hugging Face layout.
        compute: what the 4-bit weights are unpacked to: bfloat16, or float16 where the GPU has no other.

    Raises:
        TrainError: it is an encoder-decoder.
        BaseModelError: it cannot be loaded.
        MissingExtra: accelerate, bitsandbytes or PEFT is not installed.
    """
    if read_json(folder / "config.json").get("model_type") in SEQ2SEQ:
        raise TrainError(f"{folder}: method 'qlora' is for decoders, and this is an encoder-decoder",
                         hint='method = "lora"')  # fmt: skip
    load("accelerate")
    load("bitsandbytes")
    bits = load("transformers").BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute,
    )  # fmt: skip
    decoder = Decoder.load(folder, dtype=compute, quantization=bits)
    decoder.model = load("peft").prepare_model_for_kbit_training(decoder.model, use_gradient_checkpointing=False)
    return decoder
