"""The corpus: documents read as a stream, words as numbers, rules, test texts, duplicates, what is held out."""

import gzip
import json
import lzma
import random
import re

import numpy as np
import pytest

from alambic.data import corpus_contamination as contamination
from alambic.data import corpus_read
from alambic.data.corpus import Sieve, decide, draw_rows, prepare_source
from alambic.data.corpus_read import files_of, read_documents
from alambic.data.corpus_rules import STOP_WORDS, fault_of, language_shares
from alambic.data.corpus_sketch import near_duplicates, sketch
from alambic.data.corpus_store import open_store
from alambic.data.corpus_words import cut
from alambic.errors import DataError
from alambic.events import drain
from alambic.pretrain_config import CleanSpec, DedupSpec, SourceSpec, ValidSpec

FRENCH = (
    "Le technicien qui répare la chaudière doit couper l'eau avant de démonter la vanne, puis il vérifie que le joint "
    "est en bon état. Si la pression ne remonte pas, on regarde dans le circuit où se trouve une fuite et on appelle "
    "le service. Les pièces sont dans la camionnette, avec les outils et une notice pour chaque modèle de la marque."
)
ENGLISH = (
    "The engineer who repairs the boiler must close the water before taking the valve apart, and then checks that the "
    "seal is in good order. If the pressure does not rise again, they look for a leak in the circuit and call the "
    "office. The parts are in the van, with the tools and a manual for each model of the brand that we sell."
)
WORDS = [f"mot{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]


def prose(seed, count=120):
    """Return words in a random order with French function words between them: no rule drops it."""
    rng = random.Random(seed)
    small = STOP_WORDS["fr"].split()
    return " ".join(rng.choice(small) if i % 3 == 0 else rng.choice(WORDS) + rng.choice(WORDS) for i in range(count))


def source(**other):
    return SourceSpec(**{"name": "s", "path": "*.txt", "language": "fr", "licence": "CC0-1.0", **other})


def texts(path, render=None):
    return [document.text for document in read_documents([path], render)]


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".xz", lzma.open), (".gz", gzip.open)])
def test_documents_are_separated_by_the_end_line_when_read(tmp_path, suffix, opener):
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wb") as file:
        file.write("un\r\ndeux\n<|endoftext|>\n\n<|endoftext|>\nété\u0301 <|endoftext|> reste\n".encode())
    assert texts(path) == ["un\ndeux", "été\u0301 <|endoftext|> reste".replace("e\u0301", "é")]


