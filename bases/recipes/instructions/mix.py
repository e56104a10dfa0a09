"""The mix: how many rows of each family, what is left out and why, the split, and the datasheet."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructions import everyday, grounded, labels, pairs, press, rewriting, structured
from instructions.contamination import Held, counted
from instructions.frame import Frame
from instructions.row import OWN, Pair, Row, fits
from instructions.sources import CORPUS, SOURCES, Library

_VALID_OF = 50  # one group in so many


@dataclass(frozen=True)
class Counts:
    """Rows asked for of each family whose number is free; the others take all that their source has."""

    scale: float = 1.0

    def of(self, rows: int) -> int:
        """Return `rows` at this scale, at least 1."""
        return max(1, round(rows * self.scale))


@dataclass
class Made:
    """What came out."""

    train: list[Any] = field(default_factory=list)
    valid: list[Any] = field(default_factory=list)
    long: Counter[str] = field(default_factory=Counter)
    double: int = 0
    held_out: Counter[str] = field(default_factory=Counter)

    @property
    def all(self) -> list[Any]:
        """Both parts."""
        return [*self.train, *self.valid]


def french(library: Library, counts: Counts, seed: int) -> Iterator[Row]:
    """Every French row."""
    n = counts.of
    frames = _frames("fr", seed)
    yield from grounded.piaf(next(frames), library)
    yield from grounded.invented(next(frames), n(6500))
    yield from press.news(next(frames), library, summaries=n(3200), titles=n(2600), choices=n(900))
    yield from press.sheets(next(frames), library)
    yield from press.invented(next(frames), n(1200))
    yield from rewriting.corrections_fr(next(frames), library, each=n(900))
    yield from rewriting.registers(next(frames), n(1100))
    yield from rewriting.shorter(next(frames), n(900))
    yield from rewriting.translations(next(frames), library, n(2600))
    yield from labels.messages(next(frames), n(4200))
    yield from labels.sets(next(frames), library, {"ha_intents_fr": n(660)}, wording="intent")
    yield from structured.documents(next(frames), n(3200))
    yield from structured.slots(next(frames), library, "ha_intents_fr", n(600))
    yield from structured.home(next(frames), library, "ha_intents_fr", copies=1)
    yield from structured.tools(next(frames), n(2600))
    yield from everyday.greetings(next(frames), n(420))
    yield from everyday.dialogues(library)


def english(library: Library, counts: Counts, seed: int) -> Iterator[Row]:
    """Every English row."""
    n = counts.of
    frames = _frames("en", seed)
    yield from grounded.invented(next(frames), n(5000))
    yield from grounded.prompted(library, most_a_task=n(45))
    yield from press.invented(next(frames), n(900))
    yield from rewriting.corrections_en(next(frames), library, each=n(800))
    yield from rewriting.registers(next(frames), n(500))
    yield from rewriting.shorter(next(frames), n(500))
    yield from rewriting.translations(next(frames), library, n(2200))
    sets = {"clinc150": 3600, "banking77": 2200, "hwu64": 2000, "snips": 900, "bitext_intents": 1500, "sms_spam": 600}
    yield from labels.sets(next(frames), library, {name: n(count) for name, count in sets.items()})
    yield from labels.sets(next(frames), library, {"ha_intents_en": n(700)}, wording="intent")
    yield from structured.documents(next(frames), n(2000))
    yield from structured.slots(next(frames), library, "snips", n(3000))
    yield from structured.slots(next(frames), library, "bitext_intents", n(600))
    yield from structured.home(next(frames), library, "ha_intents_en", copies=1)
    yield from structured.tools(next(frames), n(1600))
    yield from structured.commands(next(frames), library, n(2400))
    yield from structured.queries(next(frames), library, n(1500))
    yield from structured.personal(next(frames), library)
    yield from everyday.greetings(next(frames), n(220))


def preferences(library: Library, counts: Counts, seed: int) -> Iterator[Pair]:
    """Every preference pair."""
    yield from pairs.pairs(next(_frames("fr", seed, "pairs")), library, counts.of(4000))
    yield from pairs.pairs(next(_frames("en", seed, "pairs")), library, counts.of(3000))


def _frames(language: str, seed: int, name: str = "rows") -> Iterator[Frame]:
    """Yield a frame for each family with a generator of its own: more rows of one change no other."""
    number = 0
    while True:
        yield Frame(language, random.Random(f"{seed}/{name}/{language}/{number}"))
        number += 1


def sift(rows: Iterable[Row | Pair], held: Held) -> Made:
    """Leave out what does not fit, comes twice, or holds a held-out text; keep groups on one side of the split."""
    made = Made()
    seen: set[str] = set()
    for row in rows:
        family = row.family if isinstance(row, Row) else row.fault
        small = fits(row.texts) if isinstance(row, Row) else pairs.usable(row)
        if not small:
            made.long[f"{row.source}: {family}"] += 1
            continue
        digest = hashlib.sha256("\x1f".join(row.texts).encode()).hexdigest()
        if digest in seen:
            made.double += 1
            continue
        seen.add(digest)
        where = held.inside(row.texts)
        if where is not None:
            made.held_out[where] += 1
            continue
        side = int(hashlib.sha256((row.group or digest).encode()).hexdigest()[:8], 16) % _VALID_OF
        (made.valid if side == 0 else made.train).append(row)
    return made


def write(
    folder: Path, made: Made, prefer: Made, *, seed: int, held: Held, tokens: dict[str, Any] | None
) -> dict[str, Any]:
    """Write train, valid, the pairs and the datasheet; return the datasheet's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, prefix in ((made, ""), (prefer, "pairs-")):
        for name in ("train", "valid"):
            rows = list(getattr(part, name))
            random.Random(f"{seed}/{prefix}{name}").shuffle(rows)
            lines = [json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{prefix}{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    figures = {
        "seed": seed,
        "rows": len(made.all),
        "train": len(made.train),
        "valid": len(made.valid),
        "by_language": _count(made.all, lambda row: row.language),
        "by_family": _count(made.all, lambda row: f"{row.family} ({row.language})"),
        "by_source": _count(made.all, lambda row: f"{row.source} ({row.licence})"),
        "cut": sum(row.cut for row in made.all),
        "left_out_long": dict(made.long.most_common()),
        "left_out_double": made.double,
        "left_out_held_out": counted(made.held_out.elements()),
        "held_out_texts": held.count,
        "pairs": {
            "train": len(prefer.train),
            "valid": len(prefer.valid),
            "by_fault": _count(prefer.all, lambda pair: f"{pair.fault} ({pair.language})"),
            "left_out_held_out": counted(prefer.held_out.elements()),
        },
        "tokens": tokens,
    }
    (folder / "datasheet.json").write_text(json.dumps(figures, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "DATASHEET.md").write_text(datasheet(figures), encoding="utf-8")
    return figures


def _count(rows: Sequence[Any], key: Any) -> dict[str, int]:
    return dict(Counter(key(row) for row in rows).most_common())


def datasheet(figures: dict[str, Any]) -> str:
    """Return the datasheet as Markdown."""
    lines = [
        "# Instruction rows: datasheet",
        "",
        f"{figures['rows']:,} rows ({figures['train']:,} to learn, {figures['valid']:,} held out by group), seed "
        f"{figures['seed']}: " + ", ".join(f"{n:,} {name}" for name, n in figures["by_language"].items()) + ".",
        "",
        _table("family (language)", figures["by_family"]),
        _table("source (licence)", figures["by_source"]),
        *_origins(figures),
        "## What was changed",
        "",
        "Passages and articles longer than the context are cut at the end of a sentence before the row is made "
        f"({figures['cut']:,} rows, "
        "marked `cut`); an answer's own sentence always stays. Rows that still do not fit 512 tokens are left out: "
        f"{sum(figures['left_out_long'].values()):,}. Doubles left out: {figures['left_out_double']:,}.",
        "",
        *_held_out(figures),
        "## Preferences",
        "",
        f"{figures['pairs']['train']:,} pairs to learn, {figures['pairs']['valid']:,} held out.",
        "",
        _table("fault of the rejected answer (language)", figures["pairs"]["by_fault"]),
        *_lengths(figures["tokens"]),
        "## Limits",
        "",
        "Questions about invented documents are worded by hand but follow their fields; real ones are more varied. "
        "News are of 2016 to 2020. No row was checked by a second person.",
        "",
    ]
    return "\n".join(lines)


def _origins(figures: dict[str, Any]) -> list[str]:
    used = {name.rsplit(" (", 1)[0] for name in figures["by_source"]}
    shared = sorted(name for name, source in SOURCES.items() if source.share_alike and name in used)
    origins = [
        f"- `{name}`: {source.origin}, {source.licence}" for name, source in (SOURCES | CORPUS).items() if name in used
    ]
    return [
        "## Where it comes from",
        "",
        *origins,
        f"- `{OWN}`: documents, messages, tools and wordings in `text/*.toml`; every person, "
        "firm, number and address is invented.",
        "",
        "Only training parts, of sets whose trained weights may be shipped."
        + (f" Share-alike: {', '.join(shared)}; rows made of them keep that licence and its notice." if shared else ""),
        "",
    ]


def _held_out(figures: dict[str, Any]) -> list[str]:
    left_out = figures["left_out_held_out"]
    most = ", ".join(f"{where} {n:,}" for where, n in list(left_out.items())[:8])
    return [
        "## Held-out texts",
        "",
        f"{figures['held_out_texts']:,} texts of test and dev parts were looked for in every row and pair, by letters "
        "and digits (whole up to 260, by first, middle and last 160 when longer; under 40 as a line). Rows that held "
        f"one are left out: {sum(left_out.values()):,}{f' ({most})' if most else ''}.",
        "",
    ]


def _lengths(tokens: dict[str, Any] | None) -> list[str]:
    if not tokens:
        return []
    return [
        "## Length",
        "",
        f"With the tokenizer of {tokens['tokenizer']}: mean {tokens['mean']:.0f} tokens, 95% within {tokens['p95']}, "
        f"longest {tokens['longest']}; rows over 512 that were left out: {tokens['over']:,}.",
        "",
    ]


def _table(title: str, counts: dict[str, int]) -> str:
    return "\n".join([f"| {title} | rows |", "|---|---|", *(f"| {name} | {n:,} |" for name, n in counts.items()), ""])
