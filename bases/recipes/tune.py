"""Instruction-tune a pre-trained decoder on the rows of make_instructions.py, then align it on the pairs; resumable.

    python bases/recipes/tune.py BASE --rows runs/instructions --out runs/alambic-fr-en

Writes `--out`/sft and `--out`/dpo (Model directories) and `--out`/tuning.json. A killed run goes on from its last
checkpoint when it is called again with the same arguments; a stage that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse, tune, align."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="folder of make_instructions.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=5e-4, help="peak rate of instruction tuning")
    parser.add_argument("--preference-rate", type=float, default=5e-6)
    parser.add_argument("--pairs", type=int, default=4000, help="most pairs to learn")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done = _record(options.out)
    if "sft" not in done:
        done = _keep(options.out, {**done, "sft": _tune(options)})
    if "dpo" not in done:
        _keep(options.out, {**done, "dpo": _align(options)})


def _tune(options: argparse.Namespace) -> dict[str, Any]:
    from alambic.data.read_chats import read_chats
    from alambic.events import drain
    from alambic.task import DataSpec
    from alambic.train.sft import SftParams, finetune_chats

    spec = DataSpec(train="train.jsonl")
    read = [read_chats(options.rows / f"{part}.jsonl", spec).dataset for part in ("train", "valid")]
    train, valid = read
    params = SftParams(epochs=options.epochs, learning_rate=options.rate, method="full", long="leave_out",
                       batch_size=32, evaluations=4, patience=8, threads=options.threads)  # fmt: skip
    result = drain(
        finetune_chats(options.base, train.chats, valid.chats[:400], params=params, out=options.out / "sft"),
        _listen,
    )
    if result.interrupted:
        sys.exit("stopped; call again to go on")
    return result.to_dict()


def _align(options: argparse.Namespace) -> dict[str, Any]:
    from alambic.data.pairs import read_pairs
    from alambic.events import drain
    from alambic.task import DataSpec
    from alambic.train.dpo import DpoParams, Pair, prefer_chats

    spec = DataSpec(train="train.jsonl")
    parts = [read_pairs(options.rows / f"pairs-{part}.jsonl", spec).dataset for part in ("train", "valid")]
    train, valid = ([Pair(e.prompt, e.chosen, e.rejected) for e in part] for part in parts)
    params = DpoParams(epochs=1.0, learning_rate=options.preference_rate, method="full", long="leave_out",
                       threads=options.threads)  # fmt: skip
    result = drain(
        prefer_chats(options.out / "sft", train[: options.pairs], valid[:200], params=params, out=options.out / "dpo"),
        _listen,
    )
    if result.interrupted:
        sys.exit("stopped; call again to go on")
    figures = ("steps", "best_dev", "accuracy", "margin", "learning_rate", "seconds")
    return {name: getattr(result, name) for name in figures} | {"left_out": len(result.left_out)}


def _listen(event: Any) -> None:
    from alambic.events import Note, Progress

    if isinstance(event, Progress) and (event.done % 100 == 0 or "dev" in event.values):
        left = "" if event.seconds_left is None else f" {event.seconds_left:.0f} s left"
        sys.stderr.write(f"{event.stage} {event.done}/{event.total} {event.values}{left}\n")
    elif isinstance(event, Note):
        sys.stderr.write(event.message[:300] + "\n")


def _record(out: Path) -> dict[str, Any]:
    path = out / "tuning.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _keep(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    beside = out / "tuning.json.partial"
    beside.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    beside.replace(out / "tuning.json")
    return record


if __name__ == "__main__":
    main()
