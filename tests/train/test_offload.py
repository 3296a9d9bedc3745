"""Weights that are moved to the device just before they are used."""

import pytest
import torch

import timm_contconv as tcc
from timm_contconv.layers import GaussianEnvelopeConv2d

from ..models_for_tests import create, scatter
from .shared import smallest_model


@pytest.mark.parametrize("recipe", ["dcls_gauss", "smp", "flex", "genv", "cc"])
def test_an_offloaded_model_gives_the_same_output(recipe):
    accelerate = pytest.importorskip("accelerate")
    model, x = scatter(create(smallest_model(recipe))).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        classes = tcc.no_split_modules(model)
        accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=classes)
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(x), expected)


def test_geometry_without_values_is_an_error():
    layer = GaussianEnvelopeConv2d(3, 4, 3, device="meta")
    layer.conv.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"raw_sigma: is on the meta device, the input on cpu: .*no_split_modules"):
        layer(torch.randn(1, 3, 64, 64))
    assert tcc.no_split_modules(torch.nn.Linear(2, 2)) == []
