"""Whole models with CC layers: the recipe, the paper's classifier, other scales at inference, pictures."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import ContinuousConv2d
from timm_contconv.models.ccnet import CC_SCALE
from timm_contconv.viz import continuous_kernel_figure, save_kernel_figure

CCNETS = ("ccnet", "ccnet_baseline")


def small(name: str = "test_resnet_cc", **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def cc_layers(model: nn.Module) -> dict[str, ContinuousConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ContinuousConv2d)}


def trained_norms(model: nn.Module) -> nn.Module:
    """Batch norms as after training, so that nothing is hidden by them being the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


# The recipe


@pytest.mark.parametrize("base", ["resnet18", "resnet34", "resnet50", "resnet101", "test_resnet"])
def test_every_strided_convolution_is_replaced(base: str) -> None:
    plain, model = on_meta(base), on_meta(f"{base}_cc")
    strided = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    layers = cc_layers(model)
    assert list(layers) == list(strided)
    for name, conv in strided.items():
        assert layers[name].scale == tuple(Fraction(1, s) for s in conv.stride)
        assert layers[name].kernel_size == conv.kernel_size


@pytest.mark.parametrize("base", ["resnet18", "resnet50", "test_resnet"])
def test_a_patched_network_starts_with_the_same_logits_odd_sizes_included(base: str) -> None:
    model = trained_norms(timm.create_model(base, num_classes=5)).eval()
    inputs = [torch.randn(1, 3, *size) for size in ((64, 64), (65, 63), (33, 97))]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        tcc.patch(model, "cc")
        for x, y in zip(inputs, expected, strict=True):
            assert (model(x) - y).abs().max() <= 1e-4 * y.abs().max()


def test_other_networks_start_with_the_same_logits() -> None:
    """Patches, downsampling by 2x2 kernels, and TensorFlow's padding."""
    for base, size in (("test_convnext", (64, 96)), ("tf_efficientnet_b0", (65, 64))):
        model = timm.create_model(base, num_classes=5).eval()
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(x)
            tcc.patch(model, "cc")
            assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max(), base


def test_report_has_no_error_and_the_same_multiply_adds() -> None:
    report = tcc.report(tcc.patch(timm.create_model("resnet18"), "cc"))
    assert report.multiply_adds_after == report.multiply_adds_before
    assert all(row.fit_error < 1e-6 for row in report.rows)


def test_a_smaller_support_is_reported_with_its_error() -> None:
    report = tcc.report(tcc.patch(timm.create_model("resnet18"), "cc", kernel_size=1))
    errors = {row.before: row.fit_error for row in report.rows}
    assert errors["Conv2d 1×1"] < 1e-6
    assert 0.8 < errors["Conv2d 3×3"] < 1


def test_merged_and_unpatched_networks_have_the_same_logits() -> None:
    model, x = trained_norms(small()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        merged = tcc.merge(model)
        assert not cc_layers(merged)
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tcc.unpatch(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert type(model.get_submodule("layer2.0.conv1")) is nn.Conv2d


def test_layers_of_a_stage_can_share_their_hidden_layers() -> None:
    recipe = {**tcc.load_patch("cc").to_dict(), "share": "stage", "select": ["all"]}
    model = timm.create_model("test_convnext", num_classes=5).eval()
    x, before = torch.randn(1, 3, 64, 64), sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected = model(x)
        tcc.patch(model, recipe)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    shared = sum(p.numel() for p in model.parameters())
    del recipe["share"]
    alone = tcc.patch(timm.create_model("test_convnext", num_classes=5), recipe)
    assert before < shared < sum(p.numel() for p in alone.parameters())


def test_hidden_layers_take_no_weight_decay() -> None:
    groups = tcc.param_groups(small(), lr=0.1, weight_decay=0.5)
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay["layer2.0.conv1.geometry.weight_2"] == 0
    assert decay["layer2.0.conv1.internal_weight"] == 0.5


def test_a_patched_network_trains() -> None:
    model = timm.create_model("test_resnet_cc", num_classes=5).train()
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(tcc.param_groups(model, 1e-2, 0.0))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(value.grad is not None for layer in cc_layers(model).values() for value in layer.parameters())


@pytest.mark.parametrize("name", ["test_resnet_cc", "ccnet"])
def test_a_saved_model_comes_back(name: str, tmp_path: Path) -> None:
    model, x = small(name), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for layer in cc_layers(model).values():
            layer.geometry["bias_1"].add_(0.1)
    loaded = tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model"))
    assert torch.equal(loaded.eval()(x), model(x))


# CC-Net


def test_ccnet_has_the_papers_layers() -> None:
    model, baseline = small("ccnet"), small("ccnet_baseline")
    layers = list(cc_layers(model).values())
    assert len(model.layers) == len(baseline.layers) == 8
    assert [layer.conv.stride[0] for layer in baseline.layers] == [1, 2, 1, 1, 1, 1, 1, 2]
    assert [float(layer.scale[0]) for layer in layers] == pytest.approx([0.25 ** (1 / 6)] * 6 + [1], rel=1e-9)
    assert sum(isinstance(module, nn.Linear) for module in model.head.modules()) == 3
    x, sizes = torch.randn(1, 3, 32, 32), []
    for layer in model.layers:
        x = layer(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 25, 20, 16, 13, 10, 8, 8]
    assert model.head(x).shape == (1, 5)


@pytest.mark.parametrize("name", CCNETS)
def test_ccnet_does_what_timms_models_do(name: str) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=1, dims=8, drop_rate=0.1)
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    model.eval()
    features, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert [y.shape[-1] for y in intermediates] == [32, 16, 8]
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train().forward_features(x), features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(4, "avg")
    assert model(torch.randn(2, 1, 50, 40)).shape == (2, 4)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 8, 8, 8)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", CCNETS)
