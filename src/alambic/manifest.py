"""What a bundle's `bundle.json` says, and how it is read without trusting it.

A manifest is checked before any other file of the bundle is touched: its format, its shape (unknown keys are errors),
its paths (relative, inside the bundle) and its seal, the SHA-256 of the canonical JSON of everything else in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alambic.errors import BundleError
from alambic.kinds.cascade import Cascade
from alambic.kinds.decision import Decision
from alambic.kinds.remote_stage import RemoteStage

# 2: models that write; 3: adapters and drafts beside them; 4: classifiers that abstain, which an older program would
# let answer everything; 5: chains of classifiers, of which it would ask the last alone; 6: models that give scores and
# vectors; 7: a remote that may be asked last. Bundles of older formats read the same.
FORMAT = 7
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 64_000_000  # a real one is under 1 MB; a stranger's file must not fill the memory

_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\\:*?"<>|]')


@dataclass(frozen=True)
class PartSpec:
    """One part of a bundle.

    Attributes:
        name: unique in the bundle.
        engine: a name in `alambic.engines.PARTS`.
        folder: folder of its files, relative to the bundle, with forward slashes.
        params: what the engine needs besides its files; JSON values only.
        after: the part whose output this one takes; None when it takes texts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    engine: str
    folder: str
    params: dict[str, Any] = field(default_factory=dict)
    after: str | None = None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Record):
    """Checksum and size of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, in hexadecimal")
    bytes: int = Field(ge=0, description="size of the file")


class Golden(_Record):
    """One sample of the round-trip proof, kept so that `verify` can run it again elsewhere."""

    text: str = Field(description="the input")
    ids: tuple[int, ...] = Field(description="token ids the model saw, before windows are cut")
    probabilities: tuple[float, ...] = Field(description="probability of each label on the machine that built it")


class WriterSpec(_Record):
    """How a bundle that writes is asked, with the settings that its scores were measured with.

    The chat template and the end tokens belong to the model: they are in the part's folder and parameters.
    """

    prompt: str | None = Field(default=None, description="user message for a text; {text} stands for it")
    system: str | None = Field(default=None, description="system message of conversations that bring none")
    sampling: dict[str, Any] = Field(default_factory=dict, description="default sampling of this task")
    json_schema: dict[str, Any] | None = Field(default=None, description="JSON Schema that every answer follows")
    adapter: str | None = Field(default=None, description="part that is the LoRA adapter of the entry, its base")
    draft: str | None = Field(default=None, description="part that guesses tokens which the entry checks")


class GoldenChat(_Record):
    """A conversation of the round-trip proof: what was read on the machine that built the bundle."""

    chat: dict[str, Any] = Field(description="OpenAI messages and tools")
    ids: tuple[int, ...] = Field(description="token ids of the prompt, the task's system message included")


class Manifest(_Record):
    """Everything a bundle says about itself; see DESIGN, "Provenance"."""

    format: int = Field(default=FORMAT, ge=1, description="version of the bundle format")
    alambic: str = Field(description="version of alambic that sealed it")
    name: str = Field(min_length=1, description="name of the task")
    kind: Literal["classify", "generate", "chat", "extract"] = Field(default="classify", description="kind of task")
    created: str = Field(description="ISO 8601 date and time")
    labels: tuple[str, ...] = Field(
        default=(), description="classify: labels, in the order of the probabilities; empty for kinds that write"
    )
    multi_label: bool = Field(default=False, description="several labels per text")
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="multi-label: probability from which a label is given"
    )
    long: Literal["windows", "head", "head_tail", "error"] = Field(
        default="windows", description="what to do with a text longer than the model reads"
    )
    entry: str = Field(description="name of the part whose output is the answer")
    parts: tuple[PartSpec, ...] = Field(min_length=1, description="parts, each after the one it takes its input from")
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="logits are multiplied by it")
    decision: Decision | None = Field(
        default=None, description="classify: when it abstains, and its label sets; None answers everything"
    )
    cascade: Cascade | None = Field(
        default=None, description="classify: models asked in turn, the entry last; None where one answers alone"
    )
    remote: RemoteStage | None = Field(
        default=None, description="classify: endpoint for what is abstained from, asked only where the caller says so"
    )
    task: dict[str, Any] = Field(default_factory=dict, description="source and digest of the task file")
    candidate: str = Field(default="", description="name of the candidate chosen")
    base: dict[str, Any] | None = Field(default=None, description="base model: name, digest, licence, source")
    data: dict[str, Any] = Field(default_factory=dict, description="digest and rows of each part of the data, licence")
    scores: dict[str, Any] = Field(default_factory=dict, description="scores on dev and test")
    machine: dict[str, Any] = Field(default_factory=dict, description="machine that measured it")
    versions: dict[str, Any] = Field(default_factory=dict, description="libraries that made it")
    seed: int = Field(default=0, description="seed of the build")
    licences: dict[str, Any] = Field(default_factory=dict, description="licences of the bundle, the base and the data")
    golden: tuple[Golden, ...] = Field(default=(), description="round-trip samples")
    writer: WriterSpec | None = Field(default=None, description="kinds that write: how the model is asked")
    golden_chats: tuple[GoldenChat, ...] = Field(default=(), description="round-trip samples of kinds that write")
    files: dict[str, FileEntry] = Field(default_factory=dict, description="every file but bundle.json")
    seal: str = Field(default="", description="SHA-256 of the canonical JSON of the manifest without this key")

    def part(self, name: str) -> PartSpec:
        """Return the part called `name`."""
        return next(part for part in self.parts if part.name == name)

    def part_digest(self, part: PartSpec) -> str:
        """Return the SHA-256 (hex) over engine, parameters and files of `part`: two bundles with one share the part."""
        prefix = part.folder + "/"
        files = {name.removeprefix(prefix): e.sha256 for name, e in self.files.items() if name.startswith(prefix)}
        return hashlib.sha256(canonical({"engine": part.engine, "params": part.params, "files": files})).hexdigest()

    def chain(self, entry: str | None = None) -> list[PartSpec]:
        """Return the parts from the one that takes texts to `entry`, the bundle's own when None."""
        parts = [self.part(entry or self.entry)]
        while parts[0].after is not None:
            parts.insert(0, self.part(parts[0].after))
        return parts


