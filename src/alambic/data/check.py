"""The data audit: what a careful person would look at before training, counted, with places to look.

It changes nothing, and repeats no personal data: those are counted by kind, with the places only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alambic.data.dataset import Dataset, Example
from alambic.data.duplicates import Duplicates, exact_key, find_duplicates
from alambic.data.personal import KINDS, find_personal
from alambic.data.split import Splits

FEW = 10
_SHOWN = 5
_WORD = re.compile(r"[^\W\d_]+")
_FRENCH = frozenset(
    _WORD.findall(
        "le la les un une des du de et est pas je j ai vous nous mon ma mes votre pour que qui quoi ne sur avec dans "
        "ce cette ça il elle au aux se en par plus bonjour merci suis c n d l qu comment quand pourquoi où été fait "
        "faire y ou si mais"
    )
)
_ENGLISH = frozenset(
    _WORD.findall(
        "the a an and is are was i my you your we it to of for in on with that this not do does can have has how what "
        "when why where be been will would please hello thanks me there they from at by but or if am did get no"
    )
)


@dataclass(frozen=True)
class LabelCount:
    """How many rows of each part have a label."""

    label: str
    rows: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Lengths:
    """How long the texts are, in `unit` (tokens of the base, or words); `over` counts those longer than it reads."""

    unit: str
    median: int
    p95: int
    longest: int
    longest_where: str
    limit: int | None
    over: int | None
    over_where: tuple[str, ...]


@dataclass(frozen=True)
class Alike:
    """Two rows whose texts are the same (`similarity` 1) or nearly."""

    where: str
    other: str
    similarity: float


@dataclass(frozen=True)
class Conflict:
    """One text that was given different labels."""

    text: str
    labels: tuple[str, ...]
    where: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A number of rows, and where the first of them are."""

    rows: int
    where: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What the audit found.

    Attributes:
        rows: rows in all parts.
        parts: rows by part (`train`, `dev`, `test`; `all` for a Dataset that is not split).
        labels: rows by label, most numerous first.
        imbalance: rows of the most numerous label for one row of the least.
        few: labels with fewer than ten rows to learn from.
        lengths: how long the texts are.
        exact_duplicates: rows that repeat an earlier text, ignoring case and white space.
        near_duplicates: rows that nearly repeat another.
        near_examples: the most alike of them.
        conflicts: number of texts under several labels.
        conflict_examples: the first of them.
        leaks_exact: test rows whose text is in train or dev.
        leaks_near: test rows nearly the same as one of train or dev.
        leak_examples: the first of both.
        personal: rows with likely personal data, by kind.
        languages: share of rows by guessed language (`fr`, `en`, `other`).
        advice: what to do about it, most serious first.
    """

    rows: int
    parts: dict[str, int]
    labels: tuple[LabelCount, ...]
    imbalance: float
    few: tuple[str, ...]
    lengths: Lengths
    exact_duplicates: Finding
    near_duplicates: Finding
    near_examples: tuple[Alike, ...]
    conflicts: int
    conflict_examples: tuple[Conflict, ...]
    leaks_exact: Finding
    leaks_near: Finding
    leak_examples: tuple[Alike, ...]
    personal: dict[str, Finding]
    languages: dict[str, float]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain dicts, lists, strings and numbers."""
        plain: dict[str, Any] = asdict(self, dict_factory=lambda pairs: {k: _plain(v) for k, v in pairs})
        return plain


def _plain(value: object) -> object:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def audit(
    data: Splits | Dataset,
    *,
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None,
    max_tokens: int | None = None,
) -> Audit:
    """Audit a Dataset, or the parts of a split one.

    Args:
        data: what to look at; leaks can only be found in Splits.
        count_tokens: gives the number of tokens of each text as the base counts them; words are counted without it.
        max_tokens: how many tokens the base reads at once.

    Raises:
        MissingExtra: rensa, which finds the near duplicates, is not installed.
    """
    parts = _parts(data)
    rows = [(name, example) for name, part in parts.items() for example in part]
    examples = [example for _, example in rows]
    names = [name for name, _ in rows]
    duplicates = find_duplicates([example.text for example in examples])
    conflicts = _conflicts(examples, duplicates)
    labels = _label_counts(parts)
    exact_leaks, near_leaks = leaks_of(names, examples, duplicates)
    repeats = [examples[i].where for group in duplicates.exact for i in group[1:]]
    alike = sorted(duplicates.near, key=lambda pair: -pair.similarity)
    near_rows = sorted({pair.second for pair in duplicates.near})
    found: dict[str, Any] = {
        "rows": len(rows),
        "parts": {name: len(part) for name, part in parts.items()},
        "labels": labels,
        "imbalance": round(labels[0].rows / max(1, labels[-1].rows), 1) if labels else 1.0,
        "few": tuple(c.label for c in labels if c.rows - c.parts.get("test", 0) < FEW),
        "lengths": _lengths(examples, count_tokens, max_tokens),
        "exact_duplicates": finding(repeats),
        "near_duplicates": finding(examples[i].where for i in near_rows),
        "near_examples": tuple(
            Alike(examples[p.second].where, examples[p.first].where, p.similarity) for p in alike[:_SHOWN]
        ),
        "conflicts": len(conflicts),
        "conflict_examples": tuple(conflicts[:_SHOWN]),
        "leaks_exact": finding(leak.where for leak in exact_leaks),
        "leaks_near": finding(leak.where for leak in near_leaks),
        "leak_examples": tuple((exact_leaks + near_leaks)[:_SHOWN]),
        "personal": personal_of(examples),
        "languages": languages_of(examples),
    }
    return Audit(**found, advice=tuple(_advice(found)))


