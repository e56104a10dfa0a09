"""The trusted half of the sandbox: takes everything away, then becomes the program. Run by path, never imported.

    python -I -S sandbox_launcher.py STATUS_FD REQUEST_JSON     # by sandbox.py, in the program's directory

Standard library only, because it runs without site-packages. On Linux: namespaces leave no network and tie every
descendant to one process (user_namespaces(7), pid_namespaces(7)); Landlock shows only the interpreter and the program's
own directory (https://docs.kernel.org/userspace-api/landlock.html); seccomp refuses sockets, changes of mode and owner,
and doors into the kernel (seccomp(2)). A privileged user gives up its identity first, or limits would not bind it. Each
works alone where another is withheld. It answers in JSON lines on STATUS_FD: protections missing, then the wait status.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from typing import Any, NoReturn

_NEWUSER, _NEWNET, _NEWPID, _NEWIPC, _NEWUTS = 0x10000000, 0x40000000, 0x20000000, 0x08000000, 0x04000000
_ANY_NAMESPACE = 0x7E020080
_PDEATHSIG, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVS, _AMBIENT, _KEEPCAPS = 1, 22, 36, 38, 47, 8
_READ_ANYTHING = 2  # CAP_DAC_READ_SEARCH: an interpreter under /root stays readable; Landlock bounds what else is
_NEEDED = (1 << _READ_ANYTHING) | (1 << 6) | (1 << 7)  # and CAP_SETGID, CAP_SETUID
_FIRST_UID = 2_000_000_000  # of nobody: each program gets one of its own, so that limits are not shared

# By machine: AUDIT_ARCH, clone, clone3, and what is refused. Sockets and io_uring (it makes sockets too); what Landlock
# does not see (mode, owner, attributes, times); handles, other processes, namespaces, mounts, keys, modules.
_CALLS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 56, 435, (
        41, 425, 90, 91, 268, 452, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199, 280, 261, 235, 132, 304, 101, 310,
        311, 272, 308, 165, 166, 155, 428, 429, 430, 432, 442, 250, 248, 249, 175, 313, 176, 246, 320, 321, 298, 323,
        463, 466, 469,
    )),
    "aarch64": (0xC00000B7, 220, 435, (
        198, 425, 52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16, 88, 265, 117, 270, 271, 97, 268, 40, 39, 41, 428, 429, 430,
        432, 442, 219, 217, 218, 105, 273, 106, 104, 294, 280, 241, 282, 463, 466, 469,
    )),
}  # fmt: skip
_TRUNCATE = {"x86_64": 76, "aarch64": 45}  # what Landlock does not see before its third version


class _Libc:
    """The few calls that Python does not have."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self, name: str, *args: Any) -> int:
        result = int(getattr(self._libc, name)(*args))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")
        return result

    def prctl(self, option: int, *args: int) -> None:
        padded = [ctypes.c_ulong(value) for value in (*args, 0, 0, 0, 0)[:4]]
        self("prctl", option, *padded)

    def syscall(self, number: int, *args: Any) -> int:
        return self("syscall", ctypes.c_long(number), *args)


