"""Parallel text: one sentence in two languages a row, from any file with two columns; and plain text, one a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alambic.data.clean import clean_text
from alambic.data.columns import listing
from alambic.data.columns import named as column
from alambic.data.duplicates import exact_key
from alambic.data.rows import Row, open_source
from alambic.errors import DataError

_SAMPLE_ROWS = 200


@dataclass(frozen=True)
class ParallelText:
    """Pairs of sentences that say the same.

    Attributes:
        known: the sentences in the teacher's language.
        new: the same in the student's further language, in the same order.
        notes: what was guessed and what was left out, for the user.
    """

    known: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.known)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over all sentences in order."""
        return digest_of(text for pair in zip(self.known, self.new, strict=True) for text in pair)

    def take(self, rows: Iterable[int]) -> ParallelText:
        """Return the pairs numbered `rows`."""
        chosen = list(rows)
        return ParallelText(tuple(self.known[i] for i in chosen), tuple(self.new[i] for i in chosen))


def read_parallel(path: Path, *, known: str | None = None, new: str | None = None) -> ParallelText:
    """Read the columns `known` and `new` of a table (csv, tsv, jsonl, parquet).

    Without names, a file of exactly two columns is read as known, new. Pairs with an empty side, and pairs that were
    there before, are left out and counted; nothing is cut.

    Raises:
        DataError: the file or a column is missing, or no whole pair is left.
    """
    source = open_source(path, None)
    names = source.columns or _seen_columns(source.rows())
    columns = _choose(path, names, known, new)
    pairs: dict[tuple[str, str], None] = {}
    unreadable, empty, twice = [], 0, 0
    for row in source.rows():
        if row.error is not None:
            unreadable.append(f"{row.where}: {row.error}")
            continue
        pair = (_cell(row, columns[0]), _cell(row, columns[1]))
        if not all(pair):
            empty += 1
        elif pair in pairs:
            twice += 1
        else:
            pairs[pair] = None
    if not pairs:
        raise DataError(f"{path}: no pair of sentences in the columns {listing(columns)}",
                        hint=unreadable[0] if unreadable else "both columns must hold text")  # fmt: skip
    notes = list(source.notes)
    notes += [f"{path.name}: {len(unreadable)} rows cannot be read, the first: {unreadable[0]}"] if unreadable else []
    notes += [f"{path.name}: {empty} pairs with an empty side left out"] if empty else []
    notes += [f"{path.name}: {twice} pairs that were there before left out"] if twice else []
    return ParallelText(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), tuple(notes))


def hold_out(pairs: ParallelText, *, number: int) -> tuple[ParallelText, ParallelText]:
    """Return (train, held out): `number` pairs chosen by digest, and no sentence of theirs, on either side, in train.

    Each held-out sentence occurs once, so that retrieval has one right answer. The choice does not depend on the order
    of rows, and hardly on which others are there.

    Raises:
        DataError: the file has too few different sentences.
    """
    order = sorted(range(len(pairs)), key=lambda i: hashlib.sha256(exact_key(pairs.known[i]).encode()).digest())
    chosen: list[int] = []
    seen: tuple[set[str], set[str]] = (set(), set())
    for i in order:
        keys = exact_key(pairs.known[i]), exact_key(pairs.new[i])
        if keys[0] in seen[0] or keys[1] in seen[1]:
            continue
        if len(chosen) == number:
            break
        chosen.append(i)
        seen[0].add(keys[0])
        seen[1].add(keys[1])
    rest = [
        i for i in range(len(pairs))
        if exact_key(pairs.known[i]) not in seen[0] and exact_key(pairs.new[i]) not in seen[1]
    ]  # fmt: skip
    if len(chosen) < number or not rest:
        raise DataError(f"{len(pairs)} pairs: too few to hold {number} out",
                        hint="give more pairs, or a smaller data.held_out")  # fmt: skip
    return pairs.take(rest), pairs.take(chosen)


def hold_out_lines(lines: Sequence[str], *, number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (train, held out): the different lines, `number` of them chosen by digest and in train no more.

    Raises:
        DataError: fewer than twice `number` different lines are there.
    """
    different: dict[str, str] = {}
    for line in lines:
        different.setdefault(exact_key(line), line)
    if len(different) < 2 * number:
        raise DataError(f"{len(different)} different lines of text: too few to hold {number} out",
                        hint="give more text, or a smaller masked.held_out")  # fmt: skip
    chosen = sorted(different, key=lambda key: hashlib.sha256(key.encode()).digest())[:number]
    held_out = tuple(different.pop(key) for key in chosen)
    return tuple(different.values()), held_out


def read_lines(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the lines of text files (or the `text` column of tables), cleaned, empty ones left out.

    Raises:
        DataError: a file is missing or unreadable, or a line is not in its encoding.
    """
    for path in paths:
        source = open_source(path, None)
        names = source.columns or _seen_columns(source.rows())
        name = column("text", "text", names, str(path)) or "text"
        for row in source.rows():
            if row.error is not None:
                raise DataError(f"{row.where}: {row.error}")
            if text := _cell(row, name):
                yield text


def digest_of(texts: Iterable[str]) -> str:
    """Return the SHA-256 (hex) over `texts` in order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\n")
    return total.hexdigest()


def _cell(row: Row, name: str) -> str:
    value = row.fields.get(name)
    return " ".join(clean_text(value).text.split()) if isinstance(value, str) else ""


def _seen_columns(rows: Iterable[Row]) -> list[str]:
    """Return the keys of the first rows of a file that does not list its columns."""
    names: dict[str, None] = {}
    for row, _ in zip(rows, range(_SAMPLE_ROWS), strict=False):
        names.update(dict.fromkeys(map(str, row.fields)))
    return list(names)


def _choose(path: Path, names: Sequence[str], known: str | None, new: str | None) -> tuple[str, str]:
    wanted = column(known, "known", names, str(path)), column(new, "new", names, str(path))
    if wanted[0] and wanted[1]:
        return wanted[0], wanted[1]
    if len(names) == 2 and not any(wanted):
        return names[0], names[1]
    raise DataError(f"{path}: which two columns are meant? It has {listing(names)}",
                    hint='name both under [data]: known = "en", new = "fr"')  # fmt: skip
