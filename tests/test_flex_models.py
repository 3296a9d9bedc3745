"""FlexNets: the paper's sizes, the authors' checkpoints, timm's manner; FlexTCN on real sequences; what docs claim."""

import copy
import statistics

import numpy as np
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks import flex_fit
from tests.flexnet_peer import ReleasedFlexNet, randomize_
from timm_contconv.layers import FlexConv1d, FlexConv2d, MAGNet
from timm_contconv.models.flex_tcn import FlexTCN
from timm_contconv.models.flexnet import FlexNet
from timm_contconv.models.tcn import TCN

NAMES = ["flexnet3", "flexnet5", "flexnet7"]
SMALL = {"img_size": 16, "dim": 4, "flex_args": {"hidden_channels": 6}}


def small(name: str = "flexnet3", **options) -> FlexNet:
    return timm.create_model(name, **{**SMALL, "num_classes": 5, **options})


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16)


# ---- the paper's numbers


@pytest.mark.parametrize(("name", "millions"), [("flexnet3", 0.27), ("flexnet5", 0.44), ("flexnet7", 0.67)])
def test_parameter_counts_are_those_of_the_paper(name, millions):
    """Within 3 % of a number that the paper rounds to two places."""
    assert abs(size(on_meta(name)) - 1e6 * millions) <= 0.03 * 1e6 * millions + 5000


def test_flexnet7_has_as_many_parameters_as_the_released_one():
    assert size(on_meta("flexnet7")) == sum(p.numel() for p in ReleasedFlexNet().parameters())


# Table 2: 105 k, 239 k and 373 k for one channel in and ten classes
@pytest.mark.parametrize(("blocks", "thousands"), [(2, 105), (4, 239), (6, 373)])
def test_parameter_counts_of_flextcn_are_those_of_the_paper(blocks, thousands):
    assert size(FlexTCN(1, 10, length=64, blocks=blocks, device="meta")) // 1000 == thousands


def test_kernels_are_as_large_as_the_images_or_one_larger():
    assert on_meta("flexnet3").stem.conv.kernel_size == (33, 33)
    assert on_meta("flexnet3", img_size=29).blocks[2].conv2.kernel_size == (29, 29)
    assert on_meta("flexnet3", img_size=[16, 25]).blocks[2].conv2.kernel_size == (17, 25)


# ---- the authors' checkpoints


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[ReleasedFlexNet, str]:
    torch.manual_seed(0)
    net = randomize_(ReleasedFlexNet(width=8, factors=(1, 1.5, 2))).eval()
    path = tmp_path_factory.mktemp("released") / "flexnet.pt"
    torch.save({"model": net.state_dict()}, path)
    return net, str(path)


