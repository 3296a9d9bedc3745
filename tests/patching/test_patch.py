"""tcc.patch on real models: what it replaces, what carries over, warm starts, sharing, refusals."""

import copy
import re
import time

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import DclsConv2d

from ..helpers import relative, slow_but
from ..models_for_tests import Snapshot, awake, create, geometry_of, layers_of, output

IMAGES = (2, 3, 64, 64)


def convnext(**options) -> nn.Module:
    return timm.create_model("test_convnext", num_classes=10, **options)


def quick(model: nn.Module, recipe: str = "dcls") -> nn.Module:
    return tcc.patch(model, recipe, init="random", kernel_count=3)


def test_patch_replaces_what_the_recipe_selects_in_place():
    model = convnext()
    assert quick(model) is model
    replaced = [name for name, module in model.named_modules() if isinstance(module, DclsConv2d)]
    assert len(replaced) == 9
    assert all(name.endswith("conv_dw") for name in replaced)
    assert model(torch.randn(IMAGES)).shape == (2, 10)


def test_device_dtype_mode_frozen_parameters_and_hooks_carry_over():
    model = convnext().double().eval()
    conv = model.stages[0].blocks[0].conv_dw
    conv.weight.requires_grad_(False)
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    layer = quick(model, "dcls_gauss").stages[0].blocks[0].conv_dw
    assert layer.weight.dtype == torch.float64
    assert not layer.training
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    for _ in range(2):
        model(torch.randn(IMAGES, dtype=torch.float64))
        assert calls == [1]
        handle.remove()


@pytest.mark.parametrize(
    ("frozen", "outcome"),
    [("stages.1.blocks.0", "is frozen for all of them"), ("stages.1.blocks.1", "trains, and changes the frozen")],
)
def test_frozen_layers_that_share_with_others_are_named(frozen, outcome):
    model = convnext()
    model.get_submodule(frozen).requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"^{frozen}.conv_dw: frozen, but .* {outcome}"):
        quick(model)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": "dcls_gaus"}, "did you mean dcls_gauss"),
        ({"kernel_size": 0}, "layer.kernel_size=0: expected an int from 1 to 255"),
        ({"kernel_size": 100_000}, "layer.kernel_size=100000: expected an int from 1 to 255"),
        ({"kernel_count": -3}, "layer.kernel_count=-3: expected at least 1"),
        ({"kernels": 3}, "layer.kernels is not a field of this layer"),
        ({"min_kernel_size": 0}, "min_kernel_size=0: expected at least 1"),
        ({"select": "head.*"}, "matches no convolution. There are: 'depthwise' (9)"),
        ({"select": []}, "select=() matches no convolution. There are: 'depthwise' (9)"),
        ({"select": "stem.0"}, "can replace none of the selected convolutions"),
        ({"select": 3}, "select=3: expected 'depthwise', 'strided', 'transposed', 'all', globs"),
        ({"select": [3]}, "select=3: expected a string or a predicate"),
        ({"init": "pretrained"}, "init='pretrained': expected 'fit'"),
        ({"compile": 3}, "compile=3: expected 'auto'"),
        ({"progress": "x"}, "progress='x': expected True, False, or None"),
        ({"patch": {"select": ["all"]}}, "patch: layer is missing"),
        ({"patch": {"select": ["all"], "layer": {"method": "magic"}}}, "method='magic': expected one of "),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(arguments, message):
    model = convnext()
    before = Snapshot(model)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        tcc.patch(model, **{"patch": "dcls", **arguments})
    assert before.differences() == []


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: "convnext_tiny", "model='convnext_tiny': expected a module"),
        (lambda model: model[0], "model: a lone convolution can't be replaced in place"),
        (compiled_in_place, "a compiled Sequential: patch the model, then compile it"),
        (lambda model: torch.compile(model, backend="eager"), "a compiled Sequential: patch the model, then"),
        (lambda model: torch.jit.trace(model, torch.randn(1, 4, 8, 8)), "a ScriptModule runs TorchScript"),
        (quick, r"already patched with 'dcls'; tcc.unpatch(model)"),
        (lambda model: nn.Sequential(quick(model)), "model: 0.0 is already a DclsConv2d; tcc.merge(model) first"),
    ],
)
def test_what_can_not_be_patched_is_refused_and_left_alone(wrap, message):
    model = wrap(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)))
    before = Snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        quick(model)
    assert before is None or before.differences() == []


def test_a_failure_half_way_leaves_the_model_alone(monkeypatch):
    model, built = convnext(), []
    before = Snapshot(model)

    def fail(cls, conv, spec, original=DclsConv2d.in_place_of.__func__):
        built.append(conv)
        if len(built) == 6:
            raise MemoryError("no room for the sixth")
        return original(cls, conv, spec)

    monkeypatch.setattr(DclsConv2d, "in_place_of", classmethod(fail))
    with pytest.raises(MemoryError):
        tcc.patch(model, "dcls")
    assert before.differences() == []


# Warm starts


