"""What our French and English decoder is worth: fine-tuned on three tasks against the same recipe from random weights.

Set ALAMBIC_BENCH_BASE to the decoder's folder. The other side has its tokenizer and its shape, and weights drawn at
random; both see the same rows in the same order for the same epochs, each at the peak rate that the product gives its
kind of base. Scores are those of the int8 bundle part, greedy, by `measure_written`; early stopping uses dev, test is
scored once. `speed` is the generation rate of one stream against memory bandwidth divided by the bytes read for a
token, both measured in the same run.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from run import ROOT, data_folder, say

sys.path.insert(0, str(ROOT / "bases" / "recipes"))

MINUTES = 45
WHAT = "our decoder fine-tuned on PIAF, OrangeSum titles and field-service, against random weights; generation speed"
_THREADS = 1  # of training; generation uses two
_CONTEXT = 512
_PROMPT_TOKENS = 400


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: in the table.
        train: most rows to learn.
        test: most rows to score.
        epochs: passes over train.
        max_tokens: of an answer.
        metrics: names of the scores; the first is compared row by row.
        reference: what others published, as it is printed.
    """

    name: str
    train: int
    test: int
    epochs: float
    max_tokens: int
    metrics: tuple[str, ...]
    reference: str


TASKS = (
    Task(
        "piaf",
        2000,
        285,
        2.0,
        40,
        ("token_f1", "squad_em"),
        "CamemBERT, FQuAD+PIAF, on FQuAD dev (another set, extractive): F1 80.6, EM 59.5",
    ),
    Task(
        "orangesum",
        1000,
        200,
        2.0,
        48,
        ("rouge_l", "rouge_1", "rouge_2", "rouge_1_ascii", "rouge_2_ascii", "rouge_l_ascii"),
        "BARThez on OrangeSum abstracts (another task, longer): 31.4 / 12.8 / 22.2 (ROUGE-1/2/L)",
    ),
    Task("field-service", 900, 258, 5.0, 8, ("exact_match",), "none published"),
)
_BASES = ("ours", "random")
_SEEN = (
    "Ours was tuned before on instruction rows, some of them made from the training parts of PIAF and OrangeSum, of "
    "which the other side saw only the rows counted here. It never saw the field-service example."
)


def run(store: Any) -> str:
    """Run every part (resumable), and write the tables."""
    base = _base()
    wanted = os.environ.get("ALAMBIC_BENCH_TASKS", ",".join(task.name for task in TASKS)).split(",")
    unknown = set(wanted) - {task.name for task in TASKS}
    if unknown:
        sys.exit(
            f"ALAMBIC_BENCH_TASKS: no task {', '.join(sorted(unknown))}; known: {', '.join(t.name for t in TASKS)}"
        )
    digest = _digest(base)
    folders = {"ours": base, "random": _random(base, store.folder / f"random-{digest}")}
    results: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        if task.name in wanted:
            for name, folder in folders.items():
                part = f"{task.name}-{name}-{digest}"
                result = store.part(part, lambda t=task, f=folder, p=part: _train_and_score(t, f, store.folder / p))
                results[f"{task.name}-{name}"] = result
    speed = store.part(f"speed-{digest}", lambda: _speed(base, store.folder / "speed"))
    return _page(results, speed)


def _base() -> Path:
    named = os.environ.get("ALAMBIC_BENCH_BASE")
    if not named or not (Path(named) / "config.json").is_file():
        sys.exit("this benchmark needs our decoder: set ALAMBIC_BENCH_BASE to its folder (with config.json)")
    return Path(named).resolve()


def _digest(base: Path) -> str:
    from alambic.model.adapter import model_digest

    return str(model_digest(base))[:12]


def _random(base: Path, out: Path) -> Path:
    """Write the base's twin: its tokenizer, template and shape, weights drawn at random (seed 0)."""
    if (out / "alambic.json").is_file():
        return out
    import torch
    import transformers

    from alambic.model.decoder import save_weights

    beside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(base, beside, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "adapter"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(beside)
    save_weights(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), beside)
    path = beside / "alambic.json"
    record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    # What marks a model as new to the product: the rate and the momentum of its training.
    record["base"] = {"name": "scratch", "source": "scratch", "licence": "none: random weights"}
    path.write_text(json.dumps(record), encoding="utf-8")
    beside.replace(out)
    return out


def chats(task: str) -> dict[str, list[Any]]:
    """Return train, dev and test of a task as conversations, in a fixed order."""
    parts = {"piaf": _piaf, "orangesum": _titles, "field-service": _service}[task]()
    random.Random(0).shuffle(parts["train"])
    return parts


