"""Pre-train a decoder or an encoder on shards of tokens, and write it as a Model directory.

    work = pretrain(Path("shards"), Path("tokenizer"), PretrainParams(hidden=256, layers=6, heads=4, tokens=8_000_000),
                    Path("model"), base={"name": "mine", "licence": "Apache-2.0"})

Beside `out` is the folder of the run, OUT.run: checkpoints, and log.jsonl with everything. Run again with the same
arguments it goes on from its last checkpoint. Several processes take shares of every step
(`alambic.train.distributed`), each with the whole model or with its rows of it (`alambic.train.pretrain_sharding`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from alambic.data.shards import Shards, open_shards
from alambic.errors import TrainError
from alambic.events import Finished, Note, Started, Work
from alambic.measure.machine import fingerprint
from alambic.model.bases import read_json
from alambic.model.decoder import FORMAT
from alambic.model.encoder import ModelSpec
from alambic.model.encoder import _quiet as quiet
from alambic.model.folder import whole_model
from alambic.train.distributed import wait, world
from alambic.train.precision import threads
from alambic.train.pretrain_data import lay_out
from alambic.train.pretrain_log import Log
from alambic.train.pretrain_loop import Objective, Pace, PretrainLoop
from alambic.train.pretrain_masked import Masked, new_encoder
from alambic.train.pretrain_model import Causal, new_decoder, product_dtype
from alambic.train.pretrain_optimiser import make_optimisers
from alambic.train.pretrain_params import PretrainParams
from alambic.train.pretrain_score import Score, score_shards
from alambic.train.pretrain_sharding import place
from alambic.train.pretrain_speed import Peak, flops_a_token, peak_of
from alambic.train.sft_model import pick_device

_SPECIAL = ("bos_token", "eos_token", "pad_token", "mask_token", "cls_token", "sep_token")


@dataclass(frozen=True)
class PretrainResult:
    """What came out.

    Attributes:
        model: Model directory.
        log: JSON Lines of the run.
        finished: every step was done; else run again to go on.
        step: steps done.
        steps: of the whole training.
        tokens: trained on.
        passes: how often the whole training reads each source.
        parameters: of the model, tied ones once.
        loss: running mean of the cross-entropy, nats a token.
        bits_per_byte: on held-out text of all sources; None where nothing is held out.
        sources: bits per byte of each source.
        seconds: of steps, all sittings together.
        cpu_seconds: of the process in those steps.
        tokens_per_second: of steps.
        utilisation: share of the peak that was used; None: the peak is unknown.
        peak_flops: operations a second; None: unknown.
        peak_source: ``data sheet``, ``measured`` or ``unknown``.
        spikes: steps whose loss jumped.
    """

    model: Path
    log: Path
    finished: bool
    step: int
    steps: int
    tokens: int
    passes: dict[str, float]
    parameters: int
    loss: float | None
    bits_per_byte: float | None
    sources: dict[str, float]
    seconds: float
    cpu_seconds: float
    tokens_per_second: float
    utilisation: float | None
    peak_flops: float | None
    peak_source: str
    spikes: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; paths are left to the caller."""
        return {k: v for k, v in asdict(self).items() if k not in ("model", "log")}


def pretrain(
    shards_folder: Path, tokenizer_folder: Path, params: PretrainParams, out: Path, *, base: Mapping[str, str]
) -> Work[PretrainResult]:
    """Train a new model and write the Model directory `out`; Ctrl-C leaves a checkpoint to go on from.

    Inside `distributed.joined`, every process takes its share.

    Args:
        shards_folder: see `alambic.data.shards`.
        tokenizer_folder: with the tokenizer.json that made the shards; its files are copied.
        params: how.
        out: folder to write; an existing one is replaced.
        base: name and licence, for the model's record.

    Raises:
        DataError: the shards cannot be opened.
        TrainError: the tokenizer is not that of the shards, the loss diverges, or `out` has checkpoints of another run.
        MissingExtra: weights are to be cut over processes, and accelerate is not installed.
    """
    params = params.checked()
    shards = open_shards(shards_folder)
    _check_tokenizer(shards, tokenizer_folder)
    with threads(params.threads):
        run = _Run(shards, tokenizer_folder, params, out)
        return (yield from run.run(base))


