"""Counts behind the scores of free text: exact match, token F1, BLEU, chrF, ROUGE. See text.py for the table.

sacrebleu counts n-grams and rouge-score finds common subsequences; the two `finish_` functions only put their formulas
over many resamples at once, and tests hold them equal to the libraries' own.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.errors import MissingExtra

Floats = NDArray[np.float64]
References = Sequence[Sequence[str]]

SQUAD_SIGNATURE = (
    "SQuAD v1.1: lower case, punctuation and articles (a an the, le la les l' un une des du) removed, "
    "French elisions split, white space folded; best reference"
)
_SPACE = re.compile(r"\s+")
_ARTICLES = re.compile(r"\b(a|an|the|le|la|les|l|un|une|des|du)\b")
# l'été is two words. Only what French elides is split, so that English contractions stay as SQuAD has them.
_ELISION = re.compile(r"\b(l|d|j|m|t|s|n|c|qu|jusqu|lorsqu|puisqu|quoiqu)['\u2019](?=\w{2})", re.IGNORECASE)
_ASCII_PUNCTUATION = frozenset(string.punctuation)
_ORDER = 4  # of BLEU
_CHAR_ORDER, _BETA = 6, 2  # of chrF


def mean(sums: Floats, n: int) -> Floats:
    """Return the mean of the only count."""
    return sums[:, 0] / max(n, 1)


def fold(text: str) -> str:
    """Return `text` in NFC with every run of white space as one space, none at the ends."""
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def squad_tokens(text: str) -> list[str]:
    """Return the words of `text` that SQuAD's measures compare (Rajpurkar et al. 2016), French read as French.

    Lower case, elisions split, punctuation removed, articles of English and French removed.
    """
    text = _ELISION.sub(r"\1 ", unicodedata.normalize("NFC", text).lower())
    text = "".join(c for c in text if c not in _ASCII_PUNCTUATION and not unicodedata.category(c).startswith("P"))
    return _ARTICLES.sub(" ", text).split()


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the words shared; two texts without a word left agree."""
    said, true = squad_tokens(prediction), squad_tokens(reference)
    if not said or not true:
        return float(said == true)
    both = sum((Counter(said) & Counter(true)).values())
    return 2.0 * both / (len(said) + len(true))


def exact_rows(predictions: Sequence[str], references: References) -> Floats:
    """Count rows equal to a reference once white space is folded."""
    return _best(predictions, references, lambda said, true: float(fold(said) == fold(true)))


def squad_exact_rows(predictions: Sequence[str], references: References) -> Floats:
    """Count rows with the words of a reference, as SQuAD normalises them."""
    return _best(predictions, references, lambda said, true: float(squad_tokens(said) == squad_tokens(true)))


def token_f1_rows(predictions: Sequence[str], references: References) -> Floats:
    """Return the best token F1 of each row."""
    return _best(predictions, references, token_f1)


def _best(predictions: Sequence[str], references: References, score: Any) -> Floats:
    pairs = zip(predictions, references, strict=True)
    return np.array([[max(score(said, true) for true in accepted)] for said, accepted in pairs])


class Bleu:
    """Corpus BLEU by sacrebleu (Post 2018), 13a tokens, case kept, exponential smoothing."""

    lowercase = False
    tokenize = "13a"

    def signature(self) -> str:
        """Return sacrebleu's signature; ``nrefs`` is left out, as rows may have several."""
        return _signed(self._metric)

    def rows(self, predictions: Sequence[str], references: References) -> Floats:
        """Return lengths of hypothesis and reference, matches and n-grams of orders 1 to 4: [N, 10]."""
        return _statistics(self._metric, predictions, references)

    @cached_property
    def _metric(self) -> Any:
        return _extras.load("sacrebleu").BLEU(
            lowercase=self.lowercase, tokenize=self.tokenize, max_ngram_order=_ORDER, force=True
        )


class MosesBleu(Bleu):
    """BLEU on lower-cased text cut by the Moses tokenizer: what papers on Multi30k report (multi-bleu.perl).

    sacremoses is that tokenizer in Python. Predictions and references are plain text here.
    """

    lowercase = True
    tokenize = "none"

    def __init__(self, language: str) -> None:
        self._language = language

    def signature(self) -> str:
        """Return sacrebleu's signature and that of the tokenizer before it."""
        version = _extras.load("importlib.metadata").version("sacremoses")
        return f"{super().signature()}|tokens:moses-{self._language}(sacremoses {version})"

    def rows(self, predictions: Sequence[str], references: References) -> Floats:
        """Return the counts of `Bleu.rows` on Moses tokens."""
        cut = self._cut
        return super().rows([cut(text) for text in predictions], [[cut(text) for text in row] for row in references])

    def _cut(self, text: str) -> str:
        return str(self._tokenizer.tokenize(text, return_str=True, escape=False))

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            moses = _extras.load("sacremoses")
        except MissingExtra as error:
            error.hint = "pip install sacremoses (or measure `bleu`, sacrebleu's own 13a tokens)"
            raise
        return moses.MosesTokenizer(lang=self._language)


