"""Preferences: of two answers to one prompt, the better and the worse. The forms are TRL's.

explicit prompt   `prompt`, `chosen`, `rejected`: texts, or lists of messages
implicit prompt   `chosen`, `rejected` alone (reward data): what both begin with is the prompt; also ``Human:`` turns
unpaired          `prompt`, `completion`, `label` (true or false, KTO): answers to one prompt are put together
scored            `prompt`, `completion`, `score` (or `reward`, a number): of two answers to one prompt the higher wins
OpenAI            `input` (with `messages`), `preferred_output`, `non_preferred_output`
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.data.chat_answers import written
from alambic.data.chat_rows import Fields, decoded, is_talk, standard
from alambic.data.clean import clean_name
from alambic.data.columns import listing, named
from alambic.data.read import cell_text
from alambic.data.read_chats import Tidied, check_order, refusal
from alambic.data.rows import Row, open_source
from alambic.errors import DataError
from alambic.kinds.chat import Chat, Message, parse_chat

if TYPE_CHECKING:
    from alambic.task import DataSpec

_SAMPLE_ROWS = 500
_MOST_PAIRS = (
    4  # of one prompt, from answers that come one by one: many answers to a few prompts must not outweigh the rest
)
_HUMAN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SCORES = ("score", "reward")
_GOOD = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 is True


@dataclass(frozen=True)
class PreferenceExample:
    """One prompt and two answers.

    Attributes:
        prompt: the conversation that waits for the assistant.
        chosen: the better answer.
        rejected: the worse one.
        where: ``file:line`` of origin.
        group: rows of one group never fall on both sides of a split.
        given: what the row gives to answer, without the words of the task's prompt around it; None: what the prompt
            says. Splits go by it, as those of the task's own rows do.
    """

    prompt: Chat
    chosen: Message
    rejected: Message
    where: str = ""
    group: str | None = None
    given: str | None = None

    @property
    def asked(self) -> str:
        """What is asked, as one text: all messages of the prompt but the system's."""
        if self.given is not None:
            return self.given
        return "\n".join(m.content for m in self.prompt.messages if m.role != "system")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of prompt and answers; origin and group do not count."""
        whole = [self.prompt.to_dict(), self.chosen.to_dict(), self.rejected.to_dict()]
        body = json.dumps(whole, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class PreferenceDataset:
    """Pairs in order."""

    examples: tuple[PreferenceExample, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[PreferenceExample]:
        return iter(self.examples)

    @property
    def chosen(self) -> list[Chat]:
        """The conversations with their better answers."""
        return [Chat((*e.prompt.messages, e.chosen), e.prompt.tools) for e in self.examples]

    @property
    def rejected(self) -> list[Chat]:
        """The conversations with their worse answers."""
        return [Chat((*e.prompt.messages, e.rejected), e.prompt.tools) for e in self.examples]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the pairs in order."""
        whole = hashlib.sha256()
        for example in self.examples:
            whole.update(example.digest.encode())
        return whole.hexdigest()

    def take(self, indices: Sequence[int]) -> PreferenceDataset:
        """Return the pairs at `indices`."""
        return PreferenceDataset(tuple(self.examples[i] for i in indices))

    def __add__(self, other: PreferenceDataset) -> PreferenceDataset:
        return PreferenceDataset(self.examples + other.examples)


@dataclass(frozen=True)
class ReadPairs:
    """A PreferenceDataset and how it was read."""

    dataset: PreferenceDataset
    notes: tuple[str, ...]
    form: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class _Sides:
    """A row: its prompt, and the answers that are good and bad (one of each but for rows of one answer)."""

    prompt: Chat
    good: tuple[Message, ...]
    bad: tuple[Message, ...]
    score: float = 0.0
    given: str | None = None


_Read = tuple[Row, _Sides, str | None]


