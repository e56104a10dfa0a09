"""Time to a given dev accuracy on BANKING77: our fine-tuning against transformers' Trainer, in one run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import sets
from run import data_folder, say

MINUTES = 45
WHAT = (
    "Wall time of fine-tuning all-MiniLM-L6-v2 on BANKING77 until dev accuracy reaches ours - 0.2 points, evaluation "
    "excluded: alambic against transformers' Trainer (fp32, batch 32, best of three learning rates)"
)
_RATES = (1e-4, 2e-4, 5e-5)
_EPOCHS = 5
_MARGIN = 0.002


def run(store: Any) -> str:
    """Train ours, then Trainer at each rate until it is there, or slower than its best so far."""
    ours = store.part("alambic", _ours)
    target = ours["best"] - _MARGIN
    ours_seconds = _reached(ours["curve"], target)
    rows = [("alambic", ours_seconds, ours["best"])]
    best: float | None = None
    for rate in _RATES:
        name = f"trainer-{rate:g}"
        result = store.part(name, lambda rate=rate, best=best: _trainer(rate, target, best))
        seconds = _reached(result["curve"], target)
        rows.append((f"Trainer, rate {rate:g}", seconds, max(p["dev"] for p in result["curve"])))
        best = min((s for s in (best, seconds) if s is not None), default=None)
    lines = [f"Target: dev accuracy {100 * target:.2f} %, n = {ours['n_dev']:,}, one run each, seed 0.", ""]
    lines += ["| what | seconds to target | best dev accuracy seen % |", "|---|---|---|"]
    for name, seconds, top in rows:
        lines.append(f"| {name} | {'not reached' if seconds is None else f'{seconds:.0f}'} | {100 * top:.2f} |")
    if best is not None and ours_seconds is not None:
        lines += ["", f"Ratio: {best / ours_seconds:.2f} times faster."]
    lines += ["", f"A rate is given up after {_EPOCHS} epochs, or once slower than the best rate before it."]
    return "\n".join(lines)


def _reached(curve: list[dict[str, float]], target: float) -> float | None:
    return next((p["seconds"] for p in curve if p["dev"] >= target), None)


def _rows() -> Any:
    from alambic.data.split import split
    from alambic.task import DataSpec

    train, _, test = sets.load(data_folder(), "banking77")
    return split(train, None, test, spec=DataSpec(train="banking77"), seed=0, lock=None)


def _ours() -> dict[str, Any]:
    """Fine-tune with the defaults; dev scores are timed apart."""
    from alambic.events import drain
    from alambic.model.bases import resolve
    from alambic.train import finetune as module

    rows = _rows()
    curve: list[dict[str, float]] = []
    began = time.perf_counter()
    spent = [0.0]
    score = module._Run._score

    def timed(self: Any) -> float:
        start = time.perf_counter()
        value = score(self)
        spent[0] += time.perf_counter() - start
        curve.append({"seconds": time.perf_counter() - began - spent[0], "dev": value})
        say(f"  alambic {curve[-1]['seconds']:.0f} s: {value:.4f}")
        return value

    module._Run._score = timed  # type: ignore[method-assign]
    base = resolve("all-minilm-l6-v2")
    with tempfile.TemporaryDirectory() as folder:
        params = module.FinetuneParams(evaluations=4, patience=99)
        result = drain(module.finetune(base, rows.train, rows.dev, params=params, out=Path(folder) / "model"))
    return {"curve": curve, "best": result.best_dev, "n_dev": len(rows.dev)}


def _trainer(rate: float, target: float, limit: float | None) -> dict[str, Any]:
    """Fine-tune as transformers' documentation does, until the target or the limit."""
    import numpy as np
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from alambic.model.bases import resolve

    rows = _rows()
    base = resolve("all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=len(rows.train.labels))

    def encode(part: Any) -> list[dict[str, Any]]:
        ids = tokenizer(part.texts, truncation=True, max_length=256, padding=False)["input_ids"]
        return [{"input_ids": i, "labels": t[0]} for i, t in zip(ids, part.targets(), strict=True)]

    curve: list[dict[str, float]] = []
    state = {"began": 0.0, "spent": 0.0}
    every = max(1, len(rows.train) // 32 // 4)

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            state["began"] = time.perf_counter()

        def on_step_end(self, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> Any:
            if trainer_state.global_step % every:
                return control
            start = time.perf_counter()
            value = _accuracy(model, rows.dev, tokenizer)
            state["spent"] += time.perf_counter() - start
            seconds = time.perf_counter() - state["began"] - state["spent"]
            curve.append({"seconds": seconds, "dev": value})
            say(f"  Trainer {rate:g} {seconds:.0f} s: {value:.4f}")
            control.should_training_stop = value >= target or (limit is not None and seconds > limit)
            return control

    def _accuracy(model: Any, part: Any, tokenizer: Any) -> float:
        model.eval()
        hits = []
        with torch.inference_mode():
            for i in range(0, len(part), 64):
                batch = tokenizer(part.texts[i : i + 64], return_tensors="pt", padding=True, truncation=True)
                hits += list(
                    model(**batch).logits.argmax(1).numpy() == np.array([t[0] for t in part.targets()[i : i + 64]])
                )
        model.train()
        return float(np.mean(hits))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=rate,
            per_device_train_batch_size=32,
            num_train_epochs=_EPOCHS,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            seed=0,
            use_cpu=True,
            dataloader_num_workers=0,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encode(rows.train),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Watch()],
        )
        trainer.train()
    return {"curve": curve}