class _Run:
    def __init__(self, shards: Shards, tokenizer_folder: Path, params: PretrainParams, out: Path) -> None:
        self.shards, self.params, self.out, self.tokenizer = shards, params, out, tokenizer_folder
        self.device = pick_device(params.device)
        self.special = special_ids(tokenizer_folder)
        self.objective = self._objective()
        self.placed = place(self.objective, params.sharding)
        self.steps = params.steps(shards.total("train").tokens)
        self.windows = lay_out(
            shards, length=params.context + self.objective.extra, windows=self.steps * params.rows, seed=params.seed
        )
        self.folder = out.with_name(f"{out.name}.run")
        self.log = Log(self.folder / "log.jsonl", writes=world().writes)

    def run(self, base: Mapping[str, str]) -> Work[PretrainResult]:
        yield Started("pretrain")
        if self.params.sharding == "full" and not self.placed.in_step:
            yield Note("pretrain: sharding = 'full', but there is one process, which holds the whole model")
        began = time.monotonic()
        peak = peak_of(self.device, dtype=product_dtype(self.params, self.device))
        loop = self._loop(peak)
        self.log.add("run", **self._header(peak))
        yield from loop.run()
        score = self._score(None if loop.finished else self.params.valid_tokens)
        if score is not None:
            self.log.add("valid", step=loop.state.step, whole=loop.finished, bits_per_byte=score.bits_per_byte,
                         sources={name: asdict(found) for name, found in score.sources.items()})  # fmt: skip
        result = self._result(loop, score, peak)
        weights = self.placed.whole()
        if world().writes:
            self._write(base, result, weights)
        wait()
        self.log.add("end", **result.to_dict())
        if not loop.finished:
            yield Note(f"pretrain: step {loop.state.step} of {self.steps}; run it again to go on")
        yield Finished("pretrain", time.monotonic() - began)
        return result

    def _objective(self) -> Objective:
        params, shards = self.params, self.shards
        rows = -(-shards.vocabulary // 64) * 64
        names = ("bos_token", "eos_token", "pad_token")
        special = {f"{name}_id": self.special.get(name) for name in names}
        if params.objective == "masked":
            if (mask := self.special.get("mask_token")) is None:
                raise TrainError(f"{self.tokenizer}: objective 'masked' needs a mask_token in tokenizer_config.json")
            encoder = new_encoder(params, vocabulary=rows, special=special)
            return Masked(encoder, params, end_id=shards.end_id, mask_id=mask, device=self.device)
        model = new_decoder(params, vocabulary=rows, special=special)
        # A base that has read documents only ends with their end token, one taught to answer with the turn's.
        ends = {shards.end_id, self.special.get("eos_token", shards.end_id)}
        model.generation_config.eos_token_id = sorted(ends)
        return Causal(model, params, end_id=shards.end_id, device=self.device)

    def _loop(self, peak: Peak) -> PretrainLoop:
        params, shards = self.params, self.shards
        pace = Pace(
            flops_a_token(weights=self.objective.multiplied, layers=params.layers, width=params.hidden,
                          context=params.context),
            None if peak.flops is None else peak.flops * world().size,
        )  # fmt: skip
        identity = {**params.identity(), "tokenizer": shards.tokenizer_digest, "sources": _sources(shards)}
        return PretrainLoop(
            self.objective, self.placed, make_optimisers(self.objective.model, params, muon=self.placed.muon),
            windows=self.windows, params=params, steps=self.steps, score=lambda: self._score(params.valid_tokens),
            pace=pace, folder=self.folder / "checkpoints", log=self.log, identity=identity,
        )  # fmt: skip

    def _score(self, most: int | None) -> Score | None:
        rows = self.params.rows_at_once(self.device.type)
        return score_shards(
            self.shards, lambda *given: self.placed.look(self.objective.nats, *given), length=self.params.context,
            most=most, rows=rows, in_step=self.placed.in_step,
        )  # fmt: skip

    def _header(self, peak: Peak) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "params": asdict(self.params), "steps": self.steps, "passes": self.windows.passes(),
            "processes": world().size, "device": name, "threads": torch.get_num_threads(),
            "precision": str(product_dtype(self.params, self.device)).removeprefix("torch."),
            "peak_flops": peak.flops, "peak_source": peak.source, "machine": fingerprint(),
            "torch": torch.__version__, "tokenizer": self.shards.tokenizer_digest,
        }  # fmt: skip

    def _result(self, loop: PretrainLoop, score: Score | None, peak: Peak) -> PretrainResult:
        state, params = loop.state, self.params
        tokens = state.step * params.rows * params.context
        speed = tokens / state.seconds if state.seconds else 0.0
        return PretrainResult(
            model=self.out, log=self.log.path, finished=loop.finished, step=state.step, steps=self.steps, tokens=tokens,
            passes=self.windows.passes(), parameters=sum(p.numel() for p in self.objective.model.parameters()),
            loss=state.mean, bits_per_byte=None if score is None else score.bits_per_byte,
            sources={} if score is None else {name: found.bits_per_byte for name, found in score.sources.items()},
            seconds=state.seconds, cpu_seconds=state.cpu_seconds, tokens_per_second=speed,
            utilisation=loop.pace.utilisation(speed), peak_flops=peak.flops, peak_source=peak.source,
            spikes=tuple(state.spikes),
        )  # fmt: skip

    def _write(self, base: Mapping[str, str], result: PretrainResult, weights: dict[str, Tensor] | None) -> None:
        """Write the Model directory: beside first, then moved into place. Its weights are the model's unless given."""
        record = {"source": "pretrain", **base}
        trained = {**self._header(Peak(result.peak_flops, result.peak_source)), **result.to_dict()}
        with whole_model(self.out) as beside:
            with quiet():
                self.objective.model.save_pretrained(beside, state_dict=weights)
            for path in beside.glob("*.safetensors"):
                path.chmod(0o644)
            for path in self.tokenizer.iterdir():
                if path.is_file():
                    shutil.copyfile(path, beside / path.name)
            whole = self._as_encoder(beside, record) if self.params.objective == "masked" else {
                "format": FORMAT, "type": "decoder", "architecture": self.objective.model.config.model_type,
                "context_tokens": self.params.context, "parameters": result.parameters, "base": record,
            }  # fmt: skip
            (beside / "alambic.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")
            (beside / "training.json").write_text(json.dumps(trained, ensure_ascii=False, indent=1), encoding="utf-8")

    def _as_encoder(self, folder: Path, base: dict[str, str]) -> dict[str, Any]:
        """Let the tokenizer put the end token before a text, as in training; return what alambic.json says."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        first = tokenizer.id_to_token(self.shards.end_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, self.shards.end_id)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        spec = ModelSpec(
            architecture=self.objective.model.config.model_type, pooling="mean", normalize=False,
            max_tokens=self.params.context, hidden=self.params.hidden, base=base,
        )  # fmt: skip
        return {"format": FORMAT, "type": "encoder", "head": None, **asdict(spec)}


def special_ids(tokenizer_folder: Path) -> dict[str, int]:
    """Return the ids of the special tokens that tokenizer_config.json names.

    Raises:
        TrainError: one of them is not in tokenizer.json.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    config = read_json(tokenizer_folder / "tokenizer_config.json")
    found = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        number = tokenizer.token_to_id(text)
        if number is None:
            raise TrainError(f"{tokenizer_folder}: {name} is {text!r}, which tokenizer.json does not have")
        found[name] = number
    return found


def _check_tokenizer(shards: Shards, folder: Path) -> None:
    path = folder / "tokenizer.json"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror})") from error
    if digest != shards.tokenizer_digest:
        raise TrainError(
            f"{path}: is not the tokenizer that made {shards.folder} "
            f"(SHA-256 {digest[:12]}..., the shards say {shards.tokenizer_digest[:12]}...)",
            hint="make the shards again, or give the folder of their tokenizer",
        )


def _sources(shards: Shards) -> list[list[Any]]:
    return [[source.name, source.weight, source.train.tokens] for source in shards.sources]
