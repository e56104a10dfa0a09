"""Tokenizers for clones: a real one from a folder of files (xz or not, GGUF too), or a small one trained here."""

from __future__ import annotations

import io
import json
import lzma
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from alambic._extras import load
from alambic.errors import BaseModelError
from alambic.model.tokenizer import from_sentencepiece, read_tokenizer

# How qwen2 splits text into words; stablelm-2 does the same.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str | None, ...]] = {
    "stablelm": (QWEN2_WORDS,),
    "qwen2": (QWEN2_WORDS,),
    # As its own tokenizer.json has it; None: digits one by one.
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", None),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens in GGUF
_TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Le vif renard brun saute par-dessus le chien paresseux ; l'été, ça s'entend très bien.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "In 2024, 37 people asked: how much is 12,5 % of 1 000 euros? Nobody knew!",
    "Un homme et une femme marchent dans la rue près d'une maison rouge.",
)


@dataclass(frozen=True)
class Made:
    """A tokenizer and what goes with it.

    Attributes:
        tokenizer: ready.
        special: `bos_token`, `eos_token`, `pad_token`, `unk_token` as texts, those it has.
        template: chat template, None when it brings none.
        trained: it is a small one trained here.
        what: it, in words.
        spm: the SentencePiece model that it came from.
    """

    tokenizer: Tokenizer
    special: dict[str, str]
    template: str | None
    trained: bool
    what: str
    spm: bytes | None = None

    def id(self, name: str) -> int | None:
        """Return the id of a special token."""
        text = self.special.get(name)
        found: int | None = self.tokenizer.token_to_id(text) if text is not None else None
        return found


def make_tokenizer(
    folder: str | None, kind: str, root: Path | None, *, extra: tuple[str, ...] = (), seq2seq: bool = False
) -> Made:
    """Read the tokenizer in `root`/`folder`, or train a small one of `kind` when there is none.

    Raises:
        BaseModelError: a file cannot be read.
    """
    if folder is None or root is None or not (root / folder).is_dir():
        return _trained(kind, seq2seq=seq2seq)
    with tempfile.TemporaryDirectory() as place:
        unpacked = Path(place)
        for path in (root / folder).iterdir():
            data = path.read_bytes()
            name = path.name.removesuffix(".xz")
            (unpacked / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
        found = sorted(unpacked.glob("*.gguf"))
        if found and not (unpacked / "tokenizer.json").is_file():
            made = tokenizer_from_gguf(found[0])
        else:
            made = _from_files(unpacked, folder)
    if extra:
        made.tokenizer.add_tokens([AddedToken(text, normalized=True) for text in extra])
    return made


def tokenizer_from_gguf(path: Path) -> Made:
    """Read the byte-level BPE vocabulary in a GGUF file.

    Raises:
        BaseModelError: it holds another kind of vocabulary.
    """
    reader = load("gguf").GGUFReader(str(path))

    def value(name: str) -> Any:
        entry = reader.fields.get(f"tokenizer.{name}")
        return None if entry is None else entry.contents()

    if value("ggml.model") != "gpt2":
        raise BaseModelError(f"{path}: a vocabulary of kind {value('ggml.model')!r}; gpt2 (byte-level BPE) is read")
    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in value("ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    _byte_level(tokenizer, value("ggml.pre"))
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=kind == _CONTROL) for t, kind in added])
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = value(f"ggml.{key}_token_id")
        if number is not None:
            special[f"{name}_token"] = tokens[int(number)]
    # The end is special whatever its type says: decoding leaves it out.
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in set(special.values())])
    return Made(tokenizer, special, value("chat_template"), False, f"real, from {path.name}")


def _from_files(folder: Path, name: str) -> Made:
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    if config.get("tokenizer_class") == "Qwen2Tokenizer":
        config.setdefault("eos_token", "<|im_end|>")
    tokenizer = read_tokenizer(folder)
    special = {}
    for key, guesses in (
        ("bos_token", ("<s>", "<|endoftext|>")), ("eos_token", ("</s>", "<|endoftext|>")), ("unk_token", ("<unk>",)),
        ("pad_token", ("<pad>", "<|padding|>")),
    ):  # fmt: skip
        stated = config.get(key)
        text = stated.get("content") if isinstance(stated, dict) else stated
        if key in config and text is None:
            continue
        text = text or next((guess for guess in guesses if tokenizer.token_to_id(guess) is not None), None)
        if text is not None:
            special[key] = text
    spm = folder / "tokenizer.model"
    template = config.get("chat_template")
    model = spm.read_bytes() if spm.is_file() and not (folder / "tokenizer.json").is_file() else None
    return Made(tokenizer, special, template, False, f"real, {name}", model)


def _trained(kind: str, *, seq2seq: bool) -> Made:
    if kind == "byte-bpe":
        return _train_bytes(seq2seq=seq2seq)
    trainer = load("sentencepiece").SentencePieceTrainer
    buffer = io.BytesIO()
    unigram = kind == "unigram"
    trainer.train(
        sentence_iterator=iter([line for text in _TEXT for line in text.splitlines()] * 8), model_writer=buffer,
        vocab_size=224 if unigram else 512, model_type="unigram" if unigram else "bpe", byte_fallback=not unigram,
        pad_id=0, eos_id=1 if unigram else 2, unk_id=2 if unigram else 3, bos_id=-1 if unigram else 1,
        pad_piece="<pad>", unk_piece="<unk>", bos_piece="<s>", eos_piece="</s>", character_coverage=1.0,
        hard_vocab_limit=False, add_dummy_prefix=unigram, normalization_rule_name="nmt_nfkc" if unigram else "identity",
        remove_extra_whitespaces=unigram, minloglevel=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tokenizer.model"
        path.write_bytes(buffer.getvalue())
        tokenizer = from_sentencepiece(path)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if not unigram:
        special["bos_token"] = "<s>"
    what = f"trained, SentencePiece {'unigram' if unigram else 'BPE'}, {tokenizer.get_vocab_size():,} tokens"
    return Made(tokenizer, special, None, True, what, buffer.getvalue())


def _train_bytes(*, seq2seq: bool) -> Made:
    tokenizer = Tokenizer(BPE())
    _byte_level(tokenizer, "qwen2")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer.train_from_iterator(
        _TEXT * 8, trainers.BpeTrainer(vocab_size=512, special_tokens=list(special.values()), show_progress=False,
                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    if seq2seq:
        pairs = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=pairs
        )
    what = f"trained, byte-level BPE, {tokenizer.get_vocab_size():,} tokens"
    return Made(tokenizer, special, None, True, what)


def _byte_level(tokenizer: Tokenizer, pre: str | None) -> None:
    """Split into words as the vocabulary was trained, then into bytes."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if words is None
        else pre_tokenizers.Split(Regex(words), behavior="isolated", invert=False)
        for words in _SPLITS.get(pre or "", ())
    ]
    if pre == "starcoder":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, whole])
    tokenizer.decoder = decoders.ByteLevel()
    if pre is None:  # gpt-neox
        tokenizer.normalizer = normalizers.NFC()
