"""ContinuousConv2d copied, pickled, traced, exported, compiled, and built on the meta device."""

import pytest
import torch
from torch import Tensor, nn

from timm_contconv.layers import ContinuousConv2d

from ...helpers import slow_but
from .builders import build, images, three_ways


class Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = build(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x, 0.61), self.layer(x, size=(5, 7)), self.layer(x[0], scale=2, size=9), self.layer(x[1])


def test_calls_with_scales_and_sizes_are_nodes_of_a_traced_graph() -> None:
    model, x = Resizing(), images()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"] * 4


@pytest.mark.slow
@three_ways
def test_exported_with_sizes_that_change(scale: float) -> None:
    layer, sizes = build(scale), dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(layer, (images(2, 4, 24, 24),), dynamic_shapes=(sizes,)).module()
    x = images(3, 4, 30, 22)
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(
    ("scale", "memory_limit"),
    slow_but([(0.5, None), (0.75, None), (0.61, None), (0.61, 1)], (0.5, None), (0.61, None)),
)
def test_compiled_in_one_graph_with_the_same_gradients(scale: float, memory_limit: int | None) -> None:
    torch._dynamo.reset()
    layer, x = build(scale, memory_limit=memory_limit).train(), images(1, 4, 4, 5, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("scale", [0.5, 0.61], ids=["strided", "features first"])
def test_one_compiled_graph_serves_images_of_any_size(scale: float) -> None:
    torch._dynamo.reset()
    layer = build(scale)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((9, 12), (14, 20)):
        x = images(1, 4, *size)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kernel_size", slow_but([3, 4], 3))
def test_symbolic_sizes_stay_simple_from_layer_to_layer(kernel_size: int) -> None:
    """Nested fractions took Inductor longer than ten minutes to simplify."""
    torch._dynamo.reset()
    layers, plain = ([make(1, 1, kernel_size, 2) for _ in range(4)] for make in (ContinuousConv2d, nn.Conv2d))
    longest = {}
    for name, model in (("ours", nn.Sequential(*layers)), ("plain", nn.Sequential(*plain))):
        shapes: list[str] = []

        def backend(graph: torch.fx.GraphModule, inputs: object, shapes: list[str] = shapes) -> torch.fx.GraphModule:
            values = [node.meta.get("example_value") for node in graph.graph.nodes]
            shapes.extend(str(value.shape) for value in values if isinstance(value, Tensor))
            return graph

        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
        for size in ((64, 96), (128, 80)):
            compiled(torch.randn(1, 1, *size))
        longest[name] = max(map(len, shapes))
    assert longest["ours"] <= 1.5 * longest["plain"]


@pytest.mark.slow
def test_compiled_for_output_sizes_that_change() -> None:
    torch._dynamo.reset()
    layer, x = build(0.5), images()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for size in ((4, 5), (7, 8), (9, 3)):
        torch.testing.assert_close(compiled(x, size=size), layer(x, size=size))


@pytest.mark.slow
def test_construction_compiles() -> None:
    layer, x = build(0.75, compile=True), images()
    expected = build(0.75)
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), expected(x))
