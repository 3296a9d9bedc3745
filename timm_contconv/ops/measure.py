"""Measures algorithms on the machine that runs them, as `torch.backends.cudnn.benchmark` does, and checks them."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .algorithms import Algorithm, PyTorch
from .problem import Problem

__all__ = ["is_measuring", "is_recording", "measure", "measuring"]

# A candidate that takes this many times as long as the best so far, and a hiccup of the machine in seconds, is not
# repeated; one image has to show it, where a batch has several.
_HOPELESS, _HICCUP = 10, 0.01
# Later rounds are for those within factors of the best that fall to the last: first runs wait for memory.
_CLOSE = (_HOPELESS, 3, 1.5)
# At least so many rounds, more in these seconds.
_ROUNDS, _MOST_ROUNDS, _ROUND_SECONDS = 5, 30, 0.06
# Calls that are timed together on CUDA.
_CALLS = 3
# Errors that a candidate may have, as a share of the sums that its results would be if no terms cancelled.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Those sums are taken to be at least this part of the product of the tensors' norms.
_PART_OF_NORMS = 1e-2

_enabled = os.environ.get("TIMM_CONTCONV_MEASURE") != "0"


class measuring:
    """Switches measuring on or off, for good or in a `with` statement.

    Where it is on, the algorithms for a convolution are measured when it first runs, and the fastest is taken from then
    on. Where it is off, a rule of thumb chooses, the same one on every machine. It is on unless the environment has
    TIMM_CONTCONV_MEASURE=0. Under `torch.use_deterministic_algorithms(True)` it is off, whatever is set here.

    Args:
        mode: True for on.
    """

    def __init__(self, mode: bool) -> None:
        global _enabled
        self._before, _enabled = _enabled, mode

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _enabled
        _enabled = self._before


def is_measuring() -> bool:
    """Whether measurements decide."""
    return _enabled and not torch.are_deterministic_algorithms_enabled()


def is_recording(device: torch.device) -> bool:
    """Whether a graph is being recorded, or no call may wait for the device, so that nothing can be measured now."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() != 0


def measure(
    pass_: str, problem: Problem, tensors: Sequence[Tensor | None], algorithms: Sequence[Algorithm]
) -> tuple[dict[str, float], dict[str, str]]:
    """Runs algorithms for one pass.

    Args:
        pass_: "output", "input" or "weight".
        problem: what is convolved.
        tensors: what the algorithms' method for the pass takes.
        algorithms: the candidates, the most promising one first.

    Returns:
        Seconds by name, inf where memory did not suffice; and by name, why a candidate must not be used. Both are empty
        where the tensors hold NaN or Inf, so that results can't be checked.
    """
    work = _Work(pass_, problem, tensors)
    check = _Check(work)
    times: dict[str, float] = {}
    faults: dict[str, str] = {}
    for algorithm in algorithms if check.is_possible else ():
        try:
            seconds, result = _first(algorithm, work, min(times.values(), default=math.inf))
        except torch.OutOfMemoryError:
            times[algorithm.name] = math.inf
            continue
        except Exception as error:
            faults[algorithm.name] = f"raised {type(error).__name__}: {str(error)[:200]}"
            continue
        # PyTorch's own are as exact as the user has set them.
        fault = None if result is None or isinstance(algorithm, PyTorch) else check.fault(result)
        if fault is None:
            times[algorithm.name] = seconds
        else:
            faults[algorithm.name] = fault
    _repeat([a for a in algorithms if a.name in times], work, times)
    return {name: float(f"{t:.3g}") for name, t in times.items()}, faults


