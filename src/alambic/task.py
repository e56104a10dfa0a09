"""Task: `task.toml` parsed, validated whole, frozen. The only configuration a user writes.

Every error names the file, the line, the key, the value got and the values allowed; all errors of a file are reported
together. Unknown keys are errors. `json_schema()` describes the file for editors.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from alambic import toml_file
from alambic.errors import TaskError, nearest
from alambic.kinds import cascade, writing
from alambic.kinds.classify import DEFAULT_CANDIDATES, DISTILLED, METRICS, MULTI_LABEL_METRICS
from alambic.task_tables import (
    AnswerSpec,
    BaseSpec,
    Budget,
    CandidateSpec,
    DataSpec,
    PreferencesSpec,
    RemoteStageSpec,
    Spec,
    TaskSpec,
)

__all__ = [
    "AnswerSpec", "BaseSpec", "Budget", "CandidateSpec", "DataSpec", "PreferencesSpec", "RemoteStageSpec", "Task",
    "TaskSpec", "json_schema", "load_task", "parse_task",
]  # fmt: skip

_LONG_WRITING = ("error", "leave_out")


class _File(Spec):
    task: TaskSpec
    data: DataSpec
    base: BaseSpec = BaseSpec()  # type: ignore[call-arg]
    budget: Budget = Budget()  # type: ignore[call-arg]
    answer: AnswerSpec = AnswerSpec()  # type: ignore[call-arg]
    preferences: PreferencesSpec | None = None
    remote: RemoteStageSpec | None = None
    labels: dict[str, str] = Field(
        default_factory=dict,
        description='Label names that may occur, name = "description" (classify): a build refuses others, '
        "`alambic label` offers them and starts its guesses from the descriptions.",
    )
    candidate: tuple[CandidateSpec, ...] = ()
    recipe: dict[str, bool | int | float | str] | None = Field(
        None, description="Sugar for one `finetune` candidate, and one `preferred` where there are preferences."
    )


_TABLES: dict[str, type[BaseModel]] = {
    "task": TaskSpec, "data": DataSpec, "base": BaseSpec, "budget": Budget, "candidate": CandidateSpec,
    "answer": AnswerSpec, "preferences": PreferencesSpec, "remote": RemoteStageSpec,
}  # fmt: skip


class Task(BaseModel):
    """A validated task; `root` is the folder that the paths of `data` start from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    source: str
    task: TaskSpec
    data: DataSpec
    base: BaseSpec
    budget: Budget
    answer: AnswerSpec
    candidates: tuple[CandidateSpec, ...]
    preferences: PreferencesSpec | None = None
    remote: RemoteStageSpec | None = None
    labels: dict[str, str] = Field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Kind of the task."""
        return self.task.kind

    @property
    def writes(self) -> bool:
        """Whether the task asks for texts rather than labels."""
        return self.task.kind in writing.WRITING

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.name

    @property
    def multi_label(self) -> bool:
        """Whether a text may carry several labels."""
        return self.task.multi_label

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.task.seed

    @property
    def root(self) -> Path:
        """Folder of the task file."""
        return self.path.parent

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the quality metrics, the one that decides first."""
        names = _metrics_of(self.task)
        floor = next(iter(self.budget.quality), None)
        return names if floor is None else (floor, *(n for n in names if n != floor))

    def path_of(self, name: str) -> Path:
        """Resolve a path of the task file."""
        return (self.root / name).expanduser().resolve()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the task file, for editors."""
    schema = _File.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "alambic task file"}


def load_task(path: Path | str) -> Task:
    """Read and validate a task file.

    Raises:
        TaskError: the file is missing, is not TOML, or breaks its schema; every fault is listed with its line.
    """
    path = Path(path).resolve()
    source = toml_file.read_text(path)
    return parse_task(toml_file.parse(source, path, hint="see docs/guides/task-file.md"), source, path)


def parse_task(raw: dict[str, Any], source: str, path: Path) -> Task:
    """Validate the parsed content `raw` of a task file whose text is `source`."""
    hint = "alambic check --schema prints every key and its values"
    file = toml_file.validate(_File, raw, source, path, tables=_TABLES, hint=hint)
    names = tuple(file.candidate) or _default_candidates(file)
    data = file.data
    if file.task.kind in writing.WRITING and "long" not in data.model_fields_set:
        data = data.model_copy(update={"long": "error"})
    task = Task(
        path=path, source=source, task=file.task, data=data, base=file.base, budget=file.budget, answer=file.answer,
        candidates=names, preferences=file.preferences, remote=file.remote, labels=file.labels,
    )  # fmt: skip
    wrong = [*_kind_faults(task, file), *_candidate_faults(task), *_budget_faults(task)]
    if wrong:
        raise TaskError("\n".join(f"{path.name}:{toml_file.line_of(source, where)}: {text}" for where, text in wrong))
    return task


def _default_candidates(file: _File) -> tuple[CandidateSpec, ...]:
    if file.recipe is not None:
        trained = ("finetune", "preferred") if file.preferences is not None else ("finetune",)
        return tuple(CandidateSpec(name=name, recipe=file.recipe, chain=None) for name in trained)
    # A model made from scratch says nothing before it is trained.
    names = [
        n for n in _ladder_of(file.task.kind, file.preferences) if not (n == "base" and file.base.name == "scratch")
    ]
    if file.task.kind == "classify" and _saves(file):
        at = names.index(cascade.NAME)  # a chain is made of all before it
        names[at:at] = DISTILLED
    if file.task.multi_label:
        names.remove(cascade.NAME)
    return tuple(CandidateSpec(name=name, step=None, chain=None) for name in names)


def _saves(file: _File) -> bool:
    """Tell whether students may help: the budget limits what they save or prefers it, or texts are there for them."""
    budget = file.budget
    limits = (budget.p95_ms, budget.size_mb, budget.peak_ram_mb, budget.j_per_request, file.data.unlabelled)
    return any(limit is not None for limit in limits) or budget.prefer not in (None, "quality")


def _ladder_of(kind: str, preferences: PreferencesSpec | None) -> tuple[str, ...]:
    names = writing.DEFAULT_CANDIDATES.get(kind, DEFAULT_CANDIDATES)
    return (*names, *writing.PREFERRED) if preferences is not None and kind in writing.PREFERRING else names


def _metrics_of(task: TaskSpec) -> tuple[str, ...]:
    if task.kind in writing.METRICS:
        return writing.METRICS[task.kind]
    return MULTI_LABEL_METRICS if task.multi_label else METRICS


# Keys that only one side of the kinds understands: (table, key), and whether it is for those that write.
_ONLY: tuple[tuple[str, str, bool], ...] = (
    ("task", "multi_label", False), ("data", "label", False), ("data", "label_separator", False),
    ("data", "output", True), ("data", "prompt", True), ("data", "system", True),
    ("data", "out_of_scope", False), ("data", "reasons", False), ("data", "unlabelled", False),
    ("budget", "precision", False), ("budget", "coverage", False), ("budget", "in_scope", False),
    ("budget", "mean_ms", False),
    ("base", "parameters", True), ("base", "shape", True),
)  # fmt: skip

# Keys that speak of the label of a text.
_ONE_LABEL = (("data", "out_of_scope"), ("budget", "precision"), ("budget", "coverage"), ("budget", "in_scope"))


def _kind_faults(task: Task, file: _File) -> list[tuple[tuple[str | int, ...], str]]:
    """List keys that do not apply to the kind: an option that does nothing would deceive."""
    kind = task.kind
    faults: list[tuple[tuple[str | int, ...], str]] = []
    for table, key, for_writing in _ONLY:
        if key in getattr(file, table).model_fields_set and for_writing != task.writes:
            faults.append(((table, key), f"{table}.{key}: does not apply to kind {kind!r}"))
    for table, key in _ONE_LABEL if task.multi_label else ():
        if getattr(getattr(file, table), key) is not None:
            faults.append(((table, key), f"{table}.{key}: needs one label per text, and multi_label is true"))
    if "answer" in file.model_fields_set and not task.writes:
        faults.append((("answer",), f"answer: does not apply to kind {kind!r}"))
    if (kind == "extract") != (task.answer.json_schema is not None):
        text = (
            "kind 'extract' needs the JSON Schema of its answers (a file)" if kind == "extract" else "only for extract"
        )
        faults.append((("answer", "schema"), f"answer.schema: {text}"))
    if kind == "extract" and task.answer.stop:
        faults.append((("answer", "stop"), "answer.stop: an answer under a schema ends where the schema does"))
    if task.answer.draft is not None and task.answer.lookup not in (False, "auto"):
        text = "answer.lookup: an engine guesses from the prompt or with a draft; beside answer.draft: 'auto' or absent"
        faults.append((("answer", "lookup"), text))
    allowed = _LONG_WRITING if task.writes else ("windows", "head", "head_tail", "error")
    if task.data.long not in allowed:
        faults.append((("data", "long"), f"data.long = {task.data.long!r}; kind {kind!r} allows {', '.join(allowed)}"))
    if task.base.name != "scratch" and (task.base.parameters or task.base.shape):
        faults.append((("base", "parameters"), "base.parameters and base.shape: only with base.name = 'scratch'"))
    if task.writes and task.base.name == "auto" and _needs_writing_base(task):
        said = "'auto' chooses among encoders" if "name" in file.base.model_fields_set else "missing"
        text = f"base.name: {said}, and kind {kind!r} needs a model that writes"
        known = "alambic-fr-en (ours, small), another of `alambic bases --kind decoder`, a folder, or scratch"
        faults.append((("base", "name"), f"{text}: {known}"))
    if task.writes and task.base.name == "scratch" and task.base.parameters is None:
        faults.append((("base", "name"), "base.name = 'scratch' needs base.parameters, for example 10_000_000"))
    if task.labels and kind != "classify":
        faults.append((("labels",), f"labels: does not apply to kind {kind!r}"))
    return [*faults, *_preference_faults(task), *_remote_faults(task)]


def _remote_faults(task: Task) -> list[tuple[tuple[str | int, ...], str]]:
    """Refuse a remote that would never be asked, or that is shown rows nobody keeps."""
    remote = task.remote
    if remote is None:
        return []
    if task.kind != "classify" or task.multi_label:
        return [(("remote",), "remote: needs kind 'classify' and one label per text")]
    faults: list[tuple[tuple[str | int, ...], str]] = []
    if task.budget.precision is None and task.data.out_of_scope is None:
        text = "remote: it answers what the bundle abstains from, and this one answers everything; "
        faults.append((("remote",), text + "give budget.precision or data.out_of_scope"))
    if remote.examples and task.data.reasons != "texts":
        text = f'remote.examples = {remote.examples}: the bundle must keep its rows: data.reasons = "texts"'
        faults.append((("remote", "examples"), text))
    if (remote.usd_per_million_in is None) != (remote.usd_per_million_out is None):
        faults.append((("remote", "usd_per_million_in"), "remote: give both prices or neither"))
    return faults


def _preference_faults(task: Task) -> list[tuple[tuple[str | int, ...], str]]:
    """Refuse preferences that nothing would learn from."""
    if task.preferences is None:
        return []
    if task.kind not in writing.PREFERRING:
        return [(("preferences",), f"preferences: do not apply to kind {task.kind!r}")]
    if not any(candidate.name in writing.PREFERRED for candidate in task.candidates):
        names = ", ".join(writing.PREFERRED)
        return [
            (("preferences",), f"preferences: no candidate learns from them; add [[candidate]] name = one of {names}")
        ]
    return []


def _needs_writing_base(task: Task) -> bool:
    return any(candidate.name not in ("nearest", "tagger") for candidate in task.candidates)


def _candidate_faults(task: Task) -> list[tuple[tuple[str | int, ...], str]]:
    known = _ladder_of(task.kind, task.preferences)
    faults: list[tuple[tuple[str | int, ...], str]] = []
    if task.kind == "classify":
        known = (*known, *DISTILLED)
        if task.data.unlabelled is not None and not any(c.made_by in DISTILLED for c in task.candidates):
            text = "data.unlabelled: no candidate learns from it; add [[candidate]] name = one of "
            faults.append((("data", "unlabelled"), text + ", ".join(DISTILLED)))
    seen: set[str] = set()
    for i, candidate in enumerate(task.candidates):
        loc = ("candidate", i, "name")
        if candidate.step is not None:
            faults += _step_faults(task, i, candidate.step, known)
        if candidate.name in writing.PREFERRED and candidate.name not in known:
            faults.append((loc, f"candidate[{i}].name: {candidate.name!r} needs [preferences] (generate and chat)"))
        elif cascade.NAME in known and cascade.is_cascade(candidate.made_by):
            names = [one.name for one in task.candidates]
            for key, text in cascade.faults_of(candidate.name, candidate.chain, names, multi_label=task.multi_label):
                faults.append((("candidate", i, key), f"candidate[{i}].{key}: {text}"))
        elif candidate.chain is not None:
            text = f"only candidates called {cascade.NAME!r} or '{cascade.NAME}-...' are chains"
            faults.append((("candidate", i, "chain"), f"candidate[{i}].chain: {text}"))
        elif candidate.step is None and candidate.name not in known:
            faults.append((loc, f"candidate[{i}].name: {candidate.name!r}; {nearest(candidate.name, known)}"))
        if candidate.name in seen:
            faults.append((loc, f"candidate[{i}].name: {candidate.name!r} is there twice"))
        seen.add(candidate.name)
    return faults


def _step_faults(task: Task, i: int, step: str, known: tuple[str, ...]) -> list[tuple[tuple[str | int, ...], str]]:
    loc, name = ("candidate", i, "step"), task.candidates[i].name
    if task.kind != "classify":
        return [(loc, f"candidate[{i}].step: does not apply to kind {task.kind!r}")]
    if step not in known:
        return [(loc, f"candidate[{i}].step: {step!r}; {nearest(step, known)}")]
    if name in known and name != step:
        return [(loc, f"candidate[{i}].name: {name!r} is a step of its own, and this candidate is made by {step!r}")]
    return []


def _budget_faults(task: Task) -> list[tuple[tuple[str | int, ...], str]]:
    known = _metrics_of(task.task)
    faults: list[tuple[tuple[str | int, ...], str]] = []
    for metric in task.budget.quality:
        if metric not in known:
            faults.append(
                (("budget", "quality"), f"budget.quality: unknown metric {metric!r}; {nearest(metric, known)}")
            )
    budget = task.budget
    if budget.prefer == "mean_ms" and task.writes:
        faults.append((("budget", "prefer"), f"budget.prefer: 'mean_ms' does not apply to kind {task.kind!r}"))
    if budget.prefer == "quality" and budget.give_up > 0:
        text = "budget.give_up: contradicts prefer = 'quality', which gives up nothing"
        faults.append((("budget", "give_up"), text))
    if budget.size_mb is not None and budget.peak_ram_mb is not None and budget.peak_ram_mb < budget.size_mb:
        text = f"budget.peak_ram_mb = {budget.peak_ram_mb:g} is under budget.size_mb = {budget.size_mb:g}"
        faults.append((("budget", "peak_ram_mb"), text + "; a bundle is read into memory, so size_mb can never bind"))
    return faults