def test_documents_are_read_when_packed_with_zstandard(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.txt.zst"), "zstd") as file:
        file.write(b"premier\n<|endoftext|>\nsecond\n" * 2)
    assert texts(tmp_path / "a.txt.zst") == ["premier", "second\npremier", "second"]


def test_rows_of_every_form_are_read_when_jsonl(tmp_path):
    rows = [
        {"text": "un texte"},
        {"messages": [{"role": "user", "content": "Bonjour"}, {"role": "assistant", "content": "Salut"}]},
        {"prompt": "2+2 ?", "completion": "4<|endoftext|>\n"},
        {"other": 1},
    ]
    path = tmp_path / "a.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + "\n{broken\n[1]\n")
    found = list(read_documents([path], lambda chat: "|".join(f"{m.role}:{m.content}" for m in chat.messages)))
    assert [d.text for d in found[:3]] == ["un texte", "user:Bonjour|assistant:Salut", "user:2+2 ?|assistant:4"]
    assert [d.chat for d in found[:3]] == [False, True, True]
    assert found[1].words == "Bonjour\nSalut"
    assert "neither text" in found[3].fault and "not a JSON object" in found[5].fault and found[4].fault
    assert [d.where for d in found] == [f"a.jsonl.xz:{i}" for i in range(1, 7)]
    assert [d.parent for d in found] == list(range(6))


@pytest.mark.parametrize("end", ["", "\n"])
def test_row_longer_than_a_block_is_read_whole_when_jsonl(tmp_path, monkeypatch, end):
    row = json.dumps({"text": "abc " * 30})
    monkeypatch.setattr(corpus_read, "_LINE", len(row) // 2)  # an even length: the last block is full
    assert len(row) % 2 == 0
    (tmp_path / "a.jsonl").write_text(row + "\n" + row + end)
    assert texts(tmp_path / "a.jsonl") == [("abc " * 30).strip()] * 2


def test_long_document_is_cut_between_paragraphs_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_read, "PIECE", 100)
    paragraph = "x" * 39 + "\n"
    whole = "".join(paragraph + paragraph + "\n" for _ in range(4))
    (tmp_path / "a.txt").write_text(whole + "<|endoftext|>\ncourt\n")
    found = list(read_documents([tmp_path / "a.txt"], None))
    assert [d.parent for d in found] == [0, 0, 1]
    assert all(len(d.text) <= 200 for d in found)
    assert "\n\n".join(d.text for d in found[:2]) == whole.strip()


def test_truncated_file_is_an_error_with_its_line_when_read(tmp_path):
    data = lzma.compress("\n".join(prose(i) for i in range(200)).encode())
    (tmp_path / "a.txt.xz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.txt\.xz:\d+: cannot be unpacked"):
        texts(tmp_path / "a.txt.xz")


def test_missing_or_unknown_file_is_an_error_when_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        files_of("*.txt", tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"not read from \.pdf"):
        files_of("a.pdf", tmp_path)


def test_words_are_those_of_a_plain_loop_when_cut():
    text = "L’été — 20\u202f000 €, « ÉTÉ » l'été; x_y 🙂 naïve"
    plain = re.findall(r"[^\W_]+", text.lower())
    words = cut(text)
    assert len(words) == len(plain)
    by_text = {}
    for word, number in zip(plain, words.hashes.tolist(), strict=True):
        assert by_text.setdefault(word, number) == number
    assert len(set(by_text.values())) == len(by_text)
    assert words.lengths.tolist() == [len(word) for word in plain]
    assert words.has_letter.tolist() == [any(c.isalpha() for c in word) for word in plain]
    assert words.characters == len(text)


def test_ngrams_are_equal_exactly_where_words_are_when_hashed():
    rng = random.Random(0)
    said = [rng.choice("abc") for _ in range(400)]
    hashes = cut(" ".join(said)).ngrams(4)
    by_words = {}
    for i, number in enumerate(hashes.tolist()):
        assert by_words.setdefault(tuple(said[i : i + 4]), number) == number
    assert len(set(by_words.values())) == len(by_words) == len(set(hashes.tolist()))
    assert cut("a b").ngrams(4).tolist() == []
    assert cut("deux mots").ngrams(2)[0] == cut("Encore, DEUX « mots »").ngrams(2)[1]


def test_good_documents_are_kept_when_judged():
    for text, language in ((FRENCH, "fr"), (ENGLISH, "en"), (prose(1), "fr"), (ENGLISH, "de")):
        assert fault_of(text, cut(text), language, CleanSpec()) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("!!! ... !!!", "empty"),
        ("trop court", "min_words"),
        ("a b c d e f g h i j " * 5, "mean_word"),
        (FRENCH + " {$}" * 150, "symbols"),
        (FRENCH + " 123456789" * 20, "digits"),
        (FRENCH + " 1" * 60, "alphabetic_words"),
        (FRENCH.replace("é", "Ã©"), "mojibake"),
        ("Lorem ipsum dolor sit amet. " + FRENCH, "filler"),
        ("\n".join("- " + line for line in prose(2).split(" mot")), "bullet_lines"),
        ("\n".join(line + "..." for line in prose(3).split(" mot")), "ellipsis_lines"),
        ("\n".join([FRENCH, *["Cliquez ici pour accepter tous les cookies de ce site."] * 12]), "duplicate_lines"),
        (prose(4, 60) + " " + "vendredi prochain " * 20, "top_ngrams"),
        (f"{prose(5, 40)} {prose(5, 40)}", "duplicate_ngrams"),
        (" ".join(WORDS), "stop_words"),
        (ENGLISH, "language"),
    ],
)
def test_each_rule_drops_what_it_is_made_for_when_judged(text, fault):
    given = text if fault != "symbols" else FRENCH + " {$}[%]" * 60
    assert fault_of(given, cut(given), "fr", CleanSpec(alphabetic_words=0.9)) == fault


