"""Three tasks of writing from nothing: commands of NL2Bash, sentences of WebNLG, titles of OrangeSum.

ALAMBIC_BENCH_PARTS=nl2bash,webnlg,titles runs a part; the page shows what was run so far. ALAMBIC_BENCH_BASE (a
catalogue name or a folder) trains that base instead, shown beside. ALAMBIC_BENCH_EPOCHS and
ALAMBIC_BENCH_PARAMETERS change how long it trains and how large it is; ALAMBIC_BENCH_TINY=1 tries all on few rows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import writing_sets
from multi30k import _shapes
from run import TINY, data_folder, say

MINUTES = 55
WHAT = "Commands, sentences and titles written by small models made from nothing, int8 through their engine, greedy"
_SETS = ("nl2bash", "webnlg", "titles")
_TITLES = {"nl2bash": "NL2Bash", "webnlg": "WebNLG (English, 2017)", "titles": "OrangeSum titles"}


def run(store: Any) -> str:
    """Run what is not kept yet, and write the tables of what is."""
    base = os.environ.get("ALAMBIC_BENCH_BASE")
    for name in os.environ.get("ALAMBIC_BENCH_PARTS", ",".join(_SETS)).split(","):
        if name not in _SETS:
            raise SystemExit(f"no set {name!r}; known: {', '.join(_SETS)}")
        store.part(f"{name}-floor", partial(_floor, name, store.folder))
        part = f"{name}-{_slug(base or 'scratch')}"
        store.part(f"{part}-train", partial(_train, name, base, store.folder / part))
        store.part(f"{part}-score", partial(_score, name, store.folder / part))
    lines: list[str] = []
    for name in _SETS:
        lines += [*_table(name, store.folder), ""]
    return "\n".join(lines)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def _cut(pairs: writing_sets.Pairs) -> writing_sets.Pairs:
    most = 60 if TINY else None
    return writing_sets.Pairs(pairs.chats[:most], pairs.references[:most], pairs.groups[:most])


def _floor(name: str, folder: Path) -> dict[str, Any]:
    """Score the answer of the most similar known input, and for titles the first words of the article."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import drain
    from alambic.kinds.generation import Reply, Timings, Usage
    from alambic.measure.written import write_all
    from alambic.train.nearest import fit_nearest

    task = writing_sets.load(data_folder(), name)
    test = _cut(task.test)
    shutil.rmtree(folder / f"{name}.nearest", ignore_errors=True)
    part = fit_nearest(_cut(task.train).chats, folder / f"{name}.nearest")
    writer = load_writer(part, folder / f"{name}.nearest")
    replies, _ = drain(write_all(writer, test.chats, sampling=_sampling(task)))
    found = {"nearest": _scores(name, task, test, replies)}
    if name == "titles":
        words = round(np.mean([len(texts[0].split()) for texts in task.train.references]))
        texts = writing_sets.first_words(test.chats, words)
        said = [Reply(text, "stop", Usage(0, 0), Timings(0.0, 0.0), content=text) for text in texts]
        found[f"first {words} words"] = _scores(name, task, test, said)
    return found


def _sampling(task: writing_sets.Task) -> Any:
    from alambic.kinds.generation import Sampling

    return Sampling(max_tokens=10 if TINY else task.max_tokens)


