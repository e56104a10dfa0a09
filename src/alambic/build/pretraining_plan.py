"""What a pre-training would do, told from the configuration and the sizes of its files, before anything slow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from alambic.data import corpus_contamination as contamination
from alambic.data.corpus_read import files_of
from alambic.pretrain_config import PretrainConfig
from alambic.train.pretrain_params import PretrainParams


@dataclass(frozen=True)
class PretrainPlan:
    """What would be done.

    Attributes:
        name: of the model.
        parameters: weights of the model, counted from its shape.
        sources: by name: files and their size on disk in 10^6 bytes.
        test_files: files of test sets that would be looked at.
        tokens: to train on, None when the configuration counts in passes.
        steps: of the optimiser, None with passes.
    """

    name: str
    parameters: int
    sources: dict[str, dict[str, Any]]
    test_files: int
    tokens: int | None
    steps: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def text(self) -> str:
        """Return the plan for a person."""
        lines = [f"{self.name}: {self.parameters / 1e6:.1f} million parameters"]
        for name, source in self.sources.items():
            limit = f", at most {source['limit_mb']:g} MB of text" if source["limit_mb"] is not None else ""
            lines.append(f"  {name:<16} {source['files']} file(s), {source['mb']:,.1f} MB on disk{limit}")
        lines.append(f"  test sets        {self.test_files} file(s)")
        if self.tokens is not None:
            lines.append(f"  training         {self.tokens:,} tokens, {self.steps:,} steps")
        return "\n".join(lines)


def plan(config: PretrainConfig) -> PretrainPlan:
    """Check that every file is there, and count.

    Raises:
        DataError: a source or a folder of test sets is not there.
    """
    sources = {}
    for source in config.source:
        files = files_of(source.path, config.corpus)
        size = sum(path.stat().st_size for path in files) / 1e6
        sources[source.name] = {"files": len(files), "mb": round(size, 3), "limit_mb": source.mb}
    tests = contamination.test_files(config.test_sets, config.contamination.patterns)
    params = PretrainParams(**config.model.model_dump(), **config.train.model_dump())
    tokens = config.train.tokens
    steps = None if tokens is None else params.steps(0)
    count = parameters(params, config.tokenizer.vocabulary)
    return PretrainPlan(config.name, count, sources, len(tests), tokens, steps)


def parameters(params: PretrainParams, vocabulary: int) -> int:
    """Count the weights of a decoder of this shape, with tied embeddings and a gated feed-forward part.

    An encoder is counted alike: it differs by a few vectors.
    """
    width = params.hidden
    kv = width * (params.kv_heads or params.heads) // params.heads
    layer = 2 * width * width + 2 * width * kv + 3 * width * params.ffn_width + 2 * width
    rows = -(-vocabulary // 64) * 64
    return rows * width + params.layers * layer + width
