"""Rewriting: accents, typography, spelling and punctuation put right, another register, fewer words, translation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from instructions.frame import Frame
from instructions.grammar import capital, pick
from instructions.row import Row
from instructions.sentences import typeset, unglue, without_accents
from instructions.sources import CORPUS, Library

_ADDRESS = re.compile(r"^(?:Rue|Avenue|Place|Boulevard|Impasse|Chemin|Allée|Route|Square|Quai|Cours)\b|\d{4}")
_ACCENT = re.compile(r"[éèêëàâîïôûùçœ]")
_PAIRS_FR = [
    ("à ", "a "),
    ("est ", "et "),
    ("ces ", "ses "),
    ("c'est", "s'est"),
    ("ont ", "on "),
    ("où ", "ou "),
    ("leurs ", "leur "),
    ("er ", "é "),
    ("é ", "er "),
    ("mm", "m"),
    ("nn", "n"),
    ("ll", "l"),
    ("ss", "s"),
    ("ent ", "e "),
    ("eau", "au"),
    ("ph", "f"),
    ("qu'", "qu "),
    ("ais ", "ait "),
    ("s ", " "),
]
_PAIRS_EN = [
    ("their", "there"),
    ("there", "their"),
    ("you're", "your"),
    ("it's", "its"),
    ("too ", "to "),
    ("ie", "ei"),
    ("ll", "l"),
    ("tt", "t"),
    ("ss", "s"),
    ("ing ", "in "),
    ("ough", "ouh"),
    ("ed ", "d "),
    ("the ", "teh "),
    ("and ", "adn "),
    ("s ", " "),
]


def sentences_fr(library: Library, rng: random.Random) -> list[str]:
    """Return the French sentences (CC0) that corrections are made of, shuffled: no address, no fragment."""
    found = []
    for document in library.documents("fr_sentences"):
        for line in document.split("\n"):
            line = line.strip()
            if 30 <= len(line) <= 230 and line[0].isupper() and line[-1] in ".!?" and not _ADDRESS.search(line):
                found.append(line.replace("’", "'"))
    rng.shuffle(found)
    return found


def corrections_fr(frame: Frame, library: Library, *, each: int) -> Iterator[Row]:
    """Accents, typography, spelling and punctuation, `each` rows of each; typography and accents are exact tasks."""
    sentences = sentences_fr(library, frame.rng)
    makers = {"accents": _bare, "typography": _loose, "spelling": _slips_fr, "punctuation": _dictated}
    place = 0
    for family, spoil in makers.items():
        made = 0
        while made < each and place < len(sentences):
            right = typeset(sentences[place])
            place += 1
            wrong = spoil(frame.rng, right)
            if wrong == right:
                continue
            made += 1
            row = frame.row("correct", frame.ask(family, text=wrong), right)
            yield row.by("fr_sentences", CORPUS["fr_sentences"].licence, group=f"cv:{right[:60]}")


def _bare(rng: random.Random, right: str) -> str:
    return without_accents(right) if _ACCENT.search(right) else right


def _loose(rng: random.Random, right: str) -> str:
    """Write as on a keyboard: straight apostrophes and quotes, no no-break space, now and then no space at all."""
    text = right.replace("’", "'").replace("…", "...").replace("«\u00a0", '"').replace("\u00a0»", '"')
    return re.sub("[\u00a0\u202f]", "" if rng.random() < 0.6 else " ", text)


def _slips_fr(rng: random.Random, right: str) -> str:
    return _slips(rng, right, _PAIRS_FR)


def _slips(rng: random.Random, right: str, pairs: list[tuple[str, str]]) -> str:
    """Put one to three slips into a sentence: a usual confusion, a letter lost, doubled or swapped."""
    text = right
    for _ in range(rng.randint(1, 3)):
        known = [pair for pair in pairs if pair[0] in text]
        if known and rng.random() < 0.6:
            wrong = pick(rng, known)
            at = pick(rng, [m.start() for m in re.finditer(re.escape(wrong[0]), text)])
            text = text[:at] + wrong[1] + text[at + len(wrong[0]) :]
            continue
        letters = [
            i for i in range(1, len(text) - 2) if text[i - 1].isalpha() and text[i].isalpha() and text[i + 1].isalpha()
        ]
        if letters:
            at, kind = pick(rng, letters), rng.randrange(3)
            middle = ("", text[at] * 2, text[at + 1] + text[at])[kind]
            text = text[:at] + middle + text[at + (2 if kind == 2 else 1) :]
    return text


def _dictated(rng: random.Random, right: str) -> str:
    """Take capitals and punctuation away; apostrophes and hyphens stay, they are part of words."""
    text = re.sub(r"[^\w\s'’\-%€°]", " ", right.replace("\u00a0", " ").replace("\u202f", " ")).lower()
    return re.sub(r"\s+", " ", text).strip()


def corrections_en(frame: Frame, library: Library, *, each: int) -> Iterator[Row]:
    """Spelling and punctuation of everyday English sentences, `each` rows of each."""
    sentences = [
        row["en"] for row in library.lines("parallel_fr_en") if row["source"] == "tatoeba" and len(row["en"]) > 35
    ]
    frame.rng.shuffle(sentences)
    place = 0
    for family in ("spelling", "punctuation"):
        made = 0
        while made < each and place < len(sentences):
            right = sentences[place]
            place += 1
            wrong = _slips(frame.rng, right, _PAIRS_EN) if family == "spelling" else _dictated(frame.rng, right)
            if wrong == right:
                continue
            made += 1
            row = frame.row("correct", frame.ask(family, text=wrong), right)
            yield row.by("parallel_fr_en", CORPUS["parallel_fr_en"].licence, group=f"tatoeba:{right[:60]}")


def translations(frame: Frame, library: Library, count: int) -> Iterator[Row]:
    """`count` everyday sentences into the frame's language."""
    into, out_of = ("fr", "en") if frame.language == "fr" else ("en", "fr")
    rows = [row for row in library.lines("parallel_fr_en") if row["source"] == "tatoeba"]
    frame.rng.shuffle(rows)
    seen: set[str] = set()
    for row in rows:
        given, told = unglue(row[out_of]), unglue(row[into])
        if len(seen) >= count:
            return
        if given in seen or not 8 < len(given) < 200:
            continue
        seen.add(given)
        told = typeset(told) if into == "fr" else told
        found = frame.row("translate", frame.ask("translate", text=given), told)
        yield found.by("parallel_fr_en", CORPUS["parallel_fr_en"].licence, group=f"tatoeba:{row['en'][:60]}")


