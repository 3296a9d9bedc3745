"""The operators under torch.library.opcheck, torch.compile, torch.export and torch.func."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_contconv import ops

OPERATORS = torch.ops.timm_contconv


class Block(nn.Module):
    """A depthwise convolution as a layer calls it."""

    def __init__(self, dims: int = 2, kernel: int = 9):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 1, *[kernel] * dims))
        self.bias = nn.Parameter(torch.randn(16))
        self.stride, self.padding = (1,) * dims, (kernel // 2,) * dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.conv(x, self.weight, self.bias, self.stride, self.padding, 16).relu()


@pytest.mark.parametrize("name", ["pytorch", "channels_last", "direct", "fft", "gemm"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_opcheck(name, form):
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=form).requires_grad_()
    weight, bias = torch.randn(3, 1, 5, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    grad = torch.randn(2, 3, 9, 4).contiguous(memory_format=form).requires_grad_()
    sizes = ([1, 2], [2, 1])
    with ops.algorithm(name):
        torch.library.opcheck(OPERATORS.depthwise_conv.default, (x, weight, bias, *sizes))
        torch.library.opcheck(
            OPERATORS.depthwise_conv_input_gradient.default, (grad, weight, [9, 8], *sizes), rtol=1e-4, atol=1e-4
        )
        torch.library.opcheck(
            OPERATORS.depthwise_conv_weight_gradient.default, (grad, x, [5, 4], *sizes), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compiles_as_one_graph_with_the_same_gradients(dims):
    block = Block(dims, 5)
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


def test_one_graph_serves_every_size():
    frames = torch._dynamo.testing.CompileCounter()
    block = torch.compile(Block(2, 9), fullgraph=True, dynamic=True, backend=frames)
    for size in (12, 20, 31):
        x = torch.randn(2, 16, size, size)
        torch.testing.assert_close(block(x), block._orig_mod(x))
    assert frames.frame_count == 1


def test_a_forced_algorithm_is_read_when_the_compiled_model_runs():
    block = torch.compile(Block(2, 9), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 16, 40, 40)
    block(x)
    with ops.algorithm("gemm"), pytest.raises(ValueError, match="'gemm' does not apply"):
        block(x)


def test_exports_with_a_dynamic_size():
    block = Block(2, 9).eval()
    dims = {"x": {0: torch.export.Dim("n", min=1), 2: torch.export.Dim("h", min=9), 3: torch.export.Dim("w", min=9)}}
    program = torch.export.export(block, (torch.randn(2, 16, 12, 13),), dynamic_shapes=dims)
    names = [str(node.target) for node in program.graph.nodes]
    assert "timm_contconv.depthwise_conv.default" in names
    for shape in ((1, 16, 12, 13), (3, 16, 30, 21)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), block(x))


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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dims", "stride"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_the_fft_convolution_of_dense_kernels(groups, dims, stride):
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    x = torch.randn(2, 4, *[8] * dims, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, *[7] * dims, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)
    got, expected = ops.fft_conv(x, weight, bias, stride, 3, groups), plain(x, weight, bias, stride, 3, 1, groups)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), (x, weight)) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.compile(ops.fft_conv, backend="aot_eager")(x, weight, bias, stride, 3, groups), got
    )
