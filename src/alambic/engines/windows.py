"""Cut token ids into what a model reads at once. The only place that decides what happens to a long text.

Works on ids, after tokenisation, so that every engine (and training) sees the same windows. Padding is not done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alambic.errors import EngineError, InputTooLong

MODES = ("windows", "head", "head_tail", "error")


@dataclass(frozen=True)
class Cutter:
    """How to cut.

    Attributes:
        mode: `windows` reads all of it in pieces of equal length, `head` the beginning, `head_tail` a quarter from the
            beginning and the rest from the end, `error` refuses.
        max_tokens: most ids in a window, special tokens included; None when the model has no limit.
        prefix_ids: ids put before every text by the tokenizer.
        suffix_ids: ids put after every text by the tokenizer.
        pad_id: the only id of a window that would be empty.
    """

    mode: str
    max_tokens: int | None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EngineError(f"unknown way to cut long texts {self.mode!r}", hint=f"known: {', '.join(MODES)}")
        if self.max_tokens is not None and self._room(self.max_tokens) < 1:
            raise EngineError(f"max_tokens is {self.max_tokens}, which the special tokens alone fill")

    def cut(self, ids: Sequence[int]) -> list[list[int]]:
        """Return the windows of one text, at least one, each with its special tokens.

        Args:
            ids: ids of the whole text, special tokens included.

        Raises:
            InputTooLong: the mode is `error` and the text is longer than the model reads.
            EngineError: the ids do not begin and end with the special tokens of this model.
        """
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return [list(ids) or [self.pad_id]]
        body = self._body(ids)
        room = self._room(self.max_tokens)
        if self.mode == "error":
            raise InputTooLong(
                f"the text has {len(ids)} tokens and the model reads {self.max_tokens}",
                hint='shorten it, or build with long = "windows" in [data]',
            )
        return [[*self.prefix_ids, *piece, *self.suffix_ids] for piece in self._pieces(body, room)]

    def _room(self, max_tokens: int) -> int:
        return max_tokens - len(self.prefix_ids) - len(self.suffix_ids)

    def _body(self, ids: Sequence[int]) -> Sequence[int]:
        start, end = len(self.prefix_ids), len(ids) - len(self.suffix_ids)
        if tuple(ids[:start]) != self.prefix_ids or tuple(ids[end:]) != self.suffix_ids:
            raise EngineError(
                f"the tokenizer does not put {list(self.prefix_ids)} before and {list(self.suffix_ids)} after a text",
                hint="the tokenizer and the parameters of this bundle do not belong together: build it again",
            )
        return ids[start:end]

    def _pieces(self, body: Sequence[int], room: int) -> Iterator[Sequence[int]]:
        if self.mode == "head":
            yield body[:room]
        elif self.mode == "head_tail":
            head = room // 4
            yield [*body[:head], *body[len(body) - (room - head) :]]
        else:
            # Pieces of equal length cost less than full ones and a crumb, and the crumb would be read without context.
            count = -(-len(body) // room)
            for i in range(count):
                yield body[len(body) * i // count : len(body) * (i + 1) // count]


def batches(lengths: Sequence[int], *, max_rows: int, max_cells: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of like length: at most `max_rows` rows, and `max_cells` ids with padding.

    A single row longer than `max_cells` makes a batch of its own.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) >= max_rows or lengths[i] * (len(batch) + 1) > max_cells):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
