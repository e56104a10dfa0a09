"""What `alambic bases` prints: the table of the catalogue, the page of one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from alambic import _extras
from alambic.cli.table import text_table
from alambic.model.bases import resolve
from alambic.model.catalogue import (
    KINDS,
    SCRATCH,
    CatalogueEntry,
    RemoteEntry,
    catalogue,
    fitting,
    free_memory_bytes,
    how_to_install,
    packaged,
    remotes,
)
from alambic.model.catalogue_size import CACHED_TOKENS, Memory, memory_of, shape_of

_MAY = {"yes": "yes", "same-licence": "yes, under the same licence", "no": "no"}


def listing(entries: Sequence[CatalogueEntry], far: Sequence[RemoteEntry], free: int | None) -> list[dict[str, Any]]:
    """Return the list for JSON; `fits` is the highest precision that runs in `free` bytes."""
    near = [{**entry.to_dict(), "fits": None if free is None else fitting(entry, free)} for entry in entries]
    return [*near, *(entry.to_dict() for entry in far)]


def table(entries: Sequence[CatalogueEntry], far: Sequence[RemoteEntry], free: int | None) -> str:
    """Write the list for people: one table of bases, one of remote models."""
    parts = []
    if entries:
        header = ["name", "kind", "parameters", "tokens", "languages", "licence", "fp16 GB", "int8 GB", "int4 GB",
                  "MB/1000 tokens", "fits"]  # fmt: skip
        parts.append(text_table(header, [_row(entry, free) for entry in entries]))
    if far:
        header = ["remote", "api", "tokens", "$/M read", "$/M written", "key in"]
        parts.append(text_table(header, [_remote_row(entry) for entry in far]))
    return "\n\n".join(parts) or "nothing fits these wishes"


def legend(free: int | None) -> str:
    """Say what the columns mean."""
    here = "" if free is None else f"; fits: the highest precision that runs in {_gigabytes(free)} GB"
    return (
        f"GB of weights, MB of cache (fp16) for 1,000 tokens{here}\n"
        f"with the engine and a cache of {CACHED_TOKENS:,} tokens; all facts of one: alambic bases show NAME"
    )


def facts_of(name: str) -> dict[str, Any]:
    """Gather what is known of `name`, and what is found of it on this machine.

    Raises:
        BaseModelError: the name is unknown, or what is here is damaged.
    """
    if name == SCRATCH:
        return {"name": SCRATCH, "kind": "decoder", "summary": "a model made from nothing on the task's own text: "
                "[base] name = \"scratch\"; its size and vocabulary are the task's"}  # fmt: skip
    if name in remotes():
        return remotes()[name].to_dict()
    entry = catalogue().get(name)
    known = {} if entry is None else entry.to_dict()
    if entry is not None and not _is_here(entry):
        return {**known, **_fit(entry.memory, entry.context_tokens), "cached": None}
    return {**known, **_found(name)}


def pulled(name: str, outcome: Any) -> dict[str, Any]:
    """Describe what a pull brought: the base, checked, when it is whole."""
    record = {"name": name, "folder": str(outcome.folder), "commit": outcome.commit, "files": list(outcome.files),
              "fetched_bytes": outcome.fetched_bytes}  # fmt: skip
    entry = catalogue().get(name)
    if entry is not None:
        record |= {"licence": entry.licence, "obliges": entry.obliges}
    return record


def hash_of(text: str) -> tuple[str, str]:
    """Read ``HEX`` (of model.safetensors) or ``FILE=HEX``."""
    file, found, digest = text.rpartition("=")
    return (file, digest) if found else ("model.safetensors", text)


def page(facts: Mapping[str, Any]) -> str:
    """Write facts for people, one a line."""
    rows = [(title, line) for title, key, write in _LINES if (line := write(facts, facts.get(key)))]
    return "\n".join(f"{click.style(title.ljust(11), dim=True)} {line}" for title, line in rows)


def _row(entry: CatalogueEntry, free: int | None) -> list[str]:
    memory = entry.memory
    sizes = ["-"] * 4
    if memory is not None:
        cache = "-" if not memory.kv_token else f"{memory.kv_token / 1000:,.0f}"
        sizes = [*(_gigabytes(getattr(memory, p)) for p in ("fp16", "int8", "int4")), cache]
    return [
        entry.name,
        entry.kind,
        _millions(entry.parameters),
        f"{entry.context_tokens:,}" if entry.context_tokens else "-",
        _some(entry.languages),
        entry.licence + (" (gated)" if entry.gated else ""),
        *sizes,
        "?" if free is None else fitting(entry, free) or "no",
    ]


def _remote_row(entry: RemoteEntry) -> list[str]:
    return [
        entry.name + (f" (retired {entry.retired})" if entry.retired else ""),
        entry.api,
        f"{entry.context_tokens:,}" if entry.context_tokens else "-",
        "-" if entry.price_in is None else f"{entry.price_in:.2f}",
        "-" if entry.price_out is None else f"{entry.price_out:.2f}",
        entry.key_env or "-",
    ]


def _is_here(entry: CatalogueEntry) -> bool:
    if packaged(entry) is not None:
        return True
    if entry.hub is None or not _extras.available("huggingface_hub"):
        return False
    from alambic.model import hub

    return hub.find_cached(entry.hub, revision=entry.revision) is not None


def _found(name: str) -> dict[str, Any]:
    """Check what is on this machine under `name` and describe it."""
    from alambic.model.bases import read_json

    base = resolve(name, offline=True, kinds=KINDS)
    shape = shape_of(read_json(base.folder / "config.json"))
    memory = None if shape is None else memory_of(base.parameters, shape)
    facts = {
        **base.to_dict(),
        "kind": base.kind,
        "architecture": base.architecture,
        "parameters": base.parameters,
        "context_tokens": base.context_tokens,
        "max_tokens": base.max_tokens,
        "languages": list(base.languages),
        "chat_template": base.has_template,
        "folder": str(base.folder),
        "cached": str(base.folder),
        "weight_bytes": sum(path.stat().st_size for path in Path(base.folder).glob("model*.safetensors")),
        **({"pooling": base.pooling} if base.kind == "encoder" else {}),
        **_fit(memory, base.context_tokens),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _fit(memory: Memory | None, context_tokens: int | None) -> dict[str, Any]:
    if memory is None:
        return {}
    free = free_memory_bytes()
    tokens = min(context_tokens or CACHED_TOKENS, CACHED_TOKENS)
    fits = None if free is None else next(
        (p for p in ("fp16", "int8", "int4") if memory.needed(p, tokens) <= free), "no"
    )  # fmt: skip
    sizes = {"fp16": memory.fp16, "int8": memory.int8, "int4": memory.int4}
    facts = {"memory_bytes": sizes, "cache_bytes_per_1000_tokens": 1000 * memory.kv_token}
    return {**facts, **({} if free is None else {"fits": fits, "free_bytes": free})}


def _gigabytes(value: int) -> str:
    gigabytes = value / 1e9
    return f"{gigabytes:.2f}" if gigabytes < 10 else f"{gigabytes:.1f}"


def _millions(value: int) -> str:
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.0f} M"


def _some(languages: Sequence[str]) -> str:
    if "multilingual" in languages:
        return " ".join(languages[:3]) + " +many"
    return " ".join(languages[:4]) + (f" +{len(languages) - 4}" if len(languages) > 4 else "")


def _architecture(facts: Mapping[str, Any], kind: Any) -> str:
    return f"{kind} ({facts['architecture']})" if facts.get("architecture") else str(kind or "")


def _size(facts: Mapping[str, Any], parameters: Any) -> str:
    if not parameters:
        return ""
    shape = facts.get("shape")
    if not shape:
        return f"{parameters:,} parameters"
    layers = f"{shape['layers']} + {shape['decoder_layers']}" if shape.get("decoder_layers") else str(shape["layers"])
    groups = f" ({shape['kv_heads']} of keys and values)" if 0 < shape["kv_heads"] < shape["heads"] else ""
    return (
        f"{parameters:,} parameters: {layers} layers of {shape['hidden']:,}, {shape['heads']} heads{groups} of "
        f"{shape['head_dim']}, vocabulary {shape['vocabulary']:,}"
    )


def _memory(facts: Mapping[str, Any], sizes: Any) -> str:
    if not sizes:
        return ""
    line = ", ".join(f"{precision} {_gigabytes(value)} GB" for precision, value in sizes.items())
    cache = facts.get("cache_bytes_per_1000_tokens")
    return line + (f"; cache of 1,000 tokens {cache / 1e6:,.0f} MB (fp16; half of it as u8)" if cache else "")


def _fits(facts: Mapping[str, Any], fits: Any) -> str:
    return f"{fits} ({_gigabytes(facts['free_bytes'])} GB free)" if fits and "free_bytes" in facts else ""


def _download(facts: Mapping[str, Any], size: Any) -> str:
    if not size:
        return ""
    files = facts.get("weight_files")
    parts = f", {files} weight file{'s' if files > 1 else ''}" if files else ""
    return f"{_gigabytes(size)} GB{' (estimated)' if facts.get('estimated') else ''}{parts}"


def _hub(facts: Mapping[str, Any], hub_id: Any) -> str:
    return f"https://huggingface.co/{hub_id} at {facts.get('revision', 'main')}" if hub_id else ""


def _cached(facts: Mapping[str, Any], cached: Any) -> str:
    if "cached" not in facts:
        return ""
    if cached:
        return str(cached)
    how = f"alambic bases pull {facts['name']}" if facts.get("hub") else how_to_install(catalogue()[facts["name"]])
    return f"no ({how})"


def _prices(facts: Mapping[str, Any], price: Any) -> str:
    if price is None:
        return ""
    day = f", read on {facts['priced']}" if facts.get("priced") else ""
    return f"${price:.2f} a million tokens read, ${facts['price_out']:.2f} written{day}"


def _plain(facts: Mapping[str, Any], value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _count(facts: Mapping[str, Any], value: Any) -> str:
    return f"{value:,} tokens" if value else ""


_LINES = (
    ("name", "name", _plain), ("what", "summary", _plain), ("kind", "kind", _architecture),
    ("size", "parameters", _size), ("reads", "context_tokens", _count), ("writes", "max_output_tokens", _count),
    ("languages", "languages", _plain),
    ("template", "chat_template", lambda _, value: {True: "yes", False: "no"}.get(value, "")),
    ("licence", "licence", _plain), ("obliges", "obliges", _plain),
    ("pass on", "redistribute", lambda _, value: f"fine-tuned weights: {_MAY[value]}" if value else ""),
    ("gated", "gated", lambda _, value: "yes: accept the licence on its page, then set HF_TOKEN" if value else ""),
    ("published", "year", _plain), ("hub", "hub", _hub), ("download", "bytes", _download),
    ("memory", "memory_bytes", _memory), ("fits here", "fits", _fits), ("api", "api", _plain), ("url", "url", _plain),
    ("model", "model", _plain), ("key in", "key_env", _plain), ("price", "price_in", _prices),
    ("retired", "retired", _plain), ("source", "source", _plain), ("digest", "digest", _plain),
    ("commit", "commit", _plain), ("files", "files", _plain), ("folder", "folder", _plain),
    ("fetched", "fetched_bytes", lambda _, value: "" if value is None else f"{value / 1e6:,.1f} MB"),
    ("pooling", "pooling", _plain), ("cached", "cached", _cached),
)  # fmt: skip