@pytest.mark.parametrize(
    ("base", "recipe", "settings"),
    [
        ("test_convnext", "dcls", {"kernel_size": 9, "kernel_count": 49}),
        ("test_convnext", "smp", {"kernel_size": 15}),
        *(
            (base, recipe, {"fit_tolerance": 1e-6})
            for base in ("test_resnet", "tf_efficientnet_b0")
            for recipe in ("genv", "cc")
        ),
    ],
)
def test_an_exact_fit_keeps_the_function_and_unpatch_gives_the_model_back(base, recipe, settings):
    model = create(base)
    x = torch.randn(IMAGES)
    expected, text = output(model, x), str(model)
    tcc.patch(model, recipe, **settings)
    assert relative(output(model, x), expected) < 1e-4
    tcc.unpatch(model)
    assert str(model) == text
    assert relative(output(model, x), expected) < 1e-4


@pytest.mark.parametrize("recipe", slow_but(["dcls", "dcls_gauss", "smp", "flex", "genv", "cc"], "dcls", "cc"))
def test_a_warm_start_is_the_same_whatever_surrounds_it(recipe):
    model = timm.create_model("test_resnet" if recipe in ("genv", "cc") else "test_convnext")
    options = {} if recipe in ("genv", "cc") else {"kernel_size": 9, "select": "stages.1.*dw"}
    options |= {"kernel_count": 10} if recipe.startswith(("dcls", "smp")) else {}
    expected = tcc.patch(copy.deepcopy(model), recipe, **options).state_dict()
    for seed, context in enumerate((lambda: torch.device("meta"), torch.inference_mode, torch.no_grad), start=1):
        other = copy.deepcopy(model)
        torch.manual_seed(seed)
        with context():
            tcc.patch(other, recipe, **options)
        for name, value in other.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("recipe", slow_but(["dcls", "dcls_triangle", "dcls_gauss", "smp"], "dcls_triangle"))
def test_a_gradient_reaches_the_geometry_after_a_fit(recipe):
    model = awake(tcc.patch(convnext(), recipe, kernel_size=9, kernel_count=6, select="stages.[01].*dw"))
    model(torch.randn(IMAGES)).square().sum().backward()
    assert layers_of(model)
    assert all(parameter.grad.any() for layer in layers_of(model) for parameter in layer.geometry.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.to("meta"), "on the meta device and hold no kernels; use init='random'"),
        (lambda model: model.stages[0].blocks[0].conv_dw.weight.data.fill_(torch.nan), "are NaN or infinite"),
    ],
)
def test_a_model_without_values_to_fit_is_refused(spoil, message):
    model = convnext()
    spoil(model)
    with pytest.raises(ValueError, match=message):
        tcc.patch(model, "dcls")
    assert layers_of(model) == []
    tcc.patch(model, "dcls", init="random")


def test_progress_is_shown_where_it_is_asked_for(capsys):
    for progress in (True, False):
        tcc.patch(convnext(), "dcls", select="stages.0.*dw", kernel_count=2, progress=progress)
        assert ("fitting kernels" in capsys.readouterr().err) == progress


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dcls", "dcls_triangle", "dcls_gauss", "smp"])
def test_convnext_tiny_is_fitted_within_a_minute(recipe):
    model = timm.create_model("convnext_tiny")
    start = time.perf_counter()
    tcc.patch(model, recipe)
    assert time.perf_counter() - start < 60


# Sharing


def assert_shared(model):
    """Stages 0 to 3 of test_convnext have 1, 2, 4 and 2 blocks."""
    found = [id(position) for position in geometry_of(model, "position")]
    assert len(found) == 9
    assert len(set(found)) == 4
    assert len(set(found[1:3])) == len(set(found[3:7])) == len(set(found[7:])) == 1


def test_a_stage_shares_positions_through_copies_conversion_loading_and_a_step(tmp_path):
    model = awake(quick(convnext(), "dcls_gauss"))
    assert_shared(model)
    copied = copy.deepcopy(model)
    assert_shared(copied)
    assert geometry_of(copied, "position")[0] is not geometry_of(model, "position")[0]
    assert_shared(copied.to(torch.float64).to(torch.float32))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    copied.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_shared(copied)
    before = geometry_of(model, "position")[3]
    assert torch.equal(geometry_of(copied, "position")[3], before)
    copied(torch.randn(IMAGES)).sum().backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    assert_shared(copied)
    assert not torch.equal(geometry_of(copied, "position")[3], before)


def test_the_gradient_of_shared_positions_is_the_sum_over_layers():
    model = quick(convnext(), "dcls_gauss")
    layers = layers_of(model.stages[2])
    upstream = [torch.randn_like(layer.weight) for layer in layers]
    torch.autograd.backward([layer.weight for layer in layers], upstream)
    total = 0
    for layer, gradient in zip(layers, upstream, strict=True):
        inputs = {name: value.detach().clone().requires_grad_() for name, value in layer.kernel.inputs().items()}
        total += torch.autograd.grad(layer.kernel.function()(**inputs), inputs["position"], gradient)[0]
    torch.testing.assert_close(layers[0].geometry["position"].grad, total, atol=1e-5, rtol=1e-4)


def test_a_flat_sequential_shares_through_its_first_layer():
    model = quick(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(3))))
    assert len(set(map(id, geometry_of(model, "position")))) == 1
    assert model(torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)
    assert [key for key in model.state_dict() if "position" in key] == ["0.dcls_geometry.position"]


def test_positions_and_widths_are_exempt_from_timms_weight_decay():
    model = quick(convnext(), "dcls_gauss")
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for layer in layers_of(model):
        assert not {id(parameter) for parameter in layer.geometry.values()} & decayed
        assert id(layer.kernel.weight) in decayed