def read_pairs(path: Path, spec: DataSpec, *, system: str | None = None) -> ReadPairs:
    """Read preferences.

    Args:
        path: a file of any format that tables or conversations are read from.
        spec: the task's `[data]`: prompt (written around a prompt that is one text, unless it is there already), system
            message, group (where the file has that column), encoding.
        system: system message of every prompt that brings none, instead of the task's.

    Raises:
        DataError: the file cannot be used, or rows are wrong; up to 20 of them are named as ``file:line``.
    """
    source = open_source(path, spec)
    sample = [row.fields for row in islice((r for r in source.rows() if r.error is None), _SAMPLE_ROWS)]
    names = source.columns or list(dict.fromkeys(name for fields in sample for name in fields))
    form, read, used = _form(names, path.name)
    group = named(spec.group, "group", names, path.name) if spec.group in names else None
    system = system if system is not None else spec.system
    tidied = Tidied()
    rows: list[_Read] = []
    faults: list[DataError] = []
    for row in source.rows():
        try:
            if row.error is not None:
                raise DataError(f"{row.where}: {row.error}")
            worded = _worded(read(row.fields, row.where), row.fields.get("prompt"), spec.prompt)
            sides = _tidy(worded, system, tidied, row.where)
        except DataError as error:
            faults.append(error)
            continue
        name = clean_name(cell_text(row.fields.get(group))) if group else ""
        rows.append((row, sides, name or None))
    if faults:
        raise refusal(path, faults, rows=len(rows) + len(faults))
    notes = [f"read as {form} ({', '.join(used)})", *tidied.notes()]
    if form in ("unpaired", "scored"):
        examples, more = _paired(rows, _ranked if form == "scored" else _sorted)
        notes += more
    else:
        examples = [PreferenceExample(s.prompt, s.good[0], s.bad[0], row.where, name, s.given) for row, s, name in rows]
    if not examples:
        raise DataError(f"{path}: no pair of a better and a worse answer", hint="each prompt needs one of both")
    said = [f"{path.name}: {note}" for note in notes]
    return ReadPairs(PreferenceDataset(tuple(examples)), (*source.notes, *said), form, used)


def _form(names: Sequence[str], where: str) -> tuple[str, Callable[[Fields, str], _Sides], tuple[str, ...]]:
    have = set(names)
    tools = ("tools",) if "tools" in have else ()
    if {"chosen", "rejected"} <= have:
        if "prompt" in have:
            return "explicit prompt", _explicit, ("prompt", "chosen", "rejected", *tools)
        return "implicit prompt", _implicit, ("chosen", "rejected", *tools)
    if {"prompt", "completion", "label"} <= have:
        return "unpaired", _unpaired, ("prompt", "completion", "label", *tools)
    score = next((name for name in _SCORES if name in have), None)
    if {"prompt", "completion"} <= have and score is not None:
        return "scored", partial(_scored, score), ("prompt", "completion", score, *tools)
    if {"input", "preferred_output", "non_preferred_output"} <= have:
        return "openai", _openai, ("input", "preferred_output", "non_preferred_output")
    raise DataError(
        f"{where}: no preferences: the columns are {listing(names)}",
        hint="known: prompt, chosen, rejected; chosen, rejected; prompt, completion, label; prompt, completion, score",
    )


def _messages(value: Any, name: str, where: str, *, role: str) -> list[dict[str, Any]]:
    """Return a cell as messages: a list of them, or a text that `role` says."""
    if is_talk(value):
        return standard(decoded(value), name, where)[0]
    if isinstance(value, Mapping) and "role" in value:
        return standard([value], name, where)[0]
    return [{"role": role, "content": written(value)}]


def _chat(messages: list[dict[str, Any]], fields: Fields, where: str) -> Chat:
    return parse_chat(messages, decoded(fields.get("tools")), where=where)


def _sides(before: Chat, chosen: Sequence[Any], rejected: Sequence[Any], where: str) -> _Sides:
    answers = []
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        messages = parse_chat(list(side), where=where).messages if side else ()
        if len(messages) != 1 or messages[0].role != "assistant":
            said = "nothing after the prompt" if not messages else f"{len(messages)} messages after the prompt"
            raise DataError(f"{where}: {name} has {said}", hint="it is one message of the assistant")
        answers.append(messages[0])
    return _Sides(before, (answers[0],), (answers[1],))


