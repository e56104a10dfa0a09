"""The part `openvino`: a tokenizer and an OpenVINO model on the CPU. The default engine of every neural bundle.

Its folder holds model.xml and model.bin (inputs `input_ids` and `attention_mask`, int64 [B, T]; one float output, or
scores and vectors) and tokenizer.json or tokenizer.xml. Safe to share between threads: one request runs at a time, on
all the engine's threads, which is what answers a single text soonest.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.arithmetic import computed
from alambic.engines.parts import Array, TokenParams, check_keys, infer_windows
from alambic.engines.tokens import choose_tokenizer, fast_tokenizer, graph_tokenizer
from alambic.errors import EngineError

# What a bundle may set. The engine's own defaults change with the CPU (bf16, groups of 32), so they are stated here.
DEFAULTS: dict[str, str | int | bool] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
_ALLOWED = (*DEFAULTS, "EXECUTION_MODE_HINT", "KV_CACHE_PRECISION", "ENABLE_CPU_PINNING", "ENABLE_HYPER_THREADING")
_INPUTS = ("input_ids", "attention_mask")


class OpenVinoPart:
    """Runs a folder written by `alambic.pack.openvino`."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        self.params = TokenParams.of(params, folder)
        self.output = self.params.output
        check_keys(self.params.properties, _ALLOWED, folder)
        self._ov = _extras.load("openvino")
        self._core = self._ov.Core()
        self._folder = folder
        self._config = self._config_of(threads, cache_dir)
        tokenizer = choose_tokenizer(folder, self.params.tokenizer)
        if tokenizer.suffix == ".json":
            self._tokenize = fast_tokenizer(tokenizer, threads=threads)
        else:
            self._core.add_extension(str(_extension()))
            self._tokenize = graph_tokenizer(self._compile(tokenizer))
        self._tokenizer = tokenizer.name
        self._compiled = self._compile(folder / "model.xml")
        self._check_model(folder / "model.xml")
        self._request = self._compiled.create_infer_request()
        self._lock = threading.Lock()

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
        """Return engine, version, device, threads and the properties that the compiled model really has."""
        names = (*DEFAULTS, "INFERENCE_NUM_THREADS", "NUM_STREAMS", *self.params.properties)
        properties = {name: _plain(self._compiled.get_property(name)) for name in dict.fromkeys(names)}
        return {
            "engine": "openvino",
            "version": self._ov.get_version(),
            "device": str(self._core.get_property("CPU", "FULL_DEVICE_NAME")),
            "tokenizer": self._tokenizer,
            "precision": self.params.precision,
            "properties": properties,
            "threads": int(properties["INFERENCE_NUM_THREADS"]),
        }

    def _run(self, ids: Array, mask: Array, *, outputs: int = 1) -> NDArray[np.float32]:
        with self._lock:
            self._request.set_input_tensor(self._at[0], self._ov.Tensor(ids, shared_memory=True))
            self._request.set_input_tensor(self._at[1], self._ov.Tensor(mask, shared_memory=True))
            try:
                self._request.infer()
            except RuntimeError as error:
                raise EngineError(
                    f"OpenVINO cannot run this input of shape {ids.shape}: {_first_line(error)}"
                ) from error
            # The tensors belong to the request, and the next call writes over them.
            if outputs == 1:
                return np.array(self._request.get_output_tensor(0).data, dtype=np.float32)
            rows = [self._request.get_output_tensor(i).data for i in range(outputs)]
            return np.concatenate(rows, axis=1, dtype=np.float32)

    def _config_of(self, threads: int | None, cache_dir: Path | None) -> dict[str, str | int | bool]:
        stated = computed({**DEFAULTS, **self.params.properties}, self._folder)
        config: dict[str, str | int | bool] = {"PERFORMANCE_HINT": "LATENCY", **stated}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        if cache_dir is not None:
            config["CACHE_DIR"] = str(cache_dir)
            config["CACHE_MODE"] = "OPTIMIZE_SIZE"  # weights stay in the bundle: 0.4 MB instead of 44, as fast to load
        return config

    def _compile(self, model: Path) -> Any:
        for file in (model, model.with_suffix(".bin")):
            if not file.is_file():
                raise EngineError(f"{file}: missing")
        try:
            return self._core.compile_model(str(model), "CPU", self._config)
        except RuntimeError as error:
            first = error
        if "CACHE_DIR" in self._config:
            # A full disk or a damaged cache must not stop a prediction: the cache only saves time.
            plain = {name: value for name, value in self._config.items() if name != "CACHE_DIR"}
            try:
                return self._core.compile_model(str(model), "CPU", plain)
            except RuntimeError as error:
                first = error
        raise EngineError(f"{model}: OpenVINO cannot load this model: {_first_line(first)}") from first

    def _check_model(self, model: Path) -> None:
        inputs, outputs = self._compiled.inputs, self._compiled.outputs
        names = [next((n for n in _INPUTS if n in port.get_names()), port.get_any_name()) for port in inputs]
        expected = 2 if self.params.vectors else 1
        if sorted(names) != sorted(_INPUTS) or len(outputs) != expected:
            raise EngineError(
                f"{model}: has inputs {', '.join(names)} and {len(outputs)} output(s); "
                f"expected {', '.join(_INPUTS)} and {expected} output(s)"
            )
        self._at = [names.index(name) for name in _INPUTS]


def _extension() -> Path:
    """Return the library with the tokenizer operations; importing its Python package would cost 0.2 s for nothing."""
    spec = importlib.util.find_spec("openvino_tokenizers")
    if spec is None or spec.origin is None:
        _extras.load("openvino_tokenizers")  # raises MissingExtra with the command to type
        raise EngineError("openvino_tokenizers is installed without its library", hint="reinstall openvino-tokenizers")
    for file in sorted((Path(spec.origin).parent / "lib").glob("*openvino_tokenizers*")):
        if file.suffix in (".so", ".dll", ".dylib"):
            return file
    raise EngineError("openvino_tokenizers is installed without its library", hint="reinstall openvino-tokenizers")


def _plain(value: object) -> str | int | bool:
    if isinstance(value, bool | int | str):
        return value
    return str(value).removeprefix("<Type: '").removesuffix("'>")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return lines[0][:300] if lines else type(error).__name__
