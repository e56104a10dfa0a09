"""How long the build of a writing model will take, told before the slow part, and how its answers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alambic.build.crew import processes
from alambic.build.plan import Plan
from alambic.build.writing.arithmetic import arithmetic_seconds
from alambic.build.writing.audit import token_counts
from alambic.build.writing.beside import is_beside
from alambic.build.writing.context import DECIDING_ROWS, WritingContext
from alambic.build.writing.guessing import guessing_seconds
from alambic.build.writing.ladder import NEEDS_BASE, PRECISION, finetune_params, start_of, trains
from alambic.build.writing.preferring import preference_params
from alambic.errors import TaskError
from alambic.events import Work
from alambic.kinds.generation import Sampling
from alambic.kinds.writing import PREFERRED
from alambic.task import CandidateSpec, Task
from alambic.workspace import StageSpec

# Seconds around the training that do not grow with it, on two cores: export, proof, measuring, writing dev answers.
_A_CANDIDATE, _A_WEIGHT = 20.0, 4e-7
# Seconds a weight takes to read a token and to write one: a model of 494 M weights in 8 bits, two cores.
_READ, _WRITTEN = 2.2e-12, 6.1e-11
_MARGIN = 1.25  # a test answer may be longer than any seen
_LEAST_EPOCHS = 0.5
_TOLD = 6.0  # seconds that are worth a line


@dataclass(frozen=True)
class _Time:
    """What the time of a build is made of, in seconds; several processes share the trainings.

    Attributes:
        fixed: of packing and measuring a candidate.
        an_epoch: of fine-tuning.
        epochs: that the task asks for.
        preferring: of learning from the pairs.
        choosing: of timing arithmetics and guesses, by candidate.
    """

    fixed: float
    an_epoch: float
    epochs: float
    preferring: float
    choosing: Mapping[str, float] = field(default_factory=dict)

    def of(self, candidates: Sequence[CandidateSpec], epochs: float) -> float:
        """Return the seconds of a build of `candidates` with so many epochs of fine-tuning."""
        seconds = self.fixed * len(candidates) + self.choosing_of(candidates)
        seconds += self.an_epoch * epochs * any(trains(c.name) for c in candidates)
        return seconds + self.preferring * any(c.name in PREFERRED for c in candidates)

    def choosing_of(self, candidates: Sequence[CandidateSpec]) -> float:
        """Return the seconds of timing arithmetics and guesses of `candidates`."""
        return sum(self.choosing.get(c.name, 0.0) for c in candidates)


def plan(ctx: WritingContext) -> Work[Plan]:
    """Predict the time of the build, and cut what does not fit into `build_minutes`: preferences, then epochs."""
    asked = ctx.task.candidates
    facts = yield from _facts(ctx, [c for c in asked if trains(c.name)])
    preferring = yield from _preference_seconds(ctx, facts)
    fixed = _A_CANDIDATE + _A_WEIGHT * facts["parameters"]
    time = _Time(
        fixed, facts["seconds_an_epoch"] / processes(), facts["epochs"], preferring / processes(),
        choosing_seconds(ctx.task, facts),
    )  # fmt: skip
    limit = ctx.task.budget.build_minutes
    candidates, epochs, cuts = (asked, time.epochs, []) if limit is None else _cut(asked, time, limit * 60)
    if not candidates:
        raise TaskError(
            f"{ctx.task.path.name}: build_minutes = {limit:g} does not allow half an epoch of fine-tuning, and there "
            "is no other candidate",
            hint="give more minutes, or add a candidate that is not trained (nearest)",
        )
    names = ", ".join(c.name for c in candidates)
    notes = [f"candidates: {names}; {min(DECIDING_ROWS, len(ctx.dev)):,} rows decide"]
    if ctx.pairs is not None and any(c.name in PREFERRED for c in candidates):
        notes.append(f"preferences: {len(ctx.pairs.train):,} pairs, {time.preferring / 60:.1f} min of the time below")
    if (choosing := time.choosing_of(candidates)) > _TOLD:
        notes.append(f"ways of computing and guessing: timed for {choosing / 60:.1f} min of the time below")
    seconds = time.of(candidates, epochs)
    shares = f" in {processes()} processes" if processes() > 1 else ""
    notes += [*cuts, f"predicted time: about {seconds / 60:.1f} min on this machine{shares}"]
    return Plan((), tuple(candidates), seconds, tuple(notes))


def _cut(asked: Sequence[CandidateSpec], time: _Time, limit: float) -> tuple[Sequence[CandidateSpec], float, list[str]]:
    """Return the candidates and the epochs that fit into `limit` seconds, and what was cut."""
    candidates, notes = list(asked), []
    if time.preferring and time.of(candidates, min(_LEAST_EPOCHS, time.epochs)) > limit:
        notes.append(f"preferences would take {time.preferring / 60:.1f} min; build_minutes does not allow them: the "
                     "preferred candidates are left out")  # fmt: skip
        candidates = [c for c in candidates if c.name not in PREFERRED]
    trained = any(trains(c.name) for c in candidates)
    if not trained or time.of(candidates, time.epochs) <= limit:
        return candidates, time.epochs, notes
    allowed = (limit - time.of(candidates, 0.0)) / max(time.an_epoch, 1e-9)
    wanted = f"fine-tuning for {time.epochs:g} epochs would take {time.an_epoch * time.epochs / 60:.1f} min"
    if allowed < _LEAST_EPOCHS:
        notes.append(f"{wanted}; build_minutes does not allow half an epoch: the fine-tuned candidates are left out")
        return [c for c in candidates if not trains(c.name)], time.epochs, notes
    epochs = round(min(allowed, time.epochs), 2)
    notes.append(f"{wanted}; build_minutes allows {epochs:g}")
    return [_with_epochs(c, epochs) for c in candidates], epochs, notes


def choosing_seconds(task: Task, facts: Mapping[str, Any]) -> dict[str, float]:
    """Predict the seconds of timing arithmetics and guesses of each candidate, at the lengths of the rows."""
    lengths = _READ * facts["prompt_tokens"] + _WRITTEN * facts["answer_tokens"]
    answer_s = facts["parameters"] * lengths
    found = {}
    for candidate in task.candidates:
        if candidate.name in NEEDS_BASE:
            precision = None if is_beside(candidate.recipe) else PRECISION[candidate.name]
            found[candidate.name] = arithmetic_seconds(task, precision, answer_s) + guessing_seconds(task, answer_s)
    return found


def _preference_seconds(ctx: WritingContext, facts: dict[str, Any]) -> Work[float]:
    """Predict the seconds of learning from the pairs; 0 when no candidate does.

    Every pair is read once as the base, then at most `epochs` times forward and backward.
    """
    pairs = ctx.pairs
    if pairs is None or not any(c.name in PREFERRED for c in ctx.task.candidates):
        return 0.0
    folder, digest = yield from start_of(ctx)

    def work(out: Any) -> Work[dict[str, Any]]:
        yield from ()
        tokens = sum(map(sum, token_counts(folder, [*pairs.train.chosen, *pairs.train.rejected])))
        return {"tokens": tokens}

    inputs = {"base": digest, "pairs": pairs.train.digest}
    stage = yield from ctx.workspace.run(StageSpec("pair-lengths", {}, inputs, libraries=("tokenizers",)), work)
    a_token = facts["seconds_an_epoch"] / max(1, facts["tokens"])
    return float(stage.result["tokens"] * a_token * (preference_params(ctx).epochs + 1 / 3))


def _with_epochs(candidate: CandidateSpec, epochs: float) -> CandidateSpec:
    if not trains(candidate.name) or "steps" in candidate.recipe:
        return candidate
    return candidate.model_copy(update={"recipe": {**candidate.recipe, "epochs": epochs}})


def _facts(ctx: WritingContext, trained: list[CandidateSpec]) -> Work[dict[str, Any]]:
    """Measure what the time of training depends on; kept in the run folder."""
    if not trained:
        return {"parameters": 0, "seconds_an_epoch": 0.0, "epochs": 0.0, "tokens": 0, "prompt_tokens": 0.0,
                "answer_tokens": 0.0}  # fmt: skip
    folder, digest = yield from start_of(ctx)
    recipe = dict(trained[0].recipe)
    spec = StageSpec(
        "timing",
        {"threads": ctx.threads, "recipe": recipe},
        {"base": digest, "train": ctx.train.digest, "machine": ctx.machine_digest},
        version=2,
        libraries=("torch", "transformers"),
    )

    def work(out: Any) -> Work[dict[str, Any]]:
        from alambic.model.bases_weights import count_stored, weight_files
        from alambic.train.sft_model import is_new, pick_method
        from alambic.train.sft_rates import default_epochs
        from alambic.train.sft_timing import training_seconds

        yield from ()
        params = finetune_params(recipe)
        parameters = count_stored(weight_files(folder))
        counts = token_counts(folder, ctx.train.chats)
        prompts, answers = (sum(column) for column in zip(*counts, strict=True))
        tokens = prompts + answers
        adapter = pick_method(params.method, folder) != "full"
        seconds = training_seconds(parameters, tokens, adapter=adapter, number_of_threads=ctx.threads)
        epochs = params.epochs or default_epochs(len(ctx.train), new=is_new(folder))
        return {
            "parameters": parameters, "seconds_an_epoch": seconds, "epochs": float(epochs), "tokens": tokens,
            "prompt_tokens": prompts / len(counts), "answer_tokens": answers / len(counts),
        }  # fmt: skip

    stage = yield from ctx.workspace.run(spec, work)
    return stage.result


def sampling_of(ctx: WritingContext) -> Work[Sampling]:
    """Return how answers are written: as the task says; an answer may be a quarter longer than the longest known."""
    answer = ctx.task.answer
    most = answer.max_tokens
    if most is None and any(c.name not in ("nearest", "tagger") for c in ctx.task.candidates):
        folder, digest = yield from start_of(ctx)

        def work(out: Any) -> Work[dict[str, Any]]:
            yield from ()
            chats = [*ctx.train.chats, *ctx.dev.chats]
            longest = max(answered for _, answered in token_counts(folder, chats))
            return {"max_tokens": 8 * (1 + int(_MARGIN * longest) // 8)}

        inputs = {"base": digest, "train": ctx.train.digest, "dev": ctx.dev.digest}
        stage = yield from ctx.workspace.run(StageSpec("lengths", {}, inputs, libraries=("tokenizers",)), work)
        most = stage.result["max_tokens"]
    return Sampling(
        max_tokens=most,
        temperature=answer.temperature,
        top_p=answer.top_p,
        repetition_penalty=answer.repetition_penalty,
        seed=ctx.task.seed,
        stop=answer.stop,
        json_schema=ctx.schema,
    )
