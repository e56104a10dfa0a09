"""Write the text that alambic-encoder-fr-en is made from: pairs.jsonl, english.txt and french.txt, one sentence a line.

    python bases/recipes/encoder_text.py CORPUS OUT

CORPUS holds the xz files of the list below (documents between lines `<|endoftext|>`, or JSON Lines). The same folder
gives the same files, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# file -> sentences kept, spread evenly over the file by digest
ENGLISH = {"en_wikipedia": 30_000, "en_books": 15_000, "en_docs": 5_000, "en_prompts": 35_000}
FRENCH = {
    "fr_news": 90_000, "fr_novels": 60_000, "fr_sentences": 60_000, "fr_msdocs": 30_000, "fr_docs": 15_000,
    "fr_chat": 10_000,
}  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?…])\s+(?=[A-ZÀ-Ý«“\"0-9-])")
_LETTERS = re.compile(r"[^\W\d_]")


def main() -> None:
    """Write the three files."""
    corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.jsonl").write_bytes(lzma.decompress((corpus / "parallel_fr_en.jsonl.xz").read_bytes()))
    for name, parts in (("english", ENGLISH), ("french", FRENCH)):
        kept = [s for file, number in parts.items() for s in _sample(_sentences(corpus, file), number)]
        (out / f"{name}.txt").write_text("".join(f"{s}\n" for s in kept), "utf-8", newline="\n")
        print(f"{name}.txt: {len(kept):,} sentences, {sum(map(len, kept)):,} characters")


def _sentences(corpus: Path, file: str) -> Iterator[str]:
    for text in _texts(corpus, file):
        for sentence in _SENTENCE.split(" ".join(text.split())):
            # Table rows, code and fragments teach little; over 220 characters few fit into 64 tokens.
            if 15 <= len(sentence) <= 220 and len(_LETTERS.findall(sentence)) >= 0.6 * len(sentence):
                yield sentence


def _texts(corpus: Path, file: str) -> Iterator[str]:
    packed = corpus / f"{file}.jsonl.xz"
    if packed.is_file():
        with lzma.open(packed, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                said = [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"]]
                yield from (part for text in said for part in text.split("\n"))
        return
    with lzma.open(corpus / f"{file}.txt.xz", "rt", encoding="utf-8") as lines:
        yield from (line for line in lines if line.strip() != "<|endoftext|>")


def _sample(sentences: Iterator[str], number: int) -> list[str]:
    """Return `number` different sentences, those of the smallest digests, in their order in the file."""
    unique = dict.fromkeys(sentences)
    digests = sorted((hashlib.blake2b(s.encode(), digest_size=8).digest(), i, s) for i, s in enumerate(unique))
    return [s for _, _, s in sorted(digests[:number], key=lambda entry: entry[1])]


if __name__ == "__main__":
    main()
