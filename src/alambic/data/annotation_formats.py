"""Annotations out and in: a CSV that a task reads, Label Studio's JSON, Argilla's records.

    exported = export("csv", journal.decisions, multi_label=False)
    imported = read_annotations(Path("project-1-at-2026.json"), labels=("a", "b"), multi_label=False)

Formats: https://labelstud.io/guide/task_format (tasks with annotations; JSON-MIN is read too) and
https://docs.argilla.io/latest/reference/argilla/records/records (`records.to_json`; records of Argilla 1 are read too).
"""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from alambic.data.annotations import Decision, Decisions
from alambic.errors import DataError, nearest

# A person is an id to Argilla; the same name always gets the same one.
_PEOPLE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/alambic-ai/alambic#annotators")


@dataclass(frozen=True)
class Settled:
    """What the annotators of one text say together.

    Attributes:
        text: the text.
        verdict: `label`, `none`, or `disputed` where no answer has more voices than every other.
        labels: the labels of the winning answer.
        decisions: every answer, in order of arrival.
    """

    text: str
    verdict: str
    labels: tuple[str, ...]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Exported:
    """The text of a file, and what is to be said about it."""

    body: str
    n: int
    notes: tuple[str, ...] = ()


def settle(decisions: Decisions) -> list[Settled]:
    """Return one answer for each text that anyone decided: the one with most voices."""
    settled = []
    for found in decisions.by_text().values():
        voices = Counter((d.verdict, tuple(sorted(d.labels))) for d in found).most_common()
        tied = len(voices) > 1 and voices[0][1] == voices[1][1]
        verdict, labels = ("disputed", ()) if tied else voices[0][0]
        settled.append(Settled(found[-1].text, verdict, labels, tuple(found)))
    return settled


def export(form: str, decisions: Decisions, *, multi_label: bool) -> Exported:
    """Return the annotations in `form`, a name of `FORMS`.

    Raises:
        DataError: there is no such form, or nothing is annotated yet.
    """
    if form not in FORMS:
        raise DataError(f"no form {form!r} of annotations; {nearest(form, FORMS)}")
    settled = settle(decisions)
    if not settled:
        raise DataError("nothing is annotated yet: there is nothing to export")
    return FORMS[form](settled, decisions.labels, multi_label)


def _csv(settled: Sequence[Settled], labels: Mapping[str, str], multi_label: bool) -> Exported:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("text", "label", "annotators", "note"))
    n, left = 0, Counter[str]()
    for one in settled:
        if one.verdict == "disputed" or (one.verdict == "none" and not multi_label):
            left[one.verdict] += 1
            continue
        cell = json.dumps(one.labels, ensure_ascii=False) if multi_label else one.labels[0]
        notes = " / ".join(d.note for d in one.decisions if d.note)
        writer.writerow((one.text, cell, ", ".join(d.by for d in one.decisions), notes))
        n += 1
    said = {
        "none": "{} text(s) that have none of the labels are left out",
        "disputed": "{} text(s) on which the annotators disagree, with as many voices each, are left out",
    }
    return Exported(out.getvalue(), n, tuple(said[verdict].format(count) for verdict, count in left.items()))


def _label_studio(settled: Sequence[Settled], labels: Mapping[str, str], multi_label: bool) -> Exported:
    tasks = []
    for number, one in enumerate(settled, 1):
        guess = next((d.guess for d in one.decisions if d.guess), None)
        task: dict[str, Any] = {
            "id": number,
            "data": {"text": one.text},
            "annotations": [_ls_annotation(d) for d in one.decisions],
        }
        if guess is not None:
            task["predictions"] = [
                {"model_version": "alambic", "score": guess[1], "result": [_ls_choices((guess[0],))]}
            ]
        tasks.append(task)
    note = f"labelling interface for Label Studio: {label_studio_config(labels, multi_label=multi_label)}"
    return Exported(json.dumps(tasks, ensure_ascii=False, indent=1) + "\n", len(tasks), (note,))


