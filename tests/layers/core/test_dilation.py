"""Dilated layers: their kernel is that of an undilated layer, its pixels further apart."""

import pytest
import timm
import torch
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.layers import DclsConv1d, DclsConv2d, FlexConv2d, SmpConv2d

from ...helpers import image_for, spread_
from ...models_for_tests import awake, create

CONVOLVE = {1: F.conv1d, 2: F.conv2d}
LAYERS = {
    "dcls": lambda: DclsConv2d(8, 8, 7, 2, padding=9, dilation=3, groups=8, kernel_count=5),
    "dcls same": lambda: DclsConv2d(8, 8, (7, 5), padding="same", dilation=(2, 3), groups=8, kernel_count=5),
    "dcls reflect": lambda: DclsConv2d(
        8, 6, 5, padding=4, dilation=2, groups=2, kernel_count=5, padding_mode="reflect"
    ),
    "causal": lambda: DclsConv1d(8, 8, 7, padding="causal", dilation=2, groups=8, kernel_count=5),
    "smp": lambda: SmpConv2d(8, 8, 7, padding=6, dilation=2, groups=8, kernel_count=9),
    "flex": lambda: FlexConv2d(8, 8, 9, padding=8, dilation=2, groups=8, hidden_channels=6),
}


def expected(layer, x):
    """By PyTorch's dilated convolution with the layer's dense kernel."""
    reach = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if layer.padding == "causal":
        sides = [(reach[0], 0)]
    elif layer.padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in layer.padding]
    amounts = [amount for side in reversed(sides) for amount in side]
    x = F.pad(x, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    return CONVOLVE[layer.ndim](x, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dilated_layer_is_a_dilated_convolution_with_its_kernel_and_merges_into_one(name):
    layer = spread_(LAYERS[name]().double())
    x = image_for(layer)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), expected(layer, x))
    merged = layer.to_conv()
    torch.testing.assert_close(merged(x), layer(x))
    assert [m.dilation for m in merged.modules() if hasattr(m, "dilation")] == [layer.dilation]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("recipe", ["dcls", "dcls_gauss", "smp", "flex"])
def test_weights_load_into_a_dilated_backbone(recipe, output_stride, tmp_path):
    """A network for segmentation has the layers of its classifier; those of late stages are dilated."""
    name = f"test_convnext_{recipe}"
    model = create(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    source = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": source, "num_classes": 10}
    dilated = timm.create_model(name, output_stride=output_stride, **arguments).eval()
    assert dilated.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(1, 3, 64, 64)
    assert dilated.forward_features(x).shape[-1] == 64 // output_stride
    torch.testing.assert_close(tcc.merge(dilated)(x), dilated(x), atol=1e-4, rtol=1e-4)


def test_weights_of_strided_layers_do_not_fit_a_dilated_backbone(tmp_path):
    model = awake(timm.create_model("test_resnet_genv", num_classes=10))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    source = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    with pytest.raises(ValueError, match=r"dilated \(output_stride\): .*load the weights without output_stride"):
        timm.create_model(
            "test_resnet_genv", pretrained=True, pretrained_cfg_overlay=source, num_classes=10, output_stride=8
        )