def _piaf() -> dict[str, list[Any]]:
    from alambic.kinds.chat import Chat
    from instructions.sentences import shorten, unglue

    def of(row: dict[str, Any]) -> Any:
        answer = unglue(row["answer"])
        # Rows that are learnt are cut around their answer; of test the whole paragraph is read, answer unseen.
        passage, _ = shorten(unglue(row["context"]), _PROMPT_TOKENS, keep=answer)
        return Chat.of(f"{passage}\n\nQuestion : {unglue(row['question'])}", completion=answer) if passage else None

    def blind(row: dict[str, Any]) -> Any:
        text = f"{unglue(row['context'])}\n\nQuestion : {unglue(row['question'])}"
        return Chat.of(text, completion=unglue(row["answer"]))

    read = {part: _rows("piaf", part) for part in ("train", "dev", "test")}
    return {
        "train": [chat for chat in map(of, read["train"]) if chat],
        "dev": [chat for chat in map(of, read["dev"]) if chat][:120],
        "test": [blind(row) for row in read["test"]],
    }


def _titles() -> dict[str, list[Any]]:
    from alambic.kinds.chat import Chat
    from instructions.sentences import shorten, unglue

    def of(row: dict[str, Any]) -> Any:
        text, _ = shorten(unglue(row["text"]), _PROMPT_TOKENS)  # whole sentences from the beginning
        return Chat.of(f"{text}\n\nTitre :", completion=unglue(row["title"])) if text and row["title"].strip() else None

    train = _rows("orangesum", "train")
    random.Random(0).shuffle(train)
    rows = {"train": train[:1500], "dev": _rows("orangesum", "dev")[:150], "test": _rows("orangesum", "test")}
    found = {part: [chat for chat in map(of, part_rows) if chat] for part, part_rows in rows.items()}
    return {**found, "dev": found["dev"][:120]}


def _service() -> dict[str, list[Any]]:
    import csv

    from alambic.kinds.chat import Chat

    def rows(name: str) -> list[Any]:
        with open(ROOT / "examples" / "field-service" / f"{name}.csv", encoding="utf-8", newline="") as handle:
            return [Chat.of(row["message"], completion=row["intent"]) for row in csv.DictReader(handle)]

    train = rows("train")
    random.Random(1).shuffle(train)
    return {"train": train[:-100], "dev": train[-100:], "test": rows("test")}


def _rows(name: str, part: str) -> list[dict[str, Any]]:
    path = data_folder() / name / f"{part}.jsonl"
    text = path.read_bytes() if path.exists() else lzma.decompress(path.with_suffix(".jsonl.xz").read_bytes())
    return [json.loads(line) for line in text.decode("utf-8").split("\n") if line.strip()]


def _train_and_score(task: Task, base: Path, folder: Path) -> dict[str, Any]:
    """Fine-tune, pack in 8 bits, write the test answers once."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import Progress, drain
    from alambic.kinds.generation import Sampling
    from alambic.measure.written import measure_written
    from alambic.pack.writer_openvino import pack_openvino
    from alambic.train.sft import SftParams, finetune_chats

    folder.mkdir(parents=True, exist_ok=True)
    parts = chats(task.name)
    train, dev, test = parts["train"][: task.train], parts["dev"], parts["test"][: task.test]
    params = SftParams(
        epochs=task.epochs,
        long="leave_out",
        max_tokens=_CONTEXT,
        batch_size=16,
        evaluations=1,
        patience=2,
        seed=0,
        threads=_THREADS,
    )

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and (event.done % 25 == 0 or "dev" in event.values):
            say(f"  {folder.name} {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    result = drain(finetune_chats(base, train, dev, params=params, out=folder / "model"), listen)
    shutil.rmtree(folder / "packed", ignore_errors=True)
    part = drain(pack_openvino(folder / "model", folder / "packed", precision="int8"))
    writer = load_writer(part, folder / "packed", threads=_THREADS)
    try:
        sampling = Sampling(max_tokens=task.max_tokens)
        written = drain(measure_written(writer, test, kind="generate", metrics=task.metrics, sampling=sampling))
    finally:
        writer.close()
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "n": written.n,
        "rows": len(train),
        "left_out": len(result.left_out),
        "errors": len(written.errors),
        "scores": {name: score.to_dict() for name, score in written.scores.items()},
        "each": list(written.row_scores),
        "endings": written.endings,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "rate": result.learning_rate,
        "best_dev": result.best_dev,
        "examples": [[row.expected, row.written] for row in written.worst[:2]],
        "signatures": {name: score.signature for name, score in written.scores.items()},
    }


def _speed(base: Path, folder: Path) -> dict[str, Any]:
    """Time one stream on two cores, and memory of the size of the weights and far over it, in turns."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import drain
    from alambic.kinds.generation import GenerationRequest, Sampling
    from alambic.measure.generation_speed import measure_generation_speed
    from alambic.pack.writer_openvino import pack_openvino

    shutil.rmtree(folder, ignore_errors=True)
    part = drain(pack_openvino(base, folder, precision="int8"))
    # The table of tokens is tied: one row of it is looked up, and all of it is read to choose the next token.
    weight_bytes = (folder / "openvino_model.bin").stat().st_size
    writer = load_writer(part, folder, threads=2)
    # Text to go on with, not a question: a short answer would time the first token alone.
    asked = [f"Séance n° {i}. Le conseil municipal s'est réuni hier soir afin de" for i in range(60)]
    sampling = Sampling(max_tokens=128)
    requests = [GenerationRequest(text=text, sampling=sampling) for text in asked]
    before = bandwidth(weight_bytes), bandwidth(1 << 28)
    try:
        speed = measure_generation_speed(writer, requests, repeats=60, seconds=60)
    finally:
        writer.close()
    after = bandwidth(weight_bytes), bandwidth(1 << 28)
    shutil.rmtree(folder, ignore_errors=True)
    rate = speed.tokens_per_second
    return {
        "weight_bytes": weight_bytes,
        "n": speed.n,
        "tokens_per_second": None if rate is None else rate.to_dict(),
        "tokens": speed.tokens,
        "cached_gb_s": [before[0], after[0]],
        "memory_gb_s": [before[1], after[1]],
    }


