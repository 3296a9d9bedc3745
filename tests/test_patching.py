"""Patching, merging, unpatching and reporting on real models."""

import copy
import re
import threading

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import timm_contconv as tcc
from timm_contconv.layers import DclsConv2d, SmpConv2d

IMAGE = (2, 3, 64, 64)


def convnext(**options) -> nn.Module:
    return timm.create_model("test_convnext", num_classes=10, **options)


def snapshot(model):
    """Everything that a failed patch must leave as it was."""
    modules = dict(model.named_modules())
    tensors = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    attributes = {name: set(module.__dict__) for name, module in modules.items()}
    return modules, tensors, attributes, [m.training for m in modules.values()]


def assert_unchanged(model, before):
    modules, tensors, attributes, training = before
    now = dict(model.named_modules())
    assert list(now) == list(modules)
    assert all(now[name] is modules[name] for name in modules)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert attributes == {name: set(module.__dict__) for name, module in now.items()}
    assert training == [m.training for m in now.values()]


def test_patch_replaces_what_the_recipe_selects_in_place():
    model = convnext()
    assert tcc.patch(model, "dcls") is model
    replaced = [name for name, module in model.named_modules() if isinstance(module, DclsConv2d)]
    assert len(replaced) == 9
    assert all(name.endswith("conv_dw") for name in replaced)
    assert model(torch.randn(IMAGE)).shape == (2, 10)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("depthwise", 9),
        ("stages.2.*.conv_dw", 4),
        (["stages.1.*dw", "stages.3.*dw"], 4),
        ("!stages.2.*", 5),
        (["depthwise", "!stages.2.*"], 5),
        (lambda name, conv: conv.out_channels == 64 and conv.groups > 1, 2),
        (["stages.0.*dw", lambda name, conv: name == "stages.1.blocks.0.conv_dw"], 2),
    ],
)
def test_selection(select, expected):
    model = tcc.patch(convnext(), "dcls", select=select, kernel_count=3)
    assert sum(isinstance(module, DclsConv2d) for module in model.modules()) == expected


def test_strided_and_all_are_presets():
    model = timm.create_model("test_resnet", num_classes=10)
    strided = sum(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in model.modules())
    every = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    for select, expected in (("strided", strided), ("all", every)):
        patched = tcc.patch(copy.deepcopy(model), "dcls", select=select, kernel_size=5, kernel_count=2)
        assert sum(isinstance(m, DclsConv2d) for m in patched.modules()) == expected


class Mixed(nn.Module):
    """A stranger's module with things that can and can't be replaced, and one convolution used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.again = self.first
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1, groups=4))
        self.last = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, groups=4)])

    def forward(self, x):
        return self.last[0](self.normed(self.dilated(self.up(self.again(self.first(x))))))


def test_what_can_not_be_replaced_is_left_alone_and_named():
    model = tcc.patch(Mixed(), "dcls", select="all", kernel_size=5, kernel_count=2)
    assert isinstance(model.first, DclsConv2d)
    assert model.again is model.first
    assert isinstance(model.last[0], DclsConv2d)
    left = tcc.report(model).left_alone
    assert set(left) == {"up", "dilated", "normed"}
    assert "transposed" in left["up"]
    assert "dilation" in left["dilated"]
    assert model(torch.randn(1, 4, 8, 8)).shape == (1, 4, 8, 8)


class Tangled(nn.Module):
    """Convolutions that share a weight, one that a plain list holds too, and one that nothing else knows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.listed, self.free = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(4))
        self.b.weight = self.a.weight
        self.order = [self.listed]

    def forward(self, x):
        return self.free(self.order[0](self.b(self.a(x))))


def test_a_convolution_that_something_else_depends_on_is_left_alone_and_named():
    model = tcc.patch(Tangled(), "dcls", kernel_size=5, kernel_count=2)
    left = tcc.report(model).left_alone
    assert left["a"] == "its weight is shared with 'b'"
    assert left["b"] == "its weight is shared with 'a'"
    assert left["listed"].startswith("'order' holds it too")
    assert model.b.weight is model.a.weight
    assert isinstance(model.free, DclsConv2d)


