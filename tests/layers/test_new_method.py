"""Adding a kernel method takes one Kernel class and one spec, with nothing said elsewhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, Self

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_contconv as tcc
from timm_contconv.layers import METHODS, Kernel, KernelConv2d, KernelSpec


def cosine_kernel(weight: Tensor, frequency: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """weight cos(2 pi (f_y y + f_x x)): (C_out, C_in/groups) and (2, C_out, C_in/groups) to a dense kernel."""
    rows, columns = (torch.arange(k, device=weight.device) - k // 2 for k in kernel_size)
    phase = frequency[0, ..., None, None] * rows[:, None] + frequency[1, ..., None, None] * columns
    return weight[..., None, None] * torch.cos(2 * torch.pi * phase)


class CosineKernel(Kernel):
    """A wave: weight (C_out, C_in/groups), frequency (2, C_out, C_in/groups) in cycles per pixel."""

    geometry_names = ("frequency",)

    def __init__(self, spec, out_channels, in_channels, kernel_size, causal=False, device=None, dtype=None) -> None:
        super().__init__(out_channels, in_channels, kernel_size, causal)
        shape = (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.frequency = nn.Parameter(torch.empty((2, *shape), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)
        nn.init.normal_(self.geometry["frequency"], std=0.1)

    def function(self) -> Callable[..., Tensor]:
        return functools.partial(cosine_kernel, kernel_size=self.kernel_size)

    @classmethod
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor], tolerance: float = 0.01) -> None:
        kernels[0].geometry["frequency"].zero_()
        for kernel, target in zip(kernels, targets, strict=True):
            kernel.weight.copy_(target.mean((-2, -1)))


class CosineSpec(KernelSpec):
    kernel: ClassVar[type[Kernel]] = CosineKernel
    layers: ClassVar[dict[int, type[KernelConv2d]]] = {2: KernelConv2d}

    method: Literal["cosine"] = "cosine"


RECIPE = {"layer": {"method": "cosine", "kernel_size": 9}, "select": ["depthwise"], "share": "stage"}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    METHODS["cosine"] = CosineSpec
    yield
    METHODS.pop("cosine")


METHODS.pop("cosine")  # known within these tests only


@pytest.fixture
def model() -> nn.Module:
    model = timm.create_model("test_convnext", num_classes=10)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)  # otherwise a layer hardly counts
    return tcc.patch(model, RECIPE, init="random")


def test_a_method_takes_less_than_60_lines():
    assert sum(len(inspect.getsource(part).splitlines()) for part in (cosine_kernel, CosineKernel, CosineSpec)) < 60


def test_it_trains(model):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=1e-3, weight_decay=0.05))
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    losses = []
    for _ in range(10):
        losses.append(nn.functional.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        tcc.constrain_(model)
    assert losses[-1] < 0.5 * losses[0]
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]


def test_it_merges_saves_and_loads(model, tmp_path):
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    merged = tcc.merge(model)
    assert type(merged.stages[0].blocks[0].conv_dw) is nn.Conv2d
    torch.testing.assert_close(merged(images), model(images), atol=1e-4, rtol=1e-4)
    tcc.save_pretrained(model, tmp_path / "cosine")
    loaded = tcc.from_pretrained(tmp_path / "cosine").eval()
    assert torch.equal(loaded(images), model(images))


def test_it_is_reported_fitted_and_compiled():
    model = tcc.patch(timm.create_model("test_convnext", num_classes=10), RECIPE)
    assert all(row.fit_error is not None for row in tcc.report(model).rows if row.name.endswith("conv_dw"))
    images = torch.randn(2, 3, 32, 32)
    stage = model.stages[0]
    features = model.stem(images)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), stage(features), atol=1e-4, rtol=1e-4)