def test_ccnet_features(name: str) -> None:
    model = timm.create_model(name, features_only=True, out_indices=(1, 2), dims=[4, 5, 6, 7, 8, 9, 10, 11])
    assert model.feature_info.reduction() == [2, 4]
    features = model(torch.randn(1, 3, 32, 32))
    assert [tuple(y.shape) for y in features] == [
        (1, channels, size, size) for channels, size in zip(model.feature_info.channels(), (16, 8), strict=True)
    ]


@pytest.mark.parametrize("name", CCNETS)
def test_ccnet_configuration_is_complete(name: str) -> None:
    config, state = get_pretrained_cfg(name), on_meta(name).state_dict()
    assert (config.architecture, config.input_size, config.num_classes) == (name, (3, 32, 32), 10)
    assert {f"{config.classifier}.weight", f"{config.first_conv}.weight"} <= state.keys()


def test_ccnet_of_another_image_size() -> None:
    model = timm.create_model("ccnet", img_size=48, dims=4)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 10)
    with pytest.raises(ValueError, match="img_size=30: expected multiples of 4"):
        timm.create_model("ccnet", img_size=30)


@pytest.mark.parametrize("name", CCNETS)
def test_a_chain_has_no_path_to_drop(name: str) -> None:
    assert timm.create_model(name, dims=4, drop_path_rate=0.0)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1: expected 0"):
        timm.create_model(name, dims=4, drop_path_rate=0.1)


def test_variances_are_kept_through_the_layers() -> None:
    x = torch.randn(4, 3, 32, 32)
    for name in CCNETS:
        assert 0.1 < float(timm.create_model(name, dims=32)(x).detach().std()) < 3


# Other scales


def ccnet() -> nn.Module:
    return timm.create_model("ccnet", num_classes=5, dims=8).eval()


def test_scales_are_given_by_name_or_in_order_and_taken_back() -> None:
    model, x = ccnet(), torch.randn(1, 3, 32, 32)
    names, own = list(cc_layers(model)), [layer.scale for layer in cc_layers(model).values()]
    wanted = [(1.0, CC_SCALE**2), (CC_SCALE**2, 1.0), *[CC_SCALE] * 4, 1.0]
    with torch.no_grad():
        before = model(x)
        with tcc.cc_scales(model, wanted) as scaled:
            assert scaled is model
            assert model.layers[:2](x).shape[2:] == (32, 20)
            by_order = model(x)
        with tcc.cc_scales(model, {names[0]: wanted[0], names[1]: wanted[1]}):
            assert torch.equal(model(x), by_order)
        assert torch.equal(model(x), before)
    assert not torch.equal(by_order, before)
    assert [layer.scale for layer in cc_layers(model).values()] == own


def test_scales_are_taken_back_after_an_error() -> None:
    model = ccnet()
    with pytest.raises(RuntimeError), tcc.cc_scales(model, [0.5] * 7):
        model(torch.randn(1, 3, 32, 32))
    assert float(model.layers[1].conv.scale[0]) == pytest.approx(CC_SCALE)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"layers.9.conv": 1}, r"scales\['layers.9.conv'\]: no CC layer; there are layers.1.conv"),
        ({"layers.0.conv": 1}, r"scales\['layers.0.conv'\]: no CC layer"),
        ([1, 1], "expected 7 of them"),
        (0.5, "scales=0.5: expected 7 of them"),
        ({"layers.1.conv": 1, "layers.2.conv": 1e9}, r"scales\['layers.2.conv'\]=1000000000.0: expected a number"),
    ],
)
def test_wrong_scales_are_named_and_change_nothing(scales, message: str) -> None:
    model = ccnet()
    with pytest.raises(ValueError, match=message), tcc.cc_scales(model, scales):
        pytest.fail("entered")
    assert float(model.layers[1].conv.scale[0]) == pytest.approx(CC_SCALE)


def test_an_ensemble_is_the_mean_over_its_sequences() -> None:
    model, x = ccnet(), torch.randn(3, 3, 32, 32)
    other = {"layers.1.conv": (1, CC_SCALE**2), "layers.2.conv": (CC_SCALE**2, 1)}
    with torch.no_grad():
        expected = model(x)
        with tcc.cc_scales(model, other):
            expected = (expected + model(x)) / 2
        torch.testing.assert_close(tcc.scale_ensemble(model, [{}, other])(x), expected)


