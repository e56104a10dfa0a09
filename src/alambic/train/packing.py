"""Rows of many lengths in one batch: packed into one sequence without padding, or padded where that cannot be.

Packing must not let a row see its neighbour. Positions start again with each row, and attention runs row by row: the
linear layers see one long sequence, no score between two rows is ever computed. The boundaries travel as the attention
mask [1, 1, 1, R + 1] of whole numbers, because transformers hands a mask of four dimensions to every layer as it is
(some families drop other arguments on the way, and a packed batch would then be contaminated in silence).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alambic.model.encoder import pad

ATTENTION = "alambic_rows"
# Rows up to this length: plain bf16 products take half the time of the fused kernel, forward and backward together.
_SHORT = 512
# Rows up to this length attend together with neighbours of like length, padded to at most this many times their tokens.
_GROUPED, _WASTE = 256, 1.25


@dataclass(frozen=True)
class Sample:
    """One conversation as ids.

    Attributes:
        ids: whole, special tokens included.
        learnt: which of them the assistant says.
        said_bytes: UTF-8 bytes of what the assistant says, for bits per byte.
        source: of an encoder-decoder, what its encoder reads; empty otherwise.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    said_bytes: int
    source: tuple[int, ...] = ()

    @property
    def n_learnt(self) -> int:
        """Tokens that count in the loss; the first of a row is predicted from nothing and never does."""
        return sum(self.learnt[1:])

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.ids) + len(self.source)


@dataclass(frozen=True)
class Batch:
    """Rows ready for a causal model.

    Attributes:
        ids: [1, T] packed, [B, T] padded.
        positions: of each id in its row.
        mask: boundaries [1, 1, 1, R + 1] of packed rows, or [B, T] zeros and ones.
        at: [N] places in the flattened hidden states that predict a learnt token.
        targets: [N] those tokens.
        rows: which row each target [N] is of, for sums by row.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    at: Tensor
    targets: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> Batch:
        """Move it; boundaries stay where Python reads them."""
        if device.type == "cpu":
            return self
        mask = self.mask if self.mask.ndim == 4 else self.mask.to(device)
        moved = [t.to(device) for t in (self.ids, self.positions, self.at, self.targets, self.rows)]
        return Batch(moved[0], moved[1], mask, *moved[2:])


def pack(rows: Sequence[Sample]) -> Batch:
    """Put `rows` one behind the other."""
    bounds, at, targets, owners = [0], [], [], []
    for number, row in enumerate(rows):
        start = bounds[-1]
        places = [i for i in range(1, len(row.ids)) if row.learnt[i]]
        at += [start + i - 1 for i in places]
        targets += [row.ids[i] for i in places]
        owners += [number] * len(places)
        bounds.append(start + len(row.ids))
    ids = torch.tensor([[i for row in rows for i in row.ids]])
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
    mask = torch.tensor(bounds, dtype=torch.int32)[None, None, None]
    return Batch(ids, positions, mask, _long(at), _long(targets), _long(owners))


def padded(rows: Sequence[Sample], *, pad_id: int) -> Batch:
    """Put `rows` one below the other, filled up on the right."""
    ids, mask = pad([row.ids for row in rows], pad_id=pad_id)
    width = ids.shape[1]
    found = [(number, i) for number, row in enumerate(rows) for i in range(1, len(row.ids)) if row.learnt[i]]
    at = _long([number * width + i - 1 for number, i in found])
    targets = _long([rows[number].ids[i] for number, i in found])
    positions = torch.arange(width)[None].expand(len(rows), -1)
    return Batch(ids, positions, mask, at, targets, _long([number for number, _ in found]))


def parts(rows: Sequence[Sample], *, most_tokens: int, packed: bool) -> Iterator[list[Sample]]:
    """Split the rows of a step into parts that go through the model one after the other.

    A part has at most `most_tokens` tokens, padding included, or one row. Rows are taken by length: equal ones next to
    each other waste least where there is padding, and the order within a step changes nothing but rounding.
    """
    part: list[Sample] = []
    total = 0
    for row in sorted(rows, key=lambda row: row.n_tokens):
        size = row.n_tokens if packed else row.n_tokens * (len(part) + 1) - total
        if part and total + size > most_tokens:
            yield part
            part, total = [], 0
            size = row.n_tokens
        part.append(row)
        total += size
    if part:
        yield part


def use_rows(model: nn.Module) -> None:
    """Let `model` understand boundaries as its mask; any other mask works as before."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, rows_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from query [B, Hq, T, D] to key and value [B, Hk, T, D]; return [B, T, Hq, D].

    The signature is that of transformers' attention functions. Causal, with the window and the logit cap of the layer.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rest: dict[str, Any] = {"scale": scale, "dropout": dropout, "window": sliding_window, "cap": softcap}
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return attend(query, key, value, mask=attention_mask, **rest).transpose(1, 2).contiguous(), None
    out = [
        _attend_in(group, [states[:, :, group.start : group.stop] for states in (query, key, value)], rest)
        for group in _groups(tuple(attention_mask.flatten().tolist()), query.device)
    ]
    return out[0] if len(out) == 1 else torch.cat(out, dim=1), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float, dropout: float,
    window: int | None, cap: float | None,
) -> Tensor:  # fmt: skip
    """Causal attention [B, Hq, T, D] over rows that all begin together; `mask` [B, 1, T, S] replaces the causal one."""
    length = key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if (
        mask is None
        and cap is None
        and not dropout
        and (window is None or length <= window)
        and _is_short(query, length)
    ):
        return _attend_by_products(query, key, value, scale)
    if cap is None and (mask is not None or window is None or length <= window):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and query.shape[2] > 1,
            scale=scale, enable_gqa=grouped,
        )  # fmt: skip
    if grouped:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scale  # B, Hq, T, S
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    allowed = _causal(query.shape[2], length, window, query.device) if mask is None else mask
    if allowed.dtype == torch.bool:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    else:
        scores = scores + allowed
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(shares, dropout) @ value


