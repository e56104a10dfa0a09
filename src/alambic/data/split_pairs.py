"""Train and dev of preferences, beside the parts of the task's own rows: what test asks is learnt from nowhere.

A pair whose prompt is (nearly) that of a test row is left out, one that asks what a dev row asks is for dev, and of the
others a tenth is set aside for dev, grouped and locked as rows are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alambic.data.dataset import Dataset, Example
from alambic.data.duplicates import find_duplicates, own_words
from alambic.data.pairs import PreferenceDataset, read_pairs
from alambic.data.split import Held, assign
from alambic.errors import DataError

if TYPE_CHECKING:
    from alambic.data.split_chats import ChatParts
    from alambic.task import Task

_LEAST_PAIRS = 10
_DEV = Held(least=20, most=1000)
_CROWD, _CROWD_SHARE = 20, 0.2  # as for rows: when all are tied to one another, only equal ones are


@dataclass(frozen=True)
class PairParts:
    """Pairs to learn from and pairs that decide.

    Attributes:
        train: learnt from; none of them asks what a dev or test row, or a pair of dev, asks.
        dev: decide when to stop, and are measured through the bundle.
        left_out: where each pair stands that asks what a test row asks.
        familiar: pairs of dev that ask what a row of train asks: the model was fine-tuned on their prompts.
        form: how the file was read.
        notes: what was guessed and set aside.
    """

    train: PreferenceDataset
    dev: PreferenceDataset
    left_out: tuple[str, ...]
    familiar: int
    form: str
    notes: tuple[str, ...]


def read_pair_parts(task: Task, rows: ChatParts, *, lock: Path | None) -> PairParts | None:
    """Read the preferences of a task and split them; None when it has none.

    Args:
        task: its `[preferences]` names the files.
        rows: the parts of the task's own rows.
        lock: file that keeps which pair is for dev; None keeps nothing.

    Raises:
        DataError: a file or its content cannot be used, or there are too few pairs.
    """
    spec = task.preferences
    if spec is None:
        return None
    read = read_pairs(task.path_of(spec.file), task.data)
    given = None if spec.dev is None else read_pairs(task.path_of(spec.dev), task.data)
    notes = [*read.notes, *(given.notes if given is not None else ())]
    dev = None if given is None else given.dataset
    return split_pairs(read.dataset, dev, rows, seed=task.seed, lock=lock, form=read.form, notes=notes)


def split_pairs(
    pairs: PreferenceDataset,
    dev: PreferenceDataset | None,
    rows: ChatParts,
    *,
    seed: int,
    lock: Path | None,
    form: str = "",
    notes: Sequence[str] = (),
) -> PairParts:
    """Split `pairs`; those that the user gave as dev stay there, unless a test row asks the same.

    Raises:
        DataError: there are too few pairs, or the lock file is damaged.
    """
    if len(pairs) < _LEAST_PAIRS:
        raise DataError(f"{len(pairs)} pairs are too few to learn from", hint=f"give at least {_LEAST_PAIRS}")
    whole = pairs if dev is None else pairs + dev
    touches = _touched(whole, rows, decided=0 if dev is None else len(dev))
    left_out = [i for i, parts in enumerate(touches) if "test" in parts]
    decides = [i for i, parts in enumerate(touches) if "test" not in parts and (i >= len(pairs) or "dev" in parts)]
    free = [i for i in range(len(pairs)) if not touches[i] & {"test", "dev"}]
    said = [*notes]
    if dev is None and len(decides) >= min(_DEV.least, len(pairs) // 3):
        said.append("preferences: the pairs that ask what dev rows ask decide")
    elif dev is None:
        drawn, more = _drawn(whole.take(free), seed=seed, lock=lock)
        decides = sorted([*decides, *(free[i] for i in drawn)])
        free = [i for i in free if i not in set(decides)]
        said += more
    else:  # pairs of train that ask what dev asks are for neither
        aside = [i for i in decides if i < len(pairs)]
        decides = [i for i in decides if i >= len(pairs)]
        said += [f"preferences: {len(aside):,} pairs ask what dev asks, and are left out"] if aside else []
    if not free or not decides:
        raise DataError(
            f"{len(free):,} pairs are left to learn from and {len(decides):,} to decide",
            hint="their prompts are those of dev or test rows, or nearly all one: give more varied ones, or a dev file",
        )
    if left_out:
        said.append(f"preferences: {len(left_out):,} pairs ask what test rows ask, and are left out")
    familiar = sum("train" in touches[i] for i in decides)
    said.append(f"preferences: {len(free):,} pairs to learn from, {len(decides):,} decide ({familiar:,} of them ask "
                "what rows of train ask)")  # fmt: skip
    places = tuple(whole.examples[i].where for i in left_out)
    return PairParts(whole.take(free), whole.take(decides), places, familiar, form, tuple(said))


def _touched(pairs: PreferenceDataset, rows: ChatParts, *, decided: int) -> list[frozenset[str]]:
    """Return for each pair the parts that hold a row of its group or one that asks (nearly) the same.

    The last `decided` pairs count as rows of dev for the others.
    """
    parts = [("train", rows.train), ("dev", rows.dev), ("test", rows.test)]
    known = [(name, row.asked or row.answer, row.group) for name, part in parts for row in part]
    names = [name for name, _, _ in known] + [""] * (len(pairs) - decided) + ["dev"] * decided
    texts = own_words([text for _, text, _ in known] + [pair.asked for pair in pairs])
    groups = [group for _, _, group in known] + [pair.group for pair in pairs]
    alike = find_duplicates(texts).groups
    if max(Counter(alike).values()) > max(_CROWD, _CROWD_SHARE * len(texts)):
        alike = find_duplicates(texts, threshold=1.0).groups
    by_text: dict[int, set[str]] = defaultdict(set)
    by_group: dict[str, set[str]] = defaultdict(set)
    for name, tie, group in zip(names, alike, groups, strict=True):
        by_text[tie].add(name)
        if group is not None:
            by_group[group].add(name)
    found = zip(alike[len(known) :], groups[len(known) :], strict=True)
    return [frozenset((by_text[tie] | by_group.get(group or "", set())) - {""}) for tie, group in found]


def _drawn(pairs: PreferenceDataset, *, seed: int, lock: Path | None) -> tuple[list[int], list[str]]:
    """Return the places of a tenth of `pairs`, whole groups, for dev."""
    if not len(pairs):
        return [], []
    asked = [pair.asked or pair.chosen.content for pair in pairs]
    texts = Dataset(tuple(Example(a, ("",), p.where, p.group) for a, p in zip(asked, pairs, strict=True)), ("",))
    places, notes = assign(texts, seed=seed, lock=lock, test_share=None, dev=_DEV, compared=own_words(asked))
    return [i for i, place in enumerate(places) if place == 0], notes