def canonical(data: dict[str, Any]) -> bytes:
    """Return the canonical JSON of `data` without its seal: sorted keys, no spaces, ASCII."""
    body = {key: value for key, value in data.items() if key != "seal"}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal_of(data: dict[str, Any]) -> str:
    """Return the seal that belongs to the manifest `data`."""
    return hashlib.sha256(canonical(data)).hexdigest()


def parse_manifest(raw: bytes, where: Path) -> Manifest:
    """Read and check a manifest.

    Args:
        raw: content of `bundle.json`.
        where: the file or bundle, for messages.

    Raises:
        BundleError: it is not JSON, too new, of the wrong shape, unsafe, or its seal does not fit.
    """
    data = _parse_json(raw, where)
    _check_format(data, where)
    try:
        manifest = Manifest.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "(whole file)"
        raise BundleError(f"{where}: {place}: {first['msg']}", hint=_DAMAGED) from error
    if manifest.seal != seal_of(data):
        raise BundleError(
            f"{where}: the seal does not fit the manifest; {MANIFEST} was changed after it was sealed", hint=_DAMAGED
        )
    check_structure(manifest, where)
    return manifest


_DAMAGED = "the bundle is damaged or was edited: fetch it again, or build it again"


def _parse_json(raw: bytes, where: Path) -> dict[str, Any]:
    try:
        data = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not a manifest: {error}", hint=_DAMAGED) from error
    if not isinstance(data, dict):
        raise BundleError(f"{where}: not a manifest: got a JSON {type(data).__name__}, not an object", hint=_DAMAGED)
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed in a manifest")


