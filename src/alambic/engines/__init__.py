"""Run bundles. `open` is the way in: ``alambic.open("bundle").predict(["some text"])``.

An engine composes the parts of a bundle; which part runs on which library comes from the closed table `PARTS`, so a
bundle's manifest can name nothing else. Importing this imports no engine's library.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic._registry import Registry
from alambic.bundle import Bundle, open_bundle, user_cache
from alambic.engines.cascade import stage_bundle
from alambic.engines.classify import ClassifyEngine, TextReader
from alambic.errors import AlambicError, EngineError, nearest
from alambic.manifest import PartSpec

if TYPE_CHECKING:
    from alambic.engines.bundle_writer import BundleWriter
    from alambic.engines.last_stage import LastStage

__all__ = [
    "ON_VECTORS",
    "PARTS",
    "ClassifyEngine",
    "TextReader",
    "load_part",
    "open",
    "open_engine",
    "open_last_stage",
    "open_part",
]

PARTS = Registry(
    "engine",
    {
        "examples": "alambic.engines.examples:Examples",
        "knn-head": "alambic.engines.heads:KnnHead",
        "linear-head": "alambic.engines.heads:LinearHead",
        "majority": "alambic.engines.majority:Majority",
        "onnx": "alambic.engines.onnx:OnnxPart",
        "openvino": "alambic.engines.openvino:OpenVinoPart",
        "static": "alambic.engines.static:StaticPart",
        "tfidf-linear": "alambic.engines.tfidf_linear:TfidfLinear",
        "torch": "alambic.engines.torch:TorchPart",
    },
)
# Parts that write: each is called as `GET(folder, params, threads=, cache_dir=)` and gives a `Writer`.
WRITERS = Registry(
    "writing engine",
    {
        "llamacpp": "alambic.engines.llamacpp:LlamaCppWriter",
        "nearest": "alambic.engines.nearest_answer:NearestWriter",
        "openvino-genai": "alambic.engines.genai:GenAIWriter",
        "openvino-graph": "alambic.engines.graph:GraphWriter",
        "tagger": "alambic.engines.tagger:TaggerWriter",
    },
)
# Parts that take the rows of another part; all others take texts.
ON_VECTORS = frozenset({"knn-head", "linear-head"})


def open(
    path: str | os.PathLike[str], *, threads: int | None = None, remote: bool = False
) -> ClassifyEngine | BundleWriter:
    """Open the bundle at `path` (a folder or a `.alambic` file), ready to predict: labels, or texts where it writes.

    Args:
        path: the bundle.
        threads: threads of the engine; None lets it choose.
        remote: send texts that the bundle abstains from to the endpoint that it names. Nothing is sent otherwise.

    Raises:
        BundleError: the bundle is missing, damaged, tampered with or too new.
        EngineError: an engine cannot run it, or `remote` is asked of a bundle that names none.
    """
    from alambic.engines.bundle_writer import open_writer

    bundle = open_bundle(path)
    if bundle.manifest.writer is not None and not remote:
        return open_writer(bundle, threads=threads)
    return open_engine(bundle, threads=threads, remote=remote)


def open_last_stage(engine: ClassifyEngine) -> LastStage:
    """Prepare the endpoint that the bundle of `engine` names; nothing is sent before a text needs it.

    Raises:
        EngineError: the bundle names none or abstains from nothing, the address is unsafe, or the key is absent.
    """
    from alambic.engines.last_stage import LastStage

    manifest, source = engine.bundle.manifest, engine.bundle.source
    if manifest.remote is None:
        raise EngineError(f"{source}: this bundle names no remote", hint="[remote] in the task file, and build again")
    if manifest.decision is None:
        raise EngineError(f"{source}: this bundle abstains from nothing, so its remote would never be asked")
    return LastStage(
        manifest.remote, engine.labels, scope_label=manifest.decision.scope_label, local=manifest.candidate,
        reasons=lambda texts, n: engine.reasons(texts, n=n),
    )  # fmt: skip


def open_engine(
    bundle: Bundle | str | os.PathLike[str],
    *,
    threads: int | None = None,
    cache_dir: Path | None = None,
    remote: bool = False,
) -> ClassifyEngine:
    """Load every part of a bundle.

    Args:
        bundle: an open bundle, or where one is.
        threads: threads of the engine; None lets it choose.
        cache_dir: where compiled models are kept between runs; None is the user's cache.
        remote: as in `open`.

    Raises:
        BundleError: the bundle is missing, damaged, tampered with or too new.
        EngineError: an engine cannot run it, its parts do not fit each other, or `remote` cannot be asked.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    if bundle.manifest.writer is not None:
        kind = bundle.manifest.kind
        raise EngineError(
            f"{bundle.source}: kind {kind!r} writes texts, it gives no labels", hint="alambic chat BUNDLE"
        )
    cascade = bundle.manifest.cascade
    earlier = cascade.stages[:-1] if cascade is not None else ()
    before = [open_engine(stage_bundle(bundle, stage), threads=threads, cache_dir=cache_dir) for stage in earlier]
    first, *rest = bundle.manifest.chain()
    _check_chain(bundle, first, rest)
    reader = open_part(first, bundle.folder(first), long=bundle.manifest.long, threads=threads, cache_dir=cache_dir)
    heads = [load_part(spec, bundle.folder(spec), threads=threads) for spec in rest]
    index = next((spec for spec in bundle.manifest.parts if spec.engine == "examples"), None)
    examples = None if index is None else partial(load_part, index, bundle.folder(index))
    engine = ClassifyEngine(bundle, reader, heads, before=before, examples=examples)
    if remote:
        engine.last = open_last_stage(engine)
    return engine


