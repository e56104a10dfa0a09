"""The golden samples of a bundle, run again: does this machine see the same tokens and give the same answers?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alambic.engines.bundle_writer import BundleWriter
from alambic.engines.classify import ClassifyEngine
from alambic.errors import EngineError
from alambic.kinds.chat import parse_chat
from alambic.kinds.generation import GenerationRequest

# Another CPU rounds int8 and bf16 differently; more than this is another model.
TOLERANCE = 0.05


@dataclass(frozen=True)
class GoldenReport:
    """What running the golden samples showed.

    Attributes:
        n: number of samples.
        largest_difference: of a probability, against the machine that built the bundle.
        changed_labels: samples whose most probable label is another one here (all within the tolerance).
    """

    n: int
    largest_difference: float
    changed_labels: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"golden": asdict(self)}


def check_golden(engine: ClassifyEngine, *, tolerance: float = TOLERANCE) -> GoldenReport:
    """Run the golden samples of the engine's bundle.

    Raises:
        EngineError: a token differs (the first is named), or a probability by more than `tolerance`.
    """
    golden = engine.bundle.manifest.golden
    if not golden:
        return GoldenReport(0, 0.0, 0)
    texts = [sample.text for sample in golden]
    if "token_ids" in engine.capabilities:
        for sample, ids in zip(golden, engine.token_ids(texts), strict=True):
            _check_ids(sample.text, list(sample.ids), ids)
    here = engine.probabilities(texts)
    there = np.array([sample.probabilities for sample in golden], dtype=np.float32)
    if here.shape != there.shape:
        raise EngineError(f"the golden samples have {there.shape[-1]} probabilities, the model gives {here.shape[-1]}")
    differences = np.abs(here - there).max(axis=1)
    worst = int(differences.argmax())
    if differences[worst] > tolerance:
        raise EngineError(
            f"golden text {texts[worst][:60]!r}: a probability differs by {differences[worst]:.3f} from the build's; "
            f"at most {tolerance} is expected",
            hint="this machine or its engine computes another model: update openvino or onnxruntime, or build here",
        )
    changed = int((here.argmax(axis=1) != there.argmax(axis=1)).sum())
    return GoldenReport(len(golden), float(differences[worst]), changed)


def check_golden_chats(writer: BundleWriter) -> GoldenReport:
    """Read the golden conversations of the writer's bundle again: every token must be the one of the build.

    Raises:
        EngineError: a token differs; the first is named.
    """
    golden = writer.bundle.manifest.golden_chats
    for i, sample in enumerate(golden):
        chat = parse_chat(sample.chat["messages"], sample.chat.get("tools"), where=f"golden conversation {i}")
        said = chat.messages[-1].content
        _check_ids(said, list(sample.ids), writer.token_ids(GenerationRequest(chat=chat)))
    return GoldenReport(len(golden), 0.0, 0)


def _check_ids(text: str, expected: list[int], got: list[int]) -> None:
    if expected == got:
        return
    at = next((i for i, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        raise EngineError(f"golden text {text[:60]!r}: {len(got)} tokens, {len(expected)} at the build")
    raise EngineError(
        f"golden text {text[:60]!r}: token {at} is {got[at]}, {expected[at]} at the build",
        hint="the tokenizer here is not the one the model was trained with: reinstall tokenizers",
    )
