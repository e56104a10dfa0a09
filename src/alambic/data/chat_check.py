"""The audit of conversations: lengths, doubles, leaks, answers that teach little, personal data.

It changes nothing and cuts nothing: rows longer than the model reads are all named. Same style as `check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from alambic.data.chats import ChatDataset, ChatExample
from alambic.data.check import Alike, Finding, finding, languages_of, leaks_of, personal_of
from alambic.data.dataset import Example
from alambic.data.duplicates import exact_key, find_duplicates, own_words
from alambic.kinds.chat import Chat

CountTokens = Callable[[Sequence[Chat]], list[tuple[int, int]]]

_SHOWN = 20
_SHORT = 20  # an answer this many times shorter than the middle one is looked at
_RUN = 3  # words in a row that say that an answer is taken from its prompt
_OFTEN = 0.2
_COPIED = 0.1  # a task of correction leaves some texts as they are


@dataclass(frozen=True)
class ChatLengths:
    """How long the texts of one side are, in `unit` (tokens of the model, or words)."""

    unit: str
    p50: int
    p90: int
    p99: int
    longest: int
    longest_where: str


@dataclass(frozen=True)
class ChatAudit:
    """What the audit of conversations found.

    Attributes:
        rows: rows in all parts.
        parts: rows by part.
        turns: rows by number of messages that are not the system's.
        system: rows with a system message.
        tools: rows that have tools.
        strange_calls: rows that call a tool which they do not have.
        prompt: lengths of what is read.
        answer: lengths of what is written (the last answer).
        whole: lengths of both together.
        limit: tokens that the model reads and writes together; None: no model is known.
        over: every row longer than that, worst first, as ``file:line: tokens``; None: no model is known.
        exact_duplicates: rows that ask and answer what an earlier one does.
        near_duplicates: rows whose question is nearly that of another.
        same_question: rows that ask what an earlier one asks and answer otherwise.
        short: rows with an answer twenty times shorter than the middle one.
        frequent: the most frequent answer, and its share when that is a fifth or more.
        copied: rows whose answer is what was asked.
        taken: share of the runs of three words of the answers that stand in their prompts.
        leaks_exact: test rows whose question is in train or dev.
        leaks_near: test rows nearly the same as one of train or dev.
        leak_examples: the first of both.
        personal: rows with likely personal data, by kind.
        languages: share of rows by guessed language (`fr`, `en`, `other`), of the questions and of the answers.
        advice: what to do about it, most serious first.
    """

    rows: int
    parts: dict[str, int]
    turns: dict[str, int]
    system: int
    tools: int
    strange_calls: Finding
    prompt: ChatLengths
    answer: ChatLengths
    whole: ChatLengths
    limit: int | None
    over: tuple[str, ...] | None
    exact_duplicates: Finding
    near_duplicates: Finding
    same_question: Finding
    short: Finding
    frequent: tuple[str, float] | None
    copied: Finding
    taken: float
    leaks_exact: Finding
    leaks_near: Finding
    leak_examples: tuple[Alike, ...]
    personal: dict[str, Finding]
    languages: dict[str, dict[str, float]]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain dicts, lists, strings and numbers."""
        return asdict(self, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs})