class _Work(NamedTuple):
    """One pass of a problem, and the tensors that the algorithms' method for it takes."""

    pass_: str
    problem: Problem
    tensors: Sequence[Tensor | None]

    def timed(self, algorithm: Algorithm) -> tuple[float, Tensor]:
        """Seconds of one run, and its result; of runs in a stream on CUDA."""
        if self.problem.device.type == "cuda":
            return self._timed_on_cuda(algorithm)
        start = time.perf_counter()
        result = algorithm.run(self.pass_, self.problem, *self.tensors)
        return time.perf_counter() - start, result

    def _timed_on_cuda(self, algorithm: Algorithm) -> tuple[float, Tensor]:
        """By the device's clock: its own time per run, or the host's where that is longer."""
        with torch.cuda.device(self.problem.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Compiles, and keeps the device busy while the others are launched.
            result = algorithm.run(self.pass_, self.problem, *self.tensors)
            start.record()
            for _ in range(_CALLS):
                result = algorithm.run(self.pass_, self.problem, *self.tensors)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / _CALLS, result

    def last_image(self) -> "_Work":
        """The work for the last image only."""
        images = 2 if self.pass_ == "weight" else 1
        tensors = [t[-1:] if i < images and t is not None else t for i, t in enumerate(self.tensors)]
        return self._replace(problem=self.problem._replace(batch=1), tensors=tensors)

    def corner(self) -> tuple["_Work", tuple[slice, ...]]:
        """Small work in float64 whose result is a corner of this one's result, and the corner.

        Of the output, or of the gradient for the input, it is the last image. It is the last two groups of channels,
        or the last two channels where there is one group.
        """
        pass_, problem = self.pass_, self.problem
        groups = min(problem.groups, 2)
        ins, outs = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        if groups == 1:
            ins = ins if pass_ == "output" else min(ins, 2)
            outs = outs if pass_ == "input" else min(outs, 2)
        of_x, of_out, of_weight = slice(-groups * ins, None), slice(-groups * outs, None), slice(-ins, None)
        every = slice(None)
        parts: dict[str, tuple[list[tuple[slice, ...]], tuple[slice, ...]]] = {
            "output": ([(every, of_x), (of_out, of_weight), (of_out,)], (slice(-1, None), of_out)),
            "input": ([(every, of_out), (of_out, of_weight)], (slice(-1, None), of_x)),
            "weight": ([(every, of_out), (every, of_x)], (of_out, of_weight)),
        }
        cuts, index = parts[pass_]
        small = self if pass_ == "weight" else self.last_image()
        tensors = [None if t is None else t[cut].double() for t, cut in zip(small.tensors, cuts, strict=True)]
        channels = small.problem._replace(in_channels=groups * ins, out_channels=groups * outs, groups=groups)
        return _Work(pass_, channels._replace(dtype=torch.float64), tensors), index


def _first(algorithm: Algorithm, work: _Work, best: float) -> tuple[float, Tensor | None]:
    """Seconds and result of a first run; no result where one image shows, on the CPU, that there is no hope."""
    batch = work.problem.batch
    if batch > 1 and work.problem.device.type == "cpu":
        seconds = batch * min(_tries(algorithm, work.last_image(), _HOPELESS * best / batch))
        if seconds > _HOPELESS * best:
            return seconds, None
    return work.timed(algorithm)


def _tries(algorithm: Algorithm, work: _Work, enough: float) -> Iterator[float]:
    """Seconds of one run; of a few where the first was too slow by less than a hiccup of the machine."""
    for _ in range(3):
        seconds = work.timed(algorithm)[0]
        yield seconds
        if seconds <= enough or seconds > enough + _HICCUP:
            return


def _repeat(algorithms: Sequence[Algorithm], work: _Work, times: dict[str, float]) -> None:
    """Brings `times` down to the least of several runs in turn, for those that may win."""
    start = time.perf_counter()
    for round_ in range(_MOST_ROUNDS):
        if round_ >= _ROUNDS and time.perf_counter() - start > _ROUND_SECONDS:
            return
        best = min(times.values(), default=0.0)
        limit = _CLOSE[min(round_, len(_CLOSE) - 1)] * best + (0 if round_ else _HICCUP)
        close = [a for a in algorithms if times[a.name] < limit]
        if len(close) < 2:
            return
        for algorithm in close:
            # Twice: the second run finds memory as its own first left it, and not as another algorithm did.
            times[algorithm.name] = min(times[algorithm.name], *(work.timed(algorithm)[0] for _ in range(2)))


class _Check:
    """A corner of a pass's result by PyTorch in float64, and the sums that it would hold if no terms cancelled.

    Where these are all but zero, as for a gradient that is zero nearly everywhere, rounding is compared with a part of
    what the tensors' norms allow: Fourier transforms spread it over the whole image.
    """

    def __init__(self, work: _Work) -> None:
        corner, self._index = work.corner()
        self._exact = PyTorch().run(corner.pass_, corner.problem, *corner.tensors)
        sums = PyTorch().run(corner.pass_, corner.problem, *(None if t is None else t.abs() for t in corner.tensors))
        norms = math.prod(t.norm().item() for t in corner.tensors[:2] if t is not None)
        self._scale = max(sums.max().item(), _PART_OF_NORMS * norms)
        self._dtype = work.problem.dtype
        self.is_possible = self._scale <= torch.finfo(self._dtype).max

    def fault(self, result: Tensor) -> str | None:
        """What is wrong with a result; None where it is as exact as its dtype allows."""
        error = (result[self._index].double() - self._exact).abs().max().item()
        if error <= _TOLERANCE[self._dtype] * self._scale + torch.finfo(torch.float32).tiny:
            return None
        return f"was off by {error:.1e}, where the terms' sizes sum up to {self._scale:.1e}"
