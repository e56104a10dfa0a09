"""A tokenizer as GGUF metadata: pieces, scores, kinds, merges, the pre-tokenizer's name and the special tokens.

llama.cpp brings its own tokenizers and knows each way of cutting a text by a name. The name is found here by what
tokenizer.json says its pre-tokenizer does, never by the name of the model; an unknown way is an error. What llama.cpp
cannot do at all (normalise to NFC, for one) is told in `Vocabulary.limits`, and `check.differences` finds the texts
on which that matters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alambic.errors import PackError
from alambic.kinds.chat import Chat
from alambic.render import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
_META = "▁"
# Whatever a file says of them, llama.cpp takes tokens of these texts for ends (llama-vocab.cpp, special_eog_ids).
_ENDS = (
    "</s>", "<EOT>", "_<EOT>", "<end_of_turn>", "<end_of_utterance>", "<eos>", "<|end_of_text|>", "<|end|>",
    "<|endoftext|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
)  # fmt: skip

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_HAN = "[一-龥ࠀ-一가-퟿]+"

# What a pre-tokenizer does, step by step -> its name in llama.cpp. A regex stands for itself.
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    (_GPT2,): "gpt-2",
    ("digits", "gpt2"): "starcoder",
    (_QWEN2,): "qwen2",
    (_LLAMA3,): "llama-bpe",
    (_TEKKEN,): "tekken",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, "digits"): "deepseek-coder",
}
# llama.cpp takes a word that is a token as it is in these, without asking the merges; the others never do.
_WHOLE_WORDS = {"llama-bpe": "dbrx", "tekken": None}


@dataclass(frozen=True)
class Vocabulary:
    """What goes into `tokenizer.ggml.*`.

    Attributes:
        model: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece BPE) or ``t5`` (unigram).
        pre: name of the pre-tokenizer.
        tokens: text of each id.
        scores: of each id; higher is merged first.
        types: `llama_token_type` of each id.
        merges: of ``gpt2``.
        add_space_prefix: a space is put before each piece of text between special tokens.
        remove_extra_whitespaces: of ``t5``.
        charsmap: SentencePiece's precompiled normalisation; empty: none.
        limits: what llama.cpp leaves out of this tokenizer.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    limits: tuple[str, ...] = ()


def vocabulary(tokenizer: Tokenizer, *, rows: int) -> Vocabulary:
    """Describe `tokenizer` in llama.cpp's terms.

    Args:
        tokenizer: as the model was trained with.
        rows: of the model's embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
        PackError: llama.cpp has no tokenizer of this kind; the message names what it does not know.
    """
    data = json.loads(tokenizer.to_str())
    model = data["model"]
    limits = tuple(_limits(data))
    if model["type"] == "Unigram":
        return _unigram(data, rows, limits)
    if model["type"] != "BPE":
        raise PackError(f"tokenizer of type {model['type']!r} has no GGUF form here", hint="allowed: BPE, Unigram")
    if _byte_level(data["pre_tokenizer"]):
        texts, types = _pieces(data, rows, model["vocab"])
        merges = tuple(" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(model))
        pre = pre_tokenizer(data["pre_tokenizer"], whole_words=bool(model.get("ignore_merges")))
        if pre == "tekken":
            limits = (*limits, "llama.cpp cuts words at combining marks")
        return Vocabulary("gpt2", pre, texts, (), types, merges=merges, limits=limits)
    return _sentencepiece(data, rows, limits)


def pre_tokenizer(described: Mapping[str, Any] | None, *, whole_words: bool = False) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer, known by what it does.

    Raises:
        PackError: llama.cpp has none that does this; the message shows the steps.
    """
    steps = tuple(_steps(described))
    name: str | None = PRE_TOKENIZERS.get(steps)
    if name is not None and not whole_words and name in _WHOLE_WORDS:
        name = _WHOLE_WORDS[name]
    elif name is not None and whole_words and name not in _WHOLE_WORDS:
        name = None
    if name is None:
        shown = " then ".join(repr(step) for step in steps) + (" with ignore_merges" if whole_words else "")
        raise PackError(
            f"pre-tokenizer not known to llama.cpp: {shown}",
            hint="pack this model for OpenVINO or as safetensors; known: "
            + ", ".join(sorted({*PRE_TOKENIZERS.values()})),
        )
    return name


def adds_bos(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Tell whether a prompt begins with the first token: as the template writes it, or as raw texts are framed."""
    bos = template.special.get("bos_token")
    if not bos or tokenizer.token_to_id(bos) is None:
        return False
    framed = tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(bos)]
    return framed or template.render(Chat.of("a"), reply=True).startswith(bos)


def special_ids(template: ChatTemplate, tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, int]:
    """Return the ids of bos, eos, eot, eom, unk and pad that the model has.

    GGUF has room for three ends of an answer; the first is the one that the template writes after a turn.
    """
    found: dict[str, int] = {}
    for key in ("bos", "unk", "pad"):
        text = template.special.get(f"{key}_token")
        number = tokenizer.token_to_id(text) if text else None
        if number is not None:
            found[key] = number
    found.update(zip(("eos", "eot", "eom"), ends, strict=False))
    return found


