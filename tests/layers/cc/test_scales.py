"""Other scales for the CC layers of a whole model, for a while or averaged."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from timm_contconv.layers.cc import ContinuousConv2d, cc_scales, scale_ensemble

HALF, TURNS = [0.5, 0.5, 1], [(1, 0.25), (0.25, 1), 1]


def network(head: nn.Module | None = None) -> nn.Sequential:
    """Three CC layers that make 16 pixels 4, and a head for maps of this size."""
    convs = [ContinuousConv2d(3, 4, 3, 2), ContinuousConv2d(4, 4, 3, 2), ContinuousConv2d(4, 4, 3)]
    return nn.Sequential(*convs, head or nn.Sequential(nn.Flatten(), nn.Linear(64, 5))).eval()


class Block(nn.Module):
    """Two paths that meet, and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = ContinuousConv2d(3, 4, 3, 2), ContinuousConv2d(3, 4, 1, 2)
        self.last = ContinuousConv2d(4, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.long(x) + self.short(x)).mean((2, 3))


def scales_of(model: nn.Module) -> list:
    return [module.scale for module in model.modules() if isinstance(module, ContinuousConv2d)]


def test_scales_are_given_by_name_or_in_order_and_taken_back() -> None:
    model, x = network(), torch.randn(1, 3, 16, 16)
    own = scales_of(model)
    with torch.no_grad():
        before = model(x)
        with cc_scales(model, TURNS) as scaled:
            assert scaled is model
            assert model[0](x).shape[2:] == (16, 4)
            by_order = model(x)
        with cc_scales(model, {"0": TURNS[0], "1": TURNS[1]}):
            assert torch.equal(model(x), by_order)
        assert torch.equal(model(x), before)
    assert not torch.equal(by_order, before)
    with pytest.raises(RuntimeError), cc_scales(model, [0.75] * 3):
        model(x)
    assert scales_of(model) == own


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"9": 1}, r"scales\['9'\]: no CC layer; there are 0, 1, 2"),
        ({"3": 1}, r"scales\['3'\]: no CC layer"),
        ([1, 1], "expected 3 of them"),
        (0.5, "scales=0.5: expected 3 of them"),
        ({"0": 1, "1": 1e9}, r"scales\['1'\]=1000000000.0: expected a number"),
    ],
)
def test_wrong_scales_are_named_and_change_nothing(scales, message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message), cc_scales(model, scales):
        pytest.fail("entered")
    assert scales_of(model)[0] == (Fraction(1, 2),) * 2


def test_an_ensemble_is_the_mean_over_its_sequences() -> None:
    model, x = network(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        with cc_scales(model, TURNS):
            expected = (expected + model(x)) / 2
        torch.testing.assert_close(scale_ensemble(model, [{}, TURNS])(x), expected)


def test_an_ensemble_of_a_network_with_parallel_paths() -> None:
    model, x, other = Block().eval(), torch.randn(1, 3, 16, 16), {"long": 0.25, "short": 0.25, "last": 1}
    with torch.no_grad():
        with cc_scales(model, other):
            expected = model(x)
        torch.testing.assert_close(scale_ensemble(model, [other])(x), expected)
    with pytest.raises(ValueError, match=r"sequences\[0\]: its sizes do not fit (.|\n)*long: 16×16 -> 4×4"):
        scale_ensemble(model, [{"long": 0.25}])(x)


def test_a_sequence_of_another_product_is_refused_with_the_sizes() -> None:
    x, lost = torch.randn(1, 3, 16, 16), {"0": 0.02, "1": 12.5}
    with pytest.raises(ValueError, match=r"sequences\[1\]: its sizes do not fit") as error:
        scale_ensemble(network(), [{}, lost])(x)
    assert "0: 16×16 -> 1×1\n  1: 1×1 -> 13×13" in str(error.value)
    any_size = network(nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match=r"sequences\[1\]: the last CC layer's output has 13×13 pixels, expected 4×4"):
        scale_ensemble(any_size, [{}, lost])(x)


def test_several_threads_may_use_an_ensemble() -> None:
    model, x = network(), torch.randn(1, 3, 16, 16)
    own, ensemble = scales_of(model), scale_ensemble(model, [HALF, TURNS])

    @torch.no_grad()
    def outputs(_: int) -> list[Tensor]:
        return [ensemble(x) for _ in range(10)]

    (expected, *_) = outputs(0)
    with ThreadPoolExecutor(3) as pool:
        for y in itertools.chain(*pool.map(outputs, range(3))):
            torch.testing.assert_close(y, expected)
    assert scales_of(model) == own


@pytest.mark.parametrize("sequences", [[], 0.5, {"0": 1}])
def test_sequences_come_in_a_list(sequences) -> None:
    with pytest.raises(ValueError, match=r"sequences=.*: expected at least one"):
        scale_ensemble(network(), sequences)


def test_what_an_ensemble_can_not_average_is_refused() -> None:
    with pytest.raises(ValueError, match="model: it is in training mode"):
        scale_ensemble(network().train(), [{}])(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="this Sequential holds no ContinuousConv2d"):
        scale_ensemble(nn.Sequential(nn.Conv2d(3, 3, 3)), [{}])


@pytest.mark.parametrize("count", [3, 4])
def test_an_ensemble_can_take_the_median(count: int) -> None:
    model, x = network(), torch.randn(2, 3, 16, 16)
    sequences = [HALF, TURNS, [(0.25, 1), (1, 0.25), 1], [0.25, 1, 1]][:count]
    with torch.no_grad():
        outputs = [scale_ensemble(model, [scales]).eval()(x).double().numpy() for scales in sequences]
        found = scale_ensemble(model, sequences, "median").eval()(x)
    np.testing.assert_allclose(found.numpy(), np.median(outputs, axis=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="aggregate='mode': expected one of mean, median"):
        scale_ensemble(model, sequences, "mode")
