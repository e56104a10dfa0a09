"""The model card of a bundle, in the Hub's format: YAML front matter, then what a reader must know before using it.

Front matter holds only what the Hub can check: identifiers that are not hub ids go into the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alambic.kinds import writing
from alambic.measure.machine import describe
from alambic.measure.metrics import METRICS
from alambic.measure.metrics import title_of as metric_title

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc0-1.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gpl-2.0", "gpl-3.0", "isc", "lgpl-3.0", "llama3.2",
    "mit", "mpl-2.0", "odbl", "odc-by", "openrail", "pddl", "unlicense", "unknown", "other",
}  # fmt: skip


def render_card(manifest: Mapping[str, Any], *, languages: Sequence[str] = ()) -> str:
    """Return the README.md of a bundle.

    Args:
        manifest: the content of `bundle.json`.
        languages: ISO 639-1 codes of the data, when known.
    """
    front = "\n".join(_yaml(_front_matter(manifest, languages)))
    sections = [_opening(manifest), _scores(manifest), _use(manifest), _origin(manifest), _limits(manifest)]
    return f"---\n{front}\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(manifest: Mapping[str, Any], languages: Sequence[str]) -> dict[str, Any]:
    licences, base, data = (manifest.get(key) or {} for key in ("licences", "base", "data"))
    test = _numbers((manifest.get("scores") or {}).get("test"))
    base_id, data_id = _hub_id(base.get("hub"), base.get("source"), base.get("name")), _hub_id(data.get("hub"))
    front: dict[str, Any] = {"language": list(languages), **_licence(licences.get("bundle"))}
    front |= {"library_name": "alambic", "pipeline_tag": _pipeline(manifest)}
    if base_id:
        front |= {"base_model": base_id, "base_model_relation": _relation(manifest)}
    front["datasets"] = [data_id] if data_id else []
    front["metrics"] = sorted({_hub_metric(name) for name in test})
    front["tags"] = ["alambic", "cpu", *sorted({part["engine"] for part in manifest.get("parts", ())})]
    if test:
        front["model-index"] = [{"name": manifest["name"], "results": [_result(manifest, test, data_id)]}]
    return {key: value for key, value in front.items() if value != []}


def _licence(name: str | None) -> dict[str, str]:
    if not name:
        return {"license": "unknown"}
    known = name.lower()
    return {"license": known} if known in _HUB_LICENCES else {"license": "other", "license_name": name}


def _hub_id(*names: object) -> str | None:
    return next((name for name in names if isinstance(name, str) and _HUB_ID.fullmatch(name)), None)


def _relation(manifest: Mapping[str, Any]) -> str:
    """Return how the Hub calls it: a model whose weights were trained is a fine-tune even when quantised after."""
    trained = str(manifest.get("candidate", "")).startswith(("finetune", "preferred", "distil", "cascade"))
    int8 = any(part.get("params", {}).get("precision") == "int8" for part in manifest.get("parts", ()))
    return "quantized" if int8 and not trained else "finetune"


def _hub_metric(name: str) -> str:
    return "f1" if name.endswith("_f1") else "accuracy"


def _labels(manifest: Mapping[str, Any]) -> bool:
    return bool(manifest.get("kind", "classify") == "classify")


def _pipeline(manifest: Mapping[str, Any]) -> str:
    return "text-classification" if _labels(manifest) else "text-generation"


def _result(manifest: Mapping[str, Any], test: Mapping[str, float], data_id: str | None) -> dict[str, Any]:
    metrics = [
        {"type": _hub_metric(name), "name": metric_title(name), "value": round(v, 4)} for name, v in test.items()
    ]
    return {
        "task": {"type": _pipeline(manifest)},
        "dataset": {"name": manifest["name"], "type": data_id or manifest["name"], "split": "test"},
        "metrics": metrics,
    }


def _numbers(scores: Any) -> dict[str, float]:
    """Read `{metric: 0.9}` and `{metric: {"value": 0.9, ...}}` alike; anything else is no score."""
    found: dict[str, float] = {}
    for name, score in (scores or {}).items():
        value = score.get("value") if isinstance(score, Mapping) else score
        if (name in METRICS or name in writing.TITLES) and isinstance(value, int | float):
            found[name] = float(value)
    return found


def _yaml(value: Mapping[str, Any], indent: str = "") -> list[str]:
    """Write YAML's block form; scalars as JSON, which YAML reads the same whatever they hold."""
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{indent}{key}:", *_yaml(item, indent + "  ")]
        elif isinstance(item, list):
            lines += [f"{indent}{key}:", *_yaml_list(item, indent)]
        else:
            lines.append(f"{indent}{key}: {json.dumps(item, ensure_ascii=False)}")
    return lines


def _yaml_list(items: Sequence[Any], indent: str) -> list[str]:
    lines = []
    for item in items:
        if isinstance(item, Mapping):
            first, *rest = _yaml(item, indent + "  ")
            lines += [f"{indent}- {first.strip()}", *rest]
        else:
            lines.append(f"{indent}- {json.dumps(item, ensure_ascii=False)}")
    return lines


