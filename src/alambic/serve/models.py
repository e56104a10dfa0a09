"""The models a server answers with: an open engine and the facts about it that the pages and `/v1/models` show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alambic.bundle import Bundle
from alambic.engines.bundle_writer import BundleWriter, filled
from alambic.engines.toolcalls import HERMES, ToolStyle, style_of
from alambic.engines.writer import Writer
from alambic.errors import BundleError, EngineError, nearest
from alambic.kinds.chat import Chat
from alambic.kinds.classify import Prediction
from alambic.kinds.generation import Sampling
from alambic.render import ChatTemplate, pinned
from alambic.serve.batcher import Predicts
from alambic.serve.errors import ApiError

if TYPE_CHECKING:
    from alambic.engines.last_stage import LastStage

_EXAMPLES = 6
_EXAMPLE_CHARACTERS = 280
# Where a run keeps its report, seen from the bundle or from the folder that holds it.
_REPORTS = ("report.html", "report/index.html")


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle ready to answer.

    Attributes:
        engine: what predicts.
        labels: every label, in order.
        multi_label: several labels per text.
        created: seconds since 1970, for `/v1/models`.
        facts: what the page shows (candidate, size_mb, base, scores, licence).
        examples: texts to try.
        last: the remote that is asked about what the engine abstains from; None asks nothing.
    """

    engine: Predicts[Prediction]
    labels: tuple[str, ...]
    multi_label: bool = False
    created: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    last: LastStage | None = None

    def card(self, name: str) -> dict[str, Any]:
        """Return the entry of `/v1/models`: OpenAI's keys, and ours under `alambic`."""
        ours = {"kind": "classify", "labels": self.labels, "multi_label": self.multi_label, "embeds": self.embeds}
        if self.last is not None:
            ours["remote"] = self.last.stage.model
        return _card(name, self.created, {**ours, **self.facts, "examples": self.examples})

    @property
    def embeds(self) -> bool:
        """Whether it gives the vector of a text."""
        return "embed" in getattr(self.engine, "capabilities", ())

    @property
    def explains(self) -> bool:
        """Whether it can show the training rows nearest to a text."""
        return "reasons" in getattr(self.engine, "capabilities", ())


@dataclass(frozen=True)
class LoadedWriter:
    """A bundle ready to write.

    Attributes:
        writer: what writes; it adds the system message of its task where a conversation has none.
        kind: kind of the task.
        sampling: how it writes unless a request says otherwise: the settings its scores were measured with.
        prompt: how the user message is written from a text ({text} stands for it); empty: as it is.
        tool_style: how its template writes tool calls; None: it writes none.
        created: seconds since 1970, for `/v1/models`.
        facts: what the page shows (candidate, size_mb, base, scores, licence).
        examples: messages to try.
        fingerprint: of the bundle, for OpenAI's `system_fingerprint`.
    """

    writer: Writer
    kind: str = "chat"
    sampling: Sampling = field(default_factory=Sampling)
    prompt: str = ""
    tool_style: ToolStyle | None = None
    created: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    fingerprint: str | None = None

    def card(self, name: str) -> dict[str, Any]:
        """Return the entry of `/v1/models`: OpenAI's keys, and ours under `alambic`."""
        ours = {
            "kind": self.kind,
            "context_tokens": self.writer.context_tokens,
            "capabilities": sorted(self.writer.capabilities),
            "embeds": self.embeds,
            "tools": self.tool_style is not None,
            "temperature": self.sampling.temperature,
        }
        return _card(name, self.created, {**ours, **self.facts, "examples": self.examples})

    @property
    def embeds(self) -> bool:
        """Whether it gives the vector of a text."""
        return "embed" in self.writer.capabilities

    def can(self, what: str) -> bool:
        """Tell whether the writer has the capability `what`."""
        return what in self.writer.capabilities

    def asked(self, chat: Chat) -> Chat:
        """Return `chat` as the task asks it: its prompt around what the user says."""
        if not self.prompt:
            return chat
        messages = (
            replace(message, content=filled(self.prompt, message.content)) if message.role == "user" else message
            for message in chat.messages
        )
        return Chat(tuple(messages), chat.tools)


Loaded = LoadedBundle | LoadedWriter
_Able = TypeVar("_Able", LoadedBundle, LoadedWriter, Loaded)


def _card(name: str, created: int, ours: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "alambic", "alambic": ours}


def pick(models: Mapping[str, Loaded], name: str | None, able: Mapping[str, _Able], what: str) -> tuple[str, _Able]:
    """Return the model `name` and its name, or the first of `able` when none is named.

    Args:
        models: all there are.
        name: what the client asks for.
        able: those that can answer here.
        what: what they do, for messages.

    Raises:
        ApiError: 404 for an unknown name, 400 for a model that cannot.
    """
    if name is None and able:
        name = next(iter(able))
    if name is None:
        raise ApiError(400, "unsupported_model", f"no model of this server {what}", param="model")
    if name not in models:
        shown = name[:80].encode(errors="replace").decode()
        raise ApiError(404, "model_not_found", f"no model {shown!r} here; {nearest(shown, models)}", param="model")
    if name not in able:
        others = ", ".join(able) or "none does"
        raise ApiError(400, "unsupported_model", f"{name!r} is not a model that {what}; here: {others}", param="model")
    return name, able[name]


