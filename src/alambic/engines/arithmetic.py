"""What this CPU computes in, where a part of an OpenVINO engine states bf16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from alambic import _extras

PROPERTY = "INFERENCE_PRECISION_HINT"
Properties = Mapping[str, str | int | bool]
_log = logging.getLogger("alambic")


@cache
def has_bf16() -> bool:
    """Tell whether this CPU multiplies bf16 in hardware, as OpenVINO sees it; torch is asked by `train.precision`."""
    capabilities = _extras.load("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities


def computed(properties: Properties, where: Path, *, bf16: bool | None = None) -> dict[str, str | int | bool]:
    """Return `properties` with float32 in the place of a bf16 that this CPU does not have, and log that once.

    OpenVINO itself says nothing. Without AVX-512 it computes in float32; with AVX-512 but no bf16 it imitates bf16 in
    software, which takes 29 times as long as float32 (docs/concepts/engines.md).

    Args:
        properties: of the engine.
        where: folder of the part, for the log.
        bf16: whether the CPU has it; None: asks OpenVINO.
    """
    if properties.get(PROPERTY) != "bf16" or (has_bf16() if bf16 is None else bf16):
        return dict(properties)
    _log.warning("%s: was measured in bf16, which this CPU does not have: computes in f32, at another speed", where)
    return {**properties, PROPERTY: "f32"}
