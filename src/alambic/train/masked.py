"""An encoder learns the language of a text by guessing masked tokens in it, before it follows a teacher.

The head that guesses is BERT's (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): a dense layer, GELU, a norm, and
the word embeddings again as the decoder. It is thrown away; the layers and the word embeddings stay. Every chosen token
is shown as the mask. Keeping or replacing a fifth of them (80/10/10) brings nothing (Wettig et al. 2023,
https://arxiv.org/abs/2202.08005), and what it was meant for, an encoder that works on text without masks, is seen to by
the stages that follow. In the same study the best share of masked tokens grows with the encoder, to 40 % for
BERT-large; so 20 % here, for tens of millions of weights.

Which tokens are masked follows from (seed, pass, number of the line), so a run that was killed repeats them. This is
not `pretrain_masked`, which makes an encoder from nothing, of whole documents.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic.errors import TrainError
from alambic.events import Event, Progress, Work
from alambic.measure.metrics import Interval
from alambic.measure.text import resampled
from alambic.model.encoder import Encoder, by_length, pad
from alambic.model.vocabulary import UNKNOWN, mask_id, special_id
from alambic.train.batches import ByWidth, batch_at
from alambic.train.loop import Loop, Plan, Point, changed
from alambic.train.precision import autocast, threads
from alambic.train.pretrain_masked import choose_masked
from alambic.train.schedule import set_dropout, table_groups
from alambic.train.sft_loss import Head, streamed_parts, token_losses

Ids = NDArray[np.int64]
_HELD_OUT = 1 << 40  # number of the first held-out window, beyond any of training
# BERT's. Between two sightings a rare piece is pushed away from every guess by a little; Adam at its usual 1e-8 makes
# full steps of that, and all rare pieces end in one corner (Gao et al. 2019, https://arxiv.org/abs/1907.12009).
_EPS = 1e-6


@dataclass(frozen=True)
class MaskedParams:
    """How the student guesses.

    Attributes:
        seed: of every random choice.
        train: ``embeddings`` leaves all but the word embeddings as they are.
        tokens: read in all, passes over the lines as needed; the last step may go over.
        mask_share: of the tokens of a line that are guessed; one at least.
        known_share: of the tokens that are of the teacher's language.
        batch_tokens: tokens of a step, padding included.
        learning_rate: peak rate of the layers.
        embedding_rate: peak rate of the word embeddings.
        head_rate: peak rate of the head that guesses.
        warmup: share of the steps spent rising.
        weight_decay: of matrices, not of biases and embeddings.
        max_tokens: tokens read at once; a longer line is learnt in parts. The encoder's own limit when that is lower.
        evaluations: scores on the held-out lines.
        threads: of torch; its own choice when None.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    train: Literal["embeddings", "all"] = "all"
    tokens: int = 4_000_000
    mask_share: float = 0.2
    known_share: float = 0.0
    batch_tokens: int = 4096
    learning_rate: float = 3e-4
    embedding_rate: float = 4e-4
    head_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_tokens: int = 128
    evaluations: int = 4
    threads: int | None = None
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class Lines:
    """Text of both languages, a sentence or so a line; `known` may be empty."""

    new: Sequence[str]
    known: Sequence[str] = ()


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy of held-out lines in nats a guessed token, with its 95 % interval over lines; lower is better.

    `lines` counts a line that is longer than is read at once by its parts.
    """

    lines: int
    guessed: int
    before: Interval
    after: Interval


@dataclass(frozen=True)
class Guessed:
    """What came out.

    Attributes:
        steps: of training.
        best_step: whose weights were kept.
        history: minus the cross-entropy of the held-out lines of the further language, by step.
        tokens: read, without padding.
        seconds: of training.
        lines: there are to learn from.
        parts: of a pass: long lines are cut, and of the teacher's language no more are drawn than its share.
        new: held-out lines of the further language. Before, the head guesses by how frequent a piece is.
        known: those of the teacher's language; None when none was learnt.
        interrupted: by Ctrl-C.
    """

    steps: int
    best_step: int
    history: tuple[Point, ...]
    tokens: int
    seconds: float
    lines: int
    parts: int
    new: HeldOut
    known: HeldOut | None
    interrupted: bool = False


def learn_masked(
    student: Encoder, train: Lines, held_out: Lines, *, params: MaskedParams, checkpoint: Path, key: str
) -> Work[Guessed]:
    """Train `student` in place to guess masked tokens of `train`.

    Run again after a kill with the same arguments, it goes on from `checkpoint` to the same weights. The weights kept
    are those that guess the held-out lines of the further language best.

    Args:
        student: an encoder without a head.
        train: lines to learn from.
        held_out: lines that are scored, and never learnt from.
        params: how.
        checkpoint: folder of the checkpoint.
        key: what the weights at the start and the lines were made of; another key starts anew.

    Raises:
        TrainError: the tokenizer has no mask, there is no text, or the loss diverges.
    """
    with threads(params.threads):
        run = _Guessing(student, train, held_out, params)
        before = run.held_out()  # of the start, also when a checkpoint is about to be loaded
        loop = run.loop(checkpoint, key)
        try:
            state = yield from changed(loop.run(), _as_nats)
        finally:
            run.hook.remove()
        after = run.held_out()
        if not loop.interrupted:
            loop.forget()
    scores = {name: _held_out(before[name], after[name], params.seed) for name in before}
    return Guessed(state.step, state.best_step, tuple(state.history), run.tokens(state.step), state.seconds,
                   run.lines, len(run.windows), scores["new"], scores.get("known"), loop.interrupted)  # fmt: skip


def _as_nats(event: Event) -> Event:
    """Show the cross-entropy that the loop's score is minus of."""
    if not isinstance(event, Progress):
        return event
    return replace(event, values={k: -v if k in ("dev", "best_dev") else v for k, v in event.values.items()})