def _explicit(fields: Fields, where: str) -> _Sides:
    asked = _messages(fields.get("prompt"), "prompt", where, role="user")
    sides = [_messages(fields.get(name), name, where, role="assistant") for name in ("chosen", "rejected")]
    # Some files repeat the prompt in front of both answers.
    sides = [side[len(asked) :] if side[: len(asked)] == asked else side for side in sides]
    return _sides(_chat(asked, fields, where), sides[0], sides[1], where)


def _implicit(fields: Fields, where: str) -> _Sides:
    cells = [fields.get("chosen"), fields.get("rejected")]
    if all(map(is_talk, cells)):
        talks = [
            standard(decoded(cell), name, where)[0] for cell, name in zip(cells, ("chosen", "rejected"), strict=True)
        ]
    else:
        talks = _split_texts(written(cells[0]), written(cells[1]))
    shared = next((i for i, (a, b) in enumerate(zip(*talks, strict=False)) if a != b), min(map(len, talks)))
    shared = min(shared, *(len(talk) - 1 for talk in talks))
    if shared < 1:
        raise DataError(f"{where}: chosen and rejected have no beginning in common", hint="give the prompt as `prompt`")
    return _sides(_chat(talks[0][:shared], fields, where), talks[0][shared:], talks[1][shared:], where)


def _split_texts(chosen: str, rejected: str) -> list[list[dict[str, Any]]]:
    """Return two texts as messages: ``Human:`` and ``Assistant:`` turns, else what both begin with as the user's."""
    talks = [_turns(text) for text in (chosen, rejected)]
    if all(talks):
        return talks
    shared = len(os.path.commonprefix((chosen, rejected)))  # noqa: RUF071 - of characters, as meant
    # No word is cut in two: it belongs to the answers.
    while shared and not chosen[shared - 1].isspace() and (chosen + rejected)[shared:].strip():
        shared -= 1
    prompt = [{"role": "user", "content": chosen[:shared].rstrip(" ")}] if chosen[:shared].strip() else []
    return [[*prompt, {"role": "assistant", "content": text[shared:]}] for text in (chosen, rejected)]


def _turns(text: str) -> list[dict[str, Any]]:
    pieces = _HUMAN.split(text)
    if len(pieces) < 5 or pieces[0].strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def _openai(fields: Fields, where: str) -> _Sides:
    asked = decoded(fields.get("input"))
    if not isinstance(asked, Mapping):
        raise DataError(f"{where}: input is not an object with messages")
    messages, _ = standard(decoded(asked.get("messages")), "input.messages", where)
    sides = [
        _messages(fields.get(name), name, where, role="assistant")
        for name in ("preferred_output", "non_preferred_output")
    ]
    return _sides(parse_chat(messages, decoded(asked.get("tools")), where=where), sides[0], sides[1], where)


def _unpaired(fields: Fields, where: str) -> _Sides:
    label = fields.get("label")
    key = label.strip().casefold() if isinstance(label, str) else label
    if not isinstance(key, bool | int | float | str) or key not in _GOOD:
        hint = "a column of numbers is called score" if isinstance(label, int | float) else None
        raise DataError(f"{where}: label {label!r} is neither true nor false", hint=hint)
    answer = _one_answer(fields, where)
    return replace(answer, bad=()) if _GOOD[key] else replace(answer, good=())


def _scored(name: str, fields: Fields, where: str) -> _Sides:
    try:
        score = float(cell_text(fields.get(name)))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: {name} {fields.get(name)!r} is no number", hint="a higher one is a better answer")
    return replace(_one_answer(fields, where), bad=(), score=score)


def _one_answer(fields: Fields, where: str) -> _Sides:
    """Return a row of one answer; it is on both sides, for the caller to choose."""
    asked = _messages(fields.get("prompt"), "prompt", where, role="user")
    said = _messages(fields.get("completion"), "completion", where, role="assistant")
    return _sides(_chat(asked, fields, where), said, said, where)


