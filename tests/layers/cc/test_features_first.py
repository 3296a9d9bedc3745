"""Memory: what a pass allocates, keeps for its gradient, and does with a limit."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from timm_contconv.layers.cc import ContinuousConv2d

from ...memory import peak_allocation
from .builders import build, images, three_ways


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
        self.numbers = max([self.numbers, *(value.numel() for value in tensors)])
        return result


@three_ways
def test_no_tensor_is_as_large_as_the_weights_of_all_pixels(scale: float) -> None:
    layer, x = build(scale, 4, channels=(32, 32)).train(), images(1, 32, 40, 40)
    with Largest() as largest:
        y = layer(x)
        y.sum().backward()
    assert largest.numbers < layer.in_channels * layer.out_channels * 16 * y[0, 0].numel() / 20


def saved_bytes(layer: ContinuousConv2d, x: Tensor) -> int:
    sizes = {}
    own = {value.untyped_storage().data_ptr() for value in (x, *layer.parameters())}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = layer(x)
    del y
    return sum(sizes.values())


def test_a_limit_keeps_little_more_than_the_image_for_the_backward_pass() -> None:
    layer, x = build(0.61, channels=(16, 16), memory_limit=2**30).train(), images(2, 16, 60, 60)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.net.weight)
    unlimited = saved_bytes(layer, x)
    layer.memory_limit = 500_000
    assert saved_bytes(layer, x) <= min(500_000 + 2 * x.nbytes, unlimited / 5)
    actual = torch.autograd.grad(layer(x).square().sum(), layer.net.weight)
    torch.testing.assert_close(actual, expected)


def test_a_limit_holds_for_a_batch_of_any_size() -> None:
    layer, x = build(0.61, channels=(16, 16), memory_limit=2**20), images(32, 16, 28, 28)
    with torch.no_grad():
        expected = layer(x[5:6]), layer(x[31:])
        peak = peak_allocation(lambda: layer(x))
        y = layer(x)
    torch.testing.assert_close((y[5:6], y[31:]), expected)
    assert peak <= 2 * y.nbytes + 2 * 2**20
