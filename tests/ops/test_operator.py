"""The custom operators: torch.library.opcheck, gradients of second order, FLOPs, torch.compile and torch.export."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_contconv import ops

from ..helpers import slow_but
from .reference import plain

OPERATORS = torch.ops.timm_contconv


class Block(nn.Module):
    """A convolution as a layer calls it."""

    def __init__(self, dims: int = 2, kernel: int = 9, groups: int = 16, stride: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16 // groups, *[kernel] * dims))
        self.bias = nn.Parameter(torch.randn(16))
        self.geometry = (stride,) * dims, (kernel // 2,) * dims, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.conv(x, self.weight, self.bias, *self.geometry).relu()


@pytest.mark.parametrize(
    ("name", "groups"),
    [("pytorch", 2), ("channels_last", 4), ("direct", 4), ("fft", 4), ("fft", 2), ("dft", 1)],
)
@pytest.mark.parametrize("form", slow_but([torch.contiguous_format, torch.channels_last], torch.channels_last), ids=str)
def test_opcheck(name, groups, form):
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=form).requires_grad_()
    weight, bias = torch.randn(4, 4 // groups, 5, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    grad = torch.randn(2, 4, 9, 4).contiguous(memory_format=form).requires_grad_()
    geometry = [1, 2], [2, 1], groups
    last = form is torch.channels_last
    exactly = {"rtol": 1e-4, "atol": 1e-4}
    with ops.algorithm(name):
        torch.library.opcheck(OPERATORS.conv.default, (x, weight, bias, *geometry), **exactly)
        torch.library.opcheck(OPERATORS.conv_input_gradient.default, (grad, weight, [9, 8], last, *geometry), **exactly)
        torch.library.opcheck(OPERATORS.conv_weight_gradient.default, (grad, x, [5, 4], *geometry), **exactly)


@pytest.mark.parametrize(
    ("name", "groups"),
    slow_but([("pytorch", 2), ("channels_last", 2), ("fft", 2), ("fft", 1), ("dft", 1)], ("fft", 2), ("dft", 1)),
)
@pytest.mark.parametrize(("stride", "padding"), slow_but([((1, 1), (2, 1)), ((2, 3), (3, 0))], ((2, 3), (3, 0))))
def test_gradcheck_to_second_order(name, groups, stride, padding):
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2 // groups, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with ops.algorithm(name):
        fn = lambda *tensors: ops.conv(*tensors, stride, padding, groups)  # noqa: E731
        assert torch.autograd.gradcheck(fn, (x, weight, bias))
        assert torch.autograd.gradgradcheck(fn, (x, weight, bias))


def test_double_backward_of_the_compiled_loops():
    x = torch.randn(1, 16, 9, 9, requires_grad=True)
    weight = torch.randn(16, 1, 5, 5, requires_grad=True)

    def penalty(fn):
        (grad,) = torch.autograd.grad(fn(x, weight, None, (1, 1), (2, 2), 16).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (x, weight))

    with ops.algorithm("direct"):
        got = penalty(ops.conv)
    for a, b in zip(got, penalty(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize(("name", "groups"), [("direct", 16), ("fft", 2)])
def test_flops_are_those_of_a_convolution(name, groups):
    x = torch.randn(2, 16, 9, 8, requires_grad=True)
    weight = torch.randn(16, 16 // groups, 5, 3, requires_grad=True)
    with ops.algorithm(name), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.conv(x, weight, None, (1, 1), (2, 1), groups).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * math.prod((2, 16, 9, 8)) * 15 * (16 // groups)


@pytest.mark.parametrize(("dims", "groups"), [(1, 16), (2, 16), (3, 16), (2, 1)])
def test_compiles_as_one_graph_with_the_same_gradients(dims, groups):
    block = Block(dims, 5, groups)
    x = torch.randn(2, 16, *[7] * dims)
    block(x).pow(2).sum().backward()
    fresh = copy.deepcopy(block)
    fresh.zero_grad()
    out = torch.compile(fresh, fullgraph=True, backend="aot_eager")(x)
    out.pow(2).sum().backward()
    torch.testing.assert_close(out, block(x))
    for a, b in zip(fresh.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-2)


def test_compiles_with_inductor():
    block = Block(2, 9)
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 16])
def test_one_compiled_graph_serves_every_size(groups):
    frames = torch._dynamo.testing.CompileCounter()
    block = torch.compile(Block(2, 9, groups), fullgraph=True, dynamic=True, backend=frames)
    for size in (12, 20, 31):
        x = torch.randn(2, 16, size, size)
        torch.testing.assert_close(block(x), block._orig_mod(x), rtol=1e-4, atol=1e-3)
    assert frames.frame_count == 1


@pytest.mark.parametrize("groups", slow_but([1, 2], 2))
def test_gradients_of_one_compiled_graph_at_every_size(groups):
    weight, bias = torch.randn(8, 8 // groups, 9, 9, requires_grad=True), torch.randn(8)
    fn = lambda x, w: ops.conv(x, w, bias, (1, 1), (4, 4), groups)  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, height, width in ((1, 16, 16), (4, 40, 33), (16, 64, 20)):
        x = torch.randn(n, 8, height, width, requires_grad=True)
        expected = F.conv2d(x, weight, bias, padding=4, groups=groups)
        wanted = torch.autograd.grad(expected.square().sum(), (x, weight))
        for a, b in zip(torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight)), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2 * b.abs().max().item())


def test_a_forced_algorithm_is_read_when_the_compiled_model_runs():
    block = torch.compile(Block(2, 9), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 16, 40, 40)
    block(x)
    with ops.algorithm("dft"), pytest.raises(ValueError, match="'dft' does not apply"):
        block(x)


@pytest.mark.parametrize("groups", [1, 16])
def test_exports_with_a_dynamic_size(groups):
    block = Block(2, 9, groups).eval()
    dims = {"x": {0: torch.export.Dim("n", min=1), 2: torch.export.Dim("h", min=9), 3: torch.export.Dim("w", min=9)}}
    program = torch.export.export(block, (torch.randn(2, 16, 12, 13),), dynamic_shapes=dims)
    assert not [node for node in program.graph.nodes if "timm_contconv" in str(node.target)]
    for shape in ((1, 16, 12, 13), (3, 16, 30, 21)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-3)


def test_autocast_is_seen_by_the_compiler():
    block, x = Block(2, 9), torch.randn(1, 16, 12, 12)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == block(x).dtype == torch.bfloat16


def test_functional_call():
    block, x = Block(2, 9), torch.randn(1, 16, 12, 12)
    weight, bias = torch.randn(16, 1, 9, 9), torch.randn(16)
    out = torch.func.functional_call(block, {"weight": weight, "bias": bias}, (x,))
    torch.testing.assert_close(out, F.conv2d(x, weight, bias, 1, 4, 1, 16).relu(), rtol=1e-4, atol=1e-4)