def _ls_choices(labels: Sequence[str]) -> dict[str, Any]:
    return {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": list(labels)}}


def _ls_annotation(decision: Decision) -> dict[str, Any]:
    result = [_ls_choices(decision.labels)] if decision.labels else []
    if decision.note:
        value = {"text": [decision.note]}
        result.append({"from_name": "note", "to_name": "text", "type": "textarea", "value": value})
    # `completed_by` must name a user of that server, whom we do not know: Label Studio ignores a key of ours.
    made: dict[str, Any] = {"result": result, "was_cancelled": False, "created_at": decision.at}
    if decision.ms is not None:
        made["lead_time"] = decision.ms / 1000
    return {**made, "alambic": {"by": decision.by}}


def label_studio_config(labels: Iterable[str], *, multi_label: bool) -> str:
    """Return the labelling interface (XML) that exported tasks fit."""
    choice = "multiple" if multi_label else "single-radio"
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in labels)
    return (
        '<View><Text name="text" value="$text"/>'
        f'<Choices name="label" toName="text" choice="{choice}">{choices}</Choices>'
        '<TextArea name="note" toName="text"/></View>'
    )


def _argilla(settled: Sequence[Settled], labels: Mapping[str, str], multi_label: bool) -> Exported:
    records = []
    for one in settled:
        responses: dict[str, list[dict[str, Any]]] = {}
        for d in one.decisions:
            person = str(uuid.uuid5(_PEOPLE, d.by))
            if d.labels or multi_label:
                value: object = list(d.labels) if multi_label else d.labels[0]
                responses.setdefault("label", []).append({"value": value, "user_id": person})
            if d.note:
                responses.setdefault("note", []).append({"value": d.note, "user_id": person})
        guess = next((d.guess for d in one.decisions if d.guess), None)
        shown = (
            {"value": [guess[0]] if multi_label else guess[0], "score": guess[1], "agent": "alambic"} if guess else {}
        )
        metadata = {"annotators": sorted({d.by for d in one.decisions})}
        none = sorted({d.by for d in one.decisions if d.verdict == "none"})
        records.append({
            "id": one.decisions[0].id, "fields": {"text": one.text},
            "metadata": metadata | ({"none_of_these": none} if none else {}),
            "suggestions": {"label": shown} if shown else {}, "responses": responses, "vectors": {}, "_server_id": None,
        })  # fmt: skip
    return Exported(json.dumps(records, ensure_ascii=False, indent=1) + "\n", len(records))


FORMS: dict[str, Callable[[Sequence[Settled], Mapping[str, str], bool], Exported]] = {
    "csv": _csv,
    "label-studio": _label_studio,
    "argilla": _argilla,
}


@dataclass(frozen=True)
class Answer:
    """One annotator's answer to one text, as a file of another tool holds it; `where` is for messages."""

    text: str
    by: str
    verdict: str
    labels: tuple[str, ...]
    note: str | None = None
    where: str = ""


def answers_of(values: object, name: str) -> tuple[str, list[Answer]]:
    """Return the tool that wrote the JSON `values` of the file `name`, and the answers in it, not checked.

    Raises:
        DataError: no tool that is known here writes this.
    """
    items = values if isinstance(values, list) else [values]
    first = next((item for item in items if isinstance(item, dict)), {})
    if "data" in first and ("annotations" in first or "completions" in first):
        tool, read = "label-studio", _from_label_studio
    elif "fields" in first and "responses" in first:
        tool, read = "argilla", _from_argilla
    elif "annotation" in first and ("text" in first or "inputs" in first):
        tool, read = "argilla-1", _from_argilla_1
    elif "annotation_id" in first or "annotator" in first:
        tool, read = "label-studio-min", _from_label_studio_min
    else:
        raise DataError(
            f"{name}: not annotations that are known here: keys {', '.join(sorted(first)[:8]) or 'none'}",
            hint="Label Studio: export as JSON; Argilla: dataset.records.to_json(path); or a table with text and label",
        )
    found = []
    for number, item in enumerate(items, 1):
        where = f"{name}:item {number}"
        if not isinstance(item, dict):
            raise DataError(f"{where}: a JSON object is expected, not {type(item).__name__}")
        try:
            found += read(item, where)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{where}: not a record of {tool}: {type(error).__name__} {error}") from error
    return tool, found


