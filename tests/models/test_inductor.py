"""torch.compile as users call it: Inductor, images whose size changes, training and evaluation."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from packaging.version import Version

import timm_contconv  # noqa: F401 - registers the models
from tests.models_for_tests import awake

pytestmark = pytest.mark.slow

# Up to torch 2.14 Inductor can't train timm's own test_convnext with sizes that become dynamic at the second call.
DYNAMIC = None if Version(torch.__version__) >= Version("2.15") else False
SIZES = (64, 96) if DYNAMIC is False else (64, 96, 80)
MODELS = (
    *(f"test_convnext_{recipe}" for recipe in ("dcls", "dcls_triangle", "dcls_gauss", "smp", "flex")),
    *("test_resnet_genv", "test_resnet_cc"),
)


def images(pixels: int) -> torch.Tensor:
    return torch.randn(2, 3, pixels, pixels + 16, generator=torch.Generator().manual_seed(pixels))


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_equals_eager_at_all_sizes(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = awake(timm.create_model(name, num_classes=10))
    check(model)


def test_ccnet_with_a_pooling_compiles_one_graph_per_size():
    """Its layers' scales are long fractions, with which symbolic sizes did not end.

    In float64: in float32 enough ReLUs fall to the other side to change gradients by some per cent, in eager too.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    check(timm.create_model("ccnet", num_classes=10, global_pool="avg", dims=8).double(), (32, 40, 48))


def check(model: torch.nn.Module, sizes: tuple[int, ...] = SIZES) -> None:
    eager = copy.deepcopy(model).double()  # in float32 a ReLU near zero may fall to the other side
    compiled, dtype = torch.compile(model, dynamic=DYNAMIC), next(model.parameters()).dtype
    for x in map(images, sizes):
        for each, module, batch in ((compiled, model, x.to(dtype)), (eager, eager, x.double())):
            module.zero_grad()
            each.train()(batch).square().sum().backward()
        largest = max(parameter.grad.abs().max().item() for parameter in eager.parameters())
        for (name, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
            # A bias of CC's ahead of a batch norm has a gradient of nothing but rounding.
            scale = max(b.grad.abs().max().item(), 3e-3 * largest)
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
    with torch.no_grad():
        for x in map(images, sizes):
            expected = eager.eval()(x.double()).to(dtype)
            torch.testing.assert_close(compiled.eval()(x.to(dtype)), expected, rtol=1e-3, atol=1e-4)