def check_chats(
    parts: Mapping[str, ChatDataset], *, count_tokens: CountTokens | None = None, limit: int | None = None
) -> ChatAudit:
    """Audit the conversations of all parts.

    Args:
        parts: by name: train, dev, test.
        count_tokens: tokens of prompt and answer of each conversation; words are counted when None.
        limit: most tokens that the model reads and writes together.

    Raises:
        MissingExtra: rensa, which finds the near duplicates, is not installed.
    """
    examples = [example for part in parts.values() for example in part]
    names = [name for name, part in parts.items() for _ in part]
    counts = count_tokens([e.chat for e in examples]) if count_tokens else [_words(e) for e in examples]
    unit = "tokens" if count_tokens else "words"
    # Questions alone decide on leaks: another answer to the same question is no new question.
    asked = [
        Example(text, ("",), e.where) for text, e in zip(own_words([e.asked for e in examples]), examples, strict=True)
    ]
    alike = find_duplicates([e.text for e in asked])
    leaks_exact, leaks_near = leaks_of(names, asked, alike)
    again, otherwise = _repeats(examples)
    found: dict[str, Any] = {
        "rows": len(examples),
        "parts": {name: len(part) for name, part in parts.items()},
        "turns": _turns(examples),
        "system": sum(e.chat.messages[0].role == "system" for e in examples),
        "tools": sum(bool(e.chat.tools) for e in examples),
        "strange_calls": finding(e.where for e in examples if _calls_strangely(e.chat)),
        "prompt": _lengths(examples, [prompt for prompt, _ in counts], unit),
        "answer": _lengths(examples, [answer for _, answer in counts], unit),
        "whole": _lengths(examples, [sum(count) for count in counts], unit),
        "limit": limit if count_tokens else None,
        "over": None if limit is None or count_tokens is None else _over(examples, counts, limit),
        "exact_duplicates": finding(again),
        "near_duplicates": finding(asked[i].where for i in sorted({pair.second for pair in alike.near})),
        "same_question": finding(otherwise),
        "short": _short(examples),
        "frequent": _frequent(examples),
        "copied": finding(e.where for e in examples if e.answer.strip() and e.answer.strip() == e.asked.strip()),
        "taken": _taken(examples),
        "leaks_exact": finding(leak.where for leak in leaks_exact),
        "leaks_near": finding(leak.where for leak in leaks_near),
        "leak_examples": tuple([*leaks_exact, *leaks_near][:5]),
        "personal": personal_of([Example(f"{e.asked}\n{e.answer}", ("",), e.where) for e in examples]),
        "languages": {
            "asked": _languages([e.asked for e in examples]),
            "answered": _languages([e.answer for e in examples]),
        },
    }
    return ChatAudit(**found, advice=tuple(_advice(found)))


def _words(example: ChatExample) -> tuple[int, int]:
    prompt = sum(len(message.content.split()) for message in example.chat.prompt.messages)
    return prompt, len(example.answer.split())


def _languages(texts: Sequence[str]) -> dict[str, float]:
    return languages_of([Example(text or " ", ("",)) for text in texts])


def _turns(examples: Sequence[ChatExample]) -> dict[str, int]:
    counts = Counter(sum(m.role != "system" for m in e.chat.messages) for e in examples)
    return {str(turns): counts[turns] for turns in sorted(counts)}


def _calls_strangely(chat: Chat) -> bool:
    known = {str(tool.get("function", tool).get("name")) for tool in chat.tools}
    return any(call.name not in known for message in chat.messages for call in message.tool_calls)


def _lengths(examples: Sequence[ChatExample], counts: Sequence[int], unit: str) -> ChatLengths:
    if not counts:
        return ChatLengths(unit, 0, 0, 0, 0, "")
    ordered = sorted(counts)
    p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    longest = max(range(len(counts)), key=counts.__getitem__)
    return ChatLengths(unit, p50, p90, p99, ordered[-1], examples[longest].where)


def _over(examples: Sequence[ChatExample], counts: Sequence[tuple[int, int]], limit: int) -> tuple[str, ...]:
    rows = sorted(
        ((sum(count), i) for i, count in enumerate(counts) if sum(count) > limit), key=lambda row: (-row[0], row[1])
    )
    return tuple(f"{examples[i].where}: {size:,} tokens" for size, i in rows)


def _repeats(examples: Sequence[ChatExample]) -> tuple[list[str], list[str]]:
    """Return the rows that repeat an earlier one, and those that ask the same and answer otherwise.

    Rows of one origin with several accepted answers do neither.
    """
    first: dict[str, dict[str, str]] = {}
    again, otherwise = [], []
    for e in examples:
        answers = first.setdefault(exact_key(e.asked), {})
        answer = exact_key(e.answer)
        if answers.get(answer, e.where) != e.where:
            again.append(e.where)
        elif any(place != e.where for place in answers.values()):
            otherwise.append(e.where)
        answers.setdefault(answer, e.where)
    return again, otherwise


