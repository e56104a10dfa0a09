"""One text at a time: the 8-bit bundle against the same model under sentence-transformers and under plain torch."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import sets
from run import HERE, data_folder

MINUTES = 8
_ROUNDS = 3
WHAT = (
    "Time of one text at a time on all BANKING77 test texts, tokenisation included, interleaved in one run: the 8-bit "
    "bundle, the float bundle, sentence-transformers and plain torch, all of the same fine-tuned model"
)


def run(store: Any) -> str:
    """Time the four, and report medians and the ratio with its interval."""
    rows = store.part("times", _times)
    lines = ["| what | p50 ms [95 %] | p95 ms | 8-bit bundle is faster at p50 by [95 %] |", "|---|---|---|---|"]
    for row in rows:
        p50, ratio = row["p50"], row["ratio"]
        lines.append(
            f"| {row['what']} | {p50['value']:.2f} [{p50['low']:.2f}, {p50['high']:.2f}] | {row['p95']['value']:.2f} | "
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    lines += ["", f"n = {rows[0]['n']:,} texts each, one process, order drawn anew for each text.", ""]
    lines += ["Alone, each in processes of its own, taken in turn; p50 of each round, in ms:", ""]
    alone = store.part("alone", _alone)
    lines += ["| what | p50 of each round | p95, median of rounds | n a round |", "|---|---|---|---|"]
    for name, found in alone.items():
        p50 = ", ".join(f"{row['p50']:.2f}" for row in found)
        p95 = statistics.median(row["p95"] for row in found)
        lines.append(f"| {name} | {p50} | {p95:.2f} | {found[0]['n']:,} |")
    middle = {name: statistics.median(row["p50"] for row in found) for name, found in alone.items()}
    ratios = [f"{middle[name] / middle['int8']:.2f} times {name}" for name in middle if name != "int8"]
    return "\n".join([*lines, "", f"The 8-bit bundle alone is faster at p50: {', '.join(ratios)}."])


def _alone() -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {"int8": [], "sentence": [], "torch": []}
    for _ in range(_ROUNDS):
        for name, rows in found.items():
            command = [sys.executable, str(HERE / "alone.py"), name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def _times() -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModel  # noqa: F401  (fails early when the build extra is absent)

    from alambic.engines import open_engine
    from alambic.measure.speed import compare_speed, speedup
    from alambic.model.encoder import Encoder

    kept = HERE.parent / ".bench" / "quality"
    model, small = kept / "banking77-0.model", kept / "banking77-0-int8.bundle"
    if not small.is_dir():
        sys.exit("the bundle is not there: make bench B=quality makes it (ALAMBIC_BENCH_SETS=banking77 is enough)")
    texts = sets.load(data_folder(), "banking77")[2].texts
    encoder = Encoder.load(model)
    sentence, head = sentence_transformer(model), encoder.head
    with open_engine(small) as int8, open_engine(kept / "banking77-0-float.bundle") as flt, torch.inference_mode():
        runs = {
            "alambic, 8-bit bundle": int8.predict,
            "alambic, float bundle": flt.predict,
            "sentence-transformers": lambda t: head(sentence.encode(t, convert_to_tensor=True) * encoder.spec.scale),
            "plain torch": lambda t: encoder(*ids(encoder, t)).argmax(1),
        }
        speeds = compare_speed(runs, texts, repeats=len(texts), seconds=600.0)
    first = speeds["alambic, 8-bit bundle"]
    return [
        {
            "what": name, "n": speed.n, "p50": speed.p50_ms.to_dict(), "p95": speed.p95_ms.to_dict(),
            "ratio": speedup(speed, first).to_dict(),
        }
        for name, speed in speeds.items()
    ]  # fmt: skip


def ids(encoder: Any, texts: list[str]) -> tuple[Any, Any]:
    from alambic.model.encoder import pad

    return pad(encoder.tokenize(texts), pad_id=encoder.pad_id)


def sentence_transformer(model: Path) -> Any:
    """Return the same encoder under sentence-transformers: transformer, mean pooling, normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    transformer = Transformer(str(model), max_seq_length=256)
    return SentenceTransformer(modules=[transformer, Pooling(384, "mean"), Normalize()], device="cpu")
