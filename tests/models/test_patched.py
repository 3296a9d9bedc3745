"""Every registered model does what its base does; numbers agree with the papers."""

import copy
import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters

import timm_contconv as tcc
from timm_contconv.hub.names import PATCHED

from ..helpers import relative, slow_but
from ..models_for_tests import awake, create, on_meta, output, scatter

NAMES = sorted(PATCHED)
DCLS_BASES = (
    *("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny", "convnext_small"),
    *("convnext_base", "convnext_large", "convformer_s18", "convformer_s36", "convformer_m36", "convformer_b36"),
    "test_convnext",
)
TESTS = [name for name in NAMES if name.startswith("test_")]
SMALL = [*TESTS, "convformer_s18_dcls_gauss"]


def test_recipes_are_registered_on_the_models_that_they_name():
    for recipe in ("dcls", "dcls_triangle", "dcls_gauss", "smp", "flex"):
        assert {f"{base}_{recipe}" for base in DCLS_BASES} <= set(timm.list_models())
    for base in ("resnet18", "resnet34", "resnet50", "resnet101", "test_resnet"):
        assert {f"{base}_genv", f"{base}_cc"} <= set(timm.list_models())


# Khalfaoui-Hassani et al. 2023, Table 1; the plain models have 28,589,128 and 26,774,448 parameters.
@pytest.mark.parametrize(
    ("name", "patch_args", "parameters"),
    [
        ("convnext_tiny_dcls", {}, 28_587_688),
        ("convnext_small_dcls", {}, 50_217_064),
        ("convnext_base_dcls", {}, 88_582_632),
        ("convformer_s18_dcls_gauss", {}, 26_757_808),
        ("convformer_s18_dcls_triangle", {}, 26_757_808),
        ("convnext_tiny_dcls_triangle", {}, 28.59e6),
        ("convnext_tiny_dcls_gauss", {}, 28.59e6),
        ("convnext_tiny_dcls_gauss", {"kernel_size": 17}, 28.59e6),
        ("convnext_tiny_dcls_gauss", {"kernel_size": 17, "kernel_count": 26}, 28_586_536),
        ("convnext_tiny_dcls_gauss", {"kernel_count": 34}, 28_685_608),
        ("convformer_s18_dcls", {}, 26.76e6),
    ],
)
def test_parameter_counts_are_those_of_the_paper(name, patch_args, parameters):
    count = sum(p.numel() for p in on_meta(name, patch_args=patch_args).parameters())
    assert (count if isinstance(parameters, int) else round(count, -4)) == parameters


@pytest.mark.parametrize(
    ("name", "count"),
    slow_but(
        [("convnext_tiny_dcls", 34), ("convnext_tiny_dcls_gauss", 26), ("convnext_base_dcls", 40)],
        ("convnext_tiny_dcls", 34),
    ),
)
def test_the_parameter_rule_gives_the_kernel_counts_of_the_paper(name, count):
    report = tcc.report(on_meta(name))
    assert report.patch["layer"]["kernel_count"] == count
    assert report.parameters_after <= report.parameters_before


# in 1e9 multiply-adds at 224 x 224
@pytest.mark.parametrize(
    ("name", "before", "after"),
    slow_but(
        [("convnext_tiny_dcls", 4.5, 5.0), ("convnext_small_dcls", 8.7, 9.5), ("convnext_base_dcls", 15.4, 16.5)],
        ("convnext_tiny_dcls", 4.5, 5.0),
    ),
)
def test_multiply_adds_are_those_of_the_release(name, before, after):
    report = tcc.report(on_meta(name))
    assert round(report.multiply_adds_before / 1e9, 1) == before
    assert round(report.multiply_adds_after / 1e9, 1) == after


