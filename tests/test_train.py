"""Parameter groups, penalties and constraints; training as timm does it."""

import copy
import functools

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.cli.digits import load_digits, train_on_digits
from timm_contconv.layers import ConvReplacement, DclsConv2d, SmpConv2d
from timm_contconv.train import training_hooks


@pytest.fixture
def model():
    return timm.create_model("test_convnext_dcls", num_classes=10)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ConvReplacement)]


def geometry_of(model):
    return {id(p) for layer in layers_of(model) for p in layer.geometry.values()}


@functools.cache
def smallest_model(recipe):
    names = tcc.load_patch(recipe).models
    tests = [name for name in names if name.startswith("test_")]
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in tests or names}
    return f"{min(sizes, key=sizes.get)}_{recipe}"


def backward(model, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 32, 32, generator=generator, dtype=next(model.parameters()).dtype)
    loss = F.cross_entropy(model(images), torch.randint(10, (batch,), generator=generator))
    loss.backward()
    return loss


# Parameter groups


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("recipe", [None, *tcc.list_patches()])
def test_every_parameter_is_in_exactly_one_group(recipe, layer_decay):
    model = timm.create_model(smallest_model(recipe) if recipe else "test_convnext", num_classes=10)
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_positions_learn_five_times_faster_without_decay(model):
    optimizer = torch.optim.SGD(tcc.param_groups(model, lr=0.1, weight_decay=0.05))
    CosineLRScheduler(optimizer, t_initial=10)
    rates = {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }
    assert rates["stages.2.dcls_geometry.position"] == (0.5, 0.0)
    assert rates["stages.2.blocks.0.conv_dw.element_weight"] == (0.1, 0.05)
    assert rates["stages.2.blocks.0.conv_dw.bias"] == (0.1, 0.0)


def test_weights_without_geometry_are_grouped_as_timm_groups_them(model):
    mine = {
        name: (group["weight_decay"], group["lr_scale"])
        for group in tcc.param_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.7)
        for name in group["param_names"]
    }
    theirs = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.7).param_groups
    expected = {id(p): (group["weight_decay"], group["lr_scale"]) for group in theirs for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in geometry_of(model):
            assert mine[name] == expected[id(parameter)], name


def test_shared_geometry_has_the_layer_decay_of_the_last_layer_that_uses_it(model):
    scales = {
        name: group["lr_scale"]
        for group in tcc.param_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.5, position_lr_scale=3)
        for name in group["param_names"]
    }
    blocks = [scales[f"stages.2.blocks.{index}.conv_dw.element_weight"] for index in range(4)]
    assert blocks[0] < blocks[-1] < 1
    assert scales["stages.2.dcls_geometry.position"] == 3 * blocks[-1]


def test_frozen_parameters_are_in_no_group(model):
    model.requires_grad_(False)
    model.head.fc.weight.requires_grad_(True)
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    assert [name for group in groups for name in group["param_names"]] == ["head.fc.weight"]


def test_a_part_without_its_layers_shared_geometry_is_refused(model):
    stage = model.stages[2]
    part = torch.nn.Sequential(stage.downsample, stage.blocks)
    with pytest.raises(ValueError, match=r"1\.0\.conv_dw, .*registered outside of this Sequential, .*pass its parent"):
        tcc.param_groups(part, lr=0.1, weight_decay=0.05)
    whole = tcc.param_groups(stage, lr=0.1, weight_decay=0.05)
    assert "dcls_geometry.position" in [name for group in whole for name in group["param_names"]]
    for layer in layers_of(part):
        layer.geometry.requires_grad_(False)
    groups = tcc.param_groups(part, lr=0.1, weight_decay=0.05)
    assert sum(len(group["params"]) for group in groups) == len(list(part.parameters()))


@pytest.mark.parametrize("recipe", tcc.list_patches())
def test_every_parameter_of_a_feature_extractor_is_in_a_group(recipe):
    model = timm.create_model(smallest_model(recipe), features_only=True)
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    used = geometry_of(model) | {id(p) for p in model.parameters()}
    assert {id(p) for group in groups for p in group["params"]} == used


@pytest.mark.parametrize("value", [-1e-3, float("inf"), float("nan"), "5"])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "layer_decay"])
def test_rates_out_of_range_are_refused(model, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected a finite number of at least 0"):
        tcc.param_groups(model, **{"lr": 1e-3, "weight_decay": 0.05, name: value})


@pytest.mark.parametrize("value", [0, -5.0, float("inf"), float("nan"), "5"])
def test_a_learning_rate_scale_of_positions_out_of_range_is_refused(model, value):
    with pytest.raises(ValueError, match=f"position_lr_scale={value!r}: expected more than 0, and finite"):
        tcc.param_groups(model, 1e-3, 0.05, position_lr_scale=value)


# Penalty and constraints


def test_penalty_is_the_mean_over_layers_and_zero_where_none_is(model):
    layers = [m for m in model.modules() if isinstance(m, DclsConv2d)]
    expected = sum(layer.penalty() for layer in layers) / len(layers)
    torch.testing.assert_close(tcc.penalty(model), expected)
    assert tcc.penalty(torch.nn.Linear(2, 2)).item() == 0


def test_penalty_pushes_elements_apart(model):
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "position" in n], lr=100.0)
    before = tcc.penalty(model).item()
    for _ in range(10):
        optimizer.zero_grad()
        tcc.penalty(model).backward()
        optimizer.step()
        tcc.constrain_(model)
    assert tcc.penalty(model).item() < 0.9 * before


