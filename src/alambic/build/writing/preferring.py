"""Preferences: the fine-tuned model learns from pairs (DPO), and each bundle says which answer of a pair is likelier.

The preferred model is a candidate of its own. The task's metric decides between it and the fine-tuned one, as between
any two: dev rows have an answer that is known to be right, pairs only say which of two is better. Its accuracy on pairs
stands beside, measured for every candidate in the same way through the engine that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.build.crew import shared
from alambic.build.writing.context import DECIDING_ROWS, ENGINE_LIBRARIES, WritingContext
from alambic.engines.bundle_writer import open_writer
from alambic.events import Work
from alambic.kinds.writing import PREFERRED
from alambic.measure.preference import gained, measure_preference
from alambic.workspace import Stage, StageSpec

if TYPE_CHECKING:
    from alambic.build.writing.trial import WritingTrial
    from alambic.data.pairs import PreferenceDataset
    from alambic.train.dpo import DpoParams, Pair


def prefer_stage(ctx: WritingContext, tuned: Stage) -> Work[Stage]:
    """Train the model of the stage `tuned` on the pairs, once for every precision."""
    assert ctx.pairs is not None, "the task file was checked: a preferred candidate has preferences"
    train, dev = ctx.pairs.train, ctx.pairs.dev
    params = preference_params(ctx)
    spec = StageSpec(
        "dpo",
        {k: v for k, v in asdict(params).items() if k != "checkpoint_seconds"},
        {"model": tuned.key, "train": train.digest, "dev": dev.digest},
        libraries=("torch", "transformers", "tokenizers", "peft"),
    )

    def work(out: Path) -> Work[dict[str, Any]]:
        model = tuned.folder / "model"
        result = yield from shared("dpo", model, _pairs(train), _pairs(dev), params=params, out=out / "model")
        if result.interrupted:
            raise KeyboardInterrupt
        record: dict[str, Any] = result.to_dict()
        return record

    stage = yield from ctx.workspace.run(spec, work, resumable=True)
    return stage


def preference_params(ctx: WritingContext) -> DpoParams:
    """Return how the pairs are learnt, as the task says."""
    from alambic.train.dpo import DpoParams

    assert ctx.task.preferences is not None
    said = ctx.task.preferences.model_dump(exclude={"file", "dev"})
    return DpoParams(**said, seed=ctx.task.seed, threads=ctx.threads, long=ctx.task.data.long)


def _pairs(pairs: PreferenceDataset) -> list[Pair]:
    from alambic.train.dpo import Pair

    return [Pair(pair.prompt, pair.chosen, pair.rejected, pair.where) for pair in pairs]


def preference_stage(ctx: WritingContext, name: str, bundle: Stage) -> Work[Stage]:
    """Ask the bundle which answer of each dev pair is likelier; the result is empty when its engine cannot tell."""
    assert ctx.pairs is not None
    dev = ctx.pairs.dev
    pairs = dev if len(dev) <= DECIDING_ROWS else dev.take(_spread(len(dev), DECIDING_ROWS))
    spec = StageSpec(
        f"preference.{name}",
        {"threads": ctx.threads},
        {"bundle": bundle.key, "pairs": pairs.digest, "machine": ctx.machine_digest},
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        with open_writer(bundle.folder / "bundle", threads=ctx.threads) as writer:
            if "score" not in writer.capabilities:
                return {}
            score = measure_preference(writer, pairs.examples, seed=ctx.task.seed)
        return {"figures": score.to_dict(), "margins": list(score.margins)}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def _spread(n: int, most: int) -> list[int]:
    """Return `most` places spread evenly over `n`."""
    return [i * n // most for i in range(most)]


def with_gains(trials: Sequence[WritingTrial], *, seed: int) -> list[WritingTrial]:
    """Compare each preferred candidate with the fine-tuned one of the same precision, where both were tried."""
    by_name = {trial.name: trial for trial in trials}
    done = []
    for trial in trials:
        before = by_name.get(trial.name.replace("preferred", "finetune")) if trial.name in PREFERRED else None
        if before is not None and trial.margins is not None and before.margins is not None:
            share = gained(trial.margins, before.margins, seed=seed)
            if share is not None:
                figures = {**trial.costs["preference"], "gained": share.to_dict(), "against": before.name}
                trial = replace(trial, costs={**trial.costs, "preference": figures})
        done.append(trial)
    return done


def scores_of(trials: Sequence[WritingTrial]) -> dict[str, dict[str, Any]]:
    """Return the figures on dev pairs of every trial that has them, by name."""
    return {trial.name: trial.costs["preference"] for trial in trials if "preference" in trial.costs}


def preference_lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say in a sentence each how well the candidates tell the dev pairs apart, and what the preferred ones gained."""
    lines = []
    for name, score in scores.items():
        line = f"{name} finds the better answer of a dev pair likelier in {_percent(score['accuracy'])}"
        if "gained" in score:
            line += f"; against {score['against']} the better answer gained in {_percent(score['gained'])}"
        lines.append(line)
    return lines


def _percent(share: Mapping[str, Any]) -> str:
    value, low, high = (100 * float(share[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}], n = {share['n']:,}"
