"""The inner convolution of an envelope as others see it: adapters, derivatives in forward mode."""

import pytest
import torch
from torch import nn

from timm_contconv.layers import GaussianEnvelopeConv2d

from ...models_for_tests import create


def test_lora_on_the_inner_convolution_merges_into_it():
    peft = pytest.importorskip("peft")
    model, x = create("test_resnet_genv"), torch.randn(2, 3, 64, 64)
    names = [name for name, module in model.named_modules() if isinstance(module, GaussianEnvelopeConv2d)]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[f"{name}.conv" for name in names]))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        lora(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        expected = lora.eval()(x)
        merged = lora.merge_and_unload()
        assert all(type(merged.get_submodule(name).conv) is nn.Conv2d for name in names)
        torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_forward_mode_agrees_with_differences(order):
    layer = GaussianEnvelopeConv2d(4, 6, 3, 2, 1, order=order, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)

    def run(image, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (image,))

    primals = (x, *(value.detach() for value in values))
    tangents = tuple(torch.randn_like(value) for value in primals)
    _, found = torch.func.jvp(run, primals, tangents)
    step = 1e-6
    ahead, behind = (run(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-6)
    jacobian = torch.func.jacfwd(run, argnums=1)(*primals)
    torch.testing.assert_close(jacobian, torch.func.jacrev(run, argnums=1)(*primals))