def test_rules_are_silent_when_turned_off():
    assert fault_of("trop court", cut("trop court"), "fr", CleanSpec(filters=False)) is None
    mixed = f"{ENGLISH} {FRENCH[:100]}"
    assert fault_of(mixed, cut(mixed), "fr", CleanSpec()) == "language"
    assert fault_of(mixed, cut(mixed), "fr", CleanSpec(language_check=False)) is None
    mail = FRENCH + " Écrivez à jean.dupont@exemple.fr"
    assert fault_of(mail, cut(mail), "fr", CleanSpec()) is None
    assert fault_of(mail, cut(mail), "fr", CleanSpec(personal_data="drop")) == "personal_data"


def test_function_words_tell_the_language_when_counted():
    french, english = language_shares(cut(FRENCH)), language_shares(cut(ENGLISH))
    assert french["fr"][0] > 0.3 > 0.05 > french["en"][0]
    assert english["en"][0] > 0.3 > 0.05 > english["fr"][0]


def make_tests(folder):
    long = " ".join(f"question{i}" for i in range(30))
    rows = [{"q": long, "n": ["quelle", "heure"]}, {"q": "un deux trois quatre cinq six sept huit neuf"},
            {"q": "trop court"}, {"q": " ".join("123456789" for _ in range(20))}]  # fmt: skip
    folder.mkdir()
    with lzma.open(folder / "test.jsonl.xz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    (folder / "train.jsonl").write_text(json.dumps({"q": FRENCH}))
    files = contamination.test_files([folder], ("*test*",))
    return drain(contamination.build_index(files, ngram=13, short=8)), long.split()


def test_document_with_words_of_a_test_is_found_when_looked_up(tmp_path):
    index, long = make_tests(tmp_path / "sets")
    index.save(tmp_path / "index.npz")
    for tests in (index, contamination.TestIndex.load(tmp_path / "index.npz")):
        held = f"{FRENCH} « {', '.join(long[5:18])} » {FRENCH}"
        name, start, length = tests.find(cut(held))
        assert (name, length) == ("test.jsonl.xz", 13)
        assert contamination.excerpt(held, start, length).split(", ")[0] == "question5"
        assert tests.find(cut(" ".join(long[5:17]))) is None  # twelve words only
        assert tests.find(cut(f"{FRENCH} Un, deux, trois, quatre, cinq, six, sept, huit, neuf. {FRENCH}"))[2] == 9
        assert tests.find(cut(f"{FRENCH} un deux trois quatre cinq six sept huit dix")) is None
        assert tests.find(cut("123456789 " * 30)) is None  # a row of numbers is no sign of a text
        assert tests.find(cut(FRENCH)) is None  # the training file was not named
        assert (tests.texts, tests.not_searched) == (2, 5)


def test_folder_without_test_files_is_an_error_when_listed(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no test file named"):
        contamination.test_files([tmp_path], ("*test*",))
    with pytest.raises(DataError, match="no such folder"):
        contamination.test_files([tmp_path / "absent"], ("*",))
    assert contamination.test_files([tmp_path / "train.jsonl"], ("*test*",))[0][0] == "train.jsonl"


def test_sketches_estimate_the_similarity_when_compared():
    base = [f"w{i}" for i in range(600)]
    for changed in (0, 6, 30, 90):
        other = [f"z{i}" if i < changed else word for i, word in enumerate(base)]
        a, b = (set(zip(*(words[k:] for k in range(5)), strict=False)) for words in (base, other))
        exact = len(a & b) / len(a | b)
        estimate = float((sketch(cut(" ".join(base))) == sketch(cut(" ".join(other)))).mean())
        assert abs(estimate - exact) < 0.15
    assert float((sketch(cut(FRENCH)) == sketch(cut(ENGLISH))).mean()) < 0.05


def test_near_duplicates_are_dropped_and_others_kept_when_found():
    base = [prose(seed, 300).split() for seed in range(40)]
    near = [[*words[:290], "tout", "autre", "fin"] for words in base[:10]]
    sketches = np.stack([sketch(cut(" ".join(words))) for words in base + near])
    found = near_duplicates(sketches, threshold=0.75, skip=np.zeros(50, bool))
    assert found[:40].tolist() == [-1] * 40
    assert found[40:].tolist() == list(range(10))
    skipped = np.arange(50) < 5
    assert near_duplicates(sketches, threshold=0.75, skip=skipped)[40:46].tolist() == [-1] * 5 + [5]


def prepared(tmp_path, name, documents, **spec):
    (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents))
    given = source(name=name, path=f"{name}.txt", **spec)
    files, out = files_of(given.path, tmp_path), tmp_path / f"store-{name}"
    counts = drain(prepare_source(given, files, Sieve("fr", CleanSpec(), None), str, seed=0, out=out))
    return counts, open_store(out)


def test_every_document_is_accounted_for_when_prepared(tmp_path):
    documents = [prose(1), "court", ENGLISH, prose(2)]
    counts, store = prepared(tmp_path, "a", documents)
    assert list(store.texts(range(2))) == [prose(1), prose(2)] and len(store) == 2
    assert (counts.documents, counts.kept_documents) == (4, 2)
    assert {reason: d.documents for reason, d in counts.dropped.items()} == {"min_words": 1, "language": 1}
    assert counts.dropped["min_words"].examples == [{"where": "a.txt:3", "text": "court"}]
    dropped = sum(d.utf8_bytes for d in counts.dropped.values())
    assert counts.read_bytes == counts.kept_bytes + dropped == sum(len(d.encode()) for d in documents)


def test_documents_are_drawn_at_random_up_to_the_limit_when_limited(tmp_path):
    documents = [prose(seed) for seed in range(60)]
    size = len(documents[0].encode())
    counts, store = prepared(tmp_path, "a", documents, mb=10 * size / 1e6)
    assert counts.documents == 60 and 9 <= counts.read_documents <= 12
    kept = [documents.index(text) for text in store.texts(range(len(store)))]
    assert kept == sorted(kept) and max(kept) > 20  # not the first ones
    again = prepared(tmp_path, "a", documents, mb=10 * size / 1e6)[1]
    assert list(again.texts(range(len(again)))) == [documents[i] for i in kept]


def test_duplicates_stay_in_the_first_source_when_decided(tmp_path):
    first = prepared(tmp_path, "a", [prose(s, 300) for s in range(10)])[1]
    changed = prose(1, 300).rsplit(" ", 3)[0] + " et puis fin"
    second = prepared(tmp_path, "b", [prose(0, 300).upper(), changed, *(prose(s, 300) for s in range(20, 30))])[1]
    made = decide([("a", first), ("b", second)], DedupSpec(), ValidSpec(share=0.2), seed=0)
    assert [rows.tolist() for rows in made.exact] == [[], [0]]
    assert [rows.tolist() for rows in made.near] == [[], [1]]
    for i, store in enumerate((first, second)):
        rows = [*made.train[i], *made.valid[i], *made.exact[i], *made.near[i]]
        assert sorted(rows) == list(range(len(store)))
        assert len(made.valid[i]) >= 1
    kept = decide([("a", first), ("b", second)], DedupSpec(exact=False, near=False), ValidSpec(), seed=0)
    assert not any(len(rows) for rows in (*kept.exact, *kept.near))


def test_pieces_of_one_document_stay_together_when_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_read, "PIECE", 300)
    long = ["\n\n".join(prose(10 * s + i, 60) for i in range(8)) for s in range(12)]
    store = prepared(tmp_path, "a", long)[1]
    assert len(store) > 40
    for seed in range(3):
        made = decide([("a", store)], DedupSpec(), ValidSpec(share=0.25), seed=seed)
        held, learnt = (set(store.parents[rows].tolist()) for rows in (made.valid[0], made.train[0]))
        assert held and not held & learnt
        assert store.sizes[made.valid[0]].sum() <= 0.25 * store.sizes.sum()


def test_rows_reach_the_limit_and_change_with_the_seed_when_drawn():
    sizes, rows = np.full(100, 10), np.arange(100)
    drawn = list(draw_rows(sizes, rows, 200, name="a", seed=0))
    assert len(drawn) == len(set(drawn)) == 20
    assert drawn != list(draw_rows(sizes, rows, 200, name="a", seed=1))
    assert len(list(draw_rows(sizes, rows, 0.5, name="a", seed=0))) == 1