def registers(frame: Frame, count: int) -> Iterator[Row]:
    """`count` messages of one or two sentences in the other register."""
    made: set[str] = set()
    while len(made) < count:
        chosen = frame.rng.sample(frame.text["register"], frame.rng.choice([1, 1, 2]))
        casual, formal = [], []
        for entry in chosen:
            values = (
                {"objet": frame.fill("<objet>"), "quand": frame.fill(pick(frame.rng, frame.text["when"]["list"]))}
                if (frame.language == "fr")
                else {"object": frame.fill("<object>"), "when": frame.fill(pick(frame.rng, frame.text["when"]["list"]))}
            )
            casual.append(capital(frame.fill(entry["tu"], values)))
            formal.append(capital(frame.fill(entry["vous"], values)))
        left, right = " ".join(casual), " ".join(formal)
        family, given, told = ("formal", left, right) if frame.rng.random() < 0.6 else ("informal", right, left)
        made.add(f"{family}{given}")
        yield frame.row("register", frame.ask(family, text=given), told, group=f"register:{left}")


def shorter(frame: Frame, count: int) -> Iterator[Row]:
    """`count` wordy messages and what they come to."""
    text = frame.text
    for _ in range(count):
        objects = frame.fill("<objet>" if frame.language == "fr" else "<object>")
        when = frame.fill(pick(frame.rng, text["when"]["list"]))
        wish = pick(frame.rng, text["wishes"])["short"]
        short = frame.fill(wish, {"objet": objects, "object": objects, "quand": when, "when": when})
        before = "".join(frame.rng.sample(text["long"]["before"], frame.rng.randint(1, 2)))
        wordy = frame.fill(before) + short + frame.fill(pick(frame.rng, text["long"]["after"]))
        yield frame.row("shorten", frame.ask("shorten", text=wordy), short, group=f"short:{wordy[:80]}")