def _is_short(query: Tensor, length: int) -> bool:
    in_bf16 = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return bool(query.device.type == "cpu" and in_bf16 and query.shape[2] == length <= _SHORT)


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention in three products; the query heads that share a key are one matrix, so no key is copied."""
    if torch.is_autocast_enabled("cpu"):  # positions have turned queries and keys, not values, into float32
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, heads, length, width = query.shape
    groups = rows * key.shape[1]
    stacked = (query * scale).reshape(groups, -1, width)  # B Hk, G T, D
    scores = torch.bmm(stacked, key.reshape(groups, length, width).transpose(1, 2))
    scores = scores.view(groups, -1, length, length).add_(_shade(scores.dtype)[:length, :length])
    shares = scores.softmax(dim=-1).to(value.dtype).view(groups, -1, length)
    return torch.bmm(shares, value.reshape(groups, length, width)).view(rows, heads, length, width)


@lru_cache(maxsize=2)
def _shade(dtype: torch.dtype) -> Tensor:
    """Return what is added to scores [T, T] so that no query sees a later key; any corner of it does for fewer."""
    return torch.full((_SHORT, _SHORT), float("-inf"), dtype=dtype).triu_(1)


@dataclass(frozen=True)
class _Group:
    """Rows next to each other that attend in one call, padded there and only there.

    Attributes:
        start: of the first, in the packed sequence.
        stop: of the last.
        rows: how many (R).
        width: tokens of the longest (L).
        spread: where each padded place [R * L] reads from, within the group; None: nothing is padded.
        back: where each place of the group went.
    """

    start: int
    stop: int
    rows: int
    width: int
    spread: Tensor | None
    back: Tensor | None


def _attend_in(group: _Group, states: Sequence[Tensor], rest: dict[str, Any]) -> Tensor:
    """Attend within `group` to states [1, H, T, D]; return [1, T, Hq, D].

    Padding is on the right, where no real query looks, so no mask is needed.
    """
    if group.rows == 1:
        return attend(*states, mask=None, **rest).transpose(1, 2)

    def stacked(whole: Tensor) -> Tensor:
        flat = whole.transpose(1, 2)[0]  # T, H, D
        if group.spread is not None:
            flat = flat.index_select(0, group.spread)
        return flat.unflatten(0, (group.rows, group.width)).transpose(1, 2)  # R, H, L, D

    query, key, value = (stacked(whole) for whole in states)
    out = attend(query, key, value, mask=None, **rest).transpose(1, 2).flatten(0, 1)  # R L, Hq, D
    return (out if group.back is None else out.index_select(0, group.back))[None]


@lru_cache(maxsize=8)
def _groups(bounds: tuple[int, ...], device: torch.device) -> list[_Group]:
    """Put neighbours of like length together: a call for each short row takes longer than its products."""
    lengths = [b - a for a, b in pairwise(bounds)]
    made, first = [], 0
    for i in range(1, len(lengths) + 1):
        if i < len(lengths) and _together(lengths[first : i + 1], device):
            continue
        made.append(_group(bounds[first], lengths[first:i], device))
        first = i
    return made


def _together(lengths: Sequence[int], device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    width = max(lengths)
    return width == min(lengths) or (width <= _GROUPED and width * len(lengths) <= _WASTE * sum(lengths))


def _group(start: int, lengths: Sequence[int], device: torch.device) -> _Group:
    width, whole = max(lengths), sum(lengths)
    if width * len(lengths) == whole:
        return _Group(start, start + whole, len(lengths), width, None, None)
    spread = torch.zeros(len(lengths), width, dtype=torch.long)
    back, done = [], 0
    for number, length in enumerate(lengths):
        spread[number, :length] = torch.arange(done, done + length)
        back.append(torch.arange(number * width, number * width + length))
        done += length
    return _Group(start, start + whole, len(lengths), width, spread.flatten().to(device), torch.cat(back).to(device))


@lru_cache(maxsize=4)
def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys [S] each query [T] sees."""
    distance = torch.arange(queries, device=device)[:, None] + (keys - queries) - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _long(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
