"""In compiled training all kernels of a model are cropped alike, so that few graphs serve it."""

import pytest
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers.flex import FlexConv1d

from .oracle import make, set_mask_

STEPS = 8


def test_masks_that_move_by_themselves_compile_a_model_four_times_at_most():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = nn.Sequential(*[make(kernel_size=17, padding=8) for _ in range(3)])
    tcc.constrain_(model)
    compiled, x = torch.compile(model, fullgraph=True, backend=backend), torch.randn(2, 8, 9, 9)
    for widest in torch.linspace(0.1, 0.9, STEPS).tolist():
        for layer in model:
            set_mask_(
                layer, torch.empty(2).uniform_(-0.3, 0.3).tolist(), torch.empty(2).uniform_(0.05, widest).tolist()
            )
        tcc.constrain_(model)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    assert 2 <= len(graphs) <= 4


@pytest.mark.parametrize(("sigma", "size"), [(0.05, 9), (0.35, 17), (0.5, 25), (2.0, 33)])
def test_causal_kernels_keep_their_newest_quarters(sigma, size):
    """A mask of sigma at the newest pixel of 33 reaches 2.146 * sigma * 16 pixels back."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(n.args[1].meta["example_value"].shape[2] for n in graph.graph.nodes if "conv" in str(n.target))
        return graph

    torch._dynamo.reset()
    layer = FlexConv1d(2, 2, 33, groups=2)
    with torch.no_grad():
        layer.kernel.mask_sigma.fill_(sigma)
    tcc.constrain_(layer)
    x = torch.randn(1, 2, 40)
    torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x), atol=1e-4, rtol=1e-4)
    assert sizes == [size]