def test_an_ensemble_of_a_network_with_parallel_paths() -> None:
    model, x = timm.create_model("resnet18_cc", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    other = {"conv1": 0.625, "layer2.0.conv1": 0.4, "layer2.0.downsample.0": 0.4}
    with torch.no_grad(), tcc.cc_scales(model, other):
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(tcc.scale_ensemble(model, [other])(x), expected)


def test_a_sequence_of_another_product_is_refused() -> None:
    ensemble = tcc.scale_ensemble(timm.create_model("resnet18_cc").eval(), [{}, {"conv1": 0.75}])
    with pytest.raises(ValueError, match=r"sequences\[1\]: the last CC layer's output has 3×3 pixels, expected 2×2"):
        ensemble(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("sequences", [[], 0.5, {"layers.1.conv": 1}])
def test_sequences_come_in_a_list(sequences) -> None:
    with pytest.raises(ValueError, match=r"sequences=.*: expected at least one"):
        tcc.scale_ensemble(ccnet(), sequences)


def test_several_threads_may_use_an_ensemble() -> None:
    model, x = ccnet(), torch.randn(1, 3, 32, 32)
    own = [layer.scale for layer in cc_layers(model).values()]
    turns = {"layers.1.conv": (1, CC_SCALE**2), "layers.2.conv": (CC_SCALE**2, 1)}
    ensemble = tcc.scale_ensemble(model, [{}, turns])

    @torch.no_grad()
    def outputs(_: int) -> list[torch.Tensor]:
        return [ensemble(x) for _ in range(10)]

    (expected, *_) = outputs(0)
    with ThreadPoolExecutor(3) as pool:
        for y in itertools.chain(*pool.map(outputs, range(3))):
            torch.testing.assert_close(y, expected)
    assert [layer.scale for layer in cc_layers(model).values()] == own


def test_a_sequence_that_does_not_fit_is_refused_with_the_shapes() -> None:
    model = ccnet()
    lost = {"layers.1.conv": 0.02, "layers.6.conv": CC_SCALE**2 / 0.02}
    with pytest.raises(ValueError, match=r"sequences\[0\]: its sizes do not fit") as error:
        tcc.scale_ensemble(model, [lost])(torch.randn(1, 3, 32, 32))
    assert "layers.1.conv: 32×32 -> 1×1\n  layers.2.conv: 1×1 -> 1×1" in str(error.value)
    model.reset_classifier(5, "avg")  # any size fits the rest of this network
    with pytest.raises(ValueError, match="the last CC layer's output has .* pixels, expected 8×8"):
        tcc.scale_ensemble(model, [lost])(torch.randn(1, 3, 32, 32))


def test_two_paths_of_a_block_that_come_apart_are_refused_with_the_shapes() -> None:
    model = small()
    names = list(cc_layers(model))
    scales = {names[1]: 1.0, names[2]: 0.25}
    with pytest.raises(ValueError, match=rf"its sizes do not fit (.|\n)*{names[1]}: "):
        tcc.scale_ensemble(model, [scales])(torch.randn(1, 3, 64, 64))


def test_an_ensemble_is_for_inference() -> None:
    with pytest.raises(ValueError, match="model: it is in training mode"):
        tcc.scale_ensemble(ccnet().train(), [{}])(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("call", [lambda m: tcc.scale_ensemble(m, [{}]), continuous_kernel_figure])
def test_a_model_without_cc_layers_is_named(call) -> None:
    with pytest.raises(ValueError, match="this ResNet holds no ContinuousConv2d"):
        call(timm.create_model("test_resnet"))


def test_a_scale_set_later_is_reported_as_built_and_named_when_it_is_lost(tmp_path: Path) -> None:
    model = small()
    before = tcc.report(model).multiply_adds_after
    (name, layer), *_ = cc_layers(model).items()
    layer.scale = 0.7
    assert tcc.report(model).multiply_adds_after == before
    with pytest.warns(UserWarning, match=f"saved without what was set on layers later.* {name} .scale=7/10, built"):
        tcc.save_pretrained(model, tmp_path / "saved")
    for undo in (tcc.merge, tcc.unpatch):
        with pytest.raises(ValueError, match=f"^{name}: scale=7/10: expected 1/"):
            undo(model)
    assert cc_layers(model)[name] is layer


# Pictures


def test_figure_samples_the_continuous_kernel() -> None:
    layer = ContinuousConv2d(2, 3, 4, 2)
    axes = continuous_kernel_figure(nn.Sequential(layer), channels=2, samples=40).axes
    assert len(axes) == 2
    picture = torch.from_numpy(axes[0].images[0].get_array().data)
    columns, rows = axes[0].lines[0].get_data()
    assert len(columns) == 4
    nearest = torch.tensor(rows[:1]).round().long(), torch.tensor(columns[:1]).round().long()
    assert picture.shape == (40, 40)
    weight = layer.weight.detach()[0, 0]
    assert abs(float(picture[nearest].flatten()[0]) - float(weight[0, 0])) < 0.1 * float(weight.abs().max())


def test_kernel_figure_of_a_model_with_cc_layers(tmp_path: Path) -> None:
    assert save_kernel_figure(small(), tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
