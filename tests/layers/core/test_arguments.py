"""Arguments that layers share with PyTorch's convolutions: what is refused, and how it is named."""

import re

import numpy as np
import pytest
import torch

from timm_contconv.layers import DclsConv2d, SmpConv1d


@pytest.mark.parametrize(
    ("argument", "value", "wanted"),
    [
        *(("kernel_size", value, "a positive int, or 2 of them") for value in (7.0, None, True, (7, True), (7, 7, 7))),
        *(("kernel_size", value, "a positive int, or 2 of them") for value in (torch.tensor(7), "77", np.int64(0))),
        *(("stride", value, "a positive int, or 2 of them") for value in (None, 0, (1, 1.0))),
        *(("dilation", value, "a positive int, or 2 of them") for value in (None, 1.0)),
        *(("padding", value, "an int of at least 0, or 2 of them") for value in (1.5, True, np.array([1, 1]))),
        *(("in_channels", value, "a positive int") for value in ("8", 8.0, None, True, torch.tensor(8))),
        ("out_channels", 0, "a positive int"),
        ("groups", 2.0, "a positive int"),
        ("in_channels", 7, "a multiple of groups=2"),
        ("padding", "full", "an int, 2 ints, 'same', 'valid'"),
        ("padding", "causal", "an int, 2 ints, 'same', 'valid'"),
        ("padding_mode", "mirror", "one of zeros, reflect, replicate, circular"),
        ("compile", "yes", "'auto' (on CUDA only), True or False"),
    ],
)
def test_a_bad_argument_is_refused_by_name(argument, value, wanted):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{argument}={value!r}: expected {wanted}')}$"):
        DclsConv2d(
            **{"in_channels": 8, "out_channels": 8, "kernel_size": 7, "groups": 2, "kernel_count": 5, argument: value}
        )


def test_ints_of_numpy_become_pythons():
    eight, two = np.int64(8), np.int64(2)
    layer = DclsConv2d(eight, eight, (eight, 7), (two, 1), two, np.int64(1), two, kernel_count=two)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((8, 7), (2, 1), (2, 2), (1, 1))
    assert {type(v) for v in (*layer.kernel_size, *layer.stride, *layer.padding, *layer.dilation)} == {int}
    assert {type(v) for v in (layer.in_channels, layer.out_channels, layer.groups, layer.kernel.kernel_count)} == {int}


def test_a_sequence_takes_causal_padding():
    assert SmpConv1d(2, 2, 8).padding == "causal"
    with pytest.raises(ValueError, match=r"^padding='full': expected an int, 1 ints, 'same', 'valid' or 'causal'$"):
        SmpConv1d(2, 2, 8, padding="full")
