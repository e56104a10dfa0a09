"""Log-probabilities of given texts: the model of a part run once over whole sequences, through openvino.Core.

The pipeline that writes only tells the probability of what it sampled. The graph is cut so that the vocabulary's scores
are computed for the positions asked for alone: for a prompt of 2,000 tokens and 150,000 words that is 1.2 GB less.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.genai_core import first_line
from alambic.engines.parts import padded
from alambic.engines.windows import batches
from alambic.errors import EngineError

_MAX_ROWS = 16
_MAX_CELLS = 4096  # ids in one batch
_POSITIONS = "alambic_positions"
Row = tuple[Sequence[int], Sequence[int]]


class Scorer:
    """Opens the model at its first use. Safe to share between threads: one batch at a time."""

    def __init__(self, model: Path, properties: Mapping[str, str | int | bool], *, adapter: Path | None = None) -> None:
        self._path = model
        self._adapter = adapter
        self._properties = dict(properties)
        self._request: Any = None
        self._inputs: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def score(self, rows: Sequence[Row]) -> list[list[float]]:
        """Return the natural log-probability of each id of each continuation.

        Args:
            rows: ids of a prompt, which is not empty, and ids of what follows it.

        Raises:
            EngineError: the model cannot be run.
        """
        out: list[list[float]] = [[] for _ in rows]
        asked = [i for i, (_, after) in enumerate(rows) if after]
        lengths = [len(rows[i][0]) + len(rows[i][1]) for i in asked]
        for places in batches(lengths, max_rows=_MAX_ROWS, max_cells=_MAX_CELLS):
            group = [asked[place] for place in places]
            for i, values in zip(group, self._batch([rows[i] for i in group]), strict=True):
                out[i] = values
        return out

    def close(self) -> None:
        """Free the model."""
        with self._lock:
            self._request = None

    def _batch(self, rows: Sequence[Row]) -> list[list[float]]:
        ids, mask = padded([[*before, *after] for before, after in rows], pad_id=0)  # [B, T]
        most = max(len(after) for _, after in rows)
        positions = np.zeros((len(rows), most), dtype=np.int64)  # [B, K]: where the next id is foretold
        for i, (before, after) in enumerate(rows):
            positions[i, : len(after)] = np.arange(len(before) - 1, len(before) + len(after) - 1)
        with self._lock:
            logits = self._run(ids, mask, positions)  # [B, K, V]
        return [_chosen(logits[i, : len(after)], after) for i, (_, after) in enumerate(rows)]

    def _run(self, ids: NDArray[Any], mask: NDArray[Any], positions: NDArray[Any]) -> NDArray[np.float32]:
        if self._request is None:
            self._open()
        feed = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
            "beam_idx": np.arange(len(ids), dtype=np.int32),
            _POSITIONS: positions,
        }
        self._request.reset_state()
        try:
            self._request.infer({name: value for name, value in feed.items() if name in self._inputs})
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot score this input of shape {ids.shape}: {first_line(error)}") from error
        logits: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return logits

    def _open(self) -> None:
        openvino = _extras.load("openvino")
        core = openvino.Core()
        try:
            model = core.read_model(str(self._path))
            if self._adapter is not None:
                _add_adapter(model, self._adapter)
            _only_positions(model)
            compiled = core.compile_model(model, "CPU", self._properties)
        except RuntimeError as error:
            raise EngineError(f"{self._path}: OpenVINO cannot load this model: {first_line(error)}") from error
        self._inputs = frozenset(name for port in compiled.inputs for name in port.get_names())
        self._request = compiled.create_infer_request()


def _only_positions(model: Any) -> None:
    """Gather the hidden states of the positions asked for before they meet the vocabulary."""
    ops = _extras.load("openvino.opset13")
    openvino = _extras.load("openvino")
    node = model.output(0).get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":  # past what scales or caps the scores
        node = node.input_value(0).get_node()
    positions = ops.parameter([-1, -1], dtype=np.int64, name=_POSITIONS)
    positions.output(0).get_tensor().set_names({_POSITIONS})
    picked = ops.gather(node.input_value(0), positions, openvino.opset13.constant(1, dtype=np.int64), batch_dims=1)
    node.input(0).replace_source_output(picked.output(0))
    model.add_parameters([positions])
    model.validate_nodes_and_infer_types()


def _add_adapter(model: Any, file: Path) -> None:
    """Add B (A x) beside each product that the LoRA adapter in `file` names; PEFT's names are those of the modules."""
    ops = _extras.load("openvino.opset13")
    tensors = read_tensors(file)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        name = node.get_friendly_name().split("/")[0].removeprefix("__module.")
        down = tensors.pop(f"base_model.model.{name}.lora_A.weight", None)  # [r, I]
        up = tensors.pop(f"base_model.model.{name}.lora_B.weight", None)  # [O, r]
        if down is None or up is None:
            continue
        readers = list(node.output(0).get_target_inputs())
        inner = ops.matmul(node.input_value(0), ops.constant(down), False, True)
        whole = ops.add(node.output(0), ops.matmul(inner, ops.constant(up), False, True))
        for reader in readers:
            reader.replace_source_output(whole.output(0))
    if tensors:
        raise EngineError(f"{file}: the model has no place for {next(iter(tensors))!r}: it belongs to another base")
    model.validate_nodes_and_infer_types()


def read_tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    """Read a safetensors file of float32 tensors, as `alambic.pack.writer_hf.write_adapter` leaves it.

    Raises:
        EngineError: it is not one.
    """
    try:
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entries = {k: v for k, v in json.loads(raw[8:start]).items() if k != "__metadata__"}
        if any(entry["dtype"] != "F32" for entry in entries.values()):
            raise ValueError("a tensor is not of type F32")
        return {
            name: np.frombuffer(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], np.float32)
            .reshape(entry["shape"])
            for name, entry in entries.items()
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise EngineError(f"{file}: not a readable adapter: {error}") from error


def _chosen(logits: NDArray[np.float32], ids: Sequence[int]) -> list[float]:
    """Return log softmax(logits)[ids]; logits [K, V]."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    totals = np.log(np.exp(values).sum(axis=-1))
    return [float(values[k, id] - totals[k]) for k, id in enumerate(ids)]