def test_a_lazy_convolution_is_to_be_run_first():
    with pytest.raises(ValueError, match="no shape yet: run the model once"):
        tcc.patch(nn.Sequential(nn.LazyConv2d(4, 3)), "dcls", select="all")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.compile(model, backend="eager"), "a compiled Mixed: patch the model, then compile it"),
        (lambda model: torch.jit.trace(model, torch.randn(1, 4, 8, 8)), "a ScriptModule runs TorchScript"),
    ],
)
def test_a_compiled_model_is_refused(wrap, message):
    with pytest.raises(ValueError, match=message):
        tcc.patch(wrap(Mixed()), "dcls", kernel_size=5, kernel_count=2)


def test_the_stages_of_a_feature_extractor_are_those_of_its_model():
    def sizes(**options) -> list[tuple[int, ...]]:
        model = tcc.patch(convnext(**options), "smp", init="random")
        return [m.kernel_size for m in model.modules() if isinstance(m, SmpConv2d)]

    assert len(set(sizes())) == 4
    assert sizes(features_only=True) == sizes()


def test_settings_by_stage_are_those_of_the_stage():
    model = timm.create_model("test_resnet")
    tcc.patch(model, "smp", select="layer*.conv2", init="random")
    found = {name.split(".")[0]: m.kernel_size[0] for name, m in model.named_modules() if isinstance(m, SmpConv2d)}
    assert found == {"layer1": 29, "layer2": 27, "layer3": 13, "layer4": 13}  # the stem is the first stage


class Watch:
    """A user's hook that holds its model, can't be copied and wants values."""

    def __init__(self, model):
        self.model, self.lock, self.seen = model, threading.Lock(), []

    def look(self, module, args, output):
        self.seen.append(output.mean().item())


def test_hooks_are_neither_recorded_nor_run_by_a_report():
    model = convnext()
    watch = Watch(model)
    for module in (model.stem, model.stages[0].blocks[0].conv_dw):
        module.register_forward_hook(watch.look)
    tcc.patch(model, "dcls_gauss")
    assert tcc.report(model, input_size=(3, 64, 64)).multiply_adds_before is not None
    assert watch.seen == []
    model(torch.randn(IMAGE))
    assert len(watch.seen) == 2


def test_a_report_runs_the_hooks_that_compute_weights():
    model = convnext()
    model.head.fc = nn.utils.spectral_norm(model.head.fc)
    assert tcc.report(tcc.patch(model, "dcls"), input_size=(3, 64, 64)).multiply_adds_after is not None


@pytest.mark.parametrize(
    ("frozen", "outcome"),
    [("stages.1.blocks.0", "is frozen for all of them"), ("stages.1.blocks.1", "trains, and changes the frozen")],
)
def test_frozen_layers_that_share_with_others_are_named(frozen, outcome):
    model = convnext()
    model.get_submodule(frozen).requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"^{frozen}.conv_dw: frozen, but .* {outcome}"):
        tcc.patch(model, "dcls_gauss")