def _train(name: str, base: str | None, folder: Path) -> dict[str, Any]:
    """Train a model made from nothing, or `base`; resumable. Dev loss chooses among the passes."""
    from alambic.events import Progress, drain
    from alambic.model.bases import resolve
    from alambic.train.sft import SftParams, finetune_chats

    task = writing_sets.load(data_folder(), name)
    train, dev = _cut(task.train), _cut(task.dev)
    epochs = os.environ.get("ALAMBIC_BENCH_EPOCHS", "1" if TINY else None)
    shared = {"evaluations": 1, "seed": 0, "threads": 1, "long": "leave_out"}
    if base is None:
        start = _scratch(task, folder)
        params = SftParams(
            epochs=float(epochs or task.epochs), label_smoothing=0.1, dropout=task.dropout, patience=99, **shared
        )
    else:  # its own defaults decide how long
        start = resolve(base, kinds=("decoder", "encoder-decoder")).folder
        params = SftParams(epochs=None if epochs is None else float(epochs), **shared)

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and (event.done % 50 == 0 or event.done == event.total):
            say(f"  {name} {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    result = drain(finetune_chats(start, train.chats, dev.chats, params=params, out=folder / "model"), listen)
    return {
        "base": base or "scratch", "parameters": int(sum(np.prod(shape) for shape in _shapes(folder / "model"))),
        "rows": len(train.chats), "left_out": len(result.left_out), "epochs": params.epochs, "tokens": result.tokens,
        "seconds": result.seconds, "tokens_per_second": result.tokens_per_second, "best_dev": result.best_dev,
        "steps": result.steps, "schedule": result.schedule, "dropout": params.dropout,
    }  # fmt: skip


def _scratch(task: writing_sets.Task, folder: Path) -> Path:
    from alambic.model.scratch import make_scratch

    base = folder / "base"
    if not (base / "config.json").is_file():
        parameters = int(os.environ.get("ALAMBIC_BENCH_PARAMETERS", task.parameters))
        made = make_scratch(
            _cut(task.train).chats, base, parameters=parameters, shape="encoder-decoder",
            context_tokens=task.context_tokens,
        )  # fmt: skip
        say(f"  {made}")
    return base


def _score(name: str, folder: Path) -> dict[str, Any]:
    """Pack in 8 bits, write the answers of test through the engine, score them, and time some."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import Progress, drain
    from alambic.kinds.generation import GenerationRequest
    from alambic.measure.generation_speed import measure_generation_speed
    from alambic.measure.written import write_all
    from alambic.pack.writer_openvino import pack_openvino

    task = writing_sets.load(data_folder(), name)
    test, sampling = _cut(task.test), _sampling(task)
    shutil.rmtree(folder / "packed", ignore_errors=True)
    part = drain(pack_openvino(folder / "model", folder / "packed", precision="int8"))
    writer = load_writer(part, folder / "packed", threads=1)

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and event.done % 256 == 0:
            say(f"  {name}: {event.done} of {event.total} written")

    replies, errors = drain(write_all(writer, test.chats, sampling=sampling), listen)
    requests = [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in test.chats[:100]]
    speed = measure_generation_speed(writer, requests, repeats=5 if TINY else 60, seconds=30)
    writer.close()
    samples = [[test.chats[i].prompt.messages[-1].content, test.references[i][0], replies[i].text]
               for i in range(0, len(replies), max(1, len(replies) // 5))][:5]  # fmt: skip
    return {
        "scores": _scores(name, task, test, replies), "errors": len(errors), "samples": samples,
        "cut": sum(reply.finish_reason == "length" for reply in replies),
        "size_mb": sum(path.stat().st_size for path in (folder / "packed").rglob("*")) / 1e6,
        "p50_ms": speed.p50_ms.value, "p95_ms": speed.p95_ms.value, "engine": part.engine,
    }  # fmt: skip


def _scores(name: str, task: writing_sets.Task, test: writing_sets.Pairs, replies: Sequence[Any]) -> dict[str, Any]:
    """Return the scores of all rows and of each group, and what was scored."""
    from alambic.measure.text import score_texts
    from alambic.measure.written import score_written
    from alambic.measure.written_figures import share

    found: dict[str, Any] = {}
    for group in ("all", *sorted(set(test.groups))):
        rows = [i for i in range(len(test.chats)) if group == "all" or test.groups[i] == group]
        written = score_written(
            [test.chats[i] for i in rows], [replies[i] for i in rows], references=[test.references[i] for i in rows],
            kind="generate", metrics=task.metrics,
        )  # fmt: skip
        found[group] = {metric: share(score).to_dict() for metric, score in written.scores.items()} | {"n": len(rows)}
        found["signatures"] = {metric: score.signature for metric, score in written.scores.items()}
    if name == "nl2bash":
        for title, flags in (("same programs", False), ("same programs and flags", True)):
            reduced: Callable[[str], str] = partial(writing_sets.utilities, flags=flags)
            true = [[reduced(text) for text in texts] for texts in test.references]
            score = score_texts(
                "exact_match", [reduced(reply.text) for reply in replies], true, rng=np.random.default_rng(0)
            )
            found["all"][title] = share(score).to_dict()
    return found


_HEADS = {
    "exact_match": "exact match %", "bleu": "BLEU 13a", "chrf": "chrF", "bleu_moses_en": "BLEU, lower-cased, Moses",
    "rouge_1_ascii": "ROUGE-1, ASCII", "rouge_2_ascii": "ROUGE-2, ASCII", "rouge_l_ascii": "ROUGE-L, ASCII",
    "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L",
}  # fmt: skip


def _table(name: str, folder: Path) -> list[str]:
    floor = _kept(folder / f"{name}-floor.json")
    lines = [f"## {_TITLES[name]}", ""]
    if floor is None:
        return [*lines, "Not run."]
    runs = {
        path.name.removeprefix(f"{name}-").removesuffix("-score.json"): (
            _kept(path.with_name(path.name.replace("-score", "-train"))), _kept(path),
        )
        for path in sorted(folder.glob(f"{name}-*-score.json"))
    }  # fmt: skip
    first = next(iter(floor.values()))
    metrics = [metric for metric in first["all"] if metric != "n"]
    groups = [group for group in first if group != "signatures"]
    lines += [f"| answers of | rows | n | {' | '.join(_HEADS.get(metric, metric) for metric in metrics)} |",
              "|" + "---|" * (3 + len(metrics))]  # fmt: skip
    for title, scores in floor.items():
        lines += _score_rows(title, scores, groups, metrics)
    for title, (_, scored) in runs.items():
        lines += _score_rows(title, scored["scores"], groups, metrics)
    lines.append("")
    if not any(title != "scratch" for title in runs):
        lines.append("From a base of ours: not run, there is none yet that writes.")
    lines += [_described(title, *found) for title, found in runs.items()]
    lines.append(f"Published: {writing_sets.load(data_folder(), name).published}.")
    lines.append(_NOTES[name])
    lines += ["", *[f"`{metric}`: {text}" for metric, text in first["signatures"].items()]]
    for title, (_, scored) in runs.items():
        # The questions and the right answers are others' texts, so only what our model wrote is shown.
        lines += ["", f"Five answers of {title}, taken at even distances:", ""]
        lines += [f"- `{_short(written)}`" for _, _, written in scored["samples"]]
    return lines


_NOTES = {
    "nl2bash": "Our own split by the digest of the question; 24 % of the test commands also stand in train, under "
    "another question. `same programs`: the programs run, in order; with flags: those and every flag. Neither proves "
    "that a command works.",
    "webnlg": "Triples are written as `subject | property | object ; ...`, underscores as spaces, nothing is put in "
    "the place of names. Each row has up to eight references.",
    "titles": f"The model reads the first {writing_sets.TITLE_WORDS} words of an article, no more.",
}


def _score_rows(title: str, scores: Mapping[str, Any], groups: Sequence[str], metrics: Sequence[str]) -> list[str]:
    lines = []
    for group in groups:
        cells = [_cell(scores[group].get(metric)) for metric in metrics]
        lines.append(f"| {title} | {group} | {scores[group]['n']:,} | {' | '.join(cells)} |")
    return lines


def _cell(score: Any) -> str:
    if score is None:
        return ""
    return f"{100 * score['value']:.2f} [{100 * score['low']:.2f}, {100 * score['high']:.2f}]"


def _described(title: str, trained: Any, scored: Any) -> str:
    return (
        f"{title}: {trained['parameters']:,} parameters, {trained['rows']:,} rows, best of {trained['schedule']:,} "
        f"steps: {trained['steps']:,}, {trained['tokens']:,} tokens in {trained['seconds'] / 60:.0f} min on one thread "
        f"({trained['tokens_per_second']:.0f} tokens/s), best dev loss {trained['best_dev']:.3f} nats a token; "
        f"{trained['left_out']} rows too long and left out. Bundle part {scored['size_mb']:.1f} MB (int8, "
        f"{scored['engine']}); an answer takes {scored['p50_ms']:.1f} ms (p50), {scored['p95_ms']:.1f} ms (p95) on one "
        f"thread; {scored['cut']} answers reached the limit of tokens, {scored['errors']} could not be written."
    )


def _kept(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))["result"] if path.exists() else None


def _short(text: str) -> str:
    flat = " ".join(text.split()).replace("`", "'")
    return flat if len(flat) <= 160 else flat[:157] + "..."
