"""The engine on an NVIDIA card: values of Triton's kernels, and when measuring is off. `make gpu` runs these."""

import pytest
import torch

from timm_contconv import ops

from .reference import check

pytestmark = pytest.mark.gpu

TILES = [name for name in ops.algorithms() if name.startswith("triton")]
SHAPES = [
    # batch, channels, size, kernel, stride, padding
    (3, 8, (56, 56), (23, 23), (1, 1), (11, 11)),
    (5, 8, (7, 7), (51, 51), (1, 1), (25, 25)),
    (2, 8, (14, 13), (7, 6), (2, 3), (3, 1)),
    (2, 8, (300,), (257,), (1,), (256,)),
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tensors(shape, dtype=torch.float32, **settings):
    batch, channels, size, kernel, *geometry = shape
    x = torch.randn(batch, channels, *size, dtype=dtype, device="cuda")
    weight = torch.randn(channels, 1, *kernel, dtype=dtype, device="cuda")
    return x.contiguous(**settings), weight, torch.randn(channels, dtype=dtype, device="cuda"), *geometry, channels


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TILES)
def test_the_three_passes_against_float64(name, shape, dtype):
    if not check(name, tensors(shape, dtype), TOLERANCES[dtype]):
        pytest.skip("the tile is too wide for these images")


@pytest.mark.parametrize("name", TILES)
def test_channels_last_images(name):
    assert check(name, tensors(SHAPES[0], memory_format=torch.channels_last))


def test_a_card_is_measured_once():
    x, weight, *rest = tensors((16, 64, (28, 28), (17, 17), (1, 1), (8, 8)), torch.bfloat16)
    with ops.measuring(True):
        known = len(ops.choices())
        for _ in range(2):
            y = ops.conv(x, weight, *rest)
        (choice,) = ops.choices()[known:]
    assert {"pytorch", "channels_last"} < choice.seconds.keys()
    assert any(name.startswith("triton") for name in choice.seconds)
    assert choice.seconds[choice.algorithm] == min(choice.seconds.values())
    exact = torch.nn.functional.conv2d(x.float(), weight.float(), rest[0].float(), 1, 8, 1, 64)
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=0.5)


def test_nothing_is_measured_while_a_graph_is_captured():
    x, weight, *rest = tensors((16, 64, (26, 26), (17, 17), (1, 1), (8, 8)))
    torch.nn.functional.conv2d(x, weight, rest[0], 1, 8, 1, 64)  # loads libraries
    graph = torch.cuda.CUDAGraph()
    with ops.measuring(True), torch.no_grad():
        known = len(ops.choices())
        with torch.cuda.graph(graph):
            y = ops.conv(x, weight, *rest)
        assert len(ops.choices()) == known
    graph.replay()
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), rest[0].double(), 1, 8, 1, 64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=0.2)  # PyTorch may have used TF32


def test_nothing_is_measured_where_waiting_is_an_error():
    x, weight, *rest = tensors((16, 64, (27, 27), (17, 17), (1, 1), (8, 8)))
    with ops.measuring(True), torch.no_grad():
        known = len(ops.choices())
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.conv(x, weight, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(ops.choices()) == known


def test_a_compiled_model_with_cuda_graphs():
    x, weight, *rest = tensors(SHAPES[0], torch.bfloat16)
    compiled = torch.compile(lambda x: ops.conv(x, weight, *rest), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad(), ops.algorithm("triton_4x32"):
        for _ in range(4):
            torch.testing.assert_close(compiled(x).clone(), ops.conv(x, weight, *rest))
