"""Patch, merge and unpatch change a model wholly or not at all, wherever they are interrupted."""

import functools
import inspect
import signal
import sys

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.patching import patch as patch_function
from timm_contconv.patching import transaction
from timm_contconv.patching.transaction import Transaction

from ..helpers import slow_but
from ..models_for_tests import Snapshot, layers_of

APPLYING = {inspect.getsourcefile(part) for part in (transaction, inspect.unwrap(patch_function), tcc.merge)}
RECIPES = {
    "dcls": {"kernel_size": 5, "kernel_count": 9},
    "smp": {"kernel_size": 5, "kernel_count": 9},
    "genv5": {"fit_tolerance": 1e-6},  # so that an unpatch can take the kernels back
    "cc": {},
}


def no_weight_decay() -> set[str]:
    return {"0.weight"}


class Residual(nn.Module):
    """As little of a ResNet as the recipe without max-pool takes, with depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = nn.Sequential(Block(4, 1)), nn.Sequential(Block(4, 2))

    def forward(self, x):
        return self.layer2(self.layer1(self.maxpool(x)))


class Block(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x):
        return self.conv2(self.conv1(x)) + (x if self.downsample is None else self.downsample(x))


def build() -> nn.Module:
    """With all that a patch has to keep: hooks, a frozen part, and an attribute that it sets itself."""
    torch.manual_seed(0)
    model = Residual().eval()
    model.no_weight_decay = no_weight_decay
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    model.layer1[0].conv1.bias.requires_grad_(False)
    return model


def patched(recipe: str) -> nn.Module:
    return tcc.patch(build(), recipe, init="random", **RECIPES[recipe])


def fitted(recipe: str) -> nn.Module:
    """Patched, with kernels that an unpatch can take back."""
    return tcc.patch(build(), recipe, **RECIPES[recipe])


VERBS = {
    "patch": (lambda recipe: build(), lambda m, recipe: tcc.patch(m, recipe, init="random", **RECIPES[recipe])),
    "merge": (patched, lambda m, recipe: tcc.merge(m, inplace=True)),
    "unpatch": (fitted, lambda m, recipe: tcc.unpatch(m)),
}


class Interrupted(BaseException):
    """As an interrupt or a lack of memory may arise anywhere."""


def at_line(number, act, call):
    """Run `call`, and `act` at the n-th line of those that change models; return how many of these lines it ran.

    A line of transaction.py counts as often as it runs, a line that prepares a change when it first runs.
    """
    count, seen = 0, set()

    def trace(frame, event, argument):
        nonlocal count
        file = frame.f_code.co_filename
        if file not in APPLYING:
            return None
        if event == "line" and (file == transaction.__file__ or (file, frame.f_lineno) not in seen):
            seen.add((file, frame.f_lineno))
            count += 1
            if count == number:
                act()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def interrupt():
    raise Interrupted


def structure(model):
    return str(model), list(model.state_dict()), vars(model).keys(), [p.requires_grad for p in model.parameters()]


def outcomes(verb, recipe, act, error):
    """What a verb leaves behind, interrupted at each of its lines: "as before" or "done"; anything else fails."""
    prepare, run = VERBS[verb]
    done, model = prepare(recipe), prepare(recipe)
    lines = at_line(0, None, lambda: run(done, recipe))
    x = torch.randn(1, 4, 16, 16)
    before, expected, found = Snapshot(model), model(x), []
    for number in range(1, lines + 1):
        with pytest.raises(error):
            at_line(number, act, lambda model=model: run(model, recipe))
        if not (changed := before.differences()):
            found.append("as before")
            continue
        assert structure(model) == structure(done), (number, changed)
        found.append("done")
        model = prepare(recipe)
        before = Snapshot(model)
        assert torch.equal(model(x), expected)
    return found


@pytest.mark.parametrize("recipe", slow_but(RECIPES, "cc"))
@pytest.mark.parametrize("verb", VERBS)
def test_an_error_at_any_line_leaves_the_model_as_it_was_or_wholly_changed(verb, recipe):
    handler = signal.getsignal(signal.SIGINT)
    try:
        found = outcomes(verb, recipe, interrupt, Interrupted)
    finally:
        signal.signal(signal.SIGINT, handler)  # lines that put it back are interrupted too
    assert found == sorted(found)  # once it is done it is done
    assert found[0] == "as before"


@pytest.fixture
def interruptible():
    """SIGINT raises a KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("verb", slow_but(VERBS, "patch"))
def test_ctrl_c_at_any_line_leaves_the_model_as_it_was_or_wholly_changed(verb):
    handler = signal.getsignal(signal.SIGINT)
    found = outcomes(verb, "dcls", functools.partial(signal.raise_signal, signal.SIGINT), KeyboardInterrupt)
    assert found == sorted(found)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_users_no_weight_decay_survives(recipe):
    model = build()
    with pytest.raises(ValueError, match="expected"):
        tcc.patch(model, recipe, init="nonsense")
    assert model.no_weight_decay is no_weight_decay
    tcc.patch(model, recipe, **RECIPES[recipe])
    assert model.no_weight_decay() > no_weight_decay()
    assert tcc.merge(model).no_weight_decay is no_weight_decay
    assert tcc.unpatch(model).no_weight_decay is no_weight_decay


def test_assignments_that_fail_half_way_are_undone():
    class Full(dict):
        def __setitem__(self, key, value):
            raise MemoryError

    first, second = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())
    second._modules = Full(second._modules)
    before = first[0]
    changes = Transaction()
    changes.set(first, "0", nn.Tanh())
    changes.set(first, "1", nn.Tanh())
    changes.set(second, "0", nn.Tanh())
    with pytest.raises(MemoryError):
        changes.apply()
    assert list(first) == [before]


def test_removed_attributes_come_back_in_their_order():
    model = timm.create_model("test_convnext", num_classes=10)
    before = Snapshot(model)
    changes = Transaction()
    for name in ("stem", "drop_rate", "num_classes"):
        changes.remove(model, name)
    changes.set(model, "more", 1)
    with pytest.raises(Interrupted):
        at_line(30, interrupt, changes.apply)
    assert before.differences() == []
    assert layers_of(model) == []
