"""Forcing an algorithm, for tests and comparisons."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from .algorithms import ALGORITHMS, Algorithm
from .problem import PASSES, Problem

__all__ = ["algorithm", "algorithms", "forced", "forced_algorithm", "inherited"]

_forced: ContextVar[dict[str, str]] = ContextVar("timm_contconv_algorithm", default={})  # noqa: B039 - never mutated


def algorithms() -> list[str]:
    """Names of the algorithms, for `algorithm`."""
    return list(ALGORITHMS)


def forced() -> dict[str, str]:
    """The forced algorithm of each pass that has one."""
    return _forced.get()


@contextmanager
def algorithm(name: str, passes: Sequence[str] = PASSES) -> Iterator[None]:
    """Runs all convolutions of the engine with one algorithm.

    Read when a convolution runs, so it also acts on compiled and exported models. A backward uses what is
    forced around the call of `backward`, or else what was forced around the forward. PyTorch's own convolution stays
    for empty batches, for integers and complex numbers, under the transforms of torch.func and in forward mode.

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
    with _forcing({**forced(), **dict.fromkeys(passes, name)}):
        yield


def inherited(names: dict[str, str]) -> AbstractContextManager[None]:
    """Forces `names`, as they were around a forward, for the passes that nothing is forced for now.

    The backward of a CUDA tensor runs in a thread of its own, which does not see the caller's context.
    """
    return _forcing({**names, **forced()})


@contextmanager
def _forcing(names: dict[str, str]) -> Iterator[None]:
    token = _forced.set(names)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_algorithm(pass_: str, problem: Problem) -> Algorithm | None:
    """The algorithm that is forced for a pass, or None.

    Raises:
        ValueError: if it does not apply to the problem.
    """
    name = forced().get(pass_)
    if name is None:
        return None
    refusal = ALGORITHMS[name].refusal(pass_, problem)
    if refusal:
        able = [n for n, a in ALGORITHMS.items() if not a.refusal(pass_, problem)]
        raise ValueError(
            f"algorithm {name!r} does not apply to the {pass_} pass of {problem}: {refusal}. "
            f"These do: {', '.join(able)}"
        )
    return ALGORITHMS[name]
