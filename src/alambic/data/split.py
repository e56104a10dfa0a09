"""Which rows train, which decide (dev), and which are scored once at the end (test).

Rows that are alike (near duplicates, or equal values of the group column) stay together. Each group gets a *slot*
from 0 to 9, stratified by label, or goes to test. Slots make both regimes from one assignment: five folds (slot modulo
5) below 2,000 training rows, slot 0 as dev above. The assignment is kept in `splits.lock` by row digest, so that rows
added later never move old ones. It depends on the rows and the seed alone, not on their order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alambic.data.dataset import Dataset, Example
from alambic.data.duplicates import find_duplicates
from alambic.errors import DataError

if TYPE_CHECKING:
    from alambic.task import DataSpec

FOLDS = 5
FOLDS_BELOW = 2000
_SLOTS = 10
_CROWD, _CROWD_SHARE = 20, 0.2
_TEST = "test"
_FORMAT = "splits.v1"


@dataclass(frozen=True)
class Splits:
    """The parts of the data.

    Attributes:
        train: rows to fit on; dev and test are not in it.
        dev: rows that decide, or None when the folds are used.
        test: rows scored once, at the end.
        folds: for each fold the indices in `train` that are held out; empty when there is a dev.
        notes: what the user should know.
    """

    train: Dataset
    dev: Dataset | None
    test: Dataset
    folds: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Unit:
    """Rows that must stay together, with their label counts and a key that orders units at random."""

    rows: tuple[int, ...]
    labels: Counter[str]
    order: str


def split(
    dataset: Dataset, dev: Dataset | None, test: Dataset | None, *, spec: DataSpec, seed: int, lock: Path | None
) -> Splits:
    """Split `dataset` into train, dev or folds, and test; what the user gave as dev or test is taken as it is.

    Args:
        dataset: the rows of the train file.
        dev: the user's dev rows, or None.
        test: the user's test rows, or None to set some aside (`spec.test_share`).
        spec: the task's `[data]`.
        seed: orders the groups.
        lock: file that keeps the assignment; read when it exists, written when it changes. None keeps nothing.

    Raises:
        DataError: there are too few rows, or the lock file is damaged.
    """
    if len(dataset) < 4:
        raise DataError(
            f"{spec.train}: {len(dataset)} rows are too few to split", hint="give at least 10 rows per label"
        )
    places, notes = assign(dataset, seed=seed, lock=lock, test_share=None if test is not None else spec.test_share)
    rest = [i for i, place in enumerate(places) if place != _TEST]
    outer = test if test is not None else dataset.take([i for i, place in enumerate(places) if place == _TEST])
    if test is None:
        notes.append(f"test: {len(outer)} of {len(dataset)} rows set aside, stratified by label and grouped")
    if dev is not None:
        return Splits(dataset.take(rest), dev, outer, (), tuple(notes))
    if len(rest) < FOLDS_BELOW:
        folds = [tuple(j for j, i in enumerate(rest) if int(places[i]) % FOLDS == fold) for fold in range(FOLDS)]
        used = tuple(fold for fold in folds if 0 < len(fold) < len(rest))
        if len(used) < 2:
            raise DataError(
                f"{spec.train}: nearly all rows are near-duplicates of one another; they cannot be split",
                hint="give more varied rows, or a dev file",
            )
        notes.append(f"dev: out-of-fold predictions of {len(used)} folds over {len(rest)} training rows")
        return Splits(dataset.take(rest), None, outer, used, tuple(notes))
    held = [i for i in rest if places[i] == 0]
    notes.append(f"dev: {len(held)} of {len(rest)} training rows, stratified by label and grouped")
    return Splits(dataset.take([i for i in rest if places[i] != 0]), dataset.take(held), outer, (), tuple(notes))


def set_aside(dataset: Dataset, count: int, *, seed: int) -> tuple[int, ...]:
    """Return the places of about `count` rows of `dataset`, drawn at random; alike rows and groups stay together.

    A group larger than what is still wanted is passed over, so a few less may come back.
    """
    units, _ = _units(dataset, seed, dataset.texts, crowded=False)
    taken: list[int] = []
    for unit in sorted(units, key=lambda unit: unit.order):
        if len(taken) + len(unit.rows) <= count:
            taken += unit.rows
    return tuple(sorted(taken))


@dataclass(frozen=True)
class Held:
    """How many rows slot 0, the dev part, gets at least (where there are three times as many) and at most."""

    least: int
    most: int


def assign(
    dataset: Dataset,
    *,
    seed: int,
    lock: Path | None,
    test_share: float | None,
    dev: Held | None = None,
    compared: Sequence[str] | None = None,
) -> tuple[list[str | int], list[str]]:
    """Return ``"test"`` or a slot from 0 to 9 for each row, and notes; a lock keeps what it says.

    Args:
        dataset: the rows.
        seed: orders the groups.
        lock: file that keeps the assignment; None keeps nothing.
        test_share: of the rows for test; None when the user gave a test file.
        dev: bounds of slot 0; None leaves it a tenth.
        compared: what near duplicates are looked for in, row by row; the texts when None.

    Raises:
        DataError: the lock file is damaged or cannot be written.
    """
    keys = [_key(example) for example in dataset]
    locked = _read_lock(lock)
    given = test_share is None
    units, notes = _units(dataset, seed, compared or dataset.texts, crowded=dev is not None)
    places = _place(dataset, units, _known(keys, locked, drop_test=given), test_share, dev)
    _write_lock(lock, {**locked, **{key: str(place) for key, place in zip(keys, places, strict=True)}}, locked)
    return places, [*notes, *_lock_notes(keys, locked, given_test=given)]


def _key(example: Example) -> str:
    """Return the row digest of the lock: of the text and the group, so that correcting a label moves nothing."""
    return hashlib.sha256(f"{example.text}\x1f{example.group or ''}".encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _units(dataset: Dataset, seed: int, compared: Sequence[str], *, crowded: bool) -> tuple[list[_Unit], list[str]]:
    """Gather rows by group column, or by near-duplication where they have none, in an order that the seed decides.

    When all are tied to one another by the words that they share (`crowded` expects that), only equal ones are tied.
    """
    members: dict[str, list[int]] = defaultdict(list)
    loose = [i for i, example in enumerate(dataset) if example.group is None]
    for i, example in enumerate(dataset):
        if example.group is not None:
            members[f"group {example.group}"].append(i)
    texts, notes = [compared[i] for i in loose], []
    alike = find_duplicates(texts).groups
    largest = max(Counter(alike).values(), default=0)
    if crowded and largest > max(_CROWD, _CROWD_SHARE * len(dataset)):
        alike = find_duplicates(texts, threshold=1.0).groups
        notes.append(f"{largest:,} rows are alike, each nearly like another: only equal ones are kept together")
    for i, first in zip(loose, alike, strict=True):
        members[f"like {loose[first]}"].append(i)
    units = []
    for rows in members.values():
        key = min(dataset.examples[i].digest for i in rows)
        counts = Counter(name for i in rows for name in _labels(dataset.examples[i]))
        units.append(_Unit(tuple(rows), counts, hashlib.sha256(f"{seed} {key}".encode()).hexdigest()))
    return sorted(units, key=lambda unit: (-len(unit.rows), unit.order)), notes


def _labels(example: Example) -> tuple[str, ...]:
    return example.labels or ("",)


def _known(keys: Sequence[str], locked: dict[str, str], *, drop_test: bool) -> list[str | int | None]:
    found: list[str | int | None] = []
    for key in keys:
        place = locked.get(key)
        if place is None or (place == _TEST and drop_test):
            found.append(None)
        else:
            found.append(place if place == _TEST else int(place))
    return found


def _place(
    dataset: Dataset,
    units: Sequence[_Unit],
    known: Sequence[str | int | None],
    test_share: float | None,
    dev: Held | None,
) -> list[str | int]:
    """Return ``"test"`` or the slot of each row; rows of units seen before follow them, old rows never move."""
    places: list[str | int | None] = list(known)
    fresh = []
    for unit in units:
        old = Counter(places[i] for i in unit.rows if places[i] is not None)
        if not old:
            fresh.append(unit)
            continue
        home = min(old, key=lambda place: (-old[place], str(place)))
        for i in unit.rows:
            places[i] = home if places[i] is None else places[i]
    totals = Counter(name for example in dataset for name in _labels(example))
    if test_share is not None:
        fresh = _set_aside(dataset, fresh, places, totals, test_share)
    _fill_slots(dataset, fresh, places, totals, dev)
    return [0 if place is None else place for place in places]


def _set_aside(
    dataset: Dataset, units: list[_Unit], places: list[str | int | None], totals: Counter[str], share: float
) -> list[_Unit]:
    """Put units into test until each label, then the whole, has its share; return the units left.

    A unit goes in when that brings its labels nearer to their share. Labels too rare for that (three rows, less than
    half a row wanted) are then drawn from, most numerous first, until the whole has its share; each keeps a row.
    """
    inside = Counter(n for e, p in zip(dataset, places, strict=True) if p == _TEST for n in _labels(e))
    wanted = {name: share * count for name, count in totals.items()}
    missing = share * len(dataset) - sum(place == _TEST for place in places)
    chosen: set[int] = set()
    for late in (False, True):
        left = (i for i in range(len(units)) if i not in chosen)
        queue = sorted(left, key=lambda i: -min(totals[n] - inside[n] for n in units[i].labels)) if late else left
        for i in list(queue):
            unit = units[i]
            if missing < 0.5 * len(unit.rows):
                continue
            gain = sum(n * (2 * (wanted[name] - inside[name]) - n) for name, n in unit.labels.items())
            keeps = all(totals[name] - inside[name] - n >= 1 for name, n in unit.labels.items())
            fits = all(inside[name] + n <= wanted[name] + 1 for name, n in unit.labels.items())
            if not keeps or not (fits if late else gain > 0):
                continue
            chosen.add(i)
            inside.update(unit.labels)
            missing -= len(unit.rows)
            for row in unit.rows:
                places[row] = _TEST
    return [unit for i, unit in enumerate(units) if i not in chosen]


def _fill_slots(
    dataset: Dataset,
    units: Sequence[_Unit],
    places: list[str | int | None],
    totals: Counter[str],
    dev: Held | None,
) -> None:
    """Give each unit the slot where its labels are rarest, then the fold, then the slot with the fewest rows."""
    slots = [Counter[str]() for _ in range(_SLOTS)]
    sizes = [0] * _SLOTS
    for example, place in zip(dataset, places, strict=True):
        if isinstance(place, int):
            slots[place].update(_labels(example))
            sizes[place] += 1
    for unit in units:

        def cost(slot: int, unit: _Unit = unit) -> tuple[float, float, int, int]:
            here = sum(n * (slots[slot][name] / totals[name]) for name, n in unit.labels.items())
            other = (slot + FOLDS) % _SLOTS
            fold = here + sum(n * (slots[other][name] / totals[name]) for name, n in unit.labels.items())
            return round(here, 9), round(fold, 9), sizes[slot], -slot

        # A label seen once cannot be both learnt and checked: it is for learning, never in slot 0 (dev).
        rare = any(totals[name] == n for name, n in unit.labels.items())
        full = dev is not None and sizes[0] + len(unit.rows) > dev.most
        best = min(range(1 if rare or full else 0, _SLOTS), key=cost)
        slots[best].update(unit.labels)
        sizes[best] += len(unit.rows)
        for row in unit.rows:
            places[row] = best
    if dev is not None:
        _fill_dev(units, places, min(dev.least, sum(sizes) // 3) - sizes[0])


def _fill_dev(units: Sequence[_Unit], places: list[str | int | None], missing: int) -> None:
    """Move units to slot 0 until no row is missing there; what the lock knew stays."""
    for unit in sorted(units, key=lambda unit: unit.order):
        if missing >= len(unit.rows) and places[unit.rows[0]] != 0:
            missing -= len(unit.rows)
            for row in unit.rows:
                places[row] = 0


def _read_lock(lock: Path | None) -> dict[str, str]:
    if lock is None or not lock.exists():
        return {}
    hint = "restore it from version control, or delete it to split anew (scores will not compare with earlier ones)"
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{lock}: cannot be read: {error}", hint=hint) from error
    allowed = {_TEST, *map(str, range(_SLOTS))}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(f"{lock}: not a lock file of this version of alambic ({_FORMAT})", hint=hint)
    rows = content.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(v, str) and v in allowed for v in rows.values()):
        raise DataError(f"{lock}: damaged: rows must map digests to 'test' or a slot from 0 to 9", hint=hint)
    return rows


def _write_lock(lock: Path | None, rows: dict[str, str], before: dict[str, str]) -> None:
    if lock is None or (rows == before and lock.exists()):
        return
    body = json.dumps({"format": _FORMAT, "rows": dict(sorted(rows.items()))}, indent=0)
    temporary = lock.with_name(lock.name + ".part")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(body + "\n", encoding="utf-8")
        os.replace(temporary, lock)
    except OSError as error:
        raise DataError(
            f"{lock}: cannot be written: {error.strerror}", hint="choose a folder you can write to"
        ) from error


def _lock_notes(keys: Sequence[str], locked: dict[str, str], *, given_test: bool) -> list[str]:
    if not locked:
        return []
    new = sum(key not in locked for key in keys)
    notes = [f"splits.lock: {len(keys) - new} rows keep their place, {new} new"]
    if given_test and any(locked.get(key) == _TEST for key in keys):
        notes.append("splits.lock: rows once set aside as test are for training now that a test file is given")
    return notes
