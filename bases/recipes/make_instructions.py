"""Write the instruction rows and preference pairs of the French and English decoder.

    python bases/recipes/make_instructions.py --data ../shared/data --corpus ../shared/corpus --out runs/instructions

Into `--out`: train.jsonl and valid.jsonl (OpenAI messages, with tools where there are any), pairs-train.jsonl and
pairs-valid.jsonl (prompt, chosen, rejected), datasheet.json and DATASHEET.md. The same seed gives the same bytes. A
data set that is not there gives no rows, and the datasheet shows none of it; without any, the rows written for this
project remain. About a minute of one core.

`--tokenizer` (a folder with tokenizer.json) counts tokens exactly: rows over 512 are then left out by that count too.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from instructions import mix  # noqa: E402
from instructions.contamination import Held  # noqa: E402
from instructions.row import MOST_TOKENS, Row  # noqa: E402
from instructions.sources import Library  # noqa: E402


def main() -> None:
    """Parse, make, write, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of public data sets")
    parser.add_argument("--corpus", type=Path, help="folder of public text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the free numbers of rows")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer.json counts tokens")
    options = parser.parse_args()
    for name in ("data", "corpus"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name} {folder}: no such folder")
    if not options.scale > 0:
        parser.error(f"--scale {options.scale}: expected more than 0")
    began = time.perf_counter()
    figures = make(options.data, options.corpus, options.out, seed=options.seed, scale=options.scale,
                   tokenizer=options.tokenizer)  # fmt: skip
    languages = ", ".join(f"{n:,} {name}" for name, n in figures["by_language"].items())
    sys.stderr.write(f"{figures['rows']:,} rows ({languages}), {figures['pairs']['train']:,} pairs to learn in "
                     f"{time.perf_counter() - began:.0f} s: {options.out}\n")  # fmt: skip


def make(
    data: Path | None,
    corpus: Path | None,
    out: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Write everything into `out` and return the figures of the datasheet."""
    library, counts = Library(data, corpus), mix.Counts(scale)
    held = Held(library.held_out())
    made = mix.sift([*mix.french(library, counts, seed), *mix.english(library, counts, seed)], held)
    prefer = mix.sift(mix.preferences(library, counts, seed), held)
    tokens = None if tokenizer is None else _count(made, tokenizer)
    return mix.write(out, made, prefer, seed=seed, held=held, tokens=tokens)


def _count(made: mix.Made, folder: Path) -> dict[str, Any]:
    """Count tokens as the model will read them, and drop the rows over the limit."""
    import numpy as np

    from alambic.kinds.chat import parse_chat
    from alambic.model.tokenizer import read_tokenizer
    from alambic.render import read_template

    template, tokenizer = read_template(folder), read_tokenizer(folder)
    if template is None:
        raise SystemExit(f"{folder}: no chat template")

    def length(row: Row) -> int:
        chat = parse_chat(list(row.messages), list(row.tools) or None, where=row.family)
        return len(tokenizer.encode(template.render(chat), add_special_tokens=False).ids)

    lengths: list[int] = []
    over = 0
    for name in ("train", "valid"):
        kept = []
        for row in getattr(made, name):
            n = length(row)
            over += n > MOST_TOKENS
            if n <= MOST_TOKENS:
                kept.append(row)
                lengths.append(n)
        setattr(made, name, kept)
    return {"tokenizer": folder.name, "mean": float(np.mean(lengths)), "p95": int(np.percentile(lengths, 95)),
            "longest": max(lengths), "over": over}  # fmt: skip


if __name__ == "__main__":
    main()
