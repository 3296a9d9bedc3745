"""tcc.refit_ and the damage in a report, on networks with kernels that too few elements can't hold."""

import copy
import re

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc

from ..helpers import relative, slow_but
from ..models_for_tests import Snapshot, create, output

IMAGES = 12


class Net(nn.Module):
    """Depthwise convolutions with and without bias, strided and not, a batch norm after each."""

    def __init__(self) -> None:
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
        for size, stride, bias in ((5, 1, False), (5, 1, True), (3, 2, False)):
            steps += [nn.Conv2d(8, 8, size, stride, size // 2, groups=8, bias=bias), nn.BatchNorm2d(8), nn.ReLU()]
            steps += [nn.Conv2d(8, 8, 1)]
        self.steps = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x):
        return self.steps(x)


def images(seed: int = 1) -> torch.Tensor:
    """Smooth ones, as photographs are."""
    noise = torch.randn(IMAGES, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 5, 1, 2) * 4


@pytest.fixture
def original() -> nn.Module:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore:init='fit'")
@pytest.mark.parametrize("recipe", slow_but(["dcls", "dcls_triangle", "dcls_gauss"], "dcls"))
def test_a_refit_brings_outputs_near_to_the_originals_on_other_images(recipe, original):
    model = tcc.patch(copy.deepcopy(original), recipe, kernel_size=11, kernel_count=5)
    test, expected = images(2), output(original, images(2))
    before = relative(output(model, test), expected)
    again = copy.deepcopy(model)
    state = copy.deepcopy(original.state_dict())
    assert tcc.refit_(model, original, images()) is model
    assert relative(output(model, test), expected) < 0.5 * before
    tcc.refit_(again, original, [(batch, None) for batch in images().split(5)])
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


@pytest.mark.filterwarnings("ignore:init='fit'")
def test_weights_are_those_of_a_least_squares_solver(original):
    """The first layer, whose input is the original's: NumPy solves the same problem on all outputs."""
    model = tcc.patch(copy.deepcopy(original), "dcls", kernel_size=9, kernel_count=5, select="steps.1", share=None)
    tcc.refit_(model, original, images(), images=IMAGES)
    layer, conv = model.steps[1], original.steps[1]
    x = original.steps[0](images()).detach()
    wanted = conv(x).detach()
    elements = []
    for k in range(5):
        single = copy.deepcopy(layer)
        single.kernel.weight.data.zero_()[..., k] = 1
        elements.append(single(x).detach())
    for channel in range(8):
        matrix = torch.stack([element[:, channel].flatten() for element in elements], 1).double()
        solution = torch.linalg.lstsq(matrix, wanted[:, channel].flatten().double()).solution
        best = (matrix @ solution - wanted[:, channel].flatten()).norm()
        found = (layer(x)[:, channel] - wanted[:, channel]).detach().norm()
        assert found < 1.05 * best + 1e-4 * wanted[:, channel].norm()


@pytest.mark.filterwarnings("ignore:init='fit'")
def test_batch_norms_give_the_originals_moments(original):
    model = tcc.patch(copy.deepcopy(original), "dcls", kernel_size=9, kernel_count=4)
    tcc.refit_(model, original, images())
    seen: dict[nn.Module, list[torch.Tensor]] = {model: [], original: []}
    for net, found in seen.items():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda _, __, y, found=found: found.append(y.detach()))
        output(net, images())
    for new, old in zip(*seen.values(), strict=True):
        torch.testing.assert_close(new.mean((0, 2, 3)), old.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(new.std((0, 2, 3)), old.std((0, 2, 3)), atol=1e-3, rtol=1e-3)


def other_architecture(original):
    return timm.create_model("test_convnext"), images()


def with_nan(original):
    broken = copy.deepcopy(original)
    broken.steps[4].weight.data.fill_(torch.nan)
    return broken, images()


@pytest.mark.filterwarnings("ignore:init='fit'")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_architecture, "original: steps.1 is None, expected Conv2d(8, 8, kernel_size=(5, 5)"),
        (with_nan, "outputs of steps.5 are NaN or infinite"),
        (lambda original: (tcc.patch(copy.deepcopy(original), "smp"), images()), "expected the model before its patch"),
        (lambda original: (None, images()), "original=None: expected the model before its patch"),
        (lambda original: (original, []), "batches: no images"),
        (
            lambda original: (original, images().double()),
            "batches: images are torch.float64, the model is torch.float32",
        ),
        (lambda original: (original, images()[:, :2]), "batches: the model can't take images of shape (2, 24, 24)"),
        (
            lambda original: (original, [images(), images()[..., :20]]),
            "batches: images of sizes (3, 24, 24) and (3, 24",
        ),
        (lambda original: (original, images() * torch.inf), "batches: a batch holds NaN or infinity"),
        (lambda original: (original, ["x"]), "batches: a batch is a str"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(spoil, message, original):
    model = tcc.patch(copy.deepcopy(original), "dcls", kernel_size=9, kernel_count=4)
    other, batches = spoil(original)
    before = Snapshot(model)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        tcc.refit_(model, other, batches, images=2 * IMAGES)
    assert before.differences() == []


def test_what_needs_no_refit_is_refused(original):
    with pytest.raises(ValueError, match="nothing to refit"):
        tcc.refit_(tcc.patch(copy.deepcopy(original), "smp"), original, images())
    with pytest.raises(ValueError, match="is not patched"):
        tcc.refit_(original, original, images())


@pytest.mark.filterwarnings("ignore:init='fit'")
def test_the_damage_of_a_layer_is_what_its_exchange_alone_does(original):
    model = tcc.patch(copy.deepcopy(original), "dcls", kernel_size=9, kernel_count=4)
    snapshots = Snapshot(model), Snapshot(original)
    report = tcc.report(model, (3, 24, 24), original=original, images=images())
    assert [snapshot.differences() for snapshot in snapshots] == [[], []]
    old = output(original, images()).log_softmax(1)
    merged = tcc.merge(model)
    for name, damage in report.damage.layers.items():
        alone = copy.deepcopy(original)
        alone.set_submodule(name, merged.get_submodule(name))
        new = output(alone, images()).log_softmax(1)
        assert damage == pytest.approx((old.exp() * (old - new)).sum(1).mean().item(), rel=1e-3, abs=1e-7)
    new = output(model, images()).log_softmax(1)
    assert report.damage.whole == pytest.approx((old.exp() * (old - new)).sum(1).mean().item(), rel=1e-3)
    shown = [report.damage.layers[row.name] for row in report.rows if row.name in report.damage.layers]
    assert shown == sorted(shown, reverse=True)
    assert f"sum {sum(shown):.3g}" in str(report)
    with pytest.raises(ValueError, match="images=None: expected it too"):
        tcc.report(model, original=original)


def test_features_have_a_relative_damage():
    original = create("test_resnet", num_classes=0)
    model = tcc.patch(copy.deepcopy(original), "genv")
    damage = tcc.report(model, original=original, images=torch.randn(2, 3, 64, 64)).damage
    assert damage.measure == "relative"
    assert damage.kept is None
    assert all(0 < value < 1 for value in damage.layers.values())