def render(audit: Audit) -> str:
    """Return the audit as plain text for a terminal."""
    parts = ", ".join(f"{name} {count}" for name, count in audit.parts.items())
    lines = [f"{audit.rows} rows ({parts}), {len(audit.labels)} labels, {audit.imbalance:g} to 1 at most", ""]
    lines += _render_labels(audit)
    lengths = audit.lengths
    lines += ["", f"length in {lengths.unit}: median {lengths.median}, p95 {lengths.p95}, longest {lengths.longest}"]
    if lengths.over is not None:
        lines.append(f"  longer than the base reads ({lengths.limit}): {lengths.over}{_places(lengths.over_where)}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in audit.languages.items())
    lines += [f"languages (guessed): {shares}", ""]
    lines.append(f"exact duplicates: {audit.exact_duplicates.rows}{_places(audit.exact_duplicates.where)}")
    lines.append(f"near duplicates: {audit.near_duplicates.rows}")
    lines += [f"  {a.where} ~ {a.other} ({a.similarity:.0%})" for a in audit.near_examples]
    lines.append(f"same text under several labels: {audit.conflicts}")
    lines += [f"  {c.text!r}: {' / '.join(c.labels)}{_places(c.where)}" for c in audit.conflict_examples]
    if "test" in audit.parts:
        lines.append(f"test rows also in train or dev: {audit.leaks_exact.rows} exact, {audit.leaks_near.rows} near")
        lines += [f"  {a.where} ~ {a.other} ({a.similarity:.0%})" for a in audit.leak_examples]
    personal = ", ".join(f"{kind} {found.rows}" for kind, found in audit.personal.items()) or "none found"
    lines.append(f"rows with likely personal data: {personal}")
    if audit.advice:
        lines += ["", "advice:", *(f"  - {advice}" for advice in audit.advice)]
    return "\n".join(lines)


def _render_labels(audit: Audit, *, shown: int = 30) -> list[str]:
    if not audit.labels:
        return []
    listed = list(audit.labels)
    if len(listed) > shown:
        listed = [*listed[: shown - 10], *listed[-10:]]
    width = max(len(count.label) for count in listed)
    top = max(1, audit.labels[0].rows)
    lines = [f"  {c.label:<{width}}  {c.rows:>6}  {'#' * round(24 * c.rows / top)}" for c in listed]
    if len(audit.labels) > shown:
        lines.insert(shown - 10, f"  ... {len(audit.labels) - shown} more labels ...")
    return lines


def _places(where: Sequence[str]) -> str:
    return f" ({', '.join(where)})" if where else ""


def _parts(data: Splits | Dataset) -> dict[str, Dataset]:
    if isinstance(data, Dataset):
        return {"all": data}
    parts = {"train": data.train, "dev": data.dev, "test": data.test}
    return {name: part for name, part in parts.items() if part is not None}


def finding(where: Iterable[str]) -> Finding:
    """Return how many places there are, and the first of them."""
    places = list(where)
    return Finding(len(places), tuple(places[:_SHOWN]))


def _label_counts(parts: dict[str, Dataset]) -> tuple[LabelCount, ...]:
    counts = {name: part.counts for name, part in parts.items()}
    labels = {label for part in parts.values() for label in part.labels}
    found = [LabelCount(x, sum(c[x] for c in counts.values()), {n: c[x] for n, c in counts.items()}) for x in labels]
    return tuple(sorted(found, key=lambda c: (-c.rows, c.label)))


def _lengths(
    examples: Sequence[Example], count_tokens: Callable[[Sequence[str]], list[int]] | None, limit: int | None
) -> Lengths:
    texts = [example.text for example in examples]
    counts = count_tokens(texts) if count_tokens else [len(text.split()) for text in texts]
    unit = "tokens" if count_tokens else "words"
    if not counts:
        return Lengths(unit, 0, 0, 0, "", limit, None, ())
    ordered = sorted(counts)
    longest = max(range(len(counts)), key=counts.__getitem__)
    known = count_tokens is not None and limit is not None
    over = [examples[i].where for i, count in enumerate(counts) if limit is not None and count > limit] if known else []
    return Lengths(
        unit, ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], ordered[-1],
        examples[longest].where, limit, len(over) if known else None, tuple(over[:_SHOWN]),
    )  # fmt: skip


