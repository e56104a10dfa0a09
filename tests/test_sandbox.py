import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alambic.errors import AlambicError, EngineError
from alambic.events import drain
from alambic.measure.sandbox import Limits, check_bash, run, run_python
from alambic.measure.text_code import CodeProblem, humaneval, mbpp, measure_code, pass_at_k, try_program

SHORT = Limits(seconds=1.5, cpu_seconds=2)  # for programs that never end
PATIENT = Limits(seconds=120, cpu_seconds=20)  # for those that do, on a machine however busy


def protected():
    if sys.platform != "linux":
        return False
    try:
        return run_python("", limits=PATIENT).ok
    except EngineError:
        return False


needs_protection = pytest.mark.skipif(not protected(), reason="this system does not protect against programs fully")
pytestmark = needs_protection


def processes_with(mark):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


# What a program gets.


def test_program_gives_output_and_code_when_it_ends():
    found = run_python("import sys; print('é', file=sys.stderr); print(input()); sys.exit(3)", stdin="bonjour")
    assert (found.status, found.code, found.stdout, found.stderr) == ("failed", 3, "bonjour\n", "é\n")
    assert found.missing == ()


def test_program_gets_an_empty_environment_when_ours_holds_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = run_python("import os; print(sorted(os.environ), os.listdir('.'))")
    assert found.stdout == "['HOME', 'LC_ALL', 'TMPDIR'] ['program.py']\n"


def test_program_reads_and_writes_its_own_directory_when_given_files():
    found = run_python("open('out.txt', 'w').write(open('in.txt').read()); print(open('out.txt').read())",
                       files={"in.txt": "déjà"})  # fmt: skip
    assert found.stdout == "déjà\n"


def test_directory_is_gone_when_the_program_ended():
    assert not os.path.exists(run_python("import os; print(os.getcwd(), end='')").stdout)


def test_standard_library_works_and_site_packages_do_not_when_imported():
    assert run_python("import json, re, typing, collections, threading, datetime, subprocess, random, math").ok
    assert "ModuleNotFoundError" in run_python("import numpy").stderr


# What it cannot do.


def test_endless_loop_ends_in_time_when_run():
    start = time.perf_counter()
    assert run_python("while True: pass", limits=SHORT).status == "timeout"
    assert time.perf_counter() - start < 30  # the margin is for a busy machine


def test_processor_time_is_limited_when_the_wall_allows_more():
    found = run_python("while True: pass", limits=Limits(seconds=400, cpu_seconds=1))
    assert found.status == "timeout" and found.seconds < 300  # a busy machine stretches a second far


def test_processor_time_is_limited_when_the_program_hears_no_signal():
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    found = run_python(code, limits=Limits(seconds=400, cpu_seconds=1))
    assert found.status == "crashed" and found.seconds < 300


def test_sleep_is_no_way_round_the_limit_when_run():
    assert run_python("import time; time.sleep(60)", limits=SHORT).status == "timeout"


@pytest.mark.parametrize(
    "bomb",
    ["import os\nwhile True: os.fork()",
     "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
     "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, 'program.py'])"],
)  # fmt: skip
def test_fork_bomb_is_stopped_when_run(bomb):
    # The mark stands in the program's name, which every copy of it has on its command line or inherits.
    before = set(processes_with("program.py"))
    assert run_python(bomb, limits=SHORT).status in ("failed", "timeout")
    assert set(processes_with("program.py")) <= before


def test_threads_are_limited_too_when_started():
    one = "threading.Thread(target=time.sleep, args=(60,), daemon=True)"
    code = f"import threading, time\nfor _ in range(50): {one}.start()"
    assert "can't start new thread" in run_python(code, limits=PATIENT).stderr


def test_memory_is_limited_when_asked_for():
    found = run_python("x = bytearray(10**10)", limits=PATIENT)
    assert found.status == "failed" and "MemoryError" in found.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded_when_endless(stream):
    found = run_python(
        f"import sys\nwhile True: sys.{stream}.write('x' * 9999)", limits=Limits(seconds=120, output_bytes=50_000)
    )
    assert found.status == "output" and len(getattr(found, stream)) == 50_000