def _opening(manifest: Mapping[str, Any]) -> str:
    description = (manifest.get("task") or {}).get("description")
    about = f"{_plain(description)}\n\n" if description else ""
    return (
        f"# {_plain(manifest['name'])}\n\n{about}{_gives(manifest)}\n\n"
        f"Made with alambic {manifest.get('alambic', '')}; candidate `{manifest.get('candidate', '')}`"
        f"{_stages(manifest)}.{_remote(manifest)}"
    )


def _stages(manifest: Mapping[str, Any]) -> str:
    """Name the stages of a cascade."""
    cascade = manifest.get("cascade")
    return f" ({' -> '.join(stage['name'] for stage in cascade['stages'])})" if cascade else ""


def _remote(manifest: Mapping[str, Any]) -> str:
    """Name the remote that may be asked last."""
    remote = manifest.get("remote")
    if not remote:
        return ""
    asked = f"`{_plain(remote['model'])}` at `{_plain(remote['url'])}`"
    return f" With `--remote`, and never otherwise, texts that it abstains from are sent to {asked}."


_GIVES = {
    "generate": "Writes a text from a text.",
    "chat": "Answers in conversations.",
    "extract": "Writes JSON, by the schema in `bundle.json`, from a text.",
}


def _gives(manifest: Mapping[str, Any]) -> str:
    kind = manifest.get("kind", "classify")
    if kind in _GIVES:
        return _GIVES[kind]
    labels = ", ".join(f"`{_plain(label)}`" for label in manifest.get("labels", ()))
    several = "any number of" if manifest.get("multi_label") else "one of"
    return f"Gives a text {several} these labels: {labels}."


def _scores(manifest: Mapping[str, Any]) -> str:
    lines = ["## Scores", "", "| rows | metric | value | 95% interval | n |", "|---|---|---|---|---|"]
    for split, scores in (manifest.get("scores") or {}).items():
        if not isinstance(scores, Mapping):
            continue
        for name, value in _numbers(scores).items():
            spread = scores[name] if isinstance(scores[name], Mapping) else {}
            between = f"{spread['low']:.3f} to {spread['high']:.3f}" if {"low", "high"} <= set(spread) else "–"
            n = spread.get("n", scores.get("n", "–"))
            lines.append(f"| {_plain(split)} | {metric_title(name)} | {value:.3f} | {between} | {n} |")
    if len(lines) == 4:
        return "## Scores\n\nThis bundle was not scored."
    machine = manifest.get("machine")
    where = f"\n\nMeasured on: {_plain(describe(machine))}." if machine else ""
    return "\n".join(lines) + f"\n\nDev rows chose the model; test rows were scored once, at the end.{where}"


def _use(manifest: Mapping[str, Any]) -> str:
    said = "label" if _labels(manifest) else "content"
    return (
        "## Use\n\n```sh\npip install alambic\nalambic predict . \"a text\"\n```\n\n"
        f'```python\nimport alambic\n\nengine = alambic.open(".")\nprint(engine.predict(["a text"])[0].{said})\n```'
    )  # fmt: skip


def _origin(manifest: Mapping[str, Any]) -> str:
    base, data, licences = (manifest.get(key) or {} for key in ("base", "data", "licences"))
    lines = ["## Origin", ""]
    if base:
        lines.append(f"- Base: {_plain(base.get('name'))} (licence: {_plain(base.get('licence') or 'not stated')}).")
    for split, part in data.items():
        if isinstance(part, Mapping) and "rows" in part:
            lines.append(f"- Data, {_plain(split)}: {part['rows']} rows, SHA-256 `{_plain(part.get('digest', ''))}`.")
    lines.append(f"- Licence of the data: {_plain(licences.get('data') or data.get('licence') or 'not stated')}.")
    for name, version in (manifest.get("versions") or {}).items():
        lines.append(f"- {_plain(name)} {_plain(version)}")
    return "\n".join(lines)


def _limits(manifest: Mapping[str, Any]) -> str:
    if not _labels(manifest):
        return (
            "## Limits\n\nIt answers inputs like those it was trained on; of others it may write what is false, and as "
            "surely. Measure it on your own rows with `alambic measure . --data FILE` before relying on it."
        )
    return (
        "## Limits\n\nIt knows only the labels above and texts like those it was trained on; a text of another kind "
        f"gets one of these labels all the same. {_abstention(manifest)} Measure it on your own rows with "
        "`alambic measure . --data FILE` before relying on it."
    )


def _abstention(manifest: Mapping[str, Any]) -> str:
    """Say when the bundle abstains, and what that rests on."""
    decision = manifest.get("decision") or {}
    found = (decision.get("facts") or {}).get("precision")
    lines = []
    if found is not None and found["kept"]:
        lines.append(
            f"It abstains under a confidence of {decision['threshold']:.4f}: of the answers it then gives, at least "
            f"{found['precision']:g} are right, a bound at {found['confidence']:.0%} confidence from {found['n']} rows "
            "that nothing else used, for texts like those rows."
        )
    elif found is not None:
        lines.append(
            f"A precision of {found['precision']:g} was asked and **is not supported** by the rows kept apart."
        )
    if decision.get("scope") is not None:
        lines.append("Texts that seem to belong to no label are marked `abstained` too.")
    return " ".join(lines) or "Check `confidence`."


def _plain(value: object) -> str:
    """Keep a value from outside on one line and out of Markdown's and HTML's syntax."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(value).split()))
