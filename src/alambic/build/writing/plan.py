"""How long the build of a writing model will take, told before the slow part, and how its answers are written."""

from __future__ import annotations

from typing import Any

from alambic.build.plan import Plan
from alambic.build.writing.audit import token_counts
from alambic.build.writing.context import DECIDING_ROWS, WritingContext
from alambic.build.writing.ladder import finetune_params, start_of
from alambic.events import Work
from alambic.kinds.generation import Sampling
from alambic.task import CandidateSpec
from alambic.workspace import StageSpec

# Seconds around the training that do not grow with it, on two cores: export, proof, measuring, writing dev answers.
_A_CANDIDATE, _A_WEIGHT = 20.0, 4e-7
_MARGIN = 1.25  # a test answer may be longer than any seen
_LEAST_EPOCHS = 0.5


def plan(ctx: WritingContext) -> Work[Plan]:
    """Predict the time of the build, and cut the passes over the rows until they fit into `build_minutes`."""
    candidates = ctx.task.candidates
    trained = [c for c in candidates if c.name.startswith("finetune")]
    facts = yield from _facts(ctx, trained)
    fixed = _A_CANDIDATE * len(candidates) + _A_WEIGHT * facts["parameters"] * len(candidates)
    training = facts["seconds_an_epoch"] * facts["epochs"]
    seconds = fixed + training
    limit = ctx.task.budget.build_minutes
    names = ", ".join(c.name for c in candidates)
    rows = min(DECIDING_ROWS, len(ctx.dev))
    notes = [f"candidates: {names}; {rows:,} rows decide"]
    if limit is not None and trained and seconds > limit * 60:
        allowed = (limit * 60 - fixed) / max(facts["seconds_an_epoch"], 1e-9)
        wanted = f"fine-tuning for {facts['epochs']:g} epochs would take {training / 60:.1f} min"
        if allowed < _LEAST_EPOCHS:
            notes.append(
                f"{wanted}; build_minutes does not allow half an epoch: the fine-tuned candidates are left out"
            )
            candidates = tuple(c for c in candidates if c not in trained)
            seconds = fixed
        else:
            epochs = round(min(allowed, facts["epochs"]), 2)
            notes.append(f"{wanted}; build_minutes allows {epochs:g}")
            candidates = tuple(_with_epochs(c, epochs) for c in candidates)
            seconds = fixed + facts["seconds_an_epoch"] * epochs
    notes.append(f"predicted time: about {seconds / 60:.1f} min on this machine")
    return Plan((), candidates, seconds, tuple(notes))


def _with_epochs(candidate: CandidateSpec, epochs: float) -> CandidateSpec:
    if not candidate.name.startswith("finetune") or "steps" in candidate.recipe:
        return candidate
    return candidate.model_copy(update={"recipe": {**candidate.recipe, "epochs": epochs}})


def _facts(ctx: WritingContext, trained: list[CandidateSpec]) -> Work[dict[str, Any]]:
    """Measure what the time of training depends on; kept in the run folder."""
    if not trained:
        return {"parameters": 0, "seconds_an_epoch": 0.0, "epochs": 0.0}
    folder, digest = yield from start_of(ctx)
    recipe = dict(trained[0].recipe)
    spec = StageSpec(
        "timing",
        {"threads": ctx.threads, "recipe": recipe},
        {"base": digest, "train": ctx.train.digest, "machine": ctx.machine_digest},
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
        tokens = sum(prompt + answer for prompt, answer in token_counts(folder, ctx.train.chats))
        adapter = pick_method(params.method, folder) != "full"
        seconds = training_seconds(parameters, tokens, adapter=adapter, number_of_threads=ctx.threads)
        epochs = params.epochs or default_epochs(len(ctx.train), new=is_new(folder))
        return {"parameters": parameters, "seconds_an_epoch": seconds, "epochs": float(epochs), "tokens": tokens}

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