def _conflicts(examples: Sequence[Example], duplicates: Duplicates) -> list[Conflict]:
    found = []
    for group in duplicates.exact:
        rows_of: dict[tuple[str, ...], int] = {}
        for i in group:
            rows_of.setdefault(examples[i].labels, i)
        if len(rows_of) > 1:
            text = exact_key(examples[group[0]].text)
            names = tuple(", ".join(labels) or "(none)" for labels in rows_of)
            places = tuple(examples[i].where for i in list(rows_of.values())[:_SHOWN])
            found.append(Conflict(_masked(text), names, places))
    return found


def _masked(text: str) -> str:
    """Return the beginning of a text, or nothing of one that may hold personal data."""
    if find_personal(text):
        return "(text with personal data)"
    return text if len(text) <= 60 else text[:59] + "…"


def leaks_of(
    names: Sequence[str], examples: Sequence[Example], duplicates: Duplicates
) -> tuple[list[Alike], list[Alike]]:
    """Return the test rows that are, exactly or nearly, in train or dev: each once, with the row most like it."""
    twins = {group[0]: group for group in duplicates.exact}
    exact: dict[int, tuple[int, float]] = {}
    for group in duplicates.exact:
        seen = next((i for i in group if names[i] != "test"), None)
        if seen is not None:
            exact.update({i: (seen, 1.0) for i in group if names[i] == "test"})
    near: dict[int, tuple[int, float]] = {}
    for pair in duplicates.near:
        sides = [twins.get(row, (row,)) for row in (pair.first, pair.second)]
        for tested, other in (sides, sides[::-1]):
            seen = next((i for i in other if names[i] != "test"), None)
            if seen is None:
                continue
            for i in tested:
                if names[i] == "test" and i not in exact and pair.similarity > near.get(i, (0, 0.0))[1]:
                    near[i] = (seen, pair.similarity)

    def listed(found: dict[int, tuple[int, float]]) -> list[Alike]:
        return [Alike(examples[i].where, examples[j].where, s) for i, (j, s) in sorted(found.items())]

    return listed(exact), listed(near)


def personal_of(examples: Sequence[Example]) -> dict[str, Finding]:
    """Return the rows with likely personal data, by kind."""
    where: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        for kind in find_personal(example.text):
            where[kind].append(example.where)
    return {kind: finding(where[kind]) for kind in KINDS if where[kind]}


def languages_of(examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of rows by guessed language."""
    counts = Counter(_language(example.text) for example in examples)
    return {name: round(counts[name] / max(1, len(examples)), 4) for name in ("fr", "en", "other") if counts[name]}


def _language(text: str) -> str:
    words = _WORD.findall(text[:2000].casefold())
    french = sum(word in _FRENCH for word in words) + sum(c in "éèêàùçœ" for c in text[:2000].casefold())
    english = sum(word in _ENGLISH for word in words)
    if french == english:
        return "other"
    return "fr" if french > english else "en"


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    exact, near = found["leaks_exact"].rows, found["leaks_near"].rows
    if exact or near:
        advice.append(
            f"{exact + near} test rows leak from train or dev: remove them from one side, or the score flatters"
        )
    if found["conflicts"]:
        advice.append(f"{found['conflicts']} texts have several labels: decide which one is right")
    if found["few"]:
        shown = ", ".join(map(repr, found["few"][:5])) + (" ..." if len(found["few"]) > 5 else "")
        advice.append(
            f"{len(found['few'])} labels have fewer than {FEW} rows to learn from ({shown}): add rows or merge"
        )
    lengths: Lengths = found["lengths"]
    if lengths.over:
        advice.append(f"{lengths.over} texts are longer than the base reads: data.long says what happens to them")
    if found["imbalance"] > 20:
        advice.append(f"labels are unbalanced ({found['imbalance']:g} to 1): look at macro F1, not accuracy")
    if found["personal"]:
        advice.append("some rows hold likely personal data: check that you may train on them")
    return advice
