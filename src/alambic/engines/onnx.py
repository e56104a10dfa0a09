"""The part `onnx`: tokenizer.json and model.onnx through ONNX Runtime on the CPU.

It exists because CPUs differ: on those without VNNI or AVX-512, its dynamic int8 answers a short text in a third of the
time that OpenVINO needs; on the others OpenVINO leads. The build measures both. Safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.parts import Array, TokenParams, check_keys, infer_windows
from alambic.engines.tokens import choose_tokenizer, fast_tokenizer
from alambic.errors import EngineError

# What a bundle may set: whether idle threads wait in a loop (sooner answers, busier cores).
_ALLOWED = ("allow_spinning",)


class OnnxPart:
    """Runs a folder written by `alambic.pack.onnx`."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        self.params = TokenParams.of(params, folder)
        self.output = self.params.output
        check_keys(self.params.properties, _ALLOWED, folder)
        self._ort = _extras.load("onnxruntime")
        self._ort.disable_telemetry_events()
        self._tokenize = fast_tokenizer(choose_tokenizer(folder, "tokenizer.json"), threads=threads)
        self._spinning = bool(self.params.properties.get("allow_spinning", True))
        self._threads = threads
        self._session = self._open(folder / "model.onnx")
        names = {entry.name for entry in self._session.get_inputs()}
        if not {"input_ids", "attention_mask"} <= names <= {"input_ids", "attention_mask", "token_type_ids"}:
            raise EngineError(
                f"{folder / 'model.onnx'}: has inputs {', '.join(sorted(names))}; expected input_ids, attention_mask"
            )
        self._needs_types = "token_type_ids" in names
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        if self.params.vectors and len(self._outputs) != 2:
            raise EngineError(
                f"{folder / 'model.onnx'}: has {len(self._outputs)} output(s); expected scores and vectors"
            )

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""
        return self._tokenize(texts)

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return one row per window of ids, computed in batches of like length."""
        return infer_windows(windows, self._run, pad_id=self.params.pad_id, batch_size=batch_size)

    def infer_wide(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return scores and vector of each window of ids, [N, L + H]."""
        return infer_windows(windows, partial(self._run, outputs=2), pad_id=self.params.pad_id, batch_size=batch_size)

    def run(self, items: Sequence[str]) -> NDArray[np.float32]:
        """Return one row per text; long texts are the business of `classify`."""
        return self.infer(self.token_ids(items))

    def describe(self) -> dict[str, Any]:
        """Return engine, version, threads and properties."""
        return {
            "engine": "onnx",
            "version": self._ort.__version__,
            "device": "CPU",
            "tokenizer": "tokenizer.json",
            "precision": self.params.precision,
            "properties": {"allow_spinning": self._spinning},
            "threads": self._threads,
        }

    def _run(self, ids: Array, mask: Array, *, outputs: int = 1) -> NDArray[np.float32]:
        feed = {"input_ids": ids, "attention_mask": mask}
        if self._needs_types:
            feed["token_type_ids"] = np.zeros_like(ids)
        try:
            values = self._session.run(self._outputs[:outputs], feed)
        except _errors(self._ort) as error:
            raise EngineError(f"ONNX Runtime cannot run this input of shape {ids.shape}: {error}") from error
        return np.asarray(values[0] if outputs == 1 else np.concatenate(values, axis=1), dtype=np.float32)

    def _open(self, model: Path) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # its warnings go to stderr, which belongs to the caller
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # the arena keeps the largest batch ever seen
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self._spinning)))
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if not model.is_file():
            raise EngineError(f"{model}: missing")
        try:
            return self._ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except _errors(self._ort) as error:
            raise EngineError(f"{model}: ONNX Runtime cannot load this model: {error}") from error


def _errors(ort: Any) -> tuple[type[Exception], ...]:
    state = ort.capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NotImplemented",
        "RuntimeException",
    )
    return (RuntimeError, *(getattr(state, name) for name in names if hasattr(state, name)))
