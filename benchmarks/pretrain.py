"""A pre-trained decoder against a Kneser-Ney 5-gram of the same training text: bits per byte of held-out documents.

    ALAMBIC_PRETRAIN_RUN=runs/alambic-fr-en python benchmarks/run.py pretrain

reads what `alambic pretrain` left in its run folder: shards, the model (trained to its end, or as far as it has come),
and what the training says of its speed. Both models read the same ids of the same documents, each after the end token
of the one before; the end of a document is predicted too and counts for no byte. The 5-gram sees every token of the
training text once, the model as often as the table says.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MINUTES = 15
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "pretrain-curve.png"
WHAT = "Bits per byte of held-out text by source: a pre-trained decoder against a Kneser-Ney 5-gram of the same text"
_BLOCK, _BLOCKS = 512, 50  # tokens that the bootstrap draws together; fewer where that would make fewer blocks
_DRAWS = 1000
_ROWS = 8

Floats = NDArray[np.float64]


def run(store: Any) -> str:
    """Score both models token by token, and give bits per byte with intervals, and the training's own figures."""
    folder = Path(os.environ.get("ALAMBIC_PRETRAIN_RUN", Path(__file__).parents[1] / "runs" / "alambic-fr-en"))
    model, shards, tokenizer = (
        _newest(folder, "train", "model"),
        _newest(folder, "shards"),
        _newest(folder, "tokenizer"),
    )
    trained = json.loads((model / "training.json").read_text("utf-8"))
    # Another model, or the same one trained on, is another part.
    part = f"{shards.name}-{model.parent.name}-{trained['step']}".replace(".part", "")
    found = store.part(part, lambda: _compare(model, shards, tokenizer))
    return "\n".join([*_table(found), "", *_facts(trained), "", *_curve(model)])


def _curve(model: Path) -> list[str]:
    """Draw loss and bits per byte against tokens, from the log beside the model."""
    from alambic.report.pretraining import curve_of, write_curve
    from alambic.train.pretrain_log import Log

    log = model.with_name(f"{model.name}.run") / "log.jsonl"
    curve = curve_of(Log(log).read())
    if not curve.tokens:
        return [f"No curve: {log.name} has no step."]
    write_curve(curve, PICTURE)
    told = (
        "Left, thin: each step; thick: running mean; a tick at the bottom: a sitting went on from there. Right: each "
        "source, and all by their bytes; on the way a part of the held-out text is read, at the end all of it."
    )
    return [f"![Loss and held-out bits per byte against tokens](../images/{PICTURE.name})", "", told]


def _newest(folder: Path, stage: str, inside: str = ".") -> Path:
    """Return the newest stage of a run folder, finished or not."""
    places = [path / inside for path in (folder / "stages").glob(f"{stage}-*") if (path / inside).is_dir()]
    if not places:
        sys.exit(f"{folder}: no stage {stage!r}; run `alambic pretrain` first, or set ALAMBIC_PRETRAIN_RUN")
    return max(places, key=lambda path: path.stat().st_mtime)


def _compare(model: Path, shards_folder: Path, tokenizer: Path) -> dict[str, Any]:
    import kneser_ney
    from alambic.data.shards import open_shards

    shards = open_shards(shards_folder)
    sizes, end_text = _bytes_of(tokenizer, shards.vocabulary, end_id=shards.end_id)
    parts = (np.asarray(shards.tokens("train", source.name)) for source in shards.sources)
    counts = kneser_ney.fit(parts, end_id=shards.end_id, vocabulary=shards.vocabulary)
    score = _scorer(model, shards)
    found = {}
    blocks: list[list[Floats]] = [[], [], []]
    for source in shards.sources:
        if not source.valid.tokens:
            continue
        ids = np.asarray(shards.tokens("valid", source.name))
        rows = [_blocks(x) for x in (score(source.name), -np.log2(counts.probabilities(ids)), sizes[ids])]
        # A document may end with the end token's own text before it is closed by that token once more.
        written = int((ids == shards.end_id).sum()) - source.valid.documents
        count = rows[2].sum() + written * len(end_text)
        if abs(count - source.valid.utf8_bytes) > 0.001 * source.valid.utf8_bytes:
            sys.exit(f"{source.name}: the tokens have {count:,.0f} bytes, shards.json says {source.valid.utf8_bytes:,}")
        found[source.name] = {"documents": source.valid.documents, "tokens": len(ids), **_ratios(*rows)}
        for kept, row in zip(blocks, rows, strict=True):
            kept.append(row)
    whole = [np.concatenate(kept) for kept in blocks]
    documents, tokens = (sum(entry[key] for entry in found.values()) for key in ("documents", "tokens"))
    return {**found, "all": {"documents": documents, "tokens": tokens, **_ratios(*whole)}}


