"""1,000 answers under eight schemas, from a model with random weights and from a trained one: all complete and valid?

Checked here by jsonschema itself, formats included, and by the finish reason: nothing of alambic judges alambic.
ALAMBIC_BENCH_STEPS changes how long the trained one was trained.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

import extract_rows
from run import TINY, data_folder, say

_TOKENS = 256  # an answer may take; several schemas allow far longer ones, so that the engine must come to an end
_BATCH = 25


def _object(**properties: Any) -> dict[str, Any]:
    """Return a closed object; a name that ends in ``_`` is optional."""
    named = {name.rstrip("_"): part for name, part in properties.items()}
    must = [name for name in properties if not name.endswith("_")]
    return {"type": "object", "properties": named, "required": must, "additionalProperties": False}


def _text(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


_DATE = {"type": "string", "format": "date"}
_MONEY = {"type": "number", "minimum": 0, "maximum": 100_000}
_LINE = _object(name=_text(40), quantity={"type": "integer", "minimum": 1, "maximum": 99}, price=_MONEY)
_INTENTS = ("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork",
            "SearchScreeningEvent")  # fmt: skip
_KINDS = ("PERSON", "GPE", "ORGANIZATION", "STREET_ADDRESS", "DATE_TIME", "PHONE_NUMBER", "EMAIL_ADDRESS", "OTHER")
SCHEMAS: dict[str, dict[str, Any]] = {
    "intent": _object(
        intent={"enum": list(_INTENTS)},
        slots={"type": "array", "items": _object(name=_text(30), value=_text(60)), "maxItems": 8},
    ),
    "entities": _object(
        entities={"type": "array", "items": _object(type={"enum": list(_KINDS)}, text=_text(80)), "maxItems": 12}
    ),
    "receipt": _object(company=_text(80), date=_text(20), address=_text(160), total=_text(12)),
    "order": _object(
        buyer=_object(name=_text(40), address=_object(street=_text(60), city=_text(40), postcode_=_text(10))),
        lines={"type": "array", "items": _LINE, "minItems": 1, "maxItems": 10}, paid={"type": "boolean"},
        total={"type": "number", "minimum": 0, "multipleOf": 0.01},
    ),
    "event": _object(
        title=_text(60), on=_DATE, until_={"anyOf": [_DATE, {"type": "null"}]},
        begins={"type": "string", "format": "time"}, seats={"type": ["integer", "null"], "minimum": 1, "maximum": 500},
        tags={"type": "array", "items": {"enum": ["music", "théâtre", "sport", "autre"]}, "uniqueItems": True},
    ),
    "review": _object(
        stars={"type": "integer", "minimum": 1, "maximum": 5}, language={"enum": ["fr", "en", None]},
        score={"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1}, note_={"type": ["string", "null"]},
    ),
    "open": {"type": "object", "properties": {"summary": {"type": "string"},
                                              "keywords": {"type": "array", "items": {"type": "string"}}},
             "required": ["summary", "keywords"]},
    "tree": {"$defs": {"node": _object(name=_text(20), children_={"type": "array", "items": {"$ref": "#/$defs/node"},
                                                                  "maxItems": 3})},
             "$ref": "#/$defs/node"},
}  # fmt: skip


def run(which: str, folder: Path) -> dict[str, Any]:
    """Make the writer `random` or `trained`, pack it in 8 bits, ask it, judge every answer."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import drain
    from alambic.pack.writer_openvino import pack_openvino

    count = 48 if TINY else 1000
    steps = int(os.environ.get("ALAMBIC_BENCH_STEPS", "5" if TINY else "600"))
    rows = _chats(data_folder())
    model, training = _model(which, rows, folder, steps=steps)
    packed = folder / f"json-{which}.int8"
    shutil.rmtree(packed, ignore_errors=True)
    part = drain(pack_openvino(model, packed, precision="int8"))
    writer = load_writer(part, packed, threads=1)
    began = time.perf_counter()
    asked = list(_requests(data_folder(), count))
    replies: list[Any] = []
    for at in range(0, count, _BATCH):
        replies += writer.write([request for _, request in asked[at : at + _BATCH]])
        if at % 100 == 0:
            say(f"  json-{which}: {at + _BATCH} of {count} answers, {time.perf_counter() - began:.0f} s")
    writer.close()
    seconds = time.perf_counter() - began
    tokens = sum(reply.usage.completion_tokens for reply in replies)
    verdicts = [(name, _fault(name, reply)) for (name, _), reply in zip(asked, replies, strict=True)]
    by_schema = {name: [sum(n == name and not f for n, f in verdicts), sum(n == name for n, _ in verdicts)]
                 for name in SCHEMAS}  # fmt: skip
    return {
        **training, "n": count, "good": sum(not fault for _, fault in verdicts), "by_schema": by_schema,
        "faults": [f"{name}: {fault}" for name, fault in verdicts if fault][:20], "seconds": seconds, "tokens": tokens,
        "endings": dict(Counter(reply.finish_reason for reply in replies)),
        "different": len({reply.text for reply in replies}),
    }  # fmt: skip


def _chats(data: Path) -> list[Any]:
    """Return conversations of the three tasks that have answers, each under a system message of its own."""
    from alambic.kinds.chat import Chat
    from alambic.kinds.extract import canonical

    chats = []
    for row in extract_rows.read(data / "snips", "train")[:4000]:
        marked = extract_rows.from_tags(row["tokens"], row["tags"])
        slots = [{"name": label, "value": marked.text[start:end]} for start, end, label in marked.spans]
        chats.append(("intent", marked.text, {"intent": row["label"], "slots": slots[:8]}))
    for row in extract_rows.read(data / "presidio_pii", "train"):
        found = [
            {
                "type": span["type"] if span["type"] in _KINDS else "OTHER",
                "text": row["text"][span["start"] : span["end"]][:80],
            }
            for span in row["spans"][:12]
        ]
        chats.append(("entities", row["text"], {"entities": found}))
    for row in extract_rows.read(data / "sroie", "test")[:400]:
        answer = {
            name: row[name][:most] for name, most in zip(extract_rows.SROIE_FIELDS, (80, 20, 160, 12), strict=True)
        }
        chats.append(("receipt", row["text"][:_CHARACTERS], answer))
    return [Chat.of(text, system=name, completion=canonical(answer)) for name, text, answer in chats]


