"""Run a program that a model wrote, in a process that can hurt nothing, and say which protections it had.

    outcome = run_python("print(1 + 1)")
    outcome.status        # "ok"

The program gets a directory of its own, an empty environment, limits on time, memory, files and processes, no network
and no sight of the user's files; everything it started dies with it. Linux gives all of it without privileges
(namespaces, Landlock, seccomp: see sandbox_launcher.py). Where the system withholds one, nothing is run unless the
caller accepts that by name, and the outcome names what was missing. It is a guard for measuring, not for hostile
experts: for those use a virtual machine.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from alambic.errors import EngineError, nearest

Status = Literal["ok", "failed", "timeout", "output", "crashed"]
PROTECTIONS = ("network", "files", "processes", "tree")
"""No network; no reading or writing of the user's files; a limit on processes; death of all descendants."""

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_GRACE_S = 5.0  # the launcher keeps the time; this is for a launcher that is stuck


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall time, after which it and all it started is killed; well over the processor time, so that a busy
            machine does not change who passes.
        cpu_seconds: processor time of one process.
        memory_mb: address space of one process, in MB (10^6 bytes).
        file_mb: largest file it may write, in MB.
        processes: processes and threads at once, its own included.
        output_bytes: of standard output and error together; a program that writes more is stopped.
    """

    seconds: float = 30.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 4
    output_bytes: int = 1_000_000


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        status: ``ok`` (exit code 0), ``failed`` (another exit code), ``crashed`` (killed by a signal, as when the
            memory or file limit is met in native code), ``timeout`` (wall or processor time), ``output`` (wrote too
            much).
        code: exit code; None when it did not exit by itself.
        stdout: what it wrote, as UTF-8, cut at the limit.
        stderr: the same of its errors.
        seconds: wall time.
        missing: protections that it ran without.
    """

    status: Status
    code: int | None
    stdout: str
    stderr: str
    seconds: float
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.status == "ok"


def run_python(
    code: str,
    *,
    limits: Limits | None = None,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    accept_missing: Sequence[str] = (),
) -> Outcome:
    """Run a Python program with the standard library only (``python -I -S``).

    Args:
        code: the program.
        limits: what it may use.
        stdin: what it reads.
        files: plain names and contents of files that it finds in its directory.
        accept_missing: protections it may run without where the system withholds them.

    Raises:
        EngineError: a protection is missing and not accepted, or the program cannot be started.
    """
    python = str(Path(getattr(sys, "_base_executable", sys.executable) or sys.executable).resolve())
    argv = [python, "-I", "-S", "-X", "utf8", "program.py"]
    content = {**(files or {}), "program.py": code}
    return run(argv, limits=limits, stdin=stdin, files=content, accept_missing=accept_missing)


