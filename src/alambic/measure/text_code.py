"""pass@k: the share of problems for which one of k programs passes its tests. Programs run in the sandbox.

problem = humaneval(row)                         # a row of openai/human-eval
scores = drain(measure_code([problem], [[completion_1, completion_2]], ks=(1, 2)))
scores.scores["pass_at_1"].value
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.errors import AlambicError
from alambic.events import Progress, Work
from alambic.measure.metrics import Interval
from alambic.measure.sandbox import Limits, Outcome, run_python

_DRAWS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class CodeProblem:
    """A problem and how an answer is tried.

    Attributes:
        name: for reports.
        before: what stands before the answer in the program, as HumanEval's prompt.
        after: tests; they raise when the answer is wrong.
    """

    name: str
    before: str
    after: str

    def program(self, completion: str, token: str) -> str:
        """Return the program; it writes `token` at its very end, so that leaving early is no success."""
        end = f"import os as _os\n_os.write(1, {token!r}.encode())"
        return f"{self.before}{completion}\n\n{self.after}\n\n{end}\n"


@dataclass(frozen=True)
class Tried:
    """One program that was run."""

    problem: str
    passed: bool
    outcome: Outcome


@dataclass(frozen=True)
class CodeScores:
    """What came of all programs.

    Attributes:
        scores: ``pass_at_k`` for each k, a share, higher is better, its interval over problems.
        tried: every program in order, problem by problem.
        missing: protections that the sandbox did not have.
    """

    scores: dict[str, Interval]
    tried: tuple[tuple[Tried, ...], ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return scores, and how programs ended, ready for JSON."""
        endings = [tried.outcome.status for row in self.tried for tried in row]
        return {
            "quality": {name: interval.to_dict() for name, interval in self.scores.items()},
            "programs": len(endings),
            "endings": {status: endings.count(status) for status in sorted(set(endings))},
            "missing_protections": list(self.missing),
        }


def humaneval(row: Mapping[str, Any]) -> CodeProblem:
    """Return the problem of a HumanEval row (Chen et al. 2021); an answer continues its prompt."""
    return CodeProblem(row["task_id"], row["prompt"], f"{row['test']}\ncheck({row['entry_point']})")


def mbpp(row: Mapping[str, Any]) -> CodeProblem:
    """Return the problem of an MBPP row (Austin et al. 2021); an answer is a whole function.

    The set-up stands after the answer, because some of it uses classes that the answer defines.
    """
    lines = [row.get("test_setup_code") or "", *row["test_list"]]
    return CodeProblem(f"MBPP/{row['task_id']}", "", "\n".join(lines))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of k programs drawn from n, `correct` of them right, is right.

    The unbiased estimator ``1 - C(n - c, k) / C(n, k)`` of Chen et al. 2021 (https://arxiv.org/abs/2107.03374).

    Raises:
        AlambicError: k is not between 1 and n.
    """
    if not 1 <= k <= n:
        raise AlambicError(f"pass@{k} needs {k} programs for each problem, got {n}", hint=f"k from 1 to {n}")
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def measure_code(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    *,
    ks: Sequence[int] = (1,),
    limits: Limits | None = None,
    workers: int | None = None,
    accept_missing: Sequence[str] = (),
    seed: int = 0,
) -> Work[CodeScores]:
    """Run every completion of every problem and return pass@k.

    Args:
        problems: what is to be solved.
        completions: for each problem, as many programs as its largest k or more.
        ks: which pass@k.
        limits: of each program.
        workers: programs at once; as many as there are cores when None.
        accept_missing: protections that may be missing, see sandbox.py.
        seed: of the resampling.

    Raises:
        AlambicError: a problem has too few completions, or there is none.
        EngineError: the sandbox cannot protect this machine.
    """
    if len(problems) != len(completions) or not problems:
        raise AlambicError(f"{len(completions)} lists of programs for {len(problems)} problems")
    for problem, programs in zip(problems, completions, strict=True):
        if len(programs) < max(ks):
            raise AlambicError(f"{problem.name}: pass@{max(ks)} needs {max(ks)} programs, got {len(programs)}")
    tried = yield from _try_all(problems, completions, limits or Limits(), workers, accept_missing)
    hits = [(len(row), sum(one.passed for one in row)) for row in tried]
    scores = {f"pass_at_{k}": _interval(np.array([pass_at_k(n, c, k) for n, c in hits]), seed) for k in ks}
    missing = sorted({name for row in tried for one in row for name in one.outcome.missing})
    return CodeScores(scores, tried, tuple(missing))


def try_program(
    problem: CodeProblem, completion: str, *, limits: Limits | None = None, accept_missing: Sequence[str] = ()
) -> Tried:
    """Run one answer; it passes when the program reaches its end.

    Raises:
        EngineError: the sandbox cannot protect this machine.
    """
    token = secrets.token_hex(16)
    outcome = run_python(problem.program(completion, token), limits=limits, accept_missing=accept_missing)
    return Tried(problem.name, outcome.ok and token in outcome.stdout, outcome)


def _try_all(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    limits: Limits,
    workers: int | None,
    accept_missing: Sequence[str],
) -> Work[tuple[tuple[Tried, ...], ...]]:
    work = [(i, completion) for i, programs in enumerate(completions) for completion in programs]
    results: dict[int, Tried] = {}
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = {
            pool.submit(try_program, problems[i], completion, limits=limits, accept_missing=accept_missing): at
            for at, (i, completion) in enumerate(work)
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                results[futures[future]] = future.result()
                yield Progress("code", done, len(work))
        finally:
            pool.shutdown(cancel_futures=True)
    rows: list[list[Tried]] = [[] for _ in problems]
    for at, (i, _) in enumerate(work):
        rows[i].append(results[at])
    return tuple(tuple(row) for row in rows)


def _interval(values: NDArray[np.float64], seed: int, n: int = 1000) -> Interval:
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // len(values))
    means = [
        values[rng.integers(len(values), size=(min(step, n - start), len(values)))].mean(axis=1)
        for start in range(0, n, step)
    ]
    return Interval.of(float(values.mean()), np.concatenate(means), n=len(values))
