"""llama-cpp-python built from its source package for this very processor, in a virtual environment of its own.

Nothing of it enters the project's environment. The build needs a C++ compiler and takes several minutes on 2 cores;
`CMAKE_BUILD_PARALLEL_LEVEL` says on how many it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from run import ROOT, say

VERSION = "0.3.36"
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"  # the second leaves out what sees images
# llama.cpp built by g++ 12.2 crashed on a processor with AMX: the stores that fill a tile configuration were dropped as
# dead (https://github.com/ggml-org/llama.cpp/issues/20824). So the compiler is told to drop none.
CXXFLAGS = "-fno-tree-dse -fno-dse"
FOLDER = ROOT / ".bench" / "serving" / "native"
_MADE = {"version": VERSION, "cmake": CMAKE_ARGS, "cxxflags": CXXFLAGS}
_COMPILERS = ("c++", "g++", "clang++")
_SHOW = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"


def python() -> Path:
    """Return the interpreter of that environment, there or not."""
    inside = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return FOLDER.joinpath(*inside)


def missing() -> str | None:
    """Return why the environment can neither be used nor made; None: it can."""
    if shown() is not None or os.environ.get("CXX") or any(map(shutil.which, _COMPILERS)):
        return None
    return f"no C++ compiler ({', '.join(_COMPILERS)} or $CXX) on this machine"


def shown() -> str | None:
    """Return the processor features of the llama.cpp that is there; None: none, or it was built otherwise."""
    made = FOLDER / "made.json"
    if not made.exists() or json.loads(made.read_text("utf-8")) != _MADE:
        return None
    done = subprocess.run([python(), "-c", _SHOW], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def build() -> dict[str, Any]:
    """Make the environment unless it is there; return what was built.

    Raises:
        SystemExit: it cannot be built; the message names pip's log.
    """
    if shown() is None:
        say(f"  building llama-cpp-python {VERSION} from source; its log: {FOLDER}.log")
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **os.environ}
        environment |= {"CMAKE_ARGS": CMAKE_ARGS, "CXXFLAGS": CXXFLAGS}
        # Without the cache: it may hold a wheel that other flags made.
        command = [python(), "-m", "pip", "install", "-v", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        with Path(f"{FOLDER}.log").open("w", encoding="utf-8") as log:
            done = subprocess.run(
                [*command, f"llama-cpp-python=={VERSION}"], stdout=log, stderr=log, env=environment, check=False
            )
        if done.returncode:
            raise SystemExit(f"llama-cpp-python could not be built; see {FOLDER}.log")
        (FOLDER / "made.json").write_text(json.dumps(_MADE), "utf-8")
    found = shown()
    if found is None:
        raise SystemExit(f"{python()}: llama-cpp-python {VERSION} was built and cannot be imported")
    return {**_MADE, "features": found}
