"""Measures algorithms ahead: which convolutions run, and what is chosen for each."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from .choose import Call, Choice, choices, choose, counting
from .measure import is_measuring, measuring
from .problem import Problem

__all__ = ["calls_of", "tune"]


def calls_of(run: Callable[[], object]) -> Counter[Call]:
    """What the engine computes in one call of `run`, and how often: ("output", problem), ("weight", problem), ...

    Nothing is measured meanwhile. Not for compiled functions, whose graphs may have left PyTorch's own convolutions in.
    """
    with measuring(False), counting() as counts:
        run()
    return counts


def tune(pass_: str, problem: Problem) -> Choice | None:
    """Measures one pass of a problem with random numbers, unless that was done before, and remembers the result.

    Returns:
        The choice; None where the work is too small for a choice to pay, or only one algorithm applies.

    Raises:
        RuntimeError: measuring is off.
    """
    if not is_measuring():
        raise RuntimeError(
            "measuring is off, so nothing can be tuned: unset TIMM_CONTCONV_MEASURE, or call ops.measuring(True); it is"
            " also off under torch.use_deterministic_algorithms(True)"
        )
    choose(pass_, problem, _tensors(pass_, problem))
    return next((c for c in choices() if (c.pass_, c.problem) == (pass_, problem)), None)


def _tensors(pass_: str, problem: Problem) -> tuple[Tensor | None, ...]:
    """Random tensors that the pass takes."""
    x, grad = _images(problem, problem.input_shape), _images(problem, problem.output_shape)
    weight = torch.randn(problem.weight_shape, dtype=problem.dtype, device=problem.device)
    return {"output": (x, weight, None), "input": (grad, weight), "weight": (grad, x)}[pass_]


def _images(problem: Problem, shape: tuple[int, ...]) -> Tensor:
    images = torch.randn(shape, dtype=problem.dtype, device=problem.device)
    form = {2: torch.channels_last, 3: torch.channels_last_3d}.get(problem.ndim)
    return images.contiguous(memory_format=form) if problem.channels_last and form else images
