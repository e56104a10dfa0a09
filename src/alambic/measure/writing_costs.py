"""What using a bundle that writes costs: time of an answer, size, memory, energy, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alambic.engines.bundle_writer import BundleWriter
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest
from alambic.measure.energy import Energy, measure_energy
from alambic.measure.generation_speed import GenerationSpeed, measure_generation_speed
from alambic.measure.machine import fingerprint
from alambic.measure.memory import Memory, measure_peak_ram, size_mb

_MEMORY_TEXTS = 8
_ENERGY_TEXTS = 16


@dataclass(frozen=True)
class WritingCosts:
    """Figures of one bundle and one machine."""

    speed: GenerationSpeed
    size_mb: float
    memory: Memory
    energy: Energy
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names of `alambic measure --json`; what is not known is absent."""
        figures: dict[str, Any] = {
            "speed": self.speed.to_dict(),
            "size_mb": self.size_mb,
            "peak_ram_mb": self.memory.peak_ram_mb,
            "memory": self.memory.to_dict(),
            "energy": self.energy.to_dict(),
            "machine": self.machine,
        }
        return {key: value for key, value in figures.items() if value is not None}

    def figures(self) -> dict[str, Any]:
        """Return what a point of the frontier needs besides its name and quality, ready for JSON."""
        return {
            "p50_ms": self.speed.p50_ms.to_dict(),
            "p95_ms": self.speed.p95_ms.to_dict(),
            "size_mb": self.size_mb,
            "peak_ram_mb": self.memory.peak_ram_mb,
            "j_per_request": self.energy.j_per_request,
            "energy_source": self.energy.source,
        }


def measure_writing_costs(
    bundle: Path,
    writer: BundleWriter,
    chats: Sequence[Chat],
    *,
    threads: int | None = None,
    repeats: int = 40,
    seconds: float = 20.0,
    energy_seconds: float = 3.0,
    seed: int = 0,
) -> WritingCosts:
    """Measure `writer`, the open `bundle`, on real conversations, answered or not.

    Args:
        bundle: where it is, for the fresh process that tells peak memory.
        writer: the same bundle, open.
        chats: the task's own rows.
        threads: threads of the engine; None lets it decide.
        repeats: answers to time, at least 30.
        seconds: time after which only the answers that a figure needs are still written.
        energy_seconds: time for energy; 0 leaves energy out.
        seed: of every draw.

    Raises:
        EngineError: the writer cannot answer, or a fresh process failed.
    """
    prompts = [chat.prompt for chat in chats]
    requests = [GenerationRequest(chat=prompt, sampling=writer.sampling) for prompt in prompts]
    speed = measure_generation_speed(writer, requests, repeats=repeats, seconds=seconds, seed=seed)
    rng = np.random.default_rng(seed)
    drawn = [prompts[i] for i in rng.permutation(len(prompts))]
    energy = Energy(None, "unavailable", "not asked for")
    if energy_seconds > 0:
        energy = measure_energy(writer.predict, drawn[:_ENERGY_TEXTS], seconds=energy_seconds)
    longest = max(prompts, key=lambda chat: sum(len(message.content) for message in chat.messages))
    texts = [chat.messages[-1].content for chat in (*drawn[:_MEMORY_TEXTS], longest)]
    memory = measure_peak_ram(str(bundle), texts, threads=threads)
    return WritingCosts(speed, size_mb(bundle), memory, energy, fingerprint())