# Hooks on a script's own optimisers

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


def loss_of(model, seed=0):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(images), torch.arange(4))


@pytest.mark.parametrize(
    ("step", "optimizer", "lr"),
    [
        (plain_step, torch.optim.SGD, 1.0),
        (accumulating_step, torch.optim.SGD, 1.0),
        (scaled_step, torch.optim.SGD, 1.0),
        (scaled_step, functools.partial(torch.optim.SGD, fused=True), 1.0),
        (plain_step, torch.optim.AdamW, 1e-2),
    ],
    ids=["plain", "accumulation", "GradScaler", "fused with GradScaler", "AdamW"],
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

    with pytest.warns(UserWarning, match="--penalty: had no effect"):
        after = trained(model, overflowing, hooks={"penalty_factor": 1.0})
    torch.testing.assert_close(after, dict(model.named_parameters()), atol=0, rtol=0)


def test_only_layers_whose_parameters_are_stepped_are_constrained(model):
    ema, other = ModelEmaV3(model).module, copy.deepcopy(model)
    outside = [copy.deepcopy(model) for _ in range(1)] + [ema, other]
    with torch.no_grad():
        for each in (model, *outside):
            for layer in layers_of(each):
                layer.position.fill_(1000.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_hooks():
        optimizer.step()
    assert all(layer.position.abs().max() == 8 for layer in layers_of(model))
    assert all(layer.position.min() == 1000 for each in outside for layer in layers_of(each))


def test_hooks_end_with_their_block(model):
    with training_hooks():
        pass
    with torch.no_grad():
        layers_of(model)[0].position.fill_(1000.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layers_of(model)[0].position.max() == 1000


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
    from torch.distributed.optim import ZeroRedundancyOptimizer

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
            layers_of(model)[0].position.fill_(1000.0)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert layers_of(model)[0].position.max() == 8
    with training_hooks():
        pass


def test_a_penalty_with_a_closure_is_refused(model):
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"tcc\.penalty\(model\) to the loss"), training_hooks(penalty_factor=1.0):
        optimizer.step(lambda: backward(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty_factor": -1.0}, "penalty_factor=-1.0: expected at least 0"),
        ({"penalty_power": 0}, "penalty_power=0: expected an int of at least 1"),
        ({"penalty_factor": 1.0, "penalty_power": 1.5}, "penalty_power=1.5: expected an int of at least 1"),
        ({"penalty_power": 2}, "penalty_power=2: expected 1 with penalty_factor=0"),
        ({"position_lr_scale": 0.0}, "lr_scale=0.0: expected more than 0"),
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
        backward(model)
        optimizer.step()
    expected = {
        id(p): (0.1 * group["lr_scale"], group["weight_decay"])
        for group in tcc.param_groups(model, 0.1, 0.05, layer_decay=layer_decay)
        for p in group["params"]
    }
    made = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert made.keys() == expected.keys()
    assert all(made[key] == pytest.approx(expected[key]) for key in expected)


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
    options = ("--position-lr-scale: had no effect", "--penalty: had no effect")
    with pytest.warns(UserWarning, match=options[0]), pytest.warns(UserWarning, match=options[1]):  # noqa: SIM117
        with training_hooks(position_lr_scale=5.0, penalty_factor=1.0):
            torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1).step()
    with pytest.warns(UserWarning, match=options[1]), training_hooks(penalty_factor=1.0):
        torch.optim.SGD(points.parameters(), lr=0.1).step()


# Training


@pytest.mark.parametrize("recipe", tcc.list_patches())
def test_ten_steps_lower_the_loss(recipe, digits):
    model = timm.create_model(smallest_model(recipe), num_classes=10)
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
    start = averaged[0].position.clone()
    with torch.no_grad():
        model.stages[2].blocks[0].conv_dw.position.add_(1.0)
    ema.update(model)
    torch.testing.assert_close(averaged[0].position, start + 0.25)
    assert all(layer.position is averaged[0].position for layer in averaged)
    torch.testing.assert_close(averaged[0].weight, averaged[0].construct())
    assert not torch.equal(averaged[0].weight, before)


@pytest.mark.parametrize("recipe", tcc.list_patches())
def test_gradient_checkpointing_gives_equal_gradients(recipe):
    model = timm.create_model(smallest_model(recipe), num_classes=10).double()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    backward(model)
    backward(again)
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
    train_five_steps(compiled, torch.compile(compiled))
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
        kernels = [layer.construct() for layer in layers_of(model)]
        loss = loss_of(model)
    loss.backward()
    exact = [layer.construct() for layer in layers_of(model)]
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


def test_bfloat16_training_on_digits_learns_as_float32_does(digits):
    """Two passes over the data; the standard deviation over seeds is about a percent."""
    assert abs(difference(digits, seed=0, epochs=2)) < 0.03