_CHARACTERS = 600  # of a text; this model reads 1,024 tokens, and what is asked of it here is form, not truth


def _model(which: str, rows: Sequence[Any], folder: Path, *, steps: int) -> tuple[Path, dict[str, Any]]:
    from alambic.events import Progress, drain
    from alambic.model.scratch import make_scratch
    from alambic.train.sft import SftParams, finetune_chats

    base = folder / "json.base"
    if not (base / "config.json").is_file():
        made = make_scratch(rows, base, parameters=1_000_000, context_tokens=1024)
        say(f"  {made}")
    parameters = json.loads((base / "alambic.json").read_text("utf-8"))["parameters"]
    if which == "random":
        return base, {"parameters": parameters, "steps": 0, "loss": None}

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and event.done % 50 == 0:
            say(f"  {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    kept = folder / "json.model.json"
    if kept.exists() and (known := json.loads(kept.read_text("utf-8")))["steps"] == steps:
        return folder / "json.model", known
    params = SftParams(steps=steps, threads=1, seed=0, long="leave_out")
    order = np.random.default_rng(0).permutation(len(rows))
    result = drain(
        finetune_chats(base, [rows[i] for i in order], None, params=params, out=folder / "json.model"), listen
    )
    known = {"parameters": parameters, "steps": steps, "training_seconds": result.seconds}
    kept.write_text(json.dumps(known), "utf-8")
    return folder / "json.model", known


def _requests(data: Path, count: int) -> Iterator[tuple[str, Any]]:
    """Yield the schema's name and the request: texts of four sets in turn, half of the answers drawn."""
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest, Sampling

    texts = [
        [" ".join(row["tokens"]) for row in extract_rows.read(data / "snips", "test")],
        [row["text"] for row in extract_rows.read(data / "presidio_pii", "test")],
        [row["text"][:_CHARACTERS] for row in extract_rows.read(data / "sroie", "test")[400:]],
        [row["summary"][:_CHARACTERS] for row in extract_rows.read(data / "orangesum", "test")],
    ]
    names = list(SCHEMAS)
    for i in range(count):
        turn, name = i // len(names), names[i % len(names)]
        source = texts[turn % len(texts)]
        sampling = Sampling(
            max_tokens=_TOKENS, json_schema=SCHEMAS[name], temperature=float(turn // len(texts) % 2), seed=i
        )
        text = source[i % len(source)]
        yield name, GenerationRequest(chat=Chat.of(text, system=name), sampling=sampling)


def _fault(name: str, reply: Any) -> str:
    """Return what is wrong with an answer, nothing when it is complete and valid."""
    import jsonschema

    if reply.finish_reason != "stop":
        return f"ended by {reply.finish_reason}"
    try:
        value = _exact(reply.text)
    except ValueError as error:
        return f"no JSON: {error}"
    formats = jsonschema.FormatChecker(("date",))
    formats.checkers["time"] = (_is_time, ValueError)  # its own check of times needs one more library
    schema = _exact(json.dumps(SCHEMAS[name]))
    errors = list(jsonschema.Draft202012Validator(schema, format_checker=formats).iter_errors(value))
    return errors[0].message[:200] if errors else ""


def _exact(text: str) -> Any:
    """Read JSON with numbers as they stand: in binary floating point 4.1 is no multiple of 0.01."""
    return json.loads(text, parse_float=Decimal, parse_constant=_refuse)


def _is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.time.fromisoformat(value))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def table(trained: Any, random: Any) -> list[str]:
    """Return the lines of the page."""
    lines = [
        f"Answers under eight schemas ({', '.join(SCHEMAS)}: nested objects, lists, enums, numbers with bounds, dates, "
        f"null, a schema that refers to itself), each asked of real texts in English and French, {_TOKENS} tokens at "
        "most, half of them greedy, half drawn at temperature 1. Good: finish reason `stop`, and jsonschema finds no "
        "fault, formats included, numbers as decimals. The 95 % bound is Clopper and Pearson's.", "",
        "| writer (decoder, int8, openvino-genai) | n | complete and valid | at least [95 %] | different answers | "
        "tokens an answer | tokens/s | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in (("trained", trained), ("random weights", random)):
        if found is None:
            lines.append(f"| {name} | not run | | | | | | 100 % |")
            continue
        n, good = found["n"], found["good"]
        made = f"{found['parameters']:,} parameters" + (f", {found['steps']} steps" if found["steps"] else "")
        lines.append(
            f"| {name} ({made}) | {n:,} | {100 * good / n:.1f} % | {100 * _lowest(good, n):.2f} % | "
            f"{found['different']:,} | {found['tokens'] / n:.0f} | {found['tokens'] / found['seconds']:.0f} | 100 % |"
        )
    faults = [fault for found in (trained, random) if found is not None for fault in found["faults"]]
    lines += ["", *[f"- {fault}" for fault in faults[:10]]] if faults else []
    lines += ["", "The trained writer learnt `intent`, `entities` and `receipt`; the other five schemas it never saw."]
    return lines


def _lowest(good: int, n: int) -> float:
    from scipy.stats import beta

    return float(beta.ppf(0.025, good, n - good + 1)) if good else 0.0