def test_device_dtype_mode_frozen_parameters_and_hooks_carry_over():
    model = convnext().double().eval()
    conv = model.stages[0].blocks[0].conv_dw
    conv.weight.requires_grad_(False)
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    tcc.patch(model, "dcls_gauss")
    layer = model.stages[0].blocks[0].conv_dw
    assert layer.element_weight.dtype == torch.float64
    assert not layer.training
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    assert layer.bias.requires_grad
    model(torch.randn(IMAGE, dtype=torch.float64))
    assert calls == [1]
    handle.remove()
    model(torch.randn(IMAGE, dtype=torch.float64))
    assert calls == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": "dcls_gaus"}, "did you mean dcls_gauss"),
        ({"patch": "dcls", "kernel_size": 0}, "layer.kernel_size=0: expected an int from 1 to 255"),
        ({"patch": "dcls", "kernel_size": 100_000}, "layer.kernel_size=100000: expected an int from 1 to 255"),
        ({"patch": "dcls", "kernel_count": 0}, "layer.kernel_count=0"),
        ({"patch": "dcls", "kernel_count": -3}, "layer.kernel_count=-3"),
        ({"patch": "dcls", "kernels": 3}, "layer.kernels is not a field of this layer"),
        ({"patch": "dcls", "select": "head.*"}, "matches no convolution. There are: 'depthwise' (9)"),
        ({"patch": "dcls", "select": []}, "select=() matches no convolution. There are: 'depthwise' (9)"),
        ({"patch": "dcls", "select": "stem.0"}, "can replace none of the selected convolutions"),
        ({"patch": "dcls", "init": "pretrained"}, "init='pretrained': expected 'fit'"),
        ({"patch": "dcls", "compile": 3}, "compile=3: expected 'auto'"),
        ({"patch": {"select": ["all"]}}, "patch: layer is missing"),
        ({"patch": {"select": ["all"], "layer": {"method": "magic"}}}, "expected one of dcls"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(arguments, message):
    model = convnext()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        tcc.patch(model, **arguments)
    assert_unchanged(model, before)


def test_a_name_instead_of_a_model_is_refused():
    with pytest.raises(TypeError, match="model='convnext_tiny': expected a module"):
        tcc.patch("convnext_tiny", "dcls")


def test_a_selector_of_another_type_is_refused():
    with pytest.raises(TypeError, match="select=3: expected a string or a predicate"):
        tcc.patch(convnext(), "dcls", select=[3])


def test_a_patched_model_is_not_patched_again():
    model = tcc.patch(convnext(), "dcls")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already patched with 'dcls'; tcc.unpatch\(model\)"):
        tcc.patch(model, "dcls_gauss")
    assert_unchanged(model, before)


def test_a_failure_half_way_leaves_the_model_alone(monkeypatch):
    model = convnext()
    before = snapshot(model)
    built = []

    def fail(cls, conv, spec, original=DclsConv2d.in_place_of.__func__):
        if len(built) == 5:
            raise MemoryError("no room for the sixth")
        built.append(conv)
        return original(cls, conv, spec)

    monkeypatch.setattr(DclsConv2d, "in_place_of", classmethod(fail))
    with pytest.raises(MemoryError):
        tcc.patch(model, "dcls")
    assert_unchanged(model, before)


def test_a_failure_during_the_swap_leaves_the_model_alone():
    class Stubborn(nn.Sequential):
        def __setattr__(self, name, value):
            if isinstance(value, DclsConv2d):
                raise RuntimeError("not here")
            super().__setattr__(name, value)

    def conv() -> nn.Conv2d:
        return nn.Conv2d(4, 4, 3, padding=1, groups=4)

    model = nn.Sequential(conv(), Stubborn(conv()), conv())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="not here"):
        tcc.patch(model, "dcls", kernel_count=2)
    assert_unchanged(model, before)


def positions(model):
    return [m.position for m in model.modules() if isinstance(m, DclsConv2d)]


def assert_shared(model):
    """Stages 0 to 3 of test_convnext have 1, 2, 4 and 2 blocks."""
    found = [id(p) for p in positions(model)]
    assert len(found) == 9
    assert len(set(found)) == 4
    assert len(set(found[1:3])) == len(set(found[3:7])) == len(set(found[7:])) == 1


def test_a_stage_shares_positions_through_copies_conversion_loading_and_a_step(tmp_path):
    model = tcc.patch(convnext(), "dcls_gauss")
    assert_shared(model)
    copied = copy.deepcopy(model)
    assert_shared(copied)
    assert positions(copied)[0] is not positions(model)[0]
    assert_shared(copied.to(torch.float64).to(torch.float32))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    copied.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_shared(copied)
    assert torch.equal(positions(copied)[3], positions(model)[3])
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    before = positions(copied)[3].detach().clone()
    copied(torch.randn(IMAGE)).sum().backward()
    optimizer.step()
    assert_shared(copied)
    assert not torch.equal(positions(copied)[3], before)


def test_the_gradient_of_shared_positions_is_the_sum_over_layers():
    model = tcc.patch(convnext(), "dcls_gauss")
    layers = [m for m in model.stages[2].modules() if isinstance(m, DclsConv2d)]
    upstream = [torch.randn_like(layer.construct()) for layer in layers]
    torch.autograd.backward([layer.construct() for layer in layers], upstream)
    total = torch.zeros_like(layers[0].position)
    for layer, gradient in zip(layers, upstream, strict=True):
        position = layer.position.detach().requires_grad_()
        kernel = layer.kernel_function()(weight=layer.element_weight, position=position, sigma=layer.sigma)
        total += torch.autograd.grad(kernel, position, gradient)[0]
    torch.testing.assert_close(layers[0].position.grad, total, atol=1e-5, rtol=1e-4)


def test_a_flat_sequential_shares_through_its_first_layer():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(3)))
    tcc.patch(model, "dcls", kernel_count=2)
    assert len({id(p) for p in positions(model)}) == 1
    assert model(torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)
    assert sum("position" in key for key in model.state_dict()) == 1


