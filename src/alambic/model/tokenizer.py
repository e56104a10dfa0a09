"""The tokenizer of a base that writes: from tokenizer.json, a SentencePiece model, or vocab.json and merges.txt.

Whatever the files, the result is one `tokenizers.Tokenizer` without truncation and padding. SentencePiece models are
converted here, as SentencePiece itself, llama.cpp and Mistral's own library read them: a space is put before each piece
of text between two special tokens (where the model asks for one at all), not only before the first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from alambic._extras import load
from alambic.errors import BaseModelError

SPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_META = "▁"
_CONTROL, _USER_DEFINED, _UNIGRAM, _BPE = 3, 4, 1, 2  # sentencepiece_model.proto


def read_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer in `folder`, with the added tokens that tokenizer_config.json names.

    Raises:
        BaseModelError: there is none, it cannot be read, or it only exists as code that comes with the base.
    """
    config = _json(folder / "tokenizer_config.json")
    found = _file(folder)
    if found is None:
        code = " other than as code that comes with the base, which is never run" if "auto_map" in config else ""
        raise BaseModelError(
            f"{folder}: no tokenizer{code}",
            hint="put a tokenizer.json (or SentencePiece's tokenizer.model, or vocab.json and merges.txt) in this "
            "folder; a tiktoken vocabulary is converted once by transformers.convert_slow_tokenizer.TikTokenConverter",
        )
    try:
        if found.name == "tokenizer.json":
            tokenizer = Tokenizer.from_file(str(found))
        elif found.name in SPIECE:
            tokenizer = from_sentencepiece(found, config)
        else:
            tokenizer = _from_vocabulary(folder, config)
    except BaseModelError:
        raise
    except Exception as error:  # the Rust binding raises bare Exception
        raise BaseModelError(f"{found}: the tokenizer cannot be read ({error})") from error
    _add_named(tokenizer, config)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def from_sentencepiece(path: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    """Convert a SentencePiece model (BPE or unigram), keeping every id.

    Raises:
        BaseModelError: it is neither of the two kinds.
    """
    convert = load("transformers.convert_slow_tokenizer")
    load("sentencepiece")
    proto = convert.SentencePieceExtractor(str(path)).proto
    kind = proto.trainer_spec.model_type
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if kind == _BPE:
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        # By score, as SentencePiece merges: Mistral's runs of spaces have early ids and the lowest scores.
        merges = convert.generate_merges(vocabulary, pieces)
        tokenizer = Tokenizer(
            BPE(vocab=vocabulary, merges=merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True,
                byte_fallback=proto.trainer_spec.byte_fallback, dropout=None)
        )  # fmt: skip
        _as_bpe(tokenizer, proto)
    elif kind == _UNIGRAM:
        tokenizer = Tokenizer(Unigram(pieces, unk_id=proto.trainer_spec.unk_id,
                                      byte_fallback=proto.trainer_spec.byte_fallback))  # fmt: skip
        _as_unigram(tokenizer, proto)
    else:
        raise BaseModelError(f"{path}: a SentencePiece model of type {kind}; BPE and unigram are read")
    named = [(p.piece, p.type == _CONTROL) for p in proto.pieces if p.type in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=special) for piece, special in named])
    _frame(tokenizer, proto, config or {})
    return tokenizer


def _file(folder: Path) -> Path | None:
    for name in ("tokenizer.json", *SPIECE, "vocab.json"):
        if (folder / name).is_file() and (name != "vocab.json" or (folder / "merges.txt").is_file()):
            return folder / name
    return None


def _as_bpe(tokenizer: Tokenizer, proto: Any) -> None:
    prefix = proto.normalizer_spec.add_dummy_prefix
    steps: list[Any] = [normalizers.Replace(" ", _META)]
    if prefix:
        steps.insert(0, normalizers.Prepend(_META))
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    parts: list[Any] = [decoders.Replace(_META, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)


def _as_unigram(tokenizer: Tokenizer, proto: Any) -> None:
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_META, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement=_META, prepend_scheme=scheme)


def _frame(tokenizer: Tokenizer, proto: Any, config: dict[str, Any]) -> None:
    """Put the first and last token that the base was trained with around a raw text (chats have their template)."""
    unigram = proto.trainer_spec.model_type == _UNIGRAM
    start = config.get("add_bos_token", not unigram) and proto.trainer_spec.bos_id >= 0
    end = config.get("add_eos_token", unigram) and proto.trainer_spec.eos_id >= 0
    first = [(proto.trainer_spec.bos_piece or "<s>", proto.trainer_spec.bos_id)] if start else []
    last = [(proto.trainer_spec.eos_piece or "</s>", proto.trainer_spec.eos_id)] if end else []
    if first or last:
        before, after = [piece for piece, _ in first], [piece for piece, _ in last]
        single, second = [*before, "$A", *after], [f"{part}:1" for part in (*before, "$B", *after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *second], special_tokens=first + last
        )


def _from_vocabulary(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Build a byte-level BPE from vocab.json and merges.txt the way its family does."""
    transformers = load("transformers")
    name = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    family = getattr(transformers, name, None)
    if family is None:
        raise BaseModelError(f"{folder}: tokenizer_class {name!r} is not one of transformers' own",
                             hint="give the base as a folder with a tokenizer.json")  # fmt: skip
    return family.from_pretrained(folder, local_files_only=True).backend_tokenizer


def _add_named(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json lists and the file lacks; their ids must come out as listed."""
    listed = config.get("added_tokens_decoder")
    for number, entry in sorted((listed or {}).items(), key=lambda pair: int(pair[0])):
        content = entry["content"]
        if tokenizer.token_to_id(content) == int(number):
            held = tokenizer.get_added_tokens_decoder().get(int(number))
            if held is not None and held.special == bool(entry.get("special")):
                continue
        token = AddedToken(
            content, single_word=bool(entry.get("single_word")), lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")), normalized=bool(entry.get("normalized", True)),
            special=bool(entry.get("special")),
        )  # fmt: skip
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(content) != int(number):
            raise BaseModelError(
                f"tokenizer_config.json gives {content!r} the id {number}, the tokenizer gives it "
                f"{tokenizer.token_to_id(content)}",
                hint="the tokenizer files are of two different models",
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read as JSON ({error})") from error
    return value if isinstance(value, dict) else {}
