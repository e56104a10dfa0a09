"""The audit of preferences: lengths of both answers, pairs that say the same or the contrary, what is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alambic.data.check import Finding, finding
from alambic.data.pairs import PreferenceDataset, PreferenceExample
from alambic.data.split_pairs import PairParts
from alambic.kinds.chat import Chat

CountTokens = Callable[[Sequence[Chat]], list[tuple[int, int]]]
_SHOWN = 20
_LOPSIDED = 0.7


@dataclass(frozen=True)
class SideLengths:
    """How long the prompts, or the answers of one side, are, in `unit` (tokens of the model, or words)."""

    unit: str
    p50: int
    p90: int
    longest: int
    longest_where: str


@dataclass(frozen=True)
class PairAudit:
    """What the audit of preferences found.

    Attributes:
        pairs: in both parts.
        form: how the file was read.
        parts: pairs by part.
        prompts: different prompts.
        familiar: pairs of dev that ask what a row of train asks.
        left_out: pairs that ask what a test row asks.
        prompt: lengths of the prompts.
        chosen: lengths of the better answers.
        rejected: lengths of the worse ones.
        longer: share of the pairs whose better answer is the longer one, ties as halves.
        limit: tokens that the model reads and writes together; None: no model is known.
        over: every pair with an answer that does not fit, as ``file:line: tokens``; None: no model is known.
        repeated: pairs that an earlier one says too.
        contrary: pairs whose answers an earlier one has the other way round.
        advice: what to do about it, most serious first.
    """

    pairs: int
    form: str
    parts: dict[str, int]
    prompts: int
    familiar: int
    left_out: Finding
    prompt: SideLengths
    chosen: SideLengths
    rejected: SideLengths
    longer: float
    limit: int | None
    over: tuple[str, ...] | None
    repeated: Finding
    contrary: Finding
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain dicts, lists, strings and numbers."""
        return asdict(self, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def check_pairs(parts: PairParts, *, count_tokens: CountTokens | None = None, limit: int | None = None) -> PairAudit:
    """Audit the pairs of both parts.

    Args:
        parts: as `read_pair_parts` gives them.
        count_tokens: tokens of prompt and answer of each conversation; words are counted when None.
        limit: most tokens that the model reads and writes together.
    """
    whole = parts.train + parts.dev
    count = count_tokens or _words
    unit = "tokens" if count_tokens else "words"
    chosen, rejected = count(whole.chosen), count(whole.rejected)
    repeated, contrary = _repeats(whole)
    known = limit if count_tokens else None
    found: dict[str, Any] = {
        "pairs": len(whole),
        "form": parts.form,
        "parts": {"train": len(parts.train), "dev": len(parts.dev)},
        "prompts": len({example.asked for example in whole}),
        "familiar": parts.familiar,
        "left_out": finding(parts.left_out),
        "prompt": _lengths(whole, [prompt for prompt, _ in chosen], unit),
        "chosen": _lengths(whole, [answer for _, answer in chosen], unit),
        "rejected": _lengths(whole, [answer for _, answer in rejected], unit),
        "longer": _longer([a for _, a in chosen], [b for _, b in rejected]),
        "limit": known,
        "over": None if known is None else _over(whole, chosen, rejected, known),
        "repeated": finding(repeated),
        "contrary": finding(contrary),
    }
    return PairAudit(**found, advice=tuple(_advice(found)))


def _words(chats: Sequence[Chat]) -> list[tuple[int, int]]:
    return [
        (sum(len(m.content.split()) for m in chat.messages[:-1]), len(chat.messages[-1].content.split()))
        for chat in chats
    ]


def _lengths(pairs: PreferenceDataset, counts: Sequence[int], unit: str) -> SideLengths:
    ordered = sorted(counts)
    p50, p90 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9))
    longest = max(range(len(counts)), key=counts.__getitem__)
    return SideLengths(unit, p50, p90, ordered[-1], pairs.examples[longest].where)


def _longer(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(chosen, rejected, strict=True))
    return round(wins / len(chosen), 4)


def _over(
    pairs: PreferenceDataset, chosen: Sequence[tuple[int, int]], rejected: Sequence[tuple[int, int]], limit: int
) -> tuple[str, ...]:
    sizes = [max(sum(a), sum(b)) for a, b in zip(chosen, rejected, strict=True)]
    rows = sorted(((size, i) for i, size in enumerate(sizes) if size > limit), key=lambda row: (-row[0], row[1]))
    return tuple(f"{pairs.examples[i].where}: {size:,} tokens" for size, i in rows)


def _repeats(pairs: PreferenceDataset) -> tuple[list[str], list[str]]:
    """Return the pairs that an earlier one says too, and those that an earlier one contradicts."""
    seen: set[tuple[str, str, str]] = set()
    again, contrary = [], []
    for pair in pairs:
        asked, better, worse = _key(pair)
        if (asked, better, worse) in seen:
            again.append(pair.where)
        elif (asked, worse, better) in seen:
            contrary.append(pair.where)
        seen.add((asked, better, worse))
    return again, contrary


def _key(pair: PreferenceExample) -> tuple[str, str, str]:
    return str(pair.prompt.to_dict()), str(pair.chosen.to_dict()), str(pair.rejected.to_dict())


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    if found["contrary"].rows:
        advice.append(f"{found['contrary'].rows:,} pairs say the contrary of others: they cancel out")
    if found["over"]:
        advice.append(
            f"{len(found['over']):,} pairs have an answer that is longer than the model reads: shorten it, or write "
            'data.long = "leave_out"'
        )
    if found["repeated"].rows:
        advice.append(f"{found['repeated'].rows:,} pairs repeat others: they count twice")
    longer = found["longer"]
    if not 1 - _LOPSIDED < longer < _LOPSIDED:
        word, share = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        advice.append(f"the better answer is the {word} one in {share:.0%} of the pairs: length itself may be learnt")
    return advice


def render(audit: PairAudit) -> str:
    """Return the audit as plain text for a terminal."""
    parts = ", ".join(f"{name} {count:,}" for name, count in audit.parts.items())
    lines = [f"{audit.pairs:,} preferences ({parts}), {audit.prompts:,} different prompts, read as {audit.form}"]
    lines += ["", f"length in {audit.prompt.unit}:"]
    for name, lengths in (("prompt", audit.prompt), ("chosen", audit.chosen), ("rejected", audit.rejected)):
        figures = f"p50 {lengths.p50:,}, p90 {lengths.p90:,}, longest {lengths.longest:,} ({lengths.longest_where})"
        lines.append(f"  {name:<8}  {figures}")
    lines.append(f"the better answer is the longer one: {audit.longer:.0%}")
    if audit.over is not None:
        lines.append(f"longer than the model reads ({audit.limit:,} tokens): {len(audit.over):,}")
        lines += [f"  {row}" for row in audit.over[:_SHOWN]]
        lines += [f"  and {len(audit.over) - _SHOWN:,} more (--json lists all)"] if len(audit.over) > _SHOWN else []
    for title, found in (
        ("repeat an earlier pair", audit.repeated),
        ("say the contrary of an earlier pair", audit.contrary),
        ("left out: ask what test rows ask", audit.left_out),
    ):
        where = f" ({', '.join(found.where)})" if found.where else ""
        lines.append(f"{title}: {found.rows:,}{where}")
    lines.append(f"of dev, ask what rows of train ask: {audit.familiar:,}")
    if audit.advice:
        lines += ["", "advice:", *(f"  - {advice}" for advice in audit.advice)]
    return "\n".join(lines)
