"""A small corpus of two sources as shards, with the tokenizer that made them."""

import hashlib
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from alambic.data.shards import Shards, ShardSource, write_index, write_part

WORDS = {
    "fr": ["le", "chat", "noir", "dort", "sous", "la", "table", "verte", "pendant", "que", "tombe", "la", "pluie"],
    "en": ["a", "small", "dog", "runs", "over", "the", "green", "hill", "while", "snow", "falls", "on", "it"],
}
START, PAD, MASK, END = "<|endoftext|>", "<|pad|>", "<|mask|>", "<|end|>"


def texts(language: str, count: int, *, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[language], k=rng.randint(3, 40))) + "." for _ in range(count)]


def make_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[START, PAD, MASK, END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts("fr", 50, seed=0) + texts("en", 50, seed=0), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": START, "eos_token": END, "pad_token": PAD, "mask_token": MASK}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer


def make_shards(folder: Path, tokenizer_folder: Path, *, train: int = 400, valid: int = 12) -> Path:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = tokenizer.token_to_id(START)
    sources = []
    for language, weight in (("fr", 0.75), ("en", 0.25)):
        parts = []
        for part, count, seed in (("train", train, 1), ("valid", valid, 2)):
            rows = [(tokenizer.encode(text).ids, len(text.encode())) for text in texts(language, count, seed=seed)]
            parts.append(write_part(folder, part, language, rows, dtype="uint16", end_id=end))
        sources.append(ShardSource(language, language, "CC0", weight, *parts))
    digest = hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()
    write_index(Shards(folder, tokenizer.get_vocab_size(), "uint16", digest, end, tuple(sources)))
    return folder


def make_corpus(folder: Path) -> Path:
    """Write a tokenizer and shards of its ids into `folder`, and return it."""
    make_tokenizer(folder / "tokenizer")
    make_shards(folder / "shards", folder / "tokenizer")
    return folder


def lines(out: Path, kind: str) -> list[dict]:
    """Return the lines of `kind` in the log of the run that writes the model `out`."""
    log = out.with_name(f"{out.name}.run") / "log.jsonl"
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == kind]


def curve(out: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and norm of the gradient of every step."""
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines(out, "step")]
