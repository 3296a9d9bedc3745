"""Layers of a stage compute the interpolation of their common geometry once per forward."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm_contconv.layers.once import compute_separately
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_contconv as tcc
from timm_contconv.layers import DclsConv2d, dcls

RECIPES = ["dcls", "dcls_triangle", "dcls_gauss"]


def model_of(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(f"test_convnext_{recipe}", num_classes=10)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1)
    return model


def separately(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for module in copied.modules():
        compute_separately(module)
    return copied


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item() + 1e-12)


@pytest.fixture
def calls(monkeypatch):
    """How often the Gauss interpolation is computed."""
    counted = []

    @functools.wraps(dcls.gauss_interpolation)
    def counting(*args, original=dcls.gauss_interpolation, **kwargs):
        counted.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(dcls.INTERPOLATIONS, "gauss", counting)
    monkeypatch.setattr(dcls, "gauss_interpolation", counting)
    return counted


def test_a_training_step_computes_each_stages_interpolation_once(calls):
    model = model_of("dcls_gauss")
    layers = [module for module in model.modules() if isinstance(module, DclsConv2d)]
    stages = {id(layer.geometry) for layer in layers}
    calls.clear()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(layers) == 9
    assert len(calls) == len(stages) == 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_layers_on_their_own(recipe):
    model, images = model_of(recipe), torch.randn(2, 3, 32, 32)
    assert_equal_gradients(gradients(model, images), gradients(separately(model), images))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, monkeypatch):
    model, images = model_of("dcls_gauss"), torch.randn(2, 3, 32, 32)
    expected = gradients(separately(model), images)
    for stage in model.stages:
        for block in stage.blocks:
            again = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
            monkeypatch.setattr(block, "forward", again)
    assert_equal_gradients(gradients(model, images), expected)


def test_steps_without_an_update_in_between_accumulate():
    model, images = model_of("dcls_gauss"), torch.randn(2, 3, 32, 32)
    once = gradients(model, images)
    for _ in range(2):
        model(images).square().sum().backward()
    assert_equal_gradients({name: p.grad / 3 for name, p in model.named_parameters()}, once)


def test_a_layer_that_is_called_on_its_own_follows_its_parameters():
    model, images = model_of("dcls_gauss"), torch.randn(2, 3, 32, 32)
    model(images)
    layer = model.stages[2].blocks[0].conv_dw
    before = layer.construct()
    with torch.no_grad():
        layer.position.add_(1)
    assert not torch.equal(layer.construct(), before)
    layer.construct().sum().backward()
    layer.construct().sum().backward()


def test_a_model_can_be_copied_after_a_forward():
    model, images = model_of("dcls_gauss"), torch.randn(2, 3, 32, 32)
    model(images)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.01)
    assert_equal_gradients(gradients(copied, images), gradients(separately(copied), images))


def test_an_update_between_forwards_is_seen():
    model, images = model_of("dcls_gauss"), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        gradients(model, images)
        optimizer.step()
    assert_equal_gradients(gradients(model, images), gradients(separately(model), images))


def test_unpatching_takes_the_hooks_off():
    model = timm.create_model("test_convnext")
    before = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    tcc.merge(tcc.patch(model, "dcls_gauss", init="random"), inplace=True)
    after = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    assert after == before == 0


@pytest.mark.parametrize("between", ["no_grad", "inference_mode", "evaluation", "weight"])
def test_a_checkpointed_model_may_run_without_gradients_before_its_backward(between: str) -> None:
    model, images = model_of("dcls_gauss").train(), torch.randn(2, 3, 32, 32)
    expected = gradients(model, images)
    model.set_grad_checkpointing()
    model.zero_grad()
    loss = model(images).square().sum()
    with torch.inference_mode() if between == "inference_mode" else torch.no_grad():
        if between == "weight":
            assert model.stages[1].blocks[0].conv_dw.weight.any()
        else:
            model.train(between != "evaluation")(images)
    model.train()
    loss.backward()
    assert_equal_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_several_threads_may_train_one_model() -> None:
    model, images = model_of("dcls_gauss").train(), torch.randn(2, 3, 32, 32)
    once = gradients(model, images)
    model.zero_grad()

    def train(_: int) -> None:
        for _ in range(4):
            model(images).square().sum().backward()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, range(3)))
    summed = {name: parameter.grad / 12 for name, parameter in model.named_parameters()}
    assert_equal_gradients(summed, once)
