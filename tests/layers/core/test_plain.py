"""Kernels of one size put into another."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_contconv.layers.core.plain import centred, kernel_in_size, plain_conv, relative_error


@pytest.mark.parametrize("size", [3, 4, 7, 8])
@pytest.mark.parametrize("other", [3, 4, 7, 8])
def test_a_kernel_keeps_its_centre_in_another_size(size, other):
    """With PyTorch's "same" padding, a kernel in a larger size gives the same output."""
    small, large = sorted((size, other))
    kernel, x = torch.randn(1, 1, small, dtype=torch.float64), torch.randn(1, 1, 20, dtype=torch.float64)
    grown = centred(kernel, [large])
    torch.testing.assert_close(F.conv1d(x, grown, padding="same"), F.conv1d(x, kernel, padding="same"))
    assert torch.equal(centred(grown, [small]), kernel)


def test_a_kernel_is_cropped_only_where_its_rim_holds_next_to_nothing():
    kernel = F.pad(torch.randn(2, 1, 3, 3), (1, 1, 1, 1), value=1e-8)
    assert torch.equal(kernel_in_size(kernel, (3, 3)), kernel[..., 1:-1, 1:-1])
    kernel[0, 0, 0, 0] = 1
    assert kernel_in_size(kernel, (3, 3)) is None


def test_relative_error_counts_what_lies_outside_of_the_smaller_kernel():
    target = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    expected = target.clone()
    expected[..., 1:-1, 1:-1] = 0
    error = relative_error(target[..., 1:-1, 1:-1], target)
    assert error == pytest.approx((expected.norm() / target.norm()).item())
    assert relative_error(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)) == 0


def test_a_plain_convolution_copies_and_trains_as_what_it_is_made_of():
    weight, bias = nn.Parameter(torch.randn(4, 1, 3, 3)), torch.randn(4)
    conv = plain_conv(weight, bias, stride=(2, 2), padding=(1, 1), groups=4, padding_mode="circular")
    assert (conv.weight.requires_grad, conv.bias.requires_grad) == (True, False)
    conv.weight.data.zero_()
    assert weight.any()
    with pytest.raises(ValueError, match="padding='same' with stride=\\(2, 2\\) and padding_mode='circular'"):
        plain_conv(weight, bias, stride=(2, 2), padding="same", padding_mode="circular")
