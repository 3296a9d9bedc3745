"""No forward pass waits for an accelerator: no value of a tensor is read there.

There need be no accelerator here. The tensors are PyTorch's fake ones, which say that they are on a CUDA device and
refuse to give their values away, and the one predicate that knows them from real tensors is told to take them for real.
"""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from timm_contconv.layers import ContinuousConv2d, DclsConv2d, FlexConv2d, GaussianEnvelopeConv2d, SmpConv2d
from timm_contconv.layers.core.kept import may_look

LAYERS = {
    "dcls": lambda device: DclsConv2d(8, 8, 9, padding=4, groups=8, kernel_count=5, compile=False, device=device),
    "dcls_gauss": lambda device: DclsConv2d(
        8, 8, 9, padding=4, groups=8, kernel_count=5, interpolation="gauss", compile=False, device=device
    ),
    "smp": lambda device: SmpConv2d(8, 8, 9, padding=4, groups=8, compile=False, device=device),
    "flex": lambda device: FlexConv2d(8, 8, 9, padding=4, groups=8, compile=False, device=device),
    "genv": lambda device: GaussianEnvelopeConv2d(8, 8, 3, stride=2, padding=1, device=device),
    "cc": lambda device: ContinuousConv2d(8, 8, 4, scale=0.5, compile=False, device=device),
    "cc, any scale": lambda device: ContinuousConv2d(8, 8, 4, scale=0.61, compile=False, device=device),
}


def forward(build, device: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Two forward passes of a layer on a device that there may not be."""
    layer = build("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.to_empty(device=device).train(training)
        x = torch.empty(2, 8, 16, 16, device=device)
        for module in list(sys.modules.values()):
            if vars(module).get("may_look") is may_look:
                monkeypatch.setattr(module, "may_look", lambda values: True)
        with torch.set_grad_enabled(training):
            layer(x)
            return layer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_no_forward_waits_for_an_accelerator(name, training, monkeypatch):
    assert forward(LAYERS[name], "cuda", training, monkeypatch).device.type == "cuda"


@pytest.mark.parametrize("name", ["dcls", "smp", "flex"])
def test_a_comparison_of_values_would_be_seen(name, monkeypatch):
    """The CPU compares parameters with copies."""
    with pytest.raises(DataDependentOutputException):
        forward(LAYERS[name], "cpu", False, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_no_step_waits_on_a_real_one(name, training):
    layer = LAYERS[name]("cuda").train(training)
    x = torch.randn(2, 8, 16, 16, device="cuda", requires_grad=training)
    layer(x)  # loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.set_grad_enabled(training):
            y = layer(x)
            if training:
                y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.isfinite().all()