def main() -> None:
    """Set up, run the program, report, and leave nothing running."""
    status, request = int(sys.argv[1]), json.loads(sys.argv[2])
    os.set_inheritable(status, False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    libc = _Libc() if platform.system() == "Linux" else None
    guard = _Guard(libc, request)
    refused = [name for name in guard.missing if name not in request["accept_missing"]]
    if refused:
        _tell(status, {"refused": refused})
        return
    _tell(status, {"missing": guard.missing})
    child = os.fork()
    if child == 0:
        _begin(status, guard)
    wait = None
    try:
        wait = _wait(child, time.monotonic() + request["seconds"])
        if wait is not None and not guard.contained:
            _tell(status, {"wait": wait})
    finally:
        if wait is None:
            os.kill(child, signal.SIGKILL)
        _end(None if guard.contained else child)


def _begin(status: int, guard: _Guard) -> NoReturn:
    """Run in the first child: the program itself, or the first process of its namespace, which watches over it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not guard.contained:
        _become(status, guard)
    assert guard.libc is not None
    guard.libc.prctl(_PDEATHSIG, signal.SIGKILL)
    program = os.fork()
    if program == 0:
        _become(status, guard)
    while True:  # orphans end here too
        pid, wait = os.wait()
        if pid == program:
            _tell(status, {"wait": wait})
            os._exit(0)  # and the kernel ends whatever is left in the namespace


def _become(status: int, guard: _Guard) -> NoReturn:
    try:
        argv = guard.request["argv"]
        environment = {"HOME": os.getcwd(), "TMPDIR": os.getcwd(), "LC_ALL": "C.UTF-8"}
        os.setsid()
        guard.drop()
        os.execve(argv[0], argv, environment)
    except OSError as error:
        _tell(status, {"error": str(error)})
    finally:
        os._exit(127)


class _Guard:
    """What this system grants: found out before the program starts, applied in its process."""

    def __init__(self, libc: _Libc | None, request: dict[str, Any]) -> None:
        self.libc, self.request = libc, request
        self.folder = os.getcwd()
        self.uid: int | None = None
        self.contained = self.reaped = False
        self.landlock = self.already = 0
        self.calls: tuple[int, int, int, tuple[int, ...]] | None = None
        if libc is not None:
            self._find(libc)
        limited = libc is not None and (os.geteuid() != 0 or self.uid is not None)
        has = {
            "network": self.contained or self.calls is not None,
            "files": self.landlock > 0 and self.calls is not None,
            "processes": limited,
            "tree": self.contained or self.reaped,
        }
        self.missing = [name for name, granted in has.items() if not granted]

    def _find(self, libc: _Libc) -> None:
        libc.prctl(_PDEATHSIG, signal.SIGTERM)
        self.calls = _CALLS.get(platform.machine())
        with contextlib.suppress(OSError):
            self.landlock = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
        root = os.geteuid() == 0
        if root and (_capabilities() & _NEEDED) == _NEEDED:
            self.uid = _FIRST_UID + os.getpid() % 100_000_000
            for name in (".", *os.listdir(".")):
                os.chown(name, self.uid, self.uid)
        flags = _NEWNET | _NEWPID | _NEWIPC | _NEWUTS
        own = False
        try:
            if root:
                libc("unshare", flags)
            else:
                _enter_user_namespace(libc, flags)
                own = True
            self.contained = True
        except OSError:
            with contextlib.suppress(OSError):
                libc.prctl(_SUBREAPER, 1)
                self.reaped = True
        # A user's processes are counted together; those of a namespace, and of an identity of its own, from nothing.
        self.already = 0 if self.uid is not None else 2 if own else _running(os.getuid())

    def drop(self) -> None:
        """Apply everything to this process, what needs privileges first."""
        self._limit()
        if self.libc is None:
            return
        if self.uid is not None:
            _change_user(self.libc, self.uid)
        self.libc.prctl(_NO_NEW_PRIVS, 1)
        if self.landlock > 0:
            _hide_files(self.libc, self.landlock, self.folder, self.request["readable"])
        if self.calls is not None:
            _refuse_calls(self.libc, *self.calls, truncate=self.landlock < 3)

    def _limit(self) -> None:
        request = self.request
        # Where the soft limit is the hard one the kernel kills at once, and nobody can tell that time was the reason.
        _at_most(resource.RLIMIT_CPU, request["cpu_seconds"], more=1)
        _at_most(resource.RLIMIT_FSIZE, request["file_bytes"])
        _at_most(resource.RLIMIT_CORE, 0)
        _at_most(resource.RLIMIT_NOFILE, 64)
        with contextlib.suppress(ValueError, OSError):  # macOS knows it and refuses it
            _at_most(resource.RLIMIT_AS, request["memory_bytes"])
        if "processes" not in self.missing:
            _at_most(resource.RLIMIT_NPROC, request["processes"] + self.already)


def _at_most(what: int, value: int, *, more: int = 0) -> None:
    """Set the soft limit, and the hard one `more` above it, neither above the hard one there is."""
    hard = resource.getrlimit(what)[1]
    most = value + more if hard == resource.RLIM_INFINITY else min(value + more, hard)
    resource.setrlimit(what, (min(value, most), most))


def _enter_user_namespace(libc: _Libc, flags: int) -> None:
    uid, gid = os.getuid(), os.getgid()
    libc("unshare", _NEWUSER | flags)
    for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(content)


def _capabilities() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def _running(uid: int) -> int:
    """Count the threads of `uid`, which its limit on processes includes."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _change_user(libc: _Libc, uid: int) -> None:
    """Become `uid` with no power left but to read."""
    libc.prctl(_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kept = 1 << _READ_ANYTHING
    header = struct.pack("Ii", 0x20080522, 0)
    libc("capset", header, struct.pack("6I", kept, kept, kept, 0, 0, 0))
    libc.prctl(_AMBIENT, 2, _READ_ANYTHING)


def _hide_files(libc: _Libc, version: int, folder: str, readable: list[str]) -> None:
    """Leave reading and running below `readable`, everything below `folder`, a few devices, and nothing else."""
    everything = (1 << 13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("QQQ", everything, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    read, file_bits = 0b1101, everything & 0b1100000000000111
    devices = [f"/dev/{name}" for name in ("null", "zero", "urandom", "random", "full")]
    allowed = [(path, read) for path in readable] + [(path, 0b110) for path in devices] + [(folder, everything)]
    for path, access in allowed:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access &= everything if os.path.isdir(path) else file_bits
        rule = struct.pack("=Qi", access, handle)
        libc.syscall(445, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(handle)
    libc.syscall(446, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


def _refuse_calls(libc: _Libc, arch: int, clone: int, clone3: int, refused: tuple[int, ...], *, truncate: bool) -> None:
    """Install the filter: other machines' calls kill, refused ones fail with EPERM."""
    load, equal, reaches, has, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, deny, absent = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if arch == _CALLS["x86_64"][0]:
        code += [(reaches, 0, 1, 0x40000000), (answer, 0, 0, deny)]  # the x32 numbers of the same calls
        refused = (*refused, _TRUNCATE["x86_64"]) if truncate else refused
    elif truncate:
        refused = (*refused, _TRUNCATE["aarch64"])
    code += [(equal, 0, 1, clone3), (answer, 0, 0, absent)]  # its flags are out of sight: libraries fall back on clone
    code += [(equal, 0, 4, clone), (load, 0, 0, 16), (has, 0, 1, _ANY_NAMESPACE), (answer, 0, 0, deny)]
    code += [(answer, 0, 0, allow)]
    for number in refused:
        code += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    code += [(answer, 0, 0, allow)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HP", len(code), ctypes.addressof(packed))
    libc("prctl", _SECCOMP, ctypes.c_ulong(2), ctypes.c_char_p(program), ctypes.c_ulong(0), ctypes.c_ulong(0))


def _wait(child: int, deadline: float) -> int | None:
    """Return the wait status of `child`, None when the deadline came first."""
    pause = 0.0005
    while time.monotonic() < deadline:
        pid, wait = os.waitpid(child, os.WNOHANG)
        if pid:
            return wait
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return None


def _end(group: int | None) -> None:
    """Kill what is left of `group`, and all who left it: those are ours to reap (PR_SET_CHILD_SUBREAPER)."""
    if group is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Return our children by reading /proc; none where there is no such thing."""
    me, found = os.getpid(), []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == me:
                        found.append(int(name))
    return found


def _tell(status: int, what: dict[str, Any]) -> None:
    os.write(status, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
