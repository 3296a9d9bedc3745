"""SmpConvBn2d: an SMP convolution and a small one, each with its batch norm."""

import pytest
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import SmpConv2d, SmpConvBn2d
from timm_contconv.layers.smp import SmpSpec


def trained_block(**options) -> SmpConvBn2d:
    arguments = {"kernel_size": 9, "padding": 4, "groups": 6, "bias": False, **options}
    block = SmpConvBn2d(SmpConv2d(6, 6, **arguments), small_kernel=5)
    for _ in range(3):
        block(torch.randn(4, 6, 12, 12) * 2 + 1)
    nn.init.normal_(block.bn.weight)
    nn.init.normal_(block.small_bn.bias)
    return block.eval()


@pytest.mark.parametrize(
    "options", [{}, {"groups": 1}, {"stride": 2}, {"bias": True}, {"padding": "same"}, {"padding": 6}]
)
def test_merging_folds_both_branches_into_one_convolution(options):
    model = nn.Sequential(trained_block(**options))
    x = torch.randn(2, 6, 12, 12)
    merged = tcc.merge(model)
    assert type(merged[0]) is nn.Conv2d
    torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=1e-4)
    assert isinstance(model[0], SmpConvBn2d)


def test_branches_are_normalised_apart_in_training():
    block = trained_block().train()
    nn.init.ones_(block.bn.weight)
    y = block(torch.randn(8, 6, 12, 12))
    # two normalised branches, nearly independent: a variance of 2; one normalisation of the sum would give 1
    assert (y - block.small_bn.bias[:, None, None]).var().item() == pytest.approx(2, rel=0.25)


def test_a_block_starts_as_what_it_stands_in_for_a_convolution():
    conv = nn.Conv2d(6, 6, 7, stride=2, padding=3, groups=6)
    block = SmpConvBn2d.from_conv(conv, SmpSpec(kernel_size=13, kernel_count=60, small_kernel=5)).eval()
    x = torch.randn(1, 6, 20, 20)
    torch.testing.assert_close(block(x), conv(x), atol=1e-4, rtol=1e-4)
    assert block.multiply_adds((10, 10)) == 100 * 6 * (13**2 + 5**2)


@pytest.mark.parametrize(
    ("conv", "small_kernel", "message"),
    [
        ({"padding": 4, "small_kernel": 5}, 5, "conv: has small_kernel=(5, 5)"),
        ({"padding": 4}, 4, "small_kernel=4: expected at most"),
        ({"padding": 1}, 5, "padding=(1, 1): expected 1 more"),
    ],
)
def test_small_kernels_that_do_not_fit_are_refused(conv, small_kernel, message):
    with pytest.raises(ValueError, match="expected") as caught:
        SmpConvBn2d(SmpConv2d(4, 4, 9, groups=4, **conv), small_kernel)
    assert message in str(caught.value)
