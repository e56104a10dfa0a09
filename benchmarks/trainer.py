"""Fine-tuning as transformers' documentation does it, watched: what `training` compares with."""

from __future__ import annotations

import tempfile
import time
from typing import Any

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

from run import say


class Watch(TrainerCallback):
    """Scores dev four times an epoch, off the clock, and stops at the target or at the time limit."""

    def __init__(self, score: Any, *, every: int, target: float, limit: float | None) -> None:
        self.score, self.every, self.target, self.limit = score, every, target, limit
        self.began = self.spent = 0.0
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Score when it is time to."""
        if state.global_step % self.every:
            return control
        start = time.perf_counter()
        value = self.score()
        self.spent += time.perf_counter() - start
        seconds = time.perf_counter() - self.began - self.spent
        self.curve.append({"seconds": seconds, "dev": value})
        say(f"  Trainer {args.learning_rate:g} {seconds:.0f} s: {value:.4f}")
        control.should_training_stop = value >= self.target or (self.limit is not None and seconds > self.limit)
        return control


def train(
    base: Any, fit: Any, dev: Any, *, rate: float, epochs: int, target: float, limit: float | None
) -> list[dict[str, float]]:
    """Return the dev scores of one run with the seconds of training before each."""
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=len(fit.labels))
    watch = Watch(
        lambda: _accuracy(model, dev, tokenizer), every=max(1, len(fit) // 32 // 4), target=target, limit=limit
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(folder, rate, epochs),
            train_dataset=_encoded(fit, tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[watch],
        )
        trainer.train()
    return watch.curve


def _arguments(folder: str, rate: float, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        per_device_train_batch_size=32,
        num_train_epochs=epochs,
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


def _encoded(part: Any, tokenizer: Any) -> list[dict[str, Any]]:
    ids = tokenizer(part.texts, truncation=True, max_length=256, padding=False)["input_ids"]
    return [{"input_ids": i, "labels": t[0]} for i, t in zip(ids, part.targets(), strict=True)]


def _accuracy(model: Any, part: Any, tokenizer: Any) -> float:
    model.eval()
    answers = []
    with torch.inference_mode():
        for i in range(0, len(part), 64):
            batch = tokenizer(part.texts[i : i + 64], return_tensors="pt", padding=True, truncation=True)
            answers += model(**batch).logits.argmax(1).tolist()
    model.train()
    return float(np.mean([answer == truth[0] for answer, truth in zip(answers, part.targets(), strict=True)]))