def _from_label_studio(item: Mapping[str, Any], where: str) -> list[Answer]:
    text = _text_in(item["data"])
    found = []
    for annotation in item.get("annotations") or item.get("completions") or ():
        by = _person(annotation.get("alambic", {}).get("by") or annotation.get("completed_by"))
        labels: list[str] = []
        note = None
        for result in annotation.get("result") or ():
            value = result.get("value") or {}
            labels += map(str, value.get("choices") or ())
            if result.get("type") == "textarea":
                note = " ".join(map(str, value.get("text") or ())) or None
        skipped = annotation.get("was_cancelled") or annotation.get("skipped")
        verdict = "skip" if skipped else "label" if labels else "none"
        found.append(Answer(text, by, verdict, tuple(labels), note, where))
    return found


def _from_label_studio_min(item: Mapping[str, Any], where: str) -> list[Answer]:
    own = {"id", "annotation_id", "annotator", "created_at", "updated_at", "lead_time", "note"}
    rest = {key: value for key, value in item.items() if key not in own}
    text = _text_in(rest)
    chosen = next((v for k, v in rest.items() if k in ("label", "labels", "choice", "sentiment", "class")), None)
    if chosen is None:
        others = [v for v in rest.values() if v is not text and v != text and isinstance(v, str | dict)]
        chosen = others[0] if len(others) == 1 else None
    labels = chosen.get("choices", ()) if isinstance(chosen, dict) else (chosen,) if chosen else ()
    verdict = "label" if labels else "none"
    return [Answer(text, _person(item.get("annotator")), verdict, tuple(map(str, labels)), item.get("note"), where)]


def _from_argilla(item: Mapping[str, Any], where: str) -> list[Answer]:
    text = _text_in(item["fields"])
    metadata = item.get("metadata") or {}
    names = {str(uuid.uuid5(_PEOPLE, name)): name for name in metadata.get("annotators") or ()}
    responses = item.get("responses") or {}
    notes = {r["user_id"]: str(r["value"]) for r in responses.get("note") or ()}
    question = "label" if "label" in responses else next((q for q in responses if q != "note"), None)
    found = [
        Answer(text, name, "none", (), notes.get(person), where)
        for person, name in names.items()
        if name in (metadata.get("none_of_these") or ())
    ]
    for response in responses.get(question or "", ()):
        value, person = response["value"], str(response.get("user_id"))
        labels = tuple(map(str, value)) if isinstance(value, list) else (str(value),)
        by = names.get(person, f"argilla {person[:8]}")
        if any(one.by == by for one in found):
            continue
        found.append(Answer(text, by, "label" if labels else "none", labels, notes.get(person), where))
    return found


def _from_argilla_1(item: Mapping[str, Any], where: str) -> list[Answer]:
    value = item["annotation"]
    if value is None:
        return []
    text = item["text"] if isinstance(item.get("text"), str) else _text_in(item["inputs"])
    labels = tuple(map(str, value)) if isinstance(value, list) else (str(value),)
    skipped = item.get("status") == "Discarded"
    return [Answer(text, _person(item.get("annotation_agent")), "skip" if skipped else "label", labels, None, where)]


def _text_in(fields: Mapping[str, Any]) -> str:
    if isinstance(fields.get("text"), str):
        return str(fields["text"])
    texts = [value for value in fields.values() if isinstance(value, str)]
    if not texts:
        raise KeyError("text")
    return max(texts, key=len)


def _person(value: object) -> str:
    if isinstance(value, Mapping):
        value = value.get("email") or value.get("username") or value.get("id")
    if isinstance(value, int):
        return f"user {value}"
    return str(value) if value else "imported"
