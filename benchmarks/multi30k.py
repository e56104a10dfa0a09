"""English to French from nothing: an encoder-decoder trained on the 29,000 pairs of Multi30k, scored as it is packed.

ALAMBIC_BENCH_EPOCHS and ALAMBIC_BENCH_PARAMETERS change how long it trains and how large it is.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from run import data_folder, say

MINUTES = 60
WHAT = "BLEU of a translator made from scratch on Multi30k en-fr (29,000 pairs), int8 through its engine, greedy"
_TESTS = ("test2016", "test2017")
_BARS = {"test2016": 50.0}  # two CPU cores, 60 minutes of training
_PUBLISHED = {"test2016": "61.8", "test2017": "53.5"}  # a transformer-tiny, lower-cased and Moses-tokenised


def run(store: Any) -> str:
    """Train once (resumable), pack, translate both tests, score."""
    settings = {
        "parameters": int(os.environ.get("ALAMBIC_BENCH_PARAMETERS", "6000000")),
        "epochs": float(os.environ.get("ALAMBIC_BENCH_EPOCHS", "20")),
    }
    trained = store.part("train", lambda: _train(store.folder, **settings))
    scored = store.part("score", lambda: _score(store.folder))
    lines = [
        f"{trained['parameters']:,} parameters, {trained['epochs']:g} epochs, {trained['tokens']:,} tokens in "
        f"{trained['seconds'] / 60:.0f} min ({trained['tokens_per_second']:.0f} tokens/s), best dev loss "
        f"{trained['best_dev']:.3f} nats a token. Bundle part: {scored['size_mb']:.1f} MB (int8).",
        "",
        "| test | n | BLEU, lower-cased, Moses tokens [95 %] | sacreBLEU 13a [95 %] | chrF | bar | transformer-tiny |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in _TESTS:
        one = scored[name]
        cells = [_cell(one[metric]) for metric in ("bleu_moses_fr", "bleu", "chrf")]
        lines.append(f"| {name} | {one['n']:,} | {' | '.join(cells)} | {_BARS.get(name, '')} | {_PUBLISHED[name]} |")
    lines += ["", *[f"`{metric}`: {text}" for metric, text in scored["signatures"].items()]]
    lines += ["", f"Answer time: p50 {scored['p50_ms']:.1f} ms, p95 {scored['p95_ms']:.1f} ms a sentence, greedy."]
    return "\n".join(lines)


def _cell(score: dict[str, float]) -> str:
    return f"{100 * score['value']:.2f} [{100 * score['low']:.2f}, {100 * score['high']:.2f}]"


def _chats(name: str) -> list[Any]:
    from alambic.kinds.chat import Chat

    path = data_folder() / "multi30k_en_fr" / f"{name}.jsonl"
    text = path.read_bytes() if path.exists() else lzma.decompress(path.with_suffix(".jsonl.xz").read_bytes())
    rows = [json.loads(line) for line in text.decode("utf-8").splitlines()]
    return [Chat.of(row["en"].strip(), completion=row["fr"].strip()) for row in rows]


def _train(folder: Path, *, parameters: int, epochs: float) -> dict[str, Any]:
    from alambic.events import Progress, drain
    from alambic.model.scratch import make_scratch
    from alambic.train.sft import SftParams, finetune_chats

    train, dev = _chats("train"), _chats("dev")
    base = folder / "base"
    if not (base / "config.json").is_file():
        made = make_scratch(train, base, parameters=parameters, shape="encoder-decoder", context_tokens=256)
        say(f"  {made}")
    params = SftParams(epochs=epochs, label_smoothing=0.1, evaluations=1, patience=99, seed=0)

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and (event.done % 100 == 0 or "dev" in event.values):
            say(f"  {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    result = drain(finetune_chats(base, train, dev, params=params, out=folder / "model"), listen)
    count = sum(np.prod(shape) for shape in _shapes(folder / "model"))
    return {
        "parameters": int(count), "epochs": epochs, "tokens": result.tokens, "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second, "best_dev": result.best_dev, "steps": result.steps,
    }  # fmt: skip


def _shapes(folder: Path) -> list[Any]:
    from safetensors import safe_open

    shapes = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as tensors:
            shapes += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return shapes


def _score(folder: Path) -> dict[str, Any]:
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import drain
    from alambic.kinds.generation import GenerationRequest, Sampling
    from alambic.measure.generation_speed import measure_generation_speed
    from alambic.measure.written import measure_written
    from alambic.measure.written_figures import share
    from alambic.pack.writer_openvino import pack_openvino

    shutil.rmtree(folder / "packed", ignore_errors=True)
    part = drain(pack_openvino(folder / "model", folder / "packed", precision="int8"))
    writer = load_writer(part, folder / "packed")
    sampling = Sampling(max_tokens=100)
    found: dict[str, Any] = {"size_mb": sum(p.stat().st_size for p in (folder / "packed").rglob("*")) / 1e6}
    names = ("bleu_moses_fr", "bleu", "chrf")
    for test in _TESTS:
        written = drain(
            measure_written(writer, _chats(test), kind="generate", metrics=names, sampling=sampling, split=test)
        )
        found[test] = {name: share(score).to_dict() for name, score in written.scores.items()} | {"n": written.n}
        found["signatures"] = {name: score.signature for name, score in written.scores.items()}
        say(f"  {test}: {found[test]['bleu_moses_fr']['value']:.4f}")
    requests = [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in _chats("test2016")[:100]]
    speed = measure_generation_speed(writer, requests, repeats=60, seconds=30)
    writer.close()
    return {**found, "p50_ms": speed.p50_ms.value, "p95_ms": speed.p95_ms.value}
