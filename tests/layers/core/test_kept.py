"""A kept kernel is never stale: whatever changes a parameter, eval mode gives what a fresh layer gives."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import every_kernel_layer, every_layer, image_for, spread_

Factory = Callable[..., nn.Module]


def changed(value: torch.Tensor) -> torch.Tensor:
    """Another tensor like value, still in the range that layers take."""
    return value.detach() * 0.9 + 0.01


def step(layer: nn.Module, make: Factory) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.01).step()


def load(layer: nn.Module, make: Factory) -> None:
    layer.load_state_dict(spread_(make()).state_dict())


def load_by_assignment(layer: nn.Module, make: Factory) -> None:
    layer.load_state_dict(spread_(make()).state_dict(), assign=True)


def assign_data(layer: nn.Module, make: Factory) -> None:
    for parameter in layer.parameters():
        parameter.data = changed(parameter)


def edit_data(layer: nn.Module, make: Factory) -> None:
    for parameter in layer.parameters():
        parameter.data.mul_(0.9)


def edit_a_view(layer: nn.Module, make: Factory) -> None:
    for parameter in layer.parameters():
        parameter.detach()[0].add_(0.1)


def change_layout(layer: nn.Module, make: Factory) -> None:
    """Values of one tensor in the memory of its transpose, then other values there."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.flip(0).transpose(0, -1).contiguous().transpose(0, -1)


def copy_values(layer: nn.Module, make: Factory) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(changed(parameter))


def foreach(layer: nn.Module, make: Factory) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(layer.parameters()), 0.9)


def set_storage(layer: nn.Module, make: Factory) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.set_(changed(parameter))


def from_vector(layer: nn.Module, make: Factory) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    nn.utils.vector_to_parameters(changed(vector), layer.parameters())


def set_new_parameters(layer: nn.Module, make: Factory) -> None:
    for name, value in list(layer.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, nn.Parameter(changed(value)))


def change_dtype(layer: nn.Module, make: Factory) -> None:
    layer.double()
    edit_data(layer, make)


def round_to_half_and_back(layer: nn.Module, make: Factory) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def draw_anew(layer: nn.Module, make: Factory) -> None:
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


CHANGES = [
    step, load, load_by_assignment, assign_data, edit_data, edit_a_view, change_layout, copy_values, foreach,
    set_storage, from_vector, set_new_parameters, change_dtype, round_to_half_and_back, draw_anew,
]  # fmt: skip


def fresh_output(layer: nn.Module, make: Factory, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives that was never used before, with copies of the layer's values in the same memory layout."""
    fresh = make(dtype=x.dtype).eval()
    fresh.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    return fresh(x)


@every_layer
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_way_to_change_a_parameter_is_seen(make, change):
    layer = spread_(make()).eval()
    x = image_for(layer)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        with torch.enable_grad():
            change(layer, make)
        after = layer(image := x.to(next(layer.parameters()).dtype))
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh_output(layer, make, image))


@every_layer
def test_an_average_of_weights_is_followed(make):
    model = nn.Sequential(spread_(make()))
    ema = ModelEmaV3(model, decay=0.5)
    x = image_for(model[0])
    with torch.no_grad():
        for _ in range(3):
            edit_data(model[0], make)
            ema.update(model)
            assert torch.equal(ema.module(x), fresh_output(ema.module[0], make, x))


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_keeps_nothing_of_the_original(make, copied):
    layer = spread_(make()).eval()
    x = image_for(layer)
    with torch.no_grad():
        before = layer(x)
        other = copied(layer)
        edit_data(other, make)
        assert torch.equal(other(x), fresh_output(other, make, x))
        assert torch.equal(layer(x), before)


@every_layer
def test_parameters_that_are_lent_are_used(make):
    """functional_call and vmap, ahead of a forward with the layer's own parameters, and after it."""
    layer, other = spread_(make()).eval(), spread_(make()).eval()
    x = image_for(layer)
    with torch.no_grad():
        expected = layer(x), other(x)
        for _ in range(2):
            lent = torch.func.functional_call(layer, other.state_dict(), (x,))
            assert torch.equal(lent, expected[1])
            assert torch.equal(layer(x), expected[0])
            states = torch.func.stack_module_state([layer, other])
            both = torch.func.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (x,)))(*states)
            torch.testing.assert_close(both, torch.stack(expected), rtol=1e-4, atol=1e-5)


@every_kernel_layer
def test_an_edit_of_the_weight_does_not_stay(make):
    """The weight is the caller's own; edits of it, also through .data, do not reach the layer."""
    layer = spread_(make()).eval()
    x = image_for(layer)
    with torch.no_grad():
        before = layer(x)
        layer.weight.zero_()
        layer.weight.data.mul_(2)
        assert torch.equal(layer(x), before)


@every_layer
def test_gradients_flow_after_a_forward_without(make):
    layer = spread_(make()).eval()
    x = image_for(layer)
    with torch.inference_mode():
        expected = layer(x)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    image = x.clone().requires_grad_()
    y = layer.requires_grad_(False)(image)
    torch.testing.assert_close(y, expected.clone())
    assert torch.autograd.grad(y.sum(), image)[0].any()


@every_layer
def test_recording_and_fake_tensors_after_a_forward(make):
    layer = spread_(make()).eval().requires_grad_(False)
    x = image_for(layer)
    expected = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == expected.shape
    recorded = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(recorded(x), expected)
    assert torch.equal(layer(x), expected)


CONSTRUCTION = {"bmm", "mm"}  # every kernel is a matrix product, and no convolution here is


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@every_kernel_layer
def test_a_kernel_is_constructed_once_outside_training(make):
    layer = make().eval()
    x = image_for(layer)
    constructed = []
    with torch.no_grad():
        for mode in (layer.eval, layer.eval, layer.train, layer.eval):  # training frees what is kept
            mode()
            with Operators() as operators:
                layer(x)
            constructed.append(not CONSTRUCTION.isdisjoint(operators.names))
    assert constructed == [True, False, True, True]


@every_kernel_layer
def test_nothing_is_read_or_kept_off_the_cpu(make):
    """On the meta device any read of a value raises; each forward constructs."""
    layer = make(device="meta").eval().requires_grad_(False)
    x = image_for(make()).to("meta")
    for _ in range(2):
        with Operators() as operators:
            layer(x)
        assert not CONSTRUCTION.isdisjoint(operators.names)
        assert not {"equal", "_local_scalar_dense", "nonzero", "clone"} & set(operators.names)


@every_layer
def test_threads_may_share_a_layer_while_its_mode_changes(make):
    layer = spread_(make()).eval()
    x = image_for(layer)
    expected = layer(x)
    running = True

    def run(_: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                torch.testing.assert_close(layer(x), expected)

    def change() -> None:
        while running:
            if "bn" not in dict(layer.named_children()):  # batch norm would use the batch
                layer.train()
            layer.eval()
            layer.float()

    with ThreadPoolExecutor(7) as pool:
        changing = pool.submit(change)
        forwards = [pool.submit(run, i) for i in range(6)]
        for forward in forwards:
            forward.exception()
        running = False
        for future in (*forwards, changing):
            future.result()