@pytest.mark.parametrize("name", SMALL)
def test_merged_model_gives_the_same_logits(name):
    model = scatter(create(name, num_classes=16))
    x = torch.randn(1, 3, 64, 64)
    expected = output(model, x)
    assert expected.isfinite().all()
    assert relative(output(tcc.merge(model, inplace=True), x), expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_configuration_of_its_base(name):
    base, config = get_pretrained_cfg(PATCHED[name].base), get_pretrained_cfg(name)
    assert config.architecture == name
    assert config.num_classes == 1000
    for field in ("classifier", "first_conv", "interpolation"):
        assert getattr(config, field) == getattr(base, field)
    assert len(config.input_size) == len(config.mean) == len(config.std) == 3
    assert 0 < config.crop_pct <= 1
    assert config.pool_size is not None


@pytest.mark.parametrize(
    "name", slow_but([*TESTS, "convnext_atto_dcls", "convformer_s18_dcls", "resnet18_genv", "resnet50_cc"], *TESTS)
)
def test_a_model_has_the_features_of_its_base(name):
    model = on_meta(name, features_only=True)
    plain = on_meta(PATCHED[name].base, features_only=True)
    for part in ("channels", "reduction", "module_name"):
        assert getattr(model.feature_info, part)() == getattr(plain.feature_info, part)()
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert [f.shape for f in model(x)] == [f.shape for f in plain(x)]


@pytest.mark.parametrize("name", SMALL)
def test_parts_that_the_configuration_names_are_there(name):
    model, config = on_meta(name), get_pretrained_cfg(name)
    assert f"{config.classifier}.weight" in model.state_dict()
    assert model.get_submodule(config.first_conv).in_channels == config.input_size[0]
    assert f"{model.pretrained_cfg['first_conv']}.weight" in model.state_dict()


@pytest.mark.parametrize("name", SMALL)
def test_feature_extractor_holds_every_parameter_it_uses(name):
    model = awake(timm.create_model(name, features_only=True, out_indices=(1, 2)))
    sum(f.sum() for f in model(torch.randn(1, 3, 64, 64))).backward()
    held = {n: p for n, p in model.named_parameters() if "geometry" in n}
    assert {tuple(p.shape) for p in held.values()} <= {tuple(p.shape) for p in timm.create_model(name).parameters()}
    assert all(p.grad is not None for p in held.values())


@pytest.mark.parametrize("name", SMALL)
def test_options_of_the_base_work(name):
    model = create(name, num_classes=7, in_chans=1, drop_path_rate=0.1, global_pool="max")
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, 7)
    _, intermediates = model.forward_intermediates(x)
    assert len(intermediates) == len(model.feature_info)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(x).ndim == 4


@pytest.mark.parametrize("name", TESTS)  # MetaFormer has no matcher
def test_group_matcher_covers_the_model(name):
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=False))
    grouped = [n for names in groups.values() for n in names]
    assert sorted(grouped) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_whole_model_compiles_without_a_graph_break(training):
    model = create("test_convnext_dcls_gauss", num_classes=4, depths=(1, 1, 1, 1)).train(training)
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert relative(compiled(x).detach(), model(x).detach()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("base", [base for base in DCLS_BASES if base != "test_convnext"])
@pytest.mark.parametrize("training", [True, False])
def test_every_dcls_model_is_one_graph(base, training):
    """Traced without data; outputs are compared on the smallest model above."""
    torch._dynamo.reset()  # results are filed under a function's code, eight at most in a process
    model = on_meta(f"{base}_dcls_gauss", num_classes=4).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 4)


def test_patch_args_change_the_recipe_and_are_recorded():
    model = timm.create_model("test_convnext_dcls", patch_args={"kernel_size": 9, "kernel_count": 5})
    assert model.stages[0].blocks[0].conv_dw.kernel_size == (9, 9)
    layer = tcc.report(model).patch["layer"]
    assert (layer["kernel_size"], layer["kernel_count"]) == (9, 5)
    with pytest.raises(ValueError, match="layer.kernel_count=0"):
        timm.create_model("test_convnext_dcls", patch_args={"kernel_count": 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "base=None"),
        ({"base": "test_convnext"}, "patch=None"),
        ({"base": "no_such_model", "patch": {}}, "base='no_such_model': expected the name of a timm architecture"),
        ({"base": "contconv", "patch": {}}, "base='contconv': expected the name of a timm architecture"),
        ({"base": "test_convnext", "patch": {"select": ["all"], "layer": {"method": "x"}}}, "expected one of"),
        (
            {"base": "test_convnext", "base_args": {"pretrained": True}, "patch": {}},
            "not an argument of an architecture",
        ),
        ({"base": "test_convnext", "base_args": {"dims": [10**9]}, "patch": {}}, "expected at most"),
        ({"base": "test_convnext", "base_args": {"act_layer": {"a": 1}}, "patch": {}}, "expected a number"),
    ],
)
def test_a_wrong_configuration_of_a_hand_patched_model_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("contconv", **arguments)


def test_names_that_timm_ships_are_not_overwritten():
    assert timm.model_entrypoint("convnext_tiny").__module__ == "timm.models.convnext"
    assert not [name for name in NAMES if not timm.model_entrypoint(name).__module__.startswith("timm_contconv")]
