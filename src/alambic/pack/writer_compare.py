"""Does a packed writer compute what the model computes? Equal tokens in full precision, divergence in fewer bits.

    equal = compare_greedy(model, folder, prompts)                   # a part packed as fp32
    lost = diverge(model, folder, conversations)                     # any part

The packed graph runs through `openvino.Core` with exact settings (float32 everywhere, no quantisation on the fly), so
what differs is the weights and the graph, not the processor. Nothing here takes text: prompts are ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alambic import _extras
from alambic.errors import PackError
from alambic.kinds.chat import Chat
from alambic.model.decoder import Decoder
from alambic.model.seq2seq import Seq2Seq, load_writer
from alambic.pack.writer_openvino import DECODER, ENCODER, EXACT, MODEL

TIE = 1e-3  # logits nearer than this are equal but for rounding: a random clone has many
_CACHE_BLOCKS = 256  # of 32 tokens
_ROWS = 64  # of logits turned into probabilities at once

Ids = Sequence[int]


class PackedDecoder:
    """The graph of a packed decoder, or of the decoder of an encoder-decoder, read token by token."""

    def __init__(
        self, folder: Path, *, properties: Mapping[str, Any] = EXACT, threads: int | None = None, name: str = MODEL
    ) -> None:
        """Compile the graph.

        Raises:
            PackError: it is missing or cannot be compiled.
        """
        compiled = _compiled(folder / name, properties, threads)
        self._inputs = {port.get_any_name() for port in compiled.inputs}
        self._request = compiled.create_infer_request()
        self._length = 0

    def logits(self, ids: Ids, **others: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits [T, V] after each of `ids`, read from the start; `others` are more inputs."""
        self._request.reset_state()
        self._length = 0
        return self.feed(ids, **others)

    def feed(self, ids: Ids, **others: NDArray[Any]) -> NDArray[np.float32]:
        """Go on with `ids` after what was read before; return the logits [T, V] after each."""
        total = self._length + len(ids)
        known: dict[str, NDArray[Any]] = {
            "input_ids": np.array([list(ids)], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
            **others,
        }
        self._request.infer({name: known[name] for name in self._inputs})
        self._length = total
        found: NDArray[np.float32] = self._request.get_tensor("logits").data[0].astype(np.float32)
        return found

    def greedy(self, ids: Ids, *, max_tokens: int, ends: Sequence[int] = (), **others: NDArray[Any]) -> list[int]:
        """Return the likeliest next tokens, up to and with one of `ends`."""
        written: list[int] = []
        last = self.logits(ids, **others)[-1]
        while len(written) < max_tokens:
            written.append(int(last.argmax()))
            if written[-1] in ends or len(written) == max_tokens:
                break
            last = self.feed(written[-1:], **others)[-1]
        return written


class PackedSeq2Seq:
    """The two graphs of a packed encoder-decoder."""

    def __init__(self, folder: Path, start_id: int, *, properties: Mapping[str, Any] = EXACT) -> None:
        """Compile both; `start_id` is what the decoder begins with.

        Raises:
            PackError: one is missing or cannot be compiled.
        """
        self._encoder = _compiled(folder / ENCODER, properties, None).create_infer_request()
        self._decoder = PackedDecoder(folder, properties=properties, name=DECODER)
        self._start = start_id

    def logits(self, source: Ids, target: Ids) -> NDArray[np.float32]:
        """Return the logits [T, V] of each of the T ids of `target`."""
        return self._decoder.logits([self._start, *target[:-1]], **self._read(source))

    def greedy(self, ids: Ids, *, max_tokens: int, ends: Sequence[int] = ()) -> list[int]:
        """Return the likeliest tokens for the source `ids`, up to and with one of `ends`."""
        return self._decoder.greedy([self._start], max_tokens=max_tokens, ends=ends, **self._read(ids))

    def _read(self, source: Ids) -> dict[str, NDArray[Any]]:
        row = np.array([list(source)], dtype=np.int64)
        self._encoder.infer({"input_ids": row, "attention_mask": np.ones_like(row)})
        states = self._encoder.get_tensor("last_hidden_state").data.copy()
        return {"encoder_hidden_states": states, "encoder_attention_mask": np.ones_like(row)}


class EngineDecoder:
    """A packed decoder in OpenVINO GenAI's batching pipeline, which rewrites the graph's attention to a paged one."""

    def __init__(self, folder: Path, *, properties: Mapping[str, Any] = EXACT) -> None:
        """Open the pipeline.

        Raises:
            PackError: it cannot open the part.
        """
        self._genai = _extras.load("openvino_genai")
        scheduler = self._genai.SchedulerConfig()
        scheduler.num_kv_blocks = _CACHE_BLOCKS
        try:
            self._pipeline = self._genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", dict(properties))
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise PackError(f"{folder}: OpenVINO GenAI cannot open this model: {last}") from error

    def greedy(self, ids: Ids, *, max_tokens: int, ends: Sequence[int] = ()) -> list[int]:
        """Return the likeliest next tokens, up to and with one of `ends`."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.stop_token_ids = max_tokens, set(ends)
        prompt = _extras.load("openvino").Tensor(np.array([list(ids)], dtype=np.int64))
        written: list[int] = list(self._pipeline.generate([prompt], [config])[0].m_generation_ids[0])
        return written


@dataclass(frozen=True)
class Agreement:
    """Greedy decoding of two forms of one model.

    Attributes:
        prompts: compared.
        tokens: compared, up to the first tie of a prompt.
        ties: prompts whose comparison ended at two logits nearer than `TIE` in the reference.
        difference: the first token that differs without being a tie; None: all are equal.
    """

    prompts: int
    tokens: int
    ties: int
    difference: str | None

    @property
    def equal(self) -> bool:
        """Whether every compared token is equal."""
        return self.difference is None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "equal": self.equal}


def compare_greedy(
    model: Path | Decoder | Seq2Seq, packed: Any, prompts: Sequence[Ids], *, max_tokens: int = 16, tie: float = TIE
) -> Agreement:
    """Compare the greedy continuation of `prompts` by transformers in float32 with that of another form.

    Args:
        model: the reference: a folder, or a model with float32 weights.
        packed: part folder (its graph runs with exact settings), or anything with
            `greedy(ids, max_tokens=, ends=)` -> ids, such as another engine.
        prompts: ids, each of at least one token.
        max_tokens: written after each prompt.
        tie: least distance between the two best logits of the reference at which a difference counts.

    Raises:
        PackError: the packed form cannot run.
    """
    decoder = load_writer(model, dtype=torch.float32) if isinstance(model, Path) else model
    runner = _runner(decoder, packed, EXACT) if isinstance(packed, Path) else packed
    tokens = ties = 0
    for number, prompt in enumerate(prompts):
        expected = decoder.greedy(prompt, max_tokens=max_tokens)
        got = list(runner.greedy(prompt, max_tokens=max_tokens, ends=decoder.ends))
        gaps = _gaps(decoder, prompt, expected)
        for at, (gap, ours) in enumerate(zip(gaps, expected, strict=True)):
            theirs = got[at] if at < len(got) else None
            if theirs == ours:
                tokens += 1
                continue
            if gap < tie:
                ties += 1
                break
            text = f"prompt {number}, token {at}: {_shown(decoder, theirs)}, the model writes {_shown(decoder, ours)}"
            return Agreement(len(prompts), tokens, ties, f"{text} (its lead over the next is {gap:.2g})")
    return Agreement(len(prompts), tokens, ties, None)


@dataclass(frozen=True)
class Divergence:
    """What a form loses against the float32 model, token by token, both reading the same conversations.

    Attributes:
        tokens: positions compared.
        mean_kl: mean Kullback-Leibler divergence of its next-token distribution from the model's, in nats.
        p95_kl: the same, 95th percentile.
        same_top: share of positions with the same likeliest token.
        perplexity: of the model on these tokens.
        packed_perplexity: of the form.
    """

    tokens: int
    mean_kl: float
    p95_kl: float
    same_top: float
    perplexity: float
    packed_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def diverge(
    model: Path | Decoder | Seq2Seq,
    packed: Path,
    chats: Sequence[Chat],
    *,
    most_tokens: int = 512,
    properties: Mapping[str, Any] = EXACT,
) -> Divergence:
    """Compare the next-token distributions of a packed part with the model's on the answers of `chats`, teacher-forced.

    Args:
        model: the reference: a folder, or a model with float32 weights.
        packed: part folder.
        chats: conversations with answers.
        most_tokens: read of each conversation; what lies behind is not compared.
        properties: of the engine; exact by default, those of the part show what its user gets.

    Raises:
        PackError: the part cannot run, or no token counts.
        TemplateError: the template refuses a conversation.
    """
    reference = load_writer(model, dtype=torch.float32) if isinstance(model, Path) else model
    runner = _runner(reference, packed, properties)
    found = [_compare_row(reference, runner, chat, most_tokens) for chat in chats]
    rows = [row for row in found if row.shape[1]]
    if not rows:
        raise PackError("no token to compare the packed form on", hint="give conversations with answers")
    kl, same, ours, theirs = np.concatenate(rows, axis=1)
    return Divergence(
        tokens=len(kl),
        mean_kl=float(kl.mean()),
        p95_kl=float(np.percentile(kl, 95)),
        same_top=float(same.mean()),
        perplexity=float(np.exp(-ours.mean())),
        packed_perplexity=float(np.exp(-theirs.mean())),
    )


def _compare_row(model: Decoder | Seq2Seq, runner: Any, chat: Chat, most: int) -> NDArray[np.float64]:
    """Return for each compared token [4, T]: divergence, same top, log-probability by the model and by the form."""
    if isinstance(model, Seq2Seq):
        source, target = model.labelled(chat)
        target = target[:most]
        ours, theirs = _seq2seq_logits(model, source, target).numpy(), runner.logits(source, target)
        targets = np.array(target, dtype=np.int64)
    else:
        ids, learnt = model.labelled(chat)
        ids = ids[:most]
        where = np.flatnonzero(np.array(learnt[1 : len(ids)], dtype=bool))  # the position before each that counts
        ours, theirs = model.logits(ids).numpy()[where], runner.logits(ids)[where]
        targets = np.array(ids, dtype=np.int64)[where + 1]
    parts = [np.zeros((4, 0))]
    for start in range(0, len(targets), _ROWS):
        part = slice(start, start + _ROWS)
        p, q, rank = _log_softmax(ours[part]), _log_softmax(theirs[part]), np.arange(len(targets[part]))
        same = p.argmax(axis=1) == q.argmax(axis=1)
        kl = (np.exp(p) * (p - q)).sum(axis=1)
        parts.append(np.stack([kl, same, p[rank, targets[part]], q[rank, targets[part]]]))
    return np.concatenate(parts, axis=1)


def _compiled(path: Path, properties: Mapping[str, Any], threads: int | None) -> Any:
    settings = {**properties, **({} if threads is None else {"INFERENCE_NUM_THREADS": threads})}
    if not path.is_file():
        raise PackError(f"{path}: missing")
    try:
        return _extras.load("openvino").Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise PackError(f"{path}: cannot be compiled ({str(error).strip().splitlines()[-1]})") from error


def _runner(model: Decoder | Seq2Seq, folder: Path, properties: Mapping[str, Any]) -> PackedDecoder | PackedSeq2Seq:
    if isinstance(model, Seq2Seq):
        return PackedSeq2Seq(folder, model.start_id, properties=properties)
    return PackedDecoder(folder, properties=properties)


def _gaps(model: Decoder | Seq2Seq, prompt: Ids, written: Ids) -> list[float]:
    """Return the lead of each written token's logit over the next best."""
    if isinstance(model, Seq2Seq):
        logits = _seq2seq_logits(model, prompt, written)
    else:
        logits = model.logits([*prompt, *written[:-1]])[len(prompt) - 1 :]
    best = logits.topk(2, dim=-1).values
    return [float(gap) for gap in best[:, 0] - best[:, 1]]


def _seq2seq_logits(model: Seq2Seq, source: Ids, target: Ids) -> torch.Tensor:
    """Return the logits [T, V] of each of the T ids of `target`."""
    with torch.inference_mode():
        out = model.model(
            input_ids=torch.tensor([list(source)]), decoder_input_ids=torch.tensor([[model.start_id, *target[:-1]]])
        )
    logits: torch.Tensor = out.logits[0].float()
    return logits


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _shown(decoder: Decoder | Seq2Seq, token: int | None) -> str:
    return "nothing" if token is None else f"{token} ({decoder.tokenizer.id_to_token(token)!r})"
