"""Which algorithm runs: the forced one, the one that was measured to be fastest, or the prior rule's."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algorithms import ALGORITHMS, Algorithm
from .forced import forced_algorithm
from .measure import is_measuring, is_recording, measure
from .prior import candidates
from .problem import Problem
from .record import record_of, records

__all__ = [
    "Call",
    "Choice",
    "binding",
    "choices",
    "choose",
    "counting",
    "decisions",
    "gains",
    "is_counting",
    "keep",
    "state",
]

# Multiply-adds of a pass below which no choice pays, on CPUs and on accelerators.
_FEWEST_MACS, _FEWEST_MACS_ON_ACCELERATORS = 200_000, 50_000_000
# What the operator's Python side costs beyond PyTorch's own convolution, in inference and for each gradient.
_OPERATOR_SECONDS = 2e-5
_MOST_DECISIONS = 4096

#: What was decided, until something new is measured.
decisions: dict[Hashable, Any] = {}
_lock = threading.Lock()

#: One pass of a problem.
Call = tuple[str, Problem]
_counts: list[Counter[Call]] = []


class Choice(NamedTuple):
    """What was measured for one pass of one problem, on the device and with the threads that it ran with."""

    pass_: str
    problem: Problem
    #: The algorithm that runs.
    algorithm: str
    #: Seconds of every algorithm that was tried.
    seconds: dict[str, float]

    @property
    def gain(self) -> float:
        """How many times as long PyTorch's own convolution takes; NaN where it can't be used."""
        return self.seconds.get("pytorch", math.nan) / self.seconds[self.algorithm]


def choices() -> list[Choice]:
    """What this process has measured, or found measured on this machine, in the order of first use."""
    found = []
    for record in records():
        for (pass_, problem), times in record.met.items():
            able = {a.name for a in _able(pass_, problem)} & times.keys()
            if able:
                found.append(Choice(pass_, problem, min(able, key=times.__getitem__), times))
    return found


def choose(pass_: str, problem: Problem, tensors: Sequence[Tensor | None]) -> Algorithm:
    """The algorithm for one pass ("output", "input", "weight") of a problem.

    Args:
        tensors: what the algorithms' method for the pass takes; a new problem is measured with them.

    Raises:
        ValueError: if the forced algorithm does not apply.
    """
    # An empty batch: leave it to PyTorch.
    if problem.batch == 0:
        return ALGORITHMS["pytorch"]
    forced = forced_algorithm(pass_, problem)
    if forced is not None:
        return forced
    if _counts:
        _counts[-1][pass_, problem] += 1
    return _settle(pass_, problem, tensors)[0]


def binding(key: Hashable, problem: Problem, tensors: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """What computes the output where nothing is forced, from tensors of the same strides; kept by a key."""
    algorithm, is_final = _settle("output", problem, tensors)
    assert tensors[0] is not None
    run = algorithm.bound(problem, tensors[0])
    if is_final:
        keep(key, run)
    return run


def _settle(pass_: str, problem: Problem, tensors: Sequence[Tensor | None]) -> tuple[Algorithm, bool]:
    """The algorithm where nothing is forced; and whether the choice holds for as long as `state()` does."""
    key = (pass_, problem, state())
    chosen: Algorithm | None = decisions.get(key)
    if chosen is not None:
        return chosen, True
    chosen, is_final = _decide(pass_, problem, tensors)
    if is_final:
        keep(key, chosen)
    return chosen, is_final


@contextmanager
def counting() -> Iterator[Counter[Call]]:
    """Counts the passes of all convolutions that run in its block; also of those that PyTorch's own does."""
    counts: Counter[Call] = Counter()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


def is_counting() -> bool:
    """Whether every convolution has to run as the operator."""
    return bool(_counts)


def gains(passes: Sequence[str], problem: Problem) -> bool:
    """Whether the operator may be faster than PyTorch's own convolution, for all of these passes together."""
    if any(ALGORITHMS["pytorch"].refusal(pass_, problem) for pass_ in passes):
        return True
    if not _is_worth_it(problem):
        return False
    plain = ours = 0.0
    for pass_ in passes:
        able = _able(pass_, problem)
        times = _times(pass_, problem, able)
        if times is None and ((is_measuring() and len(able) > 1) or able[0].name != "pytorch"):
            return True
        if times:
            plain += times.get("pytorch", math.inf)
            ours += times[_fastest(able, times).name] + _OPERATOR_SECONDS
    return ours < plain


def state() -> tuple[Hashable, ...]:
    """What decisions depend on, besides their problem."""
    return (
        is_measuring(),
        torch.get_num_threads(),
        torch.is_anomaly_enabled(),
        torch._C._get_fp32_precision_getter("mkldnn", "matmul"),
    )


def keep(key: Hashable, decision: Any) -> None:
    """Keeps a decision until something new is measured."""
    if len(decisions) >= _MOST_DECISIONS:
        decisions.clear()
    decisions[key] = decision


def _decide(pass_: str, problem: Problem, tensors: Sequence[Tensor | None]) -> tuple[Algorithm, bool]:
    """The algorithm, and whether the decision holds for the next time, too."""
    able = _able(pass_, problem)
    times = _times(pass_, problem, able)
    if times is not None:
        return _fastest(able, times), True
    if not (is_measuring() and _is_worth_it(problem) and len(able) > 1):
        return able[0], True
    # Another thread measures now: go on without.
    if is_recording(problem.device) or not _lock.acquire(blocking=False):
        return able[0], False
    try:
        times, faults = measure(pass_, problem, tensors, able)
        if times or faults:
            record_of(problem.device).add(pass_, problem, times, faults)
            decisions.clear()
    finally:
        _lock.release()
    # Also where nothing could be measured, because of a NaN: do not try at every call.
    return _fastest(_able(pass_, problem), times), True


def _able(pass_: str, problem: Problem) -> list[Algorithm]:
    able = candidates(pass_, problem)
    if not is_measuring():
        return able
    dropped = record_of(problem.device).dropped
    return [a for a in able if a.name not in dropped] or [ALGORITHMS["pytorch"]]


def _times(pass_: str, problem: Problem, able: Sequence[Algorithm]) -> dict[str, float] | None:
    if not (is_measuring() and _is_worth_it(problem)):
        return None
    return record_of(problem.device).find(pass_, problem, [a.name for a in able])


def _fastest(able: Sequence[Algorithm], times: dict[str, float]) -> Algorithm:
    return min(able, key=lambda a: times.get(a.name, math.inf))


def _is_worth_it(problem: Problem) -> bool:
    is_cpu = problem.device.type == "cpu"
    return problem.batch > 0 and problem.macs >= (_FEWEST_MACS if is_cpu else _FEWEST_MACS_ON_ACCELERATORS)
