"""A network that has really learned something keeps it through a patch, a merge, saving and loading."""

import copy
import time

import pytest
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import DclsConv2d

from ..helpers import relative, slow_but
from ..models_for_tests import layers_of, output
from ..pretrained import crops, lite0

SIZE = 128


def kept(model: nn.Module, original: nn.Module) -> float:
    """The part of the crops with the original's top-1."""
    images = crops(SIZE)
    return (output(model, images).argmax(1) == output(original, images).argmax(1)).double().mean().item()


@pytest.mark.parametrize(
    ("recipe", "settings"),
    slow_but(
        [
            *((recipe, {}) for recipe in ("dcls", "smp", "flex", "genv", "cc")),
            ("dcls_gauss", {"kernel_size": 23}),
            ("dcls_gauss", {"kernel_size": 7}),
            ("dcls_triangle", {"kernel_size": 15}),
            ("smp", {"kernel_size": 7, "points": "filter"}),
            ("cc", {"kernel_size": 7}),
        ],
        ("dcls", {}),
    ),
)
def test_a_patch_keeps_what_a_pretrained_network_says(recipe, settings, tmp_path, recwarn):
    original = lite0()
    model = lite0()
    start = time.perf_counter()
    tcc.patch(model, recipe, **settings)
    assert time.perf_counter() - start < 20
    assert not [warning for warning in recwarn if "init='fit'" in str(warning.message)]
    assert kept(model, original) >= 0.97
    merged = tcc.merge(model)
    sizes = {name: module.kernel_size for name, module in original.named_modules() if isinstance(module, nn.Conv2d)}
    if recipe in ("smp", "flex"):
        assert {name: merged.get_submodule(name).kernel_size for name in sizes} == sizes
    images = crops(SIZE)[:8]
    assert relative(output(merged, images), output(model, images)) < 1e-4
    tcc.save_pretrained(model, tmp_path / "saved")
    assert torch.equal(output(tcc.from_pretrained(tmp_path / "saved").eval(), images), output(model, images))


def test_a_fixed_count_that_is_too_small_is_told_once_with_the_way_out():
    model = lite0()
    with pytest.warns(UserWarning, match="fit_tolerance=0.01") as caught:
        tcc.patch(model, "dcls", kernel_count=4, select="blocks.[01].*dw")
    assert len(caught) == 1
    message = str(caught[0].message)
    worst = max((row.fit_error, row.name) for row in tcc.report(model).rows if row.fit_error is not None)
    assert worst[1] in message
    assert "Leave kernel_count out" in message
    assert "tcc.refit_" in message


def depthwise(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(4, 4, size, padding=size // 2, groups=4) for size in sizes))


def counts(model: nn.Module) -> list[int]:
    return [layer.kernel.kernel_count for layer in layers_of(model) if isinstance(layer, DclsConv2d)]


@pytest.mark.parametrize("recipe", ["dcls", "dcls_triangle", "dcls_gauss"])
def test_a_group_takes_as_many_elements_as_its_kernels_need(recipe):
    model = depthwise(3, 3, 5)
    with torch.no_grad():
        model[2].weight.zero_()[..., 1:3, 1:3] = torch.rand(4, 1, 2, 2) + 0.1
    x = torch.randn(2, 4, 9, 9)
    expected = output(model, x)
    tcc.patch(model, recipe, kernel_size=11)
    assert counts(model) == [9, 9, 4]
    assert relative(output(model, x), expected) < 0.02
    assert max(row.fit_error for row in tcc.report(model).rows if row.fit_error is not None) < 0.01
    assert "4 to 9 elements per kernel" in str(tcc.report(model))


def test_layers_share_only_where_old_kernels_had_one_size():
    model = tcc.patch(depthwise(3, 5, 3), "dcls", kernel_size=9)
    positions = [layer.geometry["position"] for layer in layers_of(model)]
    assert positions[0] is positions[2]
    assert positions[0] is not positions[1]


def test_sharing_and_counts_are_arguments():
    model = tcc.patch(depthwise(3, 3, 5), "dcls", share=None, by_name={"2": {"kernel_count": 30}}, kernel_size=9)
    assert counts(model) == [9, 9, 30]
    assert len({id(layer.geometry["position"]) for layer in layers_of(model)}) == 3
    with pytest.raises(ValueError, match=r"by_name\['2'\].*kernel_count=0: expected at least 1"):
        tcc.patch(depthwise(3), "dcls", by_name={"2": {"kernel_count": 0}})
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="fit_tolerance="):
            tcc.patch(depthwise(3), "dcls", fit_tolerance=wrong)


def test_without_a_tolerance_the_number_is_the_papers():
    model = lite0()
    ruled = copy.deepcopy(model)
    tcc.patch(ruled, "dcls", init="random")
    tcc.patch(model, "dcls", fit_tolerance=None, select=["depthwise", "!blocks.[1-6].*"])
    report = tcc.report(ruled)
    assert report.parameters_after <= report.parameters_before
    assert counts(model) == [9 // 3]  # a weight and two positions for each element of its only layer


def rms(value: torch.Tensor) -> torch.Tensor:
    return value.detach().square().mean().sqrt()


def gradients(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Root mean squares of the gradients of each geometry parameter, and of the weights of its layer."""
    images = crops(SIZE)[:16]
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(images), torch.arange(16))
    loss.backward()
    found = {}
    for name, layer in model.named_modules():
        if layer in layers_of(model):
            weight = next(p for key, p in layer.named_parameters() if key.endswith("weight") and p.ndim > 2)
            for key, value in layer.geometry.items():
                found[f"{name}.{key}"] = (rms(value.grad), rms(weight.grad))
    return found


@pytest.mark.parametrize("recipe", slow_but(["dcls", "dcls_triangle", "dcls_gauss", "smp", "genv"], "dcls", "genv"))
def test_geometry_can_learn_after_a_fit(recipe):
    select = {"select": "blocks.[01].*dw"} if recipe != "genv" else {}
    model = tcc.patch(lite0(), recipe, **select)
    for name, (geometry, weight) in gradients(model).items():
        assert geometry > (5e-4 if recipe == "dcls_gauss" else 1e-3) * weight, name
