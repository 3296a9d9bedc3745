"""Compiled kernel construction: one compilation per method and kernel size."""

import copy

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import timm_contconv  # noqa: F401 - registers the models
from timm_contconv.layers import DclsConv2d


def make(channels: int, size: int = 7, count: int = 5, interpolation: str = "gauss") -> DclsConv2d:
    return DclsConv2d(
        channels, channels, size, groups=channels, kernel_count=count, interpolation=interpolation, compile=True
    )


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle", "gauss"])
def test_compiled_construction_equals_eager(interpolation):
    layer = make(24, interpolation=interpolation)
    eager = copy.deepcopy(layer)
    eager.compile_mode = False
    torch.testing.assert_close(layer.construct(), eager.construct(), atol=1e-6, rtol=1e-5)
    layer.construct().square().sum().backward()
    eager.construct().square().sum().backward()
    for (name, a), (_, b) in zip(layer.named_parameters(), eager.named_parameters(), strict=True):
        if name != "bias":
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_one_compilation_serves_all_widths_counts_and_modes():
    make(24).construct().sum().backward()
    before = compilations()
    for channels in (48, 96, 768):
        make(channels).construct().sum().backward()
    make(48, count=9).construct()
    layer = make(48)
    layer.construct().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.construct()
    layer.eval()
    with torch.no_grad():
        layer.construct()
    with torch.inference_mode():
        layer.construct()
    layer.requires_grad_(False).construct()
    assert compilations() == before


def test_every_kernel_size_compiles_however_many_there_are():
    before, limit = compilations(), 3
    sizes = range(9, 9 + 2 * (limit + 2), 2)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for size in sizes:
            make(24, size, interpolation="bilinear").construct()
    assert compilations() == before + len(sizes)


def test_compiled_construction_without_gradients_has_none():
    layer = make(24)
    with torch.no_grad():
        assert not layer.construct().requires_grad
    assert layer.construct().requires_grad
    assert not layer.requires_grad_(False).construct().requires_grad


def test_a_compiled_model_computes_the_factors_of_a_stage_once():
    """9 layers in 4 stages, 2 exponentials for each set of positions; partitioned as inductor does."""
    exponentials = []

    def count(graph, inputs):
        exponentials.append(sum(node.target == torch.ops.aten.exp.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = timm.create_model("test_convnext_dcls_gauss", num_classes=3)
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 3, 32, 32))
    assert exponentials == [8]
