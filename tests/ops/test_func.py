"""Transforms of torch.func, and forward mode, against PyTorch's own convolution."""

import copy

import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv import ops


def case_of(channels: int, size: int, kernel: int, groups: int):
    """Images, kernels, and two functions of them: ours and PyTorch's."""
    geometry = (1, 1), (kernel // 2,) * 2
    return (
        *(torch.randn(2, channels, size, size), torch.randn(channels, channels // groups, kernel, kernel)),
        lambda x, weight: ops.conv(x, weight, None, *geometry, groups),
        lambda x, weight: F.conv2d(x, weight, None, *geometry, 1, groups),
    )


def dense():
    return case_of(8, 24, 17, 1)


def depthwise():
    return case_of(16, 20, 15, 16)


cases = pytest.mark.parametrize("case", [dense, depthwise])


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@cases
def test_tangents_of_both_arguments(case):
    x, weight, ours, plain = case()
    primals, tangents = (x, weight), (torch.randn_like(x), torch.randn_like(weight))
    for got, expected in zip(*(torch.func.jvp(f, primals, tangents) for f in (ours, plain)), strict=True):
        assert_close(got, expected)


@cases
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(case, requires_grad):
    x, weight, ours, plain = case()
    weight.requires_grad_(requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        got, expected = (forward_ad.unpack_dual(f(dual, weight)).tangent for f in (ours, plain))
    assert_close(got, expected)


@cases
def test_gradients_of_every_sample(case):
    x, weight, ours, plain = case()

    def gradients(f):
        return torch.func.vmap(torch.func.grad(lambda w, x: f(x[None], w).square().sum()), (None, 0))(weight, x)

    assert_close(gradients(ours), gradients(plain))


@cases
def test_a_backward_under_a_transform_that_its_forward_was_not_under(case):
    """Of first and second order."""
    x, weight, ours, plain = case()
    tangent = torch.randn_like(ours(x, weight))

    def products(f):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = f(*leaves)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(y), tangent)
            first = torch.autograd.grad(y, leaves, dual, retain_graph=True)
            duals = [forward_ad.make_dual(torch.ones_like(g), g.detach()) for g in grads]
            second = torch.autograd.grad(grads, leaves, duals)
            return [forward_ad.unpack_dual(g).tangent for g in (*first, *second)]

    for got, expected in zip(products(ours), products(plain), strict=True):
        assert_close(got, expected)


@cases
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_batches(case, form):
    x, weight, ours, plain = case()
    leaves = x.contiguous(memory_format=form).requires_grad_(), weight.requires_grad_()

    def gradients(f):
        return torch.autograd.grad(f(*leaves).sum((1, 2, 3)), leaves, torch.eye(2), is_grads_batched=True)

    for got, expected in zip(gradients(ours), gradients(plain), strict=True):
        assert_close(got, expected)


@cases
def test_transforms_inside_compiled_graphs(case):
    x, weight, ours, plain = case()
    gradient = torch.compile(torch.func.grad(lambda w: ours(x, w).square().sum()), backend="aot_eager", fullgraph=True)
    assert_close(gradient(weight), torch.func.grad(lambda w: plain(x, w).square().sum())(weight))


def test_a_model_has_the_tangents_and_gradients_of_its_merged_copy():
    model = timm.create_model("test_convnext_dcls_gauss", num_classes=10).eval()
    merged, x = tcc.merge(copy.deepcopy(model)), torch.randn(4, 3, 160, 160)
    got, expected = (torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (model, merged))
    assert_close(got, expected)
    got, expected = (torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (model, merged))
    assert_close(got, expected)