def _held_out(before: NDArray[np.float64], after: NDArray[np.float64], seed: int) -> HeldOut:
    return HeldOut(len(before), int(before[:, 1].sum()), _nats(before, seed), _nats(after, seed))


def _nats(counts: NDArray[np.float64], seed: int) -> Interval:
    """Return the nats a guess of windows [N, 2] (nats, guesses), with the interval over windows."""
    sums = np.concatenate(list(resampled(counts, 1000, np.random.default_rng(seed))))
    total = counts.sum(axis=0)
    return Interval.of(total[0] / total[1], sums[:, 0] / np.maximum(sums[:, 1], 1.0), n=len(counts))


class GuessHead(nn.Module):  # type: ignore[misc]
    """Hidden states to what the word embeddings [V, E] are compared with; and the bias [V] of each piece.

    Args:
        hidden: width H of the states.
        counts: how often each piece [V] is in the text; the bias starts from it, so that no step is spent on it.
        width: width E of the word embeddings.
        seed: of the weights.
    """

    def __init__(self, hidden: int, counts: Ids, *, width: int, seed: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(hidden, width), nn.LayerNorm(width)
        with torch.no_grad():
            self.dense.weight.normal_(0.0, hidden**-0.5, generator=torch.Generator().manual_seed(seed))
            self.dense.bias.zero_()
        self.bias = nn.Parameter(torch.from_numpy(np.log((counts + 1.0) / (counts.sum() + len(counts)))).float())

    def forward(self, states: Tensor) -> Tensor:
        """Return [M, E] of states [M, H]."""
        return self.norm(nn.functional.gelu(self.dense(states)))


class _Guesser(nn.Module):  # type: ignore[misc]
    """The student and its head: what the loop trains and keeps."""

    def __init__(self, student: Encoder, head: GuessHead) -> None:
        super().__init__()
        self.student, self.head = student, head


class _Guessing:
    """The lines as windows of ids in batches, and the loss of each step."""

    def __init__(self, student: Encoder, train: Lines, held_out: Lines, params: MaskedParams) -> None:
        self.student, self.params = student, params
        self.mask, self.unknown = mask_id(student.tokenizer), special_id(student.tokenizer, UNKNOWN)
        self.prefix, self.suffix = student.special_ids()
        set_dropout(student, 0.0)  # few passes: nothing is learnt by heart
        self._cut(train, held_out)
        sizes = self.sizes = np.array([len(row) for row in self.windows]) + len(self.prefix) + len(self.suffix)
        ones = np.ones(len(sizes), dtype=np.int64)
        self.batches = ByWidth(sizes, ones, budget=params.batch_tokens, seed=params.seed)
        table = student.backbone.get_input_embeddings().weight
        counts = np.bincount(np.concatenate(self.windows), minlength=len(table))
        head = GuessHead(student.spec.hidden, counts, width=table.shape[1], seed=params.seed)
        self.guesser = _Guesser(student, head)
        # A piece that this text hasn't got (of the other language, say) would only ever be pushed away.
        counts[[*self.prefix, *self.suffix, self.mask]] += 1
        seen = torch.from_numpy(counts > 0)[:, None]
        table.requires_grad_(True)
        self.hook = table.register_hook(lambda gradient: gradient * seen)

    def _cut(self, train: Lines, held_out: Lines) -> None:
        params = self.params
        new = self._windows(train.new)
        if not new:
            raise TrainError("there is no text of the further language to guess in", hint="name data.new_text")
        known = self._windows(train.known) if params.known_share else []
        if params.known_share and not known:
            raise TrainError(
                "there is no text of the teacher's language to guess in", hint="set masked.known_share = 0"
            )
        wanted = round(params.known_share / (1 - params.known_share) * sum(map(len, new)))
        self.windows = [*new, *_drawn(known, wanted, seed=params.seed)]
        self.lines = len(train.new) + (len(train.known) if known else 0)
        self.held = {"new": self._windows(held_out.new)}
        if known:
            self.held["known"] = self._windows(held_out.known)

    def _windows(self, lines: Sequence[str]) -> list[Ids]:
        """Return the ids of lines, special tokens left out, cut where they are longer than is read at once."""
        around = len(self.prefix) + len(self.suffix)
        most = min(self.params.max_tokens, self.student.spec.max_tokens) - around
        rows = [row[len(self.prefix) : len(row) - len(self.suffix)] for row in self.student.tokenize(lines)]
        return [np.array(row[i : i + most]) for row in rows for i in range(0, len(row), most)]

    def loop(self, checkpoint: Path, key: str) -> Loop:
        params, per_epoch = self.params, len(self.batches)
        total = max(1, math.ceil(per_epoch * params.tokens / self.sizes.sum()))
        plan = Plan(
            stage="distil (masked)", total=total, stop=total, warmup=params.warmup,
            every=max(1, math.ceil(total / params.evaluations)), patience=0, seed=params.seed, checkpoint=checkpoint,
            checkpoint_seconds=params.checkpoint_seconds, key=self._key(key), shape="linear",
        )  # fmt: skip
        batch = batch_at(self.batches.epoch, per_epoch=per_epoch)
        return Loop(
            self.guesser, self._optimizer(), loss_of=lambda step: self._loss(batch(step), number=step // per_epoch),
            score=lambda: -float(np.divide(*self._scored("new").sum(axis=0))), plan=plan,
        )  # fmt: skip

    def tokens(self, steps: int) -> int:
        """Count the tokens read in `steps` steps."""
        return self.batches.tokens(steps, self.sizes)

    def held_out(self) -> dict[str, NDArray[np.float64]]:
        """Return the nats and the number of guesses of each held-out window, [N, 2] by language."""
        self.guesser.eval()
        return {name: self._scored(name) for name in self.held}

    def _scored(self, language: str) -> NDArray[np.float64]:
        rows = self.held[language]
        counts = np.zeros((len(rows), 2))
        head = self._decoder()
        with torch.no_grad():
            for batch in by_length([len(row) for row in rows], batch_tokens=self.params.batch_tokens):
                with autocast():
                    states, targets, guesses = self._guesses([rows[i] for i in batch], [_HELD_OUT + i for i in batch])
                    losses = token_losses(states, targets, head).double().numpy()
                owner = np.repeat(batch, guesses)
                counts[:, 0] += np.bincount(owner, losses, minlength=len(rows))
                counts[batch, 1] = guesses
        return counts

    def _loss(self, rows: list[int], *, number: int) -> Tensor:
        """Return the mean cross-entropy of a guess in the windows `rows` of pass `number`."""
        numbers = [number * len(self.windows) + i for i in rows]
        with autocast():
            states, targets, _ = self._guesses([self.windows[i] for i in rows], numbers)
            return streamed_parts(states, targets, self._decoder())[0] / max(1, len(targets))

    def _guesses(self, windows: Sequence[Ids], numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Return what guesses [M, E], the tokens that were there [M], and how many are of each window."""
        chosen = [np.flatnonzero(self._chosen(row, number)) for row, number in zip(windows, numbers, strict=True)]
        rows = []
        for window, places in zip(windows, chosen, strict=True):
            shown = window.copy()
            shown[places] = self.mask
            rows.append([*self.prefix, *shown.tolist(), *self.suffix])
        ids, mask = pad(rows, pad_id=self.student.pad_id)  # B, T
        at = np.concatenate([i * ids.shape[1] + len(self.prefix) + places for i, places in enumerate(chosen)])
        states = self.student.backbone(input_ids=ids, attention_mask=mask).last_hidden_state  # B, T, H
        states = self.guesser.head(states.flatten(0, 1).index_select(0, torch.from_numpy(at)))
        targets = np.concatenate([window[places] for window, places in zip(windows, chosen, strict=True)])
        return states, torch.from_numpy(targets), [len(places) for places in chosen]

    def _chosen(self, window: Ids, number: int) -> NDArray[np.bool_]:
        able = window if self.unknown is None else np.where(window == self.unknown, -1, window)
        share, seed = self.params.mask_share, self.params.seed
        chosen: NDArray[np.bool_] = choose_masked(able[None], [number], share=share, end_id=-1, seed=seed)[0]
        return chosen

    def _decoder(self) -> Head:
        return Head(self.student.backbone.get_input_embeddings().weight, self.guesser.head.bias)

    def _optimizer(self) -> torch.optim.Optimizer:
        params, head = self.params, self.guesser.head
        groups: list[dict[str, Any]] = table_groups(
            self.student, train=params.train, rate=params.learning_rate, table_rate=params.embedding_rate,
            weight_decay=params.weight_decay,
        )  # fmt: skip
        groups.append({"params": list(head.parameters()), "peak": params.head_rate, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=params.embedding_rate, eps=_EPS, fused=True)

    def _key(self, key: str) -> str:
        what = {"params": asdict(replace(self.params, checkpoint_seconds=0.0)), "from": key, "torch": torch.__version__}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _drawn(windows: list[Ids], wanted: int, *, seed: int) -> list[Ids]:
    """Return as many of `windows` as hold `wanted` tokens, drawn from `seed`; in several passes if needed."""
    drawn: list[Ids] = []
    rng = np.random.default_rng((seed, 3))
    held = 0
    while held < wanted:
        for i in rng.permutation(len(windows)).tolist():
            if held >= wanted:
                break
            drawn.append(windows[i])
            held += len(windows[i])
    return drawn