@pytest.mark.parametrize("recipe", ["dcls", "dcls_triangle", "dcls_gauss"])
def test_merge_gives_the_same_output_and_leaves_the_model_alone(recipe):
    model = tcc.patch(convnext(), recipe).eval()
    x = torch.randn(IMAGE)
    merged = tcc.merge(model)
    assert not any(isinstance(m, DclsConv2d) for m in merged.modules())
    assert any(isinstance(m, DclsConv2d) for m in model.modules())
    torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=1e-4)
    assert tcc.merge(model, inplace=True) is model
    assert not any("geometry" in key for key in model.state_dict())


def test_merge_of_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="holds no layer of timm_contconv"):
        tcc.merge(convnext())


def test_unpatch_restores_the_architecture_where_kernels_fit():
    model = tcc.patch(convnext(), "dcls", kernel_size=11).eval()
    with torch.no_grad():
        for position in positions(model):
            position.clamp_(-2.5, 2.5)
    x = torch.randn(IMAGE)
    expected = model(x)
    assert tcc.unpatch(model) is model
    plain = convnext().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-4)
    tcc.patch(model, "dcls_gauss")  # and it can be patched again


def test_unpatch_names_kernels_that_are_too_large():
    model = tcc.patch(convnext(), "dcls", init="random", kernel_size=11)
    with torch.no_grad():
        positions(model)[0].fill_(5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"beyond the original size: stages.0.blocks.0.conv_dw") as caught:
        tcc.unpatch(model)
    assert "stages.1.blocks.0" not in str(caught.value)
    assert_unchanged(model, before)


def test_a_model_whose_layers_are_gone_can_be_merged_but_not_unpatched():
    model = timm.create_model("test_convnext_dcls")
    model.prune_intermediate_layers([0])
    before = snapshot(model)
    for verb in (tcc.unpatch, tcc.report):
        with pytest.raises(ValueError, match=r"changed since it was patched: .*stages.3.blocks.1.conv_dw is there no"):
            verb(model)
    assert_unchanged(model, before)
    tcc.merge(model, inplace=True)
    assert not any(isinstance(m, DclsConv2d) for m in model.modules())
    assert not any("geometry" in key for key in model.state_dict())


def test_a_model_with_a_layer_exchanged_by_hand_is_not_unpatched():
    model = tcc.patch(convnext(), "dcls")
    model.stages[0].blocks[0].conv_dw = nn.Identity()
    with pytest.raises(ValueError, match="stages.0.blocks.0.conv_dw is there no more"):
        tcc.unpatch(model)


def test_report_counts_parameters_and_multiply_adds():
    model = tcc.patch(convnext(), "dcls_gauss")
    report = tcc.report(model, input_size=(3, 64, 64))
    plain = convnext()
    assert report.parameters_before == sum(p.numel() for p in plain.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    row = report.rows[0]
    assert row.name == "stages.0.blocks.0.conv_dw"
    assert row.multiply_adds_before == 16 * 16 * 24 * 7 * 7
    assert row.multiply_adds_after == 16 * 16 * 24 * 23 * 23
    assert "DclsConv2d 23×23" in str(report)
    assert report.to_dict()["rows"][0]["name"] == row.name
    with pytest.raises(ValueError, match="is not patched"):
        tcc.report(plain)


@pytest.mark.parametrize("name", tcc.list_patches())
def test_recipes_survive_toml_and_dict(name, tmp_path):
    spec = tcc.load_patch(name)
    path = tmp_path / "recipe.toml"
    path.write_text(spec.to_toml())
    assert tcc.load_patch(path) == spec
    assert tcc.PatchSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('select = ["all"]\n\n[layer]\nmethod = "dcls"\ninterpolation = "gauss"\nkernelsize = 3\n', "recipe.toml:6: "),
        ('select = ["all"]\n\n[layer]\nmethod = "dcls"\ninterpolation = "gauss"\n', "layer.kernel_size is missing"),
        ('select = ["all"]\nselct = 3\n[layer]\nmethod = "dcls"\n', "recipe.toml:2: selct is not a field"),
        ('select = ["all"\n', "recipe.toml: not a TOML file"),
    ],
)
def test_a_wrong_recipe_file_is_explained_with_its_line(text, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        tcc.load_patch(path)


def test_positions_and_widths_are_exempt_from_timms_weight_decay():
    from timm.optim import param_groups_weight_decay

    model = tcc.patch(convnext(), "dcls_gauss")
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not any(id(p) in decayed for p in positions(model))
    assert any(id(m.element_weight) in decayed for m in model.modules() if isinstance(m, DclsConv2d))
