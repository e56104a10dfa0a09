"""Number formats of GGUF: which tensor gets which, and the numbers in it.

`F32`, `F16`, `BF16`, `Q8_0` and `Q4_0` are written by the `gguf` package, bit by bit as llama.cpp writes them. Those
with superblocks (`Q4_K_M` and others) need llama.cpp's own quantiser: the library llama-cpp-python, or the program
llama-quantize.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alambic._extras import available, load
from alambic.errors import PackError

Form = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]
OWN_FORMS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# Number of the file type in llama.h.
K_FORMS = {"Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
_FILE_TYPE = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0
_AT_ONCE = 1 << 24  # numbers in float32 at a time, 64 MB


@dataclass(frozen=True)
class Streamed:
    """A tensor that is read, changed and written a few rows at a time; GGUFWriter asks for its bytes only.

    Attributes:
        nbytes: of the written tensor.
        pieces: gives the written rows in order.
    """

    nbytes: int
    pieces: Callable[[], Iterator[NDArray[Any]]]

    def tofile(self, file: Any) -> None:
        """Write the tensor."""
        for piece in self.pieces():
            piece.tofile(file)


def check_form(form: str) -> None:
    """Refuse a form that cannot be written here, before anything slow.

    Raises:
        PackError: unknown, or it needs a quantiser that is not installed.
    """
    if form in OWN_FORMS:
        return
    if form not in K_FORMS:
        raise PackError(f"GGUF form {form!r} is not known", hint="allowed: " + ", ".join((*OWN_FORMS, *K_FORMS)))
    if quantiser() is None:
        raise PackError(
            f"GGUF form {form} needs llama.cpp's own quantiser, and neither llama-cpp-python nor the program "
            "llama-quantize is installed",
            hint=f"pip install llama-cpp-python, or choose one of {', '.join(OWN_FORMS)}",
        )


def file_type(form: str) -> int:
    """Return the number of a form in `general.file_type`."""
    return _FILE_TYPE[form] if form in _FILE_TYPE else K_FORMS[form]


def tensor_form(name: str, shape: tuple[int, ...], form: str, *, tied: bool) -> str:
    """Return the form of one tensor: vectors stay F32, rows that no block divides F16.

    Args:
        name: in GGUF.
        shape: rows, then columns.
        form: of the file.
        tied: the embedding is the output matrix too. The output decides between close tokens, so Q4_0 keeps it in Q8_0.
    """
    if len(shape) < 2 or form == "F32":
        return "F32"
    if form in ("F16", "BF16"):
        return form
    if shape[-1] % _BLOCK:
        return "F16"
    last = name == "output.weight" or (tied and name == "token_embd.weight")
    return "Q8_0" if last else form


def stored(shape: tuple[int, ...], form: str, rows: Callable[[int, int], NDArray[np.float32]]) -> Streamed:
    """Return a tensor as it is stored in `form`.

    Args:
        shape: rows, then columns.
        form: one of `OWN_FORMS`.
        rows: gives the float32 rows [start, stop).
    """
    gguf = load("gguf")
    kind = gguf.GGMLQuantizationType[form]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = int(np.prod(shape, dtype=np.int64)) // block * size
    step = max(1, _AT_ONCE // max(1, int(np.prod(shape[1:], dtype=np.int64))))

    def pieces() -> Iterator[NDArray[Any]]:
        for start in range(0, shape[0], step):
            numbers = rows(start, min(start + step, shape[0]))
            if form == "F16":
                _check_range(numbers)
            yield np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(numbers), kind))

    return Streamed(nbytes, pieces)


def quantiser() -> str | None:
    """Return what can write K-forms: ``llama-cpp-python``, the path of llama-quantize, or None."""
    return "llama-cpp-python" if available("llama_cpp") else shutil.which("llama-quantize")


def requantise(source: Path, out: Path, form: str, *, threads: int) -> None:
    """Write the F16 or F32 file `source` as the K-form `form`.

    Raises:
        PackError: the quantiser fails.
    """
    tool = quantiser()
    assert tool is not None, "check_form comes first"
    if tool == "llama-cpp-python":
        _by_library(source, out, form, threads)
        return
    done = subprocess.run(
        [tool, str(source), str(out), form, str(threads)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not out.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise PackError(f"llama-quantize could not write {form}: {last[0]}")


def _by_library(source: Path, out: Path, form: str, threads: int) -> None:
    llama = load("llama_cpp")
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = K_FORMS[form], threads
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) != 0:
        raise PackError(f"llama-cpp-python could not write {form}")


def _check_range(numbers: NDArray[np.float32]) -> None:
    largest = float(np.abs(numbers).max(initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise PackError(f"a weight of {largest:g} does not fit F16", hint="use BF16 or F32")
