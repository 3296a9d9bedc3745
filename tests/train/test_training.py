"""Training as timm does it: losses, moving averages, checkpoints, compiled graphs, half precision."""

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.cli.digits import load_digits, train_on_digits
from timm_contconv.layers import DclsConv2d, SmpConv2d

from ..helpers import slow_but
from ..models_for_tests import REGISTERED, awake, layers_of
from .shared import dcls_model, loss_of, smallest_model

model = pytest.fixture(dcls_model)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def small_model(recipe):
    if recipe == "genv5":
        return tcc.patch(timm.create_model("resnet18", num_classes=10), recipe, init="random")
    return timm.create_model(smallest_model(recipe), num_classes=10)


@pytest.mark.parametrize("recipe", slow_but(REGISTERED, *set(REGISTERED) - {"genv5"}))
def test_ten_steps_lower_the_loss(recipe, digits):
    model = small_model(recipe)
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=1e-3, weight_decay=0.05))
    images, labels = digits.train_images[:16], digits.train_labels[:16]
    losses = []
    for _ in range(11):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tcc.constrain_(model)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_moving_average_holds_shared_positions_once_and_builds_its_kernels_from_them(model):
    ema = ModelEmaV3(model, decay=0.75)
    averaged = [block.conv_dw for block in ema.module.stages[2].blocks]
    before = averaged[0].weight  # built and kept
    start = averaged[0].geometry["position"].clone()
    with torch.no_grad():
        model.stages[2].blocks[0].conv_dw.geometry["position"].add_(1.0)
    ema.update(model)
    torch.testing.assert_close(averaged[0].geometry["position"], start + 0.25)
    assert all(layer.geometry["position"] is averaged[0].geometry["position"] for layer in averaged)
    torch.testing.assert_close(averaged[0].weight, averaged[0].kernel())
    assert not torch.equal(averaged[0].weight, before)


@pytest.mark.parametrize("recipe", slow_but(REGISTERED, "dcls_gauss", "smp", "flex", "genv", "cc"))
def test_gradient_checkpointing_gives_equal_gradients(recipe):
    model = awake(small_model(recipe)).double()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    loss_of(model).backward()
    loss_of(again).backward()
    for (parameter, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-12, rtol=1e-9, msg=parameter)


def test_compiled_training_equals_eager():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1),
        DclsConv2d(8, 8, 9, padding=4, groups=8, kernel_count=5, interpolation="gauss"),
        torch.nn.GELU(),
        SmpConv2d(8, 8, 9, padding=4, groups=8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 10),
    )
    compiled = copy.deepcopy(model)
    train_five_steps(model, model)
    train_five_steps(compiled, torch.compile(compiled, backend="aot_eager"))
    torch.testing.assert_close(compiled.state_dict(), model.state_dict(), atol=1e-4, rtol=1e-3)


def train_five_steps(model, forward):
    optimizer = torch.optim.SGD(tcc.param_groups(model, lr=0.1, weight_decay=0.0))
    for seed in range(5):
        optimizer.zero_grad()
        loss_of(forward, seed).backward()
        optimizer.step()
        tcc.constrain_(model)


def test_parameters_and_positions_stay_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        kernels = [layer.kernel() for layer in layers_of(model)]
        loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(loss_of(model).item(), rel=0.02)
    exact = [layer.kernel() for layer in layers_of(model)]
    torch.testing.assert_close(kernels, exact, atol=0, rtol=0)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def difference(digits, seed, epochs):
    """Accuracy under bfloat16 autocast less that in float32, from the same seed."""
    accuracies = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(seed)
        model = timm.create_model("test_convnext_dcls_gauss", num_classes=10)
        if dtype is not None:
            model.forward = torch.autocast("cpu", dtype)(model.forward)
        accuracies.append(train_on_digits(model, digits, epochs, seed=seed).accuracy)
    return accuracies[1] - accuracies[0]


@pytest.mark.slow
def test_bfloat16_training_on_digits_is_within_noise_of_float32(digits):
    """Paired by seed: the mean difference is less than two standard errors, or half a percent."""
    differences = torch.tensor([difference(digits, seed, epochs=5) for seed in range(4)])
    error = differences.std() / len(differences) ** 0.5
    assert differences.mean().abs() < max(2 * error, 0.005)