def load(path: str, **options) -> FlexNet:
    overlay = {"file": path}
    return timm.create_model("flexnet3", dim=8, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def test_a_released_checkpoint_gives_the_released_output(released):
    net, path = released
    model = load(path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        assert (model(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (tcc.merge(model)(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_keys_of_a_parallel_checkpoint_lose_their_prefix(released, tmp_path):
    net, path = released
    torch.save({f"module.{key}": value for key, value in net.state_dict().items()}, tmp_path / "parallel.pt")
    one, other = load(path), load(str(tmp_path / "parallel.pt"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_for_another_resolution_is_refused(released):
    with pytest.raises(ValueError, match="train_length=33: the checkpoint's kernels have 33 pixels, the model's 17"):
        load(released[1], img_size=16)


def test_a_checkpoint_with_other_keys_is_refused(released, tmp_path):
    state = dict(released[0].state_dict())
    del state["blocks.1.cconv2.Kernel.output_linear.bias"]
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="1 missing keys: blocks.1.conv2.output_bias"):
        load(str(tmp_path / "wrong.pt"))


def test_the_classifier_of_a_checkpoint_is_left_out_for_other_classes(released):
    assert load(released[1], num_classes=3)(torch.randn(1, 3, 32, 32)).shape == (1, 3)


# ---- timm's manner


@pytest.mark.parametrize("name", NAMES)
def test_default_config_is_complete(name):
    config = get_pretrained_cfg(name)
    model = on_meta(name)
    assert config.architecture == name
    assert config.num_classes == model.num_classes == 10
    assert config.input_size == (3, 32, 32)
    assert f"{config.classifier}.weight" in model.state_dict()
    assert isinstance(model.get_submodule(config.first_conv), FlexConv2d)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_blocks(name, x):
    model = small(name, features_only=True)
    assert model.feature_info.channels() == [b.conv1.out_channels for b in small(name).blocks]
    assert set(model.feature_info.reduction()) == {1}
    features = model(x)
    assert [tuple(f.shape[1:]) for f in features] == [(c, 16, 16) for c in model.feature_info.channels()]
    chosen = small(name, features_only=True, out_indices=(0, 2))
    assert len(chosen(x)) == 2


def test_intermediates_are_the_outputs_of_the_blocks(x):
    model = small().eval()
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(intermediates[0], model.blocks[0](model.stem(x)))
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model(x), expected)
    assert model.num_features == 6
    with pytest.raises(ValueError, match="output_fmt='NLC': expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_options_of_timm_work():
    model = small(num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, global_pool="max")
    images = torch.randn(2, 1, 16, 16)
    assert model(images).shape == (2, 7)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0, 0.1, 0.2])
    torch.testing.assert_close(model.eval().forward_head(model.forward_features(images)), model(images))
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 8)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model(images).shape[1] == 3
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 8, 16, 16)


def test_group_matcher_covers_the_model():
    model = small()
    groups = group_parameters(model, model.group_matcher())
    names = [n for names in groups.values() for n in names]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_gradient_checkpointing_gives_equal_gradients(x):
    model = small(dropout=0.0)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        each(x).square().sum().backward()
    for (key, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=key)


def test_masks_are_exempt_from_weight_decay():
    model = small()
    exempt = model.no_weight_decay()
    assert len(exempt) == 2 * 7
    assert all("mask_" in name for name in exempt)


@pytest.mark.parametrize("training", [True, False])
def test_whole_model_compiles_without_a_graph_break(training, x):
    model = small(dropout=0.0, width_factors=(1.5,)).train(training)
    if training:
        tcc.constrain_(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def test_exported_model_equals_eager(x):
    model = small(width_factors=(1.5,)).eval()
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def test_a_model_runs_at_another_resolution_with_one_call(x):
    model = small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tcc.at_resolution(model, 16, 32)(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert all(m.kernel_size == (33, 33) for m in model.modules() if isinstance(m, FlexConv2d))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = small().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(tcc.at_resolution(model, 32, 16)(x), fresh(x))


def test_a_saved_model_is_rebuilt(x, tmp_path):
    model = small().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, FlexConv2d):
                layer.geometry["mask_sigma"].uniform_(0.1, 0.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = small().eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("img_size", [16, (16, 24)])
def test_a_saved_model_is_loaded_with_its_image_size(img_size, tmp_path):
    model = small(img_size=img_size).eval()
    tcc.save_pretrained(model, tmp_path / "model")
    images = torch.randn(2, 3, 16, 24)
    for loaded in (
        tcc.from_pretrained(tmp_path / "model"),
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True),
    ):
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=0)


def test_saving_warns_of_a_resolution_that_is_lost(tmp_path):
    model = tcc.at_resolution(small(), 16, 24)
    with pytest.warns(UserWarning, match=r"saved without .* stem.conv \(at 3/2 times the resolution that it was made"):
        tcc.save_pretrained(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width_factors": ()}, "one factor per block"),
        ({"img_size": 0}, "img_size=0: expected a positive int"),
        ({"img_size": True}, "img_size=True: expected a positive int"),
        ({"img_size": "x"}, "img_size='x': expected a positive int"),
        ({"img_size": (16, 24, 32)}, r"img_size=\(16, 24, 32\): expected a positive int, in pixels, or two of them"),
        ({"img_size": (16, 24.5)}, r"img_size=\(16, 24.5\): expected a positive int"),
        ({"flex_args": {"kernel_size": 3}}, "flex_args={'kernel_size': 3}: expected a dict of .* img_size gives"),
        ({"flex_args": {"sigma": 3}}, "flex_args={'sigma': 3}: expected a dict of .*initial_sigma"),
        ({"flex_args": [3]}, r"flex_args=\[3\]: expected a dict of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FlexNet(**options)


# ---- FlexTCN


@pytest.mark.usefixtures("one_thread")
def test_tcn_reads_digits_pixel_by_pixel():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(labels)
    train, test = torch.randperm(len(y)).split([1437, 360])
    model = FlexTCN(1, 10, length=64, channels=16, dropout=0.0, flex_args={"initial_sigma": 0.5})
    optimizer = torch.optim.Adam(tcc.param_groups(model, lr=0.01, weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    for _ in range(4):
        for index in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tcc.constrain_(model)
    with torch.no_grad():
        assert (model.eval()(x[test]).argmax(1) == y[test]).float().mean() > 0.85


def test_tcn_is_causal_in_every_block_and_can_do_without_masks():
    for flex in ({}, {"mask": False}):
        model = FlexTCN(2, 3, length=16, channels=8, flex_args=flex).eval()
        x = torch.randn(2, 2, 16)
        other = x.clone()
        other[..., 10:] += 1
        y, y_other = model.forward_features(x), model.forward_features(other)
        torch.testing.assert_close(y[..., :10], y_other[..., :10], atol=1e-4, rtol=1e-4)
        assert model(x).shape == (2, 3)
        assert not torch.allclose(model(x), model(other))


def test_tcn_runs_at_another_sampling_rate():
    model = FlexTCN(1, 4, length=33).eval()
    tcc.at_resolution(model, 32, 64)
    assert {m.kernel_size for m in model.modules() if isinstance(m, FlexConv1d)} == {(65,)}
    assert model(torch.randn(1, 1, 65)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels=0: expected a positive int"),
        ({"num_classes": -1}, "num_classes=-1: expected a positive int"),
        ({"num_classes": 0}, "num_classes=0: expected a positive int"),
        ({"length": 0}, "length=0: expected a positive int"),
        ({"length": 8.0}, "length=8.0: expected a positive int"),
        ({"channels": 0}, "channels=0: expected a positive int"),
        ({"blocks": 0}, "blocks=0: expected a positive int"),
        ({"blocks": True}, "blocks=True: expected a positive int"),
        ({"dropout": 1.5}, "dropout=1.5: expected a probability, from 0 to 1"),
        ({"dropout": float("nan")}, "dropout=nan: expected a probability, from 0 to 1"),
    ],
)
def test_tcn_names_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        FlexTCN(**{"in_channels": 1, "num_classes": 10, "length": 8, **options})


def test_tcn_of_any_convolution_refuses_a_width_of_zero():
    with pytest.raises(ValueError, match="^channels=0: expected a positive int"):
        TCN(1, 10, lambda i, o: nn.Conv1d(i, o, 1), channels=0, blocks=1, dropout=0.0)


def test_tcn_takes_the_ints_of_numpy():
    model = FlexTCN(np.int64(1), np.int64(3), length=np.int64(8), channels=np.int64(4), blocks=np.int64(2))
    assert model(torch.randn(2, 1, 8)).shape == (2, 3)


# ---- what MAGNets can describe, in short; benchmarks/flex_fit.py is the long form


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("frequency", [2, 6])
def test_magnet_fits_a_gabor_function_better_than_gaussian_derivatives_of_its_size(frequency):
    error, magnet = min((flex_fit.fit_magnet(frequency, 300, seed) for seed in range(4)), key=lambda pair: pair[0])
    assert sum(p.numel() for p in magnet.parameters()) <= 58
    assert error < 0.5 * flex_fit.fit_njet(frequency, 300)[0]
    assert isinstance(magnet, MAGNet)


@pytest.mark.usefixtures("one_thread")
def test_magnet_fits_a_photograph_better_than_a_siren_of_its_size():
    fits = [flex_fit.fit_photograph("chelsea", 48, 2000, seed, hidden_channels=8) for seed in range(3)]
    assert all(0.9 < fit["siren_parameters"] / fit["magnet_parameters"] <= 1 for fit in fits)
    magnet, siren = (statistics.mean(fit[name] for fit in fits) for name in ("magnet", "siren"))
    assert magnet > siren + 0.3, f"{magnet:.2f} dB, {siren:.2f} dB"
    assert siren > 20  # a fit, and of a photograph


@pytest.mark.usefixtures("one_thread")
def test_gaussian_derivatives_of_the_comparison_are_derivatives():
    axis = torch.linspace(-1, 1, 9, dtype=torch.float64)
    jet = flex_fit.NJet(axis)
    points = axis.clone().requires_grad_()
    sigma = jet.log_sigma.exp().item()
    value = torch.exp(-0.5 * (points / sigma).square())
    (first,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), points)
    expected = F.normalize(torch.outer(second, value.detach()).flatten(), dim=0)
    basis = jet.basis().detach()
    assert (basis.T @ expected).abs().max() == pytest.approx(1, abs=1e-9)
    assert basis.shape == (81, 55)


def test_the_report_shows_each_layers_highest_frequency_and_what_the_mask_leaves():
    model = tcc.patch(timm.create_model("test_convnext"), "flex")
    report = tcc.report(model)
    for row in report.rows:
        layer = model.get_submodule(row.name)
        assert row.max_frequency == pytest.approx(0.5 * layer.max_frequency() / layer.nyquist_frequency)
        assert row.receptive_field_after == layer.to_conv().kernel_size
    assert "cycles/pixel" in str(report)
