"""A vocabulary of its own for an encoder: WordPiece, cased, accents kept, made from a sample of the user's text.

WordPiece (Schuster and Nakajima 2012; Wu et al. 2016, https://arxiv.org/abs/1609.08144) with BERT's splitting at white
space and punctuation, because every engine and every converter reads it and gives the same ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

from alambic.errors import TrainError

PAD, UNKNOWN, FIRST, LAST, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNKNOWN, FIRST, LAST, MASK)
CONTINUES = "##"
_SPELLINGS = {UNKNOWN: ("[UNK]", "<unk>"), MASK: ("[MASK]", "<mask>", "<|mask|>")}
_ALPHABET = 600  # characters kept; a rarer one is unknown
_FEWEST = 1_000


def train_vocabulary(counts: Sequence[Mapping[str, int]], *, pieces: int, pad_id: int = 0) -> Tokenizer:
    """Make a WordPiece tokenizer of `pieces` pieces from the words of several languages, each with the same say.

    Args:
        counts: words and how often they occur, one table a language.
        pieces: size of the vocabulary, special tokens included; fewer come out when the text has no more.
        pad_id: id of the token that pads; some architectures count positions from it. It is 0 when over 4.

    Raises:
        TrainError: `pieces` is too small to hold an alphabet.
    """
    if pieces < _FEWEST:
        raise TrainError(f"vocabulary.pieces = {pieces}: at least {_FEWEST} are needed")
    tokenizer = Tokenizer(
        WordPiece(unk_token=UNKNOWN, max_input_chars_per_word=100, continuing_subword_prefix=CONTINUES)
    )
    special = list(SPECIAL[1:])
    special.insert(pad_id if pad_id < len(SPECIAL) else 0, PAD)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    trainer = trainers.WordPieceTrainer(
        vocab_size=pieces, special_tokens=special, limit_alphabet=_ALPHABET, show_progress=False,
        continuing_subword_prefix=CONTINUES, min_frequency=2,
    )  # fmt: skip
    tokenizer.train_from_iterator(_repeated(counts), trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (FIRST, LAST)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}", pair=f"{FIRST} $A {LAST} $B:1 {LAST}:1", special_tokens=ids
    )
    return tokenizer


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Count the words of `texts` as `train_vocabulary` splits them, case kept."""
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    return counts


def special_id(tokenizer: Tokenizer, name: str) -> int | None:
    """Return the id of the special token `name` (``[UNK]`` or ``[MASK]``) in one of its spellings, if it is there."""
    return next((i for spelling in _SPELLINGS[name] if (i := tokenizer.token_to_id(spelling)) is not None), None)


def mask_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that hides another.

    Raises:
        TrainError: there is none.
    """
    found = special_id(tokenizer, MASK)
    if found is None:
        raise TrainError(
            f"the tokenizer has no mask token ({', '.join(_SPELLINGS[MASK])}): no word can be hidden from it",
            hint="a vocabulary of its own has one: leave vocabulary.keep out; or leave [masked] out",
        )
    return found


_SAY = 5_000_000  # words that each language counts for, or as many as the larger one has
_LINE = 1_000  # copies of a word in one text given to the trainer


def _repeated(counts: Sequence[Mapping[str, int]]) -> Iterator[str]:
    """Yield each word as often as its share of its language asks for: the trainer counts words itself."""
    totals = [sum(table.values()) for table in counts]
    say = min(_SAY, max(totals, default=0))
    for table, total in zip(counts, totals, strict=True):
        for word, n in table.items():
            copies = round(n * say / total)
            for start in range(0, copies, _LINE):
                yield " ".join([word] * min(_LINE, copies - start))