def _check_format(data: dict[str, Any], where: Path) -> None:
    number = data.get("format")
    if not isinstance(number, int) or isinstance(number, bool):
        raise BundleError(f"{where}: 'format' is {number!r}, not a number: this is no alambic bundle", hint=_DAMAGED)
    if number > FORMAT:
        version = str(data.get("alambic", ""))
        # The version comes from the file: it is repeated in a command to type, so only a plain version is.
        needed = f">={version}" if re.fullmatch(r"\d+(\.\w+){0,5}", version) else ""
        raise BundleError(
            f"{where}: bundle format {number}, made by alambic {version[:40]!r}; "
            f"this alambic reads formats up to {FORMAT}",
            hint=f"pip install --upgrade 'alambic{needed}'",
        )


def check_structure(manifest: Manifest, where: Path) -> None:
    """Check that paths stay inside the bundle and that the parts form a chain that ends at the entry.

    Raises:
        BundleError: naming the path or the part that is wrong.
    """
    for problem in _structure_problems(manifest):
        raise BundleError(f"{where}: {problem}", hint=_DAMAGED)


def _structure_problems(manifest: Manifest) -> Iterator[str]:
    folded: dict[str, str] = {}
    for name in manifest.files:
        if not is_safe_path(name) or name.casefold() == MANIFEST:
            yield f"files: unsafe path {name!r}"
        twin = folded.setdefault(name.casefold(), name)
        if twin != name:
            yield f"files: {twin!r} and {name!r} differ only by case"
    if manifest.kind == "classify" and not manifest.labels:
        yield "labels: a classifier has at least one"
    if manifest.kind != "classify" and manifest.writer is None:
        yield f"writer: missing, and kind {manifest.kind!r} writes"
    if len(set(manifest.labels)) != len(manifest.labels):
        yield "labels: the same label twice"
    if manifest.decision is not None and manifest.multi_label:
        yield "decision: only for one label per text"
    if manifest.decision is not None and manifest.decision.scope_label not in (None, *manifest.labels):
        yield f"decision.scope_label: {manifest.decision.scope_label!r} is no label"
    if manifest.remote is not None and (manifest.kind != "classify" or manifest.multi_label):
        yield "remote: only for classifiers with one label per text"
    seen: set[str] = set()
    for part in manifest.parts:
        if not is_safe_path(part.folder):
            yield f"parts: unsafe folder {part.folder!r} in part {part.name!r}"
        if part.name in seen:
            yield f"parts: two parts are called {part.name!r}"
        if part.after is not None and part.after not in seen:
            yield f"parts: part {part.name!r} comes after {part.after!r}, which is not before it"
        seen.add(part.name)
    for role in ("adapter", "draft"):
        beside = getattr(manifest.writer, role, None)
        if beside is not None and (beside not in seen or beside == manifest.entry):
            yield f"writer.{role}: {beside!r} is not a part beside the entry; parts: {', '.join(sorted(seen))}"
    if manifest.cascade is not None:
        yield from _cascade_problems(manifest, manifest.cascade, seen)
    if manifest.entry not in seen:
        yield f"entry: {manifest.entry!r} is not a part; parts: {', '.join(sorted(seen))}"


def _cascade_problems(manifest: Manifest, cascade: Cascade, parts: set[str]) -> Iterator[str]:
    yield from cascade.problems()
    if manifest.kind != "classify" or manifest.multi_label:
        yield "cascade: only for classifiers with one label per text"
    for stage in cascade.stages:
        if stage.entry not in parts:
            yield f"cascade: stage {stage.name!r}: {stage.entry!r} is not a part; parts: {', '.join(sorted(parts))}"
    if cascade.stages and cascade.stages[-1].entry != manifest.entry:
        yield f"cascade: the last stage ends in {cascade.stages[-1].entry!r}, the bundle in {manifest.entry!r}"


def is_safe_path(name: str) -> bool:
    """Tell whether `name` is a plain relative path with forward slashes, on every system."""
    if not name or len(name) > 240 or _FORBIDDEN.search(name) or name.startswith("/"):
        return False
    pieces = name.split("/")
    if any(piece in ("", ".", "..") or piece.endswith((" ", ".")) or _RESERVED.match(piece) for piece in pieces):
        return False
    return PurePosixPath(name).as_posix() == name
