"""Structured answers: JSON by a schema, tool calls, shell commands, SQL, personal data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from instructions.frame import Frame
from instructions.grammar import pick
from instructions.grounded import Invented
from instructions.row import Row, talk
from instructions.sources import SOURCES, Library


def documents(frame: Frame, count: int) -> Iterator[Row]:
    """`count` invented documents read into JSON; fields that the text lacks are null where the instruction says so."""
    for _ in range(count):
        document = Invented(frame)
        held = frame.rng.sample(document.held, frame.rng.randint(1, min(4, len(document.held))))
        absent: list[str] = []
        if document.absent and frame.rng.random() < 0.35:
            absent = [pick(frame.rng, document.absent)]
        names = [*held, *absent]
        frame.rng.shuffle(names)
        values = {name: document.values[name] if name in held else None for name in names}
        asked = frame.ask("json", text=document.text, schema=_schema(frame, names))
        asked += "\n" + frame.one("json_null").strip() if absent or frame.rng.random() < 0.15 else ""
        yield frame.row("json", asked, _json(values), group=f"own:{document.sentences[0]}")


def _schema(frame: Frame, names: list[str]) -> str:
    """Write the fields as JSON Schema, as an object of types, or as names."""
    draw = frame.rng.random()
    if draw < 0.3:
        properties = {name: {"type": "string"} for name in names}
        return _json({"type": "object", "properties": properties, "required": names})
    if draw < 0.7:
        return _json(dict.fromkeys(names, "string"))
    return ", ".join(names)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def slots(frame: Frame, library: Library, name: str, count: int) -> Iterator[Row]:
    """`count` utterances of a set with slots read into JSON."""
    rows = library.rows(name)
    frame.rng.shuffle(rows)
    kinds = {row["label"]: set[str]() for row in rows}
    read = [(row, _slots(row)) for row in rows]
    for row, found in read:
        kinds[row["label"]].update(found)
    made = 0
    for row, found in read:
        if made == count or not found:
            continue
        others = sorted(kinds[row["label"]] - set(found))
        absent = [pick(frame.rng, others)] if others and frame.rng.random() < 0.25 else []
        names = [*found, *absent]
        frame.rng.shuffle(names)
        asked = frame.ask("json", text=" ".join(row["text"].split()), schema=_schema(frame, names))
        asked += "\n" + frame.one("json_null").strip() if absent or frame.rng.random() < 0.15 else ""
        made += 1
        told = _json({key: found.get(key) for key in names})
        yield frame.row("json", asked, told).by(name, SOURCES[name].licence, group=f"{name}:{row['text'][:60]}")


def _slots(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the slots of a row: given as they are, or as BIO tags on its tokens."""
    if "slots" in row:
        return dict(row["slots"])
    if "entities" in row:
        return {entity["type"]: entity["value"] for entity in row["entities"] or []}
    found: dict[str, Any] = {}
    for token, tag in zip(row.get("tokens", ()), row["tags"] if "tokens" in row else (), strict=True):
        kind = tag[2:]
        if tag.startswith("B-") and kind not in found:
            found[kind] = token
        elif tag.startswith("I-") and kind in found:
            found[kind] += f" {token}"
    return found


def home(frame: Frame, library: Library, name: str, *, copies: int) -> Iterator[Row]:
    """Voice commands of the home as calls of one of two or three tools, each `copies` times beside others."""
    rows = library.rows(name)
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        types = kinds.setdefault(row["label"], {})
        types.update({key: _type(value) for key, value in row["slots"].items()})
    for row in [row for row in rows for _ in range(copies)]:
        others = [label for label in kinds if label != row["label"]]
        offered = [row["label"], *frame.rng.sample(others, min(len(others), frame.rng.randint(1, 2)))]
        frame.rng.shuffle(offered)
        tools = tuple(
            _tool(label, "", {key: {"type": kind} for key, kind in kinds[label].items()}, []) for label in offered
        )
        messages = _called(row["text"], row["label"], row["slots"])
        yield Row(messages, "tool", frame.language, name, SOURCES[name].licence, tools, group=f"{name}:{row['text']}")


def _type(value: Any) -> str:
    return "integer" if isinstance(value, int) else "number" if isinstance(value, float) else "string"


