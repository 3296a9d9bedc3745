"""PyTorch's convolution in float64, which every algorithm is compared with."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_contconv import ops

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CPU_ALGORITHMS = ["pytorch", "channels_last", "direct", "fft", "dft"]


def using(name: str):
    """Forces an algorithm; "default" leaves the choice to the engine."""
    return contextlib.nullcontext() if name == "default" else ops.algorithm(name)


def plain(x, weight, bias, stride, padding, groups):
    return PLAIN[weight.ndim - 2](x, weight, bias, stride, padding, 1, groups)


def run(fn, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups, grad: Tensor | None = None):
    """Output and gradients of a convolution for a fixed gradient of the output."""
    tensors = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = fn(*tensors[:2], tensors[2] if bias is not None else None, stride, padding, groups)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))


def reference(x, weight, bias, *geometry):
    """`run` in float64, and the error scale of each result: the sums if no terms cancelled, and no less than a term."""
    double = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = run(plain, *double, *geometry)
    sizes = [None if t is None else t.abs() for t in double]
    sums = run(plain, *sizes, *geometry, torch.ones_like(exact[0]))
    of_x, of_weight, one = x.double().abs().max(), weight.double().abs().max(), torch.ones(())
    terms = of_x * of_weight, of_weight, of_x, one
    return exact, [torch.maximum(s.max(), t) for s, t in zip(sums, terms, strict=False)]


def assert_close(got, exact, scales, tolerance: float):
    for name, a, b, scale in zip(("output", "input", "weight", "bias"), got, exact, scales, strict=False):
        error = (a.double() - b).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance * scale.item(), f"{name}: {error:.2e} of {scale:.2e}"


def check(name: str, case, tolerance: float = 1e-5) -> bool:
    """Compares the three passes of an algorithm with float64; False where it does not apply."""
    exact, scales = reference(*case)
    with using(name):
        try:
            got = run(ops.conv, *case)
        except ValueError as error:
            assert "does not apply" in str(error)  # noqa: PT017 - a refusal is one of two right answers
            return False
    assert {t.dtype for t in got} == {case[0].dtype}
    assert_close(got, exact, scales, tolerance)
    return True