@contextmanager
def load(paths: Sequence[Path], *, threads: int | None = None, remote: bool = False) -> Iterator[dict[str, Loaded]]:
    """Open the bundles at `paths` by the name of their task, and close their engines at the end.

    A base that several of them keep an adapter beside is loaded once. With `remote` classifiers that name an endpoint
    ask it about what they abstain from.

    Raises:
        BundleError: a bundle is damaged, or two have the same name.
        EngineError: `remote` is asked, and no bundle names an endpoint, or one cannot be asked.
    """
    from alambic.bundle import open_bundle
    from alambic.engines import open_engine, open_last_stage
    from alambic.engines.bundle_writer import open_writers, shared_base

    bundles: dict[str, Bundle] = {}
    for path in paths:
        bundle = open_bundle(path)
        name = bundle.manifest.name
        if name in bundles:
            raise BundleError(f"{path}: {name!r} is served already", hint="serve it on another port")
        bundles[name] = bundle
    if remote and not any(bundle.manifest.remote for bundle in bundles.values()):
        raise EngineError(f"{', '.join(map(str, paths))}: no bundle names a remote", hint="[remote] in a task file")
    writing = [bundle for bundle in bundles.values() if bundle.manifest.writer is not None]
    bases = {bundle.manifest.name: shared_base(bundle) for bundle in writing}
    found: dict[str, Loaded] = {}
    with ExitStack() as stack:
        for writer in open_writers(writing, threads=threads):
            name = writer.bundle.manifest.name
            stack.enter_context(writer)
            alike = [other for other, base in bases.items() if other != name and base and base == bases[name]]
            found[name] = describe_writer(writer, shares_base_with=alike)
        for name, bundle in bundles.items():
            if name not in found:
                engine = stack.enter_context(open_engine(bundle, threads=threads))
                last = None
                if remote and bundle.manifest.remote is not None:
                    last = stack.enter_context(closing(open_last_stage(engine)))
                found[name] = describe(bundle, engine, last=last)
        yield {name: found[name] for name in bundles}


def describe(bundle: Bundle, engine: Predicts[Prediction], *, last: LastStage | None = None) -> LoadedBundle:
    """Join `engine` with the facts that the manifest of `bundle` holds."""
    manifest = bundle.manifest
    return LoadedBundle(
        engine=engine,
        labels=tuple(manifest.labels),
        multi_label=manifest.multi_label,
        created=_seconds(manifest.created),
        facts=_facts(bundle),
        examples=_examples([golden.text for golden in manifest.golden]),
        last=last,
    )


def describe_writer(writer: BundleWriter, *, shares_base_with: Sequence[str] = ()) -> LoadedWriter:
    """Join `writer` with the facts that the manifest of its bundle holds."""
    shared = {"shares_base_with": list(shares_base_with)} if shares_base_with else {}
    manifest = writer.bundle.manifest
    return LoadedWriter(
        writer=writer,
        kind=manifest.kind,
        sampling=writer.sampling,
        prompt=writer.spec.prompt or "",
        tool_style=_tool_style(writer.bundle),
        created=_seconds(manifest.created),
        facts={**_facts(writer.bundle), **shared},
        fingerprint=f"fp_{manifest.seal[:12]}" if manifest.seal else None,
    )


def _tool_style(bundle: Bundle) -> ToolStyle | None:
    """Find how the model writes tool calls, from the template that lies with it."""
    part = bundle.manifest.part(bundle.manifest.entry)
    if part.engine == "nearest":  # no template: it writes the calls of known answers itself
        return HERMES if part.params.get("calls") else None
    file = bundle.folder(part) / "chat_template.jinja"
    if not file.is_file():
        return None
    special, ends = part.params.get("special") or {}, tuple(part.params.get("ends") or ())
    return style_of(ChatTemplate(pinned(file.read_text("utf-8")), special, ends))


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    scores = manifest.scores.get("test") or manifest.scores.get("dev")
    facts = {
        "candidate": manifest.candidate or None,
        "size_mb": round(bundle.size_bytes / 1e6, 2),
        "base": (manifest.base or {}).get("name"),
        "licence": manifest.licences.get("bundle"),
        "split": "test" if manifest.scores.get("test") else "dev" if scores else None,
        "scores": headline(scores) if isinstance(scores, dict) else None,
    }
    return {key: value for key, value in facts.items() if value is not None}


def headline(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce the scores of a split to `{"n", "metrics": {name: {"value", "low", "high"}}}`."""
    quality = scores.get("quality")
    values = quality if isinstance(quality, dict) else scores
    metrics: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        if name == "n" or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            metrics[name] = {"value": float(value)}
        elif isinstance(value, dict) and isinstance(value.get("value"), int | float):
            metrics[name] = {key: float(value[key]) for key in ("value", "low", "high") if key in value}
    return {"n": scores.get("n"), "metrics": metrics}


def find_report(bundle: Path) -> Path | None:
    """Return the report of the run that made `bundle`, when it lies where a run puts it."""
    places = [folder / name for folder in (bundle, bundle.absolute().parent) for name in _REPORTS]
    return next((place for place in places if place.is_file()), None)


def _examples(texts: Sequence[str]) -> tuple[str, ...]:
    fit = [text for text in map(str.strip, texts) if text and len(text) <= _EXAMPLE_CHARACTERS]
    return tuple(dict.fromkeys(fit))[:_EXAMPLES]


def _seconds(created: str) -> int:
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0