def _tool(name: str, description: str, properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = {"type": "object", "properties": dict(properties)}
    if required:
        function["parameters"]["required"] = required
    return {"type": "function", "function": function}


def _called(asked: str, name: str, arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    function = {"name": name, "arguments": _json(dict(arguments))}
    call = {"id": "call_1", "type": "function", "function": function}
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": "", "tool_calls": [call]})


def tools(frame: Frame, count: int) -> Iterator[Row]:
    """`count` requests with tools at hand: called, called and told, or no tool that serves."""
    written = frame.text["tools"]
    seen: set[str] = set()
    while len(seen) < count:
        spec = pick(frame.rng, written)
        offered = [spec, *frame.rng.sample([t for t in written if t is not spec], frame.rng.randint(0, 2))]
        frame.rng.shuffle(offered)
        shown = tuple(_of(t) for t in offered)
        row = _request(frame, spec, shown)
        if row.digest not in seen:
            seen.add(row.digest)
            yield row


def _of(spec: Mapping[str, Any]) -> dict[str, Any]:
    properties = {name: {k: v for k, v in one.items() if k != "value"} for name, one in spec["arguments"].items()}
    return _tool(spec["name"], spec["description"], properties, list(properties))


def _request(frame: Frame, spec: Mapping[str, Any], shown: tuple[dict[str, Any], ...]) -> Row:
    draw = frame.rng.random()
    values = {name: frame.fill(one["value"]) for name, one in spec["arguments"].items()}
    asked = frame.fill(pick(frame.rng, spec["requests"]), values)
    if draw < 0.15:  # nothing at hand serves
        others = tuple(tool for tool in shown if tool["function"]["name"] != spec["name"])
        if others and draw < 0.08:
            shown = others
        else:
            asked = frame.fill(pick(frame.rng, frame.text["other_requests"]["list"]))
        return Row(talk(asked, frame.text["no_tool"]["list"][0]), "tool", frame.language, tools=shown)
    typed = {
        name: int(value) if spec["arguments"][name]["type"] in ("integer", "number") else value
        for name, value in values.items()
    }
    messages = _called(asked, spec["name"], typed)
    if draw < 0.7:
        return Row(messages, "tool", frame.language, tools=shown)
    result = frame.fill(spec["result"])
    told = spec["told"]
    known = values | {key: str(value) for key, value in json.loads(result).items()}
    for key, value in known.items():
        told = told.replace("{" + key + "}", value)
    answer = {"role": "tool", "tool_call_id": "call_1", "name": spec["name"], "content": result}
    whole = (*messages, answer, {"role": "assistant", "content": told})
    return Row(whole, "tool", frame.language, tools=shown)


def commands(frame: Frame, library: Library, count: int) -> Iterator[Row]:
    """`count` shell commands, and one explanation for every five of them."""
    rows = library.rows("nl2bash")
    frame.rng.shuffle(rows)
    for number, row in enumerate(rows[:count]):
        text, command = " ".join(row["text"].split()), row["command"].strip()
        explained = number % 5 == 4
        asked = frame.ask("explain", text=command) if explained else frame.ask("command", text=text)
        found = frame.row("command", asked, text if explained else command)
        yield found.by("nl2bash", SOURCES["nl2bash"].licence, group=f"nl2bash:{command}")


def queries(frame: Frame, library: Library, count: int) -> Iterator[Row]:
    """`count` questions to one table as SQL."""
    rows = library.rows("wikisql")
    frame.rng.shuffle(rows)
    for row in rows[:count]:
        asked = frame.ask("sql", text=row["question"], schema=", ".join(row["columns"]))
        found = frame.row("sql", asked, row["sql"])
        yield found.by("wikisql", SOURCES["wikisql"].licence, group=f"wikisql:{row['table_id']}")


def personal(frame: Frame, library: Library) -> Iterator[Row]:
    """Personal data masked, and listed by type."""
    for row in library.rows("presidio_pii"):
        spans = sorted(row["spans"], key=lambda span: span["start"])
        masked, found, end = "", dict[str, list[str]](), 0
        for span in spans:
            masked += row["text"][end : span["start"]] + f"[{span['type']}]"
            found.setdefault(span["type"], []).append(row["text"][span["start"] : span["end"]])
            end = span["end"]
        masked += row["text"][end:]
        about = {"group": f"presidio:{row['template_id']}"}
        licence = SOURCES["presidio_pii"].licence
        yield frame.row("anonymise", frame.ask("anonymise", text=row["text"]), masked).by(
            "presidio_pii", licence, **about
        )
        yield frame.row("json", frame.ask("personal", text=row["text"]), _json(found)).by(
            "presidio_pii", licence, **about
        )
