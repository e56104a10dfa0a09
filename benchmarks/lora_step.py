"""A LoRA step on the CPU: ours against a plain loop of transformers and PEFT, in one process, one after the other.

Qwen2.5-0.5B's configuration with random weights in bf16 (float32 where the CPU has no bf16), rank 16 on all linear
layers, AdamW, the same rows. The plain loop pads its batch and lets transformers compute the loss; it is timed with
adapters in float32 (PEFT's default) and in the type of the model, and compared where it is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

MINUTES = 22
WHAT = (
    "Time of one LoRA training step at the Qwen2.5-0.5B shape (random weights) on the CPU, against a plain "
    "transformers + PEFT loop of the same dtype, rows and checkpointing, interleaved in one run"
)
_ROUNDS = 8  # timed, after one that warms up
_RANK = 16
# Name: rows of one step as (tokens of prompt, tokens of answer).
_SETS = {
    "8 rows of 256, half learnt": tuple((128, 128) for _ in range(8)),
    "8 rows of 64 to 512, a third learnt": tuple((n * 2 // 3, n - n * 2 // 3)
                                                  for n in (64, 96, 128, 160, 224, 288, 384, 512)),
}  # fmt: skip

Step = Callable[[], float]


def run(store: Any) -> str:
    """Time the steps, and report medians and the ratio of medians with the range of the rounds' own ratios."""
    lines = ["| rows a step | layers recomputed | ours s | plain loop s | ours / plain [rounds] | loss apart |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, rows in _SETS.items():
        for recomputed in (False, True):
            part = f"{name}{' recomputed' if recomputed else ''}".replace(" ", "-").replace(",", "")
            found = store.part(part, lambda rows=rows, recomputed=recomputed: _times(rows, recomputed))
            ours, plain = found["ours"], found["plain"]
            ratios = [one / two for one, two in zip(ours, plain, strict=True)]
            ratio = statistics.median(ours) / statistics.median(plain)
            lines.append(
                f"| {name} | {'yes' if recomputed else 'no'} | {statistics.median(ours):.2f} | "
                f"{statistics.median(plain):.2f} (adapters in {found['adapters']}) | {ratio:.2f} "
                f"[{min(ratios):.2f}, {max(ratios):.2f}] | {found['apart']:.4f} |"
            )
    notes = (
        f"n = {_ROUNDS} rounds each, order turned round every time, after one round to warm up; the dtype is "
        f"{found['dtype']}, on {found['threads']} threads. Loss apart: the largest difference of the two losses over "
        "all steps; both train the same adapters on the same rows. Bar: ours takes at most 0.8 of the time."
    )
    return "\n".join([*lines, "", notes])


def _times(rows: tuple[tuple[int, int], ...], recomputed: bool) -> dict[str, Any]:
    import torch

    from alambic.train.precision import has_bf16

    dtype = torch.bfloat16 if has_bf16() else torch.float32
    samples = _samples(rows)
    steps = {
        "ours": _ours(samples, dtype, recomputed),
        "float32": _plain(samples, dtype, recomputed, own_dtype=True),
        "the model's type": _plain(samples, dtype, recomputed, own_dtype=False),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    apart = 0.0
    for number in range(_ROUNDS + 1):
        losses = {}
        for name in list(steps) if number % 2 else list(reversed(steps)):
            began = time.perf_counter()
            losses[name] = steps[name]()
            times[name].append(time.perf_counter() - began)
        apart = max(apart, abs(losses["ours"] - losses["float32"]))
    kept = {name: found[1:] for name, found in times.items()}
    faster = min(("float32", "the model's type"), key=lambda name: statistics.median(kept[name]))
    return {
        "ours": kept["ours"], "plain": kept[faster], "adapters": faster, "apart": apart,
        "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _samples(rows: tuple[tuple[int, int], ...]) -> list[Any]:
    import numpy as np

    from alambic.train.packing import Sample

    rng = np.random.default_rng(0)
    return [
        Sample(tuple(rng.integers(0, 150_000, a + b).tolist()), (False,) * a + (True,) * b, said_bytes=4 * b)
        for a, b in rows
    ]


def _model(dtype: Any) -> Any:
    import torch
    import transformers

    from alambic.model.clone import ORIGINALS

    values = {k: v for k, v in ORIGINALS["qwen2.5-0.5b"].config.items() if k != "model_type"}
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**values)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def _ours(samples: list[Any], dtype: Any, recomputed: bool) -> Step:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    from alambic.model.decoder import Decoder, DecoderSpec
    from alambic.render import PLAIN_TEMPLATE, ChatTemplate
    from alambic.train.lora import add_lora
    from alambic.train.sft_model import Learner

    model = _model(dtype)
    spec = DecoderSpec("qwen2", 32768, model.num_parameters())
    decoder = Decoder(model, Tokenizer(BPE()), ChatTemplate(PLAIN_TEMPLATE), spec, ends=(0,))
    add_lora(model, method="lora", rank=_RANK, alpha=2.0 * _RANK, head=decoder.head, seed=0)
    learner = Learner(decoder, method="lora", packed=True)
    learner.checkpointing(recomputed)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    count = sum(sample.n_learnt for sample in samples)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = learner.loss(samples) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _plain(samples: list[Any], dtype: Any, recomputed: bool, *, own_dtype: bool) -> Step:
    """Write the loop as most people do; `own_dtype` leaves adapters in float32, as PEFT makes them."""
    import peft
    import torch

    model = _model(dtype)
    config = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=own_dtype)
    if recomputed:
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    width = max(len(sample.ids) for sample in samples)
    ids, mask = torch.zeros(len(samples), width, dtype=torch.long), torch.zeros(len(samples), width, dtype=torch.long)
    labels = torch.full((len(samples), width), -100)
    for i, sample in enumerate(samples):
        row = torch.tensor(sample.ids)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, : len(row)] = torch.where(torch.tensor(sample.learnt), row, -100)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = wrapped(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step
