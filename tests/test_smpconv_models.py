"""SMPConv's own networks: the paper's numbers, the authors' checkpoints, timm's manner; SmpTCN on real sequences."""

import copy
import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import timm_contconv as tcc
from tests.peers.smpconv import ReleasedNet, ReleasedSmp, randomize_
from timm_contconv.layers import SmpConv2d, SmpConvBn2d
from timm_contconv.models.smp_tcn import SmpTCN

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": (13, 11, 9, 7)}


def small(**options) -> nn.Module:
    return timm.create_model("smpconv_tiny", **{**SMALL, "num_classes": 5, **options})


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


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
    net = randomize_(ReleasedNet()).eval()
    path = tmp_path_factory.mktemp("released") / "SMPConv-T.pth"
    torch.save({"model": net.state_dict()}, path)
    return net, str(path)


def test_a_released_checkpoint_gives_the_released_output(released, x):
    net, path = released
    model = timm.create_model("smpconv_tiny", pretrained=True, pretrained_cfg_overlay={"file": path}).eval()
    with torch.no_grad():
        expected = net(x)
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
        merged = tcc.merge(model)
        assert (merged(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_order_and_sign_of_released_coordinates_matter(released, x):
    """The comparison above would not pass with any other orientation."""
    net, path = released
    model = timm.create_model("smpconv_tiny", pretrained=True, pretrained_cfg_overlay={"file": path}).eval()
    kernels = [m for m in net.modules() if isinstance(m, ReleasedSmp)]
    layers = [m for m in model.modules() if isinstance(m, SmpConv2d)]
    assert len(kernels) == len(layers) == 14
    for kernel, layer in list(zip(kernels, layers, strict=True))[::13]:
        torch.testing.assert_close(layer.weight[:, 0], kernel.kernel(), atol=1e-5, rtol=1e-4)
        assert (layer.weight[:, 0] - kernel.kernel().transpose(1, 2)).abs().max() > 0.1 * layer.weight.abs().max()


def test_a_released_checkpoint_loads_for_other_classes(released):
    net, path = released
    overlay = {"file": path}
    model = timm.create_model("smpconv_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    torch.testing.assert_close(model.stem[0].conv.weight, net.stem[0].conv.weight)
    assert model.head.fc.weight.shape == (3, 768)


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
        timm.create_model("smpconv_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "wrong.pth")})


# ---- timm's manner


@pytest.mark.parametrize("name", ["smpconv_tiny", "smpconv_base"])
def test_default_config_is_complete(name):
    config = get_pretrained_cfg(name)
    state = on_meta(name).state_dict()
    assert config.architecture == name
    assert (config.num_classes, config.input_size, config.pool_size) == (1000, (3, 224, 224), (7, 7))
    assert {f"{config.first_conv}.weight", f"{config.classifier}.weight"} <= set(state)


def test_feature_extractor_gives_the_features_of_the_stages(x):
    model = small().eval()
    extractor = small(features_only=True, out_indices=(1, 3)).eval()
    state = {re.sub(r"^(stem|stages)\.", r"\1_", key): value for key, value in model.state_dict().items()}
    assert not extractor.load_state_dict(state, strict=False).missing_keys
    assert extractor.feature_info.channels() == [16, 32]
    assert extractor.feature_info.reduction() == [8, 32]
    final, intermediates = model.forward_intermediates(x)
    for feature, index in zip(extractor(x), (1, 3), strict=True):
        torch.testing.assert_close(feature, intermediates[index])
    torch.testing.assert_close(final, model.forward_features(x))


def test_forward_intermediates_takes_what_is_asked_for(x):
    model = small().eval()
    full = model.forward_intermediates(x, intermediates_only=True)
    assert [f.shape[1:] for f in full] == [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]
    last, taken = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    torch.testing.assert_close(taken, [full[0], full[2]])
    torch.testing.assert_close(last, full[2])
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], model.forward_features(x))
    with pytest.raises(ValueError, match="output_fmt='NLC': expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruned_model_gives_the_intermediate_features(x):
    model = small().eval()
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model(x), expected)
    assert model.num_features == 16


def test_options_of_timm_work():
    model = small(num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, global_pool="max")
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model.eval().forward_head(model.forward_features(x)), model(x))
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 32)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model(x).shape[1] == 3
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 32, 2, 2)


def test_drop_path_grows_linearly_to_the_papers_rate():
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in on_meta("smpconv_tiny").stages[2].blocks]
    assert rates == pytest.approx([0.1 * i / 13 for i in range(4, 12) for _ in range(2)], abs=1e-6)


def test_group_matcher_covers_the_model():
    model = small()
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())


def test_gradient_checkpointing_gives_equal_gradients(x):
    model = small(drop_path_rate=0.0)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        each(x).square().sum().backward()
    for (key, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=key)


def test_points_are_exempt_from_weight_decay_and_constrained():
    model = small()
    exempt = model.no_weight_decay()
    assert len(exempt) == 2 * 5
    assert all(name.endswith(("coordinate", "radius")) for name in exempt)
    layer = model.stages[0].blocks[0].large_kernel.conv
    with torch.no_grad():
        layer.kernel.radius.fill_(0)
    tcc.constrain_(model)
    torch.testing.assert_close(layer.kernel.radius, torch.full_like(layer.kernel.radius, 1e-3))


@pytest.mark.parametrize("training", [True, False])
def test_whole_model_compiles_without_a_graph_break(training, x):
    two_stages = {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (13, 11)}
    model = small(**two_stages, drop_path_rate=0.0).train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_exported_model_equals_eager(x):
    model = small().eval()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel_sizes": (9, 9)}, "expected one each per stage"), ({"kernel_sizes": (8,) * 4}, "odd")],
)
def test_wrong_kernel_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# ---- SmpTCN


@pytest.mark.usefixtures("one_thread")
def test_tcn_learns_to_tell_two_frequencies_under_noise():
    torch.manual_seed(0)
    model = SmpTCN(1, 2, length=64, channels=16, initial_radius=0.1)
    labels, phases = torch.randint(2, (256, 1)), torch.rand(256, 1)
    waves = torch.sin(2 * torch.pi * (3 * (1 + labels) * torch.arange(64) / 64 + phases))
    x, y = (waves + 0.5 * torch.randn_like(waves)).unsqueeze(1), labels.squeeze(1)
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=1e-2, weight_decay=0.01))
    for _ in range(12):
        for index in torch.randperm(192).split(64):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tcc.constrain_(model)
    with torch.no_grad():
        correct = model.eval()(x[192:]).argmax(1) == y[192:]
    assert correct.float().mean() > 0.95


def test_tcn_is_causal_in_every_block():
    model = SmpTCN(2, 3, length=16, channels=8).eval()
    x = torch.randn(2, 2, 16)
    other = x.clone()
    other[..., 10:] += 1
    y, y_other = model.forward_features(x), model.forward_features(other)
    torch.testing.assert_close(y[..., :10], y_other[..., :10])
    assert model(x).shape == (2, 3)
    assert not torch.allclose(model(x), model(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1"),
        ({"length": 0}, "length=0"),
        ({"channels": 0}, "channels=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"kernel_count": 0}, "kernel_count=0"),
    ],
)
def test_tcn_names_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}: expected (a positive int|at least 1)"):
        SmpTCN(**{"in_channels": 1, "num_classes": 10, "length": 8, "channels": 4, **options})
