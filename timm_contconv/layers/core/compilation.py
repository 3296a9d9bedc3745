"""How a kernel function is called: its precision, and torch.compile."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ...ops import compute_dtype, has_autocast
from .subnormals import without_subnormals

__all__ = ["CompileMode", "check_compile_mode", "construct", "without_autocast"]

CompileMode = Literal["auto"] | bool

_compiler_works = True


def check_compile_mode(mode: CompileMode) -> CompileMode:
    """Return `mode` if it is "auto", True or False.

    Raises:
        ValueError: it is something else.
    """
    if mode not in ("auto", True, False):
        raise ValueError(f"compile={mode!r}: expected 'auto' (on CUDA only), True or False")
    return mode


def construct(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], dtype: torch.dtype, mode: CompileMode
) -> Tensor:
    """Call a kernel function in float32 (float64 if `dtype` is float64), through torch.compile if `mode` says so.

    Inside an outer torch.compile the function is called directly, and compiled with the rest.

    Args:
        function: a module-level function, or a `functools.partial` of one with hashable keywords.
        inputs: its tensors, by argument name.
        dtype: of the parameters.
        mode: "auto" compiles on CUDA only.

    Returns:
        What the function returns, in dtype, values under 1e-30 set to 0.
    """
    exact = compute_dtype(dtype)
    device = next(iter(inputs.values())).device
    with without_autocast(device.type):
        arguments = {name: value.to(exact) for name, value in inputs.items()}
        wanted = device.type == "cuda" if mode == "auto" else mode
        if wanted and not torch.compiler.is_compiling():
            return _construct_compiled(function, arguments).to(dtype)
        return without_subnormals(function(**arguments)).to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which operators keep the dtype of their arguments."""
    if not has_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _construct_compiled(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Call a kernel function through torch.compile. If no compiler works, warn once and stay eager."""
    global _compiler_works
    if not _compiler_works:
        return without_subnormals(function(**inputs))
    partial = function if isinstance(function, functools.partial) else functools.partial(function)
    compiled = _compiled(partial.func, tuple(sorted(partial.keywords.items())))
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in inputs.values())
    try:
        with torch.inference_mode(False), torch.enable_grad():
            kernel = compiled(**{name: _as_operand(value) for name, value in inputs.items()})
    except torch._dynamo.exc.BackendCompilerFailed as error:
        _compiler_works = False
        warnings.warn(
            f"kernel construction stays eager: torch.compile has no working compiler here ({error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return without_subnormals(function(**inputs))
    return kernel if wanted else kernel.detach()


def _as_operand(value: Tensor) -> Tensor:
    """A view of the value that requires a gradient: one form for all layers, in training and evaluation.

    torch.compile would treat the shape of a parameter as fixed, and compile again for a value without a gradient.
    """
    operand = value if value.requires_grad else value.detach().requires_grad_()
    return operand.view_as(operand)


@functools.cache
def _compiled(function: Callable[..., Tensor], static: tuple[tuple[str, Any], ...]) -> Callable[..., Tensor]:
    """One compiled function per method and kernel size, for any number of channels."""

    def construct(**inputs: Tensor) -> Tensor:
        return without_subnormals(function(**inputs, **dict(static)))

    # torch.compile stores a limited number of results per code object, so every size gets a code object of its own
    own = types.FunctionType(
        construct.__code__.replace(), construct.__globals__, function.__name__, None, construct.__closure__
    )
    return torch.compile(own, dynamic=True)
