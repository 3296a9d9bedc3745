"""The recipe `engine` on the families that have large or many depthwise kernels."""

import pytest
import timm
import torch

import timm_contconv as tcc
from tests.helpers import relative
from tests.models_for_tests import awake, layers_of, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "convformer_s18", "inception_next_tiny", "fastvit_t8", "efficientnet_b0", "tf_efficientnet_b0"],
)
def test_families_keep_their_outputs_and_gradients(name):
    model = awake(timm.create_model(name, num_classes=10)).eval()
    x = torch.randn(1, 3, 128, 128)
    expected = output(model, x)
    model(x).square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    tcc.patch(model, "engine")
    assert layers_of(model)
    assert relative(output(model, x), expected) < 1e-5
    model(x).square().sum().backward()
    assert max(relative(p.grad, gradients[key]) for key, p in model.named_parameters() if gradients[key].any()) < 1e-3
    assert relative(output(tcc.unpatch(model), x), expected) < 1e-5
