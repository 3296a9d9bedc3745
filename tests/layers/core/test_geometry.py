"""Layers that share one set of geometry parameters."""

import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_contconv as tcc
from tests.helpers import KERNEL_LAYERS, LAYERS, spread_
from timm_contconv.layers import DclsConv2d, KernelConv
from timm_contconv.layers.core.geometry import share_geometry


def test_a_shared_set_stands_once_in_the_model_and_survives_a_copy():
    home = nn.Module()
    home.a, home.b = (spread_(KERNEL_LAYERS["smp"]()) for _ in range(2))
    home.points = share_geometry([home.a.kernel, home.b.kernel])
    assert [name for name in home.state_dict() if "coordinate" in name] == ["points.coordinate"]
    (home.a.weight.sum() + 2 * home.b.weight.sum()).backward()
    assert home.points["coordinate"].grad.any()
    clone = copy.deepcopy(home)
    clone.points["radius"].data.fill_(0.5)
    assert (clone.a.geometry["radius"] == 0.5).all()
    assert (clone.b.geometry["radius"] == 0.5).all()
    assert not (home.a.geometry["radius"] == 0.5).all()


def test_sets_of_other_shapes_are_refused_and_nothing_is_changed():
    layers = [DclsConv2d(4, 4, 7, groups=groups, kernel_count=3) for groups in (4, 2)]
    with pytest.raises(ValueError, match=r"position has shape \(2, 4, 2, 3\) in one layer and \(2, 4, 1, 3\) in"):
        share_geometry([layer.kernel for layer in layers])
    assert all("kernel.position" in layer.state_dict() for layer in layers)


GEOMETRY = {
    "dcls": {"position", "sigma"},
    "smp": {"coordinate", "radius"},
    "flex": {"mask_mean", "mask_sigma"},
    "genv": {"raw_sigma"},
    "cc": {"weight_1", "bias_1", "weight_2", "bias_2"},
}


@pytest.mark.parametrize("method", GEOMETRY)
def test_geometry_is_not_decayed(method):
    layer = LAYERS[method]()
    assert layer.geometry.keys() >= GEOMETRY[method]
    geometry = {id(parameter) for parameter in layer.geometry.values()}
    groups = tcc.param_groups(nn.Sequential(layer), lr=1.0, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert not decayed & geometry


# ---- one set in several formulas: gradients are those of layers that have a copy each


def shared_model() -> nn.Module:
    model = timm.create_model("test_convnext_dcls_gauss", num_classes=10)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1)  # otherwise a layer hardly counts
    return model


def unshared_gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name of the shared model; of plain convolutions whose kernels are those of the formulas, layer by layer."""
    plain = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, KernelConv):
            plain.set_submodule(name, layer.to_conv())
    plain(images).square().sum().backward()
    model.zero_grad()
    for name, layer in model.named_modules():
        if isinstance(layer, KernelConv):
            layer.kernel().backward(plain.get_submodule(name).weight.grad)
    others = dict(plain.named_parameters())
    return {
        name: (others[name].grad if value.grad is None else value.grad).clone()
        for name, value in model.named_parameters()
    }


def once(model: nn.Module, images: torch.Tensor) -> int:
    model(images).square().sum().backward()
    return 1


def accumulated(model: nn.Module, images: torch.Tensor) -> int:
    return sum(once(model, images) for _ in range(3))


def checkpointed(model: nn.Module, images: torch.Tensor, reentrant: bool) -> int:
    for stage in model.stages:
        for block in stage.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    return once(model, images)


def interrupted(model: nn.Module, images: torch.Tensor) -> int:
    """Checkpointed, with forwards without gradients before the backward."""
    model.set_grad_checkpointing()
    loss = model(images).square().sum()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(images)
            model.eval()(images)
            assert model.stages[1].blocks[0].conv_dw.weight.any()
    model.train()
    loss.backward()
    return 1


def threaded(model: nn.Module, images: torch.Tensor) -> int:
    with ThreadPoolExecutor(3) as pool:
        return sum(pool.map(lambda _: accumulated(model, images), range(3)))


@pytest.mark.parametrize(
    "run",
    [
        once,
        accumulated,
        functools.partial(checkpointed, reentrant=False),
        functools.partial(checkpointed, reentrant=True),
        interrupted,
        threaded,
    ],
    ids=["once", "accumulated", "checkpointed", "reentrant", "interrupted", "threaded"],
)
def test_gradients_of_shared_geometry(run: Callable[[nn.Module, torch.Tensor], int]) -> None:
    model, images = shared_model(), torch.randn(2, 3, 32, 32)
    expected = unshared_gradients(model, images)
    model.zero_grad()
    passes = run(model, images)
    for name, parameter in model.named_parameters():
        tolerance = 1e-4 * expected[name].abs().max().item() + 1e-12
        torch.testing.assert_close(parameter.grad / passes, expected[name], rtol=1e-4, atol=tolerance)
