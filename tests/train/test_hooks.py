"""Penalties, constraints and rates of positions by hooks on a script's own optimisers."""

import copy
import functools

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.distributed.optim import ZeroRedundancyOptimizer

import timm_contconv as tcc
from timm_contconv.train import training_hooks

from ..models_for_tests import layers_of
from .shared import dcls_model, loss_of

model = pytest.fixture(dcls_model)

FACTOR = 1000.0  # large, so that what the penalty does is not lost in the rounding of float32


def trained(model, step, *, in_loss=False, hooks=None, optimizer=torch.optim.SGD, lr=1.0):
    """A copy of the model after one step of `step(model, optimizer, penalty in the loss)`."""
    model = copy.deepcopy(model)
    stepper = optimizer(model.parameters(), lr=lr)
    with training_hooks(**(hooks or {})):
        step(model, stepper, FACTOR * tcc.penalty(model) ** 2 if in_loss else 0.0)
    if in_loss:
        tcc.constrain_(model)
    return dict(model.named_parameters())


def plain_step(model, optimizer, extra):
    (loss_of(model) + extra).backward()
    optimizer.step()


def accumulating_step(model, optimizer, extra):
    """timm's way: the loss of each of two batches, halved."""
    for seed in range(2):
        (loss_of(model, seed) / 2 + extra / 2).backward(retain_graph=True)
    optimizer.step()


def scaled_step(model, optimizer, extra):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model) + extra).backward()
    scaler.step(optimizer)
    scaler.update()


def closing_step(model, optimizer, extra):
    """Lightning's way: the closure sets gradients to 0 and computes them."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model) + extra
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize(
    ("step", "optimizer", "lr"),
    [
        (plain_step, torch.optim.SGD, 1.0),
        (closing_step, torch.optim.SGD, 1.0),
        (accumulating_step, torch.optim.SGD, 1.0),
        (scaled_step, torch.optim.SGD, 1.0),
        (scaled_step, functools.partial(torch.optim.SGD, fused=True), 1.0),
        (plain_step, torch.optim.AdamW, 1e-2),
    ],
    ids=["plain", "closure", "accumulation", "GradScaler", "fused with GradScaler", "AdamW"],
)
def test_a_penalty_by_hook_does_what_the_same_penalty_in_the_loss_does(model, step, optimizer, lr):
    hooks = {"penalty_factor": FACTOR, "penalty_power": 2}
    by_hook = trained(model, step, hooks=hooks, optimizer=optimizer, lr=lr)
    in_loss = trained(model, step, in_loss=True, optimizer=optimizer, lr=lr)
    without = trained(model, step, optimizer=optimizer, lr=lr)
    torch.testing.assert_close(by_hook, in_loss, atol=1e-5, rtol=1e-5)
    moved = [name for name in without if not torch.allclose(by_hook[name], without[name], atol=1e-4)]
    assert moved
    assert all("position" in name for name in moved)


def test_a_step_that_the_scaler_skips_changes_nothing(model):
    def overflowing(model, optimizer, extra):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(model) * torch.tensor(1e38)).backward()
        scaler.step(optimizer)

    with pytest.warns(UserWarning, match="penalty_factor: had no effect"):
        after = trained(model, overflowing, hooks={"penalty_factor": 1.0})
    torch.testing.assert_close(after, dict(model.named_parameters()), atol=0, rtol=0)


def test_only_layers_whose_parameters_are_stepped_are_constrained(model):
    ema, other = ModelEmaV3(model).module, copy.deepcopy(model)
    outside = [copy.deepcopy(model) for _ in range(1)] + [ema, other]
    with torch.no_grad():
        for each in (model, *outside):
            for layer in layers_of(each):
                layer.geometry["position"].fill_(1000.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_hooks():
        optimizer.step()
    assert all(layer.geometry["position"].abs().max() == 8 for layer in layers_of(model))
    assert all(layer.geometry["position"].min() == 1000 for each in outside for layer in layers_of(each))


def test_hooks_end_with_their_block(model):
    with training_hooks():
        pass
    with torch.no_grad():
        layers_of(model)[0].geometry["position"].fill_(1000.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layers_of(model)[0].geometry["position"].max() == 1000


class Outer(torch.optim.SGD):
    """An optimiser around another, as torch's ZeroRedundancyOptimizer; it steps `times` times."""

    def __init__(self, params, lr, times=1):
        super().__init__(params, lr=lr)
        self.inner, self.times = torch.optim.SGD(self.param_groups, lr=lr), times

    def step(self):
        for _ in range(self.times):
            self.inner.step()


def test_a_penalty_is_added_once_by_an_optimizer_inside_of_another(model):
    hooks = {"penalty_factor": FACTOR}
    expected = trained(model, plain_step, hooks=hooks)
    torch.testing.assert_close(trained(model, plain_step, hooks=hooks, optimizer=Outer), expected)


def test_a_penalty_is_added_once_under_zero_redundancy(model, tmp_path):
    hooks = {"penalty_factor": FACTOR}
    expected = trained(model, plain_step, hooks=hooks)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        zero = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
        found = trained(model, plain_step, hooks=hooks, optimizer=zero)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, expected)


