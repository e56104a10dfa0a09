"""A fresh process that opens a bundle, predicts texts and tells what that cost; the parent side is `run`.

Cold start and peak memory cannot be seen from a process that already holds other libraries and models.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alambic.errors import AlambicError, EngineError

COMMAND = (sys.executable, "-c", "from alambic.measure.probe import main; main()")


@dataclass(frozen=True)
class Request:
    """What the process is to open and predict."""

    bundle: str
    texts: tuple[str, ...]
    threads: int | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class Result:
    """What it cost.

    Attributes:
        total_ms: from starting Python to the first prediction, seen from outside.
        open_ms: opening the bundle.
        first_ms: first prediction.
        peak_ram_mb: largest resident memory after all texts; None where the system does not tell.
        ram_source: where the figure comes from: ``VmHWM``, ``ru_maxrss``, ``PeakWorkingSetSize`` or ``unavailable``.
        n: texts predicted.
    """

    total_ms: float
    open_ms: float
    first_ms: float
    peak_ram_mb: float | None
    ram_source: str
    n: int


def run(request: Request, *, command: Sequence[str] = COMMAND, timeout_s: float = 600.0) -> Result:
    """Run the probe once; a process that takes longer than `timeout_s` is stopped.

    Raises:
        EngineError: the process failed; the end of what it wrote is given.
    """
    # Standard error goes to a file: a pipe nobody reads would block a talkative process.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        start = time.perf_counter()
        with subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as process:
            late = threading.Event()
            timer = threading.Timer(timeout_s, _stop, (process, late))
            timer.start()
            try:
                first_ms, out = _converse(process, json.dumps(asdict(request)), start)
            finally:
                timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if late.is_set():
        raise EngineError(f"{request.bundle}: no answer within {timeout_s:g} s in a fresh process")
    answer = json.loads(out) if out.strip() else {"error": said[-1] if said else f"exit code {process.returncode}"}
    if "error" in answer:
        raise EngineError(f"{request.bundle}: predicting in a fresh process failed: {answer['error']}")
    return Result(total_ms=first_ms, **answer)


def _stop(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()


def _converse(process: subprocess.Popen[str], request: str, start: float) -> tuple[float, str]:
    try:
        process.stdin.write(request + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    except BrokenPipeError:  # it died before reading: its error output says why
        return 0.0, ""
    process.stdout.readline()  # type: ignore[union-attr]  # "first", as soon as the first text is answered
    first_ms = 1000.0 * (time.perf_counter() - start)
    process.stdin.close()  # type: ignore[union-attr]
    # Not communicate(): it would read past what readline has already buffered.
    out = process.stdout.read()  # type: ignore[union-attr]
    process.wait()
    return first_ms, out


def main(open_engine: Callable[..., Any] | None = None) -> None:
    """Serve one request from standard input: the side that runs in the fresh process."""
    request = json.loads(sys.stdin.readline())
    try:
        answer = _answer(request, open_engine)
    except AlambicError as error:
        answer = {"error": error.message}
        _say("first")
    _say(json.dumps(answer))


def _answer(request: dict[str, Any], open_engine: Callable[..., Any] | None) -> dict[str, Any]:
    start = time.perf_counter()
    if open_engine is None:
        import alambic  # inside the clock: importing the engine is part of a cold start

        open_engine = alambic.open
    engine = open_engine(request["bundle"], threads=request["threads"])
    opened = time.perf_counter()
    engine.predict(request["texts"][:1])
    first = time.perf_counter()
    _say("first")
    size = request["batch_size"]
    for i in range(0, len(request["texts"]), size):
        engine.predict(request["texts"][i : i + size])
    peak, source = peak_ram()
    return {
        "open_ms": 1000.0 * (opened - start),
        "first_ms": 1000.0 * (first - opened),
        "peak_ram_mb": peak,
        "ram_source": source,
        "n": len(request["texts"]),
    }


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def peak_ram() -> tuple[float | None, str]:
    """Return the largest resident memory of this process so far in MB (10^6 bytes), and where that comes from."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6, "VmHWM"
    if sys.platform == "win32":
        return _windows_peak(), "PeakWorkingSetSize"
    return _rusage_peak()


def _rusage_peak() -> tuple[float | None, str]:
    try:
        import resource
    except ModuleNotFoundError:
        return None, "unavailable"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, "ru_maxrss"


def _windows_peak() -> float:
    import ctypes
    from ctypes import wintypes

    sizes = [(f"_{i}", ctypes.c_size_t) for i in range(7)]

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            *sizes,
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    dll: Any = ctypes
    kernel = dll.windll.kernel32
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    ask = kernel.K32GetProcessMemoryInfo
    ask.argtypes = (wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD)
    ask(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
    return float(counters.PeakWorkingSetSize) / 1e6