def _scorer(folder: Path, shards: Any) -> Any:
    """Return a function that gives the bits of each held-out token of a source, in float32."""
    import torch

    from alambic.model.decoder import Decoder
    from alambic.train.pretrain_data import held_out
    from alambic.train.pretrain_model import Causal
    from alambic.train.pretrain_params import PretrainParams
    from alambic.train.pretrain_score import counted

    params = PretrainParams(**json.loads((folder / "training.json").read_text("utf-8"))["params"])
    model = Decoder.load(folder, dtype=torch.float32).model
    objective = Causal(model, params, end_id=shards.end_id, device=torch.device("cpu"))

    def bits(name: str) -> Floats:
        windows = held_out(shards, name, length=params.context, most=None)
        losses = []
        for start in range(0, len(windows), _ROWS):
            rows = windows[start : start + _ROWS]
            losses.append(objective.losses(rows).double().numpy()[counted(rows, end_id=shards.end_id)[2].ravel()])
        return np.concatenate(losses) / math.log(2)

    return bits


def _bytes_of(tokenizer: Path, vocabulary: int, *, end_id: int) -> tuple[Floats, str]:
    """Return the UTF-8 bytes that each id stands for (a byte-level token has one character a byte), and the end's text.

    The marks of a conversation stand in its text, so they have bytes; what closes a document does not.
    """
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    added = found.get_added_tokens_decoder()
    texts = [found.id_to_token(i) or "" for i in range(vocabulary)]
    sizes = np.array([len(text.encode() if i in added else text) for i, text in enumerate(texts)], dtype=float)
    sizes[end_id] = 0
    return sizes, texts[end_id]


def _blocks(values: NDArray[Any]) -> Floats:
    size = max(1, min(_BLOCK, len(values) // _BLOCKS))
    sums: Floats = np.add.reduceat(np.asarray(values, dtype=float), np.arange(0, len(values), size))
    return sums


def _ratios(ours: Floats, theirs: Floats, sizes: Floats) -> dict[str, Any]:
    """Return bits per byte of both and how much less ours is, each with a 95 % interval from resampled blocks."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sizes), size=(_DRAWS, len(sizes)))
    whole = sizes[drawn].sum(1)
    samples = {"model": ours[drawn].sum(1) / whole, "ngram": theirs[drawn].sum(1) / whole}
    samples["less"] = 1 - samples["model"] / samples["ngram"]
    point = {"model": ours.sum() / sizes.sum(), "ngram": theirs.sum() / sizes.sum()}
    point["less"] = 1 - point["model"] / point["ngram"]
    return {
        name: [float(point[name]), *(float(x) for x in np.quantile(samples[name], (0.025, 0.975)))] for name in samples
    }


def _table(found: dict[str, Any]) -> list[str]:
    lines = ["| source | documents | tokens | model, bits per byte | 5-gram, bits per byte | less than the 5-gram |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, entry in found.items():
        model, ngram, less = entry["model"], entry["ngram"], entry["less"]
        bits = " | ".join(f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]" for x in (model, ngram))
        lines.append(f"| {name} | {entry['documents']:,} | {entry['tokens']:,} | {bits} | {less[0]:.1%} "
                     f"[{less[1]:.1%}, {less[2]:.1%}] |")  # fmt: skip
    lines += [
        "",
        f"95 % intervals: blocks of up to {_BLOCK} tokens drawn again {_DRAWS:,} times, the same ones for both.",
    ]
    return lines


def _facts(trained: dict[str, Any]) -> list[str]:
    shape = trained["params"]
    used = trained["utilisation"]
    share = "unknown" if used is None else f"{used:.1%} of {trained['peak_flops'] / 1e9:,.0f} GFLOP/s"
    passes = ", ".join(f"{name} {count:.2f}" for name, count in trained["passes"].items())
    state = "to its end" if trained["finished"] else f"to step {trained['step']:,} of {trained['steps']:,}, not its end"
    cpu = trained["tokens"] / trained["cpu_seconds"] if trained["cpu_seconds"] else 0.0
    return [
        f"Model: {trained['parameters']:,} parameters ({shape['layers']} layers of {shape['hidden']}, context "
        f"{shape['context']}), trained {state}: {trained['tokens']:,} tokens. Passes over each source: {passes}.",
        "",
        f"Training: {trained['tokens_per_second']:,.0f} tokens/s by the clock, {cpu:,.0f} by the processor's time, "
        f"over {trained['seconds'] / 60:,.0f} minutes; {trained['precision']}, {trained['threads']} thread(s), "
        f"{trained['device']}. Model-FLOPs utilisation (PaLM, appendix B): {share} ({trained['peak_source']}).",
    ]
