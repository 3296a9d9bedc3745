"""SMPConv's own networks: the paper's numbers, the authors' checkpoints, timm's manner."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_contconv as tcc
from timm_contconv.layers import SmpConv2d, SmpConvBn2d
from timm_contconv.models.smpconv import checkpoint_filter_fn

from ..helpers import relative
from ..models_for_tests import on_meta, output
from ..peers.smpconv import ReleasedNet, ReleasedSmp, randomize_

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": (13, 11, 9, 7)}


def small(**options) -> nn.Module:
    return timm.create_model("smpconv_tiny", **{**SMALL, "num_classes": 5, **options})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


# ---- the paper's numbers


@pytest.mark.parametrize(("name", "parameters"), [("smpconv_tiny", 26_705_248), ("smpconv_base", 79_546_520)])
def test_parameter_counts_are_those_of_the_paper(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize(("name", "giga"), [("smpconv_tiny", 5.7), ("smpconv_base", 16.6)])
def test_multiply_adds_are_those_of_the_paper(name, giga):
    model = on_meta(name).eval()
    for module in model.modules():
        if isinstance(module, SmpConvBn2d):  # PyTorch counts its own convolutions
            module.conv = module.conv.to_conv()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 1) == giga


# ---- the authors' checkpoints


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[ReleasedNet, str]:
    torch.manual_seed(0)
    net = randomize_(ReleasedNet(**SMALL)).eval()
    path = tmp_path_factory.mktemp("released") / "SMPConv-T.pth"
    torch.save({"model": net.state_dict()}, path)
    return net, str(path)


def loaded(path, **options) -> nn.Module:
    overlay = {"file": str(path)}
    return small(pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **options}).eval()


def test_a_released_checkpoint_gives_the_released_output(released, x):
    net, path = released
    model, expected = loaded(path), output(net, x)
    assert relative(output(model, x), expected) < 1e-5
    assert relative(output(tcc.merge(model), x), expected) < 1e-5
    # and would not with any other order or sign of the coordinates
    kernels = [m for m in net.modules() if isinstance(m, ReleasedSmp)]
    layers = [m for m in model.modules() if isinstance(m, SmpConv2d)]
    for kernel, layer in zip(kernels, layers, strict=True):
        torch.testing.assert_close(layer.weight[:, 0], kernel.kernel(), atol=1e-5, rtol=1e-4)
        assert relative(layer.weight[:, 0], kernel.kernel().transpose(1, 2)) > 0.1


@pytest.mark.parametrize(
    ("name", "depths", "dims"),
    [("smpconv_tiny", (2, 2, 8, 2), (96, 192, 384, 768)), ("smpconv_base", (2, 2, 20, 2), (128, 256, 512, 1024))],
)
def test_keys_and_shapes_of_the_releases_are_those_of_the_models(name, depths, dims):
    with torch.device("meta"):
        release = ReleasedNet(depths, dims).state_dict()
    model = on_meta(name)
    found = checkpoint_filter_fn(release, model)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_a_released_checkpoint_loads_for_other_classes(released):
    net, path = released
    model = loaded(path, num_classes=3)
    torch.testing.assert_close(model.stem[0].conv.weight, net.stem[0].conv.weight)
    assert model.head.fc.weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("stages.1.blocks.0.large_kernel.smp.conv.radius"), "missing keys: .*kernel.radius"),
        (lambda state: state.update({"extra.weight": torch.zeros(1)}), "unexpected keys: extra.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(released, tmp_path, change, message):
    state = dict(released[0].state_dict())
    change(state)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "wrong.pth")


# ---- timm's manner


def test_drop_path_grows_linearly_to_the_papers_rate():
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in on_meta("smpconv_tiny").stages[2].blocks]
    assert rates == pytest.approx([0.1 * i / 13 for i in range(4, 12) for _ in range(2)], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel_sizes": (9, 9)}, "expected one each per stage"), ({"kernel_sizes": (8,) * 4}, "odd")],
)
def test_wrong_kernel_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