def _check_chain(bundle: Bundle, first: PartSpec, rest: Sequence[PartSpec]) -> None:
    """Refuse parts that do not fit each other, or that no engine of the table runs."""
    for spec in (first, *rest):
        if spec.engine not in PARTS:
            known = nearest(spec.engine, PARTS)
            raise EngineError(f"{bundle.source}: part {spec.name!r}: unknown engine {spec.engine!r}", hint=known)
        if spec.engine == "examples":
            raise EngineError(f"{bundle.source}: part {spec.name!r}: an index of examples gives no labels")
        if (spec.engine in ON_VECTORS) != (spec is not first):
            takes = "the output of another part" if spec.engine in ON_VECTORS else "texts"
            raise EngineError(f"{bundle.source}: part {spec.name!r}: engine {spec.engine!r} takes {takes}")


def open_part(
    part: PartSpec, folder: Path, *, long: str = "windows", threads: int | None = None, cache_dir: Path | None = None
) -> TextReader:
    """Open a part that takes texts, outside of any bundle; its `run(texts)` gives one row per text.

    Args:
        part: what it is.
        folder: where its files are.
        long: what to do with texts longer than it reads.
        threads: threads of the engine; None lets it choose.
        cache_dir: where compiled models are kept between runs; None is the user's cache.

    Raises:
        EngineError: the engine cannot run it.
    """
    if cache_dir is None and part.engine == "openvino":
        cache_dir = user_cache("openvino")
    return TextReader(load_part(part, folder, threads=threads, cache_dir=cache_dir), long=long)


def load_part(part: PartSpec, folder: Path, *, threads: int | None = None, cache_dir: Path | None = None) -> Any:
    """Load one part of any engine from `folder`.

    Raises:
        EngineError: the number of threads is wrong, or the part cannot be loaded.
        AlambicError: the engine is not in `PARTS`.
    """
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}, not 1 or more")
    try:
        return PARTS.get(part.engine)(folder, part.params, threads=threads, cache_dir=cache_dir)
    except AlambicError as error:
        error.message = f"part {part.name!r}: {error.message}"
        raise
