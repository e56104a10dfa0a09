"""The catalogue of bases: facts of known models, read from bases.toml, and what follows from them by computation.

Nothing here opens a connection or a weight file; `alambic.model.bases` finds a base, `alambic.model.hub` fetches one.
"""

from __future__ import annotations

import importlib.util
import os
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from alambic.errors import BaseModelError, nearest
from alambic.model.catalogue_size import CACHED_TOKENS, Memory, Shape, memory_of, stored_bytes

Kind = Literal["encoder", "decoder", "seq2seq"]
KINDS: tuple[Kind, ...] = ("encoder", "decoder", "seq2seq")
OURS = "alambic-bases"  # the package of bases made by alambic itself
SCRATCH = "scratch"  # a reserved name: a model made from nothing, on the task's own text
# What a licence says of weights that were fine-tuned: pass them on, pass them on under the same terms, or not at all.
Redistribute = Literal["yes", "same-licence", "no"]


@dataclass(frozen=True)
class CatalogueEntry:
    """One `[[base]]` of bases.toml; what is not known is None.

    Attributes:
        name: what a task writes.
        package: installed package that holds the files, if there is one.
        folder: folder of that package.
        hub: Hub id; None: it comes with `package` alone.
        sha256: of model.safetensors, wherever it comes from.
        licence: SPDX identifier, or the licence's own name.
        languages: ISO 639-1 codes; ``multilingual`` beside them when there are many more.
        max_tokens: longest input an encoder reads by default; None: the base says.
        summary: what it is and what it is good at.
        kind: encoder, decoder (writes on) or seq2seq (reads a text, writes another).
        architecture: `model_type` of its config.json.
        revision: commit, tag or branch on the Hub.
        parameters: as published.
        shape: what its size follows from.
        context_tokens: most tokens it was made to read and write together.
        obliges: what the licence asks of you, in one line.
        gated: the Hub asks you to accept the licence first.
        redistribute: whether fine-tuned weights may be passed on.
        year: of publication.
        stored: type of the published weights.
        bytes: of everything that `pull` fetches; None: only the estimate from `parameters` and `stored` is known.
        weight_files: number of safetensors files.
        checked: ``source``: read at the publisher's; ``memory``: not read again.
    """

    name: str
    package: str | None
    folder: str | None
    hub: str | None
    sha256: str | None
    licence: str
    languages: tuple[str, ...]
    max_tokens: int | None
    summary: str
    kind: Kind = "encoder"
    architecture: str = "bert"
    revision: str = "main"
    parameters: int = 0
    shape: Shape | None = None
    context_tokens: int | None = None
    obliges: str = ""
    gated: bool = False
    redistribute: Redistribute = "yes"
    year: int | None = None
    stored: str = "fp32"
    bytes: int | None = None
    weight_files: int | None = None
    checked: Literal["source", "memory"] = "memory"

    @property
    def memory(self) -> Memory | None:
        """What its weights and cache take; None when the shape is not known."""
        return None if self.shape is None else memory_of(self.parameters, self.shape)

    @property
    def download_bytes(self) -> int:
        """Bytes to fetch: as read at the source, or estimated from the weights."""
        return self.bytes if self.bytes is not None else stored_bytes(self.parameters, self.stored)

    def to_dict(self) -> dict[str, Any]:
        """Return every known fact, ready for JSON, with the computed sizes."""
        facts = {k: v for k, v in asdict(self).items() if k != "checked" and v is not None and v != ""}
        facts["languages"] = list(self.languages)
        facts |= {"bytes": self.download_bytes, "estimated": self.bytes is None}
        memory = self.memory
        if memory is not None:
            facts["memory_bytes"] = {"fp16": memory.fp16, "int8": memory.int8, "int4": memory.int4}
            facts["cache_bytes_per_1000_tokens"] = 1000 * memory.kv_token
        return facts


@dataclass(frozen=True)
class RemoteEntry:
    """One `[[remote]]` of bases.toml: a model behind an address, to compare with, to judge, or to teach.

    Attributes:
        name: what a command or a task writes.
        api: ``openai`` (any compatible server) or ``anthropic``.
        url: base address; None: the user gives one.
        model: name that the endpoint knows; None: the user gives one.
        key_env: environment variable that holds the key.
        context_tokens: most tokens it reads and writes together.
        max_output_tokens: most tokens it writes.
        price_in: US dollars a million tokens read.
        price_out: US dollars a million tokens written.
        sampling: it takes temperature, top_p and top_k.
        body: fields to add to each request.
        retired: day since which the publisher answers no more (ISO 8601).
        summary: what it is.
        year: of publication.
        priced: day on which the prices were read.
        checked: as of `CatalogueEntry`.
    """

    name: str
    api: Literal["openai", "anthropic"]
    summary: str
    url: str | None = None
    model: str | None = None
    key_env: str | None = None
    context_tokens: int | None = None
    max_output_tokens: int | None = None
    price_in: float | None = None
    price_out: float | None = None
    sampling: bool = True
    body: dict[str, Any] = field(default_factory=dict)
    retired: str | None = None
    year: int | None = None
    priced: str | None = None
    licence: str = "terms of service of the provider"
    checked: Literal["source", "memory"] = "memory"

    def to_dict(self) -> dict[str, Any]:
        """Return every known fact, ready for JSON."""
        facts = {k: v for k, v in asdict(self).items() if k != "checked" and v is not None and v != {}}
        return {**facts, "kind": "remote"}


