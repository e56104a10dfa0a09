"""A bundle that writes, asked as its task says: system message, prompt, sampling and schema are those of its scores.

with open_writer("runs/titles/bundle") as titles:
    print(titles.predict(["Le conseil municipal ..."])[0].content)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alambic.bundle import Bundle, open_bundle, user_cache
from alambic.engines.writer import Shares, Writer
from alambic.errors import AlambicError, EngineError, nearest
from alambic.kinds.chat import Chat, Message
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Sampling
from alambic.manifest import PartSpec, WriterSpec

TAKES_PARTS = frozenset({"openvino-genai"})  # engines that read an adapter or a draft beside the model
_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


class BundleWriter:
    """A `Writer` with the manners of its task. Safe to share between threads; close it, or use a ``with`` block."""

    def __init__(self, bundle: Bundle, writer: Writer) -> None:
        assert bundle.manifest.writer is not None, "the manifest of a kind that writes has it"
        self.bundle = bundle
        self.kind = bundle.manifest.kind
        self.spec: WriterSpec = bundle.manifest.writer
        self.sampling = read_sampling(self.spec, str(bundle.source))
        self._writer = writer

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._writer.context_tokens

    @property
    def capabilities(self) -> frozenset[str]:
        """What the engine can do besides `write`."""
        return self._writer.capabilities

    def request(self, value: str | Chat) -> GenerationRequest:
        """Return the request that the task makes of a text or of a conversation."""
        chat = value if isinstance(value, Chat) else Chat.of(filled(self.spec.prompt, value))
        return GenerationRequest(chat=self._with_system(chat), sampling=self.sampling)

    def asked(self, chat: Chat) -> Chat:
        """Return a conversation of one question, answered or not, with the prompt of the task around the question."""
        if self.spec.prompt is None or len(chat.messages) > 2 or chat.messages[0].role != "user":
            return chat
        question = dataclasses.replace(chat.messages[0], content=filled(self.spec.prompt, chat.messages[0].content))
        return Chat((question, *chat.messages[1:]), chat.tools)

    def predict(self, inputs: Sequence[str | Chat]) -> list[Reply]:
        """Write the answer to each text or conversation, in order, with the settings of the task."""
        if isinstance(inputs, str):
            raise EngineError("predict takes a list of texts, got one text", hint="predict([text])[0]")
        return self._writer.write([self.request(value) for value in inputs])

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer piece by piece; a conversation without a system message gets the task's."""
        return self._writer.stream(self._mannered(request))

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, in order; conversations without a system message get the task's."""
        return self._writer.write([self._mannered(request) for request in requests])

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`."""
        return self._writer.token_ids(self._mannered(request))

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Return the natural log-probability of each token of each continuation, given its prompt."""
        return self._writer.score([self._mannered(prompt) for prompt in prompts], continuations)

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads."""
        return self._writer.describe()

    def close(self) -> None:
        """Free the model."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mannered(self, request: GenerationRequest) -> GenerationRequest:
        if request.chat is None:
            return request
        return dataclasses.replace(request, chat=self._with_system(request.chat))

    def _with_system(self, chat: Chat) -> Chat:
        if not self.spec.system or (chat.messages and chat.messages[0].role == "system"):
            return chat
        return Chat((Message("system", self.spec.system), *chat.messages), chat.tools)


def filled(prompt: str | None, text: str) -> str:
    """Write the user message of `text`; other braces of the prompt are left alone."""
    return text if prompt is None else prompt.replace("{text}", text)


def read_sampling(spec: WriterSpec, where: str) -> Sampling:
    """Return the sampling of a manifest.

    Raises:
        EngineError: it has a key that this version does not know.
    """
    values = dict(spec.sampling)
    for key in values:
        if key not in _SAMPLING or key == "json_schema":
            raise EngineError(f"{where}: unknown sampling setting {key!r}", hint=nearest(key, _SAMPLING))
    values["stop"] = tuple(values.get("stop", ()))
    return Sampling(**values, json_schema=spec.json_schema)


def open_writer(
    bundle: Bundle | str | os.PathLike[str], *, threads: int | None = None, cache_dir: Path | None = None
) -> BundleWriter:
    """Load a bundle that writes.

    Args:
        bundle: an open bundle, or where one is.
        threads: threads of the engine; None lets it choose.
        cache_dir: where compiled models are kept between runs; None is the user's cache.

    Raises:
        BundleError: the bundle is missing, damaged, tampered with or too new.
        EngineError: it is a classifier, or an engine cannot run it.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    if bundle.manifest.writer is None:
        raise EngineError(f"{bundle.source}: a classifier, which writes nothing", hint="alambic.open gives its labels")
    part = bundle.manifest.part(bundle.manifest.entry)
    beside = Beside(adapter_of(bundle), draft_of(bundle))
    folder = bundle.folder(part)
    return BundleWriter(bundle, load_writer(part, folder, threads=threads, cache_dir=cache_dir, beside=beside))


def open_writers(bundles: Sequence[Bundle], *, threads: int | None = None) -> Iterator[BundleWriter]:
    """Load bundles that write, one after the other; bundles whose base is the same part share its weights.

    Close them in the opposite order: the first of those that share a base owns it.

    Raises:
        EngineError: an engine cannot run one.
    """
    groups: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        groups.setdefault(shared_base(bundle) or f"alone: {len(groups)}", []).append(bundle)
    for alike in groups.values():
        first, *others = alike
        part = first.manifest.part(first.manifest.entry)
        beside = Beside(adapter_of(first), draft_of(first), tuple(adapter_of(other) for other in others))
        writer = load_writer(part, first.folder(part), threads=threads, beside=beside)
        yield BundleWriter(first, writer)
        for other in others:
            assert isinstance(writer, Shares), "only such an engine is shared"
            yield BundleWriter(other, writer.with_adapter(adapter_of(other)))


def shared_base(bundle: Bundle) -> str | None:
    """Return the digest of the base that the bundle may share with others; None: it shares nothing."""
    manifest = bundle.manifest
    part = manifest.part(manifest.entry)
    if manifest.writer is None or manifest.writer.draft or part.engine not in TAKES_PARTS:
        return None
    return manifest.part_digest(part) if part.params.get("model_digest") else None


@dataclass(frozen=True)
class Beside:
    """What lies beside the part that writes.

    Attributes:
        adapter: file of its LoRA adapter.
        draft: folder of the smaller model that guesses.
        other_adapters: that later writers over the same weights will have; see `GenAIWriter.with_adapter`.
    """

    adapter: Path | None = None
    draft: Path | None = None
    other_adapters: tuple[Path | None, ...] = ()

    def options(self) -> dict[str, Any]:
        """Return those that are there, as the engine takes them."""
        return {name: value for name, value in vars(self).items() if value}


def adapter_of(bundle: Bundle) -> Path | None:
    """Return the file of the adapter of a bundle that writes, if it has one.

    Raises:
        EngineError: the adapter was trained on another base than the one in the bundle.
    """
    manifest = bundle.manifest
    if manifest.writer is None or manifest.writer.adapter is None:
        return None
    part, base = manifest.part(manifest.writer.adapter), manifest.part(manifest.entry)
    trained, here = (part.params.get("base") or {}).get("digest"), base.params.get("model_digest")
    if trained is None or trained != here:
        raise EngineError(
            f"{bundle.source}: part {part.name!r} is an adapter of a base with the digest {trained}, and the base in "
            f"part {base.name!r} has the digest {here}",
            hint="on another base its numbers mean nothing: build the bundle again",
        )
    return bundle.folder(part) / str(part.params.get("file"))


def draft_of(bundle: Bundle) -> Path | None:
    """Return the folder of the draft of a bundle that writes, if it has one."""
    manifest = bundle.manifest
    if manifest.writer is None or manifest.writer.draft is None:
        return None
    return bundle.folder(manifest.part(manifest.writer.draft))


def load_writer(
    part: PartSpec,
    folder: Path,
    *,
    threads: int | None = None,
    cache_dir: Path | None = None,
    beside: Beside = Beside(),
) -> Writer:
    """Load one part that writes from `folder`, outside of any bundle.

    Raises:
        EngineError: the number of threads is wrong, or the part cannot be loaded.
        AlambicError: the engine is not in the table.
    """
    from alambic.engines import WRITERS

    if cache_dir is None and part.engine.startswith("openvino"):
        cache_dir = user_cache("openvino")
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}, not 1 or more")
    options = beside.options()
    if options and part.engine not in TAKES_PARTS:
        raise EngineError(f"part {part.name!r}: engine {part.engine!r} takes no {' and no '.join(options)} beside it")
    try:
        opener = WRITERS.get(part.engine)
        writer: Writer = opener(folder, part.params, threads=threads, cache_dir=cache_dir, **options)
    except AlambicError as error:
        error.message = f"part {part.name!r}: {error.message}"
        raise
    return writer
