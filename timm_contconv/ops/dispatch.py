"""Which algorithm runs which pass: the cheapest by the recorded cost rule, or the one that is forced."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from .algorithm import Algorithm
from .costs import predict
from .direct import Direct
from .fft import FFT
from .gemm import GEMM
from .problem import PASSES, Problem
from .pytorch import ChannelsLast, PyTorch
from .triton_gemm import Triton

__all__ = [
    "ALGORITHMS",
    "algorithm",
    "algorithms",
    "choose",
    "cost_key",
    "forced",
    "inherited",
    "is_plain",
]

ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in (PyTorch(), ChannelsLast(), Direct(), FFT(), GEMM(), Triton())}
# What an operator's Python side costs in a pass, autograd included; and the ratio below which a gain is trusted.
_OPERATOR_SECONDS = 7e-5
_CLEAR_GAIN = 0.8
_forced: ContextVar[dict[str, str]] = ContextVar("timm_contconv_algorithm", default={})  # noqa: B039 - never mutated


def algorithms() -> list[str]:
    """Names of the algorithms of the depthwise convolution, for `algorithm`."""
    return list(ALGORITHMS)


def forced() -> dict[str, str]:
    """The forced algorithm of each pass that has one."""
    return _forced.get()


@contextmanager
def algorithm(name: str, passes: Sequence[str] = PASSES) -> Iterator[None]:
    """Runs depthwise convolutions with one algorithm, whatever the cost rule says.

    Read when a convolution runs, so it also acts on compiled and exported models. A backward uses what is
    forced around the call of `backward`, or else what was forced around the forward.

    Args:
        name: one of `algorithms()`.
        passes: the passes it holds for: "output", "input" (gradient), "weight" (gradient).

    Raises:
        ValueError: for an unknown name or pass; and, from the convolution, if the algorithm does not apply.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"name={name!r}: expected one of {', '.join(ALGORITHMS)}")
    unknown = [p for p in passes if p not in PASSES]
    if unknown:
        raise ValueError(f"passes={tuple(passes)!r}: {unknown[0]!r} is not one of {', '.join(PASSES)}")
    token = _forced.set({**_forced.get(), **dict.fromkeys(passes, name)})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def inherited(names: dict[str, str]) -> Iterator[None]:
    """Forces `names`, as they were around a forward, for the passes that nothing is forced for now.

    The backward of a CUDA tensor runs in a thread of its own, where the caller's context is not seen.
    """
    token = _forced.set({**names, **_forced.get()})
    try:
        yield
    finally:
        _forced.reset(token)


def choose(pass_: str, problem: Problem) -> Algorithm:
    """The algorithm for one pass ("output", "input", "weight") of a problem.

    Raises:
        ValueError: if the forced algorithm does not apply.
    """
    name = _forced.get().get(pass_)
    # An empty batch is no work for anyone; PyTorch knows its results.
    if name is None or problem.elements == 0:
        return _cheapest(pass_, problem)
    refusal = ALGORITHMS[name].refusal(pass_, problem)
    if refusal:
        able = [n for n, a in ALGORITHMS.items() if not a.refusal(pass_, problem)]
        raise ValueError(
            f"algorithm {name!r} does not apply to the {pass_} pass of {problem}: {refusal}. "
            f"These do: {', '.join(able)}"
        )
    return ALGORITHMS[name]


def is_plain(problem: Problem, passes: Sequence[str]) -> bool:
    """Whether PyTorch's own convolution, called as it is, is the best way for all of these passes together.

    The operators have overheads and the predictions are not exact, so they must promise a clear gain.
    """
    plain = ours = 0.0
    for pass_ in passes:
        if ALGORITHMS["pytorch"].refusal(pass_, problem):
            return False
        costs = _predicted(pass_, problem)
        if costs:
            plain += costs["pytorch"]
            ours += costs[_cheapest(pass_, problem).name] + _OPERATOR_SECONDS
    return ours >= _CLEAR_GAIN * plain


def cost_key(pass_: str, problem: Problem) -> str:
    """The row of the cost file that a pass is predicted by."""
    dtype = str(problem.dtype).removeprefix("torch.")
    layout = "channels_last" if problem.channels_last else "contiguous"
    return f"{problem.device}/{problem.ndim}d/{dtype}/{layout}/{pass_}"


def _predicted(pass_: str, problem: Problem) -> dict[str, float]:
    if not problem.elements:
        return {}
    return predict(cost_key(pass_, problem), lambda name: ALGORITHMS[name].features(pass_, problem))


@lru_cache(maxsize=4096)
def _cheapest(pass_: str, problem: Problem) -> Algorithm:
    # Where nothing was measured (today: every CUDA device), PyTorch's own convolution stays.
    costs = _predicted(pass_, problem)
    for name in sorted(costs, key=costs.__getitem__):
        # In this order, so that the direct kernels are compiled only where they would be used.
        if not ALGORITHMS[name].refusal(pass_, problem):
            return ALGORITHMS[name]
    return ALGORITHMS["pytorch"]