class Chrf:
    """Corpus chrF by sacrebleu: character n-grams up to 6, no words, beta 2 (Popović 2015)."""

    def signature(self) -> str:
        """Return sacrebleu's signature."""
        return _signed(self._metric)

    def rows(self, predictions: Sequence[str], references: References) -> Floats:
        """Return n-grams of hypothesis, of reference and shared, for each order: [N, 18]."""
        return _statistics(self._metric, predictions, references)

    @cached_property
    def _metric(self) -> Any:
        return _extras.load("sacrebleu").CHRF(char_order=_CHAR_ORDER, word_order=0, beta=_BETA)


def _signed(metric: Any) -> str:
    metric.num_refs = 1  # sacrebleu signs nothing before it has scored something
    parts = str(metric.get_signature()).split("|")
    return "|".join(part for part in parts if not part.startswith("nrefs:"))


def _statistics(metric: Any, predictions: Sequence[str], references: References) -> Floats:
    # sacrebleu takes one stream for each place in the list of references; None where a row has fewer.
    streams = [
        [row[i] if i < len(row) else None for row in references] for i in range(max(len(row) for row in references))
    ]
    # The counts behind its own paired tests (sacrebleu/significance.py).
    return np.array(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)


def finish_bleu(sums: Floats, n: int) -> Floats:
    """Return BLEU (0..1) of sums [R, 10], exponentially smoothed as in sacrebleu's `compute_bleu`."""
    said, true = sums[:, 0], sums[:, 1]
    correct, total = sums[:, 2 : 2 + _ORDER], sums[:, 2 + _ORDER :]
    log_precision = np.zeros(len(sums))
    halving = np.ones(len(sums))
    for order in range(_ORDER):
        missed = (correct[:, order] == 0) & (total[:, order] > 0)
        halving = np.where(missed, 2.0 * halving, halving)
        shown = np.where(missed, 1.0 / halving, correct[:, order])
        # Too short a text for this order has precision 0 and BLEU 0.
        share = np.divide(shown, total[:, order], out=np.zeros(len(sums)), where=total[:, order] > 0)
        log_precision += np.log(share, out=np.full(len(sums), -np.inf), where=share > 0) / _ORDER
    ratio = np.divide(true, said, out=np.zeros(len(sums)), where=said > 0)
    brevity = np.where(said >= true, 1.0, np.exp(1.0 - ratio))
    found = correct.any(axis=1) & (said > 0)
    return np.where(found, brevity * np.exp(log_precision), 0.0)


def finish_chrf(sums: Floats, n: int) -> Floats:
    """Return chrF (0..1) of sums [R, 18]: F-beta of the means of precision and recall over orders both texts have."""
    said, true, both = (sums[:, i::3] for i in range(3))
    used = (said > 0) & (true > 0)
    orders = np.maximum(used.sum(axis=1), 1)
    precision = np.divide(both, said, out=np.zeros_like(both), where=used).sum(axis=1) / orders
    recall = np.divide(both, true, out=np.zeros_like(both), where=used).sum(axis=1) / orders
    below = _BETA**2 * precision + recall
    top = (1 + _BETA**2) * precision * recall
    score: Floats = np.divide(top, below, out=np.zeros_like(top), where=below > 0)
    return score


@dataclass(frozen=True)
class Rouge:
    """ROUGE F1 by google's rouge-score, no stemming; best reference, mean over rows (Lin 2004).

    Attributes:
        kind: ``rouge1``, ``rouge2`` or ``rougeL``.
        tokenizer: ``unicode`` keeps letters of every alphabet; ``ascii`` is rouge-score's own, which cuts at every
            accent (``été`` gives ``t``) and is what most published figures used.
    """

    kind: str
    tokenizer: str

    def signature(self) -> str:
        """Return library, version, tokenizer and what is averaged."""
        version = _extras.load("importlib.metadata").version("rouge-score")
        rule = "[a-z0-9]+ of the lower-cased text" if self.tokenizer == "ascii" else "letters and digits, lower case"
        return f"{self.kind}|F1|no stemming|tokens:{self.tokenizer} ({rule})|rouge-score {version}"

    def rows(self, predictions: Sequence[str], references: References) -> Floats:
        """Return the best F1 of each row."""
        module = _extras.load("rouge_score.rouge_scorer")
        own = UnicodeTokens() if self.tokenizer == "unicode" else None
        scorer = module.RougeScorer([self.kind], use_stemmer=False, tokenizer=own)

        def score(said: str, true: str) -> float:
            return float(scorer.score(true, said)[self.kind].fmeasure)

        return _best(predictions, references, score)


class UnicodeTokens:
    """Words of any alphabet, lower-cased, accents kept: the tokenizer that rouge-score asks for."""

    _word = re.compile(r"[^\W_]+")

    def tokenize(self, text: str) -> list[str]:
        """Return the words of `text`."""
        return self._word.findall(unicodedata.normalize("NFC", text).lower())