def test_files_are_limited_when_large():
    found = run_python("open('big', 'wb').write(b'x' * 50_000_000)", limits=Limits(file_mb=1))
    assert found.status == "failed" and "File too large" in found.stderr


def test_writing_outside_is_refused_when_tried(tmp_path):
    tmp_path.chmod(0o777)
    target = tmp_path / "mine.txt"
    target.write_text("before")
    target.chmod(0o666)
    code = f"""
import os
for act in (lambda: open({str(target)!r}, "w"), lambda: os.unlink({str(target)!r}),
            lambda: os.truncate({str(target)!r}, 0), lambda: os.chmod({str(target)!r}, 0),
            lambda: open({str(tmp_path)!r} + "/new", "w"),
            lambda: os.rename({str(target)!r}, "here"), lambda: os.symlink("/x", {str(tmp_path)!r} + "/link"),
            lambda: os.utime({str(target)!r}, (0, 0))):
    try:
        act()
        print("did it")
    except OSError:
        pass
"""
    mode, stamp = target.stat().st_mode, target.stat().st_mtime
    found = run_python(code)
    assert found.ok and found.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and target.read_text() == "before"
    assert (target.stat().st_mode, target.stat().st_mtime) == (mode, stamp)


def test_reading_the_users_files_is_refused_when_tried(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    code = f"""
for path in ({str(tmp_path / "secret.txt")!r}, "/etc/passwd", "/etc/hostname", "/proc/1/environ"):
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
"""
    assert run_python(code).stdout.split() == ["PermissionError"] * 4


def test_child_that_leaves_its_session_dies_too_when_the_program_ends():
    mark = f"left-behind-{os.getpid()}"
    code = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(60)", {mark!r}])
import time; time.sleep(0.3)
"""
    assert run_python(code, limits=PATIENT).ok
    assert processes_with(mark) == []


def test_program_cannot_end_others_when_it_tries():
    code = "import os\nfor pid in (os.getppid(), 1):\n  try: os.kill(pid, 9)\n  except OSError: pass\nprint('here')"
    assert run_python(code).stdout == "here\n"
    assert run_python("import os; os.killpg(0, 9)").status == "crashed"


@pytest.mark.parametrize(
    "attempt",
    ["import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
     "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
     "import socket; socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
     "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=1)"],
)  # fmt: skip
def test_network_is_refused_when_tried(attempt):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        found = run_python(attempt.format(port=server.getsockname()[1]))
        assert found.status == "failed" and ("not permitted" in found.stderr or "unreachable" in found.stderr)
        with pytest.raises(TimeoutError):
            server.accept()


def test_status_is_not_the_programs_to_write_when_it_finds_the_pipe():
    write = "os.write(fd, b'{\"wait\": 0}\\n')"
    code = f"import os\nfor fd in range(3, 64):\n  try: {write}\n  except OSError: pass\nos._exit(1)"
    assert run_python(code).status == "failed"


# Where the system withholds protections.


@pytest.mark.skipif(shutil.which("unshare") is None or shutil.which("setpriv") is None, reason="needs util-linux")
def test_program_runs_without_namespaces_when_other_guards_do_the_work(tmp_path):
    """Root of a user namespace, without powers and without the right to make namespaces: as in a strict container."""
    script = tmp_path / "inner.py"
    script.write_text(
        "import json\nfrom alambic.errors import EngineError\nfrom alambic.measure.sandbox import Limits, run_python\n"
        "try: refused = run_python('1').status\n"
        "except EngineError as error: refused = error.message\n"
        "def ask(code): return run_python(code, accept_missing=('processes',), limits=Limits(seconds=120))\n"
        "child = \"import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
        "'import os, time; os.setsid(); time.sleep(60)', 'inner-mark']); import time; time.sleep(0.3)\"\n"
        "net = ask('import socket; socket.socket()')\n"
        'out = ask(\'open("/tmp/alambic-escape", "w")\')\n'
        "print(json.dumps([refused, ask(child).status, net.stderr[-40:], out.stderr[-80:], list(net.missing)]))\n"
    )
    inner = f"echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all \
--ambient-caps=-all {sys.executable} {script}"
    ended = subprocess.run(["unshare", "-r", "sh", "-c", inner], capture_output=True, text=True, timeout=600)
    if ended.returncode:
        pytest.skip(f"no such container can be made here: {ended.stderr[-200:]}")
    refused, child, network, outside, missing = json.loads(ended.stdout)
    assert "does not protect processes" in refused and missing == ["processes"]
    assert child == "ok" and processes_with("inner-mark") == []
    assert "not permitted" in network and "Permission denied" in outside


def test_unknown_protection_names_the_nearest_when_accepted():
    with pytest.raises(EngineError, match="did you mean 'network'"):
        run_python("", accept_missing=("netwrk",))


def test_missing_program_is_an_error_when_started():
    with pytest.raises(EngineError, match="cannot be started"):
        run(["/usr/bin/does-not-exist"])


def test_file_names_stay_inside_when_given():
    with pytest.raises(EngineError, match="plain names"):
        run_python("", files={"../out": "x"})


# Shell.


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("command", "ok"),
    [("find . -name '*.py' | xargs wc -l", True), ("for f in *; do echo $f; done", True), ("if true; then", False),
     ("echo 'open", False), ("cat <(ls", False)],
)  # fmt: skip
def test_command_parses_or_not_when_checked(command, ok):
    assert check_bash(command).ok is ok


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
def test_command_is_not_executed_when_checked():
    assert check_bash("echo ran; $(echo ran >&2); touch x").stdout == ""


# pass@k.


def test_pass_at_k_equals_counting_all_draws_when_small():
    from itertools import combinations

    n, c = 7, 3
    for k in range(1, n + 1):
        draws = list(combinations(range(n), k))
        expected = sum(min(draw) < c for draw in draws) / len(draws)
        assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_k_is_refused_when_there_are_fewer_programs():
    with pytest.raises(AlambicError, match=r"pass@3 needs 3 programs .*got 2"):
        pass_at_k(2, 1, 3)


ADD = CodeProblem("add", "def add(a, b):\n", "assert add(1, 2) == 3")


@pytest.mark.parametrize(
    ("completion", "passed"),
    [("    return a + b", True), ("    return a - b", False), ("    return a +", False),
     ("    return a - b\nimport sys; sys.exit(0)", False), ("    return a - b\nimport os; os._exit(0)", False)],
)  # fmt: skip
def test_program_passes_only_when_its_tests_were_reached(completion, passed):
    assert try_program(ADD, completion, limits=PATIENT).passed is passed


def test_code_scores_count_programs_and_endings_when_measured():
    right, wrong, endless = "    return a + b", "    return 0", "    while True: pass"
    endless_only = Limits(seconds=120, cpu_seconds=2)  # processor time, which others on this machine do not use up
    work = measure_code([ADD, ADD], [[right, wrong], [endless, wrong]], ks=(1, 2), limits=endless_only, workers=2)
    found = drain(work)
    assert found.scores["pass_at_1"].value == pytest.approx(0.25)
    assert found.scores["pass_at_2"].value == pytest.approx(0.5)
    assert found.to_dict()["endings"] == {"failed": 2, "ok": 1, "timeout": 1}
    assert [[one.passed for one in row] for row in found.tried] == [[True, False], [False, False]]


def test_too_few_programs_are_named_when_measured():
    with pytest.raises(AlambicError, match="add: pass@2 needs 2 programs, got 1"):
        drain(measure_code([ADD], [["x"]], ks=(2,)))


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_humaneval_solutions_all_pass_when_run(shared_data):
    problems = rows(shared_data / "humaneval" / "test.jsonl")
    answers = [[row["canonical_solution"]] for row in problems]
    found = drain(measure_code([humaneval(row) for row in problems], answers))
    assert found.scores["pass_at_1"].value == 1.0, [t.problem for row in found.tried for t in row if not t.passed]


@pytest.mark.slow
def test_mbpp_solutions_all_pass_when_run(shared_data):
    problems = rows(shared_data / "mbpp" / "test.jsonl")
    patient = Limits(seconds=120, cpu_seconds=60)  # one of them counts to ten thousand twice
    work = measure_code([mbpp(row) for row in problems], [[row["code"]] for row in problems], limits=patient)
    found = drain(work)
    assert found.scores["pass_at_1"].value == 1.0, [t.problem for row in found.tried for t in row if not t.passed]