def test_a_penalty_is_added_after_a_step_that_raised(model):
    def step_after_an_error(model, optimizer, extra):
        with pytest.raises(TypeError):
            Outer(torch.nn.Linear(1, 1).parameters(), lr=1.0, times=None).step()
        plain_step(model, optimizer, extra)

    hooks = {"penalty_factor": FACTOR}
    expected = trained(model, plain_step, hooks=hooks)
    torch.testing.assert_close(trained(model, step_after_an_error, hooks=hooks), expected)


def test_a_second_block_of_hooks_is_refused_and_the_first_stays(model):
    with training_hooks():
        with pytest.raises(RuntimeError, match="training_hooks: its hooks are in force already"), training_hooks():
            pytest.fail("entered")
        with torch.no_grad():
            layers_of(model)[0].geometry["position"].fill_(1000.0)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layers_of(model)[0].geometry["position"].max() == 8
    with training_hooks():
        pass


def test_a_line_search_sees_the_loss_with_the_penalty(model):
    """LBFGS calls the closure several times in a step and compares the losses that it returns."""
    lbfgs = functools.partial(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe")

    def step(model, optimizer, extra):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model) + (FACTOR * tcc.penalty(model) ** 2 if torch.is_tensor(extra) else 0.0)
            loss.backward()
            return loss

        optimizer.step(closure)

    by_hook = trained(model.double(), step, hooks={"penalty_factor": FACTOR, "penalty_power": 2}, optimizer=lbfgs)
    torch.testing.assert_close(by_hook, trained(model, step, in_loss=True, optimizer=lbfgs), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty_factor": -1.0}, "penalty_factor=-1.0: expected at least 0"),
        ({"penalty_power": 0}, "penalty_power=0: expected an int of at least 1"),
        ({"penalty_factor": 1.0, "penalty_power": 1.5}, "penalty_power=1.5: expected an int of at least 1"),
        ({"penalty_power": 2}, "penalty_power=2: expected 1 with penalty_factor=0"),
        ({"position_lr_scale": 0.0}, "position_lr_scale=0.0: expected more than 0"),
    ],
)
def test_settings_of_hooks_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message), training_hooks(**arguments):
        pass


# Learning rates of positions in optimisers that timm makes


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timms_factory_gives_positions_the_rate_that_is_asked_for(model, layer_decay):
    with training_hooks(position_lr_scale=5.0):
        optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
        CosineLRScheduler(optimizer, t_initial=10)
        loss_of(model).backward()
        optimizer.step()
    expected = {
        id(p): (0.1 * group["lr_scale"], group["weight_decay"])
        for group in tcc.param_groups(model, 0.1, 0.05, layer_decay=layer_decay)
        for p in group["params"]
    }
    made = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert made.keys() == expected.keys()
    assert all(made[key] == pytest.approx(expected[key]) for key in expected)


def test_timms_factory_gives_geometry_the_rates_of_the_papers():
    points = timm.create_model("test_convnext_smp", num_classes=10)
    with training_hooks(position_lr_scale={}):
        optimizer = create_optimizer_v2(points, "adamw", lr=0.1, weight_decay=0.05)
        CosineLRScheduler(optimizer, t_initial=10)
        loss_of(points).backward()
        optimizer.step()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for layer in layers_of(points):
        assert rates[id(layer.geometry["radius"])] == pytest.approx(0.01)
        assert rates[id(layer.geometry["coordinate"])] == pytest.approx(0.1)


def test_timms_factory_is_itself_again_afterwards(model):
    with pytest.warns(UserWarning, match="had no effect"), training_hooks(position_lr_scale=5.0):
        pass
    groups = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05).param_groups
    assert len(groups) == 2
    assert not any("lr_scale" in group for group in groups)


def test_an_optimizer_that_timm_did_not_make_is_refused(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_hooks(position_lr_scale=5.0), pytest.raises(ValueError, match=r"tcc\.param_groups"):
        optimizer.step()


@pytest.mark.parametrize("scheduler", [None, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)])
def test_a_scheduler_that_does_not_know_lr_scale_is_refused(model, scheduler):
    with training_hooks(position_lr_scale=5.0):
        optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05)
        if scheduler:
            scheduler(optimizer)
        with pytest.raises(ValueError, match="a scheduler of timm makes them so"):
            optimizer.step()


def test_options_without_effect_are_said():
    points = timm.create_model("test_convnext_smp", num_classes=10)
    options = ("position_lr_scale: had no effect", "penalty_factor: had no effect")
    with pytest.warns(UserWarning, match=options[0]), pytest.warns(UserWarning, match=options[1]):  # noqa: SIM117
        with training_hooks(position_lr_scale=5.0, penalty_factor=1.0):
            torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1).step()
    with pytest.warns(UserWarning, match=options[1]), training_hooks(penalty_factor=1.0):
        torch.optim.SGD(points.parameters(), lr=0.1).step()
