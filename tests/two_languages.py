"""A language of 60 words, another with a word of its own for each (accents, capitals), and a teacher of the first."""

import json
import random

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from alambic.data.parallel import ParallelText

KNOWN = [a + b for a in ("ba", "ce", "di", "fo", "gu", "ka") for b in ("lan", "mor", "nis", "pel", "rud", "sto", "tix", "vem", "wol", "zur")]  # fmt: skip # noqa: E501
NEW = {word: word[::-1].replace("a", "é").replace("o", "ù") + "ois" for word in KNOWN}


def sentences(n, seed=0):
    """Return `n` pairs of four to eight words in any order."""
    rng = random.Random(seed)
    return paired([" ".join(rng.sample(KNOWN, rng.randint(4, 8))) for _ in range(n)])


def rounds(n, seed=0):
    """Return `n` pairs of four to eight words that follow each other in the list, so that a hidden one can be told."""
    rng = random.Random(seed)
    starts = [(rng.randrange(len(KNOWN)), rng.randint(4, 8)) for _ in range(n)]
    return paired([" ".join(KNOWN[(at + i) % len(KNOWN)] for i in range(length)) for at, length in starts])


def paired(known):
    """Return the sentences with their translations."""
    new = [" ".join(NEW[word] for word in text.split()).capitalize() for text in known]
    return ParallelText(tuple(known), tuple(new))


def write_teacher(folder):
    """Write an uncased encoder of two random layers that knows the first language only."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *KNOWN]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_config(folder, teacher_folder, text, extra=""):
    """Write pairs, more text and a configuration; `extra` goes after the table [train]."""
    rows = [{"fr": n, "en": k, "id": i} for i, (k, n) in enumerate(zip(text.known, text.new, strict=True))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "more.txt").write_text("\n".join(sentences(40, seed=9).known), "utf-8")
    (folder / "distil.toml").write_text(
        f'[distil]\nname = "toy"\nthreads = 1\nlicence = "MIT"\nlanguages = ["xx", "yy"]\n[teacher]\n'
        f'name = "{teacher_folder.as_posix()}"\n[data]\npairs = "pairs.jsonl"\nknown = "en"\nnew = "fr"\n'
        f'held_out = 40\nknown_text = ["more.txt"]\n[vocabulary]\npieces = 1000\n'
        f"[train]\nepochs = 1.0\nbatch_tokens = 512\n{extra}",
        "utf-8",
    )
    return folder / "distil.toml"
