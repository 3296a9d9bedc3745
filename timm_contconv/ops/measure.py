"""Measures algorithms on the machine that runs them, as `torch.backends.cudnn.benchmark` does, and checks them."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

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
    check = _Check(pass_, problem, tensors)
    times: dict[str, float] = {}
    faults: dict[str, str] = {}
    for algorithm in algorithms if check.is_possible else ():
        try:
            seconds, result = _first(algorithm, pass_, problem, tensors, min(times.values(), default=math.inf))
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
    _repeat([a for a in algorithms if a.name in times], pass_, problem, tensors, times)
    return {name: float(f"{t:.3g}") for name, t in times.items()}, faults


def _first(
    algorithm: Algorithm, pass_: str, problem: Problem, tensors: Sequence[Tensor | None], best: float
) -> tuple[float, Tensor | None]:
    """Seconds and result of a first run; no result where one image shows, on the CPU, that there is no hope."""
    if problem.batch > 1 and problem.device.type == "cpu":
        one, images = problem._replace(batch=1), _last_image(pass_, tensors)
        seconds = problem.batch * min(_tries(algorithm, pass_, one, images, _HOPELESS * best / problem.batch))
        if seconds > _HOPELESS * best:
            return seconds, None
    return _timed(algorithm, pass_, problem, tensors)


def _tries(
    algorithm: Algorithm, pass_: str, problem: Problem, tensors: Sequence[Tensor | None], enough: float
) -> Iterator[float]:
    """Seconds of one run; of a few where the first was too slow by less than a hiccup of the machine."""
    for _ in range(3):
        seconds = _timed(algorithm, pass_, problem, tensors)[0]
        yield seconds
        if seconds <= enough or seconds > enough + _HICCUP:
            return


def _repeat(
    algorithms: Sequence[Algorithm],
    pass_: str,
    problem: Problem,
    tensors: Sequence[Tensor | None],
    times: dict[str, float],
) -> None:
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
            times[algorithm.name] = min(times[algorithm.name], _timed(algorithm, pass_, problem, tensors)[0])


def _timed(
    algorithm: Algorithm, pass_: str, problem: Problem, tensors: Sequence[Tensor | None]
) -> tuple[float, Tensor]:
    """Seconds of one run, and its result."""
    if problem.device.type == "cuda":
        return _timed_on_cuda(algorithm, pass_, problem, tensors)
    start = time.perf_counter()
    result = algorithm.run(pass_, problem, *tensors)
    return time.perf_counter() - start, result


def _timed_on_cuda(
    algorithm: Algorithm, pass_: str, problem: Problem, tensors: Sequence[Tensor | None]
) -> tuple[float, Tensor]:
    """Seconds per run in a stream of runs, by the device's clock: its own time, or the host's where that is longer."""
    with torch.cuda.device(problem.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        result = algorithm.run(
            pass_, problem, *tensors
        )  # compiles; keeps the device busy while the others are launched
        start.record()
        for _ in range(_CALLS):
            result = algorithm.run(pass_, problem, *tensors)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / _CALLS, result


def _last_image(pass_: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors of a pass, with the last image only."""
    images = 2 if pass_ == "weight" else 1
    return [t[-1:] if i < images and t is not None else t for i, t in enumerate(tensors)]


class _Check:
    """A corner of a pass's result by PyTorch in float64, and the sums that it would hold if no terms cancelled.

    Where these are all but zero, as for a gradient that is zero nearly everywhere, rounding is compared with a part of
    what the tensors' norms allow: Fourier transforms spread it over the whole image.
    """

    def __init__(self, pass_: str, problem: Problem, tensors: Sequence[Tensor | None]) -> None:
        corner, tensors, self._index = _corner(pass_, problem, tensors)
        doubles = [None if t is None else t.double() for t in tensors]
        self._exact = PyTorch().run(pass_, corner, *doubles)
        sums = PyTorch().run(pass_, corner, *(None if t is None else t.abs() for t in doubles))
        norms = math.prod(t.norm().item() for t in doubles[:2] if t is not None)
        self._scale = max(sums.max().item(), _PART_OF_NORMS * norms)
        self._dtype = problem.dtype
        self.is_possible = self._scale <= torch.finfo(problem.dtype).max

    def fault(self, result: Tensor) -> str | None:
        """What is wrong with a result; None where it is as exact as its dtype allows."""
        error = (result[self._index].double() - self._exact).abs().max().item()
        if error <= _TOLERANCE[self._dtype] * self._scale + torch.finfo(torch.float32).tiny:
            return None
        return f"was off by {error:.1e}, where the terms' sizes sum up to {self._scale:.1e}"


def _corner(
    pass_: str, problem: Problem, tensors: Sequence[Tensor | None]
) -> tuple[Problem, list[Tensor | None], tuple[slice, ...]]:
    """A small problem whose result is a corner of a pass's result, its tensors, and the corner.

    Of the output, or of the gradient for the input, it is the last image. It is the last two groups of channels, or the
    last two channels where there is one group.
    """
    groups = min(problem.groups, 2)
    ins, outs = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if groups == 1:
        ins = ins if pass_ == "output" else min(ins, 2)
        outs = outs if pass_ == "input" else min(outs, 2)
    of_x, of_out, of_weight = slice(-groups * ins, None), slice(-groups * outs, None), slice(-ins, None)
    first, second, *rest = tensors if pass_ == "weight" else _last_image(pass_, tensors)
    assert first is not None
    assert second is not None
    if pass_ == "weight":
        cut: list[Tensor | None] = [first[:, of_out], second[:, of_x]]
        index = (of_out, of_weight)
    else:
        cut = [first[:, of_x if pass_ == "output" else of_out], second[of_out, of_weight]]
        index = (slice(-1, None), of_out if pass_ == "output" else of_x)
    small = problem._replace(in_channels=groups * ins, out_channels=groups * outs, groups=groups, dtype=torch.float64)
    small = small if pass_ == "weight" else small._replace(batch=1)
    return small, [*cut, *(None if b is None else b[of_out] for b in rest)], index