def _short(examples: Sequence[ChatExample]) -> Finding:
    sizes = sorted(len(e.answer) for e in examples)
    middle = sizes[len(sizes) // 2] if sizes else 0
    return finding(e.where for e in examples if len(e.answer) * _SHORT <= middle)


def _frequent(examples: Sequence[ChatExample]) -> tuple[str, float] | None:
    if not examples:
        return None
    answer, count = Counter(e.answer for e in examples).most_common(1)[0]
    share = count / len(examples)
    return (answer if len(answer) <= 60 else answer[:59] + "…", round(share, 4)) if share >= _OFTEN else None


def _taken(examples: Sequence[ChatExample]) -> float:
    """Return the share of the answers' runs of words that stand in their prompts: high when answers copy."""
    inside = total = 0
    for e in examples:
        said = _runs(e.answer)
        if said:
            total += len(said)
            inside += len(said & _runs(e.asked))
    return round(inside / max(1, total), 4)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {(a, b, c) for (a, b), c in zip(pairwise(words), words[_RUN - 1 :], strict=False)}


def _advice(found: Mapping[str, Any]) -> list[str]:
    advice = []
    leaks = found["leaks_exact"].rows + found["leaks_near"].rows
    if leaks:
        advice.append(
            f"{leaks:,} test rows ask what train or dev asks: remove them from one side, or the score flatters"
        )
    if found["over"]:
        advice.append(
            f"{len(found['over']):,} rows are longer than the model reads: shorten or split them, or write "
            'data.long = "leave_out"'
        )
    if found["strange_calls"].rows:
        advice.append(f"{found['strange_calls'].rows:,} rows call a tool that they do not list under tools")
    if found["exact_duplicates"].rows:
        advice.append(f"{found['exact_duplicates'].rows:,} rows repeat others: they count twice")
    if found["same_question"].rows > 0.01 * found["rows"]:
        advice.append(f"{found['same_question'].rows:,} rows ask the same as others and are answered otherwise")
    if found["short"].rows:
        advice.append(f"{found['short'].rows:,} answers are far shorter than the others: are they whole?")
    if found["frequent"] is not None:
        advice.append(f"{found['frequent'][1]:.0%} of the answers are the same: look beyond exact match")
    if found["copied"].rows > _COPIED * found["rows"]:
        advice.append(f"in {found['copied'].rows:,} rows the answer is the question: the model would learn to copy")
    if found["personal"]:
        advice.append("a model that writes can repeat personal data: remove it from the rows, or keep the model inside")
    return advice


def render(audit: ChatAudit) -> str:
    """Return the audit as plain text for a terminal."""
    parts = ", ".join(f"{name} {count:,}" for name, count in audit.parts.items())
    turns = ", ".join(f"{count:,} of {turns}" for turns, count in audit.turns.items())
    lines = [f"{audit.rows:,} conversations ({parts})", f"messages besides the system's: {turns}"]
    lines.append(f"with a system message: {audit.system:,}; with tools: {audit.tools:,}")
    lines += ["", f"length in {audit.whole.unit}:"]
    for name, lengths in (("prompt", audit.prompt), ("answer", audit.answer), ("both", audit.whole)):
        figures = f"p50 {lengths.p50:,}, p90 {lengths.p90:,}, p99 {lengths.p99:,}, longest {lengths.longest:,}"
        lines.append(f"  {name:<6}  {figures} ({lengths.longest_where})")
    if audit.over is not None:
        lines.append(f"longer than the model reads ({audit.limit:,} tokens): {len(audit.over):,}")
        lines += [f"  {row}" for row in audit.over[:_SHOWN]]
        lines += [f"  and {len(audit.over) - _SHOWN:,} more (--json lists all)"] if len(audit.over) > _SHOWN else []
    for name, languages in audit.languages.items():
        shares = ", ".join(f"{language} {share:.0%}" for language, share in languages.items())
        lines.append(f"languages {name} (guessed): {shares}")
    lines.append("")
    for title, found in (
        ("repeat an earlier row", audit.exact_duplicates),
        ("ask nearly what another asks", audit.near_duplicates),
        ("same question, another answer", audit.same_question),
        ("answer far shorter than the others", audit.short),
        ("answer is the question", audit.copied),
        ("call a tool they do not have", audit.strange_calls),
    ):
        where = f" ({', '.join(found.where)})" if found.where else ""
        lines.append(f"{title}: {found.rows:,}{where}")
    lines.append(f"words of the answers that are taken from the prompts, in runs of {_RUN}: {audit.taken:.0%}")
    if audit.frequent is not None:
        lines.append(f"most frequent answer: {audit.frequent[0]!r} ({audit.frequent[1]:.0%})")
    if "test" in audit.parts:
        lines.append(
            f"test rows also in train or dev: {audit.leaks_exact.rows:,} exact, {audit.leaks_near.rows:,} near"
        )
        lines += [f"  {a.where} ~ {a.other} ({a.similarity:.0%})" for a in audit.leak_examples]
    personal = ", ".join(f"{kind} {found.rows:,}" for kind, found in audit.personal.items()) or "none found"
    lines.append(f"rows with likely personal data: {personal}")
    if audit.advice:
        lines += ["", "advice:", *(f"  - {advice}" for advice in audit.advice)]
    return "\n".join(lines)
