"""Energy of one text: measured by the processor's own counters (RAPL), estimated, or unavailable; never invented.

RAPL counts the whole package: idle power and other programs are inside the figure. Where the counters cannot be read
(no permission, a virtual machine, another system), CPU time multiplied by the share of the package's thermal design
power (TDP) that one core stands for gives an estimate, provided that the TDP is known: given by the caller, or stated
by the kernel as the package's maximum sustained power. Otherwise there is no figure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alambic.measure.metrics import Interval

POWERCAP = Path("/sys/class/powercap")
# A counter wraps after 262 kJ or 66 kJ, at the least minutes under full load: reads closer than this miss no wrap.
_READ_EVERY_S = 5.0


@dataclass(frozen=True)
class Energy:
    """Energy of one text.

    Attributes:
        j_per_request: joules; None when unavailable.
        source: ``rapl``, ``estimated`` or ``unavailable``.
        how: one sentence: what was read, or why nothing could be.
        n: texts predicted during the measurement.
        interval: over rounds of texts; None unless measured or estimated.
    """

    j_per_request: float | None
    source: str
    how: str
    n: int = 0
    interval: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, ready for JSON; `j_per_request` is absent when unavailable."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Rapl:
    """The energy counters of every processor package, summed, with wrap-around handled."""

    def __init__(self, domains: Sequence[Path]) -> None:
        self._domains = tuple(domains)
        self._ranges = [_number(domain / "max_energy_range_uj") for domain in domains]
        self._last = [_number(domain / "energy_uj") for domain in domains]
        self._total_uj = 0

    def joules(self) -> float:
        """Return the energy since this object was made; call it at least every few minutes."""
        for i, domain in enumerate(self._domains):
            now = _number(domain / "energy_uj")
            spent = now - self._last[i]
            self._total_uj += spent if spent >= 0 else spent + self._ranges[i] + 1
            self._last[i] = now
        return self._total_uj / 1e6


def measure_energy(
    predict: Callable[[Sequence[Any]], object],
    texts: Sequence[Any],
    *,
    seconds: float = 5.0,
    tdp_watts: float | None = None,
    root: Path = POWERCAP,
) -> Energy:
    """Predict `texts` one at a time for about `seconds` and tell the energy of one.

    Args:
        predict: a bound `predict`.
        texts: real texts of the task, repeated as long as needed.
        seconds: how long to measure.
        tdp_watts: the package's TDP, when the caller knows it and the kernel does not.
        root: where the kernel shows its power counters.
    """
    if not texts:
        return Energy(None, "unavailable", "no text to predict")
    packages: list[Path] = []
    try:
        packages = _packages(root)
        meter = Rapl(packages)
    except OSError as error:
        why = f"RAPL counters are not readable ({error.strerror or error})"
    else:
        if packages:
            how = f"RAPL, {len(packages)} package(s), idle power and other programs included"
            return _energy(_rounds(predict, texts, seconds, meter.joules), "rapl", how)
        why = "no RAPL counters on this machine"
    watts, origin = (tdp_watts, "given") if tdp_watts is not None else (_stated_tdp(packages), "stated by the kernel")
    if watts is None:
        return Energy(None, "unavailable", f"{why}, and the processor's TDP is not known")
    cores = os.cpu_count() or 1
    rounds = _rounds(predict, texts, seconds, lambda: time.process_time() * watts / cores)
    return _energy(rounds, "estimated", f"CPU time x {watts:g} W TDP ({origin}) / {cores} logical cores; {why}")


def _energy(rounds: list[tuple[float, int]], source: str, how: str) -> Energy:
    joules, counts = np.array([j for j, _ in rounds]), np.array([n for _, n in rounds])
    draws = np.random.default_rng(0).integers(len(rounds), size=(1000, len(rounds)))
    value, total = float(joules.sum() / counts.sum()), int(counts.sum())
    interval = Interval.of(value, joules[draws].sum(axis=1) / counts[draws].sum(axis=1), n=total)
    return Energy(value, source, how, total, interval)


def _rounds(
    predict: Callable[[Sequence[str]], object], texts: Sequence[str], seconds: float, joules: Callable[[], float]
) -> list[tuple[float, int]]:
    """Return (joules, texts) of rounds: counters tick every millisecond, so a single text is too short to read."""
    for text in texts[:5]:
        predict([text])
    rounds: list[tuple[float, int]] = []
    stop, length, sent = time.perf_counter() + seconds, min(seconds / 20, _READ_EVERY_S), 0
    while not rounds or time.perf_counter() < stop:
        before, count, end = joules(), 0, time.perf_counter() + length
        while count == 0 or time.perf_counter() < end:
            predict([texts[sent % len(texts)]])
            count, sent = count + 1, sent + 1
        rounds.append((joules() - before, count))
    return rounds


def _packages(root: Path) -> list[Path]:
    # `intel-rapl:0` is a package (AMD too), `intel-rapl:0:1` a part of it that would be counted twice.
    domains = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    return [domain for domain in domains if _text(domain / "name").startswith("package")]


def _stated_tdp(packages: Sequence[Path]) -> float | None:
    """Return the sum over packages of their maximum long-term power, which is their TDP and readable by all."""
    watts = 0.0
    for package in packages:
        try:
            if _text(package / "constraint_0_name") != "long_term":
                return None
            watts += _number(package / "constraint_0_max_power_uw") / 1e6
        except OSError:
            return None
    return watts or None


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def _number(path: Path) -> int:
    return int(_text(path))
