"""The only door to optional and heavy libraries.

`load` imports a library late and says how to install it when it is missing. OpenVINO and NNCF report to an analytics
service on import unless their telemetry package is absent, so it is hidden first: both then use their own stubs. ONNX
Runtime gives the machine an identifier and reports from native code, unless the environment forbids it before import.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from alambic.errors import MissingExtra

_EXTRA_OF = {
    "torch": "build", "transformers": "build", "sklearn": "build", "nncf": "build", "onnx": "build", "pyarrow": "build",
    "rensa": "build", "charset_normalizer": "build", "matplotlib": "build", "safetensors": "build",
    "huggingface_hub": "build", "scipy": "build", "threadpoolctl": "build", "onnxscript": "build",
    "jsonschema": "generate", "referencing": "generate", "optimum": "generate", "peft": "generate",
    "accelerate": "generate", "sacrebleu": "generate",
    "rouge_score": "generate", "sacremoses": "generate", "gguf": "gguf", "xllamacpp": "gguf",
    "sentencepiece": "build", "httpx": "build",
}  # fmt: skip

# ONNX Runtime reads the first; releases in between read the second.
_OPT_OUT = (
    "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY",
)  # fmt: skip


def hide_telemetry() -> None:
    """Make the analytics packages of OpenVINO, NNCF, ONNX Runtime and the Hub client inert in this process."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    for name in _OPT_OUT:
        os.environ.setdefault(name, "1")


def _house_matplotlib() -> None:
    """Let Matplotlib keep its list of fonts in our cache: by itself it makes two more folders in the user's home."""
    from alambic.bundle_cache import writable_cache

    if "MPLCONFIGDIR" not in os.environ and (folder := writable_cache("matplotlib")) is not None:
        os.environ["MPLCONFIGDIR"] = str(folder)


def available(name: str) -> bool:
    """Tell whether the top-level module `name` can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def missing(error: ModuleNotFoundError) -> MissingExtra | None:
    """Return what to say and to install when the absent module is one of an extra's, None when it is not."""
    top = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(top)
    if extra is None:
        return None
    return MissingExtra(f"this needs {top}, which is not installed", hint=f"pip install 'alambic[{extra}]'")


def load(name: str) -> ModuleType:
    """Import module `name` (dotted names too) with telemetry hidden.

    Raises:
        MissingExtra: the library is not installed; the message names the extra that brings it.
    """
    hide_telemetry()
    top = name.partition(".")[0]
    if top == "matplotlib":
        _house_matplotlib()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        absent = missing(error)
        if absent is None:
            package = top.replace("_", "-")
            absent = MissingExtra(f"this needs {top}, which is not installed", hint=f"pip install {package}")
        raise absent from error
