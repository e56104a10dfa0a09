"""Ids to text piece by piece: whole characters only, and no part of a stop text."""

import random

import pytest
import tokenizers

from alambic.engines.detokenise import Detokeniser, StopFinder

TEXTS = [
    "où été garçon 你好 🙂 👩‍👩‍👧 naïve",
    "plain words only",
    "\ufffd at the start and \ufffd\ufffd inside \ufffd",
    "🙂" * 20,
]


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback():
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "é"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def pushed(tokenizer, ids, **options):
    detokeniser = Detokeniser(tokenizer, **options)
    pieces = [detokeniser.push([id]) for id in ids]
    return pieces, detokeniser.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_when_tokens_are_bytes(byte_level, text):
    pieces, rest = pushed(byte_level, byte_level.encode(text).ids)
    assert "".join(pieces) + rest == text
    if "\ufffd" not in text:
        assert rest == "" and all("\ufffd" not in piece for piece in pieces)


def test_pieces_join_to_what_decode_gives_when_ids_are_random(byte_level):
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(1, byte_level.get_vocab_size()) for _ in range(60)]
        pieces, rest = pushed(byte_level, ids)
        assert "".join(pieces) + rest == byte_level.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", ["a b", "ab é 🙂 a", "🙂🙂 你好 a"])
def test_pieces_join_to_the_text_when_bytes_are_a_fallback(byte_fallback, text):
    ids = byte_fallback.encode(text).ids
    pieces, rest = pushed(byte_fallback, ids)
    assert "".join(pieces) + rest == text == byte_fallback.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


def test_text_goes_on_when_broken_bytes_never_become_a_character(byte_fallback):
    ids = [0xE2 + 1] * 6 + [byte_fallback.token_to_id("a")]
    pieces, rest = pushed(byte_fallback, ids)
    assert any(pieces[:6])
    assert ("".join(pieces) + rest).endswith("a")


def test_space_is_kept_when_an_answer_goes_on(byte_fallback):
    ids = byte_fallback.encode("a a").ids
    assert "".join(pushed(byte_fallback, ids[1:], before=ids[:1])[0]) == " a"


def test_ids_show_nothing_when_they_are_silent(byte_level):
    ids = [0, *byte_level.encode("où").ids, 0]
    pieces, rest = pushed(byte_level, ids, silent={0})
    assert "".join(pieces) + rest == "où"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "given"),
    [
        ("hello world", ("wor",), "hello "),
        ("aab", ("ab",), "a"),
        ("hello", ("lo!", "x"), "hello"),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("abcabd", ("abd", "bca"), "a"),
        ("hello", (), "hello"),
        ("hello", ("",), "hello"),
    ],
)
def test_text_ends_before_the_first_stop_when_it_comes_in_pieces(text, stops, given, size):
    finder, said = StopFinder(stops), ""
    for i in range(0, len(text), size):
        piece = finder.push(text[i : i + size])
        said += piece
        assert given.startswith(said)
    assert said + finder.flush() == given
    assert finder.found == any(stop and stop in text for stop in stops)
