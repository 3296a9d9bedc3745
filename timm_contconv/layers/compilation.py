"""The one point where kernel construction meets torch.compile."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["CompileMode", "check_compile_mode", "construct_compiled", "should_compile"]

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


def should_compile(mode: CompileMode, device: torch.device) -> bool:
    """Whether a layer with this mode constructs its kernel on `device` through its own compiled function.

    Inside an outer `torch.compile`, the outer compilation already covers the construction.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" if mode == "auto" else mode


def construct_compiled(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Call a kernel function through torch.compile; stay eager, with one warning, where no compiler works.

    Args:
        function: a module-level function, or a `functools.partial` of one with hashable keywords.
        inputs: its tensors, by argument name.
    """
    global _compiler_works
    if not _compiler_works:
        return function(**inputs)
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
        return function(**inputs)
    return kernel if wanted else kernel.detach()


def _as_operand(value: Tensor) -> Tensor:
    """The value as compiled code takes it for any layer, in training and evaluation, without compiling anew.

    A view, since torch.compile takes the shapes of parameters for fixed; always with a gradient.
    """
    operand = value if value.requires_grad else value.detach().requires_grad_()
    return operand.view_as(operand)


@functools.cache
def _compiled(function: Callable[..., Tensor], static: tuple[tuple[str, Any], ...]) -> Callable[..., Tensor]:
    """One compiled function per method and kernel size, for any number of channels."""

    def construct(**inputs: Tensor) -> Tensor:
        return function(**inputs, **dict(static))

    # torch.compile files its results under the code object, a limited number for each: every size gets its own
    own = types.FunctionType(
        construct.__code__.replace(), construct.__globals__, function.__name__, None, construct.__closure__
    )
    return torch.compile(own, dynamic=True)