def check_bash(command: str, *, limits: Limits | None = None, accept_missing: Sequence[str] = ()) -> Outcome:
    """Parse a shell command with ``bash -n``; nothing of it is executed. ``ok`` means that it parses.

    Raises:
        EngineError: bash is not there, or as `run_python`.
    """
    bash = next((path for path in ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash") if os.path.exists(path)), None)
    if bash is None:
        raise EngineError("bash is not installed, and commands are parsed with `bash -n`", hint="install bash")
    argv = [bash, "--noprofile", "--norc", "-n", "command.sh"]
    return run(argv, limits=limits, files={"command.sh": command + "\n"}, accept_missing=accept_missing)


def run(
    argv: Sequence[str],
    *,
    limits: Limits | None = None,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    accept_missing: Sequence[str] = (),
) -> Outcome:
    """Run `argv` (its first word an absolute path) in the sandbox; see `run_python`.

    Raises:
        EngineError: as `run_python`.
    """
    limits = limits or Limits()
    for name in accept_missing:
        if name not in PROTECTIONS:
            raise EngineError(f"unknown protection {name!r}", hint=nearest(name, PROTECTIONS))
    if os.name != "posix":
        raise EngineError("programs can be run safely on Linux (and, with fewer protections, macOS) only")
    with _directory(files or {}) as folder, tempfile.TemporaryFile() as source:
        source.write(stdin.encode("utf-8", "surrogatepass"))
        source.seek(0)
        return _Run(argv, limits, folder, tuple(accept_missing)).go(source)


@contextmanager
def _directory(files: Mapping[str, str]) -> Iterator[Path]:
    # A program may leave unreadable folders behind; what cannot be removed stays in the system's temporary folder.
    with tempfile.TemporaryDirectory(prefix="alambic-sandbox-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file, content in files.items():
            if Path(file).name != file:
                raise EngineError(f"file {file!r}: only plain names are allowed in the sandbox")
            (folder / file).write_bytes(content.encode("utf-8", "surrogatepass"))
        yield folder


class _Run:
    """One program between start and end."""

    def __init__(self, argv: Sequence[str], limits: Limits, folder: Path, accept: tuple[str, ...]) -> None:
        self.limits, self.folder = limits, folder
        request = {
            "argv": list(argv),
            "seconds": limits.seconds,
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_mb * 1_000_000,
            "file_bytes": limits.file_mb * 1_000_000,
            "processes": limits.processes,
            "readable": [str(path) for path in _readable(argv[0])],
            "accept_missing": list(accept),
        }
        self.request = json.dumps(request)

    def go(self, stdin: IO[bytes]) -> Outcome:
        status_read, status_write = os.pipe()
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(status_write), self.request],
                stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder, env={},
                pass_fds=(status_write,), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(status_read)
            raise EngineError(f"the sandbox cannot be started: {error}") from error
        finally:
            os.close(status_write)
        with process, os.fdopen(status_read, "rb") as status:
            try:
                out, err, report, overflow = self._read(process, status, started)
            finally:
                _end(process)
        return self._outcome(out, err, report, overflow, time.perf_counter() - started)

    def _read(
        self, process: subprocess.Popen[bytes], status: IO[bytes], started: float
    ) -> tuple[bytes, bytes, bytes, bool]:
        """Read all three pipes until they close, or the time or the output is used up."""
        assert process.stdout is not None and process.stderr is not None
        taken: dict[IO[bytes], bytearray] = {stream: bytearray() for stream in (process.stdout, process.stderr, status)}
        until = started + self.limits.seconds + _GRACE_S
        overflow = False
        with selectors.DefaultSelector() as selector:
            for stream, content in taken.items():
                selector.register(stream, selectors.EVENT_READ, content)
            while selector.get_map() and (left := until - time.perf_counter()) > 0:
                for key, _ in selector.select(left):
                    piece = os.read(key.fd, 65536)
                    key.data.extend(piece)
                    if not piece:
                        selector.unregister(key.fileobj)
                written = len(taken[process.stdout]) + len(taken[process.stderr])
                if written > self.limits.output_bytes:
                    overflow = True
                    break
        out, err, report = (bytes(content) for content in taken.values())
        return out, err, report, overflow

    def _outcome(self, out: bytes, err: bytes, report: bytes, overflow: bool, seconds: float) -> Outcome:
        lines = [json.loads(line) for line in report.decode().splitlines()]
        told: dict[str, Any] = {key: value for line in lines for key, value in line.items()}
        if "refused" in told:
            absent = ", ".join(told["refused"])
            raise EngineError(
                f"programs cannot be run safely here: this system does not protect {absent}",
                hint="run it in a container or a virtual machine of its own, and accept that by name (accept_missing)",
            )
        if "error" in told:
            raise EngineError(f"the sandbox cannot be started: {told['error']}")
        keep = self.limits.output_bytes
        status, code = _verdict(told.get("wait"), overflow)
        text = [piece[:keep].decode("utf-8", "replace") for piece in (out, err)]
        return Outcome(status, code, text[0], text[1], seconds, tuple(told.get("missing", ())))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the launcher take its descendants down, then make sure."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _verdict(wait: object, overflow: bool) -> tuple[Status, int | None]:
    if overflow:
        return "output", None
    if not isinstance(wait, int):  # killed by the clock, in the launcher or here
        return "timeout", None
    if os.WIFSIGNALED(wait):
        return ("timeout" if os.WTERMSIG(wait) == signal.SIGXCPU else "crashed"), None
    code = os.waitstatus_to_exitcode(wait)
    return ("ok" if code == 0 else "failed"), code


def _readable(program: str) -> list[Path]:
    """Return what a program must read to run at all: itself, its libraries and the standard library."""
    places = [
        *(Path(place) for place in (sys.base_prefix, sys.base_exec_prefix)),
        Path(program).resolve(),
        *(Path(place) for place in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/bin", "/usr/bin")),
        *(Path(place) for place in ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/nix/store")),
    ]
    return [place for place in dict.fromkeys(places) if place.exists()]
