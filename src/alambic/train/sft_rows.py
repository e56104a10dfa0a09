"""From conversations to rows of ids, what the assistant says marked; rows that are too long are named, never cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alambic.errors import DataError, TemplateError, TrainError
from alambic.kinds.chat import Chat
from alambic.model.decoder import Decoder
from alambic.model.seq2seq import Seq2Seq
from alambic.train.packing import Sample

LONG = ("error", "leave_out")
_SHOWN = 5


@dataclass(frozen=True)
class Rows:
    """What is trained on, or scored.

    Attributes:
        samples: in the order of the conversations.
        left_out: where each row that was too long stands, and its tokens.
        blurred: rows where the first token of an answer also holds the end of its prompt: an engine never sees it so.
    """

    samples: tuple[Sample, ...]
    left_out: tuple[str, ...] = ()
    blurred: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of ids and marks."""
        whole = hashlib.sha256()
        for sample in self.samples:
            whole.update(np.asarray(sample.ids, dtype=np.int64).tobytes())
            whole.update(np.asarray(sample.learnt, dtype=np.bool_).tobytes())
            whole.update(np.asarray(sample.source, dtype=np.int64).tobytes())
            whole.update(b"/")
        return whole.hexdigest()


def rows_of(
    writer: Decoder | Seq2Seq, chats: Sequence[Chat], *, long: str, max_tokens: int, where: Sequence[str] | None = None
) -> Rows:
    """Turn conversations into rows.

    Args:
        writer: the model that learns them.
        chats: with their answers.
        long: ``error`` refuses a row over `max_tokens`, ``leave_out`` lists and skips it.
        max_tokens: of a row; of each of the two texts for an encoder-decoder.
        where: ``file:line`` of each conversation; row numbers when None.

    Raises:
        TrainError: a row is too long or has no answer, or the template refuses it.
    """
    if long not in LONG:
        raise TrainError(f"long = {long!r}; allowed: {', '.join(LONG)}")
    samples, too_long, blurred = [], [], 0
    for number, chat in enumerate(chats):
        name = where[number] if where else f"row {number + 1}"
        try:
            sample, blur = _sample(writer, chat)
        except (TemplateError, DataError) as error:
            raise TrainError(f"{name}: {error.message}", hint=error.hint) from error
        if not sample.n_learnt or not sample.said_bytes:
            raise TrainError(f"{name}: the assistant says nothing", hint="remove the row, or give it an answer")
        size = max(len(sample.ids), len(sample.source))
        if size > max_tokens:
            too_long.append(f"{name}: {size:,} tokens")
            continue
        samples.append(sample)
        blurred += blur
    if too_long and long == "error":
        more = f" and {len(too_long) - _SHOWN} more" if len(too_long) > _SHOWN else ""
        raise TrainError(
            f"{len(too_long)} of {len(chats)} rows are longer than {max_tokens:,} tokens: "
            f"{'; '.join(too_long[:_SHOWN])}{more}",
            hint='raise base.max_tokens if the base allows more, shorten them, or set data.long = "leave_out"',
        )
    return Rows(tuple(samples), tuple(too_long), blurred)


def _sample(writer: Decoder | Seq2Seq, chat: Chat) -> tuple[Sample, bool]:
    if isinstance(writer, Seq2Seq):
        source, target = writer.labelled(chat)
        learnt = (False, *(True for _ in target))
        said = len(writer.decode(target).encode())
        return Sample((writer.start_id, *target), learnt, said, tuple(source)), False
    ids, learnt_ids = writer.labelled(chat)
    said = len(writer.decode([i for i, learns in zip(ids, learnt_ids, strict=True) if learns]).encode())
    return Sample(tuple(ids), tuple(learnt_ids), said), _is_blurred(writer, chat, ids)


def _is_blurred(decoder: Decoder, chat: Chat, ids: Sequence[int]) -> bool:
    prompt = decoder.prompt_ids(chat.prompt)
    return list(ids[: len(prompt)]) != prompt
