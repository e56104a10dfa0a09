"""Smaller weights for writers: 8 bits per channel, 4 bits per group, by NNCF; and the forms worth trying, by name.

In the 4-bit forms the embedding table and the output matrix stay in 8 bits (every token passes through them), and so do
the most sensitive layers where `ratio` is under 1. The calibrated forms see the task's own conversations as the ids
that training saw. What a form costs on the task is measured by the build through the engine, and cheaply by
`alambic.pack.writer_compare.diverge`.

References: AWQ (Lin et al. 2023, arXiv:2306.00978), GPTQ (Frantar et al. 2022, arXiv:2210.17323); scale estimation and
sensitivity metrics as NNCF documents them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.errors import PackError, nearest
from alambic.pack.openvino import _silent as silent

Mode = Literal["int8_asym", "int8_sym", "int4_asym", "int4_sym"]
Refinement = Literal["awq", "scale_estimation", "gptq"]
CALIBRATION_ROWS, CALIBRATION_TOKENS = 128, 512
_SMALLEST_GROUP = 16  # of the power of two that is taken where the wanted one does not divide a layer


@dataclass(frozen=True)
class WeightForm:
    """How weights are stored.

    Attributes:
        mode: bits, and whether a zero point is kept besides the scale (asym).
        group_size: weights that share a scale; None: a whole output channel (8 bits).
        ratio: share of the layers in 4 bits; the most sensitive others are kept in 8.
        refine: calibrated corrections, which need conversations of the task.
    """

    mode: Mode
    group_size: int | None = None
    ratio: float = 1.0
    refine: tuple[Refinement, ...] = ()

    @property
    def precision(self) -> str:
        """``int8`` or ``int4``."""
        return self.mode.partition("_")[0]

    @property
    def calibrated(self) -> bool:
        """Whether it needs conversations."""
        return bool(self.refine)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "refine": list(self.refine)}


FORMS: Mapping[str, WeightForm] = {
    "int8": WeightForm("int8_asym"),
    "int8-sym": WeightForm("int8_sym"),
    "int4": WeightForm("int4_asym", 64),
    "int4-g32": WeightForm("int4_asym", 32),
    "int4-g128": WeightForm("int4_asym", 128),
    "int4-sym-g128": WeightForm("int4_sym", 128),
    "int4-mixed": WeightForm("int4_asym", 64, ratio=0.8),
    "int4-awq": WeightForm("int4_asym", 64, refine=("awq", "scale_estimation")),
    "int4-gptq": WeightForm("int4_asym", 64, refine=("gptq",)),
    "int4-gptq-scale": WeightForm("int4_asym", 64, refine=("gptq", "scale_estimation")),
    "int4-mixed-gptq": WeightForm("int4_asym", 64, ratio=0.8, refine=("gptq",)),
    "int4-mixed-awq": WeightForm("int4_asym", 64, ratio=0.8, refine=("awq", "scale_estimation")),
}
_SMALL = 100_000_000  # weights: up to here GPTQ, which works column by column, takes minutes at most


def usual_form(precision: str, *, calibrated: bool, parameters: int) -> str:
    """Return what a bare precision means.

    On a trained model of 260,000 weights (stories260K), 4 bits cost a mean divergence of 0.091 nats uncalibrated,
    0.074 with AWQ and scale estimation, 0.061 with GPTQ, and 0.037 with GPTQ and a fifth of the layers in 8 bits.
    """
    if precision == "int8":
        return "int8"
    if not calibrated:
        return "int4"
    return "int4-mixed-gptq" if parameters <= _SMALL else "int4-awq"


def choose_form(precision: str, form: str | None, *, calibrated: bool, parameters: int) -> tuple[str, WeightForm]:
    """Return the name and the form that `precision` and `form` ask for.

    Raises:
        PackError: unknown, of another precision, or it needs conversations that were not given.
    """
    name = usual_form(precision, calibrated=calibrated, parameters=parameters) if form is None else form
    if name not in FORMS:
        raise PackError(f"unknown form {name!r} of weights", hint=nearest(name, FORMS))
    found = FORMS[name]
    if found.precision != precision:
        allowed = ", ".join(known for known, other in FORMS.items() if other.precision == precision)
        raise PackError(f"form {name!r} has {found.precision} weights, not {precision}", hint=f"allowed: {allowed}")
    if found.calibrated and not calibrated:
        raise PackError(f"form {name!r} is calibrated and got no conversation", hint="give conversations of the task")
    return name, found


def quantise(model: Any, form: WeightForm, rows: Sequence[Sequence[int]] = ()) -> Any:
    """Return the OpenVINO model with its weights in `form`; `model` itself is changed.

    Args:
        model: a stateful decoder, as exported.
        form: see `FORMS`.
        rows: ids of whole conversations, for the calibrated forms and the choice of sensitive layers.

    Raises:
        PackError: NNCF cannot compress this model so.
    """
    nncf = _extras.load("nncf")
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode(form.mode)}
    if form.precision == "int4":
        inputs = [model_inputs(model, ids) for ids in rows if ids]
        dataset = nncf.Dataset(inputs) if inputs and (form.calibrated or form.ratio < 1) else None
        advanced = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.quantization.advanced_parameters.GroupSizeFallbackMode.ADJUST,
            min_adjusted_group_size=_SMALLEST_GROUP,
        )
        options |= {"group_size": form.group_size, "ratio": form.ratio, "dataset": dataset,
                    "subset_size": max(1, len(inputs)), "backup_mode": nncf.BackupMode.INT8_ASYM,
                    "advanced_parameters": advanced}  # fmt: skip
        options.update({str(name): True for name in form.refine})
        if form.ratio < 1:
            metric = nncf.SensitivityMetric
            options["sensitivity_metric"] = (
                metric.WEIGHT_QUANTIZATION_ERROR if dataset is None else metric.MAX_ACTIVATION_VARIANCE
            )
    try:
        with silent():
            return nncf.compress_weights(model, **options)
    except (nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError, RuntimeError, ValueError) as error:
        raise PackError(f"NNCF cannot store the weights as {form.mode}: {str(error).strip()}") from error


def model_inputs(model: Any, ids: Sequence[int]) -> dict[str, NDArray[np.int64] | NDArray[np.int32]]:
    """Return the inputs with which an exported decoder reads `ids` from the start, batch of one."""
    row = np.array([list(ids)], dtype=np.int64)
    known: dict[str, NDArray[Any]] = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(row.shape[1], dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    names = {port.get_any_name() for port in model.inputs}
    return {name: value for name, value in known.items() if name in names}


def calibration_rows(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return at most `CALIBRATION_ROWS` rows spread evenly over `rows`, each cut to `CALIBRATION_TOKENS`.

    Only the statistics of the layers' inputs are taken from them, so the beginning of a conversation is enough.
    """
    step = max(1, len(rows) // CALIBRATION_ROWS)
    return [list(row[:CALIBRATION_TOKENS]) for row in rows[::step][:CALIBRATION_ROWS] if row]
