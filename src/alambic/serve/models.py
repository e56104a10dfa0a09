"""The models a server answers with: an open engine and the facts about it that the page and `/v1/models` show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from alambic.bundle import Bundle
from alambic.errors import BundleError
from alambic.serve.batcher import Predicts

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
    """

    engine: Predicts
    labels: tuple[str, ...]
    multi_label: bool = False
    created: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[str, ...] = ()

    def card(self, name: str) -> dict[str, Any]:
        """Return the entry of `/v1/models`: OpenAI's keys, and ours under `alambic`."""
        ours = {"kind": "classify", "labels": self.labels, "multi_label": self.multi_label}
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "alambic",
            "alambic": {**ours, **self.facts, "examples": self.examples},
        }


@contextmanager
def load(paths: Sequence[Path], *, threads: int | None = None) -> Iterator[dict[str, LoadedBundle]]:
    """Open the bundles at `paths` by the name of their task, and close their engines at the end.

    Raises:
        BundleError: a bundle is damaged, or two have the same name.
    """
    from alambic.bundle import open_bundle
    from alambic.engines import open_engine

    loaded: dict[str, LoadedBundle] = {}
    with ExitStack() as stack:
        for path in paths:
            bundle = open_bundle(path)
            name = bundle.manifest.name
            if name in loaded:
                raise BundleError(f"{path}: {name!r} is served already", hint="serve it on another port")
            loaded[name] = describe(bundle, stack.enter_context(open_engine(bundle, threads=threads)))
        yield loaded


def describe(bundle: Bundle, engine: Predicts) -> LoadedBundle:
    """Join `engine` with the facts that the manifest of `bundle` holds."""
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
    return LoadedBundle(
        engine=engine,
        labels=tuple(manifest.labels),
        multi_label=manifest.multi_label,
        created=_seconds(manifest.created),
        facts={key: value for key, value in facts.items() if value is not None},
        examples=_examples(bundle),
    )


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


def _examples(bundle: Bundle) -> tuple[str, ...]:
    texts = [golden.text.strip() for golden in bundle.manifest.golden]
    fit = [text for text in texts if text and len(text) <= _EXAMPLE_CHARACTERS]
    return tuple(dict.fromkeys(fit))[:_EXAMPLES]


def _seconds(created: str) -> int:
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0