def _worded(sides: _Sides, cell: Any, template: str | None) -> _Sides:
    """Write the words of the task's prompt around a prompt that is one text, unless they are there already."""
    head, mark, tail = (template or "").partition("{text}")
    messages = sides.prompt.messages
    if not mark or not isinstance(cell, str) or is_talk(cell) or len(messages) != 1:
        return sides
    text = messages[0].content
    if head + tail and text.startswith(head) and text.endswith(tail) and len(text) >= len(head + tail):
        return replace(sides, given=text[len(head) : len(text) - len(tail)])
    asked = replace(messages[0], content=f"{head}{text}{tail}")
    return replace(sides, prompt=Chat((asked,), sides.prompt.tools), given=text)


def _tidy(sides: _Sides, system: str | None, tidied: Tidied, where: str) -> _Sides:
    prompt = sides.prompt
    if system and prompt.messages[0].role != "system":
        prompt = Chat((Message("system", system), *prompt.messages), prompt.tools)
    wholes = [
        [tidied.chat(Chat((*prompt.messages, answer), prompt.tools), where) for answer in side]
        for side in (sides.good, sides.bad)
    ]
    for whole in (*wholes[0], *wholes[1]):
        check_order(whole, where)
    good, bad = (tuple(whole.messages[-1] for whole in side) for side in wholes)
    if good and good == bad:
        raise DataError(f"{where}: chosen and rejected are the same", hint="remove the row: it prefers nothing")
    return replace(sides, prompt=(wholes[0] or wholes[1])[0].prompt, good=good, bad=bad)


def _paired(
    rows: Iterable[_Read], order: Callable[[Sequence[_Read]], list[tuple[int, int]]]
) -> tuple[list[PreferenceExample], list[str]]:
    """Put answers to the same prompt together, the better before the worse as `order` says, a few pairs a prompt."""
    by_prompt: dict[str, list[_Read]] = defaultdict(list)
    for row in rows:
        by_prompt[json.dumps(row[1].prompt.to_dict(), sort_keys=True)].append(row)
    examples, alone = [], 0
    for same in by_prompt.values():
        answers = [(sides.good or sides.bad)[0] for _, sides, _ in same]
        places = [(i, j) for i, j in order(same) if answers[i] != answers[j]]
        alone += len(same) - len({at for place in places for at in place})
        for i, j in places:
            origin, sides, group = same[i]
            examples.append(PreferenceExample(sides.prompt, answers[i], answers[j], origin.where, group, sides.given))
    note = [f"{alone:,} answers have no other side to be compared with, and are left out"] if alone else []
    return examples, [f"{len(examples):,} pairs made of answers to the same prompts", *note]


def _sorted(same: Sequence[_Read]) -> list[tuple[int, int]]:
    """Return the places of each good answer with a bad one."""
    good = [i for i, (_, sides, _) in enumerate(same) if sides.good]
    bad = [i for i, (_, sides, _) in enumerate(same) if sides.bad]
    # Diagonals first, so that every answer is used before one is used twice.
    order = sorted(product(range(len(good)), range(len(bad))), key=lambda at: (abs(at[0] - at[1]), at))
    return [(good[i], bad[j]) for i, j in order[: max(_MOST_PAIRS, len(good), len(bad))]]


def _ranked(same: Sequence[_Read]) -> list[tuple[int, int]]:
    """Return the places of higher and lower scores: the best with the worst and so inwards, then the widest apart."""
    scores = [sides.score for _, sides, _ in same]
    order = sorted(range(len(same)), key=lambda i: (-scores[i], i))
    inwards = [(order[k], order[-1 - k]) for k in range(len(order) // 2)]
    apart = sorted(product(order, order), key=lambda at: scores[at[1]] - scores[at[0]])
    pairs = [(i, j) for i, j in dict.fromkeys((*inwards, *apart)) if scores[i] > scores[j]]
    return pairs[: max(_MOST_PAIRS, len(inwards))]