def _unigram(data: Mapping[str, Any], rows: int, limits: tuple[str, ...]) -> Vocabulary:
    pieces = data["model"]["vocab"]
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    texts, types = _pieces(data, rows, ids, unknown=data["model"].get("unk_id"))
    scores = tuple(float(score) for _, score in pieces) + (0.0,) * (rows - len(pieces))
    charsmap, stripped = b"", False
    for step in _parts(data["normalizer"], "normalizers"):
        if step["type"] == "Precompiled":
            import base64

            charsmap = base64.b64decode(step["precompiled_charsmap"])
        stripped = stripped or step["type"] == "Strip" or (step["type"] == "Replace" and step["content"] == " ")
    return Vocabulary(
        "t5", "default", texts, scores, types, add_space_prefix=_prefixed(data), charsmap=charsmap,
        remove_extra_whitespaces=stripped, limits=limits,
    )  # fmt: skip


def _sentencepiece(data: Mapping[str, Any], rows: int, limits: tuple[str, ...]) -> Vocabulary:
    """SentencePiece's BPE joins the pair whose result has the best score: the rank of the merge, negated."""
    model = data["model"]
    if not model.get("byte_fallback") or _META not in json.dumps([data["normalizer"], data["pre_tokenizer"]],
                                                                 ensure_ascii=False):  # fmt: skip
        steps = " then ".join(repr(step) for step in _steps(data["pre_tokenizer"])) or "none"
        raise PackError(
            f"tokenizer is neither byte-level nor SentencePiece with byte fallback (pre-tokenizer: {steps})",
            hint="pack this model for OpenVINO or as safetensors",
        )
    texts, types = _pieces(data, rows, model["vocab"], unused=model["vocab"].get(model.get("unk_token")))
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(model)):
        ranks.setdefault("".join(pair), rank)
    scores = tuple(-float(ranks.get(text, len(ranks) + i)) for i, text in enumerate(texts))
    return Vocabulary("llama", "default", texts, scores, types, add_space_prefix=_prefixed(data), limits=limits)


def _pieces(
    data: Mapping[str, Any], rows: int, ids: Mapping[str, int], *, unknown: int | None = None, unused: int | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return texts and types of all ids.

    Args:
        data: tokenizer.json.
        rows: of the embedding.
        ids: of the model's pieces.
        unknown: what stands for a character that no piece has; llama.cpp finds its text in prompts.
        unused: a piece that nothing ever becomes: the sign of unknown characters where those are bytes.
    """
    texts: list[str] = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for text, i in ids.items():
        texts[i] = text
        types[i] = BYTE if _is_byte(text) and not _byte_level(data["pre_tokenizer"]) else NORMAL
    for kind, number in ((UNKNOWN, unknown), (UNUSED, unused)):
        if number is not None:
            types[number] = kind
    for token in data["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return tuple(texts), tuple(types)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _parts(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [part for inner in step[name] for part in _parts(inner, name)] if step["type"] == "Sequence" else [step]


def _byte_level(described: Mapping[str, Any] | None) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(described, "pretokenizers"))


def _steps(described: Mapping[str, Any] | None) -> list[str]:
    """Write a pre-tokenizer as steps; one that llama.cpp cannot do is written as JSON, which is in no table."""
    found = []
    for part in _parts(described, "pretokenizers"):
        pattern = part.get("pattern") or {}
        if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            found += ["gpt2"] if part.get("use_regex", True) else []
        elif part["type"] == "Digits" and part.get("individual_digits"):
            found.append("digits")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in pattern:
            found.append(pattern["Regex"])
        elif part["type"] == "Split" and part["behavior"] == "Removed" and part["invert"] and "Regex" in pattern:
            found.append(pattern["Regex"])  # what matches is kept: the same where the regex matches everything
        else:
            found.append(json.dumps(part, ensure_ascii=False, sort_keys=True))
    return found


def _prefixed(data: Mapping[str, Any]) -> bool:
    for part in _parts(data["normalizer"], "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == _META:
            return True
    return any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") == "always"
        for part in _parts(data["pre_tokenizer"], "pretokenizers")
    )


def _limits(data: Mapping[str, Any]) -> list[str]:
    found = []
    added = {token["content"] for token in data["added_tokens"]}
    known = data["model"]["vocab"] if isinstance(data["model"]["vocab"], dict) else ()
    taken = sorted(text for text in _ENDS if text in known and text not in added)
    if taken:
        found.append(f"llama.cpp ends an answer at {' and '.join(map(repr, taken))}, a piece of text like others here")
    unigram = data["model"]["type"] == "Unigram"
    if unigram:
        found.append("llama.cpp may cut a run of one character elsewhere, where several ways are as likely")
    pieces = (piece for piece, _ in data["model"]["vocab"]) if unigram else data["model"]["vocab"]
    if any("\0" in piece for piece in pieces):
        found.append("llama.cpp cannot hold a piece with the character NUL in it")
    for part in _parts(data["normalizer"], "normalizers"):
        if part["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents") or (
            part["type"] == "Precompiled" and not unigram
        ):
            found.append(f"llama.cpp does not normalise texts ({part['type']})")
    for part in _parts(data["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") == "always":
            found.append("llama.cpp puts its space before a text that begins with one too")
        if part["type"] == "Metaspace" and part.get("prepend_scheme") == "first":
            found.append("llama.cpp puts a space before every piece of text or before none, not before the first only")
    if any(token.get("single_word") for token in data["added_tokens"]):
        found.append("llama.cpp finds added tokens inside of words too (single_word)")
    if any((token.get("lstrip") or token.get("rstrip")) for token in data["added_tokens"]):
        found.append("llama.cpp keeps the spaces around added tokens (lstrip, rstrip)")
    return found