def bandwidth(size: int, *, threads: int = 2, repeats: int = 40) -> float:
    """Return how many 10^9 bytes a second `threads` threads read together from `size` bytes in all: the best.

    A sum of 64-bit integers reads each byte once, and numpy lets go of the interpreter while it adds.
    """
    from concurrent.futures import ThreadPoolExecutor
    from time import perf_counter

    each = max(1, size // threads // 8)
    buffers = [np.ones(each, dtype=np.int64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = perf_counter()
            list(pool.map(np.sum, buffers))
            best = min(best, perf_counter() - began)
    return threads * each * 8 / best / 1e9


def paired(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference over the same rows and its 95% interval (paired bootstrap, 5,000 resamples)."""
    difference = np.array(ours, dtype=np.float64) - np.array(other, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(5000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def _page(results: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    lines = [
        "| task | rows | n test | metric | ours [95 %] | random weights [95 %] | difference [95 %] | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        sides = [results.get(f"{task.name}-{name}") for name in _BASES]
        if not all(sides):
            lines.append(f"| {task.name} | | not run | | | | | |")
            continue
        ours, other = sides
        for i, metric in enumerate(task.metrics):
            first = i == 0
            cells = [_cell(side["scores"][metric]) for side in (ours, other)]
            gain = (
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in paired(ours["each"], other["each"])))
                if first
                else ""
            )
            lines.append(
                f"| {task.name if first else ''} | {ours['rows']:,} | {ours['n']:,} | {metric} | {cells[0]} | "
                f"{cells[1]} | {gain} | "
                f"{task.reference if first else ''} |"
            )
    lines += ["", _SEEN, ""]
    lines += ["Scores times 100. " + " ".join(_said(name, result) for name, result in results.items())]
    for metric, text in {m: t for r in results.values() for m, t in r["signatures"].items()}.items():
        lines += ["", f"`{metric}`: {text}"]
    return "\n".join([*lines, "", *_speed_lines(speed)])


def _cell(score: dict[str, Any]) -> str:
    scale = 100.0 / (score["range"][1] or 1.0)
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(scale * score[key] for key in ("value", "low", "high")))


def _said(name: str, result: dict[str, Any]) -> str:
    left = f", {result['left_out']} rows too long and left out" if result["left_out"] else ""
    failed = f", {result['errors']} prompts too long to answer (they count as wrong)" if result["errors"] else ""
    cost = f"{result['tokens']:,} tokens in {result['seconds'] / 60:.0f} min, peak rate {result['rate']:g}"
    return f"{name}: {cost}{left}{failed}."


def _speed_lines(speed: dict[str, Any]) -> list[str]:
    if speed["tokens_per_second"] is None:
        return ["Generation speed: no answer had two tokens."]
    rate, size = speed["tokens_per_second"], speed["weight_bytes"]
    bounds = {
        name: max(speed[key]) * 1e9 / size
        for name, key in (("at the size of the weights", "cached_gb_s"), ("256 MB", "memory_gb_s"))
    }
    shown = "; ".join(
        f"{name}: {', '.join(f'{v:.1f}' for v in speed[key])} GB/s before and after, {bound:,.0f} tokens/s, "
        f"{100 * rate['value'] / bound:.0f}% reached"
        for (name, bound), key in zip(bounds.items(), ("cached_gb_s", "memory_gb_s"), strict=True)
    )
    return [
        f"One stream, 2 threads, int8: {rate['value']:.0f} tokens/s [{rate['low']:.0f}, {rate['high']:.0f}] "
        f"over {speed['n']} answers of {speed['tokens']:.0f} tokens; {size / 1e6:.1f} MB of weights read a token.",
        "",
        f"Bandwidth divided by weight bytes. Reading {shown}.",
    ]