@cache
def catalogue() -> dict[str, CatalogueEntry]:
    """Return the known bases by name."""
    return {row["name"]: _entry(row) for row in _file()["base"]}


@cache
def remotes() -> dict[str, RemoteEntry]:
    """Return the known remote models by name."""
    return {row["name"]: RemoteEntry(**row) for row in _file()["remote"]}


def find_remote(name: str) -> RemoteEntry:
    """Return the remote model `name`.

    Raises:
        BaseModelError: there is none of that name.
    """
    if name not in remotes():
        raise BaseModelError(f"no remote model {name!r}", hint=nearest(name, remotes()))
    return remotes()[name]


def packaged(entry: CatalogueEntry) -> Path | None:
    """Return the folder of `entry` in the installed package that ships it, None when it is not there.

    The package is found without being imported; an older release of it may lack the folder.
    """
    if entry.package is None or entry.folder is None:
        return None
    found = importlib.util.find_spec(entry.package)
    if found is None or not found.submodule_search_locations:
        return None
    folders = (Path(place) / entry.folder for place in found.submodule_search_locations)
    return next((folder for folder in folders if folder.is_dir()), None)


def how_to_install(entry: CatalogueEntry) -> str:
    """Return the command that brings the package of `entry`."""
    name = str(entry.package).replace("_", "-")
    return f"pip install {name}" + (" (in a clone of alambic: pip install ./bases)" if name == OURS else "")


def select(
    entries: Iterable[CatalogueEntry],
    *,
    kind: str | None = None,
    language: str | None = None,
    licence: str | None = None,
    fits_bytes: int | None = None,
) -> list[CatalogueEntry]:
    """Return the entries that satisfy all that is given.

    Args:
        entries: to choose from.
        kind: one of `KINDS`.
        language: code such as ``fr``; models of very many languages always count.
        licence: part of the licence's name, in any case.
        fits_bytes: memory; kept is what runs in it at int4 or better.
    """
    return [
        entry
        for entry in entries
        if (kind is None or entry.kind == kind)
        and (language is None or {language, "multilingual"} & set(entry.languages))
        and (licence is None or licence.lower() in entry.licence.lower())
        and (fits_bytes is None or fitting(entry, fits_bytes) is not None)
    ]


def fitting(entry: CatalogueEntry, free_bytes: int) -> str | None:
    """Return the highest precision at which `entry` runs in `free_bytes`, None when there is none.

    Counted are the weights, a cache of 4,096 tokens (or the whole context when it is shorter) and the engine.
    """
    memory = entry.memory
    if memory is None:
        return None
    tokens = min(entry.context_tokens or CACHED_TOKENS, CACHED_TOKENS)
    return next((p for p in ("fp16", "int8", "int4") if memory.needed(p, tokens) <= free_bytes), None)


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that a new process may take now: what the system has, cut by a container's limit.

    Linux tells what is available; elsewhere it is the whole memory of the machine. None when nothing tells.

    Args:
        root: where `/proc` and `/sys` are.
    """
    available = _field(root / "proc/meminfo", "MemAvailable:", unit=1024) or None
    group = root / "sys/fs/cgroup"
    limit = _number(group / "memory.max")
    if limit is not None:
        # Cached files count as used, yet give way to any process that asks.
        used = (_number(group / "memory.current") or 0) - _field(group / "memory.stat", "inactive_file", unit=1)
        left = max(limit - max(used, 0), 0)
        return left if available is None else min(left, available)
    if available is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available


def _field(path: Path, name: str, *, unit: int) -> int:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(words[1]) * unit for words in map(str.split, lines) if words[:1] == [name]), 0)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _file() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("bases.toml").read_text(encoding="utf-8"))


def _entry(row: dict[str, Any]) -> CatalogueEntry:
    absent = dict.fromkeys(("package", "folder", "hub", "sha256", "max_tokens"))
    shape = Shape(**row["shape"]) if "shape" in row else None
    return CatalogueEntry(**{**absent, **row, "languages": tuple(row["languages"]), "shape": shape})
