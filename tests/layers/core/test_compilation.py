"""torch.compile and torch.export: of kernel construction, one compilation per method and kernel size; of layers."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import timm_contconv  # noqa: F401 - registers the models
from tests.helpers import LAYERS, every_layer, image_for, slow_but, spread_
from tests.models_for_tests import layers_of
from timm_contconv.layers import DclsConv2d, FlexConv2d, SmpConv2d


def make(channels: int, size: int = 7, count: int = 5, interpolation: str = "gauss") -> DclsConv2d:
    return DclsConv2d(
        channels, channels, size, groups=channels, kernel_count=count, interpolation=interpolation, compile=True
    )


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


# ---- kernel construction


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(make(24, interpolation="gauss"), id="gauss"),
        pytest.param(make(24, interpolation="bilinear"), id="bilinear", marks=pytest.mark.slow),
        pytest.param(make(24, interpolation="triangle"), id="triangle", marks=pytest.mark.slow),
        pytest.param(SmpConv2d(24, 24, 7, groups=24, compile=True), id="smp", marks=pytest.mark.slow),
        pytest.param(
            FlexConv2d(24, 24, 7, groups=24, hidden_layers=1, compile=True), id="flex", marks=pytest.mark.slow
        ),
    ],
)
def test_compiled_construction_equals_eager(layer):
    spread_(layer)
    eager = copy.deepcopy(layer)
    eager.compile_construction(False)
    torch.testing.assert_close(layer.kernel(), eager.kernel(), atol=1e-6, rtol=1e-5)
    layer.kernel().square().sum().backward()
    eager.kernel().square().sum().backward()
    for (name, a), (_, b) in zip(layer.kernel.named_parameters(), eager.kernel.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_one_compilation_serves_all_widths_counts_and_modes():
    make(24).kernel().sum().backward()
    before = compilations()
    for channels in (48, 96, 768):
        make(channels).kernel().sum().backward()
    make(48, count=9).kernel()
    layer = make(48)
    layer.kernel().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.kernel()
    layer.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not layer.kernel().requires_grad
    assert layer.kernel().requires_grad
    assert not layer.requires_grad_(False).kernel().requires_grad
    assert compilations() == before


@pytest.mark.slow
def test_every_kernel_size_compiles_however_many_there_are():
    before, limit = compilations(), 1
    sizes = range(9, 9 + 2 * (limit + 2), 2)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for size in sizes:
            make(24, size, interpolation="bilinear").kernel()
    assert compilations() == before + len(sizes)


@pytest.mark.slow
def test_without_a_compiler_construction_warns_once_and_stays_eager():
    """In a process of its own, in which there is no C++ compiler."""
    script = """
import copy, warnings, torch
from timm_contconv.layers import DclsConv2d
layer = DclsConv2d(8, 8, 7, groups=8, kernel_count=5, compile=True)
eager = copy.deepcopy(layer)
eager.compile_construction(False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(layer.kernel(), eager.kernel())
print([w.category.__name__ for w in caught if "stays eager" in str(w.message)])
"""
    alone = {"CXX": "/no/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env={**os.environ, **alone}, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.stdout == "['RuntimeWarning']\n", done.stderr


# ---- layers


QUICK = ("dcls", "dcls_reflect", "smp", "flex", "genv", "cc")


@pytest.mark.parametrize(
    ("name", "needs_gradient"),
    slow_but([(name, inside) for name in LAYERS for inside in (True, False)], *((name, True) for name in QUICK)),
)
def test_a_compiled_layer_equals_eager(name, needs_gradient):
    layer = spread_(LAYERS[name]())
    x, eager = image_for(layer).requires_grad_(needs_gradient), copy.deepcopy(layer)
    outputs, gradients = [], []
    for each in (torch.compile(layer, fullgraph=True, backend="aot_eager"), eager):
        outputs.append(each(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [*each.parameters(), *[x] * needs_gradient]))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * max(1, b.abs().max().item()), rtol=1e-4)


@every_layer
def test_an_exported_layer_equals_eager(make):
    layer = spread_(make()).eval()
    x = image_for(layer)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [LAYERS["dcls"], LAYERS["smp_causal"]])
def test_a_layer_that_is_made_in_a_compiled_function_equals_eager(make):
    x = image_for(make())

    def run(x):
        torch.manual_seed(0)
        return make()(x)

    torch.testing.assert_close(torch.compile(run, backend="eager")(x), run(x))


@pytest.mark.slow
def test_a_compiled_stage_computes_its_factors_once():
    """4 layers share a set of positions, which takes 2 exponentials; partitioned as inductor does."""
    exponentials = []

    def count(graph, inputs):
        exponentials.append(sum(node.target == torch.ops.aten.exp.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    stage = timm.create_model("test_convnext_dcls_gauss", num_classes=3).stages[2]
    assert len(layers_of(stage)) == 4
    torch.compile(stage.blocks, fullgraph=True, backend=backend)(torch.randn(2, 48, 4, 4))
    assert exponentials == [2]
