"""Where the embeddings of a new vocabulary start: from the teacher's, through words that both languages share.

A piece starts at the mean of the vectors of the words it is a part of, each weighed by how often it is seen:
- a word of the teacher's language: the teacher's own piece of the same letters where it has one, else the mean of the
  teacher's pieces of that word (overlap after the teacher's lower-casing and stripping, as in WECHSEL, Minixhofer et
  al. 2022, https://arxiv.org/abs/2112.06598);
- a word of the new language: the mean of its translations in the parallel text, weighed by their share;
- a word without a translation: the mean of the most similar words that have one, by the company they keep in text (as
  in FOCUS, Dobler and de Melo 2023, https://arxiv.org/abs/2305.14481).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn

from alambic.model.encoder import Encoder
from alambic.model.vocabulary import CONTINUES, FIRST, LAST, MASK, PAD, UNKNOWN, special_id
from alambic.model.vocabulary_align import Lexicon

Neighbours = Mapping[str, Sequence[tuple[str, float]]]
Vectors = NDArray[np.float32]
_WORDS = 200_000  # the most frequent of each language


@dataclass(frozen=True)
class Start:
    """The first embeddings of a vocabulary.

    Attributes:
        table: [V, H].
        sources: share of the running words by where their vectors come from: ``known`` (the teacher's language),
            ``translated``, ``similar`` and ``none``.
    """

    table: Vectors
    sources: dict[str, float]


def start_embeddings(
    tokenizer: Tokenizer,
    teacher: Tokenizer,
    embeddings: Vectors,
    *,
    known: Mapping[str, int],
    new: Mapping[str, int],
    lexicon: Lexicon,
    neighbours: Neighbours,
    special: Mapping[str, int],
) -> Start:
    """Return the embeddings [V, H] that `tokenizer` starts from.

    Args:
        tokenizer: of the student.
        teacher: tokenizer of the teacher.
        embeddings: [V of the teacher, H].
        known: words of the teacher's language and how often they occur.
        new: words of the new language, the same.
        lexicon: translations of words of the new language (lower case).
        neighbours: words of the new language (lower case) that are like one without a translation.
        special: special tokens of the student, and the numbers of the teacher's tokens that they start from.
    """
    words = _TeacherWords(teacher, embeddings)
    sums = _Sums(tokenizer, words)
    sums.add(known, lambda word: ("known", words.vector(word)), same_language=True)
    sums.add(new, lambda word: _translated(word, words, lexicon, neighbours), same_language=False)
    return Start(sums.table(special), sums.seen)


class _Sums:
    """What the words that a piece is a part of add up to."""

    def __init__(self, tokenizer: Tokenizer, words: _TeacherWords) -> None:
        self.tokenizer, self.words = tokenizer, words
        self.vectors = np.zeros((tokenizer.get_vocab_size(), words.embeddings.shape[1]))
        self.weights, self.lengths = np.zeros(len(self.vectors)), np.zeros(len(self.vectors))
        self.usual = float(np.linalg.norm(words.embeddings, axis=1).mean())
        self.seen = dict.fromkeys(("known", "translated", "similar", "none"), 0.0)

    def add(
        self, counts: Mapping[str, int], look_up: Callable[[str], tuple[str, Vectors | None]], *, same_language: bool
    ) -> None:
        """Add the words of one language, each by its share of that language."""
        total = sum(counts.values())
        frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_WORDS]
        encodings = self.tokenizer.encode_batch_fast([word for word, _ in frequent], add_special_tokens=False)
        for (word, n), encoding in zip(frequent, encodings, strict=True):
            source, vector = look_up(word)
            self.seen[source] += n / total / 2
            if vector is None:
                continue
            for number in encoding.ids:  # the fast encoding has no strings of its pieces
                piece = self.tokenizer.id_to_token(number)
                # Letters shared by two languages say nothing; figures and marks mean the same in both.
                own = self.words.own(word, piece) if same_language or not word.isalpha() else None
                self._add(number, n / total, vector, own)

    def _add(self, number: int, share: float, vector: Vectors, own: Vectors | None) -> None:
        self.vectors[number] += share * (vector if own is None else own)
        # A mean is shorter than what it is made of; a piece that the teacher has keeps its length.
        self.lengths[number] += share * (self.usual if own is None else float(np.linalg.norm(own)))
        self.weights[number] += share

    def table(self, special: Mapping[str, int]) -> Vectors:
        """Return the embeddings [V, H]; a piece that no word has gets the mean of the teacher's."""
        embeddings = self.words.embeddings
        table = np.repeat(embeddings.mean(axis=0, keepdims=True), len(self.vectors), axis=0)
        found = self.weights > 0
        table[found] = self.vectors[found] / np.linalg.norm(self.vectors[found], axis=1, keepdims=True)
        table[found] *= (self.lengths[found] / self.weights[found])[:, None]
        for name, number in special.items():
            table[self.tokenizer.token_to_id(name)] = embeddings[number]
        return table.astype(np.float32)


def _translated(
    word: str, words: _TeacherWords, lexicon: Lexicon, neighbours: Neighbours
) -> tuple[str, Vectors | None]:
    lower = word.lower()
    if not any(c.isalpha() for c in word):
        return "known", words.vector(word)
    if lower in lexicon:
        return "translated", words.mean(lexicon[lower])
    alike = [(words.mean(lexicon[other]), share) for other, share in neighbours.get(lower, ()) if other in lexicon]
    if not alike:
        return "none", None
    total = sum(share for _, share in alike)
    return "similar", sum((vector * np.float32(share / total) for vector, share in alike), np.float32(0))  # type: ignore[return-value]


class _TeacherWords:
    """The teacher's vectors of whole words."""

    def __init__(self, tokenizer: Tokenizer, embeddings: Vectors) -> None:
        self.tokenizer, self.embeddings = tokenizer, embeddings
        # Byte-level vocabularies have a word as it stands after a space.
        self.before = " " if "ByteLevel" in str(tokenizer.pre_tokenizer) else ""
        self._known: dict[str, tuple[dict[str, int], Vectors]] = {}

    def vector(self, word: str) -> Vectors:
        """Return the mean of the pieces of `word` [H]."""
        return self._look(word)[1]

    def own(self, word: str, piece: str) -> Vectors | None:
        """Return the teacher's vector of the piece of `word` that has the letters of `piece`, if there is one."""
        bare = piece.removeprefix(CONTINUES)
        lowered = self.tokenizer.normalizer.normalize_str(bare) if self.tokenizer.normalizer else bare
        number = self._look(word)[0].get(piece[: len(piece) - len(bare)] + lowered)
        return None if number is None else self.embeddings[number]

    def mean(self, translations: Sequence[tuple[str, float]]) -> Vectors:
        """Return the mean of several words [H], each with its weight."""
        total = sum(share for _, share in translations)
        out = np.zeros(self.embeddings.shape[1], dtype=np.float32)
        for word, share in translations:
            out += self.vector(word) * np.float32(share / total)
        return out

    def _look(self, word: str) -> tuple[dict[str, int], Vectors]:
        if word not in self._known:
            found = self.tokenizer.encode(self.before + word, add_special_tokens=False)
            ids = found.ids or [0]
            self._known[word] = dict(zip(found.tokens, found.ids, strict=True)), self.embeddings[ids].mean(axis=0)
        return self._known[word]


def special_tokens(teacher: Encoder) -> dict[str, int]:
    """Return the teacher's tokens that the student's special tokens start from; those it has not got are left out."""
    first, last = teacher.special_ids()
    named = {name: special_id(teacher.tokenizer, name) for name in (UNKNOWN, MASK)}
    found = {PAD: teacher.pad_id, FIRST: first[0] if first else None, LAST: last[-1] if last else None, **named}
    return {name: number for name, number in found.items() if number is not None}


def with_vocabulary(teacher: Encoder, tokenizer: Tokenizer, table: Vectors) -> Encoder:
    """Return the teacher's own layers under another vocabulary, whose embeddings are `table` [V, H]."""
    backbone = teacher.backbone
    embeddings = nn.Embedding(*table.shape, padding_idx=tokenizer.token_to_id(PAD))
    with torch.no_grad():
        embeddings.weight.copy_(torch.from_numpy(table))
    backbone.set_input_embeddings(embeddings)
    backbone.config.vocab_size = len(table)
    backbone.config.pad_token_id = tokenizer.token_to_id(PAD)
    for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(backbone.config, name, None) is not None:
            setattr(backbone.config, name, tokenizer.token_to_id(FIRST if name[0] in "bc" else LAST))
    return Encoder(backbone, tokenizer, teacher.spec)
